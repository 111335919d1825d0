"""The hand-written step equals autograd through plain einsums, and finite differences."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import LAYOUTS, assert_same, decomposition_problem, dense_directions, rows
from torch import Tensor

from l3d_pl import Subnetworks
from l3d_pl.batch_topk import n_selected
from l3d_pl.gradients import DenseGradient, OuterGradient, SampleGradient
from l3d_pl.step import decompose

layouts = pytest.mark.parametrize("layout", list(LAYOUTS))
restarts_1_and_3 = pytest.mark.parametrize("restarts", [1, 3])


def explicit_loss(subnetworks: Subnetworks, gradients: dict[str, SampleGradient], mask: Tensor) -> Tensor:
    """L [R] from g [N, n_w] and V_in, V_out [R, n_v, n_w], on autograd's own graph."""
    g = rows({name: gradients[name].dense() for name in subnetworks.shapes})
    v_in, v_out = (
        rows(dense_directions(side)).view(subnetworks.restarts, -1, g.shape[1])
        for side in (subnetworks.v_in, subnetworks.v_out)
    )
    codes = torch.einsum("nw,rvw->nrv", g, v_in) * mask
    return (g[:, None] - torch.einsum("nrv,rvw->nrw", codes, v_out)).square().sum((0, 2)) / g.square().sum()


def gradients_of(subnetworks: Subnetworks, loss: Tensor) -> dict[str, Tensor]:
    """{parameter: gradient} of a number, by `backward`."""
    subnetworks.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone() for name, parameter in subnetworks.named_parameters() if parameter.grad is not None
    }


@layouts
@restarts_1_and_3
@pytest.mark.parametrize("k", [0.15, 1.0])
@pytest.mark.parametrize("way", ["explicit", "reconstruct"])
def test_step_equals_autograd(layout: str, restarts: int, k: float, way: str) -> None:
    subnetworks, gradients = decomposition_problem(layout, restarts)
    prepared = subnetworks.prepare(gradients)
    step = decompose(subnetworks, prepared, k)
    if way == "explicit":
        expected = explicit_loss(subnetworks, gradients, step.mask)
    else:
        c = subnetworks.coefficients(prepared)
        assert_same(step.coefficients, c.detach())
        expected = subnetworks.reconstruct(prepared, c * step.mask).loss
    assert step.mask.sum((0, 2)).tolist() == [round(k * 7 * 5)] * restarts
    assert_same(step.loss.detach(), expected.detach())
    assert_same(step.codes, step.coefficients * step.mask)
    weights = torch.tensor([1.0, -0.5, 3.0])[:restarts].double() * 2
    theirs = gradients_of(subnetworks, (expected * weights).sum())
    mine = gradients_of(subnetworks, (step.loss * weights).sum())
    assert mine.keys() == theirs.keys() == dict(subnetworks.named_parameters()).keys()
    for name, gradient in mine.items():
        assert_same(gradient, theirs[name])


@layouts
@restarts_1_and_3
@pytest.mark.parametrize("n_dense", [1, 4])
def test_dense_subnetworks_always_take_part(layout: str, restarts: int, n_dense: int) -> None:
    subnetworks, gradients = decomposition_problem(layout, restarts)
    subnetworks.n_dense = n_dense
    prepared = subnetworks.prepare(gradients)
    step = decompose(subnetworks, prepared, 0.3)
    assert step.mask[..., :n_dense].all()
    rest, chosen = step.coefficients[..., n_dense:].abs(), step.mask[..., n_dense:]
    for r in range(restarts):
        assert int(chosen[:, r].sum()) == n_selected(0.3, 7 * (5 - n_dense))
        assert float(step.threshold[r]) == float(rest[:, r][chosen[:, r]].min())
        assert not (rest[:, r][~chosen[:, r]] > step.threshold[r]).any()
    expected = explicit_loss(subnetworks, gradients, step.mask)
    assert_same(step.loss.detach(), expected.detach())
    theirs = gradients_of(subnetworks, expected.sum())
    for name, gradient in gradients_of(subnetworks, step.loss.sum()).items():
        assert_same(gradient, theirs[name])


@layouts
def test_step_equals_finite_differences(layout: str) -> None:
    """With the mask held: away from ties it does not change within the step."""
    subnetworks, gradients = decomposition_problem(layout)
    prepared = subnetworks.prepare(gradients)
    step = decompose(subnetworks, prepared, 0.3)
    found = gradients_of(subnetworks, step.loss.sum())
    epsilon = 1e-6
    for name, parameter in subnetworks.named_parameters():
        direction = torch.randn_like(parameter)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * epsilon * direction
                moved = decompose(subnetworks, prepared, 0.3)
                assert torch.equal(moved.mask, step.mask)
                sides.append(float(moved.loss))
                parameter -= sign * epsilon * direction
        slope = float((found[name] * direction).sum())
        assert (sides[0] - sides[1]) / (2 * epsilon) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@given(
    samples=st.integers(1, 6),
    n_v=st.integers(1, 6),
    k=st.floats(0.01, 1),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 99),
)
def test_any_size_equals_autograd(samples: int, n_v: int, k: float, layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    subnetworks, gradients = decomposition_problem(layout, 2, samples, n_subnetworks=n_v)
    step = decompose(subnetworks, subnetworks.prepare(gradients), k)
    theirs = gradients_of(subnetworks, explicit_loss(subnetworks, gradients, step.mask).sum())
    for name, gradient in gradients_of(subnetworks, step.loss.sum()).items():
        assert_same(gradient, theirs[name], scale=1.0)


@layouts
def test_float32_equals_float64(layout: str) -> None:
    results = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(3)
        subnetworks, gradients = decomposition_problem(layout, 3)
        subnetworks.to(dtype)
        step = decompose(
            subnetworks, subnetworks.prepare({name: gradient.to(dtype) for name, gradient in gradients.items()}), 0.3
        )
        assert step.loss.dtype == dtype
        results.append((step, gradients_of(subnetworks, step.loss.sum())))
    (wide, wide_gradients), (narrow, narrow_gradients) = results
    assert torch.equal(wide.mask, narrow.mask)
    assert_same(narrow.loss.double(), wide.loss, 1e-4)
    for name, gradient in narrow_gradients.items():
        assert_same(gradient.double(), wide_gradients[name], 1e-4)


@layouts
def test_gradient_accumulation_sums_and_scales(layout: str) -> None:
    """Two backwards add up; a loss divided by their number gives the mean."""
    subnetworks, first = decomposition_problem(layout)
    _, second = decomposition_problem(layout)
    batches = [subnetworks.prepare(gradients) for gradients in (first, second)]
    apart = [gradients_of(subnetworks, decompose(subnetworks, batch, 0.3).loss.sum()) for batch in batches]
    subnetworks.zero_grad()
    for batch in batches:
        (decompose(subnetworks, batch, 0.3).loss.sum() / 2).backward()
    for name, parameter in subnetworks.named_parameters():
        assert parameter.grad is not None
        assert_same(parameter.grad, (apart[0][name] + apart[1][name]) / 2)


def scaled(gradient: SampleGradient, factor: float) -> SampleGradient:
    if isinstance(gradient, OuterGradient):
        return replace(gradient, outputs=gradient.outputs * factor)
    return DenseGradient(gradient.dense() * factor)


@layouts
def test_scaled_gradients_give_the_same_step(layout: str) -> None:
    subnetworks, gradients = decomposition_problem(layout)
    one, other = (
        decompose(subnetworks, subnetworks.prepare({name: scaled(g, factor) for name, g in gradients.items()}), 0.3)
        for factor in (1.0, 1e-6)
    )
    assert torch.equal(one.mask, other.mask)
    assert_same(other.loss.detach(), one.loss.detach())
    assert_same(other.threshold, one.threshold * 1e-6)
    theirs = gradients_of(subnetworks, one.loss.sum())
    for name, gradient in gradients_of(subnetworks, other.loss.sum()).items():
        assert_same(gradient, theirs[name])


@layouts
def test_batch_without_gradients_is_finite(layout: str) -> None:
    subnetworks, gradients = decomposition_problem(layout)
    zero = subnetworks.prepare({name: scaled(gradient, 0.0) for name, gradient in gradients.items()})
    step = decompose(subnetworks, zero, 0.3)
    assert step.loss.tolist() == [0]
    assert all(gradient.isfinite().all() for gradient in gradients_of(subnetworks, step.loss.sum()).values())
