"""Every config that ships runs, and a fit's config and its target's are about the same model and task."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import instantiate_class
from safetensors.torch import load_file
from stand_ins import stand_in_for
from torch import nn

from l3d_pl import L3D
from l3d_pl.cli import DEMO, find_config, main
from l3d_pl.configs_path import shipped_configs
from l3d_pl.report import load_run
from l3d_pl.targets.hub import language_model

NAMES = [str(path.relative_to(shipped_configs()).with_suffix("")) for path in sorted(shipped_configs().rglob("*.yaml"))]
TARGETS = [name for name in NAMES if name.startswith("targets/")]
FITS = [name for name in NAMES if not name.startswith(("targets/", "strategies/"))]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: `seed_everything` leaves it behind
    monkeypatch.setattr("l3d_pl.report.write_report", lambda run_dir: None)  # pictures take longer than the fit


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(find_config(name)).read_text())


def small_data(config: dict[str, Any]) -> list[str]:
    few = {"ToyData": ("n_val", "n_test"), "TextData": ("n_val", "max_sequences")}
    return [
        word
        for key in few.get(config["data"]["class_path"].split(".")[-1], ())
        for word in (f"--data.init_args.{key}", "50")
    ]


FEW = ["--trainer.max_steps", "3", "--trainer.limit_train_batches", "3", "--trainer.enable_progress_bar", "false"]


def recipe_of(fit: dict[str, Any]) -> dict[str, Any]:
    """The config of a fit's target, empty if its target comes from elsewhere."""
    name = fit["model"].get("target_config")
    return read(name) if name else {}


@pytest.mark.parametrize("name", TARGETS)
def test_target_config_trains_and_saves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["target", "--config", name, *FEW, *small_data(read(name))]) == 0
    config = read(name)
    saved = Path("runs/targets", f"{config['model']['name']}_seed{config['seed_everything']}")
    own = instantiate_class((), {"init_args": {}, **config["model"]["model"]}).state_dict()
    if saved.is_dir():
        tensors = language_model(str(saved)).state_dict()
        assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in saved.iterdir()}
        facts = json.loads((saved / "target.json").read_text())
        assert {"loss", "train_loss", "perplexity", "unigram_loss", "bigram_loss", "seconds", "seed"} <= set(facts)
    else:
        saved = saved.with_suffix(".safetensors")
        tensors = load_file(saved)
    assert {key: tensor.shape for key, tensor in tensors.items() if not key.startswith("truth.")} == {
        key: tensor.shape for key, tensor in own.items()
    }
    has_truth = config["data"].get("init_args", {}).get("task") in ("tmcs", "high_rank")
    assert ("truth.A" in tensors) == has_truth
    assert f"target {saved}: " in capsys.readouterr().out


@pytest.mark.parametrize("name", FITS)
def test_fit_config_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(name)
    local = [*stand_in_for(name, config, recipe_of(config), monkeypatch), *small_data(config)]
    enough = ["--model.init_samples", str(config["model"]["n_subnetworks"] + 24), "--model.swap_samples", "64"]
    assert main(["fit", "--config", name, "--trainer.accelerator", "cpu", *FEW, *enough, *local]) == 0
    root = Path(config["trainer"]["default_root_dir"])
    checkpoint = torch.load(root / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert all(
        value.isfinite().all() for key, value in checkpoint["state_dict"].items() if key.startswith("subnetworks.")
    )
    found = load_run(root)
    assert found.n_subnetworks == config["model"]["n_subnetworks"]
    assert 0 < found.figures["val/loss"] < 1000  # after three steps: neighbouring lines still overshoot together
    assert set(found.subnetworks.shapes) == set(parameters_of(name, config))


def parameters_of(name: str, config: dict[str, Any]) -> list[str]:
    """The tensors that a config decomposes, written out."""
    attention = ["k_proj.weight", "v_proj.weight", "q_proj.weight", "out_proj.weight", "out_proj.bias"]
    if name in ("pydoc_lm", "tinystories_8m"):
        return [f"transformer.h.{2 if name == 'pydoc_lm' else 4}.attn.attention.{tensor}" for tensor in attention]
    if name == "mobilenet_v3_small":
        layers = ["0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"]
        convolutions = ["0.0", "1.0", "3.0"]
        return [f"features.7.block.{layer}.weight" for layer in layers] + [
            f"features.7.block.{layer}.bias" for layer in layers if layer not in convolutions
        ]
    if name == "digits_cnn":
        return ["conv2.weight", *(f"{layer}.{what}" for layer in ("bn2", "fc1", "fc2") for what in ("weight", "bias"))]
    target = instantiate_class((), {"init_args": {}, **config["model"]["target"]})
    return [key for key, _ in target.named_parameters()]


def test_demo_runs_short_versions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(DEMO) == {"tms", "digits_cnn", "pydoc_lm"}
    for name, short in list(DEMO.items()):
        Path(name).mkdir()  # each has its own target
        monkeypatch.chdir(name)
        local = stand_in_for(name, read(name), recipe_of(read(name)), monkeypatch)
        monkeypatch.chdir("..")
        local = [f"{name}/{word}" if word.startswith("target") else word for word in local]
        enough = ["--model.init_samples", "124", "--model.swap_samples", "64"]
        monkeypatch.setitem(DEMO, name, [*short, *local, *small_data(read(name)), *FEW, *enough])
    shown: list[list[str]] = []
    monkeypatch.setattr("l3d_pl.cli.atlas_command", shown.append)
    assert main(["demo", "--root", "runs/short"]) == 0
    assert shown == [[f"runs/short/{name}"] for name in DEMO]
    out = capsys.readouterr().out
    for name in DEMO:
        assert re.search(rf"^{name}: \d+ subnetworks", out, re.MULTILINE)
        assert Path("runs/short", name, "decomposition/model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in FITS if "target_config" in read(name)["model"]])
def test_fit_and_its_target_are_about_the_same_model_and_task(name: str) -> None:
    fit = read(name)
    recipe = recipe_of(fit)
    trained = f"runs/targets/{recipe['model']['name']}_seed{recipe['seed_everything']}"
    assert fit["data"]["class_path"] == recipe["data"]["class_path"]
    data = [{"group_size": 1, **config["data"]["init_args"]} for config in (fit, recipe)]
    assert fit["trainer"]["default_root_dir"] == f"runs/{name}"
    assert fit["model"]["recipe"] == ("paper" if name.startswith("paper/") else "l3d_pl")
    if name == "pydoc_lm":
        assert fit["model"]["target"]["init_args"]["pretrained"] == data[0]["tokenizer"] == trained
        assert data[0]["source"] == data[1]["source"]
        assert data[0]["length"] <= recipe["model"]["model"]["init_args"]["context"]
        return
    assert fit["model"]["target_weights"] == f"{trained}.safetensors"
    mine, theirs = (
        instantiate_class((), {"init_args": {}, **target})
        for target in (fit["model"]["target"], recipe["model"]["model"])
    )
    assert type(mine) is type(theirs)
    assert {key: tensor.shape for key, tensor in mine.state_dict().items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }
    for key in ("task", "n_features", "probability", "group_size"):
        assert data[0].get(key) == data[1].get(key), key


@pytest.mark.parametrize("name", ["tinystories_8m", "mobilenet_v3_small"])
def test_published_settings(name: str) -> None:
    """100 subnetworks, a tenth kept, 10,000 inputs; 100 epochs, lr 0.005 x 0.8 per 10, ten without sparsity."""
    config = read(name)
    model, data = config["model"], config["data"]["init_args"]
    assert (model["n_subnetworks"], model["k"], model["recipe"]) == (100, 0.1, "paper")
    assert (model["lr"], model["lr_gamma"], model["lr_step_epochs"], model["dense_epochs"]) == (0.005, 0.8, 10, 10)
    assert (config["trainer"]["max_epochs"], data["max_rows"]) == (100, 10000)
    L3D(nn.Linear(3, 3), **{key: value for key, value in model.items() if key not in ("target", "parameters", "ranks")})
    if name == "tinystories_8m":
        assert (model["sample"], data["length"], data["batch_size"], data["mode"]) == ("token", 16, 16, "rows")
        assert model["ranks"] == {"*.weight": [25, 25], "*.bias": [25]}
    else:
        assert (data["size"], model["ranks"]) == (224, 0.1)


def test_every_toy_has_both_recipes() -> None:
    toys = {name for name in FITS if "/" not in name and read(name)["data"]["class_path"].endswith("ToyData")}
    assert toys == {"tms", "tms_40_10", "tmcs", "high_rank_30", "high_rank_25", "squared"}
    assert {name.removeprefix("paper/") for name in FITS if "/" in name} == toys
    trained = toys | {"digits_cnn", "pydoc_lm", "pydoc_llama"}
    assert {name.removeprefix("targets/") for name in TARGETS if "/paper/" not in name} == trained
    assert {name.removeprefix("targets/paper/") for name in TARGETS if "/paper/" in name} == toys
