"""What every experiment shares: settings, seeds, files, quiet fits, toys.

An experiment is a module with

    Settings                        a frozen dataclass: what can be set, with defaults that take minutes on two cores
    TINY                            {setting: value}: the same in seconds, for a test
    run(settings, output, seed)     one seed; returns tidy rows, {column: value} each. `output` is a folder of its own
    summarise(rows)                 rows of all seeds, with a column `seed`, as a `Summary`

`run_experiment` does the rest. In its folder:

    seed_N/rows.csv, seed.json      a seed that is finished: its rows; settings, command, commit, versions, seconds
    table.csv, *.csv, *.png         what all finished seeds say
    table.md                        the tables, and the figures of the verdict, to read
    manifest.json                   dates, seconds, settings, the verdict's figures, and the seed.json of all of them
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from datamodules.digits import DigitsData
from datamodules.loading import InMemoryData
from datamodules.toy import ToyData
from l3d_pl.analysis.alignment import number
from l3d_pl.analysis.tables import replace
from l3d_pl.atlas.pictures import STYLE
from l3d_pl.errors import L3DError, require_choice
from l3d_pl.experiments import EXPERIMENTS
from l3d_pl.lightning_cli import Parser
from l3d_pl.lightning_module import L3D
from l3d_pl.provenance import provenance
from l3d_pl.targets.training import load_target
from l3d_pl.toys import build_toy, calm, ensure_target, fit_quietly, target_file

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
SEEDS = (0, 1, 2, 3, 4)

_say: ContextVar[Callable[[str], None]] = ContextVar("say", default=lambda text: None)


@dataclass
class Summary:
    """What the seeds say together.

    Attributes:
        table: a row for each thing compared; numbers, or text where a cell holds more than one.
        plots: {file name without .png: figure}; `run_experiment` makes and saves them in the house's style.
        verdict: figures that decide the question, plain numbers, texts or None.
        tables: further tables, {file name without .csv: table}.
    """

    table: pd.DataFrame
    plots: dict[str, Figure] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


def doing(what: str) -> None:
    """Say beside the progress bar what a `run` is at."""
    _say.get()(what)


def load_experiment(name: str) -> ModuleType:
    """The module of an experiment.

    Raises:
        L3DError: there is none of that name.
    """
    require_choice("experiment", name, EXPERIMENTS)
    return importlib.import_module(EXPERIMENTS[name])


def parse_settings(experiment: ModuleType, config: Path | None, overrides: Sequence[str], tiny: bool = False) -> Any:
    """An experiment's `Settings`: its defaults, `TINY` if asked for, the config file, the command line; later ones win.

    Raises:
        L3DError: a file that cannot be read, an unknown setting, a value of another type.
    """
    values: dict[str, Any] = dict(experiment.TINY) if tiny else {}
    if config is not None:
        from l3d_pl.cli import require_yaml  # (it imports this module in turn)

        if not config.is_file():
            raise L3DError(f"config: there is no file {config}")
        values |= require_yaml(str(config))
    given = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    return experiment.Settings(**_parser(experiment).parse_args([*given, *overrides]).as_dict())


def settings_help(name: str) -> str:
    """What can be set in an experiment, with the defaults, as `--help` shows it.

    Raises:
        L3DError: there is none of that name.
    """
    return (
        f"settings of {name}. " + _parser(load_experiment(name)).format_help().split("\n\n")[-1]
    )  # after the parser's own


def _parser(experiment: ModuleType) -> Parser:
    parser = Parser()
    parser.add_class_arguments(experiment.Settings)
    return parser


def run_experiment(
    name: str,
    settings: Any = None,
    output: Path | None = None,
    seeds: Iterable[int] = SEEDS,
    command: Sequence[str] = (),
) -> Summary:
    """Run the seeds that are not finished yet, and summarise all that are there.

    Args:
        settings: the experiment's own; its defaults if None.
        output: folder of the results; `runs/experiments/<name>` if None.
        command: what to keep as the command that made a seed.

    Raises:
        L3DError: `output` holds seeds that were run with other settings.
    """
    experiment = load_experiment(name)
    settings = experiment.Settings() if settings is None else settings
    output = Path("runs", "experiments", name) if output is None else output
    seeds = list(dict.fromkeys(seeds))
    output.mkdir(parents=True, exist_ok=True)
    for record in _records(output):
        _require_same(record["settings"], _plain(settings), output / f"seed_{record['seed']}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _calm(), Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=len(seeds))
        for seed in seeds:

            def say(text: str, seed: int = seed) -> None:
                progress.update(bar, description=f"{name}, seed {seed}: {text}")

            token = _say.set(say)
            folder = output / f"seed_{seed}"
            if not (folder / "seed.json").is_file():
                _run_seed(experiment, settings, folder, seed, command)
            progress.advance(bar)
            _say.reset(token)
    return summarise(name, output)


def _run_seed(experiment: ModuleType, settings: Any, folder: Path, seed: int, command: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clock, cpu = time.perf_counter(), time.process_time()
    rows = pd.DataFrame(experiment.run(settings, folder, seed))
    rows.insert(0, "seed", seed)
    record = {
        "seed": seed,
        "settings": _plain(settings),
        "command": shlex.join(command),
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **provenance(),
    }
    replace(folder / "rows.csv", lambda path: rows.to_csv(path, index=False))
    replace(folder / "seed.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))  # last: finished


def summarise(name: str, output: Path) -> Summary:
    """Table, plots and manifest of the finished seeds in `output`; prints the table and the verdict."""
    experiment, records = load_experiment(name), _records(output)
    with matplotlib.rc_context(STYLE | {"text.parse_math": True}):  # the labels of logarithmic axes are formulas
        summary: Summary = experiment.summarise(rows_of(output))
        manifest = {
            "experiment": name,
            "dates": sorted({record["created"][:10] for record in records}),
            "settings": records[0]["settings"],
            "verdict": {key: _finite(value) for key, value in summary.verdict.items()},
            "seconds": sum(record["seconds"] for record in records),
            "cpu_seconds": sum(record["cpu_seconds"] for record in records),
            "seeds": [{key: value for key, value in r.items() if key != "settings"} for r in records],
        }
        with tempfile.TemporaryDirectory(dir=output, prefix=".writing") as aside:  # tasks of an array may end together
            for stem, figure in summary.plots.items():
                figure.savefig(Path(aside, f"{stem}.png"), format="png", dpi=90)
            for stem, table in ({"table": summary.table} | summary.tables).items():
                table.to_csv(Path(aside, f"{stem}.csv"), index=False)
            Path(aside, "table.md").write_text(_to_read(summary))
            Path(aside, "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            for path in Path(aside).iterdir():
                os.replace(path, output / path.name)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    for title, table in ({f"{name}, {len(records)} seeds": summary.table} | summary.tables).items():
        shown = Table(*map(str, table.columns), title=title, title_justify="left")
        for row in table.itertuples(index=False):
            shown.add_row(*(Text(cell(value)) for value in row))
        console.print(shown)
    for key, value in summary.verdict.items():
        print(f"{key}: {cell(value)}")
    print(output / "manifest.json")
    return summary


def rows_of(output: Path) -> pd.DataFrame:
    """The rows of all finished seeds, in the order of the seeds."""
    return pd.concat(
        [pd.read_csv(output / f"seed_{record['seed']}" / "rows.csv") for record in _records(output)], ignore_index=True
    )


def _records(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(path.read_text()) for path in output.glob("seed_*/seed.json")]
    return sorted(records, key=lambda record: record["seed"])


def _require_same(kept: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    for key in {**kept, **given}:
        if kept.get(key) != given.get(key):
            raise L3DError(
                f"output: {folder} was run with {key} {kept.get(key)}, found {given.get(key)}; "
                "give these settings another --output"
            )


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _calm() -> Iterator[None]:
    with warnings.catch_warnings():
        calm()
        yield


# -- tables ------------------------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A table's cell as text: numbers as the house writes them, a dash for what could not be measured."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return number(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; bars within cells are escaped."""
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    cells = [[cell(value).replace("|", r"\|") for value in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _to_read(summary: Summary) -> str:
    """All tables and the verdict as one page."""
    verdict = pd.DataFrame(summary.verdict.items(), columns=["figure", "value"])
    return "\n".join(
        [
            markdown(summary.table),
            *(f"**{name}**\n\n{markdown(table)}" for name, table in summary.tables.items()),
            *([markdown(verdict)] if len(verdict) else []),
        ]
    )


def spread(values: Any, form: str = "{:.3f}") -> str:
    """ "mean ± standard deviation" over seeds; what could not be measured does not count."""
    values = pd.Series(values, dtype=float).dropna()
    if values.empty:
        return "–"
    mean = form.format(values.mean())
    return mean if len(values) < 2 else f"{mean} ± {form.format(values.std())}"


# -- toys --------------------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """A shipped toy with its trained target.

    Attributes:
        name: of the shipped config.
        model: settings of `L3D`, with the frozen `target`.
        data: settings of its data module.
        truth: what is known of the task (`A`).
    """

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    truth: dict[str, Tensor]

    @property
    def target(self) -> nn.Module:
        return self.model["target"]

    def data_module(self, seed: int) -> InMemoryData:
        """Its data, the training rows or their order by `seed`."""
        return (DigitsData if self.name == "digits_cnn" else ToyData)(**self.data, seed=seed)

    def rows(self, split: str = "test", data: Any = None) -> dict[str, Tensor]:
        """The rows of `validation` or `test` as one batch, `inputs` and `labels`; the same for every seed."""
        data = self.data_module(0) if data is None else data
        data.setup()
        rows = getattr(data, split)
        return rows[torch.arange(len(rows))]

    def held_out(self) -> Tensor:
        """The inputs of the test rows, [n_test, features] (images [n_test, 1, 8, 8])."""
        return self.rows()["inputs"]

    def fit(
        self, seed: int, steps: int, callbacks: Sequence[Any] = (), data: Any = None, **model: Any
    ) -> tuple[L3D, float]:
        """A decomposition by the shipped config's settings, with those of `model` instead; and its CPU seconds.

        `data`: another data module than the config's.
        """
        module = L3D(**(self.model | model), seed=seed)
        data = self.data_module(seed) if data is None else data
        seconds = fit_quietly(module, data, max_steps=steps, callbacks=list(callbacks))
        module.ensure_validated()  # the last epoch may have been cut short
        return module, seconds


def load_toy(name: str, target: int, folder: Path, training: Sequence[str] = ()) -> Toy:
    """A shipped toy; its target is trained into `folder`/targets where it is not there.

    Args:
        target: seed of the target's training.
        training: more arguments of `l3d target`.
    """
    ensure_target(name, str(target), folder, training)
    model, data, _ = build_toy(name)
    truth = load_target(target_file(name, str(target), folder), model["target"])
    return Toy(name, model, data, truth)
