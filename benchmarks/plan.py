"""`l3d plan` against what a run takes: peak memory of a few real steps on the CPU, in a new process each.

    python benchmarks/plan.py            three settings, a table
    python benchmarks/plan.py cnn        one of them

Memory is what the process has resident at the most, above what it had before the target was built (`ru_maxrss`).
What is freed goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`): what glibc would keep is no figure of ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

COMMON = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.max_steps",
    "4",
    "--trainer.log_every_n_steps",
    "2",
    "--threads",
    "1",
]
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


def measure(name: str) -> None:
    """In a process of its own: a few steps; prints the peak in bytes."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    from l3d_pl.lightning_cli import L3DCLI

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
            if trainer.global_step == 3:
                print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
                os._exit(0)

    class Measured(L3DCLI):
        def before_instantiate_classes(self) -> None:
            nonlocal before
            super().before_instantiate_classes()
            for module in ("transformers.models.llama.modeling_llama", "datamodules.text", "datamodules.digits"):
                importlib.import_module(module)
            linear = torch.nn.Linear(8, 8)  # what torch sets up once
            linear(torch.randn(4, 8)).sum().backward()
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        def fit(self, model: Any, **kwargs: Any) -> None:
            self.trainer.callbacks.append(Stop())  # type: ignore[attr-defined]
            self.trainer.fit(model, **kwargs)

    before = 0
    Measured(["fit", *SETTINGS[name], *COMMON])


def compare(name: str) -> tuple[dict[str, Any], int]:
    """The plan's entry for one process, and the measured peak in bytes."""
    from l3d_pl.cli import main as l3d

    with redirect_stdout(StringIO()) as out:
        l3d(["plan", *SETTINGS[name], *COMMON, "--json"])
    plan = json.loads(out.getvalue())["strategies"][0]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return plan, int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.measure:
        measure(known.measure)
        return
    names = known.names or list(SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        print("| setting | planned GB | in | measured GB | planned / measured |\n|---|---|---|---|---|")
        for name in names:
            plan, measured = compare(name)
            planned = plan["peak"]
            print(
                f"| {name} | {planned / 1e9:.3f} | {plan['when']} | {measured / 1e9:.3f} | {planned / measured:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
