"""run.sh by itself: what it does with a run that ended one way or another; srun, squeue, scontrol are stand-ins."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "slurm"


class Job:
    """One start of train.sbatch in a directory; `srun` is what stands for the fit, a line of bash."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.programs = {"squeue": "echo RUNNING", "scontrol": f'echo "$@" >> {folder}/scontrol'}

    def start(self, srun: str, **environment: str) -> subprocess.Popen[str]:
        (self.folder / "bin").mkdir(exist_ok=True)
        for name, body in {**self.programs, "srun": f"run={self.folder}/run; {srun}"}.items():
            path = self.folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        own = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "3",
        }
        settings = {"RUN_DIR": str(self.folder / "run"), "SCRIPTS": str(SCRIPTS), "CONFIG": "mine.yaml", "L3D": "l3d"}
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", SCRIPTS / "train.sbatch", "--model.k", "0.2"],
            env={**own, **settings, **environment, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, srun: str, **environment: str) -> tuple[int, str]:
        process = self.start(srun, **environment)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.is_file() else []


SAVE = "mkdir -p $run/checkpoints; touch $run/checkpoints/last.ckpt"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_fit_gets_its_arguments_and_the_shape_of_the_job(job: Job) -> None:
    job.run('echo "$@" > $run/arguments', SLURM_GPUS_ON_NODE="3")
    words = (job.folder / "run/arguments").read_text().split()
    assert words[:7] == ["--kill-on-bad-exit=1", "l3d", "fit", "--config", "mine.yaml", "--model.k", "0.2"]
    given = dict(zip(words[7::2], words[8::2], strict=True))
    assert given["--ckpt_path"] == "last"
    assert given["--trainer.default_root_dir"] == str(job.folder / "run")
    shape = [given[f"--trainer.{name}"] for name in ("num_nodes", "devices", "accelerator")]
    assert shape == ["2", "3", "gpu"]


def test_finished_run_ends_whatever_its_exit_code_and_is_not_started_again(job: Job) -> None:
    assert job.run("touch $run/finished; exit 134")[0] == 0  # (gloo aborts now and then when all is done)
    code, output = job.run("touch $run/again")
    assert (code, job.requeued) == (0, [])
    assert "has finished before" in output
    assert not (job.folder / "run/again").exists()


def test_bad_input_is_not_requeued(job: Job) -> None:
    assert job.run("exit 2")[0] == 2
    assert job.run("touch $L3D_BAD_INPUT; exit 143")[0] == 2  # of one task, and the other was killed for it
    assert job.requeued == []
    job.run("exit 143")
    assert job.requeued == ["requeue 7"]


def test_lost_rank_is_requeued_as_long_as_something_is_saved(job: Job) -> None:
    for _ in range(4):
        assert job.run(f"sleep 0.01; {SAVE}; exit 137", RETRIES="2")[0] == 0
    assert job.requeued == ["requeue 7"] * 4
    assert job.run("exit 137", RETRIES="2")[0] == 0
    code, output = job.run("exit 137", RETRIES="2")
    assert (code, len(job.requeued)) == (1, 5)
    assert "2 starts in a row saved nothing" in output


def test_array_task_is_requeued_as_itself(job: Job) -> None:
    job.run("exit 1", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert job.requeued == ["requeue 7_3"]


def test_cancelled_job_is_left_alone(job: Job) -> None:
    job.programs["squeue"] = "echo COMPLETING"
    assert job.run("exit 143")[0] == 143
    assert job.requeued == []


def test_signal_reaches_the_ranks_and_requeues(job: Job) -> None:
    process = job.start(f"trap '{SAVE}; exit 0' USR1; touch $run/up; while :; do sleep 0.05; done")
    wait_for(job.folder / "run/up")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, job.requeued) == (0, ["requeue 7"])
    assert "requeued (exit code 0)" in output


def test_signal_before_anybody_listens_requeues_too(job: Job) -> None:
    process = job.start("touch $run/up; exec sleep 30")  # dies of the signal, as Python does before it has handlers
    wait_for(job.folder / "run/up")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0
    assert job.requeued == ["requeue 7"]


def test_signal_while_the_job_is_set_up_starts_nothing(job: Job, tmp_path: Path) -> None:
    (tmp_path / "setup").write_text("kill -USR1 $$")
    code, output = job.run("touch $run/up", SETUP=str(tmp_path / "setup"))
    assert (code, job.requeued) == (0, ["requeue 7"]), output
    assert not (job.folder / "run/up").exists()


def test_batch_that_does_not_end_is_given_up_before_the_time_limit(job: Job) -> None:
    process = job.start("trap '' USR1; touch $run/up; exec sleep 30", GRACE="1")
    wait_for(job.folder / "run/up")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert "nothing saved in 1 s" in output
    assert (process.returncode, job.requeued) == (0, ["requeue 7"])


def test_ranks_are_given_up_while_there_is_time_to_requeue(job: Job) -> None:
    """The signal comes 12 s before the limit, and GRACE is 150 s: two are left, and five are the least."""
    job.programs["squeue"] = '[ "${@: -1}" != %e ] && echo RUNNING || date -d "12 seconds" "+%FT%T"'
    process = job.start("trap '' USR1; touch $run/up; exec sleep 30")
    wait_for(job.folder / "run/up")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert "nothing saved in 5 s" in output
    assert (process.returncode, job.requeued) == (0, ["requeue 7"])


def test_start_after_a_lost_node_says_so(job: Job) -> None:
    process = job.start("touch $run/up; exec sleep 1")
    wait_for(job.folder / "run/up")
    process.kill()
    process.wait(10)
    assert "the start before this one ended without a word" in job.run("exit 137")[1]
    assert "without a word" not in job.run("exit 137")[1]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.05)
