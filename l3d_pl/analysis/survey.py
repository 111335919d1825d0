"""One pass over the data: impact, activity, coefficients, co-activation and the samples to show, in bounded memory.

What is kept does not grow with the data: sums for each subnetwork, a histogram, a matrix of counts of pairs, and some
samples. Every part of it can be merged with that of another rank, and saved and taken up again: where batches are cut,
the references of a batch and the random samples are functions of the seed and of the place in the data alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from l3d_pl.analysis.runs import Entries, checksums, placed
from l3d_pl.analysis.tables import replace
from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.gradients import Extraction, GradientExtractor
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.targets.frozen import fingerprint, select_parameters

SAY_EVERY = 30.0  # seconds between two lines about the progress, where there is no terminal


@dataclass(frozen=True)
class Settings:
    """How a survey is made.

    Attributes:
        references: n, references that each sample is compared with.
        batch_size: entries at a time; a sample's references are outputs of its batch.
        top, middle, random: samples to keep for each subnetwork; the random ones are the same for all.
        background: random samples that interventions are measured on; the `random` ones are the first of them.
        controls: random directions beside each intervention.
        seed: of references and of random samples.
        skip_bad: leave out samples with a gradient that is not finite, and count them; else they are an error.
        save_every: seconds between two savings of what has been seen so far.
    """

    references: int = 8
    batch_size: int = 64
    top: int = 16
    middle: int = 8
    random: int = 16
    background: int = 64
    controls: int = 4
    seed: int = 0
    skip_bad: bool = False
    save_every: float = 30.0

    def __post_init__(self) -> None:
        least_of = {
            "references": 1,
            "batch_size": 2,
            "top": 1,
            "middle": 0,
            "random": 1,
            "background": 1,
            "controls": 1,
        }
        for key, least in least_of.items():
            if getattr(self, key) < least:
                raise L3DError(f"{key}: found {getattr(self, key)}, allowed are whole numbers >= {least}")


def keys_of(seed: int, sample: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) for each sample, float64 [N], that looks random and depends on nothing else (splitmix64)."""
    with np.errstate(over="ignore"):
        x = sample.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += (position.numpy() + 2).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x += np.uint64(seed % 2**63) * np.uint64(0x8CB92BA72F3D8DD7)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2.0**53)


class Selection:
    """For each subnetwork the `size` samples of highest score, at most one of each entry; ties go to the first.

    `fields` holds [size, n_v] of each: `score` (-inf: an empty place), `sample`, `position`, the `checksum` of its
    entry, and what else is known.
    """

    WHOLE = ("sample", "position", "checksum")

    def __init__(self, size: int, n: int):
        self.size = size
        self.fields = {
            name: torch.full((size, n), -math.inf if name == "score" else -1, dtype=self._dtype(name))
            for name in ("score", *self.WHOLE, "impact", "impact_se", "coefficient", "active")
        }

    def _dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name in self.WHOLE else torch.float64

    def update(
        self, score: Tensor, sample: Tensor, position: Tensor, checksum: Tensor | None = None, **values: Tensor
    ) -> None:
        """Take in samples, in ascending order of their entries.

        Args:
            score: [N, n_v]; -inf for what is not wanted.
            sample, position, checksum: [N].
            values: the other fields, [N, n_v].
        """
        counts = sample.unique_consecutive(return_counts=True)[1]
        whole = {"sample": sample, "position": position}
        whole["checksum"] = torch.zeros_like(sample) if checksum is None else checksum
        if len(counts) == len(sample):
            new = {"score": score, **whole} | values
        else:  # of each entry the position of highest score, whichever that is for each subnetwork
            starts = counts.cumsum(0) - counts
            slot = torch.arange(len(sample)) - starts.repeat_interleave(counts)
            group = torch.arange(len(counts)).repeat_interleave(counts)
            padded = score.new_full((len(counts), int(counts.max()), score.shape[1]), -math.inf)
            padded[group, slot] = score
            best = starts.unsqueeze(1) + padded.argmax(1)  # [entries, n_v]
            new = {name: value.gather(0, best) for name, value in {"score": score, **values}.items()}
            new |= {name: value[best] for name, value in whole.items()}
        self._keep(new)

    def _keep(self, new: Mapping[str, Tensor]) -> None:
        joined = {}
        for name, old in self.fields.items():
            value = new[name].to(old.dtype)
            joined[name] = torch.cat([old, value if value.ndim == 2 else value.unsqueeze(1).expand(-1, old.shape[1])])
        order = joined["score"].sort(dim=0, descending=True, stable=True).indices[: self.size]
        self.fields = {name: value.gather(0, order) for name, value in joined.items()}

    def merge(self, other: Selection) -> None:
        """Take in what another rank has kept."""
        both = {name: torch.cat([value, other.fields[name]]) for name, value in self.fields.items()}
        by_sample = both["sample"].sort(dim=0, stable=True).indices
        self.fields = {name: value[:0] for name, value in self.fields.items()}
        self._keep({name: value.gather(0, by_sample) for name, value in both.items()})

    def of(self, k: int) -> list[dict[str, Any]]:
        """The samples of a subnetwork, best first."""
        there = self.fields["score"][:, k] > -math.inf
        columns = {name: value[:, k][there].tolist() for name, value in self.fields.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [row | {"active": bool(row["active"])} for row in rows]


class Histogram:
    """Counts of values whose range is not known before: for each subnetwork `BINS` bins of equal width about 0.

    Bins become three times as wide when a value falls outside. Values are counted as whole multiples of a tiny `unit`,
    so that the counts are the same in whichever order, and on however many ranks, values come.
    """

    BINS = 369

    def __init__(self, n: int, unit: float):
        self.unit = unit
        self.level = torch.zeros(n, dtype=torch.int64)  # a bin is 3^level units wide
        self.counts = torch.zeros(n, self.BINS, dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        """Take in values [N, n]."""
        multiples = (values.double() / self.unit).clamp(-(2.0**60), 2.0**60).round().long()
        largest, half = multiples.abs().amax(0), self.BINS // 2
        level = self.level.clone()
        while bool((outside := self._bin(largest, level) > half).any()):
            level += outside
        self._widen(level)
        places = self._bin(multiples, self.level) + half + torch.arange(len(self.level)) * self.BINS
        self.counts += torch.bincount(places.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    @staticmethod
    def _bin(multiples: Tensor, level: Tensor) -> Tensor:
        width = 3**level
        return torch.div(multiples + width // 2, width, rounding_mode="floor")

    def _widen(self, level: Tensor) -> None:
        places = torch.arange(self.BINS) - self.BINS // 2
        for k in (level > self.level).nonzero().squeeze(1).tolist():
            new = self._bin(places, level[k] - self.level[k]) + self.BINS // 2
            self.counts[k] = torch.zeros(self.BINS, dtype=torch.int64).index_add_(0, new, self.counts[k])
        self.level = level

    def merge(self, other: Histogram) -> None:
        level = torch.maximum(self.level, other.level)
        self._widen(level)
        other._widen(level)
        self.counts += other.counts

    def of(self, k: int, bins: int = 41) -> list[tuple[float, float, int]]:
        """(low, high, count) of so many bins (an odd number), symmetric about 0 and as narrow as they can be."""
        counts, half = self.counts[k], self.BINS // 2
        there = (counts.nonzero().squeeze(1) - half).abs()
        reach = int(there.max()) if len(there) else 0
        merged = -(-(2 * reach + 1) // bins) | 1  # bins that become one, an odd number
        places = torch.div(torch.arange(self.BINS) - half + merged // 2, merged, rounding_mode="floor") + bins // 2
        inside = (places >= 0) & (places < bins)
        total = torch.zeros(bins, dtype=torch.int64).index_add_(0, places[inside], counts[inside])
        width = self.unit * 3.0 ** int(self.level[k]) * merged
        return [((b - bins / 2) * width, (b + 1 - bins / 2) * width, int(total[b])) for b in range(bins)]


class Survey:
    """What a pass over the data has found, so far.

    Attributes:
        n_entries, n_samples, pairs, skipped: seen; (sample, reference) pairs; samples left out.
        active_pairs, active_samples, positive_pairs: [n_v].
        impact_sum, impact_variance: of I(x, v) over samples, and the sum of its squared standard errors, [n_v].
        c_sum, c_squares: of c = V_in g over all pairs, [n_v].
        together: samples in which both are active, [n_v, n_v].
        gradient: sum of the samples' gradients, {name: [*shape]}; each against one reference.
        top, middle, random: see `Selection`.
    """

    COUNTS = ("active_pairs", "active_samples", "positive_pairs")
    SUMS = ("impact_sum", "impact_variance", "c_sum", "c_squares")
    NUMBERS = ("n_entries", "n_samples", "pairs", "skipped")

    def __init__(self, decomposition: Decomposition, settings: Settings):
        n, threshold = decomposition.n_subnetworks, decomposition.threshold
        self.settings = settings
        self.n_entries = self.n_samples = self.pairs = self.skipped = 0
        self.counts = {name: torch.zeros(n, dtype=torch.int64) for name in self.COUNTS}
        self.sums = {name: torch.zeros(n, dtype=torch.float64) for name in self.SUMS}
        self.together = torch.zeros(n, n, dtype=torch.int64)
        self.gradient = {name: torch.zeros(shape) for name, shape in decomposition.subnetworks.shapes.items()}
        self.histogram = Histogram(n, (threshold or 1.0) * 2.0**-20)
        self.selections = {
            "top": Selection(settings.top, n),
            "middle": Selection(4 * settings.middle, n),
            "random": Selection(max(settings.random, settings.background), n),
        }

    @torch.no_grad()
    def look(
        self,
        decomposition: Decomposition,
        extractor: GradientExtractor,
        batch: Any,
        number: int,
        first: int,
        checksum: Tensor | None = None,
    ) -> None:
        """Take in a batch: its gradients against n references each.

        Args:
            checksum: of each entry, where it is to be known again, [B].

        Raises:
            L3DError: a gradient that is not finite.
        """
        random = torch.Generator().manual_seed(_mix(self.settings.seed, number))
        subnetworks, good = decomposition.subnetworks, None
        found: dict[str, Tensor] = {}
        for r in range(self.settings.references):
            extraction = extractor(batch, random)
            gradients = extraction.gradients
            if good is not None:
                gradients = {name: gradient.select(good) for name, gradient in gradients.items()}
            prepared = subnetworks.prepare(gradients)
            c = subnetworks.coefficients(prepared)[:, 0]
            if r == 0 and not bool(c.isfinite().all()):
                good = self._good(c, extraction, first)
                prepared = subnetworks.prepare({name: gradient.select(good) for name, gradient in gradients.items()})
                c = c[good]
            if r == 0:
                self.skipped += extraction.n_samples - len(c)
                if len(c) == 0:
                    return
                for name, value in prepared.combine(c.new_ones(1, len(c)), subnetworks.shapes).items():
                    self.gradient[name] += value[0].cpu()
            c = c.double().cpu()
            active = decomposition.active(c)
            parts = {
                "total": c,
                "absolute": c.abs(),
                "squares": c.square(),
                "active": active,
                "positive": active & (c > 0),
            }
            found = {name: part + found[name] if found else part.double() for name, part in parts.items()}
            self.histogram.update(c)
        sample, position = samples_of(extraction, first)
        if good is not None:
            sample, position = sample[good.cpu()], position[good.cpu()]
        checksum = None if checksum is None else checksum[sample - first]
        self._count(sample, position, checksum, **found)
        self.n_entries += len(sample.unique())

    def _good(self, c: Tensor, extraction: Extraction, first: int) -> Tensor:
        """The samples that have a finite gradient, [M]."""
        good = c.isfinite().all(1)
        if self.settings.skip_bad:
            return good.nonzero().squeeze(1)
        sample, position = samples_of(extraction, first)
        worst = int((~good).nonzero()[0])
        place = f"sample {int(sample[worst])}" + (f", position {int(position[worst])}" if position[worst] >= 0 else "")
        raise L3DError(
            f"data: {int((~good).sum())} of {len(good)} samples of a batch have a gradient with NaN or infinity, "
            f"first {place} (of a run with bad_samples: skip they are left out)"
        )

    def _count(
        self,
        sample: Tensor,
        position: Tensor,
        checksum: Tensor | None,
        total: Tensor,
        absolute: Tensor,
        squares: Tensor,
        active: Tensor,
        positive: Tensor,
    ) -> None:
        n = self.settings.references
        impact, often = absolute / n, active >= n / 2
        variance = (
            (squares / n - impact.square()).clamp_min(0) / (n - 1) if n > 1 else torch.full_like(impact, math.nan)
        )
        self.n_samples += len(sample)
        self.pairs += len(sample) * n
        self.counts["active_pairs"] += active.sum(0).long()
        self.counts["positive_pairs"] += positive.sum(0).long()
        self.counts["active_samples"] += often.sum(0)
        self.sums["impact_sum"] += impact.sum(0)
        self.sums["impact_variance"] += variance.sum(0)
        self.sums["c_sum"] += total.sum(0)
        self.sums["c_squares"] += squares.sum(0)
        self.together += (often.float().mT @ often.float()).long()  # exact below 2^24 samples a batch
        values = {"impact": impact, "impact_se": variance.sqrt(), "coefficient": total / n, "active": often}
        random = -keys_of(self.settings.seed, sample, position).unsqueeze(1).expand_as(impact)
        scores = {"top": impact, "middle": random.masked_fill(~often, -math.inf), "random": random}
        for name, selection in self.selections.items():
            if selection.size:
                selection.update(scores[name], sample, position, checksum, **values)

    # -- merging, keeping -------------------------------------------------------------------------------------------

    def merge(self, other: Survey) -> None:
        """Take in what another rank has found in other batches."""
        for name in self.NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        mine, its = self._sums(), other._sums()
        for name, value in mine.items():
            value += its[name]
        self.histogram.merge(other.histogram)
        for name, selection in self.selections.items():
            selection.merge(other.selections[name])

    def _sums(self) -> dict[str, Tensor]:
        gradient = {f"gradient.{name}": value for name, value in self.gradient.items()}
        return {**self.counts, **self.sums, "together": self.together, **gradient}

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        numbers = torch.tensor([getattr(self, name) for name in self.NUMBERS])
        histogram = {"histogram.level": self.histogram.level, "histogram.counts": self.histogram.counts}
        chosen = {f"{s}.{name}": value for s, sel in self.selections.items() for name, value in sel.fields.items()}
        return {"numbers": numbers, **self._sums(), **histogram, **chosen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in zip(self.NUMBERS, state["numbers"].tolist(), strict=True):
            setattr(self, name, value)
        for name, tensor in self._sums().items():
            tensor.copy_(state[name])
        self.histogram.level, self.histogram.counts = state["histogram.level"], state["histogram.counts"]
        for s, selection in self.selections.items():
            selection.fields = {name: state[f"{s}.{name}"] for name in selection.fields}

    # -- reading ----------------------------------------------------------------------------------------------------

    def chosen(self, k: int) -> dict[str, list[dict[str, Any]]]:
        """The samples to show of a subnetwork, {kind: best first}; `middle`: of the active, by their median impact."""
        rows = {name: selection.of(k) for name, selection in self.selections.items()}
        by_impact = sorted(rows["middle"], key=lambda row: (-row["impact"], row["sample"]))
        start = max(0, (len(by_impact) - self.settings.middle) // 2)
        middle = by_impact[start : start + self.settings.middle]
        return rows | {"middle": middle, "random": rows["random"][: self.settings.random]}

    def background(self, k: int) -> list[dict[str, Any]]:
        """The random samples that interventions of a subnetwork are measured on: of all subnetworks the same."""
        return self.selections["random"].of(k)[: self.settings.background]

    def mean_gradient(self) -> dict[str, Tensor]:
        """The unit direction of the mean gradient, {name: [*shape]}."""
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in self.gradient.values()))
        return {name: value / max(norm, 1e-30) for name, value in self.gradient.items()}


def _mix(seed: int, number: int) -> int:
    return int(keys_of(seed, torch.tensor([number]), torch.tensor([-1]))[0] * 2**53)


def samples_of(extraction: Extraction, first: int = 0) -> tuple[Tensor, Tensor]:
    """Each sample's entry (the batch's first is `first`) and its position (-1 if a sample is no token), int64 [N]."""
    positions = extraction.samples.positions
    if positions is None:
        return first + torch.arange(extraction.n_samples), torch.full((extraction.n_samples,), -1)
    index = extraction.samples.index
    flat = torch.arange(positions.numel()) if index is None else index.cpu()
    return first + flat // positions.shape[1], positions.flatten().cpu()[flat]


def extractor_of(decomposition: Decomposition) -> GradientExtractor:
    """The fast engine, for a decomposition with its target attached."""
    chosen = select_parameters(decomposition.target, list(decomposition.subnetworks.shapes))
    return GradientExtractor(
        decomposition.target, chosen, decomposition.divergence, decomposition.reference, decomposition.sample
    )


def take_survey(
    decomposition: Decomposition,
    entries: Entries,
    settings: Settings,
    ranks: Ranks = ALONE,
    state_file: Path | None = None,
) -> Survey:
    """One pass over the data; each rank takes every `ranks.size`-th batch, and all have the whole in the end.

    Args:
        state_file: where this rank keeps what it has seen so far, to go on from there if it is stopped.
    """
    survey, done = Survey(decomposition, settings), 0
    identity = identity_of(decomposition, entries, settings, ranks)
    if state_file is not None:
        done = _load(survey, state_file, identity)
    extractor, device = extractor_of(decomposition), next(decomposition.subnetworks.parameters()).device
    total = -(-len(entries) // settings.batch_size) or None  # (not known of a loader)
    saved = time.monotonic()
    with progress("samples", None if total is None else -(-total // ranks.size), ranks) as advance:
        batches = entries.batches(settings.batch_size, ranks.rank, ranks.size)
        for seen, (number, first, batch) in enumerate(batches, 1):
            advance()
            if seen <= done:
                continue
            known = None if entries.is_indexed else checksums(batch)
            survey.look(decomposition, extractor, placed(batch, device), number, first, known)
            if state_file is not None and time.monotonic() - saved >= settings.save_every:
                _save(survey, state_file, identity, seen)
                saved = time.monotonic()
            done = seen
    if state_file is not None:
        _save(survey, state_file, identity, done)
    for rank, state in enumerate(ranks.gather(survey.state_dict())):
        if rank == 0:
            merged = Survey(decomposition, settings)
            merged.load_state_dict(state)
        else:
            other = Survey(decomposition, settings)
            other.load_state_dict(state)
            merged.merge(other)
    if merged.n_samples == 0:
        raise L3DError("data: found no sample with a finite gradient in this split")
    return merged


def identity_of(decomposition: Decomposition, entries: Entries, settings: Settings, ranks: Ranks) -> str:
    """What a state that was saved has to agree with."""
    options = {name: value for name, value in asdict(settings).items() if name != "save_every"}
    known = {
        "decomposition": fingerprint(decomposition.subnetworks),
        "target": decomposition.target_fingerprint,
        "threshold": decomposition.threshold,
        "entries": [entries.split, len(entries), entries.limit],
        "data": (decomposition.run_config or {}).get("data"),
        "place": [ranks.rank, ranks.size],
        **options,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _save(survey: Survey, path: Path, identity: str, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in survey.state_dict().items()}
    replace(path, lambda aside: save_file(state, aside, {"identity": identity, "batches": str(done)}))


def _load(survey: Survey, path: Path, identity: str) -> int:
    """Take up what was saved of this same survey; the number of batches it has seen, or 0."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                return 0
            survey.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return int(metadata["batches"])
    except (FileNotFoundError, SafetensorError):
        return 0


@contextmanager
def progress(what: str, total: int | None, ranks: Ranks = ALONE) -> Iterator[Any]:
    """The first rank's progress, a bar on a terminal, else a line now and then; gives the function that moves it."""
    is_first, done, said = ranks.rank == 0, 0, time.monotonic()
    with Progress(transient=True, disable=not (is_first and sys.stdout.isatty())) as bar:
        task = bar.add_task(what, total=total)

        def advance() -> None:
            nonlocal done, said
            bar.advance(task)
            done += 1
            if is_first and bar.disable and time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                print(f"{what}: {done} of {total or 'an unknown number'}", flush=True)

        yield advance


def shared(items: Sequence[Any], ranks: Ranks) -> Sequence[Any]:
    """This rank's part of what there is to do."""
    return items[ranks.rank :: ranks.size]
