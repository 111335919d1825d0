"""Batch top-k (paper, "batchTopK"): which coefficients of a batch take part in the reconstruction.

Over the whole batch, all samples and subnetworks together, the fraction k with the largest |c| is kept: a sample that
needs more subnetworks gets more. A few subnetworks (`n_dense`, the first ones) may always take part, outside of it.
"""

import torch
from torch import Tensor, nn

from l3d_pl.errors import L3DError
from l3d_pl.parallel import ALONE, Ranks


def check_k(k: float, key: str = "k") -> float:
    """Raise unless 0 < k <= 1."""
    if not 0 < k <= 1:
        raise L3DError(f"{key}: found {k}; allowed is the fraction of coefficients to keep, in (0, 1]")
    return k


def n_selected(k: float, n: int) -> int:
    """How many of n coefficients the fraction k is: rounded, and at least one."""
    return min(n, max(1, round(k * n)))


def batch_topk(coefficients: Tensor, k: float, ranks: Ranks = ALONE, n_dense: int = 0) -> tuple[Tensor, Tensor]:
    """Select exactly the fraction k of |c| over a batch [N, R, n_v], for each of R restarts by itself.

    Ties at the threshold go to the earlier entries (rank, then sample, then subnetwork), so that the number kept is
    exact and the choice does not depend on the device.

    Args:
        ranks: the batch is that of all of them, each giving its own samples.
        n_dense: the first so many subnetworks are all kept, and the fraction k is of the others.

    Returns:
        mask [N, R, n_v] of bool, and the threshold [R]: the smallest |c| kept on any rank.
    """
    if n_dense:
        mask, threshold = batch_topk(coefficients[..., n_dense:], k, ranks)
        return torch.nn.functional.pad(mask, (n_dense, 0), value=True), threshold
    samples, restarts, n_subnetworks = coefficients.shape
    scores = coefficients.detach().abs().transpose(0, 1).reshape(restarts, -1)
    if ranks.size == 1:
        count = n_selected(k, samples * n_subnetworks)
        threshold = scores.topk(count, dim=1, sorted=True).values[:, -1]
    else:
        count = n_selected(k, ranks.count(scores.shape[1], scores.device))
        threshold = global_threshold(scores, count, ranks)
    mask = scores >= threshold.unsqueeze(1)
    # On a GPU, and with others, always: no round trip to look at the number.
    if ranks.size > 1 or scores.is_cuda or int(mask.sum()) != count * restarts:
        above, tied = scores > threshold.unsqueeze(1), scores == threshold.unsqueeze(1)
        room = count - ranks.sum(above.sum(1, keepdim=True)) - ranks.before(tied.sum(1, keepdim=True))
        mask = above | (tied & (tied.cumsum(1) <= room))
    return mask.view(restarts, samples, n_subnetworks).transpose(0, 1), threshold


def global_threshold(scores: Tensor, count: int, ranks: Ranks) -> Tensor:
    """The `count`-th largest of all ranks' scores >= 0, for each row of [R, any number]: [R].

    Radix selection: numbers >= 0 are ordered as their bits are, so the ranks count how many of theirs have which byte,
    from the highest byte on. It costs a sum of 256 numbers per byte and row, however many scores there are.
    """
    bits = {torch.float64: torch.int64, torch.float32: torch.int32}[scores.dtype]
    values, rows = scores.contiguous().view(bits), scores.shape[0]
    prefix = torch.zeros(rows, dtype=bits, device=scores.device)
    wanted = torch.full((rows,), count, dtype=torch.long, device=scores.device)
    width = 8 * scores.element_size()
    for shift in range(width - 8, -1, -8):
        fits = torch.ones_like(values, dtype=torch.bool)
        if shift < width - 8:
            fits = (values >> (shift + 8)) == prefix.unsqueeze(1)
        byte = ((values >> shift) & 255).long()
        numbers = torch.zeros(rows, 256, dtype=torch.long, device=scores.device)
        numbers.scatter_add_(1, byte, fits.long())
        at_or_above = ranks.sum(numbers).flip(1).cumsum(1).flip(1)  # with this byte or a larger one
        chosen = (at_or_above >= wanted.unsqueeze(1)).sum(1) - 1
        larger = torch.nn.functional.pad(at_or_above, (0, 1)).gather(1, chosen.unsqueeze(1) + 1).squeeze(1)
        wanted = wanted - larger
        prefix = (prefix << 8) | chosen.to(bits)
    return prefix.view(scores.dtype)


def at_threshold(coefficients: Tensor, threshold: Tensor | float, n_dense: int = 0) -> Tensor:
    """Mask [.., n_v] of the coefficients at or above a threshold; the first `n_dense` subnetworks always take part."""
    mask = coefficients.abs() >= threshold
    mask[..., :n_dense] = True
    return mask


class RunningThreshold(nn.Module):
    """Running mean of batch top-k's threshold, for inference: a sample alone is encoded as it would be in any batch.

    `value` [R]: exponential mean over the batches seen (`momentum` is the weight of the past); 0 before the first.
    """

    value: Tensor
    started: Tensor

    def __init__(self, restarts: int = 1, momentum: float = 0.99):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(restarts))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def update(self, threshold: Tensor) -> None:
        """Take in the threshold [R] of one batch."""
        weight = torch.where(self.started, 1 - self.momentum, 1.0)
        self.value.lerp_(threshold.to(self.value), weight.to(self.value))
        self.started.fill_(True)

    def forward(self, coefficients: Tensor, n_dense: int = 0) -> Tensor:
        """Mask [N, R, n_v] of the coefficients at or above the running threshold, and of the first `n_dense`."""
        return at_threshold(coefficients, self.value.unsqueeze(1), n_dense)
