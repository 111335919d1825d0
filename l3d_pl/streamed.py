"""A safetensors file written piece by piece: no more than one piece is in memory, whatever the file's size.

`safetensors.torch.save_file` wants all tensors at once. The format makes the rest easy: the length of a JSON header,
the header with every tensor's type, shape and place, then the bytes.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PIECE = 2**22  # bytes of a tensor that are read or written at a time


class Entry(NamedTuple):
    """A tensor to write: `read(start, stop)` gives rows of it, a scalar for (0, 1)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]


def entry_of(tensor: Tensor) -> Entry:
    """A tensor that is in memory."""
    return Entry(tensor.dtype, tuple(tensor.shape), lambda start, stop: tensor[start:stop] if tensor.ndim else tensor)


def pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Spans of rows, together all, each of `PIECE` bytes or one row; (0, 1) for a scalar."""
    rows = shape[0] if shape else 1
    step = max(1, PIECE // max(1, math.prod(shape[1:]) * itemsize))
    yield from ((start, min(rows, start + step)) for start in range(0, rows, step))


def write_safetensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write the file and flush it to the disk; returns its `checksum`.

    Raises:
        OSError: it cannot be written.
    """
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # aligned, as the library does it
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape, _ = entries[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size, crc = 0, 0
    with open(path, "wb") as file:
        for data in _contents(text, [entries[name] for name in names]):
            file.write(data)
            size, crc = size + len(data), zlib.crc32(data, crc)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}


def _contents(header: bytes, entries: Iterable[Entry]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for dtype, shape, read in entries:
        for span in pieces(shape, dtype.itemsize):
            rows = read(*span).detach().cpu().contiguous()
            if rows.numel():
                yield rows.flatten().view(torch.uint8).numpy().data


class SafetensorsFile:
    """A safetensors file that stays open, its tensors read by rows; nothing of it is mapped or kept in memory.

    Attributes:
        shapes: {name: shape} of its tensors.
        metadata: the file's own.
    """

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (as long as this is there)
        length = int.from_bytes(self._file.read(8), "little")
        self._entries = json.loads(self._file.read(length))
        self._start = 8 + length
        self.metadata: dict[str, str] = self._entries.pop("__metadata__", {})
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor that has some."""
        entry, shape = self._entries[name], self.shapes[name]
        dtype = next(dtype for dtype, text in DTYPES.items() if text == entry["dtype"])
        row = math.prod(shape[1:]) * dtype.itemsize
        data = bytearray((stop - start) * row)
        self._file.seek(self._start + entry["data_offsets"][0] + start * row)
        view = memoryview(data)
        while view and (n := self._file.readinto(view)):
            view = view[n:]
        if view:
            raise ValueError(f"the file ends within '{name}'")
        return torch.frombuffer(data, dtype=dtype).view(-1, *shape[1:])


def checksum(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return {"bytes": size, "crc32": crc}
