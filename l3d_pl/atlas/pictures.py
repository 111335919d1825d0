"""PNGs of one decomposition, from plain tensors: what the subnetworks look like, what they read, how training went.

Every function writes one PNG and returns a `Picture` with the alt text and caption that belong to it. They draw on
their own `Figure` and never touch pyplot, so no backend has to be chosen and no figure stays open. Colours are Okabe
and Ito's blue and vermilion, which readers with any colour vision tell apart.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from l3d_pl.analysis.alignment import abs_cosines, energy_shares, require_finite, single_rows
from l3d_pl.errors import L3DError

NEGATIVE, POSITIVE, ACCENT, PALE, INK = "#0072b2", "#d55e00", "#0072b2", "#b9c0c8", "#24292f"
SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#9ecae1", "#0072b2", "#08306b"])
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#57606a",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 110,
    "text.parse_math": False,  # a parameter may be called "a$b$"
}
MAX_NETWORKS = 15
MAX_TENSORS = 40
MAX_UNITS = 64  # per layer; beyond, edges are no longer seen


class Picture(NamedTuple):
    """A written PNG with the words that go with it."""

    path: Path
    alt: str
    caption: str


# --- Subnetworks as networks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One layer of a feed-forward toy: which tensors hold its weights [in, out] and its bias [out]."""

    weight: str
    transposed: bool
    bias: str | None

    def read(self, tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray | None]:
        """Weights [in, out] and bias; tensors that are not there (not decomposed) are drawn as zeros."""
        weight = tensors.get(self.weight, torch.zeros_like(target[self.weight]))
        bias = None if self.bias is None else tensors.get(self.bias, torch.zeros_like(target[self.bias]))
        return _numpy(weight.T if self.transposed else weight), None if bias is None else _numpy(bias)


def layers_of(target: Mapping[str, Tensor]) -> list[_Layer]:
    """How to draw a target model as columns of units, or [] if its tensors are none of the shapes known here.

    Known: W_in alone (tied: used as encoder, transposed as decoder), W_in with W_out, both with or without b; and a
    chain of Linear layers numbered as in nn.Sequential ("0.weight", "0.bias", "2.weight", …).
    """
    if set(target) - {"b"} == {"W_in"}:
        layers = [_Layer("W_in", False, None), _Layer("W_in", True, "b" if "b" in target else None)]
    elif set(target) - {"b"} == {"W_in", "W_out"}:
        layers = [_Layer("W_in", False, None), _Layer("W_out", False, "b" if "b" in target else None)]
    else:
        numbers = sorted({int(match[1]) for name in target if (match := re.fullmatch(r"(\d+)\.weight", name))})
        layers = [_Layer(f"{i}.weight", True, f"{i}.bias" if f"{i}.bias" in target else None) for i in numbers]
    names = {name for layer in layers for name in (layer.weight, layer.bias) if name is not None}
    if not layers or names != set(target) or any(target[layer.weight].ndim != 2 for layer in layers):
        return []
    shapes = [layer.read(target, target)[0].shape for layer in layers]
    chained = all(a[1] == b[0] for a, b in pairwise(shapes))
    return layers if chained and max(max(shape) for shape in shapes) <= MAX_UNITS else []


def networks(
    path: Path,
    v_out: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    circuits: Sequence[str] | None = None,
    alive: Tensor | None = None,
) -> Picture:
    """The target model and its subnetworks as networks: edges coloured by sign, as wide as |weight|.

    v_out: {parameter: [n_v, *shape]}; target: {parameter: shape}, of a kind that `layers_of` knows; circuits: the name
    of each subnetwork's circuit ("feature 3"), by which the panels are then ordered; alive: bool [n_v]. Each panel has
    its own scale. A subnetwork's sign is free, so each is shown with the sign that has a non-negative inner product
    with the target's parameters. At most `MAX_NETWORKS` are drawn. Raises L3DError for a target of another kind and for
    values that are not finite.
    """
    layers = layers_of(target)
    if not layers:
        raise L3DError(f"networks: found a target of {', '.join(target)}, which is no chain of small layers to draw")
    require_finite(v_out)
    n_v = len(next(iter(v_out.values())))
    order = sorted(range(n_v), key=lambda k: (_natural(circuits[k]) if circuits else [], k))[:MAX_NETWORKS]
    shown = len(order)
    columns = 3 if shown < 6 else 4
    rows = math.ceil((shown + 1) / columns)
    with new_figure(path, (3.3 * columns, 2.9 * rows + 0.5)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        _draw_network(axes[0], layers, target, target)
        axes[0].set_title("target model", fontweight="bold")
        for k, ax in zip(order, axes[1:], strict=False):
            subnetwork = {name: v[k].detach().cpu() for name, v in v_out.items()}
            overlap = sum(float((v * target[name].detach().cpu()).sum()) for name, v in subnetwork.items())
            sign = -1.0 if overlap < 0 else 1.0
            dead = alive is not None and not bool(alive[k])
            _draw_network(ax, layers, {name: sign * v for name, v in subnetwork.items()}, target)
            title = f"subnetwork {k}" + (f" · {circuits[k]}" if circuits else "") + (" · dead" if dead else "")
            ax.set_title(title, color="#6e7781" if dead else INK)
        for ax in axes[shown + 1 :]:
            ax.axis("off")
        figure.legend(
            handles=[
                Line2D([], [], color=POSITIVE, linewidth=3, label="positive weight"),
                Line2D([], [], color=NEGATIVE, linewidth=3, label="negative weight"),
            ],
            loc="outside lower center",
            ncols=2,
            frameon=False,
        )
    alt = f"The target model and {shown} of its {n_v} subnetworks drawn as networks of units and weighted edges."
    if circuits:
        alt += f" {_listing(f'{k}: {circuits[k]}' for k in order)}."
    caption = (
        "Edges: width is |weight| over the panel's largest (below 3 % not drawn), colour its sign. Units are filled by "
        "their bias on the same scale. A subnetwork's sign is free; shown is the one that agrees with the target."
    )
    return Picture(path, alt, caption + (f" The first {shown} of {n_v} subnetworks." if shown < n_v else ""))


def _draw_network(
    ax: Axes, layers: Sequence[_Layer], tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> None:
    read = [layer.read(tensors, target) for layer in layers]
    sizes = [read[0][0].shape[0], *(weight.shape[1] for weight, _ in read)]
    largest = max((float(np.abs(x).max()) for pair in read for x in pair if x is not None), default=0.0) or 1.0
    height = [(np.arange(n) - (n - 1) / 2) / max(n - 1, 1) * min(1.0, n / 5) for n in sizes]
    width = float(np.clip(40 / max(sizes), 1.0, 4.0))

    for column, (weight, _) in enumerate(read):
        strength = weight / largest
        i, j = np.nonzero(np.abs(strength) >= 0.03)
        order = np.argsort(np.abs(strength[i, j]))  # strong edges on top
        i, j = i[order], j[order]
        starts = [(column, y) for y in height[column][i]]
        ends = [(column + 1, y) for y in height[column + 1][j]]
        colours = [POSITIVE if s > 0 else NEGATIVE for s in strength[i, j]]
        widths = (width * np.abs(strength[i, j])).tolist()
        lines = list(zip(starts, ends, strict=True))
        ax.add_collection(LineCollection(lines, linewidths=widths, colors=colours, zorder=1))
    for column, y in enumerate(height):
        bias = read[column - 1][1] if column else None
        fill = [_tint(b / largest) for b in bias] if bias is not None else "white"
        x, size = np.full(len(y), column), float(np.clip(800 / max(sizes), 12, 160))
        ax.scatter(x, y, s=size, c=fill, edgecolors=INK, linewidths=0.8, zorder=2)
        if column in (0, len(height) - 1):
            every = 1 if len(y) <= 12 else 5
            for unit in range(0, len(y), every):
                side = -1 if column == 0 else 1
                beside = (side * (3 + math.sqrt(size) / 2), 0)  # in points, clear of the unit's circle
                style: Any = {"ha": "right" if side < 0 else "left", "va": "center", "fontsize": 8}
                ax.annotate(str(unit), (column, y[unit]), xytext=beside, textcoords="offset points", **style)
    last = len(sizes) - 1
    ax.set_xticks([0, last], ["input feature", "output"], fontsize=9)
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.set_xlim(-0.16 * last - 0.2, last + 0.16 * last + 0.2)
    ax.set_ylim(0.56, -0.56)  # unit 0 at the top
    ax.spines[["left", "bottom"]].set_visible(False)


def _tint(value: float) -> tuple[float, float, float]:
    """White at 0, the full colour of its sign at ±1."""
    red, green, blue = to_rgb(POSITIVE if value > 0 else NEGATIVE)
    amount = min(abs(float(value)), 1.0)
    return 1 - amount * (1 - red), 1 - amount * (1 - green), 1 - amount * (1 - blue)


# --- What subnetworks read --------------------------------------------------------------------------------------------


def directions(
    path: Path, v_out: Mapping[str, Tensor], target: Mapping[str, Tensor], *, group_size: int = 1
) -> Picture:
    """Each subnetwork's encoder against the target's features.

    A tied encoder into two hidden units is drawn in their plane: the target's row of W_in for each feature, and over it
    each subnetwork's dominant row. A tied encoder into more units: |cos| of each subnetwork's W_in with each single row
    of the target's. Any other first layer learns from the outputs' gradient, so its rows need not be parallel to the
    target's; shown is the share of its energy in each feature. Subnetworks (rows) are ordered by Hungarian assignment
    to the features; `group_size` > 1 rules off groups of features. Arguments and errors as in `networks`.
    """
    layers = layers_of(target)
    if not layers or layers[0].weight not in v_out:
        raise L3DError(f"directions: found {', '.join(v_out)} decomposed, which holds no first layer known here")
    require_finite(v_out)
    first = layers[0]
    encoder = v_out[first.weight].detach().double().cpu()
    features = target[first.weight].detach().double().cpu()
    if first.transposed:  # Linear keeps [out, in]
        encoder, features = encoder.transpose(1, 2), features.T
    shares = energy_shares(encoder.square().sum(2))
    tied = len({layer.weight for layer in layers}) < len(layers)
    if tied and features.shape[1] == 2:
        return _arrows(path, encoder, features, shares)
    if tied:
        matrix = abs_cosines(encoder.flatten(1), single_rows(features))
        what = f"|cos| with the feature's row of {first.weight}"
    else:
        matrix, what = shares, f"share of the energy of {first.weight}"
    return _feature_map(path, matrix, what, group_size)


def _arrows(path: Path, encoder: Tensor, features: Tensor, shares: Tensor) -> Picture:
    dominant = shares.argmax(1)
    own = features[dominant]
    rows = encoder[torch.arange(len(encoder)), dominant]
    dots = (rows * own).sum(1)
    rows = rows * torch.where(dots < 0, -1.0, 1.0)[:, None]
    with new_figure(path, (6.2, 6.0)) as figure:
        ax = figure.subplots()
        for i, (x, y) in enumerate(features.tolist()):
            ax.plot([0, x], [0, y], color=PALE, linewidth=7, solid_capstyle="round", zorder=1)
            length = math.hypot(x, y) or 1.0
            outward = (8 * x / length, 12 * y / length)
            ha = "left" if x > 0.3 * length else "right" if x < -0.3 * length else "center"
            va = "bottom" if y > 0.7 * length else "top" if y < -0.7 * length else "center"
            style: Any = {"ha": ha, "va": va, "color": "#57606a", "textcoords": "offset points"}
            ax.annotate(f"feature {i}", (x, y), xytext=outward, **style)
        shown: dict[int, list[int]] = {}
        for k, (x, y) in enumerate(rows.tolist()):
            arrow = {"arrowstyle": "-|>", "color": ACCENT, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", (x, y), (0, 0), arrowprops=arrow, zorder=2)
            shown.setdefault(int(dominant[k]), []).append(k)
        for members in shown.values():
            x, y = rows[members[0]].tolist()
            length = math.hypot(x, y) or 1.0
            words = f"k = {', '.join(map(str, members))}"
            beside = (-26 * y / length, 15 * x / length)  # in points, clear of the bar
            style = {"ha": "center", "va": "center", "color": ACCENT, "fontsize": 10, "textcoords": "offset points"}
            ax.annotate(words, (0.6 * x, 0.6 * y), xytext=beside, **style)
        reach = 1.4 * max(float(features.abs().max()), float(rows.abs().max()))
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.set_xlabel("weight to hidden unit 0")
        ax.set_ylabel("weight to hidden unit 1")
        ax.axhline(0, color="#e4e7eb", zorder=0)
        ax.axvline(0, color="#e4e7eb", zorder=0)
        handles = [
            Line2D([], [], color=PALE, linewidth=7, label="target: row of W_in"),
            Line2D([], [], color=ACCENT, linewidth=1.8, label="subnetwork k: its largest row of W_in"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    matched = zip(dominant.tolist(), torch.nn.functional.cosine_similarity(rows, own, dim=1).tolist(), strict=True)
    pairs = _listing(f"{k} with feature {i} (|cos| {c:.3f})" for k, (i, c) in enumerate(matched))
    caption = (
        "Encoder directions in the plane of the two hidden units. Subnetworks have unit norm over all their tensors "
        "and no sign of their own: compare directions, not lengths."
    )
    return Picture(path, f"Arrows of the target's features and of the subnetworks: {pairs}.", caption)


def _feature_map(path: Path, matrix: Tensor, what: str, group_size: int) -> Picture:
    n_v, n_features = matrix.shape
    rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
    own = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    if group_size > 1:
        best = matrix.unflatten(1, (-1, group_size)).sum(2).argmax(1)
        order = sorted(range(n_v), key=lambda k: (int(best[k]), -float(matrix[k].max())))
    else:
        order = sorted(range(n_v), key=lambda k: own.get(k, n_features + k))
    with new_figure(path, _map_size(n_features, n_v)) as figure:
        ax = figure.subplots()
        _heat_map(figure, ax, matrix[order].numpy(), what, 1.0)
        _index_ticks(ax.xaxis, range(n_features))
        _index_ticks(ax.yaxis, order)
        for edge in range(group_size, n_features, group_size) if group_size > 1 else ():
            ax.axvline(edge - 0.5, color=INK, linewidth=0.8)
        ax.set_xlabel("input feature" + (f", in groups of {group_size}" if group_size > 1 else ""))
        ax.set_ylabel("subnetwork")
    strongest = _listing(f"{k}: {int(matrix[k].argmax())} ({matrix[k].max():.2f})" for k in order)
    alt = f"Heat map of {what}, {n_v} subnetworks by {n_features} features. Strongest feature of each: {strongest}."
    order_by = "their strongest group" if group_size > 1 else "the feature each is assigned to (Hungarian)"
    return Picture(path, alt, f"{what[0].upper()}{what[1:]}, one row per subnetwork, ordered by {order_by}.")


# --- Any model --------------------------------------------------------------------------------------------------------


def norm_share(path: Path, shares: Tensor, names: Sequence[str]) -> Picture:
    """Share of each subnetwork's squared norm that lies in each parameter tensor; a subnetwork's shares sum to 1.

    shares: [n_v, tensors]; names: of the tensors. Beyond `MAX_TENSORS` tensors the smallest are summed into one row.
    Raises L3DError for values that are not finite.
    """
    require_finite({"norm shares": shares})
    shares, n_tensors = shares.T, len(names)
    names = [_short(name) for name in names]
    largest_share = float(shares.max())
    if len(names) > MAX_TENSORS:
        kept = sorted(shares.mean(1).argsort(descending=True)[: MAX_TENSORS - 1].tolist())
        rest = [i for i in range(len(names)) if i not in set(kept)]
        names = [*(names[i] for i in kept), f"{len(rest)} other tensors"]
        largest_share = float(shares[kept].max())
        shares = torch.cat([shares[kept], shares[rest].sum(0, keepdim=True)])
    n_v = shares.shape[1]
    with new_figure(path, _map_size(n_v, len(names))) as figure:
        ax = figure.subplots()
        _heat_map(figure, ax, shares.numpy(), "share of squared norm", largest_share)
        _index_ticks(ax.xaxis, range(n_v))
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set_xlabel("subnetwork")
        ax.set_ylabel("parameter tensor")
    mean = shares.mean(1)
    largest = ", ".join(f"{names[i]} {mean[i]:.0%}" for i in mean.argsort(descending=True)[:5].tolist())
    alt = f"Heat map: share of squared norm of {n_v} subnetworks in {n_tensors} tensors. Largest means: {largest}."
    return Picture(path, alt, "Share of each subnetwork's squared norm in each parameter tensor; a column sums to 1.")


def p_act_histogram(path: Path, p_act: Tensor, *, k: float | None = None) -> Picture:
    """How many subnetworks are active on which share of the samples.

    p_act: [n_v] in [0, 1]; k: the fraction of coefficients that batch top-k keeps, which is the mean of P_act when both
    are taken on the same samples. Raises L3DError for values that are not finite.
    """
    require_finite({"P_act": p_act})
    values = p_act.detach().double().cpu().numpy()
    dead = int((values == 0).sum())
    edges = np.linspace(0, max(float(values.max(initial=0.0)) * 1.05, 0.01), 25).tolist()
    with new_figure(path, (7.2, 3.8)) as figure:
        ax = figure.subplots()
        ax.hist(values[values > 0], edges, color=ACCENT, edgecolor="white", label="live")
        if dead:
            width = edges[1]
            ax.bar(-1.5 * width, dead, width, color=POSITIVE, hatch="//", edgecolor="white", label="dead (P_act = 0)")
        if k is not None:
            ax.axvline(k, color=INK, linestyle="--", linewidth=1.2, label=f"k = {k:g}")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("P_act, share of samples in whose reconstruction a subnetwork takes part")
        ax.set_ylabel("number of subnetworks")
        ax.legend(frameon=False)
    live = values[values > 0]
    spread = f", live ones between {live.min():.3g} and {live.max():.3g}" if len(live) else ""
    alt = f"Histogram of P_act of {len(values)} subnetworks: {dead} dead{spread}."
    return Picture(path, alt, f"How often each subnetwork is active. {dead} of {len(values)} are dead.")


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The columns of Lightning's metrics.csv as {name: (steps, values)}, each without its blank and non-finite cells.

    Sorted by step; a step that a resumed run logged again counts as logged last. Raises L3DError if the file is
    missing, cannot be read or has no step column.
    """
    if not path.is_file():
        raise L3DError(f"metrics: found no file {path}, so nothing to draw")
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
    except (OSError, csv.Error) as error:
        raise L3DError(f"metrics: {path} cannot be read ({error})") from None
    names = rows[0] if rows else []
    if "step" not in names:
        raise L3DError(f"metrics: found columns {', '.join(names) or 'none'} in {path}, needed is 'step'")
    columns: dict[str, dict[float, float]] = {}
    for row in rows[1:]:
        cells = {name: value for name, text in zip(names, row, strict=False) if (value := _float(text)) is not None}
        if "step" in cells:
            step = cells.pop("step")
            for name, value in cells.items():
                columns.setdefault(name, {})[step] = value
    return {name: (np.array(sorted(c)), np.array([c[step] for step in sorted(c)])) for name, c in columns.items()}


def loss_curve(path: Path, metrics: Path) -> Picture:
    """Reconstruction loss against step, from Lightning's metrics.csv: every `train/loss` and `val/loss` column.

    Train: each logged value and their running mean; validation: points. Names may carry Lightning's `_step` or
    `_epoch`. Raises L3DError if the file is missing or holds no finite value of either.
    """
    columns = read_metrics(metrics)
    train, val = (_first(columns, prefix) for prefix in ("train/loss", "val/loss"))
    if train is None and val is None:
        found = ", ".join(sorted(columns)) or "no finite values"
        raise L3DError(f"metrics: found {found} in {metrics}, needed is 'train/loss' or 'val/loss'")
    words = []
    with new_figure(path, (7.2, 3.8)) as figure:
        ax = figure.subplots()
        top = 0.0
        if train is not None:
            steps, values = train
            window = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            meaning = f"train, mean of {window} logged values" if window > 1 else "train"
            if window > 1:
                ax.plot(steps, values, color=PALE, linewidth=0.8, label="train, as logged")
            marker = "" if window > 1 else "."
            ax.plot(steps[window - 1 :], smooth, color=ACCENT, linewidth=1.8, marker=marker, label=meaning)
            top = max(float(np.quantile(values, 0.99)), float(smooth.max()))
            words.append(f"train loss from {values[0]:.3g} to {smooth[-1]:.3g} at step {steps[-1]:,g}")
        if val is not None:
            steps, values = val
            ax.plot(steps, values, color=POSITIVE, marker="o", markersize=4, linewidth=1.2, label="validation")
            top = max(top, float(values.max()))
            words.append(f"validation loss from {values[0]:.3g} to {values[-1]:.3g}")
        ax.set_ylim(0, 1.08 * top or 1.0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("reconstruction loss L\n(share of squared gradient norm)")
        ax.legend(frameon=False)
    sentence = "; ".join(words)
    caption = f"{sentence[0].upper()}{sentence[1:]}. 0 is perfect, 1 explains nothing."
    return Picture(path, f"Loss curve: {sentence}.", caption)


# --- All of them ------------------------------------------------------------------------------------------------------


def draw_run(
    directory: Path,
    *,
    shares: Tensor,
    names: Sequence[str],
    p_act: Tensor,
    metrics: Path,
    v_out: Mapping[str, Tensor] | None = None,
    target: Mapping[str, Tensor] | None = None,
    circuits: Sequence[str] | None = None,
    k: float | None = None,
    group_size: int = 1,
) -> list[Picture | str]:
    """Every picture this run has data for, in the order of the page; a sentence in place of one that cannot be drawn.

    Networks and encoder directions need v_out and a target that `layers_of` knows, and are left out otherwise.
    Arguments as in the functions above.
    """
    directory.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Path], Picture]] = {}
    if v_out and target and layers_of(target):
        makers["networks"] = lambda path: networks(path, v_out, target, circuits=circuits, alive=p_act > 0)
        makers["directions"] = lambda path: directions(path, v_out, target, group_size=group_size)
    makers["loss"] = lambda path: loss_curve(path, metrics)
    makers["p_act"] = lambda path: p_act_histogram(path, p_act, k=k)
    makers["norm_share"] = lambda path: norm_share(path, shares, names)
    drawn: list[Picture | str] = []
    for name, make in makers.items():
        try:
            drawn.append(make(directory / f"{name}.png"))
        except L3DError as error:
            drawn.append(f"No picture of {name.replace('_', ' ')}: {error}.")
    return drawn


# --- Small parts ------------------------------------------------------------------------------------------------------


@contextmanager
def new_figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
        yield figure
        figure.savefig(path, format="png")


def _heat_map(figure: Figure, ax: Axes, values: np.ndarray, label: str, largest: float) -> None:
    image = ax.imshow(values, cmap=SHARES, vmin=0, vmax=largest or 1.0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=ax, label=label, fraction=0.04, pad=0.02)
    if values.size <= 150:
        for (i, j), value in np.ndenumerate(values):
            if value < 0.005:
                continue
            colour = "white" if value > 0.5 * (largest or 1.0) else INK
            ax.annotate(f"{value:.2f}", (j, i), ha="center", va="center", color=colour, fontsize=8)


def _map_size(columns: int, rows: int) -> tuple[float, float]:
    return min(13.0, 4.0 + 0.5 * columns), min(13.0, max(2.9, 1.6 + 0.32 * rows))


def _index_ticks(axis: Any, indices: Sequence[int]) -> None:
    """Every index while they fit, else every fifth, tenth, … place."""
    every = max(1, math.ceil(len(indices) / 40 / 5) * 5) if len(indices) > 40 else 1
    places = range(0, len(indices), every)
    axis.set_ticks(list(places), [str(indices[place]) for place in places], fontsize=9)


def _natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which "feature 9" comes before "feature 10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _first(columns: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    return next((columns[key] for key in (name, f"{name}_step", f"{name}_epoch") if key in columns), None)


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _listing(items: Iterable[str], limit: int = 20) -> str:
    """What an alt text names one by one before it becomes a burden to hear."""
    items = list(items)
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _short(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().double().cpu().numpy())
