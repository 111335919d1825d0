"""Images and their labels, decoded, resized and normalised with Pillow alone."""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.files import FileData
from datamodules.loading import Batch, require_at_least, require_choice
from datamodules.records import BadRecord, Files, Record, Unfit, class_of, column_of

Interpolation = Literal["nearest", "bilinear", "bicubic"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageRows(Dataset[Batch]):
    """Encoded images in a store, indexed by a whole batch of row numbers; see `ImageData` for the batches.

    Args:
        folder: the store: `images.bin`, all files one after another; `ends.bin` int64 [rows], where each ends;
            `labels.bin` int64 [rows].
        data: says how to decode.
    """

    def __init__(self, folder: Path, data: "ImageData") -> None:
        self.folder = folder
        self.data = data
        self.ends = np.fromfile(folder / "ends.bin", np.int64)
        self.labels = np.fromfile(folder / "labels.bin", np.int64)
        self.images = np.memmap(folder / "images.bin", np.uint8, "r")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.data)  # a worker maps the file itself

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: Tensor) -> Batch:
        starts = [0 if row == 0 else self.ends[row - 1] for row in rows.tolist()]
        labels = self.labels[rows.numpy()].tolist()
        files = [self.images[a:b].tobytes() for a, b in zip(starts, self.ends[rows.numpy()], strict=True)]
        return self.data.batch([self.data.decode(content) for content in zip(files, labels, strict=True)], labels)


class ImageData(FileData):
    """Images; batches `{"inputs": float32 [N, C, H, W], "labels": int64 [N]}`, without labels if there are none.

    An image is decoded, resized so that its shorter side is `resize`, cut to `size` x `size` at its centre, scaled to
    [0, 1] and normalised per channel.

    Args:
        source: see `FileData`; `digits` are scikit-learn's, and need no network.
        image: which column holds the encoded image (in a tar shard: extension; fixed in a folder of images).
        label: which column holds its class; None: there are no labels. In a folder of images that is the directory.
        classes: names of the classes, where labels are names; None: the directories' in a folder of images.
        size: height and width, H and W.
        resize: the shorter side before cutting; None: `size`.
        mean, std: of each channel; three of them make RGB images, one makes grey ones. The default is ImageNet's.
        interpolation: `nearest`, `bilinear` or `bicubic`.
        input_key: what the images are called in a batch, such as `pixel_values`.
        **options: those of `FileData`.

    Raises:
        ValueError: one line; see `FileData`.
    """

    def __init__(
        self,
        source: Files,
        image: str = "image",
        label: str | None = "label",
        classes: list[str] | None = None,
        size: int = 224,
        resize: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        interpolation: Interpolation = "bilinear",
        input_key: str = "inputs",
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        require_at_least(1, size=size)
        require_at_least(size, resize=size if resize is None else resize)
        require_choice("interpolation", interpolation, get_args(Interpolation))
        if len(mean) not in (1, 3) or len(std) != len(mean) or min(std) <= 0:
            raise ValueError(f"mean, std: found {mean} and {std}, allowed are 1 or 3 numbers each, std above 0")
        if input_key == "labels":
            raise ValueError("input_key: found 'labels', which is what labels are called")
        self.columns = (image,) if label is None else (image, label)
        self.classes = classes
        self.size = size
        self.resize = size if resize is None else resize
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]
        self.interpolation = Image.Resampling[interpolation.upper()]
        self.input_key = input_key

    def find(self) -> None:
        super().find()
        source = self._sources["train"]
        if source.format == "imagefolder" and self.classes is None:
            self.classes = sorted({class_of(file) for file in source.files})

    def parse(self, record: Record) -> tuple[tuple[bytes, int], bytes]:
        image = column_of(record, self.columns[0])
        image = image.get("bytes") if isinstance(image, dict) else image  # as `datasets` writes them
        if not isinstance(image, bytes):
            raise Unfit(f"{self.columns[0]} holds no encoded image but a {type(image).__name__}")
        label = -1 if len(self.columns) == 1 else self._label(column_of(record, self.columns[1]))
        return (image, label), image

    def _label(self, label: Any) -> int:
        label = label.decode(errors="replace").strip() if isinstance(label, bytes) else label
        if self.classes is not None and not isinstance(label, int):
            if label not in self.classes:
                raise Unfit(f"label {label!r} is not among the {len(self.classes)} classes")
            return self.classes.index(label)
        try:
            return int(label) if isinstance(label, int | str) else int("")
        except ValueError:
            raise Unfit(f"label {label!r} is no whole number, and `classes` names none") from None

    def examine(self, content: tuple[bytes, int]) -> Image.Image:
        """The image, decoded to its last byte. Raises `Unfit`."""
        try:
            with Image.open(io.BytesIO(content[0])) as opened:
                return opened.convert("RGB" if len(self.mean) == 3 else "L")
        except Exception as error:  # damage can make Pillow raise nearly anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Unfit(f"no image that can be decoded ({reason})") from None

    def decode(self, content: tuple[bytes, int]) -> Tensor:
        """The image as a batch has it but for the normalisation, uint8 [C, H, W]. Raises `Unfit`."""
        image = self.examine(content)
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(scale * side)) for side in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), self.interpolation)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = np.array(image.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(pixels).reshape(self.size, self.size, -1).permute(2, 0, 1)

    def batch(self, images: list[Tensor], labels: list[int]) -> Batch:
        inputs = {self.input_key: torch.stack(images).float().sub_(255 * self.mean).div_(255 * self.std)}
        return inputs if len(self.columns) == 1 else {**inputs, "labels": torch.tensor(labels)}

    def write(self, folder: Path, contents: Iterator[tuple[bytes, int]], limit: int | None) -> int:
        ends, labels = [0], list[int]()
        with open(folder / "images.bin", "wb") as images:
            for file, label in islice(contents, limit):
                images.write(file)
                ends.append(ends[-1] + len(file))
                labels.append(label)
        np.array(ends[1:], np.int64).tofile(folder / "ends.bin")
        np.array(labels, np.int64).tofile(folder / "labels.bin")
        return len(labels)

    def open(self, folder: Path) -> ImageRows:
        return ImageRows(folder, self)

    def collate(self, samples: list[Any]) -> tuple[Batch | None, list[BadRecord]]:
        images, labels, bad = list[Tensor](), list[int](), list[BadRecord]()
        for content, name, row in samples:
            try:
                images.append(self.decode(content))
                labels.append(content[1])
            except Unfit as unfit:
                bad.append(BadRecord(name, row, str(unfit)))
        return (self.batch(images, labels) if images else None), bad
