"""Target models in Hugging Face format: from a local directory or from the hub, never code, never an unsafe pickle.

The target is the Hugging Face model itself, so its tensors keep their names, such as
`transformer.h.4.attn.attention.q_proj.weight`.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError
from torch import nn

from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.targets.dtypes import Dtype, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]

INSTALL_HUB = "pip install 'l3d_pl[hub]'"
CONFIGS = ("config.json", "generation_config.json", "*.index.json")


def language_model(
    pretrained: str,
    attn_implementation: Attention | None = None,
    dtype: Dtype | None = None,
    revision: str | None = None,
) -> nn.Module:
    """A causal language model of transformers: `input_ids` [N, S] -> `logits` [N, S, vocabulary].

    Args:
        pretrained: local directory with `config.json` and weights, or a hub id.
        attn_implementation: attention kernel; None: transformers' choice. Per-sample gradients are right with any.
        dtype: of its tensors; None: as they were saved.
        revision: commit, branch or tag on the hub.

    Raises:
        L3DError: one line on what is missing, cannot be reached or is not such a model.
    """
    return _load("language_model", "AutoModelForCausalLM", pretrained, attn_implementation, dtype, revision)


def image_classifier(
    pretrained: str,
    attn_implementation: Attention | None = None,
    dtype: Dtype | None = None,
    revision: str | None = None,
) -> nn.Module:
    """An image classifier of transformers: `pixel_values` [N, 3, H, W] -> `logits` [N, classes].

    Arguments and errors as for `language_model`.
    """
    return _load(
        "image_classifier", "AutoModelForImageClassification", pretrained, attn_implementation, dtype, revision
    )


def _load(
    role: str, auto_class: str, pretrained: str, attention: str | None, dtype: str | None, revision: str | None
) -> PreTrainedModel:
    try:
        import transformers
    except ImportError as error:
        raise L3DError(f"target {pretrained}: transformers is not installed; {INSTALL_HUB}") from error
    chosen_dtype = torch_dtype(dtype)
    folder = pretrained if Path(pretrained).is_dir() else _download(pretrained, revision)
    _require_model_type(folder, pretrained, role, getattr(transformers, auto_class))
    extra: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # its table of missing tensors is an error of ours, below
    if sum(file.stat().st_size for file in Path(folder).glob("*") if file.is_file()) < 2**30:  # read in a moment
        transformers.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder,
            dtype=chosen_dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            **extra,
        )
    except pickle.UnpicklingError as error:
        raise L3DError(
            f"target {pretrained}: its pytorch_model.bin holds more than tensors, and is not opened; convert it to "
            "model.safetensors"
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise L3DError(f"target {pretrained}: {reason.strip()}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    # transformers would draw them at random, with no more than a warning
    if lost := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise L3DError(
            f"target {pretrained}: its weights lack {len(lost)} tensor(s) that {type(model).__name__} needs, or have "
            f"them in another shape; the first is '{lost[0]}'"
        )
    model.config.use_cache = False
    return model


def _download(pretrained: str, revision: str | None) -> str:
    """The folder in the hub's cache with a model's files, fetched where they are not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    parent = Path(pretrained).parent
    near = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    missing = f"target {pretrained}: there is no such directory{did_you_mean(pretrained, near)}"
    try:
        validate_repo_id(pretrained)
    except HFValidationError as error:
        raise L3DError(missing) from error
    try:
        folder = snapshot_download(pretrained, revision=revision, allow_patterns=[*CONFIGS, "model*.safetensors"])
        if not any(Path(folder).glob("*.safetensors")):  # older models are there as pytorch_model.bin only
            folder = snapshot_download(pretrained, revision=revision, allow_patterns=[*CONFIGS, "pytorch_model*.bin"])
    except Exception as error:  # huggingface_hub, its HTTP client and the system each have their own
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise L3DError(
            f"{missing}, and the hub did not give it ({reason.strip().rstrip('.')}); without a network give a local "
            "directory with config.json and model.safetensors"
        ) from error
    return folder


def _require_model_type(folder: str, pretrained: str, role: str, auto_class: Any) -> None:
    """Raise unless `config.json` is of a model type that `auto_class` can build."""
    from transformers import CONFIG_MAPPING

    path = Path(folder, "config.json")
    if not path.is_file():
        raise L3DError(f"target {pretrained}: there is no config.json in this directory")
    try:
        model_type = json.loads(path.read_text()).get("model_type", "")
    except (ValueError, AttributeError) as error:
        raise L3DError(f"target {pretrained}: its config.json is no JSON mapping ({error})") from error
    known = {config.model_type for config in auto_class._model_mapping}
    if model_type not in known:
        hint = "" if model_type in CONFIG_MAPPING else did_you_mean(model_type, known)
        raise L3DError(
            f"target {pretrained}: found model type {model_type!r}, which is no {role.replace('_', ' ')} of "
            f"transformers{hint}"
        )
