"""Memory, bytes sent and time per step of every strategy on 1, 2 and 4 ranks, against formulas and `l3d plan`.

    python benchmarks/scaling.py [--strategies ddp fsdp2 ...] [--ranks 1 2 4] [--steps 8] [--output runs/benchmarks]

A multilayer perceptron, 3 layers of 1024 x 1024, n_v 600 of rank 2: what is kept of V dominates. 64 samples a step over
all ranks, random references, no start from gradients and no swaps. CPU and gloo, one thread a rank.

- `held`: bytes of V_in, V_out and AdamW's state on a rank between two steps (all tensors that there are, without the
  target's). Gradients are there within a step only; under DeepSpeed's stage 3 its master's are kept.
- `peak`: what the process's resident memory has grown by from before V to its highest, beside what `l3d plan` says of
  it. What is freed goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`), where glibc would keep some.
- `sent`: what goes over the loopback device in a step, by a rank. Each run has a network of its own (`unshare --net`,
  which takes root); where that cannot be had, other programs' packets count too.
- `seconds`: CPU seconds of a rank's step, median. The ranks share the machine's cores.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from resident import resident
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from datamodules.loading import InMemoryData, Rows
from l3d_pl import L3D
from l3d_pl.parallel import Ranks
from l3d_pl.plan.strategies import Planner, World, bytes_sent
from l3d_pl.toys import quiet_trainer

WIDTH, LAYERS, N_V, RANK, SAMPLES = 1024, 3, 600, 2, 64
STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def formulas(strategy: str, ranks: int) -> dict[str, float]:
    """Bytes held and sent by a rank."""
    side = 4.0 * N_V * LAYERS * (2 * WIDTH * RANK + RANK * RANK)
    shards = ranks if strategy == "fsdp2" else 1
    captured, codes = 4.0 * SAMPLES // ranks * LAYERS * 2 * WIDTH, 4.0 * SAMPLES * N_V / ranks
    sent = bytes_sent(strategy, 2 * side / shards, ranks, shards, captured, codes, nccl=False)
    kept = {"ddp": 6.0, "fsdp2": 6 / ranks, "deepspeed_stage_3": 10 / ranks}.get(strategy, 2 + 6 / ranks)
    return {"held": kept * side, "sent": sum(sent.values())}


def planned(strategy: str, ranks: int) -> dict[str, float]:
    """What `l3d plan` says of the same, and of the peak; without the target, which is there before."""
    with torch.device("meta"):
        batch = {"inputs": torch.zeros(SAMPLES // ranks, WIDTH)}
        planner = Planner(decomposition(perceptron()), batch, World(1, ranks, cuda=False))
    plans = {plan.strategy: plan for plan in planner.plans() if plan.shards in (1, ranks)}
    plan = plans.get(strategy) or plans["auto"]  # (one rank: no DDP, no shards)
    held = plan.memory["V"] + plan.memory["optimizer"]
    return {"held": held, "sent": sum(plan.sent.values()), "peak": plan.peak - plan.memory["target"]}


def perceptron() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def decomposition(target: nn.Module) -> L3D:
    return L3D(target, "*", N_V, ranks=RANK, init="random", swap_every=0, k_start=1.0, seed=0)


class Data(InMemoryData):
    def setup(self, stage: str | None = None) -> None:
        rows = torch.randn(SAMPLES * 64, WIDTH, generator=torch.Generator().manual_seed(0))
        self.train = self.validation = self.test = Rows(inputs=rows)


def bytes_held() -> int:
    """Of all tensors that there are."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def loopback() -> int:
    """Bytes that the loopback device has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


class Meter(Callback):
    """Takes the figures of the steps from `first` on."""

    def __init__(self, steps: int, first: int = 3):
        self.first, self.last, self.found = first, first + steps, {}
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self.first:
            self.seconds.append(time.process_time() - self.clock)
        if trainer.global_step in (self.first, self.last):
            trainer.strategy.barrier()
            name = "sent_before" if trainer.global_step == self.first else "sent_after"
            self.found[name] = loopback()
            trainer.strategy.barrier()
        if trainer.global_step == self.last:
            self.found["held"] = bytes_held()


def worker(strategy: str, ranks: int, steps: int, out: str) -> None:
    """One rank (Lightning starts the others as this same command)."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    target = perceptron()
    data, meter = Data(SAMPLES // ranks, seed=0), Meter(steps)
    data.setup()
    if strategy.startswith("deepspeed"):
        importlib.import_module("deepspeed")
    linear = nn.Linear(8, 8)  # what torch sets up once
    linear(torch.randn(4, 8)).sum().backward()
    before, started = bytes_held(), resident("VmHWM")
    trainer = quiet_trainer(
        devices=ranks,
        strategy=strategy if ranks > 1 or strategy != "ddp" else "auto",
        max_steps=meter.last,
        limit_val_batches=0,
        callbacks=[meter],
    )
    trainer.fit(decomposition(target), data)
    found = {
        "held": meter.found["held"] - before,
        "peak": resident("VmHWM") - started,
        "sent": (meter.found["sent_after"] - meter.found["sent_before"]) / steps / ranks,
        "seconds": statistics.median(meter.seconds),
    }
    everyone = Ranks.of_run().gather(found)
    if trainer.is_global_zero:
        Path(out).write_text(json.dumps({key: max(rank[key] for rank in everyone) for key in found}))


def measure(strategy: str, ranks: int, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, __file__, "--worker", strategy, str(ranks), str(steps), str(out)]
        if os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip"):
            command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        if not out.exists():
            raise SystemExit(f"{strategy} on {ranks} ranks failed, exit {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.worker:
        strategy, ranks, steps, out = known.worker
        worker(strategy, int(ranks), int(steps), out)
        return
    table = Table(
        "strategy",
        "ranks",
        "held, MiB",
        "formula",
        "peak, MiB",
        "planned",
        "sent, MiB a step",
        "formula",
        "CPU s a step",
    )
    cases = [(strategy, ranks) for strategy in known.strategies for ranks in known.ranks]
    known.output.mkdir(parents=True, exist_ok=True)
    with open(known.output / "scaling.jsonl", "w") as file:
        measured = []
        for strategy, ranks in track(cases, "measuring"):
            expected = formulas(strategy, ranks) | {"peak": planned(strategy, ranks)["peak"]}
            measured.append((strategy, ranks, measure(strategy, ranks, known.steps), expected))
            print(
                json.dumps(dict(zip(("strategy", "ranks", "found", "formula"), measured[-1], strict=True))), file=file
            )
            file.flush()
    for strategy, ranks, found, expected in measured:
        mib = [pair[key] for key in ("held", "peak", "sent") for pair in (found, expected)]
        table.add_row(strategy, str(ranks), *(f"{value / 2**20:.1f}" for value in mib), f"{found['seconds']:.2f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
