"""PNGs of a toy's effects, in the style of `l3d_pl.atlas.pictures`, each with its alt text and caption."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from l3d_pl.analysis.alignment import number, rows_of_a, squared_correlation
from l3d_pl.atlas.pictures import ACCENT, INK, POSITIVE, Picture, new_figure
from l3d_pl.errors import L3DError
from l3d_pl.figures.effects import Curve, Points, Toy, curve, scatter

GREY = "#8c959f"
MAX_PANELS, MAX_GRID = 12, 5
OWN: dict[str, Any] = {"color": POSITIVE, "marker": "o", "s": 12, "linewidths": 0, "alpha": 0.8, "zorder": 3}
SECOND: dict[str, Any] = {"color": ACCENT, "marker": "^", "s": 13, "linewidths": 0, "alpha": 0.8, "zorder": 3}
OTHER: dict[str, Any] = {"color": GREY, "marker": "x", "s": 7, "linewidths": 0.6, "alpha": 0.6, "zorder": 2}


def intervention(path: Path, toy: Toy) -> Picture:
    """For each live subnetwork: what +δ v_k does to the outputs of its own circuit, and to the others."""
    return _scatter(path, toy, None)


def hidden_layers(path: Path, toy: Toy) -> Picture:
    """`intervention` with the tensors below the last layer only: a subnetwork is more than a bias of the outputs."""
    return _scatter(path, toy, toy.hidden)


def _scatter(path: Path, toy: Toy, parameters: Sequence[str] | None) -> Picture:
    live, step = _live(toy), toy.step(parameters)
    found = scatter(toy, [{k: step} for k in live], parameters)
    shown, part = live[:MAX_PANELS], _part(MAX_PANELS, len(live), "live subnetworks")
    with new_figure(path, _panels_size(len(shown))) as figure:
        for ax, k, dots in zip(_panels(figure, len(shown), _against(toy)), shown, found, strict=False):
            _dots(ax, dots, [(toy.circuits[k], OWN)])
            ax.set_title(f"subnetwork {k} · {_circuit(toy, k)}")
        where = "" if parameters is None else ", hidden layers only"
        figure.suptitle(f"W0 + δ v_k, δ = {step:g}{where}{part and f'; {part}'}", fontsize=12)
        figure.supylabel(_what(toy), fontsize=11)
        _legend(figure, [(f"the subnetwork's own {toy.score.circuit_kind}", OWN), ("others", OTHER)])
    words = [
        f"{k} ({_circuit(toy, k)}): {number(dots.mean_change([toy.circuits[k]]))} against "
        f"{number(dots.mean_change([toy.circuits[k]], others=True))}"
        for k, dots in zip(shown, found, strict=False)
    ]
    ratio = _ratio(
        [
            (dots.mean_change([toy.circuits[k]]), dots.mean_change([toy.circuits[k]], others=True))
            for k, dots in zip(live, found, strict=True)
        ]
    )
    alt = (
        f"Change of outputs at δ = {step:g}{where}, of each subnetwork's own circuit against others, mean |change| "
        f"where they are active: {'; '.join(words)}.{_sentence(part)}"
    )
    moved = "" if parameters is None else f" ({', '.join(parameters)})"
    caption = (
        f"Each subnetwork pushed alone by δ = {step:g}{where}{moved}, on {len(toy.inputs):,} held-out inputs. "
        f"{_meaning(toy)} Its own {toy.score.circuit_kind}, where active, moves {ratio} times as much as others "
        f"({_median_of(live)}).{_sentence(part)}"
    )
    return Picture(path, alt, caption)


def several(path: Path, toy: Toy) -> Picture:
    """A grid of pairs pushed at once, each subnetwork alone on the diagonal."""
    distinct, step = _distinct(toy), toy.step()
    shown, part = distinct[:MAX_GRID], _part(MAX_GRID, len(distinct), "circuits")
    pairs = [(a, b) for a in range(len(shown)) for b in range(a, len(shown))]
    found = dict(zip(pairs, scatter(toy, [{shown[a]: step, shown[b]: step} for a, b in pairs]), strict=True))
    n = len(shown)
    with new_figure(path, (2.4 * n + 0.6, 2.1 * n + 1.0)) as figure:
        axes = figure.subplots(n, n, sharex=True, sharey=True, squeeze=False)
        for a in range(n):
            for b in range(n):
                ax = axes[a, b]
                if a > b:
                    ax.axis("off")
                    continue
                colours = [(toy.circuits[shown[a]], OWN)] + [(toy.circuits[shown[b]], SECOND)] * (a != b)
                _dots(ax, found[a, b], colours)
                ax.set_title(f"k = {shown[a]}" if a == b else f"k = {shown[a]} and {shown[b]}")
                ax.tick_params(labelbottom=a == b, labelleft=a == b)
                ax.set_xlabel(_against(toy) if a == b else "", fontsize=10)
        figure.suptitle(
            f"W0 + δ (v_a + v_b), δ = {step:g}; one alone on the diagonal{part and f'; {part}'}", fontsize=12
        )
        figure.supylabel(_what(toy), fontsize=11)
        kind = toy.score.circuit_kind
        of = [(f"{kind} of a, the row's", OWN), (f"{kind} of b, the column's", SECOND), ("others", OTHER)]
        if n > 1:
            axes[-1, 0].legend(handles=_handles(of), loc="lower left", frameon=False)  # that panel is blank
    words, drift = [], []
    for a, b in pairs:
        own = [toy.circuits[shown[k]] for k in dict.fromkeys((a, b))]
        words.append(
            f"{' and '.join(str(shown[k]) for k in dict.fromkeys((a, b)))}: "
            + ", ".join(number(found[a, b].mean_change([c])) for c in own)
            + f", others {number(found[a, b].mean_change(own, others=True))}"
        )
        for k in (a, b) if a != b else ():
            circuit = [toy.circuits[shown[k]]]
            alone = found[k, k].mean_change(circuit)
            drift.append(abs(found[a, b].mean_change(circuit) / alone - 1) if alone else math.nan)
    alt = (
        f"Change of outputs when two subnetworks are pushed at once by δ = {step:g}, mean |change|: {'; '.join(words)}."
        f"{_sentence(part)}"
    )
    caption = f"Two subnetworks at once, by δ = {step:g} each. {_meaning(toy)}"
    if drift:
        caption += f" A circuit's mean |change| differs from that of the push alone by {_median(drift):.0%} (median of "
        caption += "these pairs)."
    caption += _sentence(part)
    return Picture(path, alt, caption)


def against_delta(path: Path, toy: Toy) -> Picture:
    """Mean |change| against δ: own circuit, others, and the own one along a random direction."""
    live, step = _live(toy), toy.step()
    found = [curve(toy, k, step) for k in live]
    shown, part = live[:MAX_PANELS], _part(MAX_PANELS, len(live), "live subnetworks")
    lines: list[tuple[str, str, dict[str, Any]]] = [
        ("own", f"own {toy.score.circuit_kind}", {"color": POSITIVE, "linewidth": 2}),
        ("others", "others", {"color": INK, "linewidth": 1.6, "linestyle": "--"}),
        (
            "random_own",
            f"own {toy.score.circuit_kind}, random direction of the same ranks",
            {"color": ACCENT, "linewidth": 1.6, "linestyle": ":"},
        ),
    ]
    with new_figure(path, _panels_size(len(shown))) as figure:
        for ax, k, values in zip(_panels(figure, len(shown), "δ, step along v_k"), shown, found, strict=False):
            for attribute, _, style in lines:
                ax.plot(values.deltas, getattr(values, attribute), **style)
            ax.set_title(f"subnetwork {k} · {_circuit(toy, k)}")
        ax.set_ylim(bottom=0)  # shared; after all are drawn
        figure.suptitle(f"W0 + δ v_k{part and f'; {part}'}", fontsize=12)
        figure.supylabel("mean |change| of outputs", fontsize=11)
        handles = [Line2D([], [], label=label, **style) for _, label, style in lines]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    at = found[0].deltas.index(step)
    words = [
        f"{k} ({_circuit(toy, k)}): {number(c.own[at])}, {number(c.others[at])}, {number(c.random_own[at])}"
        for k, c in zip(shown, found, strict=False)
    ]
    alt = (
        f"Mean |change| of outputs against δ; at δ = {step:g} of the own {toy.score.circuit_kind}, of others, and of "
        f"the own one along a random direction: {'; '.join(words)}.{_sentence(part)}"
    )
    caption = (
        "Mean |change| of outputs against δ, over the inputs where they are active. "
        f"{_selective(found, _median_of(live))}{_sentence(part)}"
    )
    return Picture(path, alt, caption)


def _selective(found: Sequence[Curve], median: str) -> str:
    """Selectivity at the ends of the range and half-way there."""
    ends = [
        f"{_ratio(list(zip((c.own[i] for c in found), (c.others[i] for c in found), strict=True)))} at δ = {delta:g}"
        for i, delta in enumerate(found[0].deltas)
        if i % 4 == 0 and delta != 0
    ]
    return f"Own over others, {median}: {', '.join(ends)}."


def read_a(path: Path, toy: Toy) -> Picture:
    """TMCS: A against what is read off each subnetwork in two ways, and off the target itself, which is the ceiling."""
    if "A" not in toy.truth:
        raise L3DError("A: the target's file holds no 'truth.A' to compare with")
    v_out, planted = toy.decomposition.directions(), toy.truth["A"].double()
    w_in, w_out = v_out["W_in"].double(), v_out["W_out"].double()
    feature, a_hat = rows_of_a(w_in, w_out)
    live = torch.tensor(toy.live)
    products = (w_in @ w_out)[torch.arange(len(feature)), feature]
    learned = (toy.target["W_in"] @ toy.target["W_out"]).double()[feature]
    readings = [
        ("subnetworks: W_in[i, j*] W_out[j*]", a_hat),
        ("subnetworks: row i of W_in W_out", products),
        ("target: row i of W_in W_out", learned),
    ]
    words = []
    with new_figure(path, (11.5, 4.4)) as figure:
        axes = figure.subplots(1, 3, sharex=True, sharey=True)
        for ax, (title, rows) in zip(axes, readings, strict=True):
            rows, own = rows[live], planted[feature[live]]
            scale = (rows * own).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
            r2 = [squared_correlation(row, truth) for row, truth in zip(rows, own, strict=True)]
            ax.plot([0, float(planted.max())], [0, float(planted.max())], color=GREY, linestyle="--", linewidth=1)
            ax.scatter(own.flatten(), (scale * rows).flatten(), color=ACCENT, s=14, alpha=0.7, linewidths=0)
            ax.set_title(f"{title}\nmean r² of a row {sum(r2) / len(r2):.2f}, lowest {min(r2):.2f}")
            words.append(f"{title}: mean r² {sum(r2) / len(r2):.2f}")
        axes[0].set_ylabel("Â, each row scaled to A's")
        axes[1].set_xlabel("A, the task's matrix: y = x A")
    caption = (
        "A against Â read off the subnetworks, row by row (unit-norm subnetworks know A's rows up to one factor each). "
        "Right: the target's own weights, which never learned A better than this."
    )
    return Picture(path, f"Scatter plots of A against its readings. {'; '.join(words)}.", caption)


def swept(path: Path, cells: Sequence[Mapping[str, Any]], by: str, label: str) -> Picture:
    """Held-out loss and live subnetworks against a setting; a point for each fit.

    cells: with the key `by`, `loss` and `live`.
    """
    rows = sorted((cell[by], cell["loss"], cell["live"]) for cell in cells)
    x, loss, live = (list(column) for column in zip(*rows, strict=True))
    with new_figure(path, (8.4, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(x, loss, color=ACCENT, marker="o")
        left.set(xlabel=label, ylabel="held-out loss L\n(share of squared gradient norm)")
        left.set_ylim(0, max(1.08 * max(loss), 0.01))
        left.yaxis.set_major_locator(MaxNLocator(6))
        right.plot(x, live, color=POSITIVE, marker="s")
        right.set(xlabel=label, ylabel="live subnetworks (P_act > 0)")
        right.set_ylim(0, 1.1 * max(live) + 0.5)
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in (left, right):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(alpha=0.3)
    pairs = ", ".join(f"{place:g}: {number(value)} ({alive:.0f} live)" for place, value, alive in rows)
    steps = ", ".join(f"{n:,}" for n in sorted({cell["steps"] for cell in cells}))
    return Picture(
        path, f"Held-out loss against {label}: {pairs}.", f"One fit for each point, {steps} steps, one seed."
    )


# --- Small parts ------------------------------------------------------------------------------------------------------


def _part(shown: int, of: int, what: str) -> str:
    """What a figure says where it cannot show all."""
    return f"the first {shown} of {of} {what}" if of > shown else ""


def _sentence(part: str) -> str:
    return f" Shown are {part}." if part else ""


def _median_of(live: Sequence[int]) -> str:
    return f"median over {len(live)} subnetworks" if len(live) > 1 else "one subnetwork"


def _live(toy: Toy) -> list[int]:
    if not toy.live:
        raise L3DError("every subnetwork is dead (P_act = 0), so there is none to push")
    return toy.live


def _distinct(toy: Toy) -> list[int]:
    """The live subnetworks, one for each circuit: that which stands for it, where there is one."""
    chosen: dict[int, int] = {}
    for k in sorted(_live(toy), key=lambda k: not toy.score.subnetworks[k].own):
        chosen.setdefault(toy.circuits[k], k)
    return [chosen[circuit] for circuit in sorted(chosen)]


def _circuit(toy: Toy, k: int) -> str:
    return f"{toy.score.circuit_kind} {toy.circuits[k]}"


def _against(toy: Toy) -> str:
    if toy.own_output:
        return "the output's own input"
    return "its group's sum in the input" if toy.group_size > 1 else "its feature in the input"


def _what(toy: Toy) -> str:
    return "change of an output" if toy.own_output else "mean |change| of a sample's outputs"


def _meaning(toy: Toy) -> str:
    if toy.own_output:
        return "A dot is one output of one input: its change against its own feature."
    kind = toy.score.circuit_kind
    return (
        f"A dot is one input: the mean |change| of its outputs against the pushed {kind} in it, or against its "
        f"strongest {kind} where that is silent."
    )


def _dots(ax: Axes, found: Points, colours: Sequence[tuple[int, dict[str, Any]]]) -> None:
    mine = torch.zeros(len(found.x), dtype=torch.bool)
    for circuit, style in colours:
        own = found.circuit == circuit
        ax.scatter(*_at(found, own), **style)
        mine |= own
    ax.scatter(*_at(found, ~mine), **OTHER, rasterized=True)
    ax.axhline(0, color="#d0d7de", linewidth=0.8, zorder=0)


def _at(found: Points, index: Tensor) -> tuple[Any, Any]:
    return found.x[index].numpy(), found.y[index].numpy()


def _panels_size(n: int) -> tuple[float, float]:
    columns = min(n, 3 if n < 6 else 4)
    return max(3.3 * columns, 5.0), 2.6 * math.ceil(n / columns) + 1.2


def _panels(figure: Figure, n: int, x_label: str) -> list[Axes]:
    columns = min(n, 3 if n < 6 else 4)
    rows = math.ceil(n / columns)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for ax in axes[n:]:
        ax.axis("off")
    for i, ax in enumerate(axes[:n]):
        if i + columns >= n:  # the lowest one of its column
            ax.tick_params(labelbottom=True)
            ax.set_xlabel(x_label, fontsize=10)
    return axes[:n]


def _legend(figure: Figure, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    figure.legend(handles=_handles(entries), loc="outside lower center", ncols=len(entries), frameon=False)


def _handles(entries: Sequence[tuple[str, dict[str, Any]]]) -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", color=style["color"], marker=style["marker"], markersize=6, label=label)
        for label, style in entries
    ]


def _ratio(pairs: Sequence[tuple[float, float]]) -> str:
    return f"{_median([own / others for own, others in pairs if others]):.3g}"


def _median(values: Sequence[float]) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan
