"""Completeness: n_v goes up until the loss is flat. What do the subnetworks carry that come in with each step?

Every subnetwork of a fit is held against the fit of the same seed with the next smaller n_v (`kinds`), and asked what
it costs to do without it: taken away, or merged into the one most like it (`costs`). Two arms: L0 = k n_v held at the
shipped config's, so that each sample is explained by as many subnetworks as before; and k held, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from l3d_pl.analysis.stability import cosines, match
from l3d_pl.batch_topk import batch_topk
from l3d_pl.errors import L3DError
from l3d_pl.experiments.common import COLOURS, Summary, Toy, doing, load_toy, spread
from l3d_pl.lightning_module import L3D
from l3d_pl.repair import State, quadratic_error, state_of
from l3d_pl.subnetworks import Prepared, Subnetworks
from l3d_pl.toys import fit_quietly

KINDS = ("kept", "repeat", "split", "recombined", "residual", "dead")
"""What a subnetwork is to a smaller fit, the first that holds: see `kinds`."""

ALIKE, PART = 0.9, 0.5
"""|cos| above which two subnetworks are the same, and above which one is a part of the other."""

START = {"init_samples": 1000, "swap_samples": 1000}  # of every fit: fewer than the configs take, for speed

NAMES = {"tms": "TMS 5-2", "tms_40_10": "TMS 40-10", "digits_cnn": "digits CNN block"}


@dataclass(frozen=True)
class Settings:
    """Settings of `l3d experiment completeness`.

    Args:
        sizes: {shipped config: numbers of subnetworks, ascending}.
        steps: {shipped config: training steps of each fit}.
        fixed_k: configs that are fitted with k held as well (L0 then grows with n_v).
        samples: test samples that everything is measured on.
        target: seed of the targets' training.
    """

    sizes: dict[str, list[int]] = field(
        default_factory=lambda: {
            "tms": [2, 3, 5, 8, 12],
            "tms_40_10": [20, 40, 60],
            "digits_cnn": [25, 50, 100],
        }
    )
    steps: dict[str, int] = field(default_factory=lambda: {"tms": 600, "tms_40_10": 600, "digits_cnn": 184})
    fixed_k: list[str] = field(default_factory=lambda: ["tms"])
    samples: int = 1000
    target: int = 42


TINY = {"sizes": {"tms": [2, 4]}, "steps": {"tms": 30}, "samples": 64}


# -- measures ----------------------------------------------------------------------------------------------------------


def kinds(own: Tensor, to_base: Tensor, base: Tensor, alive: Tensor, chance: float) -> list[str]:
    """What each of n subnetworks is to the m of a smaller fit; the first that holds:

    - `dead`: takes part in no sample;
    - `kept`: the partner of one of the m (one to one), with |cos| > 0.9;
    - `repeat`: |cos| > 0.9 with one that is kept, or that comes before it;
    - `split`: |cos| >= 0.5 with one of the m: a part of it;
    - `recombined`: more of its energy lies in the span of the m than halfway from `chance` to all;
    - `residual`: the rest: a direction that the smaller fit could not express.

    Args:
        own: cosines among the n, [n, n].
        to_base: their cosines with the m, [n, m]; m may be 0.
        base: cosines among the m, [m, m].
        alive: [n] of bool.
        chance: the share of a random direction's energy that lies in the span of the m.
    """
    own, to_base = own.abs(), to_base.abs() if to_base.shape[1] else to_base.new_zeros(len(own), 1)
    partner = torch.zeros(len(own), dtype=torch.bool)
    mine, its = match(to_base)
    partner[mine] = to_base[mine, its] > ALIKE
    partner &= alive
    share = span_share(to_base, base) if base.numel() else torch.zeros(len(own))
    found = []
    for j in range(len(own)):
        before = alive & (partner | (torch.arange(len(own)) < j))
        before[j] = False
        if not alive[j]:
            found.append("dead")
        elif partner[j]:
            found.append("kept")
        elif bool((own[j][before] > ALIKE).any()):
            found.append("repeat")
        elif float(to_base[j].max()) >= PART:
            found.append("split")
        elif float(share[j]) > (1 + chance) / 2:
            found.append("recombined")
        else:
            found.append("residual")
    return found


def span_share(products: Tensor, gram: Tensor) -> Tensor:
    """Share of each unit direction's energy in the span of m others, [n], from their products [n, m] and M [m, m]."""
    inverse = torch.linalg.pinv(gram.double(), rtol=1e-5, hermitian=True)
    return ((products.double() @ inverse) * products.double()).sum(1).clamp(0, 1)


@torch.no_grad()
def costs(state: State, k: float, energy: float) -> tuple[Tensor, Tensor]:
    """How much L rises where a subnetwork is taken away, and where it is merged into its nearest, [n_v] both.

    Batch top-k then chooses as many coefficients among the others. Merged: the nearest (by |cos| of V_out) answers to
    what both answered to, c_l + <v_j, v_l> c_j, so that a repeat costs nothing.
    """
    n, now = state.c.shape[1], float(state.error())
    near = nearest(state.gram)
    removed, merged = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for j in range(n):
        for found, takes_over in ((removed, False), (merged, True)):
            c = state.c.clone()
            if takes_over and n > 1:
                c[:, near[j]] += state.gram[j, near[j]] * c[:, j]
            c[:, j] = 0
            mask = batch_topk(c.unsqueeze(1), k)[0].squeeze(1)
            found[j] = (float(quadratic_error(c * mask, state.p, state.gram)) - now) / energy
    return removed, merged


def nearest(gram: Tensor) -> Tensor:
    """The other subnetwork with the largest |cos| of each, [n]."""
    return gram.abs().fill_diagonal_(-1.0).argmax(1)


def together(active: Tensor, near: Tensor) -> Tensor:
    """Jaccard overlap of each subnetwork's samples with its nearest's: both active over either, [n].

    Args:
        active: [samples, n] of bool.
    """
    other = active[:, near]
    return (active & other).sum(0) / (active | other).sum(0).clamp_min(1)


def flat_from(losses: Mapping[int, float], least: float = 0.05) -> int | None:
    """The first n_v from which no further step lowers the loss by the share `least`; None: the last one still does."""
    sizes = sorted(losses)
    falls = [losses[b] < (1 - least) * losses[a] for a, b in pairwise(sizes)]
    last = max((i for i, fell in enumerate(falls) if fell), default=-1)
    return None if last == len(sizes) - 2 else sizes[last + 1]


# -- the experiment ----------------------------------------------------------------------------------------------------


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each subnetwork of each fit."""
    rows = []
    for name, sizes in settings.sizes.items():
        if name not in settings.steps:
            raise L3DError(f"steps: found none for {name}; allowed is a number for each config of sizes")
        toy = load_toy(name, settings.target, output.parent)
        for arm in ("L0", "k") if name in settings.fixed_k else ("L0",):
            before: Subnetworks | None = None
            for n_v in sorted(sizes):
                doing(f"{name}, {arm} held, n_v {n_v}")
                k = toy.model["k"] if arm == "k" else min(1.0, toy.model["k"] * toy.model["n_subnetworks"] / n_v)
                module = L3D(**(toy.model | START | {"n_subnetworks": n_v, "k": k}), seed=seed)
                fit_quietly(module, toy.data_module(seed), max_steps=settings.steps[name], limit_val_batches=0)
                found, base = look(module, test_gradients(toy, module, settings.samples), before, seed)
                rows += [{"target": name, "held": arm, "n_v": n_v, "k": k, **row} for row in found]
                before = base
    return rows


def test_gradients(toy: Toy, module: L3D, samples: int) -> Prepared:
    """Gradients of the first test samples as one batch, the same references for every fit."""
    extraction = module.extractor(toy.held_out()[:samples], torch.Generator().manual_seed(0))
    return module.subnetworks.prepare(extraction.gradients)


@torch.no_grad()
def look(
    module: L3D, prepared: Prepared, before: Subnetworks | None, seed: int
) -> tuple[list[dict[str, Any]], Subnetworks]:
    """Rows of a fit, and its live subnetworks, for the next one to be held against."""
    v, energy = module.subnetworks, float(prepared.energy)
    state = state_of(v, 0, prepared, module.k)
    active = state.codes != 0
    alive, near = active.any(0), nearest(state.gram)
    to_base, base, chance = torch.zeros(v.n_subnetworks, 0), torch.zeros(0, 0), 0.0
    if before is not None:
        to_base, base = cosines(v.v_out, before.v_out), cosines(before.v_out, before.v_out)
        ranks = {name: list(r) or 1 for name, r in v.ranks.items()}
        random = Subnetworks(v.shapes, 64, ranks, generator=torch.Generator().manual_seed(seed))
        chance = float(span_share(cosines(random.v_out, before.v_out), base).mean())
    removed, merged = costs(state, module.k, energy)
    found = kinds(state.gram, to_base, base, alive, chance)
    share = span_share(to_base, base) if before is not None else torch.full((v.n_subnetworks,), math.nan)
    overlap = together(active, near)
    rows = [
        {
            "loss": 1 + float(state.error()) / energy,
            "subnetwork": j,
            "kind": found[j] if before is not None or found[j] in ("dead", "repeat") else "first",
            "p_act": float(active[:, j].double().mean()),
            "nearest_cos": float(state.gram[j, near[j]].abs()) if len(near) > 1 else math.nan,
            "together": float(overlap[j]),
            "removed": float(removed[j]),
            "merged": float(merged[j]),
            "base_cos": float(to_base[j].abs().max()) if before is not None else math.nan,
            "base_share": float(share[j]),
            "chance": chance if before is not None else math.nan,
        }
        for j in range(v.n_subnetworks)
    ]
    live = alive.nonzero().squeeze(1)
    kept = Subnetworks(v.shapes, max(1, len(live)), {name: list(r) or 1 for name, r in v.ranks.items()})
    if len(live):
        kept.v_out.copy_({name: tucker.select(live) for name, tucker in v.v_out.tuckers().items()})
    return rows, kept


# -- what the seeds say ------------------------------------------------------------------------------------------------


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each n_v: loss, what has come in, what that is worth; and where the loss is flat."""
    table: list[dict[str, Any]] = []
    verdict: dict[str, Any] = {}
    for (name, held), arm in rows.groupby(["target", "held"], sort=False):
        losses = arm.groupby(["n_v", "seed"])["loss"].first()
        mean = losses.groupby("n_v").mean()
        verdict[f"{name}, {held} held: loss flat from n_v"] = flat_from(mean.to_dict())
        for n_v, fits in arm.groupby("n_v"):
            n_seeds = fits["seed"].nunique()
            counts = fits["kind"].value_counts() / n_seeds
            added = fits[fits["kind"].isin(("repeat", "split", "recombined", "residual"))]
            table.append(
                {
                    "target": NAMES.get(str(name), name),
                    "held": held,
                    "n_v": n_v,
                    "L": spread(losses[n_v]),
                    **{kind: float(counts.get(kind, 0.0)) for kind in KINDS},
                    "cost of one that is kept": _mean(fits[fits["kind"].isin(("kept", "first"))]["merged"]),
                    "cost of one that came in": _mean(added["merged"]),
                    "median |cos| with nearest": float(fits[fits["kind"] != "dead"]["nearest_cos"].median()),
                }
            )
        new = arm[arm["kind"].isin(KINDS[1:])]
        beyond = new[new["n_v"] == new["n_v"].max()]["kind"].value_counts(normalize=True)
        verdict |= {f"{name}, {held} held: {kind}, of the last step's": float(share) for kind, share in beyond.items()}
    return Summary(pd.DataFrame(table), {"completeness": draw(rows)}, verdict)


def _mean(values: pd.Series) -> float:
    return float(values.mean()) if len(values) else math.nan


def draw(rows: pd.DataFrame) -> Figure:
    """Above: the loss against n_v, a dot for each seed. Below: what the subnetworks of each fit are."""
    arms: Sequence[Any] = list(rows.groupby(["target", "held"], sort=False))
    figure = Figure(figsize=(3.4 * len(arms), 6), layout="constrained")
    axes = figure.subplots(2, len(arms), squeeze=False)
    colours = dict(zip(("first", *KINDS), ("#bbbbbb", *COLOURS[:5], "#444444"), strict=True))
    for column, ((name, held), arm) in enumerate(arms):
        losses = arm.groupby(["n_v", "seed"])["loss"].first().reset_index()
        above, below = axes[0][column], axes[1][column]
        above.plot(losses["n_v"], losses["loss"], "o", color=COLOURS[0], markersize=3, alpha=0.6)
        mean = losses.groupby("n_v")["loss"].mean()
        above.plot(mean.index, mean, color=COLOURS[0])
        above.set(title=f"{NAMES.get(str(name), name)}, {held} held", xlabel="n_v", ylabel="L on test samples")
        above.set_ylim(0, None)
        counts = arm.groupby("n_v")["kind"].value_counts().unstack(fill_value=0) / arm["seed"].nunique()
        bottom = pd.Series(0.0, index=counts.index)
        for kind, colour in colours.items():
            if kind in counts:
                below.bar([str(n) for n in counts.index], counts[kind], bottom=bottom, color=colour, label=kind)
                bottom = bottom + counts[kind]
        below.set(xlabel="n_v", ylabel="subnetworks, mean of seeds")
    handles = {h.get_label(): h for ax in axes[1] for h in ax.containers}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False)
    return figure
