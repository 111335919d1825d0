"""What a subnetwork is made of: its singular directions per tensor, small tensors whole, toys as networks."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3d_pl.atlas.pictures import layers_of
from l3d_pl.tucker import Tucker

DIRECTIONS = 8  # shown per mode of a tensor, the strongest
UNITS = 256  # shown per direction; beyond, neighbours share a cell
TENSORS = 8  # shown per subnetwork, those with the largest share of its norm
WHOLE = 4096  # values up to which a tensor is shown itself


def tensor_structure(tucker: Tucker, k: int) -> dict[str, Any]:
    """One tensor of subnetwork k for the page: heat maps of `modes` and, where it is small, of the tensor itself.

    A Tucker tensor's factors are determined up to any change of basis, so they are shown in the one basis that is its
    own: the singular vectors of the tensor's unfolding along each mode, with their singular values (HOSVD). For a
    matrix these are its singular vectors.
    """
    one = tucker.select(torch.tensor([k])).detach()
    core, factors = one.core[0].double().cpu(), [factor[0].double().cpu() for factor in one.factors]
    shape = [len(factor) for factor in factors]
    content: dict[str, Any] = {"shape": shape, "ranks": list(tucker.ranks)}
    if not all(bool(tensor.isfinite().all()) for tensor in (core, *factors)):
        return content
    if math.prod(shape) <= WHOLE:
        dense = one.dense()[0].double().cpu()
        content["whole"] = _heat_map(dense.reshape(shape[0], -1) if dense.ndim > 1 else dense[None])
    if len(shape) > 1:
        content["modes"] = [
            {"values": _rounded(values), "of": tucker.ranks[mode]} | _heat_map(vectors.T)
            for mode, (vectors, values) in enumerate(singular_directions(core, factors))
        ]
    elif "whole" not in content:
        content["whole"] = _heat_map((factors[0] @ core)[None])
    return content


def singular_directions(core: Tensor, factors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(vectors [I_m, r], values [r]) of each mode of one Tucker tensor, the strongest `DIRECTIONS` of them.

    The vectors are the left singular vectors of the mode's unfolding, in factored form: Q of the factor's QR times
    those of the core with every R multiplied in. A mode's signs are free; the entry of largest size is made positive,
    and a matrix's second mode follows the first, so that v = sum_r s_r left_r right_r^T.
    """
    orthogonal = [torch.linalg.qr(factor) for factor in factors]
    for mode, (_, r) in enumerate(orthogonal):
        core = torch.tensordot(r, core, dims=([1], [mode])).movedim(0, mode)
    found = []
    for mode, (q, _) in enumerate(orthogonal):
        left, values, _ = torch.linalg.svd(core.movedim(mode, 0).flatten(1), full_matrices=False)
        vectors = (q @ left)[:, :DIRECTIONS]
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        found.append((vectors * torch.where(largest < 0, -1.0, 1.0), values[:DIRECTIONS]))
    if len(found) == 2:
        (first, values), (q, _) = found[0], orthogonal[1]
        second = q @ (core.T @ (orthogonal[0][0].T @ first))
        found[1] = (second / second.norm(dim=0).clamp_min(1e-30), found[1][1])
    return found


def network(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]] | None:
    """A toy as columns of units, for the page: [{"weight": [in][out], "bias": [out] or None}]; None where it is no toy.

    tensors: the target itself, or a subnetwork of it, shown with the sign that agrees with the target.
    """
    layers = layers_of(target) if target else []
    overlap = sum(float((tensors[name].double() * target[name].double()).sum()) for name in tensors if name in target)
    sign = -1.0 if overlap < 0 else 1.0
    read = [layer.read(tensors, target) for layer in layers]
    return [
        {"weight": _rounded(sign * weight), "bias": None if bias is None else _rounded(sign * bias)}
        for weight, bias in read
    ] or None


def _heat_map(values: Tensor) -> dict[str, Any]:
    """Rows x columns as bytes in [-127, 127] of the largest |value|; of neighbours that share a cell, the largest."""
    matrix = values.numpy()
    rows, columns = matrix.shape
    matrix = pooled(pooled(matrix, 1), 0)
    largest = float(np.abs(matrix).max(initial=0.0))
    cells = np.rint(127 * matrix / (largest or 1.0)).astype(np.int8)
    return {
        "rows": cells.shape[0],
        "columns": cells.shape[1],
        "of_rows": rows,
        "of_columns": columns,
        "largest": largest,
        "cells": base64.b64encode(cells.tobytes()).decode("ascii"),
    }


def pooled(matrix: np.ndarray, axis: int, most: int = UNITS) -> np.ndarray:
    """The matrix with at most so many cells along an axis: of neighbours that share one, the largest by size."""
    size = matrix.shape[axis]
    if size <= most:
        return matrix
    width = math.ceil(size / most)
    padding = [(0, -size % width) if i == axis else (0, 0) for i in range(2)]
    moved = np.moveaxis(np.pad(matrix, padding), axis, 1)
    cells = moved.reshape(len(moved), -1, width)
    chosen = np.take_along_axis(cells, np.abs(cells).argmax(2)[..., None], 2)[..., 0]
    return np.moveaxis(chosen, 1, axis)


def _rounded(values: Tensor | np.ndarray) -> Any:
    array = np.asarray(values, dtype=np.float64)
    return np.vectorize(lambda x: float(f"{x:.4g}"), otypes=[float])(array).tolist() if array.size else array.tolist()
