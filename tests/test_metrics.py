"""Metrics over batches of unequal size equal those of all samples at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from l3d_pl.metrics import Activity, Reconstruction


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), restarts=st.integers(1, 3), processes=st.integers(1, 2)
)
def test_reconstruction_is_the_loss_over_all_samples(sizes: list[int], restarts: int, processes: int) -> None:
    batches = [(torch.rand(n, restarts).double(), torch.rand(n).double() + 0.1) for n in sizes]
    metrics = [Reconstruction(restarts) for _ in range(processes)]
    for index, (errors, energies) in enumerate(batches):
        metrics[index % processes].update(errors.sum(0) / energies.sum(), energies.sum())
    merged = metrics[0]
    for other in metrics[1:]:  # what "sum" does across processes
        merged.error += other.error
        merged.energy += other.energy
    errors, energies = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.testing.assert_close(merged.compute().view(restarts), errors.sum(0) / energies.sum())
    assert merged._reductions["error"] is merged._reductions["energy"]
    merged.reset()
    assert merged.energy == 0


def test_reconstruction_without_energy_is_finite() -> None:
    metric = Reconstruction(2)
    metric.update(torch.zeros(2), torch.tensor(0.0))
    assert metric.compute().tolist() == [0, 0]


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), restarts=st.integers(1, 3), n_v=st.integers(1, 4))
def test_activity_counts_samples(sizes: list[int], restarts: int, n_v: int) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    masks = [torch.rand(n, restarts, n_v, generator=generator) > 0.6 for n in sizes]
    metric = Activity(restarts, n_v)
    for mask in masks:
        metric.update(mask.sum(0), mask.shape[0])
    found, active = metric.compute(), torch.cat(masks).float()
    torch.testing.assert_close(found["p_act"].view(restarts, n_v), active.mean(0))
    torch.testing.assert_close(found["l0"].view(restarts), active.sum(2).mean(0))
    torch.testing.assert_close(found["dead_fraction"].view(restarts), (active.amax(0) == 0).float().mean(1))
