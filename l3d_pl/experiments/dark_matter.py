"""Dark matter: what is left of a sample's gradient, ‖g_i - V_out c_i‖² / ‖g_i‖². Which samples is it, and of what kind?

Per sample and direction (the residual, the gradient, each active subnetwork, and two controls): the second derivative
of D (Hessian-vector products), and how wrong the line that the gradient draws is after a finite step. Over samples:
rank correlations with the share that is left, with and without the gradient's norm taken out (batch top-k chooses by
|c|, and so gives small gradients nothing). And linear probes, as for the error of sparse autoencoders: is the residual
predictable from the codes?

All directions have unit norm, and errors are relative to step x ‖g‖, not to the slope along the direction: along the
residual that is ‖g‖ times the root of the very share that is to be explained. For the same reason one control leans to
the gradient as far as the residual does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.func import functional_call

from l3d_pl.batch_topk import batch_topk
from l3d_pl.divergence import Divergence
from l3d_pl.experiments.common import COLOURS, Summary, doing, load_toy, spread
from l3d_pl.experiments.completeness import held_out
from l3d_pl.lightning_module import L3D
from l3d_pl.toys import fit_quietly

NAMES = {"squared": "X→X²", "digits_cnn": "digits CNN block", "tms": "TMS 5-2"}

DIRECTIONS = {
    "residual": "the residual",
    "leaning": "a random direction that leans to the gradient as the residual does (control)",
    "gradient": "the gradient",
    "active": "the active subnetworks",
    "random": "a random direction (control)",
}
SHORT = ("residual", "random, leaning\nto the gradient", "gradient", "active\nsubnetworks", "random")  # for the plot
MEASURES = {"curved": "curvature", "bent": "|curvature|", "wrong": "error of the line"}
AGAINST = {"energy": "‖g‖²"} | {
    f"{measure}_{direction}": f"{text} along {along}"
    for measure, text in MEASURES.items()
    for direction, along in DIRECTIONS.items()
}
"""Columns of a sample that the unreconstructed share is correlated with."""

PROBES = {
    "codes": "residual from the codes",
    "coefficients": "residual from all coefficients",
    "norm": "‖residual‖ from |codes|",
}
PENALTIES = np.logspace(-2, 6, 17)  # of the probes' ridge regression; features have unit mean square


@dataclass(frozen=True)
class Settings:
    """Settings of `l3d experiment dark_matter`.

    Args:
        steps: {shipped config: training steps of its fit}.
        model: {shipped config: settings of `L3D` that differ}.
        samples: test samples whose curvature is measured.
        probe_samples: test samples that the linear probes see.
        step: of the finite steps, as a share of the norm of the decomposed tensors.
    """

    steps: dict[str, int] = field(default_factory=lambda: {"squared": 600, "digits_cnn": 184})
    model: dict[str, dict[str, Any]] = field(default_factory=lambda: {"digits_cnn": {"n_subnetworks": 50}})
    samples: int = 100
    probe_samples: int = 1000
    step: float = 0.02


TINY = {"steps": {"tms": 30}, "model": {}, "samples": 12, "probe_samples": 60}

Direction = Mapping[str, Tensor]  # {parameter: [*shape]}


# -- measures ----------------------------------------------------------------------------------------------------------


def second_derivatives(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Tensor,
    reference: Tensor,
    divergence: Divergence,
    directions: Sequence[Direction],
) -> list[float]:
    """v^T H v for each v of `directions`, H the Hessian of one sample's D with respect to `parameters` at W0.

    Args:
        inputs, reference: of one sample, with a batch dimension of 1.
    """
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    with torch.enable_grad():
        d = divergence(functional_call(model, leaves, (inputs,)), reference).sum()
        gradient = torch.autograd.grad(d, list(leaves.values()), create_graph=True, materialize_grads=True)
        found = []
        for v in directions:
            slope = torch.stack([(g * v[name]).sum() for name, g in zip(leaves, gradient, strict=True)]).sum()
            if not slope.requires_grad:  # D is a plane in these parameters
                found.append(0.0)
                continue
            product = torch.autograd.grad(slope, list(leaves.values()), retain_graph=True, materialize_grads=True)
            found.append(sum(float((h * v[name]).sum()) for name, h in zip(leaves, product, strict=True)))
    return found


@torch.no_grad()
def change(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Tensor,
    reference: Tensor,
    divergence: Divergence,
    v: Direction,
    step: float,
) -> float:
    """D(W0 + step v) - D(W0) of one sample."""
    moved = {name: tensor + step * v[name] for name, tensor in parameters.items()}
    there, here = (functional_call(model, weights, (inputs,)) for weights in (moved, dict(parameters)))
    return float(divergence(there, reference).sum() - divergence(here, reference).sum())


def line_error(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Tensor,
    reference: Tensor,
    divergence: Divergence,
    v: Direction,
    slope: float,
    step: float,
) -> float:
    """How wrong the line `slope` x step is about D of one sample, the mean of a step along v and of one against it."""
    ways = (step, -step)
    changes = [change(model, parameters, inputs, reference, divergence, v, way) for way in ways]
    return float(np.mean([abs(found - way * slope) for found, way in zip(changes, ways, strict=True)]))


def leaning(residual: Tensor, g: Tensor, random: Tensor) -> Tensor:
    """A unit direction with the residual's cosine to g, otherwise random; all [n_w]."""
    along = g / g.norm().clamp_min(1e-30)
    across = random - (random @ along) * along
    cosine = float((residual @ along / residual.norm().clamp_min(1e-30)).clamp(-1, 1))
    return cosine * along + math.sqrt(1 - cosine**2) * across / across.norm().clamp_min(1e-30)


def rank_correlation(x: Sequence[float], y: Sequence[float], given: Sequence[float] | None = None) -> float:
    """Spearman's correlation; with `given` the partial one: what its ranks explain of both is taken out first."""
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (np.asarray(x), np.asarray(y)))
    if given is not None:
        c = rankdata(np.asarray(given)) - (len(a) + 1) / 2
        a, b = (values - (values @ c) / max(c @ c, 1e-30) * c for values in (a, b))
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 1e-9 * len(a) ** 3 else math.nan


def probe(features: Tensor, targets: Tensor, folds: int = 5, seed: int = 0) -> float:
    """Share of the targets' energy that a ridge regression predicts on samples that it has not seen.

    Its penalty is chosen among the samples that it is fitted on, so that what is noise reads 0 and not less.

    Args:
        features: [N, n], scaled to unit mean square within.
        targets: [N, m]; not centred: 1 - ‖t - t_hat‖² / ‖t‖².
    """
    x = (features / features.square().mean().sqrt().clamp_min(1e-30)).double().numpy()
    y = torch.linalg.qr(targets.double().T, mode="r").R.T.numpy()  # the same inner products in at most N columns
    error = 0.0
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(x):
        fitted = RidgeCV(PENALTIES).fit(x[train], y[train])
        error += float(np.square(y[test] - fitted.predict(x[test]).reshape(y[test].shape)).sum())
    return 1 - error / float(np.square(y).sum())


# -- the experiment ----------------------------------------------------------------------------------------------------


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each sample, of a target that is trained from this seed; probes are repeated in each row."""
    rows = []
    for name, steps in settings.steps.items():
        doing(f"{name}, target and fit")
        toy = load_toy(name, seed, output.parent)
        module = L3D(**(toy.model | settings.model.get(name, {})), seed=seed)
        fit_quietly(module, toy.data_module(seed), max_steps=steps, limit_val_batches=0)
        doing(f"{name}, curvature")
        found = look(module, held_out(toy, settings.probe_samples, seed), settings, seed)
        rows += [{"target": name, **row} for row in found]
    return rows


@torch.no_grad()
def look(module: L3D, inputs: Tensor, settings: Settings, seed: int) -> list[dict[str, Any]]:
    """The rows of one fit, from test inputs."""
    v, extractor, target = module.subnetworks, module.extractor, module.target
    extraction = extractor(inputs, torch.Generator().manual_seed(seed))
    c = v.coefficients(v.prepare(extraction.gradients))[:, 0]
    codes = c * batch_topk(c.unsqueeze(1), module.k)[0][:, 0]
    shapes = {name: v.shapes[name] for name in v.shapes}
    g = torch.cat([extraction.gradients[name].dense().flatten(1) for name in shapes], 1)
    directions = torch.cat([tucker.dense().flatten(1) for tucker in v.v_out.tuckers().values()], 1)
    reconstructed = codes @ directions
    residual, energy = g - reconstructed, g.square().sum(1)
    good = energy > 1e-6 * energy.mean()  # (of a sample that is as its reference is, nothing is left to explain)
    dark = residual.square().sum(1) / energy
    others = torch.randperm(int(good.sum()), generator=torch.Generator().manual_seed(seed))
    left = residual[good]
    norms = left.norm(dim=1, keepdim=True) - left.norm(dim=1).mean()
    probed = {"codes": (codes[good], left), "coefficients": (c[good], left), "norm": (codes[good].abs(), norms)}
    whole = {
        "loss": float(residual.square().sum() / g.square().sum()),
        "silent_share": float((codes != 0).sum(1).eq(0).double().mean()),
        "silent_energy": float(residual[(codes != 0).sum(1) == 0].square().sum() / residual.square().sum()),
    }
    for name, (features, targets) in probed.items():
        whole[f"probe_{name}"] = probe(features, targets)
        whole[f"probe_{name}_shuffled"] = probe(features[others], targets)
    weights = {name: extractor.parameters[name].detach() for name in shapes}
    scale = math.sqrt(sum(float(w.square().sum()) for w in weights.values()))
    step, rows = settings.step * scale, []
    random = torch.Generator().manual_seed(seed)
    for i in good.nonzero().squeeze(1)[: settings.samples].tolist():
        one, reference = inputs[i : i + 1], extraction.references[i : i + 1]
        drawn = torch.randn(2, g.shape[1], generator=random)
        lines = {"residual": residual[i], "gradient": g[i], "random": drawn[0]}
        lines["leaning"] = leaning(residual[i], g[i], drawn[1])
        active = codes[i].nonzero().squeeze(1)
        every = torch.stack([*lines.values(), *directions[active]])
        every /= every.norm(dim=1, keepdim=True).clamp_min(1e-30)
        parts = [_split(line, shapes) for line in every]
        sample = (target, weights, one, reference, extractor.divergence)
        curved = second_derivatives(*sample, parts)
        size = step * math.sqrt(float(energy[i]))
        wrong = [
            line_error(*sample, v, slope, step) / size for v, slope in zip(parts, (every @ g[i]).tolist(), strict=True)
        ]
        measured = {"curved": curved, "bent": np.abs(curved).tolist(), "wrong": wrong}
        row: dict[str, Any] = {"sample": i, "dark": float(dark[i]), "energy": float(energy[i]), "active": len(active)}
        for measure, values in measured.items():
            row |= {f"{measure}_{name}": value for name, value in zip(lines, values, strict=False)}
            row[f"{measure}_active"] = float(np.mean(values[len(lines) :])) if len(active) else math.nan
        rows.append(row | whole)
    return rows


def _split(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(*shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


# -- what the seeds say ------------------------------------------------------------------------------------------------


def correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations with the dark share by target, seed and `column` of `AGAINST`.

    `plain`; `partial`, with ‖g‖² taken out; `coded`, the partial one among samples with a code. Of ‖g‖² itself nothing
    is taken out: `partial` is missing.
    """
    found = []
    for (name, seed), fit in rows.groupby(["target", "seed"], sort=False):
        for column in AGAINST:
            some = fit.dropna(subset=[column])
            coded = some[some["active"] > 0]
            given = [None if column == "energy" else samples["energy"] for samples in (some, coded)]
            plain = rank_correlation(some["dark"], some[column])
            partial = math.nan if column == "energy" else rank_correlation(some["dark"], some[column], given[0])
            among = rank_correlation(coded["dark"], coded[column], given[1])
            found.append((name, seed, column, plain, partial, among))
    return pd.DataFrame(found, columns=["target", "seed", "column", "plain", "partial", "coded"])


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each quantity of each target: its rank correlation with the dark share; the probes in the verdict."""
    table: list[dict[str, Any]] = []
    verdict: dict[str, Any] = {}
    found = correlations(rows)
    for (name, column), fits in found.groupby(["target", "column"], sort=False):
        signed = fits["plain" if column == "energy" else "partial"]
        table.append(
            {
                "target": NAMES.get(str(name), name),
                "dark share against": AGAINST[str(column)],
                "rank correlation": spread(fits["plain"], "{:.2f}"),
                "with ‖g‖² taken out": spread(fits["partial"], "{:.2f}"),
                "so, among samples with a code": spread(fits["coded"], "{:.2f}"),
                "sign the same in": f"{_same_sign(signed)} seeds",
                "median": float(rows.loc[rows["target"] == name, str(column)].median()),
            }
        )
    for name, target in rows.groupby("target", sort=False):
        fits = target.groupby("seed").first()
        for column in ("loss", "silent_share", "silent_energy"):
            verdict[f"{name}: {column}"] = spread(fits[column])
        for probed, text in PROBES.items():
            own, shuffled = spread(fits[f"probe_{probed}"]), spread(fits[f"probe_{probed}_shuffled"])
            verdict[f"{name}: {text}"] = f"{own}; of other samples {shuffled}"
        verdict[f"{name}: median dark share"] = float(target["dark"].median())
    return Summary(pd.DataFrame(table), {"dark_matter": draw(rows, found)}, verdict)


def _same_sign(values: pd.Series) -> str:
    signs = np.sign(values.dropna())
    return f"{int(max((signs > 0).sum(), (signs < 0).sum()))} of {len(values)}"


def draw(rows: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Each sample's dark share against its gradient's norm and the line's error; every seed's partial correlations."""
    targets = list(rows.groupby("target", sort=False))
    figure = Figure(figsize=(15, 4.2 * len(targets)), layout="constrained")
    axes = figure.subplots(len(targets), 3, squeeze=False, width_ratios=(1, 1, 1.3))
    for (*scatters, last), (name, target) in zip(axes, targets, strict=True):
        for ax, column in zip(scatters, ("energy", "wrong_residual"), strict=True):
            ax.plot(target[column], target["dark"], "o", color=COLOURS[0], markersize=3, alpha=0.25, markeredgewidth=0)
            ax.set_title(f"{NAMES.get(str(name), name)}: samples of all seeds", fontsize=13)
            ax.set_xlabel(AGAINST[column], fontsize=13)
            ax.set(xscale="log", ylim=(0, None))
        scatters[0].set_ylabel("unreconstructed share", fontsize=13)
        partial = found[found["target"] == name].set_index("column")["partial"]
        for place, direction in enumerate(DIRECTIONS):
            for j, (measure, text) in enumerate(MEASURES.items()):
                values = partial[[f"{measure}_{direction}"]]
                height = [place + 0.24 * (j - 1)] * len(values)
                last.plot(
                    values, height, "o", color=COLOURS[j], markersize=6, alpha=0.7, label=text if not place else None
                )
        last.axvline(0, color="#999999", linewidth=1)
        last.set_yticks(range(len(DIRECTIONS)), SHORT)
        last.invert_yaxis()
        last.set(xlim=(-1, 1))
        last.set_title(f"{NAMES.get(str(name), name)}: a dot for each seed", fontsize=13)
        last.set_xlabel("rank correlation, ‖g‖² taken out", fontsize=13)
        for ax in (*scatters, last):
            ax.tick_params(labelsize=12)
    legend = axes[0][-1].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower right", ncols=len(MEASURES), frameon=False, fontsize=12)
    return figure
