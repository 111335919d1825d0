"""A finished run, opened again to be asked: its decomposition, its target model, its data entry by entry."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from l3d_pl.analysis.items import input_of
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError, require_choice
from l3d_pl.gradients.forward import batch_size as size_of
from l3d_pl.gradients.forward import inputs_of
from l3d_pl.gradients.samples import MASKS
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.targets.frozen import fingerprint
from l3d_pl.targets.training import load_target

PATHS = ("target_weights", "pretrained", "path", "weights", "tokenizer", "source", "truth")  # may be a name alone
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # and their datasets in our own data modules


class Entries:
    """The data of a split, entry by entry: an image, a row, a sequence. Entry i is the i-th, in the data's own order.

    Args:
        source: a dataset with a length that is indexed by a tensor of row numbers, as those of our data modules are; or
            another data module's loader, or anything that gives the same entries each time it is iterated over. A
            `DataLoader` that shuffles is read in its dataset's order instead.
        limit: only the first so many entries; None: all.
        split: its name.
    """

    def __init__(self, source: Any, limit: int | None = None, split: str = ""):
        if limit is not None and limit < 2:
            raise L3DError(f"samples: found {limit}, allowed are whole numbers >= 2")
        self.source, self.limit, self.split = in_order(source), limit, split
        self.is_indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        """Number of entries; of a loader the limit, or 0 where that is not known."""
        if not self.is_indexed:
            return self.limit or 0
        return min(len(self.source), self.limit or len(self.source))

    def batches(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, int, Any]]:
        """(its number, its first entry, the batch) of every `ranks`-th batch, from the one numbered `rank`.

        Where the batches are cut does not depend on the number of ranks. None has one entry alone (a single one that is
        left joins the last): it could be compared with no other. Small batches of a loader are joined.
        """
        if self.is_indexed:
            n = len(self)
            starts = list(range(0, n, batch_size))
            if len(starts) > 1 and n - starts[-1] == 1:
                starts.pop()
            for number in range(rank, len(starts), ranks):
                stop = n if number + 1 == len(starts) else starts[number + 1]
                yield number, starts[number], self.source[torch.arange(starts[number], stop)]
            return
        first = 0
        for number, batch in enumerate(self._regrouped(batch_size)):
            if number % ranks == rank:
                yield number, first, batch
            first += length_of(batch)

    def _regrouped(self, batch_size: int) -> Iterator[Any]:
        """A loader's entries in batches of 2 to `batch_size` + 1; one is held back, for a single entry at the end."""
        ready = growing = None
        for loaded in self._loaded():
            for start in range(0, length_of(loaded), batch_size):
                piece = take(loaded, slice(start, start + batch_size))
                n = 0 if growing is None else length_of(growing)
                if growing is not None and (n == 1 or n + length_of(piece) <= batch_size):
                    growing = join([growing, piece])
                    continue
                if ready is not None:
                    yield ready
                ready, growing = growing, piece
        if ready is not None and growing is not None and length_of(growing) == 1:
            ready, growing = join([ready, growing]), None
        yield from (batch for batch in (ready, growing) if batch is not None)

    def _loaded(self) -> Iterator[Any]:
        """A loader's own batches, up to the limit."""
        left = self.limit
        for loaded in self.source:
            yield loaded if left is None else take(loaded, slice(0, left))
            if left is not None and (left := left - length_of(loaded)) <= 0:
                return

    def keep(self, entries: Sequence[int]) -> None:
        """Make ready what `pick` will be asked for: a loader is read once more for them, and they stay in memory."""
        if self.is_indexed:
            return
        wanted, first = set(entries), 0
        for loaded in self._loaded():
            n = length_of(loaded)
            for i in wanted & set(range(first, first + n)):
                one = take(loaded, slice(i - first, i - first + 1))
                self._kept[i] = tree_map_only(Tensor, torch.clone, one)  # (a view would keep the whole batch)
            first += n
            if len(self._kept) == len(wanted):
                return

    def require_same(self, known: Mapping[int, int]) -> None:
        """Raise an `L3DError` unless the entries (of a loader: those kept) still have the `checksums` known."""
        for i, expected in known.items():
            if not (self.is_indexed or i in self._kept) or int(checksums(self.pick([i]))[0]) != expected:
                raise L3DError(
                    f"data: sample {i} of split '{self.split}' is another one when it is read again: its loader "
                    "shuffles or augments at random, or the data have changed since `l3d analyze`; allowed are the "
                    "same entries in the same order"
                )

    def pick(self, entries: Sequence[int]) -> Any:
        """A batch of the given entries, in this order."""
        if not self.is_indexed:
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
    """One batch of several. Sequences are padded with 0 at their end, as their masks are.

    Raises:
        L3DError: entries of different shapes that are no sequences.
    """
    parts = [tree_flatten(batch) for batch in batches]
    leaves = [
        _cat(same) if isinstance(same[0], Tensor) else same[0]
        for same in zip(*(leaves for leaves, _ in parts), strict=True)
    ]
    joined, inputs = tree_unflatten(leaves, parts[0][1]), [input_of(batch) for batch in batches]
    if len({tensor.shape[1:] for tensor in inputs}) > 1:
        masked = isinstance(joined, Mapping) and any(name in joined for name in MASKS)
        if inputs[0].is_floating_point() and not masked:
            shapes = sorted({str(list(tensor.shape[1:])) for tensor in inputs})
            raise L3DError(f"data: found entries of shapes {', '.join(shapes)}, allowed is one (sequences are padded)")
        if isinstance(joined, Mapping) and not masked:  # what is padded here is no sample
            mask = _cat([torch.ones(tensor.shape[:2], dtype=torch.bool) for tensor in inputs])
            return dict(joined) | {"sample_mask": mask}
    return joined


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors below each other, those that are smaller in other dimensions padded with 0."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat(
        [
            pad(
                tensor,
                [n for size, own in zip(largest[::-1], tensor.shape[:0:-1], strict=True) for n in (0, size - own)],
            )
            for tensor in tensors
        ]
    )


def in_order(loader: Any) -> Any:
    """A `DataLoader` that shuffles in the order of its dataset, and whole; anything else as it is."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if not isinstance(loader.sampler, RandomSampler) or type(loader.batch_sampler) is not BatchSampler:
        return loader
    same = {name: getattr(loader, name) for name in ("collate_fn", "num_workers", "worker_init_fn")}
    return DataLoader(loader.dataset, loader.batch_size, shuffle=False, **same)


def length_of(batch: Any) -> int:
    """Number of entries in a batch."""
    return size_of(inputs_of(batch))


def checksums(batch: Any) -> Tensor:
    """CRC-32 of each entry's input, int64 [N]; zeros at its end do not count, they may be a batch's padding."""
    rows = input_of(batch).detach().cpu().contiguous()
    return torch.tensor([zlib.crc32(row.reshape(-1).view(torch.uint8).numpy().tobytes().rstrip(b"\0")) for row in rows])


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
            L3DError: there is no such split, or no data of its own in it.
        """
        require_choice("split", split, SPLITS)
        self.data.prepare_data()
        self.data.setup("test" if split == "test" else "fit")
        if hasattr(self.data, "first_dataloader"):  # one of ours: rows that can be indexed, unless it is a stream
            dataset = getattr(self.data, SPLITS[split])
            if dataset is not None:
                return Entries(dataset, limit, split)
            if split == "train" and limit is None:
                raise L3DError("samples: the training data are a stream without an end; say how many with --samples")
            loader = self.data.first_dataloader() if split == "train" else []
        else:
            loader = getattr(self.data, f"{split}_dataloader")()
            loader = loader[0] if isinstance(loader, list | tuple) and len(loader) == 1 else loader
        if next(iter(islice(iter([] if loader is None else loader), 1)), None) is None:
            raise L3DError(
                f"split: '{split}' holds no data of its own, allowed are those of {', '.join(SPLITS)} that do"
            )
        return Entries(loader, limit, split)


@contextmanager
def several_processes(device: str = "cpu") -> Iterator[tuple[Ranks, str]]:
    """The ranks that share the work, where torchrun or srun has started several, and this one's own device."""
    environment = os.environ
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        address, local = "env://", int(environment.get("LOCAL_RANK", rank))
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # srun's: in a batch script there is one process
        slurm = SLURMEnvironment(auto_requeue=False)
        address = f"tcp://{slurm.main_address}:{slurm.main_port}"
        rank, size, local = slurm.global_rank(), int(environment["SLURM_STEP_NUM_TASKS"]), slurm.local_rank()
    else:
        yield ALONE, device
        return
    is_cuda = device.startswith("cuda")
    if device == "cuda":
        device = f"cuda:{local % max(1, torch.cuda.device_count())}"  # (each may see only its own)
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo", init_method=address, rank=rank, world_size=size)
    try:
        yield Ranks.of_run(), device
    finally:
        dist.destroy_process_group()


def fingerprints_of(decomposition: Decomposition) -> dict[str, str | None]:
    """Of the target and of the decomposition itself, as a manifest keeps them."""
    return {"fingerprint": decomposition.target_fingerprint, "decomposition": fingerprint(decomposition.subnetworks)}


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
