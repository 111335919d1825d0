"""Dark matter: curvature, line errors, partial correlations and probes where the answer is known, and the command."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from l3d_pl.cli import main
from l3d_pl.divergence import KL, MSE
from l3d_pl.experiments.dark_matter import (
    AGAINST,
    PROBES,
    change,
    leaning,
    line_error,
    probe,
    rank_correlation,
    second_derivatives,
    summarise,
)
from l3d_pl.targets.toy import MLP, TiedAutoencoder
from l3d_pl.targets.training import save_target


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def drawn(shapes: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=random, dtype=t.dtype) for name, t in shapes.items()}


def test_a_quadratic_divergence_has_its_exact_curvature() -> None:
    """D = ‖W x + b - y‖²: v^T H v = 2 ‖V x + v_b‖², wherever W is; and the step's error is half of it, squared step."""
    model = nn.Linear(4, 3).double()
    weights, x, y = weights_of(model), torch.randn(1, 4).double(), torch.randn(1, 3).double()
    directions = [drawn(weights, seed) for seed in range(3)]
    found = second_derivatives(model, weights, x, y, MSE(), directions)
    exact = [2 * float((x @ v["weight"].T + v["bias"]).square().sum()) for v in directions]
    assert found == pytest.approx(exact)
    g = 2 * (model(x) - y).detach()
    for v, second in zip(directions, exact, strict=True):
        slope = float(((x @ v["weight"].T + v["bias"]) * g).sum())
        assert change(model, weights, x, y, MSE(), v, 0.3) - 0.3 * slope == pytest.approx(second * 0.09 / 2)
        assert line_error(model, weights, x, y, MSE(), v, slope, 0.3) == pytest.approx(second * 0.09 / 2)


@pytest.mark.parametrize("divergence", [MSE(), KL()])
def test_second_derivatives_equal_finite_differences(divergence: MSE | KL) -> None:
    torch.manual_seed(0)
    model = MLP((4, 6, 3)).double()
    weights, x, y = weights_of(model), torch.randn(1, 4).double(), torch.randn(1, 3).double()
    chosen = {name: tensor for name, tensor in weights.items() if name != "0.bias"}  # any subset of the tensors
    directions = [drawn(chosen, seed) for seed in range(3)]
    found = second_derivatives(model, chosen, x, y, divergence, directions)
    for v, second in zip(directions, found, strict=True):
        sides = sum(change(model, chosen, x, y, divergence, v, step) for step in (1e-4, -1e-4))
        assert second == pytest.approx(sides / 1e-8, rel=1e-4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())


class Downwards(MSE):
    """A D that is curved one way along the first output and the other way along the second."""

    def __call__(self, output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return (output - reference)[:, 0].square() - (output - reference)[:, 1].square()


def test_a_saddle_curves_both_ways_and_its_line_is_as_wrong_on_each() -> None:
    model = nn.Linear(1, 2, bias=False).double()
    weights, x, y = weights_of(model), torch.ones(1, 1).double(), torch.randn(1, 2).double()
    directions = [{"weight": torch.eye(2).double()[:, i : i + 1]} for i in range(2)]
    assert second_derivatives(model, weights, x, y, Downwards(), directions) == pytest.approx([2, -2])
    slopes = (2 * (model(x) - y)[0] * torch.tensor([1, -1])).tolist()
    for v, slope in zip(directions, slopes, strict=True):
        assert line_error(model, weights, x, y, Downwards(), v, slope, 0.1) == pytest.approx(0.01)
        assert line_error(model, weights, x, y, Downwards(), v, slope + 5, 0.1) == pytest.approx(0.5)


def test_a_plane_has_no_curvature_and_its_line_no_error() -> None:
    class Sum(MSE):
        def __call__(self, output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            return (output - reference).sum(1)

    model = nn.Linear(4, 3)
    weights, v = weights_of(model), drawn(weights_of(model), 0)
    sample = (model, weights, torch.ones(1, 4), torch.zeros(1, 3), Sum())
    assert second_derivatives(*sample, [v]) == [0.0]
    slope = float(v["weight"].sum() + v["bias"].sum())
    assert line_error(*sample, v, slope, 0.1) == pytest.approx(0, abs=1e-6)


def test_the_leaning_control_has_the_residuals_angle_and_nothing_else_of_it() -> None:
    residual, g, random = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).double()
    residual += 0.5 * g
    found, unit = leaning(residual, g, random), g / g.norm()
    assert float(found.norm()) == pytest.approx(1)
    assert float(found @ unit) == pytest.approx(float(residual @ unit / residual.norm()))
    across = [v - (v @ unit) * unit for v in (found, residual)]
    assert abs(float(torch.nn.functional.cosine_similarity(*across, dim=0))) < 0.1
    assert torch.isfinite(leaning(g, g, random)).all()


def test_rank_correlation_is_spearmans_and_the_partial_one_takes_a_common_cause_out() -> None:
    random = torch.Generator().manual_seed(0)
    cause, noise, other = torch.randn(3, 500, generator=random, dtype=torch.float64).numpy()
    a, b = (cause + 0.3 * noise) ** 3, cause + 0.3 * other
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(a, b) > 0.8
    assert abs(rank_correlation(a, b, cause)) < 0.15
    assert rank_correlation(a, b + noise, cause) > 0.5  # what is not of the cause stays
    assert pd.isna(rank_correlation(a, [1.0] * 500))


def test_a_probe_sees_what_is_there_and_nothing_where_nothing_is() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=random)
    planted = features @ torch.randn(6, 40, generator=random)
    noise = torch.randn(200, 40, generator=random) * planted.std()
    assert probe(features, planted) > 0.99
    assert probe(features, planted + noise) == pytest.approx(0.5, abs=0.1)
    assert abs(probe(features, noise)) < 0.02
    assert probe(features, planted[:, :1]) > 0.99
    assert probe(1e-6 * features, planted) == pytest.approx(probe(features, planted), abs=1e-4)


def test_a_probe_of_few_samples_is_neither_fooled_nor_blind() -> None:
    """As on the digits: 288 samples, 50 features, far more targets; a quarter of these is linear in the features."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(288, 50, generator=random)
    planted = features @ torch.randn(50, 400, generator=random)
    noise = torch.randn(288, 400, generator=random) * planted.std()
    assert abs(probe(features, noise)) < 0.03
    assert 0.12 < probe(features, planted + 3**0.5 * noise) < 0.25
    order = torch.randperm(288, generator=random)
    assert abs(probe(features[order], planted + 3**0.5 * noise)) < 0.03


def planted_rows(seeds: int = 2, samples: int = 200) -> pd.DataFrame:
    """Samples whose dark share follows ‖g‖² alone, but for one direction and measure that follow what is left of it."""
    random, parts = torch.Generator().manual_seed(0), []
    for seed in range(seeds):
        energy, own, *rest = torch.randn(2 + len(AGAINST), samples, generator=random).double().numpy()
        rows = pd.DataFrame(dict(zip(AGAINST, rest, strict=True)))
        rows["seed"], rows["target"], rows["active"], rows["energy"] = seed, "tms", 1, energy
        rows["dark"] = own - 3 * energy
        rows["curved_gradient"] = 0.2 * rows["curved_gradient"] - energy
        rows["wrong_active"] = own
        rows["curved_active"] = -own
        rows.loc[: samples // 2, ["active", "wrong_active", "curved_active"]] = 0, float("nan"), float("nan")
        rows["loss"], rows["silent_share"], rows["silent_energy"] = 0.5, 0.1, 0.2
        for i, name in enumerate(PROBES):
            rows[f"probe_{name}"], rows[f"probe_{name}_shuffled"] = 0.1 * (i + 1), -0.01 * (i + 1)
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def test_the_table_tells_plain_from_partial_and_the_probes_come_with_their_controls() -> None:
    summary = summarise(planted_rows())
    table = summary.table.set_index("dark share against")

    def mean(text: str, column: str) -> float:
        return float(table[column][text].split()[0])

    plain, partial, coded = "rank correlation", "with ‖g‖² taken out", "so, among samples with a code"
    assert mean("‖g‖²", plain) < -0.9
    assert table[partial]["‖g‖²"] == "–"
    assert mean("curvature along the gradient", plain) > 0.9
    assert abs(mean("curvature along the gradient", partial)) < 0.2
    assert mean("error of the line along the active subnetworks", plain) < 0.6
    assert mean("error of the line along the active subnetworks", partial) > 0.8
    assert mean("error of the line along the active subnetworks", coded) > 0.8
    assert mean("curvature along the active subnetworks", partial) < -0.8
    assert abs(mean("|curvature| along a random direction (control)", partial)) < 0.2
    assert set(table["sign the same in"]) >= {"2 of 2 seeds"}
    assert summary.verdict["tms: residual from all coefficients"] == "0.200 ± 0.000; of other samples -0.020 ± 0.000"


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_target(tmp_path / "targets" / f"tms_seed{seed}.safetensors", TiedAutoencoder(gain=1.0))
    assert main(["experiment", "dark_matter", "--tiny", "--seeds", "0", "1", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "seed_1" / "rows.csv")
    assert len(rows) == 12
    assert (rows["curved_residual"].notna() & rows["dark"].ge(0)).all()
    assert rows[[column for column in AGAINST if "active" not in column]].notna().all().all()
    assert rows["wrong_active"].notna().equals(rows["active"] > 0)
    assert (rows["bent_active"] >= rows["curved_active"].abs() - 1e-6)[rows["active"] > 0].all()
    assert rows["bent_leaning"].tolist() == pytest.approx(rows["curved_leaning"].abs().tolist())
    silent = rows[rows["active"] == 0]
    assert silent["dark"].tolist() == pytest.approx([1.0] * len(silent))
    torch.testing.assert_close(
        torch.tensor(silent["curved_residual"].array), torch.tensor(silent["curved_gradient"].array)
    )
    assert (tmp_path / "dark_matter.png").stat().st_size > 1000
    assert "residual from the codes" in capsys.readouterr().out
