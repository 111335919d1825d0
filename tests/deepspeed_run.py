"""A short fit in float32 with everything on that writes to V: `python deepspeed_run.py OUT STRATEGY RANKS [JSON]`.

The global batch, 16 samples, is the same on any number of ranks, and so is the reference (the batch's mean). JSON holds
settings of the model and, under "trainer", of the trainer; "resume_at" stops after so many steps and goes on from there.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.loading import InMemoryData, Rows
from l3d_pl import L3D
from l3d_pl.targets.toy import Autoencoder


class Data(InMemoryData):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, seed=3)

    def setup(self, stage: str | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        rows = torch.rand(112, 10, generator=random)
        rows *= torch.rand(112, 10, generator=random) < 0.2
        rows[:, 0] += 0.01
        self.train, self.validation, self.test = Rows(inputs=rows[:80]), Rows(inputs=rows[80:]), Rows(inputs=rows[80:])


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        self.losses.append(float(loss))


def module(**settings: Any) -> L3D:
    torch.manual_seed(1)
    target = Autoencoder(10, 5)
    options: dict[str, Any] = {
        "n_subnetworks": 7,
        "ranks": 2,
        "k": 0.2,
        "reference": "mean",
        "init_samples": 40,
        "swap_samples": 40,
        "swap_every": 4,
        "revive_every": 5,
        "aux_coefficient": 0.1,
        "dead_after": 20,
        "seed": 0,
    }
    return L3D(target, **(options | settings))


def trainer_of(strategy: str, n_ranks: int, **settings: Any) -> L.Trainer:
    options: dict[str, Any] = {"max_epochs": 6, "enable_checkpointing": False, "callbacks": []}
    return L.Trainer(
        accelerator="cpu",
        devices=n_ranks,
        strategy=strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        **(options | settings),
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out, strategy, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    settings = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    trainer_settings = settings.pop("trainer", {})
    losses = Losses()
    found = module(**settings)
    trainer = trainer_of(strategy, ranks, callbacks=[losses], **trainer_settings)
    trainer.fit(found, Data(16 // ranks))
    if trainer.is_global_zero:
        state = {name: value for name, value in found.state_dict().items() if "metric" not in name}
        torch.save({"state": state, "mean_reference": found.mean_reference, "losses": losses.losses}, Path(out))
