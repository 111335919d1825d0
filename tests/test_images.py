"""Images: what is decoded, cut and normalised, labels of every kind, and those that are damaged."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_runs import png
from PIL import Image
from sklearn.datasets import load_digits

from datamodules.images import IMAGENET_MEAN, IMAGENET_STD, ImageData
from datamodules.loading import Batch


def image_data(*arguments: Any, **options: Any) -> ImageData:
    data = ImageData(*arguments, **{"val_fraction": 0.0, "seed": 0, "shuffle": False, "size": 8, **options})
    data.setup()
    return data


def everything(loader: Any) -> Batch:
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def pixels(file: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1)


@pytest.fixture
def cifar(tmp_path: Path) -> str:
    """A directory in the format of uoft-cs/cifar100."""
    for split, first, size in (("train", 0, 40), ("test", 1000, 12)):
        rows = [
            {"img": {"bytes": png(n, 32), "path": None}, "fine_label": n % 100, "coarse_label": n % 20}
            for n in range(first, first + size)
        ]
        (tmp_path / "cifar100").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"cifar100/{split}-00000-of-00001.parquet")
    return str(tmp_path / "cifar100")


@pytest.mark.parametrize("streaming", [False, True])
def test_cifar_at_224(cifar: str, tmp_path: Path, streaming: bool) -> None:
    options: dict[str, Any] = {"streaming": True, "steps_per_epoch": 5} if streaming else {}
    data = image_data(
        cifar, "img", "fine_label", val_split="test", size=224, batch_size=8, cache_dir=tmp_path, **options
    )
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert len(loader) == 5
    assert batch["inputs"].shape == (8, 3, 224, 224)
    assert batch["inputs"].dtype == torch.float32
    assert batch["labels"].tolist() == list(range(8))
    assert batch["labels"].dtype == torch.int64
    for n in range(3):
        resized = Image.open(io.BytesIO(png(n, 32))).resize((224, 224), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
        expected = (expected - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        assert torch.allclose(batch["inputs"][n], expected, atol=1e-6)
    assert everything(data.val_dataloader())["labels"].tolist() == [n % 100 for n in range(1000, 1012)]


def test_cutting_and_channels(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    gradient = np.arange(40, dtype=np.uint8)[None, :].repeat(20, 0)  # 20 high, 40 wide
    Image.fromarray(gradient).save(folder / "wide.png")
    Image.fromarray(gradient.T.copy()).save(folder / "zhigh.png")
    options: dict[str, Any] = {"cache_dir": tmp_path, "mean": (0.0,), "std": (1 / 255,), "label": None}
    batch = everything(image_data(str(folder.parent), size=10, resize=20, **options).train_dataloader())
    assert list(batch) == ["inputs"]
    expected = torch.arange(15, 25).float().expand(10, 10)
    wide, high = (0, 1) if batch["inputs"][0, 0, 0, 0] == batch["inputs"][0, 0, 1, 0] else (1, 0)
    assert torch.allclose(batch["inputs"][wide, 0], expected)
    assert torch.allclose(batch["inputs"][high, 0], expected.T)
    small = everything(image_data(str(folder.parent), size=10, **options).train_dataloader())["inputs"][wide, 0]
    assert small[0].diff().gt(1).all()  # the whole height, so twice as wide steps
    rgb = image_data(str(folder.parent), size=20, input_key="pixel_values", cache_dir=tmp_path, mean=(0, 0, 0))
    batch = everything(rgb.train_dataloader())
    assert batch["pixel_values"].shape == (2, 3, 20, 20)
    assert batch["labels"].tolist() == [0, 0]


def test_folder_of_images_and_its_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("bird", "cat", "dog")):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for n in range(4):
                (folder / f"{n}.png").write_bytes(png(10 * label + n))
    (tmp_path / "animals/train/cat/3.png").write_bytes(png(13)[:90])
    options: dict[str, Any] = {"max_bad_fraction": 0.1, "cache_dir": tmp_path}
    with pytest.warns(UserWarning, match="found 1 bad .*cat/3.png, row 0: no image that can be decoded"):
        data = image_data(str(tmp_path / "animals"), test_split="test", **options)
    assert data.classes == ["bird", "cat", "dog"]
    batch = everything(data.train_dataloader())
    expected = {n: (pixels(png(n)) / 255 - data.mean) / data.std for n in (0, 1, 2, 3, 10, 11, 12, 20, 21, 22, 23)}
    found = [min(expected, key=lambda n: float((expected[n] - image).abs().max())) for image in batch["inputs"]]
    assert sorted(found) == sorted(expected)
    assert all(torch.allclose(expected[n], image, atol=1e-6) for n, image in zip(found, batch["inputs"], strict=True))
    assert batch["labels"].tolist() == [n // 10 for n in found]
    assert len({n // 10 for n in found[:5]}) > 1  # the first ones are of several classes
    assert sorted(everything(data.test_dataloader())["labels"].tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.warns(UserWarning, match="found 1 bad"):
        again = image_data(str(tmp_path / "animals/train/*/*.png"), **options)
    assert torch.equal(everything(again.train_dataloader())["inputs"], batch["inputs"])


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards_with_damage(tmp_path: Path, streaming: bool) -> None:
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for n in range(10 * shard, 10 * shard + 10):
                for extension, content in (("png", png(n)), ("cls", str(n).encode()), ("json", b"{}")):
                    if n != 14 or extension != "cls":
                        member = tarfile.TarInfo(f"{n:04}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    content = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(content[: content.index(b"0027.png") + 600])
    options: dict[str, Any] = {"streaming": True, "steps_per_epoch": 13} if streaming else {}
    options |= {"max_bad_fraction": 0.4, "batch_size": 4, "shuffle": True}
    data = image_data(str(tmp_path / "*.tar"), "png", "cls", cache_dir=tmp_path, **options) if streaming else None
    if data is None:
        with pytest.warns(UserWarning, match="found 2 bad"):
            data = image_data(str(tmp_path / "*.tar"), "png", "cls", cache_dir=tmp_path, **options)
    labels = everything(data.train_dataloader())["labels"].tolist()
    good = [*range(14), *range(15, 27)]
    assert sorted(labels[:26]) == good
    assert not streaming or sorted(labels[26:]) == good
    assert sorted((Path(bad.file).name, bad.row, bad.reason[:19]) for bad in data.bad_records) == [
        ("1.tar", 4, "no column 'cls', on"),
        ("2.tar", 7, "the file breaks off"),
    ]
    options["max_bad_fraction"] = 0.1
    with pytest.raises(ValueError, match=r"max_bad_fraction: found \d bad"):
        everything(image_data(str(tmp_path / "*.tar"), "png", "cls", cache_dir=tmp_path, **options).train_dataloader())


def test_labels_of_other_kinds(tmp_path: Path) -> None:
    def labels(values: list[Any], **options: Any) -> list[int]:
        rows = [{"image": png(n), "label": value} for n, value in enumerate(values)]
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        data = image_data(str(file), cache_dir=tmp_path, **options)
        return everything(data.train_dataloader())["labels"].tolist()

    assert labels([3, 1]) == [3, 1]
    assert labels(["3", "1"]) == [3, 1]
    assert labels(["dog", "cat"], classes=["cat", "dog"]) == [1, 0]
    for values, options, message in (
        (["dog"], {}, "label 'dog' is no whole number, and `classes` names none"),
        (["cow"], {"classes": ["cat", "dog"]}, "label 'cow' is not among the 2 classes"),
        ([0.5], {}, "label 0.5 is no whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            labels(values, **options)


def test_digits_need_no_network(tmp_path: Path) -> None:
    data = image_data("digits", mean=(0.0,), std=(1 / 16,), val_fraction=0.2, n_val=None, cache_dir=tmp_path)
    batch = everything(data.train_dataloader())
    n = len(batch["labels"])
    assert 1350 < n < 1530
    assert n + len(data.validation) == 1797  # type: ignore[arg-type]
    digits = load_digits()
    # the grey levels are rounded to 255 of them
    distance = torch.cdist(batch["inputs"].flatten(1), torch.from_numpy(digits.data).float())
    nearest = distance.min(1)
    assert nearest.values.max() < 0.3
    assert torch.equal(torch.from_numpy(digits.target)[nearest.indices], batch["labels"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: found 0"),
        ({"size": 8, "resize": 7}, "resize: found 7, allowed are whole numbers >= 8"),
        ({"interpolation": "linear"}, "interpolation: found 'linear', allowed are .*; did you mean 'bilinear'"),
        ({"mean": (0.5, 0.5)}, r"mean, std: found \(0.5, 0.5\) and"),
        ({"std": (1.0, 1.0, 0.0)}, "mean, std: found"),
        ({"input_key": "labels"}, "input_key: found 'labels'"),
    ],
)
def test_bad_options_give_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_data("digits", **options)


def test_no_column_of_that_name(cifar: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'imgs', only fine_label") as error:
        image_data(cifar, "imgs", "fine_label", cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).count("row ") == 3  # the first ones are named
