"""Scores against ground truth: planted subnetworks must give the known answers, whatever their signs and order."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from l3d_pl.analysis.alignment import (
    FIGURES,
    ToyScore,
    abs_cosines,
    ml2r,
    mmcs,
    number,
    recovered,
    score_toy,
    squared_correlation,
    summarise,
    summary_table,
)
from l3d_pl.errors import L3DError

Tensors = dict[str, Tensor]
seeds = st.integers(0, 2**31 - 1)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def target_of(task: str) -> Tensors:
    if task == "tms":
        return {"W_in": randn(5, 2, seed=1), "b": randn(5, seed=2)}
    if task == "tmcs":
        return {"W_in": randn(10, 5, seed=1), "W_out": randn(5, 10, seed=2), "b": randn(10, seed=3)}
    if task == "high_rank_30":
        return {"W_in": randn(30, 10, seed=1), "W_out": randn(10, 30, seed=2), "b": randn(30, seed=3)}
    sizes = [5, 10, 10, 10, 10, 5]
    weights = {f"{i}.weight": randn(sizes[i + 1], sizes[i], seed=i) for i in range(5)}
    return weights | {f"{i}.bias": randn(sizes[i + 1], seed=9 + i) for i in range(5)}


TRUTH = {"A": 3 * torch.rand(10, 10, generator=torch.Generator().manual_seed(4))}


def planted(task: str) -> Tensors:
    """One subnetwork per circuit, exactly as the ground truth has it."""
    target = target_of(task)
    if task == "tms":
        v = {"W_in": torch.diag_embed(target["W_in"].T, dim1=0, dim2=1), "b": torch.zeros(5, 5)}
    elif task == "tmcs":  # rank 1: feature f writes its row of A through its own row of W_in
        rows = target["W_in"]
        v = {
            "W_in": torch.diag_embed(rows.T, dim1=0, dim2=1),
            "W_out": torch.einsum("fh,fo->fho", rows, TRUTH["A"]),
            "b": torch.zeros(10, 10),
        }
    elif task == "high_rank_30":
        groups = torch.eye(6).repeat_interleave(5, 1)
        v = {
            "W_in": groups[:, :, None] * target["W_in"],
            "W_out": target["W_out"].repeat(6, 1, 1),
            "b": torch.zeros(6, 30),
        }
    else:
        v = {name: torch.zeros(5, *tensor.shape) for name, tensor in target.items()}
        feature = torch.arange(5)
        v["0.weight"][feature, :, feature] = 1.0
        v["4.weight"][feature, feature] = 1.0
    norm = torch.sqrt(sum((t.flatten(1).square().sum(1) for t in v.values()), start=torch.zeros(len(v[next(iter(v))]))))
    return {name: t / norm.reshape(-1, *[1] * (t.ndim - 1)) for name, t in v.items()}


def score(task: str, v_out: Tensors, alive: Tensor | None = None, **options: float) -> ToyScore:
    n_v = len(next(iter(v_out.values())))
    alive = torch.ones(n_v, dtype=torch.bool) if alive is None else alive
    return score_toy(task, v_out, target_of(task), TRUTH, alive, **options)  # type: ignore[arg-type]


TASKS = {"tms": 5, "tmcs": 10, "high_rank_30": 6, "squared": 5}


@pytest.mark.parametrize(("task", "n_circuits"), TASKS.items())
def test_the_ground_truth_itself_is_fully_recovered(task: str, n_circuits: int) -> None:
    result = score(task, planted(task), loss=0.25)
    assert result.ok
    assert result.n_circuits == n_circuits
    assert result.figures["recovered"] == n_circuits
    assert result.figures["dead"] == 0
    assert result.figures["loss"] == 0.25
    assert result.figures["share_min"] == pytest.approx(1)
    assert [s.circuit for s in result.subnetworks] == list(range(n_circuits))
    perfect = {
        "tms": ("cos_min", "mmcs", "mmcs_all", "ml2r"),
        "tmcs": ("r2_min", "r2_product"),
        "squared": ("same_output",),
    }
    for name in perfect.get(task, ()):
        assert result.figures[name] == pytest.approx(1), name


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_sign_and_order_of_the_subnetworks_change_no_figure(task: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noisy = {name: v + 0.1 * torch.randn(v.shape, generator=generator) for name, v in planted(task).items()}
    n_v = TASKS[task]
    alive = torch.rand(n_v, generator=generator) > 0.2
    order = torch.randperm(n_v, generator=generator)
    signs = torch.randint(0, 2, (n_v,), generator=generator) * 2.0 - 1
    moved = {name: v[order] * signs.reshape(-1, *[1] * (v.ndim - 1)) for name, v in noisy.items()}
    before, after = score(task, noisy, alive), score(task, moved, alive[order])
    assert after.figures == pytest.approx(before.figures)
    for place, k in enumerate(order.tolist()):
        assert after.subnetworks[place].circuit == before.subnetworks[k].circuit
        assert after.subnetworks[place].own == before.subnetworks[k].own


@pytest.mark.parametrize(("task", "n_circuits"), TASKS.items())
def test_a_duplicate_and_a_dead_subnetwork_each_lose_a_circuit(task: str, n_circuits: int) -> None:
    duplicated = {name: v.clone() for name, v in planted(task).items()}
    for v in duplicated.values():
        v[1] = -v[0]
    result = score(task, duplicated)
    assert not result.ok
    assert result.figures["recovered"] == n_circuits - 1
    assert sum(s.own for s in result.subnetworks[:2]) == 1, "one circuit is not recovered twice"

    dead = torch.ones(n_circuits, dtype=torch.bool)
    dead[2] = False
    result = score(task, planted(task), dead)
    assert result.figures["recovered"] == n_circuits - 1
    assert result.figures["dead"] == 1
    assert not result.subnetworks[2].own


@pytest.mark.parametrize("task", TASKS)
def test_without_live_subnetworks_nothing_is_measured_and_nothing_breaks(task: str) -> None:
    result = score(task, planted(task), torch.zeros(TASKS[task], dtype=torch.bool))
    assert result.figures["recovered"] == 0
    assert result.figures["share"] is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_random_subnetworks_recover_little_on_tms() -> None:
    counts = []
    for seed in range(20):
        v = {"W_in": randn(5, 5, 2, seed=seed), "b": randn(5, 5, seed=seed + 99)}
        result = score("tms", v)
        counts.append(result.figures["recovered"])
        assert result.figures["mmcs"] < 0.95
    assert np.mean(counts) < 3


def test_a_share_of_half_is_not_enough_and_more_is() -> None:
    v = planted("tms")
    v["W_in"][0, 1] = v["W_in"][0, 0]  # two equal rows
    assert score("tms", v).figures["recovered"] == 4
    v["W_in"][0, 1] *= 0.9
    result = score("tms", v)
    assert result.figures["recovered"] == 5
    assert result.subnetworks[0].share == pytest.approx(1 / 1.81)


def test_tms_cos_is_of_the_row_alone_and_only_of_recovered_features() -> None:
    v = planted("tms")
    row = target_of("tms")["W_in"][3]
    across = torch.stack([-row[1], row[0]])  # at right angles, of the same length
    v["W_in"][3, 3] = row + across
    result = score("tms", v)
    assert result.figures["cos_min"] == pytest.approx(0.5**0.5, rel=1e-6)
    assert result.figures["cos"] == pytest.approx((4 + 0.5**0.5) / 5, rel=1e-6)
    dead = torch.tensor([True, True, True, False, True])
    assert score("tms", v, dead).figures["cos_min"] == pytest.approx(1)


def test_a_bias_lowers_the_mmcs_over_everything_but_not_within_w_in() -> None:
    v = planted("tms")
    v["b"] = torch.eye(5) * v["W_in"].flatten(1).norm(dim=1)  # as long as the row: cos = 1 / sqrt 2
    figures = score("tms", v).figures
    assert figures["mmcs"] == pytest.approx(1)
    assert figures["mmcs_all"] == pytest.approx(0.5**0.5)


def test_tmcs_ceilings_are_the_targets_own_squared_correlations() -> None:
    target, A = target_of("tmcs"), TRUTH["A"]
    v = planted("tmcs")
    learned = target["W_in"] @ target["W_out"]
    v["W_out"] = torch.einsum("fh,fo->fho", target["W_in"], learned)  # subnetworks that know what the target knows
    figures = score("tmcs", v).figures
    rows = [np.corrcoef(learned[i].numpy(), A[i].numpy())[0, 1] ** 2 for i in range(10)]
    assert figures["r2_ceiling"] == pytest.approx(np.mean(rows), rel=1e-5)
    assert figures["r2"] == pytest.approx(np.mean(rows), rel=1e-5)
    assert figures["r2_min"] == pytest.approx(np.min(rows), rel=1e-5)
    assert figures["r2_ratio"] == pytest.approx(1)
    whole = np.corrcoef(learned.flatten().numpy(), A.flatten().numpy())[0, 1] ** 2
    assert figures["r2_sum_ceiling"] == pytest.approx(whole, rel=1e-5)
    alive = torch.arange(10) < 7  # a dead subnetwork's product does not count
    together = sum(v["W_in"][k] @ v["W_out"][k] for k in range(7))
    read = np.corrcoef(torch.as_tensor(together).flatten().numpy(), A.flatten().numpy())[0, 1] ** 2
    assert score("tmcs", v, alive).figures["r2_sum"] == pytest.approx(read, rel=1e-5)


def test_tmcs_reads_row_i_of_a_through_j_star() -> None:
    """Rank 2: another decoder row holds something else, which W_in W_out mixes in and the path through j* does not."""
    v = {name: t.double() for name, t in planted("tmcs").items()}
    v["W_in"] = torch.zeros(10, 10, 5, dtype=torch.float64)
    v["W_in"][range(10), range(10), 0] = 1.0  # j* = 0
    v["W_in"][range(10), range(10), 1] = 1.0
    v["W_out"] = torch.zeros(10, 5, 10, dtype=torch.float64)
    v["W_out"][:, 0] = 3 * TRUTH["A"].double()
    other = randn(10, 10, seed=5).double()
    v["W_out"][:, 1] = other
    figures = score("tmcs", v).figures
    mixed = 3 * TRUTH["A"].double() + other
    expected = [np.corrcoef(mixed[i].numpy(), TRUTH["A"][i].double().numpy())[0, 1] ** 2 for i in range(10)]
    assert figures["r2"] == pytest.approx(1)
    assert figures["r2_product"] == pytest.approx(np.mean(expected))


def test_high_rank_spare_subnetworks_may_split_groups() -> None:
    v = planted("high_rank_30")
    split = {name: torch.cat([t, t[:2]]) for name, t in v.items()}
    split["W_in"][6, :3] = 0.0  # half of group 0
    result = score("high_rank_30", split)
    assert result.ok
    assert [s.circuit for s in result.subnetworks] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert sum(s.own for s in result.subnetworks) == 6
    assert result.figures["share"] == pytest.approx(1)


def test_squared_needs_the_output_to_be_the_input() -> None:
    v = planted("squared")
    v["4.weight"][0, [0, 1]] = v["4.weight"][0, [1, 0]]
    result = score("squared", v)
    assert result.figures["recovered"] == 4
    assert result.figures["same_output"] == pytest.approx(0.8)
    v["4.bias"][0, 0] = 100.0  # the bias belongs to the output as well
    assert score("squared", v).figures["recovered"] == 5


# --- Directions ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 8))
def test_direction_figures_ignore_sign_order_and_length(seed: int, n: int, m: int, d: int) -> None:
    directions, truths = randn(n, d, seed=seed), randn(m, d, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(n, 1, generator=generator) + 0.1) * (torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1)
    moved = (scale * directions)[torch.randperm(n, generator=generator)]
    assert 0 <= mmcs(directions, truths) <= 1
    assert mmcs(moved, truths) == pytest.approx(mmcs(directions, truths))
    assert recovered(moved, truths).cos.sum() == pytest.approx(recovered(directions, truths).cos.sum().item())
    own = recovered(directions, truths).own
    taken = own[own >= 0].tolist()
    assert len(taken) == len(set(taken)) == min(n, m)


def test_mmcs_lets_truths_share_a_direction_and_recovered_does_not() -> None:
    truths = torch.eye(3)
    directions = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
    assert mmcs(directions, truths) == pytest.approx((0.5**0.5 + 0.5**0.5 + 1) / 3)
    recovery = recovered(directions, truths)
    assert recovery.n_recovered == 1
    assert sorted(recovery.own.tolist()) == [-1, 0, 1]
    assert recovered(directions, truths, threshold=0.7).n_recovered == 2


def test_the_assignment_is_the_best_of_all() -> None:
    """The greedy choice, direction 0 for truth 0, would leave |cos| 0.05 for truth 1."""
    directions = torch.tensor([[0.7, 0.65, (1 - 0.7**2 - 0.65**2) ** 0.5, 0.0], [0.65, 0.05, 0.0, 0.0]])
    directions[1, 3] = (1 - 0.65**2 - 0.05**2) ** 0.5
    recovery = recovered(directions, torch.eye(4)[:2])
    assert recovery.own.tolist() == [1, 0]
    assert recovery.cos.tolist() == pytest.approx([0.65, 0.65])


def test_ml2r_gives_lengths_back_and_sees_shrinkage() -> None:
    truths = torch.diag(torch.tensor([3.0, 0.5, 2.0]))
    unit = torch.nn.functional.normalize(truths, dim=1)
    assert ml2r(-unit[[2, 0, 1]], truths) == pytest.approx(1)
    assert ml2r(unit[:2], truths) == pytest.approx(2 / 3), "a missing direction counts as length 0"
    twins = torch.cat([unit, unit[:1]])
    assert ml2r(twins, truths) == pytest.approx((0.5 + 1 + 1) / 3), "two halves of one circuit share its length"


def test_zero_and_constant_vectors_correlate_with_nothing() -> None:
    assert abs_cosines(torch.zeros(1, 3), torch.ones(1, 3)).item() == 0
    assert squared_correlation(torch.full((7,), 0.1), torch.arange(7.0)) == 0
    assert squared_correlation(1e-9 * torch.arange(7.0), 5 - torch.arange(7.0)) == pytest.approx(1)


# --- Over seeds, and out into files and tables ----------------------------------------------------------------------


def test_summarise_gives_mean_min_and_max_and_skips_what_was_not_measured() -> None:
    dead = torch.zeros(5, dtype=torch.bool)
    runs = [
        score("tms", planted("tms"), loss=0.1),
        score("tms", planted("tms"), dead, loss=0.4),
        score("squared", planted("squared")),
    ]
    rows = {(row.task, row.figure): row for row in summarise(runs)}
    assert rows["tms", "loss"][2:] == (pytest.approx(0.25), 0.1, 0.4, 2)
    assert rows["tms", "ok"][2:] == (0.5, 0.0, 1.0, 2)
    assert rows["tms", "cos"].runs == 1
    assert rows["squared", "recovered"].mean == 5
    assert ("squared", "loss") not in rows
    assert summarise([]) == []


@pytest.mark.parametrize("task", TASKS)
def test_a_score_survives_json(task: str) -> None:
    result = score(task, planted(task), loss=float("nan"))
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert ToyScore.from_dict(json.loads(text)) == result
    assert set(result.figures) <= set(FIGURES), "every figure is explained"
    assert result.figures["loss"] is None


def test_a_file_that_is_no_score_is_refused_in_one_line() -> None:
    with pytest.raises(L3DError, match=r"score: .*n_circuits"):
        ToyScore.from_dict({"task": "tms", "subnetworks": []})


def test_tables_show_every_figure_and_its_brackets() -> None:
    console = Console(width=200, record=True)
    result = score("tmcs", planted("tmcs"))
    console.print(result)
    console.print(summary_table(summarise([result, score("tms", planted("tms"))])))
    text = console.export_text()
    assert "10 of 10" in text
    assert "W_in[i, j*]" in text, "rich must not take the index for markup"
    assert all(name in text for name in result.figures)
    shown = {1600.0: "1600", 0.99996: "1.000", 1.0: "1.000", 0.0: "0", 7.0: "7", 0.00012: "0.00012", -0.25: "-0.250"}
    assert {value: number(value) for value in shown} == shown


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named_in_one_line() -> None:
    v, target, alive = planted("tms"), target_of("tms"), torch.ones(5, dtype=torch.bool)
    cases = [
        (("tsm", v, target, {}, alive), "task: found 'tsm'.*did you mean 'tms'"),
        (("tms", {"W_inn": v["W_in"]}, target, {}, alive), "v_out: tms is read off 'W_in'.*did you mean 'W_inn'"),
        (("tms", v, {"b": target["b"]}, {}, alive), "target: tms is read off 'W_in', found only b"),
        (
            ("tms", {"W_in": v["W_in"][:, :4]}, target, {}, alive),
            r"v_out W_in: found shape \[5, 4, 2\], allowed.*\[5, 5, 2\]",
        ),
        (("tms", {"W_in": v["W_in"] * torch.nan}, target, {}, alive), "v_out W_in: found 50 of 50 values"),
        (("tms", v, target, {}, alive.float()), r"alive: found torch.float32 of shape \[5\]"),
        (
            ("tmcs", planted("tmcs"), target_of("tmcs"), {}, torch.ones(10, dtype=torch.bool)),
            "truth: found only nothing",
        ),
        (
            ("tmcs", planted("tmcs"), target_of("tmcs"), {"A": TRUTH["A"][:3]}, torch.ones(10, dtype=torch.bool)),
            r"\[3, 10\]",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(L3DError, match=message) as caught:
            score_toy(*arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(L3DError, match="group_size: found 7"):
        score("high_rank_30", planted("high_rank_30"), group_size=7)
    with pytest.raises(L3DError, match="directions, truths"):
        mmcs(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(L3DError, match="mmcs: found 0 directions"):
        mmcs(torch.ones(0, 3), torch.ones(2, 3))
