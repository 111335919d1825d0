"""Repair during training: subnetworks that sit in the wrong place, which only the loss can tell.

A run that misses a circuit often has no dead subnetwork and no two alike: one merges two circuits, or sits on a direction
that several share. So candidates are drawn from what is reconstructed badly, each is tried in the place of each
subnetwork, and a swap is made only if the loss on a fixed sample of gradients falls. All of it works on inner products
(K = <g_i, g_j>, p = <g_i, v_k>, M = <v_k, v_l>), whatever the representation of the gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l3d_pl.batch_topk import batch_topk, n_selected
from l3d_pl.initialisation import low_rank_unit
from l3d_pl.subnetworks import Prepared, Subnetworks
from l3d_pl.tucker import Tucker

_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Anchor:
    """A fixed sample of gradients that one restart is judged on."""

    prepared: Prepared
    gram: Tensor  # <g_i, g_j>, [N, N]


@dataclass
class State:
    """One restart's subnetworks against an anchor: `c`, `p`, `codes` [N, n_v] and M [n_v, n_v]."""

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
def state_of(subnetworks: Subnetworks, restart: int, anchor: Anchor, k: float) -> State:
    index = subnetworks.restart(restart)
    view_out = subnetworks.view(subnetworks.v_out, anchor.prepared).select(index)
    c = subnetworks.view(subnetworks.v_in, anchor.prepared).select(index).coefficients(anchor.prepared)
    mask, _ = batch_topk(c.unsqueeze(1), k)
    return State(c, view_out.coefficients(anchor.prepared), view_out.gram(view_out), c * mask.squeeze(1))


@torch.no_grad()
def candidates(
    subnetworks: Subnetworks, restart: int, anchor: Anchor, state: State, n: int, k: float, generator: torch.Generator, steps: int = 4
) -> dict[str, Tucker]:
    """New directions from what is reconstructed badly: {name: n Tucker tensors}, of unit norm over all parameters.

    A sample is drawn with probability proportional to its squared error; its residual is refined by power steps over the
    fraction k of samples whose residuals it explains best, and cut to rank.
    """
    codes, p = state.codes, state.p
    cross = codes @ p.mT
    residuals = anchor.gram - cross - cross.mT + codes @ state.gram @ codes.mT  # <r_i, r_j>
    errors = residuals.diagonal().clamp_min(0) + _TINY
    drawn = torch.multinomial(errors.cpu().expand(n, -1), 1, generator=generator).squeeze(1).to(codes.device)
    weights = torch.nn.functional.one_hot(drawn, codes.shape[0]).to(codes.dtype)  # [n, N]
    keep = n_selected(k, codes.shape[0])
    for _ in range(steps):
        scores = weights @ residuals
        top = torch.zeros_like(scores).scatter_(1, scores.abs().topk(keep, dim=1).indices, 1.0)
        weights = scores * top
        weights /= ((weights @ residuals) * weights).sum(1, keepdim=True).clamp_min(_TINY).sqrt()
    dense = anchor.prepared.combine(weights, subnetworks.shapes)
    index, mixed = subnetworks.restart(restart), weights @ codes  # sum_i weights_i V_out codes_i
    for name, tucker in subnetworks.v_out.tuckers().items():
        own = tucker.select(index).dense().flatten(1)
        dense[name] = dense[name] - (mixed @ own).view_as(dense[name])
    return low_rank_unit(dense, subnetworks)


@torch.no_grad()
def replace(subnetworks: Subnetworks, restart: int, slot: int, new: Mapping[str, Tucker], which: int) -> int:
    """Put candidate `which` in the place of a subnetwork (V_out, and V_in as its copy); returns its index among R * n_v."""
    index = restart * subnetworks.n_subnetworks + slot
    one = {name: tucker.select(slice(which, which + 1)) for name, tucker in new.items()}
    subnetworks.v_out.copy_(one, slice(index, index + 1))
    subnetworks.v_in.copy_(one, slice(index, index + 1))
    return index


@torch.no_grad()
def swap(
    subnetworks: Subnetworks,
    restart: int,
    anchor: Anchor,
    k: float,
    generator: torch.Generator,
    n_candidates: int = 2,
    min_gain: float = 0.003,
    max_slots: int = 64,
) -> int | None:
    """Try candidates in the places of subnetworks; make the best swap if the loss falls by the share `min_gain`.

    Args:
        max_slots: with more subnetworks than this, only those whose removal costs least are tried.

    Returns:
        The index (among R * n_v) of the subnetwork replaced, or None.
    """
    state = state_of(subnetworks, restart, anchor, k)
    new = candidates(subnetworks, restart, anchor, state, n_candidates, k, generator)
    view = subnetworks.view(subnetworks.v_out, anchor.prepared).select(subnetworks.restart(restart))
    names = anchor.prepared.names
    dense = [new[name].dense().flatten(1) for name in names[: len(anchor.prepared.sizes)]]
    new_view = type(view)(torch.cat(dense, 1) if dense else None, {name: new[name] for name in anchor.prepared.factored})
    columns = new_view.coefficients(anchor.prepared)  # [N, candidates]
    overlaps = new_view.gram(view)  # [candidates, n_v]

    codes, n = state.codes, state.codes.shape[1]
    removal = (codes * (2 * state.p - 2 * codes @ state.gram)).sum(0) + codes.square().sum(0) * state.gram.diagonal()
    slots = removal.argsort()[:max_slots]
    energy, error = anchor.gram.diagonal().double().sum(), state.error()
    best: tuple[float, int, int] | None = None
    for which in range(n_candidates):
        for part in slots.split(max(1, 4_000_000 // codes.numel())):  # [slots, N, n_v] in bounded memory
            put = torch.nn.functional.one_hot(part, n).to(codes.dtype).unsqueeze(1)  # [slots, 1, n_v]
            c = torch.lerp(state.c, columns[:, which, None], put)
            mask, _ = batch_topk(c.transpose(0, 1), k)
            row = torch.lerp(overlaps[which].unsqueeze(0), torch.ones_like(put[:, 0]), put[:, 0])  # unit norm
            gram = torch.lerp(state.gram, row.unsqueeze(1), put.mT)
            gram = torch.lerp(gram, row.unsqueeze(2), put)
            p = torch.lerp(state.p, columns[:, which, None], put)
            errors = quadratic_error(c * mask.transpose(0, 1), p, gram)
            least = int(errors.argmin())
            if best is None or float(errors[least]) < best[0]:
                best = (float(errors[least]), int(part[least]), which)
    assert best is not None
    if energy + best[0] < (1 - min_gain) * (energy + error):
        return replace(subnetworks, restart, best[1], new, best[2])
    return None
