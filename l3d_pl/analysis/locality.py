"""How far the local picture holds: D along delta against the line that its gradient predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l3d_pl.analysis.interventions import Sweep
from l3d_pl.decomposition import Decomposition
from l3d_pl.gradients import GradientExtractor


@torch.no_grad()
def slopes(
    decomposition: Decomposition, extractor: GradientExtractor, batch: Any, references: Tensor, k: int
) -> Tensor:
    """dD / d delta along v_k at delta = 0, which is <g, v_k>, of each sample of a batch, [N]."""
    subnetworks = decomposition.subnetworks
    prepared = subnetworks.prepare(extractor(batch, references=references).gradients)
    view = subnetworks.view(subnetworks.v_out, prepared).select(slice(k, k + 1))
    return view.coefficients(prepared)[:, 0]


def locality_rows(found: Sweep, slope: Tensor, relevant: Tensor) -> list[dict[str, Any]]:
    """Rows of the table `locality`, without subnetwork: means over the relevant samples.

    v and -v are one subnetwork, and a sample's D may rise along either: each is turned so that D rises with delta.

    Args:
        found: a sweep with references, whose steps are symmetric about 0 and in order.
        slope: of its samples, [N].
    """
    assert found.against is not None
    assert found.origin_against is not None
    change = found.against - found.origin_against
    turned = torch.where(slope >= 0, change, change.flip(0))  # a step -delta stands where delta would from the end
    return [
        {
            "delta": delta,
            "change": float(turned[d, relevant].double().mean()),
            "linear": float(delta * slope[relevant].abs().double().mean()),
        }
        for d, delta in enumerate(found.deltas)
    ]


def local_to(rows: Sequence[Mapping[str, Any]], tolerance: float = 0.1) -> float | None:
    """The delta up to which the change of D is within `tolerance` of its linear prediction, to both sides.

    The relative error is 0 at 0, and is taken as straight between the steps. Where it stays below, the shorter side's
    last step; None where the prediction is no change.

    Args:
        rows: as `locality_rows` gives them.
    """
    reach = []
    for sign in (1, -1):
        before = (0.0, 0.0)  # delta, error
        for row in sorted((row for row in rows if sign * row["delta"] > 0), key=lambda row: abs(row["delta"])):
            delta, error = abs(row["delta"]), abs(row["change"] - row["linear"])
            if row["linear"] == 0 or not math.isfinite(error):
                return None
            error /= abs(row["linear"])
            if error > tolerance:
                share = (tolerance - before[1]) / (error - before[1])
                before = (before[0] + share * (delta - before[0]), tolerance)
                break
            before = (delta, error)
        reach.append(before[0])
    return min(reach)
