"""Image classifiers of torchvision and timm, imported only when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.targets.dtypes import Dtype, torch_dtype

INSTALL_VISION = "pip install 'l3d_pl[vision]'"


def torchvision_model(name: str, weights: str | None = "DEFAULT", dtype: Dtype | None = None) -> nn.Module:
    """A model of torchvision, such as `mobilenet_v3_small`: images [N, 3, H, W] -> logits [N, 1000].

    Args:
        name: as in `torchvision.models.list_models()`.
        weights: name of published weights (`DEFAULT`, `IMAGENET1K_V1`); None: random, for `model.target_weights`.
        dtype: of its tensors; None: float32.

    Raises:
        L3DError: torchvision is missing; no such model or weights; they cannot be fetched.
    """
    models = _import("torchvision").models
    _require_known(name, models.list_models())
    model: nn.Module = models.get_model(name, weights=None)
    if weights is not None:
        published = models.get_model_weights(name)
        if weights not in published.__members__:
            allowed = ", ".join(published.__members__)
            hint = did_you_mean(weights, published.__members__)
            raise L3DError(f"weights of {name}: found {weights!r}, allowed are {allowed} or null{hint}")
        with _fetching(name):
            # not by get_model, which unpickles whatever comes
            model.load_state_dict(published[weights].get_state_dict(check_hash=True, weights_only=True))
    return model.to(torch_dtype(dtype))


def timm_model(name: str, pretrained: bool = True, dtype: Dtype | None = None) -> nn.Module:
    """A model of timm, such as `mobilenetv3_small_100`: images [N, 3, H, W] -> logits [N, classes].

    Args:
        name: as in `timm.list_models()`, with or without the tag of its weights (`resnet18.a1_in1k`).
        pretrained: published weights, or random ones, for `model.target_weights`.
        dtype: of its tensors; None: float32.

    Raises:
        L3DError: timm is missing; no such model; its weights cannot be fetched.
    """
    timm = _import("timm")
    _require_known(name.split(".")[0], timm.list_models())
    with _fetching(name):
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model.to(torch_dtype(dtype))


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise L3DError(f"target: {library} is not installed ({error}); {INSTALL_VISION}") from error


def _require_known(name: str, known: list[str]) -> None:
    if name not in known:
        raise L3DError(f"target name: there is no model {name!r}{did_you_mean(name, known)}")


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """What goes wrong on the way to published weights, as one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise L3DError(
            f"target {name}: its weights cannot be had ({reason}); without a network ask for none here, and give a "
            "file of them as model.target_weights"
        ) from error
