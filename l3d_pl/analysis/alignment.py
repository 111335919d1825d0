"""Subnetworks against the circuits that were planted in a toy target model.

Everything here works on plain tensors: the columns of V_out as `{parameter: [n_v, *shape]}`, the target model's
parameters as `{parameter: shape}`, and the task's ground truth. A subnetwork's sign is free (v and −v are the same
subnetwork), so every cosine is taken absolute and every correlation squared; so is the order of the subnetworks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from scipy.optimize import linear_sum_assignment
from torch import BoolTensor, Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity, normalize

from l3d_pl.errors import L3DError, did_you_mean, require_choice

FIGURES: dict[str, str] = {
    "loss": "reconstruction loss L on fresh samples",
    "recovered": "circuits with a live subnetwork of their own",
    "dead": "dead subnetworks (P_act = 0)",
    "share": "mean share of a live subnetwork's energy in its own feature or group (purity)",
    "share_min": "smallest such share",
    "cos": "mean |cos| of a recovered feature's row of W_in with the target's row",
    "cos_min": "smallest such |cos|",
    "mmcs": "mean max |cos| with the planted rows, within W_in",
    "mmcs_all": "mean max |cos| with the planted rows, over all decomposed tensors (biases have no planted part)",
    "ml2r": "mean L2 ratio to the planted rows, once the unit norms are undone",
    "r2": "mean r² per subnetwork: W_in[i, j*] W_out[j*] with row i of A",
    "r2_min": "smallest such r²",
    "r2_product": "mean r² per subnetwork: row i of W_in W_out with row i of A",
    "r2_ceiling": "the target's mean r² over the same rows: row i of its W_in W_out with row i of A",
    "r2_ratio": "r2 / r2_ceiling",
    "r2_sum": "r² of the sum over live subnetworks of W_in W_out with A, all entries at once",
    "r2_sum_ceiling": "the target's r² of W_in W_out with A, all entries at once",
    "r2_sum_ratio": "r2_sum / r2_sum_ceiling",
    "same_output": "share of live subnetworks whose dominant output is their dominant input",
}
"""What each figure of a `ToyScore` means, in one line; the order in which tables show them."""

TASKS = ("tms", "tms_40_10", "tmcs", "high_rank_30", "high_rank_25", "high_rank", "squared")


# --- Directions against directions -----------------------------------------------------------------------------------


def abs_cosines(directions: Tensor, truths: Tensor) -> Tensor:
    """|cos| of every direction with every truth, in float64; a zero vector has cosine 0 with everything.

    directions: [n, d]; truths: [m, d]. Returns [n, m] in [0, 1]. Raises L3DError on other shapes or non-finite values.
    """
    if directions.ndim != 2 or truths.ndim != 2 or directions.shape[1] != truths.shape[1]:
        found = f"{list(directions.shape)} and {list(truths.shape)}"
        raise L3DError(f"directions, truths: found shapes {found}, allowed are [n, d] and [m, d]")
    require_finite({"directions": directions, "truths": truths})

    directions, truths = (normalize(vectors.detach().double().cpu(), dim=1) for vectors in (directions, truths))
    return (directions @ truths.T).abs().clamp(max=1.0)


def mmcs(directions: Tensor, truths: Tensor) -> float:
    """Mean max cosine similarity: the mean over truths of the largest |cos| with any direction.

    directions: [n, d], n >= 1; truths: [m, d], m >= 1. In [0, 1]. Two truths may share a direction; `recovered` forbids
    that. Raises L3DError as `abs_cosines`, and when there is nothing to compare.
    """
    if not len(directions) or not len(truths):
        raise L3DError(f"mmcs: found {len(directions)} directions and {len(truths)} truths, allowed are 1 or more each")
    return abs_cosines(directions, truths).amax(0).mean().item()


class Recovery(NamedTuple):
    """Which direction stands for which truth. own: [m], index of the direction or −1; cos: [m], its |cos| or 0."""

    own: Tensor
    cos: Tensor
    n_recovered: int


def recovered(directions: Tensor, truths: Tensor, threshold: float = 0.9) -> Recovery:
    """Give each truth a direction of its own so that the sum of |cos| is largest (Hungarian assignment).

    directions: [n, d]; truths: [m, d]. `n_recovered` is how many truths got a direction of |cos| > threshold. With
    n < m, m − n truths go without (own = −1). Raises L3DError as `abs_cosines`.
    """
    cosines = abs_cosines(directions, truths)
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    own = torch.full((len(truths),), -1)
    cos = torch.zeros(len(truths), dtype=torch.float64)
    own[columns] = torch.as_tensor(rows)
    cos[columns] = cosines[rows, columns]
    return Recovery(own, cos, int((cos > threshold).sum()))


def ml2r(directions: Tensor, truths: Tensor) -> float:
    """Mean L2 ratio: the length of each truth's own direction over the truth's length; 1 is perfect, below 1 shrunk.

    Unit-norm subnetworks carry no length. It is given back to them by the least-squares coefficients with which the
    directions sum to the sum of the truths (the weights, for truths that are pieces of them); so the figure has
    meaning only where truths add up to the target's parameters. directions: [n, d]; truths: [m, d].
    """
    own = recovered(directions, truths).own
    directions, truths = directions.detach().double().cpu(), truths.detach().double().cpu()
    # `gelsd` also solves repeated and zero directions (the shortest of all solutions).
    coefficients = torch.linalg.lstsq(directions.T, truths.sum(0)[:, None], driver="gelsd").solution
    lengths = vector_norm(coefficients * directions, dim=1)
    ratios = torch.where(own >= 0, lengths[own], 0.0) / vector_norm(truths, dim=1)
    return ratios.mean().item()


def squared_correlation(a: Tensor, b: Tensor) -> float:
    """r²: Pearson's correlation of all entries of `a` with those of `b`, squared; 0 where either is constant.

    a, b: tensors of one shape, two entries or more. In [0, 1], invariant under shift, scale and sign of either.
    """

    def centred(x: Tensor) -> Tensor:
        x = x.detach().double().cpu().flatten()
        x = x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        x = x - x.mean()
        return x if vector_norm(x) > 1e-12 else torch.zeros_like(x)  # a constant is not to correlate by its rounding

    return abs_cosines(centred(a)[None], centred(b)[None]).square().item()


def single_rows(weight: Tensor) -> Tensor:
    """The planted directions of a tied encoder: each row of `weight` [features, hidden] alone, zeros elsewhere.

    Returns [features, features x hidden], one flat direction per feature, in the space of the whole tensor.
    """
    return torch.diag_embed(weight.T, dim1=0, dim2=1).flatten(1)


def energy_shares(energy: Tensor) -> Tensor:
    """[n, parts] energies as shares of each row's sum; 0 where a row has no energy at all."""
    return energy / energy.sum(1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise L3DError naming the first tensor that holds a NaN or an infinity, and how many."""
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise L3DError(f"{name}: found {bad} of {tensor.numel()} values that are not finite, allowed is none")


# --- A toy run's score ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SubnetworkScore:
    """One subnetwork read against the ground truth."""

    index: int
    alive: bool
    circuit: int
    """Its dominant feature or group."""
    share: float
    """Share of its energy (squared norm in the layer that reads the inputs) in that feature or group."""
    own: bool
    """Whether it is the one that stands for this circuit."""
    quality: float | None = None
    """TMS: |cos| of the row of W_in; TMCS: r² of its row of A; squared: 1 if dominant output = input, else 0."""


@dataclass(frozen=True)
class ToyScore:
    """A decomposition of a toy against the circuits planted in its target model.

    `figures` holds the measured values under the names of `FIGURES`, None where nothing could be measured (no live
    subnetwork, no circuit recovered). Renders itself as a table when printed by rich.
    """

    task: str
    n_circuits: int
    figures: dict[str, float | None]
    subnetworks: tuple[SubnetworkScore, ...]

    @property
    def ok(self) -> bool:
        """Every circuit has a live subnetwork of its own."""
        return self.figures["recovered"] == self.n_circuits

    @property
    def circuit_kind(self) -> str:
        """What a circuit of this task is: a "feature" or a "group" of features."""
        return "group" if self.task.startswith("high_rank") else "feature"

    def circuits(self) -> list[str]:
        """The name of each subnetwork's circuit, such as "feature 3": what pictures call it."""
        return [f"{self.circuit_kind} {subnetwork.circuit}" for subnetwork in self.subnetworks]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and None: what `json.dumps(…, allow_nan=False)` takes."""
        return asdict(self) | {"ok": self.ok, "subnetworks": [asdict(subnetwork) for subnetwork in self.subnetworks]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ToyScore":
        """The inverse of `to_dict`. Raises L3DError when keys are missing or unknown."""
        try:
            subnetworks = tuple(SubnetworkScore(**row) for row in data["subnetworks"])
            return cls(data["task"], data["n_circuits"], dict(data["figures"]), subnetworks)
        except (KeyError, TypeError) as error:
            raise L3DError(f"score: not what ToyScore.to_dict writes ({error})") from None

    def rows(self) -> list[tuple[str, str, str]]:
        """(figure, value as text, meaning) for every figure, in the order of `FIGURES`."""
        return [(name, self._text(name), meaning) for name, meaning in FIGURES.items() if name in self.figures]

    def _text(self, name: str) -> str:
        total = {"recovered": self.n_circuits, "dead": len(self.subnetworks)}.get(name)
        value = self.figures[name]
        return number(value) if total is None else f"{value:.0f} of {total}"

    def __rich__(self) -> Table:
        table = Table(
            "figure", "value", "meaning", title=Text(f"{self.task} against its ground truth"), title_justify="left"
        )
        table.columns[1].justify = "right"
        for row in self.rows():
            table.add_row(*map(Text, row))  # Text: "[i, j*]" is no markup
        return table


class SummaryRow(NamedTuple):
    """One figure of one task over several runs; `runs` counts those that could measure it."""

    task: str
    figure: str
    mean: float
    min: float
    max: float
    runs: int


def summarise(scores: Iterable[ToyScore]) -> list[SummaryRow]:
    """Mean, min and max of every figure over runs (seeds), task by task, in the order of `FIGURES`.

    Adds "ok": the share of runs in which every circuit was recovered. Runs where a figure is None do not count in it.
    """
    by_task: dict[str, list[ToyScore]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score)
    rows = []
    for task, group in by_task.items():
        columns = {"ok": [float(score.ok) for score in group]}
        columns |= {name: [v for s in group if (v := s.figures.get(name)) is not None] for name in FIGURES}
        rows += [
            SummaryRow(task, name, sum(values) / len(values), min(values), max(values), len(values))
            for name, values in columns.items()
            if values
        ]
    return rows


def summary_table(rows: Sequence[SummaryRow], title: str = "Scores against ground truth") -> Table:
    """The rows of `summarise` as a rich table."""
    table = Table("task", "figure", *("mean", "min", "max", "runs"), title=title, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for before, row in zip([None, *rows], rows, strict=False):
        first = before is None or before.task != row.task
        if first and before is not None:
            table.add_section()
        table.add_row(row.task if first else "", row.figure, *(number(v) for v in row[2:5]), str(row.runs))
    return table


def number(value: float | None) -> str:
    """A figure as tables show it: three decimals for shares, fewer for counts, more for what is tiny; "–" for None."""
    if value is None:
        return "–"
    if abs(value) != 1 and (float(value).is_integer() or abs(value) >= 100):
        return f"{value:g}"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.3g}"


def score_toy(
    task: str,
    v_out: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    alive: BoolTensor | Tensor,
    *,
    loss: float | None = None,
    group_size: int = 5,
) -> ToyScore:
    """Score the subnetworks of one toy run against its ground truth.

    task: one of `TASKS`. v_out: {parameter: [n_v, *shape]}, column k being subnetwork k. target: {parameter: shape},
    the target model's parameters. truth: {"A": [features, outputs]} for TMCS (y = x A), unused elsewhere. alive: bool
    [n_v], P_act > 0. loss: L on fresh samples, if measured (None in the figures when it is not finite). group_size:
    features per group, high rank only.

    A circuit is recovered when a live subnetwork of its own (Hungarian assignment over dominant features) has

    - TMS: its dominant row of W_in = the feature's, with more than half of the energy of its W_in;
    - TMCS: the feature as the dominant one, read as in the paper ("Reading A"): j* is the hidden unit with the longest
      row of the subnetwork's W_out, and the feature the i with the largest |W_in[i, j*]|;
    - high rank: more than half of the energy of its W_in in the group's rows;
    - squared: more than half of the energy of 0.weight in the feature's column, and the largest energy of the last
      layer (4.weight and 4.bias) in the row of the same feature.

    Raises L3DError for an unknown task, a missing tensor, tensors of other shapes, or values that are not finite.
    """
    require_choice("task", task, TASKS)
    kind = "tms" if task.startswith("tms_") else "high_rank" if task.startswith("high_rank") else task
    needed = {"tms": ("W_in",), "tmcs": ("W_in", "W_out"), "high_rank": ("W_in",), "squared": ("0.weight", "4.weight")}
    v_out, target, alive = _checked(task, needed[kind], v_out, target, alive)
    if kind == "tms":
        reading = _tms(v_out, target, alive)
    elif kind == "tmcs":
        reading = _tmcs(v_out, target, alive, truth)
    elif kind == "high_rank":
        reading = _high_rank(v_out, alive, group_size)
    else:
        reading = _squared(v_out, alive)

    share = reading.shares.gather(1, reading.circuit[:, None])[:, 0]
    own = _assign(reading, share)
    subnetworks = tuple(
        SubnetworkScore(
            index=k,
            alive=bool(alive[k]),
            circuit=int(reading.circuit[k]),
            share=share[k].item(),
            own=k in own,
            quality=None if reading.quality is None else reading.quality[k].item(),
        )
        for k in range(len(alive))
    )
    figures: dict[str, float | None] = {} if loss is None else {"loss": float(loss) if math.isfinite(loss) else None}
    figures |= {"recovered": float(len(own)), "dead": float((~alive).sum())}
    figures |= _mean_and_min("share", share[alive])
    if kind == "tms" and reading.quality is not None:
        figures |= _mean_and_min("cos", reading.quality[own])
    return ToyScore(task, reading.shares.shape[1], figures | reading.figures, subnetworks)


# --- One reading per toy ----------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """What one toy's rules say of each subnetwork."""

    circuit: Tensor
    """[n_v], the dominant feature or group."""
    shares: Tensor
    """[n_v, circuits], share of the energy in each."""
    eligible: Tensor
    """bool [n_v], live and clear enough to stand for its dominant circuit."""
    figures: dict[str, float | None]
    quality: Tensor | None = None
    """[n_v], see `SubnetworkScore.quality`."""


def _tms(v_out: dict[str, Tensor], target: dict[str, Tensor], alive: Tensor) -> _Reading:
    rows, planted_rows = v_out["W_in"], target["W_in"]
    shares = energy_shares(rows.square().sum(2))
    feature = shares.argmax(1)
    cos = cosine_similarity(rows[torch.arange(len(rows)), feature], planted_rows[feature], dim=1).abs()
    figures: dict[str, float | None] = {"mmcs": None, "mmcs_all": None, "ml2r": None}
    if alive.any():
        # A planted circuit is one row of W_in and nothing in any other tensor.
        planted = single_rows(planted_rows)
        live = rows[alive].flatten(1)
        everything = torch.cat([live, *(v[alive].flatten(1) for name, v in v_out.items() if name != "W_in")], 1)
        padded = torch.nn.functional.pad(planted, (0, everything.shape[1] - planted.shape[1]))
        figures = {"mmcs": mmcs(live, planted), "mmcs_all": mmcs(everything, padded), "ml2r": ml2r(live, planted)}
    return _Reading(feature, shares, alive & (shares.amax(1) > 0.5), figures, cos)


def _tmcs(v_out: dict[str, Tensor], target: dict[str, Tensor], alive: Tensor, truth: Mapping[str, Tensor]) -> _Reading:
    w_in, w_out = v_out["W_in"], v_out["W_out"]
    learned = target["W_in"] @ target["W_out"]
    if "A" not in truth or truth["A"].shape != learned.shape:
        found = f"shape {list(truth['A'].shape)}" if "A" in truth else f"only {', '.join(truth) or 'nothing'}"
        raise L3DError(f"truth: found {found}, allowed is A of shape [features, outputs] = {list(learned.shape)}")
    require_finite({"truth A": truth["A"]})
    planted = truth["A"].detach().double().cpu()

    k = torch.arange(len(w_in))
    feature, a_hat = rows_of_a(w_in, w_out)
    products = w_in @ w_out

    def r2_by_row(rows: Tensor) -> Tensor:
        pairs = zip(rows, planted[feature], strict=True)
        return torch.tensor([squared_correlation(row, truth_row) for row, truth_row in pairs], dtype=torch.float64)

    r2 = r2_by_row(a_hat)
    figures = _mean_and_min("r2", r2[alive])
    figures["r2_product"] = _mean(r2_by_row(products[k, feature])[alive])
    figures["r2_ceiling"] = _mean(r2_by_row(learned[feature])[alive])
    figures["r2_ratio"] = _ratio(figures["r2"], figures["r2_ceiling"])
    figures["r2_sum"] = squared_correlation(products[alive].sum(0), planted)
    figures["r2_sum_ceiling"] = squared_correlation(learned, planted)
    figures["r2_sum_ratio"] = _ratio(figures["r2_sum"], figures["r2_sum_ceiling"])
    return _Reading(feature, energy_shares(w_in.square().sum(2)), alive, figures, r2)


def rows_of_a(w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """Reading A (paper): each subnetwork's feature [n_v], and its row of A up to a factor, [n_v, outputs].

    j* is the hidden unit with the longest row of w_out [n_v, hidden, outputs], the feature the i with the largest
    |w_in[i, j*]|, w_in [n_v, features, hidden]; the row is w_in[i, j*] w_out[j*].
    """
    k = torch.arange(len(w_in))
    unit = vector_norm(w_out, dim=2).argmax(1)  # j*
    column = w_in[k, :, unit]  # W_in[:, j*] of each subnetwork
    feature = column.abs().argmax(1)
    return feature, column[k, feature][:, None] * w_out[k, unit]


def _high_rank(v_out: dict[str, Tensor], alive: Tensor, group_size: int) -> _Reading:
    energy = v_out["W_in"].square().sum(2)
    if group_size < 1 or energy.shape[1] % group_size:
        raise L3DError(f"group_size: found {group_size}, allowed are divisors of the {energy.shape[1]} features")
    shares = energy_shares(energy.unflatten(1, (-1, group_size)).sum(2))
    return _Reading(shares.argmax(1), shares, alive & (shares.amax(1) > 0.5), {})


def _squared(v_out: dict[str, Tensor], alive: Tensor) -> _Reading:
    shares = energy_shares(v_out["0.weight"].square().sum(1))
    outputs = v_out["4.weight"].square().sum(2)
    if "4.bias" in v_out:
        outputs = outputs + v_out["4.bias"].square()
    if outputs.shape != shares.shape:
        raise L3DError(f"4.weight: found {outputs.shape[1]} outputs, allowed is one per input ({shares.shape[1]})")
    feature = shares.argmax(1)
    same = outputs.argmax(1) == feature
    figures = {"same_output": _mean(same[alive].double())}
    return _Reading(feature, shares, alive & same & (shares.amax(1) > 0.5), figures, same.double())


def _assign(reading: _Reading, share: Tensor) -> list[int]:
    """The subnetworks that stand for a circuit: as many circuits as can have one, then the largest shares [n_v]."""
    value = torch.zeros_like(reading.shares)
    k = torch.nonzero(reading.eligible)[:, 0]
    value[k, reading.circuit[k]] = 1 + share[k]
    rows, columns = linear_sum_assignment(value.numpy(), maximize=True)
    return [int(row) for row, column in zip(rows, columns, strict=True) if value[row, column] > 0]


# --- Small parts ------------------------------------------------------------------------------------------------------


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _mean_and_min(name: str, values: Tensor) -> dict[str, float | None]:
    return {name: _mean(values), f"{name}_min": values.min().item() if len(values) else None}


def _ratio(value: float | None, ceiling: float | None) -> float | None:
    return value / ceiling if value is not None and ceiling else None


def _checked(
    task: str, needed: Sequence[str], v_out: Mapping[str, Tensor], target: Mapping[str, Tensor], alive: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Float64 copies on the CPU, once the names and shapes that the task's reading needs are there."""
    for place, tensors in (("v_out", v_out), ("target", target)):
        for name in needed:
            if name not in tensors:
                near = did_you_mean(name, tensors)
                found = ", ".join(tensors) or "nothing"
                raise L3DError(f"{place}: {task} is read off {name!r}, found only {found}{near}")
        require_finite({f"{place} {name}": tensor for name, tensor in tensors.items()})
    if alive.ndim != 1 or alive.dtype != torch.bool:
        raise L3DError(f"alive: found {alive.dtype} of shape {list(alive.shape)}, allowed is bool [n_v]")
    for name, tensor in v_out.items():
        shape = [len(alive), *(target[name].shape if name in target else tensor.shape[1:])]
        if list(tensor.shape) != shape:
            raise L3DError(f"v_out {name}: found shape {list(tensor.shape)}, allowed is [n_v, *shape] = {shape}")

    def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().double().cpu() for name, tensor in tensors.items()}

    return copy(v_out), copy(target), alive.cpu()
