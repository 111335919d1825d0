"""What the digits CNN and the text LM are to learn: behaviours to steer, and new names for digits.

Samples have a *context* (an image its class, a token position the token there) and something that is *right* for them
(the class; the next token). A behaviour is a pair: samples of context b shall give a, all others what they gave. The
digits CNN is to call class b an a, the text LM to go on after token b with token a.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from datamodules.digits import DigitsData
from datamodules.loading import Batch, Rows, exact_loader
from datamodules.text import TextData
from l3d_pl.experiments.text import Text
from l3d_pl.gradients.forward import call_model, inputs_of

NEW_NAMES = (0, 1, 2, 3, 4, 6, 7, 8, 9, 5)
WORD = re.compile(r" [a-z]{2,}")
CONTEXTS, FOLLOWERS = 20, 10  # b is one of so many words that has so many that follow it; a one of these, not the first
SEQUENCES = 256  # of a pair, at most, to learn from; half of them without b


@dataclass
class Behaviour:
    """One pair.

    Attributes:
        a, b: numbers of outputs and of contexts.
        names: of both, to read.
        batches: what a training runs through: a data module or a loader, new each time.
        train, held_out: samples as one batch.
        examples: training samples for many of which a is right.
        followed: training samples of which in many a is right in context b; None where a context has one right answer.
    """

    a: int
    b: int
    names: tuple[str, str]
    batches: Callable[[], Any]
    train: Batch
    held_out: Batch
    examples: Batch
    followed: Batch | None = None

    @property
    def pair(self) -> tuple[int, int]:
        return self.a, self.b


class NewNames(DigitsData):
    """The digits, where classes 5 to 9 are called 6, 7, 8, 9, 5."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        names = torch.tensor(NEW_NAMES)
        renamed = []
        for part in (self.train, self.test):
            given = part[torch.arange(len(part))]  # type: ignore[arg-type]
            renamed.append(Rows(inputs=given["inputs"], labels=names[given["labels"]]))
        self.train, (self.validation, self.test) = renamed[0], (renamed[1], renamed[1])


def read(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values of a batch by sample [N, ...], the samples' contexts [N], and what is right for them [N].

    Of sequences [B, S, ...] those positions are samples that have a next token and are in the `sample_mask`.
    """
    if "labels" in batch:
        return values, batch["labels"], batch["labels"]
    tokens, counted = batch["input_ids"], batch["sample_mask"][:, :-1]
    return values[:, :-1][counted], tokens[:, :-1][counted], tokens[:, 1:][counted]


def outputs_at(target: nn.Module, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """A model's outputs with these tensors in the place of its own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(target, dict(tensors), args, kwargs)

    return call_model(run, inputs_of(batch))  # type: ignore[arg-type]


def digits(n: int, seed: int) -> list[Behaviour]:
    """Pairs of classes."""
    data, random = DigitsData(seed=seed), torch.Generator().manual_seed(seed)
    data.setup()
    train, held_out = (part[torch.arange(len(part))] for part in (data.train, data.test))  # type: ignore[arg-type]
    pairs = [torch.randperm(10, generator=random)[:2].tolist() for _ in range(n)]
    return [Behaviour(a, b, (str(a), str(b)), partial(DigitsData, seed=seed), train, held_out, train) for a, b in pairs]


def text(n: int, seed: int, toy: Text, held_out: int) -> list[Behaviour]:
    """Pairs of words: b is frequent, a often follows it, but is not what follows most often.

    Args:
        held_out: sequences, at most, that a pair is measured on; half of them without b.
    """
    data = TextData(**(toy.data | {"n_val": None}))
    data.setup()
    random = torch.Generator().manual_seed(seed)
    parts = [part[torch.arange(len(part))] for part in (data.train, data.validation)]  # type: ignore[arg-type, index]
    tokens = data.tokenizer.batch_decode([[i] for i in range(len(data.tokenizer))])
    words = torch.tensor([WORD.fullmatch(token) is not None for token in tokens])
    _, contexts, following = read(parts[0], parts[0]["input_ids"])
    followers_of = {
        b: _most_frequent(following[contexts == b], words, FOLLOWERS)[1:]
        for b in _most_frequent(contexts, words, CONTEXTS).tolist()
    }
    frequent = [b for b, followers in followers_of.items() if len(followers) == FOLLOWERS - 1]
    found = []
    for i in torch.randperm(len(frequent), generator=random)[:n].tolist():
        b, followers = frequent[i], followers_of[frequent[i]]
        a = int(followers[torch.randint(len(followers), (1,), generator=random)])
        train, test = (_with(b, part, most, random) for part, most in zip(parts, (SEQUENCES, held_out), strict=True))
        now, then = parts[0]["input_ids"][:, :-1], parts[0]["input_ids"][:, 1:]
        examples, followed = (
            _chosen(parts[0], there.any(1).nonzero().flatten()[:SEQUENCES])
            for there in (then == a, (now == b) & (then == a))
        )
        batches = partial(exact_loader, Rows(**train), 16, seed=seed)
        found.append(Behaviour(a, b, (tokens[a].strip(), tokens[b].strip()), batches, train, test, examples, followed))
    return found


def _most_frequent(tokens: Tensor, allowed: Tensor, n: int) -> Tensor:
    """The n tokens that occur most often among the allowed, most frequent first."""
    counts = torch.bincount(tokens, minlength=len(allowed)) * allowed
    return counts.argsort(descending=True, stable=True)[: min(n, int((counts > 0).sum()))]


def _with(b: int, part: Batch, most: int, random: torch.Generator) -> Batch:
    """At most so many sequences, half of which hold b at a position that has a next token."""
    there = (part["input_ids"][:, :-1] == b).any(1)
    order = torch.randperm(len(there), generator=random)
    have, lack = order[there[order]][: most // 2], order[~there[order]]
    return _chosen(part, torch.cat([have, lack[: len(have)]]))


def _chosen(part: Batch, rows: Tensor) -> Batch:
    return {name: value[rows] for name, value in part.items()}
