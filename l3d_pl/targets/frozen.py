"""Which tensors of a target model are decomposed, and how its identity is told."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from l3d_pl.errors import L3DError, did_you_mean


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, no parameter requires a gradient. Returns the same model; of what is compiled the modules themselves.

    (What `torch.compile` fuses cannot be watched operation by operation.)
    """
    model = getattr(model, "_orig_mod", model)
    for module in model.modules():  # (one that takes another's place is walked through in its turn)
        for name, part in module._modules.items():
            module._modules[name] = getattr(part, "_orig_mod", part)
        module._compiled_call_impl = None  # of `module.compile()`, in place
    return model.eval().requires_grad_(False)


def select_parameters(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, Tensor]:
    """The parameters whose names match any of `patterns`, in the model's order, each tensor once (by its first name).

    A pattern is a shell glob (`*`, `layers.3.*.weight`), or a regular expression after the prefix `re:`.

    Raises:
        L3DError: a pattern that matches nothing (with near names), or an invalid regular expression.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    named = dict(model.named_parameters())  # named_parameters gives a tied tensor once
    if not named:
        raise L3DError(f"parameters: target model {type(model).__name__} has no parameters")
    if not patterns:
        raise L3DError("parameters: found an empty list; give at least one glob, such as '*'")
    chosen = set()
    for pattern in patterns:
        try:
            matches = [name for name in named if matches_pattern(name, pattern)]
        except re.error as error:
            raise L3DError(f"parameters: {pattern!r} is not a regular expression: {error}") from None
        if not matches:
            options = list(named) if len(named) <= 8 else [*list(named)[:8], f"... ({len(named)} in all)"]
            hint = near_patterns(pattern, named) or f"; it has {', '.join(options)}"
            raise L3DError(f"parameters: pattern {pattern!r} matches no parameter of {type(model).__name__}{hint}")
        chosen.update(matches)
    return {name: tensor for name, tensor in named.items() if name in chosen}


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a parameter's name matches a glob, or a regular expression after `re:`."""
    return re.fullmatch(pattern[3:], name) is not None if pattern.startswith("re:") else fnmatchcase(name, pattern)


def near_patterns(pattern: str, names: Iterable[str]) -> str:
    """`did_you_mean` for a pattern that matches none of the names: of a glob also the globs that would match some."""
    options = list(names)
    if "*" in pattern and not pattern.startswith("re:"):
        for parts in [name.split(".") for name in options]:
            options += [".".join(parts[:i]) + ".*" for i in range(1, len(parts))]
            options += ["*." + ".".join(parts[i:]) for i in range(1, len(parts))]
            options.append(".".join("*" if part.isdigit() else part for part in parts))
    return did_you_mean(pattern, dict.fromkeys(options))


def shard(model: nn.Module, keep: Iterable[Tensor], device_type: str) -> None:
    """Spread a frozen model's tensors over all ranks (FSDP2): a layer is gathered while it is used, then let go.

    Every rank has to call the model as often as the others. Layers are the entries of its outermost module
    lists; what is in none of them is gathered together. The tensors need not be on the device yet.

    Args:
        keep: tensors that stay whole on every rank, such as those that are decomposed.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    whole: Any = {*keep, *(tensor for tensor in model.parameters() if tensor.ndim == 0)}  # (a number has no rows)
    for module in dict.fromkeys((*layers_of(model), model)):
        fully_shard(module, mesh=mesh, ignored_params=whole)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """What `shard` gathers by itself: the entries of the outermost module lists.

    What lists within a layer hold is not called every time (experts).
    """
    for child in model.children():
        if isinstance(model, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from layers_of(child)


def fingerprint(tensors: Iterable[tuple[str, Tensor]] | nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: of a model, of all its parameters and buffers (W0's identity)."""
    if isinstance(tensors, nn.Module):
        tensors = tensors.state_dict().items()
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
