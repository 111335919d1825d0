"""Records one after another out of files, each with its place, and what is wrong with those that are bad."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
Position = tuple[int, int]  # the place of a file in the order of the files, and a row in it


@dataclass(frozen=True)
class BadRecord:
    """A record that is left out, or the end of a file that cannot be read on (`lost`)."""

    file: str
    row: int
    reason: str
    lost: bool = False

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


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


READERS: dict[str, Callable[[str], Iterator[Record | BadRecord]]] = {
    "pydoc": lambda file: pydoc_pieces(),
}


class Unfit(Exception):
    """Why a record cannot be used."""


@dataclass(frozen=True)
class Source:
    """Files of one format, and which of their records are meant.

    Args:
        format: one of `READERS`.
        files: paths, or addresses that fsspec opens.
        parse: makes of a record what is used of it and the bytes that tell it from others; raises `Unfit`.
        share: only records whose bytes have a checksum in [a, b) of all checksums: equal records stay together.
    """

    format: str
    files: tuple[str, ...]
    parse: Callable[[Record], tuple[Any, bytes]]
    share: tuple[float, float] = (0.0, 1.0)
    order: Sequence[int] | None = field(default=None)

    def read(self, start: Position = (0, 0)) -> Iterator[tuple[Position, Any]]:
        """(position, what `parse` makes of the record or a `BadRecord`), from `start` on."""
        order = range(len(self.files)) if self.order is None else self.order
        for place in range(start[0], len(order)):
            file = self.files[order[place]]
            for row, record in enumerate(READERS[self.format](file)):
                if place == start[0] and row < start[1]:
                    continue
                if isinstance(record, BadRecord):
                    yield (place, row), record
                    continue
                try:
                    content, key = self.parse(record)
                except Unfit as error:
                    yield (place, row), BadRecord(file, row, str(error))
                    continue
                if self.share[0] <= zlib.crc32(key) / 2**32 < self.share[1]:
                    yield (place, row), content
