"""Invariant 2: ranks that share a batch make the same step as one process with all of it. Real gloo processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from oracles import LAYOUTS, assert_same, decomposition_problem
from processes import on_ranks, script
from safetensors.torch import load_file
from test_deepspeed import _folder, tms  # noqa: F401 (a fixture)
from torch import Tensor, nn
from zoo import VOCABULARY, language_model

from l3d_pl import L3D, L3DError, auxiliary, sharded, step
from l3d_pl.batch_topk import batch_topk, global_threshold, n_selected
from l3d_pl.cli import main
from l3d_pl.gradients import GradientExtractor
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.strategies import NAMES, SYNONYMS, check_strategy
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.frozen import freeze, select_parameters, shard
from l3d_pl.targets.toy import Autoencoder
from l3d_pl.tucker import local

HERE = Path(__file__).parent


def _selects_as_one_process() -> None:
    ranks = Ranks.of_run()
    for case in range(12):
        random = torch.Generator().manual_seed(case)
        c = torch.randn(7, 2, 5, generator=random, dtype=torch.float64 if case % 2 else torch.float32)
        if case % 3 == 0:
            c = (c * 2).round()  # ties
        for k in (0.01, 0.3, 1.0):
            whole, threshold = batch_topk(c, k)
            edges = [0, 2, 7] if ranks.size == 2 else [0, 1, 4, 5, 7]
            mine = slice(edges[ranks.rank], edges[ranks.rank + 1])
            mask, mine_threshold = batch_topk(c[mine], k, ranks)
            assert_same(mine_threshold, threshold)
            assert torch.equal(mask, whole[mine])  # restarts apart, ties to the earlier samples


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_the_batch_threshold_is_global(size: int, tmp_path: Path) -> None:
    on_ranks(size, tmp_path, _selects_as_one_process)


@given(
    rows=st.integers(1, 3),
    n=st.integers(1, 40),
    k=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
    wide=st.booleans(),
    coarse=st.booleans(),
)
def test_radix_selection_equals_sorting(rows: int, n: int, k: float, seed: int, wide: bool, coarse: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, generator=random, dtype=torch.float64 if wide else torch.float32).abs()
    scores = (scores * 2).round() if coarse else scores * 10.0 ** torch.randint(-30, 30, (rows, n), generator=random)
    count = n_selected(k, n)
    expected = scores.sort(1, descending=True).values[:, count - 1]
    assert torch.equal(global_threshold(scores, count, ALONE), expected)


RUNS = {
    "ddp of 2": ("2", "ddp"),
    "ddp of 4": ("4", "ddp"),
    "2 shards": ("2", "fsdp2:2"),
    "4 shards": ("4", "fsdp2:4"),  # 2, 2, 2, 1 of 7
    "2 replicas of 2 shards": ("4", "fsdp2:2"),
    "2 replicas": ("2", "fsdp2:1"),
}


def _run(out: Path, *arguments: str) -> dict[str, Any]:
    script(HERE / "parallel_run.py", int(arguments[0]), str(out), *arguments, seconds=240)
    return torch.load(out, weights_only=True)


def _assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(found["mean_reference"], expected["mean_reference"], 1e-9)
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        if value.is_floating_point():
            assert_same(found["state"][name], value, 1e-9)
        else:
            assert torch.equal(found["state"][name], value), name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("one") / "found.pt", "1")


@pytest.mark.distributed
@pytest.mark.parametrize("how", RUNS)
def test_ranks_make_the_step_of_one_process(how: str, one_process: dict[str, Any], tmp_path: Path) -> None:
    found = _run(tmp_path / "found.pt", *RUNS[how])
    _assert_same_run(found, one_process)
    shards = int(RUNS[how][1].partition(":")[2] or 1)
    largest = -(-7 // shards) / 7  # of seven subnetworks
    assert max(found["held"]) == round(one_process["held"][0] * largest)  # V and AdamW's moments
    assert sum(found["held"]) * shards == one_process["held"][0] * int(RUNS[how][0])
    # A rank starts from the gradients of the global batch without ever seeing more of it than its own share.
    assert found["batches"] == [one_process["batches"][0] // int(RUNS[how][0])] * int(RUNS[how][0])


ACCUMULATED_AND_CLIPPED = ("2", "0.05")
HALF = ("precision=bf16-mixed", "swap_every=0")  # (a swap is taken or not: by a rounding error it may be)


@pytest.fixture(scope="module")
def accumulated_in_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("one") / "found.pt", "1", "auto", *ACCUMULATED_AND_CLIPPED)


@pytest.fixture(scope="module")
def half_in_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("one") / "found.pt", "1", *HALF)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2:2", "fsdp2:1"])
def test_accumulation_and_clipping_see_all_ranks(
    strategy: str, accumulated_in_one_process: dict[str, Any], tmp_path: Path
) -> None:
    """Two batches make a step, and the norm that is clipped is that of the whole gradient."""
    found = _run(tmp_path / "found.pt", "2", strategy, *ACCUMULATED_AND_CLIPPED)
    _assert_same_run(found, accumulated_in_one_process)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2:2"])
def test_mixed_precision_on_two_ranks(strategy: str, half_in_one_process: dict[str, Any], tmp_path: Path) -> None:
    """The target's pass is in bf16, which rounds alike in any batch; all else is float32."""
    found = _run(tmp_path / "found.pt", "2", strategy, *HALF)
    for name, value in half_in_one_process["state"].items():
        assert_same(found["state"][name].float(), value.float(), 1e-2)


def _shards_equal_one_process(ranks: Ranks, layout: str, tokens: bool, n_dense: int = 0) -> None:
    torch.manual_seed(0)
    n_v, samples, k = 7, 12 if tokens else 11, 0.3
    whole, gradients = decomposition_problem(layout, samples=samples, n_subnetworks=n_v)
    whole.n_dense = n_dense
    expected = step.decompose(whole, whole.prepare(gradients), k)
    expected.loss.sum().backward()

    n = samples // 2 if tokens else samples  # groups of samples
    bounds = [n * rank // ranks.size for rank in range(ranks.size + 1)]
    mine = torch.arange(bounds[ranks.rank], bounds[ranks.rank + 1])
    mine = torch.stack([2 * mine, 2 * mine + 1], 1).flatten() if tokens else mine
    own = {name: gradient.select(mine) for name, gradient in gradients.items()}
    tucker_ranks = {name: list(r) for name, r in whole.ranks.items()}
    part = Subnetworks(whole.shapes, n_v, tucker_ranks, group=ranks, n_dense=n_dense).double()
    shard = part.own
    part.is_dense = whole.is_dense  # type: ignore[method-assign]
    for side, its in ((part.v_in, whole.v_in), (part.v_out, whole.v_out)):
        side.copy_({name: tucker.detach().select(shard) for name, tucker in its.tuckers().items()})
    prepared = part.prepare(sharded.share_gradients(own, ranks))
    found = sharded.decompose(part, prepared, k, ranks)
    found.loss.sum().backward()

    assert_same(found.loss.detach(), expected.loss.detach())
    assert_same(found.threshold, expected.threshold)
    assert_same(found.coefficients, expected.coefficients[..., shard])
    assert torch.equal(found.mask, expected.mask[..., shard])
    for (name, value), other in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert value.grad is not None, name
        assert other.grad is not None
        assert_same(value.grad, other.grad[shard])

    codes = found.codes.detach()
    assert_same(sharded.reconstruct(part, prepared, codes).loss, expected.loss.detach())
    losses = whole.loss_per_parameter(whole.prepare(gradients), expected.codes.detach())
    for name, loss in sharded.loss_per_parameter(part, prepared, codes, ranks, ALONE).items():
        assert_same(loss, losses[name])
    view = whole.view(whole.v_out, whole.prepare(gradients))
    assert_same(sharded.gram(part), view.gram(view).detach())
    weights = torch.randn(2, n_v, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, sums in part.combine(weights).items():
        assert_same(sums, whole.combine(weights)[name])

    dead = torch.tensor([[True, False, False, True, True, False, True]])
    for module in (part, whole):
        module.zero_grad()
    mine_aux = sharded.auxiliary_loss(part, prepared, found, dead, 0.4, ranks)
    all_aux = auxiliary.auxiliary_loss(whole, whole.prepare(gradients), expected, dead, 0.4)
    assert mine_aux is not None
    assert all_aux is not None
    assert_same(mine_aux.detach(), all_aux.detach())
    mine_aux.backward()
    all_aux.backward()
    for value, other in zip(part.parameters(), whole.parameters(), strict=True):
        assert value.grad is not None
        assert other.grad is not None
        assert_same(value.grad, other.grad[shard])


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 3, 5])  # 7 subnetworks on 5 ranks: the last owns none
def test_sharded_subnetworks_make_the_step_of_one_process(size: int, tmp_path: Path) -> None:
    on_ranks(size, tmp_path, _all_shard_cases)


def _all_shard_cases() -> None:
    ranks = Ranks.of_run()
    for layout in LAYOUTS:
        for tokens in (False, True):
            _shards_equal_one_process(ranks, layout, tokens, n_dense=3 if tokens else 0)


def _sharded_target_gives_the_same(ranks: Ranks, family: str, sample: str) -> None:
    torch.manual_seed(0)
    model = freeze(language_model(family).double())
    batch = {"input_ids": torch.randint(0, VOCABULARY, (6, 5), generator=torch.Generator().manual_seed(ranks.rank))}
    # Of the first layer: the cut is within the second, none of whose tensors stay whole.
    chosen = select_parameters(model, "*.0.*attn*weight")
    extractor = GradientExtractor(model, chosen, "kl", "random", sample)
    whole = [extractor(batch, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert sample != "token" or extractor._passes.cut >= 0
    total = sum(parameter.numel() for parameter in model.parameters())
    shard(model, chosen.values(), "cpu")
    extractor = GradientExtractor(model, chosen, "kl", "random", sample)
    kept = sum(local(parameter).numel() for parameter in model.parameters())
    own = sum(tensor.numel() for tensor in chosen.values())
    assert kept - own <= (total - own) / ranks.size + 200  # (rows that do not divide)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for expected in whole:
        found = extractor(batch, torch.Generator().manual_seed(1))
        assert_same(found.outputs, expected.outputs)
        for name, gradient in expected.gradients.items():
            assert_same(found.gradients[name].dense(), gradient.dense())


class Expert(nn.Module):
    """A layer of layers, only some of which take part; and a parameter that is a number."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        some = self.experts[: 1 + int(x.sum() > 0)]  # (on one rank another number than on the other)
        return x + self.scale * sum(expert(x).tanh() for expert in some)


class Stages(nn.Module):
    """Lists of lists of layers."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([Expert(width), Expert(width)]), nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stages[0]:
            x = layer(x)
        return self.stages[1](x)


def _lists_within_lists(ranks: Ranks) -> None:
    model = freeze(Stages().double())
    batch = torch.rand(4, 6, dtype=torch.float64) * (1 if ranks.rank else -1)
    chosen = select_parameters(model, "stages.0.1.experts.0.weight")
    expected = GradientExtractor(model, chosen, "mse", "mean")(batch).gradients
    own, numbers = sum(tensor.numel() for tensor in chosen.values()), 2
    total = sum(parameter.numel() for parameter in model.parameters())
    shard(model, chosen.values(), "cpu")
    kept = sum(local(parameter).numel() for parameter in model.parameters())
    assert kept - own - numbers == (total - own - numbers) / ranks.size
    for name, gradient in GradientExtractor(model, chosen, "mse", "mean")(batch).gradients.items():
        assert_same(gradient.dense(), expected[name].dense())


def _sharded_targets() -> None:
    ranks = Ranks.of_run()
    torch.manual_seed(0)
    _lists_within_lists(ranks)
    for family in ("GPTNeo", "Llama"):
        for sample in ("token", "sequence"):
            _sharded_target_gives_the_same(ranks, family, sample)


@pytest.mark.distributed
def test_a_sharded_target_gives_the_same_gradients(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _sharded_targets)


def _joint_draws() -> None:
    """Each rank with a part of a batch, one of them with a single sequence, draws what one process would."""
    ranks = Ranks.of_run()
    torch.manual_seed(0)
    model = freeze(language_model("GPTNeo").double())
    chosen = select_parameters(model, "*.0.*attn*weight")
    ids = torch.randint(0, VOCABULARY, (5, 6))
    mask = torch.ones(5, 6, dtype=torch.long)
    mask[1, 4:] = mask[4, 3:] = 0
    own = slice(0, 1) if ranks.rank == 0 else slice(1, 5)
    for reference in ("random", "mean", "uniform"):
        for divergence, sample, tokens in (("kl", "token", 3), ("mse", "token", None), ("mse", "sequence", None)):
            extractor = GradientExtractor(model, chosen, divergence, reference, sample, tokens)
            expected = extractor({"input_ids": ids, "attention_mask": mask}, torch.Generator().manual_seed(1))
            part, random = {"input_ids": ids[own], "attention_mask": mask[own]}, torch.Generator().manual_seed(1)
            found = sharded.share_gradients(extractor(part, random, ranks=ranks, joint=True).gradients, ranks)
            for name, gradient in expected.gradients.items():
                assert_same(found[name].dense(), gradient.dense())


@pytest.mark.distributed
def test_ranks_that_draw_together_draw_as_one_process(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _joint_draws)


def _random_streams() -> None:
    ranks = Ranks.of_run()
    module = L3D(Autoencoder(10, 5), n_subnetworks=7, seed=0)
    module._ranks = ranks
    streams = ("references", "start", "k-lines", "anchor references", "repair", "validation")
    seeds = ranks.gather({stream: module._generator(stream).initial_seed() for stream in streams})
    assert len({of_rank["references"] for of_rank in seeds}) == ranks.size  # each draws for samples of its own
    for stream in streams[1:4]:
        assert len({of_rank[stream] for of_rank in seeds}) == 1, stream
    starts = ranks.gather([parameter.detach() for parameter in module.subnetworks.parameters()])
    assert all(torch.equal(a, b) for start in starts for a, b in zip(start, starts[0], strict=True))


@pytest.mark.distributed
def test_ranks_draw_references_of_their_own_and_start_from_the_same_v(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _random_streams)


def test_strategies_that_cannot_work_are_one_line() -> None:
    for name in (*NAMES, *SYNONYMS):
        check_strategy(name)
    check_strategy(DDPStrategy())
    allowed = f"allowed are {', '.join(NAMES)}"
    for strategy, found in (
        ("fsdp", f"'fsdp', {allowed}; did you mean 'fsdp2'?"),
        ("fsdp_cpu_offload", f"'fsdp_cpu_offload', {allowed}"),
        ("ddp_spawn", f"'ddp_spawn', {allowed}; did you mean 'ddp'?"),
        ("deepspeed_stage_4", f"'deepspeed_stage_4', {allowed}; did you mean 'deepspeed_stage_"),
        (FSDPStrategy(), f"FSDPStrategy, {allowed}"),
        (ModelParallelStrategy(), f"ModelParallelStrategy, {allowed}"),
        (DDPStrategy(start_method="fork"), f"DDPStrategy with start_method 'fork', {allowed}"),
    ):
        with pytest.raises(L3DError) as told:
            check_strategy(strategy)
        assert str(told.value).startswith(f"trainer.strategy: found {found}")


def test_restarts_are_refused_where_subnetworks_are_sharded() -> None:
    ranks = Ranks()
    ranks.size = 2
    with pytest.raises(L3DError, match="restarts: found 3; subnetworks that are sharded over ranks allow 1"):
        Subnetworks({"w": (4, 3)}, 4, restarts=3, group=ranks)


BY_CLASS = '{"class_path": "l3d_pl.strategies.fsdp2.FSDP2Strategy"}'


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fsdp"], "trainer.strategy: found 'fsdp', allowed are auto, ddp, fsdp2"),
        (
            ['{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'],
            "trainer.strategy: found ModelParallelStrategy, allowed",
        ),
        (["fsdp2", "--trainer.precision", "16-mixed"], "trainer.precision: found 16-mixed; allowed under fsdp2 are"),
        (
            [BY_CLASS, "--trainer.precision", "16"],
            "trainer.precision: found 16; allowed under fsdp2 are 32-true, 64-true",
        ),
    ],
)
@pytest.mark.usefixtures("_folder")
def test_what_a_strategy_cannot_do_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(tms("--trainer.strategy", *arguments)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"l3d: error: {sentence}")
    assert errors.count("\n") == 1


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("strategy", ["fsdp2", BY_CLASS])
def test_float64_on_a_mesh_of_either_spelling(strategy: str) -> None:
    config = {"model": {"target": {"class_path": "zoo.tied_in_float64"}, "target_weights": None, "target_config": None}}
    Path("double.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", "double.yaml", "--trainer.strategy", strategy, "--trainer.precision", "64-true"]
    assert main([word for word in tms(*words) if word not in ("--model.target_weights", "t.safetensors")]) == 0
    state = load_file("run/decomposition/model.safetensors")
    assert {tensor.dtype for name, tensor in state.items() if name.startswith("v_")} == {torch.float64}


def _alive(group: int) -> bool:
    """Whether a process group has a process that has not ended."""
    lines = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout.splitlines()
    return any(int(line.split()[0]) == group and not line.split()[1].startswith("Z") for line in lines)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("_folder")
@pytest.mark.timeout(600)
def test_a_signal_to_the_first_process_stops_all(tmp_path: Path) -> None:
    """SIGTERM to `l3d fit` on two ranks: both end after the same batch, and the run goes on from there."""
    words = tms("--trainer.strategy", "ddp", "--trainer.devices", "2", "--checkpoint.every_n_train_steps", "5")
    words[words.index("--trainer.max_epochs") + 1] = "20000"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "l3d_pl.cli", *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 300
        while not Path("run/checkpoints/last.ckpt").is_file():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        process.terminate()
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0
        assert "SIGTERM after step" in output
        step = int(output.partition("after step ")[2].partition(":")[0])
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
        until = time.monotonic() + 60
        while _alive(process.pid):  # nothing is left of either
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
