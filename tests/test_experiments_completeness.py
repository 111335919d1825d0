"""Completeness: kinds and costs where the answer is known, and the command end to end."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from l3d_pl.batch_topk import batch_topk
from l3d_pl.cli import main
from l3d_pl.experiments.common import Toy
from l3d_pl.experiments.completeness import (
    AGAINST,
    KINDS,
    costs,
    flat_from,
    held_out,
    kinds,
    nearest,
    span_share,
    summarise,
    together,
)
from l3d_pl.repair import State
from l3d_pl.targets.toy import TiedAutoencoder
from l3d_pl.targets.training import save_target

E = torch.eye(8, dtype=torch.float64)


def kinds_of(new: Tensor, base: Tensor, alive: Tensor | None = None, chance: float = 0.0) -> list[str]:
    new, base = normalize(new, dim=1), normalize(base, dim=1)
    alive = torch.ones(len(new), dtype=torch.bool) if alive is None else alive
    return kinds(new @ new.T, new @ base.T, base @ base.T, alive, chance)


def test_a_repeat_is_called_a_repeat() -> None:
    """And it is the copy that comes second, or the one without a partner; a sign does not matter."""
    assert kinds_of(torch.stack([E[0], E[1], -E[0]]), E[:2]) == ["kept", "kept", "repeat"]
    assert kinds_of(torch.stack([E[5], E[0], E[5]]), E[:1]) == ["residual", "kept", "repeat"]
    nearly = E[0] + 0.1 * E[3]
    assert sorted(kinds_of(torch.stack([nearly, E[0]]), E[:1])) == ["kept", "repeat"]
    assert kinds_of(torch.stack([nearly, E[0]]), E[:1])[1] == "kept"  # the better match is the partner


def test_a_mixture_that_falls_apart_is_split() -> None:
    assert kinds_of(E[:2], torch.stack([E[0] + E[1]])) == ["split", "split"]
    assert kinds_of(E[:4], torch.stack([E[:4].sum(0)])) == ["split"] * 4


def test_what_is_in_the_span_is_recombined_and_what_is_not_is_residual() -> None:
    base, mixture = E[:6], E[:6].sum(0)  # |cos| 0.41 with each
    assert kinds_of(torch.stack([mixture, mixture + 0.5 * E[7], E[7]]), base)[::2] == ["recombined", "residual"]
    assert kinds_of(torch.stack([mixture + 3 * E[7]]), base) == ["residual"]
    assert kinds_of(torch.stack([mixture + 1.5 * E[7]]), base, chance=0.0) == ["recombined"]
    assert kinds_of(torch.stack([mixture + 1.5 * E[7]]), base, chance=0.6) == ["residual"]  # no more than by chance


def test_the_dead_are_neither_partners_nor_repeated() -> None:
    alive = torch.tensor([False, True, True])
    assert kinds_of(torch.stack([E[0], E[0], E[1]]), E[1:2], alive) == ["dead", "residual", "kept"]
    none = torch.zeros(3, 0, dtype=torch.float64)
    assert kinds(E[:3, :3], none, none[:0], alive, 0.0) == ["dead", "residual", "residual"]


def test_span_share_is_the_projection() -> None:
    random = torch.Generator().manual_seed(0)
    base = normalize(torch.randn(5, 9, generator=random, dtype=torch.float64), dim=1)
    base = torch.cat([base, base[:1]])  # a repeat adds nothing
    v = normalize(torch.randn(4, 9, generator=random, dtype=torch.float64), dim=1)
    basis = torch.linalg.qr(base[:5].T).Q
    torch.testing.assert_close(span_share(v @ base.T, base @ base.T), (v @ basis).square().sum(1))


def state_of(g: Tensor, v_in: Tensor, v_out: Tensor, k: float) -> State:
    c = g @ v_in.T
    return State(c, g @ v_out.T, v_out @ v_out.T, c * batch_topk(c.unsqueeze(1), k)[0].squeeze(1))


def test_a_repeat_costs_nothing_when_merged_and_a_lone_one_what_it_carries() -> None:
    """Half of the samples lie along e0, which two subnetworks share; a quarter each along e1 and e2."""
    line = torch.arange(80) % 4
    g = E[torch.tensor([0, 0, 1, 2])[line]] * torch.linspace(0.9, 1.1, 80, dtype=torch.float64).unsqueeze(1)
    v_out = torch.stack([E[0], E[0], E[1], E[2]])
    v_in = v_out.clone()
    v_in[:2] /= 2  # they answer with one half each
    energy = float(g.square().sum())
    removed, merged = costs(state_of(g, v_in, v_out, 0.375), 0.375, energy)
    share = [float(g[torch.tensor([0, 0, 1, 2])[line] == j].square().sum()) / energy for j in range(3)]
    assert removed.tolist() == pytest.approx([share[0] / 4, share[0] / 4, share[1], share[2]])
    assert merged.tolist() == pytest.approx([0, 0, share[1], share[2]], abs=1e-12)


def test_joint_use_is_the_overlap_of_samples() -> None:
    gram = torch.tensor([[1.0, -0.9, 0.1], [-0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    assert nearest(gram).tolist() == [1, 0, 1]
    active = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    torch.testing.assert_close(together(active, nearest(gram)), torch.tensor([1 / 3, 1 / 3, 1 / 2]))


def test_where_the_loss_is_flat() -> None:
    assert flat_from({2: 1.0, 5: 0.5, 8: 0.49, 12: 0.48}) == 5
    assert flat_from({2: 1.0, 5: 0.98, 8: 0.5, 12: 0.49}) == 8  # a plateau before the last fall does not count
    assert flat_from({2: 1.0, 5: 0.5, 8: 0.4}) is None
    assert flat_from({2: 1.0, 5: 1.1}) == 2


def test_test_rows_follow_the_seed_and_are_not_the_training_rows() -> None:
    toy = Toy("tms", {}, {"points": 50}, {})
    data = toy.data_module(3)
    data.setup()
    rows = held_out(toy, 50, 3)
    assert torch.equal(rows, held_out(toy, 50, 3))
    assert not torch.equal(rows, held_out(toy, 50, 4))
    assert not torch.equal(rows, data.train[torch.arange(50)]["inputs"])
    digits = Toy("digits_cnn", {}, {}, {})
    assert held_out(digits, 1000, 0).shape == (360, 1, 8, 8)
    assert not torch.equal(held_out(digits, 20, 0), held_out(digits, 20, 1))


def planted_rows() -> pd.DataFrame:
    """Two seeds: L 1.0 and 0.6, two fits of one n_v a tenth apart; of four two kept, one split, one dead."""
    rows = []
    for seed in (0, 1):
        for n_v, loss, own in ((2, 1.0, ["first"] * 2), (4, 0.6, ["kept", "kept", "split", "dead"])):
            again = ["kept"] * n_v if seed else ["kept", *["residual"] * (n_v - 1)]
            for against, found, level in (("smaller", own, loss), ("another seed", again, 0.9 * loss)):
                for kind in found:
                    place = ("first", *KINDS).index(kind)
                    cost = {"merged": 0.1 * place, "removed": 0.1 * place + 0.5, "together": 0.01 * place}
                    row = {"seed": seed, "target": "tms", "held": "L0", "n_v": n_v, "against": against, "kind": kind}
                    rows.append(row | {"loss": level, "nearest_cos": 0.3} | cost)
    return pd.DataFrame(rows)


def test_the_table_has_the_floor_beside_what_came_in_and_what_each_kind_is_worth() -> None:
    summary = summarise(planted_rows())
    first, last = (row for _, row in summary.table.iterrows())
    assert last["L"] == "0.600 ± 0.000"
    assert last["kept / floor"] == "2.0 / 2.5"
    assert last["split / floor"] == "1.0 / 0.0"
    assert last["residual / floor"] == "0.0 / 1.5"
    assert first["kept / floor"] == "– / 1.5"
    assert last["L rises, merged"] == "kept 0.100, split 0.300"  # what is dead costs nothing
    assert last["L rises, removed"] == "kept 0.600, split 0.800"
    assert last["joint use"] == "kept 0.010, split 0.030"
    assert first["L rises, removed"] == "first 0.500"


def test_flat_is_judged_against_what_two_seeds_differ_by() -> None:
    rows = planted_rows()
    verdict = summarise(rows).verdict
    assert verdict["tms, L0 held: loss flat from n_v"] is None  # it falls by 0.4, two seeds differ by 0.1
    assert verdict["tms, L0 held: share of L that the last step takes off"] == "0.400 ± 0.000"
    assert verdict["tms, L0 held: share of L that two seeds differ by"] == "0.100 ± 0.000"
    assert verdict["tms, L0 held: split, of the last step's"] == pytest.approx(1 / 2)
    assert verdict["tms, L0 held: residual, of the last step's, another seed"] == 1
    small = rows.assign(loss=rows["loss"].replace({0.6: 0.92, 0.9 * 0.6: 0.82}))
    assert summarise(small).verdict["tms, L0 held: loss flat from n_v"] == 2  # by 0.08: no more than the seeds


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_target(tmp_path / "targets" / f"tms_seed{seed}.safetensors", TiedAutoencoder(gain=1.0))
    arguments = ["experiment", "completeness", "--tiny", "--seeds", "0", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    rows = pd.read_csv(tmp_path / "seed_1" / "rows.csv")
    own, again = (rows[rows["against"] == against] for against in AGAINST)
    assert own.groupby(["held", "n_v"]).size().to_dict() == {("L0", 2): 2, ("L0", 4): 4, ("k", 2): 2, ("k", 4): 4}
    assert len(own) == len(again)
    assert (own.groupby(["held", "n_v"])["loss"].first() != again.groupby(["held", "n_v"])["loss"].first()).all()
    assert set(again["kind"]) <= set(KINDS)
    assert rows.groupby("held")["k"].unique().map(list).to_dict()["k"] == [0.1]
    assert set(own[own["n_v"] == 2]["kind"]) <= {"first", "repeat", "dead"}
    assert rows["loss"].between(0, 2).all()
    assert (tmp_path / "completeness.png").stat().st_size > 1000
    assert "TMS 5-2" in (tmp_path / "table.md").read_text()
    assert "loss flat from n_v" in capsys.readouterr().out


def test_a_config_without_steps_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment", "completeness", "--sizes", '{"tmcs": [2]}', "--seed", "0", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "steps: found none for tmcs; allowed is a number for each config of sizes" in capsys.readouterr().err
