"""`l3d plan` against what a run takes: peak memory of a few real steps, in a new process each.

    python benchmarks/plan.py                  three settings on the CPU, a table
    python benchmarks/plan.py cnn              one of them
    python benchmarks/plan.py --device cuda    on one GPU, under every strategy, with the time of a step

Memory on the CPU is what the process has resident at the most, above what it had before the target was built
(`VmHWM`). What is freed goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`): what glibc would keep is no
figure of ours. On a GPU it is what torch's allocator has given out at the most.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from resident import resident

STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
STEPS = {"cpu": 3, "cuda": 20}  # of a run
TEXT = ["--data", "datamodules.text.TextData", "--data.source", "text.jsonl", "--data.tokenizer", "llama"]
HUB = "l3d_pl.targets.hub.language_model"

SETTINGS: dict[str, list[str]] = {
    # attention of a GPT-Neo, one sample per token, V large
    "gpt_neo": [
        *("--model.target", "l3d_pl.targets.language.gpt_neo", "--model.target.width", "256"),
        *("--model.parameters", "transformer.h.2.attn.attention.*_proj.weight", "--model.sample", "token"),
        *("--model.n_subnetworks", "500", "--model.ranks", "16", "--model.recipe", "paper", "--model.divergence", "kl"),
        *(*TEXT, "--data.length", "16", "--data.batch_size", "16"),
    ],
    # a convolutional block and linear layers, with a random start: dense and factored parameters
    "cnn": [
        *("--model.target", "l3d_pl.targets.digits.DigitsCNN", "--model.parameters", "['conv2.*', 'bn2.*', 'fc*']"),
        *(
            "--model.n_subnetworks",
            "8000",
            "--model.ranks",
            "0.2",
            "--model.recipe",
            "paper",
            "--model.divergence",
            "kl",
        ),
        *("--data", "datamodules.digits.DigitsData", "--data.batch_size", "256"),
    ],
    # all attention blocks of a Llama, few subnetworks: D, A and the anchors are what is large
    "llama": [
        *("--model.target", HUB, "--model.target.pretrained", "llama"),
        *("--model.parameters", "model.layers.*.self_attn.*_proj.weight", "--model.sample", "token"),
        *("--model.n_subnetworks", "100", "--model.ranks", "8", "--model.init_samples", "300"),
        *("--model.swap_samples", "100", "--model.divergence", "kl"),
        *(*TEXT, "--data.length", "16", "--data.batch_size", "16"),
    ],
}


def prepare() -> None:
    """A Llama with random weights and a tokenizer, and a text, in the working directory."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from datamodules.text import pydoc_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained("llama")
    AutoTokenizer.from_pretrained(pydoc_tokenizer(500)).save_pretrained("llama")
    words = ["once", "there", "was", "a", "little", "cat", "who", "liked", "the", "warm", "mat", "and", "birds"]
    lines = (json.dumps({"text": " ".join(words[(i * j) % 13] for j in range(1, 40))}) for i in range(1000))
    Path("text.jsonl").write_text("\n".join(lines))


def arguments(name: str, device: str, strategy: str) -> list[str]:
    """Of `l3d fit` and `l3d plan`."""
    accelerator = "cpu" if device == "cpu" else "gpu"
    words = f"--trainer.accelerator {accelerator} --trainer.max_steps {STEPS[device] + 1} --trainer.log_every_n_steps 2"
    return [*SETTINGS[name], *words.split(), "--trainer.strategy", strategy, "--threads", "1"]


def measure(name: str, device: str, strategy: str) -> None:
    """In a process of its own: a few steps; prints the peak in bytes and the median seconds of a step."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    from l3d_pl.lightning_cli import L3DCLI

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Stop(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.start = now()

        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            seconds.append(now() - self.start)
            if trainer.global_step == STEPS[device]:
                peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before
                print(
                    json.dumps({"peak": peak, "seconds": statistics.median(seconds[len(seconds) // 2 :])}), flush=True
                )
                os._exit(0)

    class Measured(L3DCLI):
        def before_instantiate_classes(self) -> None:
            nonlocal before
            super().before_instantiate_classes()
            for module in ("transformers.models.llama.modeling_llama", "datamodules.text", "datamodules.digits"):
                importlib.import_module(module)
            linear = torch.nn.Linear(8, 8)  # what torch sets up once
            linear(torch.randn(4, 8)).sum().backward()
            before = resident("VmRSS")

        def fit(self, model: Any, **kwargs: Any) -> None:
            self.trainer.callbacks.append(Stop())  # type: ignore[attr-defined]
            self.trainer.fit(model, **kwargs)

    before, seconds = 0, list[float]()
    Measured(["fit", *arguments(name, device, strategy)])


def compare(name: str, device: str = "cpu", strategy: str = "auto") -> tuple[dict[str, Any], dict[str, float]]:
    """The plan's entry for one process, and what was measured."""
    from l3d_pl.cli import main as l3d

    with redirect_stdout(StringIO()) as out:
        l3d(["plan", *arguments(name, device, strategy), "--json"])
    plans = json.loads(out.getvalue())["strategies"]
    plan = next((plan for plan in plans if plan["strategy"] == strategy), plans[0])  # (one process: no DDP, no shards)
    done = subprocess.run(
        [sys.executable, __file__, name, "--device", device, "--strategies", strategy, "--worker"],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"{name} under {strategy}: {done.stderr[-2000:]}")
    return plan, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--device", default="cpu", choices=list(STEPS))
    parser.add_argument("--strategies", nargs="+", default=None, help=f"default: auto, and on a GPU {STRATEGIES}")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    known = parser.parse_args()
    strategies = known.strategies or (["auto", *STRATEGIES] if known.device == "cuda" else ["auto"])
    if known.worker:
        measure(known.names[0], known.device, strategies[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        print("| setting | strategy | planned GB | in | measured GB | planned / measured | ms a step |")
        print("|---|---|---|---|---|---|---|")
        for name in known.names or list(SETTINGS):
            for strategy in strategies:
                plan, measured = compare(name, known.device, strategy)
                planned, peak = plan["peak"] / 1e9, measured["peak"] / 1e9
                print(
                    f"| {name} | {strategy} | {planned:.3f} | {plan['when']} | {peak:.3f} | {planned / peak:.2f} "
                    f"| {1e3 * measured['seconds']:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
