"""Per-sample gradients of one parameter, in the form in which they are smallest.

A gradient of sample i with respect to a parameter is never needed by itself: only its inner products with subnetworks
(c = V_in g), with other samples, its norm, and weighted sums of samples. Two representations offer them:

- `DenseGradient`: the tensor [N, *shape]. Right for small parameters (biases, norms, toys).
- `OuterGradient`: a matrix G_i = sum_s D_is A_s^T, kept as its two sides. Right for weight matrices, where D (gradient
  at the operation's output) and A (its input) are far smaller than G. Token samples of one sequence share their A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from l3d_pl.tucker import CHUNK, Matrices, Tucker


class SampleGradient:
    """Gradients of N samples with respect to one parameter of `shape`."""

    shape: tuple[int, ...]

    def __repr__(self) -> str:
        """Sizes, no tensors: `DenseGradient(32 samples of [4, 5])`."""
        return f"{type(self).__name__}({self.n_samples} samples of {list(self.shape)})"

    @property
    def n_samples(self) -> int:
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The gradients themselves, [N, *shape]."""
        raise NotImplementedError

    def squared_norms(self) -> Tensor:
        """‖g_i‖², [N]."""
        raise NotImplementedError

    def coefficients(self, tucker: Tucker) -> Tensor:
        """<g_i, v_k> of every sample with every subnetwork, [N, n]."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """<g_i, g_j> of all pairs of samples, [N, N]."""
        raise NotImplementedError

    def combine(self, weights: Tensor) -> Tensor:
        """Weighted sums of samples, `weights` [m, N] -> [m, *shape]."""
        raise NotImplementedError

    def select(self, index: Tensor) -> SampleGradient:
        """The gradients of the samples at `index` [M] (integers)."""
        raise NotImplementedError

    def transposed(self) -> SampleGradient:
        """The same gradients for the transposed matrix."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> SampleGradient:
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class DenseGradient(SampleGradient):
    """`values` [N, *shape]."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.values.shape[1:])

    @property
    def n_samples(self) -> int:
        return self.values.shape[0]

    def dense(self) -> Tensor:
        return self.values

    def squared_norms(self) -> Tensor:
        return self.values.reshape(self.n_samples, -1).square().sum(1)

    def coefficients(self, tucker: Tucker) -> Tensor:
        return self.values.reshape(self.n_samples, -1) @ tucker.dense().reshape(tucker.n, -1).mT

    def gram(self) -> Tensor:
        flat = self.values.reshape(self.n_samples, -1)
        return flat @ flat.mT

    def combine(self, weights: Tensor) -> Tensor:
        return (weights @ self.values.reshape(self.n_samples, -1)).reshape(-1, *self.shape)

    def select(self, index: Tensor) -> DenseGradient:
        return DenseGradient(self.values[index])

    def transposed(self) -> DenseGradient:
        return DenseGradient(self.values.mT)

    def to(self, dtype: torch.dtype) -> DenseGradient:
        return DenseGradient(self.values.to(dtype))


@dataclass(frozen=True, repr=False)
class OuterGradient(SampleGradient):
    """G_i = sum_s D_is A_s^T for the matrix view of a parameter: rows are its first mode, columns all the others.

    Samples come in B groups of T that share their inputs: the T token samples of a sequence. T is 1 where a sample is
    an item of its own. Sample (b, t) is number b * T + t.

    Attributes:
        outputs: D, gradient at the operation's output, [B, T, S, rows] (S: positions; 1 for a plain feature vector).
        inputs: A, the operation's input, [B, S, columns]; or integers [B, S], for rows of the identity (an embedding).
        shape: the parameter's shape; rows x columns values, in that order unless `is_transposed`.
        is_transposed: the parameter is a matrix stored as (columns, rows), as in x @ W.
        index: the samples that count among the B * T, [N]; None: all of them.
    """

    outputs: Tensor
    inputs: Tensor
    shape: tuple[int, ...]
    is_transposed: bool = False
    index: Tensor | None = None

    @property
    def n_samples(self) -> int:
        return self.outputs.shape[0] * self.outputs.shape[1] if self.index is None else len(self.index)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, T, S, rows, columns."""
        rows = self.outputs.shape[3]
        return *self.outputs.shape[:3], rows, math.prod(self.shape) // rows

    @property
    def is_one_hot(self) -> bool:
        return not self.inputs.is_floating_point()

    def _inputs(self) -> Tensor:
        """A as numbers, [B, S, columns]."""
        return one_hot(self.inputs, self.sizes[4]).to(self.outputs) if self.is_one_hot else self.inputs

    def _pick(self, values: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = values.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def _spread(self, values: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...]; the inverse, with zeros for the samples that do not count."""
        b, t = self.outputs.shape[:2]
        if self.index is not None:
            values = values.new_zeros(b * t, *values.shape[1:]).index_copy(0, self.index, values)
        return values.reshape(b, t, *values.shape[1:])

    def _rows(self, part: slice = slice(None)) -> Tensor:
        """These rows of every G, [N, rows, columns]."""
        return self._pick(self.outputs[..., part].mT @ self._inputs().unsqueeze(1))

    def dense(self) -> Tensor:
        g = self._rows()
        return (g.mT if self.is_transposed else g).reshape(self.n_samples, *self.shape)

    def squared_norms(self) -> Tensor:
        b, t, s, rows, columns = self.sizes
        if s == 1:
            norms = 1 if self.is_one_hot else self.inputs.square().sum((1, 2)).unsqueeze(1)
            return self._pick(self.outputs.square().sum((2, 3)) * norms)
        if s * (rows + columns / t) < rows * columns:  # "ghost norm": sum_ss' (D_s.D_s')(A_s.A_s')
            chunk = max(1, CHUNK // (t * s * s))
            parts = [
                ((d @ d.mT) * _products(a).unsqueeze(1)).sum((2, 3))
                for d, a in zip(self.outputs.split(chunk), self.inputs.split(chunk), strict=True)
            ]
            return self._pick(torch.cat(parts))
        block = max(1, CHUNK // (b * t * columns))
        return sum(self._rows(slice(i, i + block)).square().sum((1, 2)) for i in range(0, rows, block))  # type: ignore[return-value]

    def coefficients(self, tucker: Tucker) -> Tensor:
        return self.contract(tucker.matrices())[0]

    def contract(self, matrices: Matrices, chunk: int = CHUNK) -> tuple[Tensor, list[Tensor]]:
        """<g_i, v_k> = sum_s D_is . (V_k A_s), [N, n], and what `contract_backward` needs of the way there.

        With one sample per group both sides go through the factors, and only [n, R, B * S] exists. Where samples share
        their inputs, V_k A_s is formed once for all of them. Both happen for so many subnetworks at a time that an
        intermediate result has `chunk` values at most.
        """
        b, t, s, rows, _ = self.sizes
        out_side, in_side = self._oriented(matrices)  # [n, rows, R], [n, R, columns]
        n, rank = in_side.shape[:2]
        parts, saved = [], []
        if t == 1:
            for part in (slices := _slices(n, 2 * b * s * rank, chunk)):
                saved = [self._inputs_through(in_side[part]), self._outputs_through(out_side[part])]
                parts.append((saved[0] * saved[1]).sum(1).view(-1, b, s).sum(2))
            return self._pick(torch.cat(parts).mT.unsqueeze(1)), saved if len(slices) == 1 else []
        outputs, a = self.outputs.reshape(b, t, s * rows), self._inputs_through(in_side)
        for part in _slices(n, b * s * rows, chunk):
            pushed = torch.bmm(a[part].mT, out_side[part].mT)  # V_k A_s, [n, B * S, rows]
            parts.append(torch.bmm(outputs, pushed.view(-1, b, s * rows).permute(1, 2, 0)))
        return self._pick(torch.cat(parts, 2)), [a]

    def contract_backward(self, matrices: Matrices, saved: list[Tensor], d: Tensor, chunk: int = CHUNK) -> Matrices:
        """Gradients of <d, coefficients> ([N, n] each) with respect to the two matrices."""
        b, t, s, rows, _ = self.sizes
        out_side, in_side = self._oriented(matrices)
        n, rank = in_side.shape[:2]
        d = self._spread(d)  # [B, T, n]
        d_out = out_side.new_empty(n, rank, rows)
        if t == 1:
            d_in = torch.empty_like(in_side)
            for part in _slices(n, 2 * b * s * rank, chunk):
                a, c = saved or (self._inputs_through(in_side[part]), self._outputs_through(out_side[part]))
                weights = d[:, 0, part].mT.repeat_interleave(s, 1).unsqueeze(1)  # [n, 1, B * S]
                d_out[part] = ((weights * a).flatten(0, 1) @ self.outputs.reshape(b * s, rows)).view(-1, rank, rows)
                d_in[part] = self._back_to_inputs(weights * c)
        else:
            outputs, a = self.outputs.reshape(b, t, s * rows), saved[0]
            d_a = torch.empty_like(a)
            for part in _slices(n, b * s * rows, chunk):
                weights = d[:, :, part].mT
                d_pushed = a.new_empty(weights.shape[1], b, s * rows)
                torch.bmm(weights, outputs, out=d_pushed.transpose(0, 1))
                d_pushed = d_pushed.view(-1, b * s, rows)
                torch.bmm(out_side[part].mT, d_pushed.mT, out=d_a[part])
                torch.bmm(a[part], d_pushed, out=d_out[part])
            d_in = self._back_to_inputs(d_a)
        return Matrices(d_in.mT, d_out) if self.is_transposed else Matrices(d_out.mT, d_in)

    def _inputs_through(self, in_side: Tensor) -> Tensor:
        """A through [n, R, columns]: [n, R, B * S]."""
        if self.is_one_hot:
            return in_side[:, :, self.inputs.flatten()]
        n, rank, columns = in_side.shape
        return (in_side.reshape(n * rank, columns) @ self.inputs.reshape(-1, columns).mT).view(n, rank, -1)

    def _outputs_through(self, out_side: Tensor) -> Tensor:
        """D, of one sample per group, through [n, rows, R]: [n, R, B * S]."""
        n, rows, rank = out_side.shape
        return (out_side.mT.reshape(n * rank, rows) @ self.outputs.reshape(-1, rows).mT).view(n, rank, -1)

    def _back_to_inputs(self, d_a: Tensor) -> Tensor:
        """The gradient at in_side [n, R, columns] from that at `_inputs_through`'s result [n, R, B * S]."""
        n, rank, _ = d_a.shape
        columns = self.sizes[4]
        if self.is_one_hot:
            return d_a.new_zeros(n, rank, columns).index_add_(2, self.inputs.flatten(), d_a)
        return (d_a.flatten(0, 1) @ self.inputs.reshape(-1, columns)).view(n, rank, columns)

    def _oriented(self, matrices: Matrices) -> tuple[Tensor, Tensor]:
        """The matrices as out_side [n, rows, R] and in_side [n, R, columns] of this gradient's own view."""
        return (matrices.right.mT, matrices.left.mT) if self.is_transposed else matrices

    def contraction_cost(self, rank: int) -> int:
        """Multiplications per subnetwork of `contract` and `contract_backward` together."""
        b, t, s, rows, columns = self.sizes
        per_position = rank * ((0 if self.is_one_hot else 2 * columns) + (2 if t == 1 else 3) * rows)
        return b * s * (per_position + (0 if t == 1 else 2 * t * rows))

    def gram(self) -> Tensor:
        b, t, s, rows, columns = self.sizes
        if t == 1 and s * s * (rows + columns) <= rows * columns and (b * s) ** 2 <= CHUNK:
            d = self.outputs.reshape(b * s, rows)
            a = self.inputs.reshape(1, b * s, *self.inputs.shape[2:])
            products = ((d @ d.mT) * _products(a)[0]).view(b, s, b, s)
            products = products.sum((1, 3)) if s > 1 else products[:, 0, :, 0]
            return products if self.index is None else products[self.index][:, self.index]
        total = self.outputs.new_zeros(self.n_samples, self.n_samples)
        block = max(1, CHUNK // (b * t * columns))
        for i in range(0, rows, block):
            g = self._rows(slice(i, i + block)).flatten(1)
            total.addmm_(g, g.mT)
        return total

    def combine(self, weights: Tensor) -> Tensor:
        b, t, s, rows, columns = self.sizes
        spread = self._spread(weights.mT)  # [B, T, m]
        d = torch.bmm(spread.mT, self.outputs.reshape(b, t, s * rows)).view(b, -1, s, rows)
        d = d.permute(1, 3, 0, 2).reshape(-1, rows, b * s)  # [m, rows, B * S]
        if self.is_one_hot:
            g = d.new_zeros(*d.shape[:2], columns).index_add_(2, self.inputs.flatten(), d)
        else:
            g = d @ self.inputs.reshape(b * s, columns)
        return (g.mT if self.is_transposed else g).reshape(-1, *self.shape)

    def select(self, index: Tensor) -> OuterGradient:
        index = index.to(self.outputs.device)
        index = index if self.index is None else self.index[index]
        t = self.outputs.shape[1]
        if t == 1:
            return replace(self, outputs=self.outputs[index], inputs=self.inputs[index], index=None)
        groups, place = (index // t).unique(return_inverse=True)  # groups without a sample are left out
        return replace(self, outputs=self.outputs[groups], inputs=self.inputs[groups], index=place * t + index % t)

    def ungrouped(self) -> OuterGradient:
        """The same samples in groups of one, each with its own copy of the inputs."""
        t = self.outputs.shape[1]
        if t == 1:
            return self
        outputs = self._pick(self.outputs).unsqueeze(1)
        return replace(
            self,
            outputs=outputs,
            inputs=self._pick(self.inputs.repeat_interleave(t, 0).unflatten(0, (-1, t))),
            index=None,
        )

    def transposed(self) -> OuterGradient:
        return replace(self, shape=self.shape[::-1], is_transposed=not self.is_transposed)

    def to(self, dtype: torch.dtype) -> OuterGradient:
        inputs = self.inputs if self.is_one_hot else self.inputs.to(dtype)
        return replace(self, outputs=self.outputs.to(dtype), inputs=inputs)


def wide(tensor: Tensor) -> Tensor:
    """Half precision as float32, in which everything after the frozen model is computed."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _products(inputs: Tensor) -> Tensor:
    """A_s . A_s' within each group, [B, S, S]."""
    if inputs.is_floating_point():
        return inputs @ inputs.mT
    return (inputs.unsqueeze(2) == inputs.unsqueeze(1)).float()


def _slices(n: int, size: int, chunk: int) -> list[slice]:
    """0 ... n in slices whose members, of `size` values each, have at most `chunk` values together."""
    step = max(1, chunk // size)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def add(first: SampleGradient, second: SampleGradient) -> SampleGradient:
    """Gradient of a parameter that is used twice: contributions add up (outer products by joining their positions)."""
    if not isinstance(first, OuterGradient) or not isinstance(second, OuterGradient):
        return DenseGradient(first.dense() + second.dense())
    is_swapped = first.is_transposed != second.is_transposed  # D A^T + A' D'^T: one has to change its sides
    if first.is_one_hot != second.is_one_hot or (is_swapped and second.is_one_hot):  # sides that cannot be joined
        return DenseGradient(first.dense() + second.dense())
    if is_swapped or first.outputs.shape[1] != second.outputs.shape[1]:  # groups share inputs, and these need not
        first, second = first.ungrouped(), second.ungrouped()
    outputs, inputs = second.outputs, second.inputs
    if is_swapped:
        outputs, inputs = inputs.unsqueeze(1), outputs.squeeze(1)
    return replace(first, outputs=torch.cat([first.outputs, outputs], 2), inputs=torch.cat([first.inputs, inputs], 1))


def stack(parts: Sequence[SampleGradient]) -> SampleGradient:
    """T samples for each group, from T gradients with one sample per group each (the tokens of the same sequences)."""
    outers = [part for part in parts if isinstance(part, OuterGradient)]
    if len(outers) < len(parts):
        return DenseGradient(torch.stack([part.dense() for part in parts], 1).flatten(0, 1))
    first = outers[0]
    if all(part.inputs.data_ptr() == first.inputs.data_ptr() or part.inputs.equal(first.inputs) for part in outers):
        return replace(first, outputs=torch.cat([part.outputs for part in outers], 1))
    outputs = torch.stack([part.outputs for part in outers], 1).flatten(0, 1)
    return replace(first, outputs=outputs, inputs=torch.stack([part.inputs for part in outers], 1).flatten(0, 1))


def concatenate(parts: Sequence[SampleGradient]) -> SampleGradient:
    """The samples of all `parts`, in order (gradients of one parameter from several batches)."""
    outers = [part for part in parts if isinstance(part, OuterGradient)]
    if len(outers) < len(parts):
        return DenseGradient(torch.cat([part.dense() for part in parts]))
    t, s = (max(part.outputs.shape[dim] for part in outers) for dim in (1, 2))
    outputs, inputs, index, start = [], [], [], 0
    for part in outers:
        b, own_t, own_s = part.outputs.shape[:3]
        outputs.append(pad(part.outputs, (0, 0, 0, s - own_s, 0, t - own_t)))
        inputs.append(pad(part.inputs, (0, s - own_s) if part.is_one_hot else (0, 0, 0, s - own_s)))
        counted = torch.arange(b * own_t, device=part.outputs.device) if part.index is None else part.index
        index.append(start + counted // own_t * t + counted % own_t)
        start += b * t
    joined = torch.cat(index)
    is_full = len(joined) == start and all(part.index is None for part in outers)
    return replace(outers[0], outputs=torch.cat(outputs), inputs=torch.cat(inputs), index=None if is_full else joined)
