"""Invariant 2: ranks that share a batch make the same step as one process with all of it. Real gloo processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import LAYOUTS, assert_same, decomposition_problem
from torch import distributed as dist
from torch import multiprocessing as mp

from l3d_pl.batch_topk import batch_topk, global_threshold, n_selected
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.sharded import decompose_sharded, shard_of, share_gradients
from l3d_pl.step import decompose
from l3d_pl.subnetworks import Subnetworks

HERE = Path(__file__).parent


def _start(rank: int, size: int, port_file: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(port_file, size)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store)
    try:
        function(Ranks.of_run(), *args)
    finally:
        dist.destroy_process_group()


def on_ranks(size: int, tmp_path: Path, function: Callable[..., None], *args: Any) -> None:
    """Run `function(ranks, *args)` in `size` gloo processes; an assertion that fails in any of them fails here."""
    mp.spawn(_start, (size, str(tmp_path / f"store{size}"), function, args), nprocs=size)


def _selects_as_one_process(ranks: Ranks) -> None:
    for case in range(12):
        random = torch.Generator().manual_seed(case)
        c = torch.randn(7, 2, 5, generator=random, dtype=torch.float64 if case % 2 else torch.float32)
        if case % 3 == 0:
            c = (c * 2).round()  # ties
        for k in (0.01, 0.3, 1.0):
            whole, threshold = batch_topk(c, k)
            edges = [0, 2, 7] if ranks.size == 2 else [0, 1, 4, 5, 7]
            mine = slice(edges[ranks.rank], edges[ranks.rank + 1])
            mask, mine_threshold = batch_topk(c[mine], k, ranks)
            assert_same(mine_threshold, threshold)
            assert torch.equal(mask, whole[mine])  # restarts apart, ties to the earlier samples


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_the_batch_threshold_is_global(size: int, tmp_path: Path) -> None:
    on_ranks(size, tmp_path, _selects_as_one_process)


@given(
    rows=st.integers(1, 3),
    n=st.integers(1, 40),
    k=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
    wide=st.booleans(),
    coarse=st.booleans(),
)
def test_radix_selection_equals_sorting(rows: int, n: int, k: float, seed: int, wide: bool, coarse: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, generator=random, dtype=torch.float64 if wide else torch.float32).abs()
    scores = (scores * 2).round() if coarse else scores * 10.0 ** torch.randint(-30, 30, (rows, n), generator=random)
    count = n_selected(k, n)
    expected = scores.sort(1, descending=True).values[:, count - 1]
    assert torch.equal(global_threshold(scores, count, ALONE), expected)


@pytest.mark.distributed
def test_ranks_make_the_step_of_one_process(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = {}
    for size in (1, 2, 4):
        out = tmp_path / f"{size}.pt"
        command = [sys.executable, str(HERE / "parallel_run.py"), str(out), str(size)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[size] = torch.load(out, weights_only=True)
    for size in (2, 4):
        assert_same(found[size]["mean_reference"], found[1]["mean_reference"], 1e-9)
        for name, value in found[1]["state"].items():
            if value.is_floating_point():
                assert_same(found[size]["state"][name], value, 1e-9)
            else:
                assert torch.equal(found[size]["state"][name], value), name


def _shards_equal_one_process(ranks: Ranks, layout: str, tokens: bool) -> None:
    torch.manual_seed(0)
    n_v, samples, k = 7, 12 if tokens else 11, 0.3
    whole, gradients = decomposition_problem(layout, samples=samples, n_subnetworks=n_v)
    expected = decompose(whole, whole.prepare(gradients), k)
    expected.loss.sum().backward()

    n = samples // 2 if tokens else samples  # groups of samples
    bounds = [n * rank // ranks.size for rank in range(ranks.size + 1)]
    mine = torch.arange(bounds[ranks.rank], bounds[ranks.rank + 1])
    mine = torch.stack([2 * mine, 2 * mine + 1], 1).flatten() if tokens else mine
    own = {name: gradient.select(mine) for name, gradient in gradients.items()}
    shard = shard_of(n_v, ranks.rank, ranks.size)
    part = Subnetworks(
        whole.shapes, shard.stop - shard.start, {name: list(r) for name, r in whole.ranks.items()}
    ).double()
    part.is_dense = whole.is_dense  # type: ignore[method-assign]
    for side, its in ((part.v_in, whole.v_in), (part.v_out, whole.v_out)):
        side.copy_({name: tucker.detach().select(shard) for name, tucker in its.tuckers().items()})
    step = decompose_sharded(part, part.prepare(share_gradients(own, ranks)), k, n_v, ranks, ranks)
    step.loss.sum().backward()

    assert_same(step.loss.detach(), expected.loss.detach())
    assert_same(step.threshold, expected.threshold)
    assert_same(step.coefficients, expected.coefficients[..., shard])
    assert torch.equal(step.mask, expected.mask[..., shard])
    for (name, value), other in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert value.grad is not None, name
        assert other.grad is not None
        assert_same(value.grad, other.grad[shard])


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sharded_subnetworks_make_the_step_of_one_process(size: int, tmp_path: Path) -> None:
    on_ranks(size, tmp_path, _all_shard_cases)


def _all_shard_cases(ranks: Ranks) -> None:
    for layout in LAYOUTS:
        for tokens in (False, True):
            _shards_equal_one_process(ranks, layout, tokens)
