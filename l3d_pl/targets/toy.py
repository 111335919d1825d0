"""The paper's toy models. Their tensors are named as in the targets' safetensors files, so those load as they are."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, relu


class TiedAutoencoder(nn.Module):
    """Toy model of superposition (TMS): relu(x W_in W_inᵀ + b), one matrix that is used twice.

    Parameters: `W_in` [features, hidden], `b` [features]. Row i of `W_in` is the direction of feature i.

    Args:
        features: length of an input and of the output.
        hidden: length of the code.
        gain: scale of the random start, relative to Xavier's. Small, so that the task's strongest directions grow first
            and no unit is caught at a large value of the wrong sign.
    """

    def __init__(self, features: int = 5, hidden: int = 2, gain: float = 0.1) -> None:
        super().__init__()
        self.gain = gain
        self.W_in = nn.Parameter(torch.empty(features, hidden))
        self.b = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new start from torch's global random state."""
        nn.init.xavier_normal_(self.W_in, self.gain)
        nn.init.zeros_(self.b)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, features] -> [N, features]."""
        return relu(inputs @ self.W_in @ self.W_in.T + self.b)


class Autoencoder(nn.Module):
    """Toy model of compressed computation (TMCS) and of high-rank circuits: relu(x W_in W_out + b).

    Parameters: `W_in` [features, hidden], `W_out` [hidden, outputs], `b` [outputs]. Trained on x -> x A, so W_in W_out
    is the target's estimate of A [features, outputs], of the rank that fits through the hidden layer.

    Args:
        features: length of an input.
        hidden: length of the code.
        outputs: length of the output; as long as an input if None.
        gain: scale of the random start, as in `TiedAutoencoder`.
    """

    def __init__(self, features: int = 10, hidden: int = 5, outputs: int | None = None, gain: float = 0.1) -> None:
        super().__init__()
        outputs = features if outputs is None else outputs
        self.gain = gain
        self.W_in = nn.Parameter(torch.empty(features, hidden))
        self.W_out = nn.Parameter(torch.empty(hidden, outputs))
        self.b = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new start from torch's global random state."""
        nn.init.xavier_normal_(self.W_in, self.gain)
        nn.init.xavier_normal_(self.W_out, self.gain)
        nn.init.zeros_(self.b)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, features] -> [N, outputs]."""
        return relu(inputs @ self.W_in @ self.W_out + self.b)


class MLP(nn.Sequential):
    """The model of X -> X²: linear layers `0`, `1`, ..., each followed by an ELU, the last one too (authors' code).

    Args:
        sizes: lengths of the input, of each hidden layer and of the output.
    """

    def __init__(self, sizes: tuple[int, ...] = (5, 10, 10, 10, 10, 5)) -> None:
        super().__init__(*(nn.Linear(a, b) for a, b in pairwise(sizes)))

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, sizes[0]] -> [N, sizes[-1]]."""
        for layer in self:
            inputs = elu(layer(inputs))
        return inputs


@torch.no_grad()
def features_represented(model: nn.Module, n_features: int) -> int:
    """Of how many features the model, trained on x -> x, gives back more than half when they are active alone.

    Counted is what a feature adds to the output for zeros, at its own place, if it adds most there. A feature that
    found no room in the code comes out as a constant, and adds nothing.
    """
    added = model(torch.eye(n_features)) - model(torch.zeros(1, n_features))
    return int(((added.diagonal() > 0.5) & (added.argmax(1) == torch.arange(n_features))).sum())


@torch.no_grad()
def squared_correlation_with_task(model: Autoencoder, A: Tensor) -> float:
    """Squared correlation, over all entries, of W_in W_out with the task's A [features, outputs].

    The ceiling of what can be read off the target's subnetworks: it never learned A better than this.
    """
    learned = model.W_in @ model.W_out
    return torch.corrcoef(torch.stack([learned.flatten(), A.flatten()]))[0, 1].item() ** 2


def learned_of_truth(model: nn.Module, truth: dict[str, Tensor]) -> dict[str, float]:
    """How much of its task a trained toy model holds, beside its loss; empty where there is no such figure.

    `features_represented` for a tied autoencoder, `r2_of_A` for an autoencoder where `truth` has A.
    """
    if isinstance(model, TiedAutoencoder):
        return {"features_represented": float(features_represented(model, len(model.W_in)))}
    if isinstance(model, Autoencoder) and "A" in truth:
        return {"r2_of_A": squared_correlation_with_task(model, truth["A"])}
    return {}
