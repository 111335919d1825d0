"""Plain and slow versions of what the library computes, written without it, and inputs to compare the two on."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorly
import torch
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from l3d_pl.decomposition import Decomposition
from l3d_pl.gradients import DenseGradient, OuterGradient, SampleGradient
from l3d_pl.subnetworks import Directions, Subnetworks
from l3d_pl.tucker import Tucker

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda output, reference: ((output - reference) ** 2).sum(),
    "kl": lambda output, reference: F.kl_div(
        output.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum"
    ),
}


def autograd_loop(model: nn.Module, inputs: Any, references: Tensor, divergence: str = "mse") -> dict[str, Tensor]:
    """Gradients of each sample alone by plain `backward()` on a copy of the model, {name: [N, *shape]}.

    `inputs` is a tensor, or a mapping of keyword arguments.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(references)):
        model.zero_grad(set_to_none=True)
        if isinstance(inputs, Mapping):
            output = model(**{key: value[i : i + 1].clone() for key, value in inputs.items()})
        else:
            output = model(inputs[i : i + 1].clone())
        output = output["logits"] if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            DIVERGENCES[divergence](output, references[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            rows[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return {name: torch.stack(row) for name, row in rows.items()}


def assert_same(found: Tensor, expected: Tensor, rtol: float = 1e-6, scale: float | None = None) -> None:
    """Equal to `rtol` of `scale` (default: the expected tensor's largest value)."""
    if scale is None:
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * max(scale, 1e-12))


def dense_tucker(tucker: Tucker) -> Tensor:
    """G x1 U1 x2 U2 ... of every tensor by tensorly, [n, *shape]."""
    with tensorly.backend_context("pytorch"):
        return torch.stack(
            [tucker_to_tensor((core, [u[k] for u in tucker.factors])) for k, core in enumerate(tucker.core)]
        )


def dense_directions(directions: Directions) -> dict[str, Tensor]:
    """One einsum per parameter, {name: [n, *shape]}: differentiable, and independent of `Tucker.dense`."""
    result = {}
    for name, tucker in directions.tuckers().items():
        inner, outer = "pqrs"[: len(tucker.factors)], "abcd"[: len(tucker.factors)]
        factors = ",".join(f"n{o}{i}" for o, i in zip(outer, inner, strict=True))
        equation = f"n{inner},{factors}->n{outer}" if factors else "n->n"
        result[name] = torch.einsum(equation, tucker.core, *tucker.factors)
    return result


def rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """{name: [n, *shape]} as one matrix [n, n_w]."""
    return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in tensors.values()], 1)


def random_tucker(n: int, shape: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tucker:
    factors = tuple(torch.randn(n, size, rank, dtype=dtype) for size, rank in zip(shape, ranks, strict=True))
    return Tucker(torch.randn(n, *ranks, dtype=dtype), factors)


def random_gradient(
    kind: str, n: int, shape: tuple[int, ...], positions: int = 1, dtype: torch.dtype = torch.float64, tokens: int = 1
) -> SampleGradient:
    """Random gradients of a parameter of `shape`, of n groups of `tokens` samples.

    Kinds: `dense`; `outer` (rows: the first mode); of matrices also `transposed` (stored as columns x rows) and
    `one_hot` (rows of an embedding, looked up by integers).
    """
    if kind == "dense":
        return DenseGradient(torch.randn(n * tokens, *shape, dtype=dtype))
    is_transposed = kind != "outer"
    rows, columns = (shape[1], shape[0]) if is_transposed else (shape[0], math.prod(shape[1:]))
    outputs = torch.randn(n, tokens, positions, rows, dtype=dtype)
    inputs = torch.randn(n, positions, columns, dtype=dtype)
    if kind == "one_hot":
        inputs = torch.randint(0, columns, (n, positions))
    return OuterGradient(outputs, inputs, shape, is_transposed)


# How a batch is laid out for contraction: which parameters join the dense block, the others stay factored.
LAYOUTS: dict[str, Callable[[str], bool]] = {
    "dense": lambda name: True,
    "factored": lambda name: False,
    "mixed": lambda name: name != "a.weight",
}


def decomposition_problem(
    layout: str, restarts: int = 1, samples: int = 7, dtype: torch.dtype = torch.float64, n_subnetworks: int = 5
) -> tuple[Subnetworks, dict[str, SampleGradient]]:
    """Subnetworks with V_in != V_out, and gradients of matrices, an embedding, 4 modes; a vector where some are dense.

    Of tokens where `samples` is even: two for each group.
    """
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (6, 4), "b.weight": (3, 5), "conv": (2, 3, 2, 2), "e": (7, 3)}
    tokens = 2 if samples % 2 == 0 else 1
    kinds = {"a.weight": "outer", "b.weight": "transposed", "conv": "outer", "e": "one_hot"}
    gradients = {
        name: random_gradient(kind, samples // tokens, shapes[name], positions, dtype, tokens)
        for positions, (name, kind) in enumerate(kinds.items(), 1)
    }
    if layout != "factored":
        shapes["a.bias"] = (6,)
        gradients["a.bias"] = random_gradient("dense", samples, shapes["a.bias"], dtype=dtype)
    subnetworks = Subnetworks(shapes, n_subnetworks, 2, restarts, torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for parameter in subnetworks.v_in.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    subnetworks.is_dense = lambda name, gradient: LAYOUTS[layout](name)  # type: ignore[method-assign]
    return subnetworks, gradients


def planted_decomposition(n: int) -> Decomposition:
    """x -> W x in n dimensions, W the identity; subnetwork k is W[k, k] alone, and a hundredth of every other entry."""
    target = nn.Linear(n, n, bias=False)
    nn.init.eye_(target.weight)
    found = Subnetworks({"weight": (n, n)}, n, n)
    truth = torch.full((n, n, n), 0.01)
    truth[range(n), range(n), range(n)] = 1.0
    truth /= truth.flatten(1).norm(dim=1)[:, None, None]
    for side in (found.v_in, found.v_out):
        tucker = side.parameters_of("weight").tucker
        with torch.no_grad():
            tucker.core.copy_(truth)
            for factor in tucker.factors:
                factor.copy_(torch.eye(n).expand_as(factor))
    return Decomposition(found, target, p_act=torch.ones(n))
