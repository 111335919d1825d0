"""Divergences between an output and a reference output, and where references come from.

L3D decomposes g_i = grad_W D(f(x_i, W), y_r) at W0 (paper, "Divergence"): D is the divergence, y_r the reference.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from l3d_pl.errors import L3DError, require_choice
from l3d_pl.parallel import ALONE, Ranks


class Divergence:
    """D(output, reference) of every sample: [N, ...], [N, ...] -> [N].

    A user's own divergence is any callable of that form; a subclass can add the closed-form gradient and what "mean"
    and "uniform" mean for its outputs.
    """

    name = "divergence"

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, output: Tensor, reference: Tensor) -> Tensor:
        """dD_i / d output_i, [N, ...]."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            return torch.autograd.grad(self(leaf, reference).sum(), leaf)[0]

    def to_mean(self, outputs: Tensor) -> Tensor:
        """Outputs as the quantity whose mean is the mean reference (for KL: probabilities)."""
        return outputs

    def from_mean(self, mean: Tensor) -> Tensor:
        """The inverse: from that mean to an output."""
        return mean

    def uniform(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """A reference without information, [N, ...]: every output uniform over its range in the batch."""
        low, high = outputs.amin(0, keepdim=True), outputs.amax(0, keepdim=True)
        draw = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
        return low + draw * (high - low)


class MSE(Divergence):
    """Squared error of regression outputs, summed over them: D = sum_j (f_j - r_j)², gradient 2 (f - r)."""

    name = "mse"

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        return (output - reference).square().flatten(1).sum(1)

    def gradient(self, output: Tensor, reference: Tensor) -> Tensor:
        return 2 * (output - reference)


class KL(Divergence):
    """KL(reference ‖ output) of the distributions that two sets of logits [N, ..., classes] stand for.

    The gradient with respect to the output's logits is softmax(output) - softmax(reference).
    """

    name = "kl"

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        log_output, log_reference = F.log_softmax(output, -1), F.log_softmax(reference, -1)
        return (log_reference.exp() * (log_reference - log_output)).flatten(1).sum(1)

    def gradient(self, output: Tensor, reference: Tensor) -> Tensor:
        return output.softmax(-1) - reference.softmax(-1)

    def to_mean(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1)

    def from_mean(self, mean: Tensor) -> Tensor:
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def uniform(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Logits of the uniform distribution."""
        return torch.zeros_like(outputs)


class _Custom(Divergence):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        return self.function(output, reference)


DIVERGENCES: dict[str, type[Divergence]] = {"mse": MSE, "kl": KL}
DivergenceLike = str | Divergence | Callable[[Tensor, Tensor], Tensor]


def make_divergence(divergence: DivergenceLike) -> Divergence:
    """A `Divergence` from its name (`mse`, `kl`), from itself, or from any callable (output, reference) -> [N]."""
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, str):
        require_choice("divergence", divergence, DIVERGENCES)
        return DIVERGENCES[divergence]()
    return _Custom(divergence)


REFERENCES = ("random", "mean", "uniform", "contrastive")


def make_references(
    reference: str,
    outputs: Tensor,
    divergence: Divergence,
    generator: torch.Generator | None = None,
    contrast: Tensor | None = None,
    ranks: Ranks = ALONE,
    drawing: Ranks = ALONE,
) -> Tensor:
    """The reference output y_r of every sample, shaped like `outputs` [N, ...] and detached from any graph.

    - `random`: the output of a random other sample, each of the N - 1 others equally likely, never itself (paper);
      among the samples of all ranks that draw together (`drawing`, each from the same `generator`), else of this one;
    - `mean`: the mean output of the batch, of all ranks (of distributions: the mean distribution);
    - `uniform`: the uniform distribution; for regression a uniform draw from each output's range in the batch;
    - `contrastive`: the outputs of the dataset's own pairs, given as `contrast` [N, ...].

    Raises:
        L3DError: a batch of 1 with random references, missing contrast outputs, an unknown name.
    """
    require_choice("reference", reference, REFERENCES)
    outputs, n = outputs.detach(), outputs.shape[0]
    own, total = drawing.place_of(n, outputs.device)
    if reference == "random":
        if total < 2:
            raise L3DError(
                "reference: 'random' pairs a sample with another of its batch, found a batch of 1; "
                "allowed are batches of 2 or more"
            )
        index = torch.randint(1, total, (total,), generator=generator).add_(torch.arange(total)).remainder_(total)
        return drawing.rows(outputs, index[own].to(outputs.device))
    if reference == "mean":
        means = divergence.to_mean(outputs)
        known = ~means.isnan()  # (positions of a sequence that do not count are not a number)
        mean = ranks.sum(means.nan_to_num(0).sum(0, keepdim=True)) / ranks.sum(known.sum(0, keepdim=True))
        return divergence.from_mean(mean).expand_as(outputs)
    if reference == "uniform":
        if drawing.size == 1 or isinstance(divergence, KL):  # (whose is no draw)
            return divergence.uniform(outputs, generator)
        return divergence.uniform(torch.cat(drawing.all_gather(outputs)), generator)[own]
    if contrast is None:
        raise L3DError(
            "reference: 'contrastive' needs batches with an entry 'contrast' "
            "(inputs whose outputs serve as references); found none"
        )
    return contrast.detach()
