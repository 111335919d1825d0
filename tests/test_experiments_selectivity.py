"""`l3d experiment selectivity`: the measure on cases with a known answer, and the whole of it in a tiny setting."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from oracles import planted_decomposition

from l3d_pl import Decomposition
from l3d_pl.cli import main
from l3d_pl.experiments.selectivity import (
    Settings,
    curve_of,
    directions_of,
    falls_below,
    output_gradient,
    own_and_others,
    ratio,
    summarise,
    top_gradient,
)


@pytest.fixture
def planted() -> Decomposition:
    return planted_decomposition(5)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    inputs = torch.eye(5).repeat(40, 1) * torch.linspace(0.5, 1, 200)[:, None]
    return {"inputs": inputs, "labels": inputs + 0.1}


def test_selectivity_of_a_planted_subnetwork_and_of_its_controls(planted: Decomposition, batch: dict) -> None:
    settings = Settings(random=200, points=4)
    kinds: dict[str, list[float]] = {}
    for kind, _, direction, own in directions_of(planted, 2, batch, settings, seed=0):
        assert torch.stack([v.norm() for v in direction.values()]).norm() == pytest.approx(1, abs=1e-5)
        rows = curve_of(planted, batch, direction, own, settings)
        assert [row["sign"] for row in rows] == [1] * 4 + [-1] * 4
        kinds.setdefault(kind, []).append(rows[0]["selectivity"])
        if kind == "subnetwork":
            assert own == 2
            # Own output: 1 where x_2 is active, .01 elsewhere; each other: .01 everywhere. Linear, so at any step.
            assert [row["selectivity"] for row in rows] == pytest.approx([(1 + 4 * 0.01) / (5 * 0.01)] * 8, rel=0.02)
            assert rows[0]["by_samples"] == pytest.approx((1 + 4 * 0.01) / (5 * 0.01), rel=0.05)
            assert rows[3]["step"] == 1.0
            assert rows[0]["loss_ratio"] < 1 < rows[3]["loss_ratio"]  # towards the label at first, then far beyond
    middle = {kind: torch.tensor(values).median().item() for kind, values in kinds.items()}
    assert 0.7 < middle["random"] < 1.3
    assert 1.3 < middle["random, best output"] < 4
    assert middle["gradient"] > 3
    assert middle["own output's gradient"] == pytest.approx(math.inf)  # of W x: the rows of W are apart


def test_the_gradient_control_turns_its_rows_one_way(planted: Decomposition) -> None:
    inputs = 3 + torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    gradients = 2 * torch.einsum("no,ni->noi", inputs - inputs.mean(0), inputs)  # of |x - mean|², f(x) = W x, W = 1
    c = torch.einsum("noi,oi->n", gradients, planted.subnetworks.direction(2, side="in")["weight"])
    most = sorted(range(60), key=lambda i: -abs(float(c[i])))[:30]
    turned = sum(float(c[i]) < 0 for i in most)
    assert 0 < turned < 30
    wanted = sum(gradients[i] * c[i].sign() for i in most)
    found = top_gradient(planted, 2, inputs, top=30)["weight"]
    torch.testing.assert_close(found, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_an_output_is_that_of_the_rows_with_its_feature(planted: Decomposition) -> None:
    inputs = torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) + 1
    inputs[10:, 2] = 0
    found = output_gradient(planted, inputs, 2)["weight"]  # of (W x)_2: x, in row 2
    assert torch.equal(found[[0, 1, 3, 4]], torch.zeros(4, 5))
    mean = inputs[:10].mean(0)
    torch.testing.assert_close(found[2], mean / mean.norm())


def test_own_and_others() -> None:
    changes = torch.tensor([[4.0, 1.0, 0.0], [8.0, 0.0, 1.0]])
    assert own_and_others(changes, 0) == (6.0, 0.5)
    assert ratio(*own_and_others(changes, 1)) == pytest.approx(0.5 / 3.25)
    assert ratio(1.0, 0.0) == math.inf


def test_falls_below() -> None:
    steps = [0.01, 0.1, 1.0]
    assert falls_below(steps, [100.0, 1.0, 1.0], 10) == pytest.approx(0.01 * 10**0.5)
    assert falls_below(steps, [9.0, 20.0, 20.0], 10) == 0
    assert falls_below(steps, [11.0, 20.0, 12.0], 10) == math.inf
    assert falls_below(steps, [math.inf, 3.0, 1.0], 10) == 0.1


def test_tiny_run(tmp_path: Path) -> None:
    assert main(["experiment", "selectivity", "--tiny", "--seeds", "0", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "seed_0" / "rows.csv")
    assert {"subnetwork", "random", "gradient", "own output's gradient", "layer 0", "layer 4"} <= set(rows["kind"])
    assert rows["step"].min() == pytest.approx(0.001)
    medians = rows[rows["step"] == rows["step"].min()].groupby("kind")["selectivity"].median()
    assert medians["random"] < medians["random, best output"] < medians["subnetwork"]
    table = summarise(rows).table.set_index("direction")
    assert float(table.loc["subnetwork", "δ = ±0.001"]) == pytest.approx(medians["subnetwork"], abs=0.06)
    assert (tmp_path / "selectivity.png").is_file()
