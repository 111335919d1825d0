"""The processes of a data-parallel run, as the method sees them: sums over all ranks' samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class Ranks:
    """The ranks that share a batch, each with samples of its own.

    Args:
        group: their process group; None: this process is alone, and nothing is sent.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.size: int = 1 if group is None else dist.get_world_size(group)
        self.rank: int = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of_run(cls) -> Ranks:
        """All ranks of the run, if there are several."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.group.WORLD)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same on each."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def count(self, number: int, device: torch.device) -> int:
        """The sum of a whole number over all ranks (sent from `device`, where the group's tensors have to be)."""
        return number if self.size == 1 else int(self.sum(torch.tensor(number, device=device)))

    def before(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks before this one."""
        if self.size == 1:
            return torch.zeros_like(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)[: self.rank].sum(0)

    def broadcast_(self, *tensors: Tensor) -> None:
        """Overwrite tensors by those of the first rank."""
        if self.size > 1:
            for tensor in tensors:
                value = tensor.detach().contiguous()
                dist.broadcast(value, dist.get_global_rank(self.group, 0), group=self.group)
                tensor.detach().copy_(value)

    def gather(self, thing: Any) -> list[Any]:
        """Every rank's `thing` (plain numbers, strings, CPU tensors), in their order."""
        if self.size == 1:
            return [thing]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, thing, group=self.group)
        return parts


ALONE = Ranks()
