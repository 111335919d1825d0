"""The floating point types that a target's tensors can be given by config."""

from typing import Literal, get_args

import torch

from l3d_pl.errors import require_choice

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def torch_dtype(dtype: str | None) -> torch.dtype | None:
    """The torch dtype of that name; None of None.

    Raises:
        L3DError: there is no such type, or it holds no fractions.
    """
    if dtype is None:
        return None
    require_choice("dtype", dtype, get_args(Dtype))
    return getattr(torch, dtype)
