"""One rule per operation: what the gradient of each sample is with respect to an operand that is a chosen parameter.

A rule is a function with the operation's own arguments, after two more: `operand`, the very tensor in question (compare
with `is`), and `n`, the number of samples. It is called while the frozen model runs and returns a function that turns
D, the gradient at the operation's output, into the operand's `SampleGradient`; or None for a form of the operation it
does not cover (the parameter then goes to the slow oracle, functional.py). It holds on to nothing but the operands it
needs.

To teach the library a new operation, add one rule here: `@rule("name", ...)` with the names torch gives the operation.
"""

import math
from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l3d_pl.gradients.sample_gradient import DenseGradient, OuterGradient, SampleGradient
from l3d_pl.tucker import CHUNK

Finish = Callable[[Tensor], SampleGradient]
Rule = Callable[..., Finish | None]
RULES: dict[str, Rule] = {}

# Operations that keep samples apart where all their tensors hold them in the first of as many dimensions.
_ELEMENTWISE = ("add", "add_", "sub", "sub_", "subtract", "rsub", "mul", "mul_", "multiply", "div", "div_", "where")
_JOINING = ("cat", "concat", "concatenate", "stack")
_BATCHED = ("bmm", "baddbmm", "matmul")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations that torch calls by `names`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def find(name: str, operand: Tensor, n: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Finish | None:
    """The answer of `name`'s rule; None without a rule, and for arguments that it does not know."""
    try:
        return RULES[name](operand, n, *args, **kwargs) if name in RULES else None
    except TypeError:
        return None


def keeps_samples_apart(name: str, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether sample i of the output depends on nothing but entry i of each of these tensors (first dimension)."""
    ndim, n = tensors[0].ndim, tensors[0].shape[0] if tensors[0].ndim else 0
    if any(tensor.ndim != ndim or tensor.shape[0] != n for tensor in tensors) or n == 0:
        return False
    if name in _JOINING:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return dim % (ndim + (name == "stack")) != 0
    return name in _ELEMENTWISE or (name in _BATCHED and ndim >= 3)


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


def broadcast_operand(
    n: int,
    operand: Tensor,
    other: Any,
    factor: Callable[[], Tensor] | float = 1,
    shape: tuple[int, ...] | None = None,
) -> Finish | None:
    """Rule for out = f(other, operand) elementwise with d out / d operand = `factor`; `operand` is seen as `shape`."""
    shape = tuple(operand.shape) if shape is None else shape
    sample = other if isinstance(other, Tensor) else None
    if sample is None or sample.ndim < max(1, len(shape)) or sample.shape[0] % n:
        return None
    if sample.ndim == len(shape) and shape[0] != 1:
        return None

    def finish(d: Tensor) -> SampleGradient:
        values = d * factor() if callable(factor) else d * factor if factor != 1 else d
        reduced = reduce_to(values, n, shape)
        assert reduced is not None
        return DenseGradient(reduced.reshape(n, *operand.shape))

    return finish


def outer(n: int, inputs: Tensor, shape: tuple[int, ...], is_transposed: bool) -> Finish | None:
    """G = D A^T, summed over positions, with A = `inputs` [N, ..., columns]; or indices [N, ...], for a lookup."""
    rows = per_position(inputs if inputs.is_floating_point() else inputs.unsqueeze(-1), n)
    if rows is None:
        return None
    rows = rows if inputs.is_floating_point() else rows.squeeze(-1)

    def finish(d: Tensor) -> SampleGradient:
        return OuterGradient(d.reshape(n, 1, -1, d.shape[-1]), rows, shape, is_transposed)

    return finish


# -- products --------------------------------------------------


@rule("linear")
def linear(operand: Tensor, n: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Finish | None:
    """y = x W^T + b with W [O, I]: G = D A^T; for b the sum of D over positions."""
    if weight.ndim != 2:
        return None
    if operand is weight:
        return outer(n, input, tuple(weight.shape), is_transposed=False)
    return broadcast_operand(n, operand, input) if operand is bias else None


@rule("matmul", "mm")
def matmul(operand: Tensor, n: int, input: Tensor, other: Tensor) -> Finish | None:
    """x @ W with W [I, O]: G = A D^T; W @ x with x [N, ..., I, S]: G = D x^T; x @ w with a vector w: sum of D_s x_s.

    Also with one W for each of some inner dimension, such as heads: x [N, H, S, I] @ W [H, I, O].
    """
    shape = tuple(operand.shape)
    if operand is other and other.ndim == 2:
        return outer(n, input, shape, is_transposed=True)
    if operand is other and other.ndim == 1 and (rows := per_position(input, n)) is not None:
        return lambda d: DenseGradient((d.reshape(n, -1, 1) * rows).sum(1))
    if operand is input and input.ndim == 2 and other.ndim >= 3:
        finish = outer(n, other.mT, shape, is_transposed=False)
        return None if finish is None else lambda d: finish(d.mT)
    data = input if operand is other else other
    if operand.ndim >= 3 and data.ndim > operand.ndim:
        is_right = operand is other
        return broadcast_product(n, shape, lambda d: data.mT @ d if is_right else d @ data.mT, data)
    return None


def broadcast_product(
    n: int, shape: tuple[int, ...], product: Callable[[Tensor], Tensor], data: Tensor
) -> Finish | None:
    """Rule for a batch of matrices of `shape`: `product` of D holds one matrix for each of the output's."""
    if data.shape[0] % n:
        return None

    def finish(d: Tensor) -> SampleGradient:
        reduced = reduce_to(product(d), n, shape)
        assert reduced is not None
        return DenseGradient(reduced)

    return finish


@rule("addmm")
def addmm(
    operand: Tensor, n: int, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Finish | None:
    """b + x @ W (Hugging Face's Conv1D: samples and positions flattened into rows)."""
    if beta != 1 or alpha != 1:
        return None
    if operand is mat2:
        return outer(n, mat1, tuple(mat2.shape), is_transposed=True)
    return broadcast_operand(n, operand, mat1) if operand is input else None


@rule("einsum")
def einsum(operand: Tensor, n: int, equation: str, *operands: Any) -> Finish | None:
    """Outer products where W's letters are [row, *columns] or [column, row]; else G_i by the same sum, D in W's place.

    The samples' letter is the output's first, and that of all data.
    """
    operands = tuple(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    if not isinstance(equation, str) or (parsed := parse_einsum(equation, operands)) is None:
        return None
    words, out, size = parsed
    position = next(i for i, tensor in enumerate(operands) if tensor is operand)
    mine, sample = words.pop(position), out[0]
    tensors = [*operands[:position], *operands[position + 1 :]]
    data = [(word, tensor) for word, tensor in zip(words, tensors, strict=True) if sample in word]
    if sample in mine or size[sample] != n or not data or any(word[0] != sample for word, _ in data):
        return None
    shape, inputs = tuple(operand.shape), words[0]
    rows = [letter for letter in mine if letter in out and letter not in inputs]
    columns = [letter for letter in mine if letter in inputs and letter not in out]
    positions = [letter for letter in inputs if letter not in mine]
    is_matrix = len(rows) == 1 and len(columns) == len(mine) - 1 > 0 and (mine[0] in rows or len(mine) == 2)
    if is_matrix and len(words) == 1 and set(positions + rows) == set(out):
        a = tensors[0].permute([inputs.index(letter) for letter in positions + columns])
        finish = outer(n, a.flatten(len(positions)), shape, is_transposed=mine[0] not in rows)
        order = [out.index(letter) for letter in positions + rows]
        return None if finish is None else lambda d: finish(d.permute(order))
    alone = "".join(letter for letter in mine if letter not in out and not any(letter in word for word in words))

    def dense(d: Tensor) -> SampleGradient:
        ones = d.new_ones([size[letter] for letter in alone])  # what W is summed over by itself
        return DenseGradient(torch.einsum(f"{','.join([out, *words, alone])}->{sample}{mine}", d, *tensors, ones))

    return dense


def parse_einsum(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str, dict[str, int]] | None:
    """Letters of each operand and of the output, "..." spelt out, and sizes; None for diagonals and broadcasts."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    words, free = left.split(","), [letter for letter in ascii_letters if letter not in equation]
    spans = [tensor.ndim - len(word.replace("...", "")) for word, tensor in zip(words, operands, strict=True)]
    words = [word.replace("...", "".join(free[:span][::-1])) for word, span in zip(words, spans, strict=True)]
    widest = "".join(free[: max(spans)][::-1])
    if not arrow:
        out = "..." + "".join(sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1))
    out = out.replace("...", widest)
    size: dict[str, int] = {}
    for word, tensor in zip(words, operands, strict=True):
        if len(set(word)) < len(word) or any(
            size.setdefault(letter, length) != length for letter, length in zip(word, tensor.shape, strict=True)
        ):
            return None
    return (words, out, size) if out else None


@rule("tensordot")
def tensordot(operand: Tensor, n: int, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Finish | None:
    """As the einsum that it is."""
    if isinstance(dims, int):
        dims = (range(a.ndim - dims, a.ndim), range(dims))
    if isinstance(dims, Tensor) or out is not None:
        return None
    left, right = ([dim % t.ndim for dim in given] for given, t in zip(dims, (a, b), strict=True))
    first = [chr(ord("a") + i) for i in range(a.ndim)]
    second = [chr(ord("A") + i) for i in range(b.ndim)]
    for i, j in zip(left, right, strict=True):
        second[j] = first[i]
    kept = [first[i] for i in range(a.ndim) if i not in left] + [second[j] for j in range(b.ndim) if j not in right]
    return einsum(operand, n, f"{''.join(first)},{''.join(second)}->{''.join(kept)}", a, b)


# -- convolutions --------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    operand: Tensor,
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Finish | None:
    """A linear map of each patch of the input: G = D A^T over patches; dense where that is smaller, or in groups."""
    kernel = tuple(weight.shape[2:])
    if input.ndim != weight.ndim or input.shape[0] % n:
        return None
    if operand is bias:
        return broadcast_operand(n, bias, input, shape=(len(bias), *(1 for _ in kernel)))
    if operand is not weight:
        return None
    shape, dims = tuple(weight.shape), len(kernel)

    def finish(d: Tensor) -> SampleGradient:
        positions, columns = math.prod(d.shape[2:]), math.prod(shape[1:])
        if groups == 1 and positions * (shape[0] + columns) < shape[0] * columns:
            a = patches(input, kernel, stride, padding, dilation).movedim(1, 1 + dims).flatten(1 + dims)
            result = outer(n, a, shape, is_transposed=False)
            assert result is not None
            return result(d.movedim(1, -1))
        # Where there are more positions than the weight has rows and columns, the gradients are smaller than patches.
        each, values = input.shape[0] // n, groups * columns * positions
        step = each * max(1, CHUNK // (each * values))
        parts = []
        for x, part in zip(input.split(step), d.split(step), strict=True):  # [N, C, *positions, *kernel]
            a = patches(x, kernel, stride, padding, dilation)
            a = a.reshape(-1, each, groups, shape[1], positions, math.prod(kernel))
            part = part.reshape(-1, each, groups, shape[0] // groups, positions)
            parts.append(torch.einsum("nrgos,nrgcsk->ngock", part, a))
        return DenseGradient(torch.cat(parts).reshape(n, *shape))

    return finish


def patches(input: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """What a kernel sees at each of its positions, [N, C, *positions, *kernel]: a view of the padded input."""

    def each(value: Any) -> tuple[int, ...]:
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * len(kernel) if len(value) == 1 else value

    spans = [step * (size - 1) for step, size in zip(each(dilation), kernel, strict=True)]
    if padding == "same":
        margins = [(span // 2, span - span // 2) for span in spans]
    else:
        margins = [(margin, margin) for margin in each(0 if padding == "valid" else padding)]
    input = F.pad(input, [margin for pair in reversed(margins) for margin in pair])
    for dim, (span, step, every) in enumerate(zip(spans, each(stride), each(dilation), strict=True)):
        input = input.unfold(2 + dim, span + 1, step)[..., ::every]
    return input


# -- lookups --------------------------------------------------


@rule("embedding")
def embedding(
    operand: Tensor,
    n: int,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Finish | None:
    """Row W[id] at every position: G = sum of e_id D^T. The row `padding_idx` is never trained, and gets none."""
    if operand is not weight or weight.ndim != 2 or max_norm is not None or scale_grad_by_freq or input.ndim == 0:
        return None
    finish = outer(n, input, tuple(weight.shape), is_transposed=True)
    if finish is None or padding_idx is None:
        return finish
    is_padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return lambda d: finish(d.masked_fill(is_padding.view(*d.shape[:-1], 1), 0))


@rule("__getitem__")
def getitem(operand: Tensor, n: int, input: Tensor, index: Any) -> Finish | None:
    """W[ids] with integers."""
    if operand is not input or not isinstance(index, Tensor) or index.dtype in (torch.bool, torch.uint8):
        return None
    return embedding(operand, n, index % len(input), input)


@rule("expand", "expand_as", "broadcast_to")
def expand(operand: Tensor, n: int, input: Tensor, *sizes: Any) -> Finish | None:
    """One copy for each sample (and perhaps more): the sum of D over the sample's own."""
    size = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    size = size.shape if isinstance(size, Tensor) else size
    shape = tuple(operand.shape)
    if not size or size[0] == -1 or size[0] % n or (len(size) == len(shape) and shape[0] != 1):
        return None

    def finish(d: Tensor) -> SampleGradient:
        reduced = reduce_to(d, n, shape)
        assert reduced is not None
        return DenseGradient(reduced)

    return finish


# -- norms: gains and biases of what they normalise --------------------------------------------------


@rule("layer_norm")
def layer_norm(
    operand: Tensor,
    n: int,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Finish | None:
    if operand is bias:
        return broadcast_operand(n, operand, input)
    if operand is not weight:
        return None
    return broadcast_operand(n, operand, input, lambda: F.layer_norm(input, normalized_shape, eps=eps))


@rule("rms_norm")
def rms_norm(
    operand: Tensor,
    n: int,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Finish | None:
    if operand is not weight:
        return None
    return broadcast_operand(n, operand, input, lambda: F.rms_norm(input, normalized_shape, eps=eps))


@rule("group_norm")
def group_norm(
    operand: Tensor,
    n: int,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Finish | None:
    if operand is not weight and operand is not bias:
        return None
    return channel_operand(n, operand, bias, input, lambda: F.group_norm(input, num_groups, eps=eps))


@rule("batch_norm")
def batch_norm(
    operand: Tensor,
    n: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Finish | None:
    """By running statistics only: those of the batch mix its samples."""
    if training or running_mean is None or (operand is not weight and operand is not bias):
        return None
    return channel_operand(
        n, operand, bias, input, lambda: F.batch_norm(input, running_mean, running_var, training=False, eps=eps)
    )


def channel_operand(
    n: int, operand: Tensor, bias: Tensor | None, input: Tensor, normalised: Callable[[], Tensor]
) -> Finish | None:
    """A gain or bias [C] of an input [N, C, ...]."""
    shape = (len(operand), *(1 for _ in input.shape[2:]))
    return broadcast_operand(n, operand, input, 1 if operand is bias else normalised, shape)


# -- elementwise --------------------------------------------------


@rule("add", "add_", "__radd__")
def add(operand: Tensor, n: int, input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Finish | None:
    if operand is other:
        return broadcast_operand(n, operand, input, alpha)
    return broadcast_operand(n, operand, other)


@rule("sub", "sub_", "subtract")
def sub(operand: Tensor, n: int, input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Finish | None:
    if operand is other:
        return broadcast_operand(n, operand, input, -alpha)
    return broadcast_operand(n, operand, other)


@rule("__rsub__", "rsub")
def rsub(operand: Tensor, n: int, input: Tensor, other: Tensor | float) -> Finish | None:
    return sub(operand, n, other, input)


@rule("mul", "multiply", "__rmul__")
def mul(operand: Tensor, n: int, input: Tensor, other: Any) -> Finish | None:
    sample = input if operand is other else other
    return broadcast_operand(n, operand, sample, lambda: sample)


@rule("div", "divide", "true_divide")
def div(operand: Tensor, n: int, input: Tensor, other: Any) -> Finish | None:
    if operand is other:
        return broadcast_operand(n, operand, input, lambda: -input / operand.detach().square())
    return broadcast_operand(n, operand, other, lambda: 1 / other)
