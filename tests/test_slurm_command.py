"""`l3d slurm` without a cluster: what it writes, what it refuses, what it gathers. tests/slurm has a real one."""

import csv
import json
import shlex
from pathlib import Path

import pytest
import yaml

from l3d_pl import slurm
from l3d_pl.cli import main

FIT = ["--config", "tms", "--model.n_subnetworks", "7"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_submit_writes_script_and_snapshot() -> None:
    assert main(["slurm", "submit", "runs/a b", "--profile", "gpu", "--nodes", "2", "--dry-run", "--", *FIT]) == 0
    snapshot = Path("runs/a b/slurm").resolve()
    lines = (snapshot / "train.sbatch").read_text().splitlines()
    sbatch = [line for line in lines if line.startswith("#SBATCH")]
    assert sbatch[-1] == "#SBATCH --nodes 2"  # of equal options the last one counts
    assert "#SBATCH --gpus-per-node=4" in sbatch
    assert f"#SBATCH --chdir={Path.cwd()}" in sbatch
    settings = [shlex.split(line, comments=True) for line in lines if line.startswith(("RUN_DIR=", "CONFIG="))]
    assert settings == [[f"CONFIG={snapshot}/config.yaml"], [f"RUN_DIR={snapshot.parent}"]]
    assert yaml.safe_load((snapshot / "config.yaml").read_text())["model"]["n_subnetworks"] == 7
    assert json.loads((snapshot / "code.json").read_text())["versions"]["torch"]
    assert "torch==" in (snapshot / "packages.txt").read_text()
    assert {"run.sh", "code.diff"} <= {path.name for path in snapshot.iterdir()}
    assert not (snapshot / "jobs").exists()


def test_sweep_has_a_task_for_each_line_and_keeps_its_quotes() -> None:
    Path("grid").write_text('# two\n--model.k 0.1\n\n--model.parameters "[W_in, b]" --seed_everything 3\n')
    slurm.submit(Path("sweep"), FIT, grid=Path("grid"), at_once=2, dry_run=True)
    assert "#SBATCH --array=1-2%2" in Path("sweep/slurm/sweep.sbatch").read_text().splitlines()
    assert slurm.read_grid(Path("sweep/slurm/grid.txt")) == slurm.read_grid(Path("grid"))
    runs = slurm.runs_of(Path("sweep"))
    assert [(run.folder.name, run.task, run.to_resume) for run in runs] == [("1", 1, True), ("2", 2, True)]


@pytest.mark.parametrize(
    ("arguments", "grid", "message"),
    [
        (["run", "--", "--config", "tmss"], "", "did you mean 'tms'"),
        (["run", "--", *FIT, "--model.n_subnetwork", "3"], "", "did you mean"),
        (
            ["run", "--profile", "gpus", "--", *FIT],
            "",
            "profile: found 'gpus', allowed are cpu, gpu; did you mean 'gpu'",
        ),
        (["run", "--grid", "nothing", "--", *FIT], "", "grid: there is no file nothing"),
        (["run", "--grid", "grid", "--", *FIT], "# none\n", "grid: grid holds no run"),
        (
            ["run", "--grid", "grid", "--", *FIT],
            "--model.k 0.1\n--model.k 'x\n",
            "grid: grid, line 2: No closing quotation",
        ),
        (["run", "--grid", "grid", "--", *FIT], "--model.k 0.1\n--model.kk 0.1\n", "grid, run 2:"),
        (["run", "2", "--", *FIT], "", "found '2'; allowed are options of sbatch"),
        (["run", "--", *FIT, "--model.k", "7"], "", "k: found 7.0"),
        (["run", "--", *FIT, "--model.parameters", "[nothing]"], "", "pattern 'nothing' matches no parameter"),
        (["run", "--", *FIT, "--model.ranks", "[1]"], "", "ranks of 'W_in'"),
        (["run", "--", *FIT, "--checkpoint.keep", "0"], "", "keep: found 0"),
        (["run", "--", *FIT, "--trainer.strategy", "ddpp"], "", "found 'ddpp', allowed are auto, ddp"),
        (["run", "--grid", "grid", "--", *FIT], "--model.k 0.1\n--model.k 7\n", "grid, run 2: k: found 7.0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_queued(
    arguments: list[str], grid: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("grid").write_text(grid)
    assert main(["slurm", "submit", arguments[0], "--dry-run", *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("run/slurm/train.sbatch").exists()


def test_what_the_cluster_has_and_this_machine_has_not_is_no_mistake() -> None:
    more = ["--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.strategy", "ddp"]
    slurm.submit(Path("run"), [*FIT, *more], dry_run=True)
    assert [path.name for path in Path().iterdir()] == ["run"]  # nothing else is written
    assert [path.name for path in Path("run").iterdir()] == ["slurm"]


def test_run_that_is_there_is_neither_overwritten_nor_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    slurm.submit(Path("run"), FIT, dry_run=True)
    before = Path("run/slurm/config.yaml").read_text()
    for file, message in (("checkpoints", "has stopped; allowed: l3d slurm resume"), ("finished", "has finished")):
        Path("run", file).mkdir()
        if file == "finished":
            Path("run/finished").rmdir()
            Path("run/finished").touch()
        assert main(["slurm", "submit", "run", "--dry-run", "--", *FIT, "--model.k", "0.3"]) == 2
        assert message in capsys.readouterr().err
        assert Path("run/slurm/config.yaml").read_text() == before
    assert main(["slurm", "resume", "run"]) == 0
    assert capsys.readouterr().out == "nothing to resume\n"

    Path("by hand/2/checkpoints").mkdir(parents=True)  # a task of the sweep would go on with it
    Path("grid").write_text("--model.k 0.1\n--model.k 0.2\n")
    assert main(["slurm", "submit", "by hand", "--grid", "grid", "--dry-run", "--", *FIT]) == 2
    assert capsys.readouterr().err.endswith("by hand/2 holds a run that has stopped; allowed: another directory\n")


def test_starts_of_an_earlier_job_do_not_count() -> None:
    slurm.submit(Path("run"), FIT, dry_run=True)
    Path("run/slurm/starts").write_text("start 0\n" * 5)
    slurm.submit(Path("run"), FIT, dry_run=True)
    assert not Path("run/slurm/starts").exists()


def test_settings_of_the_shell_are_in_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SETUP": "modules.sh", "GRACE": "60", "RETRIES": "2"}.items():
        monkeypatch.setenv(name, value)
    slurm.submit(Path("run"), FIT, dry_run=True)
    lines = [line.split("#")[0].strip() for line in Path("run/slurm/train.sbatch").read_text().splitlines()]
    assert {f"SETUP={Path('modules.sh').resolve()}", "GRACE=60", "RETRIES=2"} <= set(lines)


def test_snapshot_names_untracked_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "git_untracked", lambda: ["mine.py"])
    slurm.submit(Path("run"), FIT, dry_run=True)
    assert json.loads(Path("run/slurm/code.json").read_text())["untracked"] == ["mine.py"]


def test_commands_that_are_missing_or_fail_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "bin")
    assert main(["slurm", "submit", "run", "--", *FIT]) == 2
    assert capsys.readouterr().err == "l3d: error: slurm: there is no command sbatch on this machine\n"
    Path("bin").mkdir()
    Path("bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    Path("bin/sbatch").chmod(0o755)
    assert main(["slurm", "submit", "run", "--", *FIT]) == 2
    assert capsys.readouterr().err.endswith("train.sbatch: sbatch: error: no such partition\n")
    Path("bin/sbatch").write_text("#!/bin/sh\nexec /bin/sleep 9\n")
    monkeypatch.setattr(slurm, "PATIENCE", 0.1)
    assert main(["slurm", "submit", "run", "--", *FIT]) == 2
    assert capsys.readouterr().err.endswith("train.sbatch: no answer within 0.1 s\n")
    Path("bin/sbatch").write_text("no program")
    assert main(["slurm", "submit", "run", "--", *FIT]) == 2
    assert capsys.readouterr().err == "l3d: error: slurm: sbatch cannot be run (Exec format error)\n"


def test_resume_submits_what_neither_finished_nor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sweep: 1 has finished, 2 runs, 3 was killed, 4 was killed and runs as a task of a later array."""
    Path("grid").write_text("--model.k 0.1\n" * 4)
    slurm.submit(Path("sweep"), FIT, grid=Path("grid"), at_once=2, dry_run=True)
    Path("sweep/slurm/jobs").write_text("11\n12\n")
    Path("sweep/1").mkdir()
    Path("sweep/1/finished").touch()
    queue = "11_1 COMPLETED\n11_2 RUNNING\n11_3 TIMEOUT\n11_4 TIMEOUT\n12_4 PENDING\n99_1 RUNNING\n"
    asked = []

    def answer(*command: str) -> str:
        asked.append(command)
        return {"squeue": queue, "sacct": "11_3|CANCELLED by 0\n", "sbatch": "13;cluster\n"}[command[0]]

    monkeypatch.setattr(slurm, "slurm", answer)
    assert [run.state for run in slurm.runs_of(Path("sweep"))] == ["COMPLETED", "RUNNING", "TIMEOUT", "PENDING"]
    assert slurm.resume(Path("sweep")) == ["13"]
    assert asked[-1] == ("sbatch", "--parsable", "--array=3%2", str(Path("sweep/slurm/sweep.sbatch").resolve()))
    assert Path("sweep/slurm/jobs").read_text() == "11\n12\n13\n"


def test_several_tasks_do_not_all_train_the_same_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main(["fit", "--config", "tms", "--model.target_weights", "none.safetensors"]) == 2
    assert "make it first: l3d target --config targets/tms.yaml --output none.safetensors" in capsys.readouterr().err


def test_collect_tabulates_what_differs() -> None:
    for run, (k, loss) in {"2": (0.1, 0.5), "10": (0.2, 0.25)}.items():
        folder = Path("sweep", run)
        (folder / "decomposition").mkdir(parents=True)
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"model": {"k": k, "lr": 1.0}, "trainer": {"default_root_dir": run}})
        )
        (folder / "decomposition/config.json").write_text(json.dumps({"figures": {"val/loss": loss}}))
        (folder / "finished").touch()
    slurm.submit(Path("sweep"), FIT, dry_run=True)  # its snapshot is no run
    Path("sweep/slurm/grid.txt").write_text("--model.k 0.1\n" * 3)  # 1 and 3 have never started
    Path("sweep/10/finished").unlink()  # what it has exported is not its result yet
    with open(slurm.collect(Path("sweep")), newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"run": "1", "model.k": "", "finished": "False", "val/loss": ""},
        {"run": "2", "model.k": "0.1", "finished": "True", "val/loss": "0.5"},
        {"run": "3", "model.k": "", "finished": "False", "val/loss": ""},
        {"run": "10", "model.k": "0.2", "finished": "False", "val/loss": ""},
    ]
    assert Path("sweep/sweep.png").stat().st_size > 0


def test_collect_without_runs_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert main(["slurm", "collect", "empty"]) == 2
    assert "holds no run" in capsys.readouterr().err
