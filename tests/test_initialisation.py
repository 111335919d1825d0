"""The start from the gradients: K-lines and what it makes of planted low-rank gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from l3d_pl import subnetworks as layout
from l3d_pl.gradients import DenseGradient, OuterGradient, SampleGradient
from l3d_pl.initialisation import dense_and_lines, k_lines, start_from_gradients
from l3d_pl.repair import loss_of
from l3d_pl.subnetworks import Subnetworks

SHAPES = {"w": (6, 5), "b": (6,)}


def planted(n_lines: int, samples: int, seed: int = 0) -> tuple[dict[str, SampleGradient], Tensor]:
    """Gradients that each lie along one of `n_lines` rank-1 directions (w as outer products); these, [n_lines, 36]."""
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(6, 6, generator=random))[0][:n_lines]
    right = torch.randn(n_lines, 5, generator=random)
    line = torch.arange(samples) % n_lines
    size = (0.5 + torch.rand(samples, generator=random)) * torch.randn(samples, generator=random).sign()
    outputs, inputs = left[line] * size[:, None], right[line]
    gradients = {"w": OuterGradient(outputs[:, None, None], inputs[:, None], (6, 5)), "b": DenseGradient(outputs)}
    lines = torch.cat([(left[:, :, None] * right[:, None]).flatten(1), left], 1)
    return gradients, torch.nn.functional.normalize(lines, dim=1)


@pytest.fixture(params=["dense", "outer"])
def representation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both layouts: one dense block, or matrices as outer products."""
    if request.param == "outer":
        monkeypatch.setattr(layout, "SMALL_PARAMETER", 0)
        monkeypatch.setattr(
            Subnetworks, "is_dense", lambda self, name, gradient: not isinstance(gradient, OuterGradient)
        )
    return str(request.param)


@given(n_lines=st.integers(1, 6), seed=st.integers(0, 1000))
def test_k_lines_recovers_planted_lines_whatever_the_signs(n_lines: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    lines = torch.linalg.qr(torch.randn(12, 12, generator=random, dtype=torch.float64))[0][:n_lines]
    size = torch.randn(60, 1, generator=random, dtype=torch.float64).sign() * torch.arange(1, 61)[:, None]
    gradients = lines[torch.arange(60) % n_lines] * size
    weights = k_lines(gradients @ gradients.mT, n_lines, torch.Generator().manual_seed(seed))
    centres = weights @ gradients
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(n_lines, dtype=torch.float64))
    cosines = (centres @ lines.mT).abs()
    torch.testing.assert_close(cosines.amax(0), torch.ones(n_lines, dtype=torch.float64))


@given(seed=st.integers(0, 1000))
def test_dense_subnetworks_start_at_what_every_sample_has(seed: int) -> None:
    """A direction in each of 240 samples, with less energy than any of the eight lines that the samples lie along."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.float64))[0]
    size = 1 + 2 * torch.rand(240, 1, generator=random, dtype=torch.float64)
    sign = torch.randn(240, 2, 1, generator=random, dtype=torch.float64).sign()
    gradients = basis[torch.arange(240) % 8] * size * sign[:, 0] + 0.7 * basis[8] * sign[:, 1]
    weights = dense_and_lines(gradients @ gradients.mT, 1, 8, torch.Generator().manual_seed(seed))
    found = weights @ gradients
    torch.testing.assert_close(found.norm(dim=1), torch.ones(9, dtype=torch.float64))
    assert (found[1:] @ found[0]).abs().max() < 1e-9
    assert float((found[0] @ basis[8]).abs()) > 0.7
    assert (found[1:] @ basis[:8].mT).abs().amax(0).min() > 0.7


def test_k_lines_gives_its_centres_to_the_energy() -> None:
    """With one centre for two lines it lies along the one of larger energy, though that has fewer samples."""
    gradients = torch.cat([torch.eye(2)[:1].repeat(30, 1), 10 * torch.eye(2)[1:].repeat(5, 1)])
    centre = k_lines(gradients @ gradients.mT, 1, torch.Generator().manual_seed(0)) @ gradients
    torch.testing.assert_close(centre.abs(), torch.tensor([[0.0, 1.0]]))


def test_k_lines_with_fewer_directions_than_centres_stays_finite() -> None:
    gradients = torch.eye(3)[:2].repeat(5, 1)
    assert k_lines(gradients @ gradients.mT, 4, torch.Generator().manual_seed(0)).isfinite().all()


def test_start_on_planted_gradients_reconstructs_them(representation: str) -> None:
    gradients, lines = planted(5, 200)
    subnetworks = Subnetworks(SHAPES, 5, ranks=1, restarts=2)
    prepared = subnetworks.prepare(gradients)
    assert list(prepared.factored) == (["w"] if representation == "outer" else [])
    untouched = [parameter[:5].clone() for parameter in subnetworks.parameters()]
    start_from_gradients(subnetworks, 1, prepared, torch.Generator().manual_seed(0), noise=0.0)
    assert loss_of(subnetworks, 0, prepared, 0.2) > 0.1
    assert loss_of(subnetworks, 1, prepared, 0.2) < 1e-5
    for parameter, old in zip(subnetworks.parameters(), untouched, strict=True):
        torch.testing.assert_close(parameter[:5], old)  # but for the rounding of another normalisation
    directions = torch.cat([subnetworks.v_out.tuckers()[name].dense().flatten(1)[5:] for name in SHAPES], 1)
    torch.testing.assert_close((directions @ lines.mT).abs().amax(0), torch.ones(5))


def test_noise_of_the_start_keeps_unit_norm_and_tied_sides(representation: str) -> None:
    gradients, lines = planted(5, 200)
    subnetworks = Subnetworks(SHAPES, 5, ranks=1)
    start_from_gradients(subnetworks, 0, subnetworks.prepare(gradients), torch.Generator().manual_seed(0), noise=0.02)
    torch.testing.assert_close(subnetworks.v_out.squared_norms(), torch.ones(5))
    for name in SHAPES:
        assert torch.equal(subnetworks.v_in.tuckers()[name].dense(), subnetworks.v_out.tuckers()[name].dense())
    directions = torch.cat([subnetworks.v_out.tuckers()[name].dense().flatten(1) for name in SHAPES], 1)
    cosines = (directions @ lines.mT).abs().amax(0)
    assert (cosines > 0.99).all()
    assert (cosines < 1 - 1e-6).all()
