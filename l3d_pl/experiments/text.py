"""The text LM as a toy: a small GPT-Neo on the standard library's English, one attention block of it decomposed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils.logging import disable_progress_bar

from datamodules.loading import Batch
from datamodules.text import TextData
from l3d_pl.configs_path import shipped_configs
from l3d_pl.experiments.common import Toy
from l3d_pl.lightning_cli import train_target
from l3d_pl.targets.hub import language_model

VOCABULARY, LENGTH = 1000, 16
ATTENTION = "transformer.h.2.attn.attention"
"""The block that configs/pydoc_lm.yaml decomposes."""
TRAINING = {
    "model.model.init_args.width": 64,  # half of the shipped target's: a network of its own for every seed in seconds
    "model.model.init_args.dropout": 0,  # of so short a training
    "model.model.init_args.vocabulary": VOCABULARY,
    "data.vocabulary": VOCABULARY,
    "data.length": 32,
    "data.batch_size": 16,
    "data.n_val": 256,
    "model.lr": 0.008,
    "trainer.max_epochs": 1000,
    "trainer.limit_val_batches": 0,
}
MODEL = {
    "parameters": [f"{ATTENTION}.*_proj.weight", f"{ATTENTION}.out_proj.bias"],
    "sample": "token",
    "tokens_per_sequence": 4,  # a backward pass for each position
    "ranks": 0.1,
    "k": 0.1,
    "divergence": "kl",
    "scale_start": True,
    "init_samples": 500,
    "swap_samples": 500,
}


class Text(Toy):
    """The text LM with its trained target."""

    def data_module(self, seed: int) -> TextData:
        return TextData(**self.data, seed=seed)


def load_text(seed: int, folder: Path, steps: int) -> Text:
    """A text LM; it is trained into `folder`/targets where it is not there.

    `truth` holds its loss on held-out text, and that of counts of pairs of tokens, in nats.

    Args:
        seed: of the training.
        steps: of the training, of 512 tokens each.
    """
    path = folder / "targets" / f"pydoc_lm_seed{seed}"
    if not path.is_dir():
        disable_progress_bar()  # of transformers, writing files
        config = str(shipped_configs() / "targets" / "pydoc_lm.yaml")
        given = TRAINING | {"trainer.max_steps": steps, "trainer.enable_progress_bar": "false", "seed_everything": seed}
        train_target(["--config", config, *(f"--{key}={value}" for key, value in given.items())], str(path))
    figures = json.loads((path / "target.json").read_text())
    data = {"vocabulary": VOCABULARY, "length": LENGTH, "batch_size": 32, "n_val": 64}
    truth = {name: torch.tensor(figures[name]) for name in ("loss", "bigram_loss")}
    return Text("pydoc_lm", MODEL | {"target": language_model(str(path)).eval()}, data, truth)


class Turned(Dataset[Batch]):
    """Sequences of which every so many-th is read backwards: its tokens come in the opposite order."""

    def __init__(self, given: Any, every: int) -> None:
        self.given, self.every = given, every

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, rows: torch.Tensor) -> Batch:
        turned = (rows % self.every == 0)[:, None]
        return {name: torch.where(turned, value.flip(1), value) for name, value in self.given[rows].items()}


class Backwards(TextData):
    """Text of which every so many-th sequence is read backwards.

    Args:
        every: 1: all.
        **options: those of `TextData`.
    """

    def __init__(self, every: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.every = every

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.train = Turned(self.train, self.every)
        self.validation = Turned(self.validation, self.every)
