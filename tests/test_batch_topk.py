"""Batch top-k against a sort in plain Python, and the running threshold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from l3d_pl import L3DError
from l3d_pl.batch_topk import RunningThreshold, at_threshold, batch_topk, check_k, n_selected


def by_sorting(values: Tensor, k: float) -> tuple[Tensor, float]:
    """Mask and threshold for one restart [N, n_v]: sort by |c|, earlier entries first among equals."""
    flat = values.abs().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda index: (-flat[index], index))
    kept = order[: max(1, round(k * len(flat)))]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[kept] = True
    return mask.view(values.shape), min(flat[index] for index in kept)


@given(
    samples=st.integers(1, 8),
    restarts=st.integers(1, 3),
    n_v=st.integers(1, 6),
    k=st.floats(1e-9, 1.0),
    levels=st.sampled_from([0, 1, 2, 1000]),
    seed=st.integers(0, 1000),
)
def test_equals_a_sort_ties_included(samples: int, restarts: int, n_v: int, k: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(-levels, levels + 1, (samples, restarts, n_v), generator=generator).float()
    mask, threshold = batch_topk(c, k)
    assert mask.shape == c.shape
    assert threshold.shape == (restarts,)
    for r in range(restarts):
        expected, smallest = by_sorting(c[:, r], k)
        assert torch.equal(mask[:, r], expected)
        assert int(mask[:, r].sum()) == n_selected(k, samples * n_v)
        assert threshold[r] == smallest


def test_the_fraction_is_of_the_batch_not_of_each_sample() -> None:
    c = torch.tensor([[9.0, -8.0, 7.0, 6.0], [0.1, 0.2, -0.3, 0.4]]).unsqueeze(1)
    mask, threshold = batch_topk(c, 0.5)
    assert mask[:, 0].sum(1).tolist() == [4, 0]
    assert threshold.tolist() == [6.0]


@pytest.mark.parametrize(("k", "kept"), [(1e-12, 1), (0.1, 2), (0.125, 2), (0.5, 10), (1.0, 20), (1, 20)])
def test_number_kept(k: float, kept: int) -> None:
    for c in (torch.randn(4, 1, 5), torch.zeros(4, 1, 5), torch.ones(4, 1, 5)):
        assert int(batch_topk(c, k)[0].sum()) == kept


def test_restarts_are_independent() -> None:
    c = torch.randn(6, 3, 5)
    c[:, 1] *= 100
    together, thresholds = batch_topk(c, 0.3)
    for r in range(3):
        alone, threshold = batch_topk(c[:, r : r + 1], 0.3)
        assert torch.equal(together[:, r : r + 1], alone)
        assert torch.equal(thresholds[r : r + 1], threshold)


def test_dense_subnetworks_take_part_at_any_threshold() -> None:
    c = torch.tensor([[0.0, 0.1, 2.0], [0.0, -3.0, 0.2]])
    assert at_threshold(c, 1.0, 1).tolist() == [[True, False, True], [True, True, False]]
    assert not at_threshold(c, 1.0)[:, 0].any()
    running = RunningThreshold()
    running.update(torch.tensor([1.0]))
    assert torch.equal(running(c.unsqueeze(1), 1)[:, 0], at_threshold(c, 1.0, 1))


@pytest.mark.parametrize("k", [0, -0.1, 1.0001, 2, float("nan")])
def test_bad_k_is_one_clear_line(k: float) -> None:
    with pytest.raises(L3DError, match=rf"^model\.k: found {k}; allowed is the fraction .* in \(0, 1\]$"):
        check_k(k, "model.k")
    assert check_k(1) == 1


def test_running_threshold_is_the_exponential_mean() -> None:
    running, expected = RunningThreshold(2, momentum=0.9), None
    assert running.value.tolist() == [0, 0]
    for _ in range(5):
        threshold = torch.rand(2)
        running.update(threshold)
        expected = threshold if expected is None else 0.9 * expected + 0.1 * threshold
    assert expected is not None
    torch.testing.assert_close(running.value, expected)


def test_running_threshold_survives_a_checkpoint() -> None:
    first, second = RunningThreshold(2), RunningThreshold(2)
    first.update(torch.tensor([1.0, 2.0]))
    second.load_state_dict(first.state_dict())
    for running in (first, second):
        running.update(torch.tensor([3.0, 0.0]))
    assert torch.equal(first.value, second.value)
    torch.testing.assert_close(second.value, torch.tensor([1.02, 1.98]))


def test_a_sample_alone_is_selected_as_in_its_batch() -> None:
    running, c = RunningThreshold(2), torch.randn(8, 2, 5)
    running.update(batch_topk(c, 0.2)[1])
    together = running(c)
    assert torch.equal(together, c.abs() >= running.value.unsqueeze(1))
    assert torch.equal(torch.cat([running(c[i : i + 1]) for i in range(8)]), together)
    assert torch.equal(together, batch_topk(c, 0.2)[0])  # of the very batch whose threshold it is
