"""Text as sequences of tokens of one length."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.files import FileData, cache_folder, fingerprint, stored
from datamodules.loading import Batch, require_at_least, require_choice
from datamodules.records import BadRecord, Files, Record, Unfit, batched, column_of, pydoc_pieces

Mode = Literal["pack", "rows"]
Ints = NDArray[np.integer[Any]]
NEEDS = "pip install 'l3d_pl[hub]'"


def pydoc_tokenizer(vocabulary: int = 2000, cache_dir: Path | str | None = None) -> Path:
    """A folder with a byte-pair tokenizer of the standard library's text, in Hugging Face's format.

    Made the first time, the same on every machine with the same Python and `tokenizers`. Its one special token,
    `<|endoftext|>`, begins, ends and pads, as in GPT-2 and GPT-Neo.

    Args:
        vocabulary: number of tokens, at least 257: all bytes and the special token.
        cache_dir: see `FileData`.
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


def load_tokenizer(name: str, vocabulary: int = 2000, cache_dir: Path | str | None = None) -> Any:
    """A Hugging Face tokenizer: `pydoc`, an id on the hub, or a local directory.

    Raises:
        ValueError: there is none, or the packages are missing.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"tokenizer: {name!r} needs the package transformers: {NEEDS}") from error
    if name == "pydoc":
        return AutoTokenizer.from_pretrained(pydoc_tokenizer(vocabulary, cache_dir))
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds
        where = (
            "the directory holds none" if os.path.isdir(name) else "no directory here, and not to be had from the hub"
        )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tokenizer: found {name!r}, {where} ({reason}); 'pydoc' needs no network") from error


class TokenRows(Dataset[Batch]):
    """Sequences in a store, indexed by a whole batch of row numbers; see `TextData` for the batches.

    Args:
        folder: the store: `tokens.bin` int32 [rows, length], `lengths.bin` int32 [rows].
        length: tokens per sequence.
        special: tokens that are no samples, int64.
    """

    def __init__(self, folder: Path, length: int, special: Tensor) -> None:
        self._arguments = folder, length, special
        self.lengths = np.memmap(folder / "lengths.bin", np.int32, "r")
        self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r", shape=(len(self), length))
        self.special = special

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> Batch:
        return batch_of(self.tokens[rows.numpy()], self.lengths[rows.numpy()], self.special)


def batch_of(tokens: Ints, lengths: Ints, special: Tensor) -> Batch:
    """A batch of sequences [N, S], of which the first `lengths` [N] tokens count, and are samples unless `special`."""
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    there = torch.arange(input_ids.shape[1]) < torch.from_numpy(lengths.astype(np.int64))[:, None]
    return {
        "input_ids": input_ids,
        "attention_mask": there.long(),
        "sample_mask": there & ~torch.isin(input_ids, special),
    }


class TextData(FileData):
    """Token sequences; batches `{"input_ids": int64, "attention_mask": int64, "sample_mask": bool}`, all [N, S].

    `attention_mask` is 0 at padding; `sample_mask` is False there and at special tokens (end, begin, padding).

    Args:
        source: see `FileData`; `pydoc` is the standard library's own English, and needs no network.
        column: which column holds the text (a member's extension in a tar shard; text files have only `text`).
        tokenizer: an id on Hugging Face's hub, a local directory, or `pydoc`: byte pairs trained on that text.
        length: tokens per sequence, S.
        mode: `pack` joins texts with the end token between them and cuts what comes into sequences; `rows` makes each
            text a sequence, cut or padded at its end.
        max_sequences: use only this many training sequences, the first ones. (`max_rows` counts texts.)
        exclude_special: whether special tokens are no samples.
        vocabulary: number of tokens of the `pydoc` tokenizer.
        **options: those of `FileData`.

    Raises:
        ValueError: one line; see `FileData`.
    """

    def __init__(
        self,
        source: Files = "pydoc",
        column: str = "text",
        tokenizer: str = "pydoc",
        length: int = 16,
        mode: Mode = "pack",
        max_sequences: int | None = None,
        exclude_special: bool = True,
        vocabulary: int = 2000,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        require_choice("mode", mode, get_args(Mode))
        require_at_least(1, length=length, max_sequences=1 if max_sequences is None else max_sequences)
        require_at_least(257, vocabulary=vocabulary)
        if self.streaming and max_sequences is not None:
            raise ValueError(
                f"max_sequences: found {max_sequences} with streaming = True; what is this small is stored"
            )
        self.columns = (column,)
        self.tokenizer_name = tokenizer
        self.length = length
        self.mode = mode
        self.limits["train"] = max_sequences
        self.exclude_special = exclude_special
        self.vocabulary = vocabulary
        self.tokenizer: Any = None  # a Hugging Face tokenizer, after `setup`

    def setup(self, stage: str | None = None) -> None:
        if self.tokenizer is None:
            if self.num_workers:
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
            self.tokenizer = load_tokenizer(self.tokenizer_name, self.vocabulary, self.cache_dir)
            if self.mode == "pack" and self.tokenizer.eos_token_id is None:
                raise ValueError(f"mode: 'pack' needs an end token, tokenizer {self.tokenizer_name!r} has none")
            special = self.tokenizer.all_special_ids if self.exclude_special else []
            self._special = torch.tensor(special, dtype=torch.int64)
        super().setup(stage)

    def parse(self, record: Record) -> tuple[str, bytes]:
        text = column_of(record, self.columns[0])
        try:
            text = text.decode() if isinstance(text, bytes) else text
            key = text.encode() if isinstance(text, str) else b""
        except UnicodeError:
            raise Unfit("the text is not UTF-8") from None
        if not isinstance(text, str):
            raise Unfit(f"{self.columns[0]} is no text but a {type(text).__name__}")
        if not text.strip():
            raise Unfit("the text is empty")
        return text, key

    def settings(self) -> list[Any]:
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = fast.to_str() if fast is not None else sorted(self.tokenizer.get_vocab().items())
        return [self.length, self.mode, fingerprint(tokenizer, self.tokenizer.all_special_ids)]

    def _sequences(self, texts: list[str], left: tuple[int, ...]) -> tuple[Ints, Ints, tuple[int, ...]]:
        """Tokens int32 [n, S] and lengths int32 [n] of `texts`, and the tokens that did not fill a sequence."""
        S, rows = self.length, self.mode == "rows"
        ids = self.tokenizer(
            texts, add_special_tokens=rows, truncation=rows, max_length=S if rows else None, verbose=False
        )["input_ids"]
        if not rows:
            flat = np.array(
                [*left, *(token for text in ids for token in (*text, self.tokenizer.eos_token_id))], np.int32
            )
            n = len(flat) // S
            return flat[: n * S].reshape(n, S), np.full(n, S, np.int32), tuple(flat[n * S :].tolist())
        ids = [text for text in ids if text]  # a tokenizer may know nothing of a text's letters
        padding = next((token for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if token), 0)
        tokens = np.full((len(ids), S), padding, np.int32)
        for row, text in zip(tokens, ids, strict=True):
            row[: len(text)] = text
        return tokens, np.array([len(text) for text in ids], np.int32), ()

    def write(self, folder: Path, contents: Iterator[str], limit: int | None) -> int:
        n = 0
        left: tuple[int, ...] = ()
        most = 2**62 if limit is None else limit
        with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "lengths.bin", "wb") as lengths_file:
            for texts in batched(contents, min(1000, most)):
                tokens, lengths, left = self._sequences(texts, left)
                tokens_file.write(tokens[: most - n].tobytes())
                lengths_file.write(lengths[: most - n].tobytes())
                n += len(tokens[: most - n])
                if n == most:
                    break
        return n

    def open(self, folder: Path) -> TokenRows:
        return TokenRows(folder, self.length, self._special)

    def expand(self, contents: list[Any], left: tuple[int, ...]) -> tuple[list[Any], tuple[int, ...]]:
        if not contents:
            return [], left
        tokens, lengths, left = self._sequences([text for text, _, _ in contents], left)
        return list(zip(tokens, lengths, strict=True)), left

    def collate(self, samples: list[Any]) -> tuple[Batch, list[BadRecord]]:
        tokens, lengths = zip(*samples, strict=True)
        return batch_of(np.stack(tokens), np.array(lengths), self._special), []
