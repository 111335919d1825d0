"""A real Slurm of several nodes on one machine: Debian's packages, loopback only, no systemd, no cgroups.

Each node's slurmd runs in its own mount, host-name and process namespaces, so that a node has a name of its own, and
killing its first process is a power cut. Everything started here dies with this process, however that ends.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "setpriv")
# slurmd believes the configuration, not the hardware: the nodes share the same cores. cred_expire is also how long a
# requeued job waits, which is two minutes by default. File descriptors, core size and so on come from who submits.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=7200
PropagateResourceLimits=ALL
PartitionName=main Nodes=ALL Default=YES DefaultTime=60
"""


def missing() -> str:
    """Why there can be no cluster here, in a few words; empty if there can."""
    if os.geteuid() != 0:
        return "a cluster of its own needs root"
    programs = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"no {', '.join(programs)} (apt-get install slurm-wlm munge)" if programs else ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(what: str, check: Callable[[], object], seconds: float = 60) -> None:
    """Until `check` is true; after `seconds`, a TimeoutError that names `what`."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not in {seconds:g} s")
        time.sleep(0.1)


class Cluster:
    """The cluster's files and processes; a context manager.

    Args:
        folder: for its files; a short path (sockets).
        nodes, cpus: how many, and what each pretends to have.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4):
        self.folder, self.nodes = folder, {f"node{i}": free_port() for i in range(1, nodes + 1)}
        self.cpus = cpus
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        config = CONFIG.format(host=host, folder=self.folder, controller_port=free_port())
        for node, port in self.nodes.items():
            config += f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory=4000 State=UNKNOWN\n"
        (self.folder / "slurm.conf").write_text(config)
        hosts = f"127.0.0.1 localhost {host} {' '.join(self.nodes)}\n"
        (self.folder / "hosts").write_text(hosts)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        try:
            options = [
                f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
            ]
            self._start("munged", ["munged", "--foreground", "--force", f"--key-file={key}", *options])
            wait_for("munged", (self.folder / "munge.socket").exists)
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in self.nodes:
                self.node_up(node)
            wait_for(
                "two idle nodes", lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(self.nodes))
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.nodes, "slurmctld", "munged"):
            self._end(name)
        try:
            wait_for("the end of all that was started", lambda: not self.programs(), 10)
        except TimeoutError as error:
            left = self.programs()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"left running: {left}") from error

    def _start(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self.processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
            )

    def _end(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait(30)

    def node_up(self, node: str) -> None:
        inside = f"mount --bind {self.folder}/hosts /etc/hosts && hostname {node} && slurmd -D -N {node}; exit $?"
        namespaces = [
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            "--propagation=private",
        ]
        self._start(node, ["unshare", *namespaces, "bash", "-c", inside])

    def power_cut(self, node: str) -> None:
        """Everything on the node is gone at once."""
        self._end(node)

    def __call__(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a command prints, run against this cluster."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def state(self, job: str) -> str:
        """State of a job or an array's task, as Slurm says it: `RUNNING`, `COMPLETED`, `TIMEOUT`."""
        rows = self("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows).get(job, "")

    def programs(self, *variables: str) -> dict[int, str]:
        """Processes of this cluster, and of whoever asks it, as {process id: command}; those with these variables."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if {f"SLURM_CONF={self.folder}/slurm.conf", *variables} <= set(environment):
                found[int(process.name)] = command
        return found


def ranks_of(cluster: Cluster, node: str) -> list[int]:
    """Process ids of the ranks on a node, as this machine counts them."""
    here = cluster.programs(f"SLURMD_NODENAME={node}").items()
    return [pid for pid, command in here if "/l3d fit" in command and not command.startswith("srun")]
