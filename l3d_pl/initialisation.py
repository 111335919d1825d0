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


def dense_and_lines(gram: Tensor, n_dense: int, n_lines: int, generator: torch.Generator) -> Tensor:
    """Principal directions of the samples, each counted alike, and K-lines of what they leave: as in `k_lines`.

    The directions of most use to every sample, be it large or small, are where dense subnetworks start.
    """
    size = gram.diagonal().clamp_min(_TINY).sqrt()
    alike = gram / torch.outer(size, size)
    values, vectors = torch.linalg.eigh(alike.double())
    values, vectors = values[-n_dense:].flip(0).clamp_min(_TINY).to(gram), vectors[:, -n_dense:].flip(1).to(gram)
    dense = vectors.mT / values.sqrt().unsqueeze(1) / size  # of unit norm, and orthogonal
    along = gram @ dense.mT  # <g_i, v_j>
    lines = k_lines(gram - along @ along.mT, n_lines, generator)
    return torch.cat([dense, lines - lines @ along @ dense])


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

    Subnetworks that take part in every sample (`n_dense`) start at its principal directions.

    Args:
        restart: which restart's subnetworks to set.
        prepared: gradients of N >= n_v samples.
        noise: normal noise added to every core and factor, relative to that tensor's root mean square.
        gram: `prepared.gram()`, where it is known already.
    """
    gram = prepared.gram() if gram is None else gram
    n, n_dense = subnetworks.n_subnetworks, subnetworks.n_dense
    weights = dense_and_lines(gram, n_dense, n - n_dense, generator) if n_dense else k_lines(gram, n, generator)
    index, own = subnetworks.restart(restart), subnetworks.own
    values = sum(math.prod(shape) for shape in subnetworks.shapes.values())
    step = max(1, 4 * subnetworks.chunk // values)  # so many dense directions at a time
    for first in range(index.start, index.stop, step):
        last = min(first + step, index.stop)
        mine = slice(max(first, own.start), min(last, own.stop))
        some = None
        if mine.start < mine.stop:
            dense = prepared.combine(weights[first - index.start : last - index.start], subnetworks.shapes)
            some = low_rank_unit(dense, subnetworks)
        shaken = _with_noise(some, subnetworks, last - first, noise, generator)
        if some is not None:
            part = slice(mine.start - first, mine.stop - first)
            place = slice(mine.start - own.start, mine.stop - own.start)
            subnetworks.v_out.copy_({name: tucker.select(part) for name, tucker in shaken.items()}, place)
    subnetworks.normalise_()
    index = subnetworks.local_restart(restart)
    subnetworks.v_in.copy_({name: tucker.select(index) for name, tucker in subnetworks.v_out.tuckers().items()}, index)


def _with_noise(
    tuckers: Mapping[str, Tucker] | None, subnetworks: Subnetworks, n: int, noise: float, generator: torch.Generator
) -> dict[str, Tucker]:
    """Every core and factor of n Tucker tensors with noise on it; of none, where another rank's turn it is to have it.

    The noise is drawn all the same: the next one's is then that of a single process.
    """
    shaken = {}
    for name, shape in subnetworks.shapes.items():
        ranks = subnetworks.ranks[name]
        sizes = [(n, *ranks), *((n, size, rank) for size, rank in zip(shape, ranks, strict=True))]
        draws = [torch.randn(size, generator=generator, dtype=subnetworks.dtype) for size in sizes]
        if tuckers is not None:
            old = (tuckers[name].core, *tuckers[name].factors)
            core, *factors = (
                tensor + noise * tensor.square().mean().sqrt() * draw.to(tensor.device)
                for tensor, draw in zip(old, draws, strict=True)
            )
            shaken[name] = Tucker(core, tuple(factors))
    return shaken
