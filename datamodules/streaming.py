"""Streams that can be taken up anywhere, and loaders whose workers change nothing.

A loader hands out numbered batches: batch i is a pure function of (seed, i), read by whichever worker process is next.
So where a loader stands is the number of batches that it has given, no matter how far its workers have read ahead.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from datamodules.loading import Batch, EpochSampler, generator
from datamodules.records import BadRecord, BadRecords, Source

# ---------------------------------------------------------------- loaders


@dataclass
class Given:
    """A batch, and what the main process has to know of how a worker came by it.

    Args:
        batch: this rank's rows.
        bookmark: from where a stream can be read on behind this batch.
        bad: bad records met on the way; every rank and worker meets the same ones.
        bad_here: those met in this rank's rows only.
        n_read: records that the worker has read.
    """

    batch: Batch
    bookmark: dict[str, Any] | None = None
    bad: list[BadRecord] = field(default_factory=list)
    bad_here: list[BadRecord] = field(default_factory=list)
    n_read: int = 0


class NumberedBatches(Protocol):
    """This rank's batches by their number; a worker asks for ascending numbers."""

    def batch(self, number: int) -> Given: ...


class IndexedBatches:
    """Batches of a dataset that is indexed with row numbers, in the order of an `EpochSampler`."""

    def __init__(self, dataset: Dataset[Batch], sampler: EpochSampler) -> None:
        self.dataset = dataset
        self.sampler = sampler

    def batch(self, number: int) -> Given:
        return Given(self.dataset[self.sampler.rows(number)])


class _WorkersShare(IterableDataset[Given]):
    """Every n-th batch, in one of n workers: taken in turn, as a DataLoader takes them, they are all of them."""

    def __init__(self, batches: NumberedBatches, numbers: range) -> None:
        self.batches = batches
        self.numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        try:
            for number in self.numbers if worker is None else self.numbers[worker.id :: worker.num_workers]:
                yield self.batches.batch(number)
        except ValueError as error:  # raised in the main process, or torch would make twenty lines of it
            yield error


def _as_it_is(given: Any) -> Any:
    return given


class NumberedLoader:
    """A loader with a length that goes on exactly where `sampler` stands, with any number of workers.

    Workers live on from epoch to epoch and read ahead across the border. A loader that is not `endless`, for
    validation, starts at batch 0 every time.

    Args:
        batches: what is read.
        sampler: where the loader stands (an `EpochSampler` or a `StreamPlace`); it is counted on.
        num_workers: worker processes; 0 reads in this process.
        prefetch: batches that each worker reads ahead.
        endless: for training.
        bad: where bad records of a stream are counted.
    """

    def __init__(
        self,
        batches: NumberedBatches,
        sampler: "EpochSampler | StreamPlace",
        *,
        num_workers: int = 0,
        prefetch: int = 2,
        endless: bool = True,
        bad: BadRecords | None = None,
    ) -> None:
        self.batches = batches
        self.sampler = sampler
        self.batch_sampler = None  # Lightning looks for one
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.endless = endless
        self.bad = BadRecords(0.0, 0) if bad is None else bad
        self._stream: Iterator[Given] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def _read(self, numbers: range) -> Iterator[Given]:
        loader: DataLoader[Any] = DataLoader(
            _WorkersShare(self.batches, numbers),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            generator=torch.Generator(),  # torch draws a seed for workers, and would take it from the global state
        )
        for given in loader:
            if isinstance(given, ValueError):
                raise given
            yield given

    def __iter__(self) -> Iterator[Batch]:
        if not self.endless:
            for given in self._read(range(len(self))):
                yield given.batch
            return
        for _ in range(len(self)):
            if self._stream is None:
                self._stream = self._read(range(self.sampler.batches_given, 2**62))
            given = next(self._stream)
            self.sampler.batches_given += 1
            if isinstance(self.sampler, StreamPlace):
                self.sampler.bookmark = given.bookmark
                self.bad.add(given.bad)
                self.bad.add(given.bad_here, weight=self.sampler.world_size)
                self.bad.check(given.n_read)
            yield given.batch

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()  # workers that have read ahead of where this goes on
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Stop the workers."""
        self._stream = None


# ---------------------------------------------------------------- streams


class StreamPlace:
    """Where a stream stands: the batches given, and a bookmark in the files, the same on all ranks.

    Args:
        steps_per_epoch: batches that are called an epoch.
        world_size: number of processes.
        identity: what gives the place its meaning; a place in another stream is refused.
    """

    def __init__(self, steps_per_epoch: int, world_size: int, identity: dict[str, Any]) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.world_size = world_size
        self.identity = identity
        self.batches_given = 0
        self.bookmark: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """See `EpochSampler.set_epoch`."""
        if self.batches_given == 0:
            self.batches_given = epoch * len(self)

    def state_dict(self) -> dict[str, Any]:
        return {"batches_given": self.batches_given, "bookmark": self.bookmark, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        ValueError: the state is of another stream.
        """
        for key, value in self.identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"cannot go on in the middle of the stream: the checkpoint was written with {key} = "
                    f"{state.get(key)!r}, this run has {key} = {value!r} (batch_size counts all processes)"
                )
        self.batches_given, self.bookmark = int(state["batches_given"]), state["bookmark"]


@dataclass(frozen=True)
class Bookmark:
    """The beginning of a block of a stream: passes over the data, file and row in this one, what came before."""

    passes: int = 0
    file: int = 0
    row: int = 0
    block: int = 0
    samples: int = 0
    left: tuple[int, ...] = ()


class StreamedBatches:
    """An endless stream of samples, pass after pass over the files, cut into batches.

    Its i-th sample is a function of (seed, i): in every pass the files come in a new order, records are read one after
    another, and within each block of `buffer` records the samples are shuffled. Every rank and every worker reads
    all records, but only turns those of its own batches into tensors. There is no last batch: the next pass
    fills it up. A record that is found bad only then leaves its batch one row shorter, so nobody else need know.

    Args:
        source: the records.
        expand: (a block's records as (content, file, row), what the last block left) -> (samples, what is left over).
        collate: samples -> (batch or None if there is no good one, bad records).
        batch_size: rows per batch and rank.
        seed, shuffle: of the order.
        buffer: records per block.
        rank, world_size: this process and the number of processes.
        place: its bookmark says where to start reading.
    """

    def __init__(
        self,
        source: Source,
        expand: Callable[[list[Any], tuple[int, ...]], tuple[list[Any], tuple[int, ...]]],
        collate: Callable[[list[Any]], tuple[Batch | None, list[BadRecord]]],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        buffer: int,
        rank: int,
        world_size: int,
        place: StreamPlace,
    ) -> None:
        self.source = source
        self.expand = expand
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.buffer = buffer
        self.rank = rank
        self.world_size = world_size
        self.place = place
        self._blocks: Iterator[tuple[Bookmark, list[Any]]] | None = None
        self._mark, self._samples = Bookmark(), list[Any]()
        self._bad: list[BadRecord] = []
        self._n_read = 0

    def _permuted(self, stream: str, number: int, n: int) -> list[int]:
        if not self.shuffle:
            return list(range(n))
        return torch.randperm(n, generator=generator(stream, self.seed, number)).tolist()

    def _read(self, mark: Bookmark) -> Iterator[tuple[Bookmark, list[Any]]]:
        """Blocks of samples, in their order, each with its bookmark."""

        def block(records: list[Any], passes: int, file: int, row: int) -> tuple[list[Any], Bookmark]:
            samples, left = self.expand(records, mark.left)
            shuffled = [samples[i] for i in self._permuted("block", mark.block, len(samples))]
            return shuffled, Bookmark(passes, file, row, mark.block + 1, mark.samples + len(samples), left)

        while True:
            records: list[Any] = []
            whole_pass, before = (mark.file, mark.row) == (0, 0), (mark.samples, mark.left)
            order = self._permuted("files", mark.passes, len(self.source.files))
            for (file, row), record in self.source.read(order, (mark.file, mark.row)):
                self._n_read += 1
                if record is None:
                    continue
                if isinstance(record, BadRecord):
                    self._bad.append(record)
                    continue
                records.append((record, self.source.files[order[file]], row))
                if len(records) == self.buffer:
                    samples, after = block(records, mark.passes, file, row + 1)
                    yield mark, samples
                    mark, records = after, []
            samples, after = block(records, mark.passes + 1, 0, 0)
            yield mark, samples
            mark = after
            if whole_pass and (mark.samples, mark.left) == before:  # or this would go round for ever
                first = f": {self._bad[0]}" if self._bad else ""
                raise ValueError(f"source: there is no good record in {len(order)} file(s){first}")

    def _reach(self, index: int) -> None:
        """Read on to the block that holds sample `index`."""
        if self._blocks is None:
            start = self.place.bookmark
            mark = Bookmark() if start is None else Bookmark(**{**start, "left": tuple(start["left"])})
            self._blocks = self._read(mark)
            self._mark, self._samples = next(self._blocks)
        while index >= self._mark.samples + len(self._samples):
            self._mark, self._samples = next(self._blocks)

    def batch(self, number: int) -> Given:
        """Raises a ValueError where this rank's part of the batch holds bad records only."""
        start = number * self.batch_size * self.world_size
        self._reach(start)
        bookmark = asdict(self._mark)
        rows = []
        for index in range(start + self.rank * self.batch_size, start + (self.rank + 1) * self.batch_size):
            self._reach(index)
            rows.append(self._samples[index - self._mark.samples])
        batch, bad_here = self.collate(rows)
        if batch is None:
            raise ValueError(
                f"data: all {len(rows)} records of a batch are bad ({bad_here[0]}); try a larger batch_size"
            )
        bad, self._bad = self._bad, []
        return Given(batch, {**bookmark, "left": list(bookmark["left"])}, bad, bad_here, self._n_read)
