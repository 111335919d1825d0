"""Dark matter: what is left of a sample's gradient, ‖g_i - V_out c_i‖² / ‖g_i‖². Which samples is it, and of what kind?

Per sample: second derivatives of D along the residual, the gradient, the active subnetworks and a random direction
(Hessian-vector products), and how wrong the line that the gradient draws is after a finite step. Over samples: rank
correlations with the share that is left, with and without the gradient's norm taken out (batch top-k chooses by |c|,
and so gives small gradients nothing). And linear probes, as for the error of sparse autoencoders: is the residual
predictable from the codes?

All directions have unit norm, and errors are relative to step x ‖g‖, not to the slope along the direction: along the
residual that is ‖g‖ times the root of the very share that is to be explained.
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
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.func import functional_call

from l3d_pl.batch_topk import batch_topk
from l3d_pl.divergence import Divergence
from l3d_pl.experiments.common import COLOURS, Summary, doing, load_toy, spread
from l3d_pl.lightning_module import L3D
from l3d_pl.toys import fit_quietly

NAMES = {"squared": "X→X²", "digits_cnn": "digits CNN block", "tms": "TMS 5-2"}

AGAINST = {
    "energy": "‖g‖²",
    "curved_residual": "curvature along the residual",
    "curved_gradient": "curvature along the gradient",
    "curved_active": "curvature along the active subnetworks",
    "curved_random": "curvature along a random direction (control)",
    "wrong_residual": "error of the line along the residual",
    "wrong_gradient": "error of the line along the gradient",
}
"""Columns of a sample that the unreconstructed share is correlated with."""


@dataclass(frozen=True)
class Settings:
    """Settings of `l3d experiment dark_matter`.

    Args:
        steps: {shipped config: training steps of its fit}.
        model: {shipped config: settings of `L3D` that differ}.
        samples: test samples whose curvature is measured.
        probe_samples: test samples that the linear probes see.
        step: of the finite steps, as a share of the norm of the decomposed tensors.
        target: seed of the targets' training.
    """

    steps: dict[str, int] = field(default_factory=lambda: {"squared": 600, "digits_cnn": 184})
    model: dict[str, dict[str, Any]] = field(default_factory=lambda: {"digits_cnn": {"n_subnetworks": 50}})
    samples: int = 100
    probe_samples: int = 1000
    step: float = 0.02
    target: int = 42


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

    Args:
        features: [N, n], scaled to unit mean square within.
        targets: [N, m]; not centred: 1 - ‖t - t_hat‖² / ‖t‖².
    """
    x = (features / features.square().mean().sqrt().clamp_min(1e-30)).double().numpy()
    y, error = targets.double().numpy(), 0.0
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(x):
        fitted = Ridge(alpha=1.0).fit(x[train], y[train])
        error += float(np.square(y[test] - fitted.predict(x[test]).reshape(y[test].shape)).sum())
    return 1 - error / float(np.square(y).sum())


# -- the experiment ----------------------------------------------------------------------------------------------------


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each sample; what belongs to the whole fit (probes) is repeated in each."""
    rows = []
    for name, steps in settings.steps.items():
        toy = load_toy(name, settings.target, output.parent)
        doing(f"{name}, fit")
        module = L3D(**(toy.model | settings.model.get(name, {})), seed=seed)
        fit_quietly(module, toy.data_module(seed), max_steps=steps, limit_val_batches=0)
        doing(f"{name}, curvature")
        found = look(module, toy.held_out()[: settings.probe_samples], settings, seed)
        rows += [{"target": name, **row} for row in found]
    return rows


@torch.no_grad()
def look(module: L3D, inputs: Tensor, settings: Settings, seed: int) -> list[dict[str, Any]]:
    """The rows of one fit, from test inputs."""
    v, extractor, target = module.subnetworks, module.extractor, module.target
    extraction = extractor(inputs, torch.Generator().manual_seed(0))
    c = v.coefficients(v.prepare(extraction.gradients))[:, 0]
    codes = c * batch_topk(c.unsqueeze(1), module.k)[0][:, 0]
    shapes = {name: v.shapes[name] for name in v.shapes}
    g = torch.cat([extraction.gradients[name].dense().flatten(1) for name in shapes], 1)
    directions = torch.cat([tucker.dense().flatten(1) for tucker in v.v_out.tuckers().values()], 1)
    reconstructed = codes @ directions
    residual, energy = g - reconstructed, g.square().sum(1)
    good = energy > 1e-6 * energy.mean()  # (of a sample that is as its reference is, nothing is left to explain)
    dark = residual.square().sum(1) / energy
    order = torch.randperm(int(good.sum()), generator=torch.Generator().manual_seed(seed))
    left = residual[good]
    norms = left.norm(dim=1, keepdim=True) - left.norm(dim=1).mean()
    whole = {
        "loss": float(residual.square().sum() / g.square().sum()),
        "silent_share": float((codes != 0).sum(1).eq(0).double().mean()),
        "silent_energy": float(residual[(codes != 0).sum(1) == 0].square().sum() / residual.square().sum()),
        "probe_codes": probe(codes[good], left),
        "probe_coefficients": probe(c[good], left),
        "probe_shuffled": probe(codes[good][order], left),
        "probe_norm": probe(codes[good].abs(), norms),
        "probe_norm_shuffled": probe(codes[good].abs()[order], norms),
    }
    weights = {name: extractor.parameters[name].detach() for name in shapes}
    scale = math.sqrt(sum(float(w.square().sum()) for w in weights.values()))
    step, rows = settings.step * scale, []
    random = torch.Generator().manual_seed(seed)
    for i in good.nonzero().squeeze(1)[: settings.samples].tolist():
        lines = {"residual": residual[i], "gradient": g[i], "random": torch.randn(g.shape[1], generator=random)}
        lines = {name: line / line.norm().clamp_min(1e-30) for name, line in lines.items()}
        active = codes[i].nonzero().squeeze(1)
        every = [*lines.values(), *directions[active]]
        one, reference = inputs[i : i + 1], extraction.references[i : i + 1]
        seconds = second_derivatives(
            target, weights, one, reference, extractor.divergence, [_split(line, shapes) for line in every]
        )
        row: dict[str, Any] = {"sample": i, "dark": float(dark[i]), "energy": float(energy[i]), "active": len(active)}
        row |= {f"curved_{name}": second for name, second in zip(lines, seconds, strict=False)}
        row["curved_active"] = float(np.mean(seconds[len(lines) :])) if len(active) else math.nan
        for name in ("residual", "gradient"):
            slope = float(lines[name] @ g[i])
            line = _split(lines[name], shapes)
            both = [
                abs(change(target, weights, one, reference, extractor.divergence, line, delta) - delta * slope)
                for delta in (step, -step)
            ]
            row[f"wrong_{name}"] = float(np.mean(both)) / (step * math.sqrt(float(energy[i])))
        rows.append(row | whole)
    return rows


def _split(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(*shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


# -- what the seeds say ------------------------------------------------------------------------------------------------


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each quantity of each target: its rank correlation with the dark share; the probes in the verdict."""
    table: list[dict[str, Any]] = []
    verdict: dict[str, Any] = {}
    for name, target in rows.groupby("target", sort=False):
        for column, text in AGAINST.items():
            plain, partial, coded = [], [], []
            for _, fit in target.groupby("seed"):
                fit = fit.dropna(subset=[column])
                plain.append(rank_correlation(fit["dark"], fit[column]))
                some = fit[fit["active"] > 0]
                if column == "energy":
                    coded.append(rank_correlation(some["dark"], some[column]))
                    continue
                partial.append(rank_correlation(fit["dark"], fit[column], fit["energy"]))
                coded.append(rank_correlation(some["dark"], some[column], some["energy"]))
            table.append(
                {
                    "target": NAMES.get(str(name), name),
                    "dark share against": text,
                    "rank correlation": spread(plain, "{:.2f}"),
                    "with ‖g‖² taken out": spread(partial, "{:.2f}"),
                    "so, among samples with a code": spread(coded, "{:.2f}"),
                    "sign the same in": f"{_same_sign(plain if column == 'energy' else partial)} seeds",
                    "median": float(target[column].median()),
                }
            )
        fits = target.groupby("seed").first()
        for column in ("loss", "silent_share", "silent_energy", *(c for c in fits if str(c).startswith("probe"))):
            verdict[f"{name}: {column}"] = spread(fits[column])
        verdict[f"{name}: median dark share"] = float(target["dark"].median())
    return Summary(pd.DataFrame(table), {"dark_matter": draw(rows)}, verdict)


def _same_sign(values: Sequence[float]) -> str:
    signs = np.sign([value for value in values if math.isfinite(value)])
    return f"{int(max((signs > 0).sum(), (signs < 0).sum()))} of {len(values)}"


def draw(rows: pd.DataFrame) -> Figure:
    """Each sample's dark share against its gradient's norm, against curvature and against the line's error."""
    targets = list(rows.groupby("target", sort=False))
    columns = ("energy", "curved_residual", "curved_gradient", "wrong_gradient")
    figure = Figure(figsize=(12, 3 * len(targets)), layout="constrained")
    axes = figure.subplots(len(targets), len(columns), squeeze=False, sharey=True)
    for line, (name, target) in zip(axes, targets, strict=True):
        for ax, column in zip(line, columns, strict=True):
            for colour, (_, fit) in zip(COLOURS, target.groupby("seed"), strict=False):
                ax.plot(fit[column], fit["dark"], "o", color=colour, markersize=2, alpha=0.4)
            ax.set_xscale("log" if column in ("energy", "wrong_gradient") else "symlog")
            ax.set(xlabel=AGAINST[column], ylim=(-0.03, 1.3))
        line[0].set_ylabel(f"{NAMES.get(str(name), name)}:\nunreconstructed share")
    return figure
