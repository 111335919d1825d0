"""Experiment transfer: its measures where the answer is known, and the command end to end."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import planted_decomposition
from torch import Tensor

from l3d_pl import Decomposition
from l3d_pl.cli import main
from l3d_pl.experiments.transfer import (
    BLOCKS,
    CHANNELS,
    FACTORS,
    HIDDEN,
    MEASURES,
    QUANTITIES,
    REST,
    TINY,
    TOP,
    Settings,
    _fit,
    blocks_of,
    by_chance,
    by_outputs,
    chosen,
    data_of,
    directions_of,
    distances,
    effective_dimension,
    effects,
    held_out,
    in_use,
    ks,
    look,
    selectivity,
    spreads,
    top_gradient,
)
from l3d_pl.targets.digits import DigitsCNN
from l3d_pl.targets.frozen import select_parameters
from l3d_pl.targets.language import gpt_neo, llama

N, D = 400, 6


@pytest.fixture
def planted() -> tuple[Decomposition, dict[str, Tensor], list[Tensor]]:
    """`planted_decomposition`; samples [N, 6] of one norm, each with three of the features; gradients of |x - y|² for
    four draws of random y."""
    random = torch.Generator().manual_seed(0)
    x = torch.zeros(N, D).scatter_(1, torch.rand(N, D, generator=random).topk(3).indices, 1.0)
    x *= (torch.rand(N, D, generator=random) < 0.5) * 2 - 1
    draws = [torch.einsum("no,ni->noi", x - torch.randn(N, D, generator=random), x).flatten(1) for _ in range(4)]
    return planted_decomposition(D), {"inputs": x}, draws


def test_selectivity_of_planted_subnetworks_and_of_random_directions(planted) -> None:
    found, batch, draws = planted
    impact = batch["inputs"].abs() + 0.1 * torch.rand(N, D)
    rows = pd.DataFrame(
        directions_of(found, batch, torch.ones(D), impact, draws, Settings(directions=D, random=20), seed=0)
    )
    medians = rows.groupby("control")[list(MEASURES)].median()
    controls = medians.drop("subnetwork")
    assert controls["first_logits"].tolist() == pytest.approx(controls["first"].tolist(), rel=0.5)
    assert controls["at_step_logits"].tolist() == pytest.approx(controls["first_logits"].tolist(), rel=0.1)
    assert (
        medians.loc["subnetwork", "first_logits"] > 100
    )  # what spills over moves all outputs alike: nothing, if centred
    # Top samples have feature k: |1 ± 0.02| and five times about 0.02; the others about 0.02 in all six outputs.
    assert medians.loc["subnetwork", "first"] > 5
    assert 0.8 < medians.loc["random", "first"] < 1.2
    assert 1.2 < medians.loc["random, own", "first"] < 0.5 * medians.loc["subnetwork", "first"]
    assert medians["at_step"].tolist() == pytest.approx(medians["first"].tolist(), rel=0.1)  # a linear model
    assert set(rows["subnetwork"]) == set(range(D))
    dead = torch.ones(D)
    dead[2:] = 0
    rows = pd.DataFrame(directions_of(found, batch, dead, impact, draws, Settings(directions=D), seed=0))
    assert set(rows["subnetwork"]) == {0, 1}
    assert directions_of(found, batch, torch.zeros(D), impact, draws, Settings(), seed=0) == []


def test_logits_show_what_saturated_probabilities_hide() -> None:
    """Two samples whose logits move alike, one sure of its class; moving all logits at once moves nothing."""
    logits = torch.tensor([[30.0, 0, 0], [0.2, 0, 0]]).double()
    moved = torch.tensor([[1.0, 0, 5], [1, 0, 5]]).double()
    steps = torch.stack([logits + 0.5 * moved, logits - 0.5 * moved])
    shown = partial(torch.softmax, dim=-1)
    found = by_outputs(shown, logits, moved, steps)
    assert all(found[name][0] < 1e-6 < 0.1 < found[name][1] for name in ("first", "at_step"))
    assert found["first_logits"].tolist() == pytest.approx([1 + 2 + 3] * 2)
    assert found["at_step_logits"].tolist() == pytest.approx([0.5 * 6] * 2)
    h = 1e-6
    slope = (shown(logits + h * moved) - shown(logits - h * moved)).abs().sum(1) / (2 * h)
    assert found["first"].tolist() == pytest.approx(slope.tolist(), abs=1e-8)
    still = by_outputs(shown, logits, torch.ones(2, 3).double(), logits + torch.ones(1, 2, 3))
    assert all(float(values.abs().max()) < 1e-12 for values in still.values())


@pytest.mark.parametrize(("seeds", "first", "second"), [(5, 1, 1), (2, 2, 4)])
def test_chance_is_that_of_noise(seeds: int, first: int, second: int) -> None:
    blocks = np.random.default_rng(0).normal(size=(20000, first + second, seeds))
    spread = np.sqrt(blocks.var(axis=2, ddof=1).mean(axis=1))
    differences = blocks[:, :first].mean(axis=1) - blocks[:, first:].mean(axis=1)
    beyond = np.abs(differences.mean(axis=1)) > 2 * spread
    assert by_chance(seeds, first, second) == pytest.approx(beyond.mean(), abs=0.003)
    one_sign = (differences > 0).all(axis=1) | (differences < 0).all(axis=1)
    assert (beyond & one_sign).sum() > 0.6 * beyond.sum()


def test_the_gradient_control_turns_its_samples_one_way(planted) -> None:
    found, _, draws = planted
    gradients = draws[0] * (torch.rand(N, 1) - 0.5).sign()
    reader = found.direction(1)["weight"].flatten()
    c = gradients @ reader
    most = c.abs().topk(TOP).indices
    assert 0 < (c[most] < 0).sum() < TOP
    wanted = sum(gradients[i] * c[i].sign() for i in most)
    control = top_gradient(found, 1, gradients)["weight"].flatten()
    torch.testing.assert_close(control, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_chosen_are_the_strongest_and_some_of_the_weaker_half() -> None:
    strengths = torch.arange(100.0)[torch.randperm(100)]
    places = chosen(strengths, torch.Generator().manual_seed(0))
    assert strengths[places[:TOP]].tolist() == [99, 98, 97, 96, 95, 94, 93, 92]
    assert len(places) == TOP + REST
    assert strengths[places[TOP:]].max() < 50
    few = chosen(torch.arange(8.0), torch.Generator().manual_seed(0))
    assert sorted(few.tolist()) == [0, 1, 2, 3, 6, 7]
    assert selectivity(torch.tensor([4.0, 2.0, 1.0, 0.5]), 2) == 4


def test_shape_of_p_act() -> None:
    assert in_use([0.1] * 7) == pytest.approx(7)
    assert in_use([0.3, 0.0, 0.0]) == pytest.approx(1)
    assert in_use([0.2, 0.1]) == pytest.approx(3 / 4 ** (1 / 3))
    p = torch.rand(50)
    assert ks(p, p[torch.randperm(50)]) == 0
    assert ks(p, p + 2) == 1


def test_effective_dimension() -> None:
    assert effective_dimension(torch.eye(9)) == pytest.approx(9)
    assert effective_dimension(torch.ones(9, 9)) == pytest.approx(1)
    assert effective_dimension(torch.diag(torch.tensor([2.0, 1, 1]))) == pytest.approx(16 / 6)


def test_a_block_decomposed_twice_with_one_seed_gives_the_same_figures() -> None:
    settings = Settings(**TINY)
    target = DigitsCNN((4, 8), HIDDEN)
    batch = held_out(data_of("cnn_2", settings, 0), 40)
    one, same, other = (
        look(_fit(settings, target, "cnn_2", ["conv2.weight", "fc*.weight"], seed), batch, settings, 0)
        for seed in (0, 0, 1)
    )
    assert one == same
    p, q, r = ([row["p_act"] for row in rows if row["kind"] == "use"] for rows in (one, same, other))
    assert ks(p, q) == 0 < ks(p, r)
    assert sum(p) == pytest.approx(settings.k * settings.n_subnetworks, abs=0.02)


def test_blocks_to_compare_have_the_same_shapes() -> None:
    size = {"vocabulary": 300, "width": 16, "layers": 2}
    models = {"gpt_neo": gpt_neo(**size), "llama": llama(**size)}
    models |= {name: DigitsCNN(channels, HIDDEN) for name, channels in CHANNELS.items()}
    shapes = {
        block: [tuple(tensor.shape) for tensor in select_parameters(models[name], parameters).values()]
        for block, (name, parameters) in blocks_of(2).items()
    }
    assert tuple(shapes) == BLOCKS
    assert all(shapes[block] == [(16, 16)] * 4 for block in BLOCKS[:4])
    assert shapes[BLOCKS[4]] == shapes[BLOCKS[5]] == [(32, 16, 3, 3), (64, 128), (10, 64)]


def test_held_out_tokens_are_one_of_each_sequence() -> None:
    data = data_of("llama", Settings(**TINY), 3)
    batch, again = held_out(data, 30), held_out(data_of("llama", Settings(**TINY), 4), 30)
    assert (batch["sample_mask"].sum(1) == 1).all()
    assert len(batch["input_ids"]) == 30
    assert len(set(batch["sample_mask"].nonzero()[:, 1].tolist())) > 5
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def figures(values) -> pd.DataFrame:
    """Figures of five seeds, all quantities alike: values(block, seed, fit)."""
    return pd.DataFrame(
        {"seed": seed, "block": block, "fit": fit} | dict.fromkeys(QUANTITIES, float(values(block, seed, fit)))
        for seed in range(5)
        for block in BLOCKS
        for fit in (0, 1)
    )


def test_spreads_of_fits_and_of_targets() -> None:
    of_fits, of_targets = spreads(figures(lambda block, seed, fit: 0.3 * fit), "loss")
    assert (of_fits, of_targets) == (pytest.approx(0.3 / 2**0.5), 0)
    of_fits, of_targets = spreads(figures(lambda block, seed, fit: seed), "loss")
    assert (of_fits, of_targets) == (0, pytest.approx(2.5**0.5))


def test_effects_count_beyond_the_noise_only() -> None:
    noise = [0.1, -0.1, 0.05, -0.05, 0.0]
    found = effects(figures(lambda block, seed, fit: noise[seed] + 2 * block.startswith("Llama")))
    loss = found[found["quantity"] == "loss"].set_index("factor")
    assert loss["effect"].to_dict() == pytest.approx(
        dict.fromkeys(FACTORS, 0) | {"architecture, first": 2, "architecture, last": 2, "digits or text": -1}
    )
    assert set(loss.index[loss["counts"]]) == {"architecture, first", "architecture, last", "digits or text"}
    small = effects(figures(lambda block, seed, fit: noise[seed] + 0.1 * block.endswith("last")))
    assert not small["counts"].any()  # of one sign in all seeds, but within the spread


def test_distances_of_p_act() -> None:
    rows = pd.DataFrame(
        {"kind": "use", "seed": seed, "block": block, "fit": fit, "p_act": 0.1 * k + block.startswith("CNN")}
        for seed in range(2)
        for block in BLOCKS
        for fit in (0, 1)
        for k in range(4)
    )
    found = distances(rows)
    assert found["kind"].value_counts().to_dict() == {"fits": 12, "seeds": 24, "blocks": 15 * 8}
    assert (found[found["kind"] != "blocks"]["ks"] == 0).all()
    apart = found.groupby(["a", "b"])["ks"].mean()
    assert apart["Llama, last", "CNN, 2 conv."] == 1
    assert apart["GPT-Neo, first", "Llama, last"] == 0


def test_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards: training the targets leaves it behind
    assert main(["experiment", "transfer", "--tiny", "--seed", "1", "--output", str(tmp_path)]) == 0
    assert "effective dimension" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "seed_1" / "rows.csv")
    fits = rows[rows["kind"] == "fit"]
    assert sorted(zip(fits["block"], fits["fit"], strict=True)) == sorted((b, f) for b in BLOCKS for f in (0, 1))
    assert ((fits["loss"] > 0) & (fits["dimension"] >= 1)).all()
    assert set(rows[rows["kind"] == "target"]["target"]) == {"gpt_neo", "llama", "cnn_2", "cnn_3"}
    assert sorted(path.name for path in (tmp_path / "targets").iterdir()) == [
        *("cnn_2_seed1.safetensors", "cnn_3_seed1.safetensors", "gpt_neo_seed1", "llama_seed1")
    ]
    assert all(math.isfinite(value) and value > 0 for value in rows[rows["kind"] == "direction"]["first"])
    assert (tmp_path / "transfer.png").stat().st_size > 5000
    sizes = pd.read_csv(tmp_path / "effects.csv", index_col="quantity")
    assert len(sizes) == len(QUANTITIES)
    assert sizes.isin(["–"]).all(axis=None)  # one seed has no spread
