"""Every config that ships runs, and a fit's config and its target's are about the same model and task."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import instantiate_class
from safetensors.torch import load_file

from l3d_pl import Decomposition
from l3d_pl.cli import find_config, main
from l3d_pl.configs_path import shipped_configs
from l3d_pl.targets.training import save_target

NAMES = [str(path.relative_to(shipped_configs()).with_suffix("")) for path in sorted(shipped_configs().rglob("*.yaml"))]
TARGETS = [name for name in NAMES if name.startswith("targets/")]
FITS = [name for name in NAMES if name not in TARGETS]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: `seed_everything` leaves it behind
    monkeypatch.setattr("l3d_pl.report.write_report", lambda run_dir: None)  # pictures take longer than the fit


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(find_config(name)).read_text())


def small_data(config: dict[str, Any]) -> list[str]:
    if not config["data"]["class_path"].endswith("ToyData"):
        return []
    return ["--data.init_args.n_val", "50", "--data.init_args.n_test", "50"]


@pytest.mark.parametrize("name", TARGETS)
def test_target_config_trains_and_saves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--trainer.max_steps", "3", "--trainer.limit_train_batches", "3", "--trainer.enable_progress_bar", "false"]
    assert main(["target", "--config", name, *few, *small_data(read(name))]) == 0
    config = read(name)
    file = Path("runs/targets", f"{config['model']['name']}_seed{config['seed_everything']}.safetensors")
    assert file.is_file()
    own = instantiate_class((), {"init_args": {}, **config["model"]["model"]}).state_dict()
    saved = load_file(file)
    assert {key: tensor.shape for key, tensor in saved.items() if not key.startswith("truth.")} == {
        key: tensor.shape for key, tensor in own.items()
    }
    has_truth = config["data"].get("init_args", {}).get("task") in ("tmcs", "high_rank")
    assert ("truth.A" in saved) == has_truth
    assert capsys.readouterr().out.startswith(f"target {file}: ")


@pytest.mark.parametrize("name", FITS)
def test_fit_config_runs(name: str) -> None:
    config = read(name)
    torch.manual_seed(0)
    target = instantiate_class((), {"init_args": {}, **config["model"]["target"]})
    truth = getattr(instantiate_class((), config["data"]), "ground_truth", dict)()
    save_target("target.safetensors", target, truth)
    few = ["--trainer.max_steps", "3", "--trainer.limit_train_batches", "3", "--trainer.enable_progress_bar", "false"]
    few += ["--model.init_samples", "64", "--model.target_weights", "target.safetensors"]
    assert main(["fit", "--config", name, *few, *small_data(config)]) == 0
    root = Path(config["trainer"]["default_root_dir"])
    checkpoint = torch.load(root / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert all(
        value.isfinite().all() for key, value in checkpoint["state_dict"].items() if key.startswith("subnetworks.")
    )
    found = Decomposition.from_pretrained(root / "decomposition", target=target)
    assert found.n_subnetworks == config["model"]["n_subnetworks"]
    assert 0 < found.figures["val/loss"] < 10


@pytest.mark.parametrize("name", FITS)
def test_fit_and_its_target_are_about_the_same_model_and_task(name: str) -> None:
    fit = read(name)
    recipe = read(fit["model"]["target_config"])
    assert (
        fit["model"]["target_weights"]
        == f"runs/targets/{recipe['model']['name']}_seed{recipe['seed_everything']}.safetensors"
    )
    mine, theirs = (
        instantiate_class((), {"init_args": {}, **target})
        for target in (fit["model"]["target"], recipe["model"]["model"])
    )
    assert type(mine) is type(theirs)
    assert {key: tensor.shape for key, tensor in mine.state_dict().items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }
    assert fit["data"]["class_path"] == recipe["data"]["class_path"]
    data = [{"group_size": 1, **config["data"]["init_args"]} for config in (fit, recipe)]
    for key in ("task", "n_features", "probability", "group_size"):
        assert data[0].get(key) == data[1].get(key), key
    assert fit["trainer"]["default_root_dir"] == f"runs/{name}"
    assert fit["model"]["recipe"] == ("paper" if name.startswith("paper/") else "l3d_pl")


def test_every_toy_has_both_recipes() -> None:
    toys = {name for name in FITS if "/" not in name} - {"digits_cnn"}
    assert toys == {"tms", "tms_40_10", "tmcs", "high_rank_30", "high_rank_25", "squared"}
    assert {name.removeprefix("paper/") for name in FITS if "/" in name} == toys
    assert {name.removeprefix("targets/") for name in TARGETS if "/paper/" not in name} == toys | {"digits_cnn"}
    assert {name.removeprefix("targets/paper/") for name in TARGETS if "/paper/" in name} == toys
