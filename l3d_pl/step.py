"""The training step's loss and its gradients, by hand: the hot path.

`decompose` computes c = V_in g, batch top-k, the reconstruction loss L, and in the same pass dL/dV_in and dL/dV_out;
the autograd node only hands them on. With E = sum_i ‖g_i‖², codes = mask * c and the dense block's residual r = g -
V_out codes:

    dL/dcodes = 2/E (codes M - p) - 2/E r V_out      over factored and dense parameters
    dL/dV_out = -2/E codes^T r  (dense);   through dp = -2/E codes and dM = 1/E codes^T codes  (factored)
    dL/dV_in  = (mask * dL/dcodes)^T g

`Subnetworks.reconstruct` is the same loss on autograd's own graph; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3d_pl.batch_topk import batch_topk
from l3d_pl.gradients import OuterGradient
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.subnetworks import Prepared, Subnetworks
from l3d_pl.tucker import Matrices, Tucker, flatten, multiply_out, multiply_out_backward, unflatten


class Step(NamedTuple):
    """One step: `loss` [R] (differentiable), `coefficients` and `mask` [N, R, n_v], batch top-k's `threshold` [R]."""

    loss: Tensor
    coefficients: Tensor
    mask: Tensor
    threshold: Tensor

    @property
    def codes(self) -> Tensor:
        """The coefficients that took part, [N, R, n_v]."""
        return self.coefficients * self.mask


def decompose(subnetworks: Subnetworks, prepared: Prepared, k: float, ranks: Ranks = ALONE) -> Step:
    """c = V_in g, the fraction k of the largest |c|, and L (paper, training step 4).

    With several `ranks` the batch is that of all of them. Each gets the loss of its own samples over everybody's energy
    times the number of ranks: the mean of these losses, and of their gradients, is that of one process with all.
    """
    names = prepared.names
    tuckers_in, tuckers_out = subnetworks.v_in.tuckers(), subnetworks.v_out.tuckers()
    flat = flatten([tuckers_in[name] for name in names]) + flatten([tuckers_out[name] for name in names])
    modes = [len(subnetworks.shapes[name]) for name in names]
    sizes = subnetworks.restarts, subnetworks.own_dense, subnetworks.chunk
    return Step(*_Step.apply(prepared, k, ranks, *sizes, modes, *flat))


class Side:
    """V_in or V_out against a batch: coefficients and their way back."""

    def __init__(self, prepared: Prepared, tuckers: list[Tucker], chunk: int):
        self.prepared, self.n_dense, self.chunk = prepared, len(prepared.sizes), chunk
        self.dense, self.factored = tuckers[: self.n_dense], tuckers[self.n_dense :]
        self.block: Tensor | None = None
        self.lefts: list[Tensor] = []
        if self.dense:
            self.block, self.lefts = multiply_out(self.dense)
        self.gradients: list[OuterGradient] = list(prepared.factored.values())  # type: ignore[arg-type]
        self.matrices = [tucker.matrices() for tucker in self.factored]
        self.saved: list[list[Tensor]] = []

    def contract(self) -> Tensor | None:
        """Coefficients on the factored parameters, [N, n]."""
        total = None
        for gradient, matrices in zip(self.gradients, self.matrices, strict=True):
            part, saved = gradient.contract(matrices, self.chunk)
            self.saved.append(saved)
            total = part if total is None else total + part
        return total

    def backward(
        self, d_block: Tensor | None, d_coefficients: Tensor, more: Sequence[Matrices] | None = None
    ) -> list[Tensor]:
        """Gradients of every (core, *factors), from those at the block [n, w] and the factored coefficients [N, n].

        Args:
            more: further gradients at the factored parameters' matrices.
        """
        result = [] if d_block is None else multiply_out_backward(self.dense, self.lefts, d_block)
        for i, (gradient, tucker) in enumerate(zip(self.gradients, self.factored, strict=True)):
            d = gradient.contract_backward(self.matrices[i], self.saved[i], d_coefficients, self.chunk)
            if more is not None:
                d = Matrices(more[i].left + d.left, more[i].right + d.right)
            result += tucker.matrices_backward(d)
        return result


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepared: Prepared,
        k: float,
        ranks: Ranks,
        restarts: int,
        n_dense: int,
        chunk: int,
        modes: list[int],
        *flat: Tensor,
    ) -> Any:
        with torch.autocast(flat[0].device.type, enabled=False):
            half, samples = len(flat) // 2, prepared.n_samples
            side_in = Side(prepared, unflatten(modes, flat[:half]), chunk)
            side_out = Side(prepared, unflatten(modes, flat[half:]), chunk)
            total = float(prepared.energy)
            energy = max(float(ranks.sum(prepared.energy)), torch.finfo(torch.float32).tiny) / ranks.size
            scale = 2 / energy

            c = side_in.contract()
            if prepared.block is not None:
                assert side_in.block is not None
                v_in = side_in.block.mT
                c = torch.mm(prepared.block, v_in) if c is None else torch.addmm(c, prepared.block, v_in)
            assert c is not None  # every parameter is in the block or factored
            c = c.view(samples, restarts, -1)
            mask, threshold = batch_topk(c, k, ranks, n_dense)
            by_restart = (c * mask).transpose(0, 1)  # codes, [R, N, n_v]

            error: Tensor | float = 0.0
            d_codes, d_out_block, d_grams = None, None, None
            if prepared.block is not None:
                assert side_out.block is not None
                rows = side_out.block.view(restarts, -1, side_out.block.shape[1])
                residual = torch.baddbmm(prepared.block.expand(restarts, -1, -1), by_restart, rows, alpha=-1)
                error = torch.linalg.vector_norm(residual, dim=(1, 2)).double().square_()
                residual.mul_(-scale)
                d_codes = residual @ rows.mT
                d_out_block = (by_restart.mT @ residual).flatten(0, 1)
            p = side_out.contract()
            if p is not None:
                p = p.view(samples, restarts, -1).transpose(0, 1)
                # L is quadratic in V_out: the way back from codes M depends on nothing that comes after it.
                parts, d_grams = zip(
                    *(matrices.push_codes(by_restart, scale, chunk) for matrices in side_out.matrices), strict=True
                )
                pushed = torch.stack(parts).sum(0)
                factored_energy = (
                    total if prepared.block is None else total - float(prepared.block.square().sum(dtype=torch.float64))
                )
                # Summed in float64: a small difference of large numbers.
                error = error + factored_energy + (by_restart.double() * (pushed.double() - 2 * p.double())).sum((1, 2))
                d = (pushed - p).mul_(scale)
                d_codes = d if d_codes is None else d_codes + d

            d_c = (d_codes.transpose(0, 1) * mask).flatten(1)  # type: ignore[union-attr]
            gradients = side_in.backward(d_c.mT @ prepared.block if prepared.block is not None else None, d_c)
            d_p = by_restart.transpose(0, 1).flatten(1) * -scale if d_grams else by_restart
            ctx.gradients = gradients + side_out.backward(d_out_block, d_p, d_grams)
            ctx.mark_non_differentiable(c, mask, threshold)
            return (error / energy).to(c), c, mask, threshold  # type: ignore[union-attr]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if d_loss.is_cuda or bool((d_loss != 1).any()):
            per_subnetwork = d_loss.repeat_interleave(gradients[0].shape[0] // d_loss.shape[0])
            for gradient in gradients:  # in place: there may be no room for another copy
                gradient.mul_(per_subnetwork.view(-1, *[1] * (gradient.ndim - 1)))
        return *[None] * 7, *gradients
