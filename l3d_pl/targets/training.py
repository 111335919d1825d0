"""Training, saving and loading of the target models that ship with the package."""

import copy
import math
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanMetric

from l3d_pl.errors import L3DError, did_you_mean, require_choice
from l3d_pl.targets.toy import learned_of_truth
from l3d_pl.version import __version__

Loss = Literal["mse", "cross_entropy"]
Schedule = Literal["one_cycle", "constant"]

TRUTH = "truth."  # prefix of the ground truth's tensors in a target's file


class TargetTraining(LightningModule):
    """Trains a target model; batches are dicts with `inputs` and `labels`.

    The paper trains its toys for 312,000 small steps. The same loss comes out of some thousand steps on large batches
    of fresh data, with a larger learning rate that rises and falls once (`one_cycle`). What small batches did besides,
    to shake a model out of poor local minima, `restarts` does: TMS 5-2 ends in four orthogonal features and a dead
    fifth from about four starts in ten. So several starts are trained side by side on the same batches, and the one
    with the lowest validation loss is the target. All of it is a function of the seed given to `seed_everything`.

    Args:
        model: the module to train; the first start as it comes, the others after `reset_parameters`.
        name: of the target, for its file.
        loss: `mse`, or `cross_entropy` between logits and class numbers.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: `one_cycle`: warm-up over a tenth of the steps, then a cosine to 0; or `constant` (the paper).
        restarts: how many starts are trained.

    Raises:
        L3DError: a value outside its range; a model that cannot be restarted; a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "target",
        loss: Loss = "mse",
        lr: float = 0.01,
        weight_decay: float = 0.01,
        schedule: Schedule = "one_cycle",
        restarts: int = 1,
    ) -> None:
        super().__init__()
        require_choice("loss", loss, get_args(Loss))
        require_choice("schedule", schedule, get_args(Schedule))
        if restarts < 1:
            raise L3DError(f"restarts: found {restarts}, allowed are whole numbers >= 1")
        if not lr > 0:
            raise L3DError(f"lr: found {lr}, allowed are numbers > 0")
        self.name = name
        self.loss: Loss = loss
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule: Schedule = schedule
        self.candidates = nn.ModuleList([model, *(_restarted(model) for _ in range(restarts - 1))])
        self.chosen = 0
        # "disable": a NaN must stay a NaN
        means = [MeanMetric(nan_strategy="disable") for _ in self.candidates]
        self.validation_losses = cast(list[MeanMetric], nn.ModuleList(means))

    @property
    def model(self) -> nn.Module:
        """The start with the lowest validation loss so far."""
        return self.candidates[self.chosen]

    def _loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = model(batch["inputs"])
        loss = mse_loss if self.loss == "mse" else cross_entropy
        return loss(outputs, batch["labels"]), outputs

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        # The starts share no parameter, so the sum trains each of them on its own loss.
        loss = torch.stack([self._loss(model, batch)[0] for model in self.candidates]).sum()
        if not torch.isfinite(loss):
            bad = [key for key in ("inputs", "labels") if not torch.isfinite(batch[key]).all()]
            cause = (
                f"its {' and '.join(bad)} are not finite" if bad else f"its data are finite; lr = {self.lr} too large?"
            )
            raise L3DError(f"target {self.name}: loss is {loss.item()} in batch {batch_idx}, {cause}")
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        for model, mean in zip(self.candidates, self.validation_losses, strict=True):
            mean.update(self._loss(model, batch)[0], weight=len(batch["inputs"]))

    def on_validation_epoch_end(self) -> None:
        losses = torch.stack([mean.compute() for mean in self.validation_losses])
        for mean in self.validation_losses:
            mean.reset()
        self.chosen = int(losses.nan_to_num(math.inf).argmin())
        self.log("val/loss", losses[self.chosen], prog_bar=True)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        loss, outputs = self._loss(self.model, batch)
        size = len(batch["inputs"])
        self.log("test/loss", loss, batch_size=size, sync_dist=True)
        if self.loss == "cross_entropy":
            right = (outputs.argmax(1) == batch["labels"]).float().mean()
            self.log("test/accuracy", right, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.candidates.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True
        )
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise L3DError("trainer: schedule one_cycle needs an end; set max_epochs or max_steps")
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=int(steps), pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _restarted(model: nn.Module) -> nn.Module:
    """A copy of `model` with another random start, drawn from torch's global random state."""
    another = copy.deepcopy(model)
    resets = [reset for module in another.modules() if callable(reset := getattr(module, "reset_parameters", None))]
    if not resets:
        raise L3DError(f"restarts: no module of {type(model).__name__} has reset_parameters(), so allowed is only 1")
    for reset in resets:
        reset()
    return another


def fit_target(
    module: TargetTraining,
    data: LightningDataModule,
    trainer: Trainer,
    output: Path | str | None = None,
    seed: int = 0,
) -> dict[str, str | float]:
    """Train a target, test it and save it with the ground truth of its task.

    Args:
        module, data, trainer: as LightningCLI builds them.
        output: the safetensors file; `runs/targets/<name>_seed<seed>.safetensors` if None.
        seed: the run's seed; it names the file, and a data module whose `task_seed` is None takes its task from it.

    Returns:
        Figures of the target, with `file` where it is and `seconds` that it took: `loss` on the test set; `accuracy`
        where it classifies; `features_represented` or `r2_of_A` where there is a ground truth.
    """
    if getattr(data, "task_seed", seed) is None:
        data.task_seed = seed  # type: ignore[attr-defined]
    path = Path("runs", "targets", f"{module.name}_seed{seed}.safetensors") if output is None else Path(output)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    figures = {key.removeprefix("test/"): value for key, value in trainer.test(module, data, verbose=False)[0].items()}
    model = module.model.cpu()
    truth: dict[str, Tensor] = getattr(data, "ground_truth", dict)()
    figures |= learned_of_truth(model, truth)
    if trainer.is_global_zero:
        save_target(path, model, truth, {"task": module.name, "seed": seed, **figures})
    return {"file": str(path), "seconds": time.perf_counter() - start, **figures}


def save_target(
    path: Path | str, model: nn.Module, truth: Mapping[str, Tensor] = {}, metadata: Mapping[str, object] = {}
) -> None:
    """Write a target's state dict, under its own keys, to a safetensors file, whole or not at all.

    Args:
        path: the file; folders are made, a file that is there is replaced.
        model: every tensor of its state dict is kept.
        truth: the task's ground truth, kept as `truth.<name>`.
        metadata: kept as strings, beside the versions of the libraries.
    """
    path = Path(path)
    tensors = dict(model.state_dict()) | {TRUTH + name: tensor for name, tensor in truth.items()}
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    versions = {"l3d_pl": __version__, "torch": torch.__version__, "lightning": version("lightning")}
    text = {key: str(value) for key, value in (dict(metadata) | versions).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(save(tensors, text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_target(path: Path | str, model: nn.Module) -> dict[str, Tensor]:
    """Load a target's file into `model`, all of it or nothing, and return the ground truth `{name: tensor}` beside it.

    Raises:
        L3DError: one line that names the file, and the tensor where it is about one: the file is missing or cannot be
            read; a tensor of the model is missing, has another shape or a value that is not finite; or the file holds
            tensors that the model has not.
    """
    path = Path(path)
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
        raise L3DError(f"target file: there is no file {path}{did_you_mean(path.name, there)}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise L3DError(f"target file: {path} is truncated or no safetensors file ({error})") from error
    truth = {name.removeprefix(TRUTH): tensors.pop(name) for name in list(tensors) if name.startswith(TRUTH)}
    kind = type(model).__name__
    expected = model.state_dict()
    for name, own in expected.items():
        if name not in tensors:
            hint = did_you_mean(name, tensors)
            raise L3DError(f"target file: {path} has no tensor {name!r}, {list(own.shape)}, which {kind} needs{hint}")
        if tensors[name].shape != own.shape:
            found = list(tensors[name].shape)
            raise L3DError(f"target file: tensor {name!r} in {path} is {found}, {kind} expects {list(own.shape)}")
        if not tensors[name].isfinite().all():
            raise L3DError(f"target file: tensor {name!r} in {path} has values that are not finite")
    if unknown := [name for name in tensors if name not in expected]:
        raise L3DError(
            f"target file: {path} has a tensor {unknown[0]!r} that {kind} has not{did_you_mean(unknown[0], expected)}"
        )
    model.load_state_dict(tensors)
    return truth
