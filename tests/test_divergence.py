"""Divergences against their definitions and autograd; where references come from."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from l3d_pl import L3DError
from l3d_pl.divergence import KL, MSE, Divergence, make_divergence, make_references

SHAPES = [(6, 5), (6, 3, 5), (6, 2, 3, 5)]


def mse(output: Tensor, reference: Tensor) -> Tensor:
    return torch.stack([F.mse_loss(o, r, reduction="sum") for o, r in zip(output, reference, strict=True)])


def kl(output: Tensor, reference: Tensor) -> Tensor:
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (reference, output))
    return torch.distributions.kl_divergence(p, q).reshape(len(output), -1).sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "definition"), [("mse", mse), ("kl", kl)])
def test_value_and_gradient(name: str, definition: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    divergence = make_divergence(name)
    output, reference = torch.randn(shape).double().requires_grad_(), torch.randn(shape).double()
    value = divergence(output, reference)
    torch.testing.assert_close(value, definition(output, reference))
    (expected,) = torch.autograd.grad(definition(output, reference).sum(), output)
    torch.testing.assert_close(divergence.gradient(output, reference), expected)
    with torch.no_grad():  # the general way, for divergences without a closed form
        torch.testing.assert_close(Divergence.gradient(divergence, output, reference), expected)


@pytest.mark.parametrize("name", ["mse", "kl"])
def test_divergence_of_an_output_from_itself_is_zero(name: str) -> None:
    output = torch.randn(6, 5)
    torch.testing.assert_close(make_divergence(name)(output, output), torch.zeros(6))
    torch.testing.assert_close(make_divergence(name).gradient(output, output), torch.zeros(6, 5))


def test_kl_of_distant_logits_stays_finite() -> None:
    output, reference = torch.tensor([[300.0, -300.0]]), torch.tensor([[-300.0, 300.0]])
    torch.testing.assert_close(KL()(output, reference), torch.tensor([600.0]))
    torch.testing.assert_close(KL().gradient(output, reference), torch.tensor([[1.0, -1.0]]))


def test_custom_callable_and_its_name() -> None:
    def cubic(output: Tensor, reference: Tensor) -> Tensor:
        return (output - reference).abs().pow(3).sum(-1)

    divergence, output, reference = make_divergence(cubic), torch.randn(6, 5), torch.randn(6, 5)
    difference = output - reference
    assert divergence.name == "cubic"
    torch.testing.assert_close(divergence(output, reference), cubic(output, reference))
    torch.testing.assert_close(divergence.gradient(output, reference), 3 * difference * difference.abs())
    assert make_divergence(divergence) is divergence
    with pytest.raises(L3DError, match=r"^divergence: found 'msse', allowed are mse, kl; did you mean 'mse'\?$"):
        make_divergence("msse")


def draws(n: int, count: int) -> Tensor:
    """[count, n]: which sample each one was paired with."""
    outputs, generator = torch.arange(n).float().unsqueeze(1), torch.Generator().manual_seed(0)
    return torch.stack([make_references("random", outputs, MSE(), generator)[:, 0] for _ in range(count)]).long()


def test_random_never_pairs_a_sample_with_itself_and_others_uniformly() -> None:
    """Chi-square of each sample's 3 possible partners: 2 degrees of freedom, 99.99 % quantile 18.4."""
    paired = draws(4, 3000)
    counts = torch.stack([(paired == other).sum(0) for other in range(4)], 1)  # [sample, partner]
    assert torch.equal(counts.diagonal(), torch.zeros(4, dtype=torch.long))
    assert torch.equal(counts.sum(1), torch.full((4,), 3000))
    expected = (1 - torch.eye(4)) * 1000
    chi_square = ((counts - expected).square() / expected.clamp_min(1)).sum(1)
    assert (chi_square < 18.4).all(), counts


def test_random_pairs_of_different_samples_are_drawn_independently() -> None:
    """Given sample 0's partner, sample 1 still meets each of its own: not one shift for the whole batch."""
    paired = draws(4, 3000)
    partners = paired[paired[:, 0] == 2][:, 1]
    counts = torch.bincount(partners, minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] > 250).all(), counts


def test_random_with_two_samples_is_the_other_one() -> None:
    outputs = torch.randn(2, 3, 4)
    assert torch.equal(make_references("random", outputs, MSE()), outputs.flip(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_reference(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape)
    found = make_references("mean", outputs, MSE())
    torch.testing.assert_close(found, outputs.mean(0, keepdim=True).expand(shape))
    probabilities = make_references("mean", outputs, KL()).softmax(-1)
    torch.testing.assert_close(probabilities, outputs.softmax(-1).mean(0, keepdim=True).expand(shape))
    certain = make_references("mean", torch.tensor([[0.0, 1000.0]]), KL())
    assert certain.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_reference(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape)
    distributions = make_references("uniform", outputs, KL()).softmax(-1)
    torch.testing.assert_close(distributions, torch.full(shape, 1 / shape[-1]))
    values = make_references("uniform", outputs.double(), MSE(), torch.Generator().manual_seed(0))
    assert values.shape == shape
    assert values.dtype == torch.float64
    assert (values >= outputs.amin(0)).all()
    assert (values <= outputs.amax(0)).all()
    assert values.flatten(1).std(0).min() > 0


def test_references_carry_no_graph() -> None:
    outputs = torch.randn(4, 3, requires_grad=True) * 2
    for reference in ("random", "mean", "uniform", "contrastive"):
        assert not make_references(reference, outputs, KL(), contrast=outputs).requires_grad


def test_contrastive_references_are_those_given() -> None:
    contrast = torch.randn(4, 3)
    assert torch.equal(make_references("contrastive", torch.randn(4, 3), MSE(), contrast=contrast), contrast)


@pytest.mark.parametrize(
    ("reference", "n", "message"),
    [
        (
            "random",
            1,
            "^reference: 'random' pairs a sample with another .*, found a batch of 1; allowed are batches of 2",
        ),
        ("contrastive", 4, "^reference: 'contrastive' needs batches with an entry 'contrast'"),
        (
            "randm",
            4,
            "^reference: found 'randm', allowed are random, mean, uniform, contrastive; did you mean 'random'",
        ),
    ],
)
def test_bad_references_are_one_clear_line(reference: str, n: int, message: str) -> None:
    with pytest.raises(L3DError, match=message) as caught:
        make_references(reference, torch.randn(n, 3), MSE())
    assert "\n" not in str(caught.value)
