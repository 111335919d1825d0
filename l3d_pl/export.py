"""`l3d export`: a finished decomposition, or one file to resume from, out of a checkpoint of any strategy.

Streamed tensor by tensor, with no target model and no GPU: a small machine exports what many have trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from l3d_pl.checkpoints import AtomicCheckpointIO, Stored, as_damage_of, newest_whole, replaced
from l3d_pl.decomposition import CONFIG, WEIGHTS, Decomposition, _write
from l3d_pl.divergence import DIVERGENCES, Divergence
from l3d_pl.errors import L3DError
from l3d_pl.parallel import ALONE
from l3d_pl.streamed import Entry, entry_of, write_safetensors
from l3d_pl.subnetworks import Subnetworks


def export_decomposition(source: Path, folder: Path) -> Path:
    """Write the `Decomposition` that a checkpoint holds: of several restarts the one of the lowest held-out loss.

    Args:
        source: a checkpoint, a file or a directory.
        folder: becomes what `Decomposition.from_pretrained` reads.

    Raises:
        L3DError: the checkpoint is damaged, or not one of L3D; the folder cannot be written.
    """
    stored = _open(source)
    if folder.exists() and not folder.is_dir():
        raise L3DError(f"export: {folder} is a file; allowed is a directory")
    with as_damage_of(stored.path):
        decomposition, first = outline(stored)
    n_v, mean_reference = decomposition.n_subnetworks, stored.content["l3d"]["mean_reference"]

    def rows_of_restart(name: str, shape: tuple[int, ...]) -> Entry:
        whole = stored.entry(f"state_dict.subnetworks.{name}")
        return Entry(whole.dtype, shape, lambda start, stop: whole.read(first + start, first + stop))

    entries = {
        name.replace("/", "."): rows_of_restart(name, tuple(tensor.shape))
        for name, tensor in decomposition.subnetworks.state_dict().items()
    }
    entries["p_act"] = entry_of(stored.rows("state_dict.p_act", first // n_v, first // n_v + 1)[0])
    if mean_reference is not None:
        entries["mean_reference"] = entry_of(mean_reference)
    config, card = json.dumps(decomposition.config(), indent=2) + "\n", decomposition.model_card()

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WEIGHTS, lambda path: write_safetensors(path, entries, {"format": "pt"}))
        _write(folder / CONFIG, lambda path: path.write_text(config))
        _write(folder / "README.md", lambda path: path.write_text(card))

    _writing(folder, write)
    return folder


def outline(stored: Stored) -> tuple[Decomposition, int]:
    """A checkpoint's decomposition without the values of V, and the row where its restart begins.

    Raises:
        L3DError: it was not written by L3D, or by a version that did not say what it decomposes.
    """
    l3d = stored.content.get("l3d")
    if not isinstance(l3d, dict):
        raise L3DError(f"checkpoint: {stored.path} was not written by L3D (no entry 'l3d')")
    settings = l3d.get("decomposition")
    if settings is None:
        raise L3DError(
            f"checkpoint: {stored.path} does not say what it decomposes: an earlier l3d_pl wrote it; resume its run, "
            "and export what that saves"
        )
    parameters, n_v = settings["parameters"], settings["n_subnetworks"]
    with torch.device("meta"):
        subnetworks = Subnetworks(
            {name: entry["shape"] for name, entry in parameters.items()},
            n_v,
            {name: list(entry["ranks"]) for name, entry in parameters.items()},
            n_dense=settings.get("n_dense", 0),  # (earlier versions had none)
        )
    for name, tensor in subnetworks.state_dict().items():
        found = stored.tensors.get(f"state_dict.subnetworks.{name}")
        expected = [settings["restarts"] * n_v, *tensor.shape[1:]]
        if found is None or list(found.shape) != expected:
            raise L3DError(
                f"checkpoint: tensor 'subnetworks.{name}' in {stored.path}: found "
                f"{'nothing' if found is None else list(found.shape)}, expected {expected}"
            )
    losses, thresholds = (
        stored.rows(f"state_dict.{name}", 0, settings["restarts"]) for name in ("held_out_loss", "threshold.value")
    )
    best = 0 if bool(losses.isnan().any()) else int(losses.argmin())
    divergence = Divergence()  # of a user's own callable, the name is all that is kept
    divergence.name = settings["divergence"]
    known = DIVERGENCES.get(settings["divergence"])
    result = Decomposition(
        subnetworks,
        divergence=divergence if known is None else known(),
        reference=settings["reference"],
        sample=settings["sample"],
        k=settings["k"],
        threshold=float(thresholds[best]),
        figures={"val/loss": float(losses[best]), "steps": stored.content["global_step"]},
        seed=settings["seed"],
        run_config=settings["run_config"],
    )
    result.target_class, result.target_fingerprint = settings["target_class"], l3d["target_fingerprint"]
    return result, best * n_v


def export_checkpoint(source: Path, file: Path) -> Path:
    """Write a checkpoint as one file, V, moments and all: it is resumed under every strategy.

    Its tensors lie in a temporary file beside it on the way, not in memory.

    Raises:
        L3DError: the checkpoint is damaged; the file cannot be written.
    """
    stored = _open(source)
    if file.is_dir():
        raise L3DError(f"export: {file} is a directory; allowed is a file")

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            aside = Path(folder, WEIGHTS)
            write_safetensors(aside, {name: stored.entry(name) for name in stored.tensors}, {})
            tensors = load_file(aside)  # mapped: a page is read when it is written
            content = replaced(stored.content, lambda name, tensor: tensors.get(name, tensor))
            AtomicCheckpointIO().save_checkpoint(content, file)

    _writing(file, write)
    return file


def _open(source: Path) -> Stored:
    """The checkpoint, or the one before it where it is damaged (and named in a warning)."""
    return Stored(newest_whole(source, ALONE))


def _writing(place: Path, write: Callable[[], Any]) -> None:
    try:
        write()
    except OSError as error:
        raise L3DError(f"export: {place} cannot be written ({error.strerror})") from error
