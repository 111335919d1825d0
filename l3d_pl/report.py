"""What a finished run is told by: its table, its score against the ground truth, its pictures and its page."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from torch import Tensor

from l3d_pl.analysis.alignment import ToyScore, number, score_toy
from l3d_pl.analysis.runs import load_run, looked_in, settings_of
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError

TOY_TASKS = ("tms", "tmcs", "high_rank", "squared")


def toy_of(decomposition: Decomposition) -> tuple[str, dict[str, Any]] | None:
    """Task and data settings of a toy run, None of any other."""
    data = (decomposition.run_config or {}).get("data") or {}
    settings = dict(data.get("init_args") or {})
    is_toy = str(data.get("class_path", "")).endswith("ToyData") and settings.get("task", "tms") in TOY_TASKS
    return (settings.get("task", "tms"), settings) if is_toy else None


def target_tensors(decomposition: Decomposition) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The target's tensors and its ground truth, from the file that the run names; both empty without one."""
    config = settings_of(decomposition)
    path = (config.get("model") or {}).get("target_weights")
    if not path:
        return {}, {}
    if not Path(path).is_file():
        raise L3DError(f"target_weights: the run's target {path} is not there any more{looked_in(config)}")
    tensors = load_file(path)
    truth = {name.removeprefix("truth."): tensors.pop(name) for name in list(tensors) if name.startswith("truth.")}
    return tensors, truth


def score_run(run_dir: Path) -> ToyScore:
    """Ground-truth score of a finished toy run, also written to `<run_dir>/score.json`.

    Raises:
        L3DError: no toy run, its target is gone, or what the score is read off is missing.
    """
    decomposition = load_run(run_dir)
    toy = toy_of(decomposition)
    if toy is None:
        raise L3DError(
            f"score: {run_dir} is no toy run, so there is no ground truth (data is not datamodules.toy.ToyData)"
        )
    tensors, truth = target_tensors(decomposition)
    if toy[0] == "tmcs" and tensors and "A" not in truth:
        path = (decomposition.run_config or {})["model"]["target_weights"]
        raise L3DError(f"target file: {path} has no tensor 'truth.A', the task's matrix, which tmcs is scored against")
    loss = decomposition.figures.get("val/loss")
    score = score_toy(
        toy[0],
        decomposition.directions(),
        tensors,
        truth,
        decomposition.p_act > 0,
        loss=None if loss is None else float(loss),
        group_size=toy[1].get("group_size") or 1,
    )
    aside = run_dir / ".score.json.writing"
    aside.write_text(json.dumps(score.to_dict(), indent=2) + "\n")
    os.replace(aside, run_dir / "score.json")
    return score


def try_score(run_dir: Path) -> tuple[ToyScore | None, str]:
    """`score_run`, or None and a sentence on what is missing: a finished fit does not fail for want of a score."""
    try:
        return score_run(run_dir), ""
    except L3DError as error:
        return None, f"not scored; {error}"


def print_score(run_dir: Path) -> None:
    """`l3d score`."""
    Console().print(score_run(run_dir))


def write_report(run_dir: Path) -> Path:
    """The atlas `<run_dir>/atlas/index.html`, with what an analysis has found if there is one; returns its path."""
    from l3d_pl.atlas.build import write_atlas

    return write_atlas(run_dir, progress=False).page


def samples_per_second(run_dir: Path) -> float | None:
    """Median over the logged values of a run, None without any."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return None
    with open(path, newline="") as file:
        values = [
            float(row["train/samples_per_second"])
            for row in csv.DictReader(file)
            if row.get("train/samples_per_second")
        ]
    return float(torch.tensor(values).median()) if values else None


def print_summary(run_dir: Path, seconds: float, resumed_at: int = 0) -> None:
    """What `l3d fit` ends with: the run's figures, and where everything is.

    Args:
        seconds: of the fit alone, without the target's training; of a resumed run its last part.
        resumed_at: steps before that part.
    """
    decomposition = load_run(run_dir)
    table = Table(
        title=f"{run_dir.resolve().name}: {decomposition.n_subnetworks} subnetworks",
        title_justify="left",
        show_header=False,
    )
    loss = decomposition.figures.get("val/loss")
    table.add_row("held-out loss L (share of |gradient|² left)", number(loss))
    score, unscored = try_score(run_dir) if toy_of(decomposition) else (None, "")
    if score is not None:
        table.add_row(
            f"{score.circuit_kind}s recovered", f"{int(score.figures['recovered'] or 0)} of {score.n_circuits}"
        )
        for name, text in (
            ("cos", "|cos| with the target's features"),
            ("mmcs", "MMCS"),
            ("r2_ratio", "r² of A, share of the target's own"),
        ):
            if score.figures.get(name) is not None:
                table.add_row(text, number(score.figures[name]))
    dead = int((decomposition.p_act == 0).sum())
    table.add_row("dead subnetworks", f"{dead} of {decomposition.n_subnetworks}")
    speed = samples_per_second(run_dir)
    steps = decomposition.figures.get("steps", 0)
    part = f" for the last {steps - resumed_at} of" if resumed_at else ","
    table.add_row(
        "time of the fit", f"{seconds:.1f} s{part} {steps} steps" + (f", {speed:,.0f} samples/s" if speed else "")
    )
    if (page := run_dir / "atlas" / "index.html").is_file():
        table.add_row("atlas", str(page))
    table.add_row("decomposition", str(run_dir / "decomposition"))
    console = Console(soft_wrap=True)
    console = console if console.is_terminal else Console(soft_wrap=True, width=160)
    console.print(table)
    if unscored:
        console.print(Text(unscored))  # Text: a path is no markup
