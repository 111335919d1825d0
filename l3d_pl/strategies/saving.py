"""Checkpoints of the strategies that hold V in pieces: each resumes the others', on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy

from l3d_pl.checkpoints import Stored, load_sharded, save_sharded


class ShardedCheckpoints(ParallelStrategy):
    """Every rank writes and reads what it holds (`l3d_pl.checkpoints`); the parent's own form is not used.

    A strategy says in `lightning_module_state_dict` and `optimizer_state` what its ranks hold, as DTensors, and reads
    its optimizer's state from `stored` in `load_optimizer_state_dict`.
    """

    stored: Stored | None = None  # the checkpoint that is being read

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        save_sharded(checkpoint, Path(self.broadcast(filepath)))

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The data's state has to be there before `setup`, whose optimizers ask for the number of batches."""
        return False

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        self.precision_plugin.convert_module(self.lightning_module)  # as `setup` will: no digit is lost on the way
        self.stored = load_sharded(Path(self.broadcast(checkpoint_path)), self.lightning_module)
        return self.stored.content

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """`load_checkpoint` has filled it."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def take_stored(self) -> Stored:
        """The checkpoint that is being read, for the last time."""
        stored, self.stored = self.stored, None
        assert stored is not None
        return stored
