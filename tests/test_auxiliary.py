"""The loss for dead subnetworks against explicit matrices with detached pieces."""

import pytest
import torch
from oracles import LAYOUTS, assert_same, decomposition_problem, dense_directions, rows

from l3d_pl.auxiliary import auxiliary_loss
from l3d_pl.batch_topk import batch_topk
from l3d_pl.step import decompose

DEAD = torch.tensor([[True, False, True, False, True], [False] * 5, [False, True, False, False, False]])


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("restarts", [1, 3])
def test_equals_the_dense_computation(layout: str, restarts: int) -> None:
    subnetworks, gradients = decomposition_problem(layout, restarts)
    prepared, dead, k = subnetworks.prepare(gradients), DEAD[:restarts], 0.4
    step = decompose(subnetworks, prepared, 0.3)
    g = rows({name: gradients[name].dense() for name in subnetworks.shapes})
    v_in, v_out = (rows(dense_directions(side)).view(restarts, 5, -1) for side in (subnetworks.v_in, subnetworks.v_out))
    expected = torch.zeros((), dtype=torch.float64)
    for r in range(restarts):
        if dead[r].any():
            left = (g - step.codes[:, r] @ v_out[r]).detach()
            c = g @ v_in[r, dead[r]].T
            b = c * batch_topk(c.unsqueeze(1), k)[0][:, 0]
            expected = expected + (left - b @ v_out[r, dead[r]]).square().sum() / g.square().sum()
    found = auxiliary_loss(subnetworks, prepared, step, dead, k)
    assert found is not None
    assert_same(found.detach(), expected.detach())
    leaves = list(subnetworks.parameters())
    theirs = torch.autograd.grad(expected, leaves, retain_graph=True)
    for mine, other in zip(torch.autograd.grad(found, leaves), theirs, strict=True):
        assert_same(mine, other)
        by_subnetwork = mine.reshape(restarts, 5, -1)
        assert not by_subnetwork[~dead].any()  # the live ones are held
        assert by_subnetwork[dead].any()


def test_nothing_dead_is_no_loss() -> None:
    subnetworks, gradients = decomposition_problem("mixed", 2)
    prepared = subnetworks.prepare(gradients)
    step = decompose(subnetworks, prepared, 0.3)
    assert auxiliary_loss(subnetworks, prepared, step, torch.zeros(2, 5, dtype=torch.bool), 0.5) is None
