"""A short fit of a small autoencoder in float64:

    python parallel_run.py OUT RANKS [STRATEGY [ACCUMULATE [CLIP [ACCELERATOR]]]] [KEY=VALUE ...]

KEY is a setting of L3D, or `precision`. STRATEGY is `auto`, `ddp`, or `fsdp2` and its number of shards: `fsdp2:2`.
ACCUMULATE batches make a step; CLIP is the largest norm of its gradient (0: any).

The global batch, 16 samples, is the same on any number of ranks, and so is the reference (the batch's mean). The last
one of an epoch has 14: on four ranks 3, 4, 3 and 4.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import nn

from datamodules.loading import InMemoryData, Rows
from l3d_pl import L3D
from l3d_pl.parallel import Ranks
from l3d_pl.strategies.fsdp2 import FSDP2Strategy
from l3d_pl.targets.toy import Autoencoder
from l3d_pl.toys import quiet_trainer
from l3d_pl.tucker import local


class LargestBatch(L.Callback):
    """The most samples that the target is given at once before the first step."""

    def __init__(self) -> None:
        self.now = self.before_training = 0

    @contextmanager
    def of(self, target: nn.Module) -> Iterator[None]:
        def see(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            self.now = max(self.now, len(inputs[0]))

        with target.register_forward_pre_hook(see):
            yield

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 0:
            self.before_training = self.now


class Data(InMemoryData):
    def __init__(self, batch_size: int, is_double: bool = True) -> None:
        super().__init__(batch_size, seed=3)
        self.is_double = is_double

    def setup(self, stage: str | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        rows = torch.rand(112, 10, generator=random, dtype=torch.float64)
        rows *= torch.rand(112, 10, generator=random) < 0.2
        rows[:, 0] += 0.01
        rows = rows if self.is_double else rows.float()
        self.train, self.validation, self.test = Rows(inputs=rows[:78]), Rows(inputs=rows[80:]), Rows(inputs=rows[80:])


def fit(
    n_ranks: int,
    strategy: str = "auto",
    accumulate: int = 1,
    clip: float = 0,
    accelerator: str = "cpu",
    precision: str = "64-true",
    **settings: Any,
) -> L3D:
    torch.manual_seed(1)
    target = Autoencoder(10, 5).double()
    target = target if precision == "64-true" else target.float()
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
    name, _, shards = strategy.partition(":")
    mesh = FSDP2Strategy(n_ranks // int(shards), int(shards)) if name == "fsdp2" else None
    trainer = quiet_trainer(
        devices=n_ranks,
        strategy=mesh or name,
        accelerator=accelerator,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
        # (by its name, "64-true", Lightning refuses it on a mesh)
        **({"plugins": DoublePrecision()} if precision == "64-true" else {"precision": precision}),
        max_epochs=6,
    )
    largest = LargestBatch()
    trainer.callbacks.append(largest)
    with largest.of(target):
        trainer.fit(module, Data(16 // n_ranks // accumulate, precision == "64-true"))
    module.largest_batch = largest.before_training
    return module


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out, arguments = sys.argv[1], [word for word in sys.argv[2:] if "=" not in word]
    settings = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in sys.argv[3:] if "=" in word)}
    values = [kind(value) for kind, value in zip((int, str, int, float, str), arguments, strict=False)]
    found = fit(*values, **settings)
    group = found.subnetworks.group
    joined = {name: torch.cat(group.all_gather(local(t))) for name, t in found.subnetworks.named_parameters()}
    states = found.trainer.optimizers[0].state.values()
    moments = [value for state in states for value in state.values() if value.ndim]
    held = [local(tensor).numel() for tensor in (*found.subnetworks.parameters(), *moments)]
    everyone, batches = Ranks.of_run().gather(sum(held)), Ranks.of_run().gather(found.largest_batch)
    if found.global_rank == 0:
        kept = {name: value for name, value in found.state_dict().items() if not name.startswith("subnetworks")}
        kept = {name: value for name, value in kept.items() if "metric" not in name}
        kept |= {f"subnetworks.{name}": value.detach() for name, value in joined.items()}
        torch.save({"state": kept, "mean_reference": found.mean_reference, "held": everyone, "batches": batches}, out)
