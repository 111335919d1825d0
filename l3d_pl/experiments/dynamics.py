"""L3D along a fine-tuning run: what persists, appears, vanishes? (docs/experiments/dynamics.md)

The digits CNN is fine-tuned until the last five classes have changed names, the text LM on text that is read backwards.
At checkpoints it is decomposed, from scratch and from where the checkpoint before ended; the subnetworks are matched.
How well two fits match *where nothing changed* is the noise: another seed (scratch), as many more steps (going on).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datamodules.digits import DigitsData
from l3d_pl.analysis.outputs import outputs_of
from l3d_pl.analysis.stability import cosines, match
from l3d_pl.decomposition import Decomposition
from l3d_pl.experiments.behaviours import NewNames, outputs_at, read
from l3d_pl.experiments.common import COLOURS, Summary, Toy, doing, load_toy, spread
from l3d_pl.experiments.text import Backwards, load_text
from l3d_pl.lightning_module import L3D
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.training import TargetTraining
from l3d_pl.toys import fit_quietly

ARMS = ("scratch", "another seed", "going on", "unchanged", "random")
FATES = (
    ("before", "persists"),
    ("before", "vanishes"),
    ("after", "persists"),
    ("after", "appears"),
    ("random", "random"),
)
MOST = 1500  # images or sequences that gradients of the new task are taken on


@dataclass(frozen=True)
class Settings:
    """What can be set.

    Args:
        tasks: the digits CNN, the text LM.
        n_subnetworks: n_v.
        fit_steps: of a decomposition from scratch; going on takes half as many.
        checkpoints: steps of fine-tuning at which the network is decomposed, besides 0.
        lr: of fine-tuning (AdamW, constant, all parameters).
        same: |cos| above which two subnetworks count as one.
        target_epochs: training of the digits CNN before; one of its own for every seed.
        text_fit_steps: `fit_steps` of the text LM.
        text_target_steps: training of the text LM before; one of its own for every seed.
    """

    tasks: tuple[Literal["digits", "text"], ...] = ("digits", "text")
    n_subnetworks: int = 40
    fit_steps: int = 100
    checkpoints: tuple[int, ...] = (20, 100)
    lr: float = 0.001
    same: float = 0.7
    target_epochs: int = 20
    text_fit_steps: int = 80
    text_target_steps: int = 600


TINY = {"n_subnetworks": 5, "fit_steps": 4, "checkpoints": [1, 3], "target_epochs": 1}
TINY |= {"text_fit_steps": 2, "text_target_steps": 2}


# -- the model that changes --------------------------------------------------------------------------------------------


@dataclass
class Shift:
    """A model, and the task that it is fine-tuned on.

    Attributes:
        toy: the model before.
        loss: of the training, a name that `TargetTraining` knows.
        new: data of the new task, by seed.
        seen: data that the model is decomposed on, the same at all checkpoints.
        fit_steps: of a decomposition.
    """

    toy: Toy
    loss: Literal["cross_entropy", "next_token"]
    new: Callable[..., Any]
    seen: Callable[..., Any]
    fit_steps: int


def load_shift(task: str, settings: Settings, output: Path, seed: int) -> Shift:
    if task == "digits":
        toy = load_toy("digits_cnn", seed, output, ["--trainer.max_epochs", str(settings.target_epochs)])
        return Shift(toy, "cross_entropy", NewNames, DigitsData, settings.fit_steps)
    text = load_text(seed, output, settings.text_target_steps)
    new, seen = partial(Backwards, **text.data), partial(Backwards, every=2, **text.data)
    return Shift(text, "next_token", new, seen, settings.text_fit_steps)


class Keep(L.Callback):
    """Copies of the model, in eval mode and frozen, after the given steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = set(steps)
        self.models: dict[int, nn.Module] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step in self.steps:
            self.models[trainer.global_step] = copy.deepcopy(cast(nn.Module, module.model)).eval().requires_grad_(False)


def fine_tune(shift: Shift, checkpoints: Sequence[int], lr: float, seed: int) -> dict[int, nn.Module]:
    """The model after 0 and after so many steps on the new task, {steps: model}."""
    kept = Keep(checkpoints)
    torch.manual_seed(seed)
    model = copy.deepcopy(shift.toy.target).requires_grad_(True)
    training = TargetTraining(model, loss=shift.loss, lr=lr, schedule="constant")
    fit_quietly(training, shift.new(seed=seed), max_steps=max(checkpoints), limit_val_batches=0, callbacks=[kept])
    return {0: shift.toy.target, **kept.models}


# -- measures ----------------------------------------------------------------------------------------------------------


def fates(cos: Tensor, before: Tensor, after: Tensor, same: float) -> tuple[list[str], list[str]]:
    """What became of each subnetwork: `persists`, `vanishes`, `dead`; how each came: `persists`, `appears`, `dead`.

    Only those that live count; of two that are alike to one, the Hungarian matching says which of them it is.

    Args:
        cos: of all subnetworks before with all after, [n, m].
        before, after: which are alive, [n] and [m].
    """
    first, second = ["vanishes"] * len(before), ["appears"] * len(after)
    alive = cos.abs() * before[:, None] * after
    for i, j in zip(*(places.tolist() for places in match(alive)), strict=True):
        if float(alive[i, j]) > same:
            first[i] = second[j] = "persists"
    for names, living in ((first, before), (second, after)):
        for i in (~living).nonzero().flatten().tolist():
            names[i] = "dead"
    return first, second


def flat(tensors: Mapping[str, Tensor], names: Sequence[str], first: int = 0) -> Tensor:
    """Tensors as one vector, float64; the first `first` dimensions stay."""
    return torch.cat([tensors[name].detach().double().flatten(first) for name in names], -1)


def coordinates(v: Tensor, step: Tensor) -> Tensor:
    """The a of least squares in step = sum_k a_k v_k, [n_v]; v is [n_v, n_w], step [n_w]."""
    return torch.linalg.lstsq(v.T, step.unsqueeze(1), driver="gelsd").solution.squeeze(1)


def attributed(v: Tensor, path: Tensor, gradients: Tensor) -> Tensor:
    """The change of a loss along a path of parameters, by subnetwork: sum over steps a_k (∇L · v_k), [n_v].

    a: `coordinates` of the step. ∇L: the mean of the step's ends, so that for a quadratic loss the sum over k is
    exactly the change that the steps' components in the span of the subnetworks make.

    Args:
        v: [n_v, n_w].
        path: parameters at the checkpoints, [checkpoints, n_w].
        gradients: of the loss there, likewise.
    """
    slopes = (gradients[1:] + gradients[:-1]) / 2
    return sum(
        (coordinates(v, step) * (v @ g) for step, g in zip(path.diff(dim=0), slopes, strict=True)), v.new_zeros(())
    )


def share_in_span(v: Tensor, step: Tensor) -> float:
    """The part of ‖step‖² that lies in the span of the rows of v."""
    return float((coordinates(v, step) @ v).square().sum() / step.square().sum())


# -- one seed ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """Rows by `kind`: `match` (pairs), `fate` (every subnetwork), `part` (those before, after, and random ones), `task`
    (every checkpoint), `path`."""
    return [{"task": task} | row for task in settings.tasks for row in _task(task, settings, output, seed)]


def _task(task: str, settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    doing(f"{task}, target")
    shift = load_shift(task, settings, output, seed)
    doing(f"{task}, fine-tuning")
    models = fine_tune(shift, settings.checkpoints, settings.lr, seed)
    steps = sorted(models)
    scratch, going_on, unchanged = {}, {}, {}
    for step in steps:
        doing(f"{task}, from scratch at {step}")
        scratch[step] = _fit(settings, shift, models[step], seed)
    doing(f"{task}, another seed")
    another = _fit(settings, shift, models[0], seed + 1000)
    going_on[0] = unchanged[0] = scratch[0]
    for last, step in pairwise(steps):
        doing(f"{task}, going on at {step}")
        going_on[step] = _fit(settings, shift, models[step], seed, going_on[last])
        unchanged[step] = _fit(settings, shift, models[0], seed, unchanged[last])

    found = {step: module.decomposition() for step, module in scratch.items()}
    rows: list[dict[str, Any]] = []
    pairs = list(dict.fromkeys([(0, step) for step in steps[1:]] + list(pairwise(steps))))
    for a, b in pairs:
        rows += _compared("scratch", a, b, found[a], found[b], settings.same)
        for arm, chain in (("going on", going_on), ("unchanged", unchanged)):
            rows += _compared(arm, a, b, chain[a].decomposition(), chain[b].decomposition(), settings.same)
    rows += _compared("another seed", 0, 0, found[0], another.decomposition(), settings.same)
    random = _random(found[0], seed)
    rows += _compared("random", 0, 0, found[0], random, settings.same)
    at_end = going_on[steps[-1]].decomposition()
    return rows + _task_rows(found[0], at_end, random, settings.same, models, shift.new(seed=seed))


def _fit(settings: Settings, shift: Shift, model: nn.Module, seed: int, start: L3D | None = None) -> L3D:
    """A decomposition of `model`: from scratch, or from the subnetworks of another fit."""
    given = shift.toy.model | {"target": model, "n_subnetworks": settings.n_subnetworks}
    steps = shift.fit_steps
    if start is not None:
        given |= {"init": "random", "scale_start": False, "k_start": 1.0, "swap_every": 0, "revive_every": 0}
        steps = max(1, steps // 2)
    module = L3D(**given, seed=seed)
    if start is not None:
        module.subnetworks.load_state_dict(start.subnetworks.state_dict())
    fit_quietly(module, shift.seen(seed=seed), max_steps=steps)
    module.ensure_validated()
    return module


def _random(found: Decomposition, seed: int) -> Decomposition:
    """As many random directions of the same ranks, all alive."""
    own = found.subnetworks
    ranks = {name: list(ranks) or 1 for name, ranks in own.ranks.items()}
    drawn = Subnetworks(own.shapes, own.n_subnetworks, ranks, generator=torch.Generator().manual_seed(seed))
    return Decomposition(drawn, divergence=found.divergence, k=found.k, p_act=torch.ones(own.n_subnetworks))


def _compared(
    arm: str, a: int, b: int, first: Decomposition, second: Decomposition, same: float
) -> list[dict[str, Any]]:
    cos = cosines(first.subnetworks.v_out, second.subnetworks.v_out).detach()
    facts = {"arm": arm, "from": a, "to": b}
    before, after = first.p_act > 0, second.p_act > 0
    alive = cos.abs() * before[:, None] * after
    rows: list[dict[str, Any]] = [
        facts
        | {
            "kind": "match",
            "subnetwork": i,
            "cos": float(cos[i, j]),
            "p_act": float(first.p_act[i]),
            "other_p_act": float(second.p_act[j]),
        }
        for i, j in zip(*(places.tolist() for places in match(alive)), strict=True)
        if before[i] and after[j]
    ]
    for side, names in zip(("before", "after"), fates(cos, before, after, same), strict=True):
        rows += [facts | {"kind": "fate", "side": side, "subnetwork": i, "fate": name} for i, name in enumerate(names)]
    return rows


def _task_rows(
    first: Decomposition,
    last: Decomposition,
    random: Decomposition,
    same: float,
    models: Mapping[int, nn.Module],
    data: Any,
) -> list[dict[str, Any]]:
    """Loss and accuracy of the new task at each checkpoint; each subnetwork's part in the change, and how it turned.

    Args:
        first, last: decompositions of the first and the last checkpoint, the second made by going on.
        random: directions without meaning.
    """
    data.setup()
    rows: list[dict[str, Any]] = []
    batch = data.validation[torch.arange(len(data.validation))]
    for step in sorted(models):
        logits, _, right = read(batch, outputs_of(models[step], batch))
        accuracy = float((logits.argmax(1) == right).double().mean())
        rows.append({"kind": "task", "to": step, "loss": float(cross_entropy(logits, right)), "accuracy": accuracy})
    names, path, gradients = list(first.subnetworks.shapes), [], []
    batch = data.train[torch.arange(min(len(data.train), MOST))]
    for step in sorted(models):
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in models[step].named_parameters()}
        with torch.enable_grad():
            logits, _, right = read(batch, outputs_at(models[step], tensors, batch))
            total = cross_entropy(logits, right)
            slopes = torch.autograd.grad(total, [tensors[name] for name in names])
        path.append(flat(tensors, names))
        gradients.append(flat(dict(zip(names, slopes, strict=True)), names))
    ways = {"before": first, "after": last, "random": random}
    directions = {side: flat(found.directions(), names, 1) for side, found in ways.items()}
    # What all decomposed tensors change, in the first place and in the span, and what random directions would.
    moved = path[-1] - path[0]
    means = [(a + b) / 2 for a, b in pairwise(gradients)]
    carried = sum(float((b - a) @ mean) for (a, b), mean in zip(pairwise(path), means, strict=True))
    rows.append(
        {"kind": "path", "carried": carried}
        | {f"in_span_{side}": share_in_span(v, moved) for side, v in directions.items()}
    )
    cos = cosines(first.subnetworks.v_out, last.subnetworks.v_out).detach()
    names_of = fates(cos, first.p_act > 0, last.p_act > 0, same)
    became = dict(zip(("before", "after"), names_of, strict=True)) | {"random": ["random"] * random.n_subnetworks}
    for side, v in directions.items():
        parts = attributed(v, torch.stack(path), torch.stack(gradients))
        rows += [
            {
                "kind": "part",
                "side": side,
                "subnetwork": k,
                "fate": became[side][k],
                "cos": float("nan") if side == "random" else float(cos[k, k].abs()),  # going on: same places
                "p_act": float(ways[side].p_act[k]),
                "part": float(parts[k]),
            }
            for k in range(len(v))
        ]
    return rows


# -- all seeds ---------------------------------------------------------------------------------------------------------


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every task, seed and comparison: mean |cos| of the matched; who persists, vanishes, appears; P_act alike?"""
    result = []
    keys = ["task", "seed", "arm", "from", "to"]
    for key, part in rows[rows["kind"].isin(["match", "fate"])].groupby(keys, sort=False):
        matched, sides = part[part["kind"] == "match"], {}
        for side in ("before", "after"):
            names = part[part["side"] == side]["fate"]
            sides[side] = names[names != "dead"]
        use = matched[["p_act", "other_p_act"]].astype(float)
        result.append(
            dict(zip(keys, key, strict=True))
            | {
                "alive": len(sides["before"]),
                "cos": matched["cos"].abs().mean(),
                "persists": (sides["before"] == "persists").mean(),
                "vanishes": (sides["before"] == "vanishes").mean(),
                "appears": (sides["after"] == "appears").mean(),
                "p_act": _rank_correlation(use["p_act"], use["other_p_act"]),
            }
        )
    return pd.DataFrame(result)


def _rank_correlation(a: Any, b: Any) -> float:
    """Spearman's; NaN where one of them is constant or there are fewer than three."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return float(spearmanr(a, b)[0]) if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def summarise(rows: pd.DataFrame) -> Summary:
    """Each arm and pair of checkpoints; whether the subnetworks that turn are those that carry the new task's loss."""
    table, order = [], {arm: i for i, arm in enumerate(ARMS)}
    verdict: dict[str, Any] = {}
    for task, of_task in rows.groupby("task", sort=False):
        found = shares(of_task)
        groups = sorted(
            found.groupby(["arm", "from", "to"], sort=False), key=lambda item: (order[item[0][0]], item[0][1:])
        )
        for (arm, a, b), part in groups:
            table.append(
                {"task": task, "arm": arm, "checkpoints": f"{int(a)} to {int(b)}"}
                | {"alive": spread(part["alive"], "{:.0f}"), "cos, absolute": spread(part["cos"], "{:.2f}")}
                | {name: spread(100 * part[name], "{:.0f}") + " %" for name in ("persists", "vanishes", "appears")}
                | {"P_act, rank correlation": spread(part["p_act"], "{:.2f}")}
            )
        verdict |= {f"{task}: {name}": value for name, value in _verdict(of_task, found).items()}
    return Summary(pd.DataFrame(table), {"dynamics": _plot(rows)}, verdict)


def _verdict(rows: pd.DataFrame, found: pd.DataFrame) -> dict[str, Any]:
    parts, task, paths = (rows[rows["kind"] == kind] for kind in ("part", "task", "path"))
    alive = parts[(parts["side"] == "before") & (parts["p_act"] > 0)]
    turned = [_rank_correlation(1 - part["cos"], part["part"].abs()) for _, part in alive.groupby("seed")]
    use = [_rank_correlation(part["p_act"], part["part"].abs()) for _, part in alive.groupby("seed")]
    last = int(task["to"].max())
    means = task.groupby("to")[["loss", "accuracy"]].mean()
    verdict: dict[str, Any] = {
        f"new task, {name} at {int(step)}": float(means.loc[step, name]) for name in means for step in means.index
    }
    verdict |= {
        "rank correlation of turning with the part in the loss": spread(turned, "{:.2f}"),
        "rank correlation of P_act with the part in the loss": spread(use, "{:.2f}"),
    }
    sizes = parts.assign(size=parts["part"].abs()).groupby(["side", "fate", "seed"])["size"].mean()
    means_of = {key: part.droplevel(["side", "fate"]) for key, part in sizes.groupby(["side", "fate"])}
    for side, fate in FATES:
        name = side if side == fate else f"{side}, {fate}"
        verdict[f"mean |part|, {name}"] = spread(means_of.get((side, fate), []), "{:.2g}")
    for side, fate in (("before", "vanishes"), ("after", "appears")):
        if {(side, fate), (side, "persists")} <= set(means_of):
            ratios = (means_of[side, fate] / means_of[side, "persists"]).dropna()
            verdict[f"|part|, {fate} over persists"] = spread(ratios, "{:.2f}")
            verdict[f"|part|, {fate} above persists, seeds"] = f"{(ratios > 1).sum()} of {len(ratios)}"
    verdict["change of the new task's loss, all decomposed tensors"] = spread(paths["carried"], "{:.2f}")
    for side, name in (("before", "those before"), ("after", "those after"), ("random", "random directions")):
        sums = parts[parts["side"] == side].groupby("seed")["part"].sum()
        verdict[f"of it along {name}"] = spread(sums, "{:.2f}")
        verdict[f"share of the step in the span of {name}"] = spread(paths[f"in_span_{side}"])
    for arm, noise in (("scratch", "another seed"), ("going on", "unchanged")):
        mine = found[(found["arm"] == arm) & (found["from"] == 0) & (found["to"] == last)].set_index("seed")
        its = found[(found["arm"] == noise) & (found["to"].isin([0, last])) & (found["from"] == 0)]
        its = its.sort_values("to").groupby("seed").last()
        verdict[f"|cos|, {arm} minus {noise}"] = spread(mine["cos"] - its["cos"], "{:.2f}")
    return verdict


def _plot(rows: pd.DataFrame) -> Figure:
    tasks = list(rows["task"].unique())
    figure = Figure(figsize=(9, 3.4 * len(tasks)), layout="constrained")
    for task, (left, right) in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False), strict=True):
        of_task = rows[rows["task"] == task]
        last = int(of_task[of_task["kind"] == "task"]["to"].max())
        matched = of_task[(of_task["kind"] == "match") & (of_task["from"] == 0) & of_task["to"].isin([0, last])]
        for colour, arm in zip(COLOURS, ARMS, strict=False):
            cos = np.sort(matched[matched["arm"] == arm]["cos"].abs().to_numpy())[::-1]
            style = "-" if arm in ("scratch", "going on") else "--"
            left.plot(np.linspace(0, 100, len(cos)), cos, style, color=colour, label=arm)
        left.set(xlabel="matched pairs, best first, %", ylabel="|cos|", ylim=(0, 1.03))
        left.set(title=f"{task}, checkpoints 0 and {last}")
        parts = of_task[(of_task["kind"] == "part") & (of_task["side"] == "before") & (of_task["p_act"] > 0)]
        right.scatter(parts["part"].abs(), 1 - parts["cos"], s=10, color=COLOURS[0], alpha=0.6)
        right.set(xscale="log", xlabel="|part in the new task's loss|, nats", ylabel="1 − |cos|, going on")
        right.set(title=f"{task}, all seeds")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(ARMS))
    return figure
