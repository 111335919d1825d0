"""Records out of files, one after another, each with its place; and what is wrong with those that are bad.

`datasets` finds the files: on the hub, or the splits in a local directory. They are read here, since its readers give
up the rest of a file at the first record that is wrong, and cannot say which one it was.
"""

import csv
import difflib
import gzip
import io
import json
import lzma
import os
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from datamodules.loading import require_choice

T = TypeVar("T")
Record = dict[str, Any]
Files = str | list[str] | dict[str, str | list[str]]


class Unfit(Exception):
    """Why a record is left out."""


@dataclass(frozen=True)
class BadRecord:
    """A record that is left out, or (`broken`) all that a file would hold from `row` on."""

    file: str
    row: int
    reason: str
    broken: bool = False

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


class BadRecords:
    """Counts bad records, each once, and raises when they are too many.

    Args:
        max_fraction: the share of the records, and of the files, that may be bad.
        n_files: files there are.
    """

    KEPT = 20
    LENIENT = 1000  # as long as fewer records have been read, the share is taken of this many

    def __init__(self, max_fraction: float, n_files: int) -> None:
        self.max_fraction = max_fraction
        self.n_files = n_files
        self.weight = 0
        self.broken = 0
        self._reported = 0
        self._seen: dict[tuple[str, int], BadRecord] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def __iter__(self) -> Iterator[BadRecord]:
        return iter(self._seen.values())

    @property
    def first(self) -> list[BadRecord]:
        return list(islice(self, self.KEPT))

    def add(self, bad: Iterable[BadRecord], weight: int = 1) -> None:
        """`weight`: how many records one of these stands for, where only every so-many-th record is looked at."""
        for record in bad:
            if (record.file, record.row) not in self._seen:
                self._seen[record.file, record.row] = record
                self.weight += weight
                self.broken += record.broken

    def check(self, n_read: int, finished: bool = False) -> None:
        """Raise a ValueError that names the first bad records, if too many of `n_read` are.

        Before everything is read (`finished`), a few at the very beginning are not yet too many.
        """
        of = n_read if finished else max(n_read, self.LENIENT)
        if self.weight > self.max_fraction * of or self.broken > self.max_fraction * self.n_files:
            raise ValueError(
                f"max_bad_fraction: {self.summary()} of {n_read} read in {self.n_files} file(s); "
                f"allowed is a share of {self.max_fraction:g} of either"
            )

    def summary(self, n: int = 3) -> str:
        more = "; ..." if len(self) > n else ""
        return f"found {len(self)} bad record(s) ({'; '.join(map(str, self.first[:n]))}{more})"

    def report(self) -> None:
        """Warn, in one line, of what has been left out since the last report."""
        if len(self) > self._reported:
            self._reported = len(self)
            warnings.warn(f"data: {self.summary()}, left out; bad_records lists the first {self.KEPT}", stacklevel=2)


# ---------------------------------------------------------------- built in


def pydoc_pieces() -> Iterator[Record]:
    """Python's own language reference, about 370,000 characters of English, in pieces of whole paragraphs.

    Topics repeat each other's paragraphs; one that has been seen is left out, so that no two pieces share any.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        piece: list[str] = []
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                piece.append(paragraph)
            if sum(map(len, piece)) >= 1000:
                yield {"text": "\n\n".join(piece)}
                piece = []
        if piece:
            yield {"text": "\n\n".join(piece)}


def digits() -> Iterator[Record]:
    """scikit-learn's 1,797 handwritten digits, 8x8, as PNG files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for image, label in zip(data.images, data.target, strict=True):
        file = io.BytesIO()
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(file, "png")
        yield {"image": file.getvalue(), "label": int(label)}


# ---------------------------------------------------------------- readers
# Each yields the records of a file, `Unfit` in the place of one that is wrong, None in the place of nothing.


def _open(file: str) -> Any:
    import fsspec

    return fsspec.open(file, "rb", compression="infer").open()


def _parquet(file: str, columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(file) as opened, pq.ParquetFile(opened) as table:
        names = [name for name in columns if name in table.schema_arrow.names]
        for batch in table.iter_batches(256, columns=names or None):
            strings = (pa.types.is_string, pa.types.is_large_string)  # one that is not UTF-8 must not cost the others
            cells = [
                (column.cast(pa.binary()) if any(is_(column.type) for is_ in strings) else column).to_pylist()
                for column in batch.columns
            ]
            for values in zip(*cells, strict=True):
                yield dict(zip(batch.schema.names, values, strict=True))


def _json(file: str, columns: Sequence[str]) -> Iterator[Record | Unfit | None]:
    with _open(file) as opened:
        if file.endswith(".json"):  # one array, or lines under another name
            if opened.read(1) == b"[":
                opened.seek(0)
                yield from json.load(opened)
                return
            opened.seek(0)
        for line in opened:
            try:
                record = json.loads(line) if line.strip() else None
            except UnicodeDecodeError:
                yield Unfit("not UTF-8")
                continue
            except ValueError as error:
                yield Unfit(f"no JSON ({error})")
                continue
            yield record if record is None or isinstance(record, dict) else Unfit("a line is no JSON object")


def _csv(file: str, columns: Sequence[str]) -> Iterator[Record | Unfit]:
    csv.field_size_limit(2**31 - 1)
    with _open(file) as opened, io.TextIOWrapper(opened, "utf-8", "surrogateescape", newline="") as lines:
        for record in csv.DictReader(lines, delimiter="\t" if ".tsv" in file else ","):
            whole = None not in record and None not in record.values()
            yield record if whole else Unfit("not as many fields as the first line has")


def _text(file: str, columns: Sequence[str]) -> Iterator[Record | None]:
    with _open(file) as opened:
        for line in opened:
            yield {"text": line.rstrip(b"\r\n")} if line.strip() else None


def _webdataset(file: str, columns: Sequence[str]) -> Iterator[Record]:
    """Members `key.ext` that follow each other with one key are one record, `{ext: bytes}`."""
    with _open(file) as opened, tarfile.open(fileobj=opened, mode="r|*") as members:
        record: Record = {}
        present: str | None = None
        for member in members:
            folder, _, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            if not member.isfile() or not key:
                continue
            if present not in (None, f"{folder}/{key}"):
                yield record
                record = {}
            present = f"{folder}/{key}"
            if extension in columns:
                record[extension] = members.extractfile(member).read()  # type: ignore[union-attr]
        if present is not None:
            yield record


def _image_file(file: str, columns: Sequence[str]) -> Iterator[Record]:
    with _open(file) as opened:
        yield {"image": opened.read(), "label": class_of(file)}


def class_of(file: str) -> str:
    """The class of an image in a folder of images: the name of the directory it is in."""
    return file.split("/")[-2]


Reader = Callable[[str, Sequence[str]], Iterator[Record | Unfit | None]]
READERS: dict[str, Reader] = {
    "parquet": _parquet,
    "json": _json,
    "csv": _csv,
    "text": _text,
    "webdataset": _webdataset,
    "imagefolder": _image_file,
    "pydoc": lambda file, columns: pydoc_pieces(),
    "digits": lambda file, columns: digits(),
}
BUILT_IN = ("pydoc", "digits")
EXTENSIONS = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".txt": "text",
    ".tar": "webdataset",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "imagefolder"),
}
DAMAGED = (ValueError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, csv.Error)


@dataclass(frozen=True)
class Source:
    """Files of one format, and which of their records are meant.

    Args:
        format: one of `READERS`.
        files: paths, or addresses that fsspec opens.
        parse: makes of a record what is used of it, and the bytes that tell it from others; raises `Unfit`.
        columns: what of a record is used.
        share: only records whose bytes have a checksum in [a, b) of all checksums, so equal records stay together.
    """

    format: str
    files: tuple[str, ...]
    parse: Callable[[Record], tuple[Any, bytes]]
    columns: tuple[str, ...]
    share: tuple[float, float] = (0.0, 1.0)

    def read(self, order: Sequence[int] | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Any]:
        """((place of the file in `order`, row), content) from `start` on.

        The content is what `parse` makes of the record, a `BadRecord`, or None for a record that is not in the share.

        Raises:
            ValueError: a file of the hub cannot be reached; it is not the file that is bad.
        """
        order = range(len(self.files)) if order is None else order
        for place in range(start[0], len(order)):
            file = self.files[order[place]]
            skip = start[1] if place == start[0] else 0
            row = -1
            try:
                for row, record in enumerate(READERS[self.format](file, self.columns)):
                    if row >= skip and record is not None:
                        yield (place, row), self._take(file, row, record)
            except Exception as error:
                if not isinstance(error, DAMAGED):
                    if "://" in file:
                        raise ValueError(f"source: {file} cannot be reached ({_line(error)})") from error
                    if not isinstance(error, OSError):
                        raise
                if row + 1 >= skip:
                    yield (place, row + 1), BadRecord(file, row + 1, f"the file breaks off ({_line(error)})", True)

    def _take(self, file: str, row: int, record: Record | Unfit) -> Any:
        try:
            if isinstance(record, Unfit):
                raise record
            content, key = self.parse(record)
        except Unfit as unfit:
            return BadRecord(file, row, str(unfit))
        return content if self.share[0] <= zlib.crc32(key) / 2**32 < self.share[1] else None

    def signature(self) -> list[Any]:
        """(file, size, time of its last change) of each; what is remote has a revision in its address."""
        if self.format in BUILT_IN:
            return [zlib.crc32(repr(list(READERS[self.format]("", ()))).encode())]
        return [(file, *_stat(file)) for file in self.files]

    def names(self) -> list[tuple[str, int]]:
        """(name, size) of each file, the same wherever they lie."""
        return [(file.rpartition("/")[2], _stat(file)[0]) for file in self.files]


def _stat(file: str) -> tuple[int, int]:
    if not os.path.isfile(file):
        return 0, 0
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def column_of(record: Record, column: str) -> Any:
    """Raises `Unfit` with the nearest name, if the record has no such column."""
    if record.get(column) is None:
        if column in record:
            raise Unfit(f"{column} is empty")
        near = difflib.get_close_matches(column, record, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Unfit(f"no column {column!r}, only {', '.join(map(str, record)) or 'nothing'}{hint}")
    return record[column]


def batched(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """`items` in lists of n; the last may be shorter."""
    items = iter(items)
    while block := list(islice(items, n)):
        yield block


# ---------------------------------------------------------------- finding files


def find_files(source: Files, config: str | None = None) -> tuple[str, dict[str, list[str]]]:
    """The format, and the files of each split.

    Args:
        source: `pydoc`, `digits`, a file, a glob or a list of them (all one split, `train`), a directory, an id on
            Hugging Face's hub, or a mapping from splits to files.
        config: which configuration of a hub data set.

    Raises:
        ValueError: there is nothing, or nothing that can be read.
    """
    if isinstance(source, dict):
        found = {split: _local(files) for split, files in source.items()}
    elif isinstance(source, list) or has_magic(source) or os.path.isfile(source) or "://" in source:
        found = {"train": _local(source)}
    elif source in BUILT_IN:
        return source, {"train": [source]}
    else:
        return _of_datasets(source, config)
    formats = {_format(file) for files in found.values() for file in files}
    if len(formats) != 1:
        raise ValueError(f"source: found files of different formats, {', '.join(sorted(formats))}; allowed is one")
    if formats == {"parquet"} and find_spec("pyarrow") is None:
        raise ValueError("source: parquet files need the package pyarrow: pip install 'l3d_pl[hub]'")
    return formats.pop(), found


def _local(files: str | list[str]) -> list[str]:
    found: list[str] = []
    for pattern in [files] if isinstance(files, str) else files:
        matching = [pattern] if "://" in pattern else sorted(glob(os.path.expanduser(pattern), recursive=True))
        matching = [str(inner) for path in matching for inner in _files_under(path)]
        if not matching:
            raise ValueError(f"source: there is no file {pattern}{_near_file(pattern)}")
        found += matching
    return found


def _files_under(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    return sorted(str(file) for file in Path(path).rglob("*") if file.is_file() and _known(file.name))


def _near_file(path: str) -> str:
    folder = Path(path).parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _known(file: str) -> str | None:
    suffixes = [
        suffix.lower() for suffix in Path(file).suffixes if suffix.lower() not in (".gz", ".zst", ".bz2", ".xz")
    ]
    return EXTENSIONS.get(suffixes[-1]) if suffixes else None


def _format(file: str) -> str:
    known = _known(file)
    if known is None:
        raise ValueError(f"source: {file} has an unknown extension, allowed are {', '.join(EXTENSIONS)}")
    return known


def _of_datasets(source: str, config: str | None) -> tuple[str, dict[str, list[str]]]:
    """A local directory or a hub data set, as `datasets` finds its splits."""
    local = Path(source).expanduser()
    if not local.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1 or _known(source)):
        raise ValueError(f"source: there is no file or directory {source}{_near_file(source)}")
    if local.is_dir() and not any(local.iterdir()):
        raise ValueError(f"source: the directory {source} is empty")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"source: {source!r} needs the package datasets: pip install 'l3d_pl[hub]'") from error
    try:
        builder = datasets.load_dataset_builder(str(local) if local.is_dir() else source, config)
    except Exception as error:
        near = difflib.get_close_matches(source, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"source: {source!r} is no file or directory here, nor a data set that the hub gives ({_line(error)}){hint}"
            if not local.is_dir()
            else f"source: found nothing to read in the directory {source} ({_line(error)})"
        ) from error
    require_choice(f"source: format of {source}", str(builder.name), [name for name in READERS if name not in BUILT_IN])
    return str(builder.name), {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
