"""Targets from elsewhere: Hugging Face directories, torchvision, timm, a user's own file. Nothing is downloaded."""

import enum
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from datamodules.text import TextData
from l3d_pl import per_sample_gradients
from l3d_pl.cli import find_config, main
from l3d_pl.errors import L3DError
from l3d_pl.lightning_cli import missing_target, train_target
from l3d_pl.targets.frozen import fingerprint, freeze, select_parameters
from l3d_pl.targets.hub import image_classifier, language_model
from l3d_pl.targets.language import gpt_neo, llama, mean_loss, next_token_loss, ngram_losses
from l3d_pl.targets.local import from_file
from l3d_pl.targets.training import load_target, save_pretrained_target, save_target
from l3d_pl.targets.vision import timm_model, torchvision_model

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0}


def tiny(family: str) -> nn.Module:
    """A model of transformers with random weights."""
    if family == "gpt_neo":
        return gpt_neo(vocabulary=50, width=16, layers=2, heads=2, context=16, window=4)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config)
    if family == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**SMALL, num_hidden_layers=2, intermediate_size=32)
        )
    if family == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SMALL, num_hidden_layers=2, intermediate_size=32, num_key_value_heads=1)
        )
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    return transformers.ResNetForImageClassification(config)


TEXT = ("gpt_neo", "gpt2", "gpt_neox", "llama")
TENSORS = {
    "gpt_neo": "transformer.h.1.attn.attention.q_proj.weight",
    "gpt2": "transformer.h.1.attn.c_attn.weight",
    "gpt_neox": "gpt_neox.layers.1.attention.query_key_value.weight",
    "llama": "model.layers.1.self_attn.q_proj.weight",
    "resnet": "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight",
}


def inputs_for(family: str) -> dict[str, Tensor]:
    if family == "resnet":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    return {"input_ids": torch.randint(50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


@pytest.mark.parametrize("family", TENSORS)
def test_saved_model_comes_back_with_its_logits_names_and_fingerprint(family: str, tmp_path: Path) -> None:
    model = tiny(family).eval()
    if family == "resnet":  # running statistics are part of it
        model.train()(**inputs_for(family))
        model.eval()
    model.save_pretrained(tmp_path / family)
    load = language_model if family in TEXT else image_classifier
    loaded = freeze(load(str(tmp_path / family)))
    inputs = inputs_for(family)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert type(loaded) is type(model)
    assert fingerprint(loaded) == fingerprint(model) == fingerprint(load(str(tmp_path / family)))
    assert list(select_parameters(loaded, TENSORS[family])) == [TENSORS[family]]
    assert not loaded.training
    if family in TEXT:
        assert loaded(**inputs).get("past_key_values") is None


@pytest.mark.parametrize("family", TENSORS)
def test_gradients_of_a_loaded_model(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    loaded = freeze((language_model if family in TEXT else image_classifier)(str(tmp_path)))
    gradients = per_sample_gradients(loaded, inputs_for(family), "kl", parameters=TENSORS[family])
    dense = gradients[TENSORS[family]].dense()
    assert dense.shape == (2, *loaded.get_parameter(TENSORS[family]).shape)
    assert dense.abs().sum() > 0


def test_dtype_and_attention_by_setting(tmp_path: Path) -> None:
    model = tiny("llama").eval()
    model.save_pretrained(tmp_path)
    inputs = inputs_for("llama")
    half = freeze(language_model(str(tmp_path), dtype="bfloat16"))
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    assert torch.allclose(half(**inputs).logits.float(), model(**inputs).logits, atol=0.02)
    assert fingerprint(half) != fingerprint(model)
    for attention in ("eager", "sdpa"):
        loaded = freeze(language_model(str(tmp_path), attn_implementation=attention))
        assert loaded.config._attn_implementation == attention
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-6)
    half.save_pretrained(tmp_path / "half")
    assert language_model(str(tmp_path / "half")).dtype == torch.bfloat16  # as it was saved
    with pytest.raises(L3DError, match=r"^dtype: found 'bfloat61', allowed are .*; did you mean 'bfloat16'"):
        language_model(str(tmp_path), dtype="bfloat61")  # type: ignore[arg-type]


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    """The one line of the L3DError that a call raises."""
    with pytest.raises(L3DError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_directories_that_hold_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("gpt_neo")
    model.save_pretrained("deep/models/lm")
    assert refused(language_model, "deep/models/lmm") == (
        "target deep/models/lmm: there is no such directory; did you mean 'deep/models/lm'?"
    )
    assert "no config.json" in refused(language_model, "deep/models")
    assert "found model type 'gpt_neo', which is no image classifier" in refused(image_classifier, "deep/models/lm")

    config = json.loads(Path("deep/models/lm/config.json").read_text())
    weights = Path("deep/models/lm/model.safetensors").read_bytes()
    folder = Path("broken")
    folder.mkdir()
    (folder / "config.json").write_text("{")
    assert "config.json is no JSON" in refused(language_model, "broken")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neoo"}))
    assert "found model type 'gpt_neoo'" in refused(language_model, "broken")
    assert "did you mean 'gpt_neo'" in refused(language_model, "broken")
    (folder / "config.json").write_text(json.dumps(config))
    assert "model.safetensors" in refused(language_model, "broken")
    (folder / "model.safetensors").write_bytes(weights[:300])
    assert refused(language_model, "broken").startswith("target broken: ")


def test_missing_tensors_are_no_random_ones(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in ("lm_head.weight",)}
    del tensors["transformer.h.1.attn.c_attn.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    line = refused(language_model, str(tmp_path))
    assert "lack 1 tensor(s) that GPT2LMHeadModel needs" in line
    assert "'transformer.h.1.attn.c_attn.weight'" in line
    assert "MISSING" not in capfd.readouterr().err


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("run_by_pickle",)


def test_torch_files_hold_tensors_and_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("gpt_neo").eval()
    model.save_pretrained("lm")
    os.remove("lm/model.safetensors")
    torch.save(model.state_dict(), "lm/pytorch_model.bin")  # as TinyStories are published
    inputs = inputs_for("gpt_neo")
    assert torch.equal(freeze(language_model("lm"))(**inputs).logits, model(**inputs).logits)
    torch.save({"a": Malicious()}, "lm/pytorch_model.bin")
    assert "holds more than tensors" in refused(language_model, "lm")

    linear = nn.Linear(3, 2)
    for content in (linear.state_dict(), {"state_dict": linear.state_dict(), "epoch": 3}):
        torch.save(content, "linear.pt")
        other = nn.Linear(3, 2)
        assert load_target("linear.pt", other) == {}
        assert torch.equal(other.weight, linear.weight)
    torch.save({"a": Malicious()}, "linear.pt")
    assert "linear.pt holds more than tensors" in refused(load_target, "linear.pt", linear)
    torch.save([1, 2], "linear.pt")
    assert "linear.pt holds a list, allowed is a state dict" in refused(load_target, "linear.pt", linear)
    Path("linear.pt").write_bytes(b"")
    assert "linear.pt is truncated or no torch file" in refused(load_target, "linear.pt", linear)
    assert "did you mean 'linear.pt'" in refused(load_target, "lineal.pt", linear)
    assert not Path("run_by_pickle").exists()


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def unreachable(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"]))
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = refused(language_model, "somebody/some-model", revision="main")
    assert asked == [("somebody/some-model", "main")]
    assert "somebody/some-model: there is no such directory, and the hub did not give it (Name or service" in line
    assert "local directory with config.json and model.safetensors" in line


def test_hub_id_is_fetched_with_safetensors_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model = tiny("gpt_neo").eval()
    model.save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    patterns = []

    def hub(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        patterns.append(allow_patterns[-1])
        if allow_patterns[-1] == "pytorch_model*.bin":
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert fingerprint(language_model("somebody/some-model")) == fingerprint(model)
    assert patterns == ["model*.safetensors", "pytorch_model*.bin"]


# -- a user's own file -------------------------------------------------------------------------------------------------

OWN = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
from beside import WIDTH

@dataclass
class Settings:
    classes: int = 3

class MyModel(nn.Sequential):
    def __init__(self, classes: int = Settings().classes):
        super().__init__(nn.Linear(WIDTH, classes))

def build():
    return 3
"""


def test_model_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_model.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    file = str(tmp_path / "my_model.py")
    model = from_file(file, "MyModel", {"classes": 2}, dtype="float64")
    assert model(torch.ones(1, 4, dtype=torch.float64)).shape == (1, 2)
    save_target(tmp_path / "w.safetensors", model)
    again = from_file(file, "MyModel", {"classes": 2}, weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(again[0].weight, model[0].weight.float())

    assert "did you mean 'my_model.py'" in refused(from_file, str(tmp_path / "my_modell.py"), "MyModel")
    assert "no class or function 'MyModell'; did you mean 'MyModel'" in refused(from_file, file, "MyModell")
    assert "MyModel of" in refused(from_file, file, "MyModel", {"klasses": 2})
    assert "build of" in refused(from_file, file, "build")
    assert "gives a int, allowed is an nn.Module" in refused(from_file, file, "build")
    (tmp_path / "bad.py").write_text("import torch\n1 +\n")
    assert "bad.py cannot be run: SyntaxError" in refused(from_file, str(tmp_path / "bad.py"), "MyModel")
    (tmp_path / "model.txt").write_text("")
    assert "allowed is a Python file" in refused(from_file, str(tmp_path / "model.txt"), "MyModel")


# -- torchvision and timm: not installed here, so modules of the same interface stand in for them ----------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> list[dict[str, Any]]:
    """A torchvision with one model `small` with published weights; returns the arguments of each request for them."""
    fetched: list[dict[str, Any]] = []

    class Weights(enum.Enum):
        IMAGENET1K_V1 = "url"
        DEFAULT = "url"  # noqa: PIE796

        def get_state_dict(self, **options: Any) -> dict[str, Tensor]:
            if fail:
                raise OSError("<urlopen error [Errno -2] Name or service not known>")
            fetched.append(options)
            return {"weight": torch.full((2, 3), 7.0), "bias": torch.zeros(2)}

    models = types.SimpleNamespace(
        list_models=lambda: ["small", "smaller"],
        get_model=lambda name, weights: nn.Linear(3, 2),
        get_model_weights=lambda name: Weights,
    )
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    return fetched


def test_torchvision_models(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = stand_in(monkeypatch)
    model = torchvision_model("small", dtype="bfloat16")
    assert torch.equal(model.weight, torch.full((2, 3), 7.0, dtype=torch.bfloat16))
    assert fetched == [{"check_hash": True, "weights_only": True}]  # no pickle but of tensors, and the right ones
    assert torchvision_model("small", weights=None).weight.abs().max() < 1
    assert len(fetched) == 1
    assert "no model 'smal'; did you mean 'small'" in refused(torchvision_model, "smal")
    assert "allowed are IMAGENET1K_V1, DEFAULT or null; did you mean 'DEFAULT'" in refused(
        torchvision_model, "small", "DEFAULTS"
    )
    stand_in(monkeypatch, fail=True)
    line = refused(torchvision_model, "small")
    assert "Name or service not known" in line
    assert "model.target_weights" in line


def test_timm_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return nn.Linear(3, 2)

    timm = types.SimpleNamespace(list_models=lambda: ["mobilenetv3_small_100"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert isinstance(timm_model("mobilenetv3_small_100.lamb_in1k"), nn.Linear)
    timm_model("mobilenetv3_small_100", pretrained=False)
    assert asked == [("mobilenetv3_small_100.lamb_in1k", True), ("mobilenetv3_small_100", False)]
    assert "did you mean 'mobilenetv3_small_100'" in refused(timm_model, "mobilenetv3_smal_100")


@pytest.mark.parametrize(("library", "load"), [("torchvision", torchvision_model), ("timm", timm_model)])
def test_library_that_is_not_installed(library: str, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # importing it fails, whether it is there or not
    line = refused(load, "mobilenet_v3_small")
    assert line.startswith(f"target: {library} is not installed")
    assert "pip install 'l3d_pl[vision]'" in line


# -- the language model that is trained here ---------------------------------------------------------------------------


def test_next_token_loss_leaves_padding_out() -> None:
    model = tiny("gpt_neo").eval()
    ids = torch.randint(1, 50, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    logits = model(**batch).logits.log_softmax(-1)
    expected = [-logits[n, s, ids[n, s + 1]] for n in range(3) for s in range(7) if mask[n, s + 1]]
    assert torch.allclose(next_token_loss(model, batch), torch.stack(expected).mean(), atol=1e-6)
    other = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
    assert torch.equal(next_token_loss(model, batch), next_token_loss(model, other))
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    assert mean_loss(model, parts) == pytest.approx(next_token_loss(model, batch).item(), abs=1e-5)


def test_ngram_losses_are_those_of_the_text() -> None:
    """On a text without order pairs do not help; on one where each token names the next they leave nothing open."""
    ids = torch.randint(10, (200, 20))
    shuffled = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    losses = ngram_losses([shuffled], [shuffled], 10)
    assert losses["unigram_loss"] == pytest.approx(torch.log(torch.tensor(10.0)).item(), abs=0.01)
    assert losses["bigram_loss"] == pytest.approx(losses["unigram_loss"], abs=0.02)
    ids = (torch.arange(20) + torch.randint(10, (200, 1))) % 10
    ordered = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    losses = ngram_losses([ordered], [ordered], 10)
    assert losses["unigram_loss"] == pytest.approx(torch.log(torch.tensor(10.0)).item(), abs=0.01)
    assert losses["bigram_loss"] < 0.02
    unseen = {"input_ids": ids.flip(1), "attention_mask": torch.ones_like(ids)}
    assert 4 < ngram_losses([ordered], [unseen], 10)["bigram_loss"] < 20  # rare, and not impossible


def test_missing_target_is_a_place_that_is_not_there(tmp_path: Path) -> None:
    def model(weights: str | None, **init_args: Any) -> Any:
        return types.SimpleNamespace(target_weights=weights, target=types.SimpleNamespace(init_args=init_args))

    there = str(tmp_path)
    assert missing_target(model(None, pretrained="nowhere/lm")) == "nowhere/lm"
    assert missing_target(model("w.safetensors", pretrained=there)) == "w.safetensors"
    assert missing_target(model(None, pretrained=there)) is None
    assert missing_target(model(None, pretrained=True)) is None  # timm's is a switch
    assert missing_target(model(None)) is None


def test_gpt_neo_refuses_what_it_cannot_be() -> None:
    assert refused(gpt_neo, width=10, heads=4) == "heads: found 4, allowed are divisors of width = 10"
    assert "layers: found 3" in refused(gpt_neo, layers=3)


def test_llama_is_as_large_as_gpt_neo_and_reads_in_order() -> None:
    size = {"vocabulary": 50, "width": 48, "layers": 2, "heads": 4, "context": 16}
    own, neo = (model(**size).eval() for model in (llama, gpt_neo))
    n_own, n_neo = (sum(p.numel() for p in model.parameters()) for model in (own, neo))
    assert n_own == pytest.approx(n_neo, rel=0.03)
    assert own.lm_head.weight is own.model.embed_tokens.weight
    ids = torch.arange(12).unsqueeze(0)
    changed = ids.clone()
    changed[0, 8] = 40
    same = torch.isclose(own(input_ids=ids).logits, own(input_ids=changed).logits, atol=1e-5).all(-1)[0]
    assert same.tolist() == [True] * 8 + [False] * 4


def test_llama_refuses_what_it_cannot_be() -> None:
    assert refused(llama, width=10, heads=4) == "heads: found 4, allowed are divisors of width = 10"
    assert "heads: found 4, allowed are those with width / heads even, width = 12" in refused(llama, width=12, heads=4)


def test_saving_leaves_what_is_no_model_alone(tmp_path: Path) -> None:
    model = tiny("gpt_neo")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert "is no directory of a saved model" in refused(save_pretrained_target, tmp_path / "notes", model, None)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    for _ in range(2):  # a second one replaces the first
        save_pretrained_target(tmp_path / "lm", model, None, {"loss": 1.5})
    assert json.loads((tmp_path / "lm/target.json").read_text())["loss"] == 1.5
    assert fingerprint(language_model(str(tmp_path / "lm"))) == fingerprint(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "notes"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_language_model_of_the_shipped_recipe_beats_pairs_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    quiet = ["--trainer.enable_progress_bar", "false"]
    figures = train_target(["--config", find_config("targets/pydoc_lm"), *quiet], str(tmp_path / "lm"))
    assert figures["loss"] < figures["bigram_loss"] - 0.15 < figures["unigram_loss"] - 1.5
    data = TextData(length=64, n_val=None, val_batch_size=64)
    data.setup("validate")
    loaded = freeze(language_model(str(tmp_path / "lm")))
    assert mean_loss(loaded, data.val_dataloader()) == pytest.approx(figures["loss"], abs=1e-3)


def test_fit_trains_a_missing_language_model_and_uses_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: `seed_everything` leaves it behind
    monkeypatch.setattr("l3d_pl.report.write_report", lambda run_dir: None)
    recipe = yaml.safe_load(Path(find_config("targets/pydoc_lm")).read_text())
    recipe["model"]["model"]["init_args"] |= {"vocabulary": 300, "width": 16, "layers": 2, "heads": 2, "context": 16}
    recipe["data"]["init_args"] |= {"vocabulary": 300, "length": 16, "max_sequences": 40, "n_val": 20}
    recipe["trainer"] |= {"max_epochs": 1, "enable_progress_bar": False}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    args = ["fit", "--config", "pydoc_lm", "--model.target_config", "recipe.yaml", "--trainer.max_steps", "2"]
    args += ["--model.target.init_args.pretrained", "models/lm", "--data.init_args.tokenizer", "models/lm"]
    args += ["--model.parameters", '["*.h.1.attn.attention.*_proj.weight"]', "--model.n_subnetworks", "5"]
    args += ["--model.init_samples", "40", "--model.swap_samples", "40", "--data.init_args.n_val", "20"]
    args += ["--trainer.enable_progress_bar", "false", "--data.init_args.max_sequences", "60"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "target models/lm is not there: training it with recipe.yaml" in out
    assert "bigram_loss" in out
    trained = fingerprint(language_model("models/lm"))
    checkpoint = torch.load("runs/pydoc_lm/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["l3d"]["target_fingerprint"] == trained
    assert main([*args, "--trainer.default_root_dir", "again"]) == 0
    assert "training it" not in capsys.readouterr().out
    assert fingerprint(language_model("models/lm")) == trained

    recipe["model"]["model"]["init_args"]["vocabulary"] = 299
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["target", "--config", "recipe.yaml"]) == 2
    assert "vocabulary: found 299, the data's tokenizer has 300 tokens" in capsys.readouterr().err
