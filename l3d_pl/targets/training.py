"""Training, saving and loading of the target models that ship with the package."""

import copy
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from itertools import islice
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
from l3d_pl.targets.language import IGNORED, mean_loss, next_token_loss, next_tokens, ngram_losses
from l3d_pl.targets.toy import learned_of_truth
from l3d_pl.version import __version__

Loss = Literal["mse", "cross_entropy", "next_token"]
Schedule = Literal["one_cycle", "constant"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
TRUTH = "truth."  # prefix of the ground truth's tensors in a target's file


class TargetTraining(LightningModule):
    """Trains a target model; batches are dicts with `inputs` and `labels`, or with `input_ids` and `attention_mask`.

    The paper trains its toys for 312,000 small steps. The same loss comes out of some thousand steps on large batches
    of fresh data, with a larger learning rate that rises and falls once (`one_cycle`). What small batches did besides,
    to shake a model out of poor local minima, `restarts` does: TMS 5-2 ends in four orthogonal features and a dead
    fifth from about four starts in ten. So several starts are trained side by side on the same batches, and the one
    with the lowest validation loss is the target. All of it is a function of the seed given to `seed_everything`.

    Args:
        model: the module to train; the first start as it comes, the others after `reset_parameters`.
        name: of the target, for its file.
        loss: `mse`, `cross_entropy` between logits and class numbers, or `next_token` of a language model.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: `one_cycle`: warm-up over a tenth of the steps, then a cosine to 0; or `constant` (the paper).
        restarts: how many starts are trained.

    Raises:
        L3DError: a value outside its range; a model that cannot be restarted; a loss that is not finite; a tokenizer
            with more tokens than the model.
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

    def _loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if self.loss == "next_token":
            return next_token_loss(model, batch)
        loss = mse_loss if self.loss == "mse" else cross_entropy
        return loss(model(batch["inputs"]), batch["labels"])

    def _size(self, batch: Mapping[str, Tensor]) -> int:
        """How many losses the mean over a batch is of."""
        return int((next_tokens(batch) != IGNORED).sum()) if self.loss == "next_token" else len(batch["inputs"])

    def on_fit_start(self) -> None:
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if tokenizer is not None and size is not None and len(tokenizer) > size:
            raise L3DError(
                f"vocabulary: found {size}, the data's tokenizer has {len(tokenizer)} tokens, and needs as many"
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        # The starts share no parameter, so the sum trains each of them on its own loss.
        loss = torch.stack([self._loss(model, batch) for model in self.candidates]).sum()
        if not torch.isfinite(loss):
            bad = [key for key in ("inputs", "labels") if key in batch and not torch.isfinite(batch[key]).all()]
            cause = (
                f"its {' and '.join(bad)} are not finite" if bad else f"its data are finite; lr = {self.lr} too large?"
            )
            raise L3DError(f"target {self.name}: loss is {loss.item()} in batch {batch_idx}, {cause}")
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        for model, mean in zip(self.candidates, self.validation_losses, strict=True):
            mean.update(self._loss(model, batch), weight=self._size(batch))

    def on_validation_epoch_end(self) -> None:
        losses = torch.stack([mean.compute() for mean in self.validation_losses])
        for mean in self.validation_losses:
            mean.reset()
        self.chosen = int(losses.nan_to_num(math.inf).argmin())
        self.log("val/loss", losses[self.chosen], prog_bar=True)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        size = self._size(batch)
        self.log("test/loss", self._loss(self.model, batch), batch_size=size, sync_dist=True)
        if self.loss == "cross_entropy":
            right = (self.model(batch["inputs"]).argmax(1) == batch["labels"]).float().mean()
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
        rise = 0.2 if steps == 10 else 0.1  # torch divides by zero where the rise is a single step
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=int(steps), pct_start=rise, cycle_momentum=False
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
        output: the safetensors file; `runs/targets/<name>_seed<seed>.safetensors` if None. Of a model of transformers
            the directory; `runs/targets/<name>_seed<seed>` if None.
        seed: the run's seed; it names the file, and a data module whose `task_seed` is None takes its task from it.

    Returns:
        Figures of the target, with `file` where it is and `seconds` that it took: `loss` on the test set; `accuracy`
        where it classifies; `features_represented` or `r2_of_A` where there is a ground truth; of a language model
        `train_loss` and `perplexity`, and `unigram_loss` and `bigram_loss`, which it has to beat.
    """
    if getattr(data, "task_seed", seed) is None:
        data.task_seed = seed  # type: ignore[attr-defined]
    in_folder = hasattr(module.model, "save_pretrained")
    path = Path("runs", "targets", f"{module.name}_seed{seed}" + ("" if in_folder else ".safetensors"))
    path = path if output is None else Path(output)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    figures = {key.removeprefix("test/"): value for key, value in trainer.test(module, data, verbose=False)[0].items()}
    model = module.model.cpu()
    truth: dict[str, Tensor] = getattr(data, "ground_truth", dict)()
    figures |= learned_of_truth(model, truth)
    if module.loss == "next_token":
        figures |= _language_figures(model, data, figures["loss"])
    figures["seconds"] = time.perf_counter() - start
    if trainer.is_global_zero:
        metadata = {"task": module.name, "seed": seed, **figures}
        if in_folder:
            save_pretrained_target(path, model, getattr(data, "tokenizer", None), metadata)
        else:
            save_target(path, model, truth, metadata)
    return {"file": str(path), **figures}


def _language_figures(model: nn.Module, data: Any, held_out_loss: float) -> dict[str, float]:
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    train_loss = mean_loss(model, islice(data.first_dataloader(), 100))
    baselines = ngram_losses(data.first_dataloader(), data.test_dataloader(), vocabulary)
    return {"train_loss": train_loss, "perplexity": math.exp(held_out_loss), **baselines}


def _with_versions(metadata: Mapping[str, object]) -> dict[str, object]:
    return dict(metadata) | {"l3d_pl": __version__, "torch": torch.__version__, "lightning": version("lightning")}


def save_pretrained_target(path: Path | str, model: Any, tokenizer: Any, metadata: Mapping[str, object] = {}) -> None:
    """Write a model of transformers, and its tokenizer, in Hugging Face format: a directory, whole or not at all.

    Args:
        path: the directory; parents are made, a target that is there is replaced.
        model: anything with `save_pretrained`.
        tokenizer: saved beside it; None: no tokenizer.
        metadata: kept in `target.json`, beside the versions of the libraries.

    Raises:
        L3DError: `path` is there and is no saved model.
    """
    path = Path(path)
    if path.exists() and not (path / "config.json").is_file() and (path.is_file() or any(path.iterdir())):
        raise L3DError(f"output: {path} is there, and is no directory of a saved model; it is left alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if tokenizer is not None:
            model.config.eos_token_id, model.config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
            tokenizer.save_pretrained(aside)
        model.save_pretrained(aside)
        facts = _with_versions(metadata) | {"transformers": version("transformers")}
        (aside / "target.json").write_text(json.dumps(facts, indent=2) + "\n")
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
    text = {key: str(value) for key, value in _with_versions(metadata).items()}
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

    Args:
        path: a safetensors file, or a torch file with a state dict (also one under `state_dict`), of tensors alone.

    Raises:
        L3DError: one line that names the file, and the tensor where it is about one: the file is missing or cannot be
            read; a tensor of the model is missing, has another shape or a value that is not finite; or the file holds
            tensors that the model has not.
    """
    path = Path(path)
    if not path.is_file():
        there = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise L3DError(f"target file: there is no file {path}{did_you_mean(path.name, there)}")
    tensors = _read_torch_file(path) if path.suffix in TORCH_SUFFIXES else _read_safetensors(path)
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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise L3DError(f"target file: {path} is truncated or no safetensors file ({error})") from error


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise L3DError(
            f"target file: {path} holds more than tensors, and is not opened; save its state_dict()"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise L3DError(f"target file: {path} is truncated or no torch file") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise L3DError(
            f"target file: {path} holds a {type(content).__name__}, allowed is a state dict, {{name: tensor}}"
        )
    return dict(content)
