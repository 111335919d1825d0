"""Repair during training: subnetworks that sit in the wrong place, which only the loss can tell.

A run that misses a circuit often has no dead subnetwork and no two alike: one merges two circuits, or sits on a
direction that several share. So candidates are drawn from what is reconstructed badly, each is tried in the place of
each subnetwork, and the best swap is made only if the loss falls on another, larger sample of gradients too. All of it
works on inner products (K = <g_i, g_j>, p = <g_i, v_k>, M = <v_k, v_l>), whatever the representation of the gradients.

Two samples, because how much energy each circuit has in a thousand samples varies by a tenth or more: judged by the
sample that it was drawn from, splitting a circuit with much energy there looks better than keeping one with little.

A candidate's row of V_in is no copy of its direction but answers to it alone (`readers`): circuits that share units
overlap, so that a copy would take up the other subnetworks' part too, and the right swap would raise the loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l3d_pl import sharded
from l3d_pl.batch_topk import batch_topk, n_selected
from l3d_pl.gradients import SampleGradient, concatenate
from l3d_pl.initialisation import low_rank_unit
from l3d_pl.subnetworks import Prepared, Subnetworks, View
from l3d_pl.tucker import Tucker, truncate

_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Anchor:
    """Fixed samples of gradients that one restart starts from and is judged on.

    Attributes:
        prepared: those that the start and the candidates are made of, N.
        gram: their <g_i, g_j>, [N, N].
        judge: those on which a swap has to prove itself; any number, as no pairs of them are formed.
    """

    prepared: Prepared
    gram: Tensor
    judge: Prepared


def anchors_of(
    parts: Sequence[dict[str, SampleGradient]], subnetworks: Subnetworks, n_start: int, n_judge: int
) -> list[Anchor]:
    """An anchor for each restart from the gradients of the first samples, without those that are not finite.

    Args:
        parts: the gradients batch by batch; they are taken out, as there may be no room for them twice.
        n_start: samples that each restart has to itself, as far as there are so many.
        n_judge: of the last samples, those that judge; common to all restarts.
    """
    joined = {name: concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    good = torch.isfinite(subnetworks.prepare(joined).sample_energies()).nonzero().squeeze(1)

    def take(index: Tensor) -> Prepared:
        return subnetworks.prepare({name: gradient.select(index) for name, gradient in joined.items()})

    judge, anchors = take(good[-n_judge:]), []
    for restart in range(subnetworks.restarts):
        # Restarts share samples only where the data set is too small for a set of their own each.
        own = (torch.arange(min(n_start, len(good))) + restart * n_start) % len(good)
        prepared = take(good[own.to(good.device)])
        anchors.append(Anchor(prepared, prepared.gram(), judge))
    return anchors


@dataclass
class State:
    """One restart's subnetworks, those of all shards, against N gradients: c, p, codes [N, n_v], M [n_v, n_v]."""

    c: Tensor
    p: Tensor
    gram: Tensor
    codes: Tensor

    def error(self) -> Tensor:
        """sum_i ‖V_out c_i‖² - 2 c_i . p_i: the squared error but for the constant energy (float64)."""
        return quadratic_error(self.codes, self.p, self.gram)


def quadratic_error(codes: Tensor, p: Tensor, gram: Tensor) -> Tensor:
    """c^T M c - 2 c.p summed over samples, for `codes`, `p` [..., N, n] and `gram` [..., n, n]."""
    return (codes * (codes @ gram - 2 * p)).double().sum((-1, -2))


@torch.no_grad()
def state_of(subnetworks: Subnetworks, restart: int, prepared: Prepared, k: float) -> State:
    """One restart against the gradients of `prepared`, with the fraction k of all coefficients taking part."""
    index = subnetworks.local_restart(restart)
    view_out = subnetworks.view(subnetworks.v_out, prepared).select(index)
    c = subnetworks.everyone(subnetworks.view(subnetworks.v_in, prepared).select(index).coefficients(prepared))
    mask, _ = batch_topk(c.unsqueeze(1), k, n_dense=subnetworks.n_dense)
    gram = view_out.gram(view_out) if subnetworks.group.size == 1 else sharded.gram(subnetworks)
    return State(c, subnetworks.everyone(view_out.coefficients(prepared)), gram, c * mask.squeeze(1))


def loss_of(subnetworks: Subnetworks, restart: int, prepared: Prepared, k: float) -> float:
    """L of one restart on the gradients of `prepared` as one batch."""
    return 1 + float(state_of(subnetworks, restart, prepared, k).error() / prepared.energy)


@torch.no_grad()
def scale_readers(subnetworks: Subnetworks, restart: int, prepared: Prepared, k: float) -> float:
    """Scale V_in by the one number with which its codes reconstruct best; returns it.

    After a start with V_in = V_out, neighbouring directions that answer to the same sample overshoot together: the
    loss can begin far above 1, and what is pushed away then is often dead for good.
    """
    state = state_of(subnetworks, restart, prepared, k)
    quadratic = float((state.codes * (state.codes @ state.gram)).sum())
    scale = float((state.codes * state.p).sum()) / quadratic if quadratic > 0 else 1.0
    for tucker in subnetworks.v_in.tuckers().values():
        tucker.core[subnetworks.local_restart(restart)] *= scale
    return scale


@torch.no_grad()
def candidates(
    subnetworks: Subnetworks,
    restart: int,
    anchor: Anchor,
    state: State,
    n: int,
    k: float,
    generator: torch.Generator,
    steps: int = 4,
) -> dict[str, Tucker]:
    """New directions from what is reconstructed badly: {name: n Tucker tensors}, of unit norm over all parameters.

    A sample is drawn with probability proportional to its squared error; its residual is refined by power steps over
    the fraction k of samples whose residuals it explains best, and cut to rank.
    """
    codes, p = state.codes, state.p
    cross = codes @ p.mT
    residuals = anchor.gram - cross - cross.mT + codes @ state.gram @ codes.mT  # <r_i, r_j>
    errors = residuals.diagonal().clamp_min(0) + _TINY
    drawn = torch.multinomial(errors.cpu().expand(n, -1), 1, generator=generator).squeeze(1).to(codes.device)
    weights = torch.nn.functional.one_hot(drawn, codes.shape[0]).to(codes.dtype)  # [n, N]
    keep = n_selected(k, codes.shape[0])
    floor = 1e-10 * anchor.gram.diagonal().mean() + _TINY  # where nothing is left, rounding must not be blown up
    for _ in range(steps):
        scores = weights @ residuals
        top = torch.zeros_like(scores).scatter_(1, scores.abs().topk(keep, dim=1).indices, 1.0)
        weights = scores * top
        weights /= ((weights @ residuals) * weights).sum(1, keepdim=True).clamp_min(floor).sqrt()
    dense = anchor.prepared.combine(weights, subnetworks.shapes)
    for name, mixed in subnetworks.combine(weights @ codes, restart).items():  # sum_i weights_i V_out codes_i
        dense[name] = dense[name] - mixed
    return low_rank_unit(dense, subnetworks)


@torch.no_grad()
def revive(
    subnetworks: Subnetworks, restart: int, anchor: Anchor, dead: Tensor, k: float, generator: torch.Generator
) -> list[int]:
    """New directions in the place of a restart's dead subnetworks, [n_v] of bool; their indices among R * n_v."""
    slots = dead.nonzero().squeeze(1).tolist()
    if not slots:
        return []
    state = state_of(subnetworks, restart, anchor.prepared, k)
    new = candidates(subnetworks, restart, anchor, state, len(slots), k, generator)
    return [replace(subnetworks, restart, slot, new, which=which) for which, slot in enumerate(slots)]


@torch.no_grad()
def replace(
    subnetworks: Subnetworks,
    restart: int,
    slot: int,
    v_out: Mapping[str, Tucker],
    v_in: Mapping[str, Tucker] | None = None,
    which: int = 0,
) -> int:
    """Put tensors `which` in the place of a subnetwork (`v_in`: default a copy of `v_out`); its index among R * n_v.

    Of a sharded subnetwork only its owner takes note.
    """
    place = _place(subnetworks, restart, slot)
    for side, tuckers in ((subnetworks.v_out, v_out), (subnetworks.v_in, v_out if v_in is None else v_in)):
        side.copy_(
            {name: tucker.select(slice(which, which + place.stop - place.start)) for name, tucker in tuckers.items()},
            place,
        )
    return restart * subnetworks.n_subnetworks + slot


def readers(gram: Tensor, overlaps: Tensor, ridge: float = 0.05) -> tuple[Tensor, Tensor]:
    """Rows of V_in that answer to a new direction v and not to the subnetworks that stay, for every slot it may take.

    w = (v - sum_l a_l v_l) / (1 - a . m) has <w, v> = 1 and, up to the ridge, <w, v_l> = 0 for all l but the slot.

    Args:
        gram: M, [n_v, n_v].
        overlaps: m = <v, v_l> of each candidate, [candidates, n_v].
        ridge: added to the diagonal of M, so that a direction which the others span is not read by its noise.

    Returns:
        a [candidates, slots, n_v], whose entry at the slot itself is 0, and 1 - a . m [candidates, slots].
    """
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    solved = overlaps @ inverse
    # H = M^-1 without subnetwork s is H - H_s H_s^T / H_ss: one inverse serves all slots.
    away = solved.unsqueeze(1) - (solved / inverse.diagonal()).unsqueeze(2) * inverse
    return away, (1 - (away @ overlaps.unsqueeze(2)).squeeze(2)).clamp_min(ridge)


class Swap(NamedTuple):
    """A replacement: the `slot` (0 ... n_v - 1) it takes, its tensors, the squared error then (without the energy)."""

    slot: int
    v_out: dict[str, Tucker]
    v_in: dict[str, Tucker]
    error: float


@torch.no_grad()
def best_swap(
    subnetworks: Subnetworks,
    restart: int,
    prepared: Prepared,
    state: State,
    new: Mapping[str, Tucker],
    k: float,
    max_slots: int = 64,
) -> Swap:
    """Of all candidates in all places the one that leaves the lowest loss on `prepared`.

    Args:
        state: `state_of` the restart on `prepared`.
        new: the candidates' directions, of unit norm.
        max_slots: with more subnetworks than this, only those whose removal costs least are tried. The dense ones stay.
    """
    codes, n = state.codes, state.codes.shape[1]
    view = subnetworks.view(subnetworks.v_out, prepared).select(subnetworks.local_restart(restart))
    dense = [new[name].dense().flatten(1) for name in prepared.names[: len(prepared.sizes)]]
    new_view = View(torch.cat(dense, 1) if dense else None, {name: new[name] for name in prepared.factored})
    columns = new_view.coefficients(prepared)  # [N, candidates]
    overlaps = subnetworks.everyone(new_view.gram(view))  # [candidates, n_v]
    away, left = readers(state.gram, overlaps)

    removal = (codes * (2 * state.p - 2 * codes @ state.gram)).sum(0) + codes.square().sum(0) * state.gram.diagonal()
    slots = removal[subnetworks.n_dense :].argsort()[:max_slots] + subnetworks.n_dense
    least, which, slot = math.inf, 0, 0
    for candidate in range(columns.shape[1]):
        for part in slots.split(max(1, 4_000_000 // codes.numel())):  # [slots, N, n_v] in bounded memory
            put = torch.nn.functional.one_hot(part, n).to(codes.dtype).unsqueeze(1)  # [slots, 1, n_v]
            read = (columns[:, candidate] - away[candidate, part] @ state.p.mT) / left[candidate, part, None]
            c = torch.lerp(state.c, read.unsqueeze(2), put)
            mask, _ = batch_topk(c.transpose(0, 1), k, n_dense=subnetworks.n_dense)
            row = torch.lerp(overlaps[candidate].unsqueeze(0), torch.ones_like(put[:, 0]), put[:, 0])  # unit norm
            gram = torch.lerp(torch.lerp(state.gram, row.unsqueeze(1), put.mT), row.unsqueeze(2), put)
            p = torch.lerp(state.p, columns[:, candidate, None], put)
            errors = quadratic_error(c * mask.transpose(0, 1), p, gram)
            if float(errors.min()) < least:
                least, which, slot = float(errors.min()), candidate, int(part[errors.argmin()])
    # Ranks that hold shards must not come to different conclusions by rounding.
    least, which, slot = (subnetworks.group.first(value) for value in (least, which, slot))

    v_out = {name: tucker.select(slice(which, which + 1)) for name, tucker in new.items()}
    v_in = {}
    for name, others in subnetworks.combine(away[which, slot].unsqueeze(0), restart).items():
        reader = (v_out[name].dense() - others) / left[which, slot]
        v_in[name] = truncate(reader, subnetworks.ranks[name])
    return Swap(slot, v_out, v_in, least)


@torch.no_grad()
def swap(
    subnetworks: Subnetworks,
    restart: int,
    anchor: Anchor,
    k: float,
    generator: torch.Generator,
    n_candidates: int = 2,
    min_gain: float = 0.01,
) -> int | None:
    """Make the best swap, and keep it if the loss falls by the share `min_gain` on both samples of the anchor.

    Args:
        k: fraction of coefficients to keep: the final one, since it is for its sake that the swap is made.

    Returns:
        The index (among R * n_v) of the subnetwork replaced, or None.
    """
    state = state_of(subnetworks, restart, anchor.prepared, k)
    new = candidates(subnetworks, restart, anchor, state, n_candidates, k, generator)
    best = best_swap(subnetworks, restart, anchor.prepared, state, new, k)
    energy = float(anchor.prepared.energy)
    if energy + best.error >= (1 - min_gain) * (energy + float(state.error())):
        return None
    place = _place(subnetworks, restart, best.slot)
    old_out, old_in = (
        {name: Tucker(tucker.core[place].clone(), tuple(factor[place].clone() for factor in tucker.factors))
         for name, tucker in side.tuckers().items()}
        for side in (subnetworks.v_out, subnetworks.v_in)
    )  # fmt: skip
    before = loss_of(subnetworks, restart, anchor.judge, k)
    index = replace(subnetworks, restart, best.slot, best.v_out, best.v_in)
    after = loss_of(subnetworks, restart, anchor.judge, k)
    if subnetworks.group.first(after) < (1 - min_gain) * subnetworks.group.first(before):
        return index
    replace(subnetworks, restart, best.slot, old_out, old_in)
    return None


def _place(subnetworks: Subnetworks, restart: int, slot: int) -> slice:
    """Where a subnetwork is stored: nowhere (an empty slice), where another rank owns it."""
    index, own = restart * subnetworks.n_subnetworks + slot, subnetworks.own
    first = index - own.start if own.start <= index < own.stop else 0
    return slice(first, first + (own.start <= index < own.stop))
