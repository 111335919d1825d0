"""Checkpoints: written aside and renamed, checked before they are read, going back to the one before where damaged.

A checkpoint is Lightning's dictionary, as one file that `torch.save` makes, or, where V_in, V_out and their moments are
sharded over ranks, as a directory that all of them write at the same time, gathering nothing:

    last.ckpt/meta.ckpt                            the dictionary; its sharded tensors are on the meta device
    last.ckpt/shard-00000-of-00002.safetensors     rows of those tensors, one file for each part of them
    last.ckpt/manifest.json                        format version; size and CRC-32 of every file

Both are read on any number of ranks, sharded or not. Nothing is unpickled but by torch's `weights_only`.

Of torch.distributed.checkpoint this takes the layout, not the code: its own format keeps a pickle, and its safetensors
writer makes each rank's file in memory, a second copy of the largest thing there is, with no checksum and no renaming.
Its HuggingFaceStorageReader reads these shards.

Saving is not asynchronous. It would take a copy of V and its moments in memory, and the one checkpoint that is urgent,
that of a job about to be ended, has to be waited for all the same.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from l3d_pl.errors import L3DError
from l3d_pl.parallel import Ranks
from l3d_pl.streamed import Entry, SafetensorsFile, checksum, entry_of, pieces, write_safetensors

FORMAT_VERSION = 1
META, MANIFEST = "meta.ckpt", "manifest.json"
LARGE = ("state_dict", "optimizer_states")  # the entries of a checkpoint whose tensors are read one by one
REMAP = 2**24  # bytes read through a file's mapping before it is mapped anew: its pages count as this process's memory

T = TypeVar("T")
_damaged: set[Path] = set()  # found by this process: what replaces them does not keep them as the one before


class NotSaved(L3DError):
    """A checkpoint could not be written (a full disk); the one before it is still there."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints in one file, written aside, flushed to the disk and renamed; they are read from either form.

    The one that is replaced stays beside the new one, as `last.ckpt.previous`; it is read where the new one is damaged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        aside = aside_of(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(aside)
            _write(aside, lambda file: torch.save(checkpoint, file))
            take_place(aside, target)
        except OSError as error:  # a full disk: the checkpoint before this one is still whole
            remove(aside)
            raise NotSaved(
                f"checkpoint: {target} cannot be written ({error.strerror}); the one before it is kept"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        ranks = Ranks.of_run()
        whole = newest_whole(Path(path), ranks)
        if whole.is_file():
            return together(ranks, lambda: _unpickle(whole, map_location))
        return together(ranks, lambda: Stored(whole).in_memory(map_location))


# -- one in place of another -------------------------------------------------------------------------------------------


def previous_of(path: Any, age: int = 1) -> Path:
    """Where the checkpoint that the one at `path` has replaced is kept; of age 2, the one before that."""
    return Path(f"{path}.previous" + (f".{age}" if age > 1 else ""))


def aside_of(path: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return path.with_name(f".{path.name}.writing")


def newest_and_previous(path: Path) -> list[Path]:
    """The checkpoint of this path and those before it, as far as they are there, the newest first."""
    found, age = [path] if path.exists() else [], 1
    while previous_of(path, age).exists() or (age == 1 and previous_of(path, 2).exists()):
        found += [previous_of(path, age)] if previous_of(path, age).exists() else []
        age += 1
    return found


def make_older(path: Path, keep: int) -> None:
    """Make room for one more before `path`: those before it age by one, and more than `keep` of them go."""
    if not previous_of(path).exists():
        return  # there is room: what was to be written then was not
    remove(previous_of(path, keep) if keep > 1 else None)
    for age in range(keep - 1, 0, -1):
        if previous_of(path, age).exists():
            os.replace(previous_of(path, age), previous_of(path, age + 1))


def take_place(aside: Path, target: Path) -> None:
    """`aside`, which is whole, becomes `target`; what was there becomes `previous_of(target)`, unless it is damaged.

    Killed in between, it leaves one of the two, whole.
    """
    if target in _damaged or not target.exists():
        remove(target)
    else:
        if target.is_dir() or previous_of(target).is_dir():
            remove(previous_of(target))
        os.replace(target, previous_of(target))
    os.replace(aside, target)
    _damaged.discard(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself has to survive a power cut
    finally:
        os.close(folder)


def remove(path: Path | None) -> None:
    """Remove a file or a directory, if it is there."""
    if path is not None and path.is_dir():
        shutil.rmtree(path)
    elif path is not None:
        path.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with open(path, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # torch.save's own bookkeeping trips over a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())


# -- checked before it is read -----------------------------------------------------------------------------------------


def together(ranks: Ranks, what: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on one, all raise, and none waits for the others for ever.

    Raises:
        L3DError: what was wrong, on the first of the ranks that failed.
    """
    result, error = None, None
    try:
        result = what()
    except Exception as caught:
        error = caught
    told = [text for text in ranks.gather(None if error is None else _told(error, ranks)) if text]
    if error is not None and not isinstance(error, (L3DError, OSError)):
        raise error
    if told:
        raise L3DError(told[0]) from error
    return result  # type: ignore[return-value]


def _told(error: Exception, ranks: Ranks) -> str:
    if isinstance(error, L3DError):
        return str(error)
    text = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
    return text if ranks.size == 1 else f"{text} on rank {ranks.rank}"


def newest_whole(path: Path, ranks: Ranks) -> Path:
    """The checkpoint at `path` if it is whole, else the newest before it that is; all ranks take the same.

    Raises:
        L3DError: there is none; what is wrong with the one at `path`.
    """
    found, first = ranks.gather(newest_and_previous(path))[0], None
    if path not in found:
        first = L3DError(f"checkpoint: there is no file {path}")
    for candidate in found:
        try:
            together(ranks, partial(verify, candidate, ranks))
        except L3DError as error:
            _damaged.add(candidate)
            first = first or error
            continue
        if first is not None:
            rank_zero_warn(f"{first}; going on from the one before it, {candidate}")
        return candidate
    assert first is not None
    raise first


def verify(path: Path, ranks: Ranks) -> None:
    """Check a checkpoint's files by size and checksum, each of them on one of the ranks.

    Raises:
        L3DError: it is damaged, or none; what was found.
    """
    if not path.is_dir():
        if not path.exists():
            raise L3DError(f"checkpoint: there is no file {path}")
        if ranks.rank == 0:
            with as_damage_of(path), zipfile.ZipFile(path) as archive:  # torch writes checksums, and reads past them
                if broken := archive.testzip():
                    raise ValueError(f"checksum of {broken}")
        return
    for index, (name, expected) in enumerate(sorted(_manifest(path).items())):
        if index % ranks.size == ranks.rank:
            with as_damage_of(path):
                if not (path / name).is_file():
                    raise ValueError(f"{name} is missing")
                found = checksum(path / name)
                if found["bytes"] != expected["bytes"]:
                    raise ValueError(f"{name} has {found['bytes']} bytes, written were {expected['bytes']}")
                if found != expected:
                    raise ValueError(f"checksum of {name}")


def _manifest(folder: Path) -> dict[str, dict[str, int]]:
    """{file: size and checksum} of a sharded checkpoint."""
    if not (folder / MANIFEST).is_file():
        if (folder / "latest").is_file() or (folder / "checkpoint").is_dir():
            raise L3DError(
                f"checkpoint: {folder} is in DeepSpeed's own format; allowed are checkpoints that l3d_pl has written"
            )
        raise L3DError(f"checkpoint: {folder} is a directory without {MANIFEST}, and no checkpoint")
    with as_damage_of(folder):
        try:
            content = json.loads((folder / MANIFEST).read_text())
            version, files = content["format_version"], content["files"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{MANIFEST} is no manifest") from None
        if version != FORMAT_VERSION:
            raise L3DError(
                f"checkpoint: {folder} has format version {version}; this l3d_pl reads version {FORMAT_VERSION}"
            )
        if not isinstance(files, dict) or META not in files or any(name != Path(name).name for name in files):
            raise ValueError(f"{MANIFEST} is no manifest")
    return files


class as_damage_of:
    """Whatever goes wrong inside the block is told as the damage of this checkpoint, in one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, L3DError):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise L3DError(f"checkpoint: {self.path} is damaged or no checkpoint ({reason})") from error


def _unpickle(path: Path, map_location: Any = "cpu", **options: Any) -> dict[str, Any]:
    with as_damage_of(path):
        return torch.load(path, map_location=map_location, weights_only=True, **options)


# -- reading -----------------------------------------------------------------------------------------------------------


class Stored:
    """A checkpoint on the disk, whole (see `newest_whole`), of which the large tensors are read row by row.

    Attributes:
        content: its dictionary; the tensors of V, the buffers and the optimizers are on the meta device.
        tensors: those by their path, such as "state_dict.subnetworks.v_in.fc/weight.core".
    """

    def __init__(self, path: Path):
        self.path, self._read = path, 0
        # {tensor: (its first row there, the row after its last one, file)}; the files stay open
        self._places: dict[str, list[tuple[int, int, SafetensorsFile]]] = {}
        stored = self._load()
        with as_damage_of(path):
            if not isinstance(stored, dict):
                raise ValueError(f"it holds {type(stored).__name__}")
            if path.is_dir():
                for name in sorted(set(_manifest(path)) - {META}):
                    self._find(path / name)
                for places in self._places.values():
                    places.sort(key=lambda place: place[:2])
        self.content = replaced(stored, lambda name, tensor: tensor.to("meta") if is_large(name) else tensor.clone())
        self.tensors = {name: tensor for name, tensor in named_tensors(self.content) if is_large(name)}
        self._mapped = dict(named_tensors(stored))

    def _load(self) -> Any:
        return _unpickle(self.path / META) if self.path.is_dir() else _unpickle(self.path, mmap=True)

    def _find(self, file: Path) -> None:
        shard = SafetensorsFile(file)
        offsets = json.loads(shard.metadata["DCP_SHARDING_INFO"])
        for name, shape in shard.shapes.items():
            first = int(offsets[name]["saved_offsets"][0])
            self._places.setdefault(name, []).append((first, first + shape[0], shard))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, on the CPU; a scalar whole."""
        if not self._mapped[name].is_meta:
            self._read += self._mapped[name][start:stop].nbytes if self._mapped[name].ndim else 0
            if self._read > REMAP and self.path.is_file():
                self._mapped, self._read = dict(named_tensors(self._load())), 0
            return self._mapped[name][start:stop] if self._mapped[name].ndim else self._mapped[name]
        expected, parts, at = self._mapped[name], [], start
        with as_damage_of(self.path):
            for first, last, shard in self._places.get(name, []):
                if first <= at < min(stop, last):
                    parts.append(shard.rows(name, at - first, min(stop, last) - first))
                    at = min(stop, last)
            found = torch.cat(parts) if parts else expected.new_empty(0, *expected.shape[1:], device="cpu")
            if found.shape != (stop - start, *expected.shape[1:]) or found.dtype != expected.dtype:
                raise ValueError(f"rows {start} to {stop} of '{name}' are missing")
        return found

    def entry(self, name: str) -> Entry:
        """A tensor as something to be written."""
        tensor = self.tensors[name]
        return Entry(tensor.dtype, tuple(tensor.shape), partial(self.rows, name))

    def read_into(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor, of a sharded one what this rank holds, by the rows that belong there."""
        first, own = 0, tensor.detach()
        if isinstance(own, DTensor):
            first, own = own.__create_chunk_list__()[0].offsets[0], own.to_local()
        for start, stop in pieces(tuple(own.shape), own.itemsize):
            rows = self.rows(name, first + start, first + stop)
            (own[start:stop] if own.ndim else own).copy_(rows)

    def in_memory(self, map_location: Any = "cpu") -> dict[str, Any]:
        """The whole dictionary, with all its tensors."""

        def read(name: str, tensor: Tensor) -> Tensor:
            if not is_large(name):
                return tensor.to(map_location)
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            self.read_into(whole, name)
            return whole.to(map_location)

        return replaced(self.content, read)


def is_large(name: str) -> bool:
    """Whether the tensor of this path belongs to V, the buffers or the optimizers."""
    return name.split(".", 1)[0] in LARGE


def replaced(tree: Any, change: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """The same nest of dictionaries and lists with every tensor changed, given its path."""
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, dict):
        return {key: replaced(value, change, f"{path}.{key}" if path else str(key)) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(replaced(value, change, f"{path}.{index}") for index, value in enumerate(tree))
    return tree


def named_tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors in a nest of dictionaries and lists."""
    found: list[tuple[str, Tensor]] = []
    replaced(tree, lambda name, tensor: found.append((name, tensor)))
    yield from found


# -- sharded -----------------------------------------------------------------------------------------------------------


def save_sharded(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint with DTensors as a directory; every rank has to call it.

    Each part of a sharded tensor is written by the first of the ranks that hold it; the rest by the first rank.

    Args:
        checkpoint: with tensors as `Module.state_dict` and `Optimizer.state_dict` give them.

    Raises:
        NotSaved: a rank cannot write its part (a full disk); on all of them, and the checkpoint before it is kept.
    """
    ranks, folder = Ranks.of_run(), Path(folder)
    aside = aside_of(folder)
    shards: dict[str, Any] = {n: tensor for n, tensor in named_tensors(checkpoint) if isinstance(tensor, DTensor)}
    rest = replaced(checkpoint, lambda name, tensor: _outline(tensor) if name in shards else tensor.detach().cpu())
    holders = ranks.gather(_part_held(shards.values()))
    parts = sorted(set(holders))
    part = parts.index(holders[ranks.rank])

    def begin() -> None:
        if ranks.rank == 0:
            remove(aside)
            aside.mkdir(parents=True)

    def write() -> dict[str, dict[str, int]]:
        files = {}
        if holders.index(holders[ranks.rank]) == ranks.rank:
            entries, offsets = {}, {}
            for name, tensor in shards.items():
                entries[name] = entry_of(tensor.detach().to_local())
                offsets[name] = {"saved_offsets": list(tensor.__create_chunk_list__()[0].offsets)}
            entries = {name: entry for name, entry in entries.items() if entry.shape[0]}
            layout = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
            name = f"shard-{part:05d}-of-{len(parts):05d}.safetensors"
            files[name] = write_safetensors(aside / name, entries, layout)
        if ranks.rank == 0:
            _write(aside / META, lambda file: torch.save(rest, file))
            files[META] = checksum(aside / META)
        return files

    def finish(files: dict[str, dict[str, int]]) -> None:
        if ranks.rank == 0:
            manifest = {"format_version": FORMAT_VERSION, "files": files}
            _write(aside / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=2).encode()))
            take_place(aside, folder)

    try:
        together(ranks, begin)
        mine = together(ranks, write)
        files = {name: found for written in ranks.gather(mine) for name, found in written.items()}
        together(ranks, lambda: finish(files))
    except L3DError as error:
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise NotSaved(f"checkpoint: {folder} cannot be written ({error}); the one before it is kept") from error


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _part_held(shards: Iterable[DTensor]) -> tuple[int, ...]:
    """Which part of the sharded tensors this rank holds: its place in the mesh, along the dimensions that shard."""
    for tensor in shards:
        place = tensor.device_mesh.get_coordinate() or ()
        return tuple(i for i, placement in zip(place, tensor.placements, strict=True) if placement.is_shard())
    return ()


def load_sharded(path: Path, module: nn.Module) -> Stored:
    """Fill a module in place from a checkpoint of either form; every rank has to call it.

    Each rank reads the rows that it holds, whatever number of ranks has written them.

    Returns:
        the checkpoint, for `load_optimizers` to go on with.

    Raises:
        L3DError: no checkpoint of the path is whole, or it is one of another shape.
    """
    ranks = Ranks.of_run()
    path = newest_whole(Path(path), ranks)

    def fill() -> Stored:
        stored = Stored(path)
        fill_module(stored, module)
        return stored

    return together(ranks, fill)


def load_optimizers(stored: Stored, optimizers: Iterable[Optimizer]) -> None:
    """The same for the optimizers, whose state is sharded as their parameters are; every rank has to call it."""

    def fill() -> None:
        states = stored.content["optimizer_states"]
        for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
            _fill_optimizer(stored, optimizer, state, f"optimizer_states.{index}")

    together(Ranks.of_run(), fill)


def fill_module(stored: Stored, module: nn.Module) -> None:
    """Overwrite a module's tensors, each rank its own rows, by those of a checkpoint that has the same ones."""
    own, saved = module.state_dict(), stored.content.get("state_dict", {})
    for name in (*saved, *own):
        found, expected = (list(tensors[name].shape) if name in tensors else "missing" for tensors in (saved, own))
        if found != expected:
            raise L3DError(
                f"checkpoint: its tensor '{name}' is {found}, this run's is {expected}; "
                "n_subnetworks, ranks, parameters and restarts have to be the checkpoint's"
            )
    for name, tensor in own.items():
        stored.read_into(tensor, f"state_dict.{name}")


def _fill_optimizer(stored: Stored, optimizer: Optimizer, saved: dict[str, Any], path: str) -> None:
    """As `Optimizer.load_state_dict`, but in place, and moments are made as their parameters are: sharded."""
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise L3DError(
            f"checkpoint: its optimizer has {len(saved['param_groups'])} groups of parameters, "
            f"this run's has {len(optimizer.param_groups)}"
        )
    for group, its in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, key in zip(group["params"], its["params"], strict=True):
            state = optimizer.state[parameter]
            for entry, value in saved["state"].get(key, {}).items():
                name = f"{path}.state.{key}.{entry}"
                if not isinstance(value, Tensor):
                    state[entry] = value
                    continue
                if entry not in state:
                    on_device = value.shape == parameter.shape or group.get("fused") or group.get("capturable")
                    state[entry] = (
                        torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
                        if value.shape == parameter.shape
                        else torch.zeros(value.shape, dtype=value.dtype, device=parameter.device if on_device else None)
                    )
                stored.read_into(state[entry], name)
        group.update({key: value for key, value in its.items() if key != "params"})
