"""`l3d params`: sizes, ranks, memory and paths, before a target is trained or data are fetched."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from stand_ins import language_model_in, photographs, stories
from torch import Tensor, nn

from l3d_pl import L3D
from l3d_pl.cli import main
from l3d_pl.params import first_batch, made_up_batch, rows_of, size, totals


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: `seed_everything` leaves it behind


class Mixed(nn.Module):
    """A large linear layer, a small one, and a layer that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.scale = nn.Linear(128, 128), nn.Linear(128, 3), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.scale(self.large(x)))


def test_rows_count_values_and_tell_the_path() -> None:
    model = L3D(Mixed(), n_subnetworks=7, ranks=2, restarts=3)
    rows = {row.name: row for row in rows_of(model, torch.randn(4, 128))}
    assert list(rows) == ["large.weight", "large.bias", "small.weight", "small.bias", "scale.weight"]
    large = rows["large.weight"]
    assert (large.shape, large.ranks, large.values) == ((128, 128), (2, 2), 128 * 128)
    assert large.subnetwork_values == 2 * 2 + 2 * 128 * 2  # core and two factors
    assert {name: row.path for name, row in rows.items()} == {
        "large.weight": "factored",
        "large.bias": "dense",
        "small.weight": "dense",
        "small.bias": "dense",
        "scale.weight": "oracle",
    }
    assert all(row.reason for row in rows.values())
    assert "prelu" in rows["scale.weight"].reason
    assert {row.path for row in rows_of(model, None)} == {"?"}

    target, tensors, sides = totals(model, list(rows.values()))
    everything = sum(parameter.numel() for parameter in model.subnetworks.parameters())
    assert target == f"target: Mixed, {sum(p.numel() for p in Mixed().parameters()):,} values, float32"
    assert f"{everything:,} values, {size(everything * 16)} with gradients and Adam" in sides
    assert "2 x 7 subnetworks x 3 restarts" in sides
    assert f"{sum(row.values for row in rows.values()):,} values" in tensors


def test_nothing_warns_of_the_oracle_twice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of(L3D(Mixed(), n_subnetworks=7), torch.randn(4, 128))


def test_sizes_for_a_person() -> None:
    assert [size(n) for n in (12, 3 * 2**10, 5 * 2**20, int(2.5 * 2**30))] == ["12 B", "3.0 KiB", "5.0 MiB", "2.5 GiB"]


def table_of(text: str) -> dict[str, list[str]]:
    """{tensor: cells} of a printed table."""
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")
    ]
    return {cells[0]: cells[1:] for cells in lines}


def test_toy_whose_target_is_not_trained_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--config", "tms", "--model.ranks", "2", "--model.n_subnetworks", "6"]) == 0
    out = capsys.readouterr().out
    assert table_of(out)["W_in"][:4] == ["5x2", "2, 2", "10", "18"]
    assert "2 x 6 subnetworks" in out
    assert "target runs/targets/tms_seed42.safetensors is not there yet: this is an untrained one" in out
    assert list(Path().iterdir()) == []  # neither a target nor a run


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args, part in (
        (["--model.parameters", "W_inn"], "did you mean 'W_in'?"),
        (["--model.ranks", "0"], "ranks of 'W_in': found 0"),
        (["--model.n_subnetwork", "3"], "did you mean 'model.n_subnetworks'"),
    ):
        capsys.readouterr()
        assert main(["params", "--config", "tms", *args]) == 2
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1


def test_language_model_whose_target_is_not_trained_yet(capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer is not there either: a batch of the size that the config says is made up."""
    assert main(["params", "--config", "pydoc_lm"]) == 0
    out = capsys.readouterr().out
    rows = table_of(out)
    attention = "transformer.h.2.attn.attention"
    assert rows[f"{attention}.q_proj.weight"][:5] == ["128x128", "13, 13", "16,384", "3,497", "factored"]
    assert rows[f"{attention}.out_proj.bias"][4] == "dense"
    assert "untrained one of targets/pydoc_lm.yaml" in out
    assert "no data (tokenizer: found 'runs/targets/pydoc_lm_seed42'" in out
    assert list(Path().iterdir()) == []


def test_published_configs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["params", "--config", "tinystories_8m", *stories()]) == 0
    rows = table_of(out := capsys.readouterr().out)
    assert len([name for name in rows if name.startswith("transformer.h.4.attn.attention")]) == 5
    assert rows["transformer.h.4.attn.attention.q_proj.weight"][:2] == ["256x256", "25, 25"]
    assert "no data" not in out

    assert main(["params", "--config", "mobilenet_v3_small", *photographs(monkeypatch)]) == 0
    rows = table_of(out := capsys.readouterr().out)
    assert len([name for name in rows if name.startswith("features.7.block")]) == 13
    assert rows["features.7.block.1.0.weight"][:2] == ["120x1x5x5", "12, 1, 1, 1"]
    assert {cells[4] for name, cells in rows.items() if name.startswith("features")} <= {"factored", "dense"}
    assert "no data" not in out


def test_only_a_little_of_the_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fit would store is stored in small: enough for one batch."""
    from datamodules.text import TextData

    stored = set()
    original = TextData.setup

    def setup(self: TextData, stage: str | None = None) -> None:
        original(self, stage)
        stored.add(len(self.train))

    monkeypatch.setattr(TextData, "setup", setup)
    assert main(["params", "--config", "tinystories_8m", *stories(), "--data.init_args.batch_size", "4"]) == 0
    assert stored == {8 * 4}


def test_batch_that_is_made_up_fits_the_target() -> None:
    batch = made_up_batch({"length": 8, "batch_size": 3}, vocabulary=20)
    assert batch["input_ids"].shape == batch["sample_mask"].shape == (3, 8)
    assert batch["input_ids"].max() < 20
    assert made_up_batch({"size": 32, "batch_size": 3}, None)["inputs"].shape == (3, 3, 32, 32)
    assert made_up_batch({"batch_size": 3}, None) is None

    class Broken:
        def prepare_data(self) -> None:
            raise FileNotFoundError("nothing\nhere")

    model = L3D(language_model_in("lm", width=16, layers=2, heads=2, context=16), "*.q_proj.weight", sample="token")
    batch, notes = first_batch(model, Broken(), {"length": 8, "batch_size": 3})
    assert notes == ["no data (nothing here): paths are those of a made-up batch of its size"]
    assert re.fullmatch("factored|dense", rows_of(model, batch)[0].path)
    assert first_batch(model, Broken(), {}) == (None, ["no data (nothing here): paths are left open"])
