"""What data from files has in common: loaders whose workers change nothing, and stores that are written once.

A loader hands out numbered batches: batch i is a pure function of (seed, i), read by whichever worker process is next.
So the state of a loader is the number of batches that it has given, no matter how far its workers have read ahead.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.constants import HF_HOME
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from datamodules.loading import Batch, EpochSampler


class Place(Protocol):
    """Where a training loader stands: its state, which Lightning keeps in the checkpoint."""

    batches_given: int

    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NumberedBatches(Protocol):
    """This rank's batches by their number; a worker asks for ascending numbers."""

    def batch(self, number: int) -> Batch: ...


class IndexedBatches:
    """Batches of a dataset that is indexed with row numbers, in the order of an `EpochSampler`."""

    def __init__(self, dataset: Dataset[Batch], sampler: EpochSampler) -> None:
        self.dataset = dataset
        self.sampler = sampler

    def batch(self, number: int) -> Batch:
        return self.dataset[self.sampler.rows(number)]  # type: ignore[index]


class _WorkersShare(IterableDataset[Batch]):
    """Every n-th batch, in one of n workers: in turn, which is how a DataLoader asks them, they are all of them."""

    def __init__(self, batches: NumberedBatches, numbers: range) -> None:
        self.batches = batches
        self.numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        share = self.numbers if worker is None else self.numbers[worker.id :: worker.num_workers]
        try:
            for number in share:
                yield self.batches.batch(number)
        except ValueError as error:  # raised in the main process, or torch would make twenty lines of it
            yield error


def _as_it_is(batch: Any) -> Any:
    return batch


class NumberedLoader:
    """A loader with a length that goes on exactly where `sampler` says, with any number of workers.

    Workers live on from epoch to epoch and read ahead across the border. A loader that is not `endless`, for
    validation, starts at batch 0 every time.

    Args:
        batches: what is read.
        sampler: where the loader stands; it counts here.
        num_workers: worker processes; 0 reads in this process.
        prefetch: batches that each worker reads ahead.
        endless: for training.
    """

    def __init__(
        self,
        batches: NumberedBatches,
        sampler: Place,
        *,
        num_workers: int = 0,
        prefetch: int = 2,
        endless: bool = True,
    ) -> None:
        self.batches = batches
        self.sampler = sampler
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.endless = endless
        self._stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def _read(self, numbers: range) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _WorkersShare(self.batches, numbers),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            generator=torch.Generator(),  # torch draws a seed for workers, and would take it from the global state
        )
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch

    def __iter__(self) -> Iterator[Batch]:
        if not self.endless:
            yield from self._read(range(len(self)))
            return
        for _ in range(len(self)):
            if self._stream is None:
                self._stream = self._read(range(self.sampler.batches_given, 2**62))
            batch = next(self._stream)
            self.sampler.batches_given += 1
            yield batch

    def close(self) -> None:
        """Stop the workers."""
        self._stream = None


# ---------------------------------------------------------------- stores


def cache_folder(cache_dir: Path | str | None) -> Path:
    return Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "datamodules"


def fingerprint(*values: Any) -> str:
    """Sixteen hexadecimal digits that depend on `values`, which JSON must be able to write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def stored(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` if it is not there yet; it appears whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
            inner = Path(aside) / folder.name
            inner.mkdir()
            write(inner)
            if not folder.is_dir():  # another process may have been faster
                os.rename(inner, folder)
    except OSError as error:
        if not folder.is_dir():
            raise ValueError(f"cache_dir: {folder} cannot be written ({error.strerror or error})") from error
    return folder
