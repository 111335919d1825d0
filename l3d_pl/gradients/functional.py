"""The oracle: per-sample gradients of any parameter of any model, by differentiating one sample at a time.

Correct but slow, and dense. It serves the parameters that an operation without a rule uses, and it is what a fit
compares its first batch with.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l3d_pl.gradients.forward import call_model, inputs_of, slice_inputs
from l3d_pl.gradients.samples import Samples

ITEMS = Samples()
Divergence = Callable[[Tensor, Tensor], Tensor]


class _Forward(nn.Module):
    """Lets `functional_call` reach a model's parameters through `call_model`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Any, then: Callable[[Tensor], Any] | None = None) -> Any:
        output = call_model(self.model, inputs)
        return output if then is None else then(output)


def _call_with(wrapped: _Forward, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], *args: Any) -> Any:
    """The model's output with `values` in the place of its own `parameters`, wherever it holds them.

    A second one of `args`, a function of the output, is called while they are there, and its result returned.

    Each place is named once: given the two names of a module that is used twice, `functional_call` does not put its
    tensors back.
    """
    by_id = {id(tensor): values[name] for name, tensor in parameters.items()}
    named = {
        f"{path}.{name}": by_id[id(tensor)]
        for path, module in wrapped.named_modules()
        for name, tensor in module._parameters.items()
        if id(tensor) in by_id
    }
    return torch.func.functional_call(wrapped, named, args, tie_weights=False)


def vmap_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Any,
    references: Tensor,
    divergence: Divergence,
    samples: Samples = ITEMS,
) -> dict[str, Tensor]:
    """`torch.func.vmap(grad)` of the divergence: {name: [N, *shape]}.

    Raises whatever torch raises for models that vmap cannot run (see `loop_gradients`), and for masked sequences.
    """
    if samples.mask is not None:
        raise NotImplementedError("sequences with positions that do not count")
    wrapped = _Forward(model)

    def sample_divergence(values: dict[str, Tensor], sample: Any, reference: Tensor, position: Tensor | None) -> Tensor:
        sample = slice_inputs(sample, None)  # type: ignore[arg-type]  # tensor[None]: a batch of one
        output = _call_with(wrapped, parameters, values, sample)
        output = output if position is None else output.index_select(1, position).squeeze(1)
        return divergence(output, reference.unsqueeze(0)).sum()

    inputs, positions = inputs_of(batch), None
    if samples.positions is not None:
        t = samples.positions.shape[1]
        flat = torch.arange(samples.positions.numel()) if samples.index is None else samples.index
        inputs, positions = slice_inputs(inputs, flat // t), samples.positions.flatten()[flat].unsqueeze(1)
    inputs = slice_inputs(inputs, slice(None))
    in_dims = (None, 0, 0, None if positions is None else 0)
    return torch.func.vmap(torch.func.grad(sample_divergence), in_dims=in_dims)(
        dict(parameters), inputs, references, positions
    )


def loop_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Any,
    references: Tensor,
    divergence: Divergence,
    samples: Samples = ITEMS,
) -> dict[str, Tensor]:
    """The same with a plain autograd loop over samples, each run alone through the model: works for every model."""
    return _stacked([
        sample_gradient(model, parameters, batch, references, divergence, samples, i) for i in range(len(references))
    ])  # fmt: skip


def sample_gradient(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Any,
    references: Tensor,
    divergence: Divergence,
    samples: Samples,
    index: int,
) -> dict[str, Tensor]:
    """The gradient of sample `index` alone, by plain autograd: {name: [*shape]}.

    `references` [N, ...] are those of all samples of the batch.
    """
    entry, alone = samples.alone(index)
    inputs = slice_inputs(inputs_of(batch), slice(entry, entry + 1))

    def loss(output: Tensor) -> Tensor:
        return divergence(*alone.comparable(alone.outputs(output), references[index : index + 1])).sum()

    def gradient(output: Tensor) -> tuple[Tensor, ...]:  # (activation checkpointing calls parts of the model again)
        return torch.autograd.grad(loss(output), list(values.values()), allow_unused=True, materialize_grads=True)

    values = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "None of the inputs have requires_grad=True")
        try:
            return dict(zip(values, _call_with(_Forward(model), parameters, values, inputs, gradient), strict=True))
        except (RuntimeError, UserWarning):  # reentrant checkpointing knows nothing but `backward`, to every leaf
            names = {id(parameter): name for name, parameter in parameters.items()}
            own = {names.get(id(tensor), f"/{name}"): tensor for name, tensor in model.named_parameters()}
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in own.items()}
            _call_with(_Forward(model), own, leaves, inputs, lambda output: loss(output).backward())
    found = ((name, leaves[name].grad) for name in parameters)
    return {name: torch.zeros_like(leaves[name]) if grad is None else grad for name, grad in found}


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def oracle_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Any,
    references: Tensor,
    divergence: Divergence,
    samples: Samples = ITEMS,
) -> dict[str, Tensor]:
    """{name: [N, *shape]} by `vmap_gradients`, or by `loop_gradients` where vmap cannot run the model."""
    try:
        return vmap_gradients(model, parameters, batch, references, divergence, samples)
    except (RuntimeError, NotImplementedError, ValueError):  # data-dependent control flow, in-place writes, ...
        return loop_gradients(model, parameters, batch, references, divergence, samples)
