"""Loss against the number of subnetworks and against L0: a grid of n_v x k, the field's Pareto plot.

    python benchmarks/pareto.py --config pydoc_lm --n_v 25 50 100 200 --k 0.02 0.05 0.1 0.2 --recipes l3d_pl paper \\
        --root runs/pareto/pydoc_lm -- --trainer.max_epochs 1

Every cell is one `l3d fit` into a folder of its own. What stands after `--` goes to each of them, but recipe `paper`
never repairs. Finished cells are kept: the same command goes on after a stop, further values add to the grid.
In `--root`:

    pareto.csv, pareto.md   a row for each cell that is there
    pareto.png              loss against n_v, loss against L0, dead share against n_v

`loss` is the held-out L with batch top-k, which keeps `l0` = k n_v subnetworks per sample; `loss_at_threshold` and
`l0_at_threshold` are those of samples encoded one by one. Dead: took part in no held-out sample at the threshold.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from l3d_pl.atlas.pictures import STYLE
from l3d_pl.batch_topk import check_k
from l3d_pl.callbacks import Stopped
from l3d_pl.cli import OneLineParser, bad_input_in, find_config, one_line, quiet, run
from l3d_pl.errors import require_choice
from l3d_pl.figures.sweeps import cells_in, fit_grid, last_validation

LINES: dict[str, dict[str, Any]] = {
    "l3d_pl": {"linestyle": "-", "marker": "o"},
    "paper": {"linestyle": "--", "marker": "x"},
}
# The published procedure repairs nothing, whatever the config and the arguments say.
PUBLISHED = ("--model.aux_coefficient", "0", "--model.revive_every", "0")


@dataclass(frozen=True)
class Cell:
    """One fit of the grid, and a row of `pareto.csv`."""

    recipe: str
    n_v: int
    k: float
    loss: float
    l0: float
    loss_at_threshold: float
    l0_at_threshold: float
    dead_fraction: float
    steps: int
    seconds: float  # of the whole fit (the first one's with the target's training, where that was missing)
    cpu_seconds: float  # the same where other programs share the machine
    seed: int


def fit(config: str, recipe: str, n_v: int, k: float, more: Sequence[str], folder: Path) -> Cell:
    """One cell, into `folder`."""
    args = ["--config", config, "--model.recipe", recipe, "--model.n_subnetworks", str(n_v), "--model.k", str(k), *more]
    args += PUBLISHED if recipe == "paper" else ()
    args += ["--trainer.logger", "true", "--trainer.enable_progress_bar", "false"]
    start, start_cpu = time.perf_counter(), time.process_time()
    cli = run(["fit", *args, "--trainer.default_root_dir", str(folder)])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    last = last_validation(folder)
    return Cell(
        recipe=recipe,
        n_v=n_v,
        k=k,
        loss=last["val/loss"],
        l0=k * n_v,
        loss_at_threshold=last["val/loss_at_threshold"],
        l0_at_threshold=last["val/l0_at_threshold"],
        dead_fraction=last["val/dead_fraction"],
        steps=cli.trainer.global_step,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        seed=cli.model.seed,
    )


def sweep(
    config: str, n_v: Sequence[int], k: Sequence[float], recipes: Sequence[str], more: Sequence[str], root: Path
) -> list[Cell]:
    """The cells of the grid that `root` does not hold yet; returns all that it holds then.

    Raises:
        L3DError: `root` holds cells of another config, or with other arguments.
    """
    fits = {
        f"{recipe}_nv{width}_k{share:g}": partial(cell, config, recipe, width, share, more)
        for recipe, width, share in product(recipes, sorted(set(n_v)), sorted(set(k)))
    }
    remedy = f"give {' '.join([config, *more])} another --root"
    fit_grid(root, [config, *more], fits, remedy, lambda: write(cells_of(root), root))
    return cells_of(root)


def cell(config: str, recipe: str, n_v: int, k: float, more: Sequence[str], folder: Path) -> dict[str, Any]:
    return asdict(fit(config, recipe, n_v, k, more, folder))


def cells_of(root: Path) -> list[Cell]:
    return sorted((Cell(**cell) for cell in cells_in(root)), key=lambda c: (c.recipe, c.n_v, c.k))


def write(cells: Sequence[Cell], root: Path) -> None:
    names = [field.name for field in fields(Cell)]
    with open(root / "pareto.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *map(astuple, cells)])
    (root / "pareto.md").write_text(table(cells))
    draw(cells, root / "pareto.png")


def table(cells: Sequence[Cell]) -> str:
    header = ("recipe", "n_v", "k", "loss", "L0", "loss at threshold", "L0 there", "dead", "steps", "CPU s")
    rows = [header, ("---",) * len(header)]
    for c in cells:
        rows.append((
            c.recipe, str(c.n_v), f"{c.k:g}", f"{c.loss:.3f}", f"{c.l0:.3g}", f"{c.loss_at_threshold:.3f}",
            f"{c.l0_at_threshold:.3g}", f"{c.dead_fraction:.1%}", str(c.steps), f"{c.cpu_seconds:.0f}",
        ))  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Three panels; a colour per k or n_v, a line style per recipe."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4), layout="constrained")
        by_n_v, pareto, dead = figure.subplots(1, 3)
        lines(by_n_v, cells, "n_v", "loss", "k")
        lines(pareto, cells, "l0", "loss", "n_v")
        lines(dead, cells, "n_v", "dead_fraction", "k")
        by_n_v.set(xlabel="n_v, subnetworks", ylabel="held-out loss L")
        pareto.set(xlabel="L0 = k n_v, active per sample", ylabel="held-out loss L")
        dead.set(xlabel="n_v, subnetworks", ylabel="dead share")
        dead.set_ylim(-0.02, max(0.1, 1.05 * max(c.dead_fraction for c in cells)))
        recipes = list(dict.fromkeys(c.recipe for c in cells))
        handles = [Line2D([], [], color="black", label=recipe, **LINES[recipe]) for recipe in recipes]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(recipes), frameon=False)
        figure.savefig(path, dpi=80)


def lines(axes: Axes, cells: Sequence[Cell], x: str, y: str, of: str) -> None:
    """`y` against `x`, a line for each value of `of` and each recipe."""
    values = sorted({getattr(c, of) for c in cells})
    colours = matplotlib.colormaps["viridis"].resampled(len(values) + 1)
    for (index, value), recipe in product(enumerate(values), LINES):
        mine = [c for c in cells if getattr(c, of) == value and c.recipe == recipe]
        points = sorted((getattr(c, x), getattr(c, y)) for c in mine)
        axes.plot(
            *zip(*points, strict=True) if points else ((), ()), color=colours(index), markersize=5, **LINES[recipe]
        )
    axes.legend(
        handles=[Line2D([], [], color=colours(i), label=f"{of} {v:g}") for i, v in enumerate(values)], fontsize=9
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5)) if x == "l0" else FixedLocator(sorted({c.n_v for c in cells}))
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def main(argv: Sequence[str]) -> None:
    split = list(argv).index("--") if "--" in argv else len(argv)
    parser = OneLineParser(prog="pareto", description="Loss against n_v and L0. After --: more arguments of `l3d fit`.")
    parser.add_argument("--config", default="digits_cnn", help="a config file, or a shipped one by name")
    parser.add_argument("--n_v", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--k", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--recipes", nargs="+", default=["l3d_pl"], help=", ".join(LINES))
    parser.add_argument("--root", type=Path, help="where cells and results go (default: runs/pareto/<config's name>)")
    known = parser.parse_args(argv[:split])
    root = known.root or Path("runs/pareto", Path(find_config(known.config)).stem)
    for recipe in known.recipes:
        require_choice("recipes", recipe, LINES)
    for k in known.k:
        check_k(k)
    quiet()
    sys.argv = sys.argv[:1]  # LightningCLI warns of arguments that it is not given
    os.environ["L3D_QUIET_SUMMARY"] = "1"
    cells = sweep(known.config, known.n_v, known.k, known.recipes, argv[split + 1 :], root)
    print(table(cells), f"plot: {root / 'pareto.png'}, rows: {root / 'pareto.csv'}", sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Stopped:
        sys.exit("pareto: stopped; the same command goes on with the cells that are missing")
    except Exception as error:
        bad_input = bad_input_in(error)
        if bad_input is None:
            raise
        sys.exit(f"pareto: error: {one_line(str(bad_input))}")
