"""`l3d plan`: formulas against traces of the real step, the trace against the real target, and what is printed."""

import json
import math
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_params import _in_a_folder_of_its_own  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from l3d_pl import L3D, L3DError
from l3d_pl.cli import main
from l3d_pl.gradients import DenseGradient, GradientExtractor, OuterGradient
from l3d_pl.lightning_cli import CheckCLI
from l3d_pl.plan.costs import StepCosts, step_costs
from l3d_pl.plan.report import batches_of, complete, recommend, steps_of
from l3d_pl.plan.shapes import Absent, PlannedPasses, Trace, sides_of
from l3d_pl.plan.strategies import Plan, Planner, World, chunk_of
from l3d_pl.sharded import decompose
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.frozen import freeze, select_parameters
from l3d_pl.targets.language import gpt_neo

# In-place products, which torch's own counter leaves out.
IN_PLACE = {
    torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.baddbmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2],
}


def test_a_trace_counts_what_lives() -> None:
    known = torch.zeros(100)
    with Trace([known]) as trace:
        a = known.view(10, 10) + 1  # 400 bytes; a view is none
        b = a @ a
        del a
        c = b.T
    assert (trace.live, trace.peak) == (400, 800)
    assert c.shape == (10, 10)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    ("shapes", "n", "ranks", "sizes"),
    [
        ({f"w{i}": (256, 256) for i in range(4)}, 200, 8, (8, 8, 8)),  # token samples, factored
        ({f"w{i}": (256, 256) for i in range(3)}, 600, 4, (4, 8, 8)),  # n_v above the number of samples
        ({"a": (512, 128), "b": (100, 600), "c": (128, 512)}, 200, 8, (32, 1, 1)),  # items
        ({"a": (512, 128), "b": (100, 600)}, 400, (4, 9), (32, 1, 16)),  # items with positions
        ({"a": (64, 50), "b": (30, 64), "c": (64,)}, 400, 8, (64, 1, 1)),  # dense
    ],
)
def test_formula_of_a_step_agrees_with_the_step(
    shapes: dict[str, tuple[int, ...]], n: int, ranks: Any, sizes: tuple[int, int, int], shards: int
) -> None:
    group = Absent(shards)
    subnetworks = Subnetworks(shapes, n, ranks, group=group)
    (b, t, s), gradients = (sizes[0] * shards, *sizes[1:]), {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            gradients[name] = OuterGradient(torch.randn(b, t, s, shape[0]), torch.randn(b, s, shape[1]), shape)
        else:
            gradients[name] = DenseGradient(torch.randn(b * t, *shape))
    costs = step_costs(subnetworks, gradients, chunk_of(subnetworks, cuda=False))
    known = [*subnetworks.parameters(), *(side for g in gradients.values() for side in sides_of(g))]
    with Trace(known) as trace, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        prepared = subnetworks.prepare(gradients)
        assert trace.live == pytest.approx(costs.block, rel=0.01)
        before = trace.peak = trace.live
        step = decompose(subnetworks, prepared, 0.1, group)
        step.loss.sum().backward()
    assert costs.peak == pytest.approx(trace.peak - before, rel=0.12)
    assert costs.flop == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert 2 * costs.side == sum(4 * parameter.numel() for parameter in subnetworks.parameters())


def test_shapes_alone_take_what_the_target_takes() -> None:
    """Cut, captured gradients and memory of the passes: on the meta device as in a real pass."""
    tokens, found = torch.randint(50, (8, 16)), {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = freeze(gpt_neo(vocabulary=50, width=64, layers=4, heads=4, context=16))
        chosen = select_parameters(model, "transformer.h.*.attn.attention.*_proj.weight")
        extractor = GradientExtractor(model, chosen, "kl", "random", "token")
        if device == "meta":
            extractor._passes = PlannedPasses()
        batch = {"input_ids": tokens.to(device)}
        for _ in range(2):  # the first batch finds the cut
            with Trace([*model.state_dict().values(), *model.buffers(), *batch.values()]) as trace:
                extraction = extractor(batch, torch.Generator().manual_seed(0))
        found[device] = extractor._passes.cut, extraction.gradients, trace.peak
    assert found["meta"][0] == found["cpu"][0] > 0
    for name, gradient in found["cpu"][1].items():
        other = found["meta"][1][name]
        assert math.prod(other.shape) == math.prod(gradient.shape)
        assert other.n_samples == gradient.n_samples
    assert found["meta"][2] == pytest.approx(found["cpu"][2], rel=0.15)


def model_on_meta(**settings: Any) -> L3D:
    with torch.device("meta"):
        return L3D(gpt_neo(vocabulary=50, width=64, layers=2, heads=2, context=16), sample="token", **settings)


def test_what_each_strategy_holds_and_sends() -> None:
    model = model_on_meta(parameters="*.q_proj.weight", n_subnetworks=30, ranks=4, divergence="kl")
    batch = {"input_ids": torch.zeros(4, 8, dtype=torch.long)}
    planner = Planner(model, batch, World(nodes=2, gpus=3))
    plans = {plan.name: plan for plan in planner.plans()}
    assert [name for name in plans if name.startswith("fsdp2")] == ["fsdp2 3 x 2", "fsdp2 2 x 3", "fsdp2 1 x 6"]
    v = 4 * sum(parameter.numel() for parameter in planner.subnetworks.parameters())
    assert planner.checkpoint() == 3 * v
    for name, part in (("ddp", 1), ("fsdp2 2 x 3", 3), ("fsdp2 1 x 6", 6)):
        assert plans[name].memory["V"] == v // part
        assert plans[name].memory["optimizer"] == 2 * v // part
    assert plans["ddp"].sent == {"gradients": 2 * 5 * v // 6}
    assert plans["fsdp2 2 x 3"].sent["gradients"] == v // 3  # between two replicas, of a third of V
    assert plans["fsdp2 1 x 6"].sent["V_out"] == 5 * v // 12  # all shards of one side but the own
    assert plans["fsdp2 1 x 6"].memory["D and A"] == 6 * planner.extracted.captured
    assert plans["deepspeed_stage_1"].memory["V"] == v + v // 6  # with the master copy
    assert plans["deepspeed_stage_3"].memory["V"] == 2 * v // 6
    assert plans["deepspeed_stage_3_offload"].memory["V"] == 0 < plans["deepspeed_stage_3_offload"].host
    assert plans["deepspeed_stage_2"].sent == {"gradients": 5 * v // 6, "V": 5 * v // 6}
    assert plans["deepspeed_stage_3"].sent["V"] == 2 * 5 * v // 6  # for the step, and for what follows it
    anchors = {plan.memory["anchors"] for plan in plans.values()}
    assert len(anchors) == 1
    fewer = model_on_meta(parameters="*.q_proj.weight", n_subnetworks=30, ranks=4, init_samples=100, swap_every=0)
    assert 0 < Planner(fewer, batch, World()).anchors[0] < anchors.pop() / 5
    assert Planner(model_on_meta(parameters="*.q_proj.weight", recipe="paper"), batch, World()).anchors == (0, 0)


def test_accumulated_gradients_are_held_and_counted_once() -> None:
    model = model_on_meta(parameters="*.q_proj.weight", n_subnetworks=30, ranks=4, recipe="paper")
    batch = {"input_ids": torch.zeros(4, 8, dtype=torch.long)}
    once, often = (
        {plan.name: plan for plan in Planner(model, batch, World(gpus=2), batches).plans()} for batches in (1, 3)
    )
    for name, plan in often.items():
        assert plan.flop == 3 * once[name].flop
    v = once["ddp"].memory["V"]
    for name, held in (("ddp", v), ("fsdp2 1 x 2", v // 2), ("deepspeed_stage_2", v // 2), ("deepspeed_stage_3", 0)):
        assert often[name].peak - once[name].peak == held
    assert often["ddp"].sent == once["ddp"].sent
    assert often["fsdp2 1 x 2"].sent["V_out"] == 3 * once["fsdp2 1 x 2"].sent["V_out"]
    assert often["deepspeed_stage_1"].sent == once["deepspeed_stage_1"].sent
    assert often["deepspeed_stage_3"].sent == {"gradients": 3 * v // 2, "V": 4 * v // 2}


@pytest.mark.parametrize(("sample", "backward"), [("token", 8), ("sequence", 1)])
def test_layers_of_a_sharded_target_are_gathered_for_every_pass(sample: str, backward: int) -> None:
    plans = {}
    for sharded in (False, True):
        with torch.device("meta"):
            target = gpt_neo(vocabulary=50, width=64, layers=4, heads=2, context=16)
            chosen = "transformer.h.1.attn.attention.*_proj.weight"
            model = L3D(target, chosen, 30, ranks=4, sample=sample, divergence="kl", shard_target=sharded)
        planner = Planner(model, {"input_ids": torch.zeros(4, 8, dtype=torch.long)}, World(gpus=2))
        plans[sharded] = planner.plans()[0]
    own = 4 * sum(tensor.numel() for tensor in model.extractor.parameters.values())
    whole = plans[False].memory["target"]
    spread = 4 * sum(parameter.numel() for parameter in target.parameters()) - own
    layer = 4 * sum(parameter.numel() for parameter in target.transformer.h[0].parameters())
    assert plans[True].memory["target"] == whole - spread // 2
    assert plans[True].sent["target"] == (1 + backward) * spread // 2
    outside = spread + own - 4 * layer
    assert plans[True].memory["communication"] - plans[False].memory["communication"] == outside + 2 * layer
    assert "target" not in plans[False].sent


def plan_of(name: str, peak: float, flop: float, **others: Any) -> Plan:
    return Plan(name, 1, 1, {"V": int(peak)}, int(peak), "the step", others.pop("host", 0), int(flop), **others)


def test_recommends_what_fits_and_works_least() -> None:
    plans = [plan_of("ddp", 90e9, 1e15), plan_of("b", 40e9, 1.1e15), plan_of("c", 30e9, 1e15), plan_of("d", 1e9, 3e15)]
    complete(plans, World(memory=80), 3600, 100, None)
    assert [plan.fits for plan in plans] == [False, True, True, True]
    assert plans[0].seconds == plans[0].hours == 10
    best, why = recommend(plans)
    assert best is plans[1]  # the first that costs about what the cheapest does
    assert "byte" in why
    plans[1].sent = {"gradients": 10**12}
    assert recommend(plans)[0] is plans[2]
    plans[2].host = 1  # what is moved to the host's memory comes last
    assert recommend(plans)[0] is plans[1]
    complete(plans, World(memory=1), 10, None, 7.2)
    assert [plan.hours for plan in plans] == [0.02] * 4
    none, why = recommend(plans)
    assert none is None
    assert "nothing fits; d comes nearest with 1.0 GB" in why
    with pytest.raises(L3DError, match=r"step_seconds: found 0, allowed are numbers > 0"):
        complete(plans, World(), 10, None, 0)
    assert StepCosts().peak == 0


def llama_config(folder: Path) -> list[str]:
    """A Llama of which there is nothing but its config."""
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 1000, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return [
        *("--model.target", "l3d_pl.targets.hub.language_model", "--model.target.pretrained", str(folder)),
        *("--model.parameters", "model.layers.*.self_attn.*", "--model.sample", "token", "--model.divergence", "kl"),
        *("--model.ranks", "8", "--data", "datamodules.text.TextData", "--data.source", "none.jsonl"),
        *(
            "--data.tokenizer",
            str(folder),
            "--data.length",
            "8",
            "--data.batch_size",
            "4",
            "--trainer.max_steps",
            "100",
        ),
    ]


def test_plan_of_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = llama_config(tmp_path / "llama")
    capsys.readouterr()
    more = ["--nodes", "2", "--gpus", "2", "--memory", "80", "--step-seconds", "36", "--json"]
    assert main(["plan", *args, *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ranks"], told["samples_per_step"], told["steps"]) == (4, 4 * 4 * 8, 100)
    ddp = told["strategies"][0]
    assert ddp["strategy"] == "ddp"
    assert ddp["hours"] == 1
    assert ddp["fits"] is True
    values = 2 * 1000 * 256 + 3 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256
    assert ddp["memory"]["target"] == pytest.approx(2 * values, rel=0.01)  # bfloat16
    recommended = next(plan for plan in told["strategies"] if plan["name"] == told["recommended"])
    assert told["arguments"] == recommended["arguments"]
    words = ["--trainer.num_nodes", "2", "--trainer.devices", "2", "--trainer.strategy"]
    assert ddp["arguments"] == [*words, "ddp"]
    for plan in told["strategies"]:  # `l3d fit` takes them
        if not plan["strategy"].startswith("deepspeed") or find_spec("deepspeed"):
            CheckCLI([*args, *plan["arguments"]])

    assert main(["plan", *args, "--json", "--trainer.accumulate_grad_batches", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples_per_step"] == 3 * 4 * 8

    assert main(["plan", *args, "--memory", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "recommended: none: nothing fits" in out
    assert "--flops-per-second" in out
    assert "run it with" not in out
    assert list(Path().iterdir()) == [Path("llama")]  # nothing is written


def test_toy_with_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "tms", "--nodes", "1", "--gpus", "2", "--flops-per-second", "1"]) == 0
    out = capsys.readouterr().out
    assert "fsdp2 1 x 2" in out
    assert "recommended: auto: " in out or "recommended: ddp: " in out
    assert "run it with: --trainer.num_nodes 1 --trainer.devices 2 --trainer.strategy ddp" in out
    assert "1,600 steps;" in out  # of fresh rows: 200 to an epoch on any number of ranks
    assert list(Path().iterdir()) == []


def test_steps_of_a_stream_and_of_accumulated_batches() -> None:
    trainer = Namespace(max_steps=-1, max_epochs=3, limit_train_batches=None, accumulate_grad_batches=1)
    stream = {"streaming": True, "steps_per_epoch": 10}
    assert steps_of(trainer, batches_of(stream, None, 4, 8)) == 30
    assert steps_of(trainer, batches_of({"points": 5, "steps_per_epoch": 10}, 100, 4, 2)) == 3 * 13
    assert steps_of(trainer, batches_of({}, None, 4, 8)) is None
    trainer.accumulate_grad_batches = 4
    assert steps_of(trainer, 10) == 3 * 3  # the last one of an epoch is of fewer batches
    trainer.limit_train_batches = 0.5
    assert steps_of(trainer, 10) == 3 * 2


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args, part in (
        (["--nodes", "0"], "nodes: found 0, allowed are whole numbers >= 1"),
        (["--gpus", "-1"], "gpus: found -1, allowed are whole numbers >= 1"),
        (["--gpus", "two"], "gpus: found 'two', allowed: int"),
        (["--memory", "0"], "memory: found 0.0, allowed are GB > 0"),
        (["--flops-per-second", "0"], "flops_per_second: found 0.0"),
        (["--node", "2"], "did you mean 'nodes'"),
        (["--trainer.precision", "64-true"], "trainer.precision: found 64-true; allowed in a plan is 32-true"),
    ):
        capsys.readouterr()
        assert main(["plan", "--config", "tms", *args]) == 2, args
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1
