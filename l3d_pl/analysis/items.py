"""What samples and outputs look like to a reader: tokens, thumbnails, labels, the outputs' names."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from l3d_pl.gradients.forward import inputs_of, tensors_of

THUMBNAIL = 96  # pixels, the longer side at most
MANY_NAMES = 10_000  # above it, names of outputs go to a table of their own
SHOWN_TOKENS, AFTER = 256, 64  # of a sequence at least, so many of them behind the last one that is marked


def input_of(batch: Any) -> Tensor:
    """The tensor that a batch is about: token ids [N, S], images [N, C, H, W], or vectors [N, ...]."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Mapping):
        for key in ("input_ids", "pixel_values"):
            if key in inputs:
                return inputs[key]
    return tensors_of(inputs)[0]


def with_input(batch: Any, tensor: Tensor) -> Any:
    """The batch with that tensor replaced."""
    if isinstance(batch, Mapping):
        old = input_of(batch)
        return {key: tensor if value is old else value for key, value in batch.items()}
    return tensor if isinstance(batch, Tensor) else (tensor, *batch[1:])


def kind_of(batch: Any) -> str:
    """`text` (integers), `image` ([N, C, H, W] of one or three channels) or `vector`."""
    tensor = input_of(batch)
    if not tensor.is_floating_point():
        return "text"
    return "image" if tensor.ndim == 4 and tensor.shape[1] in (1, 3) else "vector"


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch [N, ...]; None where it has none."""
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in ("labels", "label") if key in batch), None)
    else:
        labels = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    return labels if isinstance(labels, Tensor) else None


def output_names(target: Any, data: Any, n_outputs: int, kind: str) -> list[str]:
    """A name for each output: the class, the token of a vocabulary, or its number."""
    classes = getattr(data, "classes", None)
    if classes is not None and len(classes) == n_outputs:
        return [str(name) for name in classes]
    labels = getattr(getattr(target, "config", None), "id2label", None)
    if kind in ("text", "image") and labels and len(labels) == n_outputs:
        return [str(labels[i]) for i in range(n_outputs)]
    tokenizer = getattr(data, "tokenizer", None)
    if kind == "text" and tokenizer is not None and n_outputs >= getattr(tokenizer, "vocab_size", len(tokenizer)):
        return [tokenizer.decode([i]) if i < len(tokenizer) else str(i) for i in range(n_outputs)]
    return [str(i) for i in range(n_outputs)]


def item_rows(
    batch: Any, entries: Sequence[int], data: Any = None, marked: Mapping[int, Collection[int]] | None = None
) -> list[dict[str, Any]]:
    """Rows of the table `items`, without checksums.

    Args:
        batch: of these entries.
        data: the data module; its tokenizer and its classes are used where it has them.
        marked: positions of each entry that have to be seen.
    """
    kind, tensor, labels = kind_of(batch), input_of(batch).cpu(), labels_of(batch)
    rows: list[dict[str, Any]] = [{"sample": int(entry), "kind": kind} for entry in entries]
    for i, row in enumerate(rows):
        if kind == "text":
            first, stop = window(length_of_text(batch, i), (marked or {}).get(row["sample"], ()))
            row |= {
                "tokens": _decoded(tensor[i, first:stop].tolist(), getattr(data, "tokenizer", None)),
                "first": first,
            }
        elif kind == "image":
            png, width, height = thumbnail(tensor[i])
            row |= {"png": png, "width": width, "height": height}
        else:
            row |= {"values": tensor[i].flatten().float().tolist()}
        if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
            classes = getattr(data, "classes", None)
            label = int(labels[i])
            row["label"] = str(classes[label]) if classes is not None and 0 <= label < len(classes) else str(label)
    return rows


def length_of_text(batch: Any, row: int) -> int:
    """Tokens of a sequence without padding at its end."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return input_of(batch).shape[1] if mask is None else int(mask[row].nonzero().max()) + 1


def window(length: int, marked: Collection[int]) -> tuple[int, int]:
    """Which tokens of a sequence are shown, [first, stop): `SHOWN_TOKENS` of them, or more where marked ones are apart.

    A token position is read from what comes before it, so most of a window does.
    """
    first, last = min(marked, default=-1), max(marked, default=-1)
    stop = min(length, max(last + AFTER, SHOWN_TOKENS))
    return max(0, min(first + AFTER, stop) - SHOWN_TOKENS), stop


def _decoded(ids: Sequence[int], tokenizer: Any) -> list[str]:
    return [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]


def thumbnail(image: Tensor) -> tuple[bytes, int, int]:
    """A PNG of an image [C, H, W], scaled from its own smallest to its largest value; and its width and height."""
    low, high = image.amin(), image.amax()
    scaled = (image - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny) * 255
    pixels = scaled.round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue(), picture.width, picture.height
