"""Synthetic data of the paper's toy models: sparse features, and the task that a target learns on them."""

from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import Batch, InMemoryData, Rows, generator, require_at_least, require_choice

Task = Literal["tms", "tmcs", "high_rank", "squared"]


def task_matrix(n_features: int, task_seed: int) -> Tensor:
    """A of the tasks x -> x A, float32 [features, outputs] with as many outputs as features, entries from U(0, 3)."""
    return 3 * torch.rand(n_features, n_features, generator=generator("task matrix", task_seed))


def draw_inputs(
    rows: int, n_features: int, probability: float, group_size: int, random: torch.Generator, signed: bool = False
) -> Tensor:
    """Sparse inputs, float32 [rows, features].

    Each group of `group_size` neighbouring features is active with `probability`, independently; the features of an
    active group are uniform in [0, 1] ([-1, 1] if `signed`), the others 0. All-zero rows are dropped in the paper; here
    rows are drawn from the distribution that is left by that, so exactly `rows` come back: the first active group
    from a truncated geometric distribution, those behind it independently.
    """
    group = torch.arange(n_features // group_size)
    chance_of_being_first = (1 - probability) ** group.double()
    first = torch.multinomial(chance_of_being_first, rows, replacement=True, generator=random)[:, None]
    active = (group == first) | ((group > first) & (torch.rand(rows, len(group), generator=random) < probability))
    values = torch.rand(rows, n_features, generator=random)
    if signed:
        values = 2 * values - 1
    return values * active.repeat_interleave(group_size, 1)


class EndlessRows(Dataset[Batch]):
    """Rows made from their number: row r is a pure function of (seed, r), whatever the batches and processes.

    Rows are drawn a block at a time and the last block is kept, so a small batch costs no more than an index into it.
    Indexed with consecutive ascending row numbers, int64 [rows], which is what an endless `EpochSampler` yields.
    """

    BLOCK = 8192

    def __init__(self, data: "ToyData", rows_per_epoch: int) -> None:
        self.data = data
        self.rows_per_epoch = rows_per_epoch
        self._number = -1
        self._block: Rows

    def __len__(self) -> int:
        return self.rows_per_epoch

    def _rows_of_block(self, number: int) -> Rows:
        if number != self._number:
            self._number, self._block = number, self.data.draw(self.BLOCK, "train", self.data.seed, number)
        return self._block

    def __getitem__(self, rows: Tensor) -> Batch:
        first, last = int(rows[0]) // self.BLOCK, int(rows[-1]) // self.BLOCK
        if first == last:
            return self._rows_of_block(first)[rows - first * self.BLOCK]
        pieces = [
            self._rows_of_block(n)[rows[rows // self.BLOCK == n] - n * self.BLOCK] for n in range(first, last + 1)
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


class ToyData(InMemoryData):
    """Inputs and labels of a toy model; batches `{"inputs": [N, features], "labels": [N, features]}`, float32.

    Labels y of inputs x: x (`tms`), x A (`tmcs`, `high_rank`), x² (`squared`, whose inputs are in [-1, 1], all others
    in [0, 1]). See `draw_inputs` for the distribution of the inputs.

    Training rows depend on `seed`; validation and test rows do not, so that runs that differ in their seed are measured
    on the same rows. No two of the three sets come from the same random numbers. They are made by `setup`, when the
    file given as `truth` has to be there.

    Args:
        task: `tms`, `tmcs`, `high_rank` or `squared`.
        n_features: length of an input, and of a label.
        probability: of a group of features to be active, in (0, 1].
        group_size: neighbouring features that are active together: 5 for high rank, otherwise 1.
        points: number of training rows, shuffled in every epoch (1000 in the paper's decompositions, 10,000 in its
            target training). None: fresh rows for ever; row r is a function of (seed, r) and none comes twice.
        batch_size: training rows per batch and process.
        steps_per_epoch: batches that are called an epoch if `points` is None; no meaning otherwise.
        n_val, n_test: rows of the validation and the test set, each set one batch.
        seed: of the training rows and their order; None: that of `seed_everything`, or 0.
        task_seed: A is a function of this seed. None: that of the target which is trained on this data (`l3d target`
            fills it in), and 0 where no target is trained.
        truth: a target's safetensors file, whose tensor `truth.A` is taken instead.

    Raises:
        ValueError: one line, if a value is outside its range, or (from `setup`) `truth` is missing, unreadable, holds
            no `truth.A` or one that is not [features, features].
    """

    def __init__(
        self,
        task: Task = "tms",
        n_features: int = 5,
        probability: float = 0.05,
        group_size: int = 1,
        points: int | None = 1000,
        batch_size: int = 32,
        steps_per_epoch: int = 100,
        n_val: int = 1000,
        n_test: int = 1000,
        seed: int | None = None,
        task_seed: int | None = None,
        truth: Path | str | None = None,
    ) -> None:
        super().__init__(batch_size, seed, endless=points is None)
        require_choice("task", task, get_args(Task))
        require_at_least(1, n_features=n_features, group_size=group_size, steps_per_epoch=steps_per_epoch)
        require_at_least(1, points=1 if points is None else points, n_val=n_val, n_test=n_test)
        require_at_least(0, task_seed=task_seed or 0)
        if not 0 < probability <= 1:
            raise ValueError(f"probability: found {probability}, allowed are numbers in (0, 1]")
        if n_features % group_size:
            raise ValueError(f"group_size: found {group_size}, allowed are divisors of n_features = {n_features}")
        self.task = task
        self.n_features = n_features
        self.probability = probability
        self.group_size = group_size
        self.points = points
        self.steps_per_epoch = steps_per_epoch
        self.n_val = n_val
        self.n_test = n_test
        self.task_seed = task_seed
        self.truth_file = None if truth is None else Path(truth)
        self.A: Tensor | None = None

    def ground_truth(self) -> dict[str, Tensor]:
        """What is known of the task besides its name: `{"A": [features, outputs]}`, or nothing (tms, squared)."""
        if self.task in ("tms", "squared"):
            return {}
        if self.truth_file is None:
            return {"A": task_matrix(self.n_features, self.task_seed or 0)}
        return {"A": _read_matrix(self.truth_file, self.n_features)}

    def labels(self, inputs: Tensor) -> Tensor:
        """The task's answers to `inputs` [N, features], float32 [N, features]; after `setup`."""
        if self.task == "tms":
            return inputs
        if self.task == "squared":
            return inputs**2
        assert self.A is not None, "setup() comes first"
        return inputs @ self.A

    def draw(self, rows: int, stream: str, *key: int) -> Rows:
        """Inputs and labels, both [rows, features], from the random numbers that `stream` and `key` name."""
        random = generator(stream, *key)
        signed = self.task == "squared"
        inputs = draw_inputs(rows, self.n_features, self.probability, self.group_size, random, signed)
        return Rows(inputs=inputs, labels=self.labels(inputs))

    def setup(self, stage: str | None = None) -> None:
        self.A = self.ground_truth().get("A")
        if self.points is None:
            world_size = 1 if self.trainer is None else self.trainer.world_size
            self.train = EndlessRows(self, self.steps_per_epoch * self.batch_size * world_size)
        else:
            self.train = self.draw(self.points, "train", self.seed)
        self.validation = self.draw(self.n_val, "validation")
        self.test = self.draw(self.n_test, "test")


def _read_matrix(file: Path, n_features: int) -> Tensor:
    if not file.is_file():
        raise ValueError(f"truth: there is no file {file}")
    try:
        with safe_open(file, "pt") as tensors:
            if "truth.A" not in tensors.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                raise ValueError(f"truth: {file} holds no tensor truth.A, only {', '.join(sorted(tensors.keys()))}")
            A: Tensor = tensors.get_tensor("truth.A")
    except SafetensorError as error:
        raise ValueError(f"truth: {file} is no readable safetensors file ({error})") from error
    if A.shape != (n_features, n_features):
        raise ValueError(f"truth: truth.A in {file} is {list(A.shape)}, n_features asks for {[n_features, n_features]}")
    return A.float()
