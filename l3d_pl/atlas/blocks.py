"""Tables of an analysis, a block of subnetworks at a time, so that no table is ever in memory whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from l3d_pl.analysis.tables import SCHEMAS
from l3d_pl.errors import L3DError

ROWS = 1024  # in memory at a time while a file is read; rows of items hold pictures
Row = dict[str, Any]


def rows_between(folder: Path, name: str, low: int, high: int) -> dict[int, list[Row]]:
    """The rows of subnetworks low … high − 1 as {subnetwork: rows}, in the file's order; {} without the table.

    Row groups whose statistics rule the block out are not read.

    Raises:
        L3DError: the file is damaged, or a column is missing.
    """
    found: dict[int, list[Row]] = {}
    for batch in _batches(folder, name, "subnetwork", low, high):
        column = batch["subnetwork"]
        kept = batch.filter(pc.and_(pc.greater_equal(column, low), pc.less(column, high)))
        for row in kept.to_pylist():
            found.setdefault(row["subnetwork"], []).append(row)
    return found


def rows_of_samples(folder: Path, name: str, samples: set[int]) -> dict[int, Row]:
    """The rows of the given samples as {sample: row}; errors as above."""
    if not samples:
        return {}
    wanted, found = pa.array(sorted(samples)), {}
    for batch in _batches(folder, name, "sample", min(samples), max(samples) + 1):
        for row in batch.filter(pc.is_in(batch["sample"], value_set=wanted)).to_pylist():
            found[row["sample"]] = row
    return found


def _batches(folder: Path, name: str, column: str, low: int, high: int) -> Iterator[pa.RecordBatch]:
    path = folder / f"{name}.parquet"
    if not path.is_file():
        return
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.names
            missing = [field for field in SCHEMAS[name].names if field not in found]
            if missing:
                raise L3DError(f"analysis: {path} has no column {', '.join(missing)}; found are {', '.join(found)}")
            for group in range(file.num_row_groups):
                if _may_hold(file.metadata.row_group(group), column, low, high):
                    yield from file.iter_batches(ROWS, row_groups=[group], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise L3DError(f"analysis: {path} cannot be read ({error})") from error


def _may_hold(group: pq.RowGroupMetaData, column: str, low: int, high: int) -> bool:
    for place in range(group.num_columns):
        found = group.column(place)
        if found.path_in_schema == column and found.statistics is not None and found.statistics.has_min_max:
            return bool(found.statistics.max >= low and found.statistics.min < high)
    return True
