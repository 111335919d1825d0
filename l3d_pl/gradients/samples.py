"""What a sample is, and how all samples of a batch are differentiated at once.

- `item`: an entry of the batch's first dimension (an image, a feature vector).
- `token`: a position of a sequence, by its own divergence D_t, which depends on every earlier position (the paper's
  unit for language models). It is not the position's share in the sequence's gradient.
- `sequence`: a whole sequence, by the sum of its positions' divergences.

D_t depends on the logits at t alone. So from the output down to the point where positions first meet (the *cut*: in a
transformer the residual stream after the last attention) one ordinary backward pass serves all tokens; below it there
is one pass for each position of a sequence, for all sequences together (a GPU does several of them as one). T passes
per batch and not B * T, and the vocabulary-sized head is crossed once. Where the cut is depends on the model;
`TokenPasses` finds it by trying.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.distributed.fsdp import FSDPModule

from l3d_pl.errors import L3DError
from l3d_pl.gradients.capture import Capture, Use, add_up
from l3d_pl.gradients.sample_gradient import OuterGradient, SampleGradient, stack, wide
from l3d_pl.parallel import ALONE, Ranks

SAMPLES = ("item", "token", "sequence")
TOGETHER = 2**23  # values at the cut in a backward pass of several tokens
MASKS = ("sample_mask", "attention_mask")  # entries of a batch that say which positions count, the first one found


@dataclass(frozen=True)
class Samples:
    """Which entries of a batch's outputs [B, S, ...] are samples.

    Attributes:
        positions: of token samples, T for each sequence, [B, T]; None: samples are the entries of the first dimension.
        index: those of the B * T that count, [N]; None: all.
        mask: positions that count, [B, S] of bool; None: all.
    """

    positions: Tensor | None = None
    index: Tensor | None = None
    mask: Tensor | None = None

    def outputs(self, outputs: Tensor) -> Tensor:
        """Each sample's own output, [N, ...]; of a sequence with its uncounted positions NaN."""
        if self.positions is not None:
            chosen = outputs[torch.arange(len(outputs), device=outputs.device).unsqueeze(1), self.positions]
            chosen = chosen.flatten(0, 1)
            return chosen if self.index is None else chosen[self.index]
        if self.mask is not None:
            return outputs.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (outputs.ndim - 2)), torch.nan)
        return outputs

    def comparable(self, outputs: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and references that are equal, so that they diverge by 0, wherever one of them does not count."""
        if self.positions is not None or self.mask is None:
            return outputs, references
        counts = self.mask.view(*self.mask.shape, *[1] * (outputs.ndim - 2)) & ~references.isnan()
        return torch.where(counts, outputs, 0), torch.where(counts, references, 0)

    def alone(self, sample: int) -> tuple[int, Samples]:
        """The entry of the batch that a sample is in, and the same sample in a batch of that entry alone."""
        if self.positions is None:
            return sample, Samples(mask=None if self.mask is None else self.mask[sample : sample + 1])
        flat = sample if self.index is None else int(self.index[sample])
        group, token = divmod(flat, self.positions.shape[1])
        return group, Samples(self.positions[group : group + 1, token : token + 1])

    def cotangent(self, gradient: Tensor, outputs: Tensor) -> Tensor:
        """dD / d output of every sample, [N, ...], at its place in the batch's outputs [B, S, ...]."""
        if self.positions is None:
            return gradient
        b, t = self.positions.shape
        if self.index is not None:
            gradient = gradient.new_zeros(b * t, *gradient.shape[1:]).index_copy_(0, self.index, gradient)
        full = torch.zeros_like(outputs, dtype=gradient.dtype)
        rows = torch.arange(b, device=full.device).unsqueeze(1)
        full[rows, self.positions] = gradient.unflatten(0, (b, t))
        return full


def choose_samples(
    sample: str,
    batch: Any,
    outputs: Tensor,
    tokens_per_sequence: int | None,
    generator: torch.Generator | None,
    ranks: Ranks = ALONE,
) -> Samples:
    """The samples of a batch.

    Positions that count are those of the batch's `sample_mask` [B, S], else of its `attention_mask`, else all.

    Args:
        tokens_per_sequence: so many positions of each sequence, drawn anew for each batch; None: all that count.
        ranks: for whose sequences together the positions are drawn, each rank taking those of its own.

    Raises:
        L3DError: outputs without positions, a mask of another shape, no position that counts.
    """
    if sample == "item":
        return Samples()
    if outputs.ndim < 3:
        raise L3DError(
            f"sample: '{sample}' needs outputs [sequences, positions, ...], found {list(outputs.shape)}; "
            "allowed is 'item'"
        )
    masks = [batch[key] for key in MASKS if key in batch] if isinstance(batch, Mapping) else []
    mask = masks[0] if masks else None
    if mask is not None:
        if mask.shape != outputs.shape[:2]:
            raise L3DError(
                f"batch: its mask is {list(mask.shape)}, the outputs have positions {list(outputs.shape[:2])}"
            )
        mask = mask.bool().to(outputs.device)
        if not mask.any():
            raise L3DError("batch: its mask leaves no position to take as a sample")
        # Also where they are others' sequences that are cut short: one of these may be the reference.
        mask = mask if ranks.count(int(not mask.all()), mask.device) else None
    if sample == "sequence":
        return Samples(mask=mask)
    b, s = outputs.shape[:2]
    if tokens_per_sequence is None or tokens_per_sequence >= s:
        if mask is None:
            return Samples(torch.arange(s, device=outputs.device).expand(b, s))
        t = int(mask.sum(1).max())
        keys = mask.to(torch.float32)
    else:
        t = tokens_per_sequence
        own, all_sequences = ranks.place_of(b, outputs.device)
        keys = torch.rand(all_sequences, s, generator=generator)[own].to(outputs.device)
        keys = keys if mask is None else keys.masked_fill(~mask, -1.0)
    # Positions that count come first; those chosen are put in order.
    positions = keys.argsort(dim=1, descending=True, stable=True)[:, :t].sort(1).values
    if mask is None:
        return Samples(positions)
    counts = mask.gather(1, positions).flatten()
    return Samples(positions, None if bool(counts.all()) else counts.nonzero().squeeze(1))


class TokenPasses:
    """The backward passes of token samples through one model.

    The first batch tells where positions meet: an operation is *local* if the gradient at its result, at position
    s, comes from the output at s alone. The cut is the first local result that all gradients on their way to the
    others pass through (a sharded model gets none). Both are the same for all batches, since a model computes the
    same for each; a batch whose samples span more positions than that one's is asked again, as short texts may meet
    nothing.
    """

    def __init__(self) -> None:
        self.cut = -1  # place of the cut in the stream, from its start; -1: the output itself
        self.local: frozenset[int] = frozenset()  # watched operations above the cut
        self.one_by_one = False  # this model's operations know no batch of gradients
        self._searched = (-1, 0)  # of the batch that told: length of its stream, span of its positions

    def gradients(
        self, capture: Capture, output: Tensor, cotangent: Tensor, samples: Samples
    ) -> dict[str, SampleGradient]:
        """Gradients of every token's <output, cotangent> at its own position.

        Args:
            cotangent: [B, S, ...], zero at the positions that are no samples.
        """
        assert samples.positions is not None
        if not output.requires_grad or not capture.edges:
            return {}
        positions, edges, uses = samples.positions, capture.edges, capture.usable()
        (b, t), s = positions.shape, output.shape[1]
        counted = positions.flatten() if samples.index is None else positions.flatten()[samples.index]
        span = int(counted.max() - counted.min())
        if self._searched[0] != len(capture.stream) or span > self._searched[1]:  # (one position meets no other)
            self._searched = len(capture.stream), span
            self._search(capture, output, cotangent, int(counted.median()))
        rows = torch.arange(b, device=output.device)
        local = sorted(self.local)
        meeting = [i for i in range(len(edges)) if i not in self.local]
        start: Tensor | GradientEdge = output if self.cut < 0 else capture.stream[self.cut]
        wanted = [edges[i] for i in local] + ([capture.stream[self.cut]] if self.cut >= 0 else [])
        at_top = torch.autograd.grad(output, wanted, cotangent, retain_graph=True, allow_unused=True) if wanted else ()
        at_cut = cotangent if self.cut < 0 else at_top[-1]
        at_local = dict(zip(local, at_top, strict=False))
        done: dict[Use, OuterGradient] = {}
        for use in uses:
            d = at_local.get(use.edge)
            if d is not None and (gradient := _of_tokens(use, wide(d), positions, s)) is not None:
                done[use] = gradient
        rest = {use.edge for use in uses if use.edge in at_local and use not in done}

        def alone(d: Tensor, tokens: Tensor) -> Tensor:
            """[T, *d.shape]: a gradient [B, S, ...] or [B * S, ...] at each token's positions alone, 0 elsewhere."""
            kept, own = d.new_zeros(len(tokens), *d.shape), positions.T[tokens]  # [T, B]
            each = torch.arange(len(tokens), device=d.device).unsqueeze(1)
            kept.view(len(tokens), b, s, -1)[each, rows, own] = d.reshape(b, s, -1)[rows, own]
            return kept

        passes: list[dict[str, SampleGradient]] = []
        at_once = 1 if at_cut is None else self._at_once(capture, at_cut, t)
        for tokens in torch.arange(t if meeting or rest else 0, device=output.device).split(at_once):
            at_edges: list[Any] = [[None] * len(tokens)] * len(edges)  # of each, [T, ...] or T times None
            for i in rest:
                if (d := at_local[i]) is not None:
                    at_edges[i] = alone(d, tokens)
            if meeting and at_cut is not None:
                found = self._differentiate(start, [edges[i] for i in meeting], alone(at_cut, tokens))
                for i, of_tokens in zip(meeting, found, strict=True):
                    at_edges[i] = of_tokens
            passes += [capture.collect(at_token, but=done) for at_token in zip(*at_edges, strict=True)]
        stacked = {name: stack([part[name] for part in passes]) for name in passes[0]} if passes else {}
        own = (use.tracked.pull_back(gradient, capture.parameters) for use, gradient in done.items())
        gradients = add_up([stacked, *own])
        if samples.index is not None:
            gradients = {name: gradient.select(samples.index) for name, gradient in gradients.items()}
        return gradients

    def _at_once(self, capture: Capture, at_cut: Tensor, t: int) -> int:
        """How many of `t` tokens one backward pass serves: on a GPU, which waits for small kernels, several.

        What is large keeps the device busy by itself, and in one pass would take t times the memory.
        """
        if self.one_by_one or not at_cut.is_cuda or isinstance(capture.model, FSDPModule):
            return 1
        return max(1, min(t, TOGETHER // at_cut.numel()))

    def _differentiate(
        self, start: Tensor | GradientEdge, edges: Sequence[GradientEdge], cotangents: Tensor
    ) -> list[Sequence[Tensor | None]]:
        """The gradient at each edge, for each of the `cotangents` [T, ...] at `start`."""
        differentiate = partial(torch.autograd.grad, start, edges, retain_graph=True, allow_unused=True)
        if len(cotangents) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # some kernels still go one by one
                    found = differentiate(cotangents, is_grads_batched=True)
                nothing: list[None] = [None] * len(cotangents)
                return [nothing if d is None else d for d in found]  # type: ignore[misc]  # (a tensor, row by row)
            except RuntimeError:  # an operation that knows no batch of gradients
                self.one_by_one = True
        return list(zip(*(differentiate(one) for one in cotangents), strict=True))

    def _search(self, capture: Capture, output: Tensor, cotangent: Tensor, position: int) -> None:
        """Find the cut and the local operations by differentiating one `position` alone.

        It should have others that count on both sides: one that is padding may look at no other.
        """
        self.cut, s, edges, stream = -1, output.shape[1], capture.edges, capture.stream
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(cotangent)
        alone = torch.zeros_like(probe)
        alone[:, position] = probe[:, position]
        found = torch.autograd.grad(output, [*edges, *stream], alone, retain_graph=True, allow_unused=True)
        is_local = [d is not None and _is_at(d, output.shape[0], s, position) for d in found]
        self.local = frozenset(i for i in range(len(edges)) if is_local[i])
        if isinstance(capture.model, FSDPModule):  # a layer's tensors are there only where a pass comes to its output
            return
        others = {edge.node for i, edge in enumerate(edges) if i not in self.local}
        for place in (i for i in range(len(stream)) if is_local[len(edges) + i]):
            if others and _separates(stream[place], get_gradient_edge(output), others):
                self.cut = place
                return


def _separates(cut: GradientEdge, output: GradientEdge, nodes: set[Node]) -> bool:
    """Whether every way through the graph from `output` to any of `nodes` leads over `cut`."""
    seen: set[tuple[Node, int]] = set()
    ahead = [(output.node, output.output_nr)]
    while ahead:
        node, number = ahead.pop()
        if (node, number) in seen or (node is cut.node and number == cut.output_nr):
            continue
        if node in nodes:
            return False
        seen.add((node, number))
        ahead += [(parent, nr) for parent, nr in node.next_functions if parent is not None]
    return True


def _is_at(d: Tensor, b: int, s: int, position: int) -> bool:
    """Whether `d`, [B, S, ...] or [B * S, ...], is zero but at one position."""
    if d.numel() % (b * s) or d.shape[0] not in (b, b * s) or (d.shape[0] == b and (d.ndim < 2 or d.shape[1] != s)):
        return False
    size = d.reshape(b, s, -1).abs().amax((0, 2))
    size[position] = 0
    return not bool(size.any())


def _of_tokens(use: Use, d: Tensor, positions: Tensor, s: int) -> OuterGradient | None:
    """Each token's D_t A_t^T at a local operation, from the gradient D of all tokens together at its result.

    None for what is no outer product of each position by itself (a bias).
    """
    whole = None if use.tracked.steps else use.finish(d)
    if not isinstance(whole, OuterGradient) or whole.outputs.shape[2] != s:
        return None
    b, t = positions.shape
    rows = torch.arange(b, device=d.device).unsqueeze(1)
    outputs, inputs = whole.outputs[rows, 0, positions], whole.inputs[rows, positions]
    return replace(whole, outputs=outputs.reshape(b * t, 1, 1, -1), inputs=inputs.flatten(0, 1).unsqueeze(1))
