"""Captures what per-sample gradients are made of, in one pass over the frozen model.

A `TorchFunctionMode` sees every operation of the forward pass. Where an operand is a chosen parameter (or computed from
nothing but parameters: `W.T`, `W[:k]`, `W @ W.T`), the operation's rule (operations.py) keeps the other operand, and
`get_gradient_edge` marks the output. One `autograd.grad` from the model's output to these edges then gives every D.

No parameter ever requires a gradient. The first watched output does, as a clone of a new leaf: the graph lives from
there on, and nothing below the first chosen parameter is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from l3d_pl.gradients.operations import RULES, Finish
from l3d_pl.gradients.sample_gradient import DenseGradient, SampleGradient, add

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Tracked:
    """A tensor that is a chosen parameter, or a function of chosen parameters and other constants of the model only."""

    tensor: Tensor  # kept alive, so that its id stays its own
    parameters: tuple[str, ...]
    evaluate: Callable[[Mapping[str, Tensor]], Tensor]

    def pull_back(self, gradient: SampleGradient, values: Mapping[str, Tensor]) -> dict[str, SampleGradient]:
        """Gradients at this tensor -> gradients at the parameters it is made of (the chain rule, per sample)."""
        if len(self.parameters) == 1:
            base = values[self.parameters[0]]
            if self.tensor is base or _same_view(self.tensor, base):
                return {self.parameters[0]: gradient}
            if base.ndim == 2 and _same_view(self.tensor, base.T):
                return {self.parameters[0]: gradient.transposed()}
        mine = {name: values[name].detach() for name in self.parameters}
        vjp = torch.func.vjp(self.evaluate, mine)[1]
        return {name: DenseGradient(value) for name, value in torch.func.vmap(vjp)(gradient.dense())[0].items()}


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


@dataclass
class Use:
    """One use of a tracked tensor by one operation."""

    tracked: Tracked
    finish: Finish
    edge: int  # index into Capture.edges
    operands: list[tuple[Tensor, int]] = field(default_factory=list)  # the operation's operands and their versions then


class Capture(TorchFunctionMode):
    """Run a frozen model inside `with Capture(...)`, then ask for `gradients`.

    Args:
        model: the target model; all its parameters and buffers count as constants.
        parameters: the chosen ones, by name.
        n: number of samples; the first dimension of every activation is n, or a multiple of it with samples first.
        copy_operands: keep copies of operands, for models that change an operand in place after its use.

    Attributes:
        uncaptured: parameters used by an operation without a rule, with that operation's name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], n: int, copy_operands: bool = False):
        super().__init__()
        self.parameters, self.n, self.copy_operands = parameters, n, copy_operands
        self.constants = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.tracked = {id(tensor): Tracked(tensor, (name,), itemgetter(name)) for name, tensor in parameters.items()}
        self.edges: list[GradientEdge] = []
        self.uses: list[Use] = []
        self.uncaptured: dict[str, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        operands = [self.tracked[id(arg)] for arg in tensors if id(arg) in self.tracked]
        is_constant = bool(tensors) and all(id(arg) in self.constants or id(arg) in self.tracked for arg in tensors)
        if not operands or func in _DETACHING or not torch.is_grad_enabled():  # autograd sees no parameter here
            result = func(*args, **kwargs)
            if is_constant and isinstance(result, Tensor) and id(result) not in self.tracked:
                self.constants[id(result)] = result
            return result
        return self._derive(func, args, kwargs, operands) if is_constant else self._use(func, args, kwargs, operands)

    def _derive(self, func: Callable[..., Any], args: Args, kwargs: Kwargs, operands: list[Tracked]) -> Any:
        """An operation on constants of the model only: its result is tracked in its turn."""
        versions = [operand.tensor._version for operand in operands]
        result = func(*args, **kwargs)
        names = tuple(dict.fromkeys(name for operand in operands for name in operand.parameters))
        tracked = self.tracked
        if versions != [operand.tensor._version for operand in operands]:  # written in place: `evaluate` does not know
            self.uncaptured.update(dict.fromkeys(names, getattr(func, "__name__", str(func))))
            return result

        def evaluate(values: Mapping[str, Tensor], pick: Callable[[Any], Any]) -> Tensor:
            def swap(tensor: Tensor) -> Tensor:
                return tracked[id(tensor)].evaluate(values) if id(tensor) in tracked else tensor

            return pick(func(*tree_map_only(Tensor, swap, args), **tree_map_only(Tensor, swap, kwargs)))

        def track(tensor: Any, pick: Callable[[Any], Any]) -> None:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in tracked:
                tracked[id(tensor)] = Tracked(tensor, names, lambda values: evaluate(values, pick))

        if isinstance(result, Tensor):
            track(result, lambda whole: whole)
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                track(part, itemgetter(index))
        return result

    def _use(self, func: Callable[..., Any], args: Args, kwargs: Kwargs, operands: list[Tracked]) -> Any:
        """An operation of parameters with data: ask its rule, run it, mark its output."""
        name = getattr(func, "__name__", str(func))
        inplace = name.endswith("_") and not name.endswith("__")
        rule = RULES.get(name)
        found: list[Use] = []
        if self.copy_operands and rule is not None and not inplace:
            keep = self.tracked
            args, kwargs = tree_map_only(Tensor, lambda arg: arg if id(arg) in keep else arg.clone(), (args, kwargs))
        data, named_data = [self._data(arg) for arg in args], {key: self._data(arg) for key, arg in kwargs.items()}
        for operand in operands:
            is_written = inplace and operand.tensor is args[0]
            finish = rule(operand.tensor, self.n, *data, **named_data) if rule is not None and not is_written else None
            if finish is None:
                self.uncaptured.update(dict.fromkeys(operand.parameters, name))
            else:
                others = [] if inplace else [arg for arg in _tensors(args, kwargs) if id(arg) not in self.tracked]
                found.append(Use(operand, finish, len(self.edges), [(arg, arg._version) for arg in others]))
        output = func(*args, **kwargs)
        if not found:
            return output
        if not output.requires_grad:
            leaf = torch.zeros_like(output) if inplace else output.detach()
            leaf.requires_grad_()
            # A clone, because the model may change its own tensor in place, which a leaf forbids. (An in-place
            # operation must keep its tensor: there the graph enters by adding zeros.)
            output = output.add_(leaf) if inplace else leaf.clone()
        self.edges.append(get_gradient_edge(output))
        self.uses += found
        return output

    def _data(self, arg: Any) -> Any:
        """An argument without its graph, for a rule to keep; a tracked one as it is, for the rule to recognise."""
        return arg.detach() if isinstance(arg, Tensor) and arg.requires_grad and id(arg) not in self.tracked else arg

    def operands_changed(self) -> bool:
        """Whether the model changed an operand in place after its use: what was kept is then not what was used."""
        return any(tensor._version != version for use in self.uses for tensor, version in use.operands)

    def gradients(self, output: Tensor, cotangent: Tensor) -> dict[str, SampleGradient]:
        """Per-sample gradients of <output_i, cotangent_i> for every captured parameter the output depends on."""
        if not output.requires_grad:
            return {}
        return self.collect(torch.autograd.grad(output, self.edges, cotangent, allow_unused=True))

    def collect(self, at_outputs: Sequence[Tensor | None]) -> dict[str, SampleGradient]:
        """{parameter: gradient} from the gradients D at `edges`; contributions of several uses add up."""
        total: dict[str, SampleGradient] = {}
        for use in self.uses:
            d = at_outputs[use.edge]
            if d is None or any(name in self.uncaptured for name in use.tracked.parameters):
                continue
            for name, gradient in use.tracked.pull_back(use.finish(d), self.parameters).items():
                total[name] = add(total[name], gradient) if name in total else gradient
        return total


def _tensors(args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Tensors among the arguments, one level of lists deep (torch.cat and the like)."""
    found: list[Tensor] = []
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (tuple, list)):
            found += [part for part in arg if isinstance(part, Tensor)]
    return found
