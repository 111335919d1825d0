"""Dark matter: curvature, line errors, partial correlations and probes where the answer is known, and the command."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from l3d_pl.cli import main
from l3d_pl.divergence import KL, MSE
from l3d_pl.experiments.dark_matter import change, probe, rank_correlation, second_derivatives
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


def test_a_plane_has_no_curvature() -> None:
    class Sum(MSE):
        def __call__(self, output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            return (output - reference).sum(1)

    model = nn.Linear(4, 3)
    weights = weights_of(model)
    assert second_derivatives(model, weights, torch.ones(1, 4), torch.zeros(1, 3), Sum(), [drawn(weights, 0)]) == [0.0]


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
    assert probe(features, noise) < 0.02
    assert probe(features, planted[:, :1]) > 0.99
    assert probe(1e-6 * features, planted) == pytest.approx(probe(features, planted), abs=1e-4)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_target(tmp_path / "targets" / "tms_seed42.safetensors", TiedAutoencoder(gain=1.0))
    assert main(["experiment", "dark_matter", "--tiny", "--seeds", "0", "1", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "seed_1" / "rows.csv")
    assert len(rows) == 12
    assert (rows["curved_residual"].notna() & rows["dark"].ge(0)).all()
    silent = rows[rows["active"] == 0]
    assert silent["dark"].tolist() == pytest.approx([1.0] * len(silent))
    torch.testing.assert_close(
        torch.tensor(silent["curved_residual"].array), torch.tensor(silent["curved_gradient"].array)
    )
    assert (tmp_path / "dark_matter.png").stat().st_size > 1000
    assert "probe_codes" in capsys.readouterr().out
