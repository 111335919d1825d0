"""On the factored path nothing of the size of samples x n_w or n_v x n_w exists, in a whole step."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l3d_pl import L3DError, sharded
from l3d_pl.gradients import GradientExtractor
from l3d_pl.parallel import Ranks
from l3d_pl.sharded import share_gradients
from l3d_pl.step import decompose
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.frozen import freeze, select_parameters


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that any operation has made."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() >= leaf.numel() * leaf.element_size():
                self.values = max(self.values, leaf.numel())
        return result


class Mixer(nn.Module):
    """Positions meet in a causal mean between two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).tanh()
        mixed = hidden.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
        return self.head(self.second(mixed).tanh())


@pytest.mark.parametrize(("sample", "positions"), [("token", 6), ("sequence", 6), ("item", 1)])
def test_no_tensor_grows_as_samples_or_subnetworks_times_weights(sample: str, positions: int) -> None:
    torch.manual_seed(0)
    width, n_v, sequences = 160, 48, 8
    model = freeze(Mixer(width))
    chosen = select_parameters(model, ["first.weight", "second.weight"])
    extractor = GradientExtractor(model, chosen, "kl", "random", sample)
    subnetworks = Subnetworks({name: p.shape for name, p in chosen.items()}, n_v, 2, memory_budget=2e-3)
    subnetworks.is_dense = lambda name, gradient: False  # type: ignore[method-assign]
    batch, random = torch.randn(sequences, positions, width), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(subnetworks.parameters())
    with Largest() as largest:
        extraction = extractor(batch, random)
        prepared = subnetworks.prepare(extraction.gradients)
        decompose(subnetworks, prepared, 0.1).loss.sum().backward()
        optimizer.step()
        subnetworks.normalise_()
    samples, n_w = extraction.n_samples, 2 * width**2
    allowed = max(
        n_v * width * 2,  # a factor
        samples * positions * width,  # D
        sequences * positions * n_v * 2,  # A through the factors
        n_v * n_v * 4,  # M through ranks
        width**2,  # a weight
        subnetworks.chunk,
    )
    assert largest.values <= allowed < min(samples, n_v) * n_w / 4


class Sent:
    """Counts the bytes that a rank of a group sends, by what the collectives say of themselves."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch):
        self.bytes, self.size = 0.0, size
        for name, its in (
            ("all_gather_into_tensor", lambda whole, own, **_: (size - 1) * own.nbytes),
            ("all_gather", lambda parts, own, **_: (size - 1) * own.nbytes),
            ("all_reduce", lambda tensor, **_: 2 * (size - 1) / size * tensor.nbytes),
            ("batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
        ):
            patch.setattr(dist, name, self._counted(getattr(dist, name), its))

    def _counted(self, original: Callable[..., Any], sent: Callable[..., float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.bytes += sent(*args, **kwargs)
            return original(*args, **kwargs)

        return call


def bytes_held() -> int:
    """Of all tensors that there are, their gradients included."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _a_sharded_step() -> None:
    """Of S ranks each holds 1/S of V, gradients and moments, and sends what docs/scaling.md says."""
    ranks = Ranks.of_run()
    torch.manual_seed(0)
    width, n_v, rank, samples = 160, 480, 2, 16
    model = freeze(Mixer(width))
    chosen = select_parameters(model, ["first.weight", "second.weight"])
    extractor = GradientExtractor(model, chosen, "kl", "random", "item")
    before = bytes_held()
    shapes = {name: parameter.shape for name, parameter in chosen.items()}
    subnetworks = Subnetworks(shapes, n_v, rank, memory_budget=2e-3, group=ranks)
    subnetworks.is_dense = lambda name, gradient: False  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(subnetworks.parameters())
    batch = torch.randn(samples // ranks.size, 1, width, generator=torch.Generator().manual_seed(ranks.rank))

    side = 2 * n_v * (2 * width * rank + rank**2)  # values of V_out
    captured, codes = samples // ranks.size * 2 * 2 * width, samples * n_v // ranks.size
    with pytest.MonkeyPatch.context() as patch:
        for step in range(2):
            sent = Sent(ranks.size, patch)
            extraction = extractor(batch, torch.Generator().manual_seed(step))
            with Largest() as largest:
                prepared = subnetworks.prepare(share_gradients(extraction.gradients, ranks))
                sharded.decompose(subnetworks, prepared, 0.1, ranks).loss.sum().backward()
            if step == 1:
                del extraction, prepared
                held = bytes_held() - before
            optimizer.step()
            subnetworks.normalise_()
            subnetworks.zero_grad()
            patch.undo()
    assert held == pytest.approx(4 * 4 * 2 * side / ranks.size, rel=0.1)
    formula = (ranks.size - 1) / ranks.size * side + (ranks.size - 1) * (captured + codes)
    assert sent.bytes == pytest.approx(4 * formula, rel=0.1)
    if ranks.size > 1:
        # Two shards at once, the own one and one that passes, are the most: never all of V_out, nor samples x n_w.
        assert largest.values <= max(side // ranks.size, subnetworks.chunk, n_v * n_v // ranks.size * rank**2)
        assert largest.values < min(side, samples * 2 * width**2)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_shard_is_all_that_a_rank_holds_and_its_formula_what_it_sends(size: int, tmp_path: Path) -> None:
    on_ranks(size, tmp_path, _a_sharded_step)


def test_the_memory_budget_decides_between_dense_and_factored() -> None:
    model = freeze(nn.Linear(200, 200, bias=False))
    gradients = GradientExtractor(model, dict(model.named_parameters()))(torch.randn(4, 200)).gradients
    path, why = Subnetworks({"weight": (200, 200)}, 500, 20, memory_budget=1e-3).path_of("weight", gradients["weight"])
    assert path == "factored"
    assert "memory budget" in why
    with pytest.raises(L3DError, match="memory_budget: found 0"):
        Subnetworks({"weight": (200, 200)}, 5, 2, memory_budget=0)
