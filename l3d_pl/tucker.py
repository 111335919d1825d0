"""A batch of Tucker tensors, one for each subnetwork, all shaped like one parameter of the target model.

v_k = G_k x1 U_k1 x2 U_k2 ... (paper, section on low-rank subnetworks): every subnetwork has a core G_k [R1, ..., RN]
and a factor matrix U_km [I_m, R_m] for each mode m of its own. Everything here is plain algebra on those small tensors;
the full tensor [n, I1, ..., IN] is built by `dense` only.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3d_pl.errors import L3DError

if TYPE_CHECKING:
    from tensorly.tucker_tensor import TuckerTensor

Rank = int | float | Sequence[int | float]


def resolve_ranks(rank: Rank, shape: Sequence[int], name: str = "parameter") -> tuple[int, ...]:
    """Rank per mode for a parameter of `shape`.

    `rank` is one entry for all modes, or a list with one entry per mode; an int is capped by the dimension, a float in
    (0, 1) is that fraction of the dimension, rounded up. A list's explicit int may not exceed its dimension.

    Raises:
        L3DError: a list of the wrong length, a rank below 1, a fraction outside (0, 1), an entry above its dimension.
    """
    explicit = isinstance(rank, Sequence)
    entries: list[int | float] = list(rank) if isinstance(rank, Sequence) else [rank] * len(shape)
    if len(entries) != len(shape):
        raise L3DError(
            f"ranks of '{name}': found {len(entries)} entries {entries} for shape {tuple(shape)}; give one per mode"
        )
    resolved = []
    for entry, size in zip(entries, shape, strict=True):
        if isinstance(entry, float) and not entry.is_integer():
            if not 0 < entry < 1:
                raise L3DError(
                    f"ranks of '{name}': found fraction {entry}; allowed are fractions in (0, 1) or integers >= 1"
                )
            resolved.append(math.ceil(entry * size))
        elif entry < 1:
            raise L3DError(f"ranks of '{name}': found {entry}; allowed are integers >= 1 or fractions in (0, 1)")
        elif explicit and entry > size:
            raise L3DError(f"ranks of '{name}': found rank {entry} above the dimension {size} of shape {tuple(shape)}")
        else:
            resolved.append(min(int(entry), size))
    return tuple(resolved)


# Values that an intermediate result may have at a time, where work can be cut into pieces (64 MiB in float32).
CHUNK = 2**24


class Matrices(NamedTuple):
    """n tensors of one shape as products of two matrices: `left` [n, rows, R] times `right` [n, R, columns].

    Rows are a parameter's first mode, columns all the others; the core is part of one of the two, whichever gives the
    smaller R. It is the form in which batches of gradients are contracted: nothing of size rows x columns is needed.
    """

    left: Tensor
    right: Tensor

    def combine(self, weights: Tensor) -> Tensor:
        """Weighted sums of the tensors, `weights` [m, n] -> [m, rows, columns]."""
        right = self.right.flatten(0, 1)
        return torch.stack([(self.left * w.view(-1, 1, 1)).transpose(0, 1).flatten(1) @ right for w in weights])

    def gram(self, other: "Matrices") -> Tensor:
        """<v_k, w_l>, [n, n_other]."""
        (n, rows, rank), (m, _, rank2) = self.left.shape, other.left.shape
        columns = self.right.shape[2]
        if rank * rank2 * (rows + columns) < rows * columns:  # <L Q, L' Q'> = <L^T L', Q Q'^T>
            ours, theirs = self.left.mT.reshape(n * rank, rows), other.left.mT.reshape(m * rank2, rows)
            lefts = (ours @ theirs.mT).view(n, rank, m, rank2)
            rights = (self.right.flatten(0, 1) @ other.right.flatten(0, 1).mT).view(n, rank, m, rank2)
            return (lefts * rights).sum((1, 3))
        block = max(1, CHUNK // (max(n, m) * columns))
        total = None
        for i in range(0, rows, block):
            part = slice(i, i + block)
            mine = (self.left[:, part] @ self.right).flatten(1)
            its = mine if other is self else (other.left[:, part] @ other.right).flatten(1)
            total = mine @ its.mT if total is None else total + mine @ its.mT
        assert total is not None
        return total

    def push_codes(self, codes: Tensor, scale: float, chunk: int = CHUNK) -> tuple[Tensor, "Matrices"]:
        """codes M with M = <v_k, v_l>, and the gradient of scale / 2 <codes, codes M>, within each of R equal groups.

        Three ways lead there, and the one with the fewest multiplications is taken: by M through ranks, by M through
        dense rows, or by the reconstructions codes V, whose cost grows with n only and not with its square.

        Args:
            codes: [R, N, n / R].
            chunk: values that an intermediate result may have.
        """
        groups, samples, n = codes.shape
        pushed, d = torch.empty_like(codes), Matrices(torch.empty_like(self.left), torch.empty_like(self.right))
        costs = self.gram_costs(n, self.left.shape[1], self.right.shape[2], self.left.shape[2], samples)
        way = (_through_ranks, _through_rows, _through_samples)[costs.index(min(costs))]
        for g in range(groups):
            part = slice(g * n, (g + 1) * n)
            mine, into = Matrices(self.left[part], self.right[part]), Matrices(d.left[part], d.right[part])
            pushed[g] = way(mine, codes[g], scale, into, chunk)
        return pushed, d

    def add_products(self, other: "Matrices", weights: Tensor, gram: Tensor, d: "Matrices", chunk: int = CHUNK) -> None:
        """Add <v_k, w_l> to `gram` [n, m], and the gradient of sum_kl weights_kl <v_k, w_l> at v to `d`."""
        through_ranks, through_rows, _ = self.gram_costs(
            other.left.shape[0], self.left.shape[1], self.right.shape[2], self.left.shape[2], 0
        )
        add = add_products if through_ranks < through_rows else add_products_through_rows
        add(self, other, weights, gram, d, chunk)

    @staticmethod
    def gram_costs(n: int, rows: int, columns: int, rank: int, samples: int) -> tuple[float, float, float]:
        """Multiplications of `push_codes` in its three ways: through ranks, through dense rows, through samples."""
        dense = rows * columns
        return (
            2.0 * n * n * rank * rank * (rows + columns),
            dense * (1.6 * n * n + 3.0 * n * rank),
            dense * (3.0 * n * samples + 3.0 * n * rank),
        )


def _through_ranks(v: Matrices, codes: Tensor, scale: float, d: Matrices, chunk: int) -> Tensor:
    """M_kl = <L_k^T L_l, Q_k Q_l^T>: small where R² (rows + columns) < rows x columns."""
    d.left.zero_()
    d.right.zero_()
    gram = codes.new_zeros(codes.shape[1], codes.shape[1])
    add_products(v, v, (codes.mT @ codes) * scale, gram, d, chunk)
    return codes @ gram


def _through_rows(v: Matrices, codes: Tensor, scale: float, d: Matrices, chunk: int) -> Tensor:
    """M = V V^T with V dense, some rows of every tensor at a time."""
    n, columns = codes.shape[1], v.right.shape[2]
    gram, weights = codes.new_zeros(n, n), (codes.mT @ codes) * scale
    for part, dense in _dense_rows(v, d, chunk // (2 * n * columns)):
        for k in range(0, n, some := -(-n // 4)):  # M is symmetric: five eighths of it are enough
            gram[k : k + some, k:].addmm_(dense[k : k + some], dense[k:].mT)
        _back_to_matrices(v, (weights @ dense).view(n, -1, columns), part, d)
    return codes @ (gram.triu() + gram.triu(1).mT)


def _through_samples(v: Matrices, codes: Tensor, scale: float, d: Matrices, chunk: int) -> Tensor:
    """(codes V) V^T, some rows of every tensor at a time."""
    (samples, n), columns = codes.shape, v.right.shape[2]
    pushed, scaled = torch.zeros_like(codes), codes.mT * scale
    for part, dense in _dense_rows(v, d, chunk // ((n + samples) * columns)):
        reconstructed = codes @ dense
        pushed.addmm_(reconstructed, dense.mT)
        _back_to_matrices(v, (scaled @ reconstructed).view(n, -1, columns), part, d)
    return pushed


def _dense_rows(v: Matrices, d: Matrices, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all tensors, dense, `step` at a time: (which, [n, step * columns]). Clears what `d` will sum up."""
    d.right.zero_()
    step = max(8, step)  # with fewer rows the products would be too thin to be fast
    for i in range(0, v.left.shape[1], step):
        part = slice(i, i + step)
        yield part, torch.bmm(v.left[:, part], v.right).flatten(1)


def _back_to_matrices(v: Matrices, pushed: Tensor, part: slice, d: Matrices) -> None:
    """The gradient at some dense rows [n, rows, columns] goes to the matrices they are a product of."""
    d.left[:, part] = pushed @ v.right.mT
    d.right.baddbmm_(v.left[:, part].mT, pushed)


def add_products(v: Matrices, w: Matrices, weights: Tensor, gram: Tensor, d: Matrices, chunk: int) -> None:
    """Add <v_k, w_l> to `gram` [n, m], and the gradient of sum_kl weights_kl <v_k, w_l> at v to `d`; through ranks."""
    (n, rows, rank), (m, _, rank2) = v.left.shape, w.left.shape
    left, right = v.left.mT.reshape(n * rank, rows), v.right.reshape(n * rank, -1)
    other_left, other_right = w.left.mT.reshape(m * rank2, rows), w.right.reshape(m * rank2, -1)
    step = max(1, chunk // (m * rank * rank2))
    for i in range(0, n, step):
        some = slice(i * rank, (i + step) * rank)
        lefts, rights = left[some] @ other_left.mT, right[some] @ other_right.mT  # [some * R, m * R']
        gram[i : i + step] += (lefts * rights).view(-1, rank, m, rank2).sum((1, 3))
        scale = weights[i : i + step].view(-1, 1, m, 1)
        d_left = (rights.view(-1, rank, m, rank2) * scale).view(-1, m * rank2) @ other_left
        d_right = (lefts.view(-1, rank, m, rank2) * scale).view(-1, m * rank2) @ other_right
        d.left[i : i + step] += d_left.view(-1, rank, rows).mT
        d.right[i : i + step] += d_right.view(-1, rank, right.shape[1])


def add_products_through_rows(v: Matrices, w: Matrices, weights: Tensor, gram: Tensor, d: Matrices, chunk: int) -> None:
    """`add_products` with w dense, some rows of every tensor at a time."""
    (n, rows, _), m, columns = v.left.shape, w.left.shape[0], v.right.shape[2]
    step = max(8, chunk // (max(n, m) * columns))
    for i in range(0, rows, step):
        left = v.left[:, i : i + step]
        dense, other = torch.bmm(left, v.right).flatten(1), torch.bmm(w.left[:, i : i + step], w.right).flatten(1)
        gram.addmm_(dense, other.mT)
        pushed = (weights @ other).view(n, -1, columns)
        d.left[:, i : i + step] += pushed @ v.right.mT
        d.right.baddbmm_(left.mT, pushed)


class Tucker(NamedTuple):
    """n Tucker tensors of one shape, as tensors: `core` [n, R1, ..., RN] and `factors[m]` [n, I_m, R_m]."""

    core: Tensor
    factors: tuple[Tensor, ...]

    @property
    def n(self) -> int:
        return self.core.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (I1, ..., IN) of each tensor, the parameter's."""
        return tuple(factor.shape[1] for factor in self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.core.shape[1:])

    def dense(self) -> Tensor:
        """The tensors themselves, [n, I1, ..., IN]."""
        return dense_block([self]).view(self.n, *self.shape)

    def gram(self, other: "Tucker | None" = None) -> Tensor:
        """Inner products <v_k, w_l> of all tensors with all of `other` (default: with themselves), [n, n_other]."""
        mine = self.matrices()
        return mine.gram(mine if other is None or other is self else other.matrices())

    def matrices(self) -> Matrices:
        """The tensors as products of two matrices, first mode times all others."""
        core, factors = self.core, self.factors
        if len(factors) < 2:
            return Matrices(self.dense().reshape(self.n, -1, 1), core.new_ones(self.n, 1, 1))
        if len(factors) == 2 and self.ranks[1] < self.ranks[0]:
            return Matrices(factors[0] @ core, factors[1].mT)
        if len(factors) == 2:
            return Matrices(factors[0], core @ factors[1].mT)
        return Matrices(factors[0], _mode_products(core, factors[1:], first=1).flatten(2))

    def matrices_backward(self, d: Matrices) -> list[Tensor]:
        """From the gradient at `matrices` (of two modes or more) to those of (core, *factors)."""
        core, factors = self.core, self.factors
        if len(factors) == 2 and self.ranks[1] < self.ranks[0]:
            return [factors[0].mT @ d.left, d.left @ core.mT, d.right.mT]
        if len(factors) == 2:
            return [d.right @ factors[1], d.left, d.right.mT @ core]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (core, *factors[1:])]
            right = _mode_products(leaves[0], leaves[1:], first=1)
        d_core, *rest = torch.autograd.grad(right, leaves, d.right.reshape(right.shape))
        return [d_core, d.left, *rest]

    def squared_norms(self) -> Tensor:
        """‖v_k‖² of each tensor, [n], from the small Grams U^T U of its own factors."""
        tensor = self.core
        for mode, factor in enumerate(self.factors):
            head = math.prod(self.ranks[:mode])
            small = (factor.mT @ factor).unsqueeze(1)  # [n, 1, R_m, R_m]
            tensor = (small @ tensor.reshape(self.n, head, self.ranks[mode], -1)).reshape(self.core.shape)
        return (tensor * self.core).reshape(self.n, -1).sum(1)

    def scaled(self, scale: Tensor) -> "Tucker":
        """Each tensor times its entry of `scale` [n]."""
        return Tucker(self.core * scale.view(-1, *[1] * len(self.ranks)), self.factors)

    def select(self, index: Tensor | slice) -> "Tucker":
        """The tensors at `index`."""
        return Tucker(self.core[index], tuple(factor[index] for factor in self.factors))

    def detach(self) -> "Tucker":
        return Tucker(self.core.detach(), tuple(factor.detach() for factor in self.factors))

    def to_tensorly(self, k: int) -> "TuckerTensor":
        """Tensor k as tensorly's own `TuckerTensor` (with tensorly's backend set: `tensorly.set_backend("pytorch")`).

        A vector becomes a one-column matrix [I, 1]: tensorly wants two modes at least.
        """
        from tensorly.tucker_tensor import TuckerTensor

        core, factors = self.core[k], [factor[k] for factor in self.factors]
        if len(factors) == 1:
            core, factors = core.unsqueeze(1), [*factors, core.new_ones(1, 1)]
        return TuckerTensor((core, factors))


def dense_block(tuckers: Sequence[Tucker]) -> Tensor:
    """Dense tensors of several parameters, flattened and joined: [n, sum of their sizes].

    One autograd node with a hand-written backward: for small models a step is bound by the number of operations, and
    this takes a third of what autograd's own graph would.
    """
    return _DenseBlock.apply([len(tucker.factors) for tucker in tuckers], *flatten(tuckers))


def flatten(tuckers: Iterable[Tucker]) -> list[Tensor]:
    """(core, *factors) of every parameter, in one flat list."""
    return [tensor for tucker in tuckers for tensor in (tucker.core, *tucker.factors)]


def unflatten(modes: Sequence[int], flat: Sequence[Tensor]) -> list[Tucker]:
    """The inverse of `flatten`, for parameters of the given numbers of modes."""
    tuckers, start = [], 0
    for count in modes:
        tuckers.append(Tucker(flat[start], tuple(flat[start + 1 : start + 1 + count])))
        start += count + 1
    return tuckers


def _mode_products(core: Tensor, factors: Sequence[Tensor], first: int = 0) -> Tensor:
    """G x1 U1 ... xN UN for any number of modes, [n, I1, ..., IN]; factors of the modes from `first` on."""
    tensor = core
    for mode, factor in enumerate(factors, first):
        n, done = tensor.shape[0], tensor.shape[1 : mode + 1]
        moved = torch.einsum("napr,nip->nair", tensor.reshape(n, math.prod(done), factor.shape[2], -1), factor)
        tensor = moved.reshape(n, *done, factor.shape[1], *tensor.shape[mode + 2 :])
    return tensor


def multiply_out(tuckers: Sequence[Tucker]) -> tuple[Tensor, list[Tensor]]:
    """`dense_block`'s value [n, w], and what `multiply_out_backward` needs of the way there."""
    parts, lefts = [], []
    for tucker in tuckers:
        core, factors = tucker.core, tucker.factors
        left = core
        if len(factors) == 2:
            left = factors[0] @ core  # [n, I1, R2]
            part = left @ factors[1].mT
        elif len(factors) == 1:
            part = factors[0] @ core.unsqueeze(2)
        else:
            part = _mode_products(core, factors)
        lefts.append(left)
        parts.append(part.reshape(core.shape[0], -1))
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]), lefts


def multiply_out_backward(tuckers: Sequence[Tucker], lefts: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """From the gradient at the block [n, w] to those of (core, *factors) of every parameter, in one flat list."""
    result: list[Tensor] = []
    sizes = [math.prod(tucker.shape) for tucker in tuckers]
    for tucker, left, part in zip(tuckers, lefts, gradient.split(sizes, dim=1), strict=True):
        core, factors, n = tucker.core, tucker.factors, tucker.n
        if len(factors) == 2:
            d = part.reshape(n, *tucker.shape)
            right = d @ factors[1]  # [n, I1, R2]
            result += [factors[0].mT @ right, right @ core.mT, d.mT @ left]
        elif len(factors) == 1:
            d = part.unsqueeze(2)
            result += [(factors[0].mT @ d).squeeze(2), d * core.unsqueeze(1)]
        else:
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (core, *factors)]
                dense = _mode_products(leaves[0], leaves[1:])
            result += torch.autograd.grad(dense, leaves, part.reshape(dense.shape))
    return result


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, modes: list[int], *flat: Tensor) -> Tensor:
        block, lefts = multiply_out(unflatten(modes, flat))
        ctx.modes = modes
        ctx.save_for_backward(*flat, *lefts)
        return block

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        count = len(ctx.saved_tensors) - len(ctx.modes)
        tuckers = unflatten(ctx.modes, ctx.saved_tensors[:count])
        return None, *multiply_out_backward(tuckers, ctx.saved_tensors[count:], gradient)


class TuckerParameters(nn.Module):
    """The learned core and factors of `n` Tucker tensors shaped like one parameter; `tucker` is the algebra on them.

    `core` is [n, R1, ..., RN], `factor{m}` [n, I_m, R_m]: a shard by subnetwork is a slice of the first dimension of
    each. They start as independent normal values (the paper's code; the scale is undone by the unit norm), so that
    every subnetwork starts as a random direction.

    Args:
        own: which of the n this process keeps (default: all). All are drawn, so that a shard is that of the whole.
    """

    def __init__(
        self,
        n: int,
        shape: Sequence[int],
        ranks: Sequence[int],
        generator: torch.Generator | None = None,
        own: slice = slice(None),
    ):
        super().__init__()
        # Columns of about unit norm, as after an SVD: the optimizer's step then means the same for both starts.
        core = torch.randn(n, *ranks, generator=generator)[own] / math.sqrt(math.prod(ranks))
        self.core = nn.Parameter(core)
        for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
            factor = torch.randn(n, size, rank, generator=generator)[own] / math.sqrt(size)
            self.register_parameter(f"factor{mode}", nn.Parameter(factor))

    @property
    def tucker(self) -> Tucker:
        """The tensors themselves; of a sharded parameter, this process's subnetworks."""
        core, *factors = map(local, self._parameters.values())  # registration's order; faster than a ParameterList
        return Tucker(core, tuple(factors))

    @torch.no_grad()
    def copy_(self, other: Tucker, index: Tensor | slice = slice(None)) -> None:
        """Overwrite the tensors at `index` with `other`."""
        for mine, theirs in zip(map(local, self.parameters()), (other.core, *other.factors), strict=True):
            mine[index] = theirs.to(mine)


def local(tensor: Any) -> Any:
    """What this process holds of a sharded tensor (a DTensor); any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def truncate(tensors: Tensor, ranks: Sequence[int]) -> Tucker:
    """Tucker approximation of dense tensors [n, I1, ..., IN]: the data-driven start of subnetworks.

    Vectors and matrices by a batched SVD (the best approximation there is, Eckart-Young), large matrices of small rank
    by subspace iteration, which comes close to it; tensors of more modes by tensorly's `tucker` (HOOI started from the
    HOSVD). The factors are orthonormal, the core holds the scale.
    """
    shape = tensors.shape[1:]
    if len(shape) == 2 and min(shape) >= 64 and 4 * max(ranks) <= min(shape):
        return _subspace_iteration(tensors, ranks)
    if len(shape) == 0:
        return Tucker(tensors.clone(), ())
    if len(shape) <= 2:
        u, singular, vh = torch.linalg.svd(tensors if len(shape) == 2 else tensors.unsqueeze(2), full_matrices=True)
        if len(shape) == 1:
            core = torch.zeros_like(tensors[:, : ranks[0]])
            core[:, 0] = singular[:, 0] * vh[:, 0, 0]
            return Tucker(core, (u[..., : ranks[0]].contiguous(),))
        core = torch.diag_embed(singular)
        core = nn.functional.pad(core, (0, shape[1] - core.shape[2], 0, shape[0] - core.shape[1]))
        core = core[:, : ranks[0], : ranks[1]].contiguous()
        return Tucker(core, (_settled(u[..., : ranks[0]], singular), _settled(vh[:, : ranks[1]].mT, singular)))
    import tensorly  # scipy comes with it: a second of every start
    from tensorly.decomposition import tucker

    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to compute SVD")  # of modes smaller than the rest's rank
        parts = [tucker(tensor, rank=list(ranks), init="svd", n_iter_max=10) for tensor in tensors]
    factors = tuple(torch.stack([part.factors[mode] for part in parts]) for mode in range(len(shape)))
    return Tucker(torch.stack([part.core for part in parts]), factors)


def _subspace_iteration(matrices: Tensor, ranks: Sequence[int], more: int = 8, steps: int = 3) -> Tucker:
    """`truncate` for matrices [n, rows, columns] (Halko, Martinsson, Tropp 2011); its start is always the same."""
    random = torch.Generator().manual_seed(0)
    start = torch.randn(matrices.shape[2], max(ranks) + more, generator=random).to(matrices)
    left = torch.linalg.qr(matrices @ start).Q
    for _ in range(steps):
        right = torch.linalg.qr(matrices.mT @ left).Q
        left = torch.linalg.qr(matrices @ right).Q
    u, singular, vh = torch.linalg.svd(left.mT @ matrices @ right, full_matrices=False)
    core = torch.diag_embed(singular)[:, : ranks[0], : ranks[1]].contiguous()
    u, v = left @ u[..., : ranks[0]], right @ vh[:, : ranks[1]].mT
    return Tucker(core, (_settled(u, singular), _settled(v, singular)))


def _settled(vectors: Tensor, singular: Tensor) -> Tensor:
    """Singular vectors [n, rows, r], where those of singular values that are rounding errors are always the same ones.

    A direction of one sample is often a matrix of rank one. LAPACK's second vector is then any orthogonal one, and
    another number of processes, which sums in another order, would start, and so end, elsewhere.
    """
    noise = 64 * torch.finfo(vectors.dtype).eps * singular[:, :1]
    known = nn.functional.pad(singular > noise, (0, max(0, vectors.shape[2] - singular.shape[1])))
    known = known[:, None, : vectors.shape[2]]
    if bool(known.all()):
        return vectors.contiguous()
    random = torch.Generator().manual_seed(0)
    fixed = torch.randn(vectors.shape[1:], generator=random).to(vectors)
    return torch.where(known, vectors, torch.linalg.qr(torch.where(known, vectors, fixed)).Q)
