"""The data of the atlas's first page: what was decomposed, how well, and a line about every subnetwork."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from l3d_pl.analysis.alignment import ToyScore, number
from l3d_pl.analysis.tables import read_table
from l3d_pl.atlas.pictures import Picture, read_metrics
from l3d_pl.atlas.structure import network
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.targets.frozen import fingerprint

POINTS = 300  # per curve
CURVES = 12  # subnetworks whose P_act is drawn against the step


def overview(
    run_dir: Path,
    decomposition: Decomposition,
    analysis: Path | None,
    manifest: Mapping[str, Any] | None,
    shares: Tensor,
    target: Mapping[str, Tensor],
    score: ToyScore | None,
    unscored: str,
    drawn: Sequence[Picture | str],
) -> dict[str, Any]:
    """Everything `index.html` shows before a subnetwork is opened; arguments as in `write_atlas`.

    Raises:
        L3DError: a damaged table.
    """
    name, about = run_dir.resolve().name, manifest or {}
    curves = _curves(run_dir / "metrics.csv")
    losses, measured = _tensor_losses(curves)
    return {
        "title": name,
        "id": fingerprint(decomposition.subnetworks)[:16],  # labels belong to this decomposition alone
        "analysed": analysis is not None,
        "n": decomposition.n_subnetworks,
        "counts": {name: about.get(name) for name in ("n_samples", "n_top", "n_background", "n_controls")},
        "k": decomposition.k,
        "threshold": decomposition.threshold,
        "sample": decomposition.sample,
        "kind": about.get("kind"),
        "output_kind": about.get("output_kind", "value"),
        "divergence": decomposition.divergence.name,
        "facts": _facts(decomposition, about),
        "score": score_card(decomposition, score, unscored),
        "tensors": [
            {
                "name": tensor,
                "shape": list(shape),
                "ranks": list(decomposition.subnetworks.ranks[tensor]),
                "share": shares[:, i].mean().item(),
                "loss": losses.get(tensor),
            }
            for i, (tensor, shape) in enumerate(decomposition.subnetworks.shapes.items())
        ],
        "losses_of": measured,
        "subnetworks": _subnetworks(decomposition, analysis, shares, score),
        "map": None if analysis is None else _columns(read_table(analysis, "map"), ("subnetwork", "x", "y")),
        "curves": curves,
        "network": network(target, target) if target else None,
        "pictures": [
            {"words": picture}
            if isinstance(picture, str)
            else {"file": f"pictures/{picture.path.name}", "alt": picture.alt, "caption": picture.caption}
            for picture in drawn
            if isinstance(picture, str) or picture.path.stem in ("networks", "directions")  # the page draws the others
        ],
    }


def _facts(decomposition: Decomposition, about: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(Name, value, more): `more` is shown on request, empty for most."""
    config, versions = decomposition.run_config or {}, decomposition.provenance["versions"]
    data = config.get("data") or {}
    settings = [f"{key} {value}" for key, value in (data.get("init_args") or {}).items() if value is not None]
    source = [setting for setting in settings if setting.startswith(("source ", "task "))]
    shapes = decomposition.subnetworks.shapes
    facts = [
        ("Target model", f"{decomposition.target_class}, fingerprint {str(decomposition.target_fingerprint)[:12]}"),
        ("Decomposed", f"{len(shapes)} tensor{'s' * (len(shapes) > 1)}, {sum(map(_size, shapes.values())):,} values"),
        ("Subnetworks", f"{decomposition.n_subnetworks}; k = {decomposition.k:g} of the coefficients are kept"),
        ("Divergence", f"{decomposition.divergence.name}, {decomposition.reference} reference"),
        ("Sample", decomposition.sample),
        ("Data", ": ".join([str(data.get("class_path", "not recorded")).rsplit(".", 1)[-1], *source])),
        ("Trained", f"{decomposition.figures.get('steps', '?')} steps, seed {decomposition.seed}"),
    ]
    if about:
        samples, references = about.get("n_samples", 0), about.get("n_references")
        facts.append(("Read on", f"{samples:,} samples of {about.get('split')}, {references} references each"))
    commit = str(decomposition.provenance["git_commit"] or "none")
    facts.append(("Made with", f"l3d_pl {versions.get('l3d_pl')}, torch {versions.get('torch')}, commit {commit[:12]}"))
    more = {"Data": ", ".join(settings)}
    return [(key, _brief(value), _brief(more.get(key, ""), 2000)) for key, value in facts]


def score_card(decomposition: Decomposition, score: ToyScore | None, unscored: str) -> dict[str, Any]:
    """{"rows": (figure, value, meaning), "note"}: the run's own figures, then the ground truth where there is one."""
    figures, dead = decomposition.figures, int((decomposition.p_act == 0).sum())
    n_v = decomposition.n_subnetworks
    active = float(decomposition.p_act.sum())
    rows = [
        (
            "held-out L",
            number(figures.get("val/loss")),
            "reconstruction loss: share of squared gradient norm left; 0 is perfect",
        ),
        ("dead", f"{dead} of {n_v} ({dead / n_v:.0%})", "subnetworks that take part in no held-out sample"),
        ("L0", number(active), f"subnetworks active per sample, mean; k n_v = {decomposition.k * n_v:.3g}"),
    ]
    truth = [] if score is None else [row for row in score.rows() if row[0] not in ("loss", "dead")]
    none = "No circuits were planted in this target model: there is no ground truth to compare with."
    return {"rows": rows, "truth": truth, "note": unscored or ("" if score else none)}


def _subnetworks(
    decomposition: Decomposition, analysis: Path | None, shares: Tensor, score: ToyScore | None
) -> dict[str, Any]:
    """Columns, one value per subnetwork; null where the analysis has not been made."""
    n_v = decomposition.n_subnetworks
    top = shares.topk(min(6, shares.shape[1]), 1)
    columns: dict[str, Any] = {
        "p_act": decomposition.p_act.tolist(),
        "dead": (decomposition.p_act == 0).tolist(),
        "shares": [
            [[i, share] for i, share in zip(indices, values, strict=True) if share >= 0.005]
            for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        "circuit": score.circuits() if score else None,
    }
    if analysis is None:
        return columns
    table = read_table(analysis, "subnetworks").set_index("subnetwork").reindex(range(n_v))
    names = (
        "p_act",
        "impact_mean",
        "impact_se",
        "positive_share",
        "active_samples",
        "nearest",
        "nearest_cos",
        "local_to",
    )
    for name in names:
        columns[name] = _values(table[name])
    columns["dead"] = (table["dead"].astype("boolean").fillna(True)).tolist()
    bins = read_table(analysis, "histograms").sort_values(["subnetwork", "bin_low"])
    columns["histograms"] = [None] * n_v
    for k, rows in bins.groupby("subnetwork"):
        if 0 <= int(k) < n_v:
            low, high = float(rows["bin_low"].min()), float(rows["bin_high"].max())
            columns["histograms"][int(k)] = [low, high, rows["count"].astype(int).tolist()]
    return columns


def _curves(metrics: Path) -> dict[str, Any]:
    """Curves over the training: loss, loss per tensor, dead share, P_act of some subnetworks."""
    try:
        columns = read_metrics(metrics)
    except L3DError as error:
        return {"missing": str(error)}
    wanted = {name: _thinned(*values) for name, values in columns.items() if name.startswith(("train/", "val/"))}
    activities = sorted(
        (name for name in wanted if name.startswith("train/p_act/")), key=lambda name: int(name.rsplit("/", 1)[1])
    )
    latest = {name: wanted[name][1][-1] for name in activities}
    spread = sorted(activities, key=lambda name: latest[name])
    if len(spread) > CURVES:  # the whole range, evenly
        spread = [spread[i] for i in np.linspace(0, len(spread) - 1, CURVES).round().astype(int)]
    return {
        "loss": {name: wanted[name] for name in ("train/loss", "val/loss") if name in wanted},
        "tensors": {
            name.removeprefix("train/loss/"): values
            for name, values in wanted.items()
            if name.startswith("train/loss/")
        },
        "dead": wanted.get("train/dead_fraction"),
        "p_act": {name.rsplit("/", 1)[1]: wanted[name] for name in spread},
        "n_p_act": len(activities),
    }


def _tensor_losses(curves: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Each tensor's loss as logged last, and on what."""
    if not (found := curves.get("tensors")):
        return {}, ""
    step = max(steps[-1] for steps, _ in found.values())
    return {name: values[-1] for name, (_, values) in found.items()}, f"training batch at step {step:,.0f}"


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float]]:
    every = max(1, -(-len(steps) // POINTS))
    keep = sorted({*range(0, len(steps), every), len(steps) - 1})
    return steps[keep].tolist(), values[keep].tolist()


def _columns(table: pd.DataFrame, names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: _values(table[name]) for name in names}


def _values(column: pd.Series[Any]) -> list[Any]:
    return [None if pd.isna(value) else value for value in column.astype(object).tolist()]


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _brief(text: str, length: int = 240) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
