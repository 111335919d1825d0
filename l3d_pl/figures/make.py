"""`l3d figures RUN`: the figures of a toy run, in `RUN/figures`; the atlas shows them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from l3d_pl.analysis.runs import load_run, settings_of
from l3d_pl.atlas.pictures import Picture, directions, networks
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.figures import draw
from l3d_pl.figures.effects import Toy, open_toy
from l3d_pl.figures.sweeps import cells_in, fit_grid, last_validation, made_by_in, save
from l3d_pl.targets.frozen import fingerprint

FOLDER, WORDS, SWEPT = "figures", "figures.json", "sweeps"
SWEEPS = {"rank": "rank of every tensor", "n_v": "n_v, number of subnetworks"}
RANKS = range(1, 7)  # those of the paper; as far as the smallest matrix has them
N_V = (0.6, 1, 2, 3)  # of the run's own: 3, 5, 10, 15 for 5


def make_figures(run_dir: Path, track: Callable[[Iterable[str]], Iterable[str]] = iter) -> list[Picture | str]:
    """Draw what the run has data for into `run_dir/figures`; a sentence in place of one that cannot be drawn.

    Beside the PNGs `figures.json` keeps their words and whose they are. Sweeps are drawn where `sweep` has made them.

    Args:
        track: wraps the names of the figures, for a progress bar.

    Raises:
        L3DError: no finished toy run, or its target is gone.
    """
    toy, folder = open_toy(run_dir), run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    makers = _makers(toy)
    ours = made_by_in(folder / SWEPT)[:1] == [_mark(toy.decomposition)]
    cells = cells_in(folder / SWEPT) if ours else []
    for by in SWEEPS:
        chosen = [cell for cell in cells if by in cell]
        if len(chosen) > 1:
            makers[f"loss_{by}"] = partial(draw.swept, cells=chosen, by=by, label=SWEEPS[by])
    drawn: list[Picture | str] = []
    for name in track(makers):
        try:
            drawn.append(makers[name](folder / f"{name}.png"))
        except L3DError as error:
            drawn.append(f"No figure {name}: {error}")
    words = [
        {"file": made.path.name, "alt": made.alt, "caption": made.caption}
        for made in drawn
        if isinstance(made, Picture)
    ]
    save(folder / WORDS, {"decomposition": fingerprint(toy.decomposition.subnetworks), "figures": words})
    return drawn


def _makers(toy: Toy) -> dict[str, Callable[[Path], Picture]]:
    v_out, circuits = toy.decomposition.directions(), toy.score.circuits()
    makers: dict[str, Callable[[Path], Picture]] = {
        "networks": lambda path: networks(
            path, v_out, toy.target, circuits=circuits, alive=toy.decomposition.p_act > 0
        ),
        "directions": lambda path: directions(path, v_out, toy.target, group_size=toy.group_size),
    }
    if toy.task == "tmcs":
        makers["A_hat"] = partial(draw.read_a, toy=toy)
    return makers | {
        "intervention": partial(draw.intervention, toy=toy),
        "hidden_layers": partial(draw.hidden_layers, toy=toy),
        "delta": partial(draw.against_delta, toy=toy),
        "several": partial(draw.several, toy=toy),
    }


def sweep(
    run_dir: Path,
    ranks: Sequence[int] | None = None,
    n_v: Sequence[int] | None = None,
    max_epochs: int | None = None,
) -> None:
    """Fits of the run's own config with other ranks, and with other n_v, into `run_dir/figures/sweeps`.

    Those that are there are kept.

    Args:
        ranks, n_v: default: 1 to 6, as far as the tensors allow; 0.6, 1, 2, 3 times the run's own.
        max_epochs: default: the run's own.

    Raises:
        L3DError: no finished toy run, a value below 1, or fits of another length are there.
    """
    decomposition, config = load_run(run_dir), run_dir / "config.yaml"
    if not config.is_file():
        raise L3DError(f"sweeps: there is no {config}; it is written by `l3d fit`")
    for name, values in (("ranks", ranks), ("n_v", n_v), ("max_epochs", [max_epochs] if max_epochs else None)):
        if any(value < 1 for value in values or ()):
            raise L3DError(f"{name}: found {min(values or ())}, allowed are whole numbers >= 1")
    shapes = decomposition.subnetworks.shapes.values()
    smallest = min((min(shape) for shape in shapes if len(shape) > 1), default=1)
    ranks = [r for r in RANKS if r <= smallest] if ranks is None else ranks
    n_v = [round(share * decomposition.n_subnetworks) for share in N_V] if n_v is None else n_v
    fits: dict[str, Callable[[Path], dict[str, Any]]] = {}
    more = [] if max_epochs is None else ["--trainer.max_epochs", str(max_epochs)]
    weights = (settings_of(decomposition).get("model") or {}).get("target_weights")
    target = ["--model.target_weights", weights] if weights else []
    for by, option, values in (("rank", "ranks", ranks), ("n_v", "n_subnetworks", n_v)):
        for value in sorted({v for v in values if v >= 1}):
            arguments = ["--config", str(config), f"--model.{option}", str(value), *target, *more]
            fits[f"{by}_{value}"] = partial(_fit, arguments, {by: value})
    root = run_dir / FOLDER / SWEPT
    remedy = f"remove {root}, or give what it was made with"
    fit_grid(root, [_mark(decomposition), *more], fits, remedy)


def _mark(decomposition: Decomposition) -> str:
    """Whose sweeps they are."""
    return f"decomposition {fingerprint(decomposition.subnetworks)[:16]}"


def _fit(arguments: Sequence[str], cell: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One fit, quietly: its loss and how many subnetworks live."""
    from l3d_pl.lightning_cli import L3DCLI

    quiet = ["--trainer.logger", "true", "--trainer.enable_progress_bar", "false", "--ckpt_path", "null"]
    before, start = os.environ.get("L3D_QUIET_SUMMARY"), time.perf_counter()
    os.environ["L3D_QUIET_SUMMARY"] = "1"
    try:
        cli = L3DCLI(["fit", *arguments, *quiet, "--trainer.default_root_dir", str(folder)])
    finally:
        if before is None:
            del os.environ["L3D_QUIET_SUMMARY"]
    live = int((load_run(folder).p_act > 0).sum())
    figures = {"loss": last_validation(folder)["val/loss"], "live": live, "steps": cli.trainer.global_step}
    return {**cell, **figures, "seconds": time.perf_counter() - start}
