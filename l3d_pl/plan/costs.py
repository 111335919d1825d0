"""The step of L3D by formula: what it does with V and the captured gradients are far too many operations to go through.

The tests hold the formulas against a trace of the step itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from l3d_pl.gradients import OuterGradient, SampleGradient
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.tucker import Matrices


@dataclass
class StepCosts:
    """c = V_in g, L, and its gradients (step.py, sharded.py) on one rank: bytes beside V and D and A, and FLOP.

    Attributes:
        side: bytes of this rank's V_in, or V_out; gradients and each of Adam's moments are two of these.
        peak: bytes of all intermediate results and of the new gradients, at the most.
        passing: of these, what is there of other ranks' shards.
        block: bytes of the gradients of all samples that are laid out dense.
        logging: bytes that the loss per parameter takes, when a step is logged.
        flop: of the step.
    """

    side: int = 0
    peak: int = 0
    passing: int = 0
    block: int = 0
    logging: int = 0
    flop: int = 0


def step_costs(subnetworks: Subnetworks, gradients: Mapping[str, SampleGradient], chunk: int) -> StepCosts:
    """Of one step with these subnetworks (the largest shard of their group) and the group's gradients.

    Most of what a step makes stays until its end: the matrices that V is contracted as, A through them, the gradient
    of codes M, then the new gradients, parameter after parameter. The temporary results of one parameter come on top.

    Args:
        chunk: values that one intermediate result may have (`Subnetworks.chunk`).
    """
    n, everyone, shards = subnetworks.own.stop, subnetworks.n_subnetworks, subnetworks.group.size  # of the first rank
    samples = next(iter(gradients.values())).n_samples
    pairs = samples * n
    one = sum(tensor.numel() for tensor in subnetworks.v_out.parameters()) // subnetworks.v_out.n
    through_ranks: list[str] = []
    held = passing = multiplications = dense_values = blocks = largest = merged_products = products = 0
    for name, gradient in gradients.items():
        shape, ranks = subnetworks.shapes[name], subnetworks.ranks[name]
        size = math.prod(shape)
        if subnetworks.path_of(name, gradient)[0] == "dense":
            dense_values += size
            left = n * shape[0] * ranks[1] if len(shape) == 2 else 0
            blocks += left
            rank = ranks[1] if len(shape) == 2 else min(ranks[0], math.prod(ranks[1:]))
            multiplications += 6 * n * rank * size
            if isinstance(gradient, OuterGradient):
                multiplications += math.prod(gradient.outputs.shape[:3]) * size
            per_pair = 5 if shards == 1 else 4
            multiplications += per_pair * pairs * size + (2 * n * everyone * size if shards > 1 else 0)
            continue
        assert isinstance(gradient, OuterGradient)
        b, t, s, rows, columns = gradient.sizes
        rank = min(ranks[0], math.prod(ranks[1:]))
        first, rest = shape[0], size // shape[0]  # the matrices' own view, whichever way the operation used it
        both = n * rank * (first + rest)
        is_right_merged = not (len(ranks) == 2 and ranks[1] < ranks[0])
        merged = n * rank * (rest if is_right_merged else first)
        through = n * rank * b * s
        saved = through if t > 1 else 2 * through if n * 2 * b * s * rank <= chunk else 0
        held += 2 * merged + 2 * saved + both
        merged_products += merged
        d_through = through if t > 1 else 0
        piece = min(chunk, n * b * s * rows) if t > 1 else min(chunk, 2 * n * b * s * rank)
        largest = max(largest, 2 * both, both + d_through + 2 * max(piece, b * s * rows))
        if rank * rank * (first + rest) < first * rest:
            through_ranks.append(name)
        products = max(products, _product_temporaries(n, first, rest, rank, samples, chunk, shards))
        multiplications += 2 * n * gradient.contraction_cost(rank)
        multiplications += (
            0 if saved else 2 * n * b * s * rank * (rows + columns)
        )  # the way there, again on the way back
        multiplications += 6 * n * ranks[0] * math.prod(ranks[1:]) * (rest if is_right_merged else first)
        multiplications += subnetworks.restarts * _product_multiplications(
            n // subnetworks.restarts, first, rest, rank, samples, shards
        )
    side = n * one
    n_factored = sum(subnetworks.path_of(name, g)[0] == "factored" for name, g in gradients.items())
    block = samples * dense_values
    if dense_values:
        held += 2 * (n * dense_values + blocks) + n * dense_values + (block if shards == 1 else 0)
    few = 8 * pairs  # c, its mask, codes, p, codes M and the gradients of these
    if shards == 1:
        stacked = n_factored * pairs
        at_products = held + 2 * stacked + few
        at_end = held + stacked + few + 2 * side + largest
        at_readers = held + stacked + few + n * dense_values + side + largest
        peak = max(at_products, held + stacked + few + products, at_readers, at_end)
    else:
        shard = side + merged_products + (n * dense_values + blocks)
        gathered = samples * everyone
        passing = 2 * shard + n * dense_values  # one goes, one comes, and is laid out
        at_end = held + few + gathered + shard + side + max(side, n * dense_values) + largest
        at_ring = held + few + gathered + passing + products + 2 * n * n
        peak = max(at_ring, at_end, held + few + 2 * gathered)
    # The loss of each parameter by itself: M through ranks is not made in pieces.
    grams = (n * min(subnetworks.ranks[name][0], math.prod(subnetworks.ranks[name][1:])) for name in through_ranks)
    logging = 2 * side + 2 * n * dense_values + block + 3 * max(grams, default=0) ** 2
    return StepCosts(4 * side, 4 * peak, 4 * passing, 4 * block, 4 * logging, 2 * multiplications)


def _product_temporaries(n: int, rows: int, columns: int, rank: int, samples: int, chunk: int, shards: int) -> int:
    """Values of the largest temporary results on the way to codes M and its gradient."""
    ranks, dense, by_samples = Matrices.gram_costs(n, rows, columns, rank, samples if shards == 1 else 0)
    if shards == 1 and by_samples < min(ranks, dense):
        step = max(8, chunk // ((n + samples) * columns)) * columns
        return (2 * n + samples) * step
    if ranks < dense:
        step = max(1, chunk // (n * rank * rank))
        return 4 * min(step, n) * rank * n * rank
    return (2 if shards == 1 else 3) * n * max(8, chunk // (2 * n * columns)) * columns


def _product_multiplications(n: int, rows: int, columns: int, rank: int, samples: int, shards: int) -> int:
    """Multiplications for codes M and its gradient."""
    ways = Matrices.gram_costs(n, rows, columns, rank, samples)
    if shards == 1:
        return int(min(ways))
    through_ranks, through_rows, _ = Matrices.gram_costs(n, rows, columns, rank, 0)
    if through_ranks < through_rows:
        return int(through_ranks) * shards
    return shards * rows * columns * (2 * n * n + 4 * n * rank)
