"""Short fits in float32 under several strategies: `deepspeed_run.py OUT RANKS STRATEGY,STRATEGY,... [gpu|short]`.

The global batch, 16 samples, is the same on any number of ranks, and so is the reference (the batch's mean) of the case
"everything", with all that writes to V. DeepSpeed's runs write a checkpoint at step `SAVED` and go on; what resumes
from it is kept as "resumed", and as "elsewhere" what resumes from OUT.ckpt, where another run has left one. `short` is
"everything" and "resumed" alone.
"""

import gc
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.loading import InMemoryData, Rows
from l3d_pl import L3D
from l3d_pl.checkpoints import AtomicCheckpointIO
from l3d_pl.parallel import Ranks
from l3d_pl.targets.toy import Autoencoder
from l3d_pl.toys import quiet_trainer

SAVED = 13
ACCELERATOR = "gpu" if "gpu" in sys.argv[4:5] else "cpu"
LINEAR = torch.nn.functional.linear
CASES: dict[str, dict[str, Any]] = {
    "everything": {
        "swap_every": 4,
        "revive_every": 5,
        "aux_coefficient": 0.1,
        "dead_after": 20,
        "trainer": {"max_epochs": 6},
    },
    # 5 batches an epoch: the last one is stepped on alone.
    "accumulated": {
        "reference": "random",
        "swap_every": 0,
        "weight_decay": 0.1,
        "lr_schedule": "step",
        "lr_step_epochs": 2,
        "trainer": {"max_epochs": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    },
    "memory": {"n_subnetworks": 4000, "init": "random", "swap_every": 0, "trainer": {"max_steps": 3}},
}


class Data(InMemoryData):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, seed=3)

    def setup(self, stage: str | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        rows = torch.rand(112, 10, generator=random)
        rows *= torch.rand(112, 10, generator=random) < 0.2
        rows[:, 0] += 0.01
        self.train, self.validation, self.test = Rows(inputs=rows[:80]), Rows(inputs=rows[80:]), Rows(inputs=rows[80:])


class Watch(Callback):
    """The losses of all steps; the bytes held after the last of `max_steps`; one checkpoint, at `SAVED`."""

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.losses: list[float] = []
        self.bytes_held, self.checkpoint = 0, checkpoint

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach())))
        if self.checkpoint is not None and trainer.global_step == SAVED:
            trainer.save_checkpoint(self.checkpoint)
        if trainer.max_steps == trainer.global_step:
            self.bytes_held = bytes_held()


def bytes_held() -> int:
    """Of all tensors that there are."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def module(**settings: Any) -> L3D:
    torch.manual_seed(1)
    target = Autoencoder(10, 5)
    options: dict[str, Any] = {
        "n_subnetworks": 7,
        "ranks": 2,
        "k": 0.2,
        "reference": "mean",
        "init_samples": 40,
        "swap_samples": 40,
        "seed": 0,
    }
    return L3D(target, **(options | settings))


def trainer_of(strategy: str, n_ranks: int, **settings: Any) -> L.Trainer:
    return quiet_trainer(
        devices=n_ranks,
        strategy=strategy,
        accelerator="cpu" if strategy == "auto" else ACCELERATOR,
        plugins=[AtomicCheckpointIO()],
        **settings,
    )


def fit(strategy: str, n_ranks: int, case: str, write: Path | None = None, read: Path | None = None) -> dict[str, Any]:
    """What a fit has found: its losses, V as dense directions [side, n_v, values], the buffers."""
    settings = dict(CASES[case])
    watch, before = Watch(write), bytes_held()
    trainer = trainer_of(strategy, n_ranks, callbacks=[watch], **settings.pop("trainer"))
    found = module(**settings)
    trainer.fit(found, Data(16 // n_ranks), ckpt_path=read)
    assert torch.nn.functional.linear is LINEAR  # what rules watch
    result: dict[str, Any] = {"losses": watch.losses, "bytes_held": watch.bytes_held - before}
    result["values"] = sum(parameter.numel() for parameter in found.parameters())
    if case != "memory":
        sides = [[found.subnetworks.direction(k, side=side) for k in range(7)] for side in ("in", "out")]
        flat = [[torch.cat([part.flatten() for part in direction.values()]) for direction in side] for side in sides]
        result["directions"] = torch.stack([torch.stack(side) for side in flat]).detach()
        result["buffers"] = {name: value.clone() for name, value in found.named_buffers() if "metric" not in name}
        everywhere = Ranks.of_run().gather(result["directions"])
        assert all(torch.equal(directions, everywhere[0]) for directions in everywhere)
    if write is not None and strategy != "ddp":
        again = module(**settings)
        evaluation = trainer_of(strategy, n_ranks)
        (figures,) = evaluation.validate(again, Data(16 // n_ranks), ckpt_path=write, verbose=False)
        result["validated"] = figures["val/loss"]
    return result


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out, ranks, strategies = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
    short = "short" in sys.argv[4:5]
    cases = ["everything"] if short else list(CASES)
    found = {}
    for strategy in strategies:
        saved = out.with_suffix(f".{strategy}")
        results = {case: fit(strategy, ranks, case, saved if case == "everything" else None) for case in cases}
        if strategy != "ddp":
            results["resumed"] = fit(strategy, ranks, "everything", read=saved)
            if not short and out.with_suffix(".ckpt").exists():
                results["elsewhere"] = fit(strategy, ranks, "everything", read=out.with_suffix(".ckpt"))
        found[strategy] = results
    if Ranks.of_run().rank == 0:
        torch.save(found, out)
