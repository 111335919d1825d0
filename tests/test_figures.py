"""`l3d figures`: pictures of a toy run, the points they are drawn from, sweeps; and benchmarks/gallery.py."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from atlas_run import make_run as analysed_run
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from l3d_pl import Decomposition, Subnetworks
from l3d_pl.atlas.figures import figures_of
from l3d_pl.atlas.pictures import Picture
from l3d_pl.cli import main
from l3d_pl.errors import L3DError
from l3d_pl.figures.effects import Toy, curve, open_toy, scatter
from l3d_pl.figures.make import make_figures
from l3d_pl.targets.toy import MLP, Autoencoder, TiedAutoencoder
from l3d_pl.targets.training import save_target

TARGETS = {
    "tms": (TiedAutoencoder(5, 2), {"features": 5, "hidden": 2}, 5, 1),
    "tms_40_10": (TiedAutoencoder(40, 10), {"features": 40, "hidden": 10}, 40, 1),
    "tmcs": (Autoencoder(6, 3), {"features": 6, "hidden": 3}, 6, 1),
    "high_rank": (Autoencoder(9, 3), {"features": 9, "hidden": 3}, 9, 3),
    "squared": (MLP((5, 6, 6, 6, 6, 5)), {"sizes": [5, 6, 6, 6, 6, 5]}, 5, 1),
}
FIGURES = {"networks", "directions", "intervention", "hidden_layers", "delta", "several"}


def make_run(folder: Path, task: str, n: int = 4) -> Path:
    """A toy run that was never trained: random weights, random subnetworks, all of them live but the last."""
    target, settings, features, group_size = TARGETS[task]
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in target.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.5)
    folder.mkdir(parents=True)
    truth = {"truth.A": torch.rand(features, features) * 3} if task == "tmcs" else {}
    save_file(dict(target.state_dict()) | truth, folder / "target.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in target.named_parameters()}
    subnetworks = Subnetworks(shapes, n, 1, generator=torch.Generator().manual_seed(1))
    subnetworks.normalise_()
    data = {
        "task": task.removesuffix("_40_10"),
        "n_features": features,
        "group_size": group_size,
        "n_val": 80,
        "probability": 0.3,
    }
    config = {
        "model": {
            "target": {"class_path": f"l3d_pl.targets.toy.{type(target).__name__}", "init_args": settings},
            "target_weights": str(folder / "target.safetensors"),
        },
        "data": {"class_path": "datamodules.toy.ToyData", "init_args": data},
    }
    p_act = torch.tensor([0.1] * (n - 1) + [0.0])
    decomposition = Decomposition(subnetworks, target, threshold=0.5, p_act=p_act, run_config=config)
    decomposition.save_pretrained(folder / "decomposition")
    return folder


def by_hand(toy: Toy, push: dict[int, float], names: list[str] | None = None) -> Tensor:
    """Outputs at W0 + sum of δ v, minus those at W0, [N, outputs], with a copy of the target's tensors."""
    decomposition = toy.decomposition
    tensors = {name: tensor.clone() for name, tensor in decomposition.target.named_parameters()}
    for k, delta in push.items():
        v = {name: tucker.dense()[k] for name, tucker in decomposition.subnetworks.v_out.tuckers().items()}
        overlap = sum((v[name] * tensors0).sum() for name, tensors0 in decomposition.target.named_parameters())
        sign = -1 if overlap < 0 else 1
        for name in names or v:
            tensors[name] = tensors[name] + sign * delta * v[name]
    with torch.no_grad():
        moved = torch.func.functional_call(decomposition.target, tensors, (toy.inputs,))
        return moved - decomposition.target(toy.inputs)


@pytest.mark.parametrize("task", TARGETS)
def test_the_command_draws_every_figure(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", task)
    assert main(["figures", str(run)]) == 0
    names = FIGURES | ({"A_hat"} if task == "tmcs" else set())
    assert {path.stem for path in (run / "figures").glob("*.png")} == names
    for name in names:
        with Image.open(run / "figures" / f"{name}.png") as image:
            assert min(image.size) > 200
            assert sum(count > 0 for count in image.convert("L").histogram()) > 10  # something is on it
    assert capsys.readouterr().out.count(".png: ") == len(names)

    # The atlas shows them, less what it draws itself; not those of an earlier fit.
    kept = json.loads((run / "figures" / "figures.json").read_text())
    assert {figure["file"] for figure in kept["figures"]} == {f"{name}.png" for name in names}
    assert not any("Shown are" in figure["caption"] + figure["alt"] for figure in kept["figures"]), "all are"
    assert shown_in(run) == {f"pictures/{name}.png" for name in names - {"networks", "directions"}}
    assert all((run / "atlas" / file).is_file() for file in shown_in(run))
    (run / "figures" / "figures.json").write_text(json.dumps(kept | {"decomposition": "another"}))
    assert main(["report", str(run)]) == 0
    assert shown_in(run) == set()


def shown_in(run: Path) -> set[str]:
    text = (run / "atlas" / "data" / "overview.js").read_text()
    return {figure["file"] for figure in json.loads(text[text.index(",") + 1 : text.rindex(")")])["figures"]}


def test_what_a_figure_leaves_out_it_says(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tms_40_10", n=16)
    toy, figures = open_toy(run), {made.path.stem: made for made in make_figures(run) if isinstance(made, Picture)}
    for name in ("intervention", "hidden_layers", "delta"):
        assert "Shown are the first 12 of 15 live subnetworks." in figures[name].caption
        assert figures[name].alt.endswith("Shown are the first 12 of 15 live subnetworks.")
        assert figures[name].alt.count("feature ") == 12
    n_circuits = len({toy.circuits[k] for k in toy.live})
    assert f"Shown are the first 5 of {n_circuits} circuits." in figures["several"].caption
    # Medians are over all of them.
    step = toy.step()
    pushes = zip(toy.live, scatter(toy, [{k: step} for k in toy.live]), strict=True)
    ratios = sorted(
        dots.mean_change([toy.circuits[k]]) / dots.mean_change([toy.circuits[k]], others=True) for k, dots in pushes
    )
    assert (
        f"moves {ratios[7]:.3g} times as much as others (median over 15 subnetworks)" in figures["intervention"].caption
    )
    ends = [curve(toy, k, step) for k in toy.live]
    ratios = sorted(found.own[0] / found.others[0] for found in ends)
    assert f"median over 15 subnetworks: {ratios[7]:.3g} at δ = {-2 * step:g}" in figures["delta"].caption


@pytest.mark.parametrize("task", TARGETS)
def test_points_equal_perturbed_forward_passes(task: str, tmp_path: Path) -> None:
    toy = open_toy(make_run(tmp_path / "run", task))
    assert toy.live == sorted(range(3), key=lambda k: (toy.circuits[k], k))  # the last is dead
    for push, names in (({1: 0.3}, None), ({0: -0.4, 2: 0.7}, None), ({1: 0.3}, toy.hidden)):
        [found] = scatter(toy, [push], names)
        change, own = by_hand(toy, push, names), {toy.circuits[k] for k in push}
        if task in ("tms", "tms_40_10", "squared"):
            expected = [
                (float(x), float(y), j)
                for row, moved in zip(toy.inputs, change, strict=True)
                for j, (x, y) in enumerate(zip(row, moved, strict=True))
            ]
        else:
            expected = []
            for row, moved in zip(toy.inputs, change, strict=True):
                groups = [float(row[i : i + toy.group_size].sum()) for i in range(0, len(row), toy.group_size)]
                speaking = [c for c in range(len(groups)) if groups[c] != 0 and c in own] or range(len(groups))
                c = max(speaking, key=lambda c: groups[c])
                expected.append((groups[c], float(moved.abs().mean()), c))
        x, y, circuit = (torch.tensor(column) for column in zip(*expected, strict=True))
        torch.testing.assert_close(found.x, x)
        torch.testing.assert_close(found.y, y, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.circuit, circuit)
        mine = [abs(b) for a, b, c in expected if c in own and a != 0]
        assert found.mean_change(sorted(own)) == pytest.approx(sum(mine) / len(mine), rel=1e-4)
        others = [abs(b) for a, b, c in expected if c not in own and a != 0]
        assert found.mean_change(sorted(own), others=True) == pytest.approx(sum(others) / len(others), rel=1e-4)


def test_curve_is_zero_at_zero_and_the_scatters_mean_at_its_step(tmp_path: Path) -> None:
    toy = open_toy(make_run(tmp_path / "run", "tms"))
    found = curve(toy, 1, step=0.2)
    assert found.own[found.deltas.index(0)] == found.random_own[found.deltas.index(0)] == 0
    place = [round(delta, 6) for delta in found.deltas].index(-0.2)
    [points] = scatter(toy, [{1: -0.2}])
    assert found.own[place] == pytest.approx(points.mean_change([toy.circuits[1]]), rel=1e-5)
    assert found.others[place] == pytest.approx(points.mean_change([toy.circuits[1]], others=True), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "without"),
    [("tms", {"b"}), ("high_rank", {"W_out", "b"}), ("squared", {"4.weight", "4.bias"})],
)
def test_hidden_layers_leave_the_last_one_alone(task: str, without: set[str], tmp_path: Path) -> None:
    toy = open_toy(make_run(tmp_path / "run", task))
    assert set(toy.decomposition.subnetworks.shapes) - set(toy.hidden) == without


def test_sweeps_fit_once_and_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards
    monkeypatch.setenv("L3D_QUIET_SUMMARY", "1")
    save_target("t.safetensors", trained(TiedAutoencoder(5, 2)))
    short = ["--trainer.max_epochs", "2", "--data.steps_per_epoch", "20", "--trainer.default_root_dir", "run"]
    assert main(["fit", "--config", "tms", "--model.target_weights", "t.safetensors", *short]) == 0
    sweep = ["figures", "run", "--sweeps", "--max-epochs", "1"]
    values = ["--ranks", "1", "2", "--n_v", "3"]
    assert main([*sweep, *values]) == 0
    cells = {path.parent.name: json.loads(path.read_text()) for path in Path("run/figures/sweeps").glob("*/cell.json")}
    assert set(cells) == {"rank_1", "rank_2", "n_v_3"}
    for name, cell in cells.items():
        found = Decomposition.from_pretrained(f"run/figures/sweeps/{name}/decomposition")
        assert cell["loss"] == pytest.approx(found.figures["val/loss"], rel=1e-5)
        assert (cell["live"], cell["steps"]) == (int((found.p_act > 0).sum()), 20)
    assert found_ranks("rank_2") == [2, 2]
    assert Decomposition.from_pretrained("run/figures/sweeps/n_v_3/decomposition").n_subnetworks == 3
    assert Path("run/figures/loss_rank.png").is_file()
    assert not Path("run/figures/loss_n_v.png").exists()  # one point is no curve

    # What is there stays, what is missing is made.
    written = Path("run/figures/sweeps/rank_1/cell.json").stat().st_mtime_ns
    assert main([*sweep, "--ranks", "1", "--n_v", "3", "2"]) == 0
    assert Path("run/figures/sweeps/rank_1/cell.json").stat().st_mtime_ns == written
    assert Path("run/figures/loss_n_v.png").is_file()
    capsys.readouterr()
    assert main(["figures", "run", "--sweeps", *values]) == 2
    assert "run/figures/sweeps is of" in capsys.readouterr().err


def found_ranks(cell: str) -> list[int]:
    return list(Decomposition.from_pretrained(f"run/figures/sweeps/{cell}/decomposition").subnetworks.ranks["W_in"])


def trained(model: nn.Module) -> nn.Module:
    """Weights like those of a trained TMS: features at the corners of a pentagon."""
    angles = torch.arange(5) * 2 * torch.pi / 5
    with torch.no_grad():
        model.W_in.copy_(torch.stack([angles.cos(), angles.sin()], 1))
        model.b.fill_(-0.2)
    return model


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "tms")
    for args, words in (
        ([str(tmp_path)], "holds no decomposition/config.json"),
        ([str(analysed_run(tmp_path / "text"))], "is no toy run"),
        ([str(run), "--ranks", "1"], "--sweeps, which is missing"),
        ([str(run), "--sweeps"], "there is no"),
    ):
        capsys.readouterr()
        assert main(["figures", *args]) == 2
        assert words in capsys.readouterr().err
    (run / "config.yaml").write_text("model: {}")
    assert main(["figures", str(run), "--sweeps", "--ranks", "0"]) == 2
    assert "ranks: found 0, allowed are whole numbers >= 1" in capsys.readouterr().err


def test_a_figure_that_cannot_be_drawn_is_a_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tms", n=1)  # the only subnetwork is dead
    drawn = make_figures(run)
    assert [str(made) for made in drawn if isinstance(made, str)] == [
        f"No figure {name}: every subnetwork is dead (P_act = 0), so there is none to push"
        for name in ("intervention", "hidden_layers", "delta", "several")
    ]


def test_the_atlas_refuses_a_damaged_figure(tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    figures.mkdir()
    (tmp_path / "pictures").mkdir()
    words = [{"file": "../delta.png", "alt": "a", "caption": "c"}]
    (figures / "figures.json").write_text(json.dumps({"decomposition": "d", "figures": words}))
    for content in (b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n", None):
        if content is not None:
            (figures / "delta.png").write_bytes(content)
        else:
            (figures / "delta.png").unlink()
        with pytest.raises(L3DError, match="`l3d figures"):
            figures_of(tmp_path, "d", tmp_path / "pictures")
    Image.new("L", (3, 3)).save(figures / "delta.png")
    assert figures_of(tmp_path, "d", tmp_path / "pictures") == [
        {"file": "pictures/delta.png", "alt": "a", "caption": "c"}
    ]
    assert figures_of(tmp_path, "another", tmp_path / "pictures") == []


# -- benchmarks/gallery.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", Path(__file__).parents[1] / "benchmarks" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gallery_draws_by_seed_and_quotes_inertly(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = analysed_run(tmp_path / "run", "text", n_v=12, hostile=True)
    script.main([str(run), "--seed", "3", "--n", "5"])
    page = capsys.readouterr().out
    script.main([str(run), "--seed", "3", "--n", "5"])
    assert capsys.readouterr().out == page
    script.main([str(run), "--seed", "4", "--n", "5"])
    assert capsys.readouterr().out != page
    assert page.count("**Subnetwork ") == 5
    for tag in ("<script", "<img", "<svg", "</script"):
        assert tag not in page.replace("\\<", "")
    assert "\\<script\\>" in page
    assert all(line.count("<b>⟦") <= 1 and "\u202e" not in line for line in page.splitlines())
    assert page.count("⟧</b>") == 20
    # The tables of this run: v moves three times what the controls do, everything four times more than elsewhere.
    assert len(re.findall(r"- selectivity v 4\.00, random 4\.00( ± 0\.30)?, gradient 4\.00", page)) == 5
    assert page.count("- moved v 0.600, random 0.200, gradient 0.200") == 5

    with pytest.raises(L3DError, match=r"delta: found 7, allowed are 0\.2, 0\.5, 1"):
        script.main([str(run), "--delta", "7"])
    with pytest.raises(L3DError, match="is of image, allowed is text"):
        script.main([str(analysed_run(tmp_path / "images", "image"))])
