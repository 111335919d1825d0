"""Runs to build an atlas of, made from random numbers in seconds: of any size, of any kind, and of hostile strings."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from l3d_pl.analysis.tables import write_manifest, write_table
from l3d_pl.decomposition import Decomposition
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.targets.frozen import fingerprint

SHAPES = {f"blocks.{i}.attn.{part}.weight": (24, 16) for i in range(2) for part in ("q", "k", "v")} | {
    "head.bias": (12,)
}
BACKGROUND = 9  # random samples behind the curves
DELTAS = (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\"'><svg onload=alert(3)>",
    "line\u2028separator\u2029here",
    "javascript:alert(4)",
    "${alert(5)} {{7*7}} {% if %}",
    "&lt;b&gt;&amp;",
    "back\\slash \x00\x1b[31m",
    "\u202eright to left",
    "lone \ud800 half".encode("utf-8", "replace").decode(),
    "%3Cscript%3E",
    "a\tb\nc",
)


def make_run(
    run: Path,
    kind: str = "text",
    n_v: int = 12,
    per_kind: int = 8,
    n_items: int = 60,
    hostile: bool = False,
    length: int = 16,
) -> Path:
    """A run's directory with a decomposition of random numbers, its metrics and every table of an analysis.

    kind: text, image or vector; per_kind: samples of each subnetwork, of each of top, middle and random; hostile: every
    string that can come from data is one of `HOSTILE`.
    """
    rng = np.random.default_rng(0)
    shapes = {f"{HOSTILE[i % 4]}.{i}": shape for i, shape in enumerate(SHAPES.values())} if hostile else SHAPES
    shapes = {name.replace(".", "·") if hostile else name: shape for name, shape in shapes.items()}
    names, word = list(shapes), (lambda i: HOSTILE[i % len(HOSTILE)]) if hostile else (lambda i: f" word{i}")
    subnetworks = Subnetworks(shapes, n_v, 3, generator=torch.Generator().manual_seed(0))
    subnetworks.normalise_()
    p_act = torch.rand(n_v, generator=torch.Generator().manual_seed(1)) * 0.2
    p_act[n_v - 1] = 0.0
    decomposition = Decomposition(
        subnetworks,
        divergence="kl" if kind != "vector" else "mse",
        sample="token" if kind == "text" else "item",
        p_act=p_act,
        figures={"val/loss": 0.31, "steps": 400} | ({HOSTILE[0]: HOSTILE[1]} if hostile else {}),
        run_config={"data": {"class_path": word(1), "init_args": {word(0): word(2)}}},
    )
    decomposition.target_class, decomposition.target_fingerprint = word(0), "f" * 64
    (run / "decomposition").mkdir(parents=True)
    decomposition.save_pretrained(run / "decomposition")
    steps = np.arange(0, 400, 20)
    pd.DataFrame(
        {"step": steps, "train/loss": 0.9 / (1 + steps / 80) + 0.2, "val/loss": [None] * 19 + [0.31]}
        | {f"train/loss/{name}": 0.9 / (1 + steps / 90) + 0.1 * i for i, name in enumerate(names)}
        | {"train/dead_fraction": np.zeros(20)}
        | {f"train/p_act/{k}": rng.random(20) * 0.2 for k in range(min(n_v, 20))}
    ).to_csv(run / "metrics.csv", index=False)

    folder, ks = run / "analysis", np.arange(n_v)
    impact = np.sort(rng.exponential(size=n_v))[::-1]
    tables: dict[str, Any] = {
        "subnetworks": pd.DataFrame(
            {"subnetwork": ks, "p_act": p_act.numpy(), "impact_mean": impact, "impact_se": impact / 20}
            | {"coefficient_mean": 0.0, "coefficient_std": 1.0, "positive_share": rng.random(n_v)}
            | {"active_samples": (p_act.numpy() * 1000).astype(int), "nearest": (ks + 1) % n_v}
            | {"nearest_cos": rng.random(n_v), "dead": p_act.numpy() == 0, "local_to": 0.2}
        )
    }
    bins = np.linspace(-2, 2, 42)
    tables["histograms"] = pd.DataFrame(
        {"subnetwork": np.repeat(ks, 41), "bin_low": np.tile(bins[:-1], n_v), "bin_high": np.tile(bins[1:], n_v)}
        | {"count": rng.poisson(np.tile(500 * np.exp(-4 * bins[:-1] ** 2), n_v))}
    )
    tables["map"] = pd.DataFrame({"subnetwork": ks, "x": rng.normal(size=n_v), "y": rng.normal(size=n_v)})
    near = min(20, n_v - 1)
    tables["similarity"] = pd.DataFrame(
        {"subnetwork": np.repeat(ks, near), "other": (np.repeat(ks, near) + np.tile(np.arange(1, near + 1), n_v)) % n_v}
        | {"cos": rng.uniform(-1, 1, n_v * near), "coactivation": rng.random(n_v * near)}
    )
    rows = n_v * 3 * per_kind
    samples = pd.DataFrame(
        {
            "subnetwork": np.repeat(ks, 3 * per_kind),
            "kind": np.tile(np.repeat(["top", "middle", "random"], per_kind), n_v),
        }
        | {"place": np.tile(np.arange(per_kind), 3 * n_v), "sample": rng.integers(0, n_items, rows)}
        | {"position": rng.integers(0, length, rows) if kind == "text" else np.full(rows, -1)}
        | {
            "impact": rng.exponential(size=rows),
            "impact_se": 0.01,
            "coefficient": rng.normal(size=rows),
            "active": np.arange(rows) % per_kind != 1,  # the second of each kind is not
        }
    )
    tables["samples"] = samples
    shown = samples[samples["place"] < 8]
    each = [("raised", r) for r in range(3)] + [("lowered", r) for r in range(3)]
    tables["outputs"] = shown.loc[shown.index.repeat(6), ["subnetwork", "kind", "place", "sample", "position"]].assign(
        direction=[d for d, _ in each] * len(shown),
        rank=[r for _, r in each] * len(shown),
        output=range(6 * len(shown)),
        name=[word(i % 50) for i in range(6 * len(shown))],
        derivative=0.25,
        probability=0.1,
    )
    ways = pd.MultiIndex.from_product([ks, ["raised", "lowered"], range(3)]).to_frame(index=False)
    ways.columns = ["subnetwork", "direction", "rank"]
    tables["outputs_summary"] = ways.assign(
        output=ways["rank"], name=[word(i % 50) for i in range(len(ways))], samples=per_kind - ways["rank"],
        derivative=np.where(ways["direction"] == "raised", 0.25, -0.25),
    )  # fmt: skip
    there = pd.MultiIndex.from_product([ks, range(BACKGROUND)]).to_frame(index=False)
    there.columns = ["subnetwork", "sample"]
    tables["background"] = there.assign(position=-1, active=there["sample"] < there["subnetwork"] % BACKGROUND)
    tables["items"] = _items(kind, n_items, length, word, rng)
    pairs = samples.drop_duplicates(["subnetwork", "sample"])
    if kind == "text":
        tables["token_coefficients"] = pd.DataFrame(
            {"subnetwork": pairs["subnetwork"], "sample": pairs["sample"]}
            | {"positions": [list(range(1, length))] * len(pairs)}
            | {"coefficients": list(rng.normal(size=(len(pairs), length - 1)).astype(np.float32))}
        )
    height, width = {"text": (1, length), "image": (8, 8), "vector": (1, 12)}[kind]
    attributed = shown.drop_duplicates(["subnetwork", "sample", "position"])
    attributed = attributed[(attributed["kind"] == "top") & (attributed["place"] < 3) | (kind != "vector")]
    tables["attribution"] = attributed[["subnetwork", "sample", "position"]].assign(
        values=list(rng.normal(size=(len(attributed), height * width)).astype(np.float32)), height=height, width=width
    )
    steps_of = pd.MultiIndex.from_product([ks, ["subnetwork", "random", "gradient"], DELTAS]).to_frame(index=False)
    steps_of.columns = ["subnetwork", "control", "delta"]
    size_of = steps_of["delta"].abs() * np.where(steps_of["control"] == "subnetwork", 3, 1)
    tables["curves"] = steps_of.assign(
        relevant=size_of, irrelevant=size_of / 4, selectivity=np.where(size_of > 0, 1 + 3 / (1 + size_of), np.nan),
        kl_inactive=size_of**2 / 10, loss_change=size_of**2 / 20,
        outputs_relevant=size_of / 2, outputs_irrelevant=size_of / 10, outputs_selectivity=5.0,
        relevant_std=np.where(steps_of["control"] == "random", size_of / 8, np.nan),
        selectivity_std=np.where(steps_of["control"] == "random", 0.3, np.nan),
    )  # fmt: skip
    local = pd.MultiIndex.from_product([ks, DELTAS]).to_frame(index=False)
    local.columns = ["subnetwork", "delta"]
    tables["locality"] = local.assign(change=local["delta"] + local["delta"] ** 2, linear=local["delta"])
    first = samples[(samples["kind"] == "top") & (samples["place"] < 3)]
    grid = first.loc[first.index.repeat(len(DELTAS) * 4), ["subnetwork", "sample", "position"]].reset_index(drop=True)
    i = np.arange(len(grid))
    tables["effects"] = grid.assign(
        delta=np.array(DELTAS)[(i // 4) % len(DELTAS)], output=i % 4, name=[word(j % 4) for j in i],
        value=0.2 + 0.15 * np.array(DELTAS)[(i // 4) % len(DELTAS)] * np.where(i % 2, 1, -1),
    )  # fmt: skip
    counts = {name: write_table(folder, name, table) for name, table in tables.items()}
    write_manifest(
        folder,
        {
            "run": str(run),
            "model": word(0),
            "decomposition": fingerprint(subnetworks),
            "seed": 0,
            "split": word(3) if hostile else "val",
        }
        | {"n_samples": 1000, "n_references": 4, "sample": decomposition.sample, "kind": kind, "n_subnetworks": n_v}
        | {"n_top": per_kind, "n_background": BACKGROUND, "n_controls": 4}
        | {"output_kind": "value" if kind == "vector" else "probability", "tables": counts},
    )
    return run


def _items(
    kind: str, n: int, length: int, word: Callable[[int], str], rng: np.random.Generator
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"sample": i, "kind": kind, "label": word(i % 10)} for i in range(n)]
    for i, row in enumerate(rows):
        if kind == "text":
            row |= {"tokens": [word(i * 7 + j) for j in range(length)], "first": 0}
        elif kind == "vector":
            row["values"] = rng.normal(size=12).tolist()
        else:
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 24), dtype=np.uint8)).save(file, "png")
            row |= {"png": file.getvalue(), "width": 24, "height": 24}
    return rows
