"""`l3d experiment references`: the measures on cases with a known answer, and the whole of it in a tiny setting."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from l3d_pl import Subnetworks
from l3d_pl.cli import main
from l3d_pl.experiments.references import (
    AGAIN,
    REFERENCES,
    UNSWAPPED,
    ContrastData,
    loss_of,
    sameness,
    steps_to,
    steps_to_own,
    summarise,
    without_one,
)
from l3d_pl.gradients import per_sample_gradients
from l3d_pl.targets.toy import Autoencoder


def test_a_contrast_is_the_row_without_one_of_its_active_features() -> None:
    data = ContrastData(task="tmcs", n_features=10, probability=0.3, n_test=500)
    data.setup()
    rows = data.test[torch.arange(500)]
    active, still = rows["inputs"] != 0, rows["contrast"] != 0
    assert (active.sum(1) - still.sum(1) == 1).all()
    assert torch.equal(rows["contrast"][still], rows["inputs"][still])
    alone = torch.tensor([[0.0, 0.7, 0.0]])
    assert without_one(alone, torch.Generator().manual_seed(0)).count_nonzero() == 0
    both = without_one(torch.tensor([[0.1, 0.0, 0.9]]).repeat(2000, 1), torch.Generator().manual_seed(0))
    assert (both[:, 0] == 0).double().mean() == pytest.approx(0.5, abs=0.05)  # each as likely, whatever its size


def test_loss_of_directions_that_hold_every_gradient_and_of_none() -> None:
    torch.manual_seed(0)
    model = Autoencoder(3, 2)
    parameters = {name: value.shape for name, value in model.named_parameters() if name == "b"}
    gradients = per_sample_gradients(model, torch.rand(20, 3), parameters="b", reference="uniform")
    subnetworks = Subnetworks(parameters, 3, 1)
    with torch.no_grad():
        for side in (subnetworks.v_in, subnetworks.v_out):
            tucker = side.parameters_of("b").tucker
            tucker.core.copy_(torch.ones_like(tucker.core))
            tucker.factors[0].copy_(torch.eye(3)[:, :, None])
    assert loss_of(subnetworks, [gradients, gradients], k=1.0) == pytest.approx(0, abs=1e-6)
    dense = gradients["b"].dense()
    largest = dense.abs().flatten().topk(20).values.square().sum()  # batch top-k keeps a third of 60 coefficients
    assert loss_of(subnetworks, [gradients], k=1 / 3) == pytest.approx(
        float(1 - largest / dense.square().sum()), rel=1e-4
    )


def test_sameness() -> None:
    a = Subnetworks({"w": (6, 5)}, 4, 1, generator=torch.Generator().manual_seed(0))
    b = Subnetworks({"w": (6, 5)}, 4, 1, generator=torch.Generator().manual_seed(1))
    assert sameness(a, a) == pytest.approx(1, abs=1e-5)
    assert sameness(a, b) < 0.7


def test_steps_to_a_level() -> None:
    curve = pd.DataFrame({"step": [0, 10, 20, 30, 40], "loss": [5.0, 1.05, 1.3, 1.09, 1.0]})
    assert steps_to(curve, 1.1) == 30  # at 10 it was there, but did not stay
    assert steps_to(curve, 2.0) == 10
    assert steps_to(curve, 9.0) == 0
    assert math.isnan(steps_to(curve, 0.9))
    assert steps_to_own(curve) == 30
    assert steps_to_own(curve, tolerance=10) == 0


def test_all_are_judged_at_one_level_of_each_target() -> None:
    """`mean` is first within a tenth of its own, higher, end, and no sooner than `random` at a level common to both."""
    curves = {"random": (3.0, 1.2, 1.0), "mean": (1.3, 1.22, 1.2), "uniform": (2.0, 1.6, 1.5)}
    figures = dict.fromkeys(("recovered", "r2", "r2_ratio", "r2_sum", "r2_sum_ratio", "same"), 0.5)
    rows: list[dict[str, object]] = []
    for target, scale in ((42, 1.0), (1, 10.0)):
        for arm, losses in curves.items():
            facts = {"seed": 0, "target": target, "recipe": "l3d_pl", "reference": arm}
            points = zip((0, 10, 20, -1), (*losses, losses[-1]), strict=True)
            rows += [facts | {"step": step, "judge": "random", "loss": scale * loss} for step, loss in points]
            rows[-1] |= figures
    found = summarise(pd.DataFrame(rows))
    table = found.table.set_index(["target", "trained with"])
    for target in (42, 1):
        assert table.loc[target]["steps to 1.5 L"].to_dict() == {
            "random": "1 of 1: 10", "mean": "1 of 1: 0", "uniform": "1 of 1: 20",
        }  # fmt: skip
        steps = table.loc[target]["steps to 1.25 L"].to_dict()
        assert steps == {"random": "1 of 1: 10", "mean": "1 of 1: 10", "uniform": "0 of 1: –"}
        assert table.loc[target]["steps to own L"].to_dict() == {"random": "20", "mean": "0", "uniform": "10"}
    assert found.verdict["l3d_pl, target 42, uniform: steps to 1.25 L"] is None
    assert found.verdict["l3d_pl, target 1, uniform: steps to 1.5 L"] == 20


def test_tiny_run(tmp_path: Path) -> None:
    assert main(["experiment", "references", "--tiny", "--seeds", "0", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "seed_0" / "rows.csv")
    assert set(rows[rows["recipe"] != "l3d_pl"]["reference"]) == set(UNSWAPPED)
    rows = rows[rows["recipe"] == "l3d_pl"]
    assert set(rows["reference"]) == {*REFERENCES, AGAIN}
    curve = rows[(rows["step"] >= 0) & (rows["reference"] == "random")]
    assert curve["step"].tolist() == [0, 10, 20]
    final = rows[rows["step"] < 0].set_index(["reference", "judge"])
    assert curve["loss"].iloc[-1] == pytest.approx(final.loc[("random", "random"), "loss"])
    assert final.loc[("random", "random"), "same"] == pytest.approx(1, abs=1e-5)
    assert final.loc[(AGAIN, "random"), "same"] < 0.99
    assert len(summarise(rows).table) == 5
    assert "l3d_pl, target 42, mean: steps to 1.5 L" in json.loads((tmp_path / "manifest.json").read_text())["verdict"]
