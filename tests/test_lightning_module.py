"""The training loop: what holds after every step, what is logged, and what is kept."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from datamodules.toy import ToyData
from l3d_pl import L3D, Decomposition, L3DError, per_sample_gradients
from l3d_pl.batch_topk import batch_topk, n_selected
from l3d_pl.callbacks import ExportDecomposition, RunLogger
from l3d_pl.gradients import GradientExtractor
from l3d_pl.step import decompose
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.toy import MLP, TiedAutoencoder

REPAIRS = {"swap_every": 2, "revive_every": 3, "dead_after": 32, "aux_coefficient": 1 / 32, "restarts": 2}


def tied() -> nn.Module:
    """A TMS target with drawn weights."""
    target = TiedAutoencoder(5, 2)
    target.load_state_dict({"W_in": torch.randn(5, 2, generator=torch.Generator().manual_seed(7)), "b": torch.zeros(5)})
    return target


def module_of(target: nn.Module | None = None, **settings: Any) -> L3D:
    return L3D(
        tied() if target is None else target,
        **{"n_subnetworks": 4, "k": 0.3, "seed": 3, "init_samples": 40, **settings},
    )


def data_of(**settings: Any) -> ToyData:
    return ToyData(**{"points": 96, "batch_size": 16, "seed": 1, "n_val": 50, "n_test": 20, **settings})


def trainer_of(root: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    fixed = {"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0, "inference_mode": False}
    return L.Trainer(
        default_root_dir=root, callbacks=list(callbacks), **{**quiet, **fixed, "max_steps": 10, **settings}
    )


class AfterEachStep(L.Callback):
    """Calls a function with the module after every training batch."""

    def __init__(self, look: Callable[[L3D], None]):
        self.look = look

    def on_train_batch_end(self, trainer: L.Trainer, module: L3D, *_: object) -> None:
        self.look(module)


class BeforeOptimizer(AfterEachStep):
    """The same, with the gradients that the optimizer is about to use."""

    def on_train_batch_end(self, *_: object) -> None:
        pass

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L3D, *_: object) -> None:
        self.look(module)


# -- invariants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TiedAutoencoder, MLP])
@pytest.mark.parametrize("settings", [{}, REPAIRS, {"recipe": "paper"}], ids=["default", "repairs", "paper"])
def test_subnetworks_have_unit_norm_after_every_step(
    tmp_path: Path, kind: type[nn.Module], settings: dict[str, Any]
) -> None:
    norms: list[Tensor] = []

    def look(module: L3D) -> None:
        dense = [module.subnetworks.direction(k, r) for r in range(module.subnetworks.restarts) for k in range(4)]
        norms.append(torch.tensor([sum(float(t.double().square().sum()) for t in v.values()) ** 0.5 for v in dense]))

    module = module_of(None if kind is TiedAutoencoder else MLP(), ranks=2, lr=0.1, **settings)
    trainer_of(tmp_path, AfterEachStep(look)).fit(module, data_of())
    assert len(norms) == 10
    torch.testing.assert_close(torch.stack(norms), torch.ones(10, len(norms[0])), rtol=0, atol=1e-5)


def test_target_is_the_same_after_a_run_and_in_no_checkpoint(tmp_path: Path) -> None:
    target = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    target[1].running_mean.normal_()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    module, data = module_of(target, parameters="*.weight", **REPAIRS), data_of()
    trainer = trainer_of(tmp_path)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    after = target.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(part.training for part in target.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in target.parameters())

    trainer.save_checkpoint(tmp_path / "x.ckpt")
    held: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            held.append(value)
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            collect(child)

    collect(torch.load(tmp_path / "x.ckpt", weights_only=True))
    large = [tensor for tensor in before.values() if tensor.numel() > 8]
    assert len(held) > 10
    assert not any(torch.equal(mine, theirs) for mine in held for theirs in large)


# -- Lightning's own ways ----------------------------------------------------------------------------------------------


def test_plain_loaders_of_tensors_tuples_and_mappings(tmp_path: Path) -> None:
    x = data_of().draw(96, "own").tensors["inputs"]
    forms: dict[str, Any] = {"tuple": TensorDataset(x, x), "tensor": x, "mapping": [{"inputs": row} for row in x]}
    results = {}
    for name, rows in forms.items():
        module = module_of()
        trainer_of(tmp_path).fit(module, DataLoader(rows, 16), DataLoader(rows, 48))
        module.ensure_validated()
        results[name] = module.held_out_loss
    assert 0 < float(results["tuple"]) < 1
    assert torch.equal(results["tuple"], results["tensor"])
    assert torch.equal(results["tuple"], results["mapping"])
    trainer_of(tmp_path).fit(module_of(), DataLoader(x, 16))  # nothing to validate on


def gradients_of(module: L3D, batch: Any, k: float) -> list[Tensor]:
    """dL of one batch, by itself."""
    prepared = module.subnetworks.prepare(module.extractor(batch).gradients)
    loss = decompose(module.subnetworks, prepared, k).loss.sum()
    return list(torch.autograd.grad(loss, list(module.subnetworks.parameters())))


def test_accumulated_gradient_is_the_mean_over_batches_and_is_clipped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recipe": "paper", "reference": "mean"}  # nothing random, nothing at the start
    data = data_of()
    data.setup()
    batches = list(data.first_dataloader())[:2]
    expected = [
        torch.stack(pair).mean(0)
        for pair in zip(*(gradients_of(module_of(**settings), batch, 0.3) for batch in batches), strict=True)
    ]
    seen: list[list[Tensor]] = []
    look = BeforeOptimizer(
        lambda module: seen.append([parameter.grad.clone() for parameter in module.subnetworks.parameters()])
    )
    module = module_of(**settings)
    trainer = trainer_of(tmp_path, look, max_steps=2, accumulate_grad_batches=2)
    trainer.fit(module, data_of())
    assert len(seen) == trainer.global_step == 2
    for found, value in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)

    norms: list[float] = []

    class Clipped(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L3D) -> None:
            trainer.optimizers[0].register_step_post_hook(
                lambda *_: norms.append(
                    float(torch.nn.utils.get_total_norm([p.grad for p in module.subnetworks.parameters()]))
                )
            )

    limit = 0.1 * float(torch.nn.utils.get_total_norm(expected))
    trainer_of(tmp_path, Clipped(), max_steps=2, gradient_clip_val=limit).fit(module_of(**settings), data_of())
    assert max(norms) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions(tmp_path: Path, precision: str) -> None:
    target = tied().double() if precision == "64-true" else tied()
    module = module_of(target, swap_every=3)
    trainer_of(tmp_path, precision=precision).fit(module, data_of())
    module.ensure_validated()
    assert 0 < float(module.held_out_loss) < 1.5
    assert next(module.subnetworks.parameters()).dtype == (torch.float64 if precision == "64-true" else torch.float32)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_half_precision_is_the_targets_alone(tmp_path: Path, precision: str) -> None:
    """L of the validation set is that of float32 arithmetic on these gradients; AuxK and the log as well."""
    module, data = module_of(MLP(), ranks=2, reference="mean", aux_coefficient=0.1, dead_after=20), data_of()
    seen: list[torch.dtype] = []
    reconstruct = Subnetworks.reconstruct

    def watched(self: Subnetworks, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return reconstruct(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subnetworks, "reconstruct", watched)
        trainer = trainer_of(tmp_path, precision=precision, log_every_n_steps=1, max_epochs=1, max_steps=-1)
        trainer.fit(module, data)
        assert set(seen) == {torch.float32}
    found = float(module.held_out_loss)
    extractor = GradientExtractor(
        module.target, module.extractor.parameters, reference="mean", autocast="bf16" if "bf16" in precision else None
    )
    prepared = module.subnetworks.prepare(extractor(data.validation.tensors["inputs"]).gradients)
    c = module.subnetworks.coefficients(prepared)
    mask, _ = batch_topk(c, 0.3)
    assert found == pytest.approx(float(module.subnetworks.reconstruct(prepared, c * mask).loss.detach()), rel=1e-6)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_k_grows_geometrically_over_the_first_half(tmp_path: Path) -> None:
    ks: list[float] = []

    class Before(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L3D, *_: object) -> None:
            ks.append(module.current_k())

    trainer_of(tmp_path, Before(), max_steps=12).fit(module_of(k=0.2, k_start=0.25), data_of())
    expected = [0.2 * 0.25 ** (1 - min(1.0, step / 6)) for step in range(12)]
    assert ks == pytest.approx(expected)
    assert (ks[0], ks[6], ks[11]) == pytest.approx((0.05, 0.2, 0.2))
    ks.clear()
    trainer_of(tmp_path, Before()).fit(module_of(k=0.2, recipe="paper"), data_of())
    assert set(ks) == {0.2}


def test_dense_epochs_come_first(tmp_path: Path) -> None:
    active: list[int] = []
    thresholds: list[bool] = []

    def look(module: L3D) -> None:
        active.append(int(module.active_samples.sum()) - sum(active))
        thresholds.append(bool(module.threshold.started))

    trainer_of(tmp_path, AfterEachStep(look), max_steps=8).fit(
        module_of(dense_epochs=1, k=0.1, k_start=1.0), data_of(points=64)
    )
    assert active == [16 * 4] * 4 + [n_selected(0.1, 16 * 4)] * 4  # four batches an epoch
    assert thresholds == [False] * 4 + [True] * 4


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_learning_rate_schedules(tmp_path: Path, schedule: str) -> None:
    rates: list[float] = []
    look = BeforeOptimizer(lambda module: rates.append(module.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]))
    settings = {"lr_schedule": schedule, "lr": 0.02, "lr_step_epochs": 2, "lr_gamma": 0.5}
    trainer_of(tmp_path, look, max_steps=100).fit(module_of(**settings), data_of(points=160))  # ten batches an epoch
    if schedule == "constant":
        assert set(rates) == {0.02}
    elif schedule == "step":
        assert rates == pytest.approx([0.02 * 0.5 ** (step // 20) for step in range(100)])
    else:
        assert rates[:3] == pytest.approx([0.01, 0.02, 0.02])
        assert rates[51] == pytest.approx(0.01)
        assert rates[-1] < 1e-4
        assert rates[2:] == sorted(rates[2:], reverse=True)


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_best_restart_on_held_out_data_is_exported(tmp_path: Path) -> None:
    module = module_of(restarts=3)
    trainer = trainer_of(tmp_path, ExportDecomposition())
    trainer.fit(module, data_of())
    losses = module.held_out_loss
    assert len(set(losses.tolist())) == 3
    assert module.best_restart == int(losses.argmin())
    alone = []
    for r in range(3):
        single = module_of()
        single.subnetworks.load_state_dict(module.subnetworks.extract_restart(r).state_dict())
        alone.append(trainer_of(tmp_path).validate(single, data_of(), verbose=False)[0]["val/loss"])
    torch.testing.assert_close(losses, torch.tensor(alone), rtol=1e-5, atol=0)
    exported = Decomposition.from_pretrained(tmp_path / "decomposition", target=tied())
    assert exported.figures["val/loss"] == float(losses.min())
    for k in range(4):
        for name, tensor in module.subnetworks.direction(k, restart=module.best_restart).items():
            assert torch.equal(exported.direction(k)[name], tensor)


def test_first_restart_is_the_run_without_restarts(tmp_path: Path) -> None:
    """Without repairs, whose random numbers the restarts share. (Rounding differs: they are one batch.)"""
    modules = [module_of(restarts=restarts, swap_every=0) for restarts in (1, 2)]
    for module in modules:
        trainer_of(tmp_path).fit(module, data_of())
    for k in range(4):
        for name, tensor in modules[0].subnetworks.direction(k).items():
            torch.testing.assert_close(
                modules[1].subnetworks.direction(k, restart=0)[name], tensor, rtol=1e-3, atol=1e-4
            )
            assert not torch.allclose(modules[1].subnetworks.direction(k, restart=1)[name], tensor, atol=1e-2)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_what_is_logged(tmp_path: Path) -> None:
    module = module_of(swap_every=0)
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L3D, outputs: Any, *_: object) -> None:
            losses.append(float(outputs["loss"]))

    trainer = trainer_of(tmp_path, Losses(), logger=RunLogger(str(tmp_path)), log_every_n_steps=2, max_steps=12)
    trainer.fit(module, data_of())  # two epochs of six batches
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    train = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train] == [1, 3, 5, 7, 9, 11]  # steps count from 0
    p_act = {f"p_act/{k}" for k in range(4)}
    names = {"loss", "norm_ratio", "l0", "k", "threshold", "dead_fraction", "skipped_samples", "loss/W_in", "loss/b"}
    for row in train:
        assert set(row) == {f"train/{name}" for name in names | {"samples_per_second"}} | {"lr", "step", "epoch"}
        assert row["train/loss"] == pytest.approx(losses[int(row["step"])])
        assert row["train/norm_ratio"] == pytest.approx(math.sqrt(row["train/loss"]))
        assert (
            row["train/l0"] == n_selected(row["train/k"], 16 * 4) / 16
        )  # mean active per sample: exactly the fraction k
        assert row["train/skipped_samples"] == 0
        assert row["train/samples_per_second"] > 0
    epochs = [row for row in rows if "train/p_act/0" in row]
    assert len(epochs) == 2
    assert all(0 <= row[f"train/{name}"] <= 1 for row in epochs for name in p_act)

    val = {key: value for row in rows for key, value in row.items() if key.startswith("val/")}
    expected = {"loss", "norm_ratio", "loss_at_threshold", "l0_at_threshold", "dead_fraction"} | p_act
    assert set(val) == {f"val/{name}" for name in expected}
    assert val["val/l0_at_threshold"] == pytest.approx(sum(val[f"val/{name}"] for name in p_act), rel=1e-4)


def test_restarts_are_logged_one_by_one(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module_of(restarts=3), data_of())
    figures = trainer.logged_metrics
    assert figures["val/loss"] == min(figures[f"val/loss/restart_{r}"] for r in range(3))


@pytest.mark.parametrize("n_batches", [1, 3])
def test_validation_figures_equal_a_direct_computation(tmp_path: Path, n_batches: int) -> None:
    """Over all validation samples together, from dense gradients and directions; batch top-k is each batch's own."""
    module = module_of(reference="mean")
    data = data_of()
    trainer_of(tmp_path).fit(module, data)
    inputs = data.validation.tensors["inputs"]
    batches = inputs.tensor_split(n_batches)
    found = trainer_of(tmp_path).validate(module, DataLoader(list(batches), batch_size=None), verbose=False)[0]
    rows = [
        torch.stack(
            [torch.cat([t.flatten() for t in module.subnetworks.direction(k, side=side).values()]) for k in range(4)]
        )
        for side in ("in", "out")
    ]
    error = at_threshold = energy = torch.zeros((), dtype=torch.float64)
    active = torch.zeros(4)
    for batch in batches:
        gradients = per_sample_gradients(tied().requires_grad_(False), batch, reference="mean")
        g = torch.cat([gradients[name].dense().flatten(1) for name in module.subnetworks.shapes], 1)
        c = g @ rows[0].T
        cut = c.abs().flatten().sort(descending=True).values[n_selected(0.3, c.numel()) - 1]
        alone = c.abs() >= module.threshold.value
        error = error + (g - (c * (c.abs() >= cut)) @ rows[1]).double().square().sum()
        at_threshold = at_threshold + (g - (c * alone) @ rows[1]).double().square().sum()
        energy = energy + g.double().square().sum()
        active += alone.sum(0)
    expected = {
        "val/loss": error / energy,
        "val/norm_ratio": (error / energy).sqrt(),
        "val/loss_at_threshold": at_threshold / energy,
        "val/l0_at_threshold": active.sum() / len(inputs),
        "val/dead_fraction": (active == 0).float().mean(),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)
    torch.testing.assert_close(module.p_act[0], active / len(inputs))
    torch.testing.assert_close(module.mean_reference, tied()(inputs).mean(0).detach())


def test_validation_is_deterministic_and_of_the_final_weights(tmp_path: Path) -> None:
    module, data = module_of(), data_of()
    logger = RunLogger(str(tmp_path))
    # validated after the first epoch only: ten steps end in the middle of the second
    trainer = trainer_of(tmp_path, ExportDecomposition(), logger=logger, max_steps=10)
    trainer.fit(module, data)
    final = float(module.held_out_loss)
    first, second = (trainer_of(tmp_path).validate(module, data_of(seed=seed), verbose=False)[0] for seed in (1, 2))
    assert first == second  # the same rows and references, whatever the training rows
    assert first["val/loss"] == final
    exported = Decomposition.from_pretrained(tmp_path / "decomposition", target=tied())
    assert exported.figures["val/loss"] == final
    assert torch.equal(exported.p_act, module.p_act[0])
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")][-1] == pytest.approx(
            final
        )


# -- dead subnetworks --------------------------------------------------------------------------------------------------


def bury(module: L3D, slot: int) -> None:
    """Make one subnetwork dead: an encoder that never takes part, and a long silence behind it."""
    with torch.no_grad():
        for part in module.subnetworks.v_in.children():
            part.core[slot] = 0
    module.silent_samples[0, slot] = module.dead_after


class Bury(L.Callback):
    def __init__(self, slot: int):
        self.slot = slot

    def on_train_batch_start(self, trainer: L.Trainer, module: L3D, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            bury(module, self.slot)


def test_dead_subnetwork_is_revived(tmp_path: Path) -> None:
    module = module_of(swap_every=0, revive_every=2, dead_after=10_000, k=0.2)
    seen: list[tuple[bool, float, float]] = []

    def look(module: L3D) -> None:
        encoder = sum(float(t.square().sum()) for t in module.subnetworks.direction(2, side="in").values())
        state = [
            value
            for p in module.subnetworks.parameters()
            for value in module.optimizers(use_pl_optimizer=False).state[p].values()
        ]
        moments = sum(float(value[2].abs().sum()) for value in state if value.ndim > 1)
        seen.append((bool(module.dead()[0, 2]), encoder, moments))

    trainer_of(tmp_path, Bury(2), AfterEachStep(look), max_steps=4).fit(module, data_of())
    assert seen[0][0]
    assert seen[0][1] < 1e-2
    assert seen[1] == (
        False,
        pytest.approx(1.0, abs=1e-4),
        0.0,
    )  # alive, an encoder of unit norm, no memory in the optimizer
    for every, steps in ((0, 4), (2, 2)):  # never; and not in the last step, from which it could not settle
        kept = module_of(swap_every=0, revive_every=every, dead_after=10_000, k=0.2)
        trainer_of(tmp_path, Bury(2), max_steps=steps).fit(kept, data_of())
        assert bool(kept.dead()[0, 2])


@pytest.mark.parametrize("coefficient", [0.0, 1 / 32])
def test_auxiliary_loss_gives_the_dead_a_gradient(tmp_path: Path, coefficient: float) -> None:
    sizes: list[Tensor] = []

    def look(module: L3D) -> None:
        sizes.append(
            torch.stack([part.core.grad.flatten(1).abs().sum(1) for part in module.subnetworks.v_in.children()]).sum(0)
        )

    module = module_of(swap_every=0, aux_coefficient=coefficient, k=0.2, k_start=1.0)
    trainer_of(tmp_path, Bury(2), BeforeOptimizer(look), max_steps=1).fit(module, data_of())
    assert (sizes[0] > 0).tolist() == [True, True, coefficient > 0, True]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["training", "validation"])
def test_nan_names_its_batch_and_skip_leaves_the_rest(tmp_path: Path, where: str) -> None:
    x = torch.rand(64, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    bad = x.clone()
    bad[37] = math.nan
    train, val = (bad, x) if where == "training" else (x, bad)
    loaders = DataLoader(train, 16), DataLoader(val, 16)
    # each sample by itself, so that a NaN stays where it is
    settings: dict[str, Any] = {"reference": "contrastive"}
    pairs = [
        DataLoader([{"inputs": row, "contrast": torch.zeros(5)} for row in loader.dataset], 16) for loader in loaders
    ]
    with pytest.raises(
        L3DError,
        match="batch 2: found NaN or infinity in the data; first in the gradient of parameter 'W_in', 1 of 16 samples",
    ):
        trainer_of(tmp_path).fit(module_of(**settings), *pairs)
    module = module_of(bad_samples="skip", **settings)
    trainer_of(tmp_path, max_steps=8).fit(module, *pairs)  # two epochs
    module.ensure_validated()
    assert int(module.skipped_samples) == (2 if where == "training" else 0)
    assert all(parameter.isfinite().all() for parameter in module.subnetworks.parameters())
    assert module.held_out_loss.isfinite().all()
    good = val[val.isfinite().all(1)]
    torch.testing.assert_close(module.mean_reference, tied()(good).mean(0).detach())


def test_nothing_good_to_validate_on_is_one_line(tmp_path: Path) -> None:
    x = torch.rand(32, 5)
    nothing = DataLoader(torch.full((32, 5), math.nan), 16)
    with pytest.raises(L3DError, match="the val set is empty, or none of its samples has a finite gradient"):
        trainer_of(tmp_path, max_epochs=1).fit(module_of(bad_samples="skip"), DataLoader(x, 16), nothing)


def test_nothing_good_to_start_from_is_one_line(tmp_path: Path) -> None:
    nothing = DataLoader(torch.full((32, 5), math.nan), 16)
    with pytest.raises(L3DError, match="none of the first 32 training samples has a finite gradient"):
        trainer_of(tmp_path, max_epochs=1).fit(module_of(bad_samples="skip"), nothing)


class Centred(nn.Sequential):
    """Its output for a sample depends on the others of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize("settings", [{}, {"recipe": "paper"}, {"init": "random", "swap_every": 0, "revive_every": 2}])
def test_a_target_that_mixes_samples_is_refused_however_it_starts(tmp_path: Path, settings: dict[str, Any]) -> None:
    module = module_of(Centred(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5)), **settings)
    with pytest.raises(L3DError, match="must keep samples apart"):
        trainer_of(tmp_path).fit(module, data_of())


def test_a_compiled_target_is_decomposed_as_itself_and_a_compiled_l3d_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"swap_every": 0, "reference": "mean"}
    found = []
    for target in (tied(), torch.compile(tied())):
        module = module_of(target, **settings)
        trainer_of(tmp_path, max_steps=3).fit(module, data_of())
        found.append([parameter.detach() for parameter in module.subnetworks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(L3DError, match="found L3D in torch"):
        trainer_of(tmp_path, max_steps=3).fit(torch.compile(module_of(**settings)), data_of())


def test_compiled_parts_of_a_target_are_decomposed_as_themselves(tmp_path: Path) -> None:
    def parts(target: nn.Sequential) -> nn.Sequential:
        target[0] = torch.compile(target[0])
        target[2].compile()
        return target

    def whole(target: nn.Sequential) -> nn.Sequential:
        target.compile()
        return target

    found = []
    for change in (lambda target: target, parts, whole):
        torch.manual_seed(0)
        target = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5))
        module = module_of(change(target), swap_every=0, reference="mean")
        trainer_of(tmp_path, max_steps=2).fit(module, data_of())
        assert list(module.subnetworks.shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        found.append([module.target_fingerprint, *(p.detach() for p in module.subnetworks.parameters())])
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(other[1:], found[0][1:], strict=True))


def test_v_in_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(L3DError, match="precision: found bf16-true, allowed are 32-true"):
        trainer_of(tmp_path, precision="bf16-true").fit(module_of(), data_of())
