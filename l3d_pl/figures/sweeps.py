"""Grids of fits: each into a folder of its own, kept when it is done, so that the same command goes on after a stop."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from l3d_pl.errors import L3DError

CELL, MADE_BY = "cell.json", "arguments.json"


def fit_grid(
    root: Path,
    made_by: Sequence[str],
    fits: Mapping[str, Callable[[Path], Mapping[str, Any]]],
    remedy: str,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Make the fits that `root` does not hold yet, with a progress bar.

    Args:
        made_by: what all have in common, such as the config; kept in `root`.
        fits: {name: fit}; a fit gets its folder, `root/name`, and returns what is kept as `cell.json`.
        remedy: what to do where `root` is of something else.
        after: called after each fit.

    Raises:
        L3DError: `root` is of something else than `made_by`.
    """
    root.mkdir(parents=True, exist_ok=True)
    if (kept := made_by_in(root)) not in ([], list(made_by)):
        raise L3DError(f"root: {root} is of {' '.join(kept)}; {remedy}")
    save(root / MADE_BY, list(made_by))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)  # not rich's global one: Lightning's own bar, of a target's training, resets that
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(fits))
        for name, fit in fits.items():
            progress.update(bar, description=name)
            folder = root / name
            if not (folder / CELL).is_file():
                save(folder / CELL, fit(folder))
                after()
            progress.advance(bar)


def save(path: Path, content: object) -> None:
    """JSON, written aside and renamed."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(content, indent=1))
    os.replace(aside, path)


def made_by_in(root: Path) -> list[str]:
    """What the fits in `root` have in common; nothing where there are none."""
    path = root / MADE_BY
    return list(json.loads(path.read_text())) if path.is_file() else []


def cells_in(root: Path) -> list[dict[str, Any]]:
    """What the fits that are done have left."""
    return [json.loads(path.read_text()) for path in sorted(root.glob(f"*/{CELL}"))]


def last_validation(folder: Path) -> dict[str, float]:
    """The `val/` figures that a fit has logged last."""
    with open(folder / "metrics.csv", newline="") as file:
        row = [row for row in csv.DictReader(file) if row.get("val/loss")][-1]
    return {name: float(value) for name, value in row.items() if name.startswith("val/") and value}
