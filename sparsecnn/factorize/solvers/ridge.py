r"""Weights predicted from a few of them, by kernel ridge regression over their positions.

The weights of a kernel at p = kh kw positions, one column per kernel slice, are W (p, n). Where
they are smooth over the positions, the rows W_a at a few observed ones tell the others:

    W ~ U W_a,    U = K[:, a] (K[a, a] + lam I)^-1,

with K_ij = exp(-||p_i - p_j||^2 / (2 s^2)), or K the covariance of weights. The dictionary U
depends on the positions only. Denil, Shakibi, Dinh, Ranzato, de Freitas, "Predicting parameters in
deep learning", NIPS 2013.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Wide kernel functions over neighbouring positions are singular but for rounding.
_RTOL = 1e-13


def gaussian_kernel(grid: tuple[int, int], bandwidth: float) -> Tensor:
    """K (kh*kw, kh*kw) float64, positions row by row.

    Args:
        grid: kh, kw.
        bandwidth: s, in positions.

    Raises:
        ValueError: bandwidth not above 0.
    """
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"gaussian_kernel: expected bandwidth > 0, got {bandwidth}")
    places = _places(grid).double()
    squares = (places[:, None] - places).square().sum(-1)
    return torch.exp(-squares / (2 * bandwidth**2))


def empirical_covariance(weight: Tensor) -> Tensor:
    """Second moments ``W W^T / n`` (p, p) of the columns of W (p, n), float64."""
    columns = weight.double()
    return columns @ columns.T / columns.shape[1]


def observed_positions(grid: tuple[int, int], count: int) -> Tensor:
    """Positions that lie evenly among all: (count,) int64, ascending, row * kw + column.

    The fields of one colour of a checkerboard come first, from the middle on always the one that
    is farthest from those taken; then those of the other colour likewise. Ties by position.

    Raises:
        ValueError: count outside [1, kh kw].
    """
    total = grid[0] * grid[1]
    if not 1 <= count <= total:
        raise ValueError(f"observed_positions: expected count in [1, {total}], got {count}")
    places = _places(grid)
    middle = torch.tensor([grid[0] - 1, grid[1] - 1])
    odd = places.sum(1) % 2
    # In integers, so that equal distances are equal: the middle counts in half positions.
    nearest = -(2 * places - middle).square().sum(1)
    taken: list[int] = []
    for _ in range(count):
        free = torch.ones(total, dtype=torch.bool)
        free[taken] = False
        colour = odd[free].min()
        score = nearest.masked_fill(~free | (odd != colour), -(2**62))
        best = int(score.argmax())  # the first of equal ones
        away = (places - places[best]).square().sum(1)
        nearest = torch.minimum(nearest, away) if taken else away
        taken.append(best)
    return torch.tensor(sorted(taken))


def telling_positions(kernel: Tensor, count: int) -> Tensor:
    """Positions that tell most of the others: (count,) int64, ascending.

    Pivots of the Cholesky decomposition of K: always the one whose variance the ones before
    explain least. Ties by position.

    Args:
        kernel: K, (p, p), positive semidefinite.
        count: 1 to p; those beyond the rank of K tell nothing more.

    Raises:
        ValueError: count out of range.

    Cost: O(p count^2).
    """
    size = len(kernel)
    if not 1 <= count <= size:
        raise ValueError(f"telling_positions: expected count in [1, {size}], got {count}")
    rest = kernel.diagonal().double().clone()
    factors = torch.zeros(size, count, dtype=torch.float64)
    taken: list[int] = []
    for i in range(count):
        left = rest.clone()
        left[taken] = -1.0
        best = int(left.argmax())
        taken.append(best)
        pivot = float(rest[best])
        if pivot > 0:
            column = kernel[:, best].double() - factors[:, :i] @ factors[best, :i]
            factors[:, i] = column / pivot**0.5
            rest = (rest - factors[:, i].square()).clamp(min=0)
    return torch.tensor(sorted(taken))


def product_of(observed: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of which the ascending positions are all pairs; None if they are not."""
    rows, columns = (observed // grid[1]).unique(), (observed % grid[1]).unique()
    every = (rows[:, None] * grid[1] + columns).flatten()
    return (rows, columns) if torch.equal(every, observed) else None


def ridge_dictionary(kernel: Tensor, observed: Tensor, lam: float) -> Tensor:
    """``U = K[:, a] (K[a, a] + lam I)^-1``, (p, a) float64.

    Args:
        kernel: K, (p, p), positive semidefinite.
        observed: a, positions in [0, p), each once.
        lam: >= 0. At 0 the observed weights stay what they are: their rows of U are those of the
            identity, set so because rounding would not keep them with a kernel close to singular.

    Raises:
        ValueError: lam below 0, or positions out of range or repeated.

    Cost: O(a^3 + p a^2).
    """
    size = kernel.shape[0]
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"ridge_dictionary: expected lam >= 0, got {lam}")
    inside = bool(((observed >= 0) & (observed < size)).all())
    if not len(observed) or not inside or len(observed.unique()) != len(observed):
        raise ValueError(
            f"ridge_dictionary: expected observed to name positions in [0, {size}), each once, "
            f"got {observed.tolist()}"
        )
    full = kernel.double()
    eye = torch.eye(len(observed), dtype=torch.float64)
    inner = full[observed][:, observed] + lam * eye
    basis: Tensor = full[:, observed] @ torch.linalg.pinv(inner, rtol=_RTOL, hermitian=True)
    if lam == 0:
        basis[observed] = eye
    return basis


def predict_weights(
    values: Tensor,
    observed: Tensor,
    grid: tuple[int, int],
    *,
    kernel: Tensor | None = None,
    bandwidth: float = 1.0,
    lam: float = 0.0,
) -> Tensor:
    """All weights from the observed ones: ``U W_a``.

    Args:
        values: W_a (a, n), row i the weights at position ``observed[i]``.
        observed: (a,) int64, row * kw + column; `observed_positions` spreads them evenly.
        grid: kh, kw.
        kernel: K (kh*kw, kh*kw), for instance `empirical_covariance` of other weights; default the
            Gaussian one.
        bandwidth: of the Gaussian kernel.
        lam: see `ridge_dictionary`; what the observed weights are trusted.

    Returns:
        (kh*kw, n) float64.

    Raises:
        ValueError: shapes that do not fit, or see `ridge_dictionary` and `gaussian_kernel`.
    """
    size = grid[0] * grid[1]
    if values.dim() != 2 or values.shape[0] != len(observed):
        raise ValueError(
            f"predict_weights: expected values ({len(observed)}, n), got {tuple(values.shape)}"
        )
    if kernel is None:
        kernel = gaussian_kernel(grid, bandwidth)
    if kernel.shape != (size, size):
        raise ValueError(
            f"predict_weights: expected kernel ({size}, {size}), got {tuple(kernel.shape)}"
        )
    return ridge_dictionary(kernel, observed, lam) @ values.double()


def _places(grid: tuple[int, int]) -> Tensor:
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).reshape(-1, 2)
