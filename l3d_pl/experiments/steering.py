"""Steer a model along chosen subnetworks: wanted change against side effects (docs/experiments/steering.md).

The wanted change: samples of context b (images of a class; positions after a word) shall give a; everything else shall
stay. Every method ends in a shift Δ of the decomposed tensors, so one curve serves all: f(x, W0 + s Δ) for strengths s,
and along it

    wanted   mean p(a | x) over held-out samples of context b
    side     mean KL(f(x, W0) ‖ f(x, W0 + s Δ)) over all other held-out samples, in nats

A steering vector on a linear layer's output is a shift of that layer's bias. Methods are compared at equal `wanted`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from datamodules.loading import Batch
from l3d_pl.analysis.interventions import random_directions
from l3d_pl.analysis.outputs import Direction, outputs_of, pushed
from l3d_pl.decomposition import Decomposition
from l3d_pl.experiments import behaviours
from l3d_pl.experiments.behaviours import Behaviour, outputs_at, read
from l3d_pl.experiments.common import COLOURS, Summary, doing, load_toy
from l3d_pl.experiments.text import ATTENTION, load_text
from l3d_pl.toys import fit_quietly

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CURVE = ("strength", "wanted", "side", "accuracy_lost", "loss_added")
VECTOR_AT = {"digits": ("fc1", "fc1", "output"), "text": (f"{ATTENTION}.out_proj", "transformer.h.2.ln_2", "input")}
"""A steering vector shifts the bias of one layer, by means of what comes out of, or into, another one after it."""
LORA_AT = {"digits": "fc2", "text": f"{ATTENTION}.out_proj"}
RATES = {"digits": (0.1, 0.03, 0.03, 0.001), "text": (0.3, 0.1, 0.03, 0.003)}  # few, many, LoRA, full; see `rates`
JUDGED_AT = {"digits": 0.9, "text": 0.5}  # level of `wanted` that decides
SHOWN_AT = (0.05, 0.2, 0.5, 0.9)
KEEP = (0.0, 1.0)


@dataclass(frozen=True)
class Settings:
    """What can be set.

    Args:
        tasks: the digits CNN, the text LM.
        n_subnetworks: n_v of the digits CNN.
        fit_steps: of its decomposition.
        tuning_steps: of each learned shift.
        few: subnetworks of the small shift, those with the largest first-order gain; the large shift has as many as a
            LoRA of rank 1 has parameters.
        pairs: (a, b) drawn per seed and task.
        rates: times `RATES`: the learning rates that each method tries first; then further ones, by the same factor, as
            long as the best is the lowest or the highest.
        most_rates: that a method tries, at most.
        rates_seed: of the network and the pair on which it chooses; should be none of those that are reported.
        target_epochs: training of the network that is steered; a network of its own for every seed.
        text_subnetworks, text_fit_steps, text_tuning_steps: the same of the text LM.
        text_target_steps: training of the text LM; one of its own for every seed.
        text_held_out: sequences, at most, on which a pair of the text LM is measured.
    """

    tasks: tuple[Literal["digits", "text"], ...] = ("digits", "text")
    n_subnetworks: int = 74
    fit_steps: int = 200
    tuning_steps: int = 100
    few: int = 5
    pairs: int = 2
    rates: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    most_rates: int = 7
    rates_seed: int = 100
    target_epochs: int = 20
    text_subnetworks: int = 128
    text_fit_steps: int = 60
    text_tuning_steps: int = 50
    text_target_steps: int = 600
    text_held_out: int = 64


TINY = {
    "n_subnetworks": 6,
    "fit_steps": 4,
    "tuning_steps": 3,
    "few": 2,
    "pairs": 1,
    "target_epochs": 1,
    "rates": [1.0, 3.0],
    "most_rates": 3,
}
TINY |= {"text_subnetworks": 6, "text_fit_steps": 2, "text_tuning_steps": 2, "text_target_steps": 2, "text_held_out": 6}


# -- shifts that are learned -------------------------------------------------------------------------------------------


class Along(nn.Module):
    """Δ = sum_k δ_k v_k; learns δ.

    Args:
        directions: {name: [n, *shape]}.
    """

    def __init__(self, directions: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.directions = dict(directions)
        self.delta = nn.Parameter(torch.zeros(len(next(iter(directions.values())))))

    def forward(self) -> dict[str, Tensor]:
        return {name: torch.tensordot(self.delta, v, 1) for name, v in self.directions.items()}


class LoRA(nn.Module):
    """Δ = B A of rank 1 on one matrix [O, I] (Hu et al. 2021): B starts at 0; O + I parameters."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.name = name
        self.b = nn.Parameter(torch.zeros(shape[0], 1))
        self.a = nn.Parameter(torch.randn(1, shape[1]) / shape[1] ** 0.5)

    def forward(self) -> dict[str, Tensor]:
        return {self.name: self.b @ self.a}


class Full(nn.Module):
    """Δ itself: every value of the decomposed tensors."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.names = list(shapes)
        self.delta = nn.ParameterList([torch.zeros(tuple(shape)) for shape in shapes.values()])

    def forward(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.delta, strict=True))


class Tuning(L.LightningModule):
    """Learns a shift of a frozen model: −log p(a) on samples of context b, and, weighted, KL from W0 on all others.

    Args:
        pair: (a, b).
        keep: weight of the KL; 0: the samples of b alone are looked at.
    """

    target: nn.Module

    def __init__(self, target: nn.Module, shift: nn.Module, pair: tuple[int, int], keep: float, lr: float) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)  # frozen: in no optimizer, and stays in eval mode
        self.shift, self.pair, self.keep, self.lr = shift, pair, keep, lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        a, b = self.pair
        tensors = dict(self.target.named_parameters())
        moved = {name: tensors[name] + value for name, value in self.shift().items()}
        logits, context, _ = read(batch, outputs_at(self.target, moved, batch))
        chosen = context == b
        loss = cross_entropy(logits[chosen], torch.full((int(chosen.sum()),), a), reduction="sum")
        loss = loss / chosen.sum().clamp_min(1)
        if self.keep:
            with torch.no_grad():
                before, *_ = read(batch, outputs_of(self.target, batch))
            loss = loss + self.keep * divergences(before[~chosen], logits[~chosen]).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.shift.parameters(), lr=self.lr)


# -- measures ----------------------------------------------------------------------------------------------------------


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of each sample in nats, [N]; from logits [N, C]."""
    return kl_div(after.log_softmax(1), before.log_softmax(1), reduction="none", log_target=True).sum(1)


@torch.no_grad()
def curve(target: nn.Module, shift: Direction, pair: tuple[int, int], batch: Batch) -> list[dict[str, float]]:
    """`wanted`, `side`, lost accuracy and added cross-entropy of the others, at W0 + s Δ for every s of `STRENGTHS`."""
    a, b = pair
    origin, context, right = read(batch, outputs_of(target, batch))
    chosen = context == b
    others, right = origin[~chosen], right[~chosen]
    rows = []
    for strength in STRENGTHS:
        with pushed(target, shift, strength):
            logits, *_ = read(batch, outputs_of(target, batch))
        moved = logits[~chosen]
        rows.append(
            {
                "strength": strength,
                "wanted": float(logits[chosen].softmax(1)[:, a].double().mean()),
                "side": float(divergences(others, moved).double().mean()),
                "accuracy_lost": float(
                    (others.argmax(1) == right).double().mean() - (moved.argmax(1) == right).double().mean()
                ),
                "loss_added": float(cross_entropy(moved, right) - cross_entropy(others, right)),
            }
        )
    return rows


def strength_at(strengths: Sequence[float], wanted: Sequence[float], level: float) -> float:
    """The strength at which a curve first reaches a level of `wanted`; NaN: never.

    Between two strengths the log odds go in a straight line, as logits do until a ReLU turns.
    """
    for i, reached in enumerate(wanted):
        if reached >= level:
            if i == 0:
                return strengths[0]
            low, high, here = (
                float(np.log(p / (1 - p))) for p in np.clip([wanted[i - 1], reached, level], 1e-9, 1 - 1e-9)
            )
            return strengths[i - 1] + (here - low) / (high - low) * (strengths[i] - strengths[i - 1])
    return float("nan")


def side_at(strengths: Sequence[float], side: Sequence[float], strength: float) -> float:
    """The side effect at a strength: a power law between two of them; below the first, square, as KL is near 0."""
    s, kl = np.asarray(strengths)[1:], np.clip(np.asarray(side)[1:], 1e-12, None)
    if not strength > 0:
        return 0.0 if strength == 0 else float("nan")
    if strength <= s[0]:
        return float(kl[0] * (strength / s[0]) ** 2)
    return float(np.exp(np.interp(np.log(strength), np.log(s), np.log(kl))))


def gains(directions: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensor:
    """|∇loss · v_k|: what a small step along each subnetwork does to the wanted loss, [n_v].

    Args:
        directions: {name: [n_v, *shape]}.
        gradient: of the wanted loss, {name: [*shape]}.
    """
    return torch.stack([v.flatten(1) @ gradient[name].flatten() for name, v in directions.items()]).sum(0).abs()


# -- one seed ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each task, pair, method, weight of `keep` and strength."""
    rows: list[dict[str, Any]] = []
    for task in settings.tasks:
        tried = tried_rates(task, settings)
        tried.to_csv(output / f"rates_{task}.csv", index=False)
        doing(f"{task}, target")
        steps, found, pairs = TASKS[task](settings, output, seed, settings.pairs)
        for behaviour in pairs:
            contest = Contest(task, settings.few, steps, found, behaviour, seed)
            rows += [{"task": task} | row for row in _pair_rows(contest, tried[tried["chosen"]])]
    return rows


@cache
def tried_rates(task: str, settings: Settings) -> pd.DataFrame:
    """Every method, `keep` and learning rate on one pair of one network that is not reported; `chosen`: `best_rate`."""
    with tempfile.TemporaryDirectory() as folder:
        doing(f"{task}, target of the rates")
        steps, found, (behaviour,) = TASKS[task](settings, Path(folder), settings.rates_seed, 1)
    contest = Contest(task, settings.few, steps, found, behaviour, settings.rates_seed)

    def attempt(method: str, keep: float, lr: float) -> dict[str, float]:
        _, shift = contest.train(method, keep, lr)
        looked = pd.DataFrame(curve(found.target, shift, behaviour.pair, behaviour.held_out))
        strengths, wanted, side = (looked[name].tolist() for name in CURVE[:3])
        cost = side_at(strengths, side, strength_at(strengths, wanted, JUDGED_AT[task]))
        return {"lr": lr, "side": cost, "most": max(wanted)}

    parts = []
    for (method, (_, usual)), keep in product(contest.learned.items(), KEEP):
        part = widened([usual * times for times in settings.rates], settings.most_rates, partial(attempt, method, keep))
        parts.append(part.assign(method=method, keep=keep, chosen=part.index == best_rate(part)))
    return pd.concat(parts, ignore_index=True)[["method", "keep", "lr", "side", "most", "chosen"]]


def widened(rates: Sequence[float], most: int, attempt: Callable[[float], dict[str, float]]) -> pd.DataFrame:
    """What has come of each learning rate, in rising order, and of further ones until the best is neither end.

    Args:
        rates: two or more, rising, each the last one times the same factor.
        most: rates, at most.
        attempt: what comes of a rate: a row with `lr`, `side` and `most`; see `best_rate`.
    """
    rows = [attempt(rate) for rate in rates]
    factor = rates[1] / rates[0]
    while True:
        tried = pd.DataFrame(rows)
        best = best_rate(tried)
        if len(rows) >= most or best not in (0, len(rows) - 1):
            return tried
        rows = [attempt(rows[0]["lr"] / factor), *rows] if best == 0 else [*rows, attempt(rows[-1]["lr"] * factor)]


def best_rate(tried: pd.DataFrame) -> Any:
    """The index of the row with the smallest `side` effect; where none got to the level, with the `most` wanted."""
    return tried["most"].idxmax() if tried["side"].isna().all() else tried["side"].idxmin()


def _digits(settings: Settings, output: Path, seed: int, pairs: int) -> tuple[int, Decomposition, list[Behaviour]]:
    toy = load_toy("digits_cnn", seed, output, ["--trainer.max_epochs", str(settings.target_epochs)])
    doing("digits, decomposition")
    module, _ = toy.fit(seed, settings.fit_steps, n_subnetworks=settings.n_subnetworks)
    return settings.tuning_steps, module.decomposition(), behaviours.digits(pairs, seed)


def _text(settings: Settings, output: Path, seed: int, pairs: int) -> tuple[int, Decomposition, list[Behaviour]]:
    toy = load_text(seed, output, settings.text_target_steps)
    doing("text, decomposition")
    module, _ = toy.fit(seed, settings.text_fit_steps, n_subnetworks=settings.text_subnetworks)
    return (
        settings.text_tuning_steps,
        module.decomposition(),
        behaviours.text(pairs, seed, toy, settings.text_held_out),
    )


TASKS: dict[str, Callable[[Settings, Path, int, int], tuple[int, Decomposition, list[Behaviour]]]]
TASKS = {"digits": _digits, "text": _text}


@dataclass
class Contest:
    """All methods on one behaviour of one network.

    Attributes:
        few: subnetworks of the small shift.
        steps: of each learned shift.
    """

    task: str
    few: int
    steps: int
    found: Decomposition
    behaviour: Behaviour
    seed: int

    @cached_property
    def learned(self) -> dict[str, tuple[Callable[[], nn.Module], float]]:
        """The shifts that are trained: {method: (what makes one, its usual learning rate)}."""
        found, shapes, directions = self.found, self.found.subnetworks.shapes, self.found.directions()
        order = gains(directions, _gradient(found.target, shapes, self.behaviour)).argsort(descending=True)
        at = f"{LORA_AT[self.task]}.weight"
        many = min(sum(shapes[at]), found.n_subnetworks)

        def chosen(n: int) -> nn.Module:
            return Along({name: v[order[:n]] for name, v in directions.items()})

        def drawn(n: int) -> nn.Module:
            each = [random_directions(found, int(k), 1, self.seed)[0] for k in order[:n]]
            return Along({name: torch.stack([direction[name] for direction in each]) for name in shapes})

        rates = RATES[self.task]
        return {
            f"subnetworks, {self.few}": (partial(chosen, self.few), rates[0]),
            f"random, {self.few}": (partial(drawn, self.few), rates[0]),
            f"subnetworks, {many}": (partial(chosen, many), rates[1]),
            f"random, {many}": (partial(drawn, many), rates[1]),
            "LoRA": (partial(LoRA, at, shapes[at]), rates[2]),
            "full": (partial(Full, shapes), rates[3]),
        }

    def train(self, method: str, keep: float, lr: float) -> tuple[int, Direction]:
        """A learned shift, and how many parameters it has."""
        a, b = self.behaviour.names
        doing(f"{self.task}, {b} to {a}, {method}, keep {keep:g}, lr {lr:g}")
        torch.manual_seed(self.seed)
        tuning = Tuning(self.found.target, self.learned[method][0](), self.behaviour.pair, keep, lr)
        fit_quietly(tuning, self.behaviour.batches(), max_steps=self.steps, limit_val_batches=0)
        n = sum(parameter.numel() for parameter in tuning.shift.parameters())
        return n, {name: value.detach() for name, value in tuning.shift().items()}

    def vectors(self) -> dict[str, Direction]:
        """Steering vectors: the shifts that take no training."""
        layer, seen_at, side = VECTOR_AT[self.task]
        means = differences_of_means(self.found.target, seen_at, side, self.behaviour)
        return {name: {f"{layer}.bias": value} for name, value in means.items()}


def _pair_rows(contest: Contest, rates: pd.DataFrame) -> list[dict[str, Any]]:
    behaviour = contest.behaviour
    rows: list[dict[str, Any]] = []

    def add(method: str, n: int, keep: float, lr: float, shift: Direction) -> None:
        facts = {"a": behaviour.a, "b": behaviour.b, "pair": " to ".join(reversed(behaviour.names)), "method": method}
        facts |= {"parameters": n, "keep": keep, "lr": lr}
        curve_rows = curve(contest.found.target, shift, behaviour.pair, behaviour.held_out)
        rows.extend(facts | row for row in curve_rows)

    for row in rates.itertuples():
        n, shift = contest.train(row.method, row.keep, row.lr)
        add(row.method, n, row.keep, row.lr, shift)
    for method, shift in contest.vectors().items():
        add(method, 1, 0.0, float("nan"), shift)
    return rows


def _gradient(target: nn.Module, names: Mapping[str, Any], behaviour: Behaviour) -> dict[str, Tensor]:
    """Gradient of the mean −log p(a) over the training samples of context b."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in target.named_parameters() if name in names}
    with torch.enable_grad():
        logits, context, _ = read(behaviour.train, outputs_at(target, tensors, behaviour.train))
        logits = logits[context == behaviour.b]
        loss = cross_entropy(logits, torch.full((len(logits),), behaviour.a))
        return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


@torch.no_grad()
def differences_of_means(target: nn.Module, layer: str, side: str, behaviour: Behaviour) -> dict[str, Tensor]:
    """Differences of means of a layer's `output` or `input` over training samples.

    `vector`: where a is right, minus context b. `vector, within b`: both in context b, where a is right and where it is
    not; only where the right answer varies within a context.
    """

    def look(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        seen: list[Tensor] = []
        handle = target.get_submodule(layer).register_forward_hook(
            lambda layer, inputs, output: seen.append(output if side == "output" else inputs[0])
        )
        outputs_of(target, batch)
        handle.remove()
        return read(batch, seen[0])

    a, b = behaviour.a, behaviour.b
    (towards, _, right), (values, context, other) = look(behaviour.examples), look(behaviour.train)
    found = {"vector": towards[right == a].mean(0) - values[context == b].mean(0)}
    if behaviour.followed is not None:
        towards, there, right = look(behaviour.followed)
        away = values[(context == b) & (other != a)].mean(0)
        found["vector, within b"] = towards[(there == b) & (right == a)].mean(0) - away
    return found


# -- all seeds ---------------------------------------------------------------------------------------------------------


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """The side effect of every task, seed, pair, method and `keep` at every level of `wanted`."""
    keys = ["task", "method", "parameters", "keep", "seed", "a", "b"]
    result = []
    for key, part in rows.groupby(keys, sort=False):
        strengths, wanted, side, lost, loss = (part[name].tolist() for name in CURVE)
        for level in LEVELS:
            s = strength_at(strengths, wanted, level)
            found = {
                "level": level,
                "side": side_at(strengths, side, s),
                "accuracy_lost": np.interp(s, strengths, lost),
                "loss_added": np.interp(s, strengths, loss),
            }
            result.append(dict(zip(keys, key, strict=True)) | found)
    return pd.DataFrame(result)


def summarise(rows: pd.DataFrame) -> Summary:
    """Median cost of each method at some levels of the wanted change; subnetworks against the others."""
    table, found = [], costs(rows)
    for key, part in found.groupby(["task", "method", "parameters", "keep"], sort=False):
        row: dict[str, Any] = dict(zip(("task", "method", "parameters", "others kept"), key, strict=True))
        row["others kept"] = "yes" if row["others kept"] else "no"
        for level in SHOWN_AT:
            side = part[part["level"] == level]["side"]
            row[f"side at {level:g}"] = f"{side.notna().sum()} of {len(side)}: {_range(side)}"
        for name in ("accuracy lost", "loss added"):  # at the level that decides
            row[name] = _range(part[part["level"] == JUDGED_AT[key[0]]][name.replace(" ", "_")])
        table.append(row)
    verdict = {}
    for task, part in found.groupby("task", sort=False):
        level = JUDGED_AT[str(task)]
        for own in [name for name in part["method"].unique() if name.startswith("subnetworks")]:
            for other in (own.replace("subnetworks", "random"), "LoRA", "full", "vector", "vector, within b"):
                for keep in KEEP:
                    share = wins(part, own, other, keep, level)
                    if share is not None:
                        seen = "others kept" if keep else "b alone"
                        verdict[f"{task}: {own} cheaper than {other} at {level:g}, {seen}"] = share
    rates = rows.dropna(subset=["lr"]).drop_duplicates(["task", "method", "keep"])
    rates = rates.pivot(index=["task", "method"], columns="keep", values="lr").reset_index()
    rates = rates.rename(columns={0.0: "learning rate, b alone", 1.0: "learning rate, others kept"})
    return Summary(pd.DataFrame(table), {"steering": _plot(found)}, verdict, {"rates": rates})


def wins(found: pd.DataFrame, own: str, other: str, keep: float, level: float) -> float | None:
    """Share of (seed, pair) of one task where one method costs less than another at a level.

    Who does not reach it loses to who does. None where the other was not run so, or neither reached the level anywhere.
    """
    part = found[(found["level"] == level) & (found["keep"] == keep)]
    sides = part.pivot_table(index=["seed", "a", "b"], columns="method", values="side", dropna=False)
    if own not in sides or other not in sides:
        return None
    pairs = sides[[own, other]].dropna(how="all").fillna(np.inf)
    return float((pairs[own] < pairs[other]).mean()) if len(pairs) else None


def _range(values: pd.Series) -> str:
    """The median, as in the plot, and the range of those that get there."""
    if values.isna().all():
        return "–"
    median = _median_of_all(values)
    return f"{'–' if math.isnan(median) else f'{median:.2g}'} ({values.min():.2g} to {values.max():.2g})"


def _plot(found: pd.DataFrame) -> Figure:
    measures = {"side": "KL elsewhere, nats", "loss_added": "task loss added elsewhere, nats"}
    lines = list(product(found["task"].unique(), measures))
    figure = Figure(figsize=(9, 3 * len(lines) + 0.6), layout="constrained")
    panels = figure.subplots(len(lines), 2, sharey="row", squeeze=False)
    for (task, measure), row in zip(lines, panels, strict=True):
        of_task = found[found["task"] == task]
        own = [name for name in of_task["method"].unique() if not name.startswith("random")]
        colours = dict(zip(own, COLOURS, strict=False))
        for axes, keep, seen in zip(row, KEEP, ("trained on b alone", "others kept in training"), strict=True):
            for method in of_task["method"].unique():
                part = of_task[(of_task["method"] == method) & (of_task["keep"] == keep)]
                medians = part.groupby("level")[measure].agg(_median_of_all)
                if part.empty:
                    continue  # a steering vector is not trained
                style = "--" if method.startswith("random") else "-"
                colour = colours[method.replace("random", "subnetworks")]
                axes.plot(medians.index, medians, style, color=colour, marker=".", label=method)
            axes.set(title=f"{task}, {seen}")
            if measure == "side":
                axes.set_yscale("log")
            else:
                axes.set_yscale("symlog", linthresh=0.01)  # (it may be negative)
        row[0].set(ylabel=measures[measure])
        row[0].legend(frameon=False, fontsize=8)
    for axes in panels[-1]:
        axes.set(xlabel="wanted: p(a) in context b")
    return figure


def _median_of_all(values: pd.Series) -> float:
    """The median, where the runs that never get there cost infinitely much (NaN if that is most of them)."""
    median = float(values.fillna(np.inf).median())
    return median if np.isfinite(median) else float("nan")
