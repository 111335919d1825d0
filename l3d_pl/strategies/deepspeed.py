"""Strategies `deepspeed_stage_1`, `_2`, `_3`: DeepSpeed's ZeRO shards the optimizer, the gradients, and V itself.

Each rank has samples of its own, as under `ddp`, and makes the step of one process with all of them. What each of N
ranks holds, in bytes, for P values of V_in and V_out together (AdamW: master copy and moments):

    stage  V     gradients  AdamW
    1      4P    4P         12P/N
    2      4P    4P/N       12P/N
    3      4P/N  4P/N       12P/N

That is not the peak: a step contracts all of V and makes all its gradients at once, so within it every stage holds
both whole, 8P. `fsdp2` shares out the step too.

DeepSpeed steps on the master copy, in flat pieces that end anywhere within a tensor (`Fragment`); the V that the method
reads, normalises and repairs is another copy. `writable_parameters` carries what is written to V over to the pieces;
without it the next step would undo it.

It runs on CUDA, and on CPU with gloo. V is float32, as DeepSpeed's master copy is.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from l3d_pl.checkpoints import Stored, together
from l3d_pl.errors import L3DError
from l3d_pl.parallel import Ranks
from l3d_pl.strategies.saving import ShardedCheckpoints


class Fragment(NamedTuple):
    """What this rank owns of one parameter: of its values in a row those from `start` on, `n` of them.

    Attributes:
        shape: of the whole parameter.
        place: where these values lie in the rank's flat master copy, and in AdamW's moments.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    start: int
    n: int
    place: slice


class ZeroStrategy(ShardedCheckpoints, DeepSpeedStrategy):
    """DeepSpeed's ZeRO for `L3D`, on CPU and CUDA.

    Args:
        stage: 1 shards the optimizer's state, 2 gradients too, 3 parameters too.
        offload_optimizer: keep master copy, gradients and moments in the host's memory, and step there.
        offload_parameters: keep the sharded parameters there too (stage 3).

    Raises:
        L3DError: DeepSpeed is not installed; a precision other than 32-true; clipping by value.
    """

    def __init__(self, stage: int = 2, offload_optimizer: bool = False, offload_parameters: bool = False) -> None:
        if find_spec("deepspeed") is None:
            raise L3DError("strategy: deepspeed is not installed; it comes with: pip install 'l3d_pl[deepspeed]'")
        if stage not in (1, 2, 3):
            raise L3DError(f"strategy: found stage {stage} of deepspeed, allowed are 1, 2, 3")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found nothing else
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            logging_batch_size_per_gpu=1,  # for its log of throughput only
        )
        assert isinstance(self.config, dict)
        self.stage = stage
        self._fragments: dict[Tensor, Fragment] = {}
        # Parameters below a threshold would stay whole on every rank.
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW: DeepSpeed's own would be compiled first

    # -- processes --------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        """Lightning calls this when everything about the trainer is known, before other processes are started."""
        if self.precision_plugin.precision != "32-true":
            raise L3DError(
                f"precision: found {self.precision_plugin.precision}; allowed under deepspeed is 32-true "
                "(model.autocast: bf16 runs the frozen model in half precision, under every strategy)"
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # the parent's own is content with CUDA only

    def setup_distributed(self) -> None:
        # DeepSpeed calls what this torch has newer names for.
        warnings.filterwarnings("ignore", ".*is deprecated.*", FutureWarning, "torch.distributed.c10d_logger")
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        import deepspeed
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        if get_accelerator().device_name() != "cpu":
            set_accelerator(CPU_Accelerator())
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    # -- set-up -----------------------------------------------------------------------------------------------------

    def init_deepspeed(self) -> None:
        """DeepSpeed's engine, where there is something to train; otherwise V is whole on every rank."""
        assert isinstance(self.model, L.LightningModule)
        trainer = self.model.trainer
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise L3DError("trainer.gradient_clip_algorithm: found value; allowed under deepspeed is norm")
        self.model_to_device()
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert isinstance(self.config, dict)
        # Lightning accumulates, and says so in `block_backward_sync`: DeepSpeed would leave out an epoch's last step.
        self.config["gradient_accumulation_steps"] = 1
        zero = self.config["zero_optimization"]  # a bucket for gradients is allocated, however few there are
        largest = max(parameter.numel() for parameter in self.model.parameters())
        # DeepSpeed's own `linear` takes the place of torch's, and no gradient rule could see it: all would be slow.
        zero["memory_efficient_linear"] = False
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], largest)
        module = self.model
        self._initialize_deepspeed_train(module)
        if self.stage == 3:
            import deepspeed

            for parameter in self._parameters():  # read by the step itself, not by a submodule's forward
                deepspeed.zero.register_external_parameter(module, parameter)
        self._fragments = {fragment.parameter: fragment for fragment in self._cut()}

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Optimizer]:
        import deepspeed

        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),  # a CPU has no index
            config=self.config,
            model=model,
            model_parameters=list(model.parameters()),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero_optimizer

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """V is made whole, and sharded by `init_deepspeed`; DeepSpeed's own context would shard what is frozen too."""
        yield

    # -- training ---------------------------------------------------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around each batch whose gradients only accumulate."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    @contextmanager
    def writable_parameters(self) -> Iterator[None]:
        """Within it every parameter is whole on every rank; what all ranks have written to it then is what counts."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(self._parameters(), enabled=self.stage == 3):
            yield
            with torch.no_grad():
                for fragment in self._fragments.values():
                    own = fragment.parameter.view(-1)[fragment.start : fragment.start + fragment.n]
                    self._master[fragment.place].copy_(own)
                    if self.stage == 3:
                        fragment.parameter.ds_tensor[: fragment.n].copy_(own)  # type: ignore[attr-defined]

    @torch.no_grad()
    def zero_optimizer_state(self, parameter: Tensor, index: int) -> None:
        """Zero AdamW's moments of row `index` of a parameter."""
        fragment = self._fragments.get(parameter)
        if fragment is not None:
            row = fragment.shape[1:].numel()
            first = max(0, index * row - fragment.start)
            last = min(fragment.n, (index + 1) * row - fragment.start)
            for moment in self._moments().values():
                moment[fragment.place][first : max(first, last)] = 0

    def on_train_end(self) -> None:
        """V is whole on every rank from here on, to be validated and exported."""
        super().on_train_end()
        if self.stage == 3:
            parameters = self._parameters()
            parameters[0].all_gather(param_list=parameters)  # type: ignore[attr-defined]

    # -- checkpoints ------------------------------------------------------------------------------------------------
    # Not DeepSpeed's own: those are pickles that only DeepSpeed reads, on as many ranks as wrote them.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Buffers, and V in rows: each rank has some of every parameter."""
        assert self.lightning_module is not None
        if self.model is self.lightning_module:  # nothing is sharded
            return self.lightning_module.state_dict()
        return self.lightning_module.state_dict() | self._in_rows(self._master)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `torch.optim.AdamW.state_dict`, with moments in rows."""
        moments = {key: list(self._in_rows(value).values()) for key, value in self._moments().items()}
        rest = {key: value for key, value in self._state().items() if key not in moments}
        (group,), n = self._zero.param_groups, len(self._parameters())
        state = {i: rest | {key: value[i] for key, value in moments.items()} for i in range(n)} if moments else {}
        return {"state": state, "param_groups": [group | {"params": list(range(n))}]}

    def _in_rows(self, flat: Tensor) -> dict[str, DTensor]:
        """{parameter's name: tensor} of the pieces that all ranks have, shared out by rows."""
        ranks, own = Ranks.of_run(), {fragment.name: fragment for fragment in self._fragments.values()}
        mesh, found = init_device_mesh(self.root_device.type, (self.world_size,)), {}
        for name, shape in self._shapes().items():
            whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=self.root_device)
            if name in own:
                whole[own[name].start : own[name].start + own[name].n] = flat.detach()[own[name].place]
            whole = ranks.sum(whole.view(torch.int32)).view(flat.dtype).view(shape)  # as integers: to the bit
            step = math.ceil(shape[0] / self.world_size)  # rows of a rank, as torch.chunk counts them
            rows = whole[self.global_rank * step : (self.global_rank + 1) * step].clone()
            found[name] = DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=whole.stride())
        return found

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        stored = self.take_stored()
        together(Ranks.of_run(), lambda: self._read_state(stored))

    @torch.no_grad()
    def _read_state(self, stored: Stored) -> None:
        """AdamW's state from a checkpoint: of each moment the rows that this rank's fragments lie in."""
        (saved,), index = stored.content["optimizer_states"], {name: i for i, name in enumerate(self._shapes())}
        for key, value in saved["state"].get(0, {}).items():
            if value.ndim == 0:
                whole = stored.rows(f"optimizer_states.0.state.0.{key}", 0, 1)
                self._state()[key] = whole.to(self._master.device, copy=True)
                continue
            self._state()[key] = flat = torch.zeros_like(self._master)
            for fragment in self._fragments.values():
                row = fragment.shape[1:].numel()
                first, last = fragment.start // row, math.ceil((fragment.start + fragment.n) / row)
                rows = stored.rows(f"optimizer_states.0.state.{index[fragment.name]}.{key}", first, last).flatten()
                flat[fragment.place] = rows[fragment.start - first * row :][: fragment.n].to(flat)
        (group,), (its,) = self._zero.param_groups, saved["param_groups"]
        group.update({key: value for key, value in its.items() if key != "params"})

    # -- pieces -----------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        assert self.lightning_module is not None
        return list(self.lightning_module.parameters())

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which holds the pieces, around torch's."""
        return self.deepspeed_engine.optimizer

    @property
    def _master(self) -> Tensor:
        """This rank's piece of the master copy: everything that it steps on, in a row."""
        groups = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        (master,) = getattr(self._zero, groups)  # one group: V has one learning rate
        return master

    def _state(self) -> dict[str, Tensor]:
        """AdamW's state of the master copy; empty before the first step."""
        return self._zero.optimizer.state[self._master]

    def _moments(self) -> dict[str, Tensor]:
        """What of it is laid out like the master copy."""
        return {name: value for name, value in self._state().items() if value.shape == self._master.shape}

    def _shapes(self) -> dict[str, torch.Size]:
        """{parameter's name: shape}, also where only a part of it is here."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in named}

    def _cut(self) -> Iterator[Fragment]:
        """What this rank owns, parameter by parameter, as DeepSpeed has laid it out."""
        shapes = self._shapes()
        for name, parameter in zip(shapes, self._parameters(), strict=True):
            if self.stage == 3:  # every parameter in N equal parts, the last one padded
                _, offset, part = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = self.global_rank * part
                n = max(0, min(part, shapes[name].numel() - start))
            else:  # all parameters in a row, cut into N equal parts
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:
                    continue
                start, n = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                offset = mapping.hp_fragment_address.start
            if n:
                yield Fragment(name, parameter, shapes[name], start, n, slice(offset, offset + n))


def register() -> None:
    """Under Lightning's names for DeepSpeed, ours: Lightning's own would undo unit norms at every step."""
    for stage in (1, 2, 3):
        description = f"DeepSpeed with ZeRO stage {stage}"
        StrategyRegistry.register(f"deepspeed_stage_{stage}", ZeroStrategy, description, override=True, stage=stage)
    StrategyRegistry.register("deepspeed", ZeroStrategy, "DeepSpeed with ZeRO stage 2", override=True)
    for stage in (2, 3):
        StrategyRegistry.register(
            f"deepspeed_stage_{stage}_offload",
            ZeroStrategy,
            f"DeepSpeed with ZeRO stage {stage}, in the host's memory",
            override=True,
            stage=stage,
            offload_optimizer=True,
            offload_parameters=stage == 3,
        )
    StrategyRegistry.pop("deepspeed_stage_3_offload_nvme", None)
