"""What `TextData` and `ImageData` share: finding files, stores that are written once, and their data module."""

import hashlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from rich.progress import track
from torch.utils.data import Dataset

from datamodules.loading import Batch, EpochSampler, InMemoryData, require_at_least, require_choice
from datamodules.records import BadRecord, BadRecords, Files, Record, Source, Unfit, find_files
from datamodules.streaming import IndexedBatches, NumberedLoader, StreamedBatches, StreamPlace


def cache_folder(cache_dir: Path | str | None) -> Path:
    """Where stores are kept: `cache_dir`, or else beside what Hugging Face's libraries keep."""
    return Path(HF_HOME) / "datamodules" if cache_dir is None else Path(cache_dir).expanduser()


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
            raise ValueError(f"cache_dir: {folder} cannot be made ({error.strerror or error})") from error
    return folder


def _scattered(file: str) -> int:
    return zlib.crc32("/".join(file.split("/")[-2:]).encode())


class FileData(InMemoryData):
    """What `TextData` and `ImageData` share. Arguments that both have are described here.

    Training data are either stored (read once, without the bad records, into `cache_dir`; indexed from then on) or
    streamed (`StreamedBatches`). Validation and test data are always stored.

    Args:
        source: a file, a list of files, a glob or a directory: parquet, jsonl, csv, text, a folder of images by class,
            webdataset's tar shards; an id on Hugging Face's hub; a mapping from splits to such files; or what is
            built in (`pydoc`, `digits`).
        config: which configuration of a hub data set that has several.
        train_split, val_split, test_split: splits by name. Without `val_split` it is the one called validation or val,
            or else `val_fraction` of the training records. Without `test_split` the validation data are the test data.
        val_fraction: share of the training records that are for validation, chosen by their checksums: the same in
            every run, and never in both, even if a record comes twice.
        streaming: read the training files anew in every pass and keep nothing, for what does not fit on a disk.
        steps_per_epoch: batches that are called an epoch of a stream.
        shuffle: whether training data come in a new order in every pass.
        shuffle_buffer: records of a stream that are kept and shuffled together.
        max_rows: use only this many training records, the first good ones (a folder of images has its classes mixed).
            Not for a stream: so few are stored.
        n_val: use only this many rows for validation, and for test; None: all.
        batch_size: training rows per batch and process.
        val_batch_size: the same for validation and test; None: `batch_size`.
        num_workers: processes that read ahead; they do not change what is seen.
        prefetch: batches that each of them reads ahead.
        max_bad_fraction: bad records (undecodable, empty, the rest of a truncated file) are left out, up to this share
            of the records and of the files; `bad_records` lists the first.
        seed: of the order of the training rows; None: that of `seed_everything`, or 0.
        cache_dir: where stores are kept; None: beside what Hugging Face's libraries keep.

    Raises:
        ValueError: one line, if a value is outside its range, or (from `setup`) nothing can be read or too much is bad.
    """

    columns: tuple[str, ...]  # of a record, that are used
    train: Dataset[Batch] | None = None  # type: ignore[assignment]  # none of a stream
    validation: Dataset[Batch] | None  # type: ignore[assignment]
    test: Dataset[Batch] | None  # type: ignore[assignment]  # None: the validation data

    def __init__(
        self,
        source: Files,
        config: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        streaming: bool = False,
        steps_per_epoch: int | None = None,
        shuffle: bool = True,
        shuffle_buffer: int = 1000,
        max_rows: int | None = None,
        n_val: int | None = 256,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        max_bad_fraction: float = 0.01,
        seed: int | None = None,
        cache_dir: Path | str | None = None,
    ) -> None:
        super().__init__(batch_size, seed)
        at_least_one = {
            "steps_per_epoch": steps_per_epoch,
            "shuffle_buffer": shuffle_buffer,
            "max_rows": max_rows,
            "n_val": n_val,
            "val_batch_size": val_batch_size,
            "prefetch": prefetch,
        }
        require_at_least(1, **{name: value for name, value in at_least_one.items() if value is not None})
        require_at_least(0, num_workers=num_workers)
        for name, fraction in (("val_fraction", val_fraction), ("max_bad_fraction", max_bad_fraction)):
            if not 0 <= fraction < 1:
                raise ValueError(f"{name}: found {fraction}, allowed are numbers in [0, 1)")
        if streaming and steps_per_epoch is None:
            raise ValueError("steps_per_epoch: found None; a stream has no length, so streaming = True needs a number")
        if not streaming and steps_per_epoch is not None:
            raise ValueError(f"steps_per_epoch: found {steps_per_epoch}; it is for streaming = True only")
        if streaming and max_rows is not None:
            raise ValueError(f"max_rows: found {max_rows} with streaming = True; without, no more is read than that")
        self.source = source
        self.config = config
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.val_fraction = val_fraction
        self.streaming = streaming
        self.steps_per_epoch = steps_per_epoch
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.max_rows = max_rows
        self.limits = {"train": None, "val": n_val, "test": n_val}  # rows of each store
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.max_bad_fraction = max_bad_fraction
        self.cache_dir = cache_dir
        self._sources: dict[str, Source] = {}
        self._bad_stored = BadRecords(max_bad_fraction, 0)
        self._bad_streamed = BadRecords(max_bad_fraction, 0)
        self._training: NumberedLoader | None = None

    # -- for a subclass to say --------------------------------------------------------------------------------------

    def parse(self, record: Record) -> tuple[Any, bytes]:
        """What is used of a record, and the bytes that tell it from others. Raises `Unfit`."""
        raise NotImplementedError

    def examine(self, content: Any) -> Any:
        """Look closer at what `parse` gave, before it is stored. Raises `Unfit`."""

    def settings(self) -> list[Any]:
        """All that a store depends on besides the records."""
        return []

    def write(self, folder: Path, contents: Iterator[Any], limit: int | None) -> int:
        """Fill a store with at most `limit` rows made of `contents`; returns how many it has."""
        raise NotImplementedError

    def open(self, folder: Path) -> Dataset[Batch]:
        """The dataset in a store."""
        raise NotImplementedError

    def expand(self, contents: list[Any], left: tuple[int, ...]) -> tuple[list[Any], tuple[int, ...]]:
        """See `StreamedBatches`."""
        return contents, ()

    def collate(self, samples: list[Any]) -> tuple[Batch | None, list[BadRecord]]:
        """See `StreamedBatches`."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process needs, should it be started afresh."""
        return {name: value for name, value in self.__dict__.items() if name not in ("trainer", "_training")}

    # -- finding, storing -------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Find the files of each part: train, val and test, as far as there are any. May be called again."""
        if self._sources:
            return
        format, files = find_files(self.source, self.config)
        if format == "imagefolder":  # where the first so many are not to be all of one class
            files = {split: sorted(names, key=_scattered) for split, names in files.items()}
        splits = dict(self.splits)
        if splits["val"] is None:
            splits["val"] = next((name for name in ("validation", "val") if name in files), None)
        for part, split in splits.items():
            if split is not None:
                require_choice(f"{part}_split", split, files)
        border = self.val_fraction if splits["val"] is None else 0.0
        shares = {"train": (border, 1.0), "val": (0.0, 1.0), "test": (0.0, 1.0)}
        if splits["val"] is None and border:
            splits["val"], shares["val"] = splits["train"], (0.0, border)
        for part, split in splits.items():
            if split is not None:
                self._sources[part] = Source(format, tuple(files[split]), self.parse, self.columns, shares[part])

    def _store(self, part: str) -> Dataset[Batch]:
        """The dataset of a part, read and stored if that has not been done yet."""
        source, limit = self._sources[part], self.limits[part]
        most = self.max_rows if part == "train" else None
        key = fingerprint(source.signature(), source.columns, source.share, self.settings(), limit, most)

        def write(folder: Path) -> None:
            bad, n_read, n_rows = BadRecords(self.max_bad_fraction, len(source.files)), 0, 0

            def good() -> Iterator[Any]:
                nonlocal n_read
                bar = track(source.read(), f"reading {part} data", transient=True, disable=not sys.stdout.isatty())
                for position, content in bar:
                    n_read += 1
                    content = self._examined(source, position, content)
                    if isinstance(content, BadRecord):
                        bad.add([content])
                        bad.check(n_read)
                    elif content is not None:
                        yield content

            n_rows = self.write(folder, islice(good(), most), limit)
            bad.check(n_read, finished=True)
            if not n_rows:
                raise ValueError(
                    f"source: no row for {part} came of the {n_read} record(s) in {len(source.files)} file(s)"
                )
            meta = {"n_read": n_read, "bad": [asdict(record) for record in bad]}
            (folder / "meta.json").write_text(json.dumps(meta))

        folder = stored(cache_folder(self.cache_dir) / f"{type(self).__name__}-{part}-{key}", write)
        meta = json.loads((folder / "meta.json").read_text())
        bad = BadRecords(self.max_bad_fraction, len(source.files))
        bad.add(BadRecord(**record) for record in meta["bad"])
        bad.check(meta["n_read"], finished=True)  # it may have been stored under another limit
        self._bad_stored.add(bad)
        return self.open(folder)

    def _examined(self, source: Source, position: tuple[int, int], content: Any) -> Any:
        if content is not None and not isinstance(content, BadRecord):
            try:
                self.examine(content)
            except Unfit as unfit:
                return BadRecord(source.files[position[0]], position[1], str(unfit))
        return content

    @property
    def bad_records(self) -> list[BadRecord]:
        """The first of the bad records that were left out, as far as this process has met them."""
        return [*self._bad_stored.first, *self._bad_streamed.first]

    def prepare_data(self) -> None:
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        self.find()
        if not self.streaming:
            self.train = self._store("train")
        self.validation, self.test = (self._store(p) if p in self._sources else None for p in ("val", "test"))
        if self.trainer is None or self.trainer.is_global_zero:
            self._bad_stored.report()

    def teardown(self, stage: str) -> None:
        if self._training is not None:
            self._training.close()
            self._bad_streamed.report()

    # -- reading ----------------------------------------------------------------------------------------------------

    def _loader(self, dataset: Dataset[Batch] | None, batch_size: int | None = None) -> NumberedLoader:
        """A loader of training rows if `batch_size` is given, else of all rows of `dataset` in their order."""
        rank, world_size = self._place
        if batch_size is not None and self.streaming:
            return self._stream_loader(batch_size, rank, world_size)
        training = batch_size is not None
        assert dataset is not None
        sampler = EpochSampler(
            dataset,
            batch_size or self.val_batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            shuffle=training and self.shuffle,
        )
        return NumberedLoader(
            IndexedBatches(dataset, sampler),
            sampler,
            num_workers=self.num_workers,
            prefetch=self.prefetch,
            endless=training,
        )

    def _stream_loader(self, batch_size: int, rank: int, world_size: int) -> NumberedLoader:
        source = self._sources["train"]
        order = {"seed": self.seed, "shuffle": self.shuffle, "shuffle_buffer": self.shuffle_buffer}
        identity = {
            "files and settings": fingerprint(source.names(), source.columns, source.share, self.settings()),
            "batch_size": batch_size * world_size,
            **order,
        }
        assert self.steps_per_epoch is not None
        place = StreamPlace(self.steps_per_epoch, world_size, identity)
        batches = StreamedBatches(
            source,
            self.expand,
            self.collate,
            batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
            buffer=self.shuffle_buffer,
            rank=rank,
            world_size=world_size,
            place=place,
        )
        self._bad_streamed.n_files = len(source.files)
        return NumberedLoader(
            batches, place, num_workers=self.num_workers, prefetch=self.prefetch, bad=self._bad_streamed
        )

    def train_dataloader(self) -> NumberedLoader:
        self._training = super().train_dataloader()
        return self._training

    def first_dataloader(self) -> NumberedLoader:
        loader: NumberedLoader = super().first_dataloader()
        loader.num_workers = 0  # it is left after some batches, and its workers would linger
        return loader

    def val_dataloader(self) -> NumberedLoader | list[Any]:
        return [] if self.validation is None else self._loader(self.validation)

    def test_dataloader(self) -> NumberedLoader | list[Any]:
        return self.val_dataloader() if self.test is None else self._loader(self.test)
