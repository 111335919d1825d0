"""TMCS: which reference should a sample be compared with? (docs/experiments/references.md)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from datamodules.loading import Rows, generator
from datamodules.toy import ToyData
from l3d_pl.analysis.alignment import score_toy
from l3d_pl.analysis.stability import cosines, match
from l3d_pl.batch_topk import batch_topk
from l3d_pl.experiments.common import COLOURS, Summary, Toy, doing, load_toy, spread
from l3d_pl.gradients import SampleGradient, per_sample_gradients
from l3d_pl.subnetworks import Subnetworks

REFERENCES = ("random", "mean", "uniform", "contrastive")
AGAIN = "random, other seed"
UNSWAPPED = ("random", "mean", "contrastive")  # also fitted without swaps: is speed the schedule's, or the reference's?
R2 = {"r² of A, over the target's": "r2", "r² of the sum, over the target's": "r2_sum"}
COMMON = (
    1.5,
    1.25,
)  # times the final L of `random`: levels for all; the swaps are needed for the second, hardly for the first
TINY = {"targets": (42,), "steps": 20, "every": 10, "training": ("--trainer.max_epochs", "1")}


@dataclass(frozen=True)
class Settings:
    """References on TMCS.

    Args:
        targets: seeds of the target models.
        recipes: of `L3D`; `NAME, no swaps`: with `swap_every` 0, and some of the references only.
        steps: of each fit.
        every: steps between evaluations.
        draws: of references, for an evaluation.
        training: more arguments of `l3d target`.
    """

    targets: tuple[int, ...] = (42, 1)
    recipes: tuple[str, ...] = ("l3d_pl", "l3d_pl, no swaps")
    steps: int = 500
    every: int = 25
    draws: int = 3
    training: tuple[str, ...] = ()


class ContrastData(ToyData):
    """Toy rows, each with its pair `contrast`: the same row with one of its active features switched off."""

    def draw(self, rows: int, stream: str, *key: int) -> Rows:
        drawn = super().draw(rows, stream, *key)
        inputs = drawn.tensors["inputs"]
        return Rows(**drawn.tensors, contrast=without_one(inputs, generator(f"contrast {stream}", *key)))


def without_one(inputs: Tensor, random: torch.Generator) -> Tensor:
    """Rows [N, features] with one of their non-zero features, each as likely, set to 0."""
    off = (inputs != 0).double().multinomial(1, generator=random)
    return inputs.scatter(1, off, 0.0)


class LossCurve(L.Callback):
    """L under random references every so many steps: `points`, (step, L)."""

    def __init__(self, draws: Sequence[Mapping[str, SampleGradient]], every: int):
        self.draws, self.every = draws, every
        self.points: list[tuple[int, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(0, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._look(trainer.global_step, pl_module)

    def _look(self, step: int, module: Any) -> None:
        self.points.append((step, loss_of(module.subnetworks, self.draws, module.k)))


@torch.no_grad()
def loss_of(subnetworks: Subnetworks, draws: Sequence[Mapping[str, SampleGradient]], k: float) -> float:
    """L with batch top-k over each draw's samples, the mean over draws."""
    losses = []
    for gradients in draws:
        prepared = subnetworks.prepare(gradients)
        c = subnetworks.coefficients(prepared)
        losses.append(float(subnetworks.reconstruct(prepared, c * batch_topk(c, k)[0]).loss[0]))
    return sum(losses) / len(losses)


def evaluations(toy: Toy, draws: int) -> dict[str, list[dict[str, SampleGradient]]]:
    """Gradients of the test rows under each kind of reference; the same for every decomposition."""
    batch = toy.rows("test", ContrastData(**toy.data, seed=0))
    return {
        reference: [
            per_sample_gradients(
                toy.target, batch, "mse", reference, generator=torch.Generator().manual_seed(1_000 + draw)
            )
            for draw in range(draws)
        ]
        for reference in REFERENCES
    }


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each target, recipe, training reference, and either step of the curve or reference of the judgement."""
    rows: list[dict[str, Any]] = []
    for number in settings.targets:
        toy = load_toy("tmcs", number, output.parent, settings.training)
        judges = evaluations(toy, settings.draws)
        for recipe in settings.recipes:
            first: Subnetworks | None = None
            name, _, unswapped = recipe.partition(", ")
            how = {"recipe": name} | ({"swap_every": 0} if unswapped else {})
            for arm in UNSWAPPED if unswapped else (*REFERENCES, AGAIN):
                doing(f"target {number}, {recipe}, {arm}")
                reference, own_seed = ("random", seed + 10_000) if arm == AGAIN else (arm, seed)
                curve = LossCurve(judges["random"], settings.every)
                data = ContrastData(**toy.data, seed=own_seed) if arm == "contrastive" else None
                module, seconds = toy.fit(own_seed, settings.steps, [curve], data, reference=reference, **how)
                first = module.subnetworks if first is None else first
                common = {"target": number, "recipe": recipe, "reference": arm}
                rows += [common | {"step": step, "judge": "random", "loss": loss} for step, loss in curve.points]
                figures = read(module, toy) | {"same": sameness(first, module.subnetworks), "cpu_seconds": seconds}
                for judge, draws in judges.items():
                    final = {"step": -1, "judge": judge, "loss": loss_of(module.subnetworks, draws, module.k)}
                    rows.append(common | final | figures)
    return rows


def read(module: Any, toy: Toy) -> dict[str, float | None]:
    """What the subnetworks say of A, and how many features they have found."""
    directions = {name: t.dense().detach() for name, t in module.subnetworks.v_out.tuckers().items()}
    alive = module.p_act[0] > 0
    figures = score_toy("tmcs", directions, toy.target.state_dict(), toy.truth, alive).figures
    return {name: figures[name] for name in ("recovered", "dead", "r2", "r2_ratio", "r2_sum", "r2_sum_ratio")}


@torch.no_grad()
def sameness(a: Subnetworks, b: Subnetworks) -> float:
    """Mean |cos| of V_out's columns, matched one to one."""
    cos = cosines(a.v_out, b.v_out)
    return float(cos[match(cos)].abs().mean())


def steps_to(curve: pd.DataFrame, level: float) -> float:
    """The first step from which on the loss stays at or below a level; NaN: there is none. curve: `step`, `loss`."""
    ordered = curve.sort_values("step")
    above = ordered.loc[ordered["loss"] > level, "step"]
    return float(ordered["step"].min() if above.empty else ordered.loc[ordered["step"] > above.max(), "step"].min())


def steps_to_own(curve: pd.DataFrame, tolerance: float = 0.1) -> float:
    """Steps to within `tolerance` of the curve's own final value."""
    return steps_to(curve, (1 + tolerance) * curve.sort_values("step")["loss"].iloc[-1])


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each recipe, target and reference: means over seeds and their spread."""
    curves, finals = rows[rows["step"] >= 0], rows[rows["step"] < 0]
    arms = {recipe: list(part["reference"].unique()) for recipe, part in rows.groupby("recipe", sort=False)}
    usual = finals[(finals["reference"] == "random") & (finals["judge"] == "random")]
    final = usual[usual["recipe"] == next(iter(arms))].groupby("target")["loss"].mean()
    lines, verdict = [], dict[str, float | None]()
    for recipe, target in product(arms, final.index):
        for arm in arms[recipe]:
            chosen, drawn = (
                part[(part["recipe"] == recipe) & (part["reference"] == arm) & (part["target"] == target)]
                for part in (finals, curves)
            )
            line = {"recipe": recipe, "target": target, "trained with": arm}
            for judge in REFERENCES:
                line[f"L, {judge}"] = spread(chosen[chosen["judge"] == judge]["loss"])
            runs = [run for _, run in drawn.groupby("seed")]
            name = f"{recipe}, target {target}, {arm}"
            for times in COMMON:
                to_common = pd.Series([steps_to(run, times * final[target]) for run in runs])
                text = f"{to_common.notna().sum()} of {len(runs)}: {spread(to_common, '{:.0f}')}"
                line[f"steps to {times:g} L"] = text
                verdict[f"{name}: steps to {times:g} L"] = float(to_common.mean()) if to_common.notna().all() else None
            line["steps to own L"] = spread([steps_to_own(run) for run in runs], "{:.0f}")
            once = chosen[chosen["judge"] == "random"]
            for title, column in R2.items():
                line[title] = f"{spread(once[column], '{:.2f}')}, {spread(once[f'{column}_ratio'], '{:.2f}')}"
            line["same"] = spread(once["same"], "{:.2f}")
            line["found"] = f"{once['recovered'].mean():.1f}, fewest {once['recovered'].min():.0f}"
            lines.append(line)
            verdict[f"{name}: L under random references"] = float(once["loss"].mean())
    return Summary(pd.DataFrame(lines), {"references": draw(curves, finals)}, verdict)


def draw(curves: pd.DataFrame, finals: pd.DataFrame) -> Figure:
    """Loss against steps for each recipe, and the final loss of every run under every reference."""
    recipes = list(curves["recipe"].unique())
    figure = Figure(figsize=(4.3 * (len(recipes) + 1), 4), layout="constrained")
    panels = figure.subplots(1, len(recipes) + 1)
    arms = (*REFERENCES, AGAIN)
    for axes, recipe in zip(panels, recipes, strict=False):
        for colour, arm in zip(COLOURS, arms, strict=False):
            mine = curves[(curves["recipe"] == recipe) & (curves["reference"] == arm)].groupby("step")["loss"]
            middle = mine.median()
            axes.plot(middle.index, middle, "--" if arm == AGAIN else "-", color=colour, label=f"trained with {arm}")
            axes.fill_between(middle.index, mine.min(), mine.max(), color=colour, alpha=0.1, linewidth=0)
        axes.set(
            xlabel="step", ylabel="L under random references", yscale="log", title=f"recipe {recipe}: median, range"
        )
    panels[0].legend(frameon=False, fontsize=8.5)
    last, one = panels[-1], finals[finals["recipe"] == recipes[0]]
    for a, (colour, arm) in enumerate(zip(COLOURS, arms, strict=False)):
        for j, judge in enumerate(REFERENCES):
            losses = one[(one["reference"] == arm) & (one["judge"] == judge)]["loss"]
            last.plot([j + 0.13 * (a - 2)] * len(losses), losses, "o", color=colour, markersize=3.5, alpha=0.7)
    last.set_xticks(range(len(REFERENCES)), REFERENCES)
    last.set(xlabel="judged by references", ylabel="final L", yscale="log", title=f"recipe {recipes[0]}: every run")
    return figure
