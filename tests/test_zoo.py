"""Whole models of every family: captured gradients of all parameters equal a plain autograd loop over the samples."""

import copy
import math
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from oracles import DIVERGENCES, assert_same, autograd_loop
from torch import Tensor, nn
from zoo import INPLACE, LANGUAGE, MODULES, ZOO, N, tokens

from l3d_pl.gradients import GradientExtractor
from l3d_pl.gradients.capture import operations_without_rule
from l3d_pl.gradients.samples import TokenPasses
from l3d_pl.targets.frozen import select_parameters


def output_of(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return output["logits"] if isinstance(output, Mapping) else output


def assert_captured(
    model: nn.Module,
    plain: nn.Module,
    inputs: Any,
    oracle: str,
    divergence: str = "mse",
    rtol: float = 1e-6,
    parameters: str = "*",
) -> None:
    """Gradients of `parameters` are those of the loop over `plain`; the oracle serves `oracle` and no others."""
    references = torch.randn_like(output_of(plain, inputs))
    expected = autograd_loop(plain, inputs, references, divergence)
    expected = {name: gradient for name, gradient in expected.items() if fnmatchcase(name, parameters)}
    extractor = GradientExtractor(model, select_parameters(model, parameters), divergence)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no gradient rule covers")
        extraction = extractor(inputs, references=references)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert list(extraction.gradients) == list(expected)
    for name, gradient in extraction.gradients.items():
        assert_same(gradient.dense(), expected[name], rtol, scale)
    assert list(extractor.oracle_parameters) == [name for name in expected if fnmatchcase(name, oracle)]


@pytest.mark.parametrize("name", list(ZOO))
def test_specimen_equals_loop(name: str) -> None:
    model = ZOO[name].model()
    divergence = "kl" if name not in MODULES else "mse"
    assert_captured(model, model, ZOO[name].batch(), ZOO[name].oracle, divergence)


@pytest.mark.parametrize("name", ["gpt2-sdpa", "llama-eager", "depthwise", "einsum", "batch-norm", "class-token"])
def test_specimen_equals_loop_in_single_precision(name: str) -> None:
    model, inputs = ZOO[name].model(torch.float32), ZOO[name].batch(torch.float32)
    assert_captured(model, model, inputs, ZOO[name].oracle, rtol=1e-4)


@pytest.mark.parametrize("name", list(INPLACE))
def test_writing_in_place_equals_the_loop_without(name: str) -> None:
    specimen, expression = INPLACE[name]
    model = specimen.model()
    plain = copy.deepcopy(model)
    plain.expression = expression
    assert_captured(model, plain, specimen.batch(), specimen.oracle)


@pytest.mark.parametrize("sample", ["token", "sequence"])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", list(LANGUAGE))
def test_tokens_and_sequences_equal_autograd_of_each_alone(name: str, padding: bool, sample: str) -> None:
    model, batch = LANGUAGE[name].model(), tokens(length=5, padding=padding)()
    outputs = output_of(model, batch)
    counts = batch.get("attention_mask", torch.ones(N, 5)).bool()
    references = torch.randn_like(outputs[counts] if sample == "token" else outputs)
    extractor = GradientExtractor(model, select_parameters(model, "*"), "kl", sample=sample)
    found = extractor(batch, references=references).gradients

    plain = copy.deepcopy(model).requires_grad_(True)
    expected: dict[str, list[Tensor]] = {name: [] for name in found}
    rows = outputs.new_full(outputs.shape, torch.nan)
    rows[counts] = references if sample == "token" else references[counts]
    for b in range(N):
        logits = output_of(plain, {key: value[b : b + 1] for key, value in batch.items()})[0]
        values = [DIVERGENCES["kl"](logits[t], rows[b, t]) for t in range(5) if counts[b, t]]
        for value in values if sample == "token" else [torch.stack(values).sum()]:
            grads = torch.autograd.grad(value, list(plain.parameters()), retain_graph=True)
            for (parameter, _), grad in zip(plain.named_parameters(), grads, strict=True):
                expected[parameter].append(grad)
    scale = max(float(torch.stack(grads).abs().max()) for grads in expected.values())
    for parameter, gradient in found.items():
        assert_same(gradient.dense(), torch.stack(expected[parameter]), scale=scale)
    assert not extractor.oracle_parameters


@pytest.mark.parametrize("name", list(LANGUAGE))
def test_several_tokens_in_one_backward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does it, in two pieces of three and two of five tokens."""
    model, batch = LANGUAGE[name].model(), tokens(length=5, padding=True)()
    found = []
    for at_once in (1, 3):
        monkeypatch.setattr(
            TokenPasses, "_at_once", lambda self, *_, at_once=at_once: 1 if self.one_by_one else at_once
        )
        extractor = GradientExtractor(model, select_parameters(model, "*"), "kl", sample="token")
        found.append(extractor(batch, torch.Generator().manual_seed(0)).gradients)
        assert not extractor._passes.one_by_one
    for parameter, gradient in found[1].items():
        assert_same(gradient.dense(), found[0][parameter].dense())


def test_what_knows_no_batch_of_gradients_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = LANGUAGE["llama-eager"].model(), tokens(length=5)()
    extractor = GradientExtractor(model, select_parameters(model, "*"), "kl", sample="token")
    expected = extractor(batch, torch.Generator().manual_seed(0)).gradients
    monkeypatch.setattr(TokenPasses, "_at_once", lambda self, *_: 1 if self.one_by_one else 5)
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: Unbatched.apply(output))
    found = extractor(batch, torch.Generator().manual_seed(0)).gradients
    assert extractor._passes.one_by_one
    for parameter, gradient in found.items():
        assert_same(gradient.dense(), expected[parameter].dense())


class Unbatched(torch.autograd.Function):
    """Whose backward pass looks at numbers: vmap cannot run it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        assert math.isfinite(float(d.sum()))
        return d


@pytest.mark.parametrize("parameters", ["blocks.*", "blocks.1.1.*", "first.*", "*"])
@pytest.mark.parametrize(("name", "oracle"), [("", ""), ("-embedding", ""), ("-reentrant", "*")])
def test_activation_checkpointing_anywhere(name: str, oracle: str, parameters: str) -> None:
    """Also where the graph would begin inside what is computed again."""
    specimen = ZOO[f"checkpointed{name}"]
    model, x = specimen.model(), specimen.batch()
    assert_captured(model, model, x, oracle, parameters=parameters)


def test_a_pass_that_is_repeated_draws_the_same_references() -> None:
    model, x = ZOO["checkpointed"].model(), ZOO["checkpointed"].batch()
    extractor = GradientExtractor(model, select_parameters(model, "blocks.*"), reference="uniform")
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    first, second = (extractor(x, generator).references for generator in generators)  # the first begins twice
    assert torch.equal(first, second)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("lstm", "lstm"),
        ("gru", "gru"),
        ("attention", "multi_head_attention_forward"),
        ("transposed", "conv_transpose2d"),
        ("prelu", "prelu"),
        ("bilinear", "bilinear"),
        ("checkpointed-reentrant", "never used directly"),
        ("resnet", None),
        ("gpt2-eager", None),
    ],
)
def test_operations_without_a_rule_are_named(name: str, operation: str | None) -> None:
    model, inputs = ZOO[name].model(), ZOO[name].batch()
    found = operations_without_rule(model, select_parameters(model, "*"), inputs)
    assert set(found.values()) == ({operation} if operation else set())
    assert all(fnmatchcase(parameter, ZOO[name].oracle) for parameter in found)
