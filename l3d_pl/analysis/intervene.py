"""`l3d intervene`: push chosen subnetworks by chosen amounts, alone or together, in all tensors or in some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from l3d_pl.analysis.analyse import CONTROLS, RANDOM_DIRECTIONS
from l3d_pl.analysis.interventions import (
    curve_rows,
    direction_of,
    effect_rows,
    mean_rows,
    random_directions,
    sweep,
)
from l3d_pl.analysis.items import kind_of, output_names
from l3d_pl.analysis.outputs import Direction, only_positions
from l3d_pl.analysis.runs import Run, placed
from l3d_pl.analysis.survey import extractor_of
from l3d_pl.analysis.tables import read_manifest, read_table, replace
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError

RELEVANT, SHOWN = 10, 3  # top samples of each subnetwork that are measured, and those whose outputs are written


def intervene(
    run: Run,
    subnetworks: Sequence[int],
    deltas: Sequence[float] | None = None,
    parameters: Sequence[str] | None = None,
    grid: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """f(x, W0 + sum_k delta_k v_k) on the samples that `l3d analyze` has found for these subnetworks.

    Relevant samples are the top ones of any of the subnetworks, irrelevant are the random ones in which none is active.
    The controls take the same steps: along random unit directions (each v_k by one of its own ranks, as long in each
    tensor; means over two), and as far along the mean gradient of the random samples.

    Args:
        deltas: steps; None: those of the analysis.
        parameters: globs; only these tensors are moved.
        grid: every combination of steps, one for each subnetwork; else all take the same step.

    Returns:
        curves: rows for each step: `control` (subnetwork, random or gradient), `delta_<k>`, `relevant`, `irrelevant`,
            `selectivity`, `kl_inactive`, `loss_change`.
        effects: outputs of some samples: `delta_<k>`, `sample`, `position`, `output`, `name`, `value`.

    Raises:
        L3DError: no such subnetwork or tensor, or the run has not been analysed.
    """
    if not subnetworks:
        raise L3DError("subnetwork: found none, at least 1 is needed")
    folder, decomposition = run.folder / "analysis", run.decomposition
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != decomposition.target_fingerprint:
        raise L3DError(f"analysis: {folder} is of another target model; `l3d analyze {run.folder}` makes it again")
    entries = run.entries(manifest["split"], manifest["limit"])
    steps = list(manifest["deltas"] if deltas is None else deltas)
    combinations = list(product(steps, repeat=len(subnetworks)) if grid else ((d,) * len(subnetworks) for d in steps))
    directions = [
        direction_of(decomposition, dict(zip(subnetworks, deltas, strict=True)), parameters) for deltas in combinations
    ]  # (before any data are read: it refuses what there is not)

    tables = pd.concat([read_table(folder, "samples", k) for k in subnetworks])
    top = tables[(tables["kind"] == "top") & (tables["place"] < RELEVANT)].drop_duplicates(["sample", "position"])
    random = tables[tables["kind"] == "random"].groupby(["sample", "position"], sort=True)["active"].any().reset_index()
    rows = [(int(row.sample), int(row.position)) for row in [*top.itertuples(), *random.itertuples()]]
    entries.keep(sorted({sample for sample, _ in rows}))
    device = next(decomposition.subnetworks.parameters()).device
    batch = only_positions(
        placed(entries.pick([sample for sample, _ in rows]), device), [position for _, position in rows]
    )
    found = sweep(decomposition, batch, [(1.0, direction) for direction in directions])
    relevant, background = torch.arange(len(top)), len(top) + torch.arange(len(random))
    inactive = background[~torch.tensor(random["active"].to_numpy(dtype=bool))]
    asked = [dict(zip(subnetworks, combination, strict=True)) for combination in combinations]
    rows_of = {"subnetwork": curve_rows(found, relevant, inactive, background)}
    alone = [
        curve_rows(
            sweep(decomposition, batch, [(1.0, direction) for direction in control]), relevant, inactive, background
        )
        for control in (
            *_random(decomposition, asked, directions, manifest["seed"]),
            _along(mean_gradient(decomposition, batch, background, manifest["seed"]), asked, directions),
        )
    ]
    rows_of |= {"random": mean_rows(alone[:-1]), "gradient": alone[-1]}
    names = output_names(decomposition.target, run.data, found.outputs.shape[2], kind_of(batch))
    curves, effects = [], []
    shown = [(i, *rows[i]) for i in [*range(min(SHOWN, len(top))), *inactive[:1].tolist()]]
    of_sample = effect_rows(found, shown, names)
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
    decomposition: Decomposition, asked: Sequence[Mapping[int, float]], directions: Sequence[Direction], seed: int
) -> list[list[Direction]]:
    """For each of some draws: what every step would be with random directions in place of the v_k."""
    drawn = {k: random_directions(decomposition, k, RANDOM_DIRECTIONS, seed) for k in asked[0]}
    return [
        [
            {name: sum(delta * drawn[k][r][name] for k, delta in steps.items()) for name in direction}  # type: ignore[misc]
            for steps, direction in zip(asked, directions, strict=True)
        ]
        for r in range(RANDOM_DIRECTIONS)
    ]


def _along(
    gradient: Direction, asked: Sequence[Mapping[int, float]], directions: Sequence[Direction]
) -> list[Direction]:
    """Every step turned along the gradient, of the same tensors and as long; its sign is that of the summed deltas."""
    result: list[Direction] = []
    for steps, direction in zip(asked, directions, strict=True):
        own, its = _norm(direction), _norm({name: gradient[name] for name in direction})
        length = math.copysign(own / max(its, 1e-30), sum(steps.values()))
        result.append({name: length * gradient[name] for name in direction})
    return result


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
    """`intervene`, written to `<run>/analysis/interventions/<subnetworks>.parquet` and `.csv`, and printed."""
    curves, effects = intervene(run, subnetworks, deltas, parameters, grid)
    folder = run.folder / "analysis" / "interventions"
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(map(str, subnetworks)) + ("-grid" if grid else "")
    for part, frame in (("", curves), ("-effects", effects)):
        replace(folder / f"{name}{part}.parquet", lambda path, frame=frame: frame.to_parquet(path, index=False))
        replace(folder / f"{name}{part}.csv", lambda path, frame=frame: frame.to_csv(path, index=False))
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    where = f", in {', '.join(parameters)} only" if parameters else ""
    console.print(_table(curves, f"W0 + sum of delta v_k, k = {', '.join(map(str, subnetworks))}{where}"))
    scale = max(read_manifest(run.folder / "analysis")["deltas"])
    farthest = float(curves[[f"delta_{k}" for k in subnetworks]].abs().to_numpy().max())
    far = f"; the largest here is {farthest / scale:.2g} times that" if farthest > scale else ""
    print(f"steps of this run's analysis: up to ±{scale:g}, where outputs move clearly{far}")
    print(folder / f"{name}.csv")
    return folder / f"{name}.csv"


def _table(frame: pd.DataFrame, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        table.add_column(column, justify="left" if column == "control" else "right")
    for control, rows in frame.groupby("control", sort=False):
        for row in rows.drop(columns="control").itertuples(index=False):
            table.add_row(str(control), *("" if pd.isna(value) else f"{value:.4g}" for value in row))
        table.add_section()
    return table


def summary_of(folder: Path, top: int = 8) -> Table:
    """What `l3d analyze` ends with: the most active subnetworks."""
    subnetworks, outputs = read_table(folder, "subnetworks"), read_table(folder, "outputs")
    n = len(subnetworks)
    table = Table(title=f"{min(top, n)} of {n} subnetworks, most active first", title_justify="left")
    for column in ("k", "P_act", "impact", "raises", "lowers"):
        table.add_column(column, justify="right" if column in ("k", "P_act", "impact") else "left")
    for row in subnetworks.sort_values("p_act", ascending=False, kind="stable").head(top).itertuples():
        mine = outputs[(outputs["subnetwork"] == row.subnetwork) & (outputs["kind"] == "top")]
        named = [_most(mine[mine["direction"] == direction]) for direction in ("raised", "lowered")]
        impact = f"{row.impact_mean:.3g} ± {row.impact_se:.1g}"
        table.add_row(str(row.subnetwork), f"{row.p_act:.3f}", impact, *(Text(name) for name in named))
    return table


def _most(rows: pd.DataFrame, n: int = 4) -> str:
    """The outputs that move most, summed over samples."""
    sizes = rows.groupby("name")["derivative"].sum().abs().sort_values(ascending=False, kind="stable")
    return "  ".join(repr(name) if name != name.strip() else name for name in map(str, sizes.head(n).index))


__all__ = ["intervene", "intervene_run", "summary_of"]
