"""Callbacks for runs that are to be interrupted; the runs find this module in their working directory."""

import os
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Slow(Callback):
    """So many seconds more for each batch, in the first so many starts of the job."""

    def __init__(self, seconds: float = 0.05, starts: int = 1):
        self.seconds = seconds if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < starts else 0

    def on_train_batch_start(self, *_: object) -> None:
        time.sleep(self.seconds)


class Paced(Callback):
    """So many seconds more for each batch, until the file `go` is there."""

    def __init__(self, go: str, seconds: float = 0.2):
        self.go, self.seconds = Path(go), seconds

    def on_train_batch_start(self, *_: object) -> None:
        if not self.go.exists():
            time.sleep(self.seconds)


class Hang(Callback):
    """A batch that never ends, until the file `go` is there."""

    def __init__(self, step: int, go: str):
        self.step, self.go = step, Path(go)

    def on_train_batch_start(self, trainer: object, *_: object) -> None:
        while trainer.global_step == self.step and not self.go.exists():  # type: ignore[attr-defined]
            time.sleep(0.1)
