"""Are two runs the same? Subnetworks matched one to one by |cos|, from the factors, without a dense direction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from l3d_pl.analysis.runs import fingerprints_of, load_run
from l3d_pl.analysis.tables import made_by, replace, write_manifest
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.subnetworks import Directions, Subnetworks


@torch.no_grad()
def cosines(a: Directions, b: Directions) -> Tensor:
    """cos of all subnetworks of one side with all of another over the tensors that both have, [n_a, n_b].

    Raises:
        L3DError: no tensor is in both with the same shape.
    """
    mine, its = a.tuckers(), b.tuckers()
    shared = [name for name in mine if name in its and mine[name].shape == its[name].shape]
    if not shared:
        first = next(iter(mine))
        raise L3DError(
            f"compare: no tensor is decomposed in both with one shape; the one has {first} {list(mine[first].shape)}, "
            f"the other {', '.join(list(its)[:4])}{did_you_mean(first, its)}"
        )
    gram = torch.stack([mine[name].gram(its[name]) for name in shared]).sum(0)
    squares = [torch.stack([side[name].squared_norms() for name in shared]).sum(0) for side in (mine, its)]
    return gram / torch.outer(*squares).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()


def match(cos: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one matching of highest total |cos| (Hungarian): places in both, ordered by the first."""
    rows, columns = linear_sum_assignment(cos.detach().abs().cpu().double().numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


@dataclass
class Comparison:
    """Two runs matched.

    Attributes:
        rows: `subnetwork`, `other` and their `cos`; `p_act` of both.
        noise: |cos| of the first run's subnetworks matched with as many random ones of the second's ranks, [pairs].
    """

    rows: pd.DataFrame
    noise: Tensor

    @property
    def figures(self) -> dict[str, float]:
        """Mean and median |cos|, the share of pairs above all noise, and the noise itself."""
        found = torch.tensor(self.rows["cos"].abs().to_numpy())
        return {
            "mean_cos": float(found.mean()),
            "median_cos": float(found.median()),
            "above_noise": float((found > float(self.noise.max())).double().mean()),
            "noise_mean": float(self.noise.mean()),
            "noise_max": float(self.noise.max()),
        }


@torch.no_grad()
def compare(a: Decomposition, b: Decomposition, seed: int = 0) -> Comparison:
    """Match the subnetworks of two decompositions: other seeds, numbers of subnetworks, ranks, checkpoints."""
    cos = cosines(a.subnetworks.v_out, b.subnetworks.v_out)
    mine, its = match(cos)
    ranks = {name: list(ranks) or 1 for name, ranks in b.subnetworks.ranks.items()}
    random = torch.Generator().manual_seed(seed)
    drawn = Subnetworks(b.subnetworks.shapes, b.n_subnetworks, ranks, generator=random)
    drawn = drawn.to(next(b.subnetworks.parameters()))
    noise = cosines(a.subnetworks.v_out, drawn.v_out)
    rows = pd.DataFrame(
        {
            "subnetwork": mine.numpy(),
            "other": its.numpy(),
            "cos": cos[mine, its].double().cpu().numpy(),
            "p_act": a.p_act[mine].double().cpu().numpy(),
            "other_p_act": b.p_act[its].double().cpu().numpy(),
        }
    )
    return Comparison(rows, noise[match(noise)].abs().double().cpu())


def draw(found: Comparison, path: Path, names: tuple[str, str]) -> None:
    """A picture of the matched |cos|, highest first, with the noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    cos = found.rows["cos"].abs().sort_values(ascending=False).to_numpy()
    noise = found.noise.sort(descending=True).values.numpy()
    axes.plot(range(1, len(cos) + 1), cos, marker="o", markersize=3, color="#0072b2", label=f"{names[0]}, {names[1]}")
    axes.plot(range(1, len(noise) + 1), noise, linestyle="--", color="#d55e00", label="random directions")
    axes.set(xlabel="pair of subnetworks, best match first", ylabel="|cos|", ylim=(0, 1.03))
    axes.legend(frameon=False)
    replace(path, lambda aside: figure.savefig(aside, format="png", dpi=150))
    plt.close(figure)


def compare_runs(run_a: Path, run_b: Path, seed: int = 0) -> Path:
    """`l3d compare`: a table, a manifest and a picture in `<run_a>/analysis/compare`; prints the figures.

    They are named after run_b; of a run that lies elsewhere with its fingerprint, as two folders may have one name.
    """
    a, b = load_run(run_a), load_run(run_b)
    found, prints = compare(a, b, seed), [fingerprints_of(side) for side in (a, b)]
    names = run_a.resolve().name, run_b.resolve().name
    folder = run_a / "analysis" / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    is_beside = run_a.resolve().parent == run_b.resolve().parent
    name = names[1] if is_beside else f"{names[1]}-{str(prints[1]['decomposition'])[:8]}"
    (folder / f"{name}.json").unlink(missing_ok=True)
    replace(folder / f"{name}.csv", lambda path: found.rows.to_csv(path, index=False))
    replace(folder / f"{name}.parquet", lambda path: found.rows.to_parquet(path, index=False))
    draw(found, folder / f"{name}.png", names)
    runs = [{"run": str(run), **its} for run, its in zip((run_a, run_b), prints, strict=True)]
    write_manifest(folder, {"runs": runs, "seed": seed, "figures": found.figures} | made_by(), f"{name}.json")
    print_comparison(found, names)
    return folder / f"{name}.png"


def print_comparison(found: Comparison, names: tuple[str, str]) -> None:
    figures: dict[str, Any] = found.figures
    table = Table(title=f"{names[0]} and {names[1]}: {len(found.rows)} pairs", title_justify="left", show_header=False)
    table.add_row("|cos|, mean and median", f"{figures['mean_cos']:.3f}, {figures['median_cos']:.3f}")
    table.add_row("random directions, mean and highest", f"{figures['noise_mean']:.3f}, {figures['noise_max']:.3f}")
    table.add_row("pairs above all random ones", f"{figures['above_noise']:.0%}")
    Console(soft_wrap=True).print(table)
