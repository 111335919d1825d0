"""Processes of a test: they end with it, in whatever way it ends."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def run(command: Sequence[str], seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command line of the project, one thread per process; it and all that it starts end with this call.

    Raises:
        AssertionError: it fails; the end of what it wrote.
        TimeoutExpired: it takes longer than `seconds`.
    """
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, (output + errors)[-3000:]
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def l3d(arguments: Sequence[str], log: Path, **environment: str) -> BaseProcess:
    """Start `l3d ARGUMENTS` in a process of its own, without the seconds of its imports; `log` is what it prints.

    Its working directory is not this one.
    """
    process = _forkserver().Process(target=_l3d, args=(list(arguments), log, environment))
    process.start()
    return process


def _l3d(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    from l3d_pl.cli import main

    os.environ.update(environment)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["l3d", *arguments]
    sys.exit(main(arguments))


def _forkserver() -> ForkServerContext:
    """Whose processes find imported what takes long."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "l3d_pl.lightning_cli"])
    return context


def on_ranks(size: int, folder: Path, function: Callable[..., None], *args: Any, seconds: float = 200) -> None:
    """Call a function in `size` gloo processes; what fails in any of them fails here, and ends all."""
    store = folder / f"store{len(list(folder.glob('store*')))}"
    _together(_with_group, size, (size, str(store), function, args), seconds)


def _with_group(rank: int, size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)  # then a process that waits for the others gives up
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.FileStore(store, size), timeout=patience)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


def script(file: Path, size: int, *arguments: str, seconds: float) -> None:
    """Run a script in `size` processes, as torchrun starts them but without the seconds of its imports."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    _together(_as_main, size, (size, port, str(file), arguments), seconds)


def _as_main(rank: int, size: int, port: int, file: str, arguments: tuple[str, ...]) -> None:
    if size > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in variables.items()})
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def _together(function: Callable[..., None], size: int, args: tuple[Any, ...], seconds: float) -> None:
    _forkserver()
    until = time.monotonic() + seconds
    started = mp.start_processes(function, args, nprocs=size, join=False, start_method="forkserver")
    try:
        while not started.join(timeout=5):
            assert time.monotonic() < until, f"{size} ranks have not ended within {seconds} s"
    finally:
        for process in started.processes:
            process.kill()
