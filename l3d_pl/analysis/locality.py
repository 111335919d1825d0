"""How far the local picture holds: D along delta against the line that its gradient predicts."""

from __future__ import annotations

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
