"""Shapes in place of tensors: the target, V and a batch on torch's meta device, and what a pass over them takes.

The frozen model's forward and backward passes are run as they are, and every storage that lives at a time is counted.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import instantiate_class
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
from l3d_pl.gradients.forward import tensors_of
from l3d_pl.gradients.samples import TokenPasses, _separates
from l3d_pl.lightning_module import L3D
from l3d_pl.parallel import Ranks


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
    """The backward passes of token samples, where the cut cannot be found by trying: it is told by the operations.

    Args:
        sharded: the target is, and gets no cut.
    """

    def __init__(self, sharded: bool = False):
        super().__init__()
        self.sharded = sharded

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
        self.cut = -1
        if self.sharded:
            return
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
        backward: how many of them go back, at the most.
    """

    gradients: dict[str, SampleGradient]
    n_samples: int
    peak: int
    held: int
    captured: int
    flop: int
    backward: int


def trace_extraction(model: L3D, batch: Any, sharded: bool = False) -> Extracted:
    """Run the extraction of a batch's gradients on the meta device.

    Args:
        sharded: the target is spread over the ranks.

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
    extractor._passes, precision, extractor.autocast = PlannedPasses(sharded), extractor.autocast, None
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
    positions = extraction.samples.positions
    backward = 1 if positions is None else positions.shape[1] + bool(extractor._passes.local)
    chosen = captured if extractor.sample == "token" else 0  # copies of those that count, where some positions do not
    return Extracted(
        extraction.gradients,
        extraction.n_samples,
        trace.peak + chosen + copies,
        trace.live,
        captured,
        counter.get_total_flops(),
        backward,
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
