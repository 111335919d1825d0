"""One training step on a transformer: this engine against the published procedure, in one run.

    python benchmarks/step.py [--steps 5]                 the paper's setting; what fraction of the floor is reached
    python benchmarks/step.py --grow runs/benchmarks      step time and peak memory against n_v, width, batch, ...
    python benchmarks/step.py --large                     width 2048, n_v 1000: what the dense way could not hold
    python benchmarks/step.py --device cuda [--dtype bf16]

The paper's setting: GPT-Neo shape, 256 wide, 8 layers, vocabulary 10,000 (random weights); query, key, value and output
matrices and the output bias of layer 4; rank 25, n_v 100; 16 sequences x 16 token samples, random references.

- `ours`: extraction, loss and its gradients, AdamW, unit norms.
- `published`: re-implemented from the paper: `torch.func.jacrev` over the divergences of all tokens, dense gradients,
  einsum (torch orders it by opt_einsum), autograd, Adam, unit norms.
- `published, chunked`: the same with `jacrev(chunk_size=8)`, the fastest of 8, 32 and all at once on our machines.
- `vmap`: the same with `torch.func.vmap(grad)`, a forward pass for every token sample, in place of jacrev.

Each runs in a process of its own on one thread, in turns; medians of steps are compared, CPU seconds where the machine
is shared. Memory is the process's peak, Python and torch included.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from resident import resident
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from l3d_pl.gradients import GradientExtractor
from l3d_pl.step import decompose
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.frozen import freeze, select_parameters

K = 0.1


@dataclass(frozen=True)
class Setting:
    width: int = 256
    layers: int = 8
    heads: int = 16
    vocabulary: int = 10_000
    layer: int = 4
    sequences: int = 16
    positions: int = 16
    n_v: int = 100
    rank: int = 25
    memory_budget: float = 1.0
    device: str = "cpu"
    dtype: str = "fp32"


def target_of(setting: Setting) -> tuple[nn.Module, dict[str, Tensor]]:
    """The frozen target model, and its chosen parameters."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.width,
        num_layers=setting.layers,
        attention_types=[[["global", "local"], setting.layers // 2]],
        num_heads=setting.heads,
        max_position_embeddings=max(64, setting.positions),
        bos_token_id=0,
        eos_token_id=0,
    )
    model = freeze(GPTNeoForCausalLM(config).to(setting.device))
    return model, select_parameters(model, [f"transformer.h.{setting.layer}.attn.attention.*"])


def tokens_of(setting: Setting, step: int) -> Tensor:
    random = torch.Generator().manual_seed(step)
    shape = (setting.sequences, setting.positions)
    return torch.randint(0, setting.vocabulary, shape, generator=random).to(setting.device)


def ours(setting: Setting) -> Callable[[int], None]:
    model, chosen = target_of(setting)
    autocast = None if setting.dtype == "fp32" else setting.dtype
    extractor = GradientExtractor(model, chosen, "kl", "random", "token", autocast=autocast)
    shapes = {name: value.shape for name, value in chosen.items()}
    subnetworks = Subnetworks(shapes, setting.n_v, setting.rank, memory_budget=setting.memory_budget).to(setting.device)
    optimizer = torch.optim.AdamW(subnetworks.parameters(), lr=0.005, fused=True)
    random = torch.Generator().manual_seed(0)

    def step(index: int) -> None:
        extraction = extractor({"input_ids": tokens_of(setting, index)}, random)
        loss = decompose(subnetworks, subnetworks.prepare(extraction.gradients), K).loss.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        subnetworks.normalise_()

    return step


class Published:
    """V_in and V_out as Tucker tensors by name; dense gradients; everything by autograd."""

    def __init__(self, setting: Setting, use_vmap: bool = False, chunk_size: int | None = None):
        self.setting, self.use_vmap, self.chunk_size = setting, use_vmap, chunk_size
        self.model, self.weights = target_of(setting)
        self.model.set_attn_implementation("eager")  # type: ignore[operator]  # torch.func knows no fused attention
        self.out, self.into = ({name: self.start(value) for name, value in self.weights.items()} for _ in range(2))
        self.optimizer = torch.optim.Adam(
            [t for side in (self.into, self.out) for ts in side.values() for t in ts], lr=0.005
        )

    def start(self, value: Tensor) -> list[Tensor]:
        n, ranks = self.setting.n_v, [min(self.setting.rank, size) for size in value.shape]
        shapes = [(n, *ranks), *((n, size, rank) for size, rank in zip(value.shape, ranks, strict=True))]
        return [torch.randn(shape, device=value.device).div_(n).requires_grad_() for shape in shapes]

    @staticmethod
    def contract(gradients: Tensor, tensors: list[Tensor]) -> Tensor:
        """<gradients [N, ...], every subnetwork> [N, n]."""
        core, *factors = tensors
        equation = "bij,npq,nip,njq->bn" if len(factors) == 2 else "bi,np,nip->bn"
        return torch.einsum(equation, gradients, core, *factors)

    @staticmethod
    def expand(codes: Tensor, tensors: list[Tensor]) -> Tensor:
        core, *factors = tensors
        equation = "bn,npq,nip,njq->bij" if len(factors) == 2 else "bn,np,nip->bi"
        return torch.einsum(equation, codes, core, *factors)

    @staticmethod
    def norms(tensors: list[Tensor]) -> Tensor:
        core, *factors = tensors
        dense = (
            torch.einsum("npq,nip,njq->nij", core, *factors)
            if len(factors) == 2
            else torch.einsum("np,nip->ni", core, *factors)
        )
        return dense.flatten(1).square().sum(1)

    def logits(self, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, weights, (), {"input_ids": tokens, "use_cache": False}).logits

    def gradients(self, tokens: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = self.logits({}, tokens).flatten(0, 1)
            references = outputs[torch.randperm(len(outputs))].log_softmax(-1)

        def divergences(log_probabilities: Tensor, references: Tensor) -> Tensor:
            return (references.exp() * (references - log_probabilities)).sum(-1)

        if not self.use_vmap:
            return torch.func.jacrev(
                lambda weights: divergences(self.logits(weights, tokens).flatten(0, 1).log_softmax(-1), references),
                chunk_size=self.chunk_size,
            )(self.weights)
        positions = tokens.shape[1]

        def of_sample(weights: dict[str, Tensor], sequence: Tensor, place: Tensor, reference: Tensor) -> Tensor:
            logits = self.logits(weights, sequence.unsqueeze(0))[0].index_select(0, place)[0]
            return divergences(logits.log_softmax(-1), reference)

        places = torch.arange(positions, device=tokens.device).repeat(len(tokens)).unsqueeze(1)
        return torch.func.vmap(torch.func.grad(of_sample), in_dims=(None, 0, 0, 0), chunk_size=64)(
            self.weights, tokens.repeat_interleave(positions, 0), places, references
        )

    def __call__(self, index: int) -> None:
        gradients = self.gradients(tokens_of(self.setting, index))
        c = torch.stack([self.contract(g, self.into[name]) for name, g in gradients.items()]).sum(0)
        kept = c.detach().abs().flatten().topk(max(1, round(K * c.numel()))).indices
        codes = c * torch.zeros(c.numel(), device=c.device).index_fill_(0, kept, 1.0).view_as(c)
        error = sum(((g - self.expand(codes, self.out[name])) ** 2).sum() for name, g in gradients.items())
        loss = error / sum((g**2).sum() for g in gradients.values())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        self.optimizer.step()
        with torch.no_grad():
            scale = torch.stack([self.norms(tensors) for tensors in self.out.values()]).sum(0).rsqrt()
            for tensors in self.out.values():
                tensors[0].mul_(scale.view(-1, *[1] * (tensors[0].ndim - 1)))


PROGRAMS: dict[str, Callable[[Setting], Callable[[int], None]]] = {
    "ours": ours,
    "published": Published,
    "published, chunked": lambda setting: Published(setting, chunk_size=8),
    "vmap": lambda setting: Published(setting, use_vmap=True),
}


def work(program: str, setting: Setting, steps: int) -> dict[str, Any]:
    """In a process of its own: seconds of each step after the first, CPU seconds, peak memory, operations of a step."""
    torch.set_num_threads(1)
    cuda = setting.device.startswith("cuda")
    step = PROGRAMS[program](setting)
    step(0)
    wall, cpu = [], []
    for index in range(1, steps + 1):
        if cuda:
            torch.cuda.synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        step(index)
        if cuda:
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    peak = resident("VmHWM") / 2**30
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
    flop = 0
    if program == "ours":
        with FlopCounterMode(display=False) as counter:
            step(0)
        flop = counter.get_total_flops()
    return {"wall": wall, "cpu": cpu, "peak_gib": peak, "flop": flop, "matmul": matmul_rate(setting)}


def matmul_rate(setting: Setting, size: int = 0) -> float:
    """Floating-point operations per second of a large square matrix product, the best of five."""
    cuda = setting.device.startswith("cuda")
    size = size or (8192 if cuda else 1024)
    a = torch.randn(size, size, device=setting.device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter() if cuda else time.process_time()
        (a @ a).sum()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() if cuda else time.process_time()) - start)
    return 2 * size**3 / best


def run(program: str, setting: Setting, steps: int) -> dict[str, Any]:
    """`work` in a new process."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        program,
        "--setting",
        json.dumps(asdict(setting)),
        "--steps",
        str(steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(setting: Setting, steps: int, rounds: int) -> None:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
    for number in range(rounds):
        for name in PROGRAMS:
            print(f"round {number + 1} of {rounds}: {name} ...", file=sys.stderr, flush=True)
            results[name].append(run(name, setting, steps if name == "ours" else 1))
    clock = "wall" if setting.device.startswith("cuda") else "cpu"
    medians = {}
    print(f"| program | {clock} s per step | peak GiB | times ours |\n|---|---|---|---|")
    for name, parts in results.items():
        good = [part for part in parts if "failed" not in part]
        if not good:
            print(f"| {name} | {parts[0]['failed']} | | |")
            continue
        medians[name] = statistics.median(second for part in good for second in part[clock])
        peak = max(part["peak_gib"] for part in good)
        print(f"| {name} | {medians[name]:.3g} | {peak:.2f} | {medians[name] / medians['ours']:.1f} |")
    best = results["ours"][0]
    floor = best["flop"] / best["matmul"]
    print(
        f"\nours: {best['flop'] / 1e9:.1f} GFLOP in matrix products. At {best['matmul'] / 1e9:.0f} GFLOP/s, the rate "
        f"of a large one here, they take {floor:.2f} s: {floor / medians['ours']:.0%} of that speed is reached"
    )


GROWTH: dict[str, list[int]] = {
    "n_v": [50, 100, 200, 500, 1000, 2000],
    "width": [128, 256, 512, 1024],
    "sequences": [4, 8, 16, 32, 64],
    "positions": [8, 16, 32, 64],
    "rank": [2, 5, 10, 25, 50],
}


def grow(setting: Setting, folder: Path, steps: int) -> None:
    """Time and memory against one quantity at a time: a table, a JSON file and a plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    clock = "wall" if setting.device.startswith("cuda") else "cpu"
    rows: list[dict[str, Any]] = []
    figure, axes = plt.subplots(2, len(GROWTH), figsize=(3.2 * len(GROWTH), 5.5), sharex="col")
    print(f"| quantity | value | {clock} s per step | peak GiB | exponent of time |\n|---|---|---|---|---|")
    for column, (name, values) in enumerate(GROWTH.items()):
        times, peaks, done = [], [], []
        for value in values:
            result = run("ours", replace(setting, **{name: value}), steps)
            if "failed" in result:
                print(f"| {name} | {value} | {result['failed']} | | |", flush=True)
                continue
            done.append(value)
            times.append(statistics.median(result[clock]))
            peaks.append(result["peak_gib"])
            exponent = math.log(times[-1] / times[-2]) / math.log(done[-1] / done[-2]) if len(done) > 1 else math.nan
            print(f"| {name} | {value} | {times[-1]:.3g} | {peaks[-1]:.2f} | {exponent:.2f} |", flush=True)
            rows.append({"quantity": name, "value": value, "seconds": times[-1], "peak_gib": peaks[-1]})
        for row, (series, label) in enumerate(((times, f"{clock} s per step"), (peaks, "peak GiB"))):
            axes[row, column].loglog(done, series, "o-")
            axes[row, column].minorticks_off()
            axes[row, column].set_xticks(done, [str(value) for value in done])
            axes[row, column].set(xlabel=name if row else None, ylabel=None if column else label)
            axes[row, column].grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(folder / "growth.png", dpi=120)
    (folder / "growth.json").write_text(json.dumps({"setting": asdict(setting), "rows": rows}, indent=1))
    print(f"\nplot: {folder / 'growth.png'}, rows: {folder / 'growth.json'}")


def large(setting: Setting) -> None:
    setting = replace(setting, width=2048, layers=2, layer=1, n_v=1000, rank=4, sequences=4)
    result = run("ours", setting, 1)
    if "failed" in result:
        raise SystemExit(f"failed: {result['failed']}")
    n_w = 4 * setting.width**2
    samples = setting.sequences * setting.positions
    dense = 4 * n_w * (samples * 2 + setting.n_v * 4) / 2**30
    print(
        f"width {setting.width}, n_v {setting.n_v}, rank {setting.rank}, four matrices, {samples} token samples: "
        f"{result['wall'][0]:.1f} s a step, peak {result['peak_gib']:.2f} GiB; dense gradients, residuals, V_in, V_out "
        f"and their gradients alone would take {dense:.0f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps of ours in each round (of the others: 1)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the frozen model's pass")
    parser.add_argument("--grow", type=Path, default=None, metavar="DIR")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--setting", default=None, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.worker:
        print(json.dumps(work(known.worker, Setting(**json.loads(known.setting)), known.steps)))
        return
    setting = Setting(device=known.device, dtype=known.dtype)
    if known.grow:
        grow(setting, known.grow, known.steps)
    elif known.large:
        large(setting)
    else:
        compare(setting, known.steps, known.rounds)


if __name__ == "__main__":
    main()
