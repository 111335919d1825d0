"""Pictures and the page: right for every kind of target, harmless whatever the data says, whole when a run is not."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from l3d_pl.analysis.alignment import score_toy
from l3d_pl.atlas import pictures
from l3d_pl.atlas.page import PageTable, subnetwork_table, write_page
from l3d_pl.atlas.pictures import Picture, draw_run, layers_of
from l3d_pl.errors import L3DError

Tensors = dict[str, Tensor]
METRICS = (
    "epoch,step,train/loss,val/loss\n" + "".join(f"0,{i},{1 / (1 + i):.4f},\n" for i in range(60)) + "0,59,,0.02\n"
)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


TARGETS: dict[str, Tensors] = {
    "tied": {"W_in": randn(5, 2), "b": randn(5)},
    "tied_wide": {"W_in": randn(8, 3), "b": randn(8)},
    "untied": {"W_in": randn(10, 5), "W_out": randn(5, 10), "b": randn(10)},
    "mlp": {
        **{f"{i}.weight": randn(*((10, 5) if i == 0 else (5, 10) if i == 4 else (10, 10))) for i in range(5)},
        **{f"{i}.bias": randn(5 if i == 4 else 10) for i in range(5)},
    },
    "cnn": {
        "conv1.weight": randn(4, 1, 3, 3),
        "bn1.weight": randn(4),
        "fc1.weight": randn(6, 16),
        "fc1.bias": randn(6),
    },
}


def subnetworks_of(target: Tensors, n_v: int = 5) -> Tensors:
    return {name: randn(n_v, *tensor.shape) for name, tensor in target.items()}


class Page(HTMLParser):
    """The page as a browser would take it: its tags, its text, and what it would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.alts.append(values["alt"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


# --- Pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n_layers"), [("tied", 2), ("tied_wide", 2), ("untied", 2), ("mlp", 5), ("cnn", 0)])
def test_known_shapes_are_drawn_as_networks_and_others_are_not(kind: str, n_layers: int) -> None:
    assert len(layers_of(TARGETS[kind])) == n_layers


def test_a_target_that_only_looks_like_a_chain_is_not_drawn() -> None:
    gap = {"0.weight": randn(4, 3), "2.weight": randn(2, 5)}
    assert layers_of(gap) == []
    assert layers_of({"0.weight": randn(4, 3), "2.weight": randn(2, 4)}), "nn.Sequential leaves numbers out"
    assert layers_of({"0.weight": randn(4, 3), "scale": randn(3)}) == []
    assert layers_of({"0.weight": randn(4, 3, 2, 2)}) == []
    assert layers_of({"0.weight": randn(4, 300)}) == []
    assert layers_of({}) == []
    with pytest.raises(L3DError, match=r"networks: found a target of 0\.weight, 2\.weight"):
        pictures.networks(Path("never.png"), gap, gap)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_of_run_gets_all_its_pictures(kind: str, tmp_path: Path) -> None:
    target = TARGETS[kind]
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(METRICS)
    v_out, p_act = subnetworks_of(target), torch.tensor([0.0, 0.1, 0.1, 0.2, 0.1])
    drawn = draw_run(tmp_path / "atlas", v_out=v_out, target=target, p_act=p_act, metrics=metrics, k=0.1)
    names = ["networks", "directions"] * (kind != "cnn") + ["loss", "p_act", "norm_share"]
    assert all(isinstance(picture, Picture) for picture in drawn)
    assert [Path(picture[0]).stem for picture in drawn] == names
    for path, alt, caption in drawn:  # type: ignore[misc]
        image = imread(path)
        height, width = image.shape[:2]
        assert 250 <= height <= 1600
        assert 500 <= width <= 1600
        assert np.asarray(image)[..., :3].std() > 0.02, "not an empty sheet"
        assert 20 < len(alt) < 2000
        assert caption.endswith(".")


def pixels(path: Path, colour: str) -> int:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    image = np.asarray(imread(path))[..., :3]
    return int((np.abs(image - [red, green, blue]).max(2) < 0.02).sum())


def test_edges_take_the_colour_of_their_sign_and_the_width_of_their_weight(tmp_path: Path) -> None:
    target = {"W_in": torch.zeros(5, 2), "b": torch.zeros(5)}
    v_out = {"W_in": torch.zeros(1, 5, 2), "b": torch.zeros(1, 5)}
    empty = pictures.networks(tmp_path / "empty.png", v_out, target).path
    v_out["W_in"][0, 1, 0], target["W_in"][1, 0] = -1.0, 1.0  # the sign is free: drawn as the target's, positive
    one = pictures.networks(tmp_path / "one.png", v_out, target).path
    assert pixels(one, pictures.POSITIVE) > pixels(empty, pictures.POSITIVE) + 500
    assert pixels(one, pictures.NEGATIVE) == pixels(empty, pictures.NEGATIVE)
    v_out["W_in"][0, 3, 1] = 0.5
    two = pictures.networks(tmp_path / "two.png", v_out, target).path
    thin = pixels(two, pictures.NEGATIVE) - pixels(empty, pictures.NEGATIVE)
    thick = pixels(one, pictures.POSITIVE) - pixels(empty, pictures.POSITIVE)
    assert 0 < thin < 0.6 * thick / 2, "half the weight, half the width; the target's panel holds another thick edge"


def test_networks_are_ordered_by_circuit_and_their_number_is_bounded(tmp_path: Path) -> None:
    target = TARGETS["tied"]
    circuits = [f"feature {19 - k}" for k in range(20)]
    picture = pictures.networks(tmp_path / "n.png", subnetworks_of(target, 20), target, circuits=circuits)
    assert "19: feature 0, 18: feature 1," in picture.alt
    assert picture.alt.index("feature 9") < picture.alt.index("feature 10")
    assert "15 of its 20" in picture.alt
    assert picture.caption.endswith("The first 15 of 20 subnetworks.")


def test_directions_name_the_feature_each_subnetwork_reads(tmp_path: Path) -> None:
    for kind in ("tied", "tied_wide"):
        target = TARGETS[kind]
        n = len(target["W_in"])
        order = torch.arange(n).flip(0)
        v_out = {"W_in": -torch.diag_embed(target["W_in"].T, dim1=0, dim2=1)[order]}
        alt = pictures.directions(tmp_path / "d.png", v_out, target).alt
        expected = "0 with feature 4 (|cos| 1.000)" if kind == "tied" else f"{n - 1}: 0 (1.00)"
        assert expected in alt
    mlp = subnetworks_of(TARGETS["mlp"])
    mlp["0.weight"][:, :, 1:] = 0  # all read feature 0
    assert "3: 0 (1.00)" in pictures.directions(tmp_path / "m.png", mlp, TARGETS["mlp"]).alt
    with pytest.raises(L3DError, match="directions: found b decomposed"):
        pictures.directions(tmp_path / "n.png", {"b": randn(5, 5)}, TARGETS["tied"])


def test_high_rank_subnetworks_are_ordered_by_group(tmp_path: Path) -> None:
    target = {"W_in": randn(10, 4), "W_out": randn(4, 10)}
    v_out = {"W_in": torch.zeros(2, 10, 4), "W_out": randn(2, 4, 10)}
    v_out["W_in"][0, 5:] = 1
    v_out["W_in"][1, :5] = 1
    alt = pictures.directions(tmp_path / "g.png", v_out, target, group_size=5).alt
    assert "Strongest feature of each: 1: 0 (0.20), 0: 5 (0.20)." in alt


def test_norm_share_says_where_a_subnetwork_lies_and_sums_up_the_smallest(tmp_path: Path) -> None:
    v_out = {"a": torch.full((1, 3), 1.0), "b": torch.full((1, 1), 1.0)}
    assert "Largest means: a 75%, b 25%." in pictures.norm_share(tmp_path / "s.png", v_out).alt
    many = {rf"layer{i}.$\oops$.weight": randn(3, 2) for i in range(pictures.MAX_TENSORS + 10)}
    assert "in 50 tensors. Largest means: 11 other tensors" in pictures.norm_share(tmp_path / "m.png", many).alt


def test_p_act_counts_the_dead(tmp_path: Path) -> None:
    alt = pictures.p_act_histogram(tmp_path / "p.png", torch.tensor([0.0, 0.05, 0.2, 0.0])).alt
    assert alt == "Histogram of P_act of 4 subnetworks: 2 dead, live ones between 0.05 and 0.2."
    assert "3 dead." in pictures.p_act_histogram(tmp_path / "d.png", torch.zeros(3)).alt


def test_loss_curve_reads_what_lightning_and_a_kill_leave_behind(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(
        "step,lr,train/loss_step,val/loss\n0,.1,0.9,\n1,.1,nan,\n2,.1,inf,\n3,.1,0.5,\n3,,,0.6\n"
        "12,.1,0.3,\n9,.1,0.7,\n9,.1,0.4\n12,.1"
    )
    columns = pictures.read_metrics(metrics)
    assert columns["train/loss_step"][0].tolist() == [0, 3, 9, 12]
    assert columns["train/loss_step"][1].tolist() == [0.9, 0.5, 0.4, 0.3]
    picture = pictures.loss_curve(tmp_path / "l.png", metrics)
    assert "train loss from 0.9 to 0.3 at step 12; validation loss from 0.6 to 0.6" in picture.alt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no file"),
        (b"", "found columns none"),
        (b"epoch,loss\n0,1\n", "found columns epoch, loss"),
        (b"step,train/loss\n0,nan\n", "found no finite values"),
        (b"step,lr\n0,0.1\n", "found lr"),
        (b"\xff\xfe\x00\x01binary\x00", "found columns"),
    ],
)
def test_bad_metrics_become_one_sentence_and_the_other_pictures_stay(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.csv"
    if content is not None:
        metrics.write_bytes(content)
    target = TARGETS["tied"]
    drawn = draw_run(tmp_path, v_out=subnetworks_of(target), target=target, p_act=torch.ones(5), metrics=metrics)
    sentences = [picture for picture in drawn if isinstance(picture, str)]
    assert len(drawn) == 5
    assert len(sentences) == 1
    assert sentences[0].startswith("No picture of loss: metrics: ")
    assert message in sentences[0]
    assert "\n" not in sentences[0]


def test_a_run_that_went_to_nan_still_has_a_page(tmp_path: Path) -> None:
    target = TARGETS["untied"]
    v_out = {name: v * math.nan for name, v in subnetworks_of(target).items()}
    drawn = draw_run(tmp_path, v_out=v_out, target=target, p_act=torch.zeros(5), metrics=tmp_path / "none.csv")
    table = subnetwork_table(v_out, torch.zeros(5))
    page = write_page(tmp_path, title="a bad run", facts={}, pictures=drawn, tables=[table])
    text = Page(page.read_text(encoding="utf-8")).text
    assert "No picture of networks: W_in: found 250 of 250 values that are not finite, allowed is none." in text
    assert "No picture of loss: metrics: found no file" in text
    assert "5 of 5 are dead" in text


# --- The page --------------------------------------------------------------------------------------------------------


def toy_page(run: Path) -> Path:
    target = TARGETS["tied"]
    (run / "metrics.csv").write_text(METRICS)
    v_out = {"W_in": torch.diag_embed(target["W_in"].T, dim1=0, dim2=1), "b": randn(5, 5)}
    p_act = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0])
    score = score_toy("tms", v_out, target, {}, p_act > 0, loss=0.19)
    drawn = draw_run(
        run / "atlas",
        v_out=v_out,
        target=target,
        p_act=p_act,
        metrics=run / "metrics.csv",
        circuits=score.circuits(),
    )
    facts = {"target model": "TiedAutoencoder 5-2-5", "steps": 1600, "time": "6.2 s"}
    tables = [subnetwork_table(v_out, p_act, score)]
    return write_page(run, title="TMS", facts=facts, score_rows=score.rows(), pictures=drawn, tables=tables)


def test_the_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    path = toy_page(tmp_path)
    assert path == tmp_path / "atlas" / "index.html"
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("img") == 5
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert all(page.alts)
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?:", html)
    for words in ("TiedAutoencoder 5-2-5", "1600", "4 of 5", "0.190", "|cos| with W_in", "Train loss from 1 to"):
        assert words in page.text
    assert page.tags.count("tr") == 1 + 10 + 1 + 5, "ten figures and five subnetworks, each table with its head"


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&\"1')</script>"
    quote = '" onerror="alert(1)'
    png = tmp_path / "x.png"
    picture = pictures.p_act_histogram(png, torch.ones(3))
    page = Page(
        write_page(
            tmp_path,
            title=evil,
            facts={evil: evil, "tensor": Path(evil)},
            score_rows=[(evil, evil, evil)],
            pictures=[Picture(picture.path, quote, evil), evil, (tmp_path / "<b>gone.png", evil, evil)],
            tables=[PageTable(evil, [evil], [[evil], [quote]], evil)],
        ).read_text(encoding="utf-8")
    )
    assert "script" not in page.tags
    assert page.tags.count("b") == 0
    assert page.alts == [quote]
    assert page.text.count(evil) == 14, "2 titles, 3 facts, 3 of the score, a caption, a sentence, 4 of the table"
    assert "The picture <b>gone.png could not be read: No such file or directory." in page.text


def test_a_page_without_ground_truth_or_pictures_says_so(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path, title="digits CNN", facts={}).read_text(encoding="utf-8"))
    assert "nothing to compare with" in page.text
    assert "img" not in page.tags


def test_cells_show_numbers_flush_right_and_words_for_the_rest(tmp_path: Path) -> None:
    table = PageTable("T", ["a", "b", "c", "d", "e"], [[7, 0.12345, True, None, "x"]])
    html = write_page(tmp_path, title="t", facts={}, tables=[table]).read_text(encoding="utf-8")
    assert '<td class="number">7</td><td class="number">0.123</td><td>yes</td><td>–</td><td>x</td>' in html


def test_the_subnetwork_table_reads_the_score(tmp_path: Path) -> None:
    target = {"W_in": randn(10, 5), "W_out": randn(5, 10)}
    v_out = {"W_in": 3 * torch.diag_embed(target["W_in"].T, dim1=0, dim2=1), "W_out": torch.ones(10, 5, 10) * 1e-3}
    p_act = torch.linspace(0, 0.2, 10)
    score = score_toy("tmcs", v_out, target, {"A": randn(10, 10)}, p_act > 0)
    table = subnetwork_table(v_out, p_act, score)
    assert table.header[-1] == "r² with A"
    assert table.rows[3][0] == 3
    assert table.rows[3][2] == "W_in"
    assert table.rows[3][3] == pytest.approx(1, abs=1e-3)
    assert table.rows[3][4:7] == [3, pytest.approx(1), True]
    assert table.rows[0][6] is False, "dead"
    assert len(subnetwork_table(v_out, p_act).header) == 4


@pytest.mark.browser
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    page, shot = toy_page(tmp_path), tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,900"]
    subprocess.run(
        [browser, *options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=60
    )
    image = np.asarray(imread(shot))[..., :3]
    assert image.shape[:2] == (900, 1200)
    assert pixels(shot, pictures.POSITIVE) > 500, "the pictures of the first screen, drawn under the page's own policy"
