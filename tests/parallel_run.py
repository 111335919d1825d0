"""A short fit of a small autoencoder in float64:

    python parallel_run.py OUT RANKS [STRATEGY [ACCUMULATE [CLIP [ACCELERATOR]]]]

STRATEGY is `auto`, `ddp`, or `fsdp2` and its number of shards: `fsdp2:2`. ACCUMULATE batches make a step; CLIP is the
largest norm of its gradient (0: any).

The global batch, 16 samples, is the same on any number of ranks, and so is the reference (the batch's mean).
"""

import sys
import warnings
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision

from datamodules.loading import InMemoryData, Rows
from l3d_pl import L3D
from l3d_pl.parallel import Ranks
from l3d_pl.strategies.fsdp2 import FSDP2Strategy
from l3d_pl.targets.toy import Autoencoder
from l3d_pl.toys import quiet_trainer
from l3d_pl.tucker import local


class Data(InMemoryData):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, seed=3)

    def setup(self, stage: str | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        rows = torch.rand(112, 10, generator=random, dtype=torch.float64)
        rows *= torch.rand(112, 10, generator=random) < 0.2
        rows[:, 0] += 0.01
        self.train, self.validation, self.test = Rows(inputs=rows[:80]), Rows(inputs=rows[80:]), Rows(inputs=rows[80:])


def fit(
    n_ranks: int,
    strategy: str = "auto",
    accumulate: int = 1,
    clip: float = 0,
    accelerator: str = "cpu",
    **settings: Any,
) -> L3D:
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
    name, _, shards = strategy.partition(":")
    mesh = FSDP2Strategy(n_ranks // int(shards), int(shards)) if name == "fsdp2" else None
    trainer = quiet_trainer(
        devices=n_ranks,
        strategy=mesh or name,
        accelerator=accelerator,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
        plugins=DoublePrecision(),  # (by its name, "64-true", Lightning refuses it on a mesh)
        max_epochs=6,
    )
    trainer.fit(module, Data(16 // n_ranks // accumulate))
    return module


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out, arguments = sys.argv[1], sys.argv[2:]
    values = [kind(value) for kind, value in zip((int, str, int, float, str), arguments, strict=False)]
    found = fit(*values)
    group = found.subnetworks.group
    joined = {name: torch.cat(group.all_gather(local(t))) for name, t in found.subnetworks.named_parameters()}
    states = found.trainer.optimizers[0].state.values()
    moments = [value for state in states for value in state.values() if value.ndim]
    held = [local(tensor).numel() for tensor in (*found.subnetworks.parameters(), *moments)]
    everyone = Ranks.of_run().gather(sum(held))
    if found.global_rank == 0:
        kept = {name: value for name, value in found.state_dict().items() if not name.startswith("subnetworks")}
        kept = {name: value for name, value in kept.items() if "metric" not in name}
        kept |= {f"subnetworks.{name}": value.detach() for name, value in joined.items()}
        torch.save({"state": kept, "mean_reference": found.mean_reference, "held": everyone}, out)
