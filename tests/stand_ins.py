"""Local stand-ins, same architecture and format, for what the shipped configs train first or fetch from the hub."""

import enum
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import instantiate_class
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from datamodules.text import pydoc_tokenizer
from l3d_pl.targets.language import gpt_neo
from l3d_pl.targets.training import save_pretrained_target, save_target


def stand_in_for(
    name: str, config: dict[str, Any], recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Write small files into the working directory; the arguments that put them into the config `name`.

    Args:
        name: of a shipped config.
        config: what it says.
        recipe: of its target, if it has one.
    """
    torch.manual_seed(0)
    if name == "tinystories_8m":
        return stories()
    if name == "mobilenet_v3_small":
        return photographs(monkeypatch)
    if name == "pydoc_lm":
        init = recipe["model"]["model"]["init_args"]
        language_model_in("target", **init)
        return ["--model.target.init_args.pretrained", "target", "--data.init_args.tokenizer", "target"]
    target = instantiate_class((), {"init_args": {}, **config["model"]["target"]})
    truth = getattr(instantiate_class((), config["data"]), "ground_truth", dict)()
    save_target("target.safetensors", target, truth)
    return ["--model.target_weights", "target.safetensors"]


def language_model_in(folder: str, vocabulary: int = 500, **settings: Any) -> nn.Module:
    """A GPT-Neo with random weights, and a tokenizer of its vocabulary, in Hugging Face format."""
    model = gpt_neo(vocabulary=vocabulary, **settings)
    save_pretrained_target(folder, model, AutoTokenizer.from_pretrained(pydoc_tokenizer(vocabulary)))
    return model


def stories() -> list[str]:
    """TinyStories-8M's shape with a small vocabulary, and texts, one per line of a file."""
    language_model_in("stories_lm", width=256, layers=8, heads=16, context=64)
    words = ("once", "there", "was", "a", "little", "cat", "who", "liked", "the", "warm", "mat", "and", "birds")
    generator = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(generator.choice(words, 30))}) for _ in range(80)]
    Path("stories.jsonl").write_text("\n".join(lines))
    return [
        *("--model.target.init_args.pretrained", "stories_lm", "--data.init_args.tokenizer", "stories_lm"),
        *("--data.init_args.source", "stories.jsonl"),
    ]


class Block(nn.Module):
    """`features.7` of torchvision's mobilenet_v3_small: the same layers, names and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            self.layer(40, 120, 1, nn.Hardswish(inplace=True)),
            self.layer(120, 120, 5, nn.Hardswish(inplace=True), groups=120),
            SqueezeExcitation(120, 32),
            self.layer(120, 48, 1),
        )

    @staticmethod
    def layer(channels: int, out: int, kernel: int, *activation: nn.Module, groups: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out, eps=0.001), *activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.hardsigmoid(self.fc2(nn.functional.relu(self.fc1(self.avgpool(x)))))


class MobileNet(nn.Module):
    """Images [N, 3, H, W] -> logits [N, 10]: a stem in place of the first blocks, and no blocks after `features.7`."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 40, 8, stride=8), nn.BatchNorm2d(40), nn.Hardswish())
        self.features = nn.Sequential(stem, *(nn.Identity() for _ in range(6)), Block())
        self.classifier = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def photographs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A torchvision with nothing but that network, and CIFAR-100's parquet format with random pictures."""

    class Weights(enum.Enum):
        DEFAULT = "url"

        def get_state_dict(self, **options: Any) -> dict[str, Tensor]:
            return MobileNet().state_dict()

    models = types.SimpleNamespace(
        list_models=lambda: ["mobilenet_v3_small"],
        get_model=lambda name, weights: MobileNet(),
        get_model_weights=lambda name: Weights,
    )
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    generator = np.random.default_rng(0)
    for split, n in (("train", 96), ("test", 40)):
        rows = {"img": [], "fine_label": [], "coarse_label": []}
        for _ in range(n):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (32, 32, 3), np.uint8)).save(file, "png")
            rows["img"].append({"bytes": file.getvalue(), "path": None})
            rows["fine_label"].append(int(generator.integers(100)))
            rows["coarse_label"].append(int(generator.integers(20)))
        datasets.Dataset.from_dict(rows).to_parquet(f"{split}.parquet")
    return [
        *("--data.init_args.source", '{"train": "train.parquet", "test": "test.parquet"}'),
        *("--data.init_args.size", "64"),
    ]
