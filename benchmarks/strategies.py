"""Shipped configs, fitted to their end under every strategy: held-out L, samples per second, peak memory.

    python benchmarks/strategies.py --accelerator gpu                       one GPU
    python benchmarks/strategies.py --accelerator cpu --devices 2 --configs tms --strategies ddp fsdp2
    python benchmarks/strategies.py --accelerator gpu -- --model.autocast bf16     further arguments of `l3d fit`

Each fit is a process of its own; its target is trained first where its file is not there. Samples per second are the
median over the logged intervals, start, swaps and validation left out where they fall between two. Peak memory is what
torch's allocator gave out at the most on a GPU (rank 0), and the process's largest resident size on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from resident import resident
from rich.console import Console
from rich.progress import track
from rich.table import Table

from l3d_pl.cli import find_config

CONFIGS = ("digits_cnn", "pydoc_lm")
STRATEGIES = ("auto", "ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def worker(out: str, arguments: list[str]) -> None:
    """One fit; rank 0 writes what was measured."""
    import torch

    from l3d_pl.lightning_cli import L3DCLI

    cli = L3DCLI(["fit", *arguments])
    if not cli.trainer.is_global_zero:
        return
    peak = resident("VmHWM")
    if cli.trainer.strategy.root_device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    root = Path(cli.trainer.default_root_dir)
    with open(root / "metrics.csv", newline="") as file:
        rates = [float(rate) for row in csv.DictReader(file) if (rate := row["train/samples_per_second"])]
    figures = json.loads((root / "decomposition" / "config.json").read_text())["figures"]
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "loss": figures["val/loss"],
        "steps": cli.trainer.global_step,
        "rate": statistics.median(rates),
        "seconds": cli.seconds,
        "peak": peak,
    }
    Path(out).write_text(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("runs/benchmarks/strategies"))
    parser.add_argument("more", nargs="*", help="after `--`: arguments of `l3d fit`")
    known = parser.parse_args()
    table = Table("config", "strategy", "held-out L", "steps", "samples/s", "s of the fit", "peak, MiB")
    cases = [(config, strategy) for config in known.configs for strategy in known.strategies]
    for config, strategy in track(cases, "fitting", console=Console(stderr=True)):
        root = known.root / f"{config}_{strategy}_{int(time.time())}"
        root.mkdir(parents=True)
        words = f"--config {find_config(config)} --trainer.strategy {strategy} --trainer.devices {known.devices}"
        words += f" --trainer.accelerator {known.accelerator} --trainer.enable_progress_bar false"
        arguments = [*words.split(), "--trainer.default_root_dir", str(root), *known.more]
        command = [sys.executable, __file__, "--worker", str(root / "measured.json"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (root / "measured.json").exists():
            raise SystemExit(f"{config} under {strategy} failed, exit {done.returncode}:\n{done.stderr[-3000:]}")
        found = json.loads((root / "measured.json").read_text())
        figures = [f"{found['loss']:.4f}", str(found["steps"]), f"{found['rate']:,.0f}", f"{found['seconds']:.1f}"]
        table.add_row(config, strategy, *figures, f"{found['peak'] / 2**20:.0f}")
        print(json.dumps({"config": config, "strategy": strategy} | found), file=sys.stderr, flush=True)
    print(f"{known.devices} x {found['device']}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
