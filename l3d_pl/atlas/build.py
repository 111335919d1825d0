"""`l3d atlas RUN`: one folder of static files that show a finished run, opened from disk or served by anything."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.progress import track
from torch import Tensor

from l3d_pl.analysis.runs import load_run
from l3d_pl.analysis.tables import MANIFEST, read_manifest
from l3d_pl.atlas.figures import figures_of
from l3d_pl.atlas.overview import overview
from l3d_pl.atlas.panels import panels
from l3d_pl.atlas.pictures import draw_run
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.report import target_tensors, toy_of, try_score
from l3d_pl.targets.frozen import fingerprint

STATIC = Path(__file__).parent / "static"
MARK = "l3d_pl atlas"  # in the page's head: how a folder is known to be an atlas, and may be written over
FILES = "files.json"  # what the atlas has written there: the rest of the folder is the user's
ASIDE = ".writing"


class Atlas(NamedTuple):
    """A written atlas: its page, and what its files take on disk."""

    page: Path
    files: int
    size: int  # bytes


def write_atlas(run_dir: Path, output: Path | None = None, progress: bool = True) -> Atlas:
    """Write the atlas of a finished run to `output` (default `run_dir/atlas`); an older atlas's files are replaced.

    What the analysis's tables in `run_dir/analysis` hold is shown; without them, what the decomposition itself tells.
    Files are written aside and then put in place; what the user keeps in the folder stays. Memory grows with the
    subnetworks themselves and with one block of them in the tables, not with the tables.

    Raises:
        L3DError: no finished run, a damaged table, or `output` is a folder of something else.
    """
    output = output or run_dir / "atlas"
    require_ours(output)
    decomposition = load_run(run_dir)
    analysis = analysis_of(run_dir, decomposition)
    manifest = None if analysis is None else read_manifest(analysis)
    aside = output / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "data").mkdir(parents=True)
        toy = toy_of(decomposition)
        score, unscored = try_score(run_dir) if toy else (None, "")
        try:
            target, _ = target_tensors(decomposition) if toy else ({}, {})
        except L3DError:
            target = {}  # `unscored` says so
        shares = norm_shares(decomposition.subnetworks.v_out.tuckers())
        drawn = draw_run(
            aside / "pictures",
            shares=shares,
            names=list(decomposition.subnetworks.shapes),
            v_out=decomposition.directions() if target else None,
            target=target,
            p_act=decomposition.p_act,
            metrics=run_dir / "metrics.csv",
            circuits=score.circuits() if score else None,
            k=decomposition.k,
            group_size=(toy[1].get("group_size") or 1) if toy else 1,
        )
        pages: Iterator[dict[str, Any]] = panels(decomposition, analysis, shares, target)
        for panel in track(pages, "atlas", decomposition.n_subnetworks, disable=not progress, transient=True):
            write_data(aside / "data" / f"sub_{panel['k']:05d}.js", f"subnetwork/{panel['k']}", panel)
        for file in STATIC.iterdir():
            shutil.copyfile(file, aside / file.name)
        content = overview(run_dir, decomposition, analysis, manifest, shares, target, score, unscored, drawn)
        content["figures"] = figures_of(run_dir, fingerprint(decomposition.subnetworks), aside / "pictures")
        (aside / "index.html").write_text(_page(content["title"]), encoding="utf-8")
        names = [path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()]
        names = sorted([*names, "data/overview.js", FILES])
        (aside / FILES).write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
        size += len(_script("overview", content))
        content["size"] = {"files": len(names), "bytes": size}
        write_data(aside / "data" / "overview.js", "overview", content)
        _put_in_place(aside, output, names)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Atlas(output / "index.html", len(names), size)


def _put_in_place(aside: Path, output: Path, names: Sequence[str]) -> None:
    """Move these files from `aside` to `output`, and remove those of an older atlas that are none of them."""
    for name in set(_written(output)) - set(names):
        (output / name).unlink()
    for name in sorted(names, key=(FILES, "index.html").__contains__, reverse=True):  # first what makes it an atlas
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, output / name)


def _written(output: Path) -> list[str]:
    """The files that an older atlas has written to `output`; none where it has kept no list."""
    try:
        names = json.loads((output / FILES).read_text(encoding="utf-8"))
        files = [name for name in names if (output / name).resolve().is_relative_to(output.resolve())]
    except (OSError, ValueError, TypeError):
        return []
    return [name for name in files if (output / name).is_file()]


def analysis_of(run_dir: Path, decomposition: Decomposition) -> Path | None:
    """The folder of this decomposition's tables; None where there are none, or those of an earlier fit.

    Raises:
        L3DError: a manifest that is damaged or of another version.
    """
    folder = run_dir / "analysis"
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    here = {"decomposition": fingerprint(decomposition.subnetworks), "n_subnetworks": decomposition.n_subnetworks}
    return folder if all(manifest.get(key) == value for key, value in here.items()) else None


def norm_shares(tuckers: Mapping[str, Any]) -> Tensor:
    """Share of each subnetwork's squared norm in each tensor, [n_v, tensors], without dense tensors."""
    energy = torch.stack([tucker.squared_norms().detach().double().cpu() for tucker in tuckers.values()], 1)
    return energy / energy.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def write_data(path: Path, name: str, content: Any) -> None:
    """Write a data file: a script that hands `content` to the page under `name`, which works from disk, too."""
    path.write_text(_script(name, content), encoding="ascii")


def _script(name: str, content: Any) -> str:
    """ASCII without `<`, `>`, `&`: nothing in it can end a script or a line, wherever it is put."""
    text = json.dumps(_finite(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'atlasData("{name}",{text});\n'


def _finite(content: Any) -> Any:
    """`content` with six digits and None for what is not finite."""
    if isinstance(content, float):
        return float(f"{content:.6g}") if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def _page(title: str) -> str:
    # Always on: `select_autoescape` would go by the name and leave "index.html.j2" unescaped.
    environment = Environment(loader=PackageLoader("l3d_pl.atlas"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("index.html.j2").render(title=title, mark=MARK)


def require_ours(output: Path) -> None:
    """Raise an L3DError unless an atlas may be put there: nothing is, or an empty folder, or an older atlas."""
    if not output.exists() or (output.is_dir() and {path.name for path in output.iterdir()} <= {ASIDE}):
        return
    page = output / "index.html"
    try:
        ours = page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        ours = False
    if not ours:
        raise L3DError(f"output: {output} is there and is no atlas; allowed is a new, an empty or an atlas's folder")
