"""What surrounds the loop, by itself: one log over all resumes, one checkpoint, signals, random states.

test_resume.py has them together.
"""

import contextlib
import csv
import errno
import os
import random
import resource
import signal
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch

from datamodules.toy import ToyData
from l3d_pl import L3D, L3DError, callbacks, checkpoints
from l3d_pl.callbacks import (
    Checkpoints,
    ContinueLogs,
    ExportDecomposition,
    RandomState,
    Rows,
    RunLogger,
    StopOnSignal,
    Stopped,
)
from l3d_pl.checkpoints import AtomicCheckpointIO
from l3d_pl.cli import main
from l3d_pl.targets.toy import TiedAutoencoder
from l3d_pl.targets.training import save_target
from l3d_pl.toys import quiet_trainer


class Raise(L.Callback):
    """Sends the process a signal in step `at`, `times` over; `error`: raises instead, as a killed process ends."""

    def __init__(self, at: int | None, signum: int = signal.SIGTERM, times: int = 1, error: bool = False):
        self.at, self.signum, self.times, self.error = at, signum, times, error

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.at:
            if self.error:
                raise OSError("killed")
            for _ in range(self.times):
                signal.raise_signal(self.signum)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Whatever a test leaves behind, the next one finds Python's own handlers."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def fit(root: Path, steps: int, *callbacks: L.Callback, resume: bool = False, every: int = 4) -> L.Trainer:
    torch.manual_seed(7)
    target = TiedAutoencoder(5, 2)
    trainer = L.Trainer(
        max_steps=steps,
        default_root_dir=root,
        accelerator="cpu",
        logger=RunLogger(str(root), flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        callbacks=[
            *callbacks,
            RandomState(),
            ContinueLogs(),
            ExportDecomposition(),
            StopOnSignal(),
            Checkpoints(every_n_train_steps=every),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    # paper: a schedule that does not depend on the number of steps
    module = L3D(target, n_subnetworks=4, k=0.3, seed=3, recipe="paper")
    trainer.fit(
        module,
        ToyData(points=80, batch_size=16, seed=1, n_val=20, n_test=20),
        ckpt_path="last" if resume else None,
        weights_only=True,
    )
    return trainer


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: writing ends half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rows_of(root: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without what depends on the clock."""
    with open(root / "metrics.csv", newline="") as file:
        rows = [
            {key: value for key, value in row.items() if value and key != "train/samples_per_second"}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row]


# -- the log -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop",
    [Raise(7), Raise(7, error=True), Raise(9), Raise(10)],
    ids=["signal", "killed", "at an epoch's end", "after it"],
)
def test_log_of_a_resumed_run_is_that_of_a_whole_one(tmp_path: Path, stop: Raise) -> None:
    """13 steps, five to an epoch, stopped in step 7, 9 or 10 (killed: three steps after the last checkpoint)."""
    fit(tmp_path / "whole", 13)
    with pytest.raises((Stopped, OSError)):
        fit(tmp_path / "stopped", 13, stop)
    fit(tmp_path / "stopped", 13, resume=True)
    expected, found = rows_of(tmp_path / "whole"), rows_of(tmp_path / "stopped")
    steps = [int(row["step"]) for row in expected if "train/loss" in row]
    assert steps == list(range(13))
    assert [int(row["step"]) for row in found if "train/loss" in row] == steps
    assert found == expected


def test_log_of_a_run_resumed_twice_and_of_a_new_one(tmp_path: Path) -> None:
    for stop in (Raise(3), Raise(8)):
        with pytest.raises(Stopped):
            fit(tmp_path, 13, stop, resume=stop.at != 3)
    fit(tmp_path, 13, resume=True)
    assert [int(row["step"]) for row in rows_of(tmp_path) if "train/loss" in row] == list(range(13))
    fit(tmp_path, 3)  # from the start, in the same folder: the old rows go
    assert [int(row["step"]) for row in rows_of(tmp_path) if "train/loss" in row] == list(range(3))


def test_killed_at_any_moment_the_log_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own is deleted at a start, truncated for a new column, and a step behind the checkpoint."""
    fit(tmp_path, 6)
    seen: list[int] = []
    replace = os.replace

    def watch(source: Any, target: Any) -> None:
        steps = [int(row["step"]) for row in Rows(str(tmp_path)).rows() if "train/loss" in row]  # what a kill leaves
        if str(target).endswith("metrics.csv"):
            seen.append(len(steps))
        if str(target).endswith("last.ckpt"):
            assert steps == list(range(torch.load(source, weights_only=True)["global_step"]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    fit(tmp_path, 13, resume=True)
    assert seen
    assert min(seen) >= 6
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("13,0.")  # a lost machine's last words
    assert [int(row["step"]) for row in Rows(str(tmp_path)).rows() if "train/loss" in row] == list(range(13))


def test_rows_that_find_no_room_are_written_later_and_none_by_half(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Rows(str(tmp_path))
    rows.log_metrics({"a": 1.0}, 0)
    rows.save()
    with room_for(rows.path.stat().st_size + 2):
        for step in (1, 2):
            rows.log_metrics({"a": 2.5}, step)
            rows.save()
            assert Rows(str(tmp_path)).rows() == [{"a": "1.0", "step": "0"}]
    rows.save()
    assert rows.path.read_text().splitlines() == ["a,step", "1.0,0", "2.5,1", "2.5,2"]
    with room_for(rows.path.stat().st_size + 2):
        rows.log_metrics({"b": 3.5}, 3)  # a new column: the file is made anew
        rows.save()
    rows.save()
    assert rows.path.read_text().splitlines() == ["a,b,step", "1.0,,0", "2.5,,1", "2.5,,2", ",3.5,3"]
    line = f"l3d: {rows.path} cannot be written (File too large); its next rows are kept in memory"
    assert capsys.readouterr().err.splitlines() == [line, line]  # once each time


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1_000, 15_000, 100_000])
def test_full_disk_is_known_whatever_torch_makes_of_it(tmp_path: Path, size: int) -> None:
    with room_for(5000), pytest.raises(OSError, match="File too large"):
        checkpoints._write(tmp_path / "x", lambda file: torch.save([torch.zeros(size), *torch.eye(50)], file))


def test_run_goes_on_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints are due after 2, 4, 6, ... steps; those of 4 and 6 find no room, nor that of a signal after 7."""
    save, attempts = torch.save, []

    def full_at_times(checkpoint: dict[str, Any], file: Any) -> None:
        attempts.append(checkpoint["global_step"])
        if checkpoint["global_step"] in (4, 6, 7):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full_at_times)
    last = f"{tmp_path}/checkpoints/last.ckpt"
    why = f"checkpoint: {last} cannot be written (No space left on device); the one before it is kept"
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, 13, Raise(6), every=2)
    assert str(stopped.value) == f"SIGTERM after step 7: saved nothing ({why})"
    assert attempts == [2, 4, 6, 7]
    assert capsys.readouterr().err.splitlines() == [
        f"l3d: after step 4: {why}; going on, to be tried again with each that is due"
    ]
    assert torch.load(last, weights_only=True)["global_step"] == 2

    fit(tmp_path, 13, resume=True, every=2)
    assert capsys.readouterr().err.splitlines() == [
        "l3d: goes on after step 2",
        f"l3d: after step 4: {why}; going on, to be tried again with each that is due",
        "l3d: after step 8: checkpoints can be written again",
    ]
    fit(tmp_path / "whole", 13)
    found, expected = (path / "decomposition/model.safetensors" for path in (tmp_path, tmp_path / "whole"))
    assert found.read_bytes() == expected.read_bytes()


def test_one_checkpoint_is_written_over_and_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[tuple[str, str, int]] = []
    replace = os.replace

    def watch(source: Any, target: Any) -> None:
        if str(target).endswith(".ckpt"):
            steps = torch.load(source, weights_only=True)["global_step"]  # whole before it takes the place
            renamed.append((Path(source).name, Path(target).name, steps))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    trainer = fit(tmp_path, 10)
    assert renamed == [(".last.ckpt.writing", "last.ckpt", step) for step in (4, 8, 10)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "last.ckpt.previous"]
    assert trainer.checkpoint_callback._find_last_checkpoints(trainer) == {str(tmp_path / "checkpoints/last.ckpt")}
    fit(tmp_path, 10, resume=True)  # already at its end: nothing to do, nothing lost
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 10
    with pytest.raises(L3DError, match="every_n_train_steps: found 0; at least 1"):
        Checkpoints(0)


def test_a_resumed_run_saves_when_the_next_one_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started from the checkpoint of step 4 it ends before that of step 8: nothing new, and nothing lost."""
    saved: list[int] = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda content, file: (saved.append(content["global_step"]), save(content, file))
    )
    for stop, resume in ((5, False), (7, True), (6, True)):
        with pytest.raises(OSError, match="killed"):
            fit(tmp_path, 13, Raise(stop, error=True), resume=resume)
    assert saved == [4]
    fit(tmp_path, 13, resume=True)
    assert saved == [4, 8, 12, 13]
    fit(tmp_path, 13, resume=True)  # at its end
    assert saved == [4, 8, 12, 13]


def test_an_error_beside_the_checkpoint_is_told_like_one_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, keep: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "make_older", full)
        fit(tmp_path, 4)
    why = f"checkpoint: {tmp_path}/checkpoints/last.ckpt cannot be written (Read-only file system)"
    assert capsys.readouterr().err.splitlines()[0].startswith(f"l3d: after step 4: {why}; the one before it is kept")


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_after_the_batch_and_gives_the_handlers_back(tmp_path: Path, signum: int) -> None:
    mine = {number: (lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in mine.items():
        signal.signal(number, handler)
    with pytest.raises(Stopped, match=rf"{signal.Signals(signum).name} after step 6: saved .*checkpoints/last\.ckpt"):
        fit(tmp_path, 13, Raise(5, signum))
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert not (tmp_path / "decomposition").exists()
    assert {number: signal.getsignal(number) for number in mine} == mine
    fit(tmp_path, 13, resume=True)
    assert {number: signal.getsignal(number) for number in mine} == mine
    assert (tmp_path / "decomposition/model.safetensors").is_file()


def test_handlers_come_back_after_an_error(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(OSError, match="killed"):
        fit(tmp_path, 13, Raise(2, error=True))
    assert {number: signal.getsignal(number) for number in before} == before


def test_second_interrupt_ends_at_once() -> None:
    stop = StopOnSignal()
    stop.on_train_start(None, None)  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGINT)  # noted, no more
    signal.raise_signal(signal.SIGTERM)  # patience
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_impatient_user_loses_only_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning makes an exit of it
        fit(tmp_path, 13, Raise(6, signal.SIGINT, times=2))
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_stopped_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("l3d_pl.report.write_report", lambda run_dir: None)
    save_target("t.safetensors", TiedAutoencoder(5, 2))
    args = [
        "fit",
        "--config",
        "tms",
        "--model.target_weights",
        "t.safetensors",
        "--trainer.enable_progress_bar",
        "false",
    ]
    args += [
        "--trainer.max_epochs",
        "2",
        "--data.init_args.steps_per_epoch",
        "5",
        "--data.init_args.n_val",
        "20",
        "--trainer.default_root_dir",
        "a run",
    ]
    stop = StopOnSignal.on_train_start

    def and_interrupt(self: StopOnSignal, trainer: L.Trainer, module: L.LightningModule) -> None:
        stop(self, trainer, module)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_train_start", and_interrupt)
        assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("l3d: SIGINT after step 1: saved ")
    _, command = lines[0].split("; go on with: l3d ")
    assert command == "fit --config 'a run/config.yaml' --ckpt_path last"
    sort = jsonargparse._typehints.sort_unions_in_typehint

    def as_cached(hint: Any) -> Any:
        """Lightning's `str | Path | None` as typing may have it in its cache."""
        for clear in typing._cleanups:  # type: ignore[attr-defined]
            clear()
        return typing.Union[Path, str, None] if hint == typing.Union[str, Path, None] else sort(hint)  # noqa: UP007

    monkeypatch.setattr("jsonargparse._typehints.sort_unions_in_typehint", as_cached)
    assert main(["fit", "--config", "a run/config.yaml", "--ckpt_path", "last"]) == 0
    assert torch.load("a run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 10


# -- random states -----------------------------------------------------------------------------------------------------


def draw() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), np.random.random(), np.random.normal(), random.gauss(0, 1)  # noqa: NPY002


def test_random_states_make_the_round_trip_through_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1), np.random.seed(2), random.seed(3)  # noqa: NPY002
    draw()  # an odd number of normal draws leaves a second one in store
    AtomicCheckpointIO().save_checkpoint({"state": RandomState().state_dict()}, tmp_path / "x.ckpt")
    expected = draw()
    torch.manual_seed(4), np.random.seed(5), random.seed(6)  # noqa: NPY002
    callback = RandomState()
    callback.load_state_dict(AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")["state"])
    assert draw() != expected  # only at the first batch: what comes before may draw as it likes
    trainer = quiet_trainer(max_steps=1)
    callback.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
    assert draw() == expected
    callback.on_train_batch_start(trainer, None, None, 1)  # type: ignore[arg-type]
    assert draw() != expected  # once
