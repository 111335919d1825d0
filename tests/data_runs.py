"""Fits of a module that only notes what it is given, on text and on images: in this process, or as a script on ranks.

`python data_runs.py FOLDER` is one rank of two; torchrun's variables say which.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from datamodules.images import ImageData
from datamodules.loading import Batch
from datamodules.text import TextData

STEPS = 13  # more than an epoch, and more than a pass over a stream
CASES = {f"{kind} {how}": (kind, how == "streamed") for kind in ("text", "images") for how in ("stored", "streamed")}


def png(number: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_sources(folder: Path) -> None:
    """Uneven shards, with bad records among the good ones; a pass over them is less than STEPS batches of 8.

    The last batch of an epoch is two rows per rank or more: fewer would join the batch before, on two ranks only.
    """
    folder.mkdir(exist_ok=True)
    first = 0
    for shard, size in enumerate((24, 9, 10)):
        lines = [json.dumps({"text": f"{n} is the number of this story. " * 3}) for n in range(first, first + size)]
        lines.insert(4, "no story")
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
        images = [{"img": {"bytes": png(n), "path": None}, "fine_label": n} for n in range(first, first + size)]
        images.insert(3, {"img": {"bytes": png(0)[:60], "path": None}, "fine_label": 1000 + shard})
        pq.write_table(pa.Table.from_pylist(images), folder / f"{shard}.parquet")
        first += size


def data_of(case: str, folder: Path, batch_size: int = 8, num_workers: int = 0) -> TextData | ImageData:
    kind, streaming = CASES[case]
    options: dict[str, Any] = {"cache_dir": folder / "cache", "seed": 3, "n_val": 4, "max_bad_fraction": 0.2}
    options |= {"batch_size": batch_size, "num_workers": num_workers, "streaming": streaming}
    options |= {"steps_per_epoch": 5, "shuffle_buffer": 7} if streaming else {}
    if kind == "text":
        return TextData(str(folder / "*.jsonl"), length=16, **options)
    return ImageData(str(folder / "*.parquet"), "img", "fine_label", size=8, **options)


class Recorder(LightningModule):
    """Keeps the samples it is given: tokens of a sequence, labels of images."""

    def __init__(self, checkpoints: Path | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[Any]] = []
        self.checkpoints = checkpoints

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((batch["input_ids"] if "input_ids" in batch else batch["labels"]).tolist())
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAlways(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, module: Recorder, *_: Any) -> None:  # type: ignore[override]
        trainer.save_checkpoint(self.folder / f"{len(module.seen)}.ckpt")


def fit(module_data: Any, save: Path | None = None, resume: Path | None = None, **options: Any) -> list[list[Any]]:
    """What a fit of STEPS steps is given, batch by batch; with `resume`, from there on."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[] if save is None else [SaveAlways(save)],
        **options,
    )
    module = Recorder()
    trainer.fit(module, datamodule=module_data, ckpt_path=resume, weights_only=True)
    return module.seen


def main(folder: Path) -> None:
    results: dict[str, list[list[Any]]] = {}
    for case in CASES:
        save = folder / case
        results[case] = fit(data_of(case, folder, 4, 1), save, strategy="ddp", devices=2)
        for stop in (3, 5, 9):
            torch.manual_seed(stop)
            resumed = fit(data_of(case, folder, 4, 1), resume=save / f"{stop}.ckpt", strategy="ddp", devices=2)
            results[f"{case} {stop}"] = resumed
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
