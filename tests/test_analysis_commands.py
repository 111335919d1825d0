"""`l3d analyze`, `intervene`, `compare` on a run's directory; and an analysis on two ranks: `python ... FOLDER`."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from processes import l3d
from safetensors.torch import save_file
from torch import distributed as dist
from torch.func import functional_call

from l3d_pl import Decomposition, Subnetworks
from l3d_pl.analysis import survey
from l3d_pl.analysis.analyse import Closer
from l3d_pl.analysis.intervene import _along, _suffix, mean_gradient
from l3d_pl.analysis.runs import load_run, open_run, several_processes
from l3d_pl.analysis.tables import KINDS, read_manifest, read_table
from l3d_pl.cli import main
from l3d_pl.targets.frozen import fingerprint
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
    alone = pd.read_csv(run / "analysis" / "interventions" / "3-in-b.csv")
    assert alone["delta_3"].tolist() == manifest["deltas"] * 3
    about = read_manifest(run / "analysis" / "interventions", "3-in-b.json")
    assert about["arguments"] == {"subnetworks": [3], "deltas": None, "parameters": ["b"], "grid": False}
    for key in ("fingerprint", "decomposition", "seed", "n_top", "n_background", "n_controls", "versions"):
        assert about[key] == manifest[key] is not None
    # Only b has moved: a small step of the whole v_3 in b alone.
    row = alone[(alone["control"] == "subnetwork") & (alone["delta_3"] == max(manifest["deltas"]))].iloc[0]
    top = samples[(samples["subnetwork"] == 3) & (samples["kind"] == "top")]["sample"].tolist()
    x, model = opened.entries("val").pick(top)["inputs"], opened.decomposition.target
    before = model(x)
    model.b.data += row["delta_3"] * opened.decomposition.direction(3)["b"]
    assert row["relevant"] == pytest.approx(float((model(x) - before).abs().sum(1).mean()), rel=1e-4)
    names = [_suffix(patterns) for patterns in (["*.weight"], ["?.weight"], ["b"], ["W_in", "b"], None)]
    assert names[2:] == ["-in-b", "-in-W_in+b", ""]
    assert len(set(names)) == 5
    assert all("/" not in name and "*" not in name for name in names)

    # Alone, in all tensors and at the analysis' own steps it is the analysis' own table, and the same controls.
    capsys.readouterr()
    assert main(["intervene", str(run), "--subnetwork", "3"]) == 0
    scale = max(manifest["deltas"])
    assert f"up to ±{scale:g}, where outputs move clearly\n" in capsys.readouterr().out
    alone = pd.read_csv(run / "analysis" / "interventions" / "3.csv")
    curves = read_table(run / "analysis", "curves", 3)
    for control in ("subnetwork", "random"):
        mine, its = (frame[frame["control"] == control] for frame in (alone, curves))
        for column in ("relevant", "irrelevant", "selectivity", "outputs_selectivity", "selectivity_std"):
            assert mine[column].tolist() == pytest.approx(its[column].tolist(), rel=1e-5, nan_ok=True)
    assert main(["intervene", str(run), "--subnetwork", "3", "--delta", str(-4 * scale)]) == 0
    assert "the largest here is 4 times that" in capsys.readouterr().out

    assert main(["compare", str(run), str(other)]) == 0
    table = pd.read_csv(run / "analysis" / "compare" / "b.csv")
    assert sorted(table["other"]) == [0, 1, 2, 3]
    assert (run / "analysis" / "compare" / "b.png").stat().st_size > 1000
    about = read_manifest(run / "analysis" / "compare", "b.json")
    assert [side["decomposition"] for side in about["runs"]] == [
        fingerprint(load_run(folder).subnetworks) for folder in (run, other)
    ]
    elsewhere = make_run(tmp_path / "elsewhere" / "b", seed=2, n=3)  # another of the same name
    assert main(["compare", str(run), str(elsewhere)]) == 0
    assert len(list((run / "analysis" / "compare").glob("b*.csv"))) == 2
    assert len(pd.read_csv(run / "analysis" / "compare" / "b.csv")) == 4


def test_an_analysis_of_an_earlier_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, later = make_run(tmp_path / "run"), make_run(tmp_path / "later", seed=1)
    assert main(["analyze", str(run), "--samples", "20"]) == 0
    assert main(["intervene", str(run), "--subnetwork", "0"]) == 0
    shutil.rmtree(run / "decomposition")
    (later / "decomposition").rename(run / "decomposition")
    assert "is of an earlier fit; `l3d analyze" in error_of(capsys, "intervene", str(run), "--subnetwork", "0")


def test_a_stop_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original, calls = make_run(tmp_path / "run"), Closer.outputs, 0

    def stop(self: Closer, k: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, k)

    monkeypatch.setattr(Closer, "outputs", stop)
    monkeypatch.setattr(survey, "SAY_EVERY", 0.0)
    capsys.readouterr()
    assert main(["analyze", str(run), "--batch-size", "16"]) == 130
    found = capsys.readouterr()
    (line,) = found.err.strip().splitlines()
    assert "stopped; what was done is kept in" in line
    assert "the same command goes on from there" in line
    assert "samples: 4 of 4" in found.out  # without a terminal: lines
    assert main(["analyze", str(run), "--batch-size", "16"]) == 0
    assert calls == 3 + 4  # two were done before


def test_each_rank_has_its_place_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun says; what srun says is what `test_two_ranks_are_one_process` goes by."""
    # In a batch script there is one process, whatever was asked for.
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with several_processes("cuda") as (ranks, device):
        assert (ranks.size, device) == (1, "cuda")
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **named: chosen.append((*args, named["rank"])))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with several_processes("cuda") as (_, device):
        assert device == "cuda:1"
    assert chosen == ["cuda:1", ("nccl", 3)]


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
    (along,) = _along(found, [{2: -0.3}], iter([{"b": -0.3 * direction["b"]}]))  # as far as v_2 goes in b, and its sign
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
    twice = error_of(capsys, "intervene", str(run), "--subnetwork", "3", "--subnetwork", "3")
    assert "subnetwork: found 3, 3, allowed is each once" in twice
    assert "controls: found 0" in error_of(capsys, "analyze", str(run), "--controls", "0")
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
    started, logs = [], [tmp_path / "rank0", tmp_path / "rank1"]
    for rank, log in enumerate(logs):
        environment = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port}
        started.append(l3d(["analyze", str(both), *arguments], log, **environment))
    try:
        for process in started:
            process.join(200)
    finally:
        for process in started:
            process.kill()
    assert [process.exitcode for process in started] == [0, 0], [log.read_text() for log in logs]
    for name, n_rows in read_manifest(alone / "analysis")["tables"].items():
        one, two = (read_table(folder / "analysis", name) for folder in (alone, both))
        assert n_rows > 0 or name == "coactivation"  # (there may be no such pair)
        pd.testing.assert_frame_equal(one, two, rtol=TOLERANCE, atol=TOLERANCE, check_exact=False)
    exact = ["subnetwork", "kind", "place", "sample", "position", "active", "impact", "coefficient"]
    one, two = (read_table(folder / "analysis", "samples")[exact] for folder in (alone, both))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert list((both / "analysis").glob(".*")) == []
