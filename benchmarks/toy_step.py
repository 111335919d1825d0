"""Time of one whole training step on the toys: ours under Lightning against the published procedure, in one run.

    python benchmarks/toy_step.py [--steps 2000] [--rounds 3]

Ours is everything a user pays for: loader, Lightning's loop, gradient extraction, the step, AdamW, unit norms. The
published procedure is re-implemented here from the paper, vectorised over subnetworks: `torch.func.jacrev` over the
batch's divergences, dense gradients, einsum contractions (by opt_einsum), autograd, Adam, unit norms. One thread; the
two alternate, and medians of steps are compared. The last line says what 32,000 steps of TMS take by that median.
"""

import argparse
import logging
import statistics
import time
import warnings

import lightning as L
import torch
from torch import Tensor, nn

from datamodules.toy import ToyData
from l3d_pl import L3D
from l3d_pl.targets.toy import MLP, Autoencoder, TiedAutoencoder

TOYS = {
    "tms": (lambda: TiedAutoencoder(5, 2), {"task": "tms", "n_features": 5}, 5, 1),
    "tmcs": (lambda: Autoencoder(10, 5), {"task": "tmcs", "n_features": 10}, 10, 1),
    "high_rank": (lambda: Autoencoder(25, 10), {"task": "high_rank", "n_features": 25, "group_size": 5}, 10, 3),
    "squared": (MLP, {"task": "squared", "n_features": 5}, 5, 2),
}
K = 0.1


class Clock(L.Callback):
    """Seconds of every step, from the end of one batch to the end of the next; the first hundred are left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        return statistics.median(b - a for a, b in zip(self.ends[100:], self.ends[101:], strict=False))


def ours(target: nn.Module, data: ToyData, n_v: int, rank: int, steps: int) -> float:
    clock = Clock()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=[clock],
    )
    trainer.fit(L3D(target, n_subnetworks=n_v, ranks=rank, recipe="paper", seed=0), data)
    return clock.median()


class Published:
    """V_in and V_out as Tucker tensors by name; gradients by jacrev; everything dense, everything by autograd."""

    def __init__(self, target: nn.Module, n_v: int, rank: int):
        self.target = target
        self.weights = {name: value.detach() for name, value in target.named_parameters()}
        torch.manual_seed(0)
        self.out, self.into = (
            {name: self.start(value, n_v, rank) for name, value in self.weights.items()} for _ in range(2)
        )
        self.optimizer = torch.optim.Adam(
            [t for side in (self.into, self.out) for ts in side.values() for t in ts], lr=0.01
        )

    @staticmethod
    def start(value: Tensor, n_v: int, rank: int) -> list[Tensor]:
        ranks = [min(rank, size) for size in value.shape]
        shapes = [(n_v, *ranks), *((n_v, size, r) for size, r in zip(value.shape, ranks, strict=True))]
        return [torch.randn(shape).div_(n_v).requires_grad_() for shape in shapes]

    @staticmethod
    def dense(tensors: list[Tensor]) -> Tensor:
        core, *factors = tensors
        return (
            torch.einsum("npq,nip,njq->nij", core, *factors)
            if len(factors) == 2
            else torch.einsum("np,nip->ni", core, *factors)
        )

    def step(self, inputs: Tensor) -> None:
        with torch.no_grad():
            references = self.target(inputs)[torch.randperm(len(inputs))]

        def divergences(weights: dict[str, Tensor]) -> Tensor:
            return (torch.func.functional_call(self.target, weights, (inputs,)) - references).square().sum(1)

        gradients = torch.func.jacrev(divergences)(self.weights)
        dense_in, dense_out = (
            {name: self.dense(tensors) for name, tensors in side.items()} for side in (self.into, self.out)
        )
        c = torch.stack([torch.einsum("b...,n...->bn", gradients[name], dense_in[name]) for name in gradients]).sum(0)
        kept = c.detach().abs().flatten().topk(max(1, round(K * c.numel()))).indices
        codes = c * torch.zeros(c.numel()).index_fill_(0, kept, 1.0).view_as(c)
        error = sum(
            ((g - torch.einsum("bn,n...->b...", codes, dense_out[name])) ** 2).sum() for name, g in gradients.items()
        )
        loss = error / sum((g**2).sum() for g in gradients.values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            norms = sum(self.dense(tensors).flatten(1).square().sum(1) for tensors in self.out.values()).sqrt()
            for core, *_ in self.out.values():
                core.div_(norms.view(-1, *[1] * (core.ndim - 1)))


def published(target: nn.Module, data: ToyData, n_v: int, rank: int, steps: int) -> float:
    procedure, times = Published(target, n_v, rank), []
    data.setup()
    rows = data.train[torch.arange(len(data.train))]["inputs"]  # type: ignore[arg-type,call-overload]
    for _ in range(steps):
        start = time.perf_counter()
        procedure.step(rows[torch.randint(len(rows), (32,))])
        times.append(time.perf_counter() - start)
    return statistics.median(times[50:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of ours in each round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    print(f"{'toy':10} {'ours ms':>8} {'published ms':>13} {'ratio':>6}")
    for name, (make, settings, n_v, rank) in TOYS.items():
        torch.manual_seed(0)
        target = make().eval().requires_grad_(False)
        data = ToyData(**settings, points=1000, seed=0)
        pairs = []
        for _ in range(args.rounds):
            pairs.append(
                (
                    ours(target, data, n_v, rank, args.steps),
                    published(target, data, n_v, rank, max(300, args.steps // 4)),
                )
            )
        mine, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:10} {mine:8.2f} {theirs:13.2f} {mine / theirs:6.2f}", flush=True)
        if name == "tms":
            thirty_two_thousand = 32 * mine
    print(f"32,000 steps of TMS: {thirty_two_thousand:.0f} s")


if __name__ == "__main__":
    main()
