"""The frame of `l3d experiment`: settings, seeds, files; on an experiment that takes no time."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from l3d_pl.cli import main
from l3d_pl.configs_path import slurm_scripts
from l3d_pl.experiments import EXPERIMENTS
from l3d_pl.experiments.common import Summary, cell, doing, load_experiment, markdown, spread


@dataclass(frozen=True)
class Settings:
    """Of the experiment.

    Args:
        offset: added to the seed.
        levels: a row for each.
    """

    offset: int = 10
    levels: tuple[float, ...] = (1.0, 2.0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An experiment `quick`; the seeds that it has run."""
    seeds: list[int] = []

    def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
        seeds.append(seed)
        doing("nothing")
        return [{"level": level, "value": level * (settings.offset + seed)} for level in settings.levels]

    def summarise(rows: pd.DataFrame) -> Summary:
        table = rows.groupby("level")["value"].mean().reset_index()
        verdict = {"largest": rows["value"].max(), "nothing": float("nan")}
        return Summary(table, {"values": Figure()}, verdict, {"by_seed": rows[["seed", "value"]]})

    module = ModuleType("quick_experiment")
    module.__dict__.update(Settings=Settings, TINY={"offset": 0}, run=run, summarise=summarise)
    monkeypatch.setitem(sys.modules, "quick_experiment", module)
    monkeypatch.setitem(EXPERIMENTS, "quick", "quick_experiment")
    return seeds


def experiment(*args: object) -> int:
    return main(["experiment", "quick", *map(str, args)])


def test_seeds_are_kept_and_summarised_together(tmp_path: Path, runs: list[int]) -> None:
    assert experiment("--seeds", 0, 1, "--output", tmp_path) == 0
    assert experiment("--seed", 3, "--output", tmp_path) == 0  # a task of an array
    assert experiment("--seeds", 0, 1, 3, "--output", tmp_path) == 0
    assert runs == [0, 1, 3]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"] == {"offset": 10, "levels": [1.0, 2.0]}
    assert manifest["verdict"] == {"largest": 26.0, "nothing": None}
    assert [seed["seed"] for seed in manifest["seeds"]] == [0, 1, 3]
    assert manifest["seeds"][2]["command"] == f"l3d experiment quick --seed 3 --output {tmp_path}"
    assert manifest["seeds"][0]["versions"]["torch"]
    assert manifest["dates"] == sorted({seed["created"][:10] for seed in manifest["seeds"]})
    for unit in ("seconds", "cpu_seconds"):
        assert manifest[unit] == pytest.approx(sum(seed[unit] for seed in manifest["seeds"]))
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["value"].tolist() == pytest.approx([34 / 3, 68 / 3])
    assert len(pd.read_csv(tmp_path / "by_seed.csv")) == 6
    text = (tmp_path / "table.md").read_text()
    assert text.splitlines()[2] == "| 1.000 | 11.333 |"
    assert "**by_seed**" in text
    assert "| largest | 26 |" in text
    assert (tmp_path / "values.png").stat().st_size > 0
    assert not [path for path in tmp_path.iterdir() if "writing" in path.name]


def test_a_seed_cut_short_is_run_again(tmp_path: Path, runs: list[int]) -> None:
    (tmp_path / "seed_0").mkdir()
    (tmp_path / "seed_0" / "rows.csv").write_text("half")
    assert experiment("--seeds", 0, "--output", tmp_path) == 0
    assert runs == [0]


def test_settings_come_from_tiny_then_file_then_command_line(tmp_path: Path, runs: list[int]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("levels: [3, 4]\n")
    assert experiment("--seeds", 5, "--tiny", "--config", config, "--output", tmp_path / "a") == 0
    assert pd.read_csv(tmp_path / "a" / "seed_5" / "rows.csv")["value"].tolist() == [15, 20]
    args = ("--tiny", "--config", config, "--offset", 1, "--levels=[7]")
    assert experiment("--seeds", 5, *args, "--output", tmp_path / "b") == 0
    assert pd.read_csv(tmp_path / "b" / "seed_5" / "rows.csv")["value"].tolist() == [42]


def test_bad_input_is_one_line(tmp_path: Path, runs: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment("--seeds", 0, "--output", tmp_path) == 0
    (tmp_path / "bad.yaml").write_text("ofset: 3\n")
    capsys.readouterr()
    for args, wanted in [
        (("--offset", "x"), "offset: found 'x', allowed: int"),
        (("--ofset", "3"), "did you mean 'offset'"),
        (("--config", tmp_path / "bad.yaml"), "did you mean 'offset'"),
        (("--config", tmp_path / "none.yaml"), "there is no file"),
        (("--offset", "3"), f"output: {tmp_path / 'seed_0'} was run with offset 10, found 3"),
        (("--seeds", "0", "--seed", "1"), "not allowed with"),
    ]:
        assert experiment("--output", tmp_path, *args) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert wanted in lines[0]
    assert main(["experiment", "quik"]) == 2
    assert "did you mean 'quick'" in capsys.readouterr().err
    assert runs == [0]


def test_help_lists_the_settings_of_the_experiment(capsys: pytest.CaptureFixture[str], runs: list[int]) -> None:
    def said(*args: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            main(["experiment", *args])
        return capsys.readouterr().out

    for args in (("quick", "--help"), ("-h", "quick")):
        assert all(text in said(*args) for text in ("--offset OFFSET", "added to the seed", "--seeds"))
    assert "--offset" not in said("--help")
    assert runs == []


def test_batch_script_runs_the_seed_of_its_task() -> None:
    environment = os.environ | {
        "SLURM_ARRAY_TASK_ID": "3",
        "EXPERIMENT": "quick",
        "OUTPUT": "some where",
        "L3D": "echo",
    }
    script = slurm_scripts() / "experiment.sbatch"
    found = subprocess.run(
        ["bash", script, "--steps", "7"], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == "experiment quick --seed 3 --output some where --steps 7\n"


def test_every_experiment_has_what_the_frame_asks_for() -> None:
    for name in EXPERIMENTS:
        module = load_experiment(name)
        assert module.Settings() == module.Settings()
        assert set(module.TINY) <= set(module.Settings.__dataclass_fields__)
        assert callable(module.run)
        assert callable(module.summarise)


def test_cells() -> None:
    assert [cell(value) for value in (1, "a", 0.25, None, float("nan"), float("inf"))] == [
        "1", "a", "0.250", "–", "–", "inf",
    ]  # fmt: skip
    assert spread([1.0, 3.0], "{:.1f}") == "2.0 ± 1.4"
    assert spread([2.0, float("nan")]) == "2.000"
    assert markdown(pd.DataFrame({"a": [1], "b": ["|x|"]})) == "| a | b |\n| --- | --- |\n| 1 | \\|x\\| |\n"
