"""`l3d slurm`: submit runs with a snapshot of what they are, see how they stand, go on with them, gather a sweep.

Slurm's own part (signals, requeueing, array tasks) is in `slurm/*.sbatch`; this writes those scripts, filled in, into
`<dir>/slurm/`, from where any job can be submitted again by hand:

    slurm/train.sbatch or sweep.sbatch, run.sh    what sbatch was given, exactly
    slurm/config.yaml, grid.txt                   the whole configuration
    slurm/code.json, code.diff, packages.txt      versions, git commit, names of untracked files; what differs from the
                                                  commit; every installed package
    slurm/jobs                                    the ids of the jobs, oldest first
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from l3d_pl.configs_path import slurm_scripts
from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.provenance import git_diff, git_untracked, provenance

QUEUED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
PATIENCE = 120  # seconds that a command of Slurm may take


# -- submit ------------------------------------------------------------------------------------------------------------


def submit(
    folder: Path,
    fit_args: Sequence[str],
    sbatch_options: Sequence[str] = (),
    profile: str = "cpu",
    grid: Path | None = None,
    at_once: int = 4,
    dry_run: bool = False,
) -> str | None:
    """Write scripts and snapshot into `<folder>/slurm/` and submit one run, or with a `grid` a run for each line.

    Args:
        folder: the run's directory, or of a sweep the directory of the runs' directories.
        fit_args: arguments of `l3d fit`.
        sbatch_options: as sbatch takes them; they win over the profile's and the script's.
        profile: `cpu` or `gpu`, the options in `slurm/<profile>.options`.
        at_once: runs of a sweep that may run side by side.
        dry_run: write everything, submit nothing.

    Returns:
        The job's id.

    Raises:
        L3DError: a setting of the fit is wrong, `folder` holds a run already, sbatch refuses.
    """
    folder = folder.resolve()
    lines = read_grid(grid) if grid is not None else []
    places = [folder / str(task) for task in range(1, len(lines) + 1)] or [folder]
    require_new(folder, places)
    config = resolved_config(fit_args)
    if grid is None:
        check(fit_args)
    for number, line in enumerate(lines, 1):
        if line not in lines[: number - 1]:
            try:
                check([*fit_args, *line])
            except L3DError as error:
                raise L3DError(f"{grid}, run {number}: {error}") from error

    scripts, options = slurm_scripts(), list(sbatch_options)
    profiles = [path.stem for path in sorted(scripts.glob("*.options"))]
    if profile not in profiles:
        hint = did_you_mean(profile, profiles)
        raise L3DError(f"profile: found {profile!r}, allowed are {', '.join(profiles)}{hint}")
    folder.joinpath("slurm").mkdir(parents=True, exist_ok=True)
    snapshot = folder / "slurm"
    write_snapshot(snapshot, config, lines)
    shutil.copy(scripts / "run.sh", snapshot)
    name = "sweep.sbatch" if grid is not None else "train.sbatch"
    defaults = [*(scripts / f"{profile}.options").read_text().split(), f"--chdir={Path.cwd()}"]
    defaults += [f"--job-name={folder.name}", f"--output={snapshot}/{'%A_%a' if grid is not None else '%j'}.log"]
    if grid is not None:
        defaults.append(f"--array=1-{len(lines)}%{at_once}")
    values = {"CONFIG": snapshot / "config.yaml", "RUN_DIR": folder, "SCRIPTS": snapshot, "L3D": l3d_command()}
    if grid is not None:
        values["GRID"] = snapshot / "grid.txt"
    # Into the script, so that it is the same job from whatever shell it is submitted again.
    values |= {name: os.environ[name] for name in ("GRACE", "RETRIES") if name in os.environ}
    if "SETUP" in os.environ:
        values["SETUP"] = Path(os.environ["SETUP"]).resolve()
    script = fill_in((scripts / name).read_text(), [*defaults, *joined_options(options)], values)
    (snapshot / name).write_text(script)
    for place in places:
        (place / "slurm" / "starts").unlink(missing_ok=True)  # those of an earlier job count no more
    return None if dry_run else start(snapshot / name)


def require_new(folder: Path, places: Sequence[Path]) -> None:
    """Raise where any of `places` holds a run: it would go on, with its own weights, under the new configuration."""
    runs = {run.folder: run for run in runs_of(folder)}
    for run in runs.values():
        if run.state in QUEUED:
            raise L3DError(f"slurm submit: {run.folder} holds a run that is {run.state}; allowed is another directory")
    for place in (*places, *runs):
        if (place / "finished").is_file():
            raise L3DError(f"slurm submit: {place} holds a run that has finished; allowed is another directory")
        if (place / "checkpoints").exists():
            hint = f"l3d slurm resume {shlex.quote(str(place))}, or " if place in runs else ""
            raise L3DError(f"slurm submit: {place} holds a run that has stopped; allowed: {hint}another directory")


def check(fit_args: Sequence[str]) -> None:
    """Raise where `l3d fit` would refuse these arguments at its start."""
    from l3d_pl.cli import resolve_configs
    from l3d_pl.lightning_cli import CheckCLI

    CheckCLI(resolve_configs(fit_args))


def resolved_config(fit_args: Sequence[str]) -> str:
    """What `l3d fit` would run with these arguments, as one YAML that needs no other file; wrong ones raise."""
    from l3d_pl.cli import resolve_configs
    from l3d_pl.lightning_cli import L3DCLI

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        L3DCLI(["fit", *resolve_configs(fit_args), "--print_config"])
    return text.getvalue()


def read_grid(path: Path) -> list[list[str]]:
    """The runs of a grid file: one per line, arguments quoted like a shell's; empty lines and # lines do not count."""
    if not path.is_file():
        raise L3DError(f"grid: there is no file {path}")
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                runs.append(shlex.split(line))
            except ValueError as error:
                raise L3DError(f"grid: {path}, line {number}: {error}") from error
    if not runs:
        raise L3DError(f"grid: {path} holds no run; allowed are lines such as '--model.k 0.1 --seed_everything 1'")
    return runs


def write_snapshot(snapshot: Path, config: str, lines: Sequence[Sequence[str]]) -> None:
    """Configuration, versions and what differs from the commit."""
    (snapshot / "config.yaml").write_text(config)
    code = provenance() | {"untracked": git_untracked() or []}
    (snapshot / "code.json").write_text(json.dumps(code, indent=2) + "\n")
    (snapshot / "code.diff").write_text(git_diff() or "")
    packages = sorted({f"{found.name}=={found.version}" for found in distributions() if found.name}, key=str.lower)
    (snapshot / "packages.txt").write_text("\n".join(packages) + "\n")
    if lines:
        (snapshot / "grid.txt").write_text("".join(shlex.join(line) + "\n" for line in lines))


def joined_options(options: Sequence[str]) -> list[str]:
    """sbatch's options, one per entry: `--nodes 2` are two words, `--nodes=2` is one."""
    result: list[str] = []
    for word in options:
        if word.startswith("-") or not result:
            result.append(word)
        else:
            result[-1] += f" {word}"
    for option in result:
        if not option.startswith("-"):
            raise L3DError(
                f"slurm submit: found {option!r}; allowed are options of sbatch, and after -- those of a fit"
            )
    return result


def fill_in(script: str, options: Sequence[str], values: Mapping[str, Any]) -> str:
    """The script with further `#SBATCH` lines after its own (the last one counts) and with values for its variables."""
    head, marker, body = script.rpartition("#SBATCH ")
    last, _, body = body.partition("\n")
    lines = [head + marker + last, *(f"#SBATCH {option}" for option in options)]
    for name, value in values.items():
        before, after = re.split(rf"(?m)^{name}=\S+", body, maxsplit=1)
        body = f"{before}{name}={shlex.quote(str(value))}{after}"
    return "\n".join(lines) + "\n" + body


def l3d_command() -> str:
    """The `l3d` beside this Python, or the one on PATH."""
    beside = Path(sys.executable).with_name("l3d")
    found = str(beside) if beside.is_file() else shutil.which("l3d")
    if found is None:
        raise L3DError(f"slurm submit: there is no command l3d beside {sys.executable}, nor on PATH")
    return found


def start(script: Path, *options: str) -> str:
    """Submit a script that lies in `<folder>/slurm/` and note the job's id there; returns the id."""
    job = slurm("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]
    with open(script.with_name("jobs"), "a") as file:
        file.write(job + "\n")
    return job


def slurm(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        L3DError: it is not there, fails, or does not answer; its own first line is in the message.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    except FileNotFoundError as error:
        raise L3DError(f"slurm: there is no command {command[0]} on this machine") from error
    except OSError as error:
        raise L3DError(f"slurm: {command[0]} cannot be run ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise L3DError(f"slurm: {shlex.join(command)}: no answer within {PATIENCE} s") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[0]
        raise L3DError(f"slurm: {shlex.join(command)}: {reason}") from error


# -- status, resume ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run that was submitted: where, as which job, how far."""

    folder: Path
    script: Path
    task: int | None  # of a sweep
    job: str  # the newest: "17", or "17_3"
    state: str  # as Slurm says; "" where it has forgotten

    @property
    def finished(self) -> bool:
        return (self.folder / "finished").is_file()

    @property
    def to_resume(self) -> bool:
        return not self.finished and self.state not in QUEUED

    def last_row(self) -> dict[str, str]:
        """The newest row of its `metrics.csv`, empty without any."""
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return {}
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
        return rows[-1] if rows else {}


def runs_of(folder: Path) -> list[Run]:
    """The runs that were submitted in a folder, or in any folder below it."""
    folder = folder.resolve()
    scripts = [path for name in ("train", "sweep") for path in folder.glob(f"**/slurm/{name}.sbatch")]
    jobs = {script: _lines(script.with_name("jobs")) for script in scripts}
    states = job_states(sorted({job for ids in jobs.values() for job in ids})) if any(jobs.values()) else {}
    runs = []
    for script in sorted(scripts):
        place = script.parent.parent
        tasks: list[int | None] = [None]
        if script.name == "sweep.sbatch":
            tasks = list(range(1, len(_lines(script.with_name("grid.txt"))) + 1))
        for task in tasks:
            suffix = "" if task is None else f"_{task}"
            # A task that was resumed is in a later array; an array that was resumed lacks the tasks that were done.
            known = [job + suffix for job in jobs[script] if job + suffix in states]
            job = known[-1] if known else "".join(jobs[script][-1:])
            runs.append(Run(place if task is None else place / str(task), script, task, job, states.get(job, "")))
    return runs


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """State of each job and array task: from the queue, and from the accounting where there is one."""
    states = {}
    with contextlib.suppress(L3DError):  # (many clusters have no accounting)
        for line in slurm("sacct", "-nXP", "-j", ",".join(jobs), "-o", "JobID,State").splitlines():
            job, state = line.split("|")
            states[job] = state.split()[0]
    for line in slurm("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines():
        job, state = line.split()
        if job.split("_")[0] in jobs:
            states[job] = state
    return states


def print_status(folder: Path) -> None:
    """`l3d slurm status`."""
    folder = folder.resolve()
    runs = runs_of(folder)
    if not runs:
        raise L3DError(f"slurm status: nothing was submitted in {folder} (there is no slurm/train.sbatch below it)")
    table = Table("run", "job", "state", "step", "loss", title=str(folder), title_justify="left")
    for run in runs:
        row = run.last_row()
        state = "finished" if run.finished else run.state or "not in the queue"
        name = str(run.folder.relative_to(folder)) if run.folder != folder else folder.name
        table.add_row(name, run.job, state, row.get("step", ""), f"{float(row['train/loss']):.4g}" if row else "")
    Console().print(table)
    left = sum(run.to_resume for run in runs)
    if left:
        print(f"{left} unfinished and not in the queue; go on with: l3d slurm resume {shlex.quote(str(folder))}")


def resume(folder: Path) -> list[str]:
    """Submit again what has not finished and is in no queue; returns the ids of the new jobs."""
    runs = [run for run in runs_of(folder) if run.to_resume]
    started = []
    for script in dict.fromkeys(run.script for run in runs):
        mine = [run for run in runs if run.script == script]
        for run in mine:
            (run.folder / "slurm" / "starts").unlink(missing_ok=True)  # they have RETRIES anew
        tasks = ",".join(str(run.task) for run in mine if run.task is not None)
        throttle = re.search(r"(?m)^#SBATCH --array=\S*(%\d+)$", script.read_text())
        started.append(start(script, *([f"--array={tasks}{throttle[1] if throttle else ''}"] if tasks else [])))
    return started


# -- collect -----------------------------------------------------------------------------------------------------------


def collect(folder: Path) -> Path:
    """A table of the runs in a folder, `<folder>/sweep.csv`, and its plot, `sweep.png`; returns the table's path.

    A row per run: the settings in which the runs differ, whether it has finished, and the figures of its decomposition
    and its score. Of a line of the grid whose run has never started there is only its number.

    Raises:
        L3DError: there is no run.
    """
    places = sorted({path.parent for path in folder.glob("*/config.yaml")} - {folder / "slurm"}, key=_natural)
    if not places:
        raise L3DError(f"slurm collect: {folder} holds no run (no */config.yaml); they are written when a fit starts")
    settings = [flat(yaml.safe_load((place / "config.yaml").read_text())) for place in places]
    names = sorted({name for values in settings for name in values} - {"trainer.default_root_dir", "ckpt_path"})
    varied = [name for name in names if len({str(values.get(name)) for values in settings}) > 1]
    rows = []
    for place, values in zip(places, settings, strict=True):
        row: dict[str, Any] = {"run": place.name} | {name: values.get(name) for name in varied}
        row["finished"] = (place / "finished").is_file()
        for results in (place / "decomposition" / "config.json", place / "score.json"):
            if row["finished"] and results.is_file():
                row |= json.loads(results.read_text())["figures"]
        rows.append(row)
    grid = folder / "slurm" / "grid.txt"
    tasks = [str(task) for task in range(1, len(read_grid(grid)) + 1)] if grid.is_file() else []
    rows += [{"run": task, "finished": False} for task in tasks if not (folder / task / "config.yaml").is_file()]
    rows.sort(key=lambda row: _natural(Path(row["run"])))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "sweep.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, varied or ["run"], folder / "sweep.png")
    return folder / "sweep.csv"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names on the command line: `{"model.k": 0.1}`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def _natural(path: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name) if part]


def _plot(rows: Sequence[Mapping[str, Any]], varied: Sequence[str], path: Path) -> None:
    """Held-out loss over each setting that was varied."""
    from matplotlib.figure import Figure

    done = [row for row in rows if row.get("val/loss") is not None]
    figure = Figure(figsize=(4 * len(varied), 3), layout="constrained")
    for place, name in enumerate(varied, 1):
        axes = figure.add_subplot(1, len(varied), place, xlabel=name, ylabel="held-out loss" if place == 1 else "")
        values: list[Any] = [row[name] for row in done]
        if not all(isinstance(value, (int, float)) for value in values):
            kinds = list(dict.fromkeys(map(str, values)))
            axes.set_xticks(range(len(kinds)), [kind[:16] for kind in kinds])
            values = [kinds.index(str(value)) for value in values]
        axes.plot(values, [row["val/loss"] for row in done], "o")
    figure.savefig(path, dpi=120)
