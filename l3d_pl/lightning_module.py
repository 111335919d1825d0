"""`L3D`: the training loop of a decomposition, as a LightningModule. Start reading at `training_step`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from l3d_pl.batch_topk import RunningThreshold, batch_topk, check_k
from l3d_pl.checkpoints import together
from l3d_pl.decomposition import Decomposition
from l3d_pl.divergence import REFERENCES, Divergence
from l3d_pl.errors import L3DError, require_choice
from l3d_pl.gradients import GradientExtractor, SampleGradient
from l3d_pl.gradients.forward import inputs_of, tensors_of
from l3d_pl.initialisation import start_from_gradients
from l3d_pl.metrics import Activity, Reconstruction
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.repair import Anchor, anchors_of, revive, scale_readers, swap
from l3d_pl.resumable import drawn_by
from l3d_pl.sharded import auxiliary_loss, decompose, loss_per_parameter, reconstruct, share_gradients
from l3d_pl.step import Step
from l3d_pl.strategies import check_strategy, register, writable_parameters, zero_optimizer_state
from l3d_pl.subnetworks import Prepared, Subnetworks
from l3d_pl.targets.frozen import fingerprint, freeze, select_parameters, shard
from l3d_pl.targets.training import load_target
from l3d_pl.tucker import local

T = TypeVar("T")
TuckerRanks = int | float | list[int | float] | dict[str, int | float | list[int | float]]

register()

# Set while a module is built whose V_in and V_out are to be made by `configure_model` only: sharded, each rank its own.
START_LATER: ContextVar[bool] = ContextVar("START_LATER", default=False)

# What each recipe sets where the user sets nothing.
RECIPES: dict[str, dict[str, Any]] = {
    # As published: a random start, step-wise learning rate, k from the first step.
    "paper": {"init": "random", "k_start": 1.0, "lr_schedule": "step", "swap_every": 0},
    # Start from the gradients, anneal k, and swap subnetworks where that lowers the loss.
    "l3d_pl": {"init": "gradients", "k_start": 0.5, "lr_schedule": "cosine", "swap_every": 25},
}


@dataclass
class Progress:
    """Where a fit stands: plain numbers, asked for in every step (Lightning's own each take a chain of properties)."""

    step: int = 0
    total_steps: int = 0
    log_every: int = 50
    samples: int = 0  # since P_act was last logged
    clock: tuple[int, float] = (0, 0.0)  # step and time of the last logged throughput


def in_own_precision(step: Callable[[L3D, Any, int], T]) -> Callable[[L3D, Any, int], T]:
    """A step outside of Lightning's autocast: of what is computed in it, half precision is the target's pass alone."""

    @wraps(step)
    def run(module: L3D, batch: Any, batch_idx: int) -> T:
        with torch.autocast(module.device.type, enabled=False):
            return step(module, batch, batch_idx)

    return run


class L3D(L.LightningModule):
    """Local loss landscape decomposition of a frozen target model (Chrisman, Bushnaq, Sharkey, arXiv 2504.00194).

    The target model is no submodule: checkpoints hold V_in, V_out and the optimizer, and the target's fingerprint.

    Args:
        target: the trained model to decompose, any nn.Module.
        parameters: which of its tensors, as globs (or regular expressions after `re:`).
        n_subnetworks: n_v.
        k: fraction of the batch's coefficients that batch top-k keeps.
        n_dense: the first so many subnetworks take part in every sample, and batch top-k chooses among the others.
        ranks: Tucker rank: an int, a fraction of each dimension, a list with one per mode, or {pattern: one of these}.
        divergence: `mse`, `kl`, or an instance of `l3d_pl.divergence.Divergence`.
        reference: `random`, `mean`, `uniform`, `contrastive`.
        sample: what a sample is: `item`, `token` (a position, by its own divergence), `sequence` (their sum).
        tokens_per_sequence: of token samples, so many positions of each sequence, drawn anew; None: all that count.
        autocast: run the frozen model in `bf16` or `fp16` (V_in and V_out stay float32); None: in its own precision, or
            as `trainer.precision` bf16-mixed and 16-mixed have it.
        shard_target: spread what is not decomposed of the target over all ranks (FSDP2), under any strategy.
        memory_budget: GiB that the intermediate results of a step may take together; larger ones are made in pieces.
        recipe: `l3d_pl` or `paper`; sets `init`, `k_start`, `lr_schedule`, `swap_every` where they are not given.
        init: `gradients` (K-lines over `init_samples` sample gradients) or `random`.
        scale_start: scale V_in after the start from gradients by the number that reconstructs best: for many
            subnetworks, whose start overshoots.
        k_start: k grows geometrically from this share of k over the first half of training; 1: k throughout.
        lr_schedule: `cosine` (2 % warm-up), `step` (x `lr_gamma` every `lr_step_epochs`), `constant`.
        swap_every: loss-tested swaps every so many steps from 30 % to 75 % of training; 0: none.
        lr, weight_decay, betas: of AdamW.
        dense_epochs: epochs at the start without sparsity (k = 1).
        restarts: decompositions trained side by side on the same gradients; the lowest held-out loss is kept.
        init_samples: sample gradients that the start, and the candidates of each swap, are made from.
        swap_samples: further sample gradients, on which each swap has to lower the loss too.
        dead_after: samples without taking part after which a subnetwork counts as dead.
        aux_coefficient: weight of the auxiliary loss for dead subnetworks (Gao et al.: 1/32); 0: none.
        revive_every: every so many steps up to 75 % of training replace dead subnetworks by badly reconstructed
            gradients; 0: never.
        bad_samples: `error` on samples with a non-finite gradient, or `skip` and count them.
        seed: of the start and the references; default: that of `seed_everything`, or 0.
        target_weights: safetensors file with the target's weights; None: `target` comes with them.
        target_config: config of `l3d target` that makes this file; `l3d fit` runs it first where the file is not there.

    Raises:
        L3DError: a setting outside its range, with what is allowed.
    """

    target: nn.Module
    active_samples: Tensor
    silent_samples: Tensor
    held_out_loss: Tensor
    p_act: Tensor
    skipped_samples: Tensor

    def __init__(
        self,
        target: nn.Module,
        parameters: str | list[str] = "*",
        n_subnetworks: int = 100,
        k: float = 0.1,
        n_dense: int = 0,
        ranks: TuckerRanks = 1,
        divergence: str | Divergence = "mse",
        reference: str = "random",
        sample: str = "item",
        tokens_per_sequence: int | None = None,
        autocast: str | None = None,
        memory_budget: float = 1.0,
        shard_target: bool = False,
        recipe: str = "l3d_pl",
        init: str | None = None,
        scale_start: bool = False,
        k_start: float | None = None,
        lr_schedule: str | None = None,
        swap_every: int | None = None,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        lr_gamma: float = 0.8,
        lr_step_epochs: int = 100,
        dense_epochs: int = 0,
        restarts: int = 1,
        init_samples: int = 1000,
        swap_samples: int = 4000,
        dead_after: int = 10_000,
        aux_coefficient: float = 0.0,
        revive_every: int = 0,
        bad_samples: str = "error",
        seed: int | None = None,
        target_weights: str | None = None,
        target_config: str | None = None,
    ):
        super().__init__()
        self._ranks = self._replicas = ALONE
        require_choice("recipe", recipe, RECIPES)
        defaults = RECIPES[recipe]
        self.init = defaults["init"] if init is None else init
        self.k_start = defaults["k_start"] if k_start is None else k_start
        self.lr_schedule = defaults["lr_schedule"] if lr_schedule is None else lr_schedule
        self.swap_every = defaults["swap_every"] if swap_every is None else swap_every
        require_choice("init", self.init, ("gradients", "random"))
        require_choice("lr_schedule", self.lr_schedule, ("cosine", "step", "constant"))
        require_choice("reference", reference, REFERENCES)
        require_choice("bad_samples", bad_samples, ("error", "skip"))
        self.k, self.k_start = check_k(k), check_k(self.k_start, "k_start")
        self.recipe, self.bad_samples, self.scale_start = recipe, bad_samples, scale_start
        self.shard_target = shard_target
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.lr_gamma, self.lr_step_epochs, self.dense_epochs = lr_gamma, lr_step_epochs, dense_epochs
        self.init_samples, self.swap_samples, self.dead_after = init_samples, swap_samples, dead_after
        self.aux_coefficient, self.revive_every = aux_coefficient, revive_every
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed

        target = freeze(target)
        if target_weights is not None:
            load_target(target_weights, target)
        chosen = select_parameters(target, parameters)
        object.__setattr__(self, "target", target)  # past nn.Module's registry: W0 is in no checkpoint and no optimizer
        self.extractor = GradientExtractor(target, chosen, divergence, reference, sample, tokens_per_sequence, autocast)
        shapes = {name: tensor.shape for name, tensor in chosen.items()}
        self._make_subnetworks = partial(
            Subnetworks, shapes, n_subnetworks, ranks, restarts, memory_budget=memory_budget, n_dense=n_dense
        )
        if not START_LATER.get():
            self.subnetworks = self._make_subnetworks(generator=self._generator("start"))
        self.threshold = RunningThreshold(restarts)
        self.train_activity, self.val_activity = Activity(restarts, n_subnetworks), Activity(restarts, n_subnetworks)
        self.val_loss, self.val_threshold_loss = Reconstruction(restarts), Reconstruction(restarts)
        self.register_buffer("active_samples", torch.zeros(restarts, n_subnetworks, dtype=torch.long))
        self.register_buffer("silent_samples", torch.zeros(restarts, n_subnetworks, dtype=torch.long))
        self.register_buffer("held_out_loss", torch.full((restarts,), math.nan))
        self.register_buffer("p_act", torch.zeros(restarts, n_subnetworks))
        self.register_buffer("skipped_samples", torch.zeros((), dtype=torch.long))
        self.mean_reference: Tensor | None = None  # mean output of the held-out data
        self._held_out_outputs: list[tuple[Tensor, int]] = []  # their sum and number, batch by batch
        self.run_config: dict[str, Any] | None = None  # the command line's configuration, kept with the results
        self._random: dict[str, torch.Generator] = {}
        self._anchors: list[Anchor] = []
        self._progress = Progress()
        self._validated_step = -1

    # -- the step ---------------------------------------------------------------------------------------------------

    @in_own_precision
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One step of the method (paper, "Training"): gradients of the frozen model, c = V_in g, batch top-k, loss."""
        extraction = self.extractor(batch, self._random["references"], ranks=self._ranks)
        if batch_idx == 0 and self.trainer.global_step == 0 and not self._keeps_anchors:  # (they are checked as well)
            together(self._ranks, partial(self.extractor.check, batch, extraction))
        gradients = share_gradients(extraction.gradients, self.subnetworks.group)
        prepared = self._prepare(gradients, batch, batch_idx, count=True)
        if prepared is None:
            return None
        step = decompose(self.subnetworks, prepared, self.current_k(), self._ranks)
        loss = step.loss.sum()  # restarts share no parameters: the gradient of the sum is that of each
        self._count(step)
        if self.aux_coefficient:
            share = min(1.0, 2 * self.k)
            auxiliary = auxiliary_loss(self.subnetworks, prepared, step, self.dead(), share, self._ranks)
            if auxiliary is not None:
                loss = loss + self.aux_coefficient * auxiliary
        # When Lightning writes, or it would write old values.
        if (self._progress.step + 1) % self._progress.log_every == 0:
            self._log_step(step, prepared)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then unit norms, then repairs."""
        super().optimizer_step(*args, **kwargs)
        for parameter in self.subnetworks.parameters():
            parameter.grad = None  # or it would lie there while the next one is made
        step = self._progress.step = self.trainer.global_step + 1  # Lightning counts this step only afterwards
        done = step / max(1, self._progress.total_steps)
        with writable_parameters(self.trainer.strategy):
            self._repair(step, done)
            self.subnetworks.normalise_()

    def _repair(self, step: int, done: float) -> None:
        """Swaps and revivals that are due after `step`, the share `done` of training."""
        # Not sooner: a candidate fitted to its samples beats any subnetwork that has hardly been trained.
        if self.swap_every and step % self.swap_every == 0 and self.sparse and 0.3 <= done <= 0.75:
            self._swap()
        # Not at the end, where that is known: what comes in late has no steps left to settle, and raises the loss.
        late = self._progress.total_steps > 0 and done > 0.75
        if self.revive_every and step % self.revive_every == 0 and not late:
            self._revive()

    def current_k(self) -> float:
        """k of this step: 1 in the dense epochs, then from k_start * k up to k over the first half of training."""
        if not self.sparse:
            return 1.0
        if self.k_start == 1.0:
            return self.k
        return self.k * self.k_start ** (1 - min(1.0, 2 * self._progress.step / max(1, self._progress.total_steps)))

    @property
    def sparse(self) -> bool:
        return not self.dense_epochs or self.current_epoch >= self.dense_epochs

    def dead(self) -> Tensor:
        """Subnetworks that took part in none of the last `dead_after` samples, [R, n_v]."""
        return self.silent_samples >= self.dead_after

    def _prepare(
        self, gradients: Mapping[str, SampleGradient], batch: Any, batch_idx: int, count: bool = False
    ) -> Prepared | None:
        """The gradients laid out; where some are not finite, an error, or without those samples (to `count`)."""
        prepared = self.subnetworks.prepare(gradients)
        if math.isfinite(float(prepared.energy)):
            return prepared
        finite = torch.isfinite(prepared.sample_energies())
        if self.bad_samples == "error":
            name = next(name for name, g in gradients.items() if not torch.isfinite(g.squared_norms()).all())
            inputs = tensors_of(inputs_of(batch))
            in_data = any(t.is_floating_point() and not torch.isfinite(t).all() for t in inputs)
            source = "the data" if in_data else "the gradient"
            raise L3DError(
                f"batch {batch_idx}: found NaN or infinity in {source}; first in the gradient of parameter '{name}', "
                f"{int((~finite).sum())} of {len(finite)} samples "
                "(bad_samples: skip leaves such samples out and counts them)"
            )
        if count:
            self.skipped_samples += (~finite).sum()
        index = finite.nonzero().squeeze(1)
        if len(index) == 0 and self._ranks.size == 1:
            return None
        if len(index) == 0:  # the others would wait for this rank for ever
            raise L3DError(f"batch {batch_idx}: every sample of rank {self._ranks.rank} has a non-finite gradient")
        return self.subnetworks.prepare({name: g.select(index) for name, g in gradients.items()})

    @torch.no_grad()
    def _count(self, step: Step) -> None:
        active = self._replicas.sum(self.subnetworks.everyone(step.mask.sum(0)))
        samples = self._replicas.count(step.mask.shape[0], active.device)
        self.active_samples.add_(active)
        self._progress.samples += samples
        self.silent_samples.add_(samples).mul_(active == 0)
        if self.sparse:
            self.threshold.update(step.threshold)

    # -- starting, repairing ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self._compiler_ctx is not None:
            raise L3DError("model: found L3D in torch.compile; allowed is L3D itself, whose step is written by hand")
        if str(self.trainer.precision) not in ("32-true", "64-true", "16-mixed", "bf16-mixed"):
            raise L3DError(
                f"trainer.precision: found {self.trainer.precision}, allowed are 32-true, 64-true, 16-mixed and "
                "bf16-mixed: V is learned in float32 at least (model.autocast runs the target in half precision)"
            )
        check_strategy(self.trainer.strategy)
        mixed = {"16-mixed": "fp16", "bf16-mixed": "bf16"}.get(str(self.trainer.precision))
        self.extractor.autocast = self.extractor.autocast or mixed
        self._ranks = self._replicas = Ranks.of_run()
        mesh = self.device_mesh
        if mesh is not None:  # data x subnetworks: see `configure_model`
            self._replicas = Ranks(mesh["data_parallel"].get_group()) if mesh["data_parallel"].size() > 1 else ALONE
        self._random = {name: self._generator(name) for name in ("references", "repair")} | self._random
        if self.shard_target and self._ranks.size > 1 and not isinstance(self.target, FSDPModule):
            _ = self.target_class, self.target_fingerprint  # taken while the target is whole
            # Before it is on the device, which may have no room for all of it: this moves it there layer by layer.
            shard(self.target, self.extractor.parameters.values(), self.device.type)
        self.target.to(self.device)

    def configure_model(self) -> None:
        """V_in and V_out; sharded by subnetwork where the strategy has a mesh with an axis for it."""
        mesh = self.device_mesh
        group = Ranks(mesh["tensor_parallel"].get_group()) if mesh and mesh["tensor_parallel"].size() > 1 else ALONE
        if "subnetworks" not in self._modules or self.subnetworks.group.size != group.size:
            self.subnetworks = self._make_subnetworks(generator=self._generator("start"), group=group)
        if mesh is not None:
            self.subnetworks.distribute(mesh["tensor_parallel"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average a shard's gradients over its replicas, which saw other samples. (DDP and others do that alone.)"""
        if self.device_mesh is None or self._replicas.size == 1:
            return
        for parameter in self.subnetworks.parameters():
            if parameter.grad is not None:
                self._replicas.mean_(local(parameter.grad))

    def on_fit_start(self) -> None:
        self.target.to(self.device)

    def on_train_start(self) -> None:
        self._progress = Progress(
            self.trainer.global_step,
            self._estimate_steps(),
            self.trainer.log_every_n_steps or 2**62,  # type: ignore[attr-defined]
            self._progress.samples,
        )
        if self._keeps_anchors:
            self._anchors = self._collect_anchors()
        if self.trainer.global_step == 0 and self.init == "gradients":
            with writable_parameters(self.trainer.strategy):
                self._start()
        self._progress.clock = (self._progress.step, time.perf_counter())

    @property
    def _keeps_anchors(self) -> bool:
        return bool(self.init == "gradients" or self.swap_every or self.revive_every)

    def _start(self) -> None:
        """V from the gradients of the first samples."""
        for restart, anchor in enumerate(self._anchors):
            random = self._generator("k-lines", restart)
            start_from_gradients(self.subnetworks, restart, anchor.prepared, random, gram=anchor.gram)
            if self.scale_start:
                scale_readers(self.subnetworks, restart, anchor.prepared, self.current_k())
        self._replicas.broadcast_(*self.subnetworks.tensors())

    def _estimate_steps(self) -> int:
        self.trainer.fit_loop.setup_data()
        if self.trainer.num_training_batches == 0:
            raise L3DError("data: the training set is empty, or holds no batch")
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps <= 0:
            if self.k_start != 1.0 or self.lr_schedule == "cosine" or self.swap_every:
                raise L3DError(
                    "trainer: found neither max_steps nor max_epochs of a sized loader; the schedules need one of them"
                )
            return 0
        return int(steps)

    def _collect_anchors(self) -> list[Anchor]:
        """Gradients of the first training samples, `init_samples` for each restart; the same after a resume.

        The first global batches, of which each rank takes its share. One rank (of sharded subnetworks: one group) then
        starts and repairs for all the others, and is the only one to keep them.
        """
        # Our data modules have a loader of its own for this: a second `train_dataloader` would be taken for training.
        first_dataloader = getattr(getattr(self.trainer, "datamodule", None), "first_dataloader", None)
        loader = self.trainer.train_dataloader if first_dataloader is None else first_dataloader()
        random, seen, good, keeps = self._generator("anchor references"), 0, 0, self._replicas.rank == 0
        parts: list[dict[str, SampleGradient]] = []
        # Each restart gets its own samples to start from; what follows them is to judge swaps, and common to all.
        to_start = self.init_samples * self.subnetworks.restarts
        wanted = to_start + (self.swap_samples if self.swap_every else 0)
        with drawn_by(self.seed, loader) as batches:
            for batch_idx, batch in enumerate(batches):
                batch = self._placed(batch)
                extraction = self.extractor(batch, random, ranks=self._ranks, joint=True)
                if batch_idx == 0:
                    together(self._ranks, partial(self.extractor.check, batch, extraction))
                gradients = share_gradients(extraction.gradients, self._ranks)
                n = next(iter(gradients.values())).n_samples
                if (prepared := self._prepare(gradients, batch, batch_idx)) is not None:
                    good += prepared.n_samples
                    parts += [gradients] if keeps else []
                seen += n
                if seen >= wanted:
                    break
        if seen == 0:
            raise L3DError("data: the training set is empty")
        if not good:
            raise L3DError(f"data: none of the first {seen} training samples has a finite gradient")
        found = min(good, self.init_samples)
        if found < self.subnetworks.n_subnetworks and self.init == "gradients":
            raise L3DError(
                f"init: 'gradients' needs at least n_subnetworks = {self.subnetworks.n_subnetworks} samples, found "
                f"{found} (init_samples = {self.init_samples}, training samples {seen}); allowed then is 'random'"
            )
        return anchors_of(parts, self.subnetworks, self.init_samples, self.swap_samples) if keeps else []

    def _swap(self) -> None:
        random = self._random["repair"]
        found = [swap(self.subnetworks, r, anchor, self.k, random) for r, anchor in enumerate(self._anchors)]
        self._replaced([index for index in found if index is not None])

    @torch.no_grad()
    def _revive(self) -> None:
        dead, k, random = self.dead(), self.current_k(), self._random["repair"]
        found = [revive(self.subnetworks, r, anchor, dead[r], k, random) for r, anchor in enumerate(self._anchors)]
        self._replaced([index for some in found for index in some])

    def _replaced(self, indices: list[int]) -> None:
        """These subnetworks (of R * n_v) are new, says the first rank: the others take them from it."""
        is_new = torch.zeros_like(self.silent_samples, dtype=torch.bool).view(-1)
        is_new[indices] = True
        self._replicas.broadcast_(is_new)
        if bool(is_new.any()):
            self._replicas.broadcast_(*self.subnetworks.tensors())
            for index in is_new.nonzero().squeeze(1).tolist():
                self._forget(index)

    def _forget(self, index: int) -> None:
        """A new subnetwork starts with no optimizer state and no record of silence."""
        own = self.subnetworks.own
        if own.start <= index < own.stop:
            for parameter in self.subnetworks.parameters():
                zero_optimizer_state(self.trainer.strategy, parameter, index - own.start)
        self.silent_samples.view(-1)[index] = 0

    # -- optimizer --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.subnetworks.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )
        total_steps = self._estimate_steps()
        if self.lr_schedule == "constant":
            return optimizer
        if self.lr_schedule == "step":
            epochs = torch.optim.lr_scheduler.StepLR(optimizer, self.lr_step_epochs, self.lr_gamma)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": epochs, "interval": "epoch"}}
        steps = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}

    # -- validation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._random["validation"] = self._generator("validation")  # the same references every time
        if self.trainer.testing:
            self.target.to(self.device)

    @in_own_precision
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        extraction = self.extractor(batch, self._random["validation"], ranks=self._ranks)
        prepared = self._prepare(share_gradients(extraction.gradients, self.subnetworks.group), batch, batch_idx)
        if prepared is None:
            return
        with torch.no_grad():
            c = self.subnetworks.coefficients(prepared)
            mask, _ = batch_topk(c, self.k, self._ranks, self.subnetworks.own_dense)
            alone = self.threshold(c, self.subnetworks.own_dense)
            for metric, codes in ((self.val_loss, c * mask), (self.val_threshold_loss, c * alone)):
                metric.update(reconstruct(self.subnetworks, prepared, codes).loss, prepared.energy)
            self.val_activity.update(self.subnetworks.everyone(alone.sum(0)), prepared.n_samples)
            outputs = self.extractor.divergence.to_mean(extraction.outputs)
            outputs = outputs[outputs.flatten(1).isfinite().all(1)]  # without samples that were skipped, or masked
            self._held_out_outputs.append((outputs.sum(0), len(outputs)))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._end_evaluation("val"))

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._end_evaluation("test"))

    def _end_evaluation(self, stage: str) -> dict[str, Tensor]:
        """Figures of an evaluation, by the names under which they are logged; also kept for `decomposition`."""
        if not self._held_out_outputs:
            raise L3DError(f"data: the {stage} set is empty, or none of its samples has a finite gradient")
        restarts = self.subnetworks.restarts  # (torchmetrics drops dimensions of size one)
        loss, alone = self.val_loss.compute().view(restarts), self.val_threshold_loss.compute().view(restarts)
        activity = {name: value.view(restarts, -1) for name, value in self.val_activity.compute().items()}
        best = int(loss.argmin())
        sums, counts = zip(*self._held_out_outputs, strict=True)
        total = self._ranks.sum(torch.stack(sums).sum(0))
        self.mean_reference = self.extractor.divergence.from_mean(total / self._ranks.count(sum(counts), total.device))
        self._held_out_outputs.clear()
        self.held_out_loss.copy_(loss)
        self.p_act.copy_(activity["p_act"])
        self._validated_step = self._progress.step
        for metric in (self.val_loss, self.val_threshold_loss, self.val_activity):
            metric.reset()
        self._log_p_act(stage, activity["p_act"][best])
        figures = {
            f"{stage}/loss": loss[best],
            f"{stage}/norm_ratio": loss[best].sqrt(),
            f"{stage}/loss_at_threshold": alone[best],
            f"{stage}/l0_at_threshold": activity["l0"][best, 0],
            f"{stage}/dead_fraction": activity["dead_fraction"][best, 0],
        }
        if self.subnetworks.restarts > 1:
            figures |= {f"{stage}/loss/restart_{r}": value for r, value in enumerate(loss)}
        return figures

    def _placed(self, batch: Any) -> Any:
        """A batch as Lightning hands it to a step: on the device, in the precision of `trainer.precision`."""
        return self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))

    def ensure_validated(self) -> None:
        """Validate the final weights, if the last validation saw earlier ones (a run may end or resume in between)."""
        data = getattr(self.trainer, "datamodule", None)
        loaders = data.val_dataloader() if data is not None else self.trainer.val_dataloaders
        if self._validated_step == self._progress.step or loaders is None:
            return
        self.to(self.trainer.strategy.root_device)  # Lightning has moved it to the CPU by then
        self.on_validation_epoch_start()
        for batch_idx, batch in enumerate(loaders):
            self.validation_step(self._placed(batch), batch_idx)
        figures = {name: float(value) for name, value in self._end_evaluation("val").items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(figures, self._progress.step)
            logger.save()

    # -- logging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _log_step(self, step: Step, prepared: Prepared) -> None:
        losses = self._ranks.sum(step.loss) / self._ranks.size
        best = int(losses.argmin())
        now, then = (self._progress.step, time.perf_counter()), self._progress.clock
        self._progress.clock = now
        values: dict[str, Any] = {
            "train/loss": losses[best],
            "train/norm_ratio": losses[best].clamp_min(0).sqrt(),
            "train/l0": self.subnetworks.everyone(step.mask[:, best]).sum(1).float().mean(),
            "train/k": self.current_k(),
            "train/threshold": self.threshold.value[best],
            "train/dead_fraction": self.dead()[best].float().mean(),
            "train/skipped_samples": self.skipped_samples.float(),
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
        }
        if now[0] > then[0]:
            samples = step.mask.shape[0] * self._replicas.size
            values["train/samples_per_second"] = (now[0] - then[0]) * samples / (now[1] - then[1])
        per_parameter = loss_per_parameter(self.subnetworks, prepared, step.codes, self._ranks, self._replicas)
        values |= {f"train/loss/{name}": loss[best] for name, loss in per_parameter.items()}
        self.log_dict(values)
        self.log("loss", values["train/loss"], prog_bar=True, logger=False)

    def on_train_epoch_end(self) -> None:
        period = max(1, self.trainer.check_val_every_n_epoch or 1)
        if self.trainer.loggers and (self.current_epoch + 1) % period == 0:
            self.train_activity.update(self.active_samples, self._progress.samples)
            p_act = self.train_activity.compute()["p_act"].view(self.subnetworks.restarts, -1)
            self._log_p_act("train", p_act[self.best_restart])
            self.train_activity.reset()
            self.active_samples.zero_()
            self._progress.samples = 0

    def _log_p_act(self, stage: str, p_act: Tensor) -> None:
        """P_act of every subnetwork, one value each, and as a histogram where the logger draws them."""
        if self.trainer.sanity_checking:
            return
        for logger in self.trainer.loggers:
            logger.log_metrics(
                {f"{stage}/p_act/{k}": value for k, value in enumerate(p_act.tolist())}, self.trainer.global_step
            )
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if add_histogram is not None:
                add_histogram(f"{stage}/p_act", p_act, self.trainer.global_step)

    @cached_property
    def target_fingerprint(self) -> str:
        """SHA-256 of the target model, which is frozen."""
        return fingerprint(self.target)

    @cached_property
    def target_class(self) -> str:
        return f"{type(self.target).__module__}.{type(self.target).__qualname__}"

    # -- results and state ------------------------------------------------------------------------------------------

    @property
    def best_restart(self) -> int:
        """The restart with the lowest held-out loss (the first, before any validation)."""
        return 0 if bool(self.held_out_loss.isnan().any()) else int(self.held_out_loss.argmin())

    def decomposition(self, restart: int | None = None, figures: Mapping[str, Any] | None = None) -> Decomposition:
        """What this run has found: `restart`, by default the one with the lowest held-out loss.

        Of subnetworks that are sharded no process has all; `l3d_pl.export` makes it of a checkpoint.
        """
        best = self.best_restart if restart is None else restart
        found = Decomposition(
            self.subnetworks.extract_restart(best),
            target=None if isinstance(self.target, FSDPModule) else self.target,
            divergence=self.extractor.divergence,
            reference=self.extractor.reference,
            sample=self.extractor.sample,
            k=self.k,
            threshold=float(self.threshold.value[best]),
            p_act=self.p_act[best].clone(),
            mean_reference=self.mean_reference,
            figures={"val/loss": float(self.held_out_loss[best])} | dict(figures or {}),
            seed=self.seed,
            run_config=self.run_config,
        )
        found.target_class, found.target_fingerprint = self.target_class, self.target_fingerprint
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["l3d"] = {
            "target_fingerprint": self.target_fingerprint,
            "random": self._ranks.gather({name: state.get_state() for name, state in self._random.items()}),
            "p_act_samples": self._progress.samples,
            "validated_step": self._validated_step,
            "mean_reference": self.mean_reference,
            "decomposition": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """What `l3d export` has to know besides the tensors: plain values, as in a `Decomposition`'s config.json."""
        v, extractor = self.subnetworks, self.extractor
        return {
            "parameters": {n: {"shape": list(shape), "ranks": list(v.ranks[n])} for n, shape in v.shapes.items()},
            "n_subnetworks": v.n_subnetworks,
            "n_dense": v.n_dense,
            "restarts": v.restarts,
            "divergence": extractor.divergence.name,
            "reference": extractor.reference,
            "sample": extractor.sample,
            "k": self.k,
            "target_class": self.target_class,
            "seed": self.seed,
            "run_config": self.run_config,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("l3d")
        if state is None:
            raise L3DError("checkpoint: it was not written by L3D (no entry 'l3d')")
        mine = self.target_fingerprint
        if state["target_fingerprint"] != mine:
            raise L3DError(
                f"checkpoint: it is of another target model, fingerprint {state['target_fingerprint'][:12]}; "
                f"this target's is {mine[:12]}"
            )
        if self._trainer is not None:
            self.trainer.precision_plugin.convert_module(self)  # Lightning does it too late: digits would be lost
        tensors = self.state_dict()
        for name, tensor in checkpoint["state_dict"].items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                found = list(tensors[name].shape) if name in tensors else "missing"
                raise L3DError(
                    f"checkpoint: its tensor '{name}' is {list(tensor.shape)}, this run's is {found}; "
                    "n_subnetworks, ranks, parameters and restarts have to be the checkpoint's"
                )
        self.mean_reference, self._validated_step = state["mean_reference"], state["validated_step"]
        self._progress = Progress(step=checkpoint["global_step"], samples=state["p_act_samples"])
        states = state["random"]  # one for each rank; on another number of ranks the others start anew
        own = states[self._ranks.rank] if self._ranks.rank < len(states) else {}
        for name, value in (own | {"repair": states[0]["repair"]}).items():  # (who repairs together draws the same)
            self._random[name] = torch.Generator()
            self._random[name].set_state(value)

    def _generator(self, stream: str, *key: int) -> torch.Generator:
        """Random state of its own for each purpose, a function of the seed (and the rank, where ranks must differ)."""
        words = [self.seed, *stream.encode(), *key]
        if stream == "references":
            words.append(self._ranks.rank)
        value = 0
        for word in words:
            value = (value * 1_000_003 + word + 1) % (2**63 - 25)
        return torch.Generator().manual_seed(value)


def cosine_with_warmup(steps: int, warmup: float = 0.02) -> Callable[[int], float]:
    """Learning-rate factor of a step: linear over the first `warmup` share, then a half cosine to 0."""
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor


__all__ = ["L3D", "RECIPES", "cosine_with_warmup"]
