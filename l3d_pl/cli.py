"""`l3d`: the command line.

    l3d fit|validate|test --config CONFIG [--model.k 0.2 ...]   LightningCLI on the L3D module
    l3d params --config CONFIG [--model.ranks 0.2 ...]          what a fit would decompose: sizes, ranks, memory, paths
    l3d plan --config CONFIG --nodes 8 --gpus 8 --memory 80     what a run takes on a cluster, strategy by strategy
    l3d target --config CONFIG [--output FILE]                  train a target model
    l3d score DIR                                               ground-truth table of a finished toy run
    l3d report DIR                                              the atlas again, without analysing
    l3d export CHECKPOINT DIR                                   a checkpoint's decomposition; --checkpoint: as one file
    l3d atlas DIR [--output DIR]                                pages to read in a browser; analyses first if need be
    l3d figures DIR [--sweeps]                                  the paper's figures of a toy run, also in its atlas
    l3d analyze DIR                                             what each subnetwork does, as tables: DIR/analysis
    l3d intervene DIR --subnetwork 3 --delta -1 1               push subnetworks and see what changes
    l3d compare DIR_A DIR_B                                     match the subnetworks of two runs
    l3d slurm submit|status|resume|collect DIR                  runs as jobs of a cluster
    l3d experiment NAME [--seeds 0 1 2 3 4] [--steps 400 ...]   a question that the paper leaves open (docs/experiments)
    l3d demo | l3d toys                                         what `make run` and `make toys` run

CONFIG is a YAML file, or the name of a shipped one (`tms`, `configs/tms.yaml`). Bad input ends with one line and exit
code 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from l3d_pl.configs_path import shipped_configs
from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.version import __version__

LIGHTNING_COMMANDS = ("fit", "validate", "test")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0, or 2 after one line about bad input)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module, beside the config that names it
    commands: dict[str, Callable[[list[str]], None]] = dict.fromkeys(LIGHTNING_COMMANDS, lightning_command)
    commands |= {
        "params": params_command,
        "plan": plan_command,
        "target": target_command,
        "score": score_command,
        "report": report_command,
        "export": export_command,
        "analyze": analyze_command,
        "atlas": atlas_command,
        "figures": figures_command,
        "intervene": intervene_command,
        "compare": compare_command,
        "slurm": slurm_command,
        "experiment": experiment_command,
        "demo": demo_command,
        "toys": toys_command,
    }
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    try:
        if args[0] not in commands:
            raise L3DError(
                f"command: found {args[0]!r}, allowed are {', '.join(commands)}{did_you_mean(args[0], commands)}"
            )
        quiet()
        commands[args[0]](args if args[0] in LIGHTNING_COMMANDS else args[1:])
    except KeyboardInterrupt as stop:
        print(f"l3d: {stop if str(stop) else 'stopped'}", file=sys.stderr, flush=True)
        return 130
    except L3DError as error:  # (most of them, and those of `l3d slurm` without Lightning's seconds)
        return refuse(error)
    except Exception as error:
        from lightning.pytorch.utilities import rank_zero_only

        from l3d_pl.callbacks import Stopped

        if isinstance(error, Stopped):
            rank_zero_only(print)(f"l3d: {error}", flush=True)
            return 0
        bad_input = bad_input_in(error)
        if bad_input is None and (trouble := trouble_in(error)):
            print(f"l3d: error: {one_line(trouble)}", file=sys.stderr, flush=True)
            return 1  # (the same command may succeed)
        if bad_input is None:
            raise
        return refuse(bad_input)
    return 0


def refuse(bad_input: Exception) -> int:
    """One line about bad input; returns the exit code."""
    print(f"l3d: error: {one_line(str(bad_input))}", file=sys.stderr, flush=True)
    if file := os.environ.get("L3D_BAD_INPUT"):  # of several tasks' exit codes slurm/run.sh is told the highest
        Path(file).touch()
    return 2


def bad_input_in(error: BaseException | None) -> Exception | None:
    """The bad input behind an error, if that is what it is about.

    That is an `L3DError`, Lightning's `MisconfigurationException`, or a ValueError of one of our data modules.
    jsonargparse wraps what a constructor raises, so the chain of causes is searched.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    while error is not None:
        if isinstance(error, (L3DError, MisconfigurationException)):
            return error
        if isinstance(error, ValueError) and error.__traceback__ is not None:
            last = list(traceback.walk_tb(error.__traceback__))[-1][0]
            if str(last.f_globals.get("__name__", "")).startswith("datamodules"):
                return error
        error = error.__cause__ or error.__context__
    return None


def trouble_in(error: BaseException) -> str | None:
    """What has ended a command that nobody's input and no code is to blame for: a full disk, a lost rank."""
    full = re.search("No space left on device|Disk quota exceeded", str(error))  # (by whatever library)
    if full and isinstance(error, Exception):
        return f"the disk is full ({str(error).splitlines()[0]})"
    lost = re.search("(?i)connection (reset|closed|refused)|broken pipe|remote process exited", str(error))
    if (
        isinstance(error, RuntimeError)
        and lost
        and int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1))) > 1
    ):
        return f"another rank was lost ({lost[0]})"
    return None


def one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message).strip()


def quiet() -> None:
    """Keep Lightning's advertisements and notices about its own internals out of the way of what matters."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "lightning.fabric.utilities.seed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*Experiment logs directory.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*It is recommended to use .*sync_dist=True.*")  # all ranks' already
    warnings.filterwarnings("ignore", message=".*is a wandb run already.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a login node has it too
    warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")  # a job's first start
    warnings.filterwarnings("ignore", message=".*Total length of .* across ranks is zero.*")  # `L3D` raises
    for module in ("jsonargparse", "lightning", "torchdata", "torch.utils._pytree", "torch.jit"):
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=rf"{module}.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{module}.*")


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replace the names of shipped configs after `--config` by their paths.

    Raises:
        L3DError: neither a file nor a shipped config, with near matches.
    """
    result, expect = [], False
    for arg in args:
        if expect:
            arg, expect = find_config(arg), False
        elif arg in ("--config", "-c"):
            expect = True
        elif arg.startswith("--config="):
            arg = "--config=" + find_config(arg.removeprefix("--config="))
        result.append(arg)
    return result


def find_config(name: str) -> str:
    """Path of a config file: itself, or the shipped config of that name."""
    if Path(name).is_file():
        require_yaml(name)
        return name
    folder = shipped_configs()
    relative = name.removeprefix("configs/").removesuffix(".yaml")
    if (folder / f"{relative}.yaml").is_file():
        return str(folder / f"{relative}.yaml")
    shipped = [str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.rglob("*.yaml"))]
    hint = did_you_mean(relative, shipped) or f"; shipped are {', '.join(shipped)}"
    raise L3DError(f"config: there is no file {name}, and no shipped config of that name{hint}")


def require_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping from a file, or an `L3DError` that names the file and the line."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise L3DError(f"config: {path} is no YAML{place}: {problem}") from error
    if not isinstance(content, dict):
        raise L3DError(f"config: {path} holds {type(content).__name__}, allowed is a mapping such as 'model: ...'")
    return content


# -- fit, validate, test -----------------------------------------------------------------------------------------------


def lightning_command(args: list[str]) -> None:
    run(args)


def run(args: Sequence[str]) -> Any:
    """One of Lightning's commands with its arguments; returns the `LightningCLI` object when it is done."""
    import torch

    from l3d_pl.lightning_cli import L3DCLI

    torch.set_float32_matmul_precision("highest")
    if args[0] == "fit":  # (steps are logged across epochs, so a short one loses nothing)
        warnings.filterwarnings("ignore", message=".*training batches .* smaller than the logging interval.*")
    return L3DCLI(resolve_configs(args))


def params_command(args: list[str]) -> None:
    from l3d_pl.lightning_cli import ParamsCLI

    ParamsCLI(resolve_configs(args))


def plan_command(args: list[str]) -> None:
    from l3d_pl.lightning_cli import PlanCLI

    PlanCLI(resolve_configs(args))


def target_command(args: list[str]) -> None:
    from l3d_pl.lightning_cli import train_target

    parser = OneLineParser(prog="l3d target", add_help=False)
    parser.add_argument("--output", default=None)
    known, rest = parser.parse_known_args(args)
    print_target(train_target(resolve_configs(rest), known.output))


def print_target(figures: dict[str, Any]) -> None:
    rounded = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float))
    print(f"target {figures['file']}: {rounded}", flush=True)


# -- reading runs ------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise L3DError(f"{self.prog}: {message}")


def score_command(args: list[str]) -> None:
    from l3d_pl.report import print_score

    parser = OneLineParser(prog="l3d score", description="Ground-truth table of a finished toy run.")
    parser.add_argument("dir", help="a run's directory, such as runs/tms")
    print_score(Path(parser.parse_args(args).dir))


def report_command(args: list[str]) -> None:
    from l3d_pl.report import write_report

    parser = OneLineParser(prog="l3d report", description="The atlas of a finished run, with what has been analysed.")
    parser.add_argument("dir", help="a run's directory, such as runs/tms")
    print(write_report(Path(parser.parse_args(args).dir)))


def atlas_command(args: list[str]) -> None:
    from l3d_pl.analysis.runs import load_run
    from l3d_pl.atlas.build import analysis_of, require_ours, write_atlas

    parser = OneLineParser(prog="l3d atlas", description="A folder of static files that show a run (docs/atlas.md).")
    parser.add_argument("dir", type=Path, help="a run's directory; it is analysed first where that is not done")
    parser.add_argument("--output", type=Path, default=None, help="where the atlas goes (default: DIR/atlas)")
    known = parser.parse_args(args)
    require_ours(known.output or known.dir / "atlas")  # before the analysis, which takes long
    if analysis_of(known.dir, load_run(known.dir)) is None:
        analyze_command([str(known.dir)])
    atlas = write_atlas(known.dir, known.output)
    print(f"{atlas.page} ({atlas.files} files, {atlas.size / 1e6:.1f} MB)", flush=True)


def figures_command(args: list[str]) -> None:
    from rich.progress import track

    from l3d_pl.atlas.build import write_atlas
    from l3d_pl.figures.make import make_figures, sweep

    parser = OneLineParser(prog="l3d figures", description="The paper's figures of a finished toy run: DIR/figures.")
    parser.add_argument("dir", type=Path, help="a toy run's directory, such as runs/tms")
    parser.add_argument(
        "--sweeps", action="store_true", help="also loss against rank and n_v; fits that are there stay"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=None, help="of the sweep (default: 1 to 6)")
    parser.add_argument("--n_v", type=int, nargs="+", default=None, help="(default: 0.6, 1, 2, 3 times the run's own)")
    parser.add_argument("--max-epochs", type=int, default=None, help="of the sweep's fits (default: the run's own)")
    known = parser.parse_args(args)
    if known.sweeps:
        sweep(known.dir, known.ranks, known.n_v, known.max_epochs)
    elif known.ranks or known.n_v or known.max_epochs:
        raise L3DError("l3d figures: --ranks, --n_v and --max-epochs are for --sweeps, which is missing")
    for made in make_figures(known.dir, lambda names: track(names, "figures", transient=True)):
        print(made if isinstance(made, str) else f"{made.path}: {made.caption}")
    print(write_atlas(known.dir, progress=False).page, flush=True)


def export_command(args: list[str]) -> None:
    from l3d_pl.export import export_checkpoint, export_decomposition

    parser = OneLineParser(prog="l3d export", description="The decomposition that a checkpoint holds.")
    parser.add_argument("source", help="a checkpoint, such as runs/mine/checkpoints/last.ckpt")
    parser.add_argument("destination", help="the directory that is made")
    parser.add_argument("--checkpoint", action="store_true", help="make one file to resume from, under any strategy")
    known = parser.parse_args(args)
    export = export_checkpoint if known.checkpoint else export_decomposition
    print(export(Path(known.source), Path(known.destination)))


def analyze_command(args: list[str]) -> None:
    parser = OneLineParser(prog="l3d analyze", description="Tables of a finished run's subnetworks (docs/analysis.md).")
    parser.add_argument("dir", type=Path, help="a run's directory, such as runs/tms")
    parser.add_argument("--samples", type=int, default=None, help="only the first so many entries (images, sequences)")
    parser.add_argument("--references", type=int, default=8, help="references that each sample is compared with")
    parser.add_argument("--split", default="val", help="val, train or test")
    parser.add_argument("--batch-size", type=int, default=64, help="entries at a time")
    parser.add_argument("--top", type=int, default=16, help="top samples kept, and pushed, for each subnetwork")
    parser.add_argument("--random", type=int, default=64, help="random samples that interventions are measured on, too")
    parser.add_argument("--controls", type=int, default=4, help="random directions beside each intervention")
    parser.add_argument("--attribution", type=int, default=3, help="top samples whose inputs are attributed; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of references and of random samples")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    known = parser.parse_args(args)
    from rich.console import Console

    from l3d_pl.analysis.analyse import analyse
    from l3d_pl.analysis.intervene import summary_of
    from l3d_pl.analysis.runs import open_run, several_processes
    from l3d_pl.analysis.survey import Settings

    try:
        with several_processes(known.device) as (ranks, device):
            run = open_run(known.dir, device)
            skip_bad = run.decomposition.run_config["model"].get("bad_samples") == "skip"  # type: ignore[index]
            settings = Settings(
                *(known.references, known.batch_size, known.top),
                background=known.random,
                controls=known.controls,
                seed=known.seed,
                skip_bad=skip_bad,
            )
            folder = analyse(run, settings, known.split, known.samples, known.attribution, ranks)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; what was done is kept in {known.dir / 'analysis'}, and the same command goes on from there"
        ) from None
    if ranks.rank == 0:
        Console(soft_wrap=True).print(summary_of(folder))
        print(folder)


def intervene_command(args: list[str]) -> None:
    parser = OneLineParser(prog="l3d intervene", description="f(x, W0 + sum of delta v_k) on a run's samples.")
    parser.add_argument("dir", type=Path, help="a run's directory, after `l3d analyze`")
    parser.add_argument("--subnetwork", type=int, action="append", required=True, help="k of v_k; may be given again")
    parser.add_argument("--delta", type=float, nargs="+", default=None, help="steps (default: those of the analysis)")
    parser.add_argument("--parameters", nargs="+", default=None, help="move only these tensors (globs)")
    parser.add_argument("--grid", action="store_true", help="every combination of steps of several subnetworks")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    known = parser.parse_args(args)
    from l3d_pl.analysis.intervene import intervene_run
    from l3d_pl.analysis.runs import open_run

    run = open_run(known.dir, known.device)
    intervene_run(run, known.subnetwork, known.delta, known.parameters, known.grid)


def compare_command(args: list[str]) -> None:
    parser = OneLineParser(prog="l3d compare", description="Match the subnetworks of two runs by |cos|.")
    parser.add_argument("dir_a", type=Path, help="a run's directory; the table and the picture go there")
    parser.add_argument("dir_b", type=Path, help="another's")
    known = parser.parse_args(args)
    from l3d_pl.analysis.stability import compare_runs

    print(compare_runs(known.dir_a, known.dir_b))


def slurm_command(args: list[str]) -> None:
    from l3d_pl import slurm

    parser = OneLineParser(
        prog="l3d slurm", description="Runs as jobs of a cluster (docs/recipes.md).", allow_abbrev=False
    )
    parser.add_argument("action", choices=["submit", "status", "resume", "collect"])
    parser.add_argument("dir", type=Path, help="directory of a run, of a sweep, or of several of them")
    submit = parser.add_argument_group(
        "submit", "further options go to sbatch, and what follows -- to l3d fit: --nodes 2 -- --config mine.yaml"
    )
    submit.add_argument("--profile", default="cpu", help="options of sbatch to begin with: cpu or gpu")
    submit.add_argument("--grid", type=Path, default=None, help="file with a line of arguments for each run")
    submit.add_argument("--at-once", type=int, default=4, help="runs of a grid side by side")
    submit.add_argument("--dry-run", action="store_true", help="write the scripts, submit nothing")
    end = args.index("--") if "--" in args else len(args)
    known, sbatch_options = parser.parse_known_args(args[:end])
    if known.action != "submit" and (sbatch_options or args[end:]):
        raise L3DError(
            f"l3d slurm {known.action}: found {' '.join(sbatch_options + args[end:])}, allowed is a directory"
        )
    if known.action == "submit":
        job = slurm.submit(
            known.dir, args[end + 1 :], sbatch_options, known.profile, known.grid, known.at_once, known.dry_run
        )
        print(f"{known.dir / 'slurm'} is written" + (f", submitted as job {job}" if job else ""))
    elif known.action == "status":
        slurm.print_status(known.dir)
    elif known.action == "resume":
        jobs = slurm.resume(known.dir)
        print(f"submitted again as {', '.join(jobs)}" if jobs else "nothing to resume")
    else:
        print(slurm.collect(known.dir))


def experiment_command(args: list[str]) -> None:
    from l3d_pl.experiments import EXPERIMENTS
    from l3d_pl.experiments.common import SEEDS, load_experiment, parse_settings, run_experiment, settings_help

    named = next((word for word in args if word in EXPERIMENTS), None) if {"-h", "--help"} & set(args) else None
    parser = OneLineParser(
        prog="l3d experiment",
        description="A question that the paper leaves open (docs/experiments). Other options are the experiment's own\n"
        "settings, such as --steps 400; `l3d experiment NAME --help` lists them.",
        epilog=settings_help(named) if named else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", help=", ".join(EXPERIMENTS))
    parser.add_argument("--config", type=Path, default=None, help="YAML file with settings")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="those that are finished are kept")
    which.add_argument("--seed", type=int, default=None, help="one only, as a task of a Slurm array")
    parser.add_argument("--output", type=Path, default=None, help="results (default: runs/experiments/NAME)")
    parser.add_argument("--tiny", action="store_true", help="settings that take seconds, and show only that it runs")
    known, overrides = parser.parse_known_args(args)
    settings = parse_settings(load_experiment(known.name), known.config, overrides, known.tiny)
    seeds = known.seeds if known.seed is None else [known.seed]
    run_experiment(known.name, settings, known.output, seeds, ["l3d", "experiment", *args])


# What `l3d demo` runs, one after the other, and what makes it short there: about five minutes in all on two cores.
DEMO: dict[str, list[str]] = {
    "tms": [],
    "digits_cnn": ["--trainer.max_epochs", "20"],
    "pydoc_lm": ["--model.n_subnetworks", "50", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "100"],
}


def demo_command(args: list[str]) -> None:
    """A toy, a convolutional network and a language model from nothing: targets, decompositions, tables, atlases."""
    from l3d_pl.report import print_summary

    parser = OneLineParser(prog="l3d demo", description=f"Short decompositions of {', '.join(DEMO)}.")
    parser.add_argument("--root", default="runs", help="where the runs go")
    root = Path(parser.parse_args(args).root)
    finished = []
    for name, short in DEMO.items():
        os.environ["L3D_QUIET_SUMMARY"] = "1"
        fit = run(["fit", "--config", name, *short, "--trainer.default_root_dir", str(root / name)])
        finished.append((root / name, fit.seconds))
    os.environ.pop("L3D_QUIET_SUMMARY", None)
    for folder, _ in finished:
        atlas_command([str(folder)])
    for folder, seconds in finished:
        print_summary(folder, seconds)


def toys_command(args: list[str]) -> None:
    from l3d_pl.toys import run_toys

    parser = OneLineParser(prog="l3d toys", description="All toys, many seeds, both recipes, against the ground truth.")
    parser.add_argument("--toys", nargs="+", default=None, help="names of shipped toy configs (default: all)")
    parser.add_argument("--recipes", nargs="+", default=["l3d_pl", "paper"])
    parser.add_argument("--seeds", type=int, default=16, help="decomposition seeds of each toy")
    parser.add_argument(
        "--targets", nargs="+", default=None, help="target seeds, or safetensors files (default: 42 and 1)"
    )
    parser.add_argument("--root", default="runs/toys", help="where tables and runs go")
    known = parser.parse_args(args)
    run_toys(known.toys, known.recipes, known.seeds, known.targets, Path(known.root))


if __name__ == "__main__":
    sys.exit(main())
