"""`l3d intervene`: push chosen subnetworks by chosen amounts, alone or together, in all tensors or in some."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from l3d_pl.analysis.analyse import CONTROLS
from l3d_pl.analysis.interventions import (
    Sweep,
    curve_rows,
    direction_of,
    effect_rows,
    mean_rows,
    named_outputs,
    random_directions,
    sweep,
)
from l3d_pl.analysis.items import kind_of, output_names
from l3d_pl.analysis.outputs import Direction, derivatives, only_positions
from l3d_pl.analysis.runs import Run, fingerprints_of, placed
from l3d_pl.analysis.survey import extractor_of
from l3d_pl.analysis.tables import made_by, read_manifest, read_table, replace, write_manifest
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError

SHOWN = 3  # top samples whose outputs are written


def intervene(
    run: Run,
    subnetworks: Sequence[int],
    deltas: Sequence[float] | None = None,
    parameters: Sequence[str] | None = None,
    grid: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """f(x, W0 + sum_k delta_k v_k) on the samples that `l3d analyze` has found for these subnetworks.

    Relevant samples are the top ones of any of the subnetworks, irrelevant are the random ones in which none is active;
    relevant outputs those of highest summed |derivative| along the v_k. The controls take the same steps: along random
    unit directions (each v_k by one of its own ranks, as long in each tensor; means over as many as the analysis took),
    and as far along the mean gradient of the random samples.

    Args:
        deltas: steps; None: those of the analysis.
        parameters: globs; only these tensors are moved.
        grid: every combination of steps, one for each subnetwork; else all take the same step.

    Returns:
        curves: rows for each step: `control` (subnetwork, random or gradient), `delta_<k>`, and the figures of the
            table `curves`.
        effects: outputs of some samples: `delta_<k>`, `sample`, `position`, `output`, `name`, `value`.

    Raises:
        L3DError: no such subnetwork or tensor, or the run has not been analysed.
    """
    if not subnetworks or len(set(subnetworks)) < len(subnetworks):
        found = ", ".join(map(str, subnetworks)) or "none"
        raise L3DError(f"subnetwork: found {found}, allowed is each once, at least 1")
    folder, decomposition = run.folder / "analysis", run.decomposition
    manifest = read_manifest(folder)
    here = fingerprints_of(decomposition)
    if any(manifest[key] != value for key, value in here.items()):
        raise L3DError(f"analysis: {folder} is of an earlier fit; `l3d analyze {run.folder}` makes it again")
    entries = run.entries(manifest["split"], manifest["limit"])
    steps = list(manifest["deltas"] if deltas is None else deltas)
    combinations = list(product(steps, repeat=len(subnetworks)) if grid else ((d,) * len(subnetworks) for d in steps))
    asked = [dict(zip(subnetworks, combination, strict=True)) for combination in combinations]
    for k in subnetworks:
        direction_of(decomposition, {k: 1.0}, parameters)  # (before any data are read: it refuses what there is not)

    tables = pd.concat([read_table(folder, "samples", k) for k in subnetworks])
    top = tables[tables["kind"] == "top"].drop_duplicates(["sample", "position"])
    tables = pd.concat([read_table(folder, "background", k) for k in subnetworks])
    random = tables.groupby(["sample", "position"], sort=True)["active"].any().reset_index()
    rows = [(int(row.sample), int(row.position)) for row in [*top.itertuples(), *random.itertuples()]]
    samples = sorted({sample for sample, _ in rows})
    entries.keep(samples)
    items = read_table(folder, "items")
    known = dict(zip(items["sample"].tolist(), items["checksum"].tolist(), strict=True))
    entries.require_same({sample: known[sample] for sample in samples if sample in known})

    def pick(rows: Sequence[tuple[int, int]]) -> Any:
        device = next(decomposition.subnetworks.parameters()).device
        picked = placed(entries.pick([sample for sample, _ in rows]), device)
        return only_positions(picked, [position for _, position in rows])

    batch, near = pick(rows), pick(rows[: len(top)])
    relevant, background = torch.arange(len(top)), len(top) + torch.arange(len(random))
    inactive = background[~torch.tensor(random["active"].to_numpy(dtype=bool))]
    shown = [*range(min(SHOWN, len(top))), *inactive[:1].tolist()]
    most = sum(
        derivatives(decomposition, near, direction_of(decomposition, {k: 1.0}, parameters))[1].abs()
        for k in subnetworks
    )
    named = named_outputs(most)  # type: ignore[arg-type]

    def curve(steps: Iterable[Direction], shown: Sequence[int] = ()) -> tuple[list[dict[str, Any]], Sweep]:
        found = sweep(decomposition, batch, ((1.0, direction) for direction in steps), named=named, shown=shown)
        return curve_rows(found, relevant, inactive, background), found

    def directions() -> Iterator[Direction]:  # one after the other: each is as large as the tensors
        return (direction_of(decomposition, steps, parameters) for steps in asked)

    own, looked = curve(directions(), shown)
    controls = [curve(steps)[0] for steps in _random(decomposition, asked, directions, manifest)]
    gradient = mean_gradient(decomposition, batch, background, manifest["seed"])
    rows_of = {
        "subnetwork": own,
        "random": mean_rows(controls),
        "gradient": curve(_along(gradient, asked, directions()))[0],
    }
    names = output_names(decomposition.target, run.data, looked.outputs.shape[2], kind_of(batch))
    curves, effects = [], []
    of_sample = effect_rows(looked, [rows[i] for i in shown], names)
    each = len(of_sample) // (len(shown) * len(combinations))
    columns = [{f"delta_{k}": delta for k, delta in steps.items()} for steps in asked]
    for control in CONTROLS:
        for moved, row in zip(columns, rows_of[control], strict=True):
            curves.append({"control": control, **moved} | {key: value for key, value in row.items() if key != "delta"})
    for c, moved in enumerate(columns):
        for s in range(len(shown)):
            start = (s * len(combinations) + c) * each
            effects += [
                moved | {key: value for key, value in effect.items() if key != "delta"}
                for effect in of_sample[start : start + each]
            ]
    return pd.DataFrame(curves), pd.DataFrame(effects)


def _random(
    decomposition: Decomposition,
    asked: Sequence[Mapping[int, float]],
    directions: Callable[[], Iterable[Direction]],
    manifest: Mapping[str, Any],
) -> Iterator[Iterator[Direction]]:
    """For each of some draws: what every step would be with random directions in place of the v_k."""
    n = manifest["n_controls"]
    drawn = {k: random_directions(decomposition, k, n, manifest["seed"]) for k in asked[0]}
    for r in range(n):
        yield (
            {name: sum(delta * drawn[k][r][name] for k, delta in steps.items()) for name in direction}  # type: ignore[misc]
            for steps, direction in zip(asked, directions(), strict=True)
        )


def _along(
    gradient: Direction, asked: Sequence[Mapping[int, float]], directions: Iterable[Direction]
) -> Iterator[Direction]:
    """Every step turned along the gradient, of the same tensors and as long; its sign is that of the summed deltas."""
    for steps, direction in zip(asked, directions, strict=True):
        own, its = _norm(direction), _norm({name: gradient[name] for name in direction})
        length = math.copysign(own / max(its, 1e-30), sum(steps.values()))
        yield {name: length * gradient[name] for name in direction}


def _norm(direction: Direction) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in direction.values()))


@torch.no_grad()
def mean_gradient(decomposition: Decomposition, batch: Any, chosen: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Summed gradients of the chosen samples [M] of a batch, {name: [*shape]}, against the mean output.

    A decomposition that was never validated holds no mean output: then against others of the batch.
    """
    mean, subnetworks = decomposition.mean_reference, decomposition.subnetworks
    gradients = extractor_of(decomposition)(
        batch, torch.Generator().manual_seed(seed), None if mean is None else mean.unsqueeze(0)
    ).gradients
    first = next(subnetworks.parameters())
    prepared = subnetworks.prepare({name: value.select(chosen.to(first.device)) for name, value in gradients.items()})
    total = prepared.combine(first.new_ones(1, len(chosen)), subnetworks.shapes)
    return {name: value[0] for name, value in total.items()}


def intervene_run(
    run: Run,
    subnetworks: Sequence[int],
    deltas: Sequence[float] | None = None,
    parameters: Sequence[str] | None = None,
    grid: bool = False,
) -> Path:
    """`intervene`, written to `<run>/analysis/interventions` as tables with a manifest, and printed.

    They are named after the subnetworks (and the tensors, if not all are moved): `3-5-grid.parquet`, `.csv`, `.json`.
    """
    curves, effects = intervene(run, subnetworks, deltas, parameters, grid)
    folder = run.folder / "analysis" / "interventions"
    name = "-".join(map(str, subnetworks)) + ("-grid" if grid else "") + _suffix(parameters)
    (folder / f"{name}.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for part, frame in (("", curves), ("-effects", effects)):
        replace(folder / f"{name}{part}.parquet", lambda path, frame=frame: frame.to_parquet(path, index=False))
        replace(folder / f"{name}{part}.csv", lambda path, frame=frame: frame.to_csv(path, index=False))
    about = read_manifest(run.folder / "analysis")
    arguments = {"subnetworks": subnetworks, "deltas": deltas, "parameters": parameters, "grid": grid}
    same = {key: about[key] for key in ("seed", "split", "limit", "n_top", "n_background", "n_controls")}
    made = fingerprints_of(run.decomposition) | same | made_by()
    write_manifest(folder, {"arguments": arguments} | made, f"{name}.json")
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    where = f", in {', '.join(parameters)} only" if parameters else ""
    console.print(_table(curves, f"W0 + sum of delta v_k, k = {', '.join(map(str, subnetworks))}{where}"))
    scale = max(about["deltas"])
    farthest = float(curves[[f"delta_{k}" for k in subnetworks]].abs().to_numpy().max())
    far = f"; the largest here is {farthest / scale:.2g} times that" if farthest > scale else ""
    print(f"steps of this run's analysis: up to ±{scale:g}, where outputs move clearly{far}")
    print(folder / f"{name}.csv")
    return folder / f"{name}.csv"


def _suffix(parameters: Sequence[str] | None) -> str:
    """What tells the files of some tensors from others: the patterns, with a checksum where they are no file name."""
    if parameters is None:
        return ""
    patterns = "+".join(sorted(parameters))
    readable = re.sub(r"[^\w.+-]+", "_", patterns)[:60]
    return f"-in-{readable}" + ("" if readable == patterns else f"-{zlib.crc32(patterns.encode()):08x}")


def _table(frame: pd.DataFrame, title: str) -> Table:
    told = [
        name for name in frame if not name.endswith("_std") and name not in ("outputs_relevant", "outputs_irrelevant")
    ]
    table = Table(title=title, title_justify="left")
    for column in told:
        table.add_column(column, justify="left" if column == "control" else "right")
    for control, rows in frame.groupby("control", sort=False):
        for row in rows.to_dict("records"):
            spread = {name: row.get(f"{name}_std") for name in told}
            cells = ["" if pd.isna(row[name]) else f"{row[name]:.4g}" for name in told if name != "control"]
            more = ["" if pd.isna(spread[name]) else f" ± {spread[name]:.1g}" for name in told if name != "control"]
            table.add_row(
                str(control), *(cell + (extra if cell else "") for cell, extra in zip(cells, more, strict=True))
            )
        table.add_section()
    return table


def summary_of(folder: Path, top: int = 8) -> Table:
    """What `l3d analyze` ends with: the most active subnetworks."""
    subnetworks, outputs = read_table(folder, "subnetworks"), read_table(folder, "outputs_summary")
    n = len(subnetworks)
    table = Table(title=f"{min(top, n)} of {n} subnetworks, most active first", title_justify="left")
    for column in ("k", "P_act", "impact", "raises", "lowers"):
        table.add_column(column, justify="right" if column in ("k", "P_act", "impact") else "left")
    for row in subnetworks.sort_values("p_act", ascending=False, kind="stable").head(top).itertuples():
        mine = outputs[outputs["subnetwork"] == row.subnetwork]
        named = [_names(mine[mine["direction"] == direction]) for direction in ("raised", "lowered")]
        impact = f"{row.impact_mean:.3g} ± {row.impact_se:.1g}"
        table.add_row(str(row.subnetwork), f"{row.p_act:.3f}", impact, *(Text(name) for name in named))
    return table


def _names(rows: pd.DataFrame, n: int = 4) -> str:
    """The first outputs of a summary."""
    names = rows.sort_values("rank")["name"].head(n)
    return "  ".join(repr(name) if name != name.strip() else name for name in map(str, names))


__all__ = ["intervene", "intervene_run", "summary_of"]
