"""Experiment steering: its measures where the answer is known, and the command end to end."""

import json
import math
from collections import OrderedDict
from itertools import product

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from datamodules.loading import Rows, exact_loader
from l3d_pl import Decomposition, Subnetworks
from l3d_pl.cli import main
from l3d_pl.experiments import behaviours, steering
from l3d_pl.experiments.behaviours import read
from l3d_pl.experiments.steering import (
    Along,
    Contest,
    Full,
    LoRA,
    Tuning,
    best_rate,
    costs,
    curve,
    differences_of_means,
    divergences,
    gains,
    side_at,
    strength_at,
    summarise,
    wins,
)
from l3d_pl.experiments.text import Text


class Table(nn.Module):
    """Logits of each class number by a table: moving one row moves nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(8 * torch.eye(3), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.rows


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 1])


def test_a_shift_of_one_class_has_no_side_effect(labels: torch.Tensor) -> None:
    inputs, shift = torch.eye(3)[labels], torch.zeros(3, 3)
    shift[1, 0] = 16
    model = Table()
    rows = curve(model, {"rows": shift}, (0, 1), {"inputs": inputs, "labels": labels})
    assert [row["side"] for row in rows] == pytest.approx([0] * len(rows), abs=1e-9)
    assert rows[0]["wanted"] == pytest.approx(1 / (2 + math.exp(8)))
    at_half = next(row for row in rows if row["strength"] == 0.5)  # logits 8 and 8
    assert at_half["wanted"] == pytest.approx(1 / (2 + math.exp(-8)))
    assert rows[-1]["wanted"] > 0.99
    assert all(row["accuracy_lost"] == 0 for row in rows)
    assert torch.equal(model.rows, 8 * torch.eye(3))


def test_a_bias_towards_a_costs_what_it_moves(labels: torch.Tensor) -> None:
    """The same change for every class: the others pay as much as class b."""
    inputs, shift = torch.eye(3)[labels], torch.zeros(3, 3)
    shift[:, 0] = 16
    batch = {"inputs": inputs, "labels": labels}
    row = next(row for row in curve(Table(), {"rows": shift}, (0, 1), batch) if row["strength"] == 1)
    others, model = inputs[labels != 1], Table()
    after = (model(others) + 16 * torch.tensor([1.0, 0, 0])).log_softmax(1)
    before = model(others).log_softmax(1)
    assert row["side"] == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-4)
    assert row["accuracy_lost"] == 0.5  # class 2 is lost, class 0 is not
    loss = cross_entropy(after, labels[labels != 1]) - cross_entropy(before, labels[labels != 1])
    assert row["loss_added"] == pytest.approx(float(loss), rel=1e-4)


class Pairs(nn.Module):
    """A language model that knows pairs of tokens only: logits of the next token by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(3 * torch.eye(4).roll(1, 1), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.rows[input_ids]


class Positions(Pairs):
    """The same, and each position adds its number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Identity()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.seen(self.rows[input_ids] + torch.arange(4.0)[:, None])


SEQUENCES = {
    "input_ids": torch.tensor([[1, 2, 3, 1], [0, 1, 2, 2]]),
    "attention_mask": torch.ones(2, 4, dtype=torch.long),
    "sample_mask": torch.tensor([[True, True, True, True], [False, True, True, True]]),  # token 0 is special
}


def test_samples_of_sequences_have_a_next_token() -> None:
    values, context, right = read(SEQUENCES, SEQUENCES["input_ids"])
    assert context.tolist() == [1, 2, 3, 1, 2]
    assert right.tolist() == [2, 3, 1, 2, 2]
    assert torch.equal(values, context)


def test_a_continuation_of_one_token_has_no_side_effect() -> None:
    shift = torch.zeros(4, 4)
    shift[1, 3] = 6  # after 1 rather 3 than 2
    row = next(row for row in curve(Pairs(), {"rows": shift}, (3, 1), SEQUENCES) if row["strength"] == 1)
    assert row["wanted"] == pytest.approx(math.exp(6) / (math.exp(6) + math.exp(3) + 2))
    assert row["side"] == pytest.approx(0, abs=1e-9)
    assert row["loss_added"] == pytest.approx(0, abs=1e-9)


def test_words_are_frequent_and_followed_by_their_continuation() -> None:
    toy = Text("pydoc_lm", {}, {"vocabulary": 1000, "length": 16}, {})
    data = toy.data_module(0)
    data.setup()
    _, context, right = read(batch := data.train[torch.arange(len(data.train))], batch["input_ids"])
    pairs = behaviours.text(3, 0, toy, 20)
    assert len({pair.b for pair in pairs}) == 3
    assert [(p.a, p.b) for p in pairs] != [(p.a, p.b) for p in behaviours.text(3, 1, toy, 20)]
    for pair in pairs:
        assert all(name.isalpha() and name.islower() for name in pair.names)
        following = torch.bincount(right[context == pair.b], minlength=1000)
        assert int(following[pair.a]) > 0
        assert int(following.max()) >= int(following[pair.a])
        for part in (pair.train, pair.held_out):
            there = (part["input_ids"][:, :-1] == pair.b).any(1)
            assert int(there.sum()) * 2 == len(there)
        assert len(pair.held_out["input_ids"]) == 20
        assert (pair.examples["input_ids"][:, 1:] == pair.a).any(1).all()
        _, before, after = read(pair.followed, pair.followed["input_ids"])
        assert int(((before == pair.b) & (after == pair.a)).sum()) >= len(pair.followed["input_ids"]) > 0


def test_a_steering_vector_is_a_difference_of_means() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    inputs = torch.randn(6, 3)
    batch = {"inputs": inputs, "labels": torch.tensor([0, 0, 1, 2, 1, 1])}
    behaviour = behaviours.Behaviour(0, 1, ("0", "1"), list, batch, batch, batch)
    expected = model(inputs)[:2].mean(0) - model(inputs)[[2, 4, 5]].mean(0)
    for layer, side in (("0", "output"), ("1", "input")):
        found = differences_of_means(model, layer, side, behaviour)
        assert list(found) == ["vector"]  # what is right is the context here
        assert torch.allclose(found["vector"], expected, atol=1e-6)


def test_a_steering_vector_within_a_context_is_a_contrast_of_what_follows() -> None:
    train = SEQUENCES | {"input_ids": torch.tensor([[1, 2, 3, 1], [0, 1, 3, 1]])}  # after 1: 2, then 3
    followed = SEQUENCES | {"input_ids": torch.tensor([[1, 2, 1, 2], [0, 3, 1, 2]])}
    behaviour = behaviours.Behaviour(2, 1, ("2", "1"), list, train, train, train, followed)
    hooked = Positions()
    found = differences_of_means(hooked, "seen", "output", behaviour)["vector, within b"]
    towards = [hooked.rows[1] + p for p in (0, 2, 2)]  # places of 1 before 2 in `followed`
    away = [hooked.rows[1] + 1]  # of 1 before another in `train`
    assert torch.allclose(found, torch.stack(towards).mean(0) - torch.stack(away).mean(0), atol=1e-6)


def test_divergence_has_the_direction_of_the_page() -> None:
    before, after = torch.tensor([[math.log(0.9), math.log(0.1)]]), torch.zeros(1, 2)
    assert float(divergences(before, after)) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)


def test_strength_is_exact_where_log_odds_are_straight() -> None:
    strengths = [0.0, 0.5, 1.0, 2.0]
    wanted = [1 / (1 + math.exp(6 - 8 * s)) for s in strengths]
    for level in (0.1, 0.5, 0.9):
        assert strength_at(strengths, wanted, level) == pytest.approx((6 + math.log(level / (1 - level))) / 8)
    assert math.isnan(strength_at(strengths, [0.0, 0.4, 0.8, 0.85], 0.9))
    assert strength_at(strengths, [0.95, 0.4, 0.8, 0.85], 0.9) == 0
    assert 0.5 < strength_at(strengths, [0.1, 0.4, 0.8, 0.2], 0.6) < 1  # the first time


def test_side_is_exact_where_it_is_square() -> None:
    strengths = [0.0, 0.5, 1.0, 2.0]
    for s in (0.0, 0.2, 0.7, 1.9):
        assert side_at(strengths, [3 * s * s for s in strengths], s) == pytest.approx(3 * s * s)
    assert math.isnan(side_at(strengths, [0.0, 1.0, 2.0, 3.0], math.nan))


def test_who_does_not_get_there_loses() -> None:
    def rows(method: str, seed: int, side: float) -> list[dict[str, float | str]]:
        facts = {"task": "digits", "method": method, "parameters": 1, "keep": 0.0, "seed": seed, "a": 0, "b": 1}
        facts |= {"accuracy_lost": 0.0, "loss_added": 0.0}
        missed = math.isnan(side)
        ends = (0.0, 0.0, 0.0), (1.0, 0.5 if missed else 0.9, 1.0 if missed else side)
        return [facts | dict(zip(("strength", "wanted", "side"), end, strict=True)) for end in ends]

    sides = {"subnetworks": (1.0, 1.0, math.nan, math.nan), "LoRA": (2.0, 0.5, 9.0, math.nan)}
    found = costs(
        pd.DataFrame([r for m, v in sides.items() for seed, side in enumerate(v) for r in rows(m, seed, side)])
    )
    assert wins(found, "subnetworks", "LoRA", 0.0, 0.9) == pytest.approx(1 / 3)  # the last pair decides nothing
    assert wins(found, "subnetworks", "LoRA", 1.0, 0.9) is None


def test_gains_are_the_directional_derivatives() -> None:
    random = torch.Generator().manual_seed(0)
    directions = {"a": torch.randn(4, 2, 3, generator=random), "b": torch.randn(4, 5, generator=random)}
    gradient = {"a": torch.randn(2, 3, generator=random), "b": torch.randn(5, generator=random)}
    for k, gain in enumerate(gains(directions, gradient)):
        expected = sum(float((directions[name][k] * gradient[name]).sum()) for name in gradient)
        assert float(gain) == pytest.approx(abs(expected), rel=1e-5)


def test_shifts_begin_at_zero_and_count_their_parameters() -> None:
    shapes = {"rows": (3, 4)}
    for shift, n in (
        (Along({"rows": torch.ones(5, 3, 4)}), 5),
        (LoRA("rows", (3, 4)), 7),
        (Full(shapes), 12),
    ):
        assert sum(parameter.numel() for parameter in shift.parameters()) == n
        assert torch.equal(shift()["rows"], torch.zeros(3, 4))


def test_along_adds_up_its_directions() -> None:
    directions = torch.arange(24.0).view(2, 3, 4)
    shift = Along({"rows": directions})
    shift.delta.data = torch.tensor([2.0, -1.0])
    assert torch.equal(shift()["rows"], 2 * directions[0] - directions[1])


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_tuning_looks_at_the_others_only_if_they_are_kept(labels: torch.Tensor, keep: float) -> None:
    """A shift of class 2's row: no effect on class b, so its gradient comes from what is to be kept alone."""
    direction = torch.zeros(1, 3, 3)
    direction[0, 2, 0] = 1
    shift = Along({"rows": direction})
    shift.delta.data += 8  # half of class 2 is called 0 now
    tuning = Tuning(Table(), shift, (0, 1), keep, 0.1)
    tuning.training_step({"inputs": torch.eye(3)[labels], "labels": labels}, 0).backward()
    assert (float(shift.delta.grad) > 0.01) == bool(keep)
    assert all(not parameter.requires_grad for parameter in tuning.target.parameters())
    assert [name for name, _ in tuning.named_parameters()] == ["shift.delta"]


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch) -> Contest:
    """A model that says of a class number that number; 1 is to be called 0. Subnetwork k moves one entry of the table:
    number 4 that of class 1 towards 0, number 2 as much of it as spills over to class 2, the others what has nothing
    to do with it."""
    entries = [(0, 1), (2, 1), None, (0, 2), (1, 0)]
    spilling = torch.zeros(3, 3)
    spilling[1, 0], spilling[2, 0] = 0.8, 0.6
    truth = torch.stack([spilling if e is None else torch.eye(9)[3 * e[0] + e[1]].view(3, 3) for e in entries])
    found = Subnetworks({"rows.weight": (3, 3)}, 5, 3)
    for side in (found.v_in, found.v_out):
        tucker = side.parameters_of("rows.weight").tucker
        with torch.no_grad():
            tucker.core.copy_(truth.mT)  # a layer's weight is [outputs, inputs]
            for factor in tucker.factors:
                factor.copy_(torch.eye(3).expand_as(factor))
    target = nn.Sequential(OrderedDict(rows=nn.Linear(3, 3)))
    with torch.no_grad():
        target.rows.weight.copy_(4 * torch.eye(3))
        target.rows.bias.zero_()
    labels = torch.arange(3).repeat(40)
    batch = {"inputs": torch.eye(3)[labels], "labels": labels}
    behaviour = behaviours.Behaviour(0, 1, ("0", "1"), lambda: exact_loader(Rows(**batch), 30, seed=0), *[batch] * 3)
    for name, value in (
        ("LORA_AT", "rows"),
        ("VECTOR_AT", ("rows", "rows", "output")),
        ("RATES", (0.3, 0.3, 0.3, 0.3)),
        ("JUDGED_AT", 0.9),
    ):
        monkeypatch.setitem(getattr(steering, name), "table", value)
    return Contest("table", 1, 60, Decomposition(found, target, "kl", p_act=torch.ones(5)), behaviour, seed=0)


def test_training_goes_along_the_subnetwork_of_the_behaviour_and_gets_there(contest: Contest) -> None:
    methods = list(contest.learned)
    assert methods == ["subnetworks, 1", "random, 1", "subnetworks, 5", "random, 5", "LoRA", "full"]
    _, shift = contest.train("subnetworks, 1", 0.0, 0.3)
    along = shift["rows.weight"] / shift["rows.weight"].norm()
    assert float(along[0, 1]) == pytest.approx(1)  # number 4, by its gain, and towards a
    rates = pd.DataFrame({"method": methods, "keep": 0.0, "lr": 0.3})
    rows = pd.DataFrame(steering._pair_rows(contest, rates)).assign(seed=0, task="table")
    ends = rows.set_index(["method", "keep", "strength"])
    for method in set(methods) - {"random, 1"}:
        assert ends.loc[(method, 0.0, 0.0), "wanted"] < 0.02
        assert ends.loc[(method, 0.0, 1.0), "wanted"] > 0.9
    found = costs(rows)
    assert wins(found, "subnetworks, 1", "LoRA", 0.0, 0.9) == 1  # it touches nothing else
    assert wins(found, "subnetworks, 1", "vector", 0.0, 0.9) == 1
    summary = summarise(rows)
    assert summary.verdict["table: subnetworks, 1 cheaper than LoRA at 0.9, b alone"] == 1
    assert summary.verdict["table: subnetworks, 1 cheaper than random, 1 at 0.9, b alone"] == 1
    line = summary.table.set_index(["method", "others kept"]).loc[("subnetworks, 1", "no")]
    assert line["side at 0.9"].startswith("1 of 1: ")
    assert summary.tables["rates"]["learning rate, b alone"].tolist() == [0.3] * 6


def test_the_best_rate_costs_least_where_it_gets_there_else_it_gets_furthest() -> None:
    tried = pd.DataFrame({"side": [0.3, 0.2, math.nan], "most": [0.9, 0.92, 0.4]}, index=[4, 5, 6])
    assert best_rate(tried) == 5
    assert best_rate(tried.assign(side=math.nan)) == 5
    assert best_rate(tried.assign(side=math.nan, most=[0.5, 0.1, 0.2])) == 4


@pytest.mark.parametrize(("best", "expected"), [(1, [0.5, 1, 2]), (8, [0.5, 1, 2, 4, 8, 16]), (1 / 8, [2**-4, 2**-3])])
def test_rates_go_on_until_the_best_is_between_two(best: float, expected: list[float]) -> None:
    def attempt(lr: float) -> dict[str, float]:
        return {"lr": lr, "side": abs(math.log(lr / best)), "most": 1.0}

    tried = steering.widened([0.5, 1, 2], 7, attempt)
    assert tried["lr"].tolist()[: len(expected)] == expected
    assert tried["lr"][best_rate(tried)] == best
    assert len(steering.widened([0.5, 1, 2], 4, attempt)) <= 4
    flat = steering.widened([1.0, 2.0], 3, lambda lr: {"lr": lr, "side": math.nan, "most": 0.0})
    assert len(flat) <= 3


def test_command(tmp_path, capsys) -> None:
    arguments = ["experiment", "steering", "--tiny", "--seeds", "0", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert "subnetworks, 2" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "seed_0" / "rows.csv")
    methods = {"subnetworks, 2", "random, 2", "subnetworks, 6", "random, 6", "LoRA", "full", "vector"}
    expected = {*product(("digits", "text"), methods), ("text", "vector, within b")}
    assert set(rows[["task", "method"]].itertuples(index=False, name=None)) == expected
    for task in ("digits", "text"):
        tried = pd.read_csv(tmp_path / "seed_0" / f"rates_{task}.csv")
        assert tried.groupby(["method", "keep"]).size().tolist() == [3] * 12  # (the best of two is always an end)
        assert tried.groupby(["method", "keep"])["chosen"].sum().tolist() == [1] * 12
        chosen = tried[tried["chosen"]].set_index(["method", "keep"])["lr"]
        used = rows[(rows["task"] == task)].dropna(subset=["lr"]).groupby(["method", "keep"])["lr"].first()
        assert used.to_dict() == pytest.approx(chosen.to_dict())
    assert (rows[rows["strength"] == 0]["side"].abs() < 1e-6).all()
    assert (tmp_path / "steering.png").stat().st_size > 5000
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["few"] == 2
