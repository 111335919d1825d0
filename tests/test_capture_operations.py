"""Every way of using a parameter gives the gradients of an autograd loop over single samples.

The sizes share factors with the batch on purpose: a sample dimension mistaken for another one would show.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_same, autograd_loop
from torch import Tensor, nn
from torch.nn import functional as F

from l3d_pl.gradients import GradientExtractor, OuterGradient
from l3d_pl.targets.frozen import select_parameters

N = 4
W, SQUARE, BIAS = {"W": (4, 8)}, {"W": (8, 8)}, {"b": (8,)}


class Use(nn.Module):
    """A model of one expression: `forward(model, x)` over the given parameters, and a buffer `mask` [8, 8]."""

    def __init__(
        self, forward: Callable[[Any, Tensor], Tensor], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
    ):
        super().__init__()
        self.expression = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype)))
        self.register_buffer("mask", (torch.rand(8, 8) > 0.4).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.expression(self, x)


@dataclass(frozen=True)
class Case:
    forward: Callable[[Any, Tensor], Tensor]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: W)
    input: tuple[int, ...] = (8,)
    parameters: str = "*"
    # The same without writing in place, for the loop, where autograd itself refuses what the model does.
    plain: Callable[[Any, Tensor], Tensor] | None = None

    def build(self, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
        return Use(self.forward, self.shapes, dtype).requires_grad_(False), torch.randn(N, *self.input, dtype=dtype)


def inplace_residual(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    h += (h @ m.W).tanh()
    h += F.linear(input=h, weight=m.W).tanh()
    return h


def residual(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    h = h + (h @ m.W).tanh()
    return h + F.linear(h, m.W).tanh()


def inplace_operand(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    y, z = h @ m.W, h * m.b
    h.zero_()
    return y + z + h


def inplace_input(m: Any, x: Tensor) -> Tensor:
    y = x @ m.W
    x += 1
    return y * x


def inplace_first(m: Any, x: Tensor) -> Tensor:
    x += m.b
    return x.sin()


def inplace_activation(m: Any, x: Tensor) -> Tensor:
    return torch.relu_(x @ m.W) @ m.W + F.relu(x + m.b, inplace=True)


def inplace_parts(m: Any, x: Tensor) -> Tensor:
    first, second = (x @ m.W).chunk(2, -1)
    second = second.clone()
    second.sub_(m.b[:4])
    return first * second


def inplace_on_view(m: Any, x: Tensor) -> Tensor:
    h = x * 1
    flat = h.view(-1, 8)
    flat += m.b
    return h.sin()


def inplace_part(m: Any, x: Tensor) -> Tensor:
    h = x * 1
    h[:, 4:] += m.b
    return h.sin()


def class_token_twice(m: Any, x: Tensor) -> Tensor:
    token = m.P.expand(len(x), -1, -1)
    x = torch.cat([token, x, token], dim=1)
    return (x.sin() + token).cos()


def own_rows_twice(m: Any, x: Tensor) -> Tensor:
    ones = torch.ones(len(x), 8, dtype=x.dtype)
    return (x + torch.einsum("ni,io,jo->nj", ones, m.W, m.W)).sin()


def joined_over_samples(m: Any, x: Tensor) -> Tensor:
    bias, x = torch.cat([m.b.expand(len(x), -1), x]).chunk(2)
    return (x * bias.flip(0)).sin()


def written_into_buffer(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 2, 8)
    h[:, 0], h[:, 1] = m.P, x
    return h.flatten(1).sin()


def written_into_constant(m: Any, x: Tensor) -> Tensor:
    w = torch.zeros(2, 8, dtype=x.dtype)
    w[0] = m.b
    return (x + w.sum(0)).sin()


def masked_copy(m: Any, x: Tensor) -> Tensor:
    w = m.W.clone()
    w[:2] = 0
    return x @ w


def masked_copy_method(m: Any, x: Tensor) -> Tensor:
    return x @ m.W.clone().mul_(m.mask)


def without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (x @ m.W).square().mean(-1, keepdim=True)
    return (x @ m.W) * scale


def recurrent(m: Any, x: Tensor) -> Tensor:
    h = x
    for _ in range(3):
        h = (h @ m.W + m.b).tanh()
    return h


def unused_branch(m: Any, x: Tensor) -> Tensor:
    F.linear(x, m.W)
    return x * 2


# Captured by a rule, without a warning.
CAPTURED: dict[str, Case] = {
    "linear": Case(lambda m, x: F.linear(x, m.W, m.b), {"W": (4, 8), "b": (4,)}),
    "linear-positions": Case(lambda m, x: F.linear(x, m.W, m.b), {"W": (4, 8), "b": (4,)}, (2, 3, 8)),
    "linear-keywords": Case(
        lambda m, x: F.linear(input=F.linear(x, weight=m.W).tanh(), weight=m.W, bias=m.b), SQUARE | BIAS
    ),
    "linear-flattened": Case(lambda m, x: F.linear(x.reshape(-1, 8), m.W).reshape(x.shape[0], -1), W, (4, 8)),
    "matmul-right": Case(lambda m, x: x @ m.W, SQUARE),
    "matmul-right-positions": Case(lambda m, x: torch.matmul(x, m.W), SQUARE, (4, 8)),
    "matmul-left": Case(lambda m, x: m.W @ x, W, (8, 4)),
    "matmul-vector": Case(lambda m, x: torch.stack([x @ m.b, (x @ m.b).sin()], -1), BIAS),
    "matmul-vector-positions": Case(lambda m, x: x @ m.b, BIAS, (4, 8)),
    "mm": Case(lambda m, x: torch.mm(x, m.W), SQUARE),
    "addmm": Case(lambda m, x: torch.addmm(m.b, x, m.W), SQUARE | BIAS),
    "addmm-flattened": Case(lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.W).view(x.shape), SQUARE | BIAS, (4, 8)),
    "addmm-one-bias": Case(lambda m, x: torch.addmm(m.b, x, m.W), SQUARE | {"b": (1,)}),
    "add": Case(lambda m, x: (x + m.b).sin() + (m.b + x).cos(), BIAS),
    "add-alpha": Case(lambda m, x: torch.add(x, m.b, alpha=3) + torch.add(m.b, x, alpha=2), BIAS),
    "add-positions": Case(lambda m, x: (x + m.P).sin(), {"P": (4, 8)}, (4, 8)),
    "add-leading-one": Case(lambda m, x: (x + m.P).sin(), {"P": (1, 4, 8)}, (4, 8)),
    "add-inner-one": Case(lambda m, x: (x + m.P).sin(), {"P": (4, 1)}, (4, 8)),
    "add-broadcasts-data": Case(lambda m, x: (x.sum(-1, keepdim=True) + m.b).sin(), BIAS),
    "add-scalar": Case(lambda m, x: (x + m.s).sin(), {"s": ()}),
    "sub": Case(lambda m, x: (x - m.b).sin() + (m.b - x).cos(), BIAS),
    "sub-alpha": Case(lambda m, x: torch.sub(x, m.b, alpha=3).sin() + torch.sub(m.b, x, alpha=2).sin(), BIAS),
    "rsub": Case(lambda m, x: torch.rsub(x, m.b).sin() + torch.rsub(m.b, x).cos(), BIAS),
    "mul": Case(lambda m, x: (x * m.b).sin() + (m.b * x).cos(), BIAS),
    "mul-positions": Case(lambda m, x: (x * m.P).sin(), {"P": (4, 1)}, (4, 8)),
    "mul-leading-one": Case(lambda m, x: (x * m.P).sin(), {"P": (1, 8)}),
    "mul-scalar": Case(lambda m, x: (x * m.s).sin(), {"s": ()}),
    "mul-hidden": Case(lambda m, x: (x @ m.W).tanh() * m.b, SQUARE | BIAS),
    "T": Case(lambda m, x: x @ m.W.T),
    "t": Case(lambda m, x: x @ m.W.t()),
    "mT": Case(lambda m, x: x @ m.W.mT),
    "permute": Case(lambda m, x: F.linear(x, m.W.permute(1, 0)), {"W": (8, 4)}),
    "reshape": Case(lambda m, x: x @ m.b.reshape(8, 4), {"b": (32,)}),
    "slice": Case(lambda m, x: x @ m.W[:, 2:5], SQUARE),
    "index": Case(lambda m, x: (x @ m.W[1]) + m.W[0, 0] * x, {"W": (2, 8, 8)}),
    "chunk": Case(lambda m, x: torch.cat([x @ m.W.chunk(2)[0].T, (x @ m.W.chunk(2)[1].T).sin()], -1), SQUARE),
    "split-unbind": Case(
        lambda m, x: torch.stack([x @ w for w in m.W.unbind()]).sum(0) + x * m.b.split(8)[1],
        {"W": (2, 8, 8), "b": (16,)},
    ),
    "expand": Case(lambda m, x: x @ m.b.expand(8, -1), BIAS),
    "gram": Case(lambda m, x: x @ (m.W @ m.W.T), {"W": (8, 4)}),
    "masked": Case(lambda m, x: x @ (m.W * m.mask), SQUARE),
    "masked-derived-buffer": Case(lambda m, x: x @ (m.W * (1 - m.mask)), SQUARE),
    "normalised": Case(lambda m, x: F.linear(x, F.normalize(m.W, dim=1))),
    "low-rank": Case(lambda m, x: x @ (m.A @ m.B), {"A": (8, 2), "B": (2, 8)}),
    "product-with-unchosen": Case(lambda m, x: x @ (m.A.T @ m.B), {"A": (8, 8), "B": (8, 8)}, parameters="B"),
    "cat-parameters": Case(lambda m, x: x @ torch.cat([m.A, m.B], 1), {"A": (8, 2), "B": (8, 4)}),
    "tied": Case(lambda m, x: (x @ m.W).relu() @ m.W.T + m.b, {"W": (8, 4), "b": (8,)}),
    "tied-linear": Case(lambda m, x: F.linear(F.linear(x, m.W).tanh(), m.W.T)),
    "used-dense-and-outer": Case(lambda m, x: (x @ m.W) + (x * m.W[0]).sin(), SQUARE),
    "detached-use": Case(lambda m, x: (x @ m.W).tanh() + (x @ m.W.detach()).sin() * (x @ m.W.data), SQUARE),
    "recurrent": Case(recurrent, SQUARE | BIAS),
    "without-grad": Case(without_grad, SQUARE),
    "inplace-residual": Case(inplace_residual, SQUARE, plain=residual),
    "inplace-operand": Case(inplace_operand, SQUARE | BIAS, plain=lambda m, x: 2 * x @ m.W + 2 * x * m.b),
    "inplace-input": Case(inplace_input, SQUARE, plain=lambda m, x: (x @ m.W) * (x + 1)),
    "inplace-first": Case(inplace_first, BIAS),
    "inplace-activation": Case(inplace_activation, SQUARE | BIAS),
    "inplace-parts": Case(inplace_parts, SQUARE | BIAS),
    "inplace-on-linear": Case(
        lambda m, x: F.leaky_relu(F.linear(F.linear(x, m.W, m.b).relu_(), m.W), inplace=True) + x, SQUARE | BIAS, (4, 8)
    ),
    "inplace-on-view": Case(inplace_on_view, BIAS, (4, 8)),
    "einsum": Case(lambda m, x: torch.einsum("ni,oi->no", x, m.W)),
    "einsum-list": Case(lambda m, x: torch.einsum("ni, io -> no", [x, m.W]).tanh(), SQUARE),
    "einsum-implicit": Case(lambda m, x: torch.einsum("...j,jk", x, m.W).tanh(), SQUARE, (4, 8)),
    "tensordot": Case(lambda m, x: torch.tensordot(x, m.W, ([1, 2], [1, 0])), {"W": (8, 4, 3)}, (4, 8)),
    "batched-matrices": Case(lambda m, x: x @ m.W, {"W": (2, 8, 8)}, (2, 4, 8)),
    "batched-matrices-left": Case(lambda m, x: m.W @ x, {"W": (2, 8, 4)}, (2, 4, 8)),
    "matmul-left-deep": Case(lambda m, x: m.W @ x, W, (2, 8, 3)),
    "divided": Case(lambda m, x: (x / m.b).sin() + m.b / (x + 9), BIAS),
    "divided-one": Case(lambda m, x: x / m.s + torch.div(m.s, x.exp()), {"s": (1,)}),
    "expand-over-samples": Case(lambda m, x: (x + m.b.expand(x.shape[0], -1)).sin(), BIAS),
    "expand-as": Case(lambda m, x: (x * m.P.expand_as(x)).sin(), {"P": (4, 1)}, (4, 8)),
    "broadcast-to": Case(lambda m, x: (x - torch.broadcast_to(m.b, x.shape)).sin(), BIAS),
    "written-into-data": Case(
        lambda m, x: torch.zeros_like(x).index_copy(1, torch.arange(8), x * 2 + m.b.expand_as(x)), BIAS
    ),
    "class-token": Case(lambda m, x: torch.cat([m.P.expand(x.shape[0], -1, -1), x], 1), {"P": (1, 1, 8)}, (3, 8)),
    "class-token-twice": Case(class_token_twice, {"P": (1, 1, 8)}, (3, 8)),
    "batched-expanded": Case(lambda m, x: torch.bmm(x, m.W.expand(len(x), -1, -1)), SQUARE, (4, 8)),
    "where": Case(lambda m, x: torch.where(x > 0, x, m.b.expand(len(x), 8)), BIAS),
    "lookup-of-bare-table": Case(lambda m, x: m.W[(x > 0).long() - 1].flatten(1), {"W": (2, 3)}),
    "constant-product": Case(lambda m, x: x * F.linear(torch.eye(8, dtype=x.dtype), m.W).sum(0), SQUARE),
    "unmarked-constant": Case(lambda m, x: (x + F.linear(torch.ones(4, 8, dtype=x.dtype), m.W)).sin(), SQUARE, (4, 8)),
    "unused-branch": Case(lambda m, x: (F.linear(x, m.W), x * m.b)[1], W | BIAS, parameters="b"),
}

# No rule: right as well, by the oracle, which says so once.
ORACLE: dict[str, Case] = {
    "transposed-samples": Case(lambda m, x: (m.W @ x.T).T),
    "linear-vector-weight": Case(lambda m, x: F.linear(x, m.b).unsqueeze(-1), BIAS),
    "addmm-scaled": Case(lambda m, x: torch.addmm(m.b, x, m.W, alpha=2, beta=3), SQUARE | BIAS),
    "inplace-mul": Case(lambda m, x: (x * 1).mul_(m.b), BIAS),
    "inplace-part": Case(inplace_part, {"b": (4,)}),
    "written-into-buffer": Case(written_into_buffer, {"P": (8,)}),
    "written-into-constant": Case(written_into_constant, BIAS),
    "einsum-diagonal": Case(lambda m, x: torch.einsum("ni,ii->ni", x, m.W), SQUARE),
    "einsum-twice": Case(lambda m, x: torch.einsum("ni,io,jo->nj", x, m.W, m.W), SQUARE),
    "einsum-samples-last": Case(lambda m, x: torch.einsum("ni,io->on", x, m.W).T, SQUARE),
    "scaled-by-frequency": Case(
        lambda m, x: F.embedding((x > 0).long(), m.W, scale_grad_by_freq=True).flatten(1), {"W": (2, 3)}
    ),
    "own-rows": Case(lambda m, x: (F.linear(torch.ones(len(x), 8, dtype=x.dtype), m.W).relu() * x).sin(), SQUARE),
    "einsum-broadcast": Case(lambda m, x: torch.einsum("ni,io->no", x, m.W), {"W": (1, 8)}),
    "own-rows-twice": Case(own_rows_twice, SQUARE),
    "joined-over-samples": Case(joined_over_samples, BIAS),
    "masked-copy": Case(masked_copy, SQUARE),
    "masked-copy-method": Case(masked_copy_method, SQUARE),
    "unused-output": Case(unused_branch, W),
    "never-used": Case(lambda m, x: x * m.b, W | BIAS),
}


def extract(case: Case, dtype: torch.dtype, train: bool = False) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Captured gradients, those of the loop, and the warnings on the way (two calls)."""
    model, x = case.build(dtype)
    model.requires_grad_(train)
    references = torch.randn_like(model(x.clone()))
    plain = copy.deepcopy(model)
    plain.expression = case.plain or case.forward
    expected = autograd_loop(plain, x, references)
    extractor = GradientExtractor(model, select_parameters(model, case.parameters))
    before = x.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            extraction = extractor(x, references=references)
    extractor.check(x, extraction, index=N - 1)
    found = extraction.gradients
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad == train for parameter in model.parameters())
    return found, expected, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*CAPTURED, *ORACLE])
def test_operation_equals_loop(name: str, dtype: torch.dtype, rtol: float) -> None:
    found, expected, messages = extract((CAPTURED | ORACLE)[name], dtype)
    for parameter, gradient in found.items():
        assert not gradient.dense().requires_grad
        assert_same(gradient.dense(), expected[parameter], rtol)
        assert_same(gradient.squared_norms(), expected[parameter].reshape(N, -1).square().sum(1), rtol)
    if name in CAPTURED:
        assert not messages
    else:
        (message,) = messages
        assert message.startswith("no gradient rule covers these parameters")
        assert any(parameter in message for parameter in found)


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear-keywords",
        "tied",
        "mul-hidden",
        "low-rank",
        "masked",
        "inplace-residual",
        "inplace-first",
        "einsum",
        "class-token",
        "divided",
        "masked-copy",
    ],
)
def test_parameters_that_require_grad_are_captured_the_same_way(name: str) -> None:
    found, expected, messages = extract((CAPTURED | ORACLE)[name], torch.float64, train=True)
    assert bool(messages) == (name in ORACLE)
    for parameter, gradient in found.items():
        assert not gradient.dense().requires_grad
        assert_same(gradient.dense(), expected[parameter])


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear-positions",
        "linear-flattened",
        "matmul-right",
        "matmul-left",
        "addmm-flattened",
        "T",
        "mT",
        "tied",
        "recurrent",
    ],
)
def test_weights_are_kept_as_outer_products(name: str) -> None:
    found, _, _ = extract(CAPTURED[name], torch.float64)
    assert isinstance(found["W"], OuterGradient)


@given(
    n=st.integers(1, 5),
    positions=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    form=st.sampled_from(["linear", "matmul", "transposed", "addmm", "gated", "einsum", "lookup"]),
)
def test_any_shape_equals_loop(n: int, positions: list[int], inputs: int, outputs: int, form: str) -> None:
    forms: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "linear": lambda m, x: F.linear(x, m.W.T, m.b),
        "matmul": lambda m, x: x @ m.W + m.b,
        "einsum": lambda m, x: torch.einsum("...i,io->...o", x, m.W) / (m.b + 9),
        "lookup": lambda m, x: (m.W[(x.sum(-1) > 0).long() % inputs] @ m.W.T.sin() @ m.W * m.b).cos(),
        "transposed": lambda m, x: (x @ m.W).tanh() @ m.W.T,
        "addmm": lambda m, x: torch.addmm(m.b, x.reshape(-1, inputs), m.W).reshape(*x.shape[:-1], outputs),
        "gated": lambda m, x: (x @ m.W).sigmoid() * m.b - m.b,
    }
    model = Use(forms[form], {"W": (inputs, outputs), "b": (outputs,)}, torch.float64)
    x = torch.randn(n, *positions, inputs, dtype=torch.float64)
    references = torch.randn_like(model(x))
    chosen = {name: tensor for name, tensor in model.named_parameters() if form != "transposed" or name == "W"}
    expected = autograd_loop(model, x, references)
    for name, gradient in GradientExtractor(model, chosen)(x, references=references).gradients.items():
        assert_same(gradient.dense(), expected[name])


@given(data=st.data(), dims=st.integers(1, 3), groups=st.sampled_from([1, 1, 2, 3]), n=st.integers(1, 4))
def test_any_convolution_equals_loop(data: st.DataObject, dims: int, groups: int, n: int) -> None:
    def each(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding: Any = data.draw(st.sampled_from([each(0, 2), "valid", "same"]))
    stride = [1] * dims if padding == "same" else stride
    size = [extra + step * (k - 1) + 1 for extra, step, k in zip(each(0, 3), dilation, kernel, strict=True)]
    inputs, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    model = Use(
        lambda m, x: getattr(F, f"conv{dims}d")(x, m.W, m.b, stride, padding, dilation, groups).sin(),
        {"W": (outputs, inputs // groups, *kernel), "b": (outputs,)},
        torch.float64,
    )
    assert_captured_as_loop(model, torch.randn(n, inputs, *size, dtype=torch.float64))


@given(data=st.data(), others=st.integers(1, 2), n=st.integers(1, 4))
def test_any_einsum_equals_loop(data: st.DataObject, others: int, n: int) -> None:
    """Letters of the parameter, of the data and of a constant at random, samples first in the data and the output."""
    letters, sizes = "abcd", dict(zip("nabcd", [n, *(data.draw(st.integers(1, 3)) for _ in range(4))], strict=True))
    draw = st.lists(st.sampled_from(letters), max_size=4, unique=True).map("".join)
    mine, word, constant = data.draw(draw), data.draw(draw), data.draw(draw) if others == 2 else None
    known = sorted({*mine, *word, *(constant or "")})
    out = "".join(data.draw(st.permutations(known))[: data.draw(st.integers(0, len(known)))])
    words = data.draw(
        st.permutations([("W", mine), ("x", "n" + word), *([("mask", constant)] if constant is not None else [])])
    )
    equation = f"{','.join(word for _, word in words)}->n{out}"
    model = Use(
        lambda m, x: (
            torch.einsum(equation, *[x if key == "x" else getattr(m, key) for key, _ in words]).unsqueeze(-1).sin()
        ),
        {"W": tuple(sizes[letter] for letter in mine)},
        torch.float64,
    )
    if constant is not None:
        model.mask = torch.randn([sizes[letter] for letter in constant], dtype=torch.float64)
    assert_captured_as_loop(model, torch.randn(n, *(sizes[letter] for letter in word), dtype=torch.float64))


def assert_captured_as_loop(model: nn.Module, x: Tensor) -> None:
    references = torch.randn_like(model(x))
    expected = autograd_loop(model, x, references)
    extractor = GradientExtractor(model.requires_grad_(False), select_parameters(model, "*"))
    for name, gradient in extractor(x, references=references).gradients.items():
        assert_same(gradient.dense(), expected[name])
    assert not extractor.oracle_parameters
