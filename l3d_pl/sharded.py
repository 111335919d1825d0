"""The training step with V_in and V_out sharded by subnetwork: each rank of a group owns some of them.

The ranks of a group have samples of their own, and share the gradients of all: D and A travel once, nothing is
computed twice. Coefficients of the own subnetworks are local; batch top-k's threshold is that of all ranks. What joins
the shards is M = V_out^T V_out: with codes c_j of shard j, rank r needs

    (codes M)_r = sum_j c_j <V_j, V_r>        dL/dV_r = 2/E (sum_j (c_r^T c_j) V_j - c_r^T g)

so V_out's shards travel round the group in a ring, one at a time, and each rank adds its part as they pass. No rank
ever holds all of V_out, and neither unit norms nor the optimizer need anything from the others.

Bytes that a rank sends per step: N - 1 shards of V_out as two matrices for each parameter (`payload`), its share of D
and A to N - 1 others, and its codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from l3d_pl.batch_topk import batch_topk
from l3d_pl.gradients import DenseGradient, OuterGradient, SampleGradient, concatenate
from l3d_pl.parallel import Ranks
from l3d_pl.step import Side, Step
from l3d_pl.subnetworks import Prepared, Subnetworks
from l3d_pl.tucker import Matrices, flatten, unflatten


def shard_of(n_subnetworks: int, rank: int, size: int) -> slice:
    """The subnetworks that a rank of a group owns; sizes differ by one at most."""
    return slice(n_subnetworks * rank // size, n_subnetworks * (rank + 1) // size)


def share_gradients(gradients: Mapping[str, SampleGradient], group: Ranks) -> dict[str, SampleGradient]:
    """The gradients of all the group's samples, in the order of its ranks."""
    if group.size == 1:
        return dict(gradients)
    parts: dict[str, list[SampleGradient]] = {}
    for name, gradient in gradients.items():
        if isinstance(gradient, OuterGradient):
            outputs, inputs = all_gather(gradient.outputs, group), all_gather(gradient.inputs, group)
            indices = group.gather(None if gradient.index is None else gradient.index.cpu())
            parts[name] = [
                OuterGradient(d, a, gradient.shape, gradient.is_transposed, None if i is None else i.to(d.device))
                for d, a, i in zip(outputs, inputs, indices, strict=True)
            ]
        else:
            parts[name] = [DenseGradient(values) for values in all_gather(gradient.dense(), group)]
    return {name: concatenate(part) for name, part in parts.items()}


def all_gather(tensor: Tensor, group: Ranks) -> list[Tensor]:
    """Every rank's tensor; their sizes may differ, not their number of dimensions."""
    if group.size == 1:
        return [tensor]
    own = torch.tensor(tensor.shape, device=tensor.device)
    shapes = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(shapes, own, group=group.group)
    largest = torch.stack(shapes).amax(0).tolist()
    padded = tensor.new_zeros(largest)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    found = [torch.empty_like(padded) for _ in range(group.size)]
    dist.all_gather(found, padded, group=group.group)
    return [whole[tuple(slice(0, int(size)) for size in shape)] for whole, shape in zip(found, shapes, strict=True)]


def decompose_sharded(
    subnetworks: Subnetworks, prepared: Prepared, k: float, n_subnetworks: int, group: Ranks, ranks: Ranks
) -> Step:
    """`step.decompose` for one shard of the subnetworks.

    Args:
        subnetworks: those that this rank owns, `shard_of(n_subnetworks, ...)`; one restart.
        prepared: the gradients of all the group's samples (see `share_gradients`).
        n_subnetworks: n_v, of all shards together.
        group: the ranks that share these samples, each with another shard.
        ranks: all ranks of the run; other groups have other samples, and the same shards.

    Returns:
        the step, its `coefficients` and `mask` those of the own subnetworks. Its `loss` is the group's over the energy
        of all samples times the number of groups: the mean over groups is that of one process, and so for gradients.
    """
    tuckers_in, tuckers_out = subnetworks.v_in.tuckers(), subnetworks.v_out.tuckers()
    names = prepared.names
    flat = flatten([tuckers_in[name] for name in names]) + flatten([tuckers_out[name] for name in names])
    modes = [len(subnetworks.shapes[name]) for name in names]
    return Step(*_ShardedStep.apply(prepared, k, n_subnetworks, group, ranks, subnetworks.chunk, modes, *flat))


def payload(side: Side) -> list[Tensor]:
    """What travels of a shard of V_out: the dense block, and the two matrices of each factored parameter."""
    parts = [] if side.block is None else [side.block]
    return parts + [part for matrices in side.matrices for part in matrices]


def ring(parts: list[Tensor], n_subnetworks: int, group: Ranks) -> Iterator[tuple[int, list[Tensor]]]:
    """Shard after shard of V_out as it passes: (its owner, its `payload`), the own one first."""
    if group.size == 1:
        yield 0, parts
        return
    shapes, buffer = [part.shape[1:] for part in parts], torch.cat([part.flatten() for part in parts])
    per_subnetwork = [shape.numel() for shape in shapes]
    owner = group.rank
    ahead, behind = (dist.get_global_rank(group.group, (group.rank + step) % group.size) for step in (1, -1))
    for hop in range(group.size):
        span = shard_of(n_subnetworks, owner, group.size)
        n = span.stop - span.start
        split = buffer.split([n * size for size in per_subnetwork])
        yield owner, [part.view(n, *shape) for part, shape in zip(split, shapes, strict=True)]
        if hop == group.size - 1:
            return
        owner = (owner - 1) % group.size
        span = shard_of(n_subnetworks, owner, group.size)
        incoming = buffer.new_empty((span.stop - span.start) * sum(per_subnetwork))
        sends = [
            dist.P2POp(dist.isend, buffer, ahead, group.group),
            dist.P2POp(dist.irecv, incoming, behind, group.group),
        ]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
        buffer = incoming


class _ShardedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepared: Prepared,
        k: float,
        n_subnetworks: int,
        group: Ranks,
        ranks: Ranks,
        chunk: int,
        modes: list[int],
        *flat: Tensor,
    ) -> Any:
        with torch.autocast(flat[0].device.type, enabled=False):
            half = len(flat) // 2
            side_in = Side(prepared, unflatten(modes, flat[:half]), chunk)
            side_out = Side(prepared, unflatten(modes, flat[half:]), chunk)
            total = float(prepared.energy)  # of the group; each of its ranks counts it once
            energy = max(float(ranks.sum(prepared.energy)), torch.finfo(torch.float32).tiny) / ranks.size
            scale = 2 / energy
            c = _contract(side_in)
            mask, threshold = batch_topk(c.unsqueeze(1), k, ranks)
            codes = c * mask.squeeze(1)
            all_codes = all_gather(codes, group)
            p = _contract(side_out)

            pushed = torch.zeros_like(codes)  # codes M, the own columns
            d_block = None if side_out.block is None else torch.zeros_like(side_out.block)
            d_matrices = [Matrices(*(torch.zeros_like(part) for part in matrices)) for matrices in side_out.matrices]
            for owner, parts in ring(payload(side_out), n_subnetworks, group):
                weights = (codes.mT @ all_codes[owner]) * scale
                gram = torch.zeros_like(weights)  # <own, theirs>
                if side_out.block is not None and d_block is not None:
                    theirs = parts.pop(0)
                    gram.addmm_(side_out.block, theirs.mT)
                    d_block.addmm_(weights, theirs)
                for matrices, d in zip(side_out.matrices, d_matrices, strict=True):
                    matrices.add_products(Matrices(parts.pop(0), parts.pop(0)), weights, gram, d, chunk)
                pushed.addmm_(all_codes[owner], gram.mT)

            # Summed in float64: a small difference of large numbers.
            error = total + group.sum((codes.double() * (pushed.double() - 2 * p.double())).sum())
            d_c = (pushed - p).mul_(scale) * mask.squeeze(1)
            gradients = side_in.backward(d_c.mT @ prepared.block if prepared.block is not None else None, d_c)
            d_p = codes * -scale
            if d_block is not None and prepared.block is not None:
                d_block.addmm_(d_p.mT, prepared.block)
            ctx.gradients = gradients + side_out.backward(d_block, d_p, d_matrices)
            ctx.mark_non_differentiable(c, mask, threshold)
            return (error / energy).to(c).view(1), c.unsqueeze(1), mask, threshold

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if bool((d_loss != 1).any()):
            gradients = [gradient * d_loss for gradient in gradients]
        return *[None] * 7, *gradients


def _contract(side: Side) -> Tensor:
    """Coefficients of all samples with a side's subnetworks, over dense and factored parameters, [N, n]."""
    total = side.contract()
    if side.block is not None:
        assert side.prepared.block is not None
        dense = side.prepared.block @ side.block.mT
        total = dense if total is None else total + dense
    assert total is not None
    return total
