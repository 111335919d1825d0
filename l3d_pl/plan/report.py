"""Which strategy to take, and what `l3d plan` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from l3d_pl.errors import L3DError
from l3d_pl.gradients.forward import batch_size, inputs_of
from l3d_pl.lightning_module import L3D
from l3d_pl.params import first_batch, made_up_batch
from l3d_pl.plan.strategies import FLOP_PER_BYTE, Plan, Planner, World

GB = 1e9
SPARE = 0.1  # of a GPU's memory, for the driver, libraries' workspaces and fragmentation
SIMPLER = 1.2  # of two strategies the simpler is taken where it costs no more than this times the other


# What lowers each kind of memory.
HELP = {
    "V": "model.n_subnetworks, model.ranks, more GPUs",
    "gradients": "model.n_subnetworks, model.ranks, more GPUs",
    "optimizer": "model.n_subnetworks, model.ranks, more GPUs",
    "target": "its dtype, model.shard_target",
    "anchors": "model.init_samples, model.swap_samples",
    "D and A": "the data's batch_size or length, model.tokens_per_sequence, a split with fewer ranks per group",
    "activations": "the data's batch_size, model.autocast",
    "intermediates": "model.n_subnetworks, model.ranks, the data's batch_size",
    "communication": "the data's batch_size, another split",
}


def complete(
    plans: list[Plan], world: World, steps: int | None, flops_per_second: float | None, step_seconds: float | None
) -> None:
    """Tell of every plan whether it fits, and how long it takes.

    Args:
        flops_per_second: of a GPU, in TFLOP/s.
        step_seconds: as measured.
    """
    for key, value in (("flops_per_second", flops_per_second), ("step_seconds", step_seconds)):
        if value is not None and not value > 0:
            raise L3DError(f"{key}: found {value}, allowed are numbers > 0")
    for plan in plans:
        if world.memory is not None:
            plan.fits = plan.peak <= (1 - SPARE) * world.memory * GB
        if step_seconds is not None:
            plan.seconds = step_seconds
        elif flops_per_second is not None:
            plan.seconds = plan.flop / (flops_per_second * 1e12)
        if plan.seconds is not None and steps is not None:
            plan.hours = plan.seconds * steps / 3600


def recommend(plans: Sequence[Plan]) -> tuple[Plan | None, str]:
    """The plan to take, and why; None where nothing fits."""
    fitting = [plan for plan in plans if plan.fits is not False]
    if not fitting:
        nearest = min(plans, key=lambda plan: plan.peak)
        largest = max(nearest.memory, key=nearest.memory.__getitem__)
        return None, (
            f"nothing fits; {nearest.name} comes nearest with {nearest.peak / GB:.1f} GB in {nearest.when}, "
            f"{nearest.memory[largest] / GB:.1f} GB of them {largest}: lower {HELP[largest]}"
        )
    # What is moved to the host's memory is stepped on there, which FLOP and bytes do not show.
    least = min(fitting, key=lambda plan: (plan.host > 0, plan.cost))
    best = next(plan for plan in fitting if plan.host == 0 or least.host > 0 if plan.cost <= SIMPLER * least.cost)
    if len(fitting) == 1:
        return best, "nothing else fits"
    return best, (
        f"the simplest {'that fits ' if best.fits else ''}within a fifth of the least work: {_si(best.flop)}FLOP and "
        f"{_si(sum(best.sent.values()))}B sent per GPU and step, a byte counted as {FLOP_PER_BYTE} FLOP"
    )


def print_plans(
    planner: Planner, plans: list[Plan], steps: int | None, notes: list[str], as_json: bool = False
) -> None:
    """Two tables and the recommendation; or all of it as one JSON object."""
    best, why = recommend(plans)
    checkpoint, world = planner.checkpoint(), planner.world
    samples = planner.extracted.n_samples * world.ranks * planner.batches
    if as_json:
        strategies = [asdict(plan) | {"name": plan.name, "arguments": plan.arguments(world)} for plan in plans]
        result = {
            "ranks": world.ranks,
            "memory": None if world.memory is None else world.memory * GB,
            "samples_per_step": samples,
            "steps": steps,
            "checkpoint": checkpoint,
            "strategies": strategies,
            "recommended": None if best is None else best.name,
            "arguments": None if best is None else best.arguments(world),
            "why": why,
            "notes": notes,
        }
        print(json.dumps(result, indent=1))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=170)
    unit = _unit(min(GB, max(plan.peak for plan in plans)))
    table = Table(title=f"{unit[0]}B per GPU", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for column in (*plans[0].memory, "peak"):
        table.add_column(column.replace("communication", "comm."), justify="right")
    table.add_column("in")
    table.add_column("fits")
    for plan in plans:
        fits = "" if plan.fits is None else "yes" if plan.fits else "no"
        cells = [_in(unit, value) for value in (*plan.memory.values(), plan.peak)]
        table.add_row(plan.name, *cells, plan.when, fits)
    console.print(table)
    flop, sent = _unit(max(plan.flop for plan in plans)), _unit(max(sum(plan.sent.values()) for plan in plans))
    table = Table(title="per GPU and step", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for column in (f"{flop[0]}FLOP", f"{sent[0]}B sent", "seconds", "hours in all", "GB of a node's own memory"):
        table.add_column(column, justify="right")
    table.add_column("what is sent", overflow="fold")
    for plan in plans:
        told = ", ".join(f"{what} {_in(sent, value)}" for what, value in plan.sent.items() if value)
        seconds, hours = (f"{value:.3g}" if value is not None else "?" for value in (plan.seconds, plan.hours))
        host, total = _in(("G", GB), plan.host) if plan.host else "", sum(plan.sent.values())
        table.add_row(plan.name, _in(flop, plan.flop), _in(sent, total), seconds, hours, host, told)
    console.print(table)
    spare = f"; {SPARE:.0%} of the memory is left free" if world.memory is not None else ""
    told_steps = "steps unknown" if steps is None else f"{steps:,} steps"
    lines = [
        f"{world.nodes} x {world.gpus} GPUs, {samples:,} samples a step, "
        f"{told_steps}; a checkpoint is {_si(checkpoint)}B{spare}",
        *notes,
        f"recommended: {best.name}: {why}" if best is not None else f"recommended: none: {why}",
        *([f"run it with: {' '.join(best.arguments(world))}"] if best is not None else []),
    ]
    for line in lines:
        Console(soft_wrap=True).print(Text(line))


def _unit(number: float) -> tuple[str, float]:
    """Prefix and size of the unit in which a number is best told."""
    return next((unit for unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= unit[1]), ("", 1.0))


def _in(unit: tuple[str, float], number: float) -> str:
    value = number / unit[1]
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _si(number: float) -> str:
    """A number and the prefix of its unit."""
    return f"{_in(unit := _unit(number), number)} {unit[0]}"


def steps_of(trainer: Any, batches: int | None) -> int | None:
    """Steps of a run: `max_steps`, or `max_epochs` of so many batches; None: not to be told without the data."""
    limits = []
    if (trainer.max_steps or -1) > 0:
        limits.append(trainer.max_steps)
    if batches is not None and (trainer.max_epochs or -1) > 0:
        some = trainer.limit_train_batches
        if isinstance(some, float) and some <= 1:
            batches = max(1, int(batches * some))
        elif some is not None:
            batches = min(batches, int(some))
        limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(limits) if limits else None


def batches_of(settings: Mapping[str, Any], rows: int | None, batch_size: int, ranks: int) -> int | None:
    """Batches of a rank in an epoch: what a stream (of files, of fresh toy rows) calls one, or all rows."""
    if settings.get("steps_per_epoch") and settings.get("points") is None:
        return int(settings["steps_per_epoch"])
    return None if rows is None else math.ceil(rows / (batch_size * ranks))


def rows_of(settings: Mapping[str, Any], data: Any) -> int | None:
    """Rows of the training data: as set up, or as the settings say; None: not to be told without reading them."""
    if settings.get("mode") == "rows" and settings.get("max_rows"):
        return int(settings["max_rows"])
    train: Any = getattr(data, "train", None)
    return len(train) if hasattr(train, "__len__") else None


def run_plan(model: L3D, data: Any, config: Any, world: World) -> None:
    """`l3d plan` with a config that has been parsed, its model and its data."""
    if config.trainer.precision not in (None, 32, "32", "32-true"):
        raise L3DError(
            f"trainer.precision: found {config.trainer.precision}; allowed in a plan is 32-true: V and the step are "
            "counted in float32"
        )
    settings = vars(config.data.init_args)
    batch = made_up_batch(settings, getattr(getattr(model.target, "config", None), "vocab_size", None))
    notes: list[str] = []
    if batch is None:
        batch, notes = first_batch(model, data, settings)
        if batch is None:
            raise L3DError(f"data: a plan needs a batch, and there are {notes[0]}")
    world.rows = rows_of(settings, data)
    planner = Planner(model, batch, world, config.trainer.accumulate_grad_batches)
    plans = planner.plans()
    batches = batches_of(settings, world.rows, batch_size(inputs_of(batch)), world.ranks)
    steps = steps_of(config.trainer, batches)
    if steps is None:
        notes.append("the number of steps is not told without the data: give --trainer.max_steps")
    if config.flops_per_second is None and config.step_seconds is None:
        notes.append("for hours give --flops-per-second (TFLOP/s of a GPU) or --step-seconds (as measured)")
    complete(plans, world, steps, config.flops_per_second, config.step_seconds)
    print_plans(planner, plans, steps, notes, config.json)
