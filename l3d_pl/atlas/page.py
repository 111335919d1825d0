"""The atlas's first page: one finished run as a single HTML file that needs neither scripts nor a network."""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from l3d_pl.analysis.alignment import ToyScore, number
from l3d_pl.atlas.pictures import Picture, norm_shares

Cell = str | int | float | bool | None


class PageTable(NamedTuple):
    """A table for the page; numbers are set flush right, None is shown as a dash."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def write_page(
    run_dir: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    score_rows: Sequence[tuple[str, str, str]] = (),
    pictures: Sequence[Picture | tuple[Path, str, str] | str] = (),
    tables: Sequence[PageTable] = (),
) -> Path:
    """Write `run_dir/atlas/index.html` and return its path.

    facts: what the run is, in the order to show it; score_rows: (figure, value, meaning) as `ToyScore.rows` gives them,
    empty where there is no ground truth; pictures: PNG, alt text and caption, or a sentence in place of a picture that
    could not be drawn (`draw_run` gives both). Pictures are embedded, so the page can be sent on its own. Everything
    that comes from data is escaped. A picture that is not on disk becomes a sentence, too.
    """
    # Always on: `select_autoescape` would go by the name and leave "run.html.j2" unescaped.
    environment = Environment(
        loader=PackageLoader("l3d_pl.atlas"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.tests["numeric"] = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    html = environment.get_template("run.html.j2").render(
        title=title,
        facts=facts,
        score_rows=score_rows,
        pictures=[_embedded(picture) for picture in pictures],
        tables=tables,
    )
    page = run_dir / "atlas" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    aside = page.with_suffix(".html.tmp")
    aside.write_text(html, encoding="utf-8")
    os.replace(aside, page)
    return page


def subnetwork_table(v_out: Mapping[str, Tensor], p_act: Tensor, score: ToyScore | None = None) -> PageTable:
    """One row per subnetwork: how often it is active, which tensor holds most of it, and its circuit if there is one.

    v_out: {parameter: [n_v, *shape]}; p_act: [n_v]; score: of the same run, for toys.
    """
    names = list(v_out)
    header = ["subnetwork", "P_act", "largest tensor", "its share of squared norm"]
    rows: list[list[Cell]] = [
        [k, active, names[int(share.argmax())], share.max().item()]
        for k, (active, share) in enumerate(zip(p_act.tolist(), norm_shares(v_out), strict=True))
    ]
    if score is not None:
        header += [score.circuit_kind, f"share in the {score.circuit_kind}", "stands for it"]
        for row, read in zip(rows, score.subnetworks, strict=True):
            row += [read.circuit, read.share, read.own]
        if any(read.quality is not None for read in score.subnetworks):
            header.append({"tmcs": "r² with A", "squared": "same output"}.get(score.task, "|cos| with W_in"))
            for row, read in zip(rows, score.subnetworks, strict=True):
                row.append(read.quality)
    return PageTable(
        "Subnetworks", header, rows, "P_act: share of samples in whose reconstruction it takes part; 0 = dead."
    )


def _cell(value: Cell) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if value is None or isinstance(value, float) else str(value)


def _embedded(picture: Picture | tuple[Path, str, str] | str) -> dict[str, str]:
    """What the template shows: a data address with alt text and caption, or a sentence."""
    if isinstance(picture, str):
        return {"sentence": picture}
    path, alt, caption = picture
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        return {"sentence": f"The picture {path.name} could not be read: {error.strerror}."}
    return {"source": f"data:image/png;base64,{data}", "alt": alt, "caption": caption}
