"""`l3d plan`: what a run takes on so many GPUs, strategy by strategy, before a job is submitted.

Nothing is computed: the target, V and a batch are on torch's meta device, as shapes. The frozen model's forward and
backward passes are run there as they are, and every storage that lives at a time is counted (`Trace`). What the step
then does with V and the captured gradients is far too many operations to go through for a large model; it is counted
by formula (`StepCosts`), which the tests hold against a trace of the step itself.

Memory is that of the rank that needs most: one that starts and repairs, and so holds the anchors. GB are 1e9 bytes.
"""

from __future__ import annotations

import copy
import json
import math
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import instantiate_class
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from l3d_pl.errors import L3DError
from l3d_pl.gradients import DenseGradient, OuterGradient, SampleGradient
from l3d_pl.gradients.capture import Capture
from l3d_pl.gradients.extraction import AUTOCAST
from l3d_pl.gradients.forward import batch_size, inputs_of, tensors_of
from l3d_pl.gradients.samples import TokenPasses, _separates
from l3d_pl.lightning_module import L3D
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.params import first_batch, made_up_batch
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.tucker import CHUNK, Matrices

GB = 1e9
SPARE = 0.1  # of a GPU's memory, for the driver, libraries' workspaces and fragmentation
FLOP_PER_BYTE = 1000  # a byte sent counts as so many FLOP, to compare strategies: 25 TFLOP/s beside 25 GB/s
SIMPLER = 1.2  # of two strategies the simpler is taken where it costs no more than this times the other
DEEPSPEED_BUCKET = 200_000_000  # values, at most, in each of its two buffers for reducing (Lightning's default)

# -- shapes in place of tensors ----------------------------------------------------------------------------------------


def untrained_on_meta(target: Mapping[str, Any]) -> nn.Module:
    """A config's target as shapes: of a Hugging Face model nothing is read but `config.json`.

    Args:
        target: `class_path` and `init_args`.

    Raises:
        L3DError: there is no such model, or no config.json.
    """
    init_args: dict[str, Any] = dict(target.get("init_args") or {})
    module, _, name = target["class_path"].rpartition(".")
    if module == "l3d_pl.targets.hub" and name in ("language_model", "image_classifier"):
        return _from_config(name, **init_args)
    if module == "l3d_pl.targets.vision":
        init_args |= {"weights": None} if name == "torchvision_model" else {"pretrained": False}
    init = {"class_path": target["class_path"], "init_args": init_args}
    try:
        with torch.device("meta"):
            model = instantiate_class((), init)
    except (RuntimeError, NotImplementedError):  # it computes with the values of what it makes
        model = instantiate_class((), init)
    return model.to("meta")


def _from_config(
    role: str,
    pretrained: str,
    attn_implementation: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    import transformers
    from huggingface_hub import hf_hub_download

    from l3d_pl.targets.dtypes import torch_dtype
    from l3d_pl.targets.hub import _require_model_type

    folder = pretrained
    if not Path(pretrained).is_dir():
        try:
            folder = str(Path(hf_hub_download(pretrained, "config.json", revision=revision)).parent)
        except Exception as error:  # huggingface_hub, its HTTP client and the system each have their own
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise L3DError(
                f"target {pretrained}: there is no such directory, and the hub gave no config.json ({reason.strip()})"
            ) from error
    auto = {"language_model": "AutoModelForCausalLM", "image_classifier": "AutoModelForImageClassification"}[role]
    auto_class = getattr(transformers, auto)
    _require_model_type(folder, pretrained, role, auto_class)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = torch_dtype(dtype) or getattr(config, "dtype", None) or torch.float32
        extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with torch.device("meta"):
            model: nn.Module = auto_class.from_config(config, dtype=kind, trust_remote_code=False, **extra)
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise L3DError(f"target {pretrained}: {reason.strip()}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def batch_on_meta(batch: Any) -> Any:
    """A batch as shapes."""
    if isinstance(batch, Mapping):
        return {key: batch_on_meta(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(batch_on_meta(value) for value in batch)
    return batch.to("meta") if isinstance(batch, Tensor) else batch


class Trace(TorchDispatchMode):
    """Counts the bytes of all storages that come to life within it, for as long as they live.

    Shapes have no values, so what a program asks for one by one gets an answer here: a number is 1, a condition true
    (every position counts; gradients are finite).

    Attributes:
        live: bytes now.
        peak: the most so far.
    """

    def __init__(self, known: Any = (), answer: bool = True):
        super().__init__()
        self.live = self.peak = 0
        self.answer = answer
        self.seen: dict[int, Any] = {}
        for tensor in tree_leaves(known):
            if isinstance(tensor, Tensor):
                self._receive(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            dtype = args[0].dtype
            return self.answer if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._receive(leaf, leaf.untyped_storage().nbytes())
        return result

    def _receive(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen:
            self.seen[key] = weakref.finalize(storage, self._leave, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _leave(self, key: int, size: int) -> None:
        self.live -= size
        self.seen.pop(key, None)


class FusedAttention(TorchFunctionMode):
    """Attention by a fused kernel: for shapes torch would take the one that keeps all [positions, positions]."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            try:
                return _fused_attention(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError):  # a form that the kernel does not know
                pass
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=query.dtype) if attn_mask.dtype is torch.bool else attn_mask
        bias = bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


# Backward nodes of operations that look at each position by itself; any other is taken to mix positions.
_BY_POSITION = re.compile(
    "(View|UnsafeView|Reshape|Alias|Clone|ToCopy|Mm|Addmm|Add|Sub|Mul|Div|Neg|Pow|Sqrt|Rsqrt|Mean|Where|Split|Gelu|Silu|"
    r"Relu|Tanh|Sigmoid|Elu|Softplus|Exp|NativeLayerNorm|FusedRmsNorm|NativeDropout)Backward\d*"
)


class PlannedPasses(TokenPasses):
    """The backward passes of token samples, where the cut cannot be found by trying: it is told by the operations."""

    def _search(self, capture: Capture, output: Tensor, cotangent: Tensor, position: int) -> None:
        """Local is what no operation that may mix positions stands above."""
        top = get_gradient_edge(output)
        below: set[Node] = set()
        seen: set[tuple[Node, bool]] = set()
        ahead = [(top.node, False)]
        while ahead:
            node, is_below = ahead.pop()
            if (node, is_below) in seen:
                continue
            seen.add((node, is_below))
            if is_below:
                below.add(node)
            is_below = is_below or _BY_POSITION.fullmatch(node.name()) is None
            ahead += [(parent, is_below) for parent, _ in node.next_functions if parent is not None]
        self.local = frozenset(i for i, edge in enumerate(capture.edges) if edge.node not in below)
        others = {edge.node for i, edge in enumerate(capture.edges) if i not in self.local}
        places = [i for i, edge in enumerate(capture.stream) if edge.node not in below] if others else []
        self.cut = next((i for i in places if _separates(capture.stream[i], top, others)), -1)


# -- what one rank computes of its own batch ---------------------------------------------------------------------------


@dataclass
class Extracted:
    """The frozen model's passes over one rank's batch.

    Attributes:
        gradients: D and A, as shapes.
        n_samples: of this batch.
        peak: bytes that live at most meanwhile, what is captured included.
        held: bytes that stay: D, A, outputs and references.
        captured: bytes of D and A.
        flop: of the passes.
    """

    gradients: dict[str, SampleGradient]
    n_samples: int
    peak: int
    held: int
    captured: int
    flop: int


def trace_extraction(model: L3D, batch: Any) -> Extracted:
    """Run the extraction of a batch's gradients on the meta device.

    Raises:
        L3DError: the target model needs values there, or cannot take this batch.
    """
    target, extractor, batch = model.target, model.extractor, batch_on_meta(batch)
    copies = 0
    if extractor.autocast is not None:  # of each weight a copy in half precision stays, for the way back
        half = AUTOCAST[extractor.autocast]
        copies = sum(p.numel() * half.itemsize for p in target.parameters() if p.dtype is not half and p.ndim > 1)
        target.to(half)
        batch = tree_map_only(Tensor, lambda t: t.to(half) if t.is_floating_point() else t, batch)
    extractor._passes, precision, extractor.autocast = PlannedPasses(), extractor.autocast, None
    known = [*target.state_dict(keep_vars=True).values(), *target.buffers(), *tensors_of(batch)]
    try:
        with FusedAttention(), Trace(known) as trace, FlopCounterMode(display=False) as counter:
            extraction = extractor(batch, torch.Generator().manual_seed(0))
    except L3DError:
        raise
    except Exception as error:  # whatever a target does with shapes
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise L3DError(
            f"plan: target model {type(target).__name__} cannot be followed on the meta device: {reason}"
        ) from error
    finally:
        extractor.autocast = precision
    sides = [side for gradient in extraction.gradients.values() for side in sides_of(gradient)]
    storages = {side.untyped_storage()._cdata: side.untyped_storage().nbytes() for side in sides}
    captured = sum(storages.values())
    chosen = captured if extractor.sample == "token" else 0  # copies of those that count, where some positions do not
    return Extracted(
        extraction.gradients,
        extraction.n_samples,
        trace.peak + chosen + copies,
        trace.live,
        captured,
        counter.get_total_flops(),
    )


def sides_of(gradient: SampleGradient) -> list[Tensor]:
    """The tensors that a gradient is made of."""
    if isinstance(gradient, OuterGradient):
        return [gradient.outputs, gradient.inputs]
    return [gradient.dense()]


def repeated(gradient: SampleGradient, times: float) -> SampleGradient:
    """Gradients of so many times as many samples, as shapes."""

    def longer(tensor: Tensor) -> Tensor:
        return torch.empty(math.ceil(len(tensor) * times), *tensor.shape[1:], dtype=tensor.dtype, device="meta")

    if isinstance(gradient, OuterGradient):
        return replace(gradient, outputs=longer(gradient.outputs), inputs=longer(gradient.inputs), index=None)
    return DenseGradient(longer(gradient.dense()))


class Absent(Ranks):
    """A group of ranks that are not there: what they would send is as large as the own."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self.size > 1 else tensor

    def count(self, number: int, device: torch.device) -> int:
        return number * self.size

    def before(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)

    def gather(self, thing: Any) -> list[Any]:
        return [thing] * self.size

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        padded = tensor.clone()
        return [torch.empty_like(padded) for _ in range(self.size)]

    def ring(self, parts: Any, n: int) -> Iterator[tuple[slice, list[Tensor]]]:
        buffer, sizes = torch.cat([part.detach().flatten() for part in parts]), [part.numel() for part in parts]
        for hop in range(self.size):
            split = buffer.split(sizes)
            yield self.shard_of(n, hop), [part.view(like.shape) for part, like in zip(split, parts, strict=True)]
            if hop < self.size - 1:
                incoming = torch.empty_like(buffer)
                buffer = incoming


# -- the step, by formula ----------------------------------------------------------------------------------------------


@dataclass
class StepCosts:
    """c = V_in g, L, and its gradients (step.py, sharded.py) on one rank: bytes beside V and D and A, and FLOP.

    Attributes:
        side: bytes of this rank's V_in, or V_out; gradients and each of Adam's moments are two of these.
        peak: bytes of all intermediate results and of the new gradients, at the most.
        passing: of these, what is there of other ranks' shards.
        block: bytes of the gradients of all samples that are laid out dense.
        logging: bytes that the loss per parameter takes, when a step is logged.
        flop: of the step.
    """

    side: int = 0
    peak: int = 0
    passing: int = 0
    block: int = 0
    logging: int = 0
    flop: int = 0


def step_costs(subnetworks: Subnetworks, gradients: Mapping[str, SampleGradient], chunk: int) -> StepCosts:
    """Of one step with these subnetworks (the largest shard of their group) and the group's gradients.

    Most of what a step makes stays until its end: the matrices that V is contracted as, A through them, the gradient
    of codes M, then the new gradients, parameter after parameter. The temporary results of one parameter come on top.

    Args:
        chunk: values that one intermediate result may have (`Subnetworks.chunk`).
    """
    n, everyone, shards = subnetworks.own.stop, subnetworks.n_subnetworks, subnetworks.group.size  # of the first rank
    samples = next(iter(gradients.values())).n_samples
    pairs = samples * n
    one = sum(tensor.numel() for tensor in subnetworks.v_out.parameters()) // subnetworks.v_out.n
    through_ranks: list[str] = []
    held = passing = multiplications = dense_values = blocks = largest = merged_products = products = 0
    for name, gradient in gradients.items():
        shape, ranks = subnetworks.shapes[name], subnetworks.ranks[name]
        size = math.prod(shape)
        if subnetworks.path_of(name, gradient)[0] == "dense":
            dense_values += size
            left = n * shape[0] * ranks[1] if len(shape) == 2 else 0
            blocks += left
            rank = ranks[1] if len(shape) == 2 else min(ranks[0], math.prod(ranks[1:]))
            multiplications += 6 * n * rank * size
            if isinstance(gradient, OuterGradient):
                multiplications += math.prod(gradient.outputs.shape[:3]) * size
            per_pair = 5 if shards == 1 else 4
            multiplications += per_pair * pairs * size + (2 * n * everyone * size if shards > 1 else 0)
            continue
        assert isinstance(gradient, OuterGradient)
        b, t, s, rows, columns = gradient.sizes
        rank = min(ranks[0], math.prod(ranks[1:]))
        first, rest = shape[0], size // shape[0]  # the matrices' own view, whichever way the operation used it
        both = n * rank * (first + rest)
        is_right_merged = not (len(ranks) == 2 and ranks[1] < ranks[0])
        merged = n * rank * (rest if is_right_merged else first)
        through = n * rank * b * s
        saved = through if t > 1 else 2 * through if n * 2 * b * s * rank <= chunk else 0
        held += 2 * merged + 2 * saved + both
        merged_products += merged
        d_through = through if t > 1 else 0
        piece = min(chunk, n * b * s * rows) if t > 1 else min(chunk, 2 * n * b * s * rank)
        largest = max(largest, 2 * both, both + d_through + 2 * max(piece, b * s * rows))
        if rank * rank * (first + rest) < first * rest:
            through_ranks.append(name)
        products = max(products, _product_temporaries(n, first, rest, rank, samples, chunk, shards))
        multiplications += 2 * n * gradient.contraction_cost(rank)
        multiplications += (
            0 if saved else 2 * n * b * s * rank * (rows + columns)
        )  # the way there, again on the way back
        multiplications += 6 * n * ranks[0] * math.prod(ranks[1:]) * (rest if is_right_merged else first)
        multiplications += subnetworks.restarts * _product_multiplications(
            n // subnetworks.restarts, first, rest, rank, samples, shards
        )
    side = n * one
    n_factored = sum(subnetworks.path_of(name, g)[0] == "factored" for name, g in gradients.items())
    block = samples * dense_values
    if dense_values:
        held += 2 * (n * dense_values + blocks) + n * dense_values + (block if shards == 1 else 0)
    few = 8 * pairs  # c, its mask, codes, p, codes M and the gradients of these
    if shards == 1:
        stacked = n_factored * pairs
        at_products = held + 2 * stacked + few
        at_end = held + stacked + few + 2 * side + largest
        at_readers = held + stacked + few + n * dense_values + side + largest
        peak = max(at_products, held + stacked + few + products, at_readers, at_end)
    else:
        shard = side + merged_products + (n * dense_values + blocks)
        gathered = samples * everyone
        passing = 2 * shard + n * dense_values  # one goes, one comes, and is laid out
        at_end = held + few + gathered + shard + side + max(side, n * dense_values) + largest
        at_ring = held + few + gathered + passing + products + 2 * n * n
        peak = max(at_ring, at_end, held + few + 2 * gathered)
    # The loss of each parameter by itself: M through ranks is not made in pieces.
    grams = (n * min(subnetworks.ranks[name][0], math.prod(subnetworks.ranks[name][1:])) for name in through_ranks)
    logging = 2 * side + 2 * n * dense_values + block + 3 * max(grams, default=0) ** 2
    return StepCosts(4 * side, 4 * peak, 4 * passing, 4 * block, 4 * logging, 2 * multiplications)


def _product_temporaries(n: int, rows: int, columns: int, rank: int, samples: int, chunk: int, shards: int) -> int:
    """Values of the largest temporary results on the way to codes M and its gradient."""
    ranks, dense, by_samples = Matrices.gram_costs(n, rows, columns, rank, samples if shards == 1 else 0)
    if shards == 1 and by_samples < min(ranks, dense):
        step = max(8, chunk // ((n + samples) * columns)) * columns
        return (2 * n + samples) * step
    if ranks < dense:
        step = max(1, chunk // (n * rank * rank))
        return 4 * min(step, n) * rank * n * rank
    return (2 if shards == 1 else 3) * n * max(8, chunk // (2 * n * columns)) * columns


def _product_multiplications(n: int, rows: int, columns: int, rank: int, samples: int, shards: int) -> int:
    """Multiplications for codes M and its gradient."""
    ways = Matrices.gram_costs(n, rows, columns, rank, samples)
    if shards == 1:
        return int(min(ways))
    through_ranks, through_rows, _ = Matrices.gram_costs(n, rows, columns, rank, 0)
    if through_ranks < through_rows:
        return int(through_ranks) * shards
    return shards * rows * columns * (2 * n * n + 4 * n * rank)


# -- a strategy --------------------------------------------------------------------------------------------------------


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


class Planner:
    """All strategies for one model and batch.

    Args:
        model: an L3D whose target is on the meta device.
        batch: of one rank.
        world: what there is to run on.
    """

    def __init__(self, model: L3D, batch: Any, world: World):
        self.model, self.world = model, world
        self.extracted = trace_extraction(model, batch)
        with torch.device("meta"):
            self.subnetworks: Subnetworks = model._make_subnetworks()
        self.largest_parameter = max(parameter.numel() for parameter in self.subnetworks.parameters())
        tensors = [*model.target.parameters(), *model.target.buffers()]
        self.target = sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
        chosen = sum(t.numel() * t.element_size() for t in model.extractor.parameters.values())
        self.sharded_target = chosen + (self.target - chosen) // world.ranks

    def costs(self, shards: int) -> StepCosts:
        """The step of one of `shards` ranks that share their samples' gradients."""
        subnetworks = copy.copy(self.subnetworks)
        subnetworks.group = Absent(shards) if shards > 1 else ALONE
        subnetworks.own = subnetworks.group.shard_of(self.subnetworks.v_out.n)
        gradients = {name: repeated(g, shards) for name, g in self.extracted.gradients.items()}
        return step_costs(subnetworks, gradients, chunk_of(subnetworks, self.world.cuda))

    @cached_property
    def anchors(self) -> tuple[int, int]:
        """Bytes of the samples that the start and swaps are made from, and bytes while they are collected."""
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
        return held, max(2 * raw + laid_out + held + products, held + lines)

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
        extracted, ranks = self.extracted, self.world.ranks
        v = 2 * costs.side  # V_in and V_out
        parameters, optimizer, extra = v, 2 * v, 0
        sent: dict[str, int] = {}
        host = 0
        around = (ranks - 1) / ranks  # what leaves a rank of a ring that gathers, or that sums up and scatters
        if strategy == "ddp":
            extra = v  # the buckets that gradients are sent from
            sent["gradients"] = int(2 * around * v)
        elif strategy == "fsdp2":
            data = ranks // shards
            sent["V_out"] = (shards - 1) * costs.side
            sent["D and A"] = (shards - 1) * extracted.captured
            sent["codes"] = (
                (shards - 1) * 4 * shards * extracted.n_samples * -(-self.subnetworks.n_subnetworks // shards)
            )
            if data > 1:
                sent["gradients"] = int(2 * (data - 1) / data * v)
        elif stage:
            optimizer = 2 * v // ranks
            parameters = v + v // ranks if stage < 3 else 2 * v // ranks  # with the master copy
            extra = (v if stage == 3 else 0) + 2 * 4 * min(DEEPSPEED_BUCKET, self.largest_parameter)
            sent["gradients"], sent["V"] = int(around * v), int(around * v)
            if offload:
                own = v // ranks
                host = self.world.gpus * (own + 2 * own + own + (own if stage == 3 else 0))
                parameters, optimizer = (v if stage < 3 else 0), 0
        anchors, collecting = self.anchors
        target = self.sharded_target if getattr(self.model, "shard_target", False) else self.target
        always = parameters + target + anchors + extra
        trained = always + optimizer
        d_and_a = shards * extracted.captured
        rest = extracted.held - extracted.captured  # outputs and references
        # While they are shared there are this rank's, and the whole put together.
        sharing = (shards + 1) * extracted.captured + rest if shards > 1 else 0
        contracting = d_and_a + rest + costs.block
        phases = {
            "the start": parameters + target + collecting,
            "the target's passes": trained + extracted.peak,
            "sharing D and A": trained + sharing,
            "the step": trained + contracting + costs.peak,
            "logging": trained + contracting + costs.logging,
        }
        when = max(phases, key=phases.__getitem__)
        memory = {
            "V": parameters,
            "gradients": v,
            "optimizer": optimizer,
            "target": target,
            "anchors": anchors,
            "D and A": d_and_a,
            "activations": extracted.peak - extracted.captured,
            "intermediates": max(costs.peak - v - costs.passing, 0) + contracting - d_and_a,
            "communication": extra + costs.passing + max(0, sharing - d_and_a),
        }
        return Plan(
            strategy, ranks // shards, shards, memory, phases[when], when, host, extracted.flop + costs.flop, sent
        )

    def checkpoint(self) -> int:
        """Bytes of a checkpoint: V and AdamW's two moments, never the target."""
        return 3 * 2 * self.costs(1).side


def chunk_of(subnetworks: Subnetworks, cuda: bool) -> int:
    """`Subnetworks.chunk` on the device that is planned for."""
    return min(2**26 if cuda else 2**20, int(subnetworks.memory_budget * 2**28 / 16))


# -- choosing, and telling ---------------------------------------------------------------------------------------------

# What lowers each kind of memory.
HELP = {
    "V": "model.n_subnetworks, model.ranks, more GPUs",
    "gradients": "model.n_subnetworks, model.ranks, more GPUs",
    "optimizer": "model.n_subnetworks, model.ranks, more GPUs",
    "target": "its dtype",
    "anchors": "model.init_samples, model.swap_samples",
    "D and A": "the data's batch_size or length, model.tokens_per_sequence, a split with fewer ranks per group",
    "activations": "the data's batch_size, model.autocast",
    "intermediates": "model.n_subnetworks, model.ranks, the data's batch_size",
    "communication": "the data's batch_size, another split",
}


def complete(
    plans: list[Plan], world: World, steps: int | None, flops_per_second: float | None, step_seconds: float | None
) -> None:
    """Tell of every plan whether it fits, and how long it takes.

    Args:
        flops_per_second: of a GPU, in TFLOP/s.
        step_seconds: as measured.
    """
    for key, value in (("flops_per_second", flops_per_second), ("step_seconds", step_seconds)):
        if value is not None and not value > 0:
            raise L3DError(f"{key}: found {value}, allowed are numbers > 0")
    for plan in plans:
        if world.memory is not None:
            plan.fits = plan.peak <= (1 - SPARE) * world.memory * GB
        if step_seconds is not None:
            plan.seconds = step_seconds
        elif flops_per_second is not None:
            plan.seconds = plan.flop / (flops_per_second * 1e12)
        if plan.seconds is not None and steps is not None:
            plan.hours = plan.seconds * steps / 3600


def recommend(plans: Sequence[Plan]) -> tuple[Plan | None, str]:
    """The plan to take, and why; None where nothing fits."""
    fitting = [plan for plan in plans if plan.fits is not False]
    if not fitting:
        nearest = min(plans, key=lambda plan: plan.peak)
        largest = max(nearest.memory, key=nearest.memory.__getitem__)
        return None, (
            f"nothing fits; {nearest.name} comes nearest with {nearest.peak / GB:.1f} GB in {nearest.when}, "
            f"{nearest.memory[largest] / GB:.1f} GB of them {largest}: lower {HELP[largest]}"
        )
    # What is moved to the host's memory is stepped on there, which FLOP and bytes do not show.
    least = min(fitting, key=lambda plan: (plan.host > 0, plan.cost))
    best = next(plan for plan in fitting if plan.host == 0 or least.host > 0 if plan.cost <= SIMPLER * least.cost)
    if len(fitting) == 1:
        return best, "nothing else fits"
    return best, (
        f"the simplest {'that fits ' if best.fits else ''}within a fifth of the least work: {_si(best.flop)}FLOP and "
        f"{_si(sum(best.sent.values()))}B sent per GPU and step, a byte counted as {FLOP_PER_BYTE} FLOP"
    )


def print_plans(
    planner: Planner, plans: list[Plan], steps: int | None, notes: list[str], as_json: bool = False
) -> None:
    """Two tables and the recommendation; or all of it as one JSON object."""
    best, why = recommend(plans)
    checkpoint, world = planner.checkpoint(), planner.world
    if as_json:
        strategies = [asdict(plan) | {"name": plan.name} for plan in plans]
        result = {
            "ranks": world.ranks,
            "memory": None if world.memory is None else world.memory * GB,
            "samples_per_step": planner.extracted.n_samples * world.ranks,
            "steps": steps,
            "checkpoint": checkpoint,
            "strategies": strategies,
            "recommended": None if best is None else best.name,
            "why": why,
            "notes": notes,
        }
        print(json.dumps(result, indent=1))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=170)
    unit = _unit(min(GB, max(plan.peak for plan in plans)))
    table = Table(title=f"{unit[0]}B per GPU", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for column in (*plans[0].memory, "peak"):
        table.add_column(column.replace("communication", "comm."), justify="right")
    table.add_column("in")
    table.add_column("fits")
    for plan in plans:
        fits = "" if plan.fits is None else "yes" if plan.fits else "no"
        cells = [_in(unit, value) for value in (*plan.memory.values(), plan.peak)]
        table.add_row(plan.name, *cells, plan.when, fits)
    console.print(table)
    flop, sent = _unit(max(plan.flop for plan in plans)), _unit(max(sum(plan.sent.values()) for plan in plans))
    table = Table(title="per GPU and step", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for column in (f"{flop[0]}FLOP", f"{sent[0]}B sent", "seconds", "hours in all", "GB of a node's own memory"):
        table.add_column(column, justify="right")
    table.add_column("what is sent", overflow="fold")
    for plan in plans:
        told = ", ".join(f"{what} {_in(sent, value)}" for what, value in plan.sent.items() if value)
        seconds, hours = (f"{value:.3g}" if value is not None else "?" for value in (plan.seconds, plan.hours))
        host, total = _in(("G", GB), plan.host) if plan.host else "", sum(plan.sent.values())
        table.add_row(plan.name, _in(flop, plan.flop), _in(sent, total), seconds, hours, host, told)
    console.print(table)
    spare = f"; {SPARE:.0%} of the memory is left free" if world.memory is not None else ""
    told_steps = "steps unknown" if steps is None else f"{steps:,} steps"
    lines = [
        f"{world.nodes} x {world.gpus} GPUs, {planner.extracted.n_samples * world.ranks:,} samples a step, "
        f"{told_steps}; a checkpoint is {_si(checkpoint)}B{spare}",
        *notes,
        f"recommended: {best.name}: {why}" if best is not None else f"recommended: none: {why}",
    ]
    for line in lines:
        Console(soft_wrap=True).print(Text(line))


def _unit(number: float) -> tuple[str, float]:
    """Prefix and size of the unit in which a number is best told."""
    return next((unit for unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= unit[1]), ("", 1.0))


def _in(unit: tuple[str, float], number: float) -> str:
    value = number / unit[1]
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _si(number: float) -> str:
    """A number and the prefix of its unit."""
    return f"{_in(unit := _unit(number), number)} {unit[0]}"


def steps_of(trainer: Any, rows: int | None, batch_size: int, ranks: int) -> int | None:
    """Steps of a run: `max_steps`, or `max_epochs` of so many rows; None: not to be told without the data."""
    limits = []
    if (trainer.max_steps or -1) > 0:
        limits.append(trainer.max_steps)
    if rows is not None and (trainer.max_epochs or -1) > 0:
        per_epoch: float = math.ceil(rows / (batch_size * ranks))
        some = trainer.limit_train_batches
        if isinstance(some, float) and some <= 1:
            per_epoch = max(1, int(per_epoch * some))
        elif some is not None:
            per_epoch = min(per_epoch, some)
        limits.append(int(trainer.max_epochs * per_epoch))
    return min(limits) if limits else None


def rows_of(settings: Mapping[str, Any], data: Any) -> int | None:
    """Rows of the training data: as set up, or as the settings say; None: not to be told without reading them."""
    if settings.get("mode") == "rows" and settings.get("max_rows"):
        return int(settings["max_rows"])
    train: Any = getattr(data, "train", None)
    return len(train) if hasattr(train, "__len__") else None


def run_plan(model: L3D, data: Any, config: Any, world: World) -> None:
    """`l3d plan` with a config that has been parsed, its model and its data."""
    settings = vars(config.data.init_args)
    batch = made_up_batch(settings, getattr(getattr(model.target, "config", None), "vocab_size", None))
    notes: list[str] = []
    if batch is None:
        batch, notes = first_batch(model, data, settings)
        if batch is None:
            raise L3DError(f"data: a plan needs a batch, and there are {notes[0]}")
    world.rows = rows_of(settings, data)
    planner = Planner(model, batch, world)
    plans = planner.plans()
    steps = steps_of(config.trainer, world.rows, batch_size(inputs_of(batch)), world.ranks)
    if steps is None:
        notes.append("the number of steps is not told without the data: give --trainer.max_steps")
    if config.flops_per_second is None and config.step_seconds is None:
        notes.append("for hours give --flops-per-second (TFLOP/s of a GPU) or --step-seconds (as measured)")
    complete(plans, world, steps, config.flops_per_second, config.step_seconds)
    print_plans(planner, plans, steps, notes, config.json)
