"""Subnetworks of a language model's run, drawn at random and quoted as they are, in Markdown.

    python benchmarks/gallery.py runs/pydoc_lm --seed 0 > gallery.md       after `l3d analyze runs/pydoc_lm`

For each: P_act, its top samples with the token marked whose next one is predicted, the outputs that a step along +v
raises and lowers most, summed over these samples; and what steps of ±δ do. `moved` is the mean summed |change| of
the top samples' output probabilities (2 at most), `selectivity` is that over the same of random samples without the
subnetwork, `of outputs` the mean |change| of the outputs named for v over that of all others; all beside random
directions of the same ranks (± their standard deviation) and the mean gradient, at the same δ.
"""

from __future__ import annotations

import math
import random
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from l3d_pl.analysis.tables import read_manifest, read_table
from l3d_pl.cli import OneLineParser, one_line
from l3d_pl.errors import L3DError

CONTROLS = {"subnetwork": "v", "random": "random", "gradient": "gradient"}
AS_THEY_ARE = set(",.;'\"()?!-/")  # harmless within a line; all other ASCII punctuation is escaped


def escape(text: str) -> str:
    """Text from data as Markdown that shows it and does nothing else."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return "".join(f"\\{c}" if c in string.punctuation and c not in AS_THEY_ARE else c for c in text)


def quoted(item: pd.Series, position: int) -> str:
    """A sequence with the token at `position` marked."""
    tokens = [escape(token) for token in item["tokens"]]
    place = position - int(item["first"])
    if 0 <= place < len(tokens):
        tokens[place] = f"<b>⟦{tokens[place]}⟧</b>"
    return "".join(tokens).strip()


def outputs(rows: pd.DataFrame, direction: str, n: int = 6) -> str:
    """The outputs moved most, summed over samples."""
    mine = rows[rows["direction"] == direction]
    sizes = mine.groupby("name")["derivative"].sum().abs().sort_values(ascending=False, kind="stable")
    return ", ".join(f"“{escape(str(name))}”" for name in sizes.head(n).index) or "none"


def pushed(curves: pd.DataFrame, delta: float) -> Iterator[tuple[str, float, str, str]]:
    """(control, moved, selectivity, selectivity of outputs) at ±delta."""
    both = curves[curves["delta"].abs() == delta]
    for control, name in CONTROLS.items():
        rows = both[both["control"] == control]
        told = []
        for prefix in ("", "outputs_"):
            near, far = float(rows[f"{prefix}relevant"].mean()), float(rows[f"{prefix}irrelevant"].mean())
            spread = float(rows[f"{prefix}selectivity_std"].mean())
            told.append(f"{near / far if far else math.nan:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}"))
        yield name, float(rows["relevant"].mean()), *told


def gallery(run: Path, seed: int, n: int, top: int, delta: float | None) -> Iterator[str]:
    """The page, line by line.

    Raises:
        L3DError: the run has not been analysed, is not of text, or took no such step.
    """
    folder = run / "analysis"
    manifest = read_manifest(folder)
    if manifest["kind"] != "text":
        raise L3DError(f"run: {run} is of {manifest['kind']}, allowed is text")
    about = read_table(folder, "subnetworks").set_index("subnetwork")
    items = read_table(folder, "items").set_index("sample")
    steps = sorted({abs(d) for d in read_table(folder, "curves")["delta"]} - {0.0})
    delta = steps[max(len(steps) - 3, 0)] if delta is None else delta
    if delta not in steps:
        raise L3DError(f"delta: found {delta:g}, allowed are {', '.join(f'{step:g}' for step in steps)}")
    chosen = random.Random(seed).sample(sorted(about.index.tolist()), min(n, len(about)))
    yield f"{len(chosen)} of {len(about)} subnetworks, drawn with seed {seed}; δ = ±{delta:g}."
    for k in chosen:
        row, samples = about.loc[k], read_table(folder, "samples", k)
        samples = samples[samples["kind"] == "top"].sort_values("place").head(top)
        moved = read_table(folder, "outputs", k)
        moved = moved[(moved["kind"] == "top") & (moved["place"] < top)]
        yield f"\n**Subnetwork {k}**, P_act {row['p_act']:.3f}" + (", dead" if row["dead"] else "") + "\n"
        for sample in samples.itertuples():
            text = quoted(items.loc[sample.sample], sample.position)
            yield f"- c = {sample.coefficient:+.2f}: {text}"
        yield f"- raises {outputs(moved, 'raised')}"
        yield f"- lowers {outputs(moved, 'lowered')}"
        found = list(pushed(read_table(folder, "curves", k), delta))
        yield "- moved " + ", ".join(f"{name} {size:.3f}" for name, size, _, _ in found)
        yield "- selectivity " + ", ".join(f"{name} {value}" for name, _, value, _ in found)
        yield "- of outputs " + ", ".join(f"{name} {value}" for name, _, _, value in found)


def main(argv: Sequence[str]) -> None:
    parser = OneLineParser(prog="gallery", description="Subnetworks of an analysed text run, drawn at random.")
    parser.add_argument("run", type=Path, help="a run's directory, after `l3d analyze`")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--n", type=int, default=10, help="subnetworks")
    parser.add_argument("--top", type=int, default=4, help="samples of each")
    parser.add_argument(
        "--delta", type=float, default=None, help="one of the analysis's steps (default: its third largest)"
    )
    known = parser.parse_args(argv)
    for line in gallery(known.run, known.seed, known.n, known.top, known.delta):
        print(line)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except L3DError as error:
        sys.exit(f"gallery: error: {one_line(str(error))}")
