"""The representations of per-sample gradients against their dense form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_same, dense_tucker, random_gradient, random_tucker

from l3d_pl.gradients import DenseGradient, OuterGradient, concatenate
from l3d_pl.gradients.sample_gradient import SampleGradient, add, stack

N = 4
KINDS = ("dense", "outer", "transposed", "one_hot")


def by_position(gradient: OuterGradient) -> torch.Tensor:
    """sum_s D_s A_s^T, sample by sample, in loops."""
    b, t, s, _, columns = gradient.sizes
    rows = []
    for group in range(b):
        for token in range(t):
            total = 0
            for position in range(s):
                a = gradient.inputs[group, position]
                a = torch.eye(columns, dtype=torch.float64)[a] if a.ndim == 0 else a
                total = total + torch.outer(gradient.outputs[group, token, position], a)
            rows.append(total.T if gradient.is_transposed else total)
    dense = torch.stack(rows).reshape(b * t, *gradient.shape)
    return dense if gradient.index is None else dense[gradient.index]


def test_one_is_told_by_its_sizes() -> None:
    assert repr(DenseGradient(torch.zeros(7, 4, 5))) == "DenseGradient(7 samples of [4, 5])"
    outer = OuterGradient(torch.zeros(2, 3, 1, 4), torch.zeros(2, 1, 5), (4, 5))
    assert repr(outer) == "OuterGradient(6 samples of [4, 5])"


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 4),
    tokens=st.integers(1, 3),
    positions=st.integers(1, 6),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    n_v=st.integers(1, 4),
    some=st.booleans(),
    chunk=st.sampled_from([1, 30, 2**20]),
)
def test_representations_equal_their_dense_form(
    kind: str,
    n: int,
    tokens: int,
    positions: int,
    shape: tuple[int, int],
    ranks: tuple[int, int],
    n_v: int,
    some: bool,
    chunk: int,
) -> None:
    gradient, tucker = random_gradient(kind, n, shape, positions, tokens=tokens), random_tucker(n_v, shape, ranks)
    if some:
        gradient = gradient.select(torch.randint(0, n * tokens, (3,)).unique())
    dense = by_position(gradient) if isinstance(gradient, OuterGradient) else gradient.dense()
    total = len(dense)
    flat, weights, index = dense.reshape(total, -1), torch.randn(3, total).double(), torch.randint(0, total, (4,))
    assert gradient.shape == shape
    assert gradient.n_samples == total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l3d_pl.gradients.sample_gradient.CHUNK", chunk)
        assert_same(gradient.dense(), dense)
        assert_same(gradient.squared_norms(), flat.square().sum(1))
        assert_same(gradient.gram(), flat @ flat.T)
        assert_same(gradient.combine(weights), torch.einsum("mn,nij->mij", weights, dense))
        chosen = gradient.select(index)
        assert_same(chosen.dense(), dense[index])
        assert_same(chosen.squared_norms(), flat[index].square().sum(1))
        assert_same(chosen.gram(), flat[index] @ flat[index].T)
        assert_same(gradient.transposed().dense(), dense.mT)
        assert_same(gradient.coefficients(tucker), torch.einsum("nij,kij->nk", dense, dense_tucker(tucker)))
        assert_same(chosen.coefficients(tucker), torch.einsum("nij,kij->nk", dense[index], dense_tucker(tucker)))
    assert gradient.to(torch.float32).dense().dtype == torch.float32


def test_dense_gradients_of_any_number_of_modes() -> None:
    for shape, ranks in (((), ()), ((5,), (1,)), ((2, 3, 4), (2, 1, 3)), ((2, 3, 2, 2), (1, 2, 2, 1))):
        gradient, tucker = random_gradient("dense", N, shape), random_tucker(3, shape, ranks)
        flat = gradient.dense().reshape(N, -1)
        assert_same(gradient.squared_norms(), (flat @ flat.T).diagonal())
        assert_same(gradient.combine(torch.eye(N).double()), gradient.dense())
        if shape:
            assert_same(gradient.coefficients(tucker), flat @ dense_tucker(tucker).reshape(3, -1).T)


def test_outer_gradients_of_any_number_of_modes() -> None:
    for shape, ranks in (((2, 3, 4), (2, 1, 3)), ((2, 3, 2, 2), (1, 2, 2, 1)), ((3, 1, 5, 5), (3, 1, 2, 2))):
        for tokens in (1, 3):
            gradient, tucker = random_gradient("outer", N, shape, 2, tokens=tokens), random_tucker(3, shape, ranks)
            flat = gradient.dense().reshape(N * tokens, -1)
            assert_same(flat, by_position(gradient).flatten(1))  # type: ignore[arg-type]
            assert_same(gradient.squared_norms(), (flat @ flat.T).diagonal())
            assert_same(gradient.combine(torch.eye(N * tokens).double()), gradient.dense())
            assert_same(gradient.coefficients(tucker), flat @ dense_tucker(tucker).reshape(3, -1).T)


@pytest.mark.parametrize("first_kind", KINDS)
@pytest.mark.parametrize("second_kind", KINDS)
def test_sums_and_concatenations(first_kind: str, second_kind: str) -> None:
    kinds = (first_kind, second_kind)
    first, second = (random_gradient(kind, N, (3, 5), positions) for kind, positions in zip(kinds, (2, 3), strict=True))
    assert_same(add(first, second).dense(), first.dense() + second.dense())
    joins = "dense" not in kinds and (kinds.count("one_hot") != 1)
    assert isinstance(add(first, second), OuterGradient if joins else DenseGradient)
    same_kind: list[SampleGradient] = [first, random_gradient(first_kind, 2, (3, 5), 3, tokens=2)]
    for parts in (
        [first, first.select(torch.tensor([0, 2]))],
        same_kind,
        [same_kind[1].select(torch.tensor([0, 3])), first],
    ):
        assert_same(concatenate(parts).dense(), torch.cat([part.dense() for part in parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_token_samples_are_stacked_group_by_group(kind: str) -> None:
    whole = random_gradient(kind, N, (3, 5), 2, tokens=3)
    if isinstance(whole, OuterGradient):
        parts: list[SampleGradient] = [
            OuterGradient(whole.outputs[:, t : t + 1], whole.inputs, whole.shape, whole.is_transposed) for t in range(3)
        ]
    else:
        parts = [DenseGradient(whole.dense().view(N, 3, 3, 5)[:, t]) for t in range(3)]
    assert_same(stack(parts).dense(), whole.dense())


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("chunk", [1, 50, 2**20])
@pytest.mark.parametrize("ranks", [(2, 3), (3, 2)])
def test_contraction_backward_equals_autograd(tokens: int, chunk: int, ranks: tuple[int, int]) -> None:
    for kind, shape in (("outer", (3, 5)), ("transposed", (3, 5)), ("one_hot", (7, 3)), ("outer", (3, 2, 2, 2))):
        ranks_here = ranks if len(shape) == 2 else (*ranks, 1, 2)
        gradient, tucker = random_gradient(kind, N, shape, 2, tokens=tokens), random_tucker(4, shape, ranks_here)
        assert isinstance(gradient, OuterGradient)
        gradient = gradient.select(torch.tensor([0, 2, 3])) if tokens > 1 else gradient
        leaves = [tensor.requires_grad_() for tensor in (tucker.core, *tucker.factors)]
        d = torch.randn(gradient.n_samples, 4).double()
        dense = gradient.dense().flatten(1) @ dense_tucker(tucker).reshape(4, -1).T
        expected = torch.autograd.grad(dense, leaves, d)
        with torch.no_grad():
            matrices = tucker.matrices()
            found, saved = gradient.contract(matrices, chunk)
            assert_same(found, dense.detach())
            mine = tucker.matrices_backward(gradient.contract_backward(matrices, saved, d, chunk))
            for part, its in zip(mine, expected, strict=True):
                assert_same(part, its)
