"""X -> X²: does a subnetwork keep moving its own output only, as the step grows? (docs/experiments/selectivity.md)"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from l3d_pl.analysis.alignment import score_toy
from l3d_pl.analysis.interventions import random_directions, sweep
from l3d_pl.analysis.outputs import Direction, derivatives
from l3d_pl.decomposition import Decomposition
from l3d_pl.experiments.behaviours import outputs_at
from l3d_pl.experiments.common import COLOURS, Summary, doing, load_toy, spread
from l3d_pl.gradients import per_sample_gradients

KINDS = ("subnetwork", "gradient", "own output's gradient", "random, best output", "random")
TINY = {"targets": (42,), "steps": 20, "points": 4, "random": 2, "training": ("--trainer.max_epochs", "1")}


@dataclass(frozen=True)
class Settings:
    """X -> X² under growing steps.

    Args:
        targets: seeds of the target models.
        steps: of each fit.
        decades: of the steps, up to ‖W0‖.
        points: steps of each sign.
        random: random directions for each subnetwork.
        top: validation rows whose mean gradient is a control.
        training: more arguments of `l3d target`.
    """

    targets: tuple[int, ...] = (42, 1)
    steps: int = 1600
    decades: int = 3
    points: int = 16
    random: int = 8
    top: int = 20
    training: tuple[str, ...] = ()


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each target, direction and step."""
    rows: list[dict[str, Any]] = []
    for number in settings.targets:
        doing(f"target {number}")
        toy = load_toy("squared", number, output.parent, settings.training)
        module, _ = toy.fit(seed, settings.steps)
        found = module.decomposition()
        alive = found.p_act > 0
        score = score_toy("squared", found.directions(), toy.target.state_dict(), toy.truth, alive)
        common = {"target": number, "loss": found.figures["val/loss"], "recovered": score.figures["recovered"]}
        validation, test = toy.rows("validation"), toy.rows("test")
        for k in alive.nonzero().squeeze(1).tolist():
            for kind, part, direction, own in directions_of(found, k, validation, settings, seed):
                curve = curve_of(found, test, direction, own, settings)
                rows += [common | {"subnetwork": k, "kind": kind, "part": part, "output": own} | row for row in curve]
    return rows


def directions_of(
    found: Decomposition, k: int, validation: Mapping[str, Tensor], settings: Settings, seed: int
) -> list[tuple[str, str, Direction, int]]:
    """(kind, part, unit direction, own output) of subnetwork k and its controls."""
    v = found.direction(k)
    own, _ = most_moved(found, validation, v)
    result: list[tuple[str, str, Direction, int]] = [("subnetwork", "", v, own)]
    for r, direction in enumerate(random_directions(found, k, settings.random, seed)):
        result.append(("random", str(r), direction, own))
        result.append(("random, best output", str(r), direction, most_moved(found, validation, direction)[0]))
    result.append(("gradient", "", top_gradient(found, k, validation["inputs"], settings.top), own))
    result.append(("own output's gradient", "", output_gradient(found, validation["inputs"], own), own))
    for layer in sorted({name.rpartition(".")[0] for name in v}):
        part = {name: value for name, value in v.items() if name.rpartition(".")[0] == layer}
        norm = torch.stack([value.norm() for value in part.values()]).norm()
        if norm > 0:
            result.append((f"layer {layer}", layer, {name: value / norm for name, value in part.items()}, own))
    return result


def most_moved(found: Decomposition, batch: Mapping[str, Tensor], direction: Direction) -> tuple[int, float]:
    """The output with the largest mean |derivative| along a direction, and its signed mean there."""
    _, slopes = derivatives(found, batch, direction)
    output = int(slopes.abs().mean(0).argmax())
    return output, float(slopes[:, output].mean())


@torch.no_grad()
def top_gradient(found: Decomposition, k: int, inputs: Tensor, top: int) -> dict[str, Tensor]:
    """Mean gradient of the samples with the largest |V_in[k] . g|, each times its sign; of unit norm, {name: [*shape]}.

    References are the mean output of `inputs` [N, ...].
    """
    names, divergence = list(found.subnetworks.shapes), found.divergence
    given = per_sample_gradients(found.target, inputs, divergence, "mean", names)
    gradients = {name: given[name].dense() for name in names}
    reader = found.subnetworks.direction(k, side="in")
    c = torch.stack([(gradients[name] * reader[name]).flatten(1).sum(1) for name in names]).sum(0)
    most = c.abs().topk(min(top, len(c))).indices
    mean = {name: torch.einsum("n...,n->...", g[most], c[most].sign()) for name, g in gradients.items()}
    norm = torch.stack([value.norm() for value in mean.values()]).norm()
    return {name: value / norm for name, value in mean.items()}


def output_gradient(found: Decomposition, inputs: Tensor, own: int) -> dict[str, Tensor]:
    """∇_W of an output, the mean over the rows in which its feature is active; of unit norm, {name: [*shape]}.

    What no decomposition is needed for, but to know which output is meant.
    """
    given = dict(found.target.named_parameters())
    tensors = {name: given[name].detach().requires_grad_() for name in found.subnetworks.shapes}
    with torch.enable_grad():
        output = outputs_at(found.target, tensors, {"inputs": inputs[inputs[:, own] != 0]})[:, own].mean()
        slopes = torch.autograd.grad(output, list(tensors.values()))
    norm = torch.stack([slope.norm() for slope in slopes]).norm()
    return {name: slope / norm for name, slope in zip(tensors, slopes, strict=True)}


def curve_of(
    found: Decomposition, batch: Mapping[str, Tensor], direction: Direction, own: int, settings: Settings
) -> list[dict[str, Any]]:
    """Selectivity at every step of both signs."""
    tensors = dict(found.target.named_parameters())
    size = float(torch.stack([tensors[name].norm() for name in found.subnetworks.shapes]).norm())
    steps = np.logspace(-settings.decades, 0, settings.points).tolist()
    sign = math.copysign(1.0, float(derivatives(found, batch, direction)[1][:, own].mean()))
    deltas = [side * step for side in (1, -1) for step in steps]
    looked = sweep(found, batch, [(sign * delta * size, direction) for delta in deltas])
    changes = (looked.outputs - looked.origin).abs().double()
    active = batch["inputs"][:, own] != 0
    assert looked.losses is not None
    assert looked.origin_losses is not None
    rows = []
    for d, delta in enumerate(deltas):
        relevant, irrelevant = own_and_others(changes[d], own)
        on, off = (float(changes[d][rows].sum(1).mean()) for rows in (active, ~active))
        rows.append(
            {
                "sign": int(math.copysign(1, delta)),
                "step": abs(delta),
                "relevant": relevant,
                "irrelevant": irrelevant,
                "selectivity": ratio(relevant, irrelevant),
                "by_samples": ratio(on, off),
                "loss_ratio": float(looked.losses[d].mean() / looked.origin_losses.mean()),
            }
        )
    return rows


def own_and_others(changes: Tensor, own: int) -> tuple[float, float]:
    """Mean |change| of the own output, and of the others, over samples; changes [N, outputs]."""
    means = changes.mean(0)
    others = torch.cat([means[:own], means[own + 1 :]])
    return float(means[own]), float(others.mean())


def ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.inf


def falls_below(steps: Sequence[float], values: Sequence[float], level: float) -> float:
    """The step at which a curve first falls below a level, interpolated in logarithms.

    Returns:
        0 where it begins below, infinity where it never falls so far.
    """
    for i, value in enumerate(values):
        if value < level:
            if i == 0:
                return 0.0
            if math.isinf(values[i - 1]) or value <= 0:
                return float(steps[i])
            share = math.log(values[i - 1] / level) / math.log(values[i - 1] / value)
            return float(steps[i - 1] * (steps[i] / steps[i - 1]) ** share)
    return math.inf


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each kind of direction; figures are medians over directions, their spread is over seeds and targets."""
    kinds = [*KINDS, *sorted(kind for kind in rows["kind"].unique() if kind.startswith("layer"))]
    steps = sorted(rows["step"].unique())
    tenth = min(steps, key=lambda step: abs(math.log(10 * step)))
    falls, first = crossings(rows), rows[rows["step"] == steps[0]]
    lines = []
    for kind in kinds:
        mine, of_kind = rows[rows["kind"] == kind], falls[falls["kind"] == kind]
        line: dict[str, Any] = {"direction": kind, f"δ = ±{steps[0]:.2g}": _medians(first[first["kind"] == kind])}
        for step in (tenth, steps[-1]):
            for sign, name in ((1, "+"), (-1, "−")):
                here = mine[(mine["step"] == step) & (mine["sign"] == sign)]
                line[f"δ = {name}{step:.2g}"] = _medians(here)
        line["by samples"] = _medians(first[first["kind"] == kind], "by_samples")
        for level in (10, 2):
            line[f"begins below {level}"] = f"{(of_kind[f'below_{level}'] == 0).mean():.0%}"
            for sign, name in ((1, "δ > 0"), (-1, "δ < 0")):
                places = of_kind.loc[of_kind["sign"] == sign, f"below_{level}"]
                line[f"below {level} at, {name}"] = _step(places[places > 0].median())
        lines.append(line)
    subnetworks = falls[falls["kind"] == "subnetwork"]
    keys = ["seed", "target", "subnetwork", "sign"]
    best = first.groupby(["kind", *keys])["selectivity"].max()
    fits = rows.drop_duplicates(["seed", "target"])
    verdict = {
        "fits": len(fits),
        "features (own outputs of a target)": len(subnetworks.drop_duplicates(["target", "output"])),
        "fits with all five features": int((fits["recovered"] == 5).sum()),
        "subnetworks above 10 at the smallest step": float((subnetworks["below_10"] > 0).mean()),
        "subnetworks above 2 to the step of 0.01": float((subnetworks["below_2"] > 0.01).mean()),
    }
    for kind in (
        "gradient",
        "own output's gradient",
        "random, best output",
    ):  # (of several random directions, the best)
        more = (best["subnetwork"] > best[kind]).mean()
        verdict[f"subnetworks above their {kind}, smallest step"] = float(more)
    return Summary(pd.DataFrame(lines), {"selectivity": draw(rows)}, verdict)


def _medians(rows: pd.DataFrame, column: str = "selectivity") -> str:
    return spread(rows.groupby(["seed", "target"])[column].median(), "{:.1f}")


def crossings(rows: pd.DataFrame) -> pd.DataFrame:
    """`below_10` and `below_2` of every curve."""
    keys = ["seed", "target", "subnetwork", "kind", "part", "sign", "output"]
    found = []
    for key, curve in rows.groupby(keys, sort=False, dropna=False):
        ordered = curve.sort_values("step")
        steps, values = ordered["step"].tolist(), ordered["selectivity"].tolist()
        line = dict(zip(keys, key, strict=True))
        found.append(line | {f"below_{level}": falls_below(steps, values, level) for level in (10, 2)})
    return pd.DataFrame(found)


def _step(value: float) -> str:
    return "–" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.2g}"


def draw(rows: pd.DataFrame) -> Figure:
    """Selectivity against the step by kind, by layer, and the task's loss along the way."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    whole, layers, loss = figure.subplots(1, 3)
    parts = sorted(kind for kind in rows["kind"].unique() if kind.startswith("layer"))
    for axes, kinds, column in (
        (whole, KINDS, "selectivity"),
        (layers, ("subnetwork", *parts), "selectivity"),
        (loss, KINDS, "loss_ratio"),
    ):
        for colour, kind in zip(COLOURS, kinds, strict=False):
            for sign, style in ((1, "-"), (-1, "--")):
                mine = rows[(rows["kind"] == kind) & (rows["sign"] == sign)].groupby("step")[column]
                middle = mine.median()
                label = kind if sign > 0 else None
                axes.plot(middle.index, middle, style, color=colour, label=label, linewidth=1.6)
                if sign > 0 and column == "selectivity":
                    low, high = mine.quantile(0.25), mine.quantile(0.75)
                    axes.fill_between(middle.index, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="step δ / ‖W0‖")
        axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for axes in (whole, layers):
        axes.set_ylabel("own output over the others")
        for level in (1, 2, 10):
            axes.axhline(level, color="#8c959f", linewidth=0.7, zorder=0)
    whole.set_title("medians and quartiles; dashed: δ < 0")
    layers.set_title("a subnetwork's part in one layer")
    loss.set(ylabel="task loss / that of W0", title="is the model still there?")
    return figure
