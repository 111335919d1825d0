"""Where V starts: the data-driven start finds the lines that the sample gradients lie along.

K-lines is k-means for directions without a sign: centre j is a unit vector v_j, sample i belongs to the centre with the
largest <g_i, v_j>², and a centre moves by a power step to sum_i <g_i, v_j> g_i over its samples. Large gradients weigh
more, as they do in the reconstruction loss. Only inner products of samples are needed (`Prepared.gram`), so it runs on
any representation of the gradients.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from l3d_pl.subnetworks import Prepared, Subnetworks
from l3d_pl.tucker import Tucker, truncate

_TINY = torch.finfo(torch.float32).tiny


def k_lines(gram: Tensor, n_lines: int, generator: torch.Generator, tries: int = 12, steps: int = 12) -> Tensor:
    """Centres of K-lines as combinations of samples: weights [n_lines, N] with v_j = sum_i weights_ji g_i of unit norm.

    Args:
        gram: <g_i, g_j>, [N, N].
        n_lines: number of centres.
        generator: random state of the seeding (CPU).
        tries: independent starts (seeded by D², as in k-means++); the one that explains most energy is returned.
        steps: Lloyd steps of each.
    """
    n, energy = gram.shape[0], gram.diagonal().clamp_min(0)
    seeds = torch.empty(tries, n_lines, dtype=torch.long, device=gram.device)
    explained = torch.zeros(tries, n, dtype=gram.dtype, device=gram.device)
    for j in range(n_lines):
        left = (energy - explained).clamp_min(0) + _TINY  # what the centres so far leave of each sample: D²
        seeds[:, j] = torch.multinomial(left.cpu(), 1, generator=generator).squeeze(1).to(gram.device)
        rows = gram[seeds[:, j]]  # [tries, N]
        explained = torch.maximum(explained, rows.square() / energy[seeds[:, j]].clamp_min(_TINY).unsqueeze(1))
    weights = torch.nn.functional.one_hot(seeds, n).to(gram.dtype)  # [tries, n_lines, N]
    for step in range(steps + 1):
        products = weights @ gram  # <sum_i weights_i g_i, g_m>, [tries, n_lines, N]
        norms = (products * weights).sum(2, keepdim=True).clamp_min(_TINY).sqrt()
        products = products / norms
        if step == steps:
            best = products.square().amax(1).sum(1).argmax()
            return (weights / norms)[best]
        mine = torch.nn.functional.one_hot(products.square().argmax(1), n_lines).mT.to(gram.dtype)
        moved = mine * products
        empty = moved.square().sum(2, keepdim=True) == 0  # a centre without samples stays where it is
        weights = torch.where(empty, weights, moved)
    raise AssertionError("unreachable")


def low_rank_unit(dense: Mapping[str, Tensor], subnetworks: Subnetworks) -> dict[str, Tucker]:
    """Directions given as dense tensors {name: [m, *shape]}, cut to the subnetworks' ranks and scaled to unit norm."""
    cut = {name: truncate(dense[name], subnetworks.ranks[name]) for name in subnetworks.shapes}
    norms = torch.stack([tucker.squared_norms() for tucker in cut.values()]).sum(0).clamp_min(_TINY).rsqrt()
    return {name: tucker.scaled(norms) for name, tucker in cut.items()}


@torch.no_grad()
def start_from_gradients(
    subnetworks: Subnetworks,
    restart: int,
    prepared: Prepared,
    generator: torch.Generator,
    noise: float = 0.02,
    gram: Tensor | None = None,
) -> None:
    """Set V_out, and V_in as its copy, to the K-lines of a sample of gradients, cut to rank.

    Args:
        restart: which restart's subnetworks to set.
        prepared: gradients of N >= n_v samples.
        noise: normal noise added to every core and factor, relative to that tensor's root mean square.
        gram: `prepared.gram()`, where it is known already.
    """
    weights = k_lines(prepared.gram() if gram is None else gram, subnetworks.n_subnetworks, generator)
    index = subnetworks.restart(restart)
    values = sum(math.prod(shape) for shape in subnetworks.shapes.values())
    step = max(1, 4 * subnetworks.chunk // values)  # so many dense directions at a time
    for first in range(0, len(weights), step):
        some = low_rank_unit(prepared.combine(weights[first : first + step], subnetworks.shapes), subnetworks)
        some = {name: Tucker(*_with_noise(tucker, noise, generator)) for name, tucker in some.items()}
        subnetworks.v_out.copy_(some, slice(index.start + first, min(index.start + first + step, index.stop)))
    subnetworks.normalise_()
    subnetworks.v_in.copy_({name: tucker.select(index) for name, tucker in subnetworks.v_out.tuckers().items()}, index)


def _with_noise(tucker: Tucker, noise: float, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    def shake(tensor: Tensor) -> Tensor:
        draw = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
        return tensor + noise * tensor.square().mean().sqrt() * draw

    return shake(tucker.core), tuple(shake(factor) for factor in tucker.factors)
