"""Scaffolding: a circuit that is active on every sample, among sparse ones. Found by one subnetwork, spread, or lost?

The target is planted, so that the truth is known: relu(x W_in W_out) with both matrices the identity. Input j is a
sparse feature, the last one is there in every sample, `strength` times as large. What moves output o lies in column o
of W_in and W_out and in b[o], so that these parts of a gradient are its circuits, and together all of it. (In a
feature's column the row of the scaffold counts too: what is always there is something to build upon.)

Arms: `plain`, batch top-k keeps as many coefficients as there are active features; `room`, one more for each sample;
`dense`, the first subnetwork takes part in every sample (`n_dense` 1) and batch top-k keeps as many as in `plain`;
`dense 3`, three do, with two subnetworks more than the others have, so that the sparse circuits keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from datamodules.loading import Rows, generator
from datamodules.toy import ToyData
from l3d_pl.batch_topk import batch_topk
from l3d_pl.experiments.common import COLOURS, Summary, doing, spread
from l3d_pl.lightning_module import L3D
from l3d_pl.targets.toy import Autoencoder
from l3d_pl.toys import fit_quietly

ARMS = {"plain": 0, "room": 0, "dense": 1, "dense 3": 3}  # {arm: n_dense}
OUTCOMES = ("found", "spread", "lost")


@dataclass(frozen=True)
class Settings:
    """Settings of `l3d experiment scaffolding`.

    Args:
        strengths: mean values of the input that is always there; the sparse ones are uniform in [0, 1].
        features: how many sparse inputs.
        probability: of each to be active.
        spare: subnetworks beyond one for each circuit.
        steps: of each fit.
        samples: test samples that everything is measured on.
    """

    strengths: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    features: int = 10
    probability: float = 0.05
    spare: int = 0
    steps: int = 400
    samples: int = 1000


TINY = {"strengths": [1.0], "features": 4, "steps": 40, "samples": 64}


class ScaffoldData(ToyData):
    """Rows of sparse features, as for TMS, and a last one that is never 0: uniform in [0.5, 1.5] x `strength`."""

    def __init__(self, strength: float, **settings: Any) -> None:
        super().__init__(task="tms", points=None, **settings)
        self.strength = strength

    def draw(self, rows: int, stream: str, *key: int) -> Rows:
        sparse = super().draw(rows, stream, *key).tensors["inputs"]
        always = 0.5 + torch.rand(rows, 1, generator=generator(f"scaffold, {stream}", *key))
        inputs = torch.cat([sparse, self.strength * always], 1)
        return Rows(inputs=inputs, labels=inputs)


def planted(circuits: int) -> Autoencoder:
    """The target: each input is given back by a hidden unit of its own."""
    model = Autoencoder(circuits, circuits)
    with torch.no_grad():
        model.W_in.copy_(torch.eye(circuits))
        model.W_out.copy_(torch.eye(circuits))
        model.b.zero_()
    return model


def l0_of(arm: str, features: int, probability: float) -> float:
    """Coefficients per sample that batch top-k keeps: the mean number of active features; in `room` one more."""
    return features * probability / (1 - (1 - probability) ** features) + (arm == "room")


# -- measures ----------------------------------------------------------------------------------------------------------


def by_circuit(tensors: dict[str, Tensor]) -> Tensor:
    """Gradients or directions {W_in, W_out [n, circuits, circuits], b [n, circuits]} as [n, circuits, entries]."""
    return torch.cat([tensors["W_in"].mT, tensors["W_out"].mT, tensors["b"].unsqueeze(2)], 2)


def explained(g: Tensor, reconstructed: Tensor) -> Tensor:
    """Share of each circuit's gradient energy that is reconstructed, [circuits]; below 0 where it is made worse.

    Args:
        g, reconstructed: [N, circuits, entries].
    """
    error = (g - reconstructed).square().sum((0, 2))
    return 1 - error / g.square().sum((0, 2)).clamp_min(torch.finfo(g.dtype).tiny)


def contributions(codes: Tensor, v: Tensor, circuit: int) -> Tensor:
    """What each subnetwork does in a circuit over all samples: sum_i c_ik² ‖v_k in the circuit‖², as shares [n_v].

    Args:
        codes: [N, n_v].
        v: V_out, [n_v, circuits, entries].
    """
    energy = codes.square().sum(0) * v[:, circuit].square().sum(1)
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)


def ceiling(g: Tensor) -> float:
    """Share of the energy of gradients [N, entries] that lies along the one direction that explains most of it."""
    squares = torch.linalg.svdvals(g).square()
    return float(squares[0] / squares.sum())


def outcome(explained: float, shares: Tensor) -> str:
    """`lost`: less than half is reconstructed; `found`: one subnetwork does 80 % of it; else `spread`."""
    if not explained >= 0.5:
        return "lost"
    return "found" if float(shares.max()) >= 0.8 else "spread"


def features_found(v: Tensor, alive: Tensor) -> int:
    """Circuits but the last that a live subnetwork has more than half of its energy in."""
    energy = v.square().sum(2)
    shares = energy / energy.sum(1, keepdim=True)
    return int((shares[alive] > 0.5).any(0)[:-1].sum()) if bool(alive.any()) else 0


# -- the experiment ----------------------------------------------------------------------------------------------------


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each strength and arm."""
    rows, n = [], settings.features
    for strength in settings.strengths:
        data = {"strength": strength, "n_features": n, "probability": settings.probability}
        for arm, n_dense in ARMS.items():
            doing(f"strength {strength:g}, {arm}")
            n_v = n + max(1, n_dense) + settings.spare
            k = min(1.0, l0_of(arm, n, settings.probability) / (n_v - n_dense))
            sizes = {"n_subnetworks": n_v, "n_dense": n_dense, "init_samples": 500, "swap_samples": 1000}
            module = L3D(planted(n + 1), k=k, seed=seed, **sizes)  # type: ignore[arg-type]
            module_data = ScaffoldData(**data, steps_per_epoch=200, seed=seed)
            fit_quietly(module, module_data, max_steps=settings.steps, limit_val_batches=0)
            inputs = module_data.draw(settings.samples, "test", seed).tensors["inputs"]
            rows.append({"strength": strength, "arm": arm, **measure(module, inputs)})
    return rows


@torch.no_grad()
def measure(module: L3D, inputs: Tensor) -> dict[str, Any]:
    """How a fit of a planted target takes its circuits, on a batch of inputs [N, circuits]."""
    v = module.subnetworks
    gradients = module.extractor(inputs, torch.Generator().manual_seed(0)).gradients
    c = v.coefficients(v.prepare(gradients))
    codes = (c * batch_topk(c, module.k, n_dense=v.n_dense)[0])[:, 0]
    g = by_circuit({name: gradient.dense() for name, gradient in gradients.items()})
    directions = by_circuit({name: tucker.dense() for name, tucker in v.v_out.tuckers().items()})
    reconstructed = torch.einsum("nk,kce->nce", codes, directions)
    by_itself, energy = explained(g, reconstructed), g.square().sum((0, 2))
    shares, scaffold = contributions(codes, directions, -1), float(by_itself[-1])
    main, active = int(shares.argmax()), codes != 0
    sparse = 1 - float(((1 - by_itself) * energy)[:-1].sum() / energy[:-1].sum())
    own = directions[main].square().sum(1)
    return {
        "loss": float((g - reconstructed).square().sum() / g.square().sum()),
        "scaffold_energy": float(energy[-1] / energy.sum()),
        "scaffold_explained": scaffold,
        "scaffold_ceiling": ceiling(g[:, -1]),
        "largest_share": float(shares.max()),
        "effective_number": float(1 / shares.square().sum().clamp_min(1e-12)),
        "outcome": outcome(scaffold, shares),
        "main_p_act": float(active[:, main].double().mean()),
        "main_purity": float(own[-1] / own.sum()),
        "sparse_explained": sparse,
        "features_found": features_found(directions, active.any(0)),
        "l0": float(active.sum(1).double().mean()),
    }


# -- what the seeds say ------------------------------------------------------------------------------------------------


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each strength and arm; the verdict: how often each outcome, and what always-on ones gain over `room`.

    The gains are of one strength and seed: of all, and at the strength where there is least.
    """
    table = []
    for (strength, arm), fits in rows.groupby(["strength", "arm"], sort=False):
        counts = fits["outcome"].value_counts()
        table.append(
            {
                "strength": strength,
                "scaffold's share of energy": float(fits["scaffold_energy"].mean()),
                "best one direction explains": float(fits["scaffold_ceiling"].mean()),
                "arm": arm,
                **{name: int(counts.get(name, 0)) for name in OUTCOMES},
                "scaffold explained": spread(fits["scaffold_explained"], "{:.2f}"),
                "largest share": spread(fits["largest_share"], "{:.2f}"),
                "effective number": spread(fits["effective_number"], "{:.1f}"),
                "sparse explained": spread(fits["sparse_explained"], "{:.2f}"),
                "features found": float(fits["features_found"].mean()),
                "L": spread(fits["loss"]),
                "L0": float(fits["l0"].mean()),
            }
        )
    verdict: dict[str, Any] = {}
    for arm, fits in rows.groupby("arm", sort=False):
        shares = fits["outcome"].value_counts(normalize=True)
        verdict |= {f"{arm}: {name}": float(shares.get(name, 0.0)) for name in OUTCOMES}
        verdict[f"{arm}: sparse explained"] = float(fits["sparse_explained"].mean())
    rows = rows.assign(found=(rows["outcome"] == "found").astype(float))
    for column, text in (("found", "found"), ("sparse_explained", "sparse explained")):
        by_arm = rows.pivot(index=["strength", "seed"], columns="arm", values=column)
        for arm in (arm for arm, n_dense in ARMS.items() if n_dense):
            gain = (by_arm[arm] - by_arm["room"]).groupby("strength").mean()
            verdict[f"{arm} over room: {text}"] = float(gain.mean())
            verdict[f"{arm} over room: {text}, least, at strength {gain.idxmin():g}"] = float(gain.min())
    return Summary(pd.DataFrame(table), {"scaffolding": draw(rows)}, verdict)


def draw(rows: pd.DataFrame) -> Figure:
    """Against strength, a dot for each seed and a line for each arm's mean."""
    panels = {
        "scaffold_explained": "scaffold: share explained",
        "largest_share": "scaffold: largest subnetwork's share",
        "sparse_explained": "sparse circuits: share explained",
    }
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    for ax, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm, colour, shift in zip(ARMS, COLOURS, (-1.5, -0.5, 0.5, 1.5), strict=False):
            fits = rows[rows["arm"] == arm]
            ax.plot(fits["strength"] * 1.04**shift, fits[name].clip(lower=-0.1), "o", color=colour, ms=5, alpha=0.5)
            mean = fits.groupby("strength")[name].mean().clip(lower=-0.1)
            ax.plot(mean.index * 1.04**shift, mean, color=colour, label=arm)
        ax.set(xscale="log", xlabel="strength of the scaffold", ylabel=label, ylim=(-0.12, 1.03))
        strengths = sorted(rows["strength"].unique())
        ax.set_xticks(strengths, [f"{value:g}" for value in strengths])
        ax.minorticks_off()
    figure.axes[0].legend(frameon=False)
    return figure
