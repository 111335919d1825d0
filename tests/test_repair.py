"""Loss-tested swaps: their inner products against dense algebra, and planted faults."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import LAYOUTS, assert_same, decomposition_problem
from test_initialisation import SHAPES, planted, representation  # noqa: F401  (a fixture)
from torch import Tensor

from l3d_pl.batch_topk import batch_topk, n_selected
from l3d_pl.gradients import SampleGradient
from l3d_pl.initialisation import start_from_gradients
from l3d_pl.repair import (
    Anchor,
    State,
    best_swap,
    candidates,
    loss_of,
    quadratic_error,
    readers,
    replace,
    scale_readers,
    state_of,
    swap,
)
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.tucker import Tucker, truncate

K = 0.2


def dense_rows(gradients: dict[str, SampleGradient]) -> Tensor:
    return torch.cat([gradients[name].dense().flatten(1) for name in SHAPES], 1)


def dense_side(tuckers: dict[str, Tucker]) -> Tensor:
    return torch.cat([tuckers[name].dense().flatten(1) for name in SHAPES], 1)


@torch.no_grad()
def brute_loss(subnetworks: Subnetworks, restart: int, g: Tensor, k: float) -> float:
    index = subnetworks.restart(restart)
    v_in, v_out = (dense_side(side.tuckers())[index] for side in (subnetworks.v_in, subnetworks.v_out))
    c = g @ v_in.mT
    mask, _ = batch_topk(c.unsqueeze(1), k)
    return float((g - (c * mask.squeeze(1)) @ v_out).square().sum() / g.square().sum())


def anchor_of(
    subnetworks: Subnetworks, gradients: dict[str, SampleGradient], judge: dict[str, SampleGradient]
) -> Anchor:
    prepared = subnetworks.prepare(gradients)
    return Anchor(prepared, prepared.gram(), subnetworks.prepare(judge))


@given(samples=st.integers(1, 20), n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_quadratic_error_is_the_squared_error_without_the_energy(samples: int, n: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    g, v, codes = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((samples, 9), (n, 9), (samples, n))
    )
    found = quadratic_error(codes, g @ v.mT, v @ v.mT)
    torch.testing.assert_close(found, (g - codes @ v).square().sum() - g.square().sum())


@given(n=st.integers(2, 6), seed=st.integers(0, 1000))
def test_readers_answer_to_the_new_direction_alone(n: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(n + 2, 30, generator=random, dtype=torch.float64), dim=1)
    new, own = v[:2], v[2:]
    away, left = readers(own @ own.mT, new @ own.mT, ridge=1e-9)
    for slot in range(n):
        w = (new - away[:, slot] @ own) / left[:, slot, None]
        answers = w @ own.mT
        answers[:, slot] = 0
        assert answers.abs().max() < 1e-6
        assert away[:, slot, slot].abs().max() < 1e-12
        torch.testing.assert_close((w * new).sum(1), torch.ones(2, dtype=torch.float64))


def test_loss_of_equals_dense_algebra(representation: str) -> None:  # noqa: F811
    gradients, _ = planted(5, 60)
    subnetworks = Subnetworks(SHAPES, 4, ranks=2, restarts=2)
    prepared = subnetworks.prepare(gradients)
    for restart in range(2):
        expected = brute_loss(subnetworks, restart, dense_rows(gradients), K)
        assert loss_of(subnetworks, restart, prepared, K) == pytest.approx(expected, rel=1e-5)


def brute_candidates(g: Tensor, state: State, v_out: Tensor, drawn: Tensor, k: float, steps: int) -> Tensor:
    """Power steps on the residuals themselves, cut to rank 1 per parameter."""
    residuals = g - state.codes @ v_out
    rows = []
    for start in drawn.tolist():
        direction = residuals[start]
        for _ in range(steps):
            scores = residuals @ direction
            top = scores.abs().topk(n_selected(k, len(g))).indices
            direction = torch.nn.functional.normalize(scores[top] @ residuals[top], dim=0)
        w, b = truncate(direction[:30].view(1, 6, 5), (1, 1)).dense().flatten(), direction[30:]
        rows.append(torch.nn.functional.normalize(torch.cat([w, b]), dim=0))
    return torch.stack(rows)


def test_candidates_equal_power_steps_on_dense_residuals(representation: str) -> None:  # noqa: F811
    gradients, _ = planted(5, 60)
    subnetworks = Subnetworks(SHAPES, 3, ranks=1, restarts=2)
    anchor = anchor_of(subnetworks, gradients, gradients)
    state = state_of(subnetworks, 1, anchor.prepared, K)
    g, v_out = dense_rows(gradients), dense_side(subnetworks.v_out.tuckers())[subnetworks.restart(1)]
    errors = (g - state.codes @ v_out).square().sum(1)
    drawn = torch.multinomial(errors.expand(3, -1), 1, generator=torch.Generator().manual_seed(7)).squeeze(1)
    found = candidates(subnetworks, 1, anchor, state, 3, K, torch.Generator().manual_seed(7))
    expected = brute_candidates(g, state, v_out, drawn, K, steps=4)
    cosines = (dense_side(found) * expected).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(3), rtol=1e-4, atol=1e-4)


def test_best_swap_is_the_best_of_all_tried_one_by_one(representation: str) -> None:  # noqa: F811
    """Full rank, so that the readers lose nothing: the error foretold is the error after the swap."""
    gradients, _ = planted(5, 60)
    subnetworks = Subnetworks(SHAPES, 3, ranks={"w": [5, 5], "b": 1})
    prepared = subnetworks.prepare(gradients)
    anchor, energy = anchor_of(subnetworks, gradients, gradients), float(prepared.energy)
    state = state_of(subnetworks, 0, prepared, K)
    new = candidates(subnetworks, 0, anchor, state, 2, K, torch.Generator().manual_seed(0))
    best = best_swap(subnetworks, 0, prepared, state, new, K)
    own, v_new = dense_side(subnetworks.v_out.tuckers()), dense_side(new)
    away, left = readers(own @ own.mT, v_new @ own.mT)
    g, v_in = dense_rows(gradients), dense_side(subnetworks.v_in.tuckers())
    losses = []
    for which in range(2):
        for slot in range(3):
            side_in, side_out = v_in.clone(), own.clone()
            side_in[slot] = (v_new[which] - away[which, slot] @ own) / left[which, slot]
            side_out[slot] = v_new[which]
            c = g @ side_in.mT
            mask, _ = batch_topk(c.unsqueeze(1), K)
            losses.append(float((g - (c * mask.squeeze(1)) @ side_out).square().sum() / energy))
    assert 1 + best.error / energy == pytest.approx(min(losses), abs=1e-5)
    replace(subnetworks, 0, best.slot, best.v_out, best.v_in)
    assert loss_of(subnetworks, 0, prepared, K) == pytest.approx(min(losses), abs=1e-5)


def with_fault(fault: str, gradients: dict[str, SampleGradient], restarts: int = 1) -> Subnetworks:
    """Five subnetworks on the five planted lines, except that 1 repeats 0, or merges 0 and 1."""
    subnetworks = Subnetworks(SHAPES, 5, ranks=1, restarts=restarts)
    prepared = subnetworks.prepare(gradients)
    for restart in range(restarts):
        start_from_gradients(subnetworks, restart, prepared, torch.Generator().manual_seed(0), noise=0.0)
    zero, one = ({n: t.select(slice(i, i + 1)) for n, t in subnetworks.v_out.tuckers().items()} for i in (0, 1))
    if fault == "merged":
        zero = {name: truncate(zero[name].dense() + one[name].dense(), subnetworks.ranks[name]) for name in SHAPES}
    replace(subnetworks, 0, 1, zero)
    subnetworks.normalise_()
    return subnetworks


@pytest.mark.parametrize("fault", ["duplicated", "merged"])
def test_swaps_repair_a_planted_fault(representation: str, fault: str) -> None:  # noqa: F811
    gradients, lines = planted(5, 200)
    subnetworks = with_fault(fault, gradients, restarts=2)
    other = [parameter[5:].clone() for parameter in subnetworks.parameters()]
    anchor, random = anchor_of(subnetworks, gradients, planted(5, 300)[0]), torch.Generator().manual_seed(0)
    before = loss_of(subnetworks, 0, anchor.judge, K)
    swapped = [swap(subnetworks, 0, anchor, K, random) for _ in range(6)]
    assert any(index is not None for index in swapped)
    # A candidate made from what a merged subnetwork leaves is not pure at once: training has the rest to do.
    assert loss_of(subnetworks, 0, anchor.judge, K) < (1e-3 if fault == "duplicated" else before / 5)
    if fault == "duplicated":
        cosines = dense_side(subnetworks.v_out.tuckers())[:5] @ lines.mT
        assert (cosines.abs().amax(0) > 0.999).all()
    assert all(torch.equal(p[5:], old) for p, old in zip(subnetworks.parameters(), other, strict=True))


def test_swaps_leave_dense_subnetworks_alone(representation: str) -> None:  # noqa: F811
    """The fault would be mended in slot 0 or 1, which are dense: neither is touched."""
    gradients, _ = planted(5, 200)
    subnetworks = with_fault("duplicated", gradients)
    anchor = anchor_of(subnetworks, gradients, planted(5, 300)[0])
    subnetworks.n_dense = 2
    before = [parameter[:2].clone() for parameter in subnetworks.parameters()]
    swapped = [swap(subnetworks, 0, anchor, K, torch.Generator().manual_seed(n), min_gain=0) for n in range(6)]
    assert all(index is None or index >= 2 for index in swapped)
    assert all(torch.equal(p[:2], old) for p, old in zip(subnetworks.parameters(), before, strict=True))
    subnetworks.n_dense = 0
    assert swap(subnetworks, 0, anchor, K, torch.Generator().manual_seed(0)) in (0, 1)


@given(seed=st.integers(0, 1000), min_gain=st.sampled_from([0.0, 0.003, 0.1]))
def test_a_swap_lowers_the_loss_on_the_judge_or_changes_nothing(seed: int, min_gain: float) -> None:
    random = torch.Generator().manual_seed(seed)
    gradients, judge = planted(5, 40, seed)[0], planted(5, 80, seed)[0]
    subnetworks = Subnetworks(SHAPES, 4, ranks=1, generator=random)
    anchor = anchor_of(subnetworks, gradients, judge)
    before = loss_of(subnetworks, 0, anchor.judge, K)
    weights = [parameter.clone() for parameter in subnetworks.parameters()]
    index = swap(subnetworks, 0, anchor, K, random, min_gain=min_gain)
    if index is None:
        assert all(torch.equal(p, old) for p, old in zip(subnetworks.parameters(), weights, strict=True))
    else:
        assert (
            loss_of(subnetworks, 0, anchor.judge, K) < (1 - min_gain) * before
        )  # (the anchor's is foretold before V_in is cut to rank)


def test_a_swap_that_the_judge_refuses_is_taken_back(representation: str) -> None:  # noqa: F811
    """The anchor has a line, and much of it, that the judge has not: no swap, and every byte as before."""
    gradients = planted(5, 200)[0]
    line = torch.arange(200) % 5
    judge = {name: gradient.select((line != 0).nonzero().squeeze(1)) for name, gradient in gradients.items()}
    subnetworks = Subnetworks(SHAPES, 4, ranks=1)
    start_from_gradients(subnetworks, 0, subnetworks.prepare(judge), torch.Generator().manual_seed(0), noise=0.0)
    much = torch.cat([(line == 0).nonzero().squeeze(1).repeat(5), (line != 0).nonzero().squeeze(1)])
    anchor = anchor_of(subnetworks, {name: gradient.select(much) for name, gradient in gradients.items()}, judge)
    weights = [parameter.clone() for parameter in subnetworks.parameters()]
    assert [swap(subnetworks, 0, anchor, 0.25, torch.Generator().manual_seed(seed)) for seed in range(4)] == [None] * 4
    assert all(torch.equal(p, old) for p, old in zip(subnetworks.parameters(), weights, strict=True))
    anchor = Anchor(anchor.prepared, anchor.gram, anchor.prepared)
    assert swap(subnetworks, 0, anchor, 0.25, torch.Generator().manual_seed(0)) is not None


@pytest.mark.parametrize("layout", list(LAYOUTS))
@torch.no_grad()
def test_scaled_readers_reconstruct_best(layout: str) -> None:
    subnetworks, gradients = decomposition_problem(layout, restarts=2)
    prepared = subnetworks.prepare(gradients)
    before = [parameter.clone() for parameter in subnetworks.parameters()]
    scale = scale_readers(subnetworks, 1, prepared, 0.4)
    best = loss_of(subnetworks, 1, prepared, 0.4)
    for factor in (0.97, 1.03):
        for module in subnetworks.v_in.children():
            module.core[subnetworks.restart(1)] *= factor
        assert loss_of(subnetworks, 1, prepared, 0.4) > best
        for module in subnetworks.v_in.children():
            module.core[subnetworks.restart(1)] /= factor
    assert scale != 1
    others = slice(0, subnetworks.n_subnetworks)  # restart 0 is left alone, and V_out
    for old, new in zip(before, subnetworks.parameters(), strict=True):
        assert_same(new[others], old[others])
