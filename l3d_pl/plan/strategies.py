"""What a run takes under a strategy, on the rank that needs most."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from l3d_pl.errors import L3DError
from l3d_pl.gradients import OuterGradient
from l3d_pl.lightning_module import L3D
from l3d_pl.parallel import ALONE
from l3d_pl.plan.costs import StepCosts, step_costs
from l3d_pl.plan.shapes import Absent, repeated, sides_of, trace_extraction
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.frozen import layers_of
from l3d_pl.tucker import CHUNK

FLOP_PER_BYTE = 1000  # a byte sent counts as so many FLOP, to compare strategies: 25 TFLOP/s beside 25 GB/s
DEEPSPEED_BUCKET = 200_000_000  # values, at most, in each of its two buffers for reducing (Lightning's default)


@dataclass
class Plan:
    """What a strategy takes, per GPU.

    Attributes:
        strategy: as `--trainer.strategy` names it.
        data, shards: ranks along the data axis and along that of the subnetworks.
        memory: bytes by what they hold.
        peak: bytes at the most, and `when`.
        host: bytes of a node's own memory.
        flop: of a step.
        sent: bytes that a rank sends per step, by what they are.
        seconds: of a step, None: not told.
        hours: of all steps.
        fits: None: no memory was given.
    """

    strategy: str
    data: int
    shards: int
    memory: dict[str, int]
    peak: int
    when: str
    host: int
    flop: int
    sent: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    hours: float | None = None
    fits: bool | None = None

    @property
    def name(self) -> str:
        return f"{self.strategy} {self.data} x {self.shards}" if self.strategy == "fsdp2" else self.strategy

    def arguments(self, world: World) -> list[str]:
        """Of `l3d fit`, for a run under it."""
        words = ["--trainer.num_nodes", str(world.nodes), "--trainer.devices", str(world.gpus), "--trainer.strategy"]
        if self.strategy != "fsdp2":
            return [*words, self.strategy]
        sizes = {"data_parallel_size": self.data, "tensor_parallel_size": self.shards}
        words.append("l3d_pl.strategies.fsdp2.FSDP2Strategy")
        return [*words, *(word for key, size in sizes.items() for word in (f"--trainer.strategy.{key}", str(size)))]

    @property
    def cost(self) -> float:
        """FLOP of a step, with what it sends."""
        return self.flop + FLOP_PER_BYTE * sum(self.sent.values())


@dataclass
class World:
    """What a run is given: nodes, GPUs of each, GB of each GPU; the device's kind; how many rows the data have."""

    nodes: int = 1
    gpus: int = 1
    memory: float | None = None
    cuda: bool = True
    rows: int | None = None

    def __post_init__(self) -> None:
        for key in ("nodes", "gpus"):
            if getattr(self, key) < 1:
                raise L3DError(f"{key}: found {getattr(self, key)}, allowed are whole numbers >= 1")
        if self.memory is not None and not self.memory > 0:
            raise L3DError(f"memory: found {self.memory}, allowed are GB > 0")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


def bytes_sent(
    strategy: str,
    v: float,
    ranks: int,
    shards: int = 1,
    captured: float = 0,
    codes: float = 0,
    batches: int = 1,
    nccl: bool = True,
) -> dict[str, int]:
    """Bytes that a rank sends per step, by what they are.

    Args:
        v: bytes of the rank's V_in and V_out.
        shards: ranks that share out the subnetworks.
        captured: bytes of D and A of its samples.
        codes: bytes of the codes of its subnetworks, for all samples of its group.
        batches: whose gradients accumulate to a step.
        nccl: gradients can be reduced and scattered; gloo sums them up on all ranks.
    """
    around = (ranks - 1) / ranks  # what leaves a rank of a ring that gathers, or that sums up and scatters
    sent: dict[str, float] = {}
    if strategy == "ddp":
        sent = {"gradients": 2 * around * v}
    elif strategy == "fsdp2":
        others, data = batches * (shards - 1), ranks // shards
        sent = {"V_out": others * v / 2, "D and A": others * captured, "codes": others * codes}
        if data > 1:
            sent["gradients"] = 2 * (data - 1) / data * v
    elif strategy.startswith("deepspeed"):
        stage = int(strategy.split("_")[2])
        sent["gradients"] = (1 if nccl else 2) * (1 if stage == 1 else batches) * around * v
        sent["V"] = (batches + 1 if stage == 3 else 1) * around * v  # for each batch, and for what follows the step
    return {what: int(number) for what, number in sent.items()}


def target_bytes(model: L3D, ranks: int) -> tuple[int, int, int]:
    """Bytes of the frozen model that a rank holds, of layers gathered at a time, and of all that a pass gathers.

    Of a sharded one, two layers at a time, as one is gathered while another is used, beside what is in no layer.
    """

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())

    target, chosen = model.target, {id(tensor) for tensor in model.extractor.parameters.values()}
    whole = size([*target.parameters(), *target.buffers()])
    if not model.shard_target or ranks == 1:
        return whole, 0, 0
    spread = [tensor for tensor in target.parameters() if id(tensor) not in chosen]
    layers = [[t for t in layer.parameters() if id(t) not in chosen] for layer in layers_of(target)]
    everything, in_layers = size(spread), size(t for layer in layers for t in layer)
    largest = max(map(size, layers), default=0)
    return whole - everything + everything // ranks, everything - in_layers + 2 * largest, everything


class Planner:
    """All strategies for one model and batch.

    Args:
        model: an L3D whose target is on the meta device.
        batch: of one rank.
        world: what there is to run on.
        batches: whose gradients accumulate to a step.
    """

    def __init__(self, model: L3D, batch: Any, world: World, batches: int = 1):
        self.model, self.world, self.batches = model, world, batches
        self.target, self.gathered, self.spread = target_bytes(model, world.ranks)
        self.extracted = trace_extraction(model, batch, sharded=self.spread > 0)
        with torch.device("meta"):
            self.subnetworks: Subnetworks = model._make_subnetworks()
        self.largest_parameter = max(parameter.numel() for parameter in self.subnetworks.parameters())

    def costs(self, shards: int) -> StepCosts:
        """The step of one of `shards` ranks that share their samples' gradients."""
        subnetworks = copy.copy(self.subnetworks)
        subnetworks.group = Absent(shards) if shards > 1 else ALONE
        subnetworks.own = subnetworks.group.shard_of(self.subnetworks.v_out.n)
        gradients = {name: repeated(g, shards) for name, g in self.extracted.gradients.items()}
        return step_costs(subnetworks, gradients, chunk_of(subnetworks, self.world.cuda))

    @cached_property
    def anchors(self) -> tuple[int, int]:
        """Bytes of the samples that the start and swaps are made from, and at the most until they are there."""
        model, extracted = self.model, self.extracted
        if model.init != "gradients" and not model.swap_every and not model.revive_every:
            return 0, 0
        subnetworks = self.subnetworks
        limit = math.inf if self.world.rows is None else self.world.rows * extracted.n_samples // self.batch_size
        restarts, n = subnetworks.restarts, subnetworks.n_subnetworks
        total = model.init_samples * restarts + (model.swap_samples if model.swap_every else 0)
        total = int(min(-(-total // extracted.n_samples) * extracted.n_samples, limit))
        start, judge = min(model.init_samples, total), min(model.swap_samples, total)
        raw = self.anchor_bytes(subnetworks, total, as_captured=True)
        held = restarts * (self.anchor_bytes(subnetworks, start) + 4 * start**2) + self.anchor_bytes(subnetworks, judge)
        laid_out = self.anchor_bytes(subnetworks, total) - self.anchor_bytes(subnetworks, total, only_factored=True)
        lines = 5 * 4 * 12 * n * start if model.init == "gradients" else 0  # twelve starts of K-lines side by side
        products = 3 * 4 * CHUNK  # rows of all gradients, dense, for <g_i, g_j>
        # While the target makes the last batch's, those of the batches before are there; the graph is gone afterwards.
        passes = raw - min(raw, extracted.captured) + extracted.peak + self.gathered
        return held, max(passes, raw + laid_out + held + products, held + lines)

    def anchor_bytes(
        self, subnetworks: Subnetworks, samples: int, as_captured: bool = False, only_factored: bool = False
    ) -> int:
        """Bytes of the gradients of so many samples, as they were captured or as they are laid out."""
        total, times = 0, samples / self.extracted.n_samples
        for name, gradient in self.extracted.gradients.items():
            many = repeated(gradient, times)
            if as_captured or subnetworks.path_of(name, many)[0] == "factored":
                total += sum(side.numel() * side.element_size() for side in sides_of(many))
            elif not only_factored:
                total += 4 * samples * math.prod(subnetworks.shapes[name])
        return total

    @property
    def batch_size(self) -> int:
        first = next(iter(self.extracted.gradients.values()))
        return first.outputs.shape[0] if isinstance(first, OuterGradient) else first.n_samples

    def plans(self) -> list[Plan]:
        """Every strategy that this many ranks allow."""
        whole, ranks, subnetworks = self.costs(1), self.world.ranks, self.subnetworks
        plans = [self.plan("ddp" if ranks > 1 else "auto", whole, 1)]
        if subnetworks.restarts == 1:
            sizes = [size for size in range(2, ranks + 1) if ranks % size == 0 and size <= subnetworks.n_subnetworks]
            plans += [self.plan("fsdp2", self.costs(size), size) for size in sizes]
        for stage, offload in ((1, False), (2, False), (3, False), (2, True), (3, True)):
            plans.append(self.plan(f"deepspeed_stage_{stage}" + "_offload" * offload, whole, 1, stage, offload))
        return plans

    def plan(self, strategy: str, costs: StepCosts, shards: int, stage: int = 0, offload: bool = False) -> Plan:
        """One strategy, laid out as its own files say: step.py, sharded.py, strategies/."""
        extracted, ranks, batches = self.extracted, self.world.ranks, self.batches
        v = 2 * costs.side  # V_in and V_out
        parameters, optimizer, extra, host = v, 2 * v, 0, 0
        accumulated = v if batches > 1 else 0  # gradients of the batches before
        if strategy == "ddp":
            extra = v  # the buckets that gradients are sent from
        elif stage:
            own = v // ranks
            optimizer = 2 * own + (own if stage == 3 else 0)  # with the gradient of its master copy
            parameters = v + own if stage < 3 else 2 * own  # with the master copy
            extra = (v if stage == 3 else 0) + 2 * 4 * min(DEEPSPEED_BUCKET, self.largest_parameter)
            accumulated = {1: accumulated, 2: accumulated // ranks, 3: 0}[stage]
            if offload:
                host = self.world.gpus * (own + 2 * own + own + (own if stage == 3 else 0))
                parameters, optimizer, accumulated = (v if stage < 3 else 0), 0, 0
        codes = 4 * shards * extracted.n_samples * -(-self.subnetworks.n_subnetworks // shards)
        nccl = self.world.cuda
        sent = bytes_sent(strategy, v, ranks, shards, extracted.captured, codes, batches, nccl)
        if self.spread:
            sent["target"] = int(batches * (1 + extracted.backward) * (ranks - 1) / ranks * self.spread)
        anchors, collecting = self.anchors
        passes = extracted.peak + self.gathered
        always = parameters + self.target + anchors + extra
        trained = always + optimizer + accumulated
        d_and_a = shards * extracted.captured
        rest = extracted.held - extracted.captured  # outputs and references
        # While they are shared there are this rank's, and the whole put together.
        sharing = (shards + 1) * extracted.captured + rest if shards > 1 else 0
        contracting = d_and_a + rest + costs.block
        phases = {
            "the start": parameters + extra + self.target + collecting,
            "the target's passes": trained + passes,
            "sharing D and A": trained + sharing,
            "the step": trained + contracting + costs.peak,
            "logging": trained + contracting + costs.logging,
        }
        when = max(phases, key=phases.__getitem__)
        memory = {
            "V": parameters,
            "gradients": v + accumulated,
            "optimizer": optimizer,
            "target": self.target,
            "anchors": anchors,
            "D and A": d_and_a,
            "activations": extracted.peak - extracted.captured,
            "intermediates": max(costs.peak - v - costs.passing, 0) + contracting - d_and_a,
            "communication": extra + costs.passing + max(0, sharing - d_and_a) + self.gathered,
        }
        flop = batches * (extracted.flop + costs.flop)
        return Plan(strategy, ranks // shards, shards, memory, phases[when], when, host, flop, sent)

    def checkpoint(self) -> int:
        """Bytes of a checkpoint: V and AdamW's two moments, never the target."""
        return 3 * 2 * self.costs(1).side


def chunk_of(subnetworks: Subnetworks, cuda: bool) -> int:
    """`Subnetworks.chunk` on the device that is planned for."""
    return min(2**26 if cuda else 2**20, int(subnetworks.memory_budget * 2**28 / 16))
