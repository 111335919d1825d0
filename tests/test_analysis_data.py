"""An analysis of data that are not ours: plain loaders, shuffled, padded, uneven; long sequences; names of outputs."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from oracles import assert_same
from test_analysis import SETTINGS, decompose, texts, vectors
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from l3d_pl import Decomposition, L3DError
from l3d_pl.analysis import items as items_module
from l3d_pl.analysis.analyse import analyse
from l3d_pl.analysis.items import item_rows, output_names, window
from l3d_pl.analysis.runs import Entries, Run, checksums, join
from l3d_pl.analysis.tables import read_manifest, read_table
from l3d_pl.targets.toy import MLP


class Plain(LightningDataModule):
    """A data module of a user's own: any loader."""

    def __init__(self, loader: Any):
        super().__init__()
        self.loader = loader

    def val_dataloader(self) -> Any:
        return self.loader


def run_of(folder: Path, decomposition: Decomposition, loader: Any) -> Run:
    folder.mkdir()
    return Run(folder, decomposition, Plain(loader))


class Stories(torch.utils.data.Dataset[Tensor]):
    """Sequences of 2 to 6 tokens, never 0."""

    def __init__(self, n: int):
        random = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(1, 30, (2 + i % 5,), generator=random) for i in range(n)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return self.rows[i]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """A batch as long as its longest sequence."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_uneven_batches_of_texts(tmp_path: Path) -> None:
    """21 sequences, four at a time, each batch as long as its longest, the last one alone."""
    data, (decomposition, _) = Stories(21), texts()
    folder = analyse(run_of(tmp_path / "run", decomposition, DataLoader(data, 4, collate_fn=padded)), SETTINGS)
    assert read_manifest(folder)["n_entries"] == 21
    assert read_manifest(folder)["n_samples"] == sum(len(row) for row in data.rows)
    for item in read_table(folder, "items").itertuples():
        assert list(item.tokens) == [str(i) for i in data.rows[item.sample].tolist()]
    tokens = read_table(folder, "token_coefficients")
    assert all(len(row.positions) == len(data.rows[row.sample]) for row in tokens.itertuples())
    # The same sequences in one batch have the same coefficients: padding is no sample, and changes none.
    whole = run_of(tmp_path / "whole", decomposition, DataLoader(data, 21, collate_fn=padded))
    found, expected = (
        {row.sample: row.checksum for row in read_table(where, "items").itertuples()}
        for where in (folder, analyse(whole, SETTINGS))
    )
    shared = found.keys() & expected.keys()
    assert len(shared) > 5
    assert all(found[i] == expected[i] for i in shared)


def test_batches_of_a_loader_are_joined_not_left_alone() -> None:
    x = torch.arange(41.0).unsqueeze(1)
    for size, cut in ((20, [10, 10, 10, 11]), (1, [10, 10, 10, 11]), (13, [10, 3, 10, 3, 10, 5])):
        batches = [batch[0] for _, _, batch in Entries(DataLoader(TensorDataset(x), size)).batches(10)]
        assert [len(batch) for batch in batches] == cut
        assert torch.equal(torch.cat(batches), x)
    entries = Entries(DataLoader(TensorDataset(x), 10), 21)
    assert [len(batch[0]) for _, _, batch in entries.batches(10)] == [10, 11]
    entries.keep([3, 20])
    assert entries.pick([20, 3])[0].tolist() == [[20.0], [3.0]]
    assert entries._kept[3][0].untyped_storage().nbytes() == 4  # not the batch that it came in
    with pytest.raises(L3DError, match=r"entries of shapes \[3, 4, 4\], \[3, 5, 5\], allowed is one"):
        join([torch.rand(2, 3, 4, 4), torch.rand(1, 3, 5, 5)])
    ids = [{"input_ids": torch.ones(1, n, dtype=torch.int64)} for n in (2, 4)]  # without masks
    assert join(ids)["sample_mask"].tolist() == [[True, True, False, False], [True] * 4]


def test_a_shuffled_loader_is_read_in_order(tmp_path: Path) -> None:
    decomposition, data = vectors()
    x = data.tensors["inputs"]
    loader = DataLoader(TensorDataset(x), 8, shuffle=True, drop_last=True)
    entries = Entries(loader)
    assert torch.equal(torch.cat([batch[0] for _, _, batch in entries.batches(8)]), x)
    folder = analyse(run_of(tmp_path / "run", decomposition, loader), SETTINGS)
    for item in read_table(folder, "items").itertuples():
        assert_same(torch.tensor(item.values), x[item.sample].float())


class Noisy(torch.utils.data.Dataset[tuple[Tensor]]):
    """Rows that are augmented at random."""

    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor]:
        return (self.x[i] + 0.1 * torch.randn_like(self.x[i]),)


class Shuffled(IterableDataset[tuple[Tensor]]):
    """A stream in an order of its own."""

    def __init__(self, x: Tensor):
        self.x = x

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        for i in torch.randperm(len(self.x)).tolist():
            yield (self.x[i],)


@pytest.mark.parametrize("dataset", [Noisy, Shuffled])
def test_samples_that_are_others_when_read_again_are_refused(dataset: Any, tmp_path: Path) -> None:
    decomposition, data = vectors()
    run = run_of(tmp_path / "run", decomposition, DataLoader(dataset(data.tensors["inputs"]), 8))
    with pytest.raises(L3DError, match=r"sample \d+ of split 'val' is another one when it is read again"):
        analyse(run, SETTINGS)


def test_checksums_are_of_the_input_without_padding() -> None:
    ids = torch.tensor([[5, 7, 0, 0], [5, 7, 9, 1]])
    assert checksums(ids).tolist()[0] == checksums(ids[:1, :2]).tolist()[0] == checksums(ids[:1, :3]).tolist()[0]
    assert checksums(ids).unique().numel() == 2
    assert checksums({"inputs": torch.rand(3, 2, 2).bfloat16()}).unique().numel() == 3


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_a_window_holds_every_marked_position() -> None:
    assert window(100, [90]) == (0, 100)
    assert window(1000, []) == window(1000, [-1]) == (0, 256)
    assert window(1000, [500]) == (308, 564)
    assert window(1000, [999]) == (744, 1000)
    assert window(1000, [10, 900]) == (0, 964)  # too far apart for one window
    ids = torch.arange(600).unsqueeze(0)
    (row,) = item_rows(ids, [7], marked={7: {400}})
    assert row["first"] == 208
    assert row["tokens"][400 - row["first"]] == "400"


def test_items_of_long_sequences_show_what_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_module, "SHOWN_TOKENS", 2)
    monkeypatch.setattr(items_module, "AFTER", 1)
    decomposition, data = texts()
    loader = DataLoader(list(range(12)), 4, collate_fn=lambda rows: data[torch.tensor(rows)])
    folder = analyse(run_of(tmp_path / "run", decomposition, loader), SETTINGS)
    items = {item.sample: item for item in read_table(folder, "items").itertuples()}
    assert any(item.first > 0 for item in items.values())
    for row in read_table(folder, "samples").itertuples():
        item = items[row.sample]
        shown = str(int(data.tensors["input_ids"][row.sample, row.position]))
        assert item.tokens[row.position - item.first] == shown
    for row in read_table(folder, "attribution").itertuples():  # it begins where the item does
        assert row.width == len(row.values) == 6 - items[row.sample].first
        assert row.values[row.position - items[row.sample].first] != 0


class Tokenizer:
    vocab_size = 20

    def __len__(self) -> int:
        return 22

    def decode(self, ids: list[int]) -> str:
        return f"token{ids[0]}"


def test_outputs_are_classes_before_they_are_tokens() -> None:
    target = SimpleNamespace(config=SimpleNamespace(id2label={0: "bad", 1: "good"}))
    data = SimpleNamespace(tokenizer=Tokenizer(), classes=["no", "maybe", "yes"])
    assert output_names(target, data, 3, "text") == ["no", "maybe", "yes"]
    assert output_names(target, data, 2, "text") == ["bad", "good"]
    assert output_names(target, data, 5, "text") == ["0", "1", "2", "3", "4"]
    assert output_names(target, data, 24, "text")[19:] == ["token19", "token20", "token21", "22", "23"]
    assert output_names(target, data, 20, "text")[0] == "token0"
    assert output_names(decompose(MLP((5, 4, 3))).target, None, 3, "vector") == ["0", "1", "2"]
