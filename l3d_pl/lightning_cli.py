"""LightningCLI for `L3D` and for target models: config, defaults and what happens around a run."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, instantiate_class
from lightning.pytorch.plugins.precision import DoublePrecision

from l3d_pl.callbacks import (
    Checkpoints,
    ContinueLogs,
    ExportDecomposition,
    RandomState,
    RunLogger,
    StopOnSignal,
    Stopped,
    say,
)
from l3d_pl.checkpoints import AtomicCheckpointIO
from l3d_pl.decomposition import WEIGHTS
from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.lightning_module import L3D, START_LATER
from l3d_pl.strategies import check_strategy
from l3d_pl.strategies.fsdp2 import FSDP2Strategy, check_precision

ATLAS_BYTES = 2**33  # a larger decomposition's atlas is drawn on demand only: all of V_out is read for it


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, with near matches for misspelt keys, never taken for abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = brief(message)
        if "did you mean" not in message:  # the parser of a nested class has said so already
            options = {
                option.lstrip("-")
                for parser in self._all_parsers()
                for action in parser._actions
                for option in action.option_strings
            }
            unknown = re.search(r"(?:option|arguments:|key) '?(?:--)?([\w.]+)'?", message, re.IGNORECASE)
            message += did_you_mean(unknown[1], sorted(options)) if unknown and unknown[1] not in options else ""
        raise L3DError(message)

    def _all_parsers(self) -> list[Any]:
        action = getattr(self, "_subcommands_action", None)
        return [self, *(action._name_parser_map.values() if action is not None else ())]


def brief(message: str) -> str:
    """jsonargparse's account of an error as one line, `key: what is wrong`, without the list of all that it tried."""
    message = message.strip()
    if at_key := re.fullmatch(r'Parser key "([^"]+)"[^:]*:\s*(.*)', message, re.DOTALL):
        inner = brief(at_key[2])
        return f"{at_key[1]}.{inner}" if re.match(r"[\w.]+: ", inner) else f"{at_key[1]}: {inner}"
    union = re.fullmatch(
        r"Does not validate .*?Subtypes: \[(.*?)\]\s+Errors:\n( *)(.*)\n\s*Given value type:.*?Given value: (.*)",
        message,
        re.DOTALL,
    )
    if union:
        reasons = [
            reason
            for reason in re.split(rf"^{union[2]}- ", union[2] + union[3], flags=re.MULTILINE)[1:]
            if not reason.startswith("Expected a ")
        ]
        return brief(reasons[0]) if reasons else _found(union[4], union[1])
    if expected := re.fullmatch(r"Expected a (.*)\. Got value: (.*)", message, re.DOTALL):
        return _found(expected[2], expected[1])
    message = re.sub(
        r"the following arguments are required: (?:fit\.|validate\.|test\.)?", "required and not given: ", message
    )
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        message += did_you_mean(missing[2], vars(sys.modules.get(missing[1], object)))
    return re.sub(r"\s+", " ", message).strip()


def _found(value: str, types: str) -> str:
    names = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types).replace("NoneType", "null")
    names = re.sub(r"typing\.Literal\[([^]]*)\]", r"\1", names)
    return re.sub(r"\s+", " ", f"found {value!r}, allowed: {names}") + did_you_mean(
        value, re.findall(r"'([^']+)'", names)
    )


class SaveRunConfig(SaveConfigCallback):
    """`<default_root_dir>/config.yaml`: the whole configuration, to run or resume this run again."""

    def __init__(self, parser: Any, config: Any, **kwargs: Any):
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            path = Path(trainer.default_root_dir, "config.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(".config.yaml.writing")
            aside.write_text(self.parser.dump(self.config, skip_unset=False))
            os.replace(aside, path)


class FirstStep(Callback):
    """Remembers how many steps there were when this part of a run began: 0, or those of the checkpoint."""

    step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step


def require_writable(key: str, folder: Path) -> None:
    """Make a folder, before anything is trained that could not be saved there.

    Args:
        key: the setting that names it.

    Raises:
        L3DError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise L3DError(f"{key}: {folder} cannot be written to ({error.strerror})") from error


def add_threads_argument(parser: LightningArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads of torch (small models are fastest with 1)"
    )


def set_threads(threads: int | None) -> None:
    """More threads than free cores make a tiny operation wait for milliseconds, so small models ask for one."""
    if threads is not None:
        torch.set_num_threads(threads)


def missing_target(model: Any) -> str | None:
    """The file or directory that a model's config takes its target's weights from, where it is not there.

    That is `target_weights`, or else the `pretrained` of its target.
    """
    place = model.target_weights or (getattr(model.target, "init_args", None) or {}).get("pretrained")
    return place if isinstance(place, str) and not Path(place).exists() else None


class L3DCLI(LightningCLI):
    """`l3d fit|validate|test`."""

    def __init__(self, args: Sequence[str]):
        super().__init__(
            L3D,
            args=list(args),
            parser_class=Parser,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "default_root_dir": "runs/run",
                "devices": 1,
                "inference_mode": False,  # validation takes gradients too
                "use_distributed_sampler": False,  # the data modules shard their own order, and can take it up again
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "callbacks": [RandomState(), ContinueLogs(), ExportDecomposition(), StopOnSignal()],
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate", "test")
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        add_threads_argument(parser)

    def _parse_ckpt_path(self) -> None:
        """Lightning looks for hyperparameters in the checkpoint here: ours hold none; damage is told of later."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        set_threads(config.threads)
        if self.subcommand == "fit":
            require_writable("trainer.default_root_dir", Path(config.trainer.default_root_dir))
        missing, recipe = missing_target(config.model), config.model.target_config
        if missing and recipe:
            if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
                raise L3DError(
                    f"target: there is no {missing}, and a job of several tasks trains none; "
                    f"make it first: l3d target --config {recipe} --output {missing}"
                )
            from l3d_pl.cli import find_config, print_target

            print(f"target {missing} is not there: training it with {recipe}", flush=True)
            print_target(train_target(["--config", find_config(recipe)], missing))
            self._set_seed()  # the target's training has set its own

    def instantiate_classes(self) -> None:
        """Where V is to be sharded no process makes all of it: each its own part, when they know each other."""
        strategy = self.config[self.subcommand].trainer.strategy
        name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
        token = START_LATER.set(name == "fsdp2" or name.endswith("FSDP2Strategy"))
        try:
            super().instantiate_classes()
        finally:
            START_LATER.reset(token)
        # Of Lightning's type `str | Path` typing's cache may make `Path | str`: "last" would then be a file.
        if path := self.config_init[self.subcommand].get("ckpt_path"):
            self.config_init[self.subcommand].ckpt_path = str(path)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config_init[self.subcommand]["trainer"]
        if config["logger"] in (None, True):  # (validate and test print their figures, and leave the run's file alone)
            kwargs["logger"] = RunLogger(config["default_root_dir"]) if self.subcommand == "fit" else False
        check_strategy(config["strategy"])
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if config["strategy"] == "fsdp2" or isinstance(config["strategy"], FSDP2Strategy):
            check_precision(config["precision"])
            if str(config["precision"]) in ("64", "64-true"):  # Lightning takes it by the strategy's name only
                kwargs["precision"], plugins = None, [*plugins, DoublePrecision()]
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO(), *slurm_plugins()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise L3DError(f"trainer: {error}") from error

    def after_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        settings = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False))
        self.model.run_config = settings | {"started_in": os.getcwd()}  # what its relative paths are relative to

    def fit(self, model: L3D, **kwargs: Any) -> None:
        """`Trainer.fit`, with the line that says how a stopped run goes on."""
        start, finished = time.perf_counter(), Path(self.trainer.default_root_dir, "finished")
        self.trainer.callbacks.append(first := FirstStep())  # type: ignore[attr-defined]
        if self.trainer.is_global_zero:
            finished.unlink(missing_ok=True)
        try:
            self.trainer.fit(model, **kwargs)
        except Stopped as stopped:
            config = Path(self.trainer.default_root_dir, "config.yaml")
            raise Stopped(
                f"{stopped}; go on with: l3d fit --config {shlex.quote(str(config))} --ckpt_path last"
            ) from None
        self.seconds, self.resumed_at = time.perf_counter() - start, first.step
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            from l3d_pl.report import print_summary, write_report

            # An earlier fit's score must not pass for this one's, which may not get one.
            Path(self.trainer.default_root_dir, "score.json").unlink(missing_ok=True)
            weights = Path(self.trainer.default_root_dir, "decomposition", WEIGHTS)
            if (size := weights.stat().st_size if weights.is_file() else 0) <= ATLAS_BYTES:
                write_report(Path(self.trainer.default_root_dir))
            else:
                say(f"no atlas is drawn of a decomposition of {size / 2**30:.1f} GiB; l3d atlas does so")
            finished.touch()  # after this, slurm/run.sh does not start the run again
            if not os.environ.get("L3D_QUIET_SUMMARY"):
                print_summary(Path(self.trainer.default_root_dir), self.seconds, self.resumed_at)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit":
            super()._run_subcommand(subcommand)
            return
        kwargs = self._prepare_subcommand_kwargs(subcommand)
        self.fit(**kwargs)


def slurm_plugins() -> list[SLURMEnvironment]:
    """In a job of Slurm: nothing is saved or requeued inside Lightning's signal handler; the batch script requeues."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


class ParamsCLI(L3DCLI):
    """`l3d params`: the arguments of `l3d fit` for a table instead of a fit; nothing is trained, nothing written."""

    def __init__(self, args: Sequence[str]):
        self.notes: list[str] = []
        super().__init__(["fit", *args])

    def before_instantiate_classes(self) -> None:
        """A target that is still to be trained is looked at with random weights."""
        config = self.config["fit"]
        set_threads(config.threads)
        missing, recipe = missing_target(config.model), config.model.target_config
        if missing and recipe:
            from l3d_pl.cli import find_config

            untrained = yaml.safe_load(Path(find_config(recipe)).read_text())["model"]["model"]
            config.model.target = instantiate_class((), {"init_args": {}, **untrained})
            config.model.target_weights = None
            self.notes = [f"target {missing} is not there yet: this is an untrained one of {recipe}"]
        data = getattr(config.data, "init_args", None) or {}
        if data.get("max_rows", 0) != 0 and not data.get("streaming"):  # of what would be stored, enough for a batch
            data["max_rows"], data["n_val"] = min(8 * data["batch_size"], data["max_rows"] or sys.maxsize), 1

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """There is nothing to run, so no logger is opened either."""

    def after_instantiate_classes(self) -> None:
        """No run, no configuration to keep with it."""

    def _run_subcommand(self, subcommand: str) -> None:
        from l3d_pl.params import first_batch, print_params

        data = self.config["fit"].data
        batch, notes = None, ["no data are given: paths are left open"]
        if self.datamodule is not None:
            batch, notes = first_batch(self.model, self.datamodule, vars(data.init_args))
        print_params(self.model, batch, self.notes + notes)


class CheckCLI(ParamsCLI):
    """What `l3d fit` would make of its arguments, target and V as shapes alone; wrong ones raise, nothing runs."""

    def before_instantiate_classes(self) -> None:
        from l3d_pl.plan.shapes import untrained_on_meta

        config = self.config["fit"]
        target, recipe = config.model.target, config.model.target_config
        if missing_target(config.model) and recipe:
            from l3d_pl.cli import find_config

            target = yaml.safe_load(Path(find_config(recipe)).read_text())["model"]["model"]
        config.model.target, config.model.target_weights = untrained_on_meta(target), None

    def instantiate_classes(self) -> None:
        """V is not made at all: who needs it asks for its shapes."""
        token = START_LATER.set(True)
        try:
            super(L3DCLI, self).instantiate_classes()
        finally:
            START_LATER.reset(token)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # type: ignore[override]
        """On this machine, which may have less than the one that the fit is for."""
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
        return super(ParamsCLI, self).instantiate_trainer(**here, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if self.datamodule is None:
            raise L3DError("data: found none; allowed is a LightningDataModule such as datamodules.text.TextData")
        with torch.device("meta"):
            self.model._make_subnetworks()


class PlanCLI(CheckCLI):
    """`l3d plan`: the same arguments for a plan."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--nodes", type=int, default=1, help="machines")
        parser.add_argument("--gpus", type=int, default=1, help="GPUs of each machine")
        parser.add_argument("--memory", type=float | None, default=None, help="GB (1e9 bytes) of each GPU")
        parser.add_argument(
            "--flops-per-second", type=float | None, default=None, help="what a GPU computes, in TFLOP/s (float32)"
        )
        parser.add_argument("--step-seconds", type=float | None, default=None, help="of a step, as measured")
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def before_instantiate_classes(self) -> None:
        from l3d_pl.plan.strategies import World

        config = self.config["fit"]
        self.world = World(config.nodes, config.gpus, config.memory, config.trainer.accelerator != "cpu")
        super().before_instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        from l3d_pl.plan.report import run_plan

        if self.datamodule is None:
            raise L3DError("data: found none; a plan needs the size of a batch")
        run_plan(self.model, self.datamodule, self.config["fit"], self.world)


class TargetCLI(LightningCLI):
    """`l3d target`: a LightningCLI on `TargetTraining`, without subcommands."""

    def __init__(self, args: Sequence[str]):
        from l3d_pl.targets.training import TargetTraining

        super().__init__(
            TargetTraining,
            args=list(args),
            run=False,
            parser_class=Parser,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "logger": False,
                "enable_checkpointing": False,
                "devices": 1,
                "enable_model_summary": False,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_threads_argument(parser)

    def before_instantiate_classes(self) -> None:
        set_threads(self.config.threads)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        return super().instantiate_trainer(**kwargs, plugins=slurm_plugins())


def train_target(args: Sequence[str], output: str | None = None) -> dict[str, Any]:
    """Train a target from its config and save it; returns its figures, with `file`."""
    from l3d_pl.targets.training import fit_target

    cli = TargetCLI(args)
    require_writable("output", Path(output or "runs/targets/any").parent)
    return fit_target(cli.model, cli.datamodule, cli.trainer, output, seed=int(cli.config["seed_everything"] or 0))
