"""The data: every row once, the same order again, and toy inputs distributed as the paper says."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from datamodules.digits import DigitsData
from datamodules.loading import Batch, EpochSampler, Rows, exact_loader
from datamodules.toy import EndlessRows, ToyData, draw_inputs, task_matrix

# ---------------------------------------------------------------- order


def numbered(n: int) -> Rows:
    return Rows(inputs=torch.arange(n))


@given(n=st.integers(1, 200), batch_size=st.integers(1, 40), world_size=st.integers(1, 5), seed=st.integers(0, 9))
@settings(deadline=None)
def test_ranks_together_see_every_row_once_in_the_batches_of_one_process(
    n: int, batch_size: int, world_size: int, seed: int
) -> None:
    if n < world_size:
        with pytest.raises(ValueError, match=f"the dataset has {n} rows"):
            EpochSampler(numbered(n), batch_size, world_size=world_size)
        return
    samplers = [
        EpochSampler(numbered(n), batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for epoch in range(2):
        of_ranks = [list(sampler) for sampler in samplers]
        assert {len(batches) for batches in of_ranks} == {len(samplers[0])}
        together = [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]
        assert torch.equal(torch.cat(together), samplers[0].order(epoch))
        assert sorted(torch.cat(together).tolist()) == list(range(n))
        assert all(len(batch) == batch_size * world_size for batch in together[:-1])
        assert all(len(part) >= min(2, batch_size, n // world_size) for parts in of_ranks for part in parts)


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def sampler(seed: int) -> EpochSampler:
        return EpochSampler(numbered(50), 8, seed=seed)

    torch.manual_seed(1)
    expected = [sampler(3).order(epoch) for epoch in range(3)]
    torch.manual_seed(2)
    reader = sampler(3)
    assert all(torch.equal(torch.cat(list(reader)), order) for order in expected)
    assert not torch.equal(expected[0], expected[1])
    # neighbours do not share their orders, as they would if the two numbers were added
    assert not torch.equal(sampler(4).order(0), expected[1])


def test_endless_rows_never_come_twice_and_shards_are_consecutive() -> None:
    samplers = [EpochSampler(numbered(24), 4, rank=rank, world_size=2, endless=True) for rank in range(2)]
    rows = [torch.cat([torch.cat(list(sampler)) for _ in range(3)]) for sampler in samplers]
    assert sorted(torch.cat(rows).tolist()) == list(range(72))
    assert torch.equal(next(iter(samplers[0])), torch.arange(72, 76))


def test_validation_starts_at_the_first_row_every_time() -> None:
    loader = exact_loader(numbered(10), 4, shuffle=False)
    next(iter(loader))  # as a sanity check does
    for _ in range(2):
        assert torch.equal(torch.cat([batch["inputs"] for batch in loader]), torch.arange(10))


def test_loader_goes_on_after_every_batch() -> None:
    def read(loader: Any, batches: int) -> list[list[int]]:
        seen: list[list[int]] = []
        while len(seen) < batches:
            for batch in loader:
                seen.append(batch["inputs"].tolist())
                if len(seen) == batches:
                    break
        return seen

    expected = read(exact_loader(numbered(37), 8, seed=5), 15)
    for stop in range(15):
        first, second = exact_loader(numbered(37), 8, seed=5), exact_loader(numbered(37), 8, seed=5)
        seen = read(first, stop)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert seen + read(second, 15 - stop) == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: EpochSampler(numbered(38), 8), "written with rows = 37, this run has rows = 38"),
        (lambda: EpochSampler(numbered(37), 4), "written with batch_size = 8, this run has batch_size = 4"),
        (lambda: EpochSampler(numbered(37), 8, seed=1), "written with seed = 0, this run has seed = 1"),
        (lambda: EpochSampler(numbered(37), 8, endless=True), "endless = False, this run has endless = True"),
    ],
)
def test_state_of_other_data_is_refused(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        other().load_state_dict(EpochSampler(numbered(37), 8).state_dict())


def test_state_fits_any_number_of_processes_with_the_same_global_batch() -> None:
    one = EpochSampler(numbered(40), 8)
    batches = list(one)
    one.batches_given = 3
    halves = [EpochSampler(numbered(40), 4, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(one.state_dict())
    assert torch.equal(torch.cat([next(iter(half)) for half in halves]), batches[3])


def test_loader_asks_the_dataset_once_per_batch_and_leaves_the_global_random_state_alone() -> None:
    class Counting(Dataset[Batch]):
        asked = 0

        def __len__(self) -> int:
            return 20

        def __getitem__(self, rows: Tensor) -> Batch:
            self.asked += 1
            return {"inputs": rows}

    dataset = Counting()
    before = torch.get_rng_state()
    loader = exact_loader(dataset, 8)
    loader.state_dict()
    assert len(list(loader)) == len(loader) == dataset.asked == 3
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(loader.sampler, DistributedSampler)  # or Lightning would shard it again


# ---------------------------------------------------------------- resume under Lightning


class Recorder(LightningModule):
    """Keeps the inputs it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(5, 5)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch["inputs"].clone())
        return self.layer(batch["inputs"]).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert len(batch["inputs"]) == 10

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAt(Callback):
    """Saves a checkpoint, named by the number of batches seen, whenever one of Lightning's hooks comes by."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, module: Recorder, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(module.seen)}.ckpt")


def run(data: LightningDataModule, checkpoint: Path | None = None, callbacks: Any = (), **limits: Any) -> list[Tensor]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": -1, "num_sanity_val_steps": 0, **limits},
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.seen


@pytest.mark.parametrize("points", [36, None], ids=["fixed", "fresh"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": 12},
        {"max_epochs": 3},
        {"max_steps": 12, "val_check_interval": 2, "num_sanity_val_steps": 1},
        {"max_steps": 12, "limit_train_batches": 3},
        {"max_epochs": 3, "limit_train_batches": 3},
        {"max_epochs": 3, "limit_val_batches": 0, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_resumed_run_sees_the_batches_of_the_uninterrupted_one(
    tmp_path: Path, points: int | None, hook: str, limits: dict[str, Any]
) -> None:
    def data() -> ToyData:
        return ToyData(points=points, steps_per_epoch=5, batch_size=8, n_val=10)

    expected = run(data(), callbacks=[SaveAt(tmp_path, hook)], **limits)
    checkpoints = [file for file in tmp_path.glob("*.ckpt") if 0 < int(file.stem) < len(expected)]
    assert checkpoints or (hook == "on_validation_end" and limits.get("limit_val_batches") == 0)
    if hook == "on_train_batch_end":
        assert len(checkpoints) == len(expected) - 1
    for checkpoint in checkpoints:
        rest = expected[int(checkpoint.stem) :]
        seen = run(data(), checkpoint, **limits)
        assert len(seen) == len(rest)
        assert all(torch.equal(a, b) for a, b in zip(seen, rest, strict=True)), checkpoint.stem


def test_resume_on_another_batch_size_is_refused(tmp_path: Path) -> None:
    run(ToyData(points=36, batch_size=8), callbacks=[SaveAt(tmp_path, "on_train_batch_end")], max_steps=2)
    with pytest.raises(ValueError, match="written with batch_size = 8, this run has batch_size = 9"):
        run(ToyData(points=36, batch_size=9), tmp_path / "2.ckpt", max_steps=4)


# ---------------------------------------------------------------- toy data


def test_inputs_have_the_distribution_that_is_left_when_zero_rows_are_dropped() -> None:
    inputs = draw_inputs(40_000, 5, 0.05, 1, torch.Generator().manual_seed(0))
    active = inputs != 0
    assert active.any(1).all()
    brute = torch.rand(400_000, 5, generator=torch.Generator().manual_seed(1)) < 0.05
    brute = brute[brute.any(1)]
    # The standard errors are about 0.002 for the rates and 0.004 for the number of active features.
    assert torch.allclose(active.float().mean(0), brute.float().mean(0), atol=0.01)
    assert active.sum(1).float().mean().item() == pytest.approx(brute.sum(1).float().mean().item(), abs=0.01)
    both = (active[:, 0] & active[:, 4]).float().mean().item()
    assert both == pytest.approx((brute[:, 0] & brute[:, 4]).float().mean().item(), abs=0.004)
    values = inputs[active]
    assert values.min() > 0
    assert values.max() <= 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("probability", [1e-9, 1.0])
def test_extreme_probabilities(probability: float) -> None:
    active = draw_inputs(100, 4, probability, 2, torch.Generator().manual_seed(0)) != 0
    assert (active.sum(1) == (2 if probability < 1 else 4)).all()


def test_groups_are_active_together_and_squared_inputs_have_signs() -> None:
    data = ToyData("high_rank", 30, group_size=5)
    data.setup()
    active = next(iter(data.val_dataloader()))["inputs"].unflatten(1, (6, 5)) != 0
    assert torch.equal(active.all(2), active.any(2))
    signed = draw_inputs(1000, 5, 0.05, 1, torch.Generator().manual_seed(0), signed=True)
    assert signed.min() < -0.9
    assert signed.max() > 0.9


def test_labels() -> None:
    for task in ("tms", "tmcs", "high_rank", "squared"):
        data = ToyData(task, 10, task_seed=3)  # type: ignore[arg-type]
        data.setup()
        batch = next(iter(data.train_dataloader()))
        x, y = batch["inputs"], batch["labels"]
        assert x.dtype == y.dtype == torch.float32
        expected = {"tms": x, "squared": x * x}.get(task, x @ task_matrix(10, 3))
        assert torch.allclose(y, expected)
    A = task_matrix(40, 0)
    assert A.min() > 0
    assert A.max() < 3
    assert A.mean().item() == pytest.approx(1.5, abs=0.1)
    assert not torch.equal(task_matrix(10, 0), task_matrix(10, 1))


def test_matrix_is_read_from_a_target(tmp_path: Path) -> None:
    A = torch.rand(10, 10)
    A[0, 0] = torch.nan
    file = tmp_path / "target.safetensors"
    save_file({"W_in": torch.zeros(10, 5), "truth.A": A}, file)
    data = ToyData("tmcs", 10, truth=file)
    data.setup()
    assert torch.equal(data.ground_truth()["A"].nan_to_num(), A.nan_to_num())
    # what is not finite stays so, for whoever trains on it to report
    assert not next(iter(data.val_dataloader()))["labels"].isfinite().all()


def test_sets_differ_and_only_training_depends_on_the_seed() -> None:
    def sets(seed: int) -> list[Tensor]:
        data = ToyData(points=1000, seed=seed)
        data.setup()
        return [dataset[torch.arange(1000)]["inputs"] for dataset in (data.train, data.validation, data.test)]

    first, second = sets(0), sets(1)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    everything = torch.cat([*first, second[0]])
    assert len(everything.unique(dim=0)) == 4000
    assert all(torch.equal(a, b) for a, b in zip(first, sets(0), strict=True))


def test_fixed_points_are_shuffled_and_kept() -> None:
    data = ToyData(points=100)
    data.setup()
    loader = data.train_dataloader()
    epochs = [torch.cat([batch["inputs"] for batch in loader]) for _ in range(2)]
    assert len(loader) == 4
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].unique(dim=0), epochs[1].unique(dim=0))


def test_fresh_rows_are_a_function_of_seed_and_number() -> None:
    def rows(batch_size: int, seed: int = 0) -> Batch:
        data = ToyData("tmcs", 10, points=None, batch_size=batch_size, steps_per_epoch=16_000 // batch_size, seed=seed)
        data.setup()
        batches = list(data.train_dataloader())
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    small, large = rows(100), rows(16_000)  # batches that fit into a block, and one that reaches over two borders
    assert EndlessRows.BLOCK < 16_000
    for name in small:
        assert torch.equal(small[name], large[name])
    assert torch.allclose(small["labels"], small["inputs"] @ task_matrix(10, 0))
    assert len(small["inputs"].unique(dim=0)) > 15_990  # one feature alone is one of 2^24 numbers
    assert not torch.equal(small["inputs"], rows(100, seed=1)["inputs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "tmsc"}, "task: found 'tmsc', allowed are tms, tmcs, high_rank, squared; did you mean 'tms'"),
        ({"points": 0}, "points: found 0, allowed are whole numbers >= 1"),
        ({"n_val": 0}, "n_val: found 0"),
        ({"n_features": 0}, "n_features: found 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch: found 0"),
        ({"seed": -1}, "seed: found -1, allowed are whole numbers >= 0"),
        ({"probability": 0.0}, r"probability: found 0.0, allowed are numbers in \(0, 1\]"),
        ({"probability": 1.5}, "probability: found 1.5"),
        ({"probability": float("nan")}, "probability: found nan"),
        ({"n_features": 7, "group_size": 5}, "group_size: found 5, allowed are divisors of n_features = 7"),
    ],
)
def test_bad_toy_arguments_give_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ToyData(**arguments)
    assert "\n" not in str(error.value)


def test_bad_truth_files_give_one_line(tmp_path: Path) -> None:
    def refused(file: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            ToyData("tmcs", 10, truth=file).setup()
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)

    file = tmp_path / "target.safetensors"
    refused(file, "there is no file")
    save_file({"W_in": torch.zeros(10, 5)}, file)
    refused(file, "holds no tensor truth.A, only W_in")
    save_file({"truth.A": torch.zeros(5, 5)}, file)
    refused(file, r"is \[5, 5\], n_features asks for \[10, 10\]")
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, "no readable safetensors file")


def test_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="the dataset is empty"):
        Rows(inputs=torch.zeros(0, 5))
    with pytest.raises(ValueError, match="same number of rows"):
        Rows(inputs=torch.zeros(3, 5), labels=torch.zeros(2))


# ---------------------------------------------------------------- digits


def test_digits() -> None:
    data = DigitsData()
    data.setup()
    train, test = (dataset[torch.arange(len(dataset))] for dataset in (data.train, data.test))  # type: ignore[arg-type]
    assert train["inputs"].shape == (1437, 1, 8, 8)
    assert test["inputs"].shape == (360, 1, 8, 8)
    assert train["labels"].dtype == torch.int64
    assert train["inputs"].mean().item() == pytest.approx(0, abs=1e-5)
    assert train["inputs"].std().item() == pytest.approx(1, abs=1e-5)
    shares = [torch.bincount(part["labels"], minlength=10) / len(part["labels"]) for part in (train, test)]
    assert torch.allclose(*shares, atol=0.003)
    assert len(torch.cat([train["inputs"], test["inputs"]]).flatten(1).unique(dim=0)) == 1797
    again = DigitsData(seed=7)
    again.setup()
    assert torch.equal(again.test[torch.arange(360)]["inputs"], test["inputs"])
    first = [next(iter(module.train_dataloader()))["labels"] for module in (data, again)]
    assert not torch.equal(*first)


def test_bad_digits_arguments_give_one_line() -> None:
    with pytest.raises(ValueError, match=r"test_fraction: found 1.0, allowed are numbers in \(0, 1\)"):
        DigitsData(test_fraction=1.0)
    with pytest.raises(ValueError, match="batch_size: found 0"):
        DigitsData(batch_size=0)
