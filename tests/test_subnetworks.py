"""V_in and V_out against explicit matrices [n_v, n_w], in every layout; exact algebra; W0 + delta v_k."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import LAYOUTS, assert_same, decomposition_problem, dense_directions, random_gradient, rows
from torch import Tensor

from l3d_pl import L3DError, Subnetworks
from l3d_pl.gradients import DenseGradient, OuterGradient
from l3d_pl.step import decompose
from l3d_pl.subnetworks import ranks_per_parameter
from l3d_pl.targets.frozen import fingerprint, freeze
from l3d_pl.targets.toy import MLP

layouts = pytest.mark.parametrize("layout", list(LAYOUTS))
restarts_1_and_3 = pytest.mark.parametrize("restarts", [1, 3])


def explicit(subnetworks: Subnetworks, gradients: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """g [N, n_w], V_in and V_out [R, n_v, n_w]."""
    g = rows({name: gradients[name].dense() for name in subnetworks.shapes})
    v_in, v_out = (rows(dense_directions(side)) for side in (subnetworks.v_in, subnetworks.v_out))
    return g, *(side.view(subnetworks.restarts, -1, g.shape[1]) for side in (v_in, v_out))  # type: ignore[return-value]


@layouts
@restarts_1_and_3
@torch.no_grad()
def test_everything_equals_the_dense_computation(layout: str, restarts: int) -> None:
    subnetworks, gradients = decomposition_problem(layout, restarts)
    prepared = subnetworks.prepare(gradients)
    assert (prepared.block is None, bool(prepared.factored)) == (layout == "factored", layout != "dense")
    g, v_in, v_out = explicit(subnetworks, gradients)
    c = torch.einsum("nw,rvw->nrv", g, v_in)
    assert_same(subnetworks.coefficients(prepared), c)
    assert_same(
        subnetworks.coefficients(prepared, subnetworks.view(subnetworks.v_out, prepared)),
        torch.einsum("nw,rvw->nrv", g, v_out),
    )
    assert_same(prepared.energy, g.square().sum())
    assert_same(prepared.sample_energies(), g.square().sum(1))
    assert_same(prepared.gram(), g @ g.T)
    weights = torch.randn(2, len(g)).double()
    combined = prepared.combine(weights, subnetworks.shapes)
    assert_same(rows({name: combined[name] for name in subnetworks.shapes}), weights @ g)
    codes = c * (torch.rand(c.shape) > 0.5)
    error = (g[:, None] - torch.einsum("nrv,rvw->nrw", codes, v_out)).square().sum(0)  # [R, n_w]
    result = subnetworks.reconstruct(prepared, codes)
    assert_same(result.squared_error, error.sum(1))
    assert_same(result.loss, error.sum(1) / g.square().sum())
    found = subnetworks.loss_per_parameter(prepared, codes)
    sizes = [math.prod(shape) for shape in subnetworks.shapes.values()]
    parts = zip(error.split(sizes, 1), g.square().sum(0).split(sizes), strict=True)
    for name, (wrong, energy) in zip(subnetworks.shapes, parts, strict=True):
        assert_same(found[name], wrong.sum(1) / energy.sum())
    assert_same(prepared.energies().sum(), prepared.energy)
    view = subnetworks.view(subnetworks.v_out, prepared)
    other = subnetworks.view(subnetworks.v_in, prepared)
    assert_same(view.gram(view), v_out.flatten(0, 1) @ v_out.flatten(0, 1).T)
    assert_same(view.gram(other), v_out.flatten(0, 1) @ v_in.flatten(0, 1).T)
    assert_same(
        view.select(torch.tensor([3, 1])).detach().gram(other), v_out.flatten(0, 1)[[3, 1]] @ v_in.flatten(0, 1).T
    )


@layouts
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_loss_does_not_change_when_all_gradients_are_scaled(layout: str, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    subnetworks, gradients = decomposition_problem(layout)
    losses = []
    for factor in (1.0, scale):
        scaled = {
            name: OuterGradient(g.outputs * factor, g.inputs, g.shape, g.is_transposed)
            if isinstance(g, OuterGradient)
            else DenseGradient(g.dense() * factor)
            for name, g in gradients.items()
        }
        prepared = subnetworks.prepare(scaled)
        losses.append(subnetworks.reconstruct(prepared, subnetworks.coefficients(prepared)).loss)
    assert_same(losses[1], losses[0])


def full_rank(n: int, is_dense: bool) -> Subnetworks:
    """n subnetworks of two matrices at full rank: V_in and V_out can then be any tensors."""
    subnetworks = Subnetworks({"a": (4, 3), "b": (2, 5)}, n, {"a": [4, 3], "b": [2, 5]}).double()
    subnetworks.is_dense = lambda name, gradient: is_dense  # type: ignore[method-assign]
    return subnetworks


def set_rows(subnetworks: Subnetworks, side: str, matrix: Tensor) -> None:
    """Make one side the rows of `matrix` [n, n_w]: cores are the tensors, factors identities."""
    directions = getattr(subnetworks, side)
    for name, part in zip(subnetworks.shapes, matrix.split([12, 10], 1), strict=True):
        core, *factors = directions.parameters_of(name).parameters()
        core.copy_(part.reshape(core.shape))
        for factor in factors:
            factor.copy_(torch.eye(factor.shape[1]).expand_as(factor))


@given(n=st.integers(1, 6), samples=st.integers(1, 5), is_dense=st.booleans(), seed=st.integers(0, 1000))
@torch.no_grad()
def test_samples_in_the_span_are_reconstructed_when_v_in_inverts_v_out(
    n: int, samples: int, is_dense: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    basis = torch.randn(n, 22).double()
    subnetworks = full_rank(n, is_dense)
    set_rows(subnetworks, "v_out", basis)
    set_rows(subnetworks, "v_in", torch.linalg.pinv(basis).T)  # V_in V_out = I
    codes = torch.randn(samples, n).double()
    a, b = (codes @ basis).split([12, 10], 1)
    sides = [(a.view(-1, 4, 3), torch.eye(3)), (b.view(-1, 2, 5), torch.eye(5))]
    gradients = {
        name: OuterGradient(g.mT.contiguous().unsqueeze(1), eye.double().expand(samples, -1, -1), tuple(g.shape[1:]))
        for name, (g, eye) in zip("ab", sides, strict=True)
    }
    prepared = subnetworks.prepare(gradients)
    c = subnetworks.coefficients(prepared)
    assert_same(c[:, 0], codes, 1e-5)
    assert float(subnetworks.reconstruct(prepared, c).loss) < 1e-9


@layouts
@torch.no_grad()
def test_v_and_minus_v_are_one_subnetwork(layout: str) -> None:
    subnetworks, gradients = decomposition_problem(layout)
    prepared = subnetworks.prepare(gradients)
    c = subnetworks.coefficients(prepared)
    loss = subnetworks.reconstruct(prepared, c).loss
    for directions in (subnetworks.v_in, subnetworks.v_out):
        for module in directions.children():
            module.core[1] *= -1
    flipped = subnetworks.coefficients(prepared)
    assert_same(flipped[..., 1], -c[..., 1])
    assert_same(subnetworks.reconstruct(prepared, flipped).loss, loss)


@torch.no_grad()
def test_a_small_loss_is_accurate_in_float32_on_the_factored_path() -> None:
    """||g||^2 - 2 c.p + c^T M c is a small difference of large numbers: L = 1e-4 to 3 %."""
    torch.manual_seed(1)
    n, samples = 6, 40
    basis, codes = torch.linalg.qr(torch.randn(22, n).double()).Q.T, torch.randn(samples, n).double()
    g = codes @ basis
    noise = torch.randn_like(g)
    noise -= noise @ basis.T @ basis
    g += noise * (1e-2 * g.norm() / noise.norm())
    subnetworks = full_rank(n, is_dense=False)
    for side in ("v_in", "v_out"):
        set_rows(subnetworks, side, basis)
    subnetworks.float()
    parts = zip("ab", ((4, 3), (2, 5)), g.split([12, 10], 1), strict=True)
    gradients = {
        name: OuterGradient(
            part.view(-1, 1, *shape).mT.float().contiguous(), torch.eye(shape[1]).expand(samples, -1, -1), shape
        )
        for name, shape, part in parts
    }
    prepared = subnetworks.prepare(gradients)
    losses = (
        subnetworks.reconstruct(prepared, subnetworks.coefficients(prepared)).loss,
        decompose(subnetworks, prepared, 1.0).loss,
    )
    exact = float((g - g @ basis.T @ basis).square().sum() / g.square().sum())
    assert exact == pytest.approx(1e-4, rel=1e-3)
    for loss in losses:
        assert float(loss) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("small", [0, 20, 10**6])
@restarts_1_and_3
def test_unit_norm_over_all_tensors_together(small: int, restarts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l3d_pl.subnetworks.SMALL_PARAMETER", small)
    shapes = {"a.weight": (6, 4), "a.bias": (6,), "conv": (2, 3, 2, 2), "scalar": ()}
    subnetworks = Subnetworks(shapes, 5, 2, restarts)
    norms = [rows(dense_directions(side)).norm(dim=1) for side in (subnetworks.v_out, subnetworks.v_in)]
    torch.testing.assert_close(norms[0], torch.ones(5 * restarts), rtol=0, atol=1e-5)
    assert torch.equal(norms[0], norms[1])  # V_in starts as a copy of V_out
    before = rows(dense_directions(subnetworks.v_out)).detach()
    with torch.no_grad():
        for index, parameter in enumerate(subnetworks.v_out.parameters()):
            parameter *= 1 + index
    skewed = rows(dense_directions(subnetworks.v_out)).detach()
    subnetworks.normalise_()
    after = rows(dense_directions(subnetworks.v_out)).detach()
    torch.testing.assert_close(after, skewed / skewed.norm(dim=1, keepdim=True))
    assert not torch.allclose(after, before)
    assert_same(
        rows(dense_directions(subnetworks.v_in)).norm(dim=1).detach(), norms[1].detach()
    )  # V_in is left as it is


def test_scalars_are_parameters_like_others() -> None:
    subnetworks = Subnetworks({"scale": (), "w": (3,)}, 2, 1).double()
    gradients = {"scale": random_gradient("dense", 4, ()), "w": random_gradient("dense", 4, (3,))}
    prepared = subnetworks.prepare(gradients)
    g, v_in, v_out = explicit(subnetworks, gradients)
    c = subnetworks.coefficients(prepared)
    assert_same(c.detach(), torch.einsum("nw,rvw->nrv", g, v_in).detach())
    expected = (g - c[:, 0] @ v_out[0]).square().sum() / g.square().sum()
    assert_same(subnetworks.reconstruct(prepared, c).loss[0].detach(), expected.detach())
    assert subnetworks.direction(1)["scale"].shape == ()


@torch.no_grad()
def test_large_matrices_stay_factored_where_that_is_cheaper() -> None:
    shapes = {"wide": (200, 300), "bias": (200,), "small": (8, 8)}
    subnetworks = Subnetworks(shapes, 4, 1).double()
    gradients = {
        name: random_gradient("outer" if len(shape) == 2 else "dense", 3, shape) for name, shape in shapes.items()
    }
    prepared = subnetworks.prepare(gradients)
    assert list(prepared.factored) == ["wide"]
    assert prepared.names == ("bias", "small", "wide")
    g, v_in, v_out = explicit(subnetworks, gradients)
    c = torch.einsum("nw,rvw->nrv", g, v_in)
    assert_same(subnetworks.coefficients(prepared), c)
    expected = (g - c[:, 0] @ v_out[0]).square().sum() / g.square().sum()
    assert_same(subnetworks.reconstruct(prepared, c).loss[0], expected)
    many_positions = gradients | {"wide": random_gradient("outer", 3, (200, 300), 2000)}
    assert not Subnetworks(shapes, 100, 1).prepare(many_positions).factored  # the tensor itself is then cheaper


@restarts_1_and_3
@torch.no_grad()
def test_direction_and_extract_restart(restarts: int) -> None:
    subnetworks, _ = decomposition_problem("mixed", restarts)
    for r in range(restarts):
        alone = subnetworks.extract_restart(r)
        assert (alone.restarts, alone.ranks) == (1, subnetworks.ranks)
        for k in (0, 4):
            for side, directions in (("out", subnetworks.v_out), ("in", subnetworks.v_in)):
                expected = {name: dense[r * 5 + k] for name, dense in dense_directions(directions).items()}
                for found in (subnetworks.direction(k, r, side), alone.direction(k, side=side)):
                    assert found.keys() == expected.keys()
                    for name, tensor in found.items():
                        assert_same(tensor, expected[name])


@pytest.mark.parametrize("k", [-1, 5, 100])
def test_a_subnetwork_that_does_not_exist_is_one_clear_line(k: int) -> None:
    subnetworks, _ = decomposition_problem("dense")
    with pytest.raises(L3DError, match=rf"^subnetwork: found {k}; allowed are 0 to 4$"):
        subnetworks.direction(k)


# -- W0 + delta v_k ------------------------------------------------------------------------------------


def perturbable() -> tuple[Subnetworks, MLP]:
    model = freeze(MLP((4, 3, 2)))
    assert isinstance(model, MLP)
    with torch.no_grad():
        model[0].bias[0] = -0.0  # bytes that an addition and a subtraction would not give back
    return Subnetworks({name: tuple(tensor.shape) for name, tensor in model.named_parameters()}, 3, 2), model


@pytest.mark.parametrize("parameters", [None, ["0.weight"], ["0.bias", "1.weight", "0.bias"]])
def test_perturbed_is_w0_plus_the_chosen_directions(parameters: list[str] | None) -> None:
    subnetworks, model = perturbable()
    before, saved = fingerprint(model), {name: tensor.clone() for name, tensor in model.named_parameters()}
    with subnetworks.perturbed(model, {0: 0.5, 2: -3.0}, parameters=parameters) as inside:
        assert inside is model
        for name, tensor in model.named_parameters():
            moved = 0.5 * subnetworks.direction(0)[name] - 3 * subnetworks.direction(2)[name]
            torch.testing.assert_close(tensor, saved[name] + (moved if parameters is None or name in parameters else 0))
    assert fingerprint(model) == before


def test_perturbed_restores_every_byte_after_exceptions_and_nested() -> None:
    subnetworks, model = perturbable()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="inside"), subnetworks.perturbed(model, {0: 1e30, 1: float("nan")}):
        raise RuntimeError("inside")
    assert fingerprint(model) == before
    with subnetworks.perturbed(model, {0: 1.0}):
        between = fingerprint(model)
        with pytest.raises(L3DError, match="found 7"), subnetworks.perturbed(model, {1: 1.0, 7: 1.0}):
            pass
        assert fingerprint(model) == between != before
        with subnetworks.perturbed(model, {1: 1e-3}):
            assert fingerprint(model) != between
        assert fingerprint(model) == between
    assert fingerprint(model) == before
    with (
        pytest.raises(
            L3DError, match=r"parameters: '0\.wieght' is not among the decomposed ones; did you mean '0\.weight'"
        ),
        subnetworks.perturbed(model, {0: 1.0}, parameters=["0.wieght"]),
    ):
        pass
    assert fingerprint(model) == before
    assert all(not parameter.requires_grad for parameter in model.parameters())


# -- settings ------------------------------------------------------------------------------------------

SHAPES = {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (3, 5)}


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (2, [(2, 2), (2,), (2, 2)]),
        (0.5, [(3, 2), (3,), (2, 3)]),
        ([3, 2], [(3, 2), (3,), (3, 2)]),
        ({"*": 1}, [(1, 1), (1,), (1, 1)]),
        ({"a.*": 1, "*": [3, 2]}, [(1, 1), (1,), (3, 2)]),
        ({"re:.*bias": [4], "a.weight": 0.5, "*": 2}, [(3, 2), (4,), (2, 2)]),
    ],
)
def test_ranks_per_pattern(ranks: Any, expected: list[tuple[int, ...]]) -> None:
    assert ranks_per_parameter(SHAPES, ranks) == dict(zip(SHAPES, expected, strict=True))
    assert Subnetworks(SHAPES, 2, ranks).ranks == dict(zip(SHAPES, expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_subnetworks": 0}, "^n_subnetworks: found 0; at least 1 is needed$"),
        ({"restarts": 0}, "^restarts: found 0; at least 1 is needed$"),
        ({"n_dense": 2}, "^n_dense: found 2; allowed are 0 to n_subnetworks - 1 = 1$"),
        ({"n_dense": -1}, "^n_dense: found -1; allowed are 0 to"),
        ({"ranks": 0}, r"^ranks of 'a\.weight': found 0"),
        ({"ranks": [2, 5]}, r"^ranks of 'a\.weight': found rank 5 above the dimension 4"),
        ({"ranks": [2, 2, 2]}, r"^ranks of 'a\.weight': found 3 entries"),
        ({"ranks": {"a.*": 1}}, r"^ranks: no pattern matches parameter 'b\.weight'; add one, such as '\*': 1$"),
        ({"ranks": {"*": 1, "a.wieght": 2}}, r"^ranks: pattern 'a\.wieght' matches none .*; did you mean 'a\.weight'"),
    ],
)
def test_bad_settings_are_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(L3DError, match=message):
        Subnetworks(SHAPES, **{"n_subnetworks": 2, **settings})


def test_the_start_is_reproducible() -> None:
    states = [Subnetworks(SHAPES, 3, 2, 2, torch.Generator().manual_seed(seed)).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(torch.equal(value, states[2][name]) for name, value in states[0].items())
