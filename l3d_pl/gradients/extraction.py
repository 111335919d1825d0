"""One call from a batch to every sample's gradient: forward, references, one backward, rules; or the oracle."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l3d_pl.divergence import DivergenceLike, make_divergence, make_references
from l3d_pl.errors import L3DError, require_choice
from l3d_pl.gradients.capture import Capture
from l3d_pl.gradients.forward import batch_size, call_model, inputs_of, slice_inputs, tensors_of
from l3d_pl.gradients.functional import oracle_gradients, sample_gradient
from l3d_pl.gradients.sample_gradient import DenseGradient, SampleGradient, wide
from l3d_pl.gradients.samples import SAMPLES, Samples, TokenPasses, choose_samples
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.targets.frozen import select_parameters


@dataclass(frozen=True)
class Extraction:
    """Per-sample gradients of a batch, with what they were taken of.

    Attributes:
        gradients: {parameter name: gradients of N samples}.
        outputs: each sample's own output of the frozen model, [N, ...], detached; of a sequence NaN where it is masked.
        references: the reference outputs [N, ...].
        samples: which entries of the batch's outputs they are.
    """

    gradients: dict[str, SampleGradient]
    outputs: Tensor
    references: Tensor
    samples: Samples

    @property
    def n_samples(self) -> int:
        return len(self.references)


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class GradientExtractor:
    """g_i = grad_W D(f(x_i, W), y_r) at W0 for every sample of a batch, for chosen parameters of a frozen model.

    Args:
        model: the target model, in eval mode; its parameters are never changed and never need a gradient.
        parameters: {name: tensor} of the chosen ones, the model's own tensors (see `select_parameters`).
        divergence: `mse`, `kl`, a `Divergence`, or any callable (output, reference) -> [N].
        reference: where y_r comes from: `random`, `mean`, `uniform`, `contrastive`.
        sample: what a sample is: `item`, `token` or `sequence` (see samples.py).
        tokens_per_sequence: of token samples, so many of each sequence, drawn anew for each batch; None: all.
        autocast: compute the frozen model's pass in `bf16` or `fp16`; gradients are float32 all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        divergence: DivergenceLike = "mse",
        reference: str = "random",
        sample: str = "item",
        tokens_per_sequence: int | None = None,
        autocast: str | None = None,
    ):
        require_choice("sample", sample, SAMPLES)
        if autocast is not None:
            require_choice("autocast", autocast, AUTOCAST)
        if tokens_per_sequence is not None and (sample != "token" or tokens_per_sequence < 1):
            raise L3DError(
                f"tokens_per_sequence: found {tokens_per_sequence} with sample '{sample}'; "
                "allowed are whole numbers >= 1 with sample 'token'"
            )
        self.model, self.parameters = model, dict(parameters)
        self.sample, self.tokens_per_sequence, self.autocast = sample, tokens_per_sequence, autocast
        self._passes = TokenPasses()
        self._is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self.divergence, self.reference = make_divergence(divergence), reference
        self.oracle_parameters: dict[str, str] = {}  # name -> the operation that has no rule
        self._copy_operands = False
        self._inject_early = False
        self._has_run = False  # the target model has taken a batch

    @torch.no_grad()
    def outputs(self, batch: Any) -> Tensor:
        """The frozen model's outputs [B, ...] alone."""
        with self._precision(batch):
            return call_model(self.model, inputs_of(batch))

    def _precision(self, batch: Any) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(tensors_of(inputs_of(batch))[0].device.type, AUTOCAST[self.autocast])

    def _differentiable(self) -> AbstractContextManager[Any]:
        """Without cuDNN for models with recurrent layers: its own have no gradient in eval mode."""
        return torch.backends.cudnn.flags(enabled=False) if self._is_recurrent else nullcontext()

    def __call__(
        self,
        batch: Any,
        generator: torch.Generator | None = None,
        references: Tensor | None = None,
        ranks: Ranks = ALONE,
        joint: bool = False,
    ) -> Extraction:
        """Gradients of all samples in `batch`.

        Args:
            batch: a tensor, a tuple (inputs, ...), or a mapping (see `inputs_of`).
            generator: random state for the references (CPU).
            references: y_r of every sample, [N, ...], instead of drawing them.
            ranks: who has the other samples that mean references are a mean of.
            joint: draw for all ranks' samples as one process with all of them would, from the same `generator` on each;
                otherwise each rank for its own.

        Raises:
            L3DError: a first batch that the target model cannot take, such as inputs of the wrong width.
        """
        inputs = inputs_of(batch)
        first = tensors_of(inputs)[:1]
        positions = first[0].shape[1] if self.sample == "token" and first and first[0].ndim > 1 else 0
        captured = {name: tensor for name, tensor in self.parameters.items() if name not in self.oracle_parameters}
        capture = Capture(self.model, captured, batch_size(inputs), self._copy_operands, self._inject_early, positions)
        drawn = None if generator is None else generator.get_state()
        with torch.inference_mode(False), torch.enable_grad():
            try:
                with capture, self._precision(batch), self._differentiable():
                    output = call_model(self.model, inputs)
            except RuntimeError:
                if not self._has_run:
                    self._require_fitting(inputs)
                raise
            self._has_run = True
            if capture.operands_changed() and not self._copy_operands:
                self._copy_operands = True  # this model changes activations in place after their use: keep copies
                return self(batch, generator, references, ranks, joint)
            drawing = ranks if joint else ALONE
            samples = choose_samples(self.sample, batch, output, self.tokens_per_sequence, generator, drawing)
            outputs = samples.outputs(wide(output.detach()))
            given = references
            if references is None:
                contrast = self._contrast(batch, samples)
                references = make_references(
                    self.reference, outputs, self.divergence, generator, contrast, ranks, drawing
                )
            elif len(references) == 1:
                references = references.expand_as(outputs)
            at_outputs = self.divergence.gradient(*samples.comparable(outputs, references))
            cotangent = samples.cotangent(at_outputs, output).to(output.dtype)
            try:
                if samples.positions is None:
                    gradients = capture.gradients(output, cotangent)
                else:
                    gradients = self._passes.gradients(capture, output, cotangent, samples)
            except (
                RuntimeError
            ) as error:  # what activation checkpointing computes again must be what `capture` has seen
                if "torch.utils.checkpoint" not in str(error):
                    raise
                if not self._inject_early:
                    self._inject_early = True
                    if generator is not None and drawn is not None:
                        generator.set_state(drawn)
                    return self(batch, generator, given, ranks, joint)
                capture.uncaptured |= dict.fromkeys(captured, "activation checkpointing")
                gradients = {}
        missing = {
            name: capture.uncaptured.get(name, "never used directly") for name in captured if name not in gradients
        }
        if missing:
            self._send_to_oracle(missing)
        if self.oracle_parameters:
            chosen = {name: self.parameters[name] for name in self.oracle_parameters}
            with self._differentiable():
                dense = oracle_gradients(self.model, chosen, batch, references, self.divergence, samples)
            gradients |= {name: DenseGradient(wide(value.detach())) for name, value in dense.items()}
        return Extraction({name: gradients[name] for name in self.parameters}, outputs, references, samples)

    def _require_fitting(self, inputs: Any) -> None:
        """Raise an `L3DError` where the target model fails on `inputs` by itself, without `Capture` around it."""
        try:
            call_model(self.model, inputs)
        except RuntimeError as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(inputs))
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise L3DError(
                f"target model {type(self.model).__name__}: it cannot take inputs of shape {shapes}: {reason}"
            ) from error

    def _contrast(self, batch: Any, samples: Samples) -> Tensor | None:
        if self.reference != "contrastive" or not isinstance(batch, Mapping) or "contrast" not in batch:
            return None
        return samples.outputs(wide(self.outputs(batch["contrast"])))

    def _send_to_oracle(self, missing: dict[str, str]) -> None:
        self.oracle_parameters |= missing
        listed = ", ".join(f"{name} ({operation})" for name, operation in missing.items())
        warnings.warn(
            f"no gradient rule covers these parameters, the slow per-sample oracle does: {listed}", stacklevel=4
        )

    def check(
        self, batch: Any, extraction: Extraction, index: int | None = None, tolerance: float | None = None
    ) -> None:
        """Compare sample `index` with plain autograd of that sample alone, and tell if they are not the same.

        What it catches: models that mix samples of a batch, or keep them in another dimension than the first.

        Args:
            index: of the sample; None: the one with the largest gradient. (Where an output is as its reference, all but
                nothing is left of the gradient, and rounding, which depends on the size of a batch, is most of that.)
            tolerance: of the difference's norm relative to the gradient's; default 1e-3, and 0.1 in half precision.

        Raises:
            L3DError: a parameter whose captured gradient differs, by name.
        """
        samples, references = extraction.samples, extraction.references
        if index is None:
            sizes = torch.stack([gradient.squared_norms() for gradient in extraction.gradients.values()]).sum(0)
            index = int(sizes.nan_to_num(0, posinf=0).argmax())
        if tolerance is None:
            is_half = self.autocast is not None or any(wide(p) is not p for p in self.parameters.values())
            tolerance = 0.1 if is_half else 1e-3
        try:
            with self._precision(batch), self._differentiable():
                alone = sample_gradient(self.model, self.parameters, batch, references, self.divergence, samples, index)
        except RuntimeError:  # autograd itself refuses models that change an operand in place after its use
            entry, _ = samples.alone(index)
            single = (slice_inputs(inputs_of(batch), slice(entry, entry + 1)),)
            captured = self(single, references=references[index : index + 1]).gradients
            alone = {name: gradient.dense()[0] for name, gradient in captured.items()}
        scale = sum(float(value.double().square().sum()) for value in alone.values()) ** 0.5
        for name, expected in alone.items():
            found = extraction.gradients[name].select(torch.tensor([index])).dense()[0]
            error = float((found - expected).double().norm())
            if error > tolerance * max(scale, 1e-12):
                raise L3DError(
                    f"parameter '{name}': its gradient for sample {index} of a batch differs from that of the sample "
                    f"alone by {error / max(scale, 1e-12):.1e} of the norm; the target model must keep samples apart, "
                    "in the first dimension"
                )


def per_sample_gradients(
    model: nn.Module,
    inputs: Any,
    divergence: DivergenceLike = "mse",
    reference: str | Tensor = "random",
    parameters: str | Sequence[str] = ("*",),
    sample: str = "item",
    generator: torch.Generator | None = None,
) -> dict[str, SampleGradient]:
    """g_i = grad_W D(f(x_i, W), y_r) at W0 for every sample in `inputs` and every chosen parameter (paper, section 3).

    Args:
        model: the target model; put it in eval mode first (batch norm in train mode mixes samples).
        inputs: a batch: a tensor [N, ...], a tuple whose first entry is the input, or a mapping.
        divergence: `mse`, `kl` (on logits), or a callable (output, reference) -> [N].
        reference: `random`, `mean`, `uniform`, `contrastive`, or the reference outputs themselves, [N, ...].
        parameters: globs, or regular expressions after `re:`, over the model's parameter names.
        sample: `item`, an entry of the batch's first dimension; `token`, a position; `sequence` (see samples.py).
        generator: random state for random and uniform references.

    Returns:
        {name: `SampleGradient`}; `.dense()` is [N, *parameter.shape].

    Raises:
        L3DError: a pattern that matches nothing, a batch of 1 with random references, an unknown name.
    """
    given = reference if isinstance(reference, Tensor) else None
    name = "random" if given is not None else str(reference)
    extractor = GradientExtractor(model, select_parameters(model, parameters), divergence, name, sample)
    return extractor(inputs, generator, given).gradients
