"""How V is spread over the processes of a run: names for `--trainer.strategy`, beside Lightning's own `ddp`.

L3D writes to V outside the optimizer (unit norms, the start, swaps and revivals). Where a strategy holds V in pieces,
or a copy of it, these pieces have to follow: so L3D writes inside `writable_parameters`, and forgets an optimizer's
past through `zero_optimizer_state`. Both are plain where a strategy has no methods of these names.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.tucker import local

NAMES = (
    *("auto", "ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
    *("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"),
)
SYNONYMS = ("single_device", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "deepspeed")


def register() -> None:
    """Make the strategies known to Lightning by name."""
    from l3d_pl.strategies import deepspeed, fsdp2

    deepspeed.register()
    fsdp2.register()


def check_strategy(strategy: Any) -> None:
    """Raise unless a strategy, or one of this name, keeps V as the method needs it.

    Others would shard the target, or V in a way that no step knows; processes that are spawned or forked would not hand
    back what they have found.
    """
    from l3d_pl.strategies.deepspeed import ZeroStrategy
    from l3d_pl.strategies.fsdp2 import FSDP2Strategy

    if isinstance(strategy, str):
        found, allowed = repr(strategy), strategy in (*NAMES, *SYNONYMS)
    else:
        found, allowed = (
            type(strategy).__name__,
            isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy, ZeroStrategy)),
        )
        if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
            found, allowed = f"{found} with start_method {strategy._start_method!r}", False
    if not allowed:
        hint = did_you_mean(strategy, NAMES) if isinstance(strategy, str) else ""
        raise L3DError(f"trainer.strategy: found {found}, allowed are {', '.join(NAMES)}{hint}")


def writable_parameters(strategy: Any) -> AbstractContextManager[None]:
    """Within it every parameter is whole and writable on every rank; all ranks write the same values."""
    own = getattr(strategy, "writable_parameters", None)
    return nullcontext() if own is None else own()


def zero_optimizer_state(strategy: Any, parameter: Tensor, index: int) -> None:
    """Zero what the optimizer has gathered about row `index` (of this rank's, where sharded) of a parameter."""
    own = getattr(strategy, "zero_optimizer_state", None)
    if own is not None:
        own(parameter, index)
        return
    for optimizer in strategy.optimizers:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                local(value)[index] = 0
