"""Golden loss curves: what training computes does not change unnoticed.

40 steps each, on targets that are drawn, not trained, on one thread; the settings that a recipe would choose are
written out, so that tuning the recipes changes nothing here. What decides between whole subnetworks (K-lines, swaps)
runs in float64: there the last digit of a float32, which is another one on another CPU, can tip the scales. For the
same reason the larger targets start at random.

After a change that is meant to change the numbers:

    python tests/test_golden.py --write

and read the difference of `tests/golden/*.json` before committing it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from datamodules.digits import DigitsData
from datamodules.toy import ToyData
from l3d_pl import L3D
from l3d_pl.targets.digits import DigitsCNN
from l3d_pl.targets.toy import MLP, Autoencoder, TiedAutoencoder
from l3d_pl.toys import quiet_trainer

FOLDER = Path(__file__).parent / "golden"
STEPS = 40
RTOL = 3e-5  # CPUs order their sums differently, and 40 steps carry that on

PUBLISHED = {"init": "random", "k_start": 1.0, "lr_schedule": "step", "lr_step_epochs": 2, "swap_every": 0}
ANNEALED = {
    "init": "random",
    "k_start": 0.5,
    "lr_schedule": "cosine",
    "swap_every": 10,
    "init_samples": 200,
    "swap_samples": 100,
}
REPAIRED = {**ANNEALED, "init": "gradients"}

# name: target, settings of L3D, data
CASES: dict[str, tuple[type[nn.Module], dict[str, Any], type[L.LightningDataModule], dict[str, Any]]] = {
    "tms_published": (TiedAutoencoder, {"n_subnetworks": 5, "ranks": 1, **PUBLISHED}, ToyData, {"points": 320}),
    "tms_repaired": (
        TiedAutoencoder,
        {"n_subnetworks": 5, "ranks": 1, **REPAIRED},
        ToyData,
        {"points": None, "steps_per_epoch": 20},
    ),
    "tmcs": (
        Autoencoder,
        {"n_subnetworks": 10, "ranks": 1, "restarts": 2, **REPAIRED},
        ToyData,
        {"task": "tmcs", "n_features": 10, "points": 320},
    ),
    "squared": (MLP, {"n_subnetworks": 5, "ranks": 2, **ANNEALED}, ToyData, {"task": "squared", "points": 320}),
    "digits_linear": (
        DigitsCNN,
        {
            "parameters": ["fc1.*", "fc2.*"],
            "n_subnetworks": 12,
            "ranks": 0.1,
            "divergence": "kl",
            "dead_after": 64,
            "aux_coefficient": 1 / 32,
            **ANNEALED,
        },
        DigitsData,
        {"batch_size": 32},
    ),
}
SIZES = {"tmcs": {"features": 10, "hidden": 5}}


def dtype_of(name: str) -> torch.dtype:
    return torch.float64 if CASES[name][1]["swap_every"] else torch.float32


class Losses(L.Callback):
    """The training loss of every step, and what the validation at the end finds."""

    def __init__(self) -> None:
        self.train: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: object) -> None:
        self.train.append(float(outputs["loss"]))


def drawn(kind: type[nn.Module], **sizes: int) -> nn.Module:
    """A target whose parameters are drawn from a fixed seed, large enough to have gradients worth the name."""
    target, random = kind(**sizes), torch.Generator().manual_seed(42)
    with torch.no_grad():
        for parameter in target.parameters():
            scale = 1.0 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return target


def curve(name: str, root: Path) -> dict[str, list[float]]:
    """{"train": loss of each step, "val": held-out loss of each restart, "v_in_norms": norm of each row of V_in}."""
    kind, settings, data, data_settings = CASES[name]
    module = L3D(
        drawn(kind, **SIZES.get(name, {})).to(dtype_of(name)), **{"k": 0.15, "lr": 0.01, "seed": 3, **settings}
    )
    losses = Losses()
    trainer = quiet_trainer(
        max_steps=STEPS,
        default_root_dir=root,
        precision="64-true" if dtype_of(name) == torch.float64 else "32-true",
        callbacks=[losses],
    )
    own = {"n_val": 200, "n_test": 10, "batch_size": 32} if data is ToyData else {}
    trainer.fit(module, data(**{"seed": 5, **own, **data_settings}))
    module.ensure_validated()
    norms = module.subnetworks.v_in.squared_norms().sqrt().tolist()
    return {"train": losses.train, "val": module.held_out_loss.tolist(), "v_in_norms": norms}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_golden_curve(name: str, tmp_path: Path) -> None:
    expected, found = json.loads((FOLDER / f"{name}.json").read_text()), curve(name, tmp_path)
    assert len(found["train"]) == STEPS
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=RTOL, abs=0), key


def write() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        rounded = {key: [float(f"{value:.10g}") for value in values] for key, values in curve(name, FOLDER).items()}
        (FOLDER / f"{name}.json").write_text(json.dumps(rounded, indent=1) + "\n")
        print(f"{name}: loss {rounded['train'][0]:.4f} -> {rounded['train'][-1]:.4f}, held out {rounded['val']}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_golden.py --write: write tests/golden/*.json anew")
    write()
