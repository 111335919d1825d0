"""Each figure of an analysis against a plain computation of it: finite differences, sorts, loops."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import DIVERGENCES, assert_same, dense_directions, rows
from torch import Tensor, nn

from datamodules.loading import Rows
from l3d_pl import Decomposition, L3DError, Subnetworks
from l3d_pl.analysis import analyse as analyse_module
from l3d_pl.analysis.analyse import analyse, layout
from l3d_pl.analysis.attribution import REPLACEMENTS, attribution
from l3d_pl.analysis.interventions import (
    curve_rows,
    direction_of,
    mean_rows,
    named_outputs,
    natural_scale,
    random_directions,
    sweep,
)
from l3d_pl.analysis.items import item_rows, kind_of
from l3d_pl.analysis.locality import local_to, locality_rows, slopes
from l3d_pl.analysis.outputs import derivatives, most_affected, only_positions, pushed
from l3d_pl.analysis.runs import Entries, Run
from l3d_pl.analysis.stability import compare, cosines, match
from l3d_pl.analysis.survey import (
    Histogram,
    Selection,
    Settings,
    Survey,
    _mix,
    extractor_of,
    samples_of,
    take_survey,
)
from l3d_pl.analysis.tables import SCHEMAS, read_manifest, read_table, write_table
from l3d_pl.divergence import make_divergence, make_references
from l3d_pl.targets.language import gpt_neo
from l3d_pl.targets.toy import MLP


def decompose(
    model: nn.Module, divergence: str = "mse", n: int = 6, threshold: float = 0.3, **settings: Any
) -> Decomposition:
    """A decomposition of a model in float64 with V_in != V_out."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    subnetworks = Subnetworks(shapes, n, 2, generator=torch.Generator().manual_seed(1)).double()
    for parameter in subnetworks.v_in.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return Decomposition(subnetworks, model, divergence=divergence, threshold=threshold, **settings)


def vectors(divergence: str = "mse", n_rows: int = 40) -> tuple[Decomposition, Rows]:
    torch.manual_seed(0)
    return decompose(MLP((5, 4, 3)).double(), divergence), Rows(
        inputs=torch.randn(n_rows, 5).double(), labels=torch.randn(n_rows, 3).double()
    )


def texts(n_rows: int = 12) -> tuple[Decomposition, Rows]:
    torch.manual_seed(0)
    model = gpt_neo(vocabulary=30, width=8, layers=2, heads=2, context=8, window=4).double()
    ids = torch.randint(30, (n_rows, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    chosen = {name for name, _ in model.named_parameters() if "h.1.attn" in name}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if name in chosen}
    subnetworks = Subnetworks(shapes, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    decomposition = Decomposition(subnetworks, model, divergence="kl", sample="token", threshold=1e-3)
    return decomposition, Rows(input_ids=ids, attention_mask=mask, sample_mask=mask.bool())


def moved_model(model: nn.Module, direction: dict[str, Tensor], delta: float) -> nn.Module:
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name in direction:
            parameter.data += delta * direction[name]
    return model


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in model.state_dict().items()}


# -- the survey --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_impact_is_the_directional_derivative(divergence: str) -> None:
    decomposition, data = vectors(divergence, 12)
    n, h, model, v_in = 3, 1e-5, decomposition.target, dense_directions(decomposition.subnetworks.v_in)
    survey = take_survey(decomposition, Entries(data), Settings(references=n, batch_size=12, top=12, random=1))
    random, x = torch.Generator().manual_seed(_mix(0, 0)), data.tensors["inputs"]
    c = torch.empty(n, 12, 6, dtype=torch.float64)
    for r in range(n):
        references = make_references("random", model(x), make_divergence(divergence), random)
        for k in range(6):
            direction = {name: value[k] for name, value in v_in.items()}
            high, low = (moved_model(model, direction, side * h)(x) for side in (1, -1))
            for i in range(12):
                d = [DIVERGENCES[divergence](out[i : i + 1], references[i : i + 1]) for out in (high, low)]
                c[r, i, k] = (d[0] - d[1]) / (2 * h)
    impact = c.abs().mean(0)
    assert_same(survey.sums["impact_sum"], impact.sum(0), 1e-6)
    assert_same(survey.sums["c_sum"], c.sum((0, 1)), 1e-6)
    se = (c.abs().var(0) / n).sum(0).sqrt() / 12
    assert_same(survey.sums["impact_variance"].sqrt() / 12, se, 1e-5)
    assert survey.counts["active_pairs"].tolist() == (c.abs() >= 0.3).sum((0, 1)).tolist()
    for k in range(6):
        best = impact[:, k].sort(descending=True)
        found = survey.chosen(k)["top"]
        assert [row["sample"] for row in found] == best.indices.tolist()
        assert_same(torch.tensor([row["impact"] for row in found], dtype=torch.float64), best.values, 1e-6)
        coefficients = torch.tensor([row["coefficient"] for row in found], dtype=torch.float64)
        assert_same(coefficients, c.mean(0)[best.indices, k], 1e-5)


def test_selection_is_a_sort_with_one_position_of_each_entry() -> None:
    torch.manual_seed(0)
    n, entries, positions = 5, 30, 4
    score = torch.randint(0, 9, (entries * positions, n)).double()  # with many ties
    sample = torch.arange(entries).repeat_interleave(positions)
    position = torch.arange(positions).repeat(entries)
    kept = torch.rand(len(sample)) < 0.8
    score, sample, position = score[kept], sample[kept], position[kept]
    values = {name: torch.rand(len(sample), n) for name in ("impact", "impact_se", "coefficient", "active")}

    def fill(selection: Selection, wanted: Tensor) -> Selection:
        for part in torch.arange(entries).split(7):
            now = torch.isin(sample, part) & wanted
            if bool(now.any()):
                own = {name: value[now] for name, value in values.items()}
                selection.update(score[now], sample[now], position[now], **own)
        return selection

    whole = fill(Selection(8, n), torch.ones_like(sample, dtype=torch.bool))
    halves = [fill(Selection(8, n), (sample // 7) % 2 == rank) for rank in (1, 0)]
    halves[0].merge(halves[1])
    for k in range(n):
        best: dict[int, tuple[float, int, int]] = {}
        for i in range(len(sample)):
            entry = int(sample[i])
            if entry not in best or float(score[i, k]) > best[entry][0]:
                best[entry] = float(score[i, k]), int(position[i]), i
        expected = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))[:8]
        for selection in (whole, halves[0]):
            found = selection.of(k)
            assert [(row["sample"], row["position"]) for row in found] == [(e, p) for e, (_, p, _) in expected]
            assert [row["impact"] for row in found] == [float(values["impact"][i, k]) for _, (_, _, i) in expected]


def test_histogram_counts_each_value_once_in_its_bin() -> None:
    values = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 300.0]) + torch.tensor([0.0, 0.5, 0.0])
    whole, other = Histogram(3, 1e-6), Histogram(3, 1e-6)
    for part in values[:400].split(50):
        whole.update(part)
    other.update(values[400:])
    whole.merge(other)
    at_once = Histogram(3, 1e-6)
    at_once.update(values)
    assert torch.equal(whole.counts, at_once.counts)
    for k in range(3):
        bins = whole.of(k)
        assert len(bins) == 41
        assert bins[0][0] == -bins[-1][1]
        assert sum(count for _, _, count in bins) == 500
        edges = np.array([low for low, _, _ in bins] + [bins[-1][1]])
        expected = np.histogram(values[:, k].numpy(), edges)[0]
        assert np.abs(expected - [count for _, _, count in bins]).sum() <= 4  # values are rounded to 1e-6 of their unit
        assert (np.nonzero(expected)[0].max() - 20) > 41 / 2 / 4  # narrow: at least a quarter is used


def test_co_activation_and_shares() -> None:
    decomposition, data = vectors()
    survey = take_survey(decomposition, Entries(data), Settings(references=1, batch_size=20))
    extractor, c, total = extractor_of(decomposition), [], {}
    for number in (0, 1):
        batch = data[torch.arange(20 * number, 20 * number + 20)]
        extraction = extractor(batch, torch.Generator().manual_seed(_mix(0, number)))
        dense = {name: gradient.dense() for name, gradient in extraction.gradients.items()}
        total = {name: value.sum(0) + total.get(name, 0) for name, value in dense.items()}
        gradients = rows(dense)
        c.append(gradients @ rows(dense_directions(decomposition.subnetworks.v_in)).mT)
    c = torch.cat(c)
    active = c.abs() >= 0.3
    assert torch.equal(survey.together, active.long().mT @ active.long())
    assert 0 < int(active.sum()) < active.numel()
    found = analyse_module.tables_of(decomposition, survey)
    for row in found["subnetworks"]:
        own = c[:, row["subnetwork"]]
        assert row["coefficient_mean"] == pytest.approx(float(own.mean()))
        assert row["coefficient_std"] == pytest.approx(float(own.std(correction=0)))
        its = own[own.abs() >= 0.3]
        assert 0 < len(its) < 40
        assert row["positive_share"] == pytest.approx(float((its > 0).double().mean()))
    for name, value in survey.gradient.items():
        assert_same(value.double(), total[name], 1e-5)
    pairs = {(a, b): int((active[:, a] & active[:, b]).sum()) for a in range(6) for b in range(a + 1, 6)}
    assert {(row.subnetwork, row.other): row.both for row in found["coactivation"].itertuples()} == {
        pair: count for pair, count in pairs.items() if count
    }
    for row in found["coactivation"].itertuples():
        assert row.either == int((active[:, row.subnetwork] | active[:, row.other]).sum())
    assert int(active.sum(0).min()) <= 32
    for k in range(6):  # with one reference a sample is active against it or not
        its = c[active[:, k], k].abs().sort(descending=True).values
        drawn = survey.chosen(k)["middle"]
        assert len(drawn) == min(8, len(its))
        assert all(row["active"] for row in drawn)
        if len(its) <= 32:  # so many are drawn from: here all, of which those about the median are kept
            start = max(0, (len(its) - 8) // 2)
            impact = torch.tensor([row["impact"] for row in drawn], dtype=torch.float64)
            assert_same(impact, its[start : start + 8], 1e-6)
    for row in found["similarity"]:
        a, b = active[:, row["subnetwork"]], active[:, row["other"]]
        assert row["coactivation"] == pytest.approx(float((a & b).sum() / (a | b).sum()))
    v = rows(dense_directions(decomposition.subnetworks.v_out))
    for row in found["similarity"]:
        assert row["cos"] == pytest.approx(float(v[row["subnetwork"]] @ v[row["other"]]), abs=1e-6)
    dense = dense_directions(decomposition.subnetworks.v_out)
    for row in found["norm_shares"]:
        assert row["share"] == pytest.approx(float(dense[row["tensor"]][row["subnetwork"]].square().sum()), abs=1e-6)


def test_token_samples_are_their_positions() -> None:
    decomposition, data = texts()
    survey = take_survey(decomposition, Entries(data), Settings(references=2, batch_size=5, top=12, random=12))
    assert survey.n_samples == 12 * 6 - 2
    for k in range(4):
        for found in survey.chosen(k).values():
            samples = [row["sample"] for row in found]
            assert len(set(samples)) == len(samples)
            assert all(0 <= row["position"] < (4 if row["sample"] == 1 else 6) for row in found)
    assert {row["position"] for row in survey.chosen(0)["random"]} > {0}
    first = [(row["sample"], row["position"]) for row in survey.chosen(0)["random"]]
    assert all([(r["sample"], r["position"]) for r in survey.chosen(k)["random"]] == first for k in range(4))


def test_what_is_kept_does_not_grow_with_the_data() -> None:
    sizes = []
    for n in (30, 300):
        decomposition, data = vectors(n_rows=n)
        survey = take_survey(decomposition, Entries(data), Settings(references=1, batch_size=30))
        sizes.append(sum(value.numel() for value in survey.state_dict().values()))
    assert sizes[0] == sizes[1]


def test_bad_samples_are_named_or_left_out() -> None:
    decomposition, data = vectors()
    data.tensors["inputs"][27] = math.nan
    # A random reference may be the bad sample's output: against the mean of others nothing else is bad.
    decomposition.reference = "uniform"
    decomposition.divergence = make_divergence("kl")
    with pytest.raises(L3DError, match=r"1 of 10 samples .* first sample 27 "):
        take_survey(decomposition, Entries(data), Settings(batch_size=10))
    survey = take_survey(decomposition, Entries(data), Settings(batch_size=10, skip_bad=True))
    assert (survey.n_samples, survey.skipped) == (39, 1)
    assert all(bool(value.isfinite().all()) for value in survey.gradient.values())
    assert all(row["sample"] != 27 for k in range(6) for row in survey.chosen(k)["random"])


class Loader:
    """Batches of a data module that is not ours: tuples, of changing size."""

    def __init__(self, data: Rows):
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        for part in torch.arange(len(self.data)).split(17):
            yield tuple(self.data[part].values())


def test_entries_come_whole_on_any_number_of_ranks() -> None:
    _, data = vectors(n_rows=41)
    for source in (data, Loader(data)):
        alone = list(Entries(source).batches(10))
        shared = [batch for rank in range(3) for batch in Entries(source).batches(10, rank, 3)]
        assert sorted(number for number, _, _ in shared) == [number for number, _, _ in alone]
        firsts = [first for _, first, _ in alone]
        assert firsts == ([0, 10, 20, 30] if source is data else [0, 10, 17, 27, 34])
        inputs = [batch["inputs"] if isinstance(batch, dict) else batch[0] for _, _, batch in alone]
        assert torch.equal(torch.cat(inputs), data.tensors["inputs"])
        assert min(len(value) for value in inputs) > 1
        assert {number: first for number, first, _ in shared} == dict(enumerate(firsts))
        entries = Entries(source)
        entries.keep([3, 40, 18])
        picked = entries.pick([40, 3, 40, 18])
        found = picked["inputs"] if isinstance(picked, dict) else picked[0]
        assert torch.equal(found, data.tensors["inputs"][[40, 3, 40, 18]])
    assert [len(b["inputs"]) for _, _, b in Entries(data, 25).batches(10)] == [10, 10, 5]


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mse", "kl", "tokens"])
def test_derivatives_are_finite_differences(case: str) -> None:
    decomposition, data = texts() if case == "tokens" else vectors(case)
    positions = [3, 0, 5] if case == "tokens" else [-1, -1, -1]
    batch = only_positions(data[torch.arange(3)], positions)
    direction, h = decomposition.direction(1), 1e-5
    outputs, moved = derivatives(decomposition, batch, direction)

    def read(delta: float) -> Tensor:
        model = moved_model(decomposition.target, direction, delta)
        if case == "tokens":
            ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return model(**ids).logits[torch.arange(3), positions].softmax(-1)
        out = model(batch["inputs"])
        return out.softmax(-1) if case == "kl" else out

    assert_same(outputs, read(0.0))
    assert_same(moved, (read(h) - read(-h)) / (2 * h), 1e-6)
    for i, sample in enumerate(most_affected(outputs, moved, top=2)):
        order = moved[i].sort().indices.tolist()
        raised, lowered = [j for j in order[::-1][:2] if moved[i, j] > 0], [j for j in order[:2] if moved[i, j] < 0]
        assert [row["output"] for row in sample if row["direction"] == "raised"] == raised
        assert [row["output"] for row in sample if row["direction"] == "lowered"] == lowered
        assert all(row["probability"] == float(outputs[i, row["output"]]) for row in sample)


class _Cube(torch.autograd.Function):
    """An operation without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * d


def test_finite_differences_where_there_is_no_forward_mode() -> None:
    class Cubed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return _Cube.apply(self.inner(x))

    decomposition, x = decompose(Cubed()), torch.randn(4, 5).double()
    direction = decomposition.direction(0)
    with pytest.warns(UserWarning, match="finite differences instead"):
        _, moved = derivatives(decomposition, x, direction)
    before = decomposition.target.inner(x)
    expected = 3 * before.square() * (x @ direction["inner.weight"].mT + direction["inner.bias"])
    assert_same(moved, expected, 1e-5)


def test_an_error_that_is_not_about_forward_mode_is_raised() -> None:
    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = nn.Linear(5, 3).double(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:  # the first is without forward mode
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.inner(x)

    decomposition = decompose(Full())
    with pytest.raises(torch.OutOfMemoryError):
        derivatives(decomposition, torch.randn(4, 5).double(), decomposition.direction(0))


# -- interventions -----------------------------------------------------------------------------------------------------


def test_w0_comes_back_to_the_byte_after_an_exception() -> None:
    decomposition, data = vectors()
    before = bytes_of(decomposition.target)
    direction = {name: torch.full_like(value, math.inf) for name, value in decomposition.direction(0).items()}

    def fail_inside() -> None:
        with pushed(decomposition.target, direction, 0.1):
            assert bytes_of(decomposition.target) != before
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_inside()
    assert bytes_of(decomposition.target) == before
    calls = 0

    def fail(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    handle = decomposition.target.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sweep(decomposition, data[torch.arange(4)], [(d, decomposition.direction(0)) for d in (0.1, 0.2, 0.3)])
    handle.remove()
    assert bytes_of(decomposition.target) == before


def test_curves_are_the_models_outputs_along_the_way() -> None:
    decomposition, data = vectors()
    batch, deltas = data[torch.arange(9)], [-0.5, 0.0, 0.7]
    direction = direction_of(decomposition, {1: 1.0, 2: -2.0}, ["*.weight"])
    one, two = decomposition.direction(1), decomposition.direction(2)
    assert set(direction) == {"0.weight", "1.weight"}
    assert_same(direction["0.weight"], one["0.weight"] - 2 * two["0.weight"])
    found = sweep(decomposition, batch, [(delta, direction) for delta in deltas])
    near, far = torch.tensor([0, 4]), torch.tensor([1, 2, 7])
    rows = curve_rows(found, near, far, torch.arange(3, 9))
    f = decomposition.target(batch["inputs"])
    for row, delta in zip(rows, deltas, strict=True):
        g = moved_model(decomposition.target, direction, delta)(batch["inputs"])
        change = (g - f).abs().sum(1)
        assert row["relevant"] == pytest.approx(float(change[near].mean()), abs=1e-12)
        assert row["irrelevant"] == pytest.approx(float(change[far].mean()), abs=1e-12)
        assert row["kl_inactive"] == pytest.approx(float((g - f).square().sum(1)[far].mean()), abs=1e-12)
        losses = [(out - batch["labels"]).square().mean(1)[3:].mean() for out in (g, f)]
        assert row["loss_change"] == pytest.approx(float(losses[0] - losses[1]), abs=1e-12)
        if delta:
            assert row["selectivity"] == pytest.approx(row["relevant"] / row["irrelevant"])
        else:
            assert math.isnan(row["selectivity"])
    with pytest.raises(L3DError, match=r"'0.wight' matches none of the decomposed tensors; did you mean '0.weight'"):
        direction_of(decomposition, {1: 1.0}, ["0.wight"])


def test_next_token_loss_change() -> None:
    decomposition, data = texts()
    batch, direction = data[torch.arange(4)], decomposition.direction(0)
    found = sweep(decomposition, only_positions(batch, [2, 0, 3, 5]), [(0.5, direction)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for model, losses in (
        (decomposition.target, found.origin_losses),
        (moved_model(decomposition.target, direction, 0.5), found.losses[0]),
    ):
        logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for i in range(4):
            n = int(mask[i].sum())
            expected = torch.stack([-logits[i, s, ids[i, s + 1]] for s in range(n - 1)]).mean()
            assert float(losses[i]) == pytest.approx(float(expected))


def test_a_random_direction_is_not_selective_a_circuit_is() -> None:
    """Two blocks of features that never meet: v_0 lies in the first. Samples of either block are otherwise alike."""
    torch.manual_seed(0)
    model = nn.Linear(10, 10, bias=False).double()
    subnetworks = Subnetworks({"weight": (10, 10)}, 1, 2).double()
    list(subnetworks.v_out.parameters_of("weight").parameters())[2].data[:, 5:] = 0  # the inputs' factor
    subnetworks.normalise_()
    decomposition = Decomposition(subnetworks, model, threshold=0.1)
    x = torch.zeros(400, 10).double()
    x[:200, :5], x[200:, 5:] = torch.rand(200, 5), torch.rand(200, 5)
    near, far = torch.arange(200), torch.arange(200, 400)
    controls = random_directions(decomposition, 0, 40, seed=1)
    assert all(float(u["weight"].norm()) == pytest.approx(1) for u in controls)
    assert all(int(torch.linalg.matrix_rank(u["weight"], rtol=1e-5)) == 2 for u in controls)
    means = torch.tensor(
        [
            [row["relevant"], row["irrelevant"]]
            for u in controls
            for row in curve_rows(sweep(decomposition, x, [(0.5, u)]), near, far, near)
        ]
    ).mean(0)
    assert float(means[0] / means[1]) == pytest.approx(1, abs=0.15)
    found = sweep(decomposition, x + 1e-6, [(0.5, decomposition.direction(0))])
    assert curve_rows(found, near, far, near)[0]["selectivity"] > 100


def test_selectivity_of_outputs_of_a_planted_direction() -> None:
    """v moves output 3 by 4 parts, 5 by 3 and 0 by 1: two of eight are named, six others share 1."""
    model = nn.Linear(4, 8, bias=False).double()
    u, v = torch.tensor([0.6, 0.0, 0.8, 0.0]).double(), torch.zeros(8, 4).double()
    for output, size in ((3, 4.0), (5, -3.0), (0, 1.0)):
        v[output] = size * u
    decomposition = Decomposition(Subnetworks({"weight": (8, 4)}, 1, 1).double(), model, threshold=0.1)
    x, deltas = torch.rand(6, 4).double() + 0.1, [-0.5, 0.0, 2.0]
    named = named_outputs(derivatives(decomposition, x[:2], {"weight": v})[1])
    assert [set(row) for row in named.tolist()] == [{3, 5}] * 2
    found = sweep(decomposition, x, [(delta, {"weight": v}) for delta in deltas], named=named, shown=[1])
    assert found.outputs.shape == (3, 1, 8)
    assert_same(found.outputs[2, 0], x[1] @ (model.weight + 2 * v).mT)
    rows = curve_rows(found, torch.arange(2), torch.arange(2, 6), torch.arange(2, 6))
    reach = float((x[:2] @ u).abs().mean())
    for row, delta in zip(rows, deltas, strict=True):
        assert row["relevant"] == pytest.approx(8 * abs(delta) * reach)
        assert row["outputs_relevant"] == pytest.approx(3.5 * abs(delta) * reach)
        assert row["outputs_irrelevant"] == pytest.approx(abs(delta) * reach / 6)
        assert row["outputs_selectivity"] == pytest.approx(21 if delta else math.nan, nan_ok=True)
    assert named_outputs(torch.ones(3, 1)) is None  # of one output there is no other


def test_random_directions_are_told_with_their_spread() -> None:
    row = {"delta": 0.5, "kl_inactive": 1.0, "loss_change": None, "irrelevant": 2.0, "outputs_irrelevant": 1.0}
    runs = [
        [row | {"relevant": r, "selectivity": r / 2, "outputs_relevant": 3 * r, "outputs_selectivity": 3 * r}]
        for r in (1.0, 2.0, 6.0)
    ]
    (mean,) = mean_rows(runs)
    assert (mean["relevant"], mean["selectivity"], mean["outputs_selectivity"]) == (3.0, 1.5, 9.0)
    spread = [mean[f"{name}_std"] for name in ("relevant", "selectivity", "outputs_selectivity")]
    assert spread == pytest.approx([7**0.5, 7**0.5 / 2, 3 * 7**0.5])
    assert mean["loss_change"] is None


def test_the_scale_is_a_step_that_moves_enough() -> None:
    decomposition, data = vectors()
    looks = [(decomposition.direction(k), data[torch.arange(8)]) for k in range(3)]
    scale = natural_scale(decomposition, looks, 0.5)
    sizes = {
        factor: np.median(
            [
                np.mean([float(sweep(decomposition, b, [(s * factor * scale, v)]).changes().mean()) for s in (1, -1)])
                for v, b in looks
            ]
        )
        for factor in (0.4, 1.1)
    }
    assert sizes[0.4] < 0.5 < sizes[1.1] * 1.1


def test_locality_of_squared_error_is_a_parabola() -> None:
    torch.manual_seed(0)
    decomposition, x = decompose(nn.Linear(5, 3).double()), torch.randn(7, 5).double()
    reference, deltas = torch.randn(1, 3).double(), [-0.4, -0.1, 0.0, 0.1, 0.4]
    v = decomposition.direction(2)
    slope = slopes(decomposition, extractor_of(decomposition), x, reference, 2)
    jacobian = x @ v["weight"].mT + v["bias"]
    assert_same(slope, (2 * (decomposition.target(x) - reference) * jacobian).sum(1))
    found = sweep(decomposition, x, [(delta, v) for delta in deltas], reference)
    for row, delta in zip(locality_rows(found, slope, torch.tensor([1, 3])), deltas, strict=True):
        straight = delta * slope.abs()[[1, 3]]
        assert row["linear"] == pytest.approx(float(straight.mean()), abs=1e-9)
        curved = straight + delta**2 * jacobian.square().sum(1)[[1, 3]]
        assert row["change"] == pytest.approx(float(curved.mean()), abs=1e-9)


def test_local_to_is_where_the_line_is_a_tenth_off() -> None:
    """s delta + a delta^2 against s delta: off by a delta / s."""
    deltas = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)

    def curve(bend: float, linear: float = 3.0) -> list[dict[str, float]]:
        return [{"delta": d, "change": linear * d + bend * d * d, "linear": linear * d} for d in deltas]

    assert local_to(curve(0.4)) == pytest.approx(0.1 * 3 / 0.4)
    assert local_to(curve(-0.9)) == pytest.approx(0.1 * 3 / 0.9)
    assert local_to(curve(0.01)) == 2.0  # never off: at least as far as was looked
    assert local_to(curve(0.4, linear=0.0)) is None
    bent = [row if row["delta"] >= 0 else row | {"change": 2 * row["change"]} for row in curve(0.0)]
    assert local_to(bent) == pytest.approx(0.05)  # on one side only: the shorter counts


# -- attribution -------------------------------------------------------------------------------------------------------


def test_attribution_of_vectors_is_what_a_covered_entry_costs() -> None:
    decomposition, data = vectors()
    batch, reference = data[torch.arange(2)], torch.zeros(1, 3).double()
    found = attribution(decomposition, extractor_of(decomposition), batch, [-1, -1], [1, 4], reference)
    v_in = rows(dense_directions(decomposition.subnetworks.v_in))

    def c(x: Tensor, k: int) -> float:
        model = copy.deepcopy(decomposition.target).requires_grad_(True)
        model(x).square().sum().backward()
        return float(torch.cat([p.grad.flatten() for p in model.parameters()]) @ v_in[k])

    for i, k in enumerate((1, 4)):
        x = batch["inputs"][i : i + 1]
        whole = c(x, k)
        expected = []
        for j in range(5):
            covered = x.clone()
            covered[0, j] = 0
            expected.append((whole - c(covered, k)) * np.sign(whole))
        values, height, width = found[i]
        assert (height, width) == (1, 5)
        assert_same(values, torch.tensor(expected, dtype=torch.float64), 1e-6)


def test_attribution_of_images_shows_where() -> None:
    class Corner(nn.Module):
        """Sees the 4 x 4 pixels at the top right only."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, 0, :4, 4:].flatten(1))

    torch.manual_seed(0)
    decomposition = decompose(Corner().double())
    images = torch.rand(2, 1, 8, 8).double() + 0.5
    found = attribution(
        decomposition, extractor_of(decomposition), images, [-1] * 2, [0, 1], torch.zeros(1, 3).double()
    )
    for values, height, width in found:
        assert (height, width) == (8, 8)
        seen = values.view(8, 8).abs()
        assert float(seen[5:].max()) < 1e-12
        assert float(seen[:, :3].max()) < 1e-12
        assert float(seen[:4, 4:].sum()) > 0.7 * float(seen.sum()) > 0


def test_attribution_of_text_ends_at_the_position() -> None:
    decomposition, data = texts()
    batch = data[torch.arange(2)]
    reference = decomposition.divergence.from_mean(torch.full((1, 30), 1 / 30).double())
    strangers = data.tensors["input_ids"]
    found = attribution(decomposition, extractor_of(decomposition), batch, [3, 2], [0, 1], reference, strangers)
    for (values, height, width), position in zip(found, (3, 2), strict=True):
        assert (height, width) == (1, 6)
        assert bool((values[: position + 1] != 0).all())
        assert bool((values[position + 1 :] == 0).all())
    v_in = rows(dense_directions(decomposition.subnetworks.v_in))
    chosen = list(decomposition.subnetworks.shapes)

    def c(ids: Tensor, position: int, k: int) -> float:
        model = copy.deepcopy(decomposition.target)
        parameters = dict(model.named_parameters())
        for name in chosen:
            parameters[name].requires_grad_(True)
        out = model(input_ids=ids, attention_mask=mask).logits[:, position]
        DIVERGENCES["kl"](out, reference).backward()
        return float(torch.cat([parameters[name].grad.flatten() for name in chosen]) @ v_in[k])

    ids, mask = batch["input_ids"][:1], batch["attention_mask"][:1]
    whole = c(ids, 3, 0)
    for place in range(4):
        others = [i for i in strangers[:, place].unique().tolist() if i != int(ids[0, place])][:REPLACEMENTS]
        lost = []
        for other in others:
            covered = ids.clone()
            covered[0, place] = other
            lost.append((whole - c(covered, 3, 0)) * np.sign(whole))
        assert float(found[0][0][place]) == pytest.approx(np.mean(lost), rel=1e-5)
    later = attribution(
        decomposition, extractor_of(decomposition), batch, [3, 2], [0, 1], reference, strangers, firsts=[2, 0]
    )
    assert later[0][1:] == (1, 4)
    assert_same(later[0][0], found[0][0][2:])
    assert_same(later[1][0], found[1][0])


# -- stability ---------------------------------------------------------------------------------------------------------


def test_a_run_matches_itself_permuted_and_turned() -> None:
    decomposition, _ = vectors()
    order, sign = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([1.0, -1, -1, 1, 1, -1]).double()
    other = copy.deepcopy(decomposition)
    for name, tucker in decomposition.subnetworks.v_out.tuckers().items():
        other.subnetworks.v_out.parameters_of(name).copy_(tucker.select(order).scaled(sign))
    found = compare(decomposition, other)
    assert [int(order[i]) for i in found.rows["other"]] == found.rows["subnetwork"].tolist() == list(range(6))
    assert_same(torch.tensor(found.rows["cos"].to_numpy()), sign[torch.tensor(found.rows["other"].to_numpy())], 1e-6)
    assert found.figures["mean_cos"] == pytest.approx(1)
    assert found.figures["noise_max"] < 1
    assert found.figures["above_noise"] == 1


def test_cosines_from_factors_are_those_of_dense_directions() -> None:
    shapes = {"a": (6, 4), "b": (5,), "c": (3, 2, 2)}
    a, b = (Subnetworks(shapes, n, rank).double() for n, rank in ((4, 2), (7, 1)))
    expected = rows(dense_directions(a.v_out)) @ rows(dense_directions(b.v_out)).mT
    assert_same(cosines(a.v_out, b.v_out), expected, 1e-6)
    mine, its = match(expected)
    assert mine.tolist() == [0, 1, 2, 3]
    assert len(set(its.tolist())) == 4
    with pytest.raises(L3DError, match=r"no tensor is decomposed in both with one shape; the one has a \[6, 4\]"):
        cosines(a.v_out, Subnetworks({"a": (6, 5)}, 2).v_out)


def test_layout_keeps_distances_of_a_plane() -> None:
    points = torch.tensor([[0.0, 0.0], [0.3, 0.1], [0.5, -0.2], [-0.1, 0.4]]).double()
    similarity = 1 - torch.cdist(points, points).square() / 2
    assert_same(torch.cdist(*[layout(similarity)] * 2), torch.cdist(points, points), 1e-6)


# -- all together ------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """As much of a data module as an analysis asks for."""

    train: Rows
    validation: Rows
    test: Rows | None = None
    classes: list[str] | None = None

    def prepare_data(self) -> None: ...

    def setup(self, stage: str | None = None) -> None: ...

    def first_dataloader(self) -> None: ...


def run_of(folder: Path, made: tuple[Decomposition, Rows]) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, made[0], Data(made[1], made[1]))


SETTINGS = Settings(references=3, batch_size=8, top=5, middle=3, random=6, background=12, controls=2, save_every=0.0)


def tables_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def mean_output(decomposition: Decomposition, folder: Path) -> Tensor:
    """The mean output over the background samples: the reference where a run was never validated."""
    data, rows_ = texts()[1], read_table(folder, "background", 0)
    outputs = decomposition.target(**{name: data.tensors[name] for name in ("input_ids", "attention_mask")}).logits
    own = outputs[torch.tensor(rows_["sample"].to_numpy()), torch.tensor(rows_["position"].to_numpy())]
    return decomposition.divergence.from_mean(own.softmax(-1).mean(0, keepdim=True))


@pytest.mark.parametrize("kind", ["vectors", "texts"])
def test_a_whole_analysis(kind: str, tmp_path: Path) -> None:
    decomposition, data = vectors("mse") if kind == "vectors" else texts()
    before = bytes_of(decomposition.target)
    folder = analyse(run_of(tmp_path / "run", (decomposition, data)), SETTINGS)
    assert bytes_of(decomposition.target) == before
    manifest = read_manifest(folder)
    assert manifest["kind"] == ("vector" if kind == "vectors" else "text")
    assert manifest["n_samples"] == (40 if kind == "vectors" else 70)
    assert manifest["fingerprint"] == decomposition.target_fingerprint
    assert [path.name for path in folder.glob(".*")] == []
    for name, n_rows in manifest["tables"].items():
        table = read_table(folder, name)
        assert list(table.columns) == SCHEMAS[name].names
        assert len(table) == n_rows > 0
    n = decomposition.n_subnetworks
    samples, items = read_table(folder, "samples"), read_table(folder, "items")
    assert set(samples["sample"]) == set(items["sample"])
    assert len(items) == items["sample"].nunique()
    curves = read_table(folder, "curves")
    assert len(curves) == n * 3 * len(manifest["deltas"])
    one = read_table(folder, "curves", 2)
    assert set(one["subnetwork"]) == {2}
    v = direction_of(decomposition, {2: 1.0})
    top = samples[(samples["subnetwork"] == 2) & (samples["kind"] == "top")]
    batch = only_positions(data[torch.tensor(top["sample"].to_numpy())], top["position"].tolist())
    delta = manifest["deltas"][-1]
    expected = sweep(decomposition, batch, [(delta, v)]).changes().mean()
    found = one[(one["control"] == "subnetwork") & (one["delta"] == delta)]["relevant"].item()
    assert found == pytest.approx(float(expected), rel=1e-6)
    summary = read_table(folder, "outputs_summary", 2)
    moved = derivatives(decomposition, batch, v)[1].mean(0)
    for direction, sign in (("raised", 1), ("lowered", -1)):
        listed = summary[summary["direction"] == direction]
        values, places = (sign * moved).sort(descending=True, stable=True)
        n_of_them = min(5, int((values > 0).sum()))
        assert listed["output"].tolist() == places[:n_of_them].tolist()
        assert listed["derivative"].tolist() == pytest.approx((sign * values[:n_of_them]).tolist())
    background = read_table(folder, "background", 2)
    random = samples[(samples["subnetwork"] == 2) & (samples["kind"] == "random")]
    assert len(background) == manifest["n_background"] == 12
    assert background["sample"].tolist()[:6] == random["sample"].tolist()
    assert (manifest["n_controls"], manifest["n_top"], manifest["n_attributed"]) == (2, 5, 3)
    locality = read_table(folder, "locality", 2).to_dict("records")
    assert read_table(folder, "subnetworks")["local_to"][2] == pytest.approx(local_to(locality))
    if kind == "texts":
        tokens = read_table(folder, "token_coefficients")
        extraction = extractor_of(decomposition)(data[torch.arange(12)], references=mean_output(decomposition, folder))
        gradients = rows({name: gradient.dense() for name, gradient in extraction.gradients.items()})
        c = gradients @ rows(dense_directions(decomposition.subnetworks.v_in)).mT
        sample, position = samples_of(extraction)
        for row in tokens.iloc[::4].itertuples():
            mine = sample == row.sample
            assert list(row.positions) == position[mine].tolist()
            assert list(row.coefficients) == pytest.approx(c[mine, row.subnetwork].tolist(), rel=1e-4, abs=1e-7)
        assert set(zip(samples["subnetwork"], samples["sample"], strict=True)) == set(
            zip(tokens["subnetwork"], tokens["sample"], strict=True)
        )
        short = tokens[tokens["sample"] == 1]
        assert len(short) == 0 or all(list(p) == [0, 1, 2, 3] for p in short["positions"])


@pytest.mark.parametrize(("where", "total"), [("survey", 5), ("outputs", 6), ("moved", 6)])
def test_a_stopped_analysis_goes_on_to_the_same_bytes(
    where: str, total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tables_in(analyse(run_of(tmp_path / "whole", vectors()), SETTINGS))
    owner: Any = Survey if where == "survey" else analyse_module.Closer
    method, calls = "look" if where == "survey" else where, 0
    original: Callable[..., Any] = getattr(owner, method)

    def stop(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(owner, method, stop)
    with pytest.raises(KeyboardInterrupt):
        analyse(run_of(tmp_path / "stopped", vectors()), SETTINGS)
    left = calls
    again = tables_in(analyse(run_of(tmp_path / "stopped", vectors()), SETTINGS))
    assert calls - left == total - 1  # what was done before is not done again
    assert again == whole


def test_what_was_kept_of_another_analysis_is_not_taken_up(tmp_path: Path) -> None:
    decomposition, data = vectors()
    state, settings = tmp_path / "state", Settings(references=2, batch_size=8)
    first = take_survey(decomposition, Entries(data), settings, state_file=state)
    decomposition.threshold = 0.5
    other = take_survey(decomposition, Entries(data), settings, state_file=state)
    assert other.n_samples == first.n_samples == 40
    assert bool((other.counts["active_pairs"] < first.counts["active_pairs"]).any())


def test_an_analysis_of_another_split_is_not_taken_up(tmp_path: Path) -> None:
    """Both splits are as long, and lie in one file."""
    decomposition, data = vectors()
    other = Rows(inputs=data.tensors["inputs"].flip(1), labels=data.tensors["labels"])
    run = Run(tmp_path, decomposition, Data(other, data))
    state, settings = tmp_path / "state", Settings(references=2, batch_size=8)
    take_survey(decomposition, run.entries("val"), settings, state_file=state)
    found = take_survey(decomposition, run.entries("train"), settings, state_file=state)
    fresh = take_survey(decomposition, Entries(other), settings)
    assert_same(found.sums["impact_sum"], fresh.sums["impact_sum"])
    with pytest.raises(L3DError, match="split: 'test' holds no data of its own"):
        run.entries("test")  # the validation data are no test data


def test_tables_refuse_what_is_not_theirs(tmp_path: Path) -> None:
    with pytest.raises(L3DError, match="column of map: found 'z', allowed are subnetwork, x, y"):
        write_table(tmp_path, "map", [{"subnetwork": 0, "z": 1.0}])
    with pytest.raises(L3DError, match=r"there is no .*map.parquet; `l3d analyze RUN` makes it"):
        read_table(tmp_path, "map")
    with pytest.raises(L3DError, match=r"table: found 'maps', .* did you mean 'map'"):
        read_table(tmp_path, "maps")
    write_table(tmp_path, "map", [{"subnetwork": 0, "x": 1.0}])
    assert read_table(tmp_path, "map").to_dict("list") == {
        "subnetwork": [0],
        "x": [1.0],
        "y": pytest.approx([math.nan], nan_ok=True),
    }
    (tmp_path / "map.parquet").write_bytes(b"no table")
    with pytest.raises(L3DError, match=r"map.parquet cannot be read"):
        read_table(tmp_path, "map")
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(L3DError, match="format version 99; this l3d_pl reads version 2"):
        read_manifest(tmp_path)


def test_items_are_what_was_given() -> None:
    from io import BytesIO

    from PIL import Image

    images = {"inputs": torch.arange(2 * 64.0).view(2, 1, 8, 8), "labels": torch.tensor([1, 0])}
    assert kind_of(images) == "image"
    data = Data(Rows(**images), Rows(**images), classes=["<b>cat</b>", "dog"])
    found = item_rows(images, [7, 3], data)
    assert [(row["sample"], row["label"], row["width"], row["height"]) for row in found] == [
        (7, "dog", 8, 8),
        (3, "<b>cat</b>", 8, 8),
    ]
    with Image.open(BytesIO(found[0]["png"])) as picture:
        assert np.array(picture)[0, 0] == 0
        assert np.array(picture)[7, 7] == 255
    large = item_rows(torch.rand(1, 3, 300, 200), [0])[0]
    assert (large["width"], large["height"]) == (64, 96)
