"""Captures what per-sample gradients are made of, in one pass over the frozen model.

A `TorchFunctionMode` sees every operation of the forward pass. Where one operand is a chosen parameter (or computed
from nothing but parameters and constants: `W.T`, `W[:k]`, `W @ W.T`) and another derives from the model's inputs, the
operation's rule (operations.py) keeps the latter, and `get_gradient_edge` marks the output. One `autograd.grad` from
the model's output to these edges then gives every D.

No parameter ever requires a gradient. The first watched output does, as a clone of a new leaf: the graph lives from
there on, and nothing below the first chosen parameter is differentiated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from l3d_pl.gradients.forward import batch_size, call_model
from l3d_pl.gradients.operations import Finish, find, keeps_samples_apart
from l3d_pl.gradients.sample_gradient import DenseGradient, SampleGradient, add, wide

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Steps = list[tuple["Tracked", Finish]]

_MARKS = itertools.count()
_DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Tracked:
    """A tensor that is a chosen parameter, or a function of chosen parameters and of constants only.

    Attributes:
        parameters: what it is a function of.
        evaluate: that function.
        steps: for N samples the operands of the operation that made it, each with how the gradient here becomes theirs;
            None: by `evaluate`.
        own_steps: the same where its rows turn out to be the samples' own (a class token, one copy for each), from the
            gradient at each sample's row; None: not known.
    """

    tensor: Tensor  # kept alive, so that its id stays its own
    parameters: tuple[str, ...]
    evaluate: Callable[[Mapping[str, Tensor]], Tensor]
    steps: Callable[[int], Steps | None] | None = None
    own_steps: Steps | None = None

    def pull_back(self, gradient: SampleGradient, values: Mapping[str, Tensor]) -> dict[str, SampleGradient]:
        """Gradients at this tensor -> gradients at the parameters it is made of (the chain rule, per sample)."""
        steps = None if self.steps is None else self.steps(gradient.n_samples)
        if steps is not None:
            d = gradient.dense()
            return add_up(operand.pull_back(finish(d), values) for operand, finish in steps)
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


def add_up(parts: Iterable[dict[str, SampleGradient]]) -> dict[str, SampleGradient]:
    """Contributions of several uses to the same parameters."""
    total: dict[str, SampleGradient] = {}
    for part in parts:
        for name, gradient in part.items():
            total[name] = add(total[name], gradient) if name in total else gradient
    return total


@dataclass(eq=False)
class Use:
    """One use of a tracked tensor by one operation."""

    tracked: Tracked
    finish: Finish
    edge: int  # index into Capture.edges
    operands: list[tuple[Tensor, int]] = field(default_factory=list)  # the operation's operands and their versions then


class Capture(TorchFunctionMode):
    """Run a frozen model inside `with Capture(...)`, then ask for `gradients`.

    What derives from the model's inputs holds the samples in its first dimension; all else (parameters, buffers,
    `torch.arange(S)`) is the same for every sample, whatever its shape. So one position embedding for the whole batch
    is no operation on samples, but part of the parameter's way to the operation that adds it to the batch.

    Args:
        model: the target model.
        parameters: the chosen ones, by name.
        n: number of samples; the first dimension of every activation is n, or a multiple of it with samples first.
        copy_operands: keep copies of operands, for models that change an operand in place after its use.
        inject_early: let the graph begin at the model's inputs, or the first floating-point activation, for models with
            activation checkpointing: what it computes again, outside this mode, must be what it was.
        positions: number of positions of each sequence, to record the `stream`; 0: it is not recorded.

    Attributes:
        uncaptured: parameters used by an operation without a rule, with that operation's name.
        edges: outputs of the operations in `uses`.
        stream: edges of all results [n, positions, ...] that depend on a watched operation, in order of computation.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        n: int,
        copy_operands: bool = False,
        inject_early: bool = False,
        positions: int = 0,
    ):
        super().__init__()
        self.model, self.parameters, self.n = model, parameters, n
        self.copy_operands, self.inject_early, self.positions = copy_operands, inject_early, positions
        self.tracked = {id(tensor): Tracked(tensor, (name,), itemgetter(name)) for name, tensor in parameters.items()}
        self.mark = next(_MARKS)  # on tensors that derive from the model's inputs
        self.is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
        self.edges: list[GradientEdge] = []
        self.stream: list[GradientEdge] = []
        self.uses: list[Use] = []
        self.constants: list[tuple[Tensor, int]] = []  # what tracked tensors are computed with, and versions then
        self.uncaptured: dict[str, str] = {}

    def __enter__(self) -> Capture:
        self._hook = self.model.register_forward_pre_hook(self._receive, with_kwargs=True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)

    def _receive(self, model: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The model's inputs arrive."""
        if self.inject_early:
            args, kwargs = tree_map_only(Tensor, self._as_leaf, (args, dict(kwargs)))
        for leaf in tree_leaves((args, dict(kwargs))):
            if isinstance(leaf, Tensor):
                leaf._l3d_mark = self.mark  # type: ignore[attr-defined]
        return args, kwargs

    def _as_leaf(self, tensor: Tensor) -> Tensor:
        """A clone of a new leaf of the graph; a clone, because the model may write into it."""
        if not tensor.is_floating_point():
            return tensor
        self.inject_early = False
        return tensor.detach().requires_grad_().clone()

    def is_samples(self, tensor: Tensor) -> bool:
        """Whether it derives from the model's inputs: seen so, or as part of the graph that begins at such a tensor."""
        return getattr(tensor, "_l3d_mark", None) == self.mark or (self.is_frozen and tensor.requires_grad)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        operands = [self.tracked[id(arg)] for arg in tensors if id(arg) in self.tracked]
        has_samples = any(map(self.is_samples, tensors))
        if not operands or func in _DETACHING or not torch.is_grad_enabled():  # autograd sees no parameter here
            result = func(*args, **kwargs)
            if self.inject_early and has_samples and torch.is_grad_enabled():
                result = self._begin(result, tensors)
        else:
            name, operands = getattr(func, "__name__", str(func)), list({id(x): x for x in operands}.values())
            if not has_samples:
                return self._derive(func, name, args, kwargs, tensors, operands)
            result = self._use(func, name, args, kwargs, tensors, operands)
        if has_samples:
            self._receive_result(getattr(func, "__name__", ""), args, kwargs, result)
        return result

    def _receive_result(self, name: str, args: Args, kwargs: Kwargs, result: Any) -> None:
        """What an operation on samples gives, or writes into, derives from the inputs too."""
        if isinstance(result, Tensor):
            result._l3d_mark = self.mark  # type: ignore[attr-defined]
            if self.positions and result.grad_fn is not None and result.ndim > 2:
                self.stream += [get_gradient_edge(result)] if result.shape[:2] == (self.n, self.positions) else []
        elif isinstance(result, (tuple, list)):
            for part in _tensors((result,), {}):
                part._l3d_mark = self.mark  # type: ignore[attr-defined]
        if is_inplace(name) or name == "__setitem__" or "out" in kwargs:
            for written in _tensors((kwargs.get("out", args[0] if args else None),), {}):
                for tensor in (written, written._base):
                    if tensor is not None:
                        tensor._l3d_mark = self.mark  # type: ignore[attr-defined]

    def _begin(self, result: Any, tensors: list[Tensor]) -> Any:
        """Let the graph begin at the first activation, unless it has begun."""
        if not isinstance(result, Tensor) or any(result is tensor for tensor in tensors) or result.ndim == 0:
            return result
        if result.requires_grad:
            self.inject_early = False
        return self._as_leaf(result) if self.inject_early and result.shape[0] % self.n == 0 else result

    def _derive(
        self,
        func: Callable[..., Any],
        name: str,
        args: Args,
        kwargs: Kwargs,
        tensors: list[Tensor],
        operands: list[Tracked],
    ) -> Any:
        """An operation that knows no samples: its result is tracked in its turn."""
        tracked = self.tracked
        if self.copy_operands and not is_inplace(name):
            args, kwargs = tree_map_only(Tensor, lambda arg: arg if id(arg) in tracked else arg.clone(), (args, kwargs))
            tensors = _tensors(args, kwargs)
        versions = [_version(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        names = tuple(dict.fromkeys(name for operand in operands for name in operand.parameters))
        if versions != [_version(tensor) for tensor in tensors]:  # written in place: `evaluate` does not know
            self.uncaptured.update(dict.fromkeys(names, name))
            return result
        self.constants += [(t, v) for t, v in zip(tensors, versions, strict=True) if id(t) not in tracked]

        def evaluate(values: Mapping[str, Tensor], pick: Callable[[Any], Any]) -> Tensor:
            def swap(tensor: Tensor) -> Tensor:
                return tracked[id(tensor)].evaluate(values) if id(tensor) in tracked else tensor

            return pick(func(*tree_map_only(Tensor, swap, args), **tree_map_only(Tensor, swap, kwargs)))

        is_once = len(operands) == sum(id(tensor) in tracked for tensor in tensors)

        def steps(n: int, args: Args) -> Steps | None:
            found = [(operand, find(name, operand.tensor, n, args, kwargs)) for operand in operands]
            known = [(operand, finish) for operand, finish in found if finish is not None]
            return known if is_once and len(known) == len(found) else None

        def of_constants(n: int) -> Steps | None:  # outer products, with the same constants for every sample
            return steps(n, (args[0].expand(n, *args[0].shape), *args[1:]))

        def track(tensor: Any, pick: Callable[[Any], Any], *steps: Any) -> None:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in tracked:
                tracked[id(tensor)] = Tracked(tensor, names, lambda values: evaluate(values, pick), *steps)

        if isinstance(result, Tensor):
            is_product = name in ("embedding", "linear") and bool(args) and id(args[0]) not in tracked
            own = steps(self.n, args) if result.ndim and result.shape[0] == self.n else None
            track(result, lambda result: result, of_constants if is_product else None, own)
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                track(part, itemgetter(index))
        return result

    def _use(
        self,
        func: Callable[..., Any],
        name: str,
        args: Args,
        kwargs: Kwargs,
        tensors: list[Tensor],
        operands: list[Tracked],
    ) -> Any:
        """An operation of parameters with samples: ask its rule, run it, mark its output."""
        inplace = is_inplace(name)
        found: list[Use] = []
        if self.copy_operands and not inplace:
            keep = self.tracked
            args, kwargs = tree_map_only(Tensor, lambda arg: arg if id(arg) in keep else arg.clone(), (args, kwargs))
            tensors = _tensors(args, kwargs)
        data, named_data = [self._data(arg) for arg in args], {key: self._data(arg) for key, arg in kwargs.items()}
        others = [] if inplace else [(arg, _version(arg)) for arg in tensors if id(arg) not in self.tracked]
        rows: dict[int, Tensor] = {}
        for operand in operands:
            is_once = sum(tensor is operand.tensor for tensor in tensors) == 1
            is_written = inplace and (operand.tensor is args[0] or _whole(args[0]) is None)
            finish = find(name, operand.tensor, self.n, data, named_data) if is_once and not is_written else None
            if finish is not None:
                found.append(Use(operand, finish, len(self.edges), others))
            elif operand.own_steps and not is_written and keeps_samples_apart(name, tensors, args, kwargs):
                rows[id(operand.tensor)] = self._enter(operand)
            else:
                self.uncaptured.update(dict.fromkeys(operand.parameters, name))
        if rows:
            args, kwargs = tree_map_only(Tensor, lambda arg: rows.get(id(arg), arg), (args, kwargs))
            found = [replace(use, edge=len(self.edges)) for use in found]
        output = func(*args, **kwargs)
        if not found:
            return output
        if not output.requires_grad:
            leaf = torch.zeros_like(output) if inplace else output.detach()
            leaf.requires_grad_()
            # A clone, because the model may change its own tensor in place, which a leaf forbids. (An in-place
            # operation must keep its tensor: there the graph enters by adding zeros.)
            output = output.add_(leaf) if inplace else leaf.clone()
        whole = _whole(output)
        if whole is None:
            whole = output = output.clone()
        self.edges.append(get_gradient_edge(whole))
        self.uses += found if whole is output else [replace(use, finish=_viewed(use.finish, output)) for use in found]
        return output

    def _enter(self, operand: Tracked) -> Tensor:
        """The rows of a tracked tensor are the samples' own: from here on it is an activation as any other."""
        rows = operand.tensor.detach().requires_grad_().clone()
        assert operand.own_steps is not None
        self.uses += [Use(source, finish, len(self.edges)) for source, finish in operand.own_steps]
        self.edges.append(get_gradient_edge(rows))
        return rows

    def _data(self, arg: Any) -> Any:
        """An argument without its graph, for a rule to keep; a tracked one as it is, for the rule to recognise."""
        if isinstance(arg, (tuple, list)):
            return type(arg)(map(self._data, arg)) if type(arg) in (tuple, list) else arg
        return wide(arg.detach()) if isinstance(arg, Tensor) and id(arg) not in self.tracked else arg

    def operands_changed(self) -> bool:
        """Whether the model changed an operand in place after its use: what was kept is then not what was used."""
        kept = [*self.constants, *(pair for use in self.uses for pair in use.operands)]
        return any(_version(tensor) != version for tensor, version in kept)

    def without_rule(self) -> dict[str, str]:
        """Parameters this pass has no gradients for, and why: {name: the operation that has no rule}."""
        used = {name for use in self.uses for name in use.tracked.parameters}
        return {
            name: self.uncaptured.get(name, "never used directly")
            for name in self.parameters
            if name in self.uncaptured or name not in used
        }

    def gradients(self, output: Tensor, cotangent: Tensor) -> dict[str, SampleGradient]:
        """Per-sample gradients of <output_i, cotangent_i> for every captured parameter the output depends on."""
        if not output.requires_grad or not self.edges:
            return {}
        return self.collect(torch.autograd.grad(output, self.edges, cotangent, allow_unused=True))

    def collect(self, at_edges: Sequence[Tensor | None], but: Collection[Use] = ()) -> dict[str, SampleGradient]:
        """{parameter: gradient} from the gradients D at `edges`; contributions of several uses (`but` some) add up."""
        return add_up(
            use.tracked.pull_back(use.finish(wide(d)), self.parameters)
            for use in self.usable()
            if (d := at_edges[use.edge]) is not None and not any(use is other for other in but)
        )

    def usable(self) -> list[Use]:
        """The uses of parameters all of whose uses have a rule."""
        return [use for use in self.uses if not any(name in self.uncaptured for name in use.tracked.parameters)]


def operations_without_rule(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Any) -> dict[str, str]:
    """Which of a frozen model's chosen parameters go to the slow oracle, and by which operation: {name: operation}.

    Args:
        model: the target model.
        parameters: the chosen ones, by name (see `select_parameters`).
        inputs: the model's inputs (see `inputs_of`), two samples at least.
    """
    with torch.inference_mode(False), torch.enable_grad(), Capture(model, parameters, batch_size(inputs)) as capture:
        call_model(model, inputs)
    return capture.without_rule()


def is_inplace(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _whole(tensor: Tensor) -> Tensor | None:
    """The tensor that `tensor` is a view of, if one is as good as the other; itself if it is no view.

    Writing into a view makes its base a function of what was written, and leaves the view's own past without gradient.
    """
    base = tensor._base
    if base is None:
        return tensor
    return base if base.numel() == tensor.numel() and base.is_contiguous() and tensor.is_contiguous() else None


def _viewed(finish: Finish, output: Tensor) -> Finish:
    shape = output.shape
    return lambda d: finish(d.reshape(shape))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # an inference tensor does not count its versions


def _tensors(args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Tensors among the arguments, one level of lists deep (torch.cat and the like)."""
    found: list[Tensor] = []
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (tuple, list)):
            found += [part for part in arg if isinstance(part, Tensor)]
    return found
