"""Text: tokens, masks, the built-in source, and what comes of local files."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datamodules.loading import Batch
from datamodules.records import pydoc_pieces
from datamodules.text import TextData, pydoc_tokenizer

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of whole words that begins a text with <s> where special tokens are wanted: Llama's manner."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def everything(loader: Any) -> Batch:
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def write(path: Path, texts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"story": text}) + "\n" for text in texts))
    return str(path)


def text_data(*arguments: Any, **options: Any) -> TextData:
    data = TextData(*arguments, **{"val_fraction": 0.0, "seed": 0, **options})
    data.setup()
    return data


# ---------------------------------------------------------------- the built-in text


def test_pydoc_needs_nothing_but_python(cache: Path) -> None:
    pieces = [piece["text"] for piece in pydoc_pieces()]
    assert 300_000 < sum(map(len, pieces)) < 500_000
    data = TextData(cache_dir=cache, length=32, n_val=None)
    data.setup()
    train, val = everything(data.train_dataloader()), everything(data.val_dataloader())
    for batch in (train, val):
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert batch["sample_mask"].dtype == torch.bool
        assert batch["input_ids"].shape[1:] == (32,)
        assert batch["attention_mask"].all()
        assert torch.equal(batch["sample_mask"], batch["input_ids"] != data.tokenizer.eos_token_id)
    assert 0.05 < len(val["input_ids"]) / len(train["input_ids"]) < 0.2
    # in their order, the sequences are the text
    joined = data.tokenizer.decode(data.validation[torch.arange(len(data.validation))]["input_ids"].flatten())  # type: ignore
    first = joined.split("<|endoftext|>")[0]
    assert len(first) > 500
    assert first in pieces
    in_val = set(joined.split("<|endoftext|>")[:-1])
    in_train = data.tokenizer.decode(data.train[torch.arange(len(data.train))]["input_ids"].flatten())  # type: ignore
    assert in_val <= set(pieces)
    assert not in_val & set(in_train.split("<|endoftext|>"))


def test_pydoc_tokenizer_is_the_same_everywhere_and_says_what_it_was_given(cache: Path, tmp_path: Path) -> None:
    folder = pydoc_tokenizer(600, cache)
    code = f"from datamodules.text import pydoc_tokenizer; print(pydoc_tokenizer(600, {str(tmp_path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (Path(other) / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 600
    text = "def f(x):\n    return x  # größer → 漢字"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="vocabulary: found 256, allowed are whole numbers >= 257"):
        pydoc_tokenizer(256)


# ---------------------------------------------------------------- tokens and masks


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30), min_size=1, max_size=12),
    length=st.integers(1, 20),
)
@settings(max_examples=20)
def test_packing_and_rows(tmp_path_factory: Any, words: str, texts: list[list[str]], length: int) -> None:
    folder = tmp_path_factory.mktemp("text")
    source = write(folder / "a.jsonl", [" ".join(text) for text in texts])
    ids = [[4 + WORDS.index(word) for word in text] for text in texts]
    options = {"column": "story", "tokenizer": words, "length": length, "shuffle": False, "cache_dir": folder}
    options |= {"max_bad_fraction": 0.9, "batch_size": 3}

    rows = everything(text_data(source, mode="rows", **options).train_dataloader())
    expected = [[0, *text][:length] for text in ids]
    assert rows["input_ids"].tolist() == [text + [2] * (length - len(text)) for text in expected]
    assert rows["attention_mask"].sum(1).tolist() == [len(text) for text in expected]
    assert torch.equal(rows["sample_mask"], rows["input_ids"] > 3)

    flat = [token for text in ids for token in (*text, 1)]
    n = len(flat) // length
    if n == 0:
        with pytest.raises(ValueError, match=r"source: no row for train came of the \d+ record"):
            text_data(source, **options)
        return
    packed = everything(text_data(source, **options).train_dataloader())
    assert packed["input_ids"].flatten().tolist() == flat[: n * length]
    assert packed["attention_mask"].all()
    with_ends = everything(text_data(source, exclude_special=False, **options).train_dataloader())
    assert with_ends["sample_mask"].all()
    # a stream packs the same, in whatever blocks, and goes on into the next pass
    loader = text_data(source, streaming=True, steps_per_epoch=n, shuffle_buffer=2, **options).train_dataloader()
    stream = everything(loader)["input_ids"].flatten().tolist()
    assert stream == (flat * -(-len(stream) // len(flat)))[: len(stream)]


def test_a_stream_of_rows_holds_every_text_once(tmp_path: Path, words: str) -> None:
    source = write(tmp_path / "a.jsonl", WORDS)
    options = {"column": "story", "tokenizer": words, "length": 4, "mode": "rows", "cache_dir": tmp_path}
    data = text_data(
        source, streaming=True, steps_per_epoch=5, batch_size=10, shuffle_buffer=7, num_workers=2, **options
    )
    batch = everything(data.train_dataloader())
    data.teardown("fit")
    assert sorted(batch["input_ids"][:, 1].tolist()) == list(range(4, 54))
    assert batch["sample_mask"].sum() == 50


def test_limits(tmp_path: Path, words: str) -> None:
    source = write(tmp_path / "a.jsonl", [f"{word} w0 w1" for word in WORDS])
    options = {"column": "story", "tokenizer": words, "length": 4, "cache_dir": tmp_path}
    assert len(text_data(source, **options).train) == 50
    assert len(text_data(source, max_sequences=7, **options).train) == 7
    assert len(text_data(source, max_rows=7, **options).train) == 7
    data = text_data(source, val_fraction=0.5, n_val=3, **options)
    assert len(data.validation) == 3  # type: ignore[arg-type]
    assert 10 < len(data.train) < 40


def test_bad_texts_are_named(tmp_path: Path, words: str) -> None:
    texts: list[Any] = ["w1 w2 w3"] * 20
    texts[3], texts[5], texts[9] = "  \n", 17, None
    write(tmp_path / "a.jsonl", texts)
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"story": "caf\xe9"}\n{"story": "\\ud800"}\n')
    options = {"column": "story", "tokenizer": words, "length": 4, "max_bad_fraction": 0.3, "cache_dir": tmp_path}
    with pytest.warns(UserWarning, match="data: found 5 bad"):
        data = text_data(str(tmp_path / "a.jsonl"), **options)
    assert [(bad.row, bad.reason) for bad in data.bad_records] == [
        (3, "the text is empty"),
        (5, "story is no text but a int"),
        (9, "story is empty"),
        (20, "not UTF-8"),
        (21, "the text is not UTF-8"),
    ]
    assert len(data.train) == 17
    with pytest.raises(ValueError, match="no column 'stroy', only story; did you mean 'story'"):
        text_data(str(tmp_path / "a.jsonl"), **{**options, "column": "stroy"})


@pytest.mark.parametrize("suffix", ["parquet", "csv", "txt"])
def test_text_that_is_not_utf8_costs_nobody_else(tmp_path: Path, words: str, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    lines = [word.encode() for word in WORDS]
    lines[20] = b"caf\xe9"
    if suffix == "parquet":
        ends = [0, *itertools.accumulate(map(len, lines))]
        offsets = pa.py_buffer(np.array(ends, np.int32).tobytes())
        column = pa.StringArray.from_buffers(len(lines), offsets, pa.py_buffer(b"".join(lines)))
        pq.write_table(pa.table({"text": column}), file)
    else:
        file.write_bytes(b"\n".join([b"text", *lines] if suffix == "csv" else lines))
    with pytest.warns(UserWarning, match="row 20: the text is not UTF-8"):
        data = text_data(str(file), tokenizer=words, mode="rows", max_bad_fraction=0.02, length=4, cache_dir=tmp_path)
    assert len(data.train) == 49


def test_hub_tokenizers_padding_with_their_end_token(tmp_path: Path, cache: Path) -> None:
    """GPT-2's: padding and end are one token, so the mask cannot be told from the tokens."""
    source = write(tmp_path / "a.jsonl", ["import", "for x in y: pass"])
    data = text_data(source, column="story", mode="rows", length=12, shuffle=False, cache_dir=cache)
    batch = everything(data.train_dataloader())
    lengths = [len(data.tokenizer(text)["input_ids"]) for text in ("import", "for x in y: pass")]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["sample_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][0, lengths[0] :] == data.tokenizer.eos_token_id).all()


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            text_data(**{"cache_dir": tmp_path, **options})
        assert "\n" not in str(error.value)

    refused("mode: found 'packed', allowed are pack, rows; did you mean 'pack'", mode="packed")
    refused("length: found 0, allowed are whole numbers >= 1", length=0)
    refused("max_sequences: found 0", max_sequences=0)
    refused("max_sequences: found 5 with streaming", max_sequences=5, streaming=True, steps_per_epoch=1)
    (tmp_path / "none").mkdir()
    refused("tokenizer: found '.*none', the directory holds none", tokenizer=str(tmp_path / "none"))
    config = Path(words) / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    (tmp_path / "endless").mkdir()
    for file in Path(words).iterdir():
        (tmp_path / "endless" / file.name).write_bytes(file.read_bytes())
    del settings["eos_token"]
    (tmp_path / "endless/tokenizer_config.json").write_text(json.dumps(settings))
    refused("mode: 'pack' needs an end token, tokenizer '.*' has none", tokenizer=str(tmp_path / "endless"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(r"tokenizer: 'pydoc' needs the package transformers: pip install 'l3d_pl\[hub\]'")
