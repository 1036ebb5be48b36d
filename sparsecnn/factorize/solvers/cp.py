"""CP by alternating least squares, its starts, and the guard against cancelling terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cp_power import cp_tpm
from .cp_tensor import (
    _TINY,
    CP,
    Unfolded,
    check_init,
    checked,
    effort,
    hadamard,
    normal_columns,
    normalized,
)

# Proximal weight (columns have length 1): keeps the systems definite for collinear terms without
# moving the solution. Far above the rounding of the Gram matrices, about R * 2e-16.
_PROXIMAL = 1e-11
# Where the squared relative error is rounding: x.x - 2 x.y + y.y of equal x and y.
_ROUNDING = 1e-15
_DEGENERATE = 10.0
_PENALTIES = (1e-3, 1e-2)


def cp_als(
    x: Tensor,
    rank: int,
    *,
    n_init: int | None = None,
    l2: float = 0.0,
    max_iter: int | None = None,
    tol: float = 1e-4,
    seed: int = 0,
    init: CP | None = None,
) -> CP:
    """CP by alternating least squares: ``min ||X - sum_r w_r a_r o b_r o ..||^2 + l2 ||w||^2``.

    For each mode: A_m diag(w) <- X_(m) KR (H + l2 I)^-1 with KR the Khatri-Rao product of the
    other factors and H the elementwise product of their Gram matrices; then the columns of A_m are
    scaled to length 1. So the penalty means the same in every mode and the objective never rises.

    The starts: singular vectors (`_spectral_start`), `n_init` random ones and, on small tensors,
    the terms of the power method; the least objective wins, all run as one batch. For a matrix, or
    a tensor with all but two modes of length 1, the first is the optimum. On large tensors
    (512 x 512 x 9 at rank 200) a sweep takes 0.1 s on one core. There the spectral start alone
    with 30 sweeps comes within 6 % of the error of ten times as many sweeps (kernels of decaying
    spectra, 256 and 512 channels), which those buy with terms that cancel: sum_r w_r^2 grows from
    1 to 3 times ||X||^2 to 15 to 40 times.

    Own code, and not `tensorly.decomposition.parafac`, for speed: that forms one full product per
    mode where `Unfolded.sweep` needs two in all, runs one start at a time, and penalizes each
    factor by itself, so that l2 depends on how weights are spread. Same optima (tested).

    Args:
        x: (n_1 .. n_d).
        rank: R.
        n_init: random starts beside the deterministic ones; 3 on small tensors, else 0.
        l2: >= 0, penalty on the weights relative to terms of length 1.
        max_iter: most sweeps; 300 on small tensors, else 30.
        tol: stop when a sweep lowers the root of the objective by less than this share of it.
        seed: of the random starts.
        init: begin here, and nowhere else.

    Returns:
        CP.

    Raises:
        ValueError: see `checked`; l2, n_init or max_iter out of range; an `init` of other shape.

    Cost: per sweep two products of N R multiply-adds and d factorizations of (R, R).

    Source: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned
    CP-decomposition", ICLR 2015; Kolda, Bader, SIAM Review 51 (2009).
    """
    x = checked("cp_als", x, rank)
    n_init = effort(x, rank, 3, 0) if n_init is None else n_init
    max_iter = effort(x, rank, 300, 30) if max_iter is None else max_iter
    if not l2 >= 0 or n_init < 0 or max_iter < 1:
        raise ValueError(
            "cp_als: expected l2 >= 0, n_init >= 0 and max_iter >= 1, got "
            f"{l2}, {n_init} and {max_iter}"
        )
    batch = x.unsqueeze(0)
    if init is not None:
        check_init("cp_als", x, rank, init)
        starts = [[f.unsqueeze(0) for f in init.factors]]
    else:
        generator = torch.Generator().manual_seed(seed)
        starts = [_spectral_start(batch, rank, generator)]
        if _is_matrix(x.shape):
            n_init = 0
        elif effort(x, rank, 1, 0):
            starts.append([f.unsqueeze(0) for f in cp_tpm(x, rank, seed=seed).factors])
        starts += [normal_columns(x.shape, rank, 1, generator) for _ in range(n_init)]
    weights, factors = _best_fit(batch, starts, l2, max_iter, tol)
    return normalized(weights[0], [f[0] for f in factors])


def cp_als_batch(
    x: Tensor, rank: int, *, n_init: int = 2, max_iter: int = 200, tol: float = 1e-4, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """`cp_als` of B small tensors at once.

    Args:
        x: (B, n_1 .. n_d).
        rank: R of each.
        n_init: see `cp_als`.
        max_iter: see `cp_als`.
        tol: see `cp_als`, of the error over all B tensors.
        seed: see `cp_als`.

    Returns:
        weights (B, R) and per mode (B, n_m, R) with columns of length 1.

    Raises:
        ValueError: see `checked`.
    """
    x = checked("cp_als_batch", x, rank)
    generator = torch.Generator().manual_seed(seed)
    starts = [_spectral_start(x, rank, generator)]
    if not _is_matrix(x.shape[1:]):
        starts += [normal_columns(x.shape[1:], rank, len(x), generator) for _ in range(n_init)]
    return _best_fit(x, starts, 0.0, max_iter, tol)


def cp_exact(x: Tensor) -> CP:
    """X as n_min n_3 ... n_d terms without error, n_min = min(n_1, n_2).

    X = sum_{s,i,j} X[:, s, i, j] o e_s o e_i o e_j, the first two modes in the other roles when
    the first is the shorter one.

    Args:
        x: (n_1, n_2 .. n_d).

    Returns:
        CP.

    Raises:
        ValueError: see `checked`.
    """
    x = checked("cp_exact", x, 1)
    free = 0 if x.shape[0] >= x.shape[1] else 1
    columns = x.movedim(free, 0).flatten(1)
    fixed = [n for m, n in enumerate(x.shape) if m != free]
    indices = torch.cartesian_prod(*[torch.arange(n) for n in fixed]).reshape(-1, len(fixed))
    factors = [
        torch.nn.functional.one_hot(indices[:, m], n).T.double() for m, n in enumerate(fixed)
    ]
    factors.insert(free, columns)
    return normalized(torch.ones(columns.shape[1], dtype=torch.float64), factors)


def guarded(x: Tensor, fit: Callable[[float], CP], *, seed: int = 0) -> tuple[CP, str]:
    """`fit(0)`, or a tamer fit where its terms cancel, and a sentence that says so.

    A best CP approximation need not exist: terms can grow without bound and opposite signs while
    the error still falls (de Silva, Lim, SIAM J. Matrix Anal. Appl. 30 (2008)). Such a chain loses
    its digits in float32 and cannot be tuned. Above sum_r w_r^2 / ||X||^2 = 10 the tensor is fitted
    again with a penalty on the weights (on kernels 0.001 halts their growth at about 5 and raises
    the error by less than 1 %), and if that does not help, by the power method, whose weights are
    bounded.

    Args:
        x: (n_1 .. n_d).
        fit: makes a CP of it for a given l2.
        seed: of the power method.

    Returns:
        The CP to use; "" or the reason and the remedy.
    """
    found = fit(0.0)
    degeneracy = found.degeneracy(x)
    if degeneracy <= _DEGENERATE:
        return found, ""
    reason = f"terms cancel (squared weights sum to {degeneracy:.3g} times the squared norm)"
    for l2 in _PENALTIES:
        tamed = fit(l2)
        if tamed.degeneracy(x) <= _DEGENERATE:
            return tamed, f"{reason}: fitted again with l2={l2:g}"
    return cp_tpm(x, len(found.weights), seed=seed), f"{reason}: replaced by the power method"


def _is_matrix(sizes: Sequence[int]) -> bool:
    return sum(n > 1 for n in sizes) <= 2


def _spectral_start(x: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """The leading terms of a decomposition without error, one (B, n_m, R) per mode.

    All modes but the two longest are rotated to their singular vectors (HOSVD). Each slice along
    them is a matrix; the R greatest singular triplets over all slices, with the rotated unit
    vectors, are mutually orthogonal terms. With R = all of them the tensor is met exactly, which
    the usual start from the singular vectors of every mode (Kolda, Bader 2009) cannot promise;
    it also needs random columns as soon as R exceeds a mode of length 3.
    """
    sizes = list(x.shape[1:])
    long, short = sorted(range(len(sizes)), key=lambda m: -sizes[m])[:2]  # stable: ties by position
    others = [m for m in range(len(sizes)) if m not in (long, short)]
    rotated = x.permute(0, *[m + 1 for m in others], long + 1, short + 1)
    bases = []
    for k in range(len(others)):
        unfolded = rotated.movedim(k + 1, 1).flatten(2)
        basis = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors.flip(-1)  # (B, n, n)
        bases.append(basis)
        moved = rotated.movedim(k + 1, -1)
        lead = [1] * (moved.dim() - 3)
        rotated = (moved @ basis.reshape(len(x), *lead, *basis.shape[1:])).movedim(-1, k + 1)
    slices = rotated.reshape(len(x), -1, sizes[long], sizes[short])
    # Of the short side's Gram matrix: half the squared precision is plenty for a start.
    square, right = torch.linalg.eigh(slices.mT @ slices)
    square, right = square.flip(-1), right.flip(-1)
    count = min(rank, square[0].numel())
    chosen = square.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :count]
    where, which = chosen // sizes[short], chosen % sizes[short]
    row = torch.arange(len(x)).unsqueeze(1)
    v = right[row, where, :, which]  # (B, count, short)
    u = (slices[row, where] @ v.unsqueeze(-1)).squeeze(-1)
    found: list[Tensor] = [x] * len(sizes)
    found[long], found[short] = u.mT, v.mT
    index = torch.unravel_index(where, [sizes[m] for m in others]) if others else ()
    for m, basis, i in zip(others, bases, index, strict=True):
        found[m] = basis[row, :, i].mT
    random = normal_columns(sizes, rank, len(x), generator)
    norms = [f.norm(dim=1, keepdim=True) for f in found]
    return [
        torch.cat([torch.where(n > 0, f / n.clamp_min(_TINY), r[:, :, :count]), r[:, :, count:]], 2)
        for f, n, r in zip(found, norms, random, strict=True)
    ]


def _best_fit(
    x: Tensor, starts: Sequence[list[Tensor]], l2: float, max_iter: int, tol: float
) -> tuple[Tensor, list[Tensor]]:
    """Weights (B, R) and factors of the best start of each of B tensors (B, n_1 .. n_d)."""
    u = Unfolded.of(x)
    batch, rank = len(x), starts[0][0].shape[2]
    factors = [torch.cat(parts) for parts in zip(*map(u.arranged, starts), strict=True)]
    weights = torch.zeros(len(starts) * batch, rank, dtype=torch.float64)
    count = len(starts)
    objective = _alternate(u.repeated(count), weights, factors, l2, max_iter, tol, batch)
    chosen = objective.reshape(count, batch).argmin(0) * batch + torch.arange(batch)
    return weights[chosen], u.restored([f[chosen] for f in factors])


def _alternate(
    u: Unfolded,
    weights: Tensor,
    factors: list[Tensor],
    l2: float,
    max_iter: int,
    tol: float,
    batch: int,
) -> Tensor:
    """Alternating least squares in place.

    Args:
        u: starts * batch tensors, the batch fastest.
        weights: (starts * batch, R).
        factors: (starts * batch, n_m, R) with columns of length 1.
        l2: see `cp_als`.
        max_iter: most sweeps.
        tol: stop when no start lowers the error over its batch by more than this share.
        batch: tensors per start.

    Returns:
        The objective of each tensor (starts * batch,).
    """
    grams = [f.mT @ f for f in factors]
    square = u.matrix.square().sum((1, 2))
    rounding = _ROUNDING * square.reshape(-1, batch).sum(1)
    ridge = (l2 + _PROXIMAL) * torch.eye(weights.shape[1], dtype=torch.float64)
    objective = square

    def update(m: int, product: Tensor) -> Tensor:
        nonlocal objective
        system = hadamard([g for q, g in enumerate(grams) if q != m])
        old = factors[m]
        right = product + _PROXIMAL * (old * weights.unsqueeze(1))
        solved = torch.cholesky_solve(right.mT, torch.linalg.cholesky(system + ridge)).mT
        weights.copy_(solved.norm(dim=1))
        length = weights.unsqueeze(1)
        unit = torch.where(length > 0, solved / length.clamp_min(_TINY), old)
        grams[m] = unit.mT @ unit
        if m == len(factors) - 1:
            fitted = (solved * (solved @ system)).sum((1, 2))
            objective = square - 2 * (product * solved).sum((1, 2)) + fitted
            objective = objective.clamp_min(0) + l2 * weights.square().sum(1)
        return unit

    previous = None
    for _ in range(max_iter):
        u.sweep(factors, update)
        total = objective.reshape(-1, batch).sum(1)
        if bool((total <= rounding).any()):  # nothing is left for the other starts to win
            break
        if previous is not None:
            gained = previous.sqrt() - total.sqrt()
            if bool((gained <= tol * total.sqrt()).all()):
                break
        previous = total
    return objective
