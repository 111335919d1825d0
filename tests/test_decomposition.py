"""A finished decomposition: kept and loaded bit for bit, refused elsewhere, and read as the paper defines it."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import DIVERGENCES, assert_same, autograd_loop, dense_directions, rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l3d_pl import Decomposition, L3DError, Subnetworks
from l3d_pl.batch_topk import batch_topk
from l3d_pl.divergence import make_divergence, make_references
from l3d_pl.targets.frozen import fingerprint
from l3d_pl.targets.toy import MLP


def make(divergence: Any = "mse", **settings: Any) -> tuple[Decomposition, MLP, Tensor]:
    """A decomposition of a small model in float64 with V_in != V_out, the model, and inputs."""
    torch.manual_seed(0)
    model = MLP((5, 4, 3)).double()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    subnetworks = Subnetworks(shapes, 6, 2).double()
    for parameter in subnetworks.v_in.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    inputs = torch.randn(8, 5).double()
    settings = {"k": 0.3, "threshold": 0.2, "mean_reference": model(inputs).mean(0).detach()} | settings
    return Decomposition(subnetworks, model, divergence=divergence, **settings), model, inputs


def per_sample(model: nn.Module, inputs: Tensor, references: Tensor, divergence: str = "mse") -> Tensor:
    return rows(autograd_loop(model, inputs, references, divergence))


# -- kept and loaded -----------------------------------------------------------------------------------


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    decomposition, model, inputs = make(p_act=torch.rand(6), figures={"loss": 0.25, "bad": float("nan")}, seed=3)
    decomposition.save_pretrained(tmp_path / "new" / "folder")
    loaded = Decomposition.from_pretrained(tmp_path / "new" / "folder", target=model)
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    saved, again = decomposition.subnetworks.state_dict(), loaded.subnetworks.state_dict()
    assert saved.keys() == again.keys()
    for name, value in saved.items():
        assert value.dtype == again[name].dtype
        assert torch.equal(value, again[name])
    for name in ("p_act", "mean_reference"):
        assert torch.equal(getattr(decomposition, name), getattr(loaded, name))
    for name in ("k", "threshold", "reference", "seed", "provenance", "target_fingerprint", "target_class"):
        assert getattr(decomposition, name) == getattr(loaded, name)
    assert loaded.figures == {"loss": 0.25, "bad": None}
    assert loaded.config() == json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert torch.equal(loaded.encode(inputs), decomposition.encode(inputs))
    assert not any(parameter.requires_grad for parameter in loaded.subnetworks.parameters())


def test_it_is_told_in_one_line(tmp_path: Path) -> None:
    decomposition, _, _ = make("kl", figures={"val/loss": 0.12345})
    assert repr(decomposition) == (
        "Decomposition(6 subnetworks of l3d_pl.targets.toy.MLP, parameters 0.weight, 0.bias, 1.weight, 1.bias, "
        "k=0.3, divergence=kl, held-out loss 0.1235)"
    )
    many = Decomposition(Subnetworks({f"{i}.weight": (2, 2) for i in range(6)}, 2, 1))
    assert "no target yet, parameters 0.weight, 1.weight, 2.weight, 3.weight, ... (6 in all), k=" in repr(many)
    assert repr(many).endswith("divergence=mse)")


def test_config_and_card_say_what_it_is(tmp_path: Path) -> None:
    decomposition, model, _ = make("kl", figures={"held-out loss": 0.125}, seed=7)
    decomposition.save_pretrained(tmp_path)
    config, card = json.loads((tmp_path / "config.json").read_text()), (tmp_path / "README.md").read_text()
    assert config["format_version"] == 1
    assert config["target_fingerprint"] == fingerprint(model)
    assert config["target_class"] == "l3d_pl.targets.toy.MLP"
    assert config["parameters"]["0.weight"] == {"shape": [4, 5], "ranks": [2, 2]}
    assert list(config["parameters"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    chosen = {name: config[name] for name in ("n_subnetworks", "divergence", "reference", "k", "threshold", "seed")}
    assert chosen == {
        "n_subnetworks": 6,
        "divergence": "kl",
        "reference": "random",
        "k": 0.3,
        "threshold": 0.2,
        "seed": 7,
    }
    assert config["provenance"]["versions"].keys() >= {"l3d_pl", "torch", "python"}
    assert config["provenance"].keys() == {"versions", "git_commit", "created"}
    for part in (
        "6 subnetworks of l3d_pl.targets.toy.MLP",
        fingerprint(model)[:12],
        "held-out loss | 0.125",
        "`1.bias` | [3] | [2]",
    ):
        assert part in card
    files = load_file(tmp_path / "model.safetensors")
    assert not any(value.shape == (4, 5) for value in files.values())  # W0 is not in it


def test_saving_again_overwrites(tmp_path: Path) -> None:
    make(seed=1)[0].save_pretrained(tmp_path)
    make(seed=2, figures={"loss": 0.5})[0].save_pretrained(tmp_path)
    assert Decomposition.from_pretrained(tmp_path).seed == 2
    assert "| loss | 0.5 |" in (tmp_path / "README.md").read_text()


def test_hub_mixin_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make()[0].save_pretrained(tmp_path)
    assert {"repo_id", "push_to_hub"} <= inspect.signature(Decomposition.save_pretrained).parameters.keys()
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "l3d_pl.decomposition.snapshot_download", lambda name, **hub: asked.append((name, hub)) or str(tmp_path)
    )
    loaded = Decomposition.from_pretrained("someone/decomposition", revision="v1", cache_dir=tmp_path / "cache")
    assert loaded.n_subnetworks == 6
    ((name, hub),) = asked
    assert (name, hub["revision"], hub["cache_dir"]) == ("someone/decomposition", "v1", tmp_path / "cache")

    def offline(name: str, **hub: Any) -> str:
        raise ConnectionError("no network")

    with pytest.raises(TypeError, match="targt"):
        Decomposition.from_pretrained(tmp_path, targt=None)
    monkeypatch.setattr("l3d_pl.decomposition.snapshot_download", offline)
    with pytest.raises(
        L3DError, match=r"'no/where' is no directory, and not to be had from the hub \(ConnectionError\)"
    ):
        Decomposition.from_pretrained("no/where")


def signed_cube(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference).abs().pow(3).sum(-1)


def test_custom_divergence_is_given_again_on_loading(tmp_path: Path) -> None:
    decomposition, model, inputs = make(signed_cube)
    decomposition.save_pretrained(tmp_path)
    loaded = Decomposition.from_pretrained(tmp_path, target=model, divergence=signed_cube)
    assert torch.equal(loaded.encode(inputs), decomposition.encode(inputs))
    with pytest.raises(L3DError, match="divergence: found 'signed_cube'"):
        Decomposition.from_pretrained(tmp_path, target=model)


# -- refused -------------------------------------------------------------------------------------------


def another_bias(model: nn.Module) -> None:
    model.get_parameter("1.bias").data[0] += 1e-9


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            lambda: MLP((5, 4, 3)).double(),
            "^target: fingerprint [0-9a-f]{12} is not that of the model decomposed, [0-9a-f]{12}$",
        ),
        (
            lambda: MLP((5, 6, 3)).double(),
            r"^target: parameter '0\.weight' has shape \(6, 5\), the decomposition is of shape \(4, 5\)$",
        ),
        (
            lambda: nn.Linear(5, 4),
            r"^target: parameter '0\.weight' has shape none, the decomposition is of shape \(4, 5\)$",
        ),
    ],
    ids=["bytes", "shape", "names"],
)
def test_another_target_is_refused(target: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    make()[0].save_pretrained(tmp_path)
    torch.manual_seed(1)
    with pytest.raises(L3DError, match=message):
        Decomposition.from_pretrained(tmp_path, target=target())


def test_a_single_other_byte_is_refused(tmp_path: Path) -> None:
    decomposition, model, _ = make()
    decomposition.save_pretrained(tmp_path)
    another_bias(model)
    with pytest.raises(L3DError, match=r"^target: fingerprint"):
        Decomposition.from_pretrained(tmp_path, target=model)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: edit_config(d, format_version=2),
            r"config\.json has format version 2; this l3d_pl reads version 1$",
        ),
        (lambda d: edit_config(d, format_version=...), "has format version None; this l3d_pl reads version 1$"),
        (lambda d: edit_config(d, n_subnetworks=...), r"config\.json has no entry 'n_subnetworks'$"),
        (lambda d: edit_config(d, n_subnetworks=7), r"tensor '.*core' in .*: found \(6, 2, 2\), expected \(7, 2, 2\)$"),
        (lambda d: (d / "config.json").write_text("[]"), "has format version None"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda d: (d / "config.json").unlink(), r"config\.json is missing$"),
        (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors cannot be read"),
        (lambda d: truncate_file(d / "model.safetensors"), r"model\.safetensors cannot be read"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), r"model\.safetensors cannot be read"),
        (
            lambda d: edit_tensors(d, lambda t: t.pop("v_in.0.bias.core")),
            r"tensor 'v_in\.0\.bias\.core' in .*: found nothing, expected \(6, 2\)$",
        ),
    ],
)
def test_damaged_files_are_one_clear_line(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make()[0].save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(L3DError, match=f"^decomposition: .*{message}") as caught:
        Decomposition.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_target_only_the_directions_can_be_read(tmp_path: Path) -> None:
    decomposition, model, inputs = make()
    decomposition.save_pretrained(tmp_path)
    loaded = Decomposition.from_pretrained(tmp_path)
    assert torch.equal(loaded.direction(2)["0.weight"], decomposition.direction(2)["0.weight"])
    for use in (loaded.encode, loaded.impact, loaded.reconstruction_loss):
        with pytest.raises(L3DError, match=r"^target: none is attached; give the l3d_pl\.targets\.toy\.MLP to"):
            use(inputs)
    assert loaded.attach(model) is loaded
    assert torch.equal(loaded.encode(inputs), decomposition.encode(inputs))


# -- read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_encode_is_the_thresholded_coefficient_against_the_mean(divergence: str) -> None:
    decomposition, model, inputs = make(divergence)
    assert decomposition.mean_reference is not None
    g = per_sample(model, inputs, decomposition.mean_reference.expand(8, -1), divergence)
    c = g @ rows(dense_directions(decomposition.subnetworks.v_in)).T
    decomposition.threshold = threshold = 1.01 * float(c.abs().median())
    expected = torch.where(c.abs() >= threshold, c, 0)
    assert 0 < int((expected != 0).sum()) < expected.numel()
    assert_same(decomposition.encode(inputs), expected)
    references = torch.randn(8, 3).double()
    c = per_sample(model, inputs, references, divergence) @ rows(dense_directions(decomposition.subnetworks.v_in)).T
    assert_same(decomposition.encode((inputs, "labels"), references), torch.where(c.abs() >= threshold, c, 0))


def test_dense_subnetworks_are_kept_and_always_coded(tmp_path: Path) -> None:
    decomposition, model, inputs = make(threshold=1e9)
    decomposition.subnetworks.n_dense = 2
    decomposition.save_pretrained(tmp_path)
    loaded = Decomposition.from_pretrained(tmp_path, target=model)
    codes = loaded.encode(inputs)
    assert (codes[:, :2] != 0).all()
    assert not codes[:, 2:].any()
    assert loaded.reconstruction_loss(inputs) == decomposition.reconstruction_loss(inputs)
    decomposition.subnetworks.n_dense = 0
    assert loaded.reconstruction_loss(inputs) != decomposition.reconstruction_loss(inputs)


def test_a_code_does_not_depend_on_the_rest_of_the_batch() -> None:
    decomposition, _, inputs = make()
    together = decomposition.encode(inputs)
    assert_same(torch.cat([decomposition.encode(inputs[i : i + 1]) for i in range(8)]), together, 1e-12)
    assert_same(decomposition.encode(inputs[[5, 2]]), together[[5, 2]], 1e-12)


def test_encode_without_a_mean_reference_is_one_clear_line() -> None:
    decomposition, _, inputs = make(mean_reference=None)
    with pytest.raises(L3DError, match=r"^encode: this decomposition holds no mean reference .*; give references=$"):
        decomposition.encode(inputs)


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_impact_is_the_directional_derivative_by_finite_differences(divergence: str) -> None:
    """|d D(f(x_i, W0 + delta V_in[k]), y) / d delta|, a central difference on the model itself."""
    decomposition, model, inputs = make(divergence)
    generator, expected = torch.Generator().manual_seed(4), torch.zeros(8, 6).double()
    v_in, saved, epsilon = decomposition.directions("in"), model.state_dict(), 1e-5
    for _ in range(3):
        references = make_references("random", model(inputs), make_divergence(divergence), generator)
        for k in range(6):
            sides = []
            for delta in (epsilon, -epsilon):
                moved = {name: value + delta * v_in[name][k] for name, value in saved.items()}
                outputs = torch.func.functional_call(model, moved, (inputs,))
                sides.append(
                    torch.stack([DIVERGENCES[divergence](o, r) for o, r in zip(outputs, references, strict=True)])
                )
            expected[:, k] += ((sides[0] - sides[1]) / (2 * epsilon)).abs() / 3
    assert_same(decomposition.impact(inputs, n_references=3, seed=4), expected, 1e-6)
    with pytest.raises(L3DError, match=r"^n_references: found 0; at least 1 is needed$"):
        decomposition.impact(inputs, n_references=0)
    with pytest.raises(L3DError, match="found a batch of 1"):
        decomposition.impact(inputs[:1])


@pytest.mark.parametrize("k", [None, 0.1, 1.0])
def test_reconstruction_loss_is_the_dense_computation(k: float | None) -> None:
    decomposition, model, inputs = make()
    references = make_references("random", model(inputs), make_divergence("mse"), torch.Generator().manual_seed(5))
    g = per_sample(model, inputs, references)
    v_in, v_out = (
        rows(dense_directions(side)) for side in (decomposition.subnetworks.v_in, decomposition.subnetworks.v_out)
    )
    c = g @ v_in.T
    codes = c * batch_topk(c.unsqueeze(1), 0.3 if k is None else k)[0][:, 0]
    expected = float((g - codes @ v_out).square().sum() / g.square().sum())
    assert decomposition.reconstruction_loss(inputs, seed=5, k=k) == pytest.approx(expected, rel=1e-6)


def test_directions_are_of_unit_norm_and_perturb_the_target() -> None:
    decomposition, model, inputs = make()
    assert_same(rows(decomposition.directions()).norm(dim=1), torch.ones(6).double(), 1e-5)
    for name, dense in decomposition.directions("in").items():
        assert torch.equal(decomposition.directions("out")[name][4], decomposition.direction(4)[name])
        assert_same(dense, dense_directions(decomposition.subnetworks.v_in)[name])
    before, outputs = fingerprint(model), model(inputs)
    with decomposition.perturbed({4: 0.7}, parameters=["1.bias"]) as moved:
        inner = MLP((5, 4)).double()
        inner.load_state_dict({name: value for name, value in model.state_dict().items() if name.startswith("0.")})
        logits = inner(inputs) @ model[1].weight.T + moved[1].bias
        assert_same(moved(inputs), nn.functional.elu(logits))
        assert not torch.allclose(moved(inputs), outputs)
    assert fingerprint(model) == before
    assert torch.equal(model(inputs), outputs)
