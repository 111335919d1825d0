"""Which part of an input a subnetwork's coefficient comes from, by occlusion.

A part of the input is covered, and what the coefficient loses by that is the part's share: (c - c_covered) sign(c), in
units of the coefficient. It needs no second derivative, so that it works through every operation and attention kernel.

- Images: a square window is set to 0 (the mean, where images are normalised), and slid over the image.
- Text: an earlier token is replaced by tokens of other sequences, several in turn: no token of a
  vocabulary stands for nothing.
- Vectors: an entry is set to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3d_pl.analysis.items import input_of, kind_of, with_input
from l3d_pl.analysis.outputs import only_positions
from l3d_pl.analysis.runs import join, take
from l3d_pl.decomposition import Decomposition
from l3d_pl.gradients import GradientExtractor

WINDOWS = 14  # to a side of an image at most
REPLACEMENTS = 4  # tokens in the place of one
MANY_VALUES = 1024  # a longer vector is covered in so many pieces


@torch.no_grad()
def attribution(
    decomposition: Decomposition,
    extractor: GradientExtractor,
    batch: Any,
    positions: Sequence[int],
    subnetworks: Sequence[int],
    references: Tensor,
    strangers: Tensor | None = None,
    batch_size: int = 64,
    firsts: Sequence[int] | None = None,
) -> list[tuple[Tensor, int, int]]:
    """The share of each part of each entry's input in one subnetwork's coefficient: (values [height * width], height,
    width) per entry; of text a value for each token from its `first` on, 0 behind the position.

    Args:
        extractor: the fast engine on the decomposition's target.
        batch: entries, one sample each.
        positions: of the token samples, -1 for others.
        subnetworks: for each entry, of which.
        references: one for all, [1, ...].
        strangers: token ids to put in the place of others, [M, S] (of text only).
        batch_size: covered inputs at a time.
        firsts: of text, where each entry's values begin; None: at its first token.
    """
    kind, found = kind_of(batch), []
    for i, (position, k) in enumerate(zip(positions, subnetworks, strict=True)):
        one = take(batch, slice(i, i + 1))
        if kind == "image":
            covered, parts = _images(input_of(one))
        elif kind == "text":
            assert strangers is not None
            covered, parts = _texts(input_of(one), position, strangers, 0 if firsts is None else firsts[i])
        else:
            covered, parts = _vectors(input_of(one))
        everything = torch.cat([input_of(one), covered])
        c = torch.cat(
            [
                _coefficients(decomposition, extractor, one, piece, position, k, references)
                for piece in everything.split(max(1, batch_size))
            ]
        )
        lost = (c[0] - c[1:]) * c[0].sign()
        weights = parts.to(lost.dtype)  # [covered, height, width], 1 where it is covered
        shape = weights.shape[1:]
        times = weights.sum(0)
        values = (lost.view(-1, 1, 1) * weights).sum(0) / times.clamp_min(1)
        found.append((values.flatten().cpu(), shape[0], shape[1]))
    return found


def _coefficients(
    decomposition: Decomposition,
    extractor: GradientExtractor,
    one: Any,
    inputs: Tensor,
    position: int,
    k: int,
    references: Tensor,
) -> Tensor:
    """c_k of versions of one entry, [M]."""
    batch = with_input(join([one] * len(inputs)), inputs)
    batch = only_positions(batch, [position] * len(inputs))
    subnetworks = decomposition.subnetworks
    prepared = subnetworks.prepare(extractor(batch, references=references).gradients)
    view = subnetworks.view(subnetworks.v_in, prepared).select(slice(k, k + 1))
    return view.coefficients(prepared)[:, 0]


def _images(image: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of [1, C, H, W] with a window covered, [M, C, H, W], and where it was, [M, H', W'] of thumbnail cells."""
    height, width = image.shape[-2:]
    step = [max(1, -(-size // WINDOWS)) for size in (height, width)]
    rows, columns = (-(-size // s) for size, s in zip((height, width), step, strict=True))
    covered, parts = [], []
    for row in range(max(1, rows - 1)):
        for column in range(max(1, columns - 1)):  # windows of two by two cells, half over one another
            copy, part = image.clone(), torch.zeros(1, rows, columns, device=image.device)
            top, left = row * step[0], column * step[1]
            copy[..., top : top + 2 * step[0], left : left + 2 * step[1]] = 0
            part[:, row : row + 2, column : column + 2] = 1
            covered.append(copy)
            parts.append(part)
    return torch.cat(covered), torch.cat(parts)


def _texts(ids: Tensor, position: int, strangers: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Copies of [1, S] with one token from `first` to `position` replaced, and which, [M, 1, S - first]."""
    length = ids.shape[1]
    last = length - 1 if position < 0 else position
    covered, parts = [], []
    for place in range(first, last + 1):
        others = strangers[:, min(place, strangers.shape[1] - 1)]
        others = others[others != ids[0, place]].unique()[:REPLACEMENTS]
        copies = ids.repeat(len(others), 1)
        copies[:, place] = others
        part = torch.zeros(len(others), 1, length - first, device=ids.device)
        part[:, :, place - first] = 1
        covered.append(copies)
        parts.append(part)
    return torch.cat(covered), torch.cat(parts)


def _vectors(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of [1, ...] with an entry set to 0 (of a long one a stretch), and which, [M, 1, number of values]."""
    n = vector[0].numel()
    piece = -(-n // MANY_VALUES)
    parts = torch.zeros(-(-n // piece), n, device=vector.device)
    for i, part in enumerate(parts):
        part[i * piece : (i + 1) * piece] = 1
    covered = vector.flatten(1) * (1 - parts)
    return covered.view(-1, *vector.shape[1:]), parts.unsqueeze(1)
