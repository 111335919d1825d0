"""`l3d experiment compare-methods`: measures and baselines on planted directions, and the whole in a tiny setting."""

from itertools import combinations, product
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.linalg import lstsq
from torch.nn.functional import normalize

from l3d_pl.cli import main
from l3d_pl.experiments.common import Toy
from l3d_pl.experiments.compare_methods import (
    METHODS,
    ResidualData,
    ResidualMLP,
    best_codes,
    dictionary,
    gradients_of,
    joined,
    k_means,
    linear_codes,
    nmf,
    pca,
    random_lines,
    split,
)

N_W, N_V = 12, 4


@pytest.fixture
def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit directions [4, 12], far from orthogonal, and 600 samples that are multiples of one of them each."""
    random = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(N_V, N_W, generator=random) + 0.5, dim=1)
    size = torch.rand(600, 1, generator=random) + 0.5
    return directions, directions[torch.randint(N_V, (600,), generator=random)] * size


def test_best_codes_are_the_best(planted: tuple[torch.Tensor, torch.Tensor]) -> None:
    directions, samples = planted
    loss, used = best_codes(directions, samples, k=1 / N_V)
    assert loss == pytest.approx(0, abs=1e-9)
    assert int(used.sum()) == 600
    assert (used > 100).all()
    # Half of the coefficients: the largest samples are kept, whole.
    energy = samples.double().square().sum(1).sort(descending=True).values
    assert best_codes(directions, samples, k=0.5 / N_V)[0] == pytest.approx(float(energy[300:].sum() / energy.sum()))


def test_best_codes_against_all_pairs() -> None:
    """Orthogonal directions: matching pursuit is optimal. The brute force fits every pair by least squares."""
    random = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(N_W, N_V, generator=random).double()).Q.T
    samples = torch.randn(8, N_W, generator=random).double()

    def left(i: int, chosen: tuple[int, ...]) -> float:
        if not chosen:
            return float(samples[i].square().sum())
        atoms = directions[list(chosen)].T
        return float((samples[i] - atoms @ lstsq(atoms, samples[i]).solution).square().sum())

    best = [[min(left(i, c) for c in combinations(range(N_V), m)) for m in range(3)] for i in range(8)]
    budgets = [counts for counts in product(range(3), repeat=8) if sum(counts) == 8]
    wanted = min(sum(best[i][m] for i, m in enumerate(counts)) for counts in budgets) / float(samples.square().sum())
    assert best_codes(directions, samples, k=1 / N_V, most=2)[0] == pytest.approx(wanted, rel=1e-9)


def test_linear_codes_with_the_right_readers(planted: tuple[torch.Tensor, torch.Tensor]) -> None:
    directions, samples = planted
    readers = torch.linalg.pinv(directions).T
    assert linear_codes(readers, directions, samples, k=1 / N_V) == pytest.approx(0, abs=1e-9)
    assert linear_codes(directions, directions, samples, k=0.5) > 0.05  # they overlap


def closest(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (normalize(found, dim=1) @ truth.T).abs().amax(0)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_baselines_find_what_they_are_made_for(planted: tuple[torch.Tensor, torch.Tensor]) -> None:
    directions, samples = planted
    assert (closest(dictionary(samples, N_V, 0, k=1 / N_V), directions) > 0.99).all()
    assert (closest(k_means(samples, N_V, 0), directions) > 0.999).all()
    assert (closest(nmf(samples, N_V, 0), directions) > 0.9).all()
    assert closest(random_lines(samples, N_V, 7), directions).mean() < 0.8
    spread = torch.randn(600, 2, generator=torch.Generator().manual_seed(2)) * torch.tensor([3.0, 1.0])
    axes = torch.linalg.qr(torch.randn(N_W, 2, generator=torch.Generator().manual_seed(3))).Q.T
    assert (closest(pca(spread @ axes, 2, 0), axes) > 0.99).all()


def test_flat_directions_keep_the_order_of_tensors() -> None:
    torch.manual_seed(0)
    toy = Toy("residual", {"target": ResidualMLP(4, 3)}, {}, {})
    inputs = torch.rand(6, 4) - 0.3
    gradients = gradients_of(toy, inputs, seed=0)
    assert gradients.shape == (6, 24)
    parts = split(toy, gradients)
    assert {name: part.shape[1:] for name, part in parts.items()} == {"W_in": (4, 3), "W_out": (3, 4)}
    assert torch.equal(joined(toy, dict(reversed(parts.items()))), gradients)
    silent = (inputs @ toy.target.get_parameter("W_in")) <= 0
    assert (parts["W_in"].abs().sum(1)[silent] == 0).all()  # a silent unit has no gradient
    assert (parts["W_in"].abs().sum(1)[~silent] > 0).any()


def test_residual_task() -> None:
    data = ResidualData(task="squared", n_features=4, n_test=50)
    data.setup()
    rows = data.test[torch.arange(50)]
    assert (rows["inputs"] < 0).any()
    assert torch.equal(rows["labels"], rows["inputs"] + rows["inputs"].clamp_min(0))


def test_tiny_run(tmp_path: Path) -> None:
    assert main(["experiment", "compare-methods", "--tiny", "--seeds", "0", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "seed_0" / "rows.csv").set_index(["toy", "method"])
    assert set(rows.index) == {(toy, method) for toy in ("tms", "residual") for method in METHODS}
    assert rows.loc[("tms", "L3D"), "mmcs"] > 0.9 > rows.loc[("tms", "random"), "mmcs"]
    assert rows.loc[("tms", "L3D"), "loss"] < rows.loc[("tms", "PCA"), "loss"] < rows.loc[("tms", "random"), "loss"]
    assert (rows["loss"] <= 1.02 * rows["loss_linear"]).all()  # codes that are sought are hardly worse than linear ones
    assert "| tms | APD, published | 0.998 | 0.89 |" in (tmp_path / "table.md").read_text()
