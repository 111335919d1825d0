"""L3D beside plain baselines on the same gradients (docs/experiments/compare-methods.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, PCA, MiniBatchDictionaryLearning
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from datamodules.toy import ToyData
from l3d_pl.analysis.alignment import score_toy
from l3d_pl.batch_topk import batch_topk
from l3d_pl.experiments.common import COLOURS, Summary, Toy, doing, load_toy, spread
from l3d_pl.gradients import per_sample_gradients
from l3d_pl.initialisation import start_from_gradients
from l3d_pl.lightning_module import L3D
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.training import TargetTraining, load_target, save_target
from l3d_pl.toys import fit_quietly

TOYS = ("tms", "tms_40_10", "residual")
METHODS = ("L3D", "K-lines", "dictionary learning", "k-means", "NMF", "PCA", "random")
SOME_TMS = "TMS, size not known to us"
PUBLISHED = pd.DataFrame(
    [
        ("tms", "SPD, published", "1.000", "0.99 to 1.01"),
        ("tms_40_10", "SPD, published", "1.000", "0.99 to 1.01"),
        (SOME_TMS, "APD, published", "0.998", "0.89"),
    ],
    columns=["toy", "method", "MMCS", "ML2R"],
).assign(**{"CPU s": "not given", "values held": "not given"})
"""Figures of others' papers, for the table: SPD, arXiv 2506.20790; APD, arXiv 2501.14926. They decompose weights, not
gradients."""
PENALTIES = (0.1, 0.3, 0.5)  # of dictionary learning
STARTS = 3  # of NMF and k-means
NMF_ITERATIONS, DICTIONARY_STEPS = 2000, 200  # at most
PATIENCE = 50  # steps of dictionary learning without a lower cost; scikit-learn's own 10 ends it after 30 steps
MOST = 6
TINY = {"toys": ("tms", "residual"), "steps": 20, "rows": 200, "target_epochs": 1}


@dataclass(frozen=True)
class Settings:
    """Methods on the gradients of toys.

    Args:
        toys: `tms`, `tms_40_10`, `residual`.
        steps: of L3D.
        rows: gradients that the other methods are given.
        target_epochs: of each target's training.
    """

    toys: tuple[str, ...] = TOYS
    steps: int = 1600
    rows: int = 5_000
    target_epochs: int = 4


class ResidualMLP(nn.Module):
    """x + relu(x W_in) W_out, without biases: a residual stream of as many places as there are features.

    Parameters: `W_in` [features, hidden], `W_out` [hidden, features].
    """

    def __init__(self, features: int = 10, hidden: int = 10) -> None:
        super().__init__()
        self.W_in = nn.Parameter(nn.init.xavier_normal_(torch.empty(features, hidden)))
        self.W_out = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, features)))

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, features] -> [N, features]."""
        return inputs + relu(inputs @ self.W_in) @ self.W_out


class ResidualData(ToyData):
    """Sparse inputs in [-1, 1] and labels x + relu(x)."""

    def labels(self, inputs: Tensor) -> Tensor:
        return inputs + relu(inputs)


def load_residual(seed: int, folder: Path, epochs: int) -> Toy:
    """The residual MLP; it is trained into `folder`/targets where it is not there."""
    path = folder / "targets" / f"residual_seed{seed}.safetensors"
    # "squared" is the task with inputs of both signs.
    data: dict[str, Any] = {"task": "squared", "n_features": 10, "points": None, "steps_per_epoch": 200}
    L.seed_everything(seed, verbose=False)
    target = ResidualMLP()
    if not path.is_file():
        training = TargetTraining(target, "residual", lr=0.01)
        fit_quietly(
            training,
            ResidualData(**(data | {"batch_size": 1024, "steps_per_epoch": 500}), seed=seed),
            max_epochs=epochs,
        )
        save_target(path, target, metadata={"task": "residual", "seed": seed})
    load_target(path, target)
    model = {"target": target, "n_subnetworks": 10, "ranks": 1, "k": 0.1, "recipe": "l3d_pl", "lr": 0.01}
    return Toy("residual", model, data, {})


def data_of(toy: Toy, seed: int) -> ToyData:
    return (ResidualData if toy.name == "residual" else ToyData)(**toy.data, seed=seed)


def gradients_of(toy: Toy, inputs: Tensor, seed: int) -> Tensor:
    """Dense gradients with random references, [N, n_w], the tensors in the order of the target's."""
    given = per_sample_gradients(toy.target, inputs, generator=torch.Generator().manual_seed(seed))
    return torch.cat([given[name].dense().flatten(1) for name, _ in toy.target.named_parameters()], 1)


def split(toy: Toy, flat: Tensor) -> dict[str, Tensor]:
    """[n, n_w] -> {name: [n, *shape]}."""
    parameters = dict(toy.target.named_parameters())
    parts = flat.split([value.numel() for value in parameters.values()], 1)
    return {name: part.view(-1, *parameters[name].shape) for name, part in zip(parameters, parts, strict=True)}


def joined(toy: Toy, directions: dict[str, Tensor]) -> Tensor:
    """The inverse of `split`."""
    return torch.cat([directions[name].detach().flatten(1) for name, _ in toy.target.named_parameters()], 1)


# -- methods: gradients [N, n_w] -> n directions [n, n_w], and whether they stopped by their own rule ------------------


@dataclass(frozen=True)
class Found:
    """What a method has found.

    Attributes:
        directions: [n, n_w], of any norm.
        readers: V_in of L3D, [n, n_w].
        converged: whether it stopped by its own rule before the most iterations; None: it has no such rule.
    """

    directions: Tensor
    readers: Tensor | None = None
    converged: bool | None = None


def pca(gradients: Tensor, n: int, seed: int) -> Found:
    return Found(_tensor(PCA(min(n, *gradients.shape), random_state=seed).fit(gradients.numpy()).components_))


def k_means(gradients: Tensor, n: int, seed: int) -> Found:
    """Centres of the gradients' directions."""
    fitted = KMeans(n, n_init=STARTS, random_state=seed).fit(normalize(gradients, dim=1).numpy())
    return Found(_tensor(fitted.cluster_centers_), converged=fitted.n_iter_ < fitted.max_iter)


def nmf(gradients: Tensor, n: int, seed: int) -> Found:
    """Parts of the positive and of the negative halves side by side; a direction is the one minus the other.

    The best of `STARTS` by its own error: one from the singular vectors, the others random.
    """
    halves = torch.cat([gradients.clamp_min(0), (-gradients).clamp_min(0)], 1).numpy()
    starts = [("random" if start else "nndsvda", seed + 1000 * start) for start in range(STARTS)]
    fits = [NMF(n, init=init, max_iter=NMF_ITERATIONS, random_state=own).fit(halves) for init, own in starts]
    best = min(fits, key=lambda fitted: fitted.reconstruction_err_)
    above, below = _tensor(best.components_).chunk(2, 1)
    return Found(above - below, converged=best.n_iter_ < NMF_ITERATIONS)


def dictionary(gradients: Tensor, n: int, seed: int, k: float) -> Found:
    """The best of three penalties by L with best codes, on 1000 of its own rows."""
    found: list[Found] = []
    scaled = (gradients / gradients.square().sum(1).mean().sqrt()).numpy()
    epochs = math.ceil(DICTIONARY_STEPS * 256 / len(scaled))
    given = {"max_iter": epochs, "batch_size": 256, "tol": 0.0, "max_no_improvement": PATIENCE, "fit_algorithm": "cd"}
    for alpha in PENALTIES:
        fitted = MiniBatchDictionaryLearning(n, alpha=alpha, random_state=seed, **given).fit(scaled)
        found.append(Found(_tensor(fitted.components_), converged=fitted.n_steps_ < DICTIONARY_STEPS))
    return min(found, key=lambda it: best_codes(it.directions, gradients[:1000], k)[0])


def k_lines(toy: Toy, gradients: Tensor, inputs: Tensor, seed: int) -> Found:
    """The start of L3D (docs/method.md)."""
    samples = int(toy.model.get("init_samples", 1000))
    given = per_sample_gradients(toy.target, inputs[:samples], generator=torch.Generator().manual_seed(seed))
    shapes = {name: value.shape for name, value in toy.target.named_parameters()}
    found = Subnetworks(shapes, toy.model["n_subnetworks"], toy.model["ranks"])
    prepared = found.prepare(given)
    with torch.no_grad():
        start_from_gradients(found, 0, prepared, torch.Generator().manual_seed(seed), gram=prepared.gram())
    return Found(joined(toy, {name: tucker.dense() for name, tucker in found.v_out.tuckers().items()}))


def random_lines(gradients: Tensor, n: int, seed: int) -> Found:
    return Found(torch.randn(n, gradients.shape[1], generator=torch.Generator().manual_seed(seed)))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values)).float()


# -- judging them ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def best_codes(directions: Tensor, gradients: Tensor, k: float, most: int = MOST) -> tuple[float, Tensor]:
    """L with sparse codes that are sought for each sample, whatever found the directions.

    Orthogonal matching pursuit takes up to `most` directions per sample; over the batch those steps are kept that lower
    the error most, k n of them per sample on average. A sample's step is kept only with those before it.

    Args:
        directions: [n, n_w]; gradients: [N, n_w].

    Returns:
        L, and in how many samples each direction takes part, [n].
    """
    gradients, directions = gradients.double(), normalize(directions.double(), dim=1)
    N, n = len(gradients), len(directions)
    rows, chosen = torch.arange(N), torch.empty(N, 0, dtype=torch.long)
    residual, energies = gradients, [gradients.square().sum(1)]
    for _ in range(min(most, n)):
        fit = (residual @ directions.T).abs()
        fit[rows[:, None], chosen] = -1
        chosen = torch.cat([chosen, fit.argmax(1, keepdim=True)], 1)
        atoms = directions[chosen]  # [N, steps, n_w]
        codes = torch.linalg.pinv(atoms @ atoms.mT, hermitian=True) @ (atoms @ gradients[:, :, None])
        residual = gradients - (codes.mT @ atoms)[:, 0]
        energies.append(torch.minimum(residual.square().sum(1), energies[-1]))
    gains = torch.stack(energies[:-1], 1) - torch.stack(energies[1:], 1)
    order = gains.cummin(1).values.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros_like(gains, dtype=torch.bool).flatten()
    kept[order[: round(k * n * N)]] = True
    kept = kept.view_as(gains) & (gains > 0)
    used = torch.bincount(chosen[kept], minlength=n)
    return float(1 - gains[kept].sum() / energies[0].sum()), used


@torch.no_grad()
def linear_codes(readers: Tensor, directions: Tensor, gradients: Tensor, k: float) -> float:
    """L with batch top-k of linear coefficients: readers and directions [n, n_w], gradients [N, n_w]."""
    c = gradients @ readers.T
    mask, _ = batch_topk(c[:, None], k)
    return float((gradients - (c * mask[:, 0]) @ directions).square().sum() / gradients.square().sum())


def judge(toy: Toy, found: Found, gradients: Tensor) -> dict[str, float | None]:
    """Figures of what was found, as unit directions, on test gradients."""
    directions, k = normalize(found.directions, dim=1), toy.model["k"]
    loss, used = best_codes(directions, gradients, k)
    own = directions if found.readers is None else found.readers
    # The rows of W_in are the planted directions of all three toys.
    v, target = {"W_in": split(toy, directions)["W_in"]}, {"W_in": toy.target.get_parameter("W_in")}
    figures = score_toy("tms", v, target, {}, used > 0).figures
    return {name: figures[name] for name in ("mmcs", "ml2r", "recovered")} | {
        "features": float(len(target["W_in"])),
        "loss": loss,
        "loss_linear": linear_codes(own, directions, gradients, k),
        "unused": float((used == 0).sum()),
    }


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each toy and method; targets are trained, and test rows drawn, from this seed."""
    rows = []
    for name in settings.toys:
        doing(f"{name}, target")
        if name == "residual":
            toy = load_residual(seed, output.parent, settings.target_epochs)
        else:
            toy = load_toy(name, seed, output.parent, ("--trainer.max_epochs", str(settings.target_epochs)))
        data = data_of(toy, seed)
        data.setup()
        inputs = data.draw(settings.rows, "train", seed).tensors["inputs"]
        held_out = gradients_of(toy, data.draw(data.n_test, "test", seed).tensors["inputs"], seed + 1000)
        for method in METHODS:
            doing(f"{name}, {method}")
            found, seconds, values = fit(method, toy, inputs, seed, settings.steps)
            row: dict[str, Any] = {"toy": name, "method": method, "cpu_seconds": seconds, "values": values}
            rows.append(row | {"converged": found.converged} | judge(toy, found, held_out))
    return rows


def fit(method: str, toy: Toy, inputs: Tensor, seed: int, steps: int) -> tuple[Found, float, int]:
    """What a method finds, its CPU seconds, and the values that are held at once for the data."""
    if method == "L3D":
        module, seconds = toy.fit(seed, steps, data=data_of(toy, seed))
        v = module.subnetworks
        out, into = (joined(toy, {n: t.dense() for n, t in side.tuckers().items()}) for side in (v.v_out, v.v_in))
        return Found(out, into), seconds, held_by_l3d(module, out.shape[1])
    start, n, k = time.process_time(), toy.model["n_subnetworks"], toy.model["k"]
    gradients = gradients_of(toy, inputs, seed)
    others: dict[str, Callable[[], Found]] = {
        "K-lines": lambda: k_lines(toy, gradients, inputs, seed),
        "dictionary learning": lambda: dictionary(gradients, n, seed, k),
        "k-means": lambda: k_means(gradients, n, seed),
        "NMF": lambda: nmf(gradients, n, seed),
        "PCA": lambda: pca(gradients, n, seed),
        "random": lambda: random_lines(gradients, n, seed),
    }
    found = others[method]()
    samples = int(toy.model.get("init_samples", 1000)) if method == "K-lines" else len(gradients)
    return found, time.process_time() - start, min(samples, len(gradients)) * gradients.shape[1]


def held_by_l3d(module: L3D, n_w: int) -> int:
    """Values of the gradients that it holds at most, for the start and the swaps."""
    return (module.init_samples + (module.swap_samples if module.swap_every else 0)) * n_w


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each toy and method, and one for each published figure; the verdict: L3D against the best other."""
    lines: list[dict[str, Any]] = []
    verdict: dict[str, Any] = {}
    toys = list(rows["toy"].unique())
    for toy in toys:
        of_toy = rows[rows["toy"] == toy]
        for method in METHODS:
            mine = of_toy[of_toy["method"] == method]
            line = {"toy": toy, "method": method, "MMCS": spread(mine["mmcs"]), "ML2R": spread(mine["ml2r"])}
            features, fewest = int(mine["features"].iloc[0]), int(mine["recovered"].min())
            line["found"] = f"{mine['recovered'].mean():.1f} of {features}, fewest {fewest}"
            line |= {"L, best codes": spread(mine["loss"]), "L, linear": spread(mine["loss_linear"])}
            ended = mine["converged"].dropna()
            line["converged"] = f"{int(ended.astype(bool).sum())} of {len(ended)}" if len(ended) else "–"
            line["CPU s"] = spread(mine["cpu_seconds"], "{:.1f}")
            line["values held"] = f"{mine['values'].max():.2g}"
            lines.append(line)
        for title, column, better in (("MMCS", "mmcs", 1), ("L, best codes", "loss", -1)):
            by_method = of_toy.pivot(index="seed", columns="method", values=column)
            best = (better * by_method.drop(columns=["L3D"]).mean()).idxmax()
            verdict[f"{toy}: {title} of L3D"] = float(by_method["L3D"].mean())
            verdict[f"{toy}: {title} of the best other, {best}"] = float(by_method[best].mean())
            verdict[f"{toy}: {title}, L3D minus {best}, by seed"] = spread(by_method["L3D"] - by_method[best])
    wanted = {*toys, SOME_TMS} if {"tms", "tms_40_10"} & set(toys) else set()
    lines += PUBLISHED[PUBLISHED["toy"].isin(wanted)].to_dict("records")
    return Summary(pd.DataFrame(lines).fillna("–"), {"compare-methods": draw(rows)}, verdict)


def draw(rows: pd.DataFrame) -> Figure:
    """Every run: share of features found, MMCS, L with best codes and CPU seconds, method by method."""
    toys = list(rows["toy"].unique())
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    shown = rows.assign(found=rows["recovered"] / rows["features"])
    columns = {"found": "features found", "mmcs": "MMCS", "loss": "L, best codes", "cpu_seconds": "CPU seconds"}
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for t, toy in enumerate(toys):
            for place, method in enumerate(METHODS):
                values = shown[(shown["toy"] == toy) & (shown["method"] == method)][column]
                height = [place + 0.22 * (t - (len(toys) - 1) / 2)] * len(values)
                label = toy if place == 0 else None
                axes.plot(values, height, "o", color=COLOURS[t], markersize=4, alpha=0.6, label=label)
        axes.set_xlabel(title)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_yticks(range(len(METHODS)), METHODS)
    panels[0].invert_yaxis()
    panels[3].set_xscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(toys))
    return figure
