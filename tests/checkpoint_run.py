"""Fits of a small autoencoder in float64 that save a checkpoint and go on: `python checkpoint_run.py RANKS JOB ...`.

A JOB is OUT,STRATEGY,SHARDS[,CHECKPOINT]: it starts anew or from CHECKPOINT, saves OUT.middle.ckpt at step `SAVED`
and OUT.ckpt at its end. With STRATEGY+target the target, one of three layers then, is sharded too. The global batch,
16 samples, and the reference, its mean, are the same on any number of ranks.
"""

import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from parallel_run import Data
from torch import nn

from l3d_pl import L3D
from l3d_pl.checkpoints import AtomicCheckpointIO
from l3d_pl.strategies.fsdp2 import FSDP2Strategy
from l3d_pl.targets.toy import Autoencoder
from l3d_pl.toys import quiet_trainer

SAVED = 13


class SaveMidway(L.Callback):
    def __init__(self, out: Path):
        self.out = out

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.out)


class Layers(nn.Module):
    """Something of a target that is not decomposed, and so can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def fit(n_ranks: int, out: Path, strategy: str, shards: int, checkpoint: Path | None = None) -> L3D:
    torch.manual_seed(1)
    strategy, _, sharded = strategy.partition("+")
    module = L3D(
        (Layers() if sharded else Autoencoder(10, 5)).double(),
        parameters="layers.1.*" if sharded else "*",
        shard_target=bool(sharded),
        n_subnetworks=7,
        ranks=2,
        k=0.2,
        reference="mean",
        init_samples=40,
        swap_samples=40,
        swap_every=4,
        aux_coefficient=0.1,
        dead_after=20,
        seed=0,
    )
    trainer = quiet_trainer(
        devices=n_ranks,
        strategy=FSDP2Strategy(n_ranks // shards, shards) if strategy == "fsdp2" else strategy,
        plugins=[AtomicCheckpointIO(), DoublePrecision()],
        max_epochs=6,
        callbacks=[SaveMidway(out.with_suffix(".middle.ckpt"))],
    )
    trainer.fit(module, Data(16 // n_ranks), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(out.with_suffix(".ckpt"))
    return module


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        out, strategy, shards, *checkpoint = job.split(",")
        fit(int(sys.argv[1]), Path(out), strategy, int(shards), Path(checkpoint[0]) if checkpoint else None)
