"""The method on V_in and V_out as they are: whole on this rank, or sharded by subnetwork over a group of ranks.

Where they are whole (`subnetworks.group` is this rank alone) each function hands on to `step`, `auxiliary` or
`Subnetworks`. Otherwise each rank of the group owns some of the subnetworks, and has samples of its own. All share the
gradients of all samples: D and A travel once, nothing is computed twice. Coefficients of the own subnetworks are local;
batch top-k's threshold is that of all ranks. What joins the shards is M = V_out^T V_out: with codes c_j of shard j,
rank r needs

    (codes M)_r = sum_j c_j <V_j, V_r>        dL/dV_r = 2/E (sum_j (c_r^T c_j) V_j - c_r^T g)

so V_out's shards travel round the group in a ring, one at a time, and each rank adds its part as they pass. No rank
ever holds all of V_out, and neither unit norms nor the optimizer need anything from the others.

Values that a rank sends per step, in a group of S: (S - 1) / S of V_out, S - 1 times its own samples' D and A, and
S - 1 times its codes [samples of the group, n_v / S]. With several groups, their gradients of V are averaged besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from l3d_pl import auxiliary, step
from l3d_pl.batch_topk import batch_topk
from l3d_pl.gradients import DenseGradient, OuterGradient, SampleGradient
from l3d_pl.parallel import Ranks
from l3d_pl.step import Side, Step
from l3d_pl.subnetworks import Prepared, Reconstruction, Subnetworks
from l3d_pl.tucker import Matrices, Tucker, flatten, unflatten


def share_gradients(gradients: Mapping[str, SampleGradient], group: Ranks) -> dict[str, SampleGradient]:
    """The gradients of all the group's samples, in the order of its ranks; one parameter after the other."""
    if group.size == 1:
        return dict(gradients)
    sizes = group.gather({name: _sizes(gradient) for name, gradient in gradients.items()})
    shared: dict[str, SampleGradient] = {}
    for name, gradient in gradients.items():
        theirs = [by_name[name] for by_name in sizes]
        rows = [its[0] for its in theirs]
        if not isinstance(gradient, OuterGradient):
            shared[name] = DenseGradient(group.join(gradient.dense(), rows))
            continue
        (own_t, own_s), (t, s) = gradient.outputs.shape[1:3], (max(its[i] for its in theirs) for i in (1, 2))
        outputs = pad(gradient.outputs, (0, 0, 0, s - own_s, 0, t - own_t))
        inputs = pad(gradient.inputs, (0, s - own_s) if gradient.is_one_hot else (0, 0, 0, s - own_s))
        index = None
        if any(its[1:] != (t, s, True) for its in theirs):  # somewhere positions do not count, or are not there
            samples = torch.arange(rows[group.rank] * own_t, device=outputs.device)
            samples = samples if gradient.index is None else gradient.index
            samples = sum(rows[: group.rank]) * t + samples // own_t * t + samples % own_t
            index = torch.cat(group.all_gather(samples))
        outputs, inputs = group.join(outputs, rows), group.join(inputs, rows)
        shared[name] = replace(gradient, outputs=outputs, inputs=inputs, index=index)
    return shared


def _sizes(gradient: SampleGradient) -> tuple[Any, ...]:
    if isinstance(gradient, OuterGradient):
        return *gradient.outputs.shape[:3], gradient.index is None
    return (gradient.n_samples,)


def decompose(subnetworks: Subnetworks, prepared: Prepared, k: float, ranks: Ranks) -> Step:
    """`step.decompose`; of sharded subnetworks (one restart) for this rank's own.

    Args:
        prepared: the gradients of all the group's samples (see `share_gradients`).
        ranks: all ranks of the run; other groups have other samples, and the same shards.

    Returns:
        the step, its `coefficients` and `mask` those of the own subnetworks. Its `loss` is the group's over the energy
        of all samples times the number of groups: the mean over groups is that of one process, and so for gradients.
    """
    if subnetworks.group.size == 1:
        return step.decompose(subnetworks, prepared, k, ranks)
    return _decompose(subnetworks, prepared, k, ranks)


def auxiliary_loss(
    subnetworks: Subnetworks, prepared: Prepared, main: Step, dead: Tensor, k: float, ranks: Ranks
) -> Tensor | None:
    """`auxiliary.auxiliary_loss`, with `main` the step that `decompose` has made; `dead` is [R, n_v], of all shards."""
    if subnetworks.group.size == 1:
        return auxiliary.auxiliary_loss(subnetworks, prepared, main, dead, k, ranks)
    if not bool(dead.any()):
        return None
    own = subnetworks.mine(dead)[0]
    return _decompose(subnetworks, prepared, k, ranks, fixed=main.codes[:, 0], among=own).loss.sum()


def reconstruct(subnetworks: Subnetworks, prepared: Prepared, codes: Tensor) -> Reconstruction:
    """`Subnetworks.reconstruct` of the group's samples, from `codes` [N, R, n] of the own subnetworks."""
    if subnetworks.group.size == 1:
        return subnetworks.reconstruct(prepared, codes)
    return Reconstruction(_errors(subnetworks, prepared, codes[:, 0]).sum().view(1), prepared.energy)


def loss_per_parameter(
    subnetworks: Subnetworks, prepared: Prepared, codes: Tensor, ranks: Ranks, replicas: Ranks
) -> dict[str, Tensor]:
    """`Subnetworks.loss_per_parameter` over the samples of all `ranks`, {name: [R]}, from the own codes [N, R, n].

    Args:
        replicas: the ranks of other groups with the same shard, and samples of their own.
    """
    if subnetworks.group.size == 1:
        return subnetworks.loss_per_parameter(prepared, codes, ranks=ranks)
    errors = replicas.sum(_errors(subnetworks, prepared, codes[:, 0]))
    ratios = errors / replicas.sum(prepared.energies()).clamp_min(torch.finfo(torch.float32).tiny)
    return {name: ratio.view(1) for name, ratio in zip(prepared.names, ratios, strict=True)}


@torch.no_grad()
def gram(subnetworks: Subnetworks) -> Tensor:
    """M = <v_k, v_l> of all sharded subnetworks, [n_v, n_v], on every rank."""
    own, names = subnetworks.v_out.tuckers(), tuple(subnetworks.shapes)
    modes = [len(shape) for shape in subnetworks.shapes.values()]
    flat = flatten([own[name] for name in names])
    rows = flat[0].new_zeros(subnetworks.v_out.n, subnetworks.n_subnetworks)
    for which, parts in subnetworks.group.ring(flat, subnetworks.n_subnetworks):
        if rows[:, which].numel():
            for mine, theirs in zip(own.values(), unflatten(modes, parts), strict=True):
                rows[:, which] += mine.gram(theirs)
    return subnetworks.everyone(rows.mT).mT


# -- the shards meet ---------------------------------------------------------------------------------------------------


def _decompose(
    subnetworks: Subnetworks,
    prepared: Prepared,
    k: float,
    ranks: Ranks,
    fixed: Tensor | None = None,
    among: Tensor | None = None,
) -> Step:
    """`decompose` for this rank's shard.

    Args:
        fixed: codes [N, n] of the own subnetworks that are there already, and held constant.
        among: which of the own subnetworks take part besides, [n] of bool (default: all).
    """
    tuckers_in, tuckers_out = subnetworks.v_in.tuckers(), subnetworks.v_out.tuckers()
    names = prepared.names
    flat = flatten([tuckers_in[name] for name in names]) + flatten([tuckers_out[name] for name in names])
    return Step(*_ShardedStep.apply(subnetworks, prepared, k, ranks, fixed, among, *flat))


class _ShardedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        subnetworks: Subnetworks,
        prepared: Prepared,
        k: float,
        ranks: Ranks,
        fixed: Tensor | None,
        among: Tensor | None,
        *flat: Tensor,
    ) -> Any:
        group, chunk, half = subnetworks.group, subnetworks.chunk, len(flat) // 2
        modes = [len(subnetworks.shapes[name]) for name in prepared.names]
        with torch.autocast(flat[0].device.type, enabled=False):
            side_in = _Side(prepared, unflatten(modes, flat[:half]), chunk)
            side_out = _Side(prepared, unflatten(modes, flat[half:]), chunk)
            total = float(prepared.energy)  # of the group; each of its ranks counts it once
            energy = max(float(ranks.sum(prepared.energy)), torch.finfo(torch.float32).tiny) / ranks.size
            scale = 2 / energy
            c = side_in.coefficients()
            if among is None:
                mask, threshold = batch_topk(c.unsqueeze(1), k, ranks, subnetworks.own_dense)
            else:
                mask = torch.zeros_like(c, dtype=torch.bool).unsqueeze(1)
                mask[:, :, among], threshold = batch_topk(c[:, among].unsqueeze(1), k, ranks)
            learned = c * mask.squeeze(1)
            codes = learned if fixed is None else learned + fixed
            everyone = subnetworks.everyone(codes)
            p = side_out.coefficients()

            pushed = torch.zeros_like(codes)  # codes M, the own columns
            d_block = None if side_out.block is None else torch.zeros_like(side_out.block)
            d_matrices = [Matrices(*(torch.zeros_like(part) for part in matrices)) for matrices in side_out.matrices]
            for which, other in _ring(subnetworks, prepared, flat[half:], side_out):
                theirs = everyone[:, which]
                weights = (learned.mT @ theirs) * scale
                gram = weights.new_zeros(weights.shape)  # <own, theirs>
                if d_block is not None:
                    assert side_out.block is not None
                    assert other.block is not None
                    gram.addmm_(side_out.block, other.block.mT)
                    d_block.addmm_(weights, other.block)
                for mine, matrices, d in zip(side_out.matrices, other.matrices, d_matrices, strict=True):
                    mine.add_products(matrices, weights, gram, d, chunk)
                pushed.addmm_(theirs, gram.mT)

            # Summed in float64: a small difference of large numbers.
            error = total + group.sum((codes.double() * (pushed.double() - 2 * p.double())).sum())
            d_c = (pushed - p).mul_(scale) * mask.squeeze(1)
            gradients = side_in.backward(d_c.mT @ prepared.block if prepared.block is not None else None, d_c)
            d_p = learned * -scale
            if d_block is not None and prepared.block is not None:
                d_block.addmm_(d_p.mT, prepared.block)
            ctx.gradients = gradients + side_out.backward(d_block, d_p, d_matrices)
            coefficients = c.unsqueeze(1)
            ctx.mark_non_differentiable(coefficients, mask, threshold)
            return (error / energy).to(c).view(1), coefficients, mask, threshold

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if d_loss.is_cuda or bool((d_loss != 1).any()):
            for gradient in gradients:  # in place: there may be no room for another copy
                gradient.mul_(d_loss)
        return *[None] * 6, *gradients


@torch.no_grad()
def _errors(subnetworks: Subnetworks, prepared: Prepared, codes: Tensor) -> Tensor:
    """sum_i ‖g_i - V_out code_i‖² of every parameter over the group's samples, [P] in the order of `prepared.names`.

    Args:
        codes: of the own subnetworks, [N, n].
    """
    tuckers = subnetworks.v_out.tuckers()
    flat = flatten([tuckers[name] for name in prepared.names])
    modes = [len(subnetworks.shapes[name]) for name in prepared.names]
    side = _Side(prepared, unflatten(modes, flat), subnetworks.chunk)
    everyone, wide = subnetworks.everyone(codes), codes.double()
    errors = codes.new_zeros(len(prepared.names), dtype=torch.float64)
    blocks = [] if side.block is None else list(side.block.split(prepared.sizes, 1))
    g_blocks = [] if side.block is None or prepared.block is None else prepared.block.split(prepared.sizes, 1)
    for i, (v, g) in enumerate(zip(blocks, g_blocks, strict=True)):
        errors[i] -= 2 * (wide * (g @ v.mT)).sum()
    for i, (gradient, matrices) in enumerate(zip(side.gradients, side.matrices, strict=True), len(blocks)):
        errors[i] -= 2 * (wide * gradient.contract(matrices, subnetworks.chunk)[0]).sum()
    for which, other in _ring(subnetworks, prepared, flat, side):
        theirs = everyone[:, which]
        others = [] if other.block is None else list(other.block.split(prepared.sizes, 1))
        grams = [v @ w.mT for v, w in zip(blocks, others, strict=True)]
        grams += [v.gram(w) for v, w in zip(side.matrices, other.matrices, strict=True)]
        errors += torch.stack([((theirs @ gram.mT).double() * wide).sum() for gram in grams])
    return prepared.energies() + subnetworks.group.sum(errors)


def _ring(subnetworks: Subnetworks, prepared: Prepared, flat: Any, own: _Side) -> Iterator[tuple[slice, Side]]:
    """The shards of V_out as they pass, laid out as `own` is; what travels are their Tucker tensors."""
    modes = [len(subnetworks.shapes[name]) for name in prepared.names]
    for which, parts in subnetworks.group.ring(flat, subnetworks.n_subnetworks):
        if own.n and which.stop > which.start:
            is_own = which == subnetworks.own
            yield which, own if is_own else Side(prepared, unflatten(modes, parts), subnetworks.chunk)


class _Side(Side):
    """A shard of V_in or V_out against a batch. A rank may own no subnetworks, where there are few."""

    def __init__(self, prepared: Prepared, tuckers: list[Tucker], chunk: int):
        self.n, self.all = tuckers[0].n, tuckers
        if self.n:
            super().__init__(prepared, tuckers, chunk)
        else:
            self.prepared, self.block, self.matrices, self.gradients = prepared, None, [], []

    def coefficients(self) -> Tensor:
        """Of all samples, over dense and factored parameters, [N, n]."""
        if not self.n:
            return self.all[0].core.new_zeros(self.prepared.n_samples, 0)
        total = self.contract()
        if self.block is not None:
            assert self.prepared.block is not None
            dense = self.prepared.block @ self.block.mT
            total = dense if total is None else total + dense
        assert total is not None
        return total

    def backward(
        self, d_block: Tensor | None, d_coefficients: Tensor, more: Sequence[Matrices] | None = None
    ) -> list[Tensor]:
        if not self.n:
            return [torch.zeros_like(tensor) for tensor in flatten(self.all)]
        return super().backward(d_block, d_coefficients, more)
