"""Any loader of training batches, resumed where it stood; and the global random states that a run goes on with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


def random_states() -> dict[str, Any]:
    """The global random states of torch, NumPy, Python and CUDA, as plain values and tensors."""
    # NumPy's global state is the one that there is to keep.
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": list(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_states(state: Mapping[str, Any]) -> None:
    """Put back what `random_states` has given."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class Resumable:
    """A loader that knows how many batches of its epoch it has read, and from which random states the epoch began.

    To go on, the epoch begins again from these states, and the batches that were taken are read and left out: the same
    batches come, of any loader whose order depends on the global random states or on its own `generator` only. (A
    loader with a state of its own, such as `StatefulDataLoader`, need not read them, and is never wrapped.) Of a loader
    without a length Lightning reads one batch ahead: it may hold other numbers after a resume, where reading it in this
    process and the model's steps both draw from the global random states.

    Args:
        loader: a `DataLoader`, or anything else that gives batches; its attributes are this one's too.
    """

    def __init__(self, loader: Any):
        self.loader = loader
        self.start: dict[str, Any] | None = None
        self.read = 0
        self.is_resumed = False
        self._resume: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # of a copy that has none yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # A generator runs nothing before its first `next`: Lightning makes iterators that it never uses.
        resume, self._resume = self._resume, None
        place, now = resume or ({"read": 0, "taken": 0}, None)
        generator = getattr(self.loader, "generator", None)
        if now is not None:
            set_random_states(place["start"])
            if generator is not None:
                generator.set_state(place["start"]["generator"])
        self.start, self.read = self._states(), 0
        for batch in self.loader:
            self.read += 1
            if now is not None and self.read == place["read"]:
                set_random_states(now)
            if self.read > place["taken"]:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning keeps one for all ranks, and may not read it. By this method it knows not to warn."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: see `state_dict`."""

    def place(self, taken: int, is_last: bool = False) -> dict[str, Any]:
        """Where this epoch began, batches read, and those of them `taken` (without a length one is fetched ahead).

        Args:
            is_last: the last batch taken is the epoch's: the place is the beginning of another.
        """
        if self.start is None or is_last:
            return {"start": self._states(), "read": 0, "taken": 0}
        return {"start": self.start, "read": self.read, "taken": min(self.read, taken)}

    def _states(self) -> dict[str, Any]:
        generator = getattr(self.loader, "generator", None)
        return random_states() | ({} if generator is None else {"generator": generator.get_state()})

    def resume(self, place: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Let the next epoch be the rest of that in `place`, when the random states were those of `now`."""
        self._resume, self.is_resumed = (place, now), True


@contextmanager
def drawn_by(seed: int, loader: Any) -> Iterator[Any]:
    """The loader; within this context batches come in the order that `seed` draws. Afterwards all is as before."""
    loader = loader.loader if isinstance(loader, Resumable) else loader
    generator = getattr(loader, "generator", None)
    before = None if generator is None else generator.get_state()
    with isolate_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        if generator is not None:
            generator.manual_seed(seed)
        yield loader
    if generator is not None:
        generator.set_state(before)
