"""The command line: bad input is one line and exit code 2; what works from a config works from a user's own files."""

import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file

from l3d_pl import Decomposition, Subnetworks, __version__
from l3d_pl.analysis.runs import settings_of
from l3d_pl.cli import bad_input_in, find_config, main
from l3d_pl.configs_path import shipped_configs
from l3d_pl.errors import L3DError
from l3d_pl.gradients import GradientExtractor
from l3d_pl.lightning_cli import L3DCLI, brief
from l3d_pl.targets.toy import Autoencoder, TiedAutoencoder
from l3d_pl.targets.training import save_target

FIT_CONFIGS = [
    str(path.relative_to(shipped_configs()).with_suffix("")) for path in sorted(shipped_configs().rglob("*.yaml"))
]
FIT_CONFIGS = [name for name in FIT_CONFIGS if not name.startswith(("targets/", "strategies/"))]
SHORT = ["--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1", "--model.init_samples", "40"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target `t.safetensors` in the working directory; what a command adds to `sys.path` goes again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: `seed_everything` leaves it behind
    save_target("t.safetensors", TiedAutoencoder(5, 2))


def tms(*more: str, command: str = "fit") -> list[str]:
    """Arguments of a few steps of TMS on `t.safetensors`."""
    small = [
        "--data.init_args.steps_per_epoch",
        "3",
        "--data.init_args.n_val",
        "20",
        "--model.target_weights",
        "t.safetensors",
    ]
    return [command, "--config", "tms", *small, *SHORT, "--trainer.default_root_dir", "run", *more]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that has to end with exit code 2; the one line that it printed, without its `l3d: error: `."""
    capsys.readouterr()
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert err.startswith("l3d: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in out + err
    assert "Union" not in err
    assert "<class" not in err
    return err.removeprefix("l3d: error: ").removesuffix("\n")


# -- values ------------------------------------------------------------------------------------------------------------

BAD_VALUES = {
    "a glob that matches nothing": (
        ["--model.parameters", "W_inn"],
        ["parameters: pattern 'W_inn' matches no parameter", "did you mean 'W_in'?"],
    ),
    "one glob of two": (
        ["--model.parameters", '["W_in", "c"]'],
        ["pattern 'c' matches no parameter", "it has W_in, b"],
    ),
    "rank above the dimension": (["--model.ranks", "[5, 3]"], ["ranks of 'W_in'", "rank 3 above the dimension 2"]),
    "rank above every dimension": (["--model.ranks", "6"], ["ranks: found rank 6", "up to 5"]),
    "rank 0": (["--model.ranks", "0"], ["ranks of 'W_in': found 0"]),
    "rank a word": (["--model.ranks", "abc"], ["model.ranks: found 'abc', allowed: int, float, list"]),
    "k = 0": (["--model.k", "0"], ["k: found 0.0", "(0, 1]"]),
    "k = -1": (["--model.k", "-1"], ["k: found -1.0", "(0, 1]"]),
    "k = 1.5": (["--model.k", "1.5"], ["k: found 1.5", "(0, 1]"]),
    "k not a number": (["--model.k", ".nan"], ["k: found nan", "(0, 1]"]),
    "k a word": (["--model.k", "abc"], ["model.k: found 'abc', allowed: float"]),
    "n_v = 0": (["--model.n_subnetworks", "0"], ["n_subnetworks: found 0; at least 1"]),
    "recipe": (["--model.recipe", "papr"], ["recipe: found 'papr'", "did you mean 'paper'?"]),
    "divergence": (["--model.divergence", "msee"], ["divergence: found 'msee'", "did you mean 'mse'?"]),
    "bad_samples": (["--model.bad_samples", "skipp"], ["bad_samples: found 'skipp'", "did you mean 'skip'?"]),
    "empty dataset": (["--data.init_args.points", "0"], ["points: found 0"]),
    "a batch of 1": (["--data.init_args.batch_size", "1"], ["reference: 'random'", "found a batch of 1", "2 or more"]),
    "too few samples to start from": (["--model.init_samples", "4"], ["n_subnetworks = 5", "init_samples = 4"]),
    "task": (["--data.init_args.task", "tsm"], ["data.task: found 'tsm'", "did you mean 'tms'"]),
    "number of features": (["--data.init_args.n_features", "abc"], ["data.n_features: found 'abc', allowed: int"]),
    "epochs": (["--trainer.max_epochs", "abc"], ["trainer.max_epochs: found 'abc', allowed: int, null"]),
    "steps between checkpoints": (["--checkpoint.every_n_train_steps", "0"], ["every_n_train_steps: found 0"]),
    "accelerator": (["--trainer.accelerator", "cpuu"], ["trainer:", "cpuu"]),
    "precision": (["--trainer.precision", "33"], ["trainer.precision: found '33'"]),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, parts = BAD_VALUES[case]
    line = refused(capsys, *tms(*args))
    assert all(part in line for part in parts), line
    assert not Path("run/checkpoints").exists()


# -- keys, commands, configs -------------------------------------------------------------------------------------------

BAD_KEYS = {
    "model": (["--model.n_subnetwork", "5"], ["--model.n_subnetwork", "did you mean 'model.n_subnetworks'?"]),
    "trainer": (["--trainer.max_epoch=5"], ["--trainer.max_epoch", "did you mean 'trainer.max_epochs'"]),
    "data, whose class is a setting": (
        ["--data.init_args.n_featuress", "5"],
        ["data: Option 'n_featuress'", "did you mean 'n_features'"],
    ),
    "target": (
        ["--model.target.init_args.featuress", "5"],
        ["model.target: Option 'featuress'", "did you mean 'features'"],
    ),
    "a class of the target": (
        ["--model.target.class_path", "l3d_pl.targets.toy.Autoencodr"],
        ["model.target", "did you mean 'Autoencoder'"],
    ),
    "a module of the target": (
        ["--model.target.class_path", "nowhere.Model"],
        ["model.target", "nowhere.Model", "No module named 'nowhere'"],
    ),
    "a class of the data": (["--data.class_path", "datamodules.toy.ToyDat"], ["data:", "did you mean 'ToyData'"]),
    "data that are no data": (
        ["--data.class_path", "l3d_pl.targets.toy.MLP"],
        ["data:", "l3d_pl.targets.toy.MLP", "LightningDataModule"],
    ),
    "a word too many": (["word"], ["unrecognized arguments: word"]),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_unknown_key_names_the_near_match(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, parts = BAD_KEYS[case]
    line = refused(capsys, *tms(*args))
    assert all(part in line for part in parts), line
    assert len(line) < 250


BAD_FILES: dict[str, tuple[str, list[str]]] = {
    "model key": (
        "model: {n_subnetwork: 3, target: {class_path: l3d_pl.targets.toy.MLP}}",
        ["model.n_subnetwork'", "did you mean 'model.n_subnetworks'"],
    ),
    "group": ("modell: {k: 0.1}", ["modell.k", "did you mean 'model.k'"]),
    "target key": (
        "model: {target: {class_path: l3d_pl.targets.toy.MLP, init_args: {size: [2, 2]}}}",
        ["'size'", "did you mean 'sizes'?"],
    ),
    "data key": (
        "data: {class_path: datamodules.toy.ToyData, init_args: {batchsize: 3}}",
        ["data: Option 'batchsize'", "did you mean 'batch_size'"],
    ),
    "value": ("model: {k: abc}", ["model.k: found 'abc', allowed: float"]),
    "malformed": ("model: [1, 2\n  k: 3\n", ["bad.yaml is no YAML in line 2, column 4"]),
    "tab": ("model:\n\tk: 3\n", ["bad.yaml is no YAML in line 2, column 1"]),
    "no mapping": ("only words", ["bad.yaml holds str", "a mapping"]),
    "empty": ("", ["bad.yaml holds NoneType", "a mapping"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_config_file_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, parts = BAD_FILES[case]
    Path("bad.yaml").write_text(text)
    line = refused(capsys, "fit", "--config", "bad.yaml")
    assert all(part in line for part in parts), line


def test_unknown_commands_and_missing_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "found 'fitt', allowed are fit, validate, test" in refused(capsys, "fitt")
    assert "did you mean 'score'" in refused(capsys, "scor")
    assert "there is no file tmss" in refused(capsys, "fit", "--config", "tmss")
    assert "did you mean 'digits_cnn'" in refused(capsys, "fit", "--config=configs/digits_cn.yaml")
    assert "shipped are digits_cnn, " in refused(capsys, "fit", "--config", "xyzzy.yaml")
    assert "model.target" in refused(capsys, "fit")
    assert "model.model" in refused(capsys, "target")
    assert "there is no file targets/tmss" in refused(capsys, "target", "--config", "targets/tmss")
    assert "expected one argument" in refused(capsys, "fit", "--config")


def test_nothing_of_jsonargparse_stays_in_the_line() -> None:
    nested = (
        'Parser key "a":\nDoes not validate against any of the Union subtypes\n'
        "Subtypes: [<class 'int'>, <class 'NoneType'>]\nErrors:\n"
        "  - Expected a <class 'int'>\n  - Expected a <class 'NoneType'>\n"
        "Given value type: <class 'str'>\nGiven value: x\ny"
    )
    assert brief(nested) == r"a: found 'x\ny', allowed: int, null"
    assert brief("Parser key \"a.b\": Expected a typing.Literal['left', 'right']. Got value: lefft") == (
        "a.b: found 'lefft', allowed: 'left', 'right'; did you mean 'left'?"
    )
    assert brief("two\n  lines") == "two lines"


# -- files -------------------------------------------------------------------------------------------------------------


def test_target_file_missing_truncated_or_of_another_shape(capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--model.target_config", "null", "--model.target_weights"]
    assert "there is no file elsewhere/t.safetensors" in refused(capsys, *tms(*weights, "elsewhere/t.safetensors"))
    assert "did you mean 't.safetensors'?" in refused(capsys, *tms(*weights, "tt.safetensors"))
    whole = Path("t.safetensors").read_bytes()
    for size in (0, 4, 60, len(whole) - 1):
        Path("cut.safetensors").write_bytes(whole[:size])
        assert "cut.safetensors is truncated or no safetensors file" in refused(
            capsys, *tms(*weights, "cut.safetensors")
        )
    line = refused(capsys, *tms("--model.target.init_args.features", "6"))
    assert line == "target file: tensor 'W_in' in t.safetensors is [5, 2], TiedAutoencoder expects [6, 2]"


def test_checkpoint_missing_damaged_or_of_another_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tms()) == 0
    checkpoint = Path("run/checkpoints/last.ckpt")
    resume = ["--ckpt_path", str(checkpoint)]
    assert "there is no file nowhere.ckpt" in refused(capsys, *tms("--ckpt_path", "nowhere.ckpt"))
    save_target("other.safetensors", TiedAutoencoder(5, 2))
    for command in ("fit", "validate", "test"):
        line = refused(capsys, *tms(*resume, "--model.target_weights", "other.safetensors", command=command))
        assert line.startswith("checkpoint: it is of another target model, fingerprint ")
    for other in (
        ["--model.n_subnetworks", "6"],
        ["--model.ranks", "2"],
        ["--model.restarts", "2"],
        ["--model.parameters", "W_in"],
    ):
        assert "n_subnetworks, ranks, parameters and restarts have to be the checkpoint's" in refused(
            capsys, *tms(*resume, *other)
        )
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint at all"):
        checkpoint.write_bytes(damaged)
        assert "last.ckpt is damaged or no checkpoint" in refused(capsys, *tms(*resume))
    torch.save({"state_dict": {}, "pytorch-lightning_version": L.__version__}, checkpoint)
    assert "it was not written by L3D" in refused(capsys, *tms(*resume, command="validate"))


def test_folder_that_cannot_be_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    for folder in ("file", "file/run"):
        line = refused(capsys, *tms("--trainer.default_root_dir", folder))
        assert line.startswith(f"trainer.default_root_dir: {folder} cannot be written to")


def test_data_of_the_wrong_width_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    expected = "target model TiedAutoencoder: it cannot take inputs of shape [32, 7]: mat1 and mat2 shapes cannot be"
    for recipe in ("l3d_pl", "paper"):  # the first batch is one for the start, or one of training
        assert refused(capsys, *tms("--data.init_args.n_features", "7", "--model.recipe", recipe)).startswith(expected)
    assert main(tms()) == 0
    for command, rows in (("validate", 20), ("test", 1000)):
        line = refused(capsys, *tms("--ckpt_path", "last", "--data.init_args.n_features", "7", command=command))
        assert line.startswith(expected.replace("[32, 7]", f"[{rows}, 7]"))


def test_later_batch_that_the_target_cannot_take_keeps_its_traceback() -> None:
    """Only the first batch tells of a setting; what fails later is no bad input, and its traceback is shown."""
    model = TiedAutoencoder(5, 2)
    extractor = GradientExtractor(model, dict(model.named_parameters()))
    with pytest.raises(L3DError, match=r"TiedAutoencoder: it cannot take inputs of shape \[3, 7\]"):
        extractor(torch.rand(3, 7))
    extractor(torch.rand(3, 5))
    with pytest.raises(RuntimeError, match="mat1 and mat2") as error:
        extractor(torch.rand(3, 7))
    assert bad_input_in(error.value) is None


def test_toy_run_whose_target_has_no_truth_ends_well_without_a_score(capsys: pytest.CaptureFixture[str]) -> None:
    tmcs = tms()
    tmcs[tmcs.index("tms")] = "tmcs"
    model = Autoencoder(10, 5)
    save_target("t.safetensors", model, {"A": torch.rand(10, 10)})
    assert main(tmcs) == 0
    assert Path("run/score.json").is_file()
    assert "features recovered" in capsys.readouterr().out

    save_target("t.safetensors", model)
    sentence = "target file: t.safetensors has no tensor 'truth.A', the task's matrix, which tmcs is scored against"
    assert main(tmcs) == 0
    assert f"not scored; {sentence}" in capsys.readouterr().out
    assert f"not scored; {sentence}" in Path("run/atlas/data/overview.js").read_text()
    assert not Path("run/score.json").exists()  # nor that of the run before
    assert main(["report", "run"]) == 0
    assert refused(capsys, "score", "run") == sentence


def test_score_and_report_of_what_is_no_toy_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    for command in ("score", "report"):
        assert "empty holds no decomposition/config.json" in refused(capsys, command, "empty")
        assert "nowhere holds no decomposition/config.json" in refused(capsys, command, "nowhere")
        assert "required: dir" in refused(capsys, command)
        assert "unrecognized arguments: more" in refused(capsys, command, "empty", "more")
    own_files()
    assert main(["fit", "--config", "own.yaml", *SHORT]) == 0
    assert "run is no toy run, so there is no ground truth" in refused(capsys, "score", "run")
    assert main(["report", "run"]) == 0
    assert "run/atlas/index.html" in capsys.readouterr().out


# -- a user's own files ------------------------------------------------------------------------------------------------

OWN_CODE = '''
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class OwnModel(nn.Module):
    """Two layers; `poison` makes the gradients of `second` NaN where an input is above it, and keeps the outputs."""

    def __init__(self, poison: float = 9.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.poison = nn.Linear(4, 6), nn.Linear(6, 3), poison

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        out = self.second(hidden)
        zero = (x.amax(1, keepdim=True) <= self.poison).float()  # 1 for a good sample, 0 for a bad one
        return out + 0 * torch.sqrt(zero * self.second.weight.square().sum())


class OwnData(L.LightningDataModule):
    """Batches (x, y). `bad` rows hold a NaN, or, with `large`, a 10; `rows`: 0 for an empty set."""

    def __init__(self, rows: int = 40, bad: int = 0, large: bool = False, batch_size: int = 10):
        super().__init__()
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
        x[13 : 13 + bad, 2] = 10.0 if large else float("nan")
        self.rows, self.batch_size = TensorDataset(x, x.sum(1)), batch_size

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size)
'''

OWN_CONFIG = """
model:
  target: {class_path: %(module)s.OwnModel}
  n_subnetworks: 6
  ranks: 2
  k: 0.3
data: {class_path: %(module)s.OwnData}
trainer: {accelerator: cpu, default_root_dir: run}
"""


def own_files() -> str:
    """`own.yaml` and its module, under a new name each time (Python imports a name once); returns the name."""
    module = f"own_{abs(hash(Path.cwd()))}"
    Path(f"{module}.py").write_text(OWN_CODE)
    Path("own.yaml").write_text(OWN_CONFIG % {"module": module})
    return module


def test_own_module_and_data_from_the_working_directory(capsys: pytest.CaptureFixture[str]) -> None:
    module = own_files()
    assert main(["fit", "--config", "own.yaml", *SHORT]) == 0
    assert "6 subnetworks" in capsys.readouterr().out
    found = Decomposition.from_pretrained("run/decomposition", target=sys.modules[module].OwnModel())
    assert set(found.direction(0)) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert found.encode(torch.randn(3, 4)).shape == (3, 6)
    # everything is in the run's own config, which is enough to go on
    assert main(["fit", "--config", "run/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    for command in ("validate", "test"):
        assert main([command, "--config", "run/config.yaml", "--ckpt_path", "last"]) == (
            0 if command == "validate" else 2
        )


def test_nan_in_the_data_names_batch_and_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    own_files()
    random = ["--model.init", "random", "--model.swap_every", "0"]  # nothing is looked at before the first step
    for more in ([], random):
        line = refused(
            capsys,
            "fit",
            "--config",
            "own.yaml",
            *SHORT,
            *more,
            "--data.init_args.bad",
            "1",
            "--model.reference",
            "uniform",
        )
        assert line.startswith(
            "batch 1: found NaN or infinity in the data; first in the gradient of parameter 'first.weight'"
        ), line
        assert "bad_samples: skip" in line


def test_nan_in_a_gradient_names_batch_and_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    own_files()
    bad = ["--data.init_args.bad", "3", "--data.init_args.large", "true"]
    line = refused(capsys, "fit", "--config", "own.yaml", *SHORT, *bad)
    assert line.startswith(
        "batch 1: found NaN or infinity in the gradient; "
        "first in the gradient of parameter 'second.weight', 3 of 10 samples"
    ), line


def test_bad_samples_are_skipped_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    own_files()
    bad = ["--data.init_args.bad", "3", "--data.init_args.large", "true", "--model.bad_samples", "skip"]
    assert main(["fit", "--config", "own.yaml", *SHORT, *bad, "--trainer.max_epochs", "2"]) == 0
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert state["state_dict"]["skipped_samples"] == 2 * 3  # of two epochs
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    found = Decomposition.from_pretrained("run/decomposition", target=sys.modules[own_files()].OwnModel())
    assert math.isfinite(found.figures["val/loss"])
    assert found.mean_reference.isfinite().all()


def test_bad_data_are_skipped_in_validation_too(capsys: pytest.CaptureFixture[str]) -> None:
    module = own_files()
    bad = ["--data.init_args.bad", "1", "--model.bad_samples", "skip", "--model.reference", "mean"]
    assert main(["fit", "--config", "own.yaml", *SHORT, *bad, "--model.reference", "random"]) == 0
    found = Decomposition.from_pretrained("run/decomposition", target=sys.modules[module].OwnModel())
    assert found.mean_reference.isfinite().all()


def test_own_empty_data_and_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    own_files()
    for more in ([], ["--model.recipe", "paper"], ["--trainer.max_epochs", "null", "--trainer.max_steps", "3"]):
        assert "training set is empty" in refused(
            capsys, "fit", "--config", "own.yaml", *SHORT, "--data.init_args.rows", "0", *more
        )
    text = Path("own.yaml").read_text()
    Path("own.yaml").write_text("\n".join(line for line in text.splitlines() if not line.startswith("data")))
    assert "train_dataloader" in refused(capsys, "fit", "--config", "own.yaml", *SHORT)


# -- what works --------------------------------------------------------------------------------------------------------


def parsed(args: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that a fit would run with."""
    monkeypatch.setattr(L3DCLI, "before_instantiate_classes", lambda self: None)
    monkeypatch.setattr(L3DCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(L3DCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(L3DCLI, "_run_subcommand", lambda self, subcommand: None)
    return L3DCLI(args).config["fit"]


@pytest.mark.parametrize("name", FIT_CONFIGS)
def test_print_config_round_trips(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", name, "--model.k", "0.123", "--print_config"])
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    assert yaml.safe_load(printed)["model"]["k"] == 0.123
    with pytest.raises(SystemExit):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert capsys.readouterr().out == printed
    first, second = (
        parsed(args, monkeypatch)
        for args in (["fit", "--config", find_config(name), "--model.k", "0.123"], ["fit", "--config", "printed.yaml"])
    )
    first.pop("config"), second.pop("config")
    assert first == second


def test_every_value_can_be_set_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "model.parameters": ["W_in"],
        "model.n_subnetworks": 7,
        "model.k": 0.25,
        "model.n_dense": 2,
        "model.shard_target": True,
        "model.ranks": {"W_in": [2, 1], "*": 0.5},
        "model.divergence": "kl",
        "model.reference": "mean",
        "model.sample": "token",
        "model.tokens_per_sequence": 4,
        "model.autocast": "bf16",
        "model.memory_budget": 0.5,
        "model.recipe": "paper",
        "model.init": "random",
        "model.scale_start": True,
        "model.k_start": 0.75,
        "model.lr_schedule": "constant",
        "model.swap_every": 3,
        "model.swap_samples": 77,
        "model.lr": 1e-3,
        "model.weight_decay": 0.5,
        "model.betas": [0.5, 0.6],
        "model.lr_gamma": 0.3,
        "model.lr_step_epochs": 5,
        "model.dense_epochs": 2,
        "model.restarts": 3,
        "model.init_samples": 9,
        "model.dead_after": 11,
        "model.aux_coefficient": 0.1,
        "model.revive_every": 6,
        "model.bad_samples": "skip",
        "model.seed": 5,
        "model.target_weights": "t.safetensors",
        "model.target_config": "targets/tms.yaml",
        "model.target.init_args.hidden": 4,
        "data.init_args.probability": 0.5,
        "data.init_args.batch_size": 3,
        "trainer.max_epochs": 4,
        "trainer.gradient_clip_val": 0.5,
        "trainer.accumulate_grad_batches": 2,
        "trainer.default_root_dir": "elsewhere",
        "checkpoint.every_n_train_steps": 8,
        "seed_everything": 12,
        "ckpt_path": "last",
    }
    args = [
        word
        for key, value in settings.items()
        for word in (f"--{key}", yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip())
    ]
    config = parsed(["fit", "--config", find_config("tms"), *args], monkeypatch)
    found = {key: config.get(key) for key in settings}
    found["model.betas"] = list(found["model.betas"])
    assert found == settings
    missing = [key for key in vars(config.model) if f"model.{key}" not in settings and key != "target"]
    assert not missing, "settings of L3D that this test does not know"


def test_fit_trains_a_missing_target_and_leaves_one_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(Path(find_config("targets/tms")).read_text())
    recipe["data"]["init_args"] |= {"batch_size": 64, "steps_per_epoch": 5, "n_val": 50, "n_test": 50}
    recipe["trainer"] |= {"max_epochs": 1, "enable_progress_bar": False}
    recipe["model"]["restarts"] = 1
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    args = tms("--model.target_weights", "targets/new.safetensors", "--model.target_config", "recipe.yaml")
    assert main(args) == 0
    assert "target targets/new.safetensors is not there: training it with recipe.yaml" in capsys.readouterr().out
    first, found = Path("targets/new.safetensors").read_bytes(), Path("run/decomposition/model.safetensors")
    decomposed = found.read_bytes()
    assert main(args) == 0
    assert "training it" not in capsys.readouterr().out
    assert found.read_bytes() == decomposed  # the target's own seed is not left behind
    assert Path("targets/new.safetensors").read_bytes() == first

    # `l3d target` makes the same one, byte for byte but for the figure of the time
    assert main(["target", "--config", "recipe.yaml", "--output", "again.safetensors"]) == 0
    assert capsys.readouterr().out.startswith("target again.safetensors: ")
    for name, tensor in load_file("again.safetensors").items():
        assert torch.equal(tensor, load_file("targets/new.safetensors")[name])
    assert main(["target", "--config", "recipe.yaml", "--seed_everything", "7", "--model.name", "little"]) == 0
    assert Path("runs/targets/little_seed7.safetensors").is_file()
    Path("file").write_text("")
    assert refused(capsys, "target", "--config", "recipe.yaml", "--output", "file/x.safetensors").startswith(
        "output: file cannot be written to"
    )


def test_score_of_a_toy_run_and_a_fit_from_another_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert main(tms("--model.target_weights", "../t.safetensors")) == 0
    assert "features recovered" in capsys.readouterr().out
    assert main(["score", "run"]) == 0
    assert "recovered" in capsys.readouterr().out
    for path in (
        "config.yaml",
        "checkpoints/last.ckpt",
        "metrics.csv",
        "decomposition/model.safetensors",
        "score.json",
        "atlas/index.html",
    ):
        assert Path("run", path).is_file(), path
    monkeypatch.chdir("..")
    assert main(["score", "below/run"]) == 0  # its target was named from below/
    for command in ("validate", "test"):
        assert main(tms("--trainer.default_root_dir", "below/run", "--ckpt_path", "last", command=command)) == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [([], "l3d fit|validate|test"), (["--help"], "l3d fit|validate|test"), (["--version"], __version__)],
)
def test_help_and_version(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "expected"), [("score", "a run's directory"), ("fit", "--model.k"), ("report", "a run's directory")]
)
def test_help_of_a_command(command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code in (0, None)
    assert expected in capsys.readouterr().out


def test_the_command_itself() -> None:
    """The console script, in a process of its own: a module of the working directory is found, an error is one line."""
    own_files()
    script = Path(sys.executable).with_name("l3d")
    done = subprocess.run(
        [script, "fit", "--config", "own.yaml", "--model.k", "2"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "l3d: error: k: found 2.0; allowed is the fraction of coefficients to keep, in (0, 1]\n"


def test_what_needs_no_torch_starts_without_it() -> None:
    """On a login node `l3d slurm status` answers at once."""
    code = "import sys; from l3d_pl.cli import main; code = main({}); sys.exit(3 if 'torch' in sys.modules else code)"
    for arguments, expected in (["--version"], 0), (["--help"], 0), (["slurm", "status", "nowhere"], 2), (["fi"], 2):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, timeout=60)
        assert done.returncode == expected, (arguments, done)


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_a_fit_ends_with_its_own_time_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert main(tms()) == 0
    assert not [str(warning.message) for warning in found if "logging interval" in str(warning.message)]
    printed = capsys.readouterr().out
    assert "held-out loss L (share of |gradient|² left)" in printed
    assert re.search(r"time of the fit +│ \d+\.\d s, 3 steps", printed)
    assert main(tms("--trainer.max_epochs", "3", "--ckpt_path", "last")) == 0
    assert re.search(r"\d+\.\d s for the last 6 of 9 steps", capsys.readouterr().out)


# -- from elsewhere ----------------------------------------------------------------------------------------------------


def test_a_run_is_read_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its paths and its own modules are looked up where the fit was started."""
    Path("my_toys.py").write_text(
        "from datamodules.toy import ToyData\n\n\nclass MyToyData(ToyData):\n    def __init__(self, task: str = 'tms', "
        "n_features: int = 5, n_val: int = 20, steps_per_epoch: int = 3):\n"
        "        super().__init__(task, n_features, n_val=n_val, steps_per_epoch=steps_per_epoch)\n"
    )
    data = "{class_path: my_toys.MyToyData, init_args: {task: tms}}"
    target = ["--model.target_weights", "t.safetensors", "--trainer.default_root_dir", "runs/a"]
    assert main(["fit", "--config", "tms", *SHORT, *target, "--data", data]) == 0

    elsewhere, run = tmp_path / "elsewhere", str(tmp_path / "runs" / "a")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
    monkeypatch.delitem(sys.modules, "my_toys")
    assert main(["analyze", run, "--references", "1"]) == 0
    assert main(["intervene", run, "--subnetwork", "0"]) == 0
    assert main(["score", run]) == 0
    assert list(elsewhere.iterdir()) == []

    Path(tmp_path, "t.safetensors").rename(elsewhere / "t.safetensors")  # else here, as for a run without the entry
    assert main(["score", run]) == 0
    Path("t.safetensors").unlink()
    for command in (["score", run], ["analyze", run]):
        line = refused(capsys, *command)
        assert f"t.safetensors is not there any more (looked from {tmp_path} and {elsewhere})" in line


def test_only_what_is_a_path_is_looked_up_where_the_fit_was_started(tmp_path: Path) -> None:
    start = tmp_path / "start"
    for name in ("texts", "digits", "tms"):
        (start / name).mkdir(parents=True)
    (start / "texts" / "a.txt").write_text("a")
    decomposition = Decomposition(Subnetworks({"w": (3, 2)}, 2, 1))
    given = {
        "task": "tms",
        "source": {"train": ["texts/*.txt", "texts/gone.txt", "https://x.org/a.txt"], "val": "texts"},
        "column": "texts",
        "n": 3,
    }
    decomposition.run_config = {"data": {"init_args": given}, "model": {"source": "digits"}, "started_in": str(start)}
    found = settings_of(decomposition)
    assert found["data"]["init_args"] == given | {
        "source": {
            "train": [str(start / "texts/*.txt"), "texts/gone.txt", "https://x.org/a.txt"],
            "val": str(start / "texts"),
        }
    }
    assert found["model"] == {"source": "digits"}
