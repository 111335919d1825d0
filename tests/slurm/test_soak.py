"""A soak: a run of two nodes is interrupted again and again, each time in another way; it ends as an uninterrupted one.

The run's directory is a small disk of its own, which the test fills. Moments are random; SOAK=4 takes fewer of them.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing, ranks_of, wait_for
from test_slurm import SMALL, rows_of

from l3d_pl import slurm
from l3d_pl.lightning_cli import train_target

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {missing()}"),
]

STEPS, EVERY = 400, 10
FIT = ["--config", "tms", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", str(STEPS // 100)]
FIT += ["--data.steps_per_epoch", "100", "--model.init_samples", "200", "--model.swap_samples", "200"]
FIT += ["--checkpoint.every_n_train_steps", str(EVERY), "--trainer.log_every_n_steps", "1"]
# Two ranks, five subnetworks: three on the one, two on the other.
FIT += ["--trainer.strategy", "l3d_pl.strategies.fsdp2.FSDP2Strategy"]
FIT += ["--trainer.strategy.data_parallel_size", "1", "--trainer.strategy.tensor_parallel_size", "2"]
KINDS = {"before the time limit": 4, "SIGTERM": 3, "kill -9": 4, "power cut": 3, "full disk": 3, "damage": 3}
WAIT = 240  # seconds for anything, on a busy machine


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty disk of 16 MiB."""
    place = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def cluster(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that see the disk, and a working directory with a target in it."""
    with pytest.MonkeyPatch.context() as patch, Cluster(tmp_path_factory.mktemp("slurm"), cpus=8) as found:
        work = tmp_path_factory.mktemp("work")
        patch.chdir(work)
        patch.setenv("SLURM_CONF", found.environment["SLURM_CONF"])
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RETRIES", "9")
        patch.setattr(sys, "argv", ["l3d"])
        found.environment = dict(os.environ)
        shutil.copy(Path(__file__).with_name("interruptions.py"), work)
        config = str(Path(__file__).parents[2] / "configs/targets/tms.yaml")
        train_target(
            ["--config", config, "--trainer.enable_progress_bar", "false"], "runs/targets/tms_seed42.safetensors"
        )
        yield found


class Soak:
    """The run that is interrupted; one method for each kind, all of which wait until the run goes on."""

    def __init__(self, cluster: Cluster, run: Path, job: str, log: Path):
        self.cluster, self.run, self.job, self.log = cluster, run, job, log
        self.last, self.filler = run / "checkpoints/last.ckpt", run / "filler"
        self.random = random.Random(0)
        self.nodes = itertools.cycle(cluster.nodes)  # whose power is cut; the job's script runs on the first
        self.room_again = itertools.cycle((True, False))  # on a full disk, before anything else happens
        self.seen = 0  # characters of the log that were there before the present interruption
        self.lost = 0  # steps that had to be made again

    def text(self) -> str:
        """What the log says since the present interruption has begun."""
        return self.log.read_text()[self.seen :] if self.log.is_file() else ""

    def said(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.text())

    def wait_until_said(self, pattern: str) -> re.Match[str]:
        try:
            wait_for(pattern, lambda: self.said(pattern), WAIT)
        except TimeoutError:
            raise AssertionError(f"{pattern!r} is not in the log:\n{self.text()}") from None
        found = self.said(pattern)
        assert found is not None
        return found

    def interrupt(self, kind: str) -> str:
        """Returns what was done."""
        interruption: Callable[[], str] = {
            "before the time limit": self.signal,
            "SIGTERM": self.terminate,
            "kill -9": self.kill,
            "power cut": self.power_cut,
            "full disk": self.fill_the_disk,
            "damage": self.damage,
        }[kind]
        self.wait_for_a_moment(starting=kind in ("before the time limit", "kill -9", "power cut"))
        assert not (self.run / "finished").exists()
        self.seen = len(self.log.read_text())
        return interruption()

    def wait_for_a_moment(self, starting: bool) -> None:
        """Some time after the next checkpoint, or in a quarter of the cases, where that is allowed, at start-up."""
        self.starting = starting and self.random.random() < 0.25
        if self.starting:
            wait_for("the ranks", lambda: all(ranks_of(self.cluster, node) for node in self.cluster.nodes), WAIT)
            time.sleep(self.random.uniform(0, 4))
            return
        for _ in range(self.random.choice((1, 2))):
            before = self.saved_at()
            wait_for("a new checkpoint", lambda before=before: self.saved_at() > before, WAIT)
        time.sleep(self.random.uniform(0, 1))

    def saved_at(self) -> int:
        return self.last.stat().st_mtime_ns if self.last.exists() else 0

    def step_of(self, checkpoint: Path) -> int:
        import torch

        return int(torch.load(checkpoint / "meta.ckpt", weights_only=True)["global_step"])

    def wait_for_the_next_start(self, checkpoint: Path | None = None, allowed: int = EVERY + 2) -> None:
        """Until the run goes on, from the newest checkpoint (or the given one), with no more than that to do again.

        Args:
            allowed: steps: of a checkpoint, one that it is put off at the end of an epoch, one whose end was not seen.
        """
        wait_for("the end of the start", lambda: self.cluster.state(self.job) != "RUNNING", WAIT)
        checkpoint = checkpoint or (self.last if self.last.exists() else self.last.with_suffix(".ckpt.previous"))
        saved = self.step_of(checkpoint) if checkpoint.exists() else 0
        steps = [int(row["step"]) + 1 for row in rows_of(self.run / "metrics.csv") if row.get("train/loss")]
        self.wait_until_said(r"start \d+ on node\[1-2\]")
        lost = max([*steps, saved]) - saved
        assert lost <= allowed, f"{lost} steps lost:\n{self.text()}"
        self.lost += lost
        if saved:
            found = self.wait_until_said(r"l3d: goes on after step (\d+)")
            assert int(found[1]) == saved

    # -- the kinds --------------------------------------------------------------------------------------------------

    def signal(self) -> str:
        self.cluster("scancel", "--batch", "--signal=USR1", self.job)
        self.wait_until_said(r"== .* job \d+: the signal has come")
        self.wait_until_said(r"== .* job \d+: requeued \(exit code \d+\)")
        found = self.said(r"l3d: .* after step (\d+): saved \S+last.ckpt; go on with: l3d fit --config")
        self.wait_for_the_next_start()
        return f"saved after step {found[1]}" if found else "at start-up"

    def terminate(self) -> str:
        rank = self.random.choice((*self.cluster.nodes, None))
        if rank is None:
            self.cluster("scancel", "--signal=TERM", self.job)
        else:
            os.kill(*ranks_of(self.cluster, rank), signal.SIGTERM)
        found = self.wait_until_said(
            r"l3d: (SIGTERM|a signal to another rank) after step (\d+): saved \S+; go on with: l3d fit --config"
        )
        self.wait_until_said(r"requeued \(exit code 0\)")
        self.wait_for_the_next_start(allowed=0)
        return f"{'all ranks' if rank is None else f'the rank on {rank}'}, saved after step {found[2]}"

    def kill(self) -> str:
        node = self.random.choice(list(self.cluster.nodes))
        os.kill(*ranks_of(self.cluster, node), signal.SIGKILL)
        self.wait_until_said(rf"srun: error: {node}: task \d: Killed")
        if not self.starting:
            self.wait_until_said(r"l3d: error: another rank was lost|node\d: task \d: Terminated")
        self.wait_until_said(r"requeued \(exit code \d+\)")
        self.wait_for_the_next_start()
        return f"the rank on {node}"

    def power_cut(self) -> str:
        node = next(self.nodes)
        self.cluster.power_cut(node)
        wait_for("the node's failure", lambda: self.cluster.state(self.job) != "RUNNING", WAIT)
        self.cluster.node_up(node)
        self.wait_for_the_next_start()
        self.wait_until_said("DUE TO NODE FAILURE|the start before this one ended without a word")
        return node

    def fill_the_disk(self) -> str:
        """In turn: it goes on with more space; a signal comes while there is none."""
        self.fill()
        found = self.wait_until_said_filling(
            r"l3d: after step (\d+): checkpoint: \S+last.ckpt cannot be written "
            r"\(No space left on device on rank \d\); the one before it is kept; going on"
        )
        if next(self.room_again):
            self.filler.unlink()
            again = self.wait_until_said(r"l3d: after step (\d+): checkpoints can be written again")
            return f"nothing saved after step {found[1]}, saved again after step {again[1]}"
        self.cluster("scancel", "--batch", "--signal=USR1", self.job)
        self.wait_until_said_filling(r"after step \d+: saved nothing \(.*; the one before it is kept\); go on with")
        self.wait_until_said(r"requeued \(exit code \d+\)")
        self.filler.unlink()
        self.wait_for_the_next_start(allowed=STEPS)
        return f"nothing saved after step {found[1]}, nor at the signal that followed"

    def fill(self) -> None:
        """All of the disk but a few KiB, in which a checkpoint finds its beginning."""
        with open(self.filler, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, file.tell() - 4096 * self.random.randrange(6)))

    def wait_until_said_filling(self, pattern: str) -> re.Match[str]:
        """A checkpoint that was whole just before frees the room of an older one: until none is left."""
        end = time.monotonic() + WAIT
        while not self.said(pattern) and time.monotonic() < end:
            self.fill()
            time.sleep(0.5)
        return self.wait_until_said(pattern)

    def damage(self) -> str:
        """Slurm preempts the job; while it waits, its newest checkpoint is spoilt."""
        self.cluster("scontrol", "requeuehold", self.job)
        wait_for("the job to be held", lambda: self.cluster.state(self.job) == "PENDING", WAIT)
        shards = sorted(self.last.glob("shard-*"))
        victim = self.random.choice([*shards, self.last / "meta.ckpt", self.last / "manifest.json"])
        how = self.random.choice(["cut off", "one byte changed", "removed"])
        if victim.suffix == ".json":
            how = "cut off"
        if how == "cut off":
            os.truncate(victim, self.random.randrange(victim.stat().st_size))
        elif how == "one byte changed":
            content = bytearray(victim.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            victim.write_bytes(content)
        else:
            victim.unlink()
        self.cluster("scontrol", "release", self.job)
        before = self.last.with_name("last.ckpt.previous")
        self.wait_for_the_next_start(before, allowed=2 * EVERY + 2)
        found = self.wait_until_said(r"checkpoint: \S+last.ckpt is damaged .*; going on from the one before it, \S+")
        reason = re.search(r"\((.*)\)", found[0])
        assert reason is not None
        assert victim.name in reason[1]
        return f"{victim.name} {how}: {reason[1]}"


def test_twenty_interruptions(cluster: Cluster, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()

    def tell(text: str) -> None:
        with capsys.disabled():
            print(f"\n{time.monotonic() - began:5.0f} s  {text}", end="", file=sys.stderr, flush=True)

    whole = Path("runs/whole")
    job = slurm.submit(whole, FIT, ["--nodes=2", *SMALL])
    wait_for("the uninterrupted run", lambda: cluster.state(job) == "COMPLETED", WAIT)
    tell(f"uninterrupted: {STEPS} steps")

    run, paced = disk / "run", ["--trainer.callbacks+=interruptions.Paced", "--trainer.callbacks.go=go"]
    job = slurm.submit(run, [*FIT, *paced], ["--nodes=2", *SMALL, f"--output={Path.cwd()}/log"])
    assert job is not None
    soak = Soak(cluster, run, job, Path("log"))
    kinds = [kind for kind, number in KINDS.items() for _ in range(number)]
    soak.random.shuffle(kinds)
    kinds = kinds[: int(os.environ.get("SOAK", len(kinds)))]
    for number, kind in enumerate(kinds, 1):
        tell(f"{number:2} of {len(kinds)}  {kind}: {soak.interrupt(kind)}")
    Path("go").touch()
    wait_for("the end", lambda: cluster.state(job) == "COMPLETED", WAIT)
    soak.seen = 0
    tell(f"finished; {len(re.findall('start [0-9]+ on', soak.text()))} starts, {soak.lost} steps done again\n")

    assert soak.said("job \\d+: finished")
    assert "Traceback" not in soak.text()
    found, wanted = ((path / "decomposition/model.safetensors").read_bytes() for path in (run, whole))
    assert found == wanted
    assert rows_without_clock(run) == rows_without_clock(whole)
    assert [row["step"] for row in rows_of(run / "metrics.csv") if row["train/loss"]] == [str(i) for i in range(STEPS)]
    assert json.loads((run / "decomposition/config.json").read_text())["figures"]["steps"] == STEPS
    assert not [*run.glob("**/.*.writing"), *run.glob("**/version_*"), *run.glob("**/hpc_ckpt*")]
    assert [ranks_of(cluster, node) for node in cluster.nodes] == [[], []]


def rows_without_clock(run: Path) -> list[dict[str, str]]:
    rows = [
        {name: value for name, value in row.items() if value and name != "train/samples_per_second"}
        for row in rows_of(run / "metrics.csv")
    ]
    return [row for row in rows if row.keys() > {"step", "epoch"}]
