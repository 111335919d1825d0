"""What a toy's subnetworks do to its outputs, as points to draw: f(x, W0 + sum_k δ_k v_k) − f(x, W0).

A *circuit* is a feature, or a group of them, as the ground truth says. Where output i is feature i's own (`tms`,
`squared`) there is a point for each sample and output, against the output's own feature. Where every output depends on
every feature (`tmcs`, `high_rank`) there is a point for each sample: its outputs' mean |change|, against the pushed
circuit's strength in it; against that of its strongest circuit where the pushed one is silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from l3d_pl.analysis.alignment import ToyScore
from l3d_pl.analysis.interventions import direction_of, natural_scale, random_directions, sweep
from l3d_pl.analysis.runs import Run, load_run, open_run
from l3d_pl.atlas.pictures import layers_of
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.report import score_run, target_tensors, toy_of

SAMPLES = 1000
STRONGEST = 16  # samples of a circuit that the step is chosen by
ENOUGH = 0.25  # of the outputs' range: what the step is to move one of these samples' outputs by, in sum
STEPS = torch.linspace(-2, 2, 17).tolist()  # of the step of the scatter
OWN_OUTPUT = ("tms", "squared")  # tasks whose output i is feature i's own


@dataclass
class Toy:
    """A finished toy run, opened, with what is known of it.

    Attributes:
        inputs: [N, features], the first `SAMPLES` held-out ones.
        strengths: of each circuit in each sample, [N, circuits]: the feature, or the group's sum.
        circuits: each subnetwork's circuit, [n_v].
        target, truth: the tensors of its target's file.
    """

    run: Run
    task: str
    group_size: int
    score: ToyScore
    inputs: Tensor
    strengths: Tensor
    circuits: list[int]
    target: dict[str, Tensor]
    truth: dict[str, Tensor]

    @property
    def decomposition(self) -> Decomposition:
        return self.run.decomposition

    @property
    def own_output(self) -> bool:
        return self.task in OWN_OUTPUT

    @property
    def live(self) -> list[int]:
        """Subnetworks that are active, by their circuits."""
        return sorted((s.index for s in self.score.subnetworks if s.alive), key=lambda k: (self.circuits[k], k))

    @property
    def hidden(self) -> list[str]:
        """Decomposed tensors below the last layer: all but its bias, and its weights unless the first layer's are the
        same."""
        layers = layers_of(self.target)
        last = {layers[-1].bias} | {layers[-1].weight} - {layer.weight for layer in layers[:-1]}
        return [name for name in self.decomposition.subnetworks.shapes if name not in last]

    def direction(self, deltas: Mapping[int, float], parameters: Sequence[str] | None = None) -> dict[str, Tensor]:
        """sum_k δ_k v_k, {name: [*shape]}, each v_k with the sign that agrees with W0: v and −v are one subnetwork."""
        signed = {k: delta * self.sign(k) for k, delta in deltas.items()}
        return direction_of(self.decomposition, signed, parameters)

    def sign(self, k: int) -> float:
        """That of <v_k, W0>; 1 for 0."""
        v = self.decomposition.direction(k)
        return -1.0 if sum(float((v[name] * self.target[name]).sum()) for name in v) < 0 else 1.0

    def changes(self, directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Of every output of every sample along each direction, [D, N, outputs]."""
        found = sweep(self.decomposition, {"inputs": self.inputs}, [(1.0, direction) for direction in directions])
        return found.outputs - found.origin

    def step(self, parameters: Sequence[str] | None = None) -> float:
        """A δ that moves the samples of half of the live subnetworks' circuits visibly, rounded to one digit."""
        looks = [
            (
                self.direction({k: 1.0}, parameters),
                {"inputs": self.inputs[self.strengths[:, self.circuits[k]].abs().topk(STRONGEST).indices]},
            )
            for k in self.live
        ]
        with torch.no_grad():
            outputs = self.decomposition.target(self.inputs)
        wide = float(outputs.max() - outputs.min()) * (1 if self.own_output else outputs.shape[1])
        return natural_scale(self.decomposition, looks, ENOUGH * wide)


def open_toy(run_dir: Path) -> Toy:
    """A finished toy run.

    Raises:
        L3DError: no finished run, no toy, or its target is gone or of a kind that is not known.
    """
    toy = toy_of(load_run(run_dir))
    if toy is None:
        raise L3DError(f"figures: {run_dir} is no toy run; `l3d atlas {run_dir}` shows runs of every kind")
    score = score_run(run_dir)
    run = open_run(run_dir)
    target, truth = target_tensors(run.decomposition)
    if not layers_of(target):
        raise L3DError(f"figures: the run's target holds {', '.join(target) or 'no file'}, no chain of small layers")
    task, group_size = toy[0], toy[1].get("group_size") or 1
    entries = run.entries("val")
    inputs = entries.pick(range(min(SAMPLES, len(entries))))["inputs"]
    circuits = [subnetwork.circuit for subnetwork in score.subnetworks]
    strengths = inputs.unflatten(1, (-1, group_size)).sum(2)
    if max(circuits) >= strengths.shape[1]:
        raise L3DError(f"figures: circuit {max(circuits)} is none of the {strengths.shape[1]} that the data hold")
    return Toy(run, task, group_size, score, inputs, strengths, circuits, target, truth)


@dataclass
class Points:
    """Points of a scatter, each [M]: against what (`x`), how much outputs change (`y`), whose they are (`circuit`)."""

    x: Tensor
    y: Tensor
    circuit: Tensor

    def mean_change(self, circuits: Sequence[int], others: bool = False) -> float:
        """Mean |y| of the points of these circuits, or of all others, where they are active (x is not 0)."""
        mine = torch.isin(self.circuit, torch.tensor(circuits)) ^ others
        chosen = self.y[mine & (self.x != 0)].abs()
        return float(chosen.mean()) if len(chosen) else float("nan")


def points(toy: Toy, change: Tensor, pushed: Sequence[int]) -> Points:
    """The points of one push (module docstring).

    Args:
        change: of every output of every sample, [N, outputs].
        pushed: the circuits of the subnetworks that were pushed.
    """
    if toy.own_output:
        features = torch.arange(toy.inputs.shape[1])
        return Points(toy.inputs.flatten(), change.flatten(), features.repeat(len(toy.inputs)))
    first = toy.strengths.clone()
    first[:, list(pushed)] += 1e6 * (first[:, list(pushed)] != 0)  # where it speaks, a pushed circuit comes first
    circuit = first.argmax(1)
    return Points(toy.strengths.gather(1, circuit[:, None])[:, 0], change.abs().mean(1), circuit)


def scatter(toy: Toy, pushes: Sequence[Mapping[int, float]], parameters: Sequence[str] | None = None) -> list[Points]:
    """The points of each push {subnetwork: δ}; with `parameters` (names) only these tensors are moved."""
    changes = toy.changes([toy.direction(push, parameters) for push in pushes])
    return [points(toy, change, [toy.circuits[k] for k in push]) for push, change in zip(pushes, changes, strict=True)]


@dataclass
class Curve:
    """Mean |change| of outputs against δ, [D] each: of a subnetwork's own circuit, of the others, and the same two
    along a random direction of its ranks, and as long in every tensor."""

    deltas: list[float]
    own: list[float]
    others: list[float]
    random_own: list[float]


def curve(toy: Toy, k: int, step: float, seed: int = 0) -> Curve:
    """Along v_k, from −2 to 2 `step`s."""
    deltas, circuit = [step * factor for factor in STEPS], [toy.circuits[k]]
    random = random_directions(toy.decomposition, k, 1, seed)[0]
    both = [
        [points(toy, change, circuit) for change in toy.changes([scaled(v, delta) for delta in deltas])]
        for v in (toy.direction({k: 1.0}), random)
    ]
    return Curve(
        deltas,
        [found.mean_change(circuit) for found in both[0]],
        [found.mean_change(circuit, others=True) for found in both[0]],
        [found.mean_change(circuit) for found in both[1]],
    )


def scaled(direction: Mapping[str, Tensor], delta: float) -> dict[str, Tensor]:
    return {name: delta * value for name, value in direction.items()}
