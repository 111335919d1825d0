"""Checkpoints of sharded runs: any number of ranks reads what any other has written, and only what is whole."""

import json
import os
import pickle
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

from l3d_pl import L3DError, checkpoints
from l3d_pl.checkpoints import (
    AtomicCheckpointIO,
    Stored,
    load_optimizers,
    load_sharded,
    make_older,
    named_tensors,
    newest_and_previous,
    newest_whole,
    previous_of,
    save_sharded,
)
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.streamed import SafetensorsFile, checksum

SHAPES = {"v_in": (3,), "v_out": (2, 2)}
SIZES = (7, 5, 2)  # of 4 ranks, with 7 the last holds less, with 5 the last holds nothing, with 2 two hold nothing


class Model(nn.Module):
    """Two parameters [n, ...], sharded where there is a mesh, and a buffer that is not."""

    def __init__(self, n: int, mesh: DeviceMesh | None = None, seed: int = 0):
        super().__init__()
        self.mesh, random = mesh, torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            self.add_module(name, nn.Module())
            value = torch.randn(n, *shape, generator=random)
            self.get_submodule(name).register_parameter("core", nn.Parameter(self.sharded(value)))
        self.register_buffer("counts", torch.arange(n) + seed)

    def sharded(self, value: Tensor) -> Tensor:
        return value if self.mesh is None else distribute_tensor(value, self.mesh, [Shard(0)])

    def train_for(self, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
        """Steps with random gradients: AdamW's are the same, element by element, sharded or not."""
        random = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for parameter in self.parameters():
                parameter.grad = self.sharded(torch.randn(parameter.shape, generator=random))
            optimizer.step()


def adam(model: Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def trained(n: int, mesh: DeviceMesh | None = None, seed: int = 0, steps: int = 3) -> tuple[Model, dict[str, Any]]:
    """A model after some steps, and the checkpoint that Lightning would make of it."""
    model = Model(n, mesh, seed)
    optimizer = adam(model)
    model.train_for(optimizer, steps, seed + 1)
    optimizer.param_groups[0]["lr"] = 0.05
    content = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "global_step": steps,
        "callbacks": {"RandomState": {"ranks": [torch.arange(5)]}},
    }
    return model, content


def rows_held(tensor: Tensor, whole: Tensor) -> Tensor:
    """Of the whole tensor, what this rank holds by DTensor's own account."""
    if not isinstance(tensor, DTensor):
        return whole
    chunk = tensor.__create_chunk_list__()[0]
    return whole[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]]


def assert_equals_one_process(model: Model, optimizer: torch.optim.Optimizer, expected: dict[str, Any]) -> None:
    """Bit for bit, weights and moments, as far as this rank holds them."""
    for name, tensor in model.state_dict().items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(own, rows_held(tensor, expected["state_dict"][name])), name
    states = expected["optimizer_states"][0]["state"]
    for index, parameter in enumerate(model.parameters()):
        for key, value in optimizer.state[parameter].items():
            own = value.to_local() if isinstance(value, DTensor) else value
            assert torch.equal(own, rows_held(value, states[index][key])), key


def assert_goes_on(path: Path, n: int, mesh: DeviceMesh | None) -> None:
    """Loaded into another model, on this mesh, it is the checkpoint of one process, and goes on as that would."""
    whole, expected = trained(n)
    model = Model(n, mesh, seed=9)
    optimizer = adam(model)
    stored = load_sharded(path, model)
    load_optimizers(stored, [optimizer])
    rest = stored.content
    assert_equals_one_process(model, optimizer, expected)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert rest["global_step"] == 3
    assert torch.equal(rest["callbacks"]["RandomState"]["ranks"][0], torch.arange(5))
    assert rest["state_dict"]["v_in.core"].shape == (n, 3)  # what `on_load_checkpoint` compares

    other = adam(whole)
    other.load_state_dict(expected["optimizer_states"][0])
    model.train_for(optimizer, 2, seed=5)
    whole.train_for(other, 2, seed=5)
    later = {"state_dict": whole.state_dict(), "optimizer_states": [other.state_dict()]}
    assert_equals_one_process(model, optimizer, later)


# -- processes ---------------------------------------------------------------------------------------------------------


def mesh_of(data: int, tensor: int) -> DeviceMesh:
    return init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))[
        "tensor_parallel"
    ]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of one process: this one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield mesh_of(1, 1)
    dist.destroy_process_group()


def _save(folder: Path, data: int, tensor: int) -> None:
    mesh = mesh_of(data, tensor)
    for n in SIZES:
        save_sharded(trained(n, mesh)[1], folder / f"{data}x{tensor}/{n}.ckpt")


def _load(folder: Path) -> None:
    size = dist.get_world_size()
    for mesh in [mesh_of(1, size)] + ([mesh_of(2, size // 2)] if size == 4 else []):
        for path in sorted(folder.glob("*/*.ckpt")):
            assert_goes_on(path, int(path.stem), mesh)


def _load_with_torch(folder: Path, n: int) -> None:
    """torch's own reader, as an oracle for the layout."""
    mesh, expected = mesh_of(1, dist.get_world_size()), dict(named_tensors(trained(n)[1]))
    found = {name: zeros(expected[name].shape, device_mesh=mesh, placements=[Shard(0)]) for name in NAMES}
    torch_load(dict(found), storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, tensor in found.items():
        assert torch.equal(tensor.to_local(), rows_held(tensor, expected[name])), name


NAMES = [f"state_dict.{name}.core" for name in SHAPES]
NAMES += [f"optimizer_states.0.state.{i}.{moment}" for i in range(2) for moment in ("exp_avg", "exp_avg_sq")]


@pytest.mark.distributed
def test_every_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path) -> None:
    """Written by 2 ranks, by 4, and by 2 x 2 of which two hold the same; read by 1, 2, 3, 4 and 2 x 2."""
    written = tmp_path / "written"
    on_ranks(2, tmp_path, _save, written, 1, 2)
    on_ranks(4, tmp_path, _save, written, 1, 4)
    on_ranks(4, tmp_path, _save, written, 2, 2)
    one = AtomicCheckpointIO()
    for n in SIZES:
        one.save_checkpoint(trained(n)[1], written / f"file/{n}.ckpt")
    names = {file.name for file in (written / "2x2/7.ckpt").iterdir()}
    shards = {f"shard-0000{i}-of-00002.safetensors" for i in range(2)}  # of two replicas, one writes
    assert names == {"meta.ckpt", "manifest.json", *shards}

    for size in (2, 3, 4):
        on_ranks(size, tmp_path, _load, written)
    on_ranks(3, tmp_path, _load_with_torch, written / "1x4/7.ckpt", 7)
    for path in sorted(written.glob("*/*.ckpt")):  # without any process group
        n = int(path.stem)
        assert_goes_on(path, n, None)
        found, expected = one.load_checkpoint(path), trained(n)[1]
        assert dict(named_tensors(found)).keys() == dict(named_tensors(expected)).keys()
        for name, tensor in named_tensors(expected):
            assert torch.equal(dict(named_tensors(found))[name], tensor), name
        assert found["optimizer_states"][0]["param_groups"] == expected["optimizer_states"][0]["param_groups"]


def _one_disk_is_full(folder: Path, full: int) -> None:
    """On one rank files can hold 4 KB; what is written there is larger. Then there is room again."""
    ranks, mesh = Ranks.of_run(), mesh_of(1, dist.get_world_size())
    whole, larger = folder / "last.ckpt", trained(2000, mesh)[1]
    save_sharded(trained(7, mesh)[1], whole)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if ranks.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(L3DError) as told:
        save_sharded(larger, whole)
    expected = f"checkpoint: {whole} cannot be written (File too large on rank {full}); the one before it is kept"
    assert str(told.value) == expected
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert_goes_on(whole, 7, mesh)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save_sharded(larger, whole)
    assert_goes_on(previous_of(whole), 7, mesh)


@pytest.mark.distributed
@pytest.mark.parametrize("full", [0, 1])
def test_full_disk_of_one_rank_is_told_by_all_and_loses_nothing(full: int, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    on_ranks(2, tmp_path, _one_disk_is_full, tmp_path / "run", full)


def _take_the_one_before(last: Path) -> None:
    """Each of the files is checked on one rank only; all have to know."""
    ranks = Ranks.of_run()
    for file in sorted(file.name for file in last.iterdir() if file.name != "manifest.json"):
        damaged = last.with_name(f"{file}.ckpt")
        if ranks.rank == 0:
            shutil.copytree(last, damaged)
            shutil.copytree(previous_of(last), previous_of(damaged))
            flip(damaged / file)
        dist.barrier()
        model = Model(7, mesh_of(1, ranks.size), seed=9)
        assert load_sharded(damaged, model).content["global_step"] == 2
        flip(previous_of(damaged) / "manifest.json") if ranks.rank == 0 else None
        dist.barrier()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(L3DError, match=f"damaged or no checkpoint .checksum of {file}.$"):
            load_sharded(damaged, model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in (tensor, before[name])))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def _save_twice(last: Path) -> None:
    for steps in (2, 3):
        save_sharded(trained(7, mesh_of(1, dist.get_world_size()), steps=steps)[1], last)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`last.ckpt` after three steps and `last.ckpt.previous` after two, written by two ranks."""
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, folder, _save_twice, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture
def last(two: Path, tmp_path: Path) -> Path:
    """A copy of `two` to damage."""
    for path in (two, previous_of(two)):
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path / two.name


@pytest.mark.distributed
def test_damage_found_by_one_rank_sends_all_to_the_one_before(last: Path) -> None:
    on_ranks(2, last.parent, _take_the_one_before, last)


# -- damage ------------------------------------------------------------------------------------------------------------


def _rewrite_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def _truncate(file: str, share: float) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, int((folder / file).stat().st_size * share))


def _drop_shard(folder: Path) -> None:
    """Missing, and not in the manifest either: what it held is noticed."""
    (folder / SECOND).unlink()
    _rewrite_manifest(lambda manifest: manifest["files"].pop(SECOND))(folder)


def _malicious(folder: Path) -> None:
    """A pickle that would run a command."""

    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {folder / 'it-has-run'}",)

    with zipfile.ZipFile(folder / "meta.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Command()))
        archive.writestr("archive/version", "3")
    found = checksum(folder / "meta.ckpt")
    _rewrite_manifest(lambda manifest: manifest["files"].update({"meta.ckpt": found}))(folder)


FIRST, SECOND = (f"shard-0000{i}-of-00002.safetensors" for i in range(2))
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda folder: (folder / SECOND).unlink(), rf"{SECOND} is missing"),
    "shard cut": (_truncate(FIRST, 0.5), rf"{FIRST} has \d+ bytes, written were \d+"),
    "shard flipped": (lambda folder: flip(folder / FIRST), f"checksum of {FIRST}"),
    "rest flipped": (lambda folder: flip(folder / "meta.ckpt"), r"checksum of meta.ckpt"),
    "manifest cut": (_truncate("manifest.json", 0.7), "manifest.json is no manifest"),
    "manifest of nothing": (lambda folder: (folder / "manifest.json").write_text("3"), "is no manifest"),
    "outside": (_rewrite_manifest(lambda m: m["files"].update({"../x": {"bytes": 1, "crc32": 1}})), "is no manifest"),
    "version": (_rewrite_manifest(lambda m: m.update(format_version=2)), "has format version 2; .* reads version 1"),
    "foreign": (lambda folder: [file.unlink() for file in folder.iterdir()], "is a directory without manifest.json"),
    "deepspeed": (
        lambda folder: (folder / "manifest.json").rename(folder / "latest"),
        "is in DeepSpeed's own format; allowed are",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_and_the_one_before_is_taken(last: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(last)
    io = AtomicCheckpointIO()
    with pytest.warns(UserWarning, match=f"{message}.*; going on from the one before it, .*last.ckpt.previous"):
        assert io.load_checkpoint(last)["global_step"] == 2
    io.save_checkpoint({"state_dict": {}, "step": 4}, last)  # takes the place of the damaged one, not of the good one
    assert io.load_checkpoint(previous_of(last))["global_step"] == 2
    assert io.load_checkpoint(last)["step"] == 4
    shutil.rmtree(previous_of(last))
    last.write_bytes(b"")
    with pytest.raises(L3DError, match="damaged or no checkpoint") as told:
        newest_whole(last, ALONE)
    assert "\n" not in str(told.value)


@pytest.mark.distributed
def test_what_checksums_do_not_tell(last: Path) -> None:
    io = AtomicCheckpointIO()
    for damage, message in (
        (_drop_shard, r"damaged or no checkpoint \(rows 0 to 7 of 'state_dict.v_in.core' are missing\)"),
        (_malicious, r"damaged or no checkpoint \(Weights only load failed"),
    ):
        damage(last)
        with pytest.raises(L3DError, match=message):
            io.load_checkpoint(last)
    assert not (last / "it-has-run").exists()
    with pytest.raises(L3DError, match=r"there is no file nowhere\.ckpt"):
        io.load_checkpoint("nowhere.ckpt")


@pytest.mark.distributed
def test_checkpoint_of_another_shape_is_refused_before_anything_is_changed(last: Path) -> None:
    model = Model(8, seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(L3DError, match=r"its tensor 'counts' is \[7\], this run's is \[8\]; n_subnetworks"):
        load_sharded(last, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model = Model(7)
    model.register_buffer("more", torch.zeros(1))
    with pytest.raises(L3DError, match=r"its tensor 'more' is missing, this run's is \[1\]"):
        load_sharded(last, model)
    model = Model(7)
    parts = [{"params": [parameter]} for parameter in model.parameters()]
    with pytest.raises(L3DError, match="its optimizer has 1 groups of parameters, this run's has 2"):
        load_optimizers(load_sharded(last, model), [torch.optim.AdamW(parts)])


# -- one in place of another -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.distributed
def test_killed_at_any_moment_it_leaves_a_whole_one(
    mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of the calls that change the disk, in turn, until it comes through."""
    saved, calls = tmp_path / "last.ckpt", 0
    allowed = 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Killed
            return original(*args, **kwargs)

        return call

    outcomes = []
    while True:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        for step in (1, 2):
            save_sharded(trained(7, mesh, steps=step)[1], saved)
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"), (os, "mkdir")):
                patch.setattr(module, name, counted(name, getattr(module, name)))
            calls = 0
            content = trained(7, mesh, steps=3)[1]
            try:
                save_sharded(content, saved)
                finished = True
            except Killed:
                finished = False
        checkpoints._damaged.clear()  # another process goes on
        found = load_sharded(newest_and_previous(saved)[0], Model(7, mesh)).content["global_step"]
        outcomes.append(found)
        if finished:
            break
        save_sharded(trained(7, mesh, steps=4)[1], saved)  # what the killed one has left is in nobody's way
        assert load_sharded(saved, Model(7, mesh)).content["global_step"] == 4
        allowed += 1
    assert len(outcomes) > 8
    assert set(outcomes) == {2, 3}
    assert outcomes == sorted(outcomes)


@pytest.mark.distributed
def test_keeping_more_than_one(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Files and directories in turn, as when a run goes on under another strategy."""
    last, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    for step in range(1, 8):
        make_older(last, keep=3)
        content = trained(7, mesh if step % 3 else None, steps=step)[1]
        save_sharded(content, last) if step % 3 else io.save_checkpoint(content, last)
    kept = newest_and_previous(last)
    assert [path.name for path in kept] == ["last.ckpt", *(f"last.ckpt.previous{age}" for age in ("", ".2", ".3"))]
    assert sorted(tmp_path.iterdir()) == kept
    assert [io.load_checkpoint(path)["global_step"] for path in kept] == [7, 6, 5, 4]
    for number, path in enumerate(kept[:3]):
        flip(path / "meta.ckpt") if path.is_dir() else os.truncate(path, 100)
        with pytest.warns(UserWarning, match="going on from the one before it"):
            assert io.load_checkpoint(last)["global_step"] == 6 - number
    shutil.rmtree(kept[1]) if kept[1].is_dir() else kept[1].unlink()  # a gap in the row
    assert newest_and_previous(last) == [kept[0], *kept[2:]]


@pytest.mark.distributed
def test_a_shard_is_opened_once(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    original = SafetensorsFile.__init__

    def watched(self: SafetensorsFile, path: Path) -> None:
        opened.append(path)
        original(self, path)

    monkeypatch.setattr(SafetensorsFile, "__init__", watched)
    stored = Stored(two)
    whole = dict(named_tensors(AtomicCheckpointIO().load_checkpoint(two)))
    del opened[2:]
    for name, tensor in stored.tensors.items():
        for row in range(tensor.shape[0] if tensor.ndim else 1):
            found = stored.rows(name, row, row + 1)
            assert torch.equal(found, whole[name][row : row + 1] if tensor.ndim else whole[name])
    assert [path.name for path in opened] == [FIRST, SECOND]


def test_shards_say_where_their_rows_belong(two: Path) -> None:
    with safe_open(two / SECOND, "pt") as shard:
        offsets = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
        assert offsets["state_dict.v_in.core"]["saved_offsets"] == [4, 0]
        assert shard.get_slice("state_dict.v_in.core").get_shape() == [3, 3]
    content = torch.load(two / "meta.ckpt", weights_only=True)
    assert content["state_dict"]["v_in.core"].is_meta
    assert torch.equal(content["state_dict"]["counts"], torch.arange(7))
