"""`l3d export`: what a checkpoint of any strategy holds, in the memory of a small machine."""

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from checkpoint_run import fit as fit_midway
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from datamodules.toy import ToyData
from l3d_pl import L3D, Decomposition, L3DError
from l3d_pl.callbacks import Checkpoints, ExportDecomposition
from l3d_pl.checkpoints import AtomicCheckpointIO, named_tensors, replaced, save_sharded
from l3d_pl.cli import main
from l3d_pl.export import export_checkpoint, export_decomposition
from l3d_pl.streamed import entry_of, write_safetensors
from l3d_pl.targets.toy import Autoencoder
from l3d_pl.toys import quiet_trainer

HERE = Path(__file__).parent


def huber(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.huber_loss(output, reference, reduction="none").sum(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three restarts, and a divergence of the user's own."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    module = L3D(Autoencoder(10, 5), n_subnetworks=7, ranks=2, restarts=3, init_samples=60, divergence=huber, seed=3)
    module.run_config = {"model": {"k": 0.1}, "trainer": None}
    trainer = quiet_trainer(
        max_epochs=2,
        default_root_dir=root,
        callbacks=[ExportDecomposition(), Checkpoints()],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True,
    )
    trainer.fit(module, ToyData(n_features=10, points=100, batch_size=16, seed=1, n_val=20, n_test=20))
    return root


def settings_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    config["provenance"].pop("created")
    return config


def shard(source: Path, folder: Path) -> Path:
    """The sharded form of a checkpoint, as a single process writes it."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        content = AtomicCheckpointIO().load_checkpoint(source)

        def sharded(name: str, tensor: torch.Tensor) -> torch.Tensor:
            is_v = "subnetworks" in name or "exp_avg" in name
            return distribute_tensor(tensor, mesh, [Shard(0)]) if is_v else tensor

        save_sharded(replaced(content, sharded), folder)
    finally:
        dist.destroy_process_group()
    return folder


@pytest.mark.distributed
def test_export_is_what_the_run_itself_has_left(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints/last.ckpt"
    for name, source in (("file", file), ("directory", shard(file, tmp_path / "sharded.ckpt"))):
        assert main(["export", str(source), str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
        found, expected = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / name, run / "decomposition")
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert settings_of(tmp_path / name) == settings_of(run / "decomposition")
        assert (tmp_path / name / "README.md").read_text() == (run / "decomposition/README.md").read_text()
        assert oct((tmp_path / name / "model.safetensors").stat().st_mode)[-3:] == "644"
        torch.manual_seed(1)
        loaded = Decomposition.from_pretrained(tmp_path / name, target=Autoencoder(10, 5), divergence=huber)
        assert loaded.encode(torch.rand(4, 10)).shape == (4, 7)


@pytest.mark.distributed
def test_one_file_of_a_sharded_checkpoint_is_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shard(run / "checkpoints/last.ckpt", tmp_path / "sharded.ckpt")
    assert main(["export", "--checkpoint", str(source), str(tmp_path / "deep/one.ckpt")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'deep/one.ckpt'}\n"
    found, expected = (
        torch.load(path, weights_only=True) for path in (tmp_path / "deep/one.ckpt", run / "checkpoints/last.ckpt")
    )
    tensors = dict(named_tensors(found))
    assert tensors.keys() == dict(named_tensors(expected)).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in named_tensors(expected))

    def without(tree: Any) -> Any:
        return replaced(tree, lambda name, tensor: None)

    assert without(found) == without(dict(expected))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one.ckpt"]


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run / "checkpoints/last.ckpt"

    def changed(name: str, **entries: Any) -> Path:
        AtomicCheckpointIO().save_checkpoint(torch.load(good, weights_only=True) | entries, tmp_path / name)
        return tmp_path / name

    l3d = torch.load(good, weights_only=True)["l3d"]
    fewer = l3d["decomposition"] | {"n_subnetworks": 6}
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:-200])
    torch.save([1], tmp_path / "list.ckpt")
    cases: list[tuple[list[Path | str], str]] = [
        (["nowhere.ckpt", tmp_path / "x"], "checkpoint: there is no file nowhere.ckpt"),
        ([tmp_path / "cut.ckpt", tmp_path / "x"], "cut.ckpt is damaged or no checkpoint"),
        ([tmp_path / "list.ckpt", tmp_path / "x"], "list.ckpt is damaged or no checkpoint (it holds list)"),
        ([run / "decomposition", tmp_path / "x"], "is a directory without manifest.json, and no checkpoint"),
        ([changed("a.ckpt", l3d=None), tmp_path / "x"], "a.ckpt was not written by L3D (no entry 'l3d')"),
        ([changed("b.ckpt", l3d=l3d | {"decomposition": None}), tmp_path / "x"], "does not say what it decomposes"),
        ([changed("c.ckpt", l3d=l3d | {"decomposition": {}}), tmp_path / "x"], "c.ckpt is damaged or no checkpoint"),
        (
            [changed("d.ckpt", l3d=l3d | {"decomposition": fewer}), tmp_path / "x"],
            "d.ckpt: found [21, 2, 2], expected [18, 2, 2]",
        ),
        ([good, good], "last.ckpt is a file; allowed is a directory"),
        ([good, good / "x"], "last.ckpt/x cannot be written (Not a directory)"),
        (["--checkpoint", good, tmp_path], "is a directory; allowed is a file"),
        ([good], "l3d export: the following arguments are required: destination"),
    ]
    for args, message in cases:
        assert main(["export", *map(str, args)]) == 2, message
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_streamed_file_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "many": torch.randn(9000, 1000),  # more than one piece
        "transposed": torch.arange(6).view(2, 3).T,
    }
    entries = {name: entry_of(tensor) for name, tensor in tensors.items()}
    found = write_safetensors(tmp_path / "a", entries, {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "b", {"format": "pt"})
    assert found["bytes"] == (tmp_path / "a").stat().st_size
    for name, tensor in load_file(tmp_path / "a").items():
        assert torch.equal(tensor, tensors[name]), name
    header, its = (
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for content in ((tmp_path / name).read_bytes() for name in "ab")
    )
    assert header["__metadata__"] == its["__metadata__"]
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
        assert all(header[name][key] == its[name][key] for key in ("dtype", "shape"))


MEASURE = """
import sys, threading, time
from pathlib import Path
from l3d_pl.export import export_checkpoint, export_decomposition

def mebibytes(key):  # not ru_maxrss: a process inherits its parent's peak
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

def watch():  # pages that are of no file: those of a file can be dropped when memory is short
    while True:
        seen.append(mebibytes("RssAnon"))
        time.sleep(0.002)

source, out, small, seen = *map(Path, sys.argv[1:]), []
export_decomposition(small, out)  # code that is loaded at its first use is not counted
before = mebibytes("VmRSS")
export_decomposition(source, out)
print(mebibytes("VmHWM") - before)
threading.Thread(target=watch, daemon=True).start()
before = mebibytes("RssAnon")
export_checkpoint(source, out / "one.ckpt")
print(max(seen) - before)
"""


@pytest.mark.distributed
def test_v_larger_than_the_memory_it_takes(run: Path, tmp_path: Path) -> None:
    """230 MiB of V, exported with less than a third of that in the process's memory at any moment."""
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    n_v, rank = 3000, 100
    settings = content["l3d"]["decomposition"]
    settings |= {"n_subnetworks": n_v, "restarts": 1, "parameters": {"w": {"shape": [rank, 5], "ranks": [rank, 1]}}}
    row = {"core": (rank, 1), "factor0": (rank, rank), "factor1": (5, 1)}
    state = {
        f"subnetworks.{side}.w.{name}": torch.ones(n_v, *shape)
        for side in ("v_in", "v_out")
        for name, shape in row.items()
    }
    state |= {"p_act": torch.zeros(1, n_v), "held_out_loss": torch.zeros(1), "threshold.value": torch.zeros(1)}
    size = sum(tensor.nbytes for tensor in state.values()) / 2**20
    content |= {"state_dict": state, "optimizer_states": []}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "one.ckpt")
    shard(tmp_path / "one.ckpt", tmp_path / "sharded.ckpt")
    assert size > 220
    for source in ("one.ckpt", "sharded.ckpt"):
        out = tmp_path / f"of_{source}"
        done = processes.run(["-c", MEASURE, str(tmp_path / source), str(out), str(run / "checkpoints/last.ckpt")], 120)
        for mebibytes in map(float, done.stdout.split()):
            assert mebibytes < size / 3, done.stdout
        assert (out / "model.safetensors").stat().st_size > size * 2**20


@pytest.mark.distributed
def test_resumed_on_other_ranks_and_under_another_strategy_it_ends_at_the_same(tmp_path: Path) -> None:
    """Float64, the mean as reference: every run ends where the uninterrupted one of one process does."""
    fit_midway(1, tmp_path / "whole", "auto", 1)

    def start(ranks: int, *jobs: tuple[str, str, int] | tuple[str, str, int, str]) -> None:
        given = [
            ",".join([str(tmp_path / out), strategy, str(shards), *(str(tmp_path / c) for c in source)])
            for out, strategy, shards, *source in jobs
        ]
        processes.script(HERE / "checkpoint_run.py", ranks, str(ranks), *given, seconds=240)

    middle = "sharded.middle.ckpt"
    start(
        2,
        ("sharded", "fsdp2", 2),
        ("again", "fsdp2", 2, middle),
        ("of a file", "fsdp2", 2, "whole.middle.ckpt"),
        ("two replicas", "ddp", 1, middle),
    )
    start(4, ("four", "fsdp2", 2, middle))
    export_checkpoint(tmp_path / middle, tmp_path / "consolidated.ckpt")
    fit_midway(1, tmp_path / "one", "auto", 1, tmp_path / middle)
    fit_midway(1, tmp_path / "of one file", "auto", 1, tmp_path / "consolidated.ckpt")

    def result(name: str) -> dict[str, torch.Tensor]:
        export_decomposition(tmp_path / f"{name}.ckpt", tmp_path / f"export {name}")
        return load_file(tmp_path / f"export {name}/model.safetensors")

    whole, sharded = result("whole"), result("sharded")
    for name in ("sharded", "again", "of a file", "two replicas", "four", "one", "of one file"):
        found = result(name)
        for key, value in whole.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {key}")
        if name == "again":  # the same ranks: to the bit
            assert all(torch.equal(found[key], value) for key, value in sharded.items())


@pytest.mark.distributed
def test_a_sharded_target_is_decomposed_and_resumed_as_a_whole_one(tmp_path: Path) -> None:
    fit_midway(1, tmp_path / "whole", "auto+target", 1)
    jobs = [f"{tmp_path / name},{strategy}+target,2" for name, strategy in (("ddp", "ddp"), ("fsdp2", "fsdp2"))]
    again = [f"{job.replace(',', ' again,', 1)},{job.partition(',')[0]}.middle.ckpt" for job in jobs]
    processes.script(HERE / "checkpoint_run.py", 2, "2", *jobs, *again, seconds=240)

    def result(name: str) -> dict[str, torch.Tensor]:
        export_decomposition(tmp_path / f"{name}.ckpt", tmp_path / f"export {name}")
        return load_file(tmp_path / f"export {name}/model.safetensors")

    whole = result("whole")
    for name in ("ddp", "fsdp2"):
        found, resumed = result(name), result(f"{name} again")
        for key, value in whole.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {key}")
            assert torch.equal(resumed[key], found[key])


def test_of_a_damaged_checkpoint_the_one_before_is_exported(run: Path, tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    for path in (last, Path(f"{last}.previous")):
        path.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged .*; going on from the one before it, .*previous"):
        export_decomposition(last, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_checkpoint_of_an_unfinished_run_is_exported(tmp_path: Path) -> None:
    """Before any validation: the first restart, no mean reference."""
    fit_midway(1, tmp_path / "run", "auto", 1)
    content = torch.load(tmp_path / "run.middle.ckpt", weights_only=True)
    content["l3d"]["mean_reference"] = None
    content["state_dict"]["held_out_loss"].fill_(torch.nan)
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "early.ckpt")
    export_decomposition(tmp_path / "early.ckpt", tmp_path / "out")
    found = Decomposition.from_pretrained(tmp_path / "out")
    assert found.figures == {"val/loss": None, "steps": 13}
    with pytest.raises(L3DError, match="holds no mean reference"):
        found.encode(torch.rand(2, 10))
