"""`l3d experiment compare-methods`: measures and baselines on planted directions, and the whole in a tiny setting."""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.decomposition import NMF
from torch.linalg import lstsq
from torch.nn.functional import normalize

from l3d_pl.cli import main
from l3d_pl.experiments import compare_methods
from l3d_pl.experiments.common import Toy
from l3d_pl.experiments.compare_methods import (
    METHODS,
    SOME_TMS,
    Found,
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
    summarise,
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


def closest(found: Found, truth: torch.Tensor) -> torch.Tensor:
    return (normalize(found.directions, dim=1) @ truth.T).abs().amax(0)


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


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_baseline_that_was_cut_short_says_so(
    planted: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, samples = planted
    ended = {
        "nmf": lambda: nmf(samples, N_V, 0).converged,
        "dictionary": lambda: dictionary(samples, N_V, 0, k=1 / N_V).converged,
    }
    monkeypatch.setattr(compare_methods, "PATIENCE", 5)
    assert {name: found() for name, found in ended.items()} == {"nmf": True, "dictionary": True}
    assert k_means(samples, N_V, 0).converged
    assert pca(samples, N_V, 0).converged is None
    monkeypatch.setattr(compare_methods, "NMF_ITERATIONS", 2)
    monkeypatch.setattr(compare_methods, "DICTIONARY_STEPS", 2)
    assert {name: found() for name, found in ended.items()} == {"nmf": False, "dictionary": False}


def test_nmf_takes_the_best_of_its_starts(
    planted: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start from singular vectors is stuck where each part is a mixture; a random one is not."""
    _, samples = planted
    errors = []

    class Watched(NMF):
        def fit(self, *args: Any, **more: Any) -> NMF:
            fitted = super().fit(*args, **more)
            errors.append((fitted.reconstruction_err_, fitted.components_))
            return fitted

    monkeypatch.setattr(compare_methods, "NMF", Watched)
    found = nmf(samples, N_V, 0).directions
    assert len({error for error, _ in errors}) == 3
    best = torch.from_numpy(min(errors, key=lambda it: it[0])[1]).float()
    torch.testing.assert_close(found, best[:, :N_W] - best[:, N_W:])


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


def planted_rows() -> pd.DataFrame:
    """Two seeds whose targets differ much; in each L3D is 0.02 below NMF, and the best in no other way."""
    rows = []
    for seed, level in enumerate((0.2, 0.6)):
        for place, method in enumerate(METHODS):
            loss = level + {"L3D": 0.0, "NMF": 0.02}.get(method, 0.1 + 0.01 * place)
            figures = {"mmcs": 0.99 if method == "k-means" else 0.9, "ml2r": 1.0, "recovered": 4.0 + seed}
            converged = {"NMF": seed == 0, "k-means": True}.get(method)
            cost = {"cpu_seconds": 1.0, "values": 100, "converged": converged}
            row = {"seed": seed, "toy": "tms", "method": method, "features": 5.0, "loss": loss, "loss_linear": 1.0}
            rows.append(row | figures | cost)
    return pd.DataFrame(rows)


def test_the_verdict_is_l3d_against_the_best_other_by_seed() -> None:
    summary = summarise(planted_rows())
    verdict = summary.verdict
    assert verdict["tms: L, best codes of L3D"] == pytest.approx(0.4)
    assert verdict["tms: L, best codes of the best other, NMF"] == pytest.approx(0.42)
    assert verdict["tms: L, best codes, L3D minus NMF, by seed"] == "-0.020 ± 0.000"  # though targets differ by 0.4
    assert verdict["tms: MMCS, L3D minus k-means, by seed"] == "-0.090 ± 0.000"
    table = summary.table.set_index("method")
    assert table["L, best codes"]["NMF"] == "0.420 ± 0.283"
    assert table["found"]["NMF"] == "4.5 of 5, fewest 4"
    assert table["converged"][["NMF", "k-means", "PCA", "L3D"]].tolist() == ["1 of 2", "2 of 2", "–", "–"]


def test_published_figures_claim_no_toy_that_they_were_not_given_for() -> None:
    published = summarise(planted_rows()).table.set_index("method")
    assert published["toy"][["SPD, published", "APD, published"]].tolist() == ["tms", SOME_TMS]
    assert published["CPU s"]["APD, published"] == "not given"
    others = summarise(planted_rows().assign(toy="residual")).table
    assert not others["method"].str.contains("published").any()


def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_methods, "DICTIONARY_STEPS", 40)  # (it would take most of a minute, to the same end)
    assert main(["experiment", "compare-methods", "--tiny", "--seeds", "0", "--output", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "seed_0" / "rows.csv").set_index(["toy", "method"])
    assert set(rows.index) == {(toy, method) for toy in ("tms", "residual") for method in METHODS}
    assert rows.loc[("tms", "L3D"), "mmcs"] > 0.9 > rows.loc[("tms", "random"), "mmcs"]
    assert rows.loc[("tms", "L3D"), "loss"] < rows.loc[("tms", "PCA"), "loss"] < rows.loc[("tms", "random"), "loss"]
    assert (rows["loss"] <= 1.02 * rows["loss_linear"]).all()  # codes that are sought are hardly worse than linear ones
    assert f"| {SOME_TMS} | APD, published | 0.998 | 0.89 |" in (tmp_path / "table.md").read_text()
