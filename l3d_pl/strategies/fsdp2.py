"""Strategy `fsdp2`: a mesh of data x subnetworks, on Lightning's `ModelParallelStrategy`; V are DTensors.

    trainer:
      strategy:
        class_path: l3d_pl.strategies.fsdp2.FSDP2Strategy
        init_args: {data_parallel_size: 2, tensor_parallel_size: 4}

The tensor-parallel axis is that of the subnetworks: each of its ranks owns n_v / N of V_in, V_out, their gradients and
AdamW's moments (`l3d_pl.sharded` has the step). Ranks along the data axis hold the same shard, and see other samples.
By its name alone, `--trainer.strategy fsdp2`, subnetworks are sharded within a node, and every node is a replica.

It runs on CUDA, and on CPU with gloo.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from l3d_pl.checkpoints import load_optimizers
from l3d_pl.errors import L3DError
from l3d_pl.strategies.saving import ShardedCheckpoints


class FSDP2Strategy(ShardedCheckpoints, ModelParallelStrategy):
    """V_in and V_out sharded by subnetwork.

    Args:
        data_parallel_size: replicas of every shard; "auto": the number of nodes.
        tensor_parallel_size: shards; "auto": the devices of a node.

    Raises:
        L3DError: sizes whose product is not the number of ranks; precision 16-mixed.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        **kwargs: Any,
    ):
        super().__init__(data_parallel_size, tensor_parallel_size, **kwargs)

    def _configure_launcher(self) -> None:
        """Lightning calls this when everything about the trainer is known, before other processes are started."""
        check_precision(self.precision_plugin.precision)
        super()._configure_launcher()

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        data = self.num_nodes if self._data_parallel_size == "auto" else self._data_parallel_size
        shards = self.num_processes if self._tensor_parallel_size == "auto" else self._tensor_parallel_size
        if data * shards != ranks:
            raise L3DError(
                f"trainer.strategy fsdp2: found data_parallel_size {data} x tensor_parallel_size {shards}, allowed is "
                f"a product of {ranks}, the number of ranks ({self.num_nodes} nodes x {self.num_processes} devices)"
            )
        super().setup_environment()

    # Every rank's part as it is: nothing is gathered to be saved.
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        load_optimizers(self.take_stored(), self.optimizers)


def check_precision(precision: Any) -> None:
    """Raise for 16-mixed: its scaler would leave out a step on one shard, and not on the others."""
    if str(precision) in ("16", "16-mixed"):
        raise L3DError(
            f"trainer.precision: found {precision}; allowed under fsdp2 are 32-true, 64-true and bf16-mixed "
            "(model.autocast: fp16 runs the frozen model in float16)"
        )


def register() -> None:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description=FSDP2Strategy.__doc__, override=True)
