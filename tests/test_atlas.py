"""Pictures and the atlas's folder: right for every kind of run, harmless whatever the data says."""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from atlas_run import HOSTILE, make_run
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from l3d_pl.analysis.tables import read_table, write_table
from l3d_pl.atlas import blocks, overview, panels, pictures, structure
from l3d_pl.atlas.build import write_atlas
from l3d_pl.atlas.pictures import Picture, draw_run, layers_of
from l3d_pl.cli import main
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.subnetworks import Subnetworks

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


def shares_of(v_out: Tensors) -> dict[str, Any]:
    """What `draw_run` is told about subnetworks."""
    energy = torch.stack([v.flatten(1).square().sum(1) for v in v_out.values()], 1)
    return {"v_out": v_out, "names": list(v_out), "shares": energy / energy.sum(1, keepdim=True)}


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
    drawn = draw_run(tmp_path / "atlas", **shares_of(v_out), target=target, p_act=p_act, metrics=metrics, k=0.1)
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
    assert "Largest means: a 75%, b 25%." in pictures.norm_share(
        tmp_path / "s.png", torch.tensor([[0.75, 0.25]]), ["a", "b"]
    ).alt  # fmt: skip
    many = [rf"layer{i}.$\oops$.weight" for i in range(pictures.MAX_TENSORS + 10)]
    shares = torch.full((3, len(many)), 1 / len(many))
    alt = pictures.norm_share(tmp_path / "m.png", shares, many).alt
    assert "in 50 tensors. Largest means: 11 other tensors" in alt


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
    v_out = shares_of(subnetworks_of(target))
    drawn = draw_run(tmp_path, **v_out, target=target, p_act=torch.ones(5), metrics=metrics)
    sentences = [picture for picture in drawn if isinstance(picture, str)]
    assert len(drawn) == 5
    assert len(sentences) == 1
    assert sentences[0].startswith("No picture of loss: metrics: ")
    assert message in sentences[0]
    assert "\n" not in sentences[0]


# --- The folder ------------------------------------------------------------------------------------------------------


def content(path: Path) -> Any:
    """What a data file hands to the page."""
    text = path.read_text(encoding="ascii")
    assert len(text.splitlines()) == 1, "U+2028 and its like are escaped"
    assert not set("<>&") & set(text)
    return json.loads(re.fullmatch(r'atlasData\("[\w/]+",(.*)\);\n', text)[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("atlas") / "run")


@pytest.fixture(scope="module")
def atlas(run: Path) -> Path:
    return write_atlas(run, progress=False).page.parent


def test_the_data_is_one_line_and_its_settings_are_whole(run: Path) -> None:
    settings = {"source": "pydoc", "column": "text", "seed": None} | {f"setting_{i}": i for i in range(40)}
    data = {"class_path": "datamodules.text.TextData", "init_args": settings}
    decomposition = Decomposition.from_pretrained(run / "decomposition")
    decomposition.run_config = {"data": data}
    (fact,) = (fact for fact in overview._facts(decomposition, {}) if fact[0] == "Data")
    assert fact[1] == "TextData: source pydoc"
    assert fact[2].startswith("source pydoc, column text, setting_0 0, ")
    assert fact[2].endswith(", setting_39 39"), "not cut"


def test_the_folder_is_whole_and_says_its_size(run: Path, atlas: Path) -> None:
    files = {path.relative_to(atlas).as_posix() for path in atlas.rglob("*") if path.is_file()}
    assert {"index.html", "atlas.js", "charts.js", "atlas.css", "data/overview.js"} < files
    assert sum(name.startswith("data/sub_") for name in files) == 12
    assert not list(run.glob(".*")), "nothing half-written stays"
    said = content(atlas / "data" / "overview.js")["size"]
    assert said["files"] == len(files)
    assert said["bytes"] == pytest.approx(sum((atlas / name).stat().st_size for name in files), rel=1e-3)
    addresses = r"(?:https?:)?//(?!www\.w3\.org/2000/svg)\w+\.\w+"
    for name in ("index.html", "atlas.js", "charts.js", "atlas.css"):
        text = (atlas / name).read_text()
        assert not re.search(
            addresses + r"|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text
        )
    page = (atlas / "index.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["atlas.css", "#/", "charts.js", "atlas.js"]
    assert "onclick" not in page


def test_a_panel_holds_the_rows_of_its_subnetwork(run: Path, atlas: Path) -> None:
    panel = content(atlas / "data" / "sub_00003.js")
    samples = read_table(run / "analysis", "samples", 3)
    for kind in ("top", "middle", "random"):
        rows = samples[samples["kind"] == kind].sort_values("place")
        shown = panel["samples"][kind]
        assert [s["sample"] for s in shown] == rows["sample"].tolist()
        assert [s["impact"] for s in shown] == pytest.approx(rows["impact"].tolist(), rel=1e-5)
        assert all(len(s["raised"]) == len(s["lowered"]) == 3 for s in shown)
    items = read_table(run / "analysis", "items").set_index("sample")
    assert set(map(int, panel["items"])) == set(samples["sample"]) | set(
        read_table(run / "analysis", "effects", 3)["sample"]
    )
    assert all(item["tokens"] == list(items.loc[int(s), "tokens"]) for s, item in panel["items"].items())
    effects = read_table(run / "analysis", "effects", 3)
    case = panel["effects"]["cases"][0]
    own = effects[(effects["sample"] == case["sample"]) & (effects["position"] == case["position"])]
    for output, (name, values) in enumerate(case["outputs"]):
        rows = own[own["output"] == output].drop_duplicates("delta").sort_values("delta")
        assert values == pytest.approx(rows["value"].tolist(), rel=1e-5)
        assert name == rows["name"].iloc[0]
    assert panel["curves"]["subnetwork"]["selectivity"][3] is None, "not a number at delta 0"
    background = read_table(run / "analysis", "background", 3)
    assert panel["irrelevant"] == (~background["active"]).sum() == 6
    assert [(name, same) for name, _, same in panel["summary"]["lowered"]] == [
        (row["name"], row["samples"])
        for _, row in read_table(run / "analysis", "outputs_summary", 3).query("direction == 'lowered'").iterrows()
    ]
    assert all(mean < 0 for _, mean, _ in panel["summary"]["lowered"])


def test_a_long_vector_is_drawn_in_cells(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "vector", n_v=3)
    items = read_table(run / "analysis", "items")
    long = np.zeros(16_384, dtype=np.float32)
    long[[5, 700]] = 2.0, -3.0
    items["values"] = [long] * len(items)
    write_table(run / "analysis", "items", items)
    attribution = read_table(run / "analysis", "attribution")
    attribution["values"] = [long] * len(attribution)
    write_table(run / "analysis", "attribution", attribution)
    panel = content(write_atlas(run, progress=False).page.parent / "data" / "sub_00001.js")
    item, first = next(iter(panel["items"].values())), panel["samples"]["top"][0]
    for values in (item["values"], first["attribution"]["values"]):
        assert len(values) == 256
        assert {i: value for i, value in enumerate(values) if value} == {0: 2.0, 10: -3.0}, "the largest of 64"
    assert item["of"] == 16_384


@pytest.mark.parametrize(
    ("columns", "said", "loss"),
    [
        (("train/loss/w",), "training batch at step 40", 0.5),
        (("train/loss/w", "val/loss/restart_0"), "training batch at step 40", 0.5),  # (that is no tensor's)
        ((), "", None),
    ],
)
def test_it_is_said_what_a_tensors_loss_was_measured_on(
    columns: tuple[str, ...], said: str, loss: float | None, tmp_path: Path
) -> None:
    rows = [f"{step},{','.join([value] * len(columns))}" for step, value in ((20, "0.9"), (40, "0.5"))]
    (tmp_path / "metrics.csv").write_text("\n".join([",".join(("step", *columns)), *rows]))
    losses, measured = overview._tensor_losses(overview._curves(tmp_path / "metrics.csv"))
    assert (losses.get("w"), measured) == (loss, said)
    assert overview._tensor_losses(overview._curves(tmp_path / "none.csv")) == ({}, "")


@pytest.mark.parametrize("size", [1, 1000])
def test_blocks_read_what_a_whole_read_would(
    run: Path, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_table(run / "analysis", "samples").sample(frac=1, random_state=0)  # in no order
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), tmp_path / "samples.parquet", row_group_size=size)
    monkeypatch.setattr(blocks, "ROWS", 7)
    found = blocks.rows_between(tmp_path, "samples", 4, 9)
    assert set(found) == {4, 5, 6, 7, 8}
    for k, rows in found.items():
        assert [row["place"] for row in rows] == table[table["subnetwork"] == k]["place"].tolist()
    some = blocks.rows_of_samples(run / "analysis", "items", {2, 5, 59, 4711})
    assert set(some) == {2, 5, 59}
    assert blocks.rows_between(tmp_path, "outputs", 0, 9) == {}


def test_singular_directions_rebuild_the_tensor() -> None:
    tucker = Subnetworks({"w": (9, 7)}, 2, 3).double().v_out.tuckers()["w"].detach()
    core, factors = tucker.core[1].double(), [factor[1].double() for factor in tucker.factors]
    (left, values), (right, _) = structure.singular_directions(core, factors)
    dense = tucker.dense()[1].double()
    torch.testing.assert_close(left @ values.diag() @ right.T, dense, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(values, torch.linalg.svdvals(dense)[:3], rtol=1e-6, atol=1e-9)
    conv = Subnetworks({"w": (6, 5, 3, 3)}, 1, 2).double().v_out.tuckers()["w"].detach()
    found = structure.singular_directions(conv.core[0].double(), [f[0].double() for f in conv.factors])
    dense = conv.dense()[0].double()
    for mode, (vectors, values) in enumerate(found):
        unfolded = dense.movedim(mode, 0).flatten(1)
        torch.testing.assert_close((vectors.T @ unfolded).norm(dim=1), values, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_cells_keep_the_largest_of_what_they_hold() -> None:
    values = torch.zeros(1, 1000)
    values[0, 0], values[0, 501], values[0, 999] = 1.0, -2.0, 0.5
    cells = structure._heat_map(values)
    decoded = np.frombuffer(base64.b64decode(cells["cells"]), np.int8)
    assert (cells["columns"], cells["of_columns"], cells["largest"]) == (250, 1000, 2.0)
    assert decoded[[0, 125, 249]].tolist() == [64, -127, 32]
    assert np.count_nonzero(decoded) == 3


def test_hostile_strings_stay_data(tmp_path: Path) -> None:
    atlas = write_atlas(make_run(tmp_path / "<script>alert(0)</script>".replace("/", ""), hostile=True), progress=False)
    page = atlas.page.read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(0)" in page, "its title"
    shown = json.dumps([content(path) for path in (atlas.page.parent / "data").iterdir()], ensure_ascii=False)
    for text in HOSTILE:
        assert json.dumps(text, ensure_ascii=False)[1:-1] in shown, "as it came"


def test_pictures_are_shrunk_and_what_is_no_picture_is_left_out(tmp_path: Path) -> None:
    def png(width: int, height: int) -> bytes:
        Image.new("RGB", (width, height), (9, 99, 200)).save(file := io.BytesIO(), "png")
        return file.getvalue()

    address = panels._picture(png(900, 300))
    assert address is not None
    with Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))) as small:
        assert small.size == (128, 43)
    assert panels._picture(png(20, 20)) == "data:image/png;base64," + base64.b64encode(png(20, 20)).decode()
    for bad in (None, b"", b"<svg onload=alert(1)>", png(900, 900)[:200]):
        assert panels._picture(bad) is None


def test_only_an_atlas_is_written_over(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    with pytest.raises(L3DError, match=r"output: .*thesis is there and is no atlas"):
        write_atlas(run, mine, progress=False)
    assert (mine / "chapter.txt").read_text() == "years of work"
    with pytest.raises(L3DError, match="is no atlas"):
        write_atlas(run, mine / "chapter.txt", progress=False)
    mine.rename(own := make_run(tmp_path / "run", n_v=2) / "atlas")
    with pytest.raises(L3DError, match=r"output: .*run/atlas is there and is no atlas"):
        write_atlas(own.parent, progress=False)
    assert [path.name for path in own.iterdir()] == ["chapter.txt"]


def test_what_the_user_keeps_in_an_atlas_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_v=4)
    atlas = write_atlas(run, progress=False).page.parent
    (tmp_path / "outside.txt").write_text("mine")
    kept = [atlas / "labels.json", atlas / "data" / "notes.js", atlas / "slides" / "one.png"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (atlas / "data" / "sub_00009.js").write_text("of an older atlas")
    listed = json.loads((atlas / "files.json").read_text())
    assert set(listed) == {path.relative_to(atlas).as_posix() for path in atlas.rglob("*") if path.is_file()} - {
        "labels.json", "data/notes.js", "slides/one.png", "data/sub_00009.js"
    }  # fmt: skip
    (atlas / "files.json").write_text(json.dumps([*listed, "data/sub_00009.js", "../../outside.txt", "gone.js"]))
    assert main(["report", str(run)]) == 0
    assert [path.read_text() for path in [*kept, tmp_path / "outside.txt"]] == ["mine"] * 4
    assert not (atlas / "data" / "sub_00009.js").exists(), "what the older one had more is gone"
    assert json.loads((atlas / "files.json").read_text()) == listed
    assert not (atlas / ".writing").exists()


def test_an_atlas_goes_into_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", n_v=2)
    (here := tmp_path / "new" / "place").mkdir(parents=True)
    (here / ".writing").mkdir()  # of one that was killed
    monkeypatch.chdir(here)
    for _ in range(2):
        assert main(["atlas", str(run), "--output", "."]) == 0
        assert (here / "index.html").is_file()


def test_tables_of_another_decomposition_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_v=4)
    assert content(write_atlas(run, progress=False).page.parent / "data" / "overview.js")["analysed"]
    manifest = json.loads((run / "analysis" / "manifest.json").read_text())
    (run / "analysis" / "manifest.json").write_text(json.dumps(manifest | {"decomposition": "an earlier fit's"}))
    data = write_atlas(run, progress=False).page.parent / "data"
    assert not content(data / "overview.js")["analysed"]
    assert content(data / "sub_00000.js")["samples"] == {"top": [], "middle": [], "random": []}
    assert content(data / "sub_00000.js")["tensors"], "its structure is there"


def test_damaged_tables_are_one_line_and_the_older_atlas_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_v=4)
    page = write_atlas(run, progress=False).page
    table = read_table(run / "analysis", "samples")
    table.drop(columns="impact").to_parquet(run / "analysis" / "samples.parquet")
    with pytest.raises(L3DError, match=r"samples\.parquet has no column impact; found are subnetwork, kind"):
        write_atlas(run, progress=False)
    (run / "analysis" / "samples.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(L3DError, match=r"analysis: .*samples\.parquet cannot be read"):
        write_atlas(run, progress=False)
    assert page.is_file()
    assert not list(run.glob(".atlas*"))


def test_a_run_that_went_to_nan_still_has_an_atlas(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_v=4)
    shutil.rmtree(run / "analysis")
    weights = run / "decomposition" / "model.safetensors"
    save_file({name: torch.full_like(value, math.nan) for name, value in load_file(weights).items()}, weights)
    (run / "metrics.csv").unlink()
    data = write_atlas(run, progress=False).page.parent / "data"
    assert content(data / "overview.js")["subnetworks"]["p_act"] == [None] * 4
    assert "found no file" in content(data / "overview.js")["curves"]["missing"]
    assert any("not finite" in picture.get("words", "") for picture in content(data / "overview.js")["pictures"])
    assert "whole" not in content(data / "sub_00001.js")["tensors"][0]


def test_the_command_analyses_where_that_is_not_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("l3d_pl.cli.analyze_command", asked.append)
    assert main(["atlas", str(run), "--output", str(tmp_path / "out")]) == 0
    assert asked == [], "its tables are there"
    assert re.search(r"out/index\.html \(\d+ files, [\d.]+ MB\)", capsys.readouterr().out)
    shutil.copytree(run / "decomposition", tmp_path / "bare" / "decomposition")
    assert main(["atlas", str(tmp_path / "bare")]) == 0
    assert asked == [[str(tmp_path / "bare")]]
    assert main(["atlas", str(tmp_path / "nowhere")]) == 2
    assert "nowhere holds no decomposition/config.json" in capsys.readouterr().err


MEMORY = """
import sys
from pathlib import Path
from l3d_pl.atlas.build import write_atlas
from l3d_pl.analysis.runs import load_run

def peak():  # not ru_maxrss: a process inherits its parent's peak
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

load_run(Path(sys.argv[1]))
before = peak()
write_atlas(Path(sys.argv[1]), progress=False)
print(before, peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tables(tmp_path: Path) -> None:
    """1,000 subnetworks and 102,000 rows of samples take no more than 200 MiB beyond the decomposition itself.

    Holding all rows as Python objects would take several GiB.
    """
    run = make_run(tmp_path / "run", n_v=1000, per_kind=34, n_items=20_000)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, run],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before, after = map(int, done.stdout.split())
    assert (after - before) / 1024 < 200
