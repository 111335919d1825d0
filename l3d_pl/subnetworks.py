"""V_in and V_out over all chosen parameters: coefficients, reconstruction loss, unit norms, directions, W0 + delta v_k.

Neither the gradients [samples x n_w] nor the subnetworks [n_v x n_w] have to exist: the loss needs inner products only,

    sum_i ‖g_i - V_out c_i‖² = sum_i ‖g_i‖² - 2 c_i . p_i + c_i^T M c_i,    p = V_out^T g,    M = V_out^T V_out.

Small parameters are dense all the same, joined into one block, where the residual itself is cheapest (`prepare`
decides).

Several decompositions of the same gradients can be learned side by side (`restarts`): arrays are then [.., R, n_v], and
the R * n_v subnetworks of all of them are stored as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from l3d_pl.errors import L3DError, did_you_mean
from l3d_pl.gradients import DenseGradient, OuterGradient, SampleGradient
from l3d_pl.parallel import ALONE, Ranks
from l3d_pl.targets.frozen import matches_pattern, near_patterns
from l3d_pl.tucker import Matrices, Rank, Tucker, TuckerParameters, dense_block, local, resolve_ranks

# Below this many values the factored form of a parameter costs more calls than it saves multiplications.
SMALL_PARAMETER = 4096


def ranks_per_parameter(
    shapes: Mapping[str, Sequence[int]], ranks: Rank | Mapping[str, Rank]
) -> dict[str, tuple[int, ...]]:
    """Ranks of every parameter from one `rank` for all, or from {pattern: rank}, where the first that matches counts.

    Raises:
        L3DError: an invalid rank, one that no parameter can have, a pattern that matches no parameter, a parameter
            without a pattern.
    """
    if not isinstance(ranks, Mapping):
        largest = max((size for shape in shapes.values() for size in shape), default=1)
        if not isinstance(ranks, Sequence) and ranks > max(1, largest):  # capped where some parameter can have it
            raise L3DError(
                f"ranks: found rank {ranks}, above every dimension of the chosen parameters; "
                f"allowed are up to {largest}"
            )
        uniform: dict[str, Rank] = {}
        for (
            name,
            shape,
        ) in shapes.items():  # one list serves all parameters with that many modes; vectors take its first entry
            is_list = isinstance(ranks, Sequence)
            uniform[name] = [min(ranks[0], shape[0])] if is_list and len(shape) == 1 and len(ranks) > 1 else ranks  # type: ignore[index,arg-type]
        return {name: resolve_ranks(uniform[name], shape, name) for name, shape in shapes.items()}
    for pattern in ranks:
        if not any(matches_pattern(name, pattern) for name in shapes):
            raise L3DError(
                f"ranks: pattern {pattern!r} matches none of the chosen parameters{near_patterns(pattern, shapes)}"
            )
    resolved = {}
    for name, shape in shapes.items():
        rank = next((rank for pattern, rank in ranks.items() if matches_pattern(name, pattern)), None)
        if rank is None:
            raise L3DError(f"ranks: no pattern matches parameter '{name}'; add one, such as '*': 1")
        resolved[name] = resolve_ranks(rank, shape, name)
    return resolved


class Directions(nn.Module):
    """One side, V_in or V_out: n tensors for each parameter, together n directions in parameter space.

    `parameters_of[name]` holds the Tucker tensors of one parameter (its module name has "/" for ".").

    Args:
        own: which of the n this process keeps.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        ranks: Mapping[str, tuple[int, ...]],
        n: int,
        generator: torch.Generator | None,
        own: slice,
    ):
        super().__init__()
        self.names = tuple(shapes)
        self.n = own.stop - own.start
        for name, shape in shapes.items():
            self.add_module(name.replace(".", "/"), TuckerParameters(n, shape, ranks[name], generator, own))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def parameters_of(self, name: str) -> TuckerParameters:
        return self.get_submodule(name.replace(".", "/"))  # type: ignore[return-value]

    def tuckers(self) -> dict[str, Tucker]:
        """{name: Tucker tensors} of all parameters."""
        return {name: module.tucker for name, module in zip(self.names, self._modules.values(), strict=True)}  # type: ignore[union-attr,misc]

    def squared_norms(self) -> Tensor:
        """‖v_k‖² over all tensors together, [n]."""
        tuckers = self.tuckers().values()
        small = [tucker for tucker in tuckers if math.prod(tucker.shape) <= SMALL_PARAMETER]
        parts = [tucker.squared_norms() for tucker in tuckers if math.prod(tucker.shape) > SMALL_PARAMETER]
        if small:
            parts.append(dense_block(small).square().sum(1))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    @torch.no_grad()
    def normalise_(self) -> None:
        """Rescale every subnetwork to unit L2 norm over all its tensors together (paper, training step 5)."""
        if self.n == 0:
            return
        scale = self.squared_norms().clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        for tucker in self.tuckers().values():
            tucker.core.mul_(scale.view(-1, *[1] * (tucker.core.ndim - 1)))

    @torch.no_grad()
    def copy_(self, tuckers: Mapping[str, Tucker], index: Tensor | slice = slice(None)) -> None:
        """Overwrite the subnetworks at `index` (of n)."""
        for name, tucker in tuckers.items():
            self.parameters_of(name).copy_(tucker, index)


@dataclass
class Prepared:
    """A batch of per-sample gradients in the form in which they are contracted.

    Attributes:
        names: all parameters, those of the dense block first.
        sizes: number of values of each parameter of the block.
        block: gradients of the dense parameters, joined, [N, sum of sizes]; None if there are none.
        factored: the other parameters' gradients.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    block: Tensor | None
    factored: dict[str, SampleGradient]
    n_samples: int

    @cached_property
    def energy(self) -> Tensor:
        """sum_i ‖g_i‖², a number (float64)."""
        total = torch.zeros((), dtype=torch.float64)
        if self.block is not None:
            total = self.block.square().sum(dtype=torch.float64)
        for gradient in self.factored.values():
            total = total + gradient.squared_norms().sum(dtype=torch.float64)
        return total

    def energies(self) -> Tensor:
        """The same for each parameter, [P] in the order of `names`."""
        parts = [] if self.block is None else [part.sum() for part in self.block.square().sum(0).split(self.sizes)]
        parts += [gradient.squared_norms().sum() for gradient in self.factored.values()]
        return torch.stack(parts).double()

    def sample_energies(self) -> Tensor:
        """‖g_i‖² of every sample, [N]."""
        parts = [] if self.block is None else [self.block.square().sum(1)]
        if self.factored:
            parts.append(torch.stack([gradient.squared_norms() for gradient in self.factored.values()]).sum(0))
        return torch.stack(parts).sum(0)

    def gram(self) -> Tensor:
        """<g_i, g_j> of all pairs of samples, [N, N]."""
        parts = [gradient.gram() for gradient in self.factored.values()]
        if self.block is not None:
            parts.append(self.block @ self.block.mT)
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def combine(self, weights: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Weighted sums of samples, `weights` [m, N] -> {name: [m, *shape]}."""
        combined = {}
        if self.block is not None:
            parts = (weights @ self.block).split(self.sizes, dim=1)
            combined = {name: part.reshape(-1, *shapes[name]) for name, part in zip(self.names, parts, strict=False)}
        return combined | {name: gradient.combine(weights) for name, gradient in self.factored.items()}


@dataclass
class View:
    """One side's directions laid out for a `Prepared` batch: the dense block [n, w] and the factored rest."""

    block: Tensor | None
    tuckers: dict[str, Tucker]

    def coefficients(self, prepared: Prepared) -> Tensor:
        """<g_i, v_k>, [N, n]."""
        total = None if self.block is None else prepared.block @ self.block.mT  # type: ignore[operator]
        for name, gradient in prepared.factored.items():
            tucker = self.tuckers[name]
            part = gradient.coefficients(tucker) if tucker.n else tucker.core.new_zeros(prepared.n_samples, 0)
            total = part if total is None else total + part
        assert total is not None
        return total

    def gram(self, other: View) -> Tensor:
        """<v_k, w_l>, [n, n_other]."""
        total = None if self.block is None else self.block @ other.block.mT  # type: ignore[union-attr]
        for name, tucker in self.tuckers.items():
            its = other.tuckers[name]
            some = tucker.n and its.n  # (a rank may own no subnetworks)
            part = tucker.gram(None if other is self else its) if some else tucker.core.new_zeros(tucker.n, its.n)
            total = part if total is None else total + part
        assert total is not None
        return total

    def select(self, index: Tensor | slice) -> View:
        block = None if self.block is None else self.block[index]
        return View(block, {name: tucker.select(index) for name, tucker in self.tuckers.items()})

    def detach(self) -> View:
        block = None if self.block is None else self.block.detach()
        return View(block, {name: tucker.detach() for name, tucker in self.tuckers.items()})


@dataclass
class Reconstruction:
    """What is left of a batch of gradients when `codes` [N, R, n_v] of V_out is taken away.

    Attributes:
        squared_error: sum_i ‖g_i - V_out code_i‖², [R].
        energy: sum_i ‖g_i‖², a number.
    """

    squared_error: Tensor
    energy: Tensor

    @property
    def loss(self) -> Tensor:
        """L = squared error / energy, [R] (paper, "Reconstruction loss")."""
        return self.squared_error / self.energy.clamp_min(torch.finfo(torch.float32).tiny).to(self.squared_error)


class Subnetworks(nn.Module):
    """V_in and V_out: n_v subnetworks, each a low-rank tensor for every chosen parameter.

    Args:
        shapes: {parameter name: shape}.
        n_subnetworks: n_v.
        ranks: Tucker rank: an int, a fraction, a list per mode, or {pattern: one of these}.
        restarts: R decompositions side by side.
        generator: random state of the start, the same on every process.
        memory_budget: GiB that the intermediate results of a step may take together.
        group: the ranks among which the subnetworks are sharded; this process then holds `own` of them only, drawn as
            a single process would.
        n_dense: the first so many subnetworks take part in every sample, outside batch top-k.

    Raises:
        L3DError: n_v or restarts below 1, invalid ranks, restarts that are sharded, n_dense outside 0 ... n_v - 1.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        n_subnetworks: int,
        ranks: Rank | Mapping[str, Rank] = 1,
        restarts: int = 1,
        generator: torch.Generator | None = None,
        memory_budget: float = 1.0,
        group: Ranks = ALONE,
        n_dense: int = 0,
    ):
        super().__init__()
        if n_subnetworks < 1:
            raise L3DError(f"n_subnetworks: found {n_subnetworks}; at least 1 is needed")
        if restarts < 1:
            raise L3DError(f"restarts: found {restarts}; at least 1 is needed")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.ranks = ranks_per_parameter(self.shapes, ranks)
        if not memory_budget > 0:
            raise L3DError(f"memory_budget: found {memory_budget}; allowed are GiB > 0")
        if restarts > 1 and group.size > 1:
            raise L3DError(f"restarts: found {restarts}; subnetworks that are sharded over ranks allow 1")
        self.n_subnetworks, self.restarts, self.memory_budget, self.group = (
            n_subnetworks, restarts, memory_budget, group
        )  # fmt: skip
        if not 0 <= n_dense < n_subnetworks:
            raise L3DError(f"n_dense: found {n_dense}; allowed are 0 to n_subnetworks - 1 = {n_subnetworks - 1}")
        self.n_dense = n_dense
        self.own = group.shard_of(restarts * n_subnetworks)
        self.v_out = Directions(self.shapes, self.ranks, restarts * n_subnetworks, generator, self.own)
        self.v_out.normalise_()
        self.v_in = Directions(self.shapes, self.ranks, restarts * n_subnetworks, generator, self.own)
        self.v_in.copy_({name: tucker.detach() for name, tucker in self.v_out.tuckers().items()})

    # -- sharding by subnetwork -------------------------------------------------------------------------------------

    def distribute(self, mesh: DeviceMesh) -> None:
        """Tell torch that each parameter is `own` of a larger one: it becomes a DTensor on `mesh`, Shard(0).

        Checkpoints, the optimizer and the norm of all gradients then see one V_in and one V_out. What is stored whole
        here is cut.
        """
        n = self.restarts * self.n_subnetworks
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or isinstance(parameter, DTensor):
                    continue
                rows = parameter.detach()
                rows = rows if len(rows) == self.own.stop - self.own.start else rows[self.own].clone()
                whole = torch.empty(n, *rows.shape[1:], device="meta")
                shards = DTensor.from_local(
                    rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
                )
                module._parameters[name] = nn.Parameter(shards)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def tensors(self) -> list[Tensor]:
        """The tensors of the own subnetworks, to be written to."""
        return [local(parameter.detach()) for parameter in self.parameters()]

    def everyone(self, columns: Tensor) -> Tensor:
        """What each rank of the group knows of its own subnetworks, [.., n] each, side by side: [.., n_v]."""
        return columns if self.group.size == 1 else torch.cat(self.group.all_gather(columns), -1)

    def mine(self, columns: Tensor) -> Tensor:
        """Of something for each subnetwork, [.., n_v], the part of the own ones, [.., n]."""
        return columns if self.group.size == 1 else columns[..., self.own]

    @torch.no_grad()
    def combine(self, weights: Tensor, restart: int = 0) -> dict[str, Tensor]:
        """Weighted sums of V_out, `weights` [m, n_v] -> {name: [m, *shape]}, over all shards."""
        weights, index, sums = self.mine(weights), self.local_restart(restart), {}
        for name, tucker in self.v_out.tuckers().items():
            part = weights.new_zeros(len(weights), math.prod(self.shapes[name]))
            if self.v_out.n:
                part = tucker.select(index).matrices().combine(weights)
            sums[name] = self.group.sum(part).view(-1, *self.shapes[name])
        return sums

    @property
    def own_dense(self) -> int:
        """How many of the first `n_dense` subnetworks are stored here (of each restart); they are the first ones."""
        return self.n_dense if self.group.size == 1 else min(max(0, self.n_dense - self.own.start), self.v_out.n)

    def local_restart(self, r: int) -> slice:
        """Restart r among the stored subnetworks: all of them, where they are sharded."""
        return self.restart(r) if self.group.size == 1 else slice(0, self.v_out.n)

    def _given_ranks(self) -> dict[str, Rank]:
        return {name: list(ranks) or 1 for name, ranks in self.ranks.items()}

    # -- layout -----------------------------------------------------------------------------------------------------

    @property
    def chunk(self) -> int:
        """Values that one intermediate result of a step may have: what the caches like, a sixteenth of the budget."""
        likes = 2**26 if self.v_out.device.type == "cuda" else 2**20
        return min(likes, int(self.memory_budget * 2**28 / 16))

    def is_dense(self, name: str, gradient: SampleGradient) -> bool:
        """Whether a parameter joins the dense block."""
        return self.path_of(name, gradient)[0] == "dense"

    def path_of(self, name: str, gradient: SampleGradient) -> tuple[str, str]:
        """`dense` or `factored`: how a parameter is contracted, and why. Memory counts first, then multiplications."""
        # (the largest shard's n: what travels between ranks has to look the same on all)
        size, n, ranks = (
            math.prod(self.shapes[name]),
            self.group.shard_of(self.restarts * self.n_subnetworks, 0).stop,
            self.ranks[name],
        )
        if not isinstance(gradient, OuterGradient):
            return "dense", "its gradients are no outer products"
        if size < SMALL_PARAMETER:
            return "dense", f"small: {size} values"
        values = (2 * gradient.n_samples + 4 * n) * size  # gradients, residuals, both sides and their gradients
        if values > self.memory_budget * 2**28:
            return "factored", f"dense would hold {4 * values / 2**30:.2g} GiB, above the memory budget"
        b, t, s, rows, columns = gradient.sizes
        rank = min(ranks[0], math.prod(ranks[1:]))
        dense = b * t * s * size + 6 * n * rank * size + 5 * gradient.n_samples * n * size
        gram = self.restarts * min(Matrices.gram_costs(self.n_subnetworks, rows, columns, rank, gradient.n_samples))
        factored = 2 * n * gradient.contraction_cost(rank) + gram
        path = "dense" if dense <= factored else "factored"
        return path, f"{dense / 1e9:.2f} G multiplications dense, {factored / 1e9:.2f} G factored"

    def prepare(self, gradients: Mapping[str, SampleGradient]) -> Prepared:
        """Lay out a batch of per-sample gradients for contraction."""
        dense = [name for name in self.shapes if self.is_dense(name, gradients[name])]
        names = (*dense, *(name for name in self.shapes if name not in dense))
        parts = [gradients[name].dense().reshape(gradients[name].n_samples, -1) for name in dense]
        block = None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        factored = {name: gradients[name] for name in names[len(dense) :]}
        n_samples = next(iter(gradients.values())).n_samples
        return Prepared(names, tuple(part.shape[1] for part in parts), block, factored, n_samples)

    def view(self, directions: Directions, prepared: Prepared) -> View:
        """V_in or V_out laid out for `prepared`. Build it once per step and side: it holds their autograd graph."""
        tuckers = directions.tuckers()
        dense = [tuckers[name] for name in prepared.names[: len(prepared.sizes)]]
        block = None
        if dense:  # (a rank may own no subnetworks)
            block = dense_block(dense) if directions.n else dense[0].core.new_zeros(0, sum(prepared.sizes))
        return View(block, {name: tuckers[name] for name in prepared.factored})

    # -- the method -------------------------------------------------------------------------------------------------

    def coefficients(self, prepared: Prepared, view: View | None = None) -> Tensor:
        """c = V_in g of every sample, [N, R, n_v] (or of another side, given its view)."""
        view = self.view(self.v_in, prepared) if view is None else view
        return view.coefficients(prepared).view(prepared.n_samples, self.restarts, -1)

    def reconstruct(self, prepared: Prepared, codes: Tensor, view: View | None = None) -> Reconstruction:
        """Squared error of V_out codes, for `codes` [N, R, n_v] (masked coefficients)."""
        view = self.view(self.v_out, prepared) if view is None else view
        total = codes.new_zeros(self.restarts, dtype=torch.float64) if prepared.factored else None
        if prepared.block is not None:
            error = self._residual(prepared.block, codes, view).square().sum((1, 2))
            total = error if total is None else total + error
        if prepared.factored:
            rest = View(None, view.tuckers)
            p = torch.stack([g.coefficients(view.tuckers[name]) for name, g in prepared.factored.items()]).sum(0)
            energy = torch.stack([g.squared_norms().sum(dtype=torch.float64) for g in prepared.factored.values()]).sum()
            rest_error = self._gram_error(codes, p, rest, energy)
            total = rest_error if total is None else total + rest_error
        assert total is not None
        return Reconstruction(total, prepared.energy)

    @torch.no_grad()
    def loss_per_parameter(
        self, prepared: Prepared, codes: Tensor, view: View | None = None, ranks: Ranks = ALONE
    ) -> dict[str, Tensor]:
        """L of every parameter by itself, {name: [R]}; over the samples of all `ranks`."""
        view = self.view(self.v_out, prepared) if view is None else view
        errors = []
        if prepared.block is not None:
            columns = self._residual(prepared.block, codes, view).square().sum(1)
            errors = [part.sum(1).double() for part in columns.split(prepared.sizes, dim=1)]
        for name, gradient in prepared.factored.items():
            alone = View(None, {name: view.tuckers[name]})
            energy = gradient.squared_norms().sum(dtype=torch.float64)
            errors.append(self._gram_error(codes, gradient.coefficients(view.tuckers[name]), alone, energy))
        energies = ranks.sum(prepared.energies()).clamp_min(torch.finfo(torch.float32).tiny)
        total = ranks.sum(torch.stack(errors))
        return {name: error / energy for name, error, energy in zip(prepared.names, total, energies, strict=True)}

    def _residual(self, block: Tensor, codes: Tensor, view: View) -> Tensor:
        """g - V_out code over the dense block, [R, N, w]."""
        assert view.block is not None
        if self.restarts == 1:
            return torch.addmm(block, codes[:, 0], view.block, alpha=-1).unsqueeze(0)
        directions = view.block.view(self.restarts, -1, view.block.shape[1])
        return torch.baddbmm(block.expand(self.restarts, -1, -1), codes.transpose(0, 1), directions, alpha=-1)

    def _gram_error(self, codes: Tensor, p: Tensor, view: View, energy: Tensor) -> Tensor:
        """‖g‖² - 2 c.p + c^T M c, [R]: summed in float64, since what is left is a small difference of large numbers."""
        wide, p = codes.double(), p.view_as(codes).double()
        errors = []
        for r in range(self.restarts):
            mine = view.select(self.restart(r)) if self.restarts > 1 else view
            quadratic = ((codes[:, r] @ mine.gram(mine)).double() * wide[:, r]).sum()
            errors.append(energy - 2 * (wide[:, r] * p[:, r]).sum() + quadratic)
        return torch.stack(errors)

    def restart(self, r: int) -> slice:
        """The subnetworks of restart r among the R * n_v stored ones."""
        return slice(r * self.n_subnetworks, (r + 1) * self.n_subnetworks)

    @torch.no_grad()
    def normalise_(self) -> None:
        """Unit L2 norm of every subnetwork (V_out) over all its tensors together."""
        self.v_out.normalise_()

    # -- reading and using it ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def extract_restart(self, r: int) -> Subnetworks:
        """Restart r alone, as a new `Subnetworks`."""
        alone = Subnetworks(self.shapes, self.n_subnetworks, self._given_ranks(), n_dense=self.n_dense)
        for mine, theirs in ((alone.v_in, self.v_in), (alone.v_out, self.v_out)):
            mine.to(next(self.parameters()))
            mine.copy_({name: tucker.select(self.restart(r)) for name, tucker in theirs.tuckers().items()})
        return alone

    @torch.no_grad()
    def direction(self, k: int, restart: int = 0, side: str = "out") -> dict[str, Tensor]:
        """Subnetwork v_k as tensors shaped like the parameters, {name: [*shape]}; `side` "in" gives the row of V_in.

        Raises:
            L3DError: k outside 0 ... n_v - 1.
        """
        if not 0 <= k < self.n_subnetworks:
            raise L3DError(f"subnetwork: found {k}; allowed are 0 to {self.n_subnetworks - 1}")
        index = restart * self.n_subnetworks + k
        directions = self.v_in if side == "in" else self.v_out
        return {
            name: tucker.select(slice(index, index + 1)).dense()[0] for name, tucker in directions.tuckers().items()
        }

    @contextmanager
    def perturbed(
        self, model: nn.Module, deltas: Mapping[int, float], restart: int = 0, parameters: Sequence[str] | None = None
    ) -> Iterator[nn.Module]:
        """W0 + sum_k delta_k v_k within a `with` block; then every byte of W0 is put back, exceptions included.

        Args:
            model: the target model.
            deltas: {subnetwork: step along its unit direction}.
            parameters: only these tensors, by name (default: all).
        """
        tensors = dict(model.named_parameters())
        names = list(dict.fromkeys(self.shapes if parameters is None else parameters))
        for name in names:
            if name not in self.shapes:
                raise L3DError(
                    f"parameters: '{name}' is not among the decomposed ones{did_you_mean(name, self.shapes)}"
                )
        directions = {k: self.direction(k, restart) for k in deltas}
        saved = {name: tensors[name].detach().clone() for name in names}
        try:
            with torch.no_grad():
                for k, delta in deltas.items():
                    for name in names:
                        tensors[name].add_(directions[k][name].to(tensors[name]), alpha=delta)
            yield model
        finally:
            with torch.no_grad():
                for name, tensor in saved.items():
                    tensors[name].copy_(tensor)


__all__ = ["DenseGradient", "Directions", "Prepared", "Reconstruction", "Subnetworks", "View", "ranks_per_parameter"]
