"""Batch top-k (paper, "batchTopK"): which coefficients of a batch take part in the reconstruction.

Over the whole batch, all samples and subnetworks together, the fraction k with the largest |c| is kept: a sample that
needs more subnetworks gets more.
"""

import torch
from torch import Tensor, nn

from l3d_pl.errors import L3DError


def check_k(k: float, key: str = "k") -> float:
    """Raise unless 0 < k <= 1."""
    if not 0 < k <= 1:
        raise L3DError(f"{key}: found {k}; allowed is the fraction of coefficients to keep, in (0, 1]")
    return k


def n_selected(k: float, n: int) -> int:
    """How many of n coefficients the fraction k is: rounded, and at least one."""
    return min(n, max(1, round(k * n)))


def batch_topk(coefficients: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """Select exactly the fraction k of |c| over a batch [N, R, n_v], for each of R restarts by itself.

    Ties at the threshold go to the earlier entries (sample, then subnetwork), so that the number kept is exact and the
    choice does not depend on the device.

    Returns:
        mask [N, R, n_v] of bool, and the threshold [R]: the smallest |c| kept.
    """
    samples, restarts, n_subnetworks = coefficients.shape
    scores = coefficients.detach().abs().transpose(0, 1).reshape(restarts, -1)
    count = n_selected(k, samples * n_subnetworks)
    threshold = scores.topk(count, dim=1, sorted=True).values[:, -1]
    mask = scores >= threshold.unsqueeze(1)
    if scores.is_cuda or int(mask.sum()) != count * restarts:  # on a GPU always: no round trip to look at the number
        above, tied = scores > threshold.unsqueeze(1), scores == threshold.unsqueeze(1)
        room = count - above.sum(1, keepdim=True)
        mask = above | (tied & (tied.cumsum(1) <= room))
    return mask.view(restarts, samples, n_subnetworks).transpose(0, 1), threshold


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

    def forward(self, coefficients: Tensor) -> Tensor:
        """Mask [N, R, n_v] of the coefficients at or above the running threshold."""
        return coefficients.abs() >= self.value.unsqueeze(1)
