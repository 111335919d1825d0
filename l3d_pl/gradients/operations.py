"""One rule per operation: what the gradient of each sample is with respect to an operand that is a chosen parameter.

A rule is a function with the operation's own arguments, after two more: `operand`, the very tensor in question (compare
with `is`), and `n`, the number of samples. It is called while the frozen model runs and returns a function that turns
D, the gradient at the operation's output, into the operand's `SampleGradient`; or None for a form of the operation it
does not cover (the parameter then goes to the slow oracle, functional.py). It holds on to nothing but the operands it
needs.

To teach the library a new operation, add one rule here: `@rule("name", ...)` with the names torch gives the operation.
"""

from collections.abc import Callable

from torch import Tensor

from l3d_pl.gradients.sample_gradient import DenseGradient, OuterGradient, SampleGradient

Finish = Callable[[Tensor], SampleGradient]
Rule = Callable[..., Finish | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations that torch calls by `names`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def per_position(tensor: Tensor, n: int) -> Tensor | None:
    """[N, ..., F] or [N * S, F] as [N, S, F]; None if the first dimension does not hold the samples."""
    if tensor.ndim < 2 or tensor.shape[0] % n:
        return None
    return tensor.reshape(n, -1, tensor.shape[-1])


def reduce_to(values: Tensor, n: int, shape: tuple[int, ...]) -> Tensor | None:
    """Undo broadcasting per sample: [N * ..., *broadcast] -> [N, *shape]; None if `shape` holds that of the samples."""
    missing = values.ndim - len(shape)
    if missing < 0 or values.shape[0] % n or (missing == 0 and (not shape or shape[0] != 1)):
        return None
    if missing == 0:  # shape [1, ...] against [N, ...]: a leading 1 is the sample dimension
        return reduced.unsqueeze(1) if (reduced := reduce_to(values, n, shape[1:])) is not None else None
    values = values.reshape(n, -1, *values.shape[missing:]).sum(1)
    broadcast = [dim + 1 for dim, size in enumerate(shape) if size == 1 and values.shape[dim + 1] != 1]
    return values.sum(broadcast, keepdim=True) if broadcast else values


def broadcast_operand(n: int, operand: Tensor, other: Tensor | float, factor: Tensor | float) -> Finish | None:
    """Rule for out = f(other, operand) elementwise with d out / d operand = `factor`."""
    sample = other if isinstance(other, Tensor) else None
    if sample is None or sample.ndim < max(1, operand.ndim) or sample.shape[0] % n:
        return None
    if sample.ndim == operand.ndim and (operand.ndim == 0 or operand.shape[0] != 1):
        return None
    shape = tuple(operand.shape)

    def finish(d: Tensor) -> SampleGradient:
        reduced = reduce_to(d * factor if isinstance(factor, Tensor) or factor != 1 else d, n, shape)
        assert reduced is not None
        return DenseGradient(reduced)

    return finish


def outer(n: int, inputs: Tensor, shape: tuple[int, ...], is_transposed: bool) -> Finish | None:
    rows = per_position(inputs, n)
    if rows is None:
        return None

    def finish(d: Tensor) -> SampleGradient:
        return OuterGradient(d.reshape(n, 1, -1, d.shape[-1]), rows, shape, is_transposed)

    return finish


@rule("linear")
def linear(operand: Tensor, n: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Finish | None:
    """y = x W^T + b with W [O, I]: G = D A^T; for b the sum of D over positions."""
    if weight.ndim != 2:
        return None
    if operand is weight:
        return outer(n, input, tuple(weight.shape), is_transposed=False)
    return broadcast_operand(n, operand, input, 1) if operand is bias else None


@rule("matmul", "mm")
def matmul(operand: Tensor, n: int, input: Tensor, other: Tensor) -> Finish | None:
    """x @ W with W [I, O]: G = A D^T; W @ x with x [N, I, S]: G = D x^T; x @ w with a vector w: sum of D_s x_s."""
    if operand is other and other.ndim == 2:
        return outer(n, input, tuple(other.shape), is_transposed=True)
    if operand is other and other.ndim == 1 and (rows := per_position(input, n)) is not None:
        return lambda d: DenseGradient((d.reshape(n, -1, 1) * rows).sum(1))
    if operand is input and input.ndim == 2 and other.ndim == 3 and other.shape[0] == n:
        return lambda d: OuterGradient(d.mT.unsqueeze(1), other.mT, tuple(operand.shape))
    return None


@rule("addmm")
def addmm(
    operand: Tensor, n: int, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Finish | None:
    """b + x @ W (Hugging Face's Conv1D: samples and positions flattened into rows)."""
    if beta != 1 or alpha != 1:
        return None
    if operand is mat2:
        return outer(n, mat1, tuple(mat2.shape), is_transposed=True)
    return broadcast_operand(n, operand, mat1, 1) if operand is input else None


@rule("add", "add_", "__radd__")
def add(operand: Tensor, n: int, input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Finish | None:
    if operand is other:
        return broadcast_operand(n, operand, input, alpha)
    return broadcast_operand(n, operand, other, 1)


@rule("sub", "sub_", "subtract")
def sub(operand: Tensor, n: int, input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Finish | None:
    if operand is other:
        return broadcast_operand(n, operand, input, -alpha)
    return broadcast_operand(n, operand, other, 1)


@rule("__rsub__", "rsub")
def rsub(operand: Tensor, n: int, input: Tensor, other: Tensor | float) -> Finish | None:
    return sub(operand, n, other, input)


@rule("mul", "multiply", "__rmul__")
def mul(operand: Tensor, n: int, input: Tensor, other: Tensor | float) -> Finish | None:
    sample = input if operand is other else other
    return broadcast_operand(n, operand, sample, sample)
