"""How V is spread over the processes of a run: names for `--trainer.strategy`, beside Lightning's own `ddp`.

L3D writes to V outside the optimizer (unit norms, the start, swaps and revivals). Where a strategy holds V in pieces,
or a copy of it, these pieces have to follow: so L3D writes inside `writable_parameters`, and forgets an optimizer's
past through `zero_optimizer_state`. Both are plain where a strategy has no methods of these names.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from l3d_pl.tucker import local


def register() -> None:
    """Make the strategies known to Lightning by name."""
    from l3d_pl.strategies import deepspeed, fsdp2

    deepspeed.register()
    fsdp2.register()


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
