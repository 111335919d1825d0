"""AuxK: a second loss that gives dead subnetworks something to do (Gao et al. 2024, for TopK autoencoders).

The dead subnetworks alone reconstruct what the live ones leave: e = g - V_out codes (held constant), and
L_aux = sum_i ‖e_i - V_dead b_i‖² / sum_i ‖g_i‖² with b the largest coefficients among the dead.
"""

import torch
from torch import Tensor

from l3d_pl.batch_topk import batch_topk
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.step import Step
from l3d_pl.subnetworks import Prepared, Subnetworks


def auxiliary_loss(
    subnetworks: Subnetworks, prepared: Prepared, step: Step, dead: Tensor, k: float, ranks: Ranks = ALONE
) -> Tensor | None:
    """L_aux summed over restarts, or None where nothing is dead.

    Args:
        step: the main step on the same batch.
        dead: [R, n_v] of bool.
        k: the fraction of (sample, dead subnetwork) pairs that take part.
        ranks: as in `decompose`.
    """
    total, energy = None, ranks.sum(prepared.energy) / ranks.size
    view_in, view_out = (subnetworks.view(side, prepared) for side in (subnetworks.v_in, subnetworks.v_out))
    for r in range(subnetworks.restarts):
        if not bool(dead[r].any()):
            continue
        index = torch.arange(subnetworks.n_subnetworks, device=dead.device)[dead[r]] + r * subnetworks.n_subnetworks
        mine, fixed = view_out.select(index), view_out.select(subnetworks.restart(r)).detach()
        codes = step.codes[:, r]
        c = view_in.select(index).coefficients(prepared)
        b = c * batch_topk(c.unsqueeze(1), k, ranks)[0].squeeze(1)
        overlap = mine.coefficients(prepared) - codes @ fixed.gram(mine)  # <e_i, v_l> for dead l
        with torch.no_grad():
            quadratic = codes * (codes @ fixed.gram(fixed) - 2 * fixed.coefficients(prepared))
            left = prepared.energy + quadratic.double().sum()  # sum_i ‖e_i‖²
        error = left + (b * (b @ mine.gram(mine) - 2 * overlap)).double().sum()
        part = (error / energy).to(c)
        total = part if total is None else total + part
    return total
