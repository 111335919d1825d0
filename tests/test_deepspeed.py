"""DeepSpeed's stages make the step of one process, with everything that writes to V. Real gloo processes.

DeepSpeed's master copy is float32, so this is float32 too: over some thirty steps of AdamW everything agrees to 1e-4.
That many ranks are one process to 1e-9, `test_parallel.py` shows under ddp.
"""

import sys
from importlib import util
from pathlib import Path
from typing import Any

import deepspeed_run
import pytest
import torch
from oracles import assert_same
from processes import run, script
from torch import Tensor

from l3d_pl import L3DError
from l3d_pl.cli import main
from l3d_pl.strategies.deepspeed import ZeroStrategy
from l3d_pl.targets.toy import TiedAutoencoder
from l3d_pl.targets.training import save_target

HERE = Path(__file__).parent
STAGES = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
pytestmark = pytest.mark.filterwarnings("ignore:Starting from v1.9.0:UserWarning", "ignore:.*_dataloader:UserWarning")


def run_ranks(out: Path, ranks: int, strategies: list[str], seconds: int, *more: str) -> dict[str, Any]:
    """What `deepspeed_run.py` has found."""
    script(HERE / "deepspeed_run.py", ranks, str(out), str(ranks), ",".join(strategies), *more, seconds=seconds)
    return torch.load(out, weights_only=True)


def same_subnetworks(found: Tensor, expected: Tensor) -> None:
    """Equal directions [2, n_v, values], up to the sign of a subnetwork: v and -v are one."""
    signs = (found[1] * expected[1]).sum(-1, keepdim=True).sign()
    assert_same(found * signs, expected, 1e-4)


def same_run(found: dict[str, Any], expected: dict[str, Any], ends: int | None = None) -> None:
    """Losses (of the last `ends` steps), directions and buffers of two runs."""
    start = None if ends is None else -ends
    assert_same(torch.tensor(found["losses"][start:]), torch.tensor(expected["losses"][start:]), 1e-4)
    same_subnetworks(found["directions"], expected["directions"])
    for name, value in expected["buffers"].items():
        if value.is_floating_point():
            assert_same(found["buffers"][name], value, 1e-4)
        else:
            assert torch.equal(found["buffers"][name], value), name


@pytest.fixture
def one(tmp_path: Path) -> dict[str, Any]:
    """The run "everything" on one process, which leaves OUT.ckpt behind."""
    return deepspeed_run.fit("auto", 1, "everything", write=tmp_path / "out.ckpt")


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_of_every_stage_make_the_step_of_one_process(tmp_path: Path, one: dict[str, Any]) -> None:
    found = run_ranks(tmp_path / "out.pt", 2, ["ddp", *STAGES], 500)
    ddp = found["ddp"]
    same_run(ddp["everything"], one)
    left = len(one["losses"]) - deepspeed_run.SAVED
    for stage in STAGES:
        results = found[stage]
        same_run(results["everything"], one)
        same_run(results["accumulated"], ddp["accumulated"])
        norms = results["everything"]["directions"][1].norm(dim=1)
        assert_same(norms, torch.ones_like(norms), 1e-5)

        # What resumes is the uninterrupted run to the bit; what resumes from another strategy's checkpoint, nearly.
        assert results["resumed"]["losses"] == results["everything"]["losses"][-left:]
        assert torch.equal(results["resumed"]["directions"], results["everything"]["directions"])
        for name, value in results["everything"]["buffers"].items():
            assert torch.equal(results["resumed"]["buffers"][name], value), name
        same_run(results["elsewhere"], one, left)
        alone = deepspeed_run.fit("auto", 1, "everything", read=tmp_path / f"out.{stage}")
        same_run(alone, one, left)
        assert results["everything"]["validated"] == pytest.approx(one["validated"], rel=1e-4)

    # In units of V, between two steps: ddp holds V and moments; each stage half of what it shares out, with
    # a master copy: moments; stage 3 V and gradients too. (Other tensors make about a tenth.)
    expected = {"ddp": 3.0, "deepspeed_stage_1": 1 + 3 / 2, "deepspeed_stage_2": 1 + 3 / 2, "deepspeed_stage_3": 5 / 2}
    for strategy, share in expected.items():
        memory = found[strategy]["memory"]
        assert memory["bytes_held"] / (4 * memory["values"]) == pytest.approx(share, abs=0.2), strategy


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 4])
def test_one_and_four_ranks_of_every_stage(tmp_path: Path, one: dict[str, Any], ranks: int) -> None:
    found = run_ranks(tmp_path / "out.pt", ranks, STAGES, 500, "short")
    for stage in STAGES:
        same_run(found[stage]["everything"], one)
        assert torch.equal(found[stage]["resumed"]["directions"], found[stage]["everything"]["directions"])


# -- the command line --------------------------------------------------------------------------------------------------


def tms(*more: str) -> list[str]:
    """Arguments of a few steps of TMS."""
    words = "fit --config tms --data.init_args.steps_per_epoch 6 --data.init_args.n_val 20 --model.target_weights"
    end = "--trainer.max_epochs 1 --trainer.enable_progress_bar false --model.init_samples 40 --trainer.accelerator cpu"
    return [*words.split(), "t.safetensors", *end.split(), "--trainer.default_root_dir", "run", *more]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["l3d"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: `seed_everything` leaves it behind
    save_target("t.safetensors", TiedAutoencoder(5, 2))


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trainer.precision", "bf16-mixed"], "trainer: precision: found bf16-mixed; allowed under deepspeed is"),
        (["--trainer.precision", "16-true"], "trainer: precision: found 16-true; allowed under deepspeed is 32-true"),
        (
            ["--trainer.gradient_clip_val", "1", "--trainer.gradient_clip_algorithm", "value"],
            "trainer.gradient_clip_algorithm: found value; allowed under deepspeed is norm",
        ),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(tms("--trainer.strategy", "deepspeed_stage_2", *arguments)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"l3d: error: {sentence}")
    assert errors.count("\n") == 1


def test_a_missing_deepspeed_and_a_stage_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(L3DError, match="found stage 4 of deepspeed, allowed are 1, 2, 3"):
        ZeroStrategy(stage=4)
    find = util.find_spec
    gone = "l3d_pl.strategies.deepspeed.find_spec"
    monkeypatch.setattr(gone, lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(L3DError, match="deepspeed is not installed; it comes with: pip install"):
        ZeroStrategy()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("_folder")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp2", *STAGES, "deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
)
def test_fit_from_the_command_line(strategy: str) -> None:
    """`l3d fit` on two ranks from a shipped config, with checkpoint, export and page."""
    run(["-m", "l3d_pl.cli", *tms("--config", f"strategies/{strategy}", "--trainer.devices", "2")], seconds=300)
    assert Path("run/finished").is_file()
    assert Path("run/decomposition/model.safetensors").is_file()
    shard = "" if strategy == "ddp" else "shard-00001-of-00002.safetensors"
    assert Path("run/checkpoints/last.ckpt", shard).is_file()
    assert not list(Path("run").glob(".*"))  # what was written aside on the way is gone
