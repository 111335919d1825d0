"""On the factored path nothing of the size of samples x n_w or n_v x n_w exists, in a whole step."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l3d_pl import L3DError
from l3d_pl.gradients import GradientExtractor
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


def test_the_memory_budget_decides_between_dense_and_factored() -> None:
    model = freeze(nn.Linear(200, 200, bias=False))
    gradients = GradientExtractor(model, dict(model.named_parameters()))(torch.randn(4, 200)).gradients
    path, why = Subnetworks({"weight": (200, 200)}, 500, 20, memory_budget=1e-3).path_of("weight", gradients["weight"])
    assert path == "factored"
    assert "memory budget" in why
    with pytest.raises(L3DError, match="memory_budget: found 0"):
        Subnetworks({"weight": (200, 200)}, 5, 2, memory_budget=0)
