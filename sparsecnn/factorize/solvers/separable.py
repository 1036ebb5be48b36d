r"""Few separable filters of which a bank of 2-D filters is made up.

    min sum_j || f_j - sum_k w_jk s_k ||^2    over w (n, K) and s (K, kh, kw), every s_k of rank 1.

Rigamonti, Sironi, Lepetit, Fua, "Learning separable filters", CVPR 2013, relax the rank to the
nuclear norm, ``+ lam sum_k ||s_k||_*``, and raise lam until every s_k has rank 1; Sironi, Tekin,
Rigamonti, Lepetit, Fua, "Learning separable filters", TPAMI 37 (2015), take the canonical
decomposition of the bank as a (n, kh, kw) tensor, which is the same model.

The best w for given s is linear, so that the bank F (n, kh kw) counts only by its Gram matrix: the
search runs on R, F = Q R with Q^T Q = I, which has at most kh kw filters however large n is.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .cp import cp_als

Solver = Literal["svt", "cp"]
SOLVERS = get_args(Solver)
_STARTS = 3
# lam over the Lipschitz constant of the gradient, as a share of the norm 1 of each s_k: by how much
# a step lowers singular values. It ends below 1/sqrt(24), where an s_k of 24 x 24 could vanish.
_FIRST, _RAISE, _LAST, _STEPS = 1e-3, 1.05, 0.2, 2
_EVALUATIONS, _ENOUGH = 100, 1e-8
# Without a price on w two s_k may grow alike while their weights cancel, without end: with 4
# filters 3x3 for noise, weights of 70 to 240 times the bank's norm lower the error by 1e-4 of what
# weights of 2 reach. Planted bases come out with a relative error of half of this.
_PRICE = 1e-6


def svt(matrices: Tensor, threshold: float) -> Tensor:
    """``argmin_X ||X - A||^2 / 2 + threshold ||X||_*``: singular values less the threshold.

    Cai, Candes, Shen, "A singular value thresholding algorithm for matrix completion", SIAM
    Journal on Optimization 20 (2010).

    Args:
        matrices: A, (..., rows, columns).
        threshold: >= 0; smaller singular values become 0.
    """
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    shrunk: Tensor = (left * (values - threshold).clamp(min=0)[..., None, :]) @ right
    return shrunk


def sep_svd(filters: Tensor, rank: int) -> Tensor:
    """Each filter as a sum of separable ones of its own: its truncated SVD.

    The plain way to separable filters, n rank of them where `separable_basis` shares K.

    Args:
        filters: (n, kh, kw).
        rank: separable filters per filter.

    Returns:
        (n, kh, kw) float64.
    """
    left, values, right = torch.linalg.svd(filters.double(), full_matrices=False)
    cut: Tensor = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    return cut


def separable_basis(
    filters: Tensor, count: int, *, solver: Solver = "svt", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A shared basis of separable filters, and how each filter is made of it.

    "svt" starts at the best basis of any filters (principal components) and at random rotations of
    it, and alternates least squares for w with proximal gradient steps for s: singular values are
    soft-thresholded by a lam that is raised until every s_k has rank 1. "cp" starts at a canonical
    decomposition by alternating least squares. Both end with Levenberg-Marquardt steps among
    separable bases, w being solved for at a small price, and the best end is taken.

    Args:
        filters: f, (n, kh, kw).
        count: K in [1, kh kw]; at kh kw the basis is that of single positions and exact.
        solver: "svt" or "cp".
        seed: of the starts: same seed, same bits.

    Returns:
        s (K, kh, kw) of unit norm and rank 1, and w (n, K); float64.

    Raises:
        ValueError: filters of another shape, count out of range or an unknown solver.

    Cost: O(n (kh kw)^2) and a search that does not depend on n: tenths of a second for 3x3.
    """
    if filters.dim() != 3 or filters.numel() == 0:
        raise ValueError(
            f"separable_basis: expected filters (n, kh, kw), got {tuple(filters.shape)}"
        )
    if solver not in SOLVERS:
        raise ValueError(f"separable_basis: expected solver 'svt' or 'cp', got {solver!r}")
    n, kh, kw = filters.shape
    if not 1 <= count <= kh * kw:
        raise ValueError(f"separable_basis: expected count in [1, {kh * kw}], got {count}")
    bank = filters.detach().to("cpu", torch.float64).flatten(1)
    basis = torch.eye(kh * kw, dtype=torch.float64)[:count].reshape(count, kh, kw)
    if n == 1:
        left, _, right = torch.linalg.svd(bank.reshape(kh, kw), full_matrices=False)
        own = left.T[:count, :, None] * right[:count, None, :]
        basis = torch.cat([own, basis[: count - len(own)]])
    elif count < kh * kw and bool(bank.any()):
        reduced = torch.linalg.qr(bank, mode="r").R
        reduced = reduced / torch.linalg.vector_norm(reduced)
        if min(kh, kw) == 1:
            starts = _principal(reduced, count).reshape(1, count, kh, kw)
        else:
            starts = (_by_svt if solver == "svt" else _by_cp)(reduced, (count, kh, kw), seed)
        ends = [_refined(reduced, start) for start in starts]
        # The first of the equally good ones: starts often end in the same filters.
        least = min(error for error, _ in ends)
        basis = next(found for error, found in ends if error <= 1.0001 * least)
    return basis, bank @ torch.linalg.pinv(basis.flatten(1), rtol=1e-10)


def _principal(bank: Tensor, count: int) -> Tensor:
    """The orthonormal basis (count, p) that loses least of a bank (m, p)."""
    _, _, right = torch.linalg.svd(bank, full_matrices=True)
    components: Tensor = right[:count]
    return components


def _by_svt(bank: Tensor, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Bases (starts, K, kh, kw) of unit norm and nearly rank 1; bank (m, p) of norm 1."""
    count = shape[0]
    source = torch.Generator().manual_seed(seed)
    turns = torch.randn(_STARTS, count, count, generator=source, dtype=torch.float64)
    turns[0] = torch.eye(count)
    basis = torch.linalg.qr(turns).Q @ _principal(bank, count)
    threshold = _FIRST
    while threshold < _LAST and _above_rank_1(basis.unflatten(2, shape[1:])):
        weights = bank @ torch.linalg.pinv(basis)
        gram, pull = weights.mT @ weights, weights.mT @ bank
        step = 1 / torch.linalg.eigvalsh(gram)[:, -1, None, None].clamp(min=1e-30)
        for _ in range(_STEPS):
            moved = basis - step * (gram @ basis - pull)
            basis = svt(moved.unflatten(2, shape[1:]), threshold).flatten(2)
        # Else s_k shrinks, its weights grow and nothing is thresholded any more.
        basis = basis / torch.linalg.vector_norm(basis, dim=2, keepdim=True).clamp(min=1e-30)
        threshold *= _RAISE
    bases: Tensor = basis.unflatten(2, shape[1:])
    return bases


def _above_rank_1(basis: Tensor) -> bool:
    return bool((torch.linalg.svdvals(basis)[..., 1:] > 1e-8).any())


def _by_cp(bank: Tensor, shape: tuple[int, int, int], seed: int) -> Tensor:
    """The basis (1, K, kh, kw) of rank 1 of the best canonical decomposition of the bank (m, p)."""
    count, kh, kw = shape
    fit = cp_als(bank.reshape(-1, kh, kw), count, n_init=_STARTS, l2=_PRICE, seed=seed)
    _, rows, columns = fit.factors
    return (rows.T[:, :, None] * columns.T[:, None, :])[None]


def _refined(bank: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """Levenberg-Marquardt steps from the nearest separable basis, the weights being solved for.

    Minimizes ``||R - w S||^2 + price ||w||^2`` over S of unit norm, w the best for each S: least
    squares for R and K zeros more per filter with ``[S, sqrt(price) I]``. The Jacobian is that of
    Kaufman: the change of S times w, projected off S (Golub, Pereyra, "Separable nonlinear least
    squares", Inverse Problems 19, 2003). Own steps, because `scipy.optimize.least_squares` differs
    in bits from run to run ("lm") or stops where an SVD does not converge ("trf").

    Returns:
        The root of the minimum, and S (K, kh, kw).
    """
    left, _, right = torch.linalg.svd(start, full_matrices=False)
    units = (left[:, :, 0], right[:, 0])
    wanted = torch.cat([bank, bank.new_zeros(len(bank), len(start))], 1)
    error, slope, curve = _normal_equations(wanted, units)
    damping = 1e-3
    for _ in range(_EVALUATIONS):
        # Sizes do not count: along them the curvature is 0, and only the damping is there.
        floor = damping * curve.diagonal().max().clamp(min=1e-30) * torch.eye(len(curve)).double()
        step = torch.linalg.solve(curve + floor, -slope)
        cut = units[0].numel()
        moved = (
            _unit(units[0] + step[:cut].reshape_as(units[0])),
            _unit(units[1] + step[cut:].reshape_as(units[1])),
        )
        after, new_slope, new_curve = _normal_equations(wanted, moved)
        if after >= error:
            if damping > 1e6:
                break
            damping *= 8
            continue
        gained = error - after
        units, error, slope, curve = moved, after, new_slope, new_curve
        damping = max(damping / 8, 1e-12)
        if gained <= _ENOUGH * error:
            break
    return math.sqrt(error), units[0][:, :, None] * units[1][:, None, :]


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return unit


def _normal_equations(
    wanted: Tensor, units: tuple[Tensor, Tensor]
) -> tuple[float, Tensor, Tensor]:
    """Squared residual, and J^T r and J^T J for changes of the rows, then of the columns."""
    (count, kh), kw = units[0].shape, units[1].shape[1]
    basis = (units[0][:, :, None] * units[1][:, None, :]).flatten(1)
    priced = torch.cat([basis, math.sqrt(_PRICE) * torch.eye(count).double()], 1)
    inverse = torch.linalg.pinv(priced)
    weights = wanted @ inverse
    residual = wanted - weights @ priced
    off = torch.eye(priced.shape[1]).double() - inverse @ priced
    off = off[: kh * kw].reshape(kh, kw, -1)
    blocks = []
    for unit, turn in zip(
        units,
        (
            torch.einsum("kj,ijp->kip", units[1], off),
            torch.einsum("ki,ijp->kjp", units[0], off),
        ),
        strict=True,
    ):
        along = torch.einsum("ki,kip->kp", unit, turn)[:, None]
        blocks.append((turn - unit[:, :, None] * along).flatten(0, 1))
    turns = torch.cat(blocks)
    owner = torch.cat([torch.arange(count).repeat_interleave(n) for n in (kh, kw)])
    # J has one row per filter and position; its products need no more than w^T w and w^T r.
    curve = (weights.T @ weights)[owner][:, owner] * (turns @ turns.T)
    slope = -((weights.T @ residual)[owner] * turns).sum(1)
    return float(residual.square().sum()), slope, curve
