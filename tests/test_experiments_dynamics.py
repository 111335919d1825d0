"""Experiment dynamics: its measures where the answer is known, and the command end to end."""

import copy
import math
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from oracles import planted_decomposition
from torch.nn.functional import cross_entropy

from datamodules.digits import DigitsData
from datamodules.loading import Rows
from datamodules.text import TextData
from l3d_pl import L3D
from l3d_pl.analysis.stability import cosines
from l3d_pl.cli import main
from l3d_pl.experiments.behaviours import NEW_NAMES, NewNames
from l3d_pl.experiments.common import Toy
from l3d_pl.experiments.dynamics import (
    Settings,
    Shift,
    _fit,
    _random,
    _task_rows,
    _verdict,
    attributed,
    coordinates,
    fates,
    share_in_span,
    shares,
)
from l3d_pl.experiments.text import Backwards
from l3d_pl.targets.digits import DigitsCNN

ALIVE = torch.ones(3, dtype=torch.bool)


def test_the_same_subnetworks_in_another_order_persist() -> None:
    cos = torch.eye(3)[[2, 0, 1]] * torch.tensor([-1.0, 1, 1])  # the sign is free
    assert fates(cos, ALIVE, ALIVE, 0.7) == (["persists"] * 3, ["persists"] * 3)


def test_a_new_one_appears_and_an_old_one_vanishes() -> None:
    cos = torch.eye(3)
    cos[1, 1] = 0.2
    assert fates(cos, ALIVE, ALIVE, 0.7) == (["persists", "vanishes", "persists"], ["persists", "appears", "persists"])


def test_dead_ones_match_nothing() -> None:
    alive = torch.tensor([True, False, True])
    before, after = fates(torch.eye(3), alive, ALIVE, 0.7)
    assert before == ["persists", "dead", "persists"]
    assert after == ["persists", "appears", "persists"]


def test_a_repeat_persists_once() -> None:
    cos = torch.tensor([[1.0, 0.99], [0.0, 0.0]])  # both of the later ones are like the first of the earlier
    alive = torch.ones(2, dtype=torch.bool)
    before, after = fates(cos, alive, alive, 0.7)
    assert before == ["persists", "vanishes"]
    assert sorted(after) == ["appears", "persists"]


def test_parts_of_a_quadratic_loss_add_up_to_its_change() -> None:
    random = torch.Generator().manual_seed(0)
    n = 6
    root = torch.randn(n, n, generator=random, dtype=torch.float64)
    curvature = root @ root.T
    path = torch.randn(3, n, generator=random, dtype=torch.float64)
    losses, gradients = 0.5 * ((path @ curvature) * path).sum(1), path @ curvature
    v = torch.randn(n, n, generator=random, dtype=torch.float64)  # a basis, not orthogonal
    assert float(attributed(v, path, gradients).sum()) == pytest.approx(float(losses[-1] - losses[0]))
    inside = torch.linalg.qr(v[:2].T).Q  # of two of them, what the steps' projections do
    steps, slopes = path.diff(dim=0), (gradients[1:] + gradients[:-1]) / 2
    expected = ((steps @ inside @ inside.T) * slopes).sum()
    assert float(attributed(v[:2], path, gradients).sum()) == pytest.approx(float(expected))


def test_the_part_is_that_of_the_subnetwork_that_was_moved() -> None:
    v = torch.eye(4, dtype=torch.float64)[:3]
    path = torch.stack([torch.zeros(4), torch.tensor([0.0, 2.0, 0.0, 5.0])]).double()
    gradients = torch.tensor([[1.0, -3.0, 1.0, 9.0], [1.0, -1.0, 1.0, 9.0]]).double()
    assert attributed(v, path, gradients).tolist() == [0, -4, 0]


def test_span_and_coordinates() -> None:
    v = torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]], dtype=torch.float64)
    assert coordinates(v, torch.tensor([3.0, 2, 7]).double()).tolist() == pytest.approx([1, 2])
    assert share_in_span(v, torch.tensor([3.0, 0, 4]).double()) == pytest.approx(9 / 25)
    twice = torch.cat([v, v])  # repeats change nothing
    assert share_in_span(twice, torch.tensor([3.0, 0, 4]).double()) == pytest.approx(9 / 25)


def test_new_names_are_the_old_ones_for_the_first_half() -> None:
    old, new = NewNames.__bases__[0](), NewNames()
    old.setup()
    new.setup()
    for part in ("train", "test"):
        before, after = (getattr(data, part)[torch.arange(300)] for data in (old, new))
        assert torch.equal(before["inputs"], after["inputs"])
        assert after["labels"].tolist() == [NEW_NAMES[label] for label in before["labels"].tolist()]
    assert NEW_NAMES[:5] == (0, 1, 2, 3, 4)
    assert sorted(NEW_NAMES) == list(range(10))
    assert all(NEW_NAMES[i] != i for i in range(5, 10))


def test_text_is_read_backwards() -> None:
    settings = {"vocabulary": 1000, "length": 16}
    there, all_back, half_back = TextData(**settings), Backwards(**settings), Backwards(every=2, **settings)
    for data in (there, all_back, half_back):
        data.setup()
    for part in ("train", "validation"):
        given, turned, mixed = (getattr(data, part)[torch.arange(3, 9)] for data in (there, all_back, half_back))
        tokens = given["input_ids"]
        assert not torch.equal(tokens, tokens.flip(1))
        assert torch.equal(turned["input_ids"], tokens.flip(1))
        assert torch.equal(turned["sample_mask"], given["sample_mask"].flip(1))
        assert torch.equal(mixed["input_ids"][::2], tokens[::2])  # rows 3, 5, 7
        assert torch.equal(mixed["input_ids"][1::2], tokens[1::2].flip(1))


def test_shares_count_the_living() -> None:
    facts = {"task": "digits", "seed": 0, "arm": "scratch", "from": 0, "to": 1}
    rows = [facts | {"kind": "match", "cos": cos, "p_act": 0.1, "other_p_act": 0.1} for cos in (-0.9, 0.5)]
    rows += [facts | {"kind": "fate", "side": "before", "fate": fate} for fate in ("persists", "vanishes", "dead")]
    rows += [facts | {"kind": "fate", "side": "after", "fate": fate} for fate in ("persists", "appears", "appears")]
    found = shares(pd.DataFrame(rows)).iloc[0]
    assert found["cos"] == pytest.approx(0.7)
    assert (found["persists"], found["vanishes"], found["appears"]) == (0.5, 0.5, pytest.approx(2 / 3))
    assert found["alive"] == 2
    assert math.isnan(found["p_act"])


def test_the_loss_falls_along_the_subnetwork_that_the_model_was_moved_along() -> None:
    first, last, moved = planted_decomposition(4), planted_decomposition(4), 2
    with torch.no_grad():  # afterwards there is another one in its place
        core = last.subnetworks.v_out.parameters_of("weight").tucker.core
        core[moved] = 0
        core[moved, moved, 0] = 1
    random = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(300, 4, generator=random), torch.randint(4, (300,), generator=random)
    rows = Rows(inputs=inputs, labels=labels)
    data = SimpleNamespace(setup=lambda: None, train=rows, validation=rows)
    models = {}
    for step in (0, 1, 2, 3):
        models[step] = copy.deepcopy(first.target)
        with torch.no_grad():
            models[step].weight += 0.2 * step * first.direction(moved)["weight"]
    losses = [float(cross_entropy(models[step](inputs), labels)) for step in models]
    found = pd.DataFrame(_task_rows(first, last, _random(first, 0), 0.7, models, data))
    assert found[found["kind"] == "task"]["loss"].tolist() == pytest.approx(losses)
    parts, fell = found[found["kind"] == "part"].set_index(["side", "subnetwork"]), losses[-1] - losses[0]
    before, after = parts.loc["before"], parts.loc["after"]
    assert before["part"][moved] == pytest.approx(fell, rel=0.01)
    assert before["part"].drop(moved).abs().max() < 1e-4 * abs(fell)
    assert after["part"].abs().max() < 0.1 * abs(fell)  # those that are there now had next to no part
    assert (before["fate"][moved], after["fate"][moved]) == ("vanishes", "appears")
    assert set(before["fate"].drop(moved)) == set(after["fate"].drop(moved)) == {"persists"}
    path = found[found["kind"] == "path"].iloc[0]
    assert path["carried"] == pytest.approx(fell, rel=0.01)
    assert path["in_span_before"] == pytest.approx(1)
    assert path["in_span_after"] < 0.1


def test_going_on_begins_with_the_subnetworks_that_were_there() -> None:
    model = {"target": DigitsCNN((4, 8), 16), "parameters": ["fc1.weight"], "divergence": "kl", "ranks": 0.2}
    shift = Shift(Toy("digits_cnn", model | {"lr": 0.0}, {}, {}), "cross_entropy", NewNames, DigitsData, fit_steps=4)
    settings = Settings(n_subnetworks=6)
    start = L3D(**model, n_subnetworks=6, init="random", seed=5)
    again = _fit(settings, shift, model["target"], 0, start)
    cos = cosines(start.subnetworks.v_out, again.subnetworks.v_out).detach()
    torch.testing.assert_close(cos.diagonal(), torch.ones(6), rtol=0, atol=1e-5)
    scratch = _fit(settings, shift, model["target"], 0)
    assert cosines(start.subnetworks.v_out, scratch.subnetworks.v_out).abs().max() < 0.9


def test_the_verdict_of_planted_rows() -> None:
    """Those that turn most carry most, those that vanish four times as much as those that persist; two seeds."""
    rows: list[dict[str, object]] = []
    for seed in (0, 1):
        facts = {"task": "digits", "seed": seed}
        rows += [facts | {"kind": "task", "to": t, "loss": 5.0 - t + seed, "accuracy": t / 4} for t in (0, 1, 3)]
        rows.append(
            facts
            | {"kind": "path", "carried": -2.0, "in_span_before": 0.5, "in_span_after": 0.6, "in_span_random": 0.01}
        )
        for side, k, fate, cos, p_act, part in (
            *(("before", 0, "persists", 0.95, 0.1, -0.1), ("before", 1, "persists", 0.9, 0.3, 0.3)),
            *(("before", 2, "vanishes", 0.3, 0.2, -0.8), ("before", 3, "dead", 0.9, 0.0, 9.0)),
            *(("after", 0, "persists", 0.95, 0.1, 0.5), ("after", 2, "appears", 0.3, 0.1, -0.25 - seed)),
            ("random", 0, "random", float("nan"), 1.0, 0.01),
        ):
            row = {"kind": "part", "side": side, "subnetwork": k, "fate": fate, "cos": cos, "p_act": p_act}
            rows.append(facts | row | {"part": part})
    arms = {"scratch": 0.4, "another seed": 0.5, "going on": 0.6, "unchanged": 0.9}
    found = pd.DataFrame(
        {"seed": seed, "arm": arm, "from": 0, "to": 0 if arm == "another seed" else to, "cos": cos - to / 100}
        for seed in (0, 1)
        for arm, cos in arms.items()
        for to in (1, 3)
    )
    verdict = _verdict(pd.DataFrame(rows), found)
    assert [verdict[f"new task, loss at {t}"] for t in (0, 1, 3)] == [5.5, 4.5, 2.5]
    assert verdict["rank correlation of turning with the part in the loss"] == "1.00 ± 0.00"  # the dead do not count
    assert verdict["rank correlation of P_act with the part in the loss"] == "0.50 ± 0.00"
    assert verdict["mean |part|, before, persists"] == "0.2 ± 0"
    assert verdict["mean |part|, before, vanishes"] == "0.8 ± 0"
    assert verdict["|part|, vanishes over persists"] == "4.00 ± 0.00"
    assert verdict["|part|, vanishes above persists, seeds"] == "2 of 2"
    assert verdict["|part|, appears over persists"] == "1.50 ± 1.41"
    assert verdict["|part|, appears above persists, seeds"] == "1 of 2"
    assert verdict["mean |part|, random"] == "0.01 ± 0"
    assert verdict["of it along those after"] == "-0.25 ± 0.71"
    assert verdict["share of the step in the span of those after"] == "0.600 ± 0.000"
    assert verdict["|cos|, scratch minus another seed"] == "-0.10 ± 0.00"
    assert verdict["|cos|, going on minus unchanged"] == "-0.30 ± 0.00"


def test_command(tmp_path, capsys) -> None:
    assert main(["experiment", "dynamics", "--tiny", "--seed", "1", "--output", str(tmp_path)]) == 0
    assert "another seed" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "seed_1" / "rows.csv")
    losses = rows[rows["kind"] == "task"]
    assert set(losses[["task", "to"]].itertuples(index=False, name=None)) == set(product(("digits", "text"), (0, 1, 3)))
    assert losses.groupby("task")["loss"].nunique().tolist() == [3, 3]  # it is being trained
    assert set(rows[rows["kind"] == "match"]["arm"]) == {"scratch", "another seed", "going on", "unchanged", "random"}
    assert (rows[rows["kind"] == "match"]["cos"].abs() <= 1.0001).all()
    assert (tmp_path / "dynamics.png").stat().st_size > 5000
