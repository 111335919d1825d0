"""Completeness: n_v goes up until the loss is flat. What do the subnetworks carry that come in with each step?

Every subnetwork of a fit is held against the fit of the same seed with the next smaller n_v (`kinds`), and asked what
it costs to do without it: taken away, or merged into the one most like it (`costs`). The floor: a fit of the same n_v
from another seed, held against this one, where nothing has come in. Two arms: L0 = k n_v held at the shipped config's,
so that each sample is explained by as many subnetworks as before; and k held, as in the paper.
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

from datamodules.toy import ToyData
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

AGAINST = ("smaller", "another seed")
"""What a fit is held against: that of the next smaller n_v; one of the same n_v, which is the floor."""

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
    """

    sizes: dict[str, list[int]] = field(
        default_factory=lambda: {
            "tms": [3, 5, 8, 12],
            "tms_40_10": [20, 40, 80],
            "digits_cnn": [25, 50, 100],
        }
    )
    steps: dict[str, int] = field(default_factory=lambda: {"tms": 500, "tms_40_10": 500, "digits_cnn": 345})
    fixed_k: list[str] = field(default_factory=lambda: ["tms"])
    samples: int = 1000


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
    """A row for each subnetwork of each fit, of targets that are trained from this seed."""
    rows = []
    for name, sizes in settings.sizes.items():
        if name not in settings.steps:
            raise L3DError(f"steps: found none for {name}; allowed is a number for each config of sizes")
        toy = load_toy(name, seed, output.parent)
        inputs = held_out(toy, settings.samples, seed)
        for arm in ("L0", "k") if name in settings.fixed_k else ("L0",):
            base: Subnetworks | None = None
            for n_v in sorted(sizes):
                doing(f"{name}, {arm} held, n_v {n_v}")
                k = toy.model["k"] if arm == "k" else min(1.0, toy.model["k"] * toy.model["n_subnetworks"] / n_v)
                for against in AGAINST:
                    own_seed = seed if against == "smaller" else seed + 1000
                    module = L3D(**(toy.model | START | {"n_subnetworks": n_v, "k": k}), seed=own_seed)
                    fit_quietly(module, toy.data_module(own_seed), max_steps=settings.steps[name], limit_val_batches=0)
                    gradients = module.extractor(inputs, torch.Generator().manual_seed(seed)).gradients
                    found, live = look(module, module.subnetworks.prepare(gradients), base, seed)
                    rows += [{"target": name, "held": arm, "n_v": n_v, "against": against, **row} for row in found]
                    base = live if against == "smaller" else base
    return rows


def held_out(toy: Toy, samples: int, seed: int) -> Tensor:
    """Inputs that no fit has seen, [samples, *]: fresh ones of a toy task, or the digits' test images, in any order."""
    data: Any = toy.data_module(seed)
    data.setup()
    if isinstance(data, ToyData):
        return data.draw(samples, "test", seed).tensors["inputs"]
    rows = toy.held_out()
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]]


@torch.no_grad()
def look(
    module: L3D, prepared: Prepared, before: Subnetworks | None, seed: int
) -> tuple[list[dict[str, Any]], Subnetworks]:
    """Rows of a fit held against `before`, and its live subnetworks, for the next one to be held against."""
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
            "k": module.k,
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
        own, again = (arm[arm["against"] == against] for against in AGAINST)
        losses, others = (fits.groupby(["n_v", "seed"])["loss"].first() for fits in (own, again))
        mean, apart = losses.groupby("n_v").mean(), (losses - others).abs() / losses
        sizes = sorted(mean.index)
        label = f"{name}, {held} held"
        verdict[f"{label}: loss flat from n_v"] = flat_from(mean.to_dict(), max(0.05, float(apart.mean())))
        if len(sizes) > 1:
            verdict[f"{label}: share of L that the last step takes off"] = spread(
                1 - losses[sizes[-1]] / losses[sizes[-2]]
            )
        verdict[f"{label}: share of L that two seeds differ by"] = spread(apart)
        for n_v, fits in own.groupby("n_v"):
            floor = again[again["n_v"] == n_v]
            live = fits[fits["kind"] != "dead"]
            table.append(
                {
                    "target": NAMES.get(str(name), name),
                    "held": held,
                    "n_v": n_v,
                    "L": spread(losses[n_v]),
                    **{f"{kind} / floor": f"{_count(fits, kind)} / {_count(floor, kind)}" for kind in KINDS},
                    "L rises, merged": by_kind(live, "merged"),
                    "L rises, removed": by_kind(live, "removed"),
                    "joint use": by_kind(live, "together"),
                    "median |cos| with nearest": float(live["nearest_cos"].median()),
                }
            )
        for fits, against in ((own, ""), (again, ", another seed")):
            beyond = fits[(fits["n_v"] == sizes[-1]) & fits["kind"].isin(KINDS[1:])]["kind"].value_counts(
                normalize=True
            )
            verdict |= {f"{label}: {kind}, of the last step's{against}": float(x) for kind, x in beyond.items()}
    return Summary(pd.DataFrame(table), {"completeness": draw(rows)}, verdict)


def _count(fits: pd.DataFrame, kind: str) -> str:
    """How many of a kind, the mean of the seeds; nothing is any kind where there is no smaller fit."""
    return "–" if "first" in set(fits["kind"]) else f"{(fits['kind'] == kind).sum() / fits['seed'].nunique():.1f}"


def by_kind(live: pd.DataFrame, column: str) -> str:
    """The mean of a column for each kind that there is: "kept 0.115, split 0.011"."""
    means = live.groupby("kind")[column].mean()
    return ", ".join(f"{kind} {means[kind]:.3f}" for kind in ("first", *KINDS) if kind in means)


def draw(rows: pd.DataFrame) -> Figure:
    """Above: the loss against n_v, a dot for each fit. Below: what the subnetworks of each fit are, and the floor."""
    arms: Sequence[Any] = list(rows.groupby(["target", "held"], sort=False))
    figure = Figure(figsize=(4 * len(arms), 7.5), layout="constrained")
    axes = figure.subplots(2, len(arms), squeeze=False)
    colours = dict(zip(("first", *KINDS), ("#bbbbbb", *COLOURS[:5], "#444444"), strict=True))
    for column, ((name, held), arm) in enumerate(arms):
        above, below = axes[0][column], axes[1][column]
        sizes = sorted(arm["n_v"].unique())
        for against, fill, shift in zip(AGAINST, ("full", "none"), (-0.2, 0.2), strict=True):
            fits = arm[arm["against"] == against]
            losses = fits.groupby(["n_v", "seed"])["loss"].first()
            at = losses.index.get_level_values("n_v")
            above.plot(at, losses, "o", color=COLOURS[0], fillstyle=fill, markersize=5, alpha=0.7, label=against)
            if against == "smaller":
                above.plot(sizes, losses.groupby("n_v").mean(), color=COLOURS[0])
            counts = fits.groupby("n_v")["kind"].value_counts().unstack(fill_value=0) / fits["seed"].nunique()
            bottom = pd.Series(0.0, index=counts.index)
            places = [sizes.index(n_v) + shift for n_v in counts.index]
            for kind, colour in colours.items():
                if kind in counts:
                    alpha = 1.0 if against == "smaller" else 0.45
                    below.bar(places, counts[kind], 0.36, bottom, color=colour, alpha=alpha, label=kind)
                    bottom = bottom + counts[kind]
        above.set(title=f"{NAMES.get(str(name), name)}, {held} held", xlabel="n_v", ylabel="L on test samples")
        above.set_ylim(0, 1.08 * float(arm["loss"].max()))
        below.set_xticks(range(len(sizes)), [str(n_v) for n_v in sizes])
        below.set(xlabel="n_v", ylabel="subnetworks, mean of seeds")
    handles = {bars.get_label(): bars for ax in axes[1] for bars in reversed(ax.containers)}
    figure.legend(
        [handles[kind] for kind in colours if kind in handles],
        [kind for kind in colours if kind in handles],
        loc="outside lower center",
        ncols=7,
        frameon=False,
    )
    figure.suptitle("filled, left: against the next smaller n_v; hollow, pale: the same n_v from another seed (floor)")
    return figure
