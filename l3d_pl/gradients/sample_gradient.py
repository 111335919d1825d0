"""Per-sample gradients of one parameter, in the form in which they are smallest.

A gradient of sample i with respect to a parameter is never needed by itself: only its inner products with subnetworks
(c = V_in g), with other samples, its norm, and weighted sums of samples. Two representations offer them:

- `DenseGradient`: the tensor [N, *shape]. Right for small parameters (biases, norms, toys).
- `OuterGradient`: a matrix G_i = sum_s D_is A_is^T, kept as its two sides. Right for weight matrices, where D (gradient
  at the operation's output) and A (its input) are far smaller than G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l3d_pl.tucker import Tucker


class SampleGradient:
    """Gradients of N samples with respect to one parameter of `shape`."""

    shape: tuple[int, ...]

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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class OuterGradient(SampleGradient):
    """G_i = sum_s D_is A_is^T for the matrix view (rows, columns) of a parameter.

    Attributes:
        outputs: D, gradient at the operation's output, [N, S, rows] (S: positions; 1 for a plain feature vector).
        inputs: A, the operation's input, [N, S, columns].
        shape: the parameter's shape; rows x columns values, in that order unless `is_transposed`.
        is_transposed: the parameter is stored as (columns, rows), as in x @ W.
    """

    outputs: Tensor
    inputs: Tensor
    shape: tuple[int, ...]
    is_transposed: bool = False

    @property
    def n_samples(self) -> int:
        return self.outputs.shape[0]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Left and right side: the parameter's gradient is sum_s left_s right_s^T."""
        return (self.inputs, self.outputs) if self.is_transposed else (self.outputs, self.inputs)

    def dense(self) -> Tensor:
        left, right = self.sides
        return (left.mT @ right).reshape(self.n_samples, *self.shape)

    def squared_norms(self) -> Tensor:
        left, right = self.sides
        if left.shape[1] == 1:
            return left.square().sum((1, 2)) * right.square().sum((1, 2))
        return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))  # "ghost norm": sum_ss' (D_s.D_s')(A_s.A_s')

    def coefficients(self, tucker: Tucker) -> Tensor:
        """sum_s D_s . (V_k A_s): both sides through the factor matrices first, so that only [N, S, n, R] exists."""
        if len(tucker.factors) != 2:
            return DenseGradient(self.dense()).coefficients(tucker)
        return self.contract(tucker)[0]

    def contract(self, tucker: Tucker) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """`coefficients` [N, n], and what `contract_backward` needs of the way there."""
        left, right = self.sides
        u_left, u_right = tucker.factors  # [n, rows, R1], [n, columns, R2]
        a = torch.einsum("bsi,kiq->bskq", right, u_right)
        b = torch.einsum("bso,kop->bskp", left, u_left)
        pushed = torch.einsum("bskq,kpq->bskp", a, tucker.core)
        return (pushed * b).sum((1, 3)), (a, b, pushed)

    def contract_backward(self, tucker: Tucker, saved: tuple[Tensor, Tensor, Tensor], d: Tensor) -> list[Tensor]:
        """Gradients of <d, coefficients> ([N, n] each) with respect to the core and the two factors."""
        left, right = self.sides
        a, b, pushed = saved
        d = d[:, None, :, None]
        d_pushed = d * b
        d_core = torch.einsum("bskp,bskq->kpq", d_pushed, a)
        d_left = torch.einsum("bso,bskp->kop", left, d * pushed)
        d_right = torch.einsum("bsi,bskq->kiq", right, torch.einsum("bskp,kpq->bskq", d_pushed, tucker.core))
        return [d_core, d_left, d_right]

    def coefficient_cost(self, ranks: Sequence[int]) -> int:
        """Multiplications per subnetwork of `coefficients`."""
        left, right = self.sides
        samples = left.shape[0] * left.shape[1]
        return samples * (left.shape[2] * ranks[0] + right.shape[2] * ranks[1] + math.prod(ranks))

    def gram(self) -> Tensor:
        left, right = self.sides
        n, s = left.shape[:2]
        left, right = left.reshape(n * s, -1), right.reshape(n * s, -1)
        products = (left @ left.mT) * (right @ right.mT)
        return products.reshape(n, s, n, s).sum((1, 3)) if s > 1 else products

    def combine(self, weights: Tensor) -> Tensor:
        left, right = self.sides
        weighted = torch.einsum("mn,nso->mnso", weights, left).flatten(1, 2)  # [m, N * S, rows]
        return (weighted.mT @ right.flatten(0, 1)).reshape(-1, *self.shape)

    def select(self, index: Tensor) -> OuterGradient:
        return replace(self, outputs=self.outputs[index], inputs=self.inputs[index])

    def transposed(self) -> OuterGradient:
        return replace(self, shape=self.shape[::-1], is_transposed=not self.is_transposed)

    def to(self, dtype: torch.dtype) -> OuterGradient:
        return replace(self, outputs=self.outputs.to(dtype), inputs=self.inputs.to(dtype))


def add(first: SampleGradient, second: SampleGradient) -> SampleGradient:
    """Gradient of a parameter that is used twice: contributions add up (outer products by joining their positions)."""
    if isinstance(first, OuterGradient) and isinstance(second, OuterGradient) and first.shape == second.shape:
        if first.is_transposed == second.is_transposed:
            sides = (second.outputs, second.inputs)
        else:  # D A^T + A' D'^T: the other use's sides change places
            sides = (second.inputs, second.outputs)
        outputs, inputs = torch.cat([first.outputs, sides[0]], 1), torch.cat([first.inputs, sides[1]], 1)
        return replace(first, outputs=outputs, inputs=inputs)
    return DenseGradient(first.dense() + second.dense())


def concatenate(parts: Sequence[SampleGradient]) -> SampleGradient:
    """The samples of all `parts`, in order (gradients of one parameter from several batches)."""
    outers = [part for part in parts if isinstance(part, OuterGradient)]
    if len(outers) == len(parts) and len({part.inputs.shape[1] for part in outers}) == 1:  # as many positions in each
        outputs, inputs = torch.cat([part.outputs for part in outers]), torch.cat([part.inputs for part in outers])
        return replace(outers[0], outputs=outputs, inputs=inputs)
    return DenseGradient(torch.cat([part.dense() for part in parts]))
