"""`l3d analyze`, `intervene`, `compare` on a run's directory; and an analysis on two ranks: `python ... FOLDER`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from l3d_pl import Decomposition, Subnetworks
from l3d_pl.analysis.intervene import _along, mean_gradient
from l3d_pl.analysis.runs import open_run
from l3d_pl.analysis.tables import KINDS, read_manifest, read_table
from l3d_pl.cli import main
from l3d_pl.targets.toy import MLP, TiedAutoencoder

TOLERANCE = 1e-9


def make_run(folder: Path, seed: int = 0, n: int = 6) -> Path:
    """A run's directory: a decomposition of a small model with random weights, of toy data, that was never trained."""
    torch.manual_seed(0)
    target = TiedAutoencoder(5, 2)
    folder.mkdir(parents=True)
    save_file(target.state_dict(), folder / "target.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in target.named_parameters()}
    subnetworks = Subnetworks(shapes, n, 1, generator=torch.Generator().manual_seed(seed))
    data = {"class_path": "datamodules.toy.ToyData", "init_args": {"task": "tms", "n_features": 5, "n_val": 60}}
    model = {
        "target": {"class_path": "l3d_pl.targets.toy.TiedAutoencoder", "init_args": {"features": 5, "hidden": 2}},
        "target_weights": str(folder / "target.safetensors"),
    }
    decomposition = Decomposition(subnetworks, target, threshold=0.5, run_config={"model": model, "data": data})
    decomposition.save_pretrained(folder / "decomposition")
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert main(list(args)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_analyze_intervene_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, n=4)
    assert main(["analyze", str(run), "--batch-size", "16", "--references", "2"]) == 0
    assert "6 of 6 subnetworks, most active first" in capsys.readouterr().out
    manifest = read_manifest(run / "analysis")
    assert (manifest["n_samples"], manifest["n_references"], manifest["split"]) == (60, 2, "val")
    samples = read_table(run / "analysis", "samples")
    assert set(samples["kind"]) <= set(KINDS)
    assert (run / "analysis" / "samples.csv").is_file()

    steps = ["--delta", "-0.2", "0", "0.3"]
    assert main(["intervene", str(run), "--subnetwork", "3", "--subnetwork", "5", *steps, "--grid"]) == 0
    grid = pd.read_parquet(run / "analysis" / "interventions" / "3-5-grid.parquet")
    assert grid["control"].tolist() == ["subnetwork"] * 9 + ["random"] * 9 + ["gradient"] * 9
    still = (grid["delta_3"] == 0) & (grid["delta_5"] == 0)
    assert grid[still]["relevant"].tolist() == [0, 0, 0]
    assert (grid[~still]["relevant"] > 0).all()
    effects = pd.read_parquet(run / "analysis" / "interventions" / "3-5-grid-effects.parquet")
    opened = open_run(run)
    row = effects[(effects["delta_3"] == -0.2) & (effects["delta_5"] == 0.3)].iloc[0]
    x = opened.entries("val").pick([int(row["sample"])])["inputs"]
    with opened.decomposition.perturbed({3: -0.2, 5: 0.3}) as model:
        assert row["value"] == pytest.approx(float(model(x)[0, int(row["output"])]), abs=1e-6)
    assert main(["intervene", str(run), "--subnetwork", "3", "--parameters", "b"]) == 0
    alone = pd.read_csv(run / "analysis" / "interventions" / "3.csv")
    assert alone["delta_3"].tolist() == manifest["deltas"] * 3

    # Alone, in all tensors and at the analysis' own steps it is the analysis' own table, and the same controls.
    capsys.readouterr()
    assert main(["intervene", str(run), "--subnetwork", "3"]) == 0
    scale = max(manifest["deltas"])
    assert f"up to ±{scale:g}, where outputs move clearly\n" in capsys.readouterr().out
    alone = pd.read_csv(run / "analysis" / "interventions" / "3.csv")
    curves = read_table(run / "analysis", "curves", 3)
    for control in ("subnetwork", "random"):
        mine, its = (frame[frame["control"] == control] for frame in (alone, curves))
        for column in ("relevant", "irrelevant", "selectivity"):
            assert mine[column].tolist() == pytest.approx(its[column].tolist(), rel=1e-5, nan_ok=True)
    assert main(["intervene", str(run), "--subnetwork", "3", "--delta", str(-4 * scale)]) == 0
    assert "the largest here is 4 times that" in capsys.readouterr().out

    assert main(["compare", str(run), str(other)]) == 0
    table = pd.read_csv(run / "analysis" / "compare" / "b.csv")
    assert sorted(table["other"]) == [0, 1, 2, 3]
    assert (run / "analysis" / "compare" / "b.png").stat().st_size > 1000


def test_the_gradient_beside_an_intervention_is_the_mean_gradient(tmp_path: Path) -> None:
    decomposition = open_run(make_run(tmp_path / "run")).decomposition
    x, chosen = torch.rand(7, 5), torch.tensor([1, 2, 5])
    decomposition.mean_reference = decomposition.target(x).mean(0)
    found = mean_gradient(decomposition, {"inputs": x}, chosen, 0)
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in decomposition.target.named_parameters()}
    loss = (functional_call(decomposition.target, parameters, x[chosen]) - decomposition.mean_reference).square().sum()
    for name, expected in zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True):
        torch.testing.assert_close(found[name], expected)

    direction = decomposition.direction(2)
    (along,) = _along(found, [{2: -0.3}], [{"b": -0.3 * direction["b"]}])  # as far as v_2 goes in b, and its sign
    torch.testing.assert_close(along["b"], -0.3 * direction["b"].norm() * found["b"] / found["b"].norm())


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert "holds no decomposition/config.json" in error_of(capsys, "analyze", str(tmp_path / "rum"))
    assert "split: found 'vl', allowed are train, val, test" in error_of(capsys, "analyze", str(run), "--split", "vl")
    assert "references: found 0" in error_of(capsys, "analyze", str(run), "--references", "0")
    assert "samples: found 1" in error_of(capsys, "analyze", str(run), "--samples", "1")
    assert "`l3d analyze RUN` makes it" in error_of(capsys, "intervene", str(run), "--subnetwork", "0")
    assert main(["analyze", str(run), "--samples", "20"]) == 0
    assert "subnetwork: found 6; allowed are 0 to 5" in error_of(capsys, "intervene", str(run), "--subnetwork", "6")
    line = error_of(capsys, "intervene", str(run), "--subnetwork", "0", "--parameters", "W_on")
    assert "'W_on' matches none of the decomposed tensors; did you mean 'W_in'?" in line
    (run / "target.safetensors").rename(run / "gone")
    assert "target.safetensors is not there any more (looked from" in error_of(capsys, "analyze", str(run))
    save_file(TiedAutoencoder(5, 2).state_dict(), run / "target.safetensors")
    assert "is not that of the model decomposed" in error_of(capsys, "analyze", str(run))


def test_a_run_without_its_configuration_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    path = run / "decomposition" / "config.json"
    config = json.loads(path.read_text())
    config["run_config"]["data"]["class_path"] = "my_data.Gone"
    path.write_text(json.dumps(config))
    assert "data: my_data.Gone cannot be made again" in error_of(capsys, "analyze", str(run))
    path.write_text(json.dumps(config | {"run_config": None}))
    assert "keeps no 'model.target' in its configuration" in error_of(capsys, "analyze", str(run))


def test_other_models_can_be_compared_where_tensors_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = make_run(tmp_path / "run"), tmp_path / "other"
    model = MLP((5, 4, 3))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    Decomposition(Subnetworks(shapes, 3, 1), model).save_pretrained(other / "decomposition")
    assert "no tensor is decomposed in both" in error_of(capsys, "compare", str(run), str(other))


@pytest.mark.distributed
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    alone, both = make_run(tmp_path / "alone"), make_run(tmp_path / "both")
    arguments = ["--batch-size", "8", "--references", "2"]
    assert main(["analyze", str(alone), *arguments]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "l3d_pl.cli", "analyze", str(both), *arguments],
                env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    for name, n_rows in read_manifest(alone / "analysis")["tables"].items():
        one, two = (read_table(folder / "analysis", name) for folder in (alone, both))
        assert n_rows > 0
        pd.testing.assert_frame_equal(one, two, rtol=TOLERANCE, atol=TOLERANCE, check_exact=False)
    exact = ["subnetwork", "kind", "place", "sample", "position", "active", "impact", "coefficient"]
    one, two = (read_table(folder / "analysis", "samples")[exact] for folder in (alone, both))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert list((both / "analysis").glob(".*")) == []
