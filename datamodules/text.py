"""Text as sequences of tokens of one length."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import Batch, EpochSampler, InMemoryData, require_at_least, require_choice
from datamodules.records import BadRecord, Record, Source, Unfit, pydoc_pieces
from datamodules.streaming import IndexedBatches, NumberedLoader, cache_folder, fingerprint, stored

Mode = Literal["pack", "rows"]


def pydoc_tokenizer(vocabulary: int = 2000, cache_dir: Path | str | None = None) -> Path:
    """A folder with a byte-pair tokenizer of the standard library's text, in Hugging Face's format.

    Made the first time, the same on every machine with the same Python and `tokenizers`. Its one special token,
    `<|endoftext|>`, begins, ends and pads, as in GPT-2 and GPT-Neo.
    """
    require_at_least(257, vocabulary=vocabulary)
    texts = [piece["text"] for piece in pydoc_pieces()]

    def write(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        end = "<|endoftext|>"
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, pad_token=end
        ).save_pretrained(folder)

    return stored(cache_folder(cache_dir) / f"tokenizer-pydoc-{vocabulary}-{fingerprint(texts)}", write)


class TokenRows(Dataset[Batch]):
    """Sequences in a store, indexed by a whole batch of row numbers; see `TextData` for the batches."""

    def __init__(self, folder: Path, length: int, special: Tensor) -> None:
        lengths, tokens = folder / "lengths.bin", folder / "tokens.bin"
        self.lengths = np.memmap(lengths, np.int32, "r") if lengths.stat().st_size else np.zeros(0, np.int32)
        self.tokens = np.memmap(tokens, np.int32, "r", shape=(len(self), length)) if len(self) else None
        self.special = special

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> Batch:
        return batch_of(self.tokens[rows.numpy()], self.lengths[rows.numpy()], self.special)  # type: ignore[index]


def batch_of(tokens: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], special: Tensor) -> Batch:
    """A batch of sequences [N, S], of which the first `lengths` [N] tokens count, without the special ones."""
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    there = torch.arange(input_ids.shape[1]) < torch.from_numpy(lengths.astype(np.int64))[:, None]
    return {
        "input_ids": input_ids,
        "attention_mask": there.long(),
        "sample_mask": there & ~torch.isin(input_ids, special),
    }


class TextData(InMemoryData):
    """Token sequences; batches `{"input_ids": int64, "attention_mask": int64, "sample_mask": bool}`, all [N, S].

    `sample_mask` is False at padding and special tokens.

    Args:
        source: `pydoc`, the standard library's own English.
        tokenizer: `pydoc`, or what AutoTokenizer takes.
        length: tokens per sequence, S.
        mode: `pack` joins texts with the end token between them and cuts; `rows` makes each text a sequence, cut or
            padded.
        batch_size: training sequences per batch and process.
        val_batch_size: the same for validation; None: `batch_size`.
        val_fraction: share of the texts that are for validation, chosen by their checksums.
        max_sequences: use this many training sequences at most.
        n_val: use this many validation (and test) sequences at most; None: all.
        vocabulary: tokens of the `pydoc` tokenizer.
        exclude_special: whether special tokens are no samples.
        seed: of the order; None: that of `seed_everything`, or 0.
        num_workers, prefetch: worker processes, and the batches each of them reads ahead.
        cache_dir: where tokens are kept.

    Raises:
        ValueError: one line, if a value is outside its range.
    """

    def __init__(
        self,
        source: str = "pydoc",
        tokenizer: str = "pydoc",
        length: int = 16,
        mode: Mode = "pack",
        batch_size: int = 16,
        val_batch_size: int | None = None,
        val_fraction: float = 0.1,
        max_sequences: int | None = None,
        n_val: int | None = 256,
        vocabulary: int = 2000,
        exclude_special: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        cache_dir: Path | str | None = None,
    ) -> None:
        super().__init__(batch_size, seed)
        require_choice("mode", mode, get_args(Mode))
        require_at_least(1, length=length, val_batch_size=val_batch_size or 1, prefetch=prefetch)
        require_at_least(0, num_workers=num_workers)
        self.source = source
        self.tokenizer_name = tokenizer
        self.length = length
        self.mode = mode
        self.val_batch_size = val_batch_size or batch_size
        self.val_fraction = val_fraction
        self.max_sequences = max_sequences
        self.n_val = n_val
        self.vocabulary = vocabulary
        self.exclude_special = exclude_special
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.cache_dir = cache_dir
        self.tokenizer: Any = None
        self.bad_records: list[BadRecord] = []

    # -- making the sequences ---------------------------------------------------------------------------------------

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        name: Any = self.tokenizer_name
        if name == "pydoc":
            name = pydoc_tokenizer(self.vocabulary, self.cache_dir)
        return AutoTokenizer.from_pretrained(name)

    def parse(self, record: Record) -> tuple[str, bytes]:
        text = record["text"]
        if not text.strip():
            raise Unfit("the text is empty")
        return text, text.encode()

    def _sequences(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Tokens [n, S] and lengths [n], int32, a thousand texts at a time."""
        left: list[int] = []
        for block in itertools.batched(texts, 1000) if hasattr(itertools, "batched") else _batched(texts, 1000):
            ids = self.tokenizer(list(block), add_special_tokens=False, verbose=False)["input_ids"]
            for text in ids:
                left += [*text, self.tokenizer.eos_token_id]
            n = len(left) // self.length
            tokens = np.array(left[: n * self.length], np.int32).reshape(n, self.length)
            left = left[n * self.length :]
            yield tokens, np.full(n, self.length, np.int32)

    def _store(self, part: str) -> Path:
        share = (0.0, self.val_fraction) if part == "val" else (self.val_fraction, 1.0)
        limit = self.n_val if part == "val" else self.max_sequences
        source = Source("pydoc", ("pydoc_data.topics",), self.parse, share)
        key = fingerprint(
            [piece["text"] for piece in pydoc_pieces()],
            share,
            limit,
            self.length,
            self.mode,
            self.tokenizer.backend_tokenizer.to_str(),
        )

        def write(folder: Path) -> None:
            texts = (text for _, text in source.read() if not isinstance(text, BadRecord))
            left = limit if limit is not None else 2**62
            with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "lengths.bin", "wb") as lengths_file:
                for tokens, lengths in self._sequences(texts):
                    tokens_file.write(tokens[:left].tobytes())
                    lengths_file.write(lengths[:left].tobytes())
                    left -= len(tokens[:left])
                    if left == 0:
                        break

        return stored(cache_folder(self.cache_dir) / f"text-{part}-{key}", write)

    def prepare_data(self) -> None:
        self.tokenizer = self._load_tokenizer()
        for part in ("train", "val"):
            self._store(part)

    def setup(self, stage: str | None = None) -> None:
        if self.num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        self.tokenizer = self.tokenizer or self._load_tokenizer()
        special = torch.tensor(self.tokenizer.all_special_ids if self.exclude_special else [], dtype=torch.int64)
        self.train = TokenRows(self._store("train"), self.length, special)
        self.validation = self.test = TokenRows(self._store("val"), self.length, special)

    # -- reading them -----------------------------------------------------------------------------------------------

    def _loader(self, dataset: Dataset[Batch], batch_size: int | None = None) -> NumberedLoader:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        training = batch_size is not None
        sampler = EpochSampler(
            dataset,
            batch_size or self.val_batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            shuffle=training,
        )
        return NumberedLoader(
            IndexedBatches(dataset, sampler),
            sampler,
            num_workers=self.num_workers if training else 0,
            prefetch=self.prefetch,
            endless=training,
        )


def _batched(items: Iterable[Any], n: int) -> Iterator[tuple[Any, ...]]:
    items = iter(items)
    while block := tuple(itertools.islice(items, n)):
        yield block
