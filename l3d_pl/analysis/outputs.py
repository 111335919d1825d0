"""What comes out of the target model for chosen samples, and which outputs a subnetwork moves most."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from l3d_pl.analysis.items import input_of
from l3d_pl.decomposition import Decomposition
from l3d_pl.divergence import Divergence
from l3d_pl.gradients.forward import call_model, inputs_of
from l3d_pl.gradients.sample_gradient import wide
from l3d_pl.gradients.samples import Samples, choose_samples

Direction = Mapping[str, Tensor]  # {parameter name: [*shape]}
NO_FORWARD_MODE = "(?i)forward[- ]?(mode )?AD|jvp|functorch|data pointer"  # what such an error of torch says


def only_positions(batch: Any, positions: Sequence[int]) -> Any:
    """The same batch with one token sample for each sequence: the position of its own (all -1: the batch itself)."""
    if all(position < 0 for position in positions):
        return batch
    ids = input_of(batch)
    mask = torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device)
    mask[torch.arange(len(ids)), torch.tensor(positions, device=ids.device)] = True
    given = dict(batch) if isinstance(batch, Mapping) else {"inputs": inputs_of(batch)}
    return given | {"sample_mask": mask}


def probabilities(divergence: Divergence, outputs: Tensor, samples: Samples) -> Tensor:
    """Each sample's outputs to read, [N, n_outputs]: probabilities for KL, else the outputs themselves.

    Of a whole sequence it is the mean over the positions that count.

    Args:
        outputs: of a batch, [B, ...], as the model gives them.
    """
    outputs = wide(outputs)
    if samples.positions is not None:
        outputs = samples.outputs(outputs)
    if divergence.name == "kl":
        outputs = outputs.softmax(-1)
    if samples.positions is None and outputs.ndim > 2 and samples.mask is not None:
        weights = samples.mask.to(outputs.dtype).view(*samples.mask.shape, *[1] * (outputs.ndim - 2))
        outputs = (outputs * weights).sum(1) / weights.sum(1)
    elif samples.positions is None and outputs.ndim > 2:
        outputs = outputs.mean(1)
    return outputs.flatten(1)


def derivatives(decomposition: Decomposition, batch: Any, direction: Direction) -> tuple[Tensor, Tensor]:
    """Outputs to read and d outputs / d delta of f(x, W0 + delta v) at delta = 0, both [N, n_outputs].

    Forward-mode: one pass, no graph. Where an operation of the model has no forward-mode derivative, central finite
    differences take its place, with a warning.
    """
    target, inputs = decomposition.target, inputs_of(batch)
    tensors = dict(target.named_parameters())
    chosen = {name: tensors[name].detach() for name in direction}
    tangents = {name: direction[name].to(tensors[name]) for name in direction}
    samples = choose_samples(decomposition.sample, batch, outputs_of(target, batch), None, None)

    def read(parameters: Direction) -> Tensor:
        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(target, dict(parameters), args, kwargs)

        return probabilities(decomposition.divergence, call_model(run, inputs), samples)  # type: ignore[arg-type]

    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no forward mode
            outputs, moved, *_ = jvp(read, (chosen,), (tangents,))
        return outputs, moved
    except RuntimeError as error:
        if not (isinstance(error, NotImplementedError) or re.search(NO_FORWARD_MODE, str(error))):
            raise
        warnings.warn(f"finite differences instead of a forward-mode derivative: {error}".splitlines()[0], stacklevel=2)
    return read(chosen), _finite_differences(target, chosen, tangents, read)


@torch.no_grad()
def _finite_differences(
    target: nn.Module, chosen: Direction, tangents: Direction, read: Callable[[Direction], Tensor]
) -> Tensor:
    """(f(W0 + h v) - f(W0 - h v)) / 2h, with h a small part of the parameters' norm."""
    h = 1e-3 * max(float(torch.stack([tensor.norm() for tensor in chosen.values()]).norm()), 1e-3)
    high, low = (
        read({name: tensor + side * h * tangents[name] for name, tensor in chosen.items()}) for side in (1.0, -1.0)
    )
    return (high - low) / (2 * h)


@torch.no_grad()
def outputs_of(target: nn.Module, batch: Any) -> Tensor:
    """The target model's outputs for a batch, [B, ...]."""
    return call_model(target, inputs_of(batch))


@contextmanager
def pushed(model: nn.Module, direction: Direction, delta: float = 1.0) -> Iterator[nn.Module]:
    """W0 + delta v for the time of a `with` block, for any direction v; W0 is put back to the byte, come what may."""
    tensors = dict(model.named_parameters())
    saved = {name: tensors[name].detach().clone() for name in direction}
    try:
        with torch.no_grad():
            for name, value in direction.items():
                tensors[name].add_(value.to(tensors[name]), alpha=delta)
        yield model
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                tensors[name].copy_(tensor)


def most_affected(outputs: Tensor, moved: Tensor, top: int = 5) -> list[list[dict[str, Any]]]:
    """For each sample the outputs raised and lowered most: rows with direction, rank, output, derivative, probability.

    Args:
        outputs, moved: as `derivatives` gives them.
    """
    rows: list[list[dict[str, Any]]] = [[] for _ in range(len(outputs))]
    for direction, sign in (("raised", 1), ("lowered", -1)):
        values, places = (sign * moved).topk(min(top, moved.shape[1]), 1)
        for i, row in enumerate(rows):
            row += [
                {
                    "direction": direction,
                    "rank": rank,
                    "output": output,
                    "derivative": sign * value,
                    "probability": float(outputs[i, output]),
                }
                for rank, (output, value) in enumerate(zip(places[i].tolist(), values[i].tolist(), strict=True))
                if value > 0
            ]
    return rows
