"""Invariant 5: a run stopped anywhere and resumed equals the uninterrupted run bit for bit."""

import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from processes import l3d
from torch.utils.data import DataLoader, Dataset, IterableDataset

from datamodules.toy import ToyData
from l3d_pl import L3D, L3DError
from l3d_pl.callbacks import Checkpoints, ExportDecomposition, RandomState, StopOnSignal, Stopped
from l3d_pl.checkpoints import AtomicCheckpointIO
from l3d_pl.targets.toy import TiedAutoencoder
from l3d_pl.toys import quiet_trainer

SETTINGS = {
    "default": {},
    "all repairs": {"restarts": 2, "revive_every": 7, "dead_after": 64, "aux_coefficient": 1 / 32, "swap_every": 5},
    "paper": {"recipe": "paper", "dense_epochs": 1, "lr_step_epochs": 1},
}


def fit(
    root: Path,
    steps: int,
    resume: bool = False,
    stop_at: int | None = None,
    points: int | None = 100,
    weight: float = 1.0,
    loader: Callable[[], Any] | None = None,
    draws: bool = True,
    **settings,
) -> L3D:
    """A fit of a little TMS; `stop_at` sends the process a SIGTERM in that step. `loader`: makes other data."""
    torch.manual_seed(7)
    target = TiedAutoencoder(5, 2)
    target.load_state_dict({"W_in": weight * torch.randn(5, 2), "b": torch.zeros(5)})
    L.seed_everything(99 if resume else 7, verbose=False)  # a resumed process has other global random states

    class Stopper(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == stop_at:
                signal.raise_signal(signal.SIGTERM)

        def on_train_batch_end(self, *_: object) -> None:
            if draws:
                torch.rand(()), random.random()  # as a target with dropout draws in every step

    trainer = quiet_trainer(
        max_steps=steps,
        default_root_dir=root,
        callbacks=[
            Stopper(),
            RandomState(),
            StopOnSignal(),
            ExportDecomposition(),
            Checkpoints(every_n_train_steps=1000),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True,
    )
    module = L3D(target, n_subnetworks=4, seed=3, init_samples=60, **settings)
    data: Any = ToyData(points=points, batch_size=16, steps_per_epoch=7, seed=1, n_val=20, n_test=20)
    trainer.fit(module, data if loader is None else loader(), ckpt_path="last" if resume else None, weights_only=True)
    return module


def state_of(module: L3D) -> dict[str, torch.Tensor]:
    return {**module.state_dict(), "mean_reference": module.mean_reference}


@pytest.mark.parametrize("points", [100, None], ids=["fixed points", "fresh data"])
@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_anywhere_and_resumed_is_bit_for_bit_the_uninterrupted_run(
    tmp_path: Path, name: str, points: int | None
) -> None:
    expected = state_of(fit(tmp_path / "whole", 20, points=points, **SETTINGS[name]))
    # The first step, mid-epoch, both sides of an epoch's border (7 batches each), and two stops in a row across one.
    for stops in ((0,), (3,), (6,), (7,), (13, 16)):
        root = tmp_path / f"stopped{stops}"
        for number, stop_at in enumerate(stops):
            # After an epoch's last batch nothing is saved: the stop waits for the first of the next.
            last = stop_at + 2 if stop_at % 7 == 6 else stop_at + 1
            with pytest.raises(Stopped, match=f"after step {last}:"):
                fit(root, 20, resume=number > 0, stop_at=stop_at, points=points, **SETTINGS[name])
        found = state_of(fit(root, 20, resume=True, points=points, **SETTINGS[name]))
        different = [key for key, value in expected.items() if not torch.equal(value, found[key])]
        assert not different, f"after stops in steps {stops}"


class Noisy(Dataset[torch.Tensor]):
    """Rows of which each is another at every reading."""

    def __len__(self) -> int:
        return 112

    def __getitem__(self, row: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(row)
        return torch.rand(5, generator=generator) * (torch.rand(5) < 0.4) * np.random.random() * random.random()  # noqa: NPY002


class Stream(IterableDataset[torch.Tensor]):
    """Rows in an order of its own, and nobody knows how many."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = Noisy()
        for row in torch.randperm(112).tolist():
            torch.manual_seed(row)
            yield rows[row]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), 16, shuffle=True),
    "a generator of its own": lambda: DataLoader(
        torch.rand(112, 5, generator=torch.Generator().manual_seed(1)),  # type: ignore[arg-type]
        16,
        shuffle=True,
        generator=torch.Generator().manual_seed(5),
    ),
    "a worker": lambda: DataLoader(Noisy(), 16, shuffle=True, num_workers=1),
    "a stream": lambda: DataLoader(Stream(), 16),
}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("name", LOADERS)
def test_a_plain_loader_goes_on_where_it_stood(tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {
        "loader": LOADERS[name],
        "swap_samples": 60,
        "swap_every": 3,
        "revive_every": 4,
        "dead_after": 32,
    }
    settings["draws"] = name != "a stream"  # (one of its batches is read ahead: see `Resumable`)
    expected = state_of(fit(tmp_path / "whole", 20, **settings))
    for stops in ((0,), (3,), (9, 12)):
        root = tmp_path / f"stopped{stops}"
        for number, stop_at in enumerate(stops):
            with pytest.raises(Stopped):
                fit(root, 20, resume=number > 0, stop_at=stop_at, **settings)
        found = state_of(fit(root, 20, resume=True, **settings))
        del found["held_out_loss"], found["mean_reference"]  # there is no held-out data
        different = [key for key, value in found.items() if not torch.equal(value, expected[key])]
        assert not different, f"after stops in steps {stops}"


def test_checkpoint_holds_no_target_weights_and_is_refused_by_another_target(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "target" in name]
    assert len(checkpoint["l3d"]["target_fingerprint"]) == 64
    with pytest.raises(L3DError, match="checkpoint: it is of another target model"):
        fit(tmp_path, 8, resume=True, weight=1.5)


def test_half_written_checkpoint_never_takes_the_place_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"value": torch.ones(3)}, tmp_path / "last.ckpt")

    def full_disk(checkpoint: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(L3DError, match=r"last.ckpt cannot be written \(No space left on device\)"):
        io.save_checkpoint({"value": torch.zeros(3)}, tmp_path / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "last.ckpt")["value"].sum() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"value": torch.ones(300)}, tmp_path / "last.ckpt")
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(L3DError, match=r"last\.ckpt is damaged or no checkpoint") as error:
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["a flipped byte", "half", "missing"])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, damage: str) -> None:
    last = tmp_path / "run/checkpoints/last.ckpt"
    for number, stop_at in enumerate((4, 10)):
        with pytest.raises(Stopped):
            fit(tmp_path / "run", 20, resume=number > 0, stop_at=stop_at)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 255
    last.write_bytes(content if damage == "a flipped byte" else content[: len(content) // 2])
    if damage == "missing":  # killed between two renames
        last.unlink()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(Stopped, match="after step 9:"):
            fit(tmp_path / "run", 20, resume=True, stop_at=8)
    named = [str(warning.message) for warning in told if "last.ckpt is damaged" in str(warning.message)]
    assert len(named) == (damage != "missing")
    assert all("going on from the one before it" in message for message in named)
    torch.load(f"{last}.previous", weights_only=True)  # the damaged one has not taken the place of the good one
    found, expected = state_of(fit(tmp_path / "run", 20, resume=True)), state_of(fit(tmp_path / "whole", 20))
    assert [key for key, value in expected.items() if not torch.equal(value, found[key])] == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_interruptions_by_signal_and_by_kill(tmp_path: Path) -> None:
    """The command itself, stopped 20 times by SIGTERM, SIGINT and SIGKILL at random moments, start-up included."""
    command = ["fit", "--config", "tms", "--trainer.max_epochs", "24"]
    command += ["--checkpoint.every_n_train_steps", "40", "--trainer.enable_progress_bar", "false"]
    command += ["--model.target_weights", str(tmp_path / "target.safetensors")]
    log = tmp_path / "log"

    def finish(*more: str) -> None:
        process = l3d([*command, *more], log)
        process.join(600)
        assert process.exitcode == 0, log.read_text()

    finish("--trainer.default_root_dir", str(tmp_path / "whole"))
    root, draw, seen = tmp_path / "stopped", random.Random(0), {"SIGTERM": 0, "SIGINT": 0, "SIGKILL": 0}
    command += ["--trainer.default_root_dir", str(root), "--ckpt_path", "last"]
    last = root / "checkpoints" / "last.ckpt"
    while sum(seen.values()) < 20:
        kind = draw.choice(["SIGTERM", "SIGINT", "SIGKILL", "SIGKILL"])
        before = last.stat().st_mtime_ns if last.is_file() else 0
        process = l3d(command, log)
        try:
            if draw.random() < 0.85:  # once training runs and has saved something; otherwise somewhere in the start
                deadline = time.monotonic() + 120
                while (last.stat().st_mtime_ns if last.is_file() else 0) == before and process.is_alive():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.3))
            else:
                kind = "SIGKILL"
                time.sleep(draw.uniform(0, 2))
            assert process.is_alive(), f"it ended before its 20 interruptions: {log.read_text()}"
            assert process.pid is not None
            os.kill(process.pid, getattr(signal, kind))
            process.join(120)
        finally:
            process.kill()
        if kind != "SIGKILL":
            output = log.read_text()
            assert process.exitcode == 0, output
            assert f"{kind} after step" in output
            assert "go on with: l3d fit --config" in output
        if last.is_file():
            torch.load(last, weights_only=True)  # whole, whatever happened
        seen[kind] += 1
    assert min(seen.values()) >= 2, seen
    finish()
    whole, resumed = (
        (folder / "decomposition/model.safetensors").read_bytes() for folder in (tmp_path / "whole", root)
    )
    assert whole == resumed
