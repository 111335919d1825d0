"""`l3d analyze`: everything about a run's subnetworks, as the tables of `tables.py`.

First a pass over the data (`survey.py`); then the samples that it has chosen are looked at more closely, subnetwork by
subnetwork. Both are shared by all ranks and taken up again where they were stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from l3d_pl.analysis.attribution import attribution
from l3d_pl.analysis.interventions import (
    GRID,
    Sweep,
    curve_rows,
    direction_of,
    effect_rows,
    mean_rows,
    named_outputs,
    natural_scale,
    random_directions,
    sweep,
)
from l3d_pl.analysis.items import MANY_NAMES, input_of, item_rows, kind_of, length_of_text, output_names, window
from l3d_pl.analysis.locality import local_to, locality_rows, slopes
from l3d_pl.analysis.outputs import derivatives, most_affected, only_positions, outputs_of, probabilities
from l3d_pl.analysis.runs import Entries, Run, checksums, fingerprints_of, placed
from l3d_pl.analysis.stability import cosines
from l3d_pl.analysis.survey import (
    Settings,
    Survey,
    extractor_of,
    identity_of,
    progress,
    samples_of,
    shared,
    take_survey,
)
from l3d_pl.analysis.tables import MANIFEST, made_by, write_manifest, write_table
from l3d_pl.decomposition import Decomposition
from l3d_pl.gradients.samples import choose_samples
from l3d_pl.parallel import ALONE, Ranks

Rows = dict[str, Any]  # {table: a list of rows, or a frame}
NEIGHBOURS, TOGETHER = 20, 5  # others listed for each subnetwork: the nearest by |cos|, and the most co-active
SHOWN = {"top": 8, "middle": 4}  # samples whose most affected outputs are told
TRIED, ENOUGH = 12, 0.75  # the largest step moves half of so many subnetworks' top samples by this, of 2 at most
MOST = 5  # outputs raised, and lowered, that are listed
EFFECTS = 2  # top samples whose outputs are shown against delta, with a random one beside them


def analyse(
    run: Run,
    settings: Settings,
    split: str = "val",
    limit: int | None = None,
    attributed: int = 3,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `<run>/analysis` and return it.

    Args:
        split: `train`, `val` or `test`.
        limit: only the first so many entries of it.
        attributed: top samples of each subnetwork whose inputs are attributed; 0: none.
        ranks: who shares the work; each has opened the run itself.
    """
    folder, entries = run.folder / "analysis", run.entries(split, limit)
    place = f"{ranks.rank}-of-{ranks.size}"
    survey_file, closer_file = folder / f".survey-{place}.safetensors", folder / f".closer-{place}.jsonl"
    survey = take_survey(run.decomposition, entries, settings, ranks, survey_file)
    closer = Closer(run, entries, survey, attributed)
    identity = identity_of(run.decomposition, entries, settings, ranks) + f" {attributed}"
    rows, deltas = closer.look(Journal(closer_file, identity), ranks)
    if ranks.rank == 0:
        (folder / MANIFEST).unlink(missing_ok=True)  # until all tables are there
        rows |= tables_of(run.decomposition, survey) | {"items": closer.items()}
        by_subnetwork: dict[int, list[dict[str, Any]]] = {}
        for row in rows["locality"]:
            by_subnetwork.setdefault(row["subnetwork"], []).append(row)
        for row in rows["subnetworks"]:
            row["local_to"] = local_to(by_subnetwork[row["subnetwork"]])
        names = closer.names
        if len(names) > MANY_NAMES:
            rows["outputs_names"] = [{"output": i, "name": name} for i, name in enumerate(names)]
        written = {name: write_table(folder, name, rows[name]) for name in sorted(rows)}
        write_manifest(folder, manifest_of(run, closer, survey, split, limit, deltas, written))
    ranks.gather(None)  # nobody removes what another may still read
    survey_file.unlink(missing_ok=True)
    closer_file.unlink(missing_ok=True)
    return folder


class Journal:
    """What has been found out so far, a line of JSON for each piece of work; taken up again if it is of this work."""

    def __init__(self, path: Path, identity: str):
        self.path, self.done = path, dict[str, Any]()
        lines = path.read_text().splitlines() if path.is_file() else []
        if lines and lines[0] == identity:
            for line in lines[1:]:
                try:
                    key, value = json.loads(line)
                except ValueError:  # the last one, cut off
                    break
                self.done[key] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [identity, *(json.dumps([key, value]) for key, value in self.done.items())]
        path.write_text("\n".join(kept) + "\n")

    def get(self, key: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, done now or before."""
        if key not in self.done:
            self.done[key] = work()
            with open(self.path, "a") as file:
                file.write(json.dumps([key, self.done[key]]) + "\n")
        return self.done[key]


class Closer:
    """A closer look at the samples that a survey has chosen."""

    def __init__(self, run: Run, entries: Entries, survey: Survey, attributed: int):
        self.run, self.entries, self.survey, self.attributed = run, entries, survey, attributed
        self.decomposition, self.extractor = run.decomposition, extractor_of(run.decomposition)
        self.device = next(self.decomposition.subnetworks.parameters()).device
        self.chosen = [survey.chosen(k) for k in range(self.decomposition.n_subnetworks)]
        self.shown: dict[int, set[int]] = {}  # entry -> the subnetworks that show it
        self.marked: dict[int, set[int]] = {}  # entry -> positions that are shown
        self.background = survey.background(0)  # of all subnetworks the same, but for where they are active
        known = {row["sample"]: row["checksum"] for row in self.background}
        for k, kinds in enumerate(self.chosen):
            for row in (row for rows in kinds.values() for row in rows):
                self.shown.setdefault(row["sample"], set()).add(k)
                self.marked.setdefault(row["sample"], set()).add(row["position"])
                known[row["sample"]] = row["checksum"]
        entries.keep(sorted(known))
        if not entries.is_indexed:
            entries.require_same(known)
        batch = self.pick(self.background)
        self.kind = kind_of(batch)
        own, outputs = self._outputs(batch)
        self.reference = self._reference(own)
        self.output_size = 1.0 if self.decomposition.divergence.name == "kl" else float(outputs.max() - outputs.min())
        self.names = output_names(self.decomposition.target, run.data, outputs.shape[1], self.kind)
        self.strangers = input_of(batch) if self.kind == "text" else None
        self.gradient = survey.mean_gradient()

    def pick(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """A batch of chosen samples, in their order; of token samples each sequence with its own position only."""
        batch = placed(self.entries.pick([row["sample"] for row in rows]), self.device)
        return only_positions(batch, [row["position"] for row in rows])

    def _outputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Each sample's own output, and its outputs to read."""
        output = outputs_of(self.decomposition.target, batch)
        samples = choose_samples(self.decomposition.sample, batch, output, None, None)
        return samples.outputs(output.float()), probabilities(self.decomposition.divergence, output, samples)

    def _reference(self, own: Tensor) -> Tensor:
        """The mean output, [1, ...]: of the held-out data, or else of the random samples."""
        if self.decomposition.mean_reference is not None:
            return self.decomposition.mean_reference.unsqueeze(0)
        divergence = self.decomposition.divergence
        return divergence.from_mean(divergence.to_mean(own).nanmean(0, keepdim=True))

    # -- the work, piece by piece -----------------------------------------------------------------------------------

    def look(self, journal: Journal, ranks: Ranks) -> tuple[Rows, list[float]]:
        """The tables that need the model again (of all ranks), and the steps of the interventions."""
        n = self.decomposition.n_subnetworks
        mine = shared(range(n), ranks)
        made = ("outputs", "outputs_summary", "curves", "effects", "locality", "attribution")
        found: Rows = {name: [] for name in made}
        found |= {"token_coefficients": []} if self.decomposition.sample == "token" else {}
        with progress("outputs", len(mine), ranks) as advance:
            for k in mine:
                part = journal.get(f"outputs {k}", lambda k=k: self.outputs(k))  # type: ignore[misc]
                found = {name: rows + part.get(name, []) for name, rows in found.items()}
                advance()
        scale = ranks.gather(journal.get("scale", self.scale))[0]
        deltas = [float(f"{scale * step:.6g}") for step in GRID]
        with progress("interventions", len(mine), ranks) as advance:
            for k in mine:
                named = journal.done[f"outputs {k}"]["named"]
                part = journal.get(f"moved {k}", lambda k=k, named=named: self.moved(k, deltas, named))  # type: ignore[misc]
                found = {name: rows + part.get(name, []) for name, rows in found.items()}
                advance()
        if self.decomposition.sample == "token":
            batches = list(_cut(sorted(self.shown), self.survey.settings.batch_size))
            with progress("tokens", len(batches), ranks) as advance:
                for b, part in shared(list(enumerate(batches)), ranks):
                    found["token_coefficients"] += journal.get(f"tokens {b}", lambda part=part: self.tokens(part))  # type: ignore[misc]
                    advance()
        parts = ranks.gather(found)
        joined = {name: [row for part in parts for row in part[name]] for name in found}
        return {name: sorted(rows, key=_order) for name, rows in joined.items()}, deltas

    def scale(self) -> float:
        """The largest step of the interventions, from some of the subnetworks that are active most."""
        often = self.survey.counts["active_pairs"].sort(descending=True, stable=True).indices[:TRIED].tolist()
        looks = [(self.decomposition.direction(k), self.pick(self.chosen[k]["top"])) for k in often]
        return natural_scale(self.decomposition, looks, ENOUGH * self.output_size)

    def outputs(self, k: int) -> Rows:
        """Rows of `outputs` and `outputs_summary` of a subnetwork, and the outputs `named` for its top samples."""
        top = self.chosen[k]["top"]
        rows = [*top, *self.chosen[k]["middle"][: SHOWN["middle"]]]
        outputs, moved = derivatives(self.decomposition, self.pick(rows), self.decomposition.direction(k))
        result = []
        for place, (row, affected) in enumerate(zip(rows, most_affected(outputs, moved, MOST), strict=True)):
            kind, i = ("top", place) if place < len(top) else ("middle", place - len(top))
            if i < SHOWN[kind]:
                where = {
                    "subnetwork": k,
                    "kind": kind,
                    "place": i,
                    "sample": row["sample"],
                    "position": row["position"],
                }
                result += [where | output | {"name": self.names[output["output"]]} for output in affected]
        named = named_outputs(moved[: len(top)])
        return {
            "outputs": result,
            "outputs_summary": self._summary(k, moved[: len(top)]),
            "named": None if named is None else named.tolist(),
        }

    def _summary(self, k: int, moved: Tensor) -> list[dict[str, Any]]:
        """The outputs of highest mean derivative over the top samples, from `moved` [M, n_outputs]."""
        mean = moved.double().mean(0, keepdim=True)
        (rows,) = most_affected(mean, mean, MOST)
        return [
            {
                "subnetwork": k,
                "direction": row["direction"],
                "rank": row["rank"],
                "output": row["output"],
                "name": self.names[row["output"]],
                "derivative": row["derivative"],
                "samples": int((moved[:, row["output"]] * row["derivative"] > 0).sum()),
            }
            for row in rows
        ]

    def moved(self, k: int, deltas: list[float], named: list[list[int]] | None) -> Rows:
        """Rows of `curves`, `effects`, `locality` and `attribution` of a subnetwork; `named` as `outputs` says."""
        top = self.chosen[k]["top"]
        batch = self.pick([*top, *self.background])
        relevant = torch.arange(len(top))
        background = len(top) + torch.arange(len(self.background))
        active = torch.tensor([row["active"] for row in self.survey.background(k)], dtype=torch.bool)
        v = direction_of(self.decomposition, {k: 1.0})
        far = background[~active][:1].tolist()  # a sample in which it is inactive
        shown = [*range(min(EFFECTS, len(top))), *far]
        outputs = None if named is None else torch.tensor(named)
        own = sweep(self.decomposition, batch, [(delta, v) for delta in deltas], self.reference, outputs, shown)
        controls = random_directions(self.decomposition, k, self.survey.settings.controls, self.survey.settings.seed)

        def curve(found: Sweep) -> list[dict[str, Any]]:
            return curve_rows(found, relevant, background[~active], background)

        alone = [
            curve(sweep(self.decomposition, batch, [(delta, u) for delta in deltas], named=outputs, shown=()))
            for u in (*controls, self.gradient)
        ]
        curves = {"subnetwork": curve(own), "random": mean_rows(alone[:-1]), "gradient": alone[-1]}
        where = [(row["sample"], row["position"]) for row in [*top, *self.background]]
        slope = slopes(self.decomposition, self.extractor, batch, self.reference, k)
        return {
            "curves": [
                {"subnetwork": k, "control": control, **row} for control, rows in curves.items() for row in rows
            ],
            "effects": [{"subnetwork": k, **row} for row in effect_rows(own, [where[i] for i in shown], self.names)],
            "locality": [{"subnetwork": k, **row} for row in locality_rows(own, slope, relevant)],
            "attribution": self.attribution(k),
        }

    def attribution(self, k: int) -> list[dict[str, Any]]:
        rows = self.chosen[k]["top"][: self.attributed]
        if not rows:
            return []
        batch, firsts = self.entries.pick([row["sample"] for row in rows]), None
        if self.kind == "text":  # as its item begins
            firsts = [window(length_of_text(batch, i), self.marked[row["sample"]])[0] for i, row in enumerate(rows)]
        found = attribution(
            self.decomposition,
            self.extractor,
            placed(batch, self.device),
            [row["position"] for row in rows],
            [k] * len(rows),
            self.reference,
            self.strangers,
            self.survey.settings.batch_size,
            firsts,
        )
        return [
            {
                "subnetwork": k,
                "sample": row["sample"],
                "position": row["position"],
                "values": values.tolist(),
                "height": height,
                "width": width,
            }
            for row, (values, height, width) in zip(rows, found, strict=True)
        ]

    @torch.no_grad()
    def tokens(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of `token_coefficients` of some sequences: against the mean reference, all counted positions."""
        batch = placed(self.entries.pick(entries), self.device)
        extraction = self.extractor(batch, references=self.reference)
        subnetworks = self.decomposition.subnetworks
        c = subnetworks.coefficients(subnetworks.prepare(extraction.gradients))[:, 0].cpu()
        sample, position = samples_of(extraction)
        rows = []
        for i, entry in enumerate(entries):
            mine = sample == i
            rows += [
                {
                    "subnetwork": k,
                    "sample": entry,
                    "positions": position[mine].tolist(),
                    "coefficients": c[mine, k].tolist(),
                }
                for k in sorted(self.shown[entry])
            ]
        return rows

    def items(self) -> list[dict[str, Any]]:
        """Rows of `items`: every sample that is shown, once."""
        rows: list[dict[str, Any]] = []
        for part in _cut(sorted(self.shown), self.survey.settings.batch_size):
            rows += item_rows(self.entries.pick(part), part, self.run.data, self.marked)
        for row in rows:
            row["checksum"] = int(checksums(self.entries.pick([row["sample"]]))[0])
        return rows


def _cut(items: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(items[i : i + size]) for i in range(0, len(items), size))


CONTROLS = ("subnetwork", "random", "gradient")


def _order(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows of a subnetwork together, in the order in which they were made, whichever rank made them."""
    return (
        row["subnetwork"],
        CONTROLS.index(row.get("control", "subnetwork")),
        row["sample"] if "positions" in row else 0,
    )


# -- what the survey alone says ----------------------------------------------------------------------------------------


@torch.no_grad()
def tables_of(decomposition: Decomposition, survey: Survey) -> Rows:
    """The tables that a survey and the decomposition itself make."""
    cos = cosines(decomposition.subnetworks.v_out, decomposition.subnetworks.v_out).double().cpu()
    return {
        "subnetworks": _subnetworks(survey, cos),
        "norm_shares": _norm_shares(decomposition),
        "histograms": [
            {"subnetwork": k, "bin_low": low, "bin_high": high, "count": count}
            for k in range(len(cos))
            for low, high, count in survey.histogram.of(k)
        ],
        "similarity": _similarity(survey, cos),
        "coactivation": _coactivation(survey),
        "map": [{"subnetwork": k, "x": x, "y": y} for k, (x, y) in enumerate(layout(cos.abs()).tolist())],
        "samples": [
            {"subnetwork": k, "kind": kind, "place": place}
            | {name: row[name] for name in row if name not in ("score", "checksum")}
            for k in range(len(cos))
            for kind, rows in survey.chosen(k).items()
            for place, row in enumerate(rows)
        ],
        "background": [
            {"subnetwork": k} | {name: row[name] for name in ("sample", "position", "active")}
            for k in range(len(cos))
            for row in survey.background(k)
        ],
    }


def _subnetworks(survey: Survey, cos: Tensor) -> list[dict[str, Any]]:
    n, pairs, counts, sums = survey.n_samples, survey.pairs, survey.counts, survey.sums
    mean = sums["c_sum"] / pairs
    std = (sums["c_squares"] / pairs - mean.square()).clamp_min(0).sqrt()
    others = cos.abs() - 2 * torch.eye(len(cos), dtype=cos.dtype)
    nearest = others.argmax(1).tolist() if len(cos) > 1 else [None]
    rows = []
    for k in range(len(cos)):
        active = int(counts["active_pairs"][k])
        rows.append(
            {
                "subnetwork": k,
                "p_act": active / pairs,
                "impact_mean": float(sums["impact_sum"][k]) / n,
                "impact_se": float(sums["impact_variance"][k]) ** 0.5 / n,
                "coefficient_mean": float(mean[k]),
                "coefficient_std": float(std[k]),
                "positive_share": int(counts["positive_pairs"][k]) / active if active else None,
                "active_samples": int(counts["active_samples"][k]),
                "nearest": nearest[k],
                "nearest_cos": None if nearest[k] is None else float(cos[k, nearest[k]]),
                "dead": active == 0,
            }
        )
    return rows


def _norm_shares(decomposition: Decomposition) -> list[dict[str, Any]]:
    squares = {name: tucker.squared_norms() for name, tucker in decomposition.subnetworks.v_out.tuckers().items()}
    total = torch.stack(list(squares.values())).sum(0)
    return [
        {"subnetwork": k, "tensor": name, "share": float(values[k] / total[k])}
        for k in range(len(total))
        for name, values in squares.items()
    ]


def _similarity(survey: Survey, cos: Tensor) -> list[dict[str, Any]]:
    both, alone = survey.together.double(), survey.counts["active_samples"].double()
    either = alone.unsqueeze(0) + alone.unsqueeze(1) - both
    together = both / either.clamp_min(1)
    apart = -2 * torch.eye(len(cos), dtype=cos.dtype)
    n = len(cos) - 1
    near = (cos.abs() + apart).sort(dim=1, descending=True, stable=True).indices[:, : min(NEIGHBOURS, n)]
    often = (together + apart).sort(dim=1, descending=True, stable=True).indices[:, : min(TOGETHER, n)]
    rows = []
    for k in range(len(cos)):
        listed = near[k].tolist()
        listed += [other for other in often[k].tolist() if other not in listed and both[k, other] > 0]
        rows += [
            {
                "subnetwork": k,
                "other": other,
                "cos": float(cos[k, other]),
                "coactivation": float(together[k, other]) if either[k, other] > 0 else None,
            }
            for other in listed
        ]
    return rows


def _coactivation(survey: Survey) -> pd.DataFrame:
    """The pairs that are active in a sample together at least once, and in how many both are, and either is."""
    alone = survey.counts["active_samples"]
    a, b = survey.together.triu(1).nonzero(as_tuple=True)
    both = survey.together[a, b]
    columns = {"subnetwork": a, "other": b, "both": both, "either": alone[a] + alone[b] - both}
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()})


def layout(similarity: Tensor) -> Tensor:
    """Places in a plane, [n, 2], by classical scaling of squared distances 2 (1 - similarity)."""
    centred = similarity - similarity.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((centred + centred.mT) / 2)
    places = torch.zeros(len(similarity), 2, dtype=similarity.dtype)
    m = min(2, len(values))
    kept = vectors[:, -m:].flip(1) * values[-m:].flip(0).clamp_min(0).sqrt()
    largest = kept.abs().argmax(0)
    signs = kept[largest, torch.arange(m)].sign()
    places[:, :m] = kept * torch.where(signs == 0, 1, signs)  # an eigenvector's sign is arbitrary
    return places


def manifest_of(
    run: Run,
    closer: Closer,
    survey: Survey,
    split: str,
    limit: int | None,
    deltas: list[float],
    written: Mapping[str, int],
) -> dict[str, Any]:
    """What `manifest.json` holds."""
    decomposition = run.decomposition
    shapes, settings, names = decomposition.subnetworks.shapes, survey.settings, closer.names
    return {
        "run": run.folder.resolve().name,
        "model": decomposition.target_class,
        "config": decomposition.run_config,
        **fingerprints_of(decomposition),
        **made_by(),
        "seed": settings.seed,
        "split": split,
        "limit": limit,
        "n_entries": survey.n_entries,
        "n_samples": survey.n_samples,
        "n_skipped": survey.skipped,
        "n_references": settings.references,
        "batch_size": settings.batch_size,
        "sample": decomposition.sample,
        "kind": closer.kind,
        "divergence": decomposition.divergence.name,
        "reference": decomposition.reference,
        "output_kind": "probability" if decomposition.divergence.name == "kl" else "value",
        "output_names": names if len(names) <= MANY_NAMES else None,
        "tensors": [
            {"name": name, "shape": list(shape), "ranks": list(decomposition.subnetworks.ranks[name])}
            for name, shape in shapes.items()
        ],
        "n_subnetworks": decomposition.n_subnetworks,
        "k": decomposition.k,
        "threshold": decomposition.threshold,
        "figures": decomposition.config()["figures"],
        "deltas": deltas,
        "attribution": "occlusion" if closer.attributed else None,
        "n_attributed": closer.attributed,  # of each subnetwork's top samples, the first so many
        "n_top": settings.top,
        "n_background": len(closer.background),
        "n_controls": settings.controls,
        "tables": dict(written),
    }
