"""The data of one subnetwork's panel, gathered from the analysis's tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from l3d_pl.analysis.tables import KINDS
from l3d_pl.atlas.blocks import Row, rows_between, rows_of_samples
from l3d_pl.atlas.structure import TENSORS, network, pooled, tensor_structure
from l3d_pl.decomposition import Decomposition

BLOCK = 50  # subnetworks whose rows are in memory at a time
PIXELS = 128  # longer side of a picture; larger ones are shrunk
TABLES = (
    *("samples", "background", "token_coefficients", "outputs", "outputs_summary", "attribution"),
    *("similarity", "curves", "effects", "locality"),
)
CURVES = (
    *("delta", "relevant", "irrelevant", "selectivity", "kl_inactive", "loss_change"),
    *("outputs_relevant", "outputs_irrelevant", "outputs_selectivity"),
    *("relevant_std", "selectivity_std", "outputs_selectivity_std"),
)


def panels(
    decomposition: Decomposition, analysis: Path | None, shares: Tensor, target: Mapping[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """The panels of subnetworks 0, 1, 2, …

    analysis: the tables' folder, or None for the structure alone; shares: of squared norm, [n_v, tensors]; target: a
    toy's tensors, empty for any other model.

    Raises:
        L3DError: a damaged table.
    """
    n_v = decomposition.n_subnetworks
    tuckers = decomposition.subnetworks.v_out.tuckers()
    names = list(tuckers)
    for low in range(0, n_v, BLOCK):
        high = min(low + BLOCK, n_v)
        tables = {} if analysis is None else {name: rows_between(analysis, name, low, high) for name in TABLES}
        shown = [
            {row["sample"] for name in ("samples", "effects") for row in tables[name].get(k, [])} if tables else set()
            for k in range(low, high)
        ]
        items = {} if analysis is None else rows_of_samples(analysis, "items", set().union(*shown))
        for k in range(low, high):
            rows = {name: table.get(k, []) for name, table in tables.items()}
            largest = shares[k].argsort(descending=True).tolist()
            panel = {
                "k": k,
                "shares": [[i, shares[k, i].item()] for i in largest[:20]],
                "tensors": [{"tensor": i} | tensor_structure(tuckers[names[i]], k) for i in largest[:TENSORS]],
                "network": network(target, decomposition.direction(k)) if target else None,
            }
            own = {sample: items[sample] for sample in sorted(shown[k - low]) if sample in items}
            yield panel | _from_tables(rows, own)


def _from_tables(rows: Mapping[str, Sequence[Row]], items: Mapping[int, Row]) -> dict[str, Any]:
    coloured = {row["sample"]: row for row in rows.get("token_coefficients", [])}
    attributed = {(row["sample"], row["position"]): row for row in rows.get("attribution", [])}
    outputs: dict[tuple[str, int], list[Row]] = {}
    for row in rows.get("outputs", []):
        outputs.setdefault((row["kind"], row["place"]), []).append(row)
    samples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for row in sorted(rows.get("samples", []), key=lambda row: row["place"]):
        moved = sorted(outputs.get((row["kind"], row["place"]), []), key=lambda o: o["rank"])
        part, item = attributed.get((row["sample"], row["position"])), items.get(row["sample"])
        samples.setdefault(row["kind"], []).append(
            {name: row[name] for name in ("sample", "position", "impact", "impact_se", "coefficient", "active")}
            | {
                way: [[o["name"], o["derivative"], o["probability"]] for o in moved if o["direction"] == way]
                for way in ("raised", "lowered")
            }
            | {"attribution": part and _attribution(part, item is not None and item["kind"] == "vector")}
        )
    return {
        "samples": samples,
        "summary": _summary(rows.get("outputs_summary", [])),
        "items": {sample: _item(row, coloured.get(sample)) for sample, row in items.items()},
        "neighbours": [[row["other"], row["cos"], row["coactivation"]] for row in rows.get("similarity", [])],
        "irrelevant": sum(not row["active"] for row in rows.get("background", [])),
        "curves": _series(rows.get("curves", []), "control", CURVES),
        "locality": _series(rows.get("locality", []), None, ("delta", "change", "linear")).get("", {}),
        "effects": _effects(rows.get("effects", [])),
    }


def _item(row: Row, coloured: Row | None) -> dict[str, Any]:
    item: dict[str, Any] = {"kind": row["kind"], "label": row["label"]}
    if row["kind"] == "text":
        item |= {"tokens": row["tokens"] or [], "first": row["first"] or 0}
        if coloured:
            item["coefficients"] = [coloured["positions"], coloured["coefficients"]]
    elif row["kind"] == "image":
        item |= {"picture": _picture(row["png"]), "width": row["width"], "height": row["height"]}
    else:
        item |= {"values": _few(row["values"] or []), "of": len(row["values"] or [])}
    return item


def _attribution(row: Row, is_vector: bool) -> dict[str, Any]:
    if is_vector:
        return {"values": _few(row["values"])}
    return {name: row[name] for name in ("values", "height", "width")}


def _few(values: Sequence[float]) -> list[float]:
    """At most as many values as are drawn side by side."""
    few: list[float] = pooled(np.asarray(values, dtype=np.float64)[None], 1)[0].tolist()
    return few


def _summary(rows: Sequence[Row]) -> dict[str, list[list[Any]]]:
    """What v moves over all top samples: {"raised", "lowered": [[output, mean derivative, samples of this sign]]}."""
    ordered = sorted(rows, key=lambda row: row["rank"])
    return {
        way: [[row["name"], row["derivative"], row["samples"]] for row in ordered if row["direction"] == way]
        for way in ("raised", "lowered")
    }


def _picture(png: bytes | None) -> str | None:
    """A data address of the picture, shrunk to `PIXELS`, or None where the bytes are no picture."""
    if not png:
        return None
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if max(image.size) > PIXELS:
                image.thumbnail((PIXELS, PIXELS))
                small = io.BytesIO()
                image.save(small, format="PNG", optimize=True)
                png = small.getvalue()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _series(rows: Sequence[Row], group: str | None, columns: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """{value of `group`: {column: values in order of delta}}."""
    series: dict[str, dict[str, list[Any]]] = {}
    for row in sorted(rows, key=lambda row: row["delta"]):
        into = series.setdefault(row[group] if group else "", {column: [] for column in columns})
        for column in columns:
            into[column].append(row[column])
    return series


def _effects(rows: Sequence[Row]) -> dict[str, Any]:
    """{"deltas": [...], "cases": [{"sample", "position", "outputs": [[name, values per delta], ...]}, ...]}."""
    deltas = sorted({row["delta"] for row in rows})
    place = {delta: i for i, delta in enumerate(deltas)}
    cases: dict[tuple[int, int], dict[int, tuple[str, list[Any]]]] = {}
    for row in rows:
        outputs = cases.setdefault((row["sample"], row["position"]), {})
        values = outputs.setdefault(row["output"], (row["name"], [None] * len(deltas)))[1]
        values[place[row["delta"]]] = row["value"]
    return {
        "deltas": deltas,
        "cases": [
            {"sample": sample, "position": position, "outputs": [list(pair) for pair in outputs.values()]}
            for (sample, position), outputs in cases.items()
        ],
    }
