"""Scaffolding: the planted target and its measures where the answer is known, always-on subnetworks in a fit."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from l3d_pl import L3D
from l3d_pl.cli import main
from l3d_pl.experiments.scaffolding import (
    ARMS,
    ScaffoldData,
    by_circuit,
    ceiling,
    contributions,
    explained,
    features_found,
    l0_of,
    outcome,
    planted,
    summarise,
)
from l3d_pl.gradients import GradientExtractor
from l3d_pl.targets.frozen import freeze, select_parameters
from l3d_pl.toys import fit_quietly


def rows_of(strength: float = 1.0, rows: int = 400) -> Tensor:
    return ScaffoldData(strength, n_features=4, seed=0).draw(rows, "test").tensors["inputs"]


def gradients_of(inputs: Tensor) -> Tensor:
    model = freeze(planted(5))
    extractor = GradientExtractor(model, select_parameters(model, "*"), "mse", "random")
    found = extractor(inputs, torch.Generator().manual_seed(0)).gradients
    return by_circuit({name: gradient.dense() for name, gradient in found.items()})


def test_the_scaffold_is_in_every_sample_and_scales_with_its_strength() -> None:
    for strength in (0.25, 3.0):
        inputs = rows_of(strength)
        assert inputs.shape == (400, 5)
        assert (inputs[:, -1] >= 0.5 * strength).all()
        assert (inputs[:, -1] <= 1.5 * strength).all()
        assert (inputs[:, :-1] > 0).any(1).all()
        assert (inputs[:, :-1] > 0).float().mean() < 0.5
    assert torch.equal(rows_of()[:, :-1], rows_of(2.0)[:, :-1])  # the sparse part is the same
    assert torch.equal(planted(5)(inputs), inputs)


def test_gradients_fall_apart_into_the_circuits_that_are_active() -> None:
    inputs = rows_of()
    energy = gradients_of(inputs).square().sum(2)
    assert torch.equal(energy > 0, inputs > 0)


def test_active_features_are_as_many_as_the_data_has() -> None:
    assert l0_of("plain", 4, 0.05) == pytest.approx(
        float((rows_of(rows=20_000)[:, :-1] > 0).sum(1).float().mean()), rel=0.02
    )
    assert l0_of("room", 4, 0.05) == l0_of("dense", 4, 0.05) + 1


def test_a_planted_dense_circuit_is_seen() -> None:
    """By hand: one subnetwork for the scaffold; five that share it; none."""
    g = gradients_of(rows_of())
    basis = torch.linalg.svd(g[:, -1], full_matrices=False).Vh  # of the scaffold's circuit
    for how, expected, largest in (("one", "found", 1.0), ("five", "spread", 0.2), ("none", "lost", 0.0)):
        v = torch.zeros(5, *g.shape[1:])
        v[:, -1] = basis[0]
        v[:, 0] = 1e-3
        v[0, 0] = 3.0  # what a subnetwork does elsewhere does not count
        c = (g[:, -1] @ basis[0]).unsqueeze(1) * {
            "one": torch.eye(5)[0],
            "five": torch.ones(5) / 5,
            "none": torch.zeros(5),
        }[how]
        shares = contributions(c, v, -1)
        share = float(explained(g, torch.einsum("nk,kce->nce", c, v))[-1])
        assert outcome(share, shares) == expected
        assert float(shares.max()) == pytest.approx(largest, abs=1e-6)
        assert share == pytest.approx(0.0 if how == "none" else ceiling(g[:, -1]), abs=1e-5)


def test_explained_is_one_for_itself_and_negative_for_the_opposite() -> None:
    g = gradients_of(rows_of())
    torch.testing.assert_close(explained(g, g), torch.ones(5))
    torch.testing.assert_close(explained(g, torch.zeros_like(g)), torch.zeros(5))
    torch.testing.assert_close(explained(g, -g), -3 * torch.ones(5))
    assert outcome(float("nan"), torch.ones(1)) == "lost"


def test_features_that_have_a_live_subnetwork() -> None:
    v = torch.zeros(4, 3, 2)
    v[0, 0], v[1, 1], v[2, 2] = 1.0, 1.0, 1.0
    v[3, 0], v[3, 1] = 1.0, 1.0  # half of each: neither's own
    assert features_found(v, torch.ones(4, dtype=torch.bool)) == 2  # the last circuit is the scaffold
    assert features_found(v, torch.tensor([True, False, True, True])) == 1
    assert features_found(v, torch.zeros(4, dtype=torch.bool)) == 0


def test_dense_subnetworks_are_never_dead_and_stay_through_repairs(tmp_path: Path) -> None:
    repairs = {"swap_every": 5, "revive_every": 5, "dead_after": 64, "init_samples": 60, "swap_samples": 200}
    module = L3D(planted(5), n_subnetworks=6, k=0.05, n_dense=2, seed=0, **repairs)
    data = ScaffoldData(1.0, n_features=4, steps_per_epoch=20, seed=0, n_val=100)
    fit_quietly(module, data, max_steps=40)
    assert module.p_act[0, :2].tolist() == [1, 1]
    assert module.silent_samples[0, :2].tolist() == [0, 0]
    assert (module.p_act[0, 2:] < 1).all()
    module.decomposition().save_pretrained(tmp_path)
    codes = type(module.decomposition()).from_pretrained(tmp_path, target=module.target).encode(rows_of())
    assert (codes[:, :2] != 0).all()
    assert (codes[:, 2:] == 0).any()


def test_the_verdict_says_how_far_dense_is_from_its_own_rule() -> None:
    """`dense` finds one more of four than `room`; of the sparse circuits it explains more, but at one strength less."""
    rows = []
    for strength, gain in ((1.0, -0.1), (4.0, 0.5)):
        for seed in (0, 1):
            for place, arm in enumerate(ARMS):
                sparse = {"dense": 0.4 + gain + 0.01 * seed, "room": 0.4 + 0.01 * seed}.get(arm, 0.9)
                outcome = "found" if arm == "dense" or (strength, seed) != (1.0, 0) else "lost"
                row = {"seed": seed, "strength": strength, "arm": arm, "outcome": outcome, "sparse_explained": sparse}
                others = "scaffold_energy scaffold_ceiling scaffold_explained largest_share effective_number loss l0"
                rows.append(row | dict.fromkeys([*others.split(), "features_found"], 0.1 * place))
    summary = summarise(pd.DataFrame(rows))
    verdict = summary.verdict
    assert verdict["dense over room: found"] == pytest.approx(0.25)
    assert verdict["dense over room: found, least, at strength 4"] == pytest.approx(0)
    assert verdict["dense over room: sparse explained"] == pytest.approx(0.2)
    assert verdict["dense over room: sparse explained, least, at strength 1"] == pytest.approx(-0.1)
    assert verdict["plain: lost"] == pytest.approx(0.25)
    table = summary.table.set_index(["strength", "arm"])
    assert table.loc[(1.0, "room"), ["found", "spread", "lost"]].tolist() == [1, 0, 1]
    assert table.loc[(4.0, "dense"), "sparse explained"].startswith("0.9")
    assert table.loc[(4.0, "dense"), "largest share"].startswith("0.20")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "scaffolding", "--tiny", "--seeds", "0", "1", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "seed_1" / "rows.csv").set_index("arm")
    assert list(rows.index) == ["plain", "room", "dense", "dense 3"]
    assert rows["l0"]["room"] == pytest.approx(rows["l0"]["plain"] + 1, abs=0.05)
    assert rows["l0"]["dense"] == pytest.approx(rows["l0"]["room"], abs=0.05)
    assert rows["l0"]["dense 3"] == pytest.approx(rows["l0"]["plain"] + 3, abs=0.05)
    assert rows["scaffold_energy"].between(0, 1).all()
    assert (tmp_path / "scaffolding.png").stat().st_size > 1000
    assert "dense: found" in capsys.readouterr().out
