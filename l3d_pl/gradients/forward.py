"""How a batch becomes a target model's output: the one place that knows the formats of batches and of model outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3d_pl.errors import L3DError

# Entries of a mapping batch that are never arguments of the target model.
NOT_INPUTS = ("labels", "label", "contrast", "sample_mask")


def inputs_of(batch: Any) -> Any:
    """The target model's input in a DataModule's batch.

    - a tensor: itself;
    - a tuple or list: its first entry (the others are labels and the like);
    - a mapping: its entry `inputs` if it has one, else all entries but those in `NOT_INPUTS`, as keyword arguments.
    """
    if isinstance(batch, Mapping):
        return batch["inputs"] if "inputs" in batch else {key: batch[key] for key in batch if key not in NOT_INPUTS}
    return batch[0] if isinstance(batch, Sequence) else batch


def call_model(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output tensor for `inputs` (a tensor, or a mapping of keyword arguments).

    The model works on a copy, so that what it changes in place is not the caller's. Of a Hugging Face `ModelOutput` or
    a dict the output is `logits`; of a tuple the first entry.

    Raises:
        L3DError: the output holds no such tensor.
    """
    if isinstance(inputs, Tensor):
        output = model(inputs.clone())
    else:
        inputs = torch.utils._pytree.tree_map_only(
            Tensor, torch.clone, dict(inputs) if isinstance(inputs, Mapping) else inputs
        )
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, Sequence) and len(output) and isinstance(output[0], Tensor):
        return output[0]
    raise L3DError(
        f"target model {type(model).__name__}: its output is a {type(output).__name__}; "
        "a tensor, a tuple or `logits` is needed"
    )


def tensors_of(inputs: Any) -> list[Tensor]:
    """All tensors in `inputs`."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
        if isinstance(leaf, Tensor)
    ]


def batch_size(inputs: Any) -> int:
    """Number of samples: the first dimension of the first tensor in `inputs`."""
    tensors = tensors_of(inputs)
    if not tensors or tensors[0].ndim == 0:
        raise L3DError(f"batch: found no tensor with a sample dimension in an input of type {type(inputs).__name__}")
    return tensors[0].shape[0]


def slice_inputs(inputs: Any, index: slice | Tensor) -> Any:
    """The samples at `index` of every tensor in `inputs`, the sample dimension kept."""
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor[index], inputs)
