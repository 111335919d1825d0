"""What is logged, as torchmetrics: states are sums, so that they are right over batches, epochs and processes."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class Reconstruction(Metric):
    """L over all samples seen: summed squared error over summed squared norms, [R] (paper, "Reconstruction loss").

    `compute` gives the squared ratio; its square root is the ratio of norms ‖g - V_out c‖ / ‖g‖.
    """

    higher_is_better = False
    full_state_update = False
    error: Tensor
    energy: Tensor

    def __init__(self, restarts: int = 1):
        super().__init__()
        self.add_state("error", torch.zeros(restarts, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("energy", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, energy: Tensor) -> None:
        """Take in a batch's loss [R] and its sum of squared gradient norms."""
        self.error.add_(loss.detach().double() * energy.double())
        self.energy.add_(energy.double())

    def compute(self) -> Tensor:
        return self.error / self.energy.clamp_min(torch.finfo(torch.float32).tiny)


class Activity(Metric):
    """How often each subnetwork takes part: `p_act` [R, n_v]; `l0` [R], mean active per sample; `dead_fraction` [R]."""

    full_state_update = False
    counts: Tensor
    samples: Tensor

    def __init__(self, restarts: int, n_subnetworks: int):
        super().__init__()
        self.add_state("counts", torch.zeros(restarts, n_subnetworks, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, active: Tensor, samples: int) -> None:
        """Take in the number of a batch's samples in which each subnetwork took part, [R, n_v]."""
        self.counts.add_(active)
        self.samples.add_(samples)

    def compute(self) -> Mapping[str, Tensor]:
        p_act = self.counts / self.samples.clamp_min(1)
        return {"p_act": p_act, "l0": p_act.sum(1), "dead_fraction": (self.counts == 0).float().mean(1)}
