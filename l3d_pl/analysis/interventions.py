"""f(x, W0 + sum_k delta_k v_k): what moves, for which samples, against what a direction without meaning would do.

The change of a sample is the summed |change| of its outputs. *Selectivity* is the mean change of the relevant samples,
a subnetwork's top ones, over that of the irrelevant: random samples in which it is inactive. Selectivity of outputs is,
within the relevant samples, the mean |change| of the outputs that v moves most at delta = 0 over that of all others.
Controls take the same steps along a random unit direction (of the same ranks, and as long in each tensor) and along the
mean gradient; what is relevant stays v's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from l3d_pl.analysis.items import input_of, labels_of
from l3d_pl.analysis.outputs import Direction, outputs_of, probabilities, pushed
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.gradients.sample_gradient import wide
from l3d_pl.gradients.samples import choose_samples
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.frozen import matches_pattern, near_patterns

SPREAD = ("relevant", "selectivity", "outputs_selectivity")  # told with their spread over random directions
GRID = (-1.0, -0.5, -0.2, -0.05, 0.0, 0.05, 0.2, 0.5, 1.0)  # of a run's own scale


NAMED = 5  # outputs of a sample that count as moved most, and a quarter of all at most


@dataclass
class Sweep:
    """Outputs of the same samples along a direction; what is as large as all of them is reduced at each step.

    Attributes:
        deltas: D steps.
        change: summed |change| of each sample's outputs to read (see `probabilities`), [D, N].
        named, others: mean |change| of the outputs named for each of the first M samples, and of all others, [D, M].
        divergences: D(output there, output at 0) of each sample, [D, N].
        against: D(output there, reference), [D, N], where references were given.
        losses: the task's loss of each entry, [D, B]; None without labels.
        outputs: to read, of the S samples shown, [D, S, n_outputs].
        origin: the same at delta = 0, [S, n_outputs]; `origin_losses` [B]; `origin_against` [N].
    """

    deltas: list[float]
    change: Tensor
    named: Tensor | None
    others: Tensor | None
    divergences: Tensor
    against: Tensor | None
    losses: Tensor | None
    outputs: Tensor
    origin: Tensor
    origin_losses: Tensor | None
    origin_against: Tensor | None

    def changes(self) -> Tensor:
        """Summed |change| of each sample's outputs, [D, N]."""
        return self.change


def direction_of(
    decomposition: Decomposition, deltas: Mapping[int, float], parameters: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """sum_k delta_k v_k, {name: [*shape]}; with `parameters` (globs) of these tensors only.

    Raises:
        L3DError: no such subnetwork, a pattern that matches none of the decomposed tensors.
    """
    names = list(decomposition.subnetworks.shapes)
    for pattern in parameters or ():
        if not any(matches_pattern(name, pattern) for name in names):
            hint = near_patterns(pattern, names) or f"; allowed are {', '.join(names)}"
            raise L3DError(f"parameters: pattern {pattern!r} matches none of the decomposed tensors{hint}")
    if parameters is not None:
        names = [name for name in names if any(matches_pattern(name, pattern) for pattern in parameters)]
    total: dict[str, Tensor] = {}
    for k, delta in deltas.items():
        v = decomposition.direction(k)
        total = {name: delta * v[name] + total.get(name, 0) for name in names}
    return total


@torch.no_grad()
def sweep(
    decomposition: Decomposition,
    batch: Any,
    steps: Iterable[tuple[float, Direction]],
    references: Tensor | None = None,
    named: Tensor | None = None,
    shown: Sequence[int] | None = None,
) -> Sweep:
    """The target's outputs at W0 and at each step away from it.

    Args:
        batch: its samples are those that `choose_samples` says.
        steps: (delta, direction): W0 + delta direction.
        references: y of every sample, for the divergence along the way.
        named: outputs of each of the first M samples that are told from the others, [M, m].
        shown: samples whose outputs are kept; None: all.
    """
    target, divergence = decomposition.target, decomposition.divergence
    output = outputs_of(target, batch)
    samples = choose_samples(decomposition.sample, batch, output, None, None)
    original, at_origin = samples.outputs(wide(output)), probabilities(divergence, output, samples)
    kept = slice(None) if shown is None else torch.tensor(shown, dtype=torch.int64, device=output.device)

    def look(output: Tensor) -> dict[str, Any]:
        own, outputs = samples.outputs(wide(output)), probabilities(divergence, output, samples)
        moved = (outputs - at_origin).abs()
        found: dict[str, Any] = {
            "change": moved.sum(1),
            "divergences": divergence(*samples.comparable(own, original)),
            "against": None if references is None else divergence(*samples.comparable(own, references.expand_as(own))),
            "losses": task_loss(batch, output),
            "outputs": outputs[kept],
            **dict.fromkeys(("named", "others")),
        }
        if named is not None:
            moved = moved[: len(named)].double()
            mine = moved.gather(1, named.to(moved.device)).sum(1)
            found |= {
                "named": mine / named.shape[1],
                "others": (moved.sum(1) - mine) / (moved.shape[1] - named.shape[1]),
            }
        return found

    deltas, still, found = [], look(output), []
    for delta, direction in steps:
        deltas.append(delta)
        if delta == 0:
            found.append(still)
            continue
        with pushed(target, direction, delta):
            found.append(look(outputs_of(target, batch)))
    stacked: dict[str, Any] = {
        name: None if still[name] is None else torch.stack([step[name] for step in found]) for name in still
    }
    return Sweep(
        deltas, **stacked, origin=at_origin[kept], origin_losses=still["losses"], origin_against=still["against"]
    )


def named_outputs(moved: Tensor) -> Tensor | None:
    """The outputs of highest |derivative| of each sample, [M, m]; None where there is one output, and so no other.

    Args:
        moved: [M, n_outputs], as `derivatives` gives it.
    """
    n = moved.shape[1]
    return None if n < 2 else moved.abs().topk(max(1, min(NAMED, n // 4)), 1).indices


def task_loss(batch: Any, output: Tensor) -> Tensor | None:
    """The loss of the task the target was trained for, of each entry [B]; None where the batch does not tell.

    Next tokens for sequences of logits, classes for whole-number labels, squared error for labels like the outputs.
    """
    ids, labels, output = input_of(batch), labels_of(batch), wide(output)
    if not ids.is_floating_point() and output.ndim == 3 and output.shape[:2] == ids.shape and ids.shape[1] > 1:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        counts = (torch.ones_like(ids) if mask is None else mask)[:, 1:].to(output.dtype)
        losses = cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses.view_as(counts) * counts).sum(1) / counts.sum(1).clamp_min(1)
    if labels is None:
        return None
    if not labels.is_floating_point() and labels.ndim == 1 and output.ndim == 2:
        return cross_entropy(output, labels, reduction="none")
    if labels.is_floating_point() and labels.shape == output.shape:
        return (output - labels).square().flatten(1).mean(1)
    return None


def curve_rows(found: Sweep, relevant: Tensor, irrelevant: Tensor, background: Tensor) -> list[dict[str, Any]]:
    """Rows of the table `curves`, without subnetwork and control.

    Args:
        relevant, irrelevant: samples of the sweep, [M] of whole numbers; the latter are those without activity.
        background: entries over which the change of the task's loss is taken.
    """
    changes, rows = found.changes(), []
    for d, delta in enumerate(found.deltas):
        near, far = (_mean(changes[d], index) for index in (relevant, irrelevant))
        named, others = (None if part is None else float(part[d].mean()) for part in (found.named, found.others))
        loss = None
        if found.losses is not None and found.origin_losses is not None:
            loss = _mean(found.losses[d] - found.origin_losses, background)
        rows.append(
            {
                "delta": delta,
                "relevant": near,
                "irrelevant": far,
                "selectivity": near / far if far > 0 else math.nan,
                "kl_inactive": _mean(found.divergences[d], irrelevant),
                "loss_change": loss,
                "outputs_relevant": named,
                "outputs_irrelevant": others,
                "outputs_selectivity": named / others if named is not None and others else math.nan,
            }
        )
    return rows


def _mean(values: Tensor, index: Tensor) -> float:
    return float(values[index.to(values.device)].double().mean()) if len(index) else math.nan


def mean_rows(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The mean of several curves (of random directions), number by number, and the standard deviation of some.

    Selectivity is that of the means.
    """
    result = []
    for rows in zip(*runs, strict=True):
        values = {key: None if rows[0][key] is None else [float(row[key]) for row in rows] for key in rows[0]}
        mean: dict[str, Any] = {key: None if own is None else sum(own) / len(own) for key, own in values.items()}
        for prefix in ("", "outputs_"):
            near, far = mean[f"{prefix}relevant"], mean[f"{prefix}irrelevant"]
            mean[f"{prefix}selectivity"] = near / far if near is not None and far else math.nan
        for key in SPREAD:
            own = values[key]
            mean[f"{key}_std"] = None if own is None or len(own) < 2 else float(torch.tensor(own).double().std())
        result.append(mean)
    return result


def effect_rows(
    found: Sweep, chosen: Sequence[tuple[int, int]], names: Sequence[str], top: int = 8
) -> list[dict[str, Any]]:
    """Rows of the table `effects`, without subnetwork: the outputs that move most, at each delta.

    Args:
        chosen: (sample, position) of each sample shown.
    """
    rows = []
    for place, (sample, position) in enumerate(chosen):
        outputs = found.outputs[:, place]
        reach = (outputs - found.origin[place]).abs().amax(0)
        most = reach.topk(min(top, len(reach))).indices.tolist()
        for d, delta in enumerate(found.deltas):
            rows += [
                {
                    "delta": delta,
                    "sample": sample,
                    "position": position,
                    "output": output,
                    "name": names[output],
                    "value": float(outputs[d, output]),
                }
                for output in most
            ]
    return rows


@torch.no_grad()
def random_directions(decomposition: Decomposition, k: int, n: int, seed: int) -> list[dict[str, Tensor]]:
    """Random unit directions of the ranks of subnetwork k, and in each tensor as long as it, n of {name: [*shape]}."""
    subnetworks, own = decomposition.subnetworks, decomposition.direction(k)
    random = torch.Generator().manual_seed(seed * 1_000_003 + k)
    ranks = {name: list(ranks) or 1 for name, ranks in subnetworks.ranks.items()}
    drawn = Subnetworks(subnetworks.shapes, n, ranks, generator=random)
    result = []
    for r in range(n):
        direction = {name: value.to(own[name]) for name, value in drawn.direction(r).items()}
        result.append(
            {
                name: value * (own[name].norm() / value.norm().clamp_min(torch.finfo(value.dtype).tiny))
                for name, value in direction.items()
            }
        )
    return result


@torch.no_grad()
def natural_scale(
    decomposition: Decomposition, looks: Sequence[tuple[Direction, Any]], wanted: float, halvings: int = 14
) -> float:
    """A step that is worth looking at: the smallest of ‖W0‖, ‖W0‖/2, ... that moves half of the subnetworks enough.

    It is found by trying: a derivative would say too much where outputs saturate.

    Args:
        looks: (unit direction, batch of its top samples) of some subnetworks.
        wanted: mean summed |change| of the samples' outputs, over both signs.

    Returns:
        the step, rounded to one digit.
    """
    tensors = dict(decomposition.target.named_parameters())
    largest = float(torch.stack([tensors[name].norm() for name in decomposition.subnetworks.shapes]).norm())
    steps = [largest / 2**i for i in range(halvings)]
    moved = [
        sweep(decomposition, batch, [(sign * step, v) for step in steps for sign in (1, -1)], shown=()).changes()
        for v, batch in looks
    ]
    sizes = torch.stack([changes.double().mean(1).view(-1, 2).mean(1) for changes in moved]).median(0).values
    enough = [step for step, size in zip(steps, sizes.tolist(), strict=True) if size >= wanted]
    return float(f"{enough[-1] if enough else largest:.0e}")
