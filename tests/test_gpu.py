"""What a GPU computes is what the CPU computes. `make test-gpu` where there is one."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed_run
import pandas as pd
import pytest
import torch
from oracles import LAYOUTS, assert_same, decomposition_problem
from parallel_run import fit as parallel_fit
from processes import run
from safetensors.torch import load_file
from test_analysis_commands import make_run
from test_deepspeed import STAGES, same_run
from torch import Tensor
from torch.utils._pytree import tree_map_only
from zoo import LANGUAGE, MODULES, ZOO, tokens

from l3d_pl import auxiliary, step
from l3d_pl.analysis.tables import read_table
from l3d_pl.batch_topk import batch_topk
from l3d_pl.cli import main
from l3d_pl.gradients import GradientExtractor
from l3d_pl.targets.frozen import select_parameters
from l3d_pl.targets.toy import TiedAutoencoder
from l3d_pl.targets.training import save_target
from l3d_pl.tucker import local

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:no gradient rule covers:UserWarning"),
]


def moved(thing: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.cuda(), thing)


def on_device(device: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward pass of a model that makes its constants wherever torch makes them."""
    with torch.device(device):
        return moved(forward(*args, **kwargs)) if device == "cuda" else forward(*args, **kwargs)


def assert_same_gradients(model: torch.nn.Module, batch: Any, divergence: str, sample: str = "item") -> None:
    found = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)
        own.forward = partial(on_device, device, own.forward)
        extractor = GradientExtractor(own, select_parameters(own, "*"), divergence, "random", sample)
        found.append(extractor(batch if device == "cpu" else moved(batch), torch.Generator().manual_seed(0)))
    expected, on_gpu = found
    # transformers compute rotations and norms in float32, whatever the model's precision is
    rtol = 1e-4 if hasattr(model, "config") else 1e-6
    assert_same(on_gpu.outputs.cpu(), expected.outputs, rtol)
    assert_same(on_gpu.references.cpu(), expected.references, rtol)  # drawn alike
    dense = {name: gradient.dense() for name, gradient in expected.gradients.items()}
    scale = max(float(gradient.abs().max()) for gradient in dense.values())
    for name, gradient in on_gpu.gradients.items():
        assert gradient.dense().is_cuda
        assert_same(gradient.dense().cpu(), dense[name], rtol, scale)
        assert_same(gradient.squared_norms().cpu(), expected.gradients[name].squared_norms(), rtol, scale**2)


@pytest.mark.parametrize("name", list(ZOO))
def test_gradients_of_every_model(name: str) -> None:
    assert_same_gradients(ZOO[name].model(), ZOO[name].batch(), "mse" if name in MODULES else "kl")


@pytest.mark.parametrize("name", list(LANGUAGE))
def test_gradients_of_tokens(name: str) -> None:
    assert_same_gradients(LANGUAGE[name].model(), tokens(length=5, padding=True)(), "kl", "token")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2-sdpa", "llama-sdpa", "gptneo-eager"])
def test_half_precision_of_the_frozen_model(name: str, dtype: str) -> None:
    model, batch = LANGUAGE[name].model(torch.float32).cuda(), moved(tokens(length=5)())
    found = []
    for autocast in (None, dtype):
        extractor = GradientExtractor(
            model, select_parameters(model, "*attn*weight"), "kl", "random", "token", None, autocast
        )
        extraction = extractor(batch, torch.Generator().manual_seed(0))
        extractor.check(batch, extraction)
        found.append(torch.cat([gradient.dense().flatten(1) for gradient in extraction.gradients.values()], 1))
    assert found[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("samples", [7, 12])  # items, and two tokens of each of six
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step(layout: str, samples: int) -> None:
    whole, gradients = decomposition_problem(layout, restarts=2, samples=samples)
    results = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(whole).to(device)
        own.is_dense = lambda name, gradient: LAYOUTS[layout](name)  # type: ignore[method-assign]
        its = gradients
        if device == "cuda":
            its = {name: copy.copy(gradient) for name, gradient in gradients.items()}
            for gradient in its.values():
                vars(gradient).update(moved(vars(gradient)))
        prepared = own.prepare(its)
        found = step.decompose(own, prepared, 0.3)
        dead = torch.zeros(2, 5, dtype=torch.bool, device=device)
        dead[:, 1:3] = True
        aux = auxiliary.auxiliary_loss(own, prepared, found, dead, 0.6)
        assert aux is not None
        (found.loss.sum() + 0.1 * aux).backward()
        own.normalise_()
        grads = [parameter.grad for parameter in own.parameters()]
        results.append((found.loss, found.coefficients, found.mask, aux, *grads, *own.parameters()))
    for expected, on_gpu in zip(*results, strict=True):
        assert expected is not None
        assert on_gpu.is_cuda
        assert_same(on_gpu.detach().cpu().double(), expected.detach().double())


def test_ties_of_batch_topk_go_to_the_same_entries() -> None:
    for seed in range(20):
        c = (torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(seed)) * 2).round()
        for k in (0.05, 0.3, 0.9):
            (mask, threshold), (on_gpu, its) = batch_topk(c, k), batch_topk(c.cuda(), k)
            assert torch.equal(on_gpu.cpu(), mask)
            assert torch.equal(its.cpu(), threshold)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2:1"])
def test_a_fit_in_double_precision(strategy: str) -> None:
    """With AuxK, dead counts and evaluation: as on the CPU."""
    settings = {"init": "random", "swap_every": 0}
    expected = parallel_fit(1, **settings).state_dict()
    found = parallel_fit(1, strategy, accelerator="gpu", **settings)
    for name, value in found.state_dict().items():
        if value.is_floating_point():
            assert_same(local(value).cpu(), expected[name].detach(), 1e-6)
        else:
            assert torch.equal(value.cpu(), expected[name]), name


def test_a_start_from_gradients_and_swaps() -> None:
    """As good as on the CPU. (Not the same: the noise of a start depends on the signs of singular vectors.)"""
    losses = [float(parallel_fit(1, accelerator=accelerator).held_out_loss[0]) for accelerator in ("cpu", "gpu")]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.timeout(300)
def test_every_stage_of_deepspeed(tmp_path: Path) -> None:
    """As DDP; what resumes is the uninterrupted run, to the bit."""
    out, stages = tmp_path / "out.pt", [*STAGES, "deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
    run([str(HERE / "deepspeed_run.py"), str(out), "1", ",".join(["ddp", *stages]), "gpu"], seconds=250)
    found = torch.load(out, weights_only=True, map_location="cpu")
    for stage in stages:
        for case in ("everything", "accumulated"):
            same_run(found[stage][case], found["ddp"][case])
        assert found[stage]["resumed"]["losses"] == found[stage]["everything"]["losses"][deepspeed_run.SAVED :]
        assert torch.equal(found[stage]["resumed"]["directions"], found[stage]["everything"]["directions"])


@pytest.mark.timeout(200)
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_command_line(strategy: str, precision: str, tmp_path: Path) -> None:
    """Fit, checkpoint, export, atlas; stopped half way and resumed it ends with the same bytes."""
    save_target(tmp_path / "t.safetensors", TiedAutoencoder(5, 2))
    words = "fit --config tms --data.init_args.steps_per_epoch 12 --data.init_args.n_val 40 --model.init_samples 40"
    words += " --trainer.max_epochs 2 --trainer.enable_progress_bar false --trainer.accelerator gpu"
    words += f" --trainer.strategy {strategy} --trainer.precision {precision} --checkpoint.every_n_train_steps 10"
    stop = ["--trainer.callbacks+=test_callbacks.Raise", "--trainer.callbacks.at=15", "--trainer.callbacks.signum=15"]
    ends = []
    for name, *parts in (("whole", []), ("stopped", stop, ["--ckpt_path", "last"])):
        place = ["--trainer.default_root_dir", str(tmp_path / name)]
        for part in parts:
            command = [*words.split(), "--model.target_weights", str(tmp_path / "t.safetensors"), *place, *part]
            run(["-m", "l3d_pl.cli", *command], 100)
        assert (tmp_path / name / "finished").is_file()
        ends.append(load_file(tmp_path / name / "decomposition" / "model.safetensors"))
    for key, value in ends[0].items():
        assert torch.equal(ends[1][key], value), key


def test_analysis_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {}
    for device in ("cpu", "cuda"):
        folder = make_run(tmp_path / device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main(["analyze", str(folder), "--references", "2", "--device", device]) == 0
            assert main(["intervene", str(folder), "--subnetwork", "3", "--delta", "-1", "1", "--device", device]) == 0
        names = ("subnetworks", "norm_shares", "similarity", "samples", "curves", "locality")
        tables[device] = {name: read_table(folder / "analysis", name) for name in names}
    capsys.readouterr()
    for name, expected in tables["cpu"].items():
        pd.testing.assert_frame_equal(tables["cuda"][name], expected, rtol=1e-3, atol=1e-4)
