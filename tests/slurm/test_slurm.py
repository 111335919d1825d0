"""The shipped scripts on a real Slurm of two nodes: whatever interrupts a run, it ends as an uninterrupted one does."""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing, ranks_of, wait_for
from processes import run as run_python

from l3d_pl import slurm
from l3d_pl.cli import main
from l3d_pl.lightning_cli import train_target

MINUTES = int(os.environ.get("MINUTES", "1"))  # of time limits that are waited for; where a start takes so long: more

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900 * MINUTES),
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {missing()}"),
]

STEPS = 300
WAIT = 240 * MINUTES  # seconds for anything, on a busy machine
FIT = ["--config", "tms", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "3"]
FIT += ["--data.steps_per_epoch", "100", "--model.init_samples", "200", "--model.swap_samples", "200"]
FIT += ["--checkpoint.every_n_train_steps", "20"]
TWO_NODES = [*FIT, "--trainer.strategy", "ddp"]
SLOW = "--trainer.callbacks+=interruptions.Slow"
SLOWER = f"--trainer.callbacks.starts=2 --trainer.callbacks.seconds={0.5 * MINUTES}"  # two starts are not enough
HANG = "--trainer.callbacks+=interruptions.Hang --trainer.callbacks.step=30"
SMALL = ["--cpus-per-task=1", "--mem-per-cpu=100"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, and a working directory with a target in it."""
    with pytest.MonkeyPatch.context() as patch, Cluster(tmp_path_factory.mktemp("slurm"), cpus=8) as found:
        work = tmp_path_factory.mktemp("work")
        patch.chdir(work)
        patch.setenv("SLURM_CONF", found.environment["SLURM_CONF"])
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RETRIES", "9")  # on a busy machine a start may take as long as the time limit
        patch.setattr(sys, "argv", ["l3d"])
        found.environment = dict(os.environ)
        shutil.copy(Path(__file__).with_name("interruptions.py"), work)
        config = str(Path(__file__).parents[2] / "configs/targets/tms.yaml")
        train_target(
            ["--config", config, "--trainer.enable_progress_bar", "false"], "runs/targets/tms_seed42.safetensors"
        )
        yield found


@pytest.fixture(scope="module", autouse=True)
def array(cluster: Cluster) -> tuple[Path, str]:
    """Four equal runs and the array's id; submitted first, as most of their time is waiting.

    1: nothing happens. 2: a signal during start-up. 3: its time limit, again and again. 4: hangs, is deaf to the
    signal, and is killed by its time limit.
    """
    sweep = Path("runs/sweep")
    Path("grid.txt").write_text(
        f"--model.k 0.1\n\n# slow ones\n--model.k 0.1\n--model.k 0.1 {SLOW} {SLOWER}\n"
        f"--model.k 0.1 {HANG} --trainer.callbacks.go=runs/sweep/go\n"
    )
    Path("deaf.sh").write_text("[ $SLURM_ARRAY_TASK_ID != 4 ] || trap '' USR1\n")
    # One second before a limit of a minute is 29 to 59 s after the start: Slurm looks twice a minute.
    options = [f"--time={MINUTES}", "--signal=B:USR1@1", "--exclude=node2", *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SETUP", "deaf.sh")
        job = slurm.submit(sweep, FIT, options, grid=Path("grid.txt"))
    wait_for("task 2", lambda: "start 0" in log_of(sweep, f"{job}_2"), WAIT)
    cluster("scancel", "--batch", "--signal=USR1", f"{job}_2")
    return sweep, job


@pytest.fixture(scope="module", autouse=True)
def hanging(cluster: Cluster, array: tuple[Path, str]) -> tuple[Path, str]:
    """A run that hangs; the signal comes less than a minute before its time limit, GRACE are more than two."""
    run = Path("runs/hanging")
    options = [f"--time={MINUTES + 1}", "--signal=B:USR1@60", *SMALL]
    job = slurm.submit(run, [*FIT, *HANG.split(), "--trainer.callbacks.go=runs/hanging/go"], options)
    return run, job


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """A two-node fit that nothing interrupts."""
    job = slurm.submit(Path("runs/whole"), TWO_NODES, ["--nodes=2", *SMALL])
    wait_for("two-node fit", lambda: cluster.state(job) == "COMPLETED", WAIT)
    return Path("runs/whole")


def log_of(run: Path, job: str = "*") -> str:
    return "".join(path.read_text() for path in sorted(run.glob(f"slurm/{job}.log")))


def rows_of(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def require_equal(run: Path, expected: Path) -> None:
    """Same weights, bit for bit, and one log with every step once."""
    found, wanted = ((path / "decomposition/model.safetensors").read_bytes() for path in (run, expected))
    assert found == wanted
    steps = [row["step"] for row in rows_of(run / "metrics.csv") if row["train/loss"]]
    assert steps == [str(step) for step in range(19, STEPS, 20)]
    assert not [*run.glob("**/version_*"), *run.glob("**/hpc_ckpt*")]


def test_two_node_fit(whole: Path) -> None:
    local = ["--trainer.devices", "2", "--trainer.default_root_dir", "runs/local"]
    run_python(["-m", "l3d_pl.cli", "fit", *TWO_NODES, *local], WAIT)
    require_equal(whole, Path("runs/local"))
    assert "MEMBER: 2/2" in log_of(whole)
    assert {path.name for path in (whole / "slurm").iterdir()} >= {"train.sbatch", "run.sh", "config.yaml", "code.json"}


def test_bad_input_of_several_tasks_is_seen(cluster: Cluster) -> None:
    """Both end with exit code 2, or are killed for the other's; nothing is started again."""
    run = Path("runs/bad")
    slurm.submit(run, TWO_NODES, ["--nodes=2", *SMALL], dry_run=True)
    job = cluster("sbatch", "--parsable", str(run / "slurm/train.sbatch"), "--model.k", "7").strip()
    wait_for("the end", lambda: cluster.state(job) == "FAILED", WAIT)
    assert "k: found 7.0" in log_of(run)
    assert "bad input: not requeued" in log_of(run)
    assert log_of(run).count("== ") == 2  # a start, and this


def test_whatever_interrupts_a_two_node_run_it_ends_the_same(
    cluster: Cluster, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/interrupted")
    job = slurm.submit(run, [*TWO_NODES, SLOW, "--trainer.callbacks.starts=9"], ["--nodes=2", *SMALL])

    def wait_for_new_checkpoint() -> None:
        last = run / "checkpoints/last.ckpt"
        before = last.stat().st_mtime_ns if last.is_file() else 0
        wait_for("a new checkpoint", lambda: last.is_file() and last.stat().st_mtime_ns > before, WAIT)

    wait_for_new_checkpoint()
    cluster.power_cut("node2")
    wait_for("the node's failure", lambda: cluster.state(job) != "RUNNING", WAIT)
    # (Later, Slurm may end another start: it repeats what it could not tell node2 while that was down.)
    cluster.node_up("node2")
    wait_for("the second start", lambda: "start 1 on" in log_of(run), WAIT)

    wait_for_new_checkpoint()
    os.kill(*ranks_of(cluster, "node2"), signal.SIGUSR1)
    wait_for("the third start", lambda: "start 2 on" in log_of(run), WAIT)
    assert "a signal to another rank after step" in log_of(run)

    wait_for_new_checkpoint()
    os.kill(*ranks_of(cluster, "node2"), signal.SIGKILL)
    wait_for("the fourth start", lambda: "start 3 on" in log_of(run), WAIT)

    wait_for_new_checkpoint()
    assert main(["slurm", "submit", str(run), "--", *TWO_NODES]) == 2
    assert "holds a run that is RUNNING" in capsys.readouterr().err
    cluster("scancel", job)
    wait_for("the cancellation", lambda: cluster.state(job) == "CANCELLED", WAIT)
    # (Slurm calls it cancelled before the last process, which may be saving, has gone.)
    wait_for("the ranks' end", lambda: not ranks_of(cluster, "node1") + ranks_of(cluster, "node2"), WAIT)
    assert "requeued" not in log_of(run).splitlines()[-1]

    assert main(["slurm", "status", str(run)]) == 0
    assert "1 unfinished and not in the queue" in capsys.readouterr().out
    assert main(["slurm", "resume", str(run)]) == 0
    again = (run / "slurm/jobs").read_text().split()[-1]
    assert capsys.readouterr().out == f"submitted again as {again}\n"
    wait_for("the end", lambda: cluster.state(again) == "COMPLETED", WAIT)
    require_equal(run, whole)


def test_array_with_tasks_stopped_by_signal_and_by_their_time_limit(cluster: Cluster, array: tuple[Path, str]) -> None:
    sweep, job = array
    for task in ("1", "2", "3"):
        wait_for(f"task {task}", lambda t=task: cluster.state(f"{job}_{t}") == "COMPLETED", WAIT)
    for task in ("2", "3"):
        assert "the signal has come" in log_of(sweep, f"{job}_{task}")
        assert f"start {int(task) - 1} on" in log_of(sweep, f"{job}_{task}")
        require_equal(sweep / task, sweep / "1")

    wait_for("task 4", lambda: cluster.state(f"{job}_4") == "TIMEOUT", WAIT)
    (sweep / "go").touch()
    (again,) = slurm.resume(sweep)
    wait_for("task 4 again", lambda: cluster.state(f"{again}_4") == "COMPLETED", WAIT)
    require_equal(sweep / "4", sweep / "1")
    assert slurm.resume(sweep) == []

    rows = rows_of(slurm.collect(sweep))
    assert [(row["run"], row["finished"], row["steps"]) for row in rows] == [
        (str(i), "True", "300") for i in (1, 2, 3, 4)
    ]
    assert len({row["val/loss"] for row in rows}) == 1
    assert (sweep / "sweep.png").stat().st_size > 0


def test_run_that_hangs_is_requeued_before_its_time_limit(
    cluster: Cluster, hanging: tuple[Path, str], array: tuple[Path, str]
) -> None:
    run, job = hanging
    wait_for("the second start", lambda: "start 1 on" in log_of(run), WAIT)
    assert re.search(r"nothing saved in \d+ s", log_of(run))
    (run / "go").touch()
    wait_for("the end", lambda: cluster.state(job) == "COMPLETED", WAIT)
    require_equal(run, array[0] / "1")


def test_experiment_has_a_seed_for_each_task(cluster: Cluster) -> None:
    script = Path(__file__).parents[2] / "slurm" / "experiment.sbatch"
    Path("experiment.sh").write_text(
        f"EXPERIMENT=references OUTPUT=runs/experiment L3D={shlex.quote(slurm.l3d_command())} "
        f"sbatch --parsable --array=0-1 {' '.join(SMALL)} {shlex.quote(str(script))} --tiny"
    )
    job = cluster("bash", "experiment.sh").strip()
    for task in ("0", "1"):
        wait_for(f"seed {task}", lambda t=task: cluster.state(f"{job}_{t}") == "COMPLETED", WAIT)
        assert rows_of(Path(f"runs/experiment/seed_{task}/rows.csv"))
    assert Path("runs/experiment/table.md").is_file()


def test_pipeline_target_sweep_analysis_table(cluster: Cluster, tmp_path: Path) -> None:
    """One task of the sweep is requeued by the signal: what depends on the array waits for its second start."""
    slow = f"{SLOW} --trainer.callbacks.seconds=0.5"
    (tmp_path / "grid.txt").write_text(f"--model.k 0.1\n--model.k 0.2 {slow}\n")
    scripts = Path(__file__).parents[2] / "slurm"
    pipeline = ["bash", str(scripts / "pipeline.sh"), "--cpus-per-task=1", "--mem-per-cpu=100"]
    target = tmp_path / "target.safetensors"
    settings = {"RUN_DIR": str(tmp_path / "sweep"), "GRID": str(tmp_path / "grid.txt"), "SCRIPTS": str(scripts)}
    settings |= {"CONFIG": "mine.yaml", "TARGET": str(target), "L3D": slurm.l3d_command()}
    short = [
        "--trainer.max_steps",
        "20",
        "--model.target_weights",
        str(target),
        "--trainer.enable_progress_bar",
        "false",
    ]
    Path("mine.yaml").write_text(slurm.resolved_config(["--config", "tms", *short]))

    def submit(**more: str) -> list[str]:
        environment = {**cluster.environment, **settings, **more}
        done = subprocess.run(pipeline, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return re.findall(r"job (\d+)", done.stdout)

    jobs, broken = submit(), submit(TARGET=str(tmp_path / "other"), TARGET_CONFIG="targets/tns")
    wait_for("the failed target", lambda: cluster.state(broken[0]) == "FAILED", WAIT)
    for job in (f"{broken[1]}_1", f"{broken[2]}_1", broken[3]):
        wait_for("those that depend on it", lambda j=job: cluster.state(j) in ("CANCELLED", ""), WAIT)
    sweep = tmp_path / "sweep"
    log = sweep / f"2-{jobs[1]}.log"
    wait_for("the slow task", lambda: log.is_file() and "start 0" in log.read_text(), WAIT)
    wait_for("its first steps", (sweep / "2/config.yaml").is_file, WAIT)
    cluster("scancel", "--batch", "--signal=USR1", f"{jobs[1]}_2")
    wait_for("the table", lambda: cluster.state(jobs[3]) == "COMPLETED", WAIT)
    assert "the signal has come" in log.read_text()
    assert "start 1 on" in log.read_text()
    for run in ("1", "2"):
        assert list((sweep / run / "analysis").iterdir())
        assert "circuit" in (sweep / f"{run}-analysis-{jobs[2]}.log").read_text()  # of the score
    rows = rows_of(sweep / "sweep.csv")
    assert [(row["run"], row["model.k"], row["finished"]) for row in rows] == [
        ("1", "0.1", "True"),
        ("2", "0.2", "True"),
    ]
