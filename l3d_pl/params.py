"""`l3d params`: what a config decomposes, how large that is and how it is computed, before anything heavy starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from l3d_pl.lightning_module import L3D

BYTES = 4 * 4  # of a value of V_in or V_out while it is trained: itself, its gradient and Adam's two moments, float32


@dataclass(frozen=True)
class Row:
    """One chosen tensor: how many values it has, and a subnetwork's share of it, on one side; its path, and why."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    values: int
    subnetwork_values: int
    path: str
    reason: str


def rows_of(model: L3D, batch: Any | None) -> list[Row]:
    """The chosen tensors in the target's order.

    Args:
        model: with its target.
        batch: of which the paths are told: they depend on its size; None: they are left open.
    """
    subnetworks = model.subnetworks
    paths = dict.fromkeys(subnetworks.shapes, ("?", "there is no batch to tell by"))
    if batch is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no gradient rule covers")  # the table says so
            extraction = model.extractor(batch, torch.Generator().manual_seed(0))
        oracle = model.extractor.oracle_parameters
        for name, gradient in extraction.gradients.items():
            paths[name] = subnetworks.path_of(name, gradient)
            if name in oracle:
                paths[name] = "oracle", f"no gradient rule ({oracle[name]}): each sample by itself, slowly"
    n = subnetworks.n_subnetworks * subnetworks.restarts
    stored = {
        name: sum(tensor.numel() for tensor in subnetworks.v_out.parameters_of(name).parameters()) // n
        for name in subnetworks.shapes
    }
    return [
        Row(name, shape, subnetworks.ranks[name], math.prod(shape), stored[name], *paths[name])
        for name, shape in subnetworks.shapes.items()
    ]


def print_params(model: L3D, batch: Any | None, notes: list[str]) -> None:
    """The table of `rows_of`, and totals."""
    rows = rows_of(model, batch)
    table = Table(title="chosen tensors", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "ranks"):
        table.add_column(column)
    for column in ("values", "per subnetwork"):
        table.add_column(column, justify="right")
    table.add_column("path")
    table.add_column("why", overflow="fold")
    for row in rows:
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            ", ".join(map(str, row.ranks)),
            f"{row.values:,}",
            f"{row.subnetwork_values:,}",
            row.path,
            row.reason,
        )
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    for line in [*totals(model, rows), *notes]:
        Console(soft_wrap=True).print(Text(line))


def totals(model: L3D, rows: list[Row]) -> list[str]:
    """One line each about the target, W, V_in and V_out."""
    target, subnetworks = model.target, model.subnetworks
    everything = list(target.parameters())
    chosen, one = sum(row.values for row in rows), sum(row.subnetwork_values for row in rows)
    n = subnetworks.n_subnetworks * subnetworks.restarts
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in everything}))
    restarts = f" x {subnetworks.restarts} restarts" if subnetworks.restarts > 1 else ""
    return [
        f"target: {type(target).__name__}, {sum(tensor.numel() for tensor in everything):,} values, {dtypes}",
        f"W: {len(rows)} tensors, {chosen:,} values; one subnetwork: {one:,} values ({one / chosen:.2%} of W)",
        f"V_in and V_out: 2 x {subnetworks.n_subnetworks} subnetworks{restarts}, {2 * n * one:,} values, "
        f"{size(2 * n * one * BYTES)} with gradients and Adam",
    ]


def size(number_of_bytes: int) -> str:
    """A number of bytes for a person."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number_of_bytes >= scale:
            return f"{number_of_bytes / scale:.1f} {unit}"
    return f"{number_of_bytes} B"


def first_batch(model: L3D, data: Any, settings: Mapping[str, Any]) -> tuple[Any | None, list[str]]:
    """The first training batch, or one of the same size where the data are not at hand; and what to say about it.

    Args:
        model: the target's own `config` tells what a batch that is made up has to hold.
        data: a LightningDataModule.
        settings: its arguments.
    """
    try:
        data.prepare_data()
        data.setup("fit")
        loader = data.first_dataloader() if hasattr(data, "first_dataloader") else data.train_dataloader()
        return next(iter(loader)), []
    except Exception as error:  # whatever a user's own data raise: the table is there before the data are
        reason = " ".join(str(error).split()) or type(error).__name__
    batch = made_up_batch(settings, getattr(getattr(model.target, "config", None), "vocab_size", None))
    told = "paths are those of a made-up batch of its size" if batch is not None else "paths are left open"
    return batch, [f"no data ({reason}): {told}"]


def made_up_batch(settings: Mapping[str, Any], vocabulary: int | None) -> dict[str, Tensor] | None:
    """Random tokens or images as `TextData` and `ImageData` with these arguments give them; None for other data."""
    n = settings.get("batch_size")
    generator = torch.Generator().manual_seed(0)
    if n and vocabulary and "length" in settings:
        ids = torch.randint(vocabulary, (n, settings["length"]), generator=generator)
        ones = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": ones, "sample_mask": ones.bool()}
    if n and "size" in settings:
        return {"inputs": torch.randn(n, 3, settings["size"], settings["size"], generator=generator)}
    return None
