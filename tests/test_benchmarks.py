"""The scripts of `benchmarks/` that keep results: what they write is what the runs say."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.figure import Figure

from l3d_pl import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.targets.toy import TiedAutoencoder
from l3d_pl.targets.training import save_target

SHORT = ["--model.target_weights", "t.safetensors", "--trainer.max_epochs", "1", "--data.steps_per_epoch", "20"]
GRID = ["--config", "tms", "--n_v", "5", "2", "--k", "0.2", "--root", "runs", "--", *SHORT]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(Path(spec.origin or "").parent)  # as where it is run
    monkeypatch.setitem(sys.modules, name, module)  # where its dataclasses are looked up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pareto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/pareto.py in a folder with a target."""
    module = load("pareto", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pareto"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards, like the next
    monkeypatch.setenv("L3D_QUIET_SUMMARY", "1")
    save_target("t.safetensors", TiedAutoencoder(5, 2))
    return module


def test_pareto_sweeps_the_grid_once(
    pareto: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pareto.main(GRID)
    with open("runs/pareto.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["n_v"] for row in rows] == ["2", "5"]
    for row in rows:
        found = Decomposition.from_pretrained(f"runs/l3d_pl_nv{row['n_v']}_k0.2/decomposition")
        assert found.n_subnetworks == int(row["n_v"])
        assert float(row["loss"]) == pytest.approx(found.figures["val/loss"], rel=1e-5)
        assert float(row["l0"]) == pytest.approx(0.2 * found.n_subnetworks)
        assert float(row["l0_at_threshold"]) == pytest.approx(float(found.p_act.sum()), rel=1e-5)
        assert float(row["dead_fraction"]) == pytest.approx(float((found.p_act == 0).float().mean()))
        assert int(row["steps"]) == 20
    assert Path("runs/pareto.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| l3d_pl | {row['n_v']} | 0.2 | {float(row['loss']):.3f} |" in printed for row in rows)

    # Again: nothing that is there is made anew, and what is missing is.
    calls: list[Any] = []
    run = pareto.run
    monkeypatch.setattr(pareto, "run", lambda args: calls.append(args) or run(args))
    Path("runs/l3d_pl_nv2_k0.2/cell.json").unlink()
    pareto.main(GRID)
    assert len(calls) == 1
    assert "runs/l3d_pl_nv2_k0.2" in calls[0]
    with open("runs/pareto.csv", newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == [row["loss"] for row in rows]

    with pytest.raises(L3DError, match=r"root: runs is of tms .*max_epochs 1.*; give tms .*max_epochs 2.* another"):
        pareto.main([*GRID, "--trainer.max_epochs", "2"])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--k", "1.5"], r"k: found 1\.5; allowed"),
        (["--recipes", "papr"], "recipes: found 'papr'.*did you mean 'paper'"),
        (["--config", "tmq"], "config: there is no file tmq.*did you mean 'tms'"),
        (["--n_v", "few"], "n_v: invalid int value: 'few'"),
    ],
)
def test_pareto_refuses_a_bad_grid_before_it_runs(pareto: ModuleType, args: list[str], message: str) -> None:
    with pytest.raises(L3DError, match=message):
        pareto.main(args)
    assert not Path("runs").exists()


def test_pareto_draws_a_line_per_value_and_recipe(pareto: ModuleType) -> None:
    cells = [
        pareto.Cell(recipe, n_v, k, 1 - k - n_v / 100, k * n_v, 0.5, 1.0, 0.0, 1, 1.0, 1.0, 0)
        for recipe in ("paper", "l3d_pl")
        for n_v in (20, 10)
        for k in (0.1, 0.3)
    ]
    axes = Figure().subplots()
    pareto.lines(axes, cells, "l0", "loss", "n_v")
    drawn = {(line.get_linestyle(), *line.get_xydata().round(6).ravel().tolist()) for line in axes.get_lines()}
    ten, twenty = (1.0, 0.8, 3.0, 0.6), (2.0, 0.7, 6.0, 0.5)
    assert drawn == {("-", *ten), ("--", *ten), ("-", *twenty), ("--", *twenty)}


def test_plan_holds_and_sends_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas are those that docs/scaling.md sets beside what the loopback device has counted."""
    scaling = load("scaling", monkeypatch)
    for strategy in scaling.STRATEGIES:
        for ranks in (1, 2, 4):
            planned = scaling.planned(strategy, ranks)
            for key, expected in scaling.formulas(strategy, ranks).items():
                assert planned[key] == pytest.approx(expected, rel=1e-6), (strategy, ranks, key)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_1"])
def test_plan_of_two_ranks_has_the_peak_of_a_run(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    scaling = load("scaling", monkeypatch)
    assert scaling.planned(strategy, 2)["peak"] == pytest.approx(scaling.measure(strategy, 2, 1)["peak"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neo", "cnn", "llama"])
def test_plan_of_one_process_has_the_peak_of_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load("plan", monkeypatch)
    monkeypatch.chdir(tmp_path)
    plan.prepare()
    planned, measured = plan.compare(name)
    assert planned["peak"] == pytest.approx(measured["peak"], rel=0.15)
