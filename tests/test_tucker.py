"""Tucker algebra against tensorly, finite differences and the SVD."""

import math
from typing import Any

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_same, dense_tucker, random_tucker
from tensorly.tucker_tensor import tucker_to_tensor

from l3d_pl import L3DError
from l3d_pl.tucker import Matrices, TuckerParameters, dense_block, flatten, resolve_ranks, truncate, unflatten

# (shape, ranks): 0 to 4 modes, ranks equal and unequal, one of full rank
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((5,), (1,)),
    ((5,), (3,)),
    ((4, 6), (1, 1)),
    ((4, 6), (3, 2)),
    ((4, 6), (4, 6)),
    ((3, 4, 5), (2, 3, 1)),
    ((3, 2, 4, 2), (2, 1, 3, 2)),
]
WITH_MODES = SHAPES[1:]


@pytest.mark.parametrize(("shape", "ranks"), WITH_MODES)
def test_dense_equals_tensorly(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    tucker = random_tucker(3, shape, ranks)
    assert (tucker.n, tucker.shape, tucker.ranks) == (3, shape, ranks)
    assert_same(tucker.dense(), dense_tucker(tucker))
    with tensorly.backend_context("pytorch"):
        for k in range(3):
            assert_same(tucker_to_tensor(tucker.to_tensorly(k)).reshape(shape), tucker.dense()[k])


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_inner_products_equal_the_dense_ones(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    tucker, other = random_tucker(4, shape, ranks), random_tucker(2, shape, tuple(max(1, rank - 1) for rank in ranks))
    mine, theirs = tucker.dense().reshape(4, -1), other.dense().reshape(2, -1)
    assert_same(tucker.squared_norms(), mine.square().sum(1))
    assert_same(tucker.gram(), mine @ mine.T)
    assert_same(tucker.gram(other), mine @ theirs.T)
    matrices, weights = tucker.matrices(), torch.randn(3, 4).double()
    assert_same((matrices.left @ matrices.right).reshape(4, -1), mine)
    assert_same(matrices.combine(weights).reshape(3, -1), weights @ mine)


@pytest.mark.parametrize("way", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 100, 2**20])
@pytest.mark.parametrize(("shape", "ranks"), [(shape, ranks) for shape, ranks in SHAPES if len(shape) > 1])
def test_codes_through_the_gram_matrix(
    shape: tuple[int, ...], ranks: tuple[int, ...], chunk: int, way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = tuple(float(i != way) for i in range(3))
    monkeypatch.setattr(Matrices, "gram_costs", staticmethod(lambda *sizes: costs))
    tucker, codes = random_tucker(6, shape, ranks), torch.randn(2, 5, 3).double()
    leaves = [tensor.requires_grad_() for tensor in (tucker.core, *tucker.factors)]
    rows = dense_tucker(tucker).reshape(2, 3, -1)
    expected = codes @ rows @ rows.mT
    d = torch.autograd.grad(0.7 / 2 * (codes * expected).sum(), leaves)
    with torch.no_grad():
        pushed, d_matrices = tucker.matrices().push_codes(codes, 0.7, chunk)
        assert_same(pushed, expected)
        for mine, theirs in zip(tucker.matrices_backward(d_matrices), d, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("way", [0, 1])
def test_products_with_other_tensors(way: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = tuple(float(i != way) for i in range(3))
    monkeypatch.setattr(Matrices, "gram_costs", staticmethod(lambda *sizes: costs))
    mine, its = random_tucker(4, (5, 6), (2, 3)), random_tucker(3, (5, 6), (3, 2)).matrices()
    weights, leaves = torch.randn(4, 3).double(), [t.requires_grad_() for t in (mine.core, *mine.factors)]
    products = mine.dense().flatten(1) @ (its.left @ its.right).flatten(1).mT
    expected = torch.autograd.grad(products, leaves, weights)
    with torch.no_grad():
        matrices = mine.matrices()
        gram, d = torch.zeros_like(weights), Matrices(*(torch.zeros_like(part) for part in matrices))
        matrices.add_products(its, weights, gram, d, chunk)
        assert_same(gram, products)
        for found, wanted in zip(mine.matrices_backward(d), expected, strict=True):
            assert_same(found, wanted)


def test_gram_takes_the_cheaper_way() -> None:
    for sizes, cheapest in (
        ((1000, 2048, 2048, 4, 2000), 0),
        ((100, 256, 256, 25, 256), 1),
        ((2000, 256, 256, 25, 256), 2),
    ):
        costs = Matrices.gram_costs(*sizes)
        assert costs.index(min(costs)) == cheapest
    for ranks in ((1, 1), (20, 20)):
        dense = (tucker := random_tucker(3, (30, 40), ranks)).dense().flatten(1)
        assert_same(tucker.gram(), dense @ dense.T)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_scaled_and_select(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    tucker, scale = random_tucker(3, shape, ranks), torch.tensor([2.0, -1.0, 0.5]).double()
    dense = tucker.dense()
    assert_same(tucker.scaled(scale).dense(), dense * scale.view(-1, *[1] * len(shape)))
    assert_same(tucker.select(torch.tensor([2, 0])).dense(), dense[[2, 0]])
    assert_same(tucker.select(slice(1, 3)).dense(), dense[1:3])
    assert not tucker.detach().core.requires_grad


def test_dense_block_gradcheck_and_round_trip() -> None:
    tuckers = [random_tucker(2, shape, ranks) for shape, ranks in SHAPES]
    modes, flat = [len(tucker.factors) for tucker in tuckers], flatten(tuckers)
    expected = torch.cat([tucker.dense().reshape(2, -1) for tucker in tuckers], 1)
    assert_same(dense_block(unflatten(modes, flat)), expected)
    leaves = [tensor.requires_grad_() for tensor in flat]
    assert torch.autograd.gradcheck(lambda *tensors: dense_block(unflatten(modes, tensors)), leaves)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    n=st.integers(1, 3),
)
def test_truncation_at_full_rank_is_exact(shape: tuple[int, ...], n: int) -> None:
    tensors = torch.randn(n, *shape).double()
    tucker = truncate(tensors, shape)
    assert tucker.ranks == shape
    assert_same(tucker.dense(), tensors)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (3, 3), (2, 3)])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_truncated_matrices_are_the_best_of_their_rank(shape: tuple[int, int], ranks: tuple[int, int]) -> None:
    """Eckart-Young: the error is that of the singular values left out; the factors are orthonormal."""
    tensors = torch.randn(3, *shape).double()
    tucker = truncate(tensors, ranks)
    left_out = torch.linalg.svdvals(tensors)[:, min(ranks) :].square().sum(1)
    assert tucker.ranks == ranks
    assert_same((tucker.dense() - tensors).square().sum((1, 2)), left_out)
    for factor in tucker.factors:
        assert_same(factor.mT @ factor, torch.eye(factor.shape[2]).double().expand(3, -1, -1))


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (80, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_errors_do_not_choose_directions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The gradient of one sample is often a matrix of rank one: what its other factors are must not depend on luck."""
    torch.manual_seed(0)
    left, right = torch.rand(3, shape[0], 1, dtype=dtype), torch.rand(3, 1, shape[1], dtype=dtype)
    matrices = left * right
    found = truncate(matrices, (3, 3))
    other = truncate(matrices * (1 + 2 * torch.finfo(dtype).eps * torch.rand_like(matrices)), (3, 3))
    for factor, again in zip(found.factors, other.factors, strict=True):
        assert_same(again, factor, 1e3 * torch.finfo(dtype).eps)
        assert_same(factor.mT @ factor, torch.eye(3, dtype=dtype).expand(3, 3, 3), 1e2 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
def test_truncation_recovers_tensors_of_low_rank() -> None:
    for shape, ranks in SHAPES:
        tensors = random_tucker(2, shape, ranks).dense()
        tucker = truncate(tensors, ranks)
        assert tucker.ranks == ranks
        assert_same(tucker.dense(), tensors, 1e-5)


def test_parameters_start_reproducibly_with_columns_of_about_unit_norm() -> None:
    starts = [TuckerParameters(50, (40, 30), (3, 2), torch.Generator().manual_seed(1)) for _ in range(2)]
    one, same = (start.tucker.detach() for start in starts)
    assert all(torch.equal(a, b) for a, b in zip(flatten([one]), flatten([same]), strict=True))
    assert [tuple(tensor.shape) for tensor in flatten([one])] == [(50, 3, 2), (50, 40, 3), (50, 30, 2)]
    assert one.dense().flatten(1).norm(dim=1).mean() == pytest.approx(1, rel=0.15)
    for factor in one.factors:
        assert factor.norm(dim=1).mean() == pytest.approx(1, rel=0.05)


def test_parameters_copy_overwrites_the_chosen_ones_only() -> None:
    parameters, other = TuckerParameters(4, (3, 2), (2, 1)), random_tucker(2, (3, 2), (2, 1), torch.float32)
    before = parameters.tucker.dense().detach().clone()
    parameters.copy_(other, torch.tensor([3, 1]))
    after = parameters.tucker.dense()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert_same(after[[3, 1]].detach(), other.dense())


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (1, (4, 6), (1, 1)),
        (5, (4, 6), (4, 5)),
        (2.0, (4, 6), (2, 2)),
        (0.5, (4, 6), (2, 3)),
        (0.1, (4, 60), (1, 6)),
        (0.3, (4, 7), (2, 3)),
        ([2, 3], (4, 6), (2, 3)),
        ([0.5, 6], (4, 6), (2, 6)),
        ([4], (4,), (4,)),
        (3, (), ()),
        ([], (), ()),
    ],
)
def test_ranks(rank: Any, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert resolve_ranks(rank, shape) == expected


@given(rank=st.one_of(st.integers(1, 20), st.floats(0.001, 0.999)), shape=st.lists(st.integers(1, 30), max_size=4))
def test_ranks_are_between_one_and_the_dimension(rank: float, shape: list[int]) -> None:
    for resolved, size in zip(resolve_ranks(rank, shape), shape, strict=True):
        assert 1 <= resolved <= size
        assert resolved == (min(rank, size) if isinstance(rank, int) else math.ceil(rank * size))


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "found 0; allowed are integers >= 1 or fractions"),
        (-2, "found -2; allowed"),
        (1.5, "found fraction 1.5; allowed are fractions in"),
        (-0.5, "found fraction -0.5"),
        (float("nan"), "found fraction nan"),
        ([2], r"found 1 entries \[2\] for shape \(4, 6\); give one per mode"),
        ([2, 3, 1], "found 3 entries"),
        ([5, 3], r"found rank 5 above the dimension 4 of shape \(4, 6\)"),
        ([0, 3], "found 0; allowed"),
    ],
)
def test_bad_ranks_are_one_clear_line(rank: Any, message: str) -> None:
    with pytest.raises(L3DError, match=f"^ranks of 'layer.weight': {message}") as caught:
        resolve_ranks(rank, (4, 6), "layer.weight")
    assert "\n" not in str(caught.value)


def test_large_matrices_are_cut_to_rank_nearly_as_well_as_by_svd() -> None:
    torch.manual_seed(0)
    matrices = (
        torch.randn(3, 80, 6).double() @ torch.randn(3, 6, 100).double() + 0.05 * torch.randn(3, 80, 100).double()
    )
    for ranks in ((5, 5), (8, 5), (5, 8)):
        found = truncate(matrices, ranks)
        singular = torch.linalg.svdvals(matrices)
        best = singular[:, min(ranks) :].square().sum(1)
        assert found.ranks == ranks
        assert float(((matrices - found.dense()).square().sum((1, 2)) / best).max()) < 1.01
        for factor in found.factors:
            assert_same(factor.mT @ factor, torch.eye(factor.shape[2]).double().expand(3, -1, -1), 1e-8)
