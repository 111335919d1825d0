"""`l3d toys`: every toy, many seeds, both recipes, scored against the ground truth.

A row of the table is one toy, one target, one recipe. The default recipe is run once per seed, as a user would run it;
the published one (32,000 steps) trains all its seeds side by side (`restarts`), on the same 1000 points.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from datamodules.toy import ToyData
from l3d_pl.analysis.alignment import ToyScore, number, score_toy
from l3d_pl.configs_path import shipped_configs
from l3d_pl.errors import L3DError, require_choice
from l3d_pl.lightning_module import L3D, RECIPES
from l3d_pl.provenance import provenance
from l3d_pl.targets.training import load_target

TOYS = ("tms", "tms_40_10", "tmcs", "high_rank_30", "high_rank_25", "squared")
# A figure of its own beside the circuits recovered.
QUALITY = {
    "tms": "cos",
    "tms_40_10": "mmcs",
    "tmcs": "r2_ratio",
    "high_rank_30": "share",
    "high_rank_25": "share",
    "squared": "share",
}


@dataclass(frozen=True)
class Job:
    """Some seeds of one toy, target and recipe, in one process."""

    toy: str
    target: str
    recipe: str
    restarts: int  # of each run; the best is kept
    seeds: tuple[int, ...]
    side_by_side: bool  # all seeds as restarts of one run, each reported


@dataclass(frozen=True)
class Run:
    """One decomposition's results; `loss` is L on the 1000 test rows as one batch, mean over three reference draws."""

    toy: str
    target: str
    recipe: str
    seed: int
    loss: float
    seconds: float
    score: dict[str, Any]


def run_toys(
    toys: Sequence[str] | None, recipes: Sequence[str], seeds: int, targets: Sequence[str] | None, root: Path
) -> list[Run]:
    """Run all and print the table; rows go to `<root>/runs.json` and `<root>/table.md` as they come.

    Args:
        toys: names of shipped toy configs (default: all).
        recipes: `l3d_pl`, `paper`.
        seeds: decomposition seeds of each.
        targets: target seeds (default 42 and 1), or safetensors files of targets for a single toy.
        root: directory of results, and of targets that are trained.
    """
    toys, targets = list(toys or TOYS), list(targets or ("42", "1"))
    for toy in toys:
        require_choice("toys", toy, TOYS)
    for recipe in recipes:
        require_choice("recipes", recipe, RECIPES)
    if seeds < 1:
        raise L3DError(f"seeds: found {seeds}; at least 1 is needed")
    jobs = [
        job for toy in toys for target in targets for recipe in recipes for job in _jobs(toy, target, recipe, seeds)
    ]
    runs: list[Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    root.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        bar = progress.add_task("targets", total=len(toys) * len(targets))
        for done in as_completed([pool.submit(ensure_target, toy, target, root) for toy in toys for target in targets]):
            done.result()
            progress.advance(bar)
        bar = progress.add_task("decompositions", total=sum(len(job.seeds) for job in jobs))
        for future in as_completed([pool.submit(run_job, job, root) for job in jobs]):
            runs += future.result()
            progress.update(bar, completed=len(runs))
            _write(root, runs)
    console = Console()
    (console if console.width >= 150 else Console(width=150)).print(table_of(runs))
    print(f"rows: {root / 'runs.json'}, table: {root / 'table.md'}")
    return runs


def _jobs(toy: str, target: str, recipe: str, seeds: int) -> list[Job]:
    everything = tuple(range(seeds))
    if recipe == "paper":
        return [Job(toy, target, recipe, seeds, everything, side_by_side=True)]
    split = [everything[start : start + 4] for start in range(0, seeds, 4)]
    jobs = [Job(toy, target, recipe, 1, part, side_by_side=False) for part in split]
    if toy == "tmcs":  # one run in a hundred ends in the wrong optimum, which only a second start can tell
        jobs += [Job(toy, target, recipe, 2, part, side_by_side=False) for part in split]
    return jobs


def target_file(toy: str, target: str, root: Path) -> Path:
    return Path(target) if target.endswith(".safetensors") else root / "targets" / f"{toy}_seed{target}.safetensors"


def ensure_target(toy: str, target: str, root: Path, training: Sequence[str] = ()) -> None:
    """Train the target of this toy and seed if its file is not there; `training`: more arguments of `l3d target`."""
    calm()
    path = target_file(toy, target, root)
    if path.is_file():
        return
    if target.endswith(".safetensors"):
        raise L3DError(f"targets: there is no file {target}")
    from l3d_pl.lightning_cli import train_target

    config = str(shipped_configs() / "targets" / f"{toy}.yaml")
    quiet = ["--trainer.enable_progress_bar", "false"]
    train_target(["--config", config, "--seed_everything", target, *quiet, *training], str(path))


def run_job(job: Job, root: Path) -> list[Run]:
    """All runs of a job."""
    calm()
    if job.side_by_side:
        return fit_and_score(job, root, seed=0)
    return [run for seed in job.seeds for run in fit_and_score(job, root, seed)]


def build_toy(toy: str, recipe: str = "l3d_pl") -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of `L3D`, of `ToyData` and of the trainer from a shipped config; the target is built, not trained."""
    config = yaml.safe_load((shipped_configs() / ("paper" if recipe == "paper" else "") / f"{toy}.yaml").read_text())
    model = dict(config["model"])
    module_name, class_name = model["target"]["class_path"].rsplit(".", 1)
    model["target"] = getattr(importlib.import_module(module_name), class_name)(**model["target"].get("init_args", {}))
    model |= {"target_weights": None, "target_config": None}
    return model, config["data"]["init_args"], config["trainer"]


def quiet_trainer(**settings: Any) -> L.Trainer:
    """Lightning's Trainer on one CPU, without files, bars and messages, but for the `settings` given."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,
    }
    return L.Trainer(**(quiet | settings))  # type: ignore[arg-type]


def fit_quietly(module: L.LightningModule, data: Any, **settings: Any) -> float:
    """Fit with a `quiet_trainer` that leaves nothing behind; returns the CPU seconds that it took.

    Args:
        data: a data module, or a training loader.
        settings: of the trainer, `max_epochs` or `max_steps` among them.
    """
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        quiet_trainer(**({"default_root_dir": scratch} | settings)).fit(module, data)
    return time.process_time() - start


def fit_and_score(job: Job, root: Path, seed: int) -> list[Run]:
    model, data_settings, trainer_settings = build_toy(job.toy, job.recipe)
    truth = load_target(target_file(job.toy, job.target, root), model["target"])
    data = ToyData(**data_settings, seed=seed)
    module = L3D(**(model | {"restarts": job.restarts}), seed=seed)
    epochs = trainer_settings["max_epochs"]
    start = time.perf_counter()
    fit_quietly(module, data, max_epochs=epochs, check_val_every_n_epoch=epochs)
    seconds = (time.perf_counter() - start) / (job.restarts if job.side_by_side else 1)
    data.setup()
    inputs = data.test[torch.arange(len(data.test))]["inputs"]  # type: ignore[arg-type]
    name = job.recipe if job.side_by_side or job.restarts == 1 else f"{job.recipe}, best of {job.restarts}"
    runs = []
    for restart in range(job.restarts) if job.side_by_side else [module.best_restart]:
        found = module.decomposition(restart)
        loss = statistics.mean(found.reconstruction_loss(inputs, seed=draw) for draw in range(3))
        score = score_toy(
            data_settings["task"],
            found.directions(),
            model["target"].state_dict(),
            truth,
            found.p_act > 0,
            loss=loss,
            group_size=data_settings.get("group_size", 1),
        )
        runs.append(
            Run(
                job.toy,
                job.target,
                name,
                job.seeds[restart] if job.side_by_side else seed,
                loss,
                seconds,
                score.to_dict(),
            )
        )
    return runs


def calm() -> None:
    """One thread, no warnings, no messages of Lightning's."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


HEADER = (
    "toy",
    "target",
    "recipe",
    "runs with every circuit",
    "fewest circuits",
    "L mean",
    "L max",
    "quality mean",
    "quality min",
    "dead",
    "s per run",
)


def rows_of(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """One row for each toy, target and recipe, as text."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.toy, run.target, run.recipe), []).append(run)
    rows: list[tuple[str, ...]] = []
    for (toy, target, recipe), members in sorted(
        groups.items(), key=lambda item: (TOYS.index(item[0][0]), item[0][1:])
    ):
        scores = [ToyScore.from_dict(run.score) for run in members]
        recovered = [int(score.figures["recovered"] or 0) for score in scores]
        quality = [value for score in scores if (value := score.figures.get(QUALITY[toy])) is not None]
        losses = [run.loss for run in members]
        rows.append((
            toy,
            Path(target).stem,
            recipe,
            f"{sum(score.ok for score in scores)} of {len(scores)}",
            f"{min(recovered)} of {scores[0].n_circuits}",
            number(statistics.mean(losses)),
            number(max(losses)),
            f"{QUALITY[toy]} {number(statistics.mean(quality))}" if quality else "–",
            number(min(quality)) if quality else "–",
            number(statistics.mean(score.figures["dead"] or 0.0 for score in scores)),
            f"{statistics.mean(run.seconds for run in members):.1f}",
        ))  # fmt: skip
    return rows


def table_of(runs: Sequence[Run]) -> Table:
    table = Table(title="Toys against their ground truth", title_justify="left")
    for name in HEADER:
        table.add_column(name, no_wrap=" " not in name)
    for row in rows_of(runs):
        table.add_row(*row)
    return table


def _write(root: Path, runs: Sequence[Run]) -> None:
    content = {"provenance": provenance(), "runs": [asdict(run) for run in runs]}
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ("---",) * len(HEADER), *rows_of(runs))]
    for name, text in (("runs.json", json.dumps(content, indent=1)), ("table.md", "\n".join(lines) + "\n")):
        aside = root / f".{name}.writing"
        aside.write_text(text)
        os.replace(aside, root / name)
