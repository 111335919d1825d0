"""A finished run, opened again to be asked: its decomposition, its target model, its data entry by entry."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError, require_choice
from l3d_pl.gradients.forward import batch_size as size_of
from l3d_pl.gradients.forward import inputs_of
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.targets.training import load_target

PATHS = ("target_weights", "pretrained", "path", "weights", "tokenizer", "source", "truth")  # may be a name alone
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # and their datasets in our own data modules


class Entries:
    """The data of a split, entry by entry: an image, a row, a sequence. Entry i is the i-th, in the data's own order.

    Args:
        source: a dataset with a length that is indexed by a tensor of row numbers, as those of our data modules are; or
            anything that gives the same batches each time it is iterated over, such as another data module's loader.
        limit: only the first so many entries; None: all.
    """

    def __init__(self, source: Any, limit: int | None = None):
        if limit is not None and limit < 2:
            raise L3DError(f"samples: found {limit}, allowed are whole numbers >= 2")
        self.source, self.limit = source, limit
        self._is_indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        """Number of entries; of a loader the limit, or 0 where that is not known."""
        if not self._is_indexed:
            return self.limit or 0
        return min(len(self.source), self.limit or len(self.source))

    def batches(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, int, Any]]:
        """(its number, its first entry, the batch) of every `ranks`-th batch, from the one numbered `rank`.

        Where the batches are cut does not depend on the number of ranks. None has one entry alone (a single one that is
        left joins the last): it could be compared with no other.
        """
        if self._is_indexed:
            n = len(self)
            starts = list(range(0, n, batch_size))
            if len(starts) > 1 and n - starts[-1] == 1:
                starts.pop()
            for number in range(rank, len(starts), ranks):
                stop = n if number + 1 == len(starts) else starts[number + 1]
                yield number, starts[number], self.source[torch.arange(starts[number], stop)]
            return
        number = first = 0
        for loaded in self.source:
            n = size_of(inputs_of(loaded))
            n = n if self.limit is None else min(n, self.limit - first)
            starts = list(range(0, n, batch_size))
            if len(starts) > 1 and n - starts[-1] == 1:
                starts.pop()
            for start, stop in zip(starts, [*starts[1:], n], strict=True):
                if number % ranks == rank:
                    yield number, first + start, take(loaded, slice(start, stop))
                number += 1
            first += n
            if first == self.limit:
                return

    def keep(self, entries: Sequence[int]) -> None:
        """Make ready what `pick` will be asked for: a loader is read once more for them, and they stay in memory."""
        if self._is_indexed:
            return
        wanted, first = set(entries), 0
        for loaded in self.source:
            n = size_of(inputs_of(loaded))
            for i in wanted & set(range(first, first + n)):
                self._kept[i] = take(loaded, slice(i - first, i - first + 1))
            first += n
            if len(self._kept) == len(wanted):
                return

    def pick(self, entries: Sequence[int]) -> Any:
        """A batch of the given entries, in this order."""
        if not self._is_indexed:
            return join([self._kept[i] for i in entries])
        if len(set(entries)) == len(entries) and list(entries) == sorted(entries):
            return self.source[torch.tensor(entries)]
        rows, place = torch.tensor(entries).unique(return_inverse=True)  # some datasets want them ascending
        return take(self.source[rows], place)


def take(batch: Any, index: Tensor | slice) -> Any:
    """The entries at `index` of every tensor in a batch."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map_only(Tensor, lambda tensor: tensor[index], batch)


def join(batches: Sequence[Any]) -> Any:
    """One batch of several."""
    parts = [tree_flatten(batch) for batch in batches]
    leaves = [
        torch.cat(same) if isinstance(same[0], Tensor) else same[0]
        for same in zip(*(leaves for leaves, _ in parts), strict=True)
    ]
    return tree_unflatten(leaves, parts[0][1])


def placed(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


@dataclass
class Run:
    """A run that can be asked.

    Attributes:
        folder: its directory.
        decomposition: with its target model attached.
        data: the data module it was fitted on.
    """

    folder: Path
    decomposition: Decomposition
    data: Any

    def entries(self, split: str = "val", limit: int | None = None) -> Entries:
        """The data of a split: `train`, `val` or `test`.

        Raises:
            L3DError: there is no such split, or no data in it.
        """
        require_choice("split", split, SPLITS)
        self.data.prepare_data()
        self.data.setup("test" if split == "test" else "fit")
        if hasattr(self.data, "first_dataloader"):  # one of ours: rows that can be indexed, unless it is a stream
            dataset = getattr(self.data, SPLITS[split])
            dataset = self.data.validation if dataset is None and split == "test" else dataset
            if dataset is not None:
                return Entries(dataset, limit)
            if split == "train" and limit is None:
                raise L3DError("samples: the training data are a stream without an end; say how many with --samples")
            loader = self.data.first_dataloader() if split == "train" else []
        else:
            loader = getattr(self.data, f"{split}_dataloader")()
        if next(iter(islice(iter(loader or []), 1)), None) is None:
            raise L3DError(f"split: '{split}' holds no data, allowed are those of {', '.join(SPLITS)} that do")
        return Entries(loader, limit)


@contextmanager
def several_processes(device: str = "cpu") -> Iterator[Ranks]:
    """The ranks that share the work, where torchrun (or srun) has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks.of_run()
    finally:
        dist.destroy_process_group()


def load_run(run_dir: Path) -> Decomposition:
    """The decomposition of a finished run, from its directory or from its `decomposition/` folder.

    Raises:
        L3DError: there is no such folder, or none in it.
    """
    for folder in (run_dir / "decomposition", run_dir):
        if (folder / "config.json").is_file():
            return Decomposition.from_pretrained(str(folder))
    raise L3DError(f"run: {run_dir} holds no decomposition/config.json; it is written when `l3d fit` ends")


def open_run(run_dir: Path, device: str = "cpu") -> Run:
    """A finished run with its target model and its data module, made from the configuration that it keeps.

    Raises:
        L3DError: no finished run; it was not made by `l3d fit`; its target or its data are not there any more, or are
            others than those it was fitted on.
    """
    decomposition = load_run(run_dir)
    config = settings_of(decomposition)
    model = config.get("model") or {}
    for key, section in (("model.target", model.get("target")), ("data", config.get("data"))):
        if not section:
            raise L3DError(
                f"run: {run_dir} keeps no '{key}' in its configuration (it was not made by `l3d fit`); "
                "give target and data to l3d_pl.analysis.survey yourself"
            )
    if config.get("threads"):
        torch.set_num_threads(config["threads"])  # as the run itself
    _require_there(model, config)
    _make_importable(config)
    target = _instantiate(nn.Module, "target", model["target"])
    if model.get("target_weights"):
        load_target(model["target_weights"], target)
    decomposition.attach(target.to(device))
    decomposition.subnetworks.to(device)
    if decomposition.mean_reference is not None:
        decomposition.mean_reference = decomposition.mean_reference.to(device)
    return Run(run_dir, decomposition, _instantiate(LightningDataModule, "data", config["data"]))


def settings_of(decomposition: Decomposition) -> dict[str, Any]:
    """The run's configuration, empty without one; its relative paths are those of where its fit was started.

    What is not there (any more) stays as it is, and is looked for in the working directory.
    """
    config = dict(decomposition.run_config or {})
    start = config.get("started_in")
    if not start or Path(start) == Path.cwd():
        return config
    return config | {key: _from(start, config.get(key)) for key in ("model", "data") if config.get(key)}


def looked_in(config: Mapping[str, Any]) -> str:
    """`" (looked from DIR and DIR)"`: where a run's relative paths are looked up."""
    return (
        f" (looked from {' and '.join(dict.fromkeys([config.get('started_in') or str(Path.cwd()), str(Path.cwd())]))})"
    )


def _from(start: str, value: Any, key: str = "") -> Any:
    """A part of a configuration in which every relative path (also a glob) that leads to something is made absolute.

    A name alone, such as `digits`, is a path only under some keys, and only if nothing else is of that name.
    """
    if isinstance(value, Mapping):
        return {name: _from(start, inner, key if key in PATHS else name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_from(start, inner, key) for inner in value]
    if not isinstance(value, str) or "://" in value or not value:
        return value
    may_be = "/" in value or Path(value).suffix or (key in PATHS and value not in ("digits", "pydoc"))
    return os.path.join(start, value) if may_be and glob(value, root_dir=start, recursive=True) else value


def _make_importable(config: Mapping[str, Any]) -> None:
    """The modules beside which the fit was started, as it could import them itself: before those of this directory."""
    start = config.get("started_in")
    if start and start not in sys.path:
        here = os.getcwd()
        sys.path.insert(sys.path.index(here) if here in sys.path else len(sys.path), start)


def _require_there(model: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise an `L3DError` if a file that the run took its target from is gone."""
    place = model.get("target_weights")
    pretrained = (model["target"].get("init_args") or {}).get("pretrained")
    if place is None and isinstance(pretrained, str) and pretrained.startswith(("runs/", "./", "/")):
        place = pretrained
    if place is not None and not Path(place).exists():
        hint = f"; l3d target --config {model['target_config']} makes it" if model.get("target_config") else ""
        raise L3DError(f"target: the run's target {place} is not there any more{looked_in(config)}{hint}")


def _instantiate(kind: type, key: str, section: Any) -> Any:
    """An object from the `class_path` and `init_args` of a run's configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=kind)
    try:
        return parser.instantiate(parser.parse_object({key: section}))[key]
    except L3DError:
        raise
    except Exception as error:  # whatever a user's class raises, where it is not there or not what it was
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise L3DError(f"{key}: {section.get('class_path', section)} cannot be made again ({lines[-1]})") from error
