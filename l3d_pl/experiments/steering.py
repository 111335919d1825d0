"""Steer a model along chosen subnetworks: wanted change against side effects (docs/experiments/steering.md).

The wanted change: samples of class b shall be called a; everything else shall stay. Every method ends in a shift Δ of
the decomposed tensors, so one curve serves all: f(x, W0 + s Δ) for strengths s, and along it

    wanted   mean p(a | x) over held-out samples of class b
    side     mean KL(f(x, W0) ‖ f(x, W0 + s Δ)) over all other held-out samples, in nats

A steering vector on a linear layer's output is a shift of that layer's bias. Methods are compared at equal `wanted`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div

from datamodules.digits import DigitsData
from l3d_pl.analysis.interventions import random_directions
from l3d_pl.analysis.outputs import Direction, pushed
from l3d_pl.decomposition import Decomposition
from l3d_pl.experiments.common import COLOURS, Summary, doing, load_toy
from l3d_pl.toys import fit_quietly

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CURVE = ("strength", "wanted", "side", "accuracy_lost")
VECTOR_AT, LORA_AT = "fc1", "fc2"  # layers of the steering vector and of the LoRA


@dataclass(frozen=True)
class Settings:
    """What can be set.

    Args:
        n_subnetworks: n_v.
        fit_steps: of the decomposition.
        tuning_steps: of each learned shift.
        few: subnetworks of the small shift, those with the largest first-order gain; the large shift has as many as a
            LoRA of rank 1 has parameters.
        pairs: (a, b) drawn per seed.
        target_epochs: training of the network that is steered; a network of its own for every seed.
    """

    n_subnetworks: int = 74
    fit_steps: int = 200
    tuning_steps: int = 100
    few: int = 5
    pairs: int = 2
    target_epochs: int = 20


TINY = {"n_subnetworks": 6, "fit_steps": 4, "tuning_steps": 3, "few": 2, "pairs": 1, "target_epochs": 1}


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
    """Learns a shift of a frozen model: −log p(a) on samples of class b, and, weighted, KL from W0 on all others.

    Args:
        pair: (a, b).
        keep: weight of the KL; 0: the samples of b alone are looked at.
    """

    target: nn.Module

    def __init__(self, target: nn.Module, shift: nn.Module, pair: tuple[int, int], keep: float, lr: float) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)  # frozen: in no optimizer, and stays in eval mode
        self.shift, self.pair, self.keep, self.lr = shift, pair, keep, lr

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        a, b = self.pair
        tensors = dict(self.target.named_parameters())
        moved = {name: tensors[name] + value for name, value in self.shift().items()}
        logits = functional_call(self.target, moved, (batch["inputs"],))
        chosen = batch["labels"] == b
        loss = cross_entropy(logits[chosen], torch.full((int(chosen.sum()),), a), reduction="sum")
        loss = loss / chosen.sum().clamp_min(1)
        if self.keep:
            with torch.no_grad():
                before = self.target(batch["inputs"][~chosen])
            loss = loss + self.keep * divergences(before, logits[~chosen]).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.shift.parameters(), lr=self.lr)


# -- measures ----------------------------------------------------------------------------------------------------------


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of each sample in nats, [N]; from logits [N, C]."""
    return kl_div(after.log_softmax(1), before.log_softmax(1), reduction="none", log_target=True).sum(1)


@torch.no_grad()
def curve(
    target: nn.Module, shift: Direction, pair: tuple[int, int], inputs: Tensor, labels: Tensor
) -> list[dict[str, float]]:
    """`wanted`, `side` and the lost accuracy of the other samples, at W0 + s Δ for every s of `STRENGTHS`."""
    a, b = pair
    chosen, origin = labels == b, target(inputs)
    rows = []
    for strength in STRENGTHS:
        with pushed(target, shift, strength):
            logits = target(inputs)
        right = [(found.argmax(1) == labels)[~chosen].double().mean() for found in (origin, logits)]
        rows.append(
            {
                "strength": strength,
                "wanted": float(logits[chosen].softmax(1)[:, a].double().mean()),
                "side": float(divergences(origin, logits)[~chosen].double().mean()),
                "accuracy_lost": float(right[0] - right[1]),
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
    """A row for each pair, method, weight of `keep` and strength."""
    doing("target")
    toy = load_toy("digits_cnn", seed, output, ["--trainer.max_epochs", str(settings.target_epochs)])
    doing("decomposition")
    module, _ = toy.fit(seed, settings.fit_steps, n_subnetworks=settings.n_subnetworks)
    found, data = module.decomposition(), DigitsData(seed=seed)
    data.setup()
    random = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(settings.pairs):
        a, b = torch.randperm(10, generator=random)[:2].tolist()
        rows += _pair_rows(settings, found, data, (a, b), seed)
    return rows


def _pair_rows(
    settings: Settings, found: Decomposition, data: DigitsData, pair: tuple[int, int], seed: int
) -> list[dict[str, Any]]:
    a, b = pair
    target, shapes = found.target, found.subnetworks.shapes
    (images, labels), held_out = (
        [part[torch.arange(len(part))][key] for key in ("inputs", "labels")]  # type: ignore[arg-type]
        for part in (data.train, data.test)
    )
    directions = found.directions()
    order = gains(directions, _gradient(target, shapes, images[labels == b], a)).argsort(descending=True)
    matrix = shapes[f"{LORA_AT}.weight"]
    many = min(sum(matrix), found.n_subnetworks)

    def chosen(n: int) -> dict[str, Tensor]:
        return {name: v[order[:n]] for name, v in directions.items()}

    def drawn(n: int) -> dict[str, Tensor]:
        each = [random_directions(found, int(k), 1, seed)[0] for k in order[:n]]
        return {name: torch.stack([direction[name] for direction in each]) for name in shapes}

    learned: dict[str, tuple[Callable[[], nn.Module], float]] = {
        f"subnetworks, {settings.few}": (lambda: Along(chosen(settings.few)), 0.1),
        f"random, {settings.few}": (lambda: Along(drawn(settings.few)), 0.1),
        f"subnetworks, {many}": (lambda: Along(chosen(many)), 0.03),
        f"random, {many}": (lambda: Along(drawn(many)), 0.03),
        "LoRA": (lambda: LoRA(f"{LORA_AT}.weight", matrix), 0.03),
        "full": (lambda: Full(shapes), 0.001),
    }
    vector = {f"{VECTOR_AT}.bias": _difference_of_means(target, images[labels == a], images[labels == b])}
    rows: list[dict[str, Any]] = []

    def add(method: str, n: int, keep: float, shift: Direction) -> None:
        facts = {"a": a, "b": b, "method": method, "parameters": n, "keep": keep}
        rows.extend(facts | row for row in curve(target, shift, pair, *held_out))

    for method, (make, lr) in learned.items():
        for keep in (0.0, 1.0):
            doing(f"{b} to {a}, {method}, keep {keep:g}")
            torch.manual_seed(seed)
            tuning = Tuning(target, make(), pair, keep, lr)
            fit_quietly(tuning, DigitsData(seed=seed), max_steps=settings.tuning_steps, limit_val_batches=0)
            n = sum(parameter.numel() for parameter in tuning.shift.parameters())
            add(method, n, keep, {name: value.detach() for name, value in tuning.shift().items()})
    add("vector", 1, 0.0, vector)
    return rows


def _gradient(target: nn.Module, names: Mapping[str, Any], inputs: Tensor, a: int) -> dict[str, Tensor]:
    """Gradient of the mean −log p(a)."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in target.named_parameters() if name in names}
    with torch.enable_grad():
        loss = cross_entropy(functional_call(target, tensors, (inputs,)), torch.full((len(inputs),), a))
        return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


@torch.no_grad()
def _difference_of_means(target: nn.Module, towards: Tensor, away: Tensor) -> Tensor:
    """Mean output of the layer `VECTOR_AT` over one set of inputs minus that over another."""
    seen: list[Tensor] = []
    handle = target.get_submodule(VECTOR_AT).register_forward_hook(lambda *args: seen.append(args[-1].mean(0)))
    target(towards), target(away)
    handle.remove()
    return seen[0] - seen[1]


# -- all seeds ---------------------------------------------------------------------------------------------------------


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """The side effect of every seed, pair, method and `keep` at every level of `wanted`."""
    keys = ["method", "parameters", "keep", "seed", "a", "b"]
    result = []
    for key, part in rows.groupby(keys, sort=False):
        strengths, wanted, side, lost = (part[name].tolist() for name in CURVE)
        for level in LEVELS:
            s = strength_at(strengths, wanted, level)
            found = {
                "level": level,
                "side": side_at(strengths, side, s),
                "accuracy_lost": np.interp(s, strengths, lost),
            }
            result.append(dict(zip(keys, key, strict=True)) | found)
    return pd.DataFrame(result)


def summarise(rows: pd.DataFrame) -> Summary:
    """Median cost of each method at half and at nine tenths of the wanted change; the few subnetworks against each."""
    table, found = [], costs(rows)
    for (method, parameters, keep), part in found.groupby(["method", "parameters", "keep"], sort=False):
        row: dict[str, Any] = {"method": method, "parameters": parameters, "others kept": "yes" if keep else "no"}
        for level in (0.5, 0.9):
            side = part[part["level"] == level]["side"]
            row[f"reach {level:g}"] = f"{side.notna().sum()} of {len(side)}"
            row[f"side at {level:g}"] = _range(side)
        row["accuracy lost at 0.9"] = _range(part[part["level"] == 0.9]["accuracy_lost"])
        table.append(row)
    verdict = {}
    methods = list(found["method"].unique())
    for own in [name for name in methods if name.startswith("subnetworks")]:
        for other in (own.replace("subnetworks", "random"), "LoRA", "full", "vector"):
            for keep in (0.0, 1.0):
                share = wins(found, own, other, keep)
                if share is not None:
                    verdict[f"{own} cheaper than {other} at 0.9, {'others kept' if keep else 'b alone'}"] = share
    return Summary(pd.DataFrame(table), {"steering": _plot(found)}, verdict)


def wins(found: pd.DataFrame, own: str, other: str, keep: float, level: float = 0.9) -> float | None:
    """Share of (seed, pair) where one method costs less than another at a level.

    Who does not reach it loses to who does. None where the other was not run so, or neither reached the level anywhere.
    """
    part = found[(found["level"] == level) & (found["keep"] == keep)]
    sides = part.pivot_table(index=["seed", "a", "b"], columns="method", values="side", dropna=False)
    if own not in sides or other not in sides:
        return None
    pairs = sides[[own, other]].dropna(how="all").fillna(np.inf)
    return float((pairs[own] < pairs[other]).mean()) if len(pairs) else None


def _range(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return "–"
    return f"{values.median():.2g} ({values.min():.2g} to {values.max():.2g})"


def _plot(found: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    methods = list(found["method"].unique())
    for axes, keep, title in zip(
        panels, (0.0, 1.0), ("trained on class b alone", "others kept in training"), strict=True
    ):
        for colour, method in zip(COLOURS, methods, strict=False):
            part = found[(found["method"] == method) & (found["keep"] == keep)]
            medians = part.groupby("level")["side"].agg(_median_of_all)
            if part.empty:
                continue  # a steering vector is not trained
            style = "--" if method.startswith("random") else "-"
            axes.plot(medians.index, medians, style, color=colour, marker=".", label=method)
        axes.set(xlabel="wanted: p(a) on class b", title=title, yscale="log")
    panels[0].set(ylabel="side effect: KL elsewhere, nats")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _median_of_all(values: pd.Series) -> float:
    """The median, where the runs that never get there cost infinitely much (NaN if that is most of them)."""
    median = float(values.fillna(np.inf).median())
    return median if np.isfinite(median) else float("nan")
