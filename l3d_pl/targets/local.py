"""A target model from a Python file of the user's, wherever it lies."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.targets.dtypes import Dtype, torch_dtype
from l3d_pl.targets.training import load_target


def from_file(
    path: str,
    name: str,
    init_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    dtype: Dtype | None = None,
) -> nn.Module:
    """The nn.Module that `name(**init_args)` of a Python file makes.

    The file is run as a module of its own; what lies beside it can be imported.

    Args:
        path: the file.
        name: a class or a function in it.
        init_args: its arguments.
        weights: safetensors or torch file with all of its tensors; None: as it comes.
        dtype: of its tensors; None: as it comes.

    Raises:
        L3DError: one line that names the file or the setting, with near matches.
    """
    file = Path(path)
    if not file.is_file():
        there = [other.name for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise L3DError(f"target path: there is no file {file}{did_you_mean(file.name, there)}")
    module = _module_of(file)
    made_by = getattr(module, name, None)
    if not callable(made_by):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise L3DError(f"target name: {file} has no class or function {name!r}{did_you_mean(name, callables)}")
    try:
        model = made_by(**dict(init_args or {}))
    except TypeError as error:
        raise L3DError(f"target init_args: {name} of {file} does not take {dict(init_args or {})}: {error}") from error
    if not isinstance(model, nn.Module):
        raise L3DError(f"target name: {name} of {file} gives a {type(model).__name__}, allowed is an nn.Module")
    if weights is not None:
        load_target(weights, model)
    return model.to(torch_dtype(dtype))


def _module_of(file: Path) -> Any:
    """The file as a module, run once per process."""
    name = f"l3d_pl_target_{file.stem}_{abs(hash(file.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise L3DError(f"target path: found {file}, allowed is a Python file (.py)")
    if str(file.parent.resolve()) not in sys.path:
        sys.path.append(str(file.parent.resolve()))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise L3DError(f"target path: {file} cannot be run: {type(error).__name__}: {error}") from error
    return module
