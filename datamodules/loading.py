"""Batches in an order that a stopped run can take up again exactly, on any number of processes.

Nothing about the order is drawn from a global random state: an epoch's order is a function of (seed, epoch), so the
whole state of a training loader is one number, the batches it has given. The epochs of the trainer do not enter.
"""

import difflib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

Batch = dict[str, Tensor]


def generator(stream: str, *key: int) -> torch.Generator:
    """A CPU random generator that depends on the stream's name and the numbers of `key`, and on nothing else.

    Sums such as `seed + epoch` would give neighbouring seeds the same numbers; NumPy's SeedSequence mixes them.
    """
    mixed = np.random.SeedSequence([int.from_bytes(stream.encode()), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))


def require_at_least(least: int, **values: int) -> None:
    """Raise a ValueError that names the first of `values` that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}: found {value}, allowed are whole numbers >= {least}")


def require_choice(key: str, value: str, options: Iterable[str]) -> None:
    """Raise a ValueError with the nearest option unless `value` is one of `options`."""
    options = list(options)
    if value not in options:
        near = difflib.get_close_matches(value, options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key}: found {value!r}, allowed are {', '.join(options)}{hint}")


class Rows(Dataset[Batch]):
    """Tensors of one length kept in memory, indexed by a whole batch of row numbers at once.

    Args:
        tensors: what a batch consists of, each of shape [rows, ...].

    Raises:
        ValueError: there is no row, or the tensors differ in length.
    """

    def __init__(self, **tensors: Tensor) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all tensors of a dataset need the same number of rows, found {lengths}")
        self.tensors = tensors
        if len(self) == 0:
            raise ValueError("the dataset is empty: 0 rows")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor) -> Batch:
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


class EpochSampler(DistributedSampler[Tensor]):
    """Yields the row numbers of whole batches, int64 [rows]; every row once per epoch, over all ranks together.

    It is one endless stream of batches, cut into epochs of `len(self)`: every iterator gives that many, and goes on
    where the last one stopped, be that in the middle of an epoch. The i-th batch of the stream is a pure function of
    (seed, i), and the state is the number of batches given. (With `shuffle=False`, for validation, every iterator
    starts at the first row.)

    The ranks' i-th batches, concatenated in the order of the ranks, are the i-th batch of a single process with batch
    size `batch_size * world_size`: data-parallel training sees the same global batches on any number of processes. The
    last batch of an epoch is smaller where the rows do not divide evenly. Where that would leave a rank fewer than two
    rows, they join the batch before: in a batch of one, nobody can be compared with somebody else, and a rank without
    a batch would keep all the others waiting.

    It is a DistributedSampler so that Lightning does not wrap it in another one, which would shard it twice.

    Args:
        dataset: anything with a length; only the length is used.
        batch_size: rows per batch and rank.
        seed: of the order.
        rank, world_size: this process and the number of processes.
        shuffle: a new permutation in every epoch, otherwise the order of the rows.
        endless: epoch e yields the row numbers e·n to (e+1)·n - 1 in their order, for data that is made from its row
            number and so never comes twice.

    Raises:
        ValueError: batch size below 1, an empty dataset, fewer rows than ranks, a rank that does not exist.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        endless: bool = False,
    ) -> None:
        require_at_least(1, batch_size=batch_size, world_size=world_size)
        require_at_least(0, seed=seed)
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.n_rows = len(dataset)  # type: ignore[arg-type]
        if self.n_rows < world_size:
            raise ValueError(f"the dataset has {self.n_rows} rows, too few for {world_size} process(es) and a row each")
        self.batch_size = batch_size
        self.endless = endless
        self.batches_given = 0
        self._ordered: tuple[int, Tensor] | None = None  # the latest epoch asked for, and its order
        self._bounds = self._shard(batch_size * world_size)

    def _shard(self, global_size: int) -> list[tuple[int, int]]:
        """First and last + 1 place of each of this rank's batches in the order of an epoch."""
        starts = list(range(0, self.n_rows, global_size))
        if len(starts) > 1 and self.n_rows - starts[-1] < 2 * self.num_replicas:
            starts.pop()
        stops = [*starts[1:], self.n_rows]

        def edge(start: int, stop: int, rank: int) -> int:
            return start + (stop - start) * rank // self.num_replicas

        return [(edge(a, b, self.rank), edge(a, b, self.rank + 1)) for a, b in zip(starts, stops, strict=True)]

    def __len__(self) -> int:
        """Batches per epoch, the same on all ranks."""
        return len(self._bounds)

    def order(self, epoch: int) -> Tensor:
        """The row numbers of an epoch in their order, all ranks together, int64 [rows]."""
        if self.endless:
            return torch.arange(epoch * self.n_rows, (epoch + 1) * self.n_rows)
        if self.shuffle:
            return torch.randperm(self.n_rows, generator=generator("order", self.seed, epoch))
        return torch.arange(self.n_rows)

    def rows(self, number: int) -> Tensor:
        """This rank's row numbers in batch `number` of the stream, int64 [rows]."""
        epoch, batch = divmod(number, len(self))
        if self._ordered is None or self._ordered[0] != epoch:
            self._ordered = epoch, self.order(epoch)
        start, stop = self._bounds[batch]
        return self._ordered[1][start:stop]

    def __iter__(self) -> Iterator[Tensor]:
        # A generator runs nothing before its first `next`: Lightning makes iterators that it never uses.
        if not (self.shuffle or self.endless):
            self.batches_given = 0
        for _ in range(len(self)):
            self.batches_given += 1
            yield self.rows(self.batches_given - 1)

    def set_epoch(self, epoch: int) -> None:
        """Put a stream that has given nothing yet to the beginning of an epoch; otherwise do nothing.

        Lightning calls this before every epoch, with a count that is one too high after some resumes. Only where it
        resumes between two epochs without handing out any state, and the data module has none, is it all there is.
        """
        if self.batches_given == 0:
            self.batches_given = epoch * len(self)

    def _identity(self) -> dict[str, int | bool]:
        return {
            "rows": self.n_rows,
            "batch_size": self.batch_size * self.num_replicas,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "endless": self.endless,
        }

    def state_dict(self) -> dict[str, int | bool]:
        """The batches given, and what gives that number its meaning; `batch_size` is global. The same on all ranks."""
        return {"batches_given": self.batches_given, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that was the last to be given when the state was saved.

        Raises:
            ValueError: the state is of other data, another batch size (over all processes) or another seed.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(
                    f"cannot go on in the middle of the data: the checkpoint was written with {key} = "
                    f"{state.get(key)!r}, this run has {key} = {value!r} (batch_size counts all processes)"
                )
        self.batches_given = int(state["batches_given"])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def exact_loader(
    dataset: Dataset[Batch],
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    endless: bool = False,
) -> StatefulDataLoader[Batch]:
    """A loader over data in memory that goes on exactly where its state says; arguments as for `EpochSampler`.

    `dataset` is indexed once per batch, with a tensor of row numbers. The loader has a length (without one, Lightning
    fetches a batch ahead, and a resumed run would miss it) and draws nothing from the global random state.
    """
    sampler = EpochSampler(
        dataset, batch_size, seed=seed, rank=rank, world_size=world_size, shuffle=shuffle, endless=endless
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch >= 2.13
        return StatefulDataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=cast(Any, _as_it_is),
            generator=torch.Generator(),  # torch draws a seed for workers, and would take it from the global state
        )


class InMemoryData(LightningDataModule):
    """A data module whose three datasets lie in memory: `setup` of a subclass fills `train`, `validation`, `test`.

    Training batches come from `exact_loader`, shuffled anew in every epoch; validation and test rows come in their
    order, each set as one batch per process, so that a figure that depends on the batch (batch top-k does) is not a
    matter of how the set was cut up.

    To stop a run so that it can go on exactly, save inside `on_train_batch_end` and then set `trainer.should_stop`.
    After `fit` has returned, Lightning counts the epoch that was cut short as a whole one: the rows would still come in
    the right order, but a run limited by `max_epochs` would end too early.

    Args:
        batch_size: training rows per batch and process.
        seed: of the order of the training rows; None: that of Lightning's `seed_everything`, or 0.
        endless: see `EpochSampler`.
    """

    train: Dataset[Batch]
    validation: Dataset[Batch]
    test: Dataset[Batch]
    _train_sampler: EpochSampler | None = None
    _state: dict[str, Any] | None = None

    def __init__(self, batch_size: int, seed: int | None, endless: bool = False) -> None:
        super().__init__()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        require_at_least(1, batch_size=batch_size)
        require_at_least(0, seed=seed)
        self.batch_size = batch_size
        self.seed = seed
        self.endless = endless
        # Lightning recommends worker processes, which would only slow down data that is there already.
        warnings.filterwarnings("ignore", r".*_dataloader' does not have many workers")

    @property
    def _place(self) -> tuple[int, int]:
        """This process and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, dataset: Dataset[Batch], batch_size: int | None = None) -> StatefulDataLoader[Batch]:
        rank, world_size = self._place
        training = batch_size is not None
        return exact_loader(
            dataset,
            batch_size or -(-len(dataset) // world_size),  # type: ignore[arg-type]
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            shuffle=training,
            endless=training and self.endless,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning's own, but for batches that are where they should be: its walk costs more than a toy's forward."""
        if device.type == "cpu":
            return batch
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def train_dataloader(self) -> StatefulDataLoader[Batch]:
        loader = self._loader(self.train, self.batch_size)
        self._train_sampler = loader.sampler
        if self._state:
            self._train_sampler.load_state_dict(self._state)
            self._state = None
        return loader

    def first_dataloader(self) -> StatefulDataLoader[Batch]:
        """This process's training batches from the very first one; training is left alone."""
        return self._loader(self.train, self.batch_size)

    # Lightning keeps the loader's own state in its checkpoints as well, but hands it out only where it resumes in the
    # middle of an epoch.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._train_sampler is None else self._train_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def val_dataloader(self) -> StatefulDataLoader[Batch]:
        return self._loader(self.validation)

    def test_dataloader(self) -> StatefulDataLoader[Batch]:
        return self._loader(self.test)
