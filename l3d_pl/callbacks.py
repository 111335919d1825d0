"""What surrounds the training loop: when checkpoints are written, exact resume, stop on a signal, the export."""

import csv
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from l3d_pl.checkpoints import NotSaved, aside_of, make_older, newest_and_previous, remove, together
from l3d_pl.errors import L3DError
from l3d_pl.export import export_decomposition
from l3d_pl.parallel import Ranks
from l3d_pl.resumable import Resumable, random_states, set_random_states


class Stopped(Exception):
    """A run ended early, on request, with everything saved."""


@rank_zero_only
def say(text: str) -> None:
    """One line for who reads the job's log (`warnings` would say the same thing only once)."""
    print(f"l3d: {text}", file=sys.stderr, flush=True)


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
    `can_resume_here`). One that cannot be written (a full disk) is said, and tried again when the next is due.

    Args:
        every_n_train_steps: steps between checkpoints.
        keep: how many earlier ones stay beside the newest: `last.ckpt.previous`, `last.ckpt.previous.2`, ...
    """

    def __init__(self, every_n_train_steps: int = 500, keep: int = 1):
        for key, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if value < 1:
                raise L3DError(f"{key}: found {value}; at least 1 is needed")
        self.keep = keep
        self._failed_at: int | None = None  # step at which the newest one could not be written
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # What a resumed run starts from is saved: another one in its first step would count as progress to a batch
        # script that gives up where there is none, and push an older one out.
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        every, before = self._every_n_train_steps, max(self._last_global_step_saved, self._failed_at or 0)
        if trainer.global_step // every > before // every and can_resume_here(trainer):
            write_logs(trainer)
            self.try_to_save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self.try_to_save(trainer)

    def try_to_save(self, trainer: L.Trainer) -> None:
        """`save_now`; where that fails, the run goes on."""
        failed_before = self._failed_at is not None
        try:
            self.save_now(trainer)
        except NotSaved as error:
            if not failed_before:
                say(f"after step {trainer.global_step}: {error}; going on, to be tried again with each that is due")
        else:
            if failed_before:
                say(f"after step {trainer.global_step}: checkpoints can be written again")

    def save_now(self, trainer: L.Trainer) -> str:
        """Write the checkpoint at once; returns its path.

        Raises:
            NotSaved: it cannot be written; on all ranks, and the one before it is kept.
        """
        saved, error = self._last_global_step_saved, None
        last = Path(str(self.dirpath), "last.ckpt")
        try:
            together(Ranks.of_run(), lambda: make_older(last, self.keep) if trainer.is_global_zero else None)
        except L3DError as caught:
            self._failed_at = trainer.global_step
            raise NotSaved(f"checkpoint: {last} cannot be written ({caught}); the one before it is kept") from caught
        try:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        except NotSaved as caught:
            error = str(caught)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # in which the ranks that write nothing are waiting
        if error := trainer.strategy.broadcast(error):
            self._last_global_step_saved, self._failed_at = saved, trainer.global_step
            raise NotSaved(error)
        self._failed_at = None
        return self.best_model_path

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        found = newest_and_previous(Path(trainer.default_root_dir, "checkpoints", "last.ckpt"))
        return {str(path) for path in found[:1]}  # killed in between, only the one before is there


class RandomState(Callback):
    """Saves the global random states of torch, NumPy and Python, and where a plain loader stands within its epoch.

    Lightning restores neither: a target with dropout, a shuffled `DataLoader` or a data set that draws numbers would go
    on differently. Each rank has its own, and takes up its own again; where there are more ranks than before, the new
    ones keep theirs.
    """

    def __init__(self) -> None:
        self._pending: Mapping[str, Any] | None = None
        self._loaders: list[Resumable] = []
        self._taken, self._is_last = 0, False  # batches of this epoch, and whether that was the last

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._loaders, process = [], trainer.strategy.process_dataloader

        def resumable(loader: Any) -> Any:
            loader = process(loader)
            return self._resumable(loader) if trainer.training and not hasattr(loader, "state_dict") else loader

        # The one place where Lightning hands out a loader as it will be used, with the sampler for this rank.
        trainer.strategy.process_dataloader = resumable  # type: ignore[method-assign,assignment]

    def _resumable(self, given: Any) -> Resumable:
        loader = Resumable(given)
        places = [] if self._pending is None else self._pending.get("loaders", [])
        if len(self._loaders) < len(places):
            assert self._pending is not None
            loader.resume(places[len(self._loaders)], self._pending)
        self._loaders.append(loader)
        return loader

    def state_dict(self) -> dict[str, Any]:
        places = [loader.place(self._taken, self._is_last) for loader in self._loaders]
        return {"ranks": Ranks.of_run().gather(random_states() | {"loaders": places})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states, rank = state_dict["ranks"], Ranks.of_run().rank
        self._pending = states[rank] if rank < len(states) else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._taken, self._is_last = batch_idx + 1, trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        state, self._pending = self._pending, None
        if state is not None and not any(loader.is_resumed for loader in self._loaders):  # (those have done it by now)
            set_random_states(state)


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
        write_logs(trainer)
        try:
            saved = checkpoints[0].save_now(trainer) if checkpoints else "nothing (no Checkpoints callback)"
        except NotSaved as error:
            saved = f"nothing ({error})"
        raise Stopped(f"{self._received or 'a signal to another rank'} after step {trainer.global_step}: saved {saved}")


def write_logs(trainer: L.Trainer) -> None:
    """This step's figures, which Lightning writes only after the callbacks: killed in between, none would be lost.

    On the disk before the checkpoint is: the steps before it are not made again.
    """
    trainer._logger_connector.update_train_step_metrics()
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.flush()


class ExportDecomposition(Callback):
    """At the end of a fit, `<default_root_dir>/decomposition/`: what `Decomposition.from_pretrained` reads.

    Where V is sharded no rank has room for all of it: it goes through a checkpoint without moments, which all ranks
    write at once and the first one then reads piece by piece.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.ensure_validated()  # type: ignore[operator]
        folder = Path(trainer.default_root_dir, "decomposition")
        if pl_module.device_mesh is None:
            if trainer.is_global_zero:
                figures = {"steps": trainer.global_step}
                pl_module.decomposition(figures=figures).save_pretrained(folder)  # type: ignore[operator]
            return
        aside = aside_of(folder)
        trainer.save_checkpoint(aside, weights_only=True)
        try:
            together(Ranks.of_run(), lambda: export_decomposition(aside, folder) if trainer.is_global_zero else None)
        finally:
            if trainer.is_global_zero:
                remove(aside)


class Rows(ExperimentWriter):
    """`metrics.csv`, whole at any moment: Lightning's own is deleted at each start, and truncated for a new column.

    Rows that cannot be written (a full disk) wait for the next ones.
    """

    def __init__(self, log_dir: str):
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self._columns: list[str] = []  # of the file
        self._failed = False

    def _check_log_dir_exists(self) -> None:
        """What is there stays there until `keep`."""

    def rows(self) -> list[dict[str, str]]:
        """Those in the file, without one that is half written, which a lost machine leaves behind."""
        if not self.path.is_file():
            return []
        with open(self.path, newline="") as file:
            whole = [line for line in file if line.endswith("\n")]
        return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(whole) if row.get("step")]

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Make these the file's rows."""
        self._columns = sorted({name for row in rows for name in row})
        aside = self.path.with_name(f".{self.path.name}.writing")
        with open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)

    def save(self) -> None:
        if not self.metrics:
            return
        columns, size = self._columns, self.path.stat().st_size if self.path.is_file() else 0
        try:
            if {name for row in self.metrics for name in row} <= set(columns):
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, columns).writerows(self.metrics)
            else:
                self.keep([*self.rows(), *self.metrics])
        except OSError as error:
            self._columns = columns
            if self.path.is_file():
                os.truncate(self.path, size)  # no half row
            if not self._failed:
                say(f"{self.path} cannot be written ({error.strerror}); its next rows are kept in memory")
            self._failed = True
            return
        self.metrics, self._failed = [], False

    def flush(self) -> None:
        """Write what there is, and onto the disk."""
        self.save()
        if self.path.is_file():
            with open(self.path, "a") as file:
                os.fsync(file.fileno())


class RunLogger(CSVLogger):
    """`<save_dir>/metrics.csv`, one file over all resumes of a run.

    Rows up to the checkpoint's step are kept, later ones go.

    Args:
        save_dir: the run's directory.
        flush_logs_every_n_steps: steps between writes.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100):
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._last: tuple[Any, ...] = ()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if (step, *metrics) != self._last:  # or `write_logs` has had them before
            super().log_metrics(metrics, step)
        self._last = (step, *metrics)

    def keep_until(self, step: int) -> None:
        """Take over the rows of an earlier part of this run, up to `step`."""
        rows = self.experiment
        rows.keep([row for row in rows.rows() if int(row["step"]) < step])

    @rank_zero_only
    def flush(self) -> None:
        self.experiment.flush()

    @property
    @rank_zero_experiment
    def experiment(self) -> Rows:
        if self._experiment is None:
            self._experiment = Rows(self.log_dir)
        assert isinstance(self._experiment, Rows)
        return self._experiment


class ContinueLogs(Callback):
    """Tells who reads along, and the `RunLogger`s, where a resumed run goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step:
            say(f"goes on after step {trainer.global_step}")
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger) and trainer.is_global_zero:
                logger.keep_until(trainer.global_step)
