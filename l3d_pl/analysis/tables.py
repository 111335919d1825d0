"""The tables of an analysis: what is in `RUN/analysis`, and how it is written and read.

Tidy parquet files, one row per fact, with a manifest beside them, so that a notebook or the atlas can take over at any
point. Small tables are there as CSV too. In all of them

- `subnetwork` is k of v_k; `sample` is an entry's place in the split of the data (an image, a row, a sequence);
- `position` is the token's place in its sequence where a sample is a token, else -1.

`SCHEMAS` is the whole contract. Its columns:

- `subnetworks`: `p_act`, share of all (sample, reference) pairs with |c| at or above the threshold; `impact_mean`,
  mean over samples of I(x, v), the mean over references of |V_in[v] . grad D|, and `impact_se`, its standard error over
  references; `coefficient_mean`, `coefficient_std` of c = V_in g; `positive_share` of the active c; `active_samples`,
  those active against half of their references at least; `nearest`, the subnetwork of highest |cos|, and `nearest_cos`;
  `dead`: never active; `local_to`: the delta up to which D is within 10 % of its linear prediction (see `locality`).
- `norm_shares`: the part of ‖v_k‖² = 1 that lies in a tensor. `histograms`: of c, over all (sample, reference) pairs.
- `similarity`: the nearest others by |cos|, and `coactivation`: samples where both are active over those where either
  is. `coactivation`: of all pairs (subnetwork < other) that are ever active together, these two counts of samples.
- `map`: places in a plane by |cos| (classical scaling). `samples`: the `place`-th of a `kind`: `top` impact, `middle`
  (about the median impact of the active ones), `random`; `coefficient` is the mean over references.
- `background`: the random samples that interventions are measured on (the first of them are the `random` of `samples`),
  and whether v_k is active there.
- `items`: what the samples are, once each. Of a long sequence `tokens` is a part, from position `first` on; `checksum`
  is the CRC-32 of the whole input. `token_coefficients`: of all counted positions of sequences that are shown.
- `outputs`: the outputs that v_k moves most, d output / d delta at delta = 0 (`derivative`) and the output itself.
  `outputs_summary`: those of highest mean derivative over the top samples, and in how many `samples` it has this sign.
- `attribution`: how much of the coefficient each part of the input carries, flat [height, width] (of a sequence from
  the position `first` of its item on).
- `curves`: against delta: mean summed |change| of the outputs of relevant and irrelevant samples, their quotient, the
  divergence from the unchanged model where v_k is inactive, the change of the task's loss (null without labels);
  `outputs_relevant`, `outputs_irrelevant`, `outputs_selectivity`: in the relevant samples, the mean |change| of the
  outputs of highest |derivative| along v_k, of all others, and their quotient; `*_std`: the standard deviation over
  random directions, of which `random` is the mean.
- `effects`: some samples' outputs at each delta. `locality`: change of D along delta, and its linear prediction.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from l3d_pl.errors import L3DError, require_choice
from l3d_pl.provenance import provenance

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
KINDS = ("top", "middle", "random")

_INT, _FLOAT, _TEXT, _BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()
_FLOATS, _INTS, _TEXTS = pa.list_(pa.float32()), pa.list_(pa.int32()), pa.list_(pa.string())


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


SCHEMAS: dict[str, pa.Schema] = {
    "subnetworks": _schema(
        subnetwork=_INT,
        p_act=_FLOAT,
        impact_mean=_FLOAT,
        impact_se=_FLOAT,
        coefficient_mean=_FLOAT,
        coefficient_std=_FLOAT,
        positive_share=_FLOAT,
        active_samples=_INT,
        nearest=_INT,
        nearest_cos=_FLOAT,
        dead=_BOOL,
        local_to=_FLOAT,
    ),
    "norm_shares": _schema(subnetwork=_INT, tensor=_TEXT, share=_FLOAT),
    "histograms": _schema(subnetwork=_INT, bin_low=_FLOAT, bin_high=_FLOAT, count=_INT),
    "similarity": _schema(subnetwork=_INT, other=_INT, cos=_FLOAT, coactivation=_FLOAT),
    "coactivation": _schema(subnetwork=_INT, other=_INT, both=_INT, either=_INT),
    "map": _schema(subnetwork=_INT, x=_FLOAT, y=_FLOAT),
    "samples": _schema(
        subnetwork=_INT,
        kind=_TEXT,
        place=_INT,
        sample=_INT,
        position=_INT,
        impact=_FLOAT,
        impact_se=_FLOAT,
        coefficient=_FLOAT,
        active=_BOOL,
    ),
    "background": _schema(subnetwork=_INT, sample=_INT, position=_INT, active=_BOOL),
    "items": _schema(
        sample=_INT,
        kind=_TEXT,
        tokens=_TEXTS,
        first=_INT,
        png=pa.binary(),
        width=_INT,
        height=_INT,
        values=_FLOATS,
        label=_TEXT,
        checksum=_INT,
    ),
    "token_coefficients": _schema(subnetwork=_INT, sample=_INT, positions=_INTS, coefficients=_FLOATS),
    "outputs": _schema(
        subnetwork=_INT,
        kind=_TEXT,
        place=_INT,
        sample=_INT,
        position=_INT,
        direction=_TEXT,
        rank=_INT,
        output=_INT,
        name=_TEXT,
        derivative=_FLOAT,
        probability=_FLOAT,
    ),
    "outputs_summary": _schema(
        subnetwork=_INT, direction=_TEXT, rank=_INT, output=_INT, name=_TEXT, derivative=_FLOAT, samples=_INT
    ),
    "outputs_names": _schema(output=_INT, name=_TEXT),
    "attribution": _schema(subnetwork=_INT, sample=_INT, position=_INT, values=_FLOATS, height=_INT, width=_INT),
    "curves": _schema(
        subnetwork=_INT,
        control=_TEXT,
        delta=_FLOAT,
        relevant=_FLOAT,
        irrelevant=_FLOAT,
        selectivity=_FLOAT,
        kl_inactive=_FLOAT,
        loss_change=_FLOAT,
        outputs_relevant=_FLOAT,
        outputs_irrelevant=_FLOAT,
        outputs_selectivity=_FLOAT,
        relevant_std=_FLOAT,
        selectivity_std=_FLOAT,
        outputs_selectivity_std=_FLOAT,
    ),
    "effects": _schema(
        subnetwork=_INT, delta=_FLOAT, sample=_INT, position=_INT, output=_INT, name=_TEXT, value=_FLOAT
    ),
    "locality": _schema(subnetwork=_INT, delta=_FLOAT, change=_FLOAT, linear=_FLOAT),
}
AS_CSV = (
    *("subnetworks", "norm_shares", "similarity", "coactivation", "map", "samples"),
    *("outputs", "outputs_summary", "curves", "locality"),
)


def write_table(folder: Path, name: str, rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> int:
    """Write a table of `SCHEMAS`, beside and then in place, so that a reader never meets half a file.

    Args:
        rows: a frame, or a mapping for each row; columns not given are null. The same rows give the same bytes.

    Returns:
        the number of rows.
    """
    schema = SCHEMAS[name]
    columns = rows.columns if isinstance(rows, pd.DataFrame) else {key for row in rows for key in row}
    for column in columns:
        require_choice(f"column of {name}", column, schema.names)
    if isinstance(rows, pd.DataFrame):
        table = pa.Table.from_pandas(rows.reindex(columns=schema.names), schema, preserve_index=False)
    else:
        table = pa.Table.from_pylist(list(rows), schema)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / f"{name}.parquet", lambda path: pq.write_table(table.replace_schema_metadata(None), path))
    if name in AS_CSV:
        replace(folder / f"{name}.csv", lambda path: table.to_pandas().to_csv(path, index=False))
    return table.num_rows


def read_table(folder: Path, name: str, subnetwork: int | None = None) -> pd.DataFrame:
    """A table, or the rows of one subnetwork.

    Raises:
        L3DError: there is no such table, or its file is damaged.
    """
    require_choice("table", name, SCHEMAS)
    path = folder / f"{name}.parquet"
    try:
        filters = None if subnetwork is None else [("subnetwork", "=", subnetwork)]
        return pq.read_table(path, filters=filters).to_pandas()
    except FileNotFoundError:
        raise L3DError(f"analysis: there is no {path}; `l3d analyze RUN` makes it") from None
    except (OSError, pa.ArrowException) as error:
        raise L3DError(f"analysis: {path} cannot be read ({error})") from error


def made_by() -> dict[str, Any]:
    """What made a table, for its manifest: commit, versions, time."""
    made = provenance()
    return {"commit": made["git_commit"], "versions": made["versions"], "created": made["created"]}


def write_manifest(folder: Path, manifest: Mapping[str, Any], name: str = MANIFEST) -> None:
    """Write `manifest.json`; it is the last file to be written: where it is, the tables are complete."""
    content = {"format_version": FORMAT_VERSION} | dict(manifest)
    replace(folder / name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        L3DError: missing, damaged, or of another format version.
    """
    path = folder / name
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise L3DError(f"analysis: there is no {path}; `l3d analyze RUN` makes it") from None
    except (OSError, ValueError) as error:
        raise L3DError(f"analysis: {path} cannot be read ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise L3DError(
            f"analysis: {path} has format version {version}; this l3d_pl reads version {FORMAT_VERSION} "
            "(`l3d analyze RUN` makes it again)"
        )
    return manifest


def replace(path: Path, write: Any) -> None:
    """Let `write` make a file beside `path`, and put it in its place."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
