"""Another block, another architecture, another training: what stays the same? (docs/experiments/transfer.md)

Two language models on one text and two CNNs on the digits, trained anew for every seed. Two attention blocks of each
language model and one block of each CNN are decomposed with equal n_v, k, relative rank, steps and samples, twice each:
how two fits of one target differ, and how targets differ, is the noise that every other difference is held against.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import ks_2samp, spearmanr, t
from torch import Tensor, nn
from torch.func import jvp

from datamodules.digits import DigitsData
from datamodules.loading import Batch
from datamodules.text import TextData
from l3d_pl.analysis.interventions import natural_scale, random_directions, sweep
from l3d_pl.analysis.outputs import Direction, derivatives, only_positions
from l3d_pl.batch_topk import batch_topk
from l3d_pl.configs_path import shipped_configs
from l3d_pl.decomposition import Decomposition
from l3d_pl.divergence import make_divergence
from l3d_pl.experiments.common import COLOURS, Summary, cell, doing, spread
from l3d_pl.lightning_cli import train_target
from l3d_pl.lightning_module import L3D
from l3d_pl.targets.digits import DigitsCNN
from l3d_pl.targets.hub import language_model
from l3d_pl.targets.training import load_target
from l3d_pl.toys import fit_quietly

FITS = 2  # of each block and target
DRAWS = 4  # of references that a held-out sample is compared with
TOP, REST = 8, 24  # samples whose outputs a direction should move, and should not
MOVED = 0.5  # mean Σ|Δ probability| of the top samples that makes a finite step
BATCH = 128  # samples of a step: tokens, images
LENGTH = 16  # tokens of a sequence that is decomposed
HIDDEN = 64  # of both CNNs
CHANNELS = {"cnn_2": (16, 32), "cnn_3": (8, 16, 32)}
TEXT = {"gpt_neo": "pydoc_lm", "llama": "pydoc_llama"}  # {target: shipped config}

TEXT_BLOCKS = ("GPT-Neo, first", "GPT-Neo, last", "Llama, first", "Llama, last")
IMAGE_BLOCKS = ("CNN, 2 conv.", "CNN, 3 conv.")
BLOCKS = TEXT_BLOCKS + IMAGE_BLOCKS
FACTORS = {
    "block, GPT-Neo": (("GPT-Neo, last",), ("GPT-Neo, first",)),
    "block, Llama": (("Llama, last",), ("Llama, first",)),
    "architecture, first": (("Llama, first",), ("GPT-Neo, first",)),
    "architecture, last": (("Llama, last",), ("GPT-Neo, last",)),
    "architecture, CNN": (("CNN, 3 conv.",), ("CNN, 2 conv.",)),
    "digits or text": (IMAGE_BLOCKS, TEXT_BLOCKS),
}
"""{what differs: (blocks, minus those)}."""

CONTROLS = ("subnetwork", "gradient", "random, own", "random")
MEASURES = {
    "first": "derivative",
    "at_step": "step",
    "first_logits": "derivative of logits",
    "at_step_logits": "step in logits",
}
"""Of selectivity, {column: as it is called}: of probabilities, and of centred logits, which do not saturate."""
QUANTITIES = {
    "loss": "L",
    "dimension": "effective dimension of gradients",
    "dead": "dead share",
    "in_use": "number in use",
} | {
    f"{name} {measure}": f"{name}, {called}"
    for measure, called in MEASURES.items()
    for name in (*CONTROLS, "subnetwork / random, own")
}


@dataclass(frozen=True)
class Settings:
    """What can be set.

    Args:
        n_subnetworks, k, rank: of every decomposition; the rank is a share of each dimension.
        fit_steps: of `BATCH` samples each.
        width, layers, vocabulary: of both language models.
        text_steps: their training, of 512 tokens each.
        image_epochs: training of both CNNs.
        samples: held out, that everything is measured on; half of them for selectivity.
        directions: live subnetworks of each fit whose selectivity is measured.
        random: random directions for each of them.
    """

    n_subnetworks: int = 50
    k: float = 0.1
    rank: float = 0.1
    fit_steps: int = 70
    width: int = 64
    layers: int = 4
    vocabulary: int = 1000
    text_steps: int = 700
    image_epochs: int = 20
    samples: int = 320
    directions: int = 8
    random: int = 1


TINY = {
    "n_subnetworks": 6,
    "fit_steps": 3,
    "width": 16,
    "layers": 2,
    "vocabulary": 300,
    "text_steps": 2,
    "image_epochs": 1,
    "samples": 80,
    "directions": 1,
    "random": 1,
}


# -- targets and blocks ------------------------------------------------------------------------------------------------


def blocks_of(layers: int) -> dict[str, tuple[str, list[str]]]:
    """{block: (target, globs of its tensors)}, in the order of `BLOCKS`."""
    neo, llama = "transformer.h.{}.attn.attention.*_proj.weight", "model.layers.{}.self_attn.*_proj.weight"
    found = [(name, [glob.format(i)]) for name, glob in (("gpt_neo", neo), ("llama", llama)) for i in (0, layers - 1)]
    found += [(name, [f"conv{len(c)}.weight", "fc1.weight", "fc2.weight"]) for name, c in CHANNELS.items()]
    return dict(zip(BLOCKS, found, strict=True))


def target_of(name: str, settings: Settings, seed: int, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A target, trained into `folder` where it is not there yet; and figures that tell how well it does its task."""
    path = folder / (f"{name}_seed{seed}" + ("" if name in TEXT else ".safetensors"))
    if not path.exists():
        _train(name, settings, seed, path)
    if name in TEXT:
        facts = json.loads((path / "target.json").read_text())
        return language_model(str(path)), {key: facts[key] for key in ("loss", "bigram_loss")}
    model = DigitsCNN(CHANNELS[name], HIDDEN)
    load_target(path, model)
    batch = held_out(DigitsData(), 360)
    with torch.no_grad():
        return model, {"accuracy": float((model.eval()(batch["inputs"]).argmax(1) == batch["labels"]).double().mean())}


def _train(name: str, settings: Settings, seed: int, path: Path) -> None:
    if name in TEXT:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # (of a file that is written in a moment)
        given: dict[str, Any] = {
            **{f"model.model.init_args.{key}": getattr(settings, key) for key in ("width", "layers", "vocabulary")},
            "data.vocabulary": settings.vocabulary,
            "data.length": 32,
            "data.batch_size": 16,
            "data.n_val": 256,
            "data.max_sequences": 16 * settings.text_steps,  # (one pass, where there is as much text)
            "model.lr": 0.008,
            "trainer.max_epochs": 1000,
            "trainer.max_steps": settings.text_steps,
            "trainer.limit_val_batches": 0,
        }
        if name == "gpt_neo":
            given["model.model.init_args.dropout"] = 0  # (Llama has none)
    else:
        given = {
            "model.model.init_args.channels": list(CHANNELS[name]),
            "model.model.init_args.hidden": HIDDEN,
            "trainer.max_epochs": settings.image_epochs,
        }
    config = shipped_configs() / "targets" / f"{TEXT.get(name, 'digits_cnn')}.yaml"
    words = ["--config", str(config), "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false"]
    train_target([*words, *(f"--{key}={value}" for key, value in given.items())], str(path))


def data_of(target: str, settings: Settings, seed: int) -> TextData | DigitsData:
    """What a target is decomposed on, `BATCH` samples at a time."""
    if target in TEXT:
        return TextData(
            vocabulary=settings.vocabulary, length=LENGTH, batch_size=BATCH // LENGTH, n_val=None, seed=seed
        )
    return DigitsData(batch_size=BATCH, seed=seed)


def held_out(data: TextData | DigitsData, n: int) -> Batch:
    """A batch of n held-out samples, the same in every call: images, or one token of each of n sequences."""
    data.setup()
    random = torch.Generator().manual_seed(0)
    assert data.validation is not None
    rows = torch.randperm(len(data.validation), generator=random)[:n]  # type: ignore[arg-type]
    batch = data.validation[rows]
    if "sample_mask" in batch:
        counts = batch["sample_mask"]
        batch = {key: value[counts.any(1)] for key, value in batch.items()}
        positions = torch.multinomial(counts[counts.any(1)].double(), 1, generator=random).squeeze(1)
        batch = only_positions(batch, positions.tolist())
    return batch


# -- measures ----------------------------------------------------------------------------------------------------------


def in_use(p_act: Any) -> float:
    """exp of the entropy of P_act: how many subnetworks take part, if some more often count for more."""
    p = np.asarray(p_act, float)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def effective_dimension(gram: Tensor) -> float:
    """(Σλ)² / Σλ² of a Gram matrix of gradients, [N, N]."""
    gram = gram.double()
    return float(gram.trace().square() / gram.square().sum())


def chosen(strengths: Tensor, random: torch.Generator) -> Tensor:
    """`TOP` samples with the largest strength, then `REST` random ones of the half with the smallest; [TOP + REST].

    Fewer where there are fewer samples: never more than a quarter, and half.
    """
    order, n = strengths.argsort(descending=True), len(strengths)
    low = order[n - n // 2 :]
    return torch.cat([order[: min(TOP, n // 4)], low[torch.randperm(len(low), generator=random)[:REST]]])


def selectivity(changes: Tensor, n_top: int) -> float:
    """Mean change of the first n_top samples over that of the others; changes [N]."""
    return float(changes[:n_top].double().mean() / changes[n_top:].double().mean())


def by_outputs(shown: Callable[[Tensor], Tensor], outputs: Tensor, moved: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """How much each sample moves, by every one of `MEASURES`, {column: [N]}.

    Args:
        shown: logits to probabilities.
        outputs: logits [N, C]; `moved`: their derivative, likewise; `steps`: at some finite steps, [D, N, C].
    """
    away = steps - outputs
    return {
        "first": jvp(shown, (outputs,), (moved,))[1].abs().sum(1),
        "at_step": (shown(steps) - shown(outputs)).abs().sum(2).mean(0),
        "first_logits": (moved - moved.mean(1, keepdim=True)).abs().sum(1),
        "at_step_logits": (away - away.mean(2, keepdim=True)).abs().sum(2).mean(0),
    }


def ks(a: Any, b: Any) -> float:
    """Kolmogorov–Smirnov distance of two samples of P_act, in [0, 1]."""
    return float(ks_2samp(a, b).statistic)


# -- one seed ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, output: Path, seed: int) -> list[dict[str, Any]]:
    """Rows by `kind`: `target`, `fit`, `use` (P_act of every subnetwork), `direction` (selectivity)."""
    rows: list[dict[str, Any]] = []
    targets: dict[str, nn.Module] = {}
    for block, (name, parameters) in blocks_of(settings.layers).items():
        if name not in targets:
            doing(f"target {name}")
            targets[name], facts = target_of(name, settings, seed, output.parent / "targets")
            rows.append({"kind": "target", "target": name} | {f"target_{key}": value for key, value in facts.items()})
        batch = held_out(data_of(name, settings, seed), settings.samples)
        for fit in range(FITS):
            doing(f"{block}, fit {fit}")
            module = _fit(settings, targets[name], name, parameters, seed + 1000 * fit)
            # (a fit's own random directions, too: their spread is the controls' noise)
            rows += [{"block": block, "fit": fit} | row for row in look(module, batch, settings, seed + 1000 * fit)]
    return rows


def _fit(settings: Settings, target: nn.Module, name: str, parameters: list[str], seed: int) -> L3D:
    module = L3D(
        target,
        parameters,
        n_subnetworks=settings.n_subnetworks,
        k=settings.k,
        ranks=settings.rank,
        divergence="kl",
        sample="token" if name in TEXT else "item",
        scale_start=True,
        init_samples=1000,
        swap_samples=1000,
        seed=seed,
    )
    fit_quietly(module, data_of(name, settings, seed), max_steps=settings.fit_steps, limit_val_batches=0)
    return module


@torch.no_grad()
def look(module: L3D, batch: Batch, settings: Settings, seed: int) -> list[dict[str, Any]]:
    """The rows of one fit, from held-out samples."""
    v, names = module.subnetworks, list(module.subnetworks.shapes)
    losses, taking_part, impacts, gradients = [], [], [], []
    for draw in range(DRAWS):
        given = module.extractor(batch, torch.Generator().manual_seed(draw)).gradients
        prepared = v.prepare(given)
        c = v.coefficients(prepared)
        mask, _ = batch_topk(c, module.k)
        losses.append(float(v.reconstruct(prepared, c * mask).loss[0]))
        taking_part.append(mask[:, 0].double().mean(0))
        impacts.append(c[:, 0].abs())
        gradients.append(torch.cat([given[name].dense().flatten(1) for name in names], 1))
    p_act, impact = torch.stack(taking_part).mean(0), torch.stack(impacts).mean(0)
    fit: dict[str, Any] = {
        "kind": "fit",
        "loss": float(np.mean(losses)),
        "dimension": float(np.mean([effective_dimension(g @ g.T) for g in gradients])),
        "dead": float((p_act == 0).double().mean()),
        "in_use": in_use(p_act),
    }
    rows = [fit, *({"kind": "use", "subnetwork": k, "p_act": float(p)} for k, p in enumerate(p_act))]
    return rows + directions_of(module.decomposition(), batch, p_act, impact, gradients, settings, seed)


def directions_of(
    found: Decomposition,
    batch: Mapping[str, Tensor],
    p_act: Tensor,
    impact: Tensor,
    gradients: Sequence[Tensor],
    settings: Settings,
    seed: int,
) -> list[dict[str, Any]]:
    """Selectivity of some live subnetworks and of their controls, by all of `MEASURES`.

    Args:
        impact: of the samples of `batch`, [N, n_v].
        gradients: of each draw of references, [N, values]; tensors in the order of `found`.
    """
    random = torch.Generator().manual_seed(seed)
    live = (p_act > 0).nonzero().squeeze(1)
    live = live[torch.randperm(len(live), generator=random)[: settings.directions]]
    measured = torch.arange(1, len(impact), 2)  # the other samples make the gradient
    directions: list[tuple[int, str, Direction, Tensor]] = []
    for k in live.tolist():
        strengths = impact[measured, k]
        directions.append((k, "subnetwork", found.direction(k), strengths))
        directions.append((k, "gradient", top_gradient(found, k, gradients[0][::2]), strengths))
        for drawn in random_directions(found, k, settings.random, seed):
            line = _flat(drawn, found)
            own = torch.stack([(g[measured] @ line).abs() for g in gradients]).mean(0)
            directions += [(k, "random", drawn, strengths), (k, "random, own", drawn, own)]
    looks = [
        (v, _pick(batch, measured[chosen(strengths, random)[:TOP]]))
        for _, control, v, strengths in directions
        if control == "subnetwork"
    ][:4]
    step = natural_scale(found, looks, MOVED) if looks else 0.0
    logits = copy.copy(found)
    logits.divergence = make_divergence("mse")  # (of which the outputs to read are the model's)
    shown = partial(torch.softmax, dim=-1) if found.divergence.name == "kl" else torch.clone
    rows = []
    for k, control, direction, strengths in directions:
        places = chosen(strengths, random)
        n_top = len(places) - min(REST, len(strengths) // 2)
        some = _pick(batch, measured[places])
        steps = sweep(logits, some, [(step, direction), (-step, direction)]).outputs
        changes = by_outputs(shown, *derivatives(logits, some, direction), steps)
        row = {"kind": "direction", "subnetwork": k, "control": control, "step": step}
        rows.append(row | {measure: selectivity(values, n_top) for measure, values in changes.items()})
    return rows


def top_gradient(found: Decomposition, k: int, gradients: Tensor) -> dict[str, Tensor]:
    """Mean gradient of the `TOP` samples with the largest |V_in[k] . g|, each times its sign; of unit norm.

    Args:
        gradients: [N, values].
    """
    c = gradients @ _flat(found.subnetworks.direction(k, side="in"), found)
    most = c.abs().topk(min(TOP, len(c))).indices
    mean = c[most].sign() @ gradients[most]
    mean = mean / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
    shapes = found.subnetworks.shapes
    parts = mean.split([int(np.prod(shape)) for shape in shapes.values()])
    return {name: part.view(*shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _flat(direction: Direction, found: Decomposition) -> Tensor:
    return torch.cat([direction[name].flatten() for name in found.subnetworks.shapes])


def _pick(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


# -- what the seeds say ------------------------------------------------------------------------------------------------


def figures_of(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for every seed, block and fit, with the columns of `QUANTITIES`."""
    keys = ["seed", "block", "fit"]
    found = rows[rows["kind"] == "fit"].set_index(keys)[["loss", "dimension", "dead", "in_use"]]
    of_directions = rows[rows["kind"] == "direction"].groupby([*keys, "control"])
    for measure in MEASURES:
        medians = of_directions[measure].median().unstack("control")
        medians["subnetwork / random, own"] = medians["subnetwork"] / medians["random, own"]
        found = found.join(medians.add_suffix(f" {measure}"))
    return found.reset_index()


def spreads(figures: pd.DataFrame, quantity: str) -> tuple[float, float]:
    """Standard deviations of fits of one target, and of targets beyond that; root mean squares over blocks."""
    of_fits, of_targets = [], []
    for _, part in figures.groupby("block"):
        table = part.pivot(index="seed", columns="fit", values=quantity)
        fits = float(table.var(axis=1).mean())
        of_fits.append(fits)
        of_targets.append(max(0.0, float(table.mean(axis=1).var()) - fits / table.shape[1]))
    return float(np.mean(of_fits)) ** 0.5, float(np.mean(of_targets)) ** 0.5


def effects(figures: pd.DataFrame) -> pd.DataFrame:
    """Each factor's effect on each quantity, paired by seed (means of fits).

    Columns: `quantity`, `factor`, `effect` (mean), `sd` (of the pairs), `spread` (over seeds, of the blocks compared),
    `counts`: more than twice the spread, and of one sign in every seed.
    """
    found = []
    for quantity in QUANTITIES:
        table = figures.groupby(["seed", "block"])[quantity].mean().unstack("block")
        for factor, sides in FACTORS.items():
            first, second = (table[list(side)] for side in sides)
            pairs = first.mean(axis=1) - second.mean(axis=1)
            noise = float(np.sqrt(pd.concat([first, second], axis=1).var().mean()))
            effect = float(pairs.mean())
            one_sign = bool((pairs > 0).all() or (pairs < 0).all())
            line = {"quantity": quantity, "factor": factor, "effect": effect, "sd": float(pairs.std()), "spread": noise}
            found.append(line | {"counts": one_sign and abs(effect) > 2 * noise})
    return pd.DataFrame(found)


def by_chance(seeds: int, first: int = 1, second: int = 1) -> float:
    """How probable it is that noise alone, as large in all blocks, makes an effect of more than twice the spread.

    The difference of the means of so many blocks each over n seeds has a standard deviation of √((1 / first +
    1 / second) / n) of the spread, which has (first + second) (n - 1) degrees of freedom: Student's t. (That all seeds
    have one sign too is nearly always so then.)
    """
    deviation = ((1 / first + 1 / second) / seeds) ** 0.5
    return float(2 * t.sf(2 / deviation, (first + second) * (seeds - 1)))


def distances(rows: pd.DataFrame) -> pd.DataFrame:
    """KS distances of P_act of all pairs of fits: `fits` (of one target), `seeds` (of one block), or `blocks`."""
    use = {key: part["p_act"].to_numpy() for key, part in rows[rows["kind"] == "use"].groupby(["seed", "block", "fit"])}
    found = []
    for (one, p), (other, q) in combinations(use.items(), 2):
        (seed_a, block_a, _), (seed_b, block_b, _) = one, other
        if block_a == block_b:
            kind = "fits" if seed_a == seed_b else "seeds"
        elif seed_a == seed_b and len(use) > FITS * len(BLOCKS):
            continue  # fits of two blocks as of two seeds: other targets, other random numbers
        else:
            kind = "blocks"
        first, second = sorted((block_a, block_b), key=BLOCKS.index)
        found.append({"kind": kind, "a": first, "b": second, "ks": ks(p, q)})
    return pd.DataFrame(found)


def summarise(rows: pd.DataFrame) -> Summary:
    """A row for each quantity, with each block's figure and the noise; which factors count beyond it."""
    figures, table = figures_of(rows), []
    found, apart = effects(figures), distances(rows)
    verdict: dict[str, Any] = {}
    for quantity, text in QUANTITIES.items():
        means = figures.groupby(["block", "seed"])[quantity].mean()
        form = "{:.3f}" if quantity in ("loss", "dead") else "{:.1f}"
        of_fits, of_targets = spreads(figures, quantity)
        table.append(
            {"": text}
            | {block: spread(means[block], form) for block in BLOCKS}
            | {"spread of fits": form.format(of_fits), "of targets": form.format(of_targets)}
        )
        mine = found[(found["quantity"] == quantity) & found["counts"]]
        verdict[f"{text}: beyond the noise"] = (
            "; ".join(f"{factor} {effect:+.3g} ({size:.1f} spreads)" for factor, effect, size in
                      zip(mine["factor"], mine["effect"], mine["effect"].abs() / mine["spread"], strict=True))
            or "nothing"
        )  # fmt: skip
    verdict["effects looked at"] = len(found)
    verdict["of them beyond the noise"] = int(found["counts"].sum())
    can_count = found[found["spread"] > 0]["factor"].map(FACTORS)  # (not dead shares that are 0 everywhere)
    n_seeds = figures["seed"].nunique()
    verdict["of them by chance, if there were none"] = sum(by_chance(n_seeds, *map(len, sides)) for sides in can_count)
    means = figures.groupby(["seed", "block"])[["loss", "dimension"]].mean()
    ranks = [float(spearmanr(part["loss"], part["dimension"])[0]) for _, part in means.groupby("seed")]
    verdict["rank correlation of L with effective dimension, six blocks"] = spread(ranks, "{:.2f}")
    for measure, called in MEASURES.items():
        above = figures.groupby(["seed", "block"])[f"subnetwork / random, own {measure}"].mean() > 1
        verdict[f"seeds and blocks where subnetworks are above random, own, {called}"] = float(above.mean())
    for kind in ("fits", "seeds"):
        mine = apart[apart["kind"] == kind]
        verdict[f"P_act, KS between {kind}"] = spread(mine["ks"], "{:.2f}")
    pairs = apart[apart["kind"] == "blocks"].groupby(["a", "b"])["ks"].mean()
    for kind, one, other in (
        ("blocks of text", TEXT_BLOCKS, TEXT_BLOCKS),
        ("the CNNs", IMAGE_BLOCKS, IMAGE_BLOCKS),
        ("text and digits", TEXT_BLOCKS, IMAGE_BLOCKS),
    ):
        values = pairs[[a in one and b in other for a, b in pairs.index]]
        verdict[f"P_act, KS between {kind}"] = float(values.mean())
        verdict[f"P_act, KS between {kind}, furthest pair"] = f"{values.max():.2f}, {' and '.join(values.idxmax())}"
    targets = rows[rows["kind"] == "target"]
    for name, part in targets.groupby("target"):
        for column in [c for c in part if str(c).startswith("target_")]:
            if part[column].notna().any():
                verdict[f"target {name}: {str(column).removeprefix('target_')}"] = spread(part[column])
    found["in spreads"] = [
        cell(size) if math.isnan(size) else f"**{size:+.1f}**" if counts else f"{size:+.1f}"
        for size, counts in zip(found["effect"] / found["spread"], found["counts"], strict=True)
    ]
    found["quantity"] = found["quantity"].map(QUANTITIES)
    sizes = found.pivot(index="quantity", columns="factor", values="in spreads")
    sizes = sizes.loc[list(QUANTITIES.values()), list(FACTORS)].reset_index()
    plots = {"transfer": draw(rows, figures, found)}
    return Summary(pd.DataFrame(table), plots, verdict, {"effects": sizes})


def draw(rows: pd.DataFrame, figures: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Loss against effective dimension; selectivity; sorted P_act; effects in units of the noise."""
    figure = Figure(figsize=(15, 14), layout="constrained")
    grid = figure.add_gridspec(3, 4, height_ratios=(0.8, 0.8, 1.4))
    select = [figure.add_subplot(grid[0, 0])]
    select += [figure.add_subplot(grid[0, i], sharey=select[0]) for i in range(1, len(MEASURES))]
    loss, use, map_ = (figure.add_subplot(place) for place in (grid[1, :2], grid[1, 2:], grid[2, :]))
    for colour, block in zip(COLOURS, BLOCKS, strict=False):
        mine = figures[figures["block"] == block]
        loss.plot(mine["dimension"], mine["loss"], "o", color=colour, markersize=5, alpha=0.7, label=block)
        p = rows[(rows["kind"] == "use") & (rows["block"] == block)].groupby(["seed", "fit"])["p_act"]
        lines = np.stack([np.sort(part.to_numpy())[::-1] for _, part in p])
        places = np.arange(1, lines.shape[1] + 1)
        use.plot(places, lines.mean(0), color=colour, label=block)
        use.fill_between(places, lines.min(0), lines.max(0), color=colour, alpha=0.12, linewidth=0)
    loss.set(xlabel="effective dimension of the gradients", ylabel="L on held-out samples", title="a dot: one fit")
    loss.legend(frameon=False, fontsize=8.5, loc="lower right")
    use.set(xlabel="subnetwork, most active first", ylabel="P_act", title="mean and range of all fits", ylim=(0, None))
    for axes, (measure, called) in zip(select, MEASURES.items(), strict=True):
        for colour, control, shift in zip(COLOURS, CONTROLS, (-0.24, -0.08, 0.08, 0.24), strict=False):
            means = figures.groupby(["block", "seed"])[f"{control} {measure}"].mean().unstack("seed").loc[list(BLOCKS)]
            at = np.arange(len(BLOCKS)) + shift
            for seed in means:
                axes.plot(at, means[seed], "o", color=colour, markersize=3, alpha=0.5)
            axes.plot(at, means.mean(axis=1), "_", color=colour, markersize=11, markeredgewidth=2.2, label=control)
        axes.axhline(1, color="#8c959f", linewidth=0.7, zorder=0)
        axes.set_yscale("log")
        ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xticks(range(len(BLOCKS)), BLOCKS, fontsize=8, rotation=35, ha="right")
        axes.set(ylabel="selectivity; a dot: one seed", title=f"by {called}")
    select[0].legend(frameon=False, fontsize=8.5, loc="lower left")
    size = (found["effect"] / found["spread"]).to_numpy().reshape(len(QUANTITIES), len(FACTORS))
    counts = found["counts"].to_numpy().reshape(size.shape)
    map_.imshow(np.clip(np.nan_to_num(size), -8, 8), cmap="RdBu_r", vmin=-8, vmax=8, aspect="auto")
    for i, j in np.ndindex(size.shape):
        weight, colour = ("bold" if counts[i, j] else "normal"), ("white" if abs(size[i, j]) > 5.5 else "black")
        text = f"{size[i, j]:+.1f}" if np.isfinite(size[i, j]) else "–"
        map_.text(j, i, text, ha="center", va="center", fontsize=8.5, color=colour, fontweight=weight)
    map_.set_xticks(range(len(FACTORS)), [factor.replace(", ", ",\n").replace(" or ", "\nor ") for factor in FACTORS])
    map_.set_yticks(range(len(QUANTITIES)), list(QUANTITIES.values()))
    map_.tick_params(labelsize=8.5)
    map_.set_title("effects in spreads over seeds; bold: beyond the noise")
    return figure
