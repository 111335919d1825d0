"""A short fit of a small autoencoder in float64, on as many ranks as asked for: `python parallel_run.py OUT RANKS`.

The global batch, 16 samples, is the same on any number of ranks, and so is the reference (the batch's mean).
"""

import sys
import warnings
from typing import Any

import lightning as L
import torch

from datamodules.loading import InMemoryData, Rows
from l3d_pl import L3D
from l3d_pl.targets.toy import Autoencoder


class Data(InMemoryData):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, seed=3)

    def setup(self, stage: str | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        rows = torch.rand(112, 10, generator=random, dtype=torch.float64)
        rows *= torch.rand(112, 10, generator=random) < 0.2
        rows[:, 0] += 0.01
        self.train, self.validation, self.test = Rows(inputs=rows[:80]), Rows(inputs=rows[80:]), Rows(inputs=rows[80:])


def fit(n_ranks: int, **settings: Any) -> L3D:
    torch.manual_seed(1)
    target = Autoencoder(10, 5).double()
    options: dict[str, Any] = {
        "n_subnetworks": 7,
        "ranks": 2,
        "k": 0.2,
        "reference": "mean",
        "init_samples": 40,
        "swap_samples": 40,
        "swap_every": 4,
        "aux_coefficient": 0.1,
        "dead_after": 20,
        "seed": 0,
    }
    module = L3D(target, **(options | settings))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=n_ranks,
        strategy="ddp" if n_ranks > 1 else "auto",
        precision="64-true",
        max_epochs=6,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
    trainer.fit(module, Data(16 // n_ranks))
    return module


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out, ranks = sys.argv[1], int(sys.argv[2])
    found = fit(ranks)
    if found.global_rank == 0:
        kept = {name: value for name, value in found.state_dict().items() if "metric" not in name}
        torch.save({"state": kept, "mean_reference": found.mean_reference}, out)
