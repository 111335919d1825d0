"""What surrounds the training loop: when checkpoints are written, exact resume, stop on a signal, the export."""

import csv
import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from l3d_pl.checkpoints import make_older, newest_and_previous
from l3d_pl.errors import L3DError
from l3d_pl.parallel import Ranks


class Stopped(Exception):
    """A run ended early, on request, with everything saved."""


def can_resume_here(trainer: L.Trainer) -> bool:
    """Whether a checkpoint after the present batch is one that Lightning resumes exactly.

    Not between batches whose gradients accumulate, and not after the last batch of an epoch: what belongs to the
    epoch's end (validation, a learning rate per epoch) is then neither done nor made up for, and batches are counted
    wrongly later.
    """
    epoch = trainer.fit_loop.epoch_loop
    return not epoch._should_accumulate() and (not trainer.is_last_batch or trainer.num_training_batches == 1)


class Checkpoints(ModelCheckpoint):
    """`<default_root_dir>/checkpoints/last.ckpt`, every `every_n_train_steps` steps and at the end.

    `--ckpt_path last` finds it. A checkpoint that falls on the last batch of an epoch is written one batch later (see
    `can_resume_here`).

    Args:
        every_n_train_steps: steps between checkpoints.
        keep: how many earlier ones stay beside the newest: `last.ckpt.previous`, `last.ckpt.previous.2`, ...
    """

    def __init__(self, every_n_train_steps: int = 500, keep: int = 1):
        for key, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if value < 1:
                raise L3DError(f"{key}: found {value}; at least 1 is needed")
        self.keep = keep
        super().__init__(
            filename="last",
            every_n_train_steps=every_n_train_steps,
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        every = self._every_n_train_steps
        if trainer.global_step // every > self._last_global_step_saved // every and can_resume_here(trainer):
            self.save_now(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self.save_now(trainer)

    def save_now(self, trainer: L.Trainer) -> str:
        """Write the checkpoint at once; returns its path."""
        if trainer.is_global_zero:
            make_older(Path(str(self.dirpath), "last.ckpt"), self.keep)
        self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.best_model_path

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        found = newest_and_previous(Path(trainer.default_root_dir, "checkpoints", "last.ckpt"))
        return {str(path) for path in found[:1]}  # killed in between, only the one before is there


class RandomState(Callback):
    """Saves the global random states of torch, NumPy and Python, and puts them back before the first resumed batch.

    Lightning restores none of them; a target with dropout, or a data set that draws numbers, would go on differently.
    Each rank has its own, and takes up its own again; where there are more ranks than before, the new ones keep theirs.
    """

    def __init__(self) -> None:
        self._pending: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        # NumPy's global state is the one that there is to keep.
        name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
        state = {
            "torch": torch.get_rng_state(),
            "numpy": [
                str(name),
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                int(position),
                int(has_gauss),
                float(gauss),
            ],
            "python": list(random.getstate()),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return {"ranks": Ranks.of_run().gather(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states, rank = state_dict["ranks"], Ranks.of_run().rank
        self._pending = states[rank] if rank < len(states) else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        torch.set_rng_state(state["torch"])
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal), gauss_next))
        if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])


class StopOnSignal(Callback):
    """SIGTERM, SIGINT, SIGUSR1: finish the batch, save a checkpoint, end with `Stopped`. A second SIGINT ends at once.

    The handler only sets a flag: nothing is saved inside a signal handler, where half a step may be done. A signal to
    any rank stops all of them, after the same batch.
    """

    def __init__(self) -> None:
        self._received: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not before: Lightning has noted by now which handlers were there, and puts them back at any end."""
        self._received = None
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(signum).name

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not can_resume_here(trainer):
            return
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints)]
        saved = checkpoints[0].save_now(trainer) if checkpoints else "nothing (no Checkpoints callback)"
        trainer._logger_connector.update_train_step_metrics()  # Lightning writes this step's figures after this hook
        raise Stopped(f"{self._received or 'a signal to another rank'} after step {trainer.global_step}: saved {saved}")


class ExportDecomposition(Callback):
    """At the end of a fit, `<default_root_dir>/decomposition/`: what `Decomposition.from_pretrained` reads."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.ensure_validated()  # type: ignore[operator]
        sharded = pl_module.device_mesh is not None
        whole = pl_module.subnetworks.whole() if sharded else None  # type: ignore[operator,union-attr] # (with all ranks)
        if trainer.is_global_zero:
            figures = {"steps": trainer.global_step}
            decomposition = pl_module.decomposition(figures=figures, subnetworks=whole)  # type: ignore[operator]
            decomposition.save_pretrained(Path(trainer.default_root_dir, "decomposition"))


class RunLogger(CSVLogger):
    """`<save_dir>/metrics.csv`, one file over all resumes of a run.

    Rows up to the checkpoint's step are kept, later ones go.

    Args:
        save_dir: the run's directory.
        flush_logs_every_n_steps: steps between writes.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100):
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    def keep_until(self, step: int) -> None:
        """Take over the rows of an earlier part of this run, up to `step`."""
        self._kept = [row for row in self._old_rows if int(row["step"]) < step]
        if self._kept:
            writer = self.experiment
            writer.metrics = self._kept + writer.metrics

    @property
    def _file(self) -> Path:
        return Path(self.log_dir, "metrics.csv")

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._old_rows: list[dict[str, Any]] = []
            if self._file.is_file():
                with open(self._file, newline="") as file:
                    self._old_rows = [
                        {key: value for key, value in row.items() if value != ""}
                        for row in csv.DictReader(file)
                        if row.get("step")
                    ]
        return super().experiment


class ContinueLogs(Callback):
    """Tells the `RunLogger`s where a resumed run goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger) and trainer.is_global_zero:
                _ = logger.experiment
                logger.keep_until(trainer.global_step)
