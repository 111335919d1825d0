"""The processes of a run, as the method sees them: sums over all ranks' samples, shards of V that go round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def mean_(self, tensor: Tensor) -> None:
        """Overwrite a tensor by its mean over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
            tensor /= self.size

    def count(self, number: int, device: torch.device) -> int:
        """The sum of a whole number over all ranks (sent from `device`, where the group's tensors have to be)."""
        return number if self.size == 1 else int(self.sum(torch.tensor(number, device=device)))

    def first(self, value: Any) -> Any:
        """The first rank's value, a number, instead of each one's own."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, dist.get_global_rank(self.group, 0), group=self.group)
        return values[0]

    def before(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks before this one."""
        if self.size == 1:
            return torch.zeros_like(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)[: self.rank].sum(0)

    def place_of(self, n: int, device: torch.device) -> tuple[slice, int]:
        """Where this rank's n things lie among those of all ranks, in their order, and how many these are."""
        if self.size == 1:
            return slice(0, n), n
        number = torch.tensor(n, device=device)
        first = int(self.before(number))
        return slice(first, first + n), int(self.sum(number))

    def rows(self, own: Tensor, index: Tensor) -> Tensor:
        """Rows of all ranks' tensors below each other, each rank asking for those at its `index`; only these travel."""
        if self.size == 1:
            return own[index]
        sizes = torch.cat(self.all_gather(torch.tensor([len(own)], device=own.device)))
        ends = sizes.cumsum(0)
        owner = torch.bucketize(index, ends, right=True)
        order = owner.argsort(stable=True)
        asks = torch.stack(self.all_gather(owner.bincount(minlength=self.size)))  # [who asks, whom]
        mine, theirs = asks[self.rank].tolist(), asks[:, self.rank].tolist()
        wanted, found = index.new_empty(sum(theirs)), own.new_empty(len(index), *own.shape[1:])
        asked = (index - (ends - sizes)[owner])[order]
        dist.all_to_all_single(wanted, asked, theirs, mine, group=self.group)
        dist.all_to_all_single(found, own[wanted], mine, theirs, group=self.group)
        return found[order.argsort()]

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

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in their order; sizes may differ, not the number of dimensions."""
        if self.size == 1:
            return [tensor]
        own = torch.tensor(tensor.shape, device=tensor.device)
        shapes = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(shapes, own, group=self.group)
        largest = torch.stack(shapes).amax(0).tolist()
        padded = tensor.new_zeros(largest)
        padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self.group)
        return [whole[tuple(slice(0, int(size)) for size in shape)] for whole, shape in zip(found, shapes, strict=True)]

    def join(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """Every rank's rows below each other, in one piece; `rows`: how many each has, of one size."""
        most = max(rows)
        if len(tensor) < most:
            tensor = torch.cat([tensor, tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])
        whole = tensor.new_empty(self.size * most, *tensor.shape[1:])
        dist.all_gather_into_tensor(whole, tensor.contiguous(), group=self.group)
        if min(rows) == most:
            return whole
        return torch.cat([whole[i * most : i * most + count] for i, count in enumerate(rows)])

    def shard_of(self, n: int, rank: int | None = None) -> slice:
        """Which of n things a rank (default: this one) owns: equal parts, the last ones smaller, as DTensor cuts."""
        part = -(-n // self.size)
        first = part * (self.rank if rank is None else rank)
        return slice(min(n, first), min(n, first + part))

    def ring(self, parts: Sequence[Tensor], n: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Shard after shard of n things as it passes: (which of them, their tensors), the own one first.

        Args:
            parts: tensors of this rank's shard, the first dimension being that of the things; on other ranks they
                differ in its size only.
        """
        if self.size == 1:
            yield slice(0, n), list(parts)
            return
        shapes, buffer = [part.shape[1:] for part in parts], torch.cat([part.detach().flatten() for part in parts])
        sizes, owner = [shape.numel() for shape in shapes], self.rank
        ahead, behind = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1))
        for hop in range(self.size):
            which, works = self.shard_of(n, owner), []
            count = which.stop - which.start
            owner = (owner - 1) % self.size
            incoming = self.shard_of(n, owner)
            received = buffer.new_empty((incoming.stop - incoming.start) * sum(sizes))
            if hop < self.size - 1:  # the next one travels while this one is worked on
                sends = [
                    dist.P2POp(dist.isend, buffer, ahead, self.group),
                    dist.P2POp(dist.irecv, received, behind, self.group),
                ]
                sends = [send for send in sends if send.tensor.numel()]  # (a shard of nothing is not sent)
                works = dist.batch_isend_irecv(sends) if sends else []
            split = buffer.split([count * size for size in sizes])
            yield which, [part.view(count, *shape) for part, shape in zip(split, shapes, strict=True)]
            for work in works:
                work.wait()
            buffer = received


ALONE = Ranks()
