"""LightningCLI for `L3D` and for target models: config, defaults and what happens around a run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from l3d_pl.callbacks import AtomicCheckpointIO, Checkpoints, ContinueLogs, ExportDecomposition, RandomState, RunLogger, Stopped, StopOnSignal
from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.lightning_module import L3D


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, with near matches for misspelt keys, which are never taken for abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        options = {option.lstrip("-") for parser in self._all_parsers() for action in parser._actions for option in action.option_strings}
        unknown = re.search(r"(?:option|arguments:|[Kk]ey|Nested key) '?(?:--)?([\w.]+)'?", message)
        hint = did_you_mean(unknown.group(1), sorted(options)) if unknown and unknown.group(1) not in options else ""
        raise L3DError(re.sub(r"\s+", " ", message).strip() + hint)

    def _all_parsers(self) -> list[Any]:
        action = getattr(self, "_subcommands_action", None)
        return [self, *(action._name_parser_map.values() if action is not None else ())]


class SaveRunConfig(SaveConfigCallback):
    """`<default_root_dir>/config.yaml`: the whole configuration, to run or resume this run again."""

    def __init__(self, parser: Any, config: Any, **kwargs: Any):
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            path = Path(trainer.default_root_dir, "config.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(".config.yaml.writing")
            aside.write_text(self.parser.dump(self.config, skip_none=False))
            os.replace(aside, path)


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
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        weights, recipe = config.model.target_weights, config.model.target_config
        if weights and recipe and not Path(weights).is_file():
            from l3d_pl.cli import find_config, print_target

            print(f"target {weights} is not there: training it with {recipe}", flush=True)
            print_target(train_target(["--config", find_config(recipe)], weights))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config_init[self.subcommand]["trainer"]
        if config["logger"] in (None, True):
            kwargs["logger"] = RunLogger(config["default_root_dir"])
        plugins = config["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.model.run_config = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))

    def fit(self, model: L3D, **kwargs: Any) -> None:
        """`Trainer.fit`, with the line that says how a stopped run goes on."""
        start = time.perf_counter()
        try:
            self.trainer.fit(model, **kwargs)
        except Stopped as stopped:
            config = Path(self.trainer.default_root_dir, "config.yaml")
            raise Stopped(f"{stopped}; go on with: l3d fit --config {config} --ckpt_path last") from None
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            from l3d_pl.report import print_summary, write_report

            write_report(Path(self.trainer.default_root_dir))
            if not os.environ.get("L3D_QUIET_SUMMARY"):
                print_summary(Path(self.trainer.default_root_dir), time.perf_counter() - start)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit":
            super()._run_subcommand(subcommand)
            return
        kwargs = self._prepare_subcommand_kwargs(subcommand)
        self.fit(**kwargs)


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
            trainer_defaults={"logger": False, "enable_checkpointing": False, "devices": 1, "enable_model_summary": False},
        )


def train_target(args: Sequence[str], output: str | None = None) -> dict[str, Any]:
    """Train a target from its config and save it; returns its figures, with `file`."""
    from l3d_pl.targets.training import fit_target

    cli = TargetCLI(args)
    return fit_target(cli.model, cli.datamodule, cli.trainer, output, seed=int(cli.config["seed_everything"] or 0))
