"""Experiment dynamics: its measures where the answer is known, and the command end to end."""

import math
from itertools import product

import pandas as pd
import pytest
import torch

from datamodules.text import TextData
from l3d_pl.cli import main
from l3d_pl.experiments.behaviours import NEW_NAMES, NewNames
from l3d_pl.experiments.dynamics import attributed, coordinates, fates, share_in_span, shares
from l3d_pl.experiments.text import Backwards

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
