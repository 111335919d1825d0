"""The oracle: per-sample gradients of any parameter of any model, by differentiating one sample at a time.

Correct but slow, and dense. It serves the parameters that an operation without a rule uses, and it is what a fit
compares its first batch with.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l3d_pl.gradients.forward import batch_size, call_model, inputs_of, slice_inputs

Divergence = Callable[[Tensor, Tensor], Tensor]


class _Forward(nn.Module):
    """Lets `functional_call` reach a model's parameters through `call_model`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        return call_model(self.model, inputs)


def _call_with(
    wrapped: _Forward, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], inputs: Any
) -> Tensor:
    """The model's output with `values` in the place of its own `parameters`, wherever it holds them.

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
    return torch.func.functional_call(wrapped, named, (inputs,), tie_weights=False)


def vmap_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Any, references: Tensor, divergence: Divergence
) -> dict[str, Tensor]:
    """`torch.func.vmap(grad)` of the divergence: {name: [N, *shape]}.

    Raises whatever torch raises for models that vmap cannot run (see `loop_gradients`).
    """
    wrapped = _Forward(model)

    def sample_divergence(values: dict[str, Tensor], sample: Any, reference: Tensor) -> Tensor:
        sample = slice_inputs(sample, None)  # type: ignore[arg-type]  # tensor[None]: a batch of one
        output = _call_with(wrapped, parameters, values, sample)
        return divergence(output, reference.unsqueeze(0)).sum()

    inputs = slice_inputs(inputs_of(batch), slice(None))
    return torch.func.vmap(torch.func.grad(sample_divergence), in_dims=(None, 0, 0))(
        dict(parameters), inputs, references
    )


def loop_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Any, references: Tensor, divergence: Divergence
) -> dict[str, Tensor]:
    """The same with a plain autograd loop over samples, each run alone through the model: works for every model."""
    wrapped, inputs = _Forward(model), inputs_of(batch)
    values = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    rows = []
    for i in range(batch_size(inputs)):
        with torch.enable_grad():
            output = _call_with(wrapped, parameters, values, slice_inputs(inputs, slice(i, i + 1)))
            loss = divergence(output, references[i : i + 1]).sum()
        grads = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
        rows.append(grads)
    return {name: torch.stack(column) for name, column in zip(values, zip(*rows, strict=True), strict=True)}


def oracle_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Any, references: Tensor, divergence: Divergence
) -> dict[str, Tensor]:
    """{name: [N, *shape]} by `vmap_gradients`, or by `loop_gradients` where vmap cannot run the model."""
    try:
        return vmap_gradients(model, parameters, batch, references, divergence)
    except (RuntimeError, NotImplementedError, ValueError):  # data-dependent control flow, in-place writes, ...
        return loop_gradients(model, parameters, batch, references, divergence)
