"""Per-sample gradients of whole models, in every format of batch and output; what the two representations compute."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assert_same, autograd_loop
from torch import Tensor, nn

from l3d_pl import L3DError, per_sample_gradients
from l3d_pl.gradients import GradientExtractor
from l3d_pl.gradients.functional import loop_gradients, vmap_gradients
from l3d_pl.targets.frozen import fingerprint, freeze, select_parameters
from l3d_pl.targets.toy import MLP, Autoencoder, TiedAutoencoder

N = 4


class First(nn.Module):
    """The first output of a module that returns a tuple, called with `copies` times the same input."""

    def __init__(self, module: nn.Module, copies: int = 1):
        super().__init__()
        self.module, self.copies = module, copies

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*[x] * self.copies)[0]


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(nn.Linear(8, 4), layer, nn.GELU())


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    model[4] = model[0]
    return model


def batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 4))
    model.train()(torch.randn(16, 3, 4))
    return model


# name: (model, shape of one input, parameters covered by a rule)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "tms": (lambda: TiedAutoencoder(8, 2, gain=1.0), (8,), True),
    "tmcs": (lambda: Autoencoder(8, 4, gain=1.0), (8,), True),
    "squared": (lambda: MLP((8, 10, 4)), (8,), True),
    "positions": (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 8)), (4, 8), True),
    "tied": (tied, (8,), True),
    "parametrised": (symmetric, (8,), True),
    "weight-norm": (WeightNormed, (8,), True),
    "layer-norm": (lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 8)), (4, 8), True),
    "lstm": (lambda: First(nn.LSTM(8, 3, batch_first=True)), (4, 8), False),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ELU(), nn.ConvTranspose2d(4, 2, 2)),
        (2, 4, 4),
        False,
    ),
    "attention": (lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3), (4, 8), False),
    "batch-norm": (batch_norm, (3, 4), True),
    "prelu-group-norm": (lambda: nn.Sequential(nn.Linear(8, 4), nn.PReLU(4), nn.GroupNorm(2, 4)), (8,), False),
}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("name", list(MODELS))
def test_model_equals_loop(name: str, divergence: str, dtype: torch.dtype, rtol: float) -> None:
    build, shape, is_captured = MODELS[name]
    model = build().to(dtype).eval()
    x = torch.randn(N, *shape, dtype=dtype)
    references = torch.randn_like(model(x).detach())
    expected = autograd_loop(model, x, references, divergence)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extractor = GradientExtractor(freeze(model), select_parameters(model, "*"), divergence)
        found = extractor(x, references=references)
        extractor.check(x, found, index=1)
        extractor(x, references=references)
    messages = [str(warning.message) for warning in caught if "no gradient rule" in str(warning.message)]
    assert messages == [] if is_captured else len(messages) == 1
    assert list(found.gradients) == [parameter for parameter, _ in model.named_parameters()]
    assert_same(found.outputs, model(x), rtol)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in found.gradients.items():
        assert_same(gradient.dense(), expected[parameter], rtol, scale)


@pytest.mark.parametrize("function", [vmap_gradients, loop_gradients])
def test_oracle_equals_loop_and_leaves_the_models_own_tensors(function: Callable[..., dict[str, Tensor]]) -> None:
    model, x = tied().double(), torch.randn(N, 8).double()
    references, before = torch.randn(N, 8).double(), dict(model.named_parameters(remove_duplicate=False))
    expected = autograd_loop(model, x, references)
    found = function(
        model, dict(model.named_parameters()), (x, "labels"), references, lambda a, b: (a - b).square().sum(-1)
    )
    for name, gradient in found.items():
        assert_same(gradient, expected[name])
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is tensor for name, tensor in before.items())


# -- batches and outputs --------------------------------------------------


class TwoInputs(nn.Module):
    """Keyword arguments in, and an output wrapped by `wrap`."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda output: output) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(5, 3), nn.Linear(2, 3, bias=False), wrap

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return self.wrap((self.a(left) * self.b(right)).tanh())


def model_output(logits: Tensor) -> Any:
    return pytest.importorskip("transformers.modeling_outputs").SequenceClassifierOutput(logits=logits)


@pytest.mark.parametrize(
    "wrap",
    [lambda o: o, lambda o: {"loss": None, "logits": o}, lambda o: (o, "state"), model_output],
    ids=["tensor", "dict", "tuple", "hf"],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_keyword_batches_and_wrapped_outputs(wrap: Callable[[Tensor], Any], is_nested: bool) -> None:
    model = freeze(TwoInputs(wrap).double())
    arguments = {"left": torch.randn(N, 5).double(), "right": torch.randn(N, 2).double()}
    references = torch.randn(N, 3).double()
    batch = (
        {"inputs": arguments, "labels": torch.zeros(N)}
        if is_nested
        else arguments | {"labels": torch.zeros(N), "contrast": None}
    )
    extractor = GradientExtractor(model, select_parameters(model, "*"))
    found = extractor(batch, references=references)
    extractor.check(batch, found)
    for name, expected in autograd_loop(model, arguments, references).items():
        assert_same(found.gradients[name].dense(), expected)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, 0), lambda x: [x, 0], lambda x: {"inputs": x, "labels": 0}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_batch_formats_mean_the_same(wrap: Callable[[Tensor], Any]) -> None:
    model, x = freeze(MLP((5, 4, 3))), torch.randn(N, 5)
    references = torch.randn(N, 3)
    expected = per_sample_gradients(model, x, reference=references)
    for name, gradient in per_sample_gradients(model, wrap(x), reference=references).items():
        assert torch.equal(gradient.dense(), expected[name].dense())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer(pair[0]).tanh() * pair[1]


def test_input_that_is_a_tuple_itself() -> None:
    model, pair = freeze(Pair()), (torch.randn(N, 5), torch.randn(N, 3))
    extractor = GradientExtractor(model, select_parameters(model, "*"))
    found = extractor((pair, torch.zeros(N)), references=torch.zeros(N, 3))
    extractor.check((pair, torch.zeros(N)), found, index=2)
    assert_same(
        found.gradients["layer.bias"].dense(), 2 * found.outputs * (1 - (found.outputs / pair[1]) ** 2) * pair[1], 1e-4
    )


@pytest.mark.parametrize("output", [None, 3, {"hidden": torch.ones(1)}, ("no tensor",)])
def test_output_without_a_tensor_is_one_clear_line(output: Any) -> None:
    model = nn.Linear(2, 2)
    model.forward = lambda x: output  # type: ignore[method-assign]
    with pytest.raises(
        L3DError, match=r"target model Linear: its output is a .*; a tensor, a tuple or `logits` is needed"
    ):
        per_sample_gradients(model, torch.ones(2, 2))


@pytest.mark.parametrize("batch", [{"inputs": "text"}, torch.tensor(1.0), {"labels": torch.ones(2)}])
def test_batch_without_samples_is_one_clear_line(batch: Any) -> None:
    with pytest.raises(L3DError, match="batch: found no tensor with a sample dimension"):
        per_sample_gradients(nn.Linear(2, 2), batch)


def test_contrastive_references_are_the_outputs_of_the_contrast() -> None:
    model, x, contrast = freeze(MLP((5, 4, 3))), torch.randn(N, 5), torch.randn(N, 5)
    found = per_sample_gradients(model, {"inputs": x, "contrast": contrast}, reference="contrastive")
    for name, expected in autograd_loop(model, x, model(contrast)).items():
        assert_same(found[name].dense(), expected, 1e-4)
    with pytest.raises(L3DError, match="needs batches with an entry 'contrast'"):
        per_sample_gradients(model, {"inputs": x}, reference="contrastive")


def test_chosen_parameters_only_and_a_glob_that_matches_nothing() -> None:
    model = MLP((5, 4, 3))
    assert list(per_sample_gradients(model, torch.randn(N, 5), parameters="1.*")) == ["1.weight", "1.bias"]
    assert list(per_sample_gradients(model, torch.randn(N, 5), parameters=["re:[01].bias", "0.*"])) == [
        "0.weight",
        "0.bias",
        "1.bias",
    ]
    with pytest.raises(L3DError, match=r"'2\.weight' matches no parameter of MLP; did you mean"):
        per_sample_gradients(model, torch.randn(N, 5), parameters="2.weight")
    named = nn.ModuleDict({"blocks": nn.ModuleList([model]), "head": nn.Linear(3, 2)})
    for pattern, near in (
        ("blok.*", "'blocks.*'"),
        ("block.*.weight", "'blocks.*.*.weight'"),
        ("*.weigth", "'*.weight'"),
        ("haed.*", "'head.*'"),
        ("heat.bias", "'head.bias'?"),
    ):
        with pytest.raises(
            L3DError, match=re.escape(f"{pattern!r} matches no parameter of ModuleDict; did you mean")
        ) as error:
            select_parameters(named, pattern)
        assert near in str(error.value)
        for option in re.findall(r"'([^']+)'", str(error.value).split("did you mean")[1]):
            assert select_parameters(named, option)  # what is offered is good
    with pytest.raises(L3DError, match="is not a regular expression"):
        per_sample_gradients(model, torch.randn(N, 5), parameters="re:(")
    with pytest.raises(
        L3DError, match=r"sample: found 'itme', allowed are item, token, sequence; did you mean 'item'\?"
    ):
        per_sample_gradients(model, torch.randn(N, 5), sample="itme")


# -- what must not happen --------------------------------------------------


class Centred(nn.Module):
    """Mixes samples: subtracts the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h - h.mean(0))


class SequenceFirst(Centred):
    """Keeps samples in the second dimension inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.transpose(0, 1)).tanh()).transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "shape"), [(Centred(), (5,)), (SequenceFirst(), (N, 5))], ids=["batch-mean", "sequence-first"]
)
def test_check_refuses_models_that_mix_samples(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(N, *shape)
    extractor = GradientExtractor(freeze(model), select_parameters(model, "*.weight"))
    extraction = extractor(x, torch.Generator().manual_seed(0))
    with pytest.raises(
        L3DError, match=r"parameter 'first\.weight': its gradient for sample 2 .* differs .* must keep samples apart"
    ):
        extractor.check(x, extraction, index=2)


def test_check_looks_at_the_sample_with_the_largest_gradient() -> None:
    """Rounding is most of what is left of a gradient where the output is as its reference."""
    model, x = freeze(nn.Linear(5, 3)), torch.randn(N, 5).sign()
    references = model(x) + torch.tensor([1e-8, 1.0, 3.0, 2.0])[:, None]
    extractor = GradientExtractor(model, select_parameters(model, "*"))
    for sample in range(N):
        extraction = extractor(x, references=references)
        values = extraction.gradients["bias"].dense()
        values[sample] += 1.0  # (of what was extracted: a bias gradient is kept dense)
        if sample == 2:
            with pytest.raises(L3DError, match="parameter 'bias': its gradient for sample 2"):
                extractor.check(x, extraction)
        else:
            extractor.check(x, extraction)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", ["tms", "squared", "batch-norm", "weight-norm"])
def test_frozen_means_frozen(name: str, is_trainable: bool) -> None:
    build, shape, _ = MODELS[name]
    model = build().eval().requires_grad_(is_trainable)
    before, x = fingerprint(model), torch.randn(N, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients = per_sample_gradients(model, x)
    assert fingerprint(model) == before
    for parameter in model.parameters():
        assert parameter.requires_grad == is_trainable
        assert parameter.grad is None
        assert parameter.is_leaf
    assert not any(gradient.dense().requires_grad for gradient in gradients.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_grad_mode_does_not_matter(context: Callable[[], Any]) -> None:
    model, x, references = MLP((5, 4, 3)), torch.randn(N, 5), torch.randn(N, 3)
    expected = autograd_loop(model, x, references)
    with context():
        for name, gradient in per_sample_gradients(model, x, reference=references).items():
            assert_same(gradient.dense(), expected[name], 1e-4)


@pytest.mark.parametrize("reference", ["random", "uniform"])
def test_generator_makes_references_reproducible(reference: str) -> None:
    model, x = freeze(MLP((5, 4, 3))), torch.randn(16, 5)
    extractor = GradientExtractor(model, select_parameters(model, "*"), reference=reference)
    first, again, other = (extractor(x, torch.Generator().manual_seed(seed)).references for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
