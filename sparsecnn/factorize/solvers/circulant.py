"""Orthogonal circulant matrices whose first rows keep as much of a covariance as they can.

Wang, Xu, Xu, Tao, "Beyond Filters: Compact Feature Map for Portable Deep Model", ICML 2017: d
responses are mapped to k < d by the first k rows R_k of R = circ(q), ``circ(q)[i, j] = q[(i - j)
mod d]``, which takes d numbers and one FFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsecnn.nn.circulant import circulant

Array = NDArray[np.float64]
_STEPS = 1000


def learn_circulant(
    c: Tensor, k: int, lam: float | None = None, *, restarts: int = 6, seed: int = 0
) -> Tensor:
    """The q whose first k rows of circ(q) capture most of C, circ(q) orthogonal.

        min over q of tr C - tr(R_k C R_k') + lam ||R R' - I||^2,   R = circ(q)

    R R' is circulant too: the penalty is sum_j (|qhat_j|^2 - 1)^2 over the d Fourier coefficients
    of q. With ``lam`` None it is infinite: qhat_j = exp(i theta_j) makes R exactly orthogonal, and
    the angles are free but for the symmetry of real vectors, with qhat_0 = 1 (the sign of q is
    arbitrary) and qhat_{d/2} = +-1. tr(R_k C R_k') = q' M q is a quadratic form in q with
    M[a, b] = sum_{i<k} C[i-a, i-b], indices mod d. L-BFGS from random starts, best one taken.

    For C of centred responses y_i, and orthonormal rows, ``sum_ij (||y_i - y_j||^2 -
    ||R_k (y_i - y_j)||^2) = 2 n^2 (tr C - tr R_k C R_k')``: what is lost of pairwise distances.

    Not to be taken for a principal component analysis: k rows of a circulant have d/2 free angles
    in place of k d entries, and keep far less. Of 32 responses with 6 latent dimensions and a
    little noise, k = 8 rows keep 0.53 of the energy; the first rows of a random orthogonal
    circulant keep 0.25, a principal component analysis 0.99 (means over 10 such covariances).

    Args:
        c: (d, d), symmetric and positive semidefinite, float64.
        k: rows, 1 <= k <= d. At k = d every orthogonal R keeps everything.
        lam: weight of the soft penalty, in the units of C; None for exact orthogonality.
        restarts: random starts.
        seed: of the starts.

    Returns:
        q (d,) float64.

    Raises:
        ValueError: a matrix that is not square or not finite, k, lam or restarts out of range.

    Cost: O(d^2) per step of L-BFGS.
    """
    _check(c, k, lam, restarts)
    d = len(c)
    # A scale of the problem's own: L-BFGS stops by absolute slopes.
    scale = float(c.trace()) or 1.0
    form = quadratic_form(c / scale, k).numpy()
    generator = torch.Generator().manual_seed(seed)
    best, least = np.zeros(d), math.inf
    for start in range(restarts):
        angles = 2 * math.pi * torch.rand((d - 1) // 2, generator=generator, dtype=torch.float64)
        free, nyquist = angles.numpy(), 1.0 - 2.0 * (start % 2)  # both signs get their turn
        if lam is None:
            free, value = _minimum(_hard, free, (form, nyquist))
            q = _of_angles(free, d, nyquist)
        else:
            q, value = _minimum(_soft, _of_angles(free, d, nyquist), (form, lam / scale))
        if value < least:
            best, least = q, value
    return torch.from_numpy(best)


def captured(c: Tensor, rows: Tensor) -> float:
    """The share tr(R C R') / tr C that orthonormal rows R (k, d) keep; 1 where C is zero."""
    total = float(c.trace())
    return float(torch.einsum("ij,jl,il->", rows, c, rows)) / total if total else 1.0


def pca_bound(c: Tensor, k: int) -> float:
    """The share that the best k orthonormal rows of any kind keep: the first eigenvalues."""
    values = torch.linalg.eigvalsh(c).clamp_min(0)
    total = float(values.sum())
    return float(values[-k:].sum()) / total if total else 1.0


def circulant_rows(q: Tensor, k: int) -> Tensor:
    """R_k (k, d), the first k rows of circ(q)."""
    return circulant(q)[:k]


def quadratic_form(c: Tensor, k: int) -> Tensor:
    """M (d, d) with tr(R_k C R_k') = q' M q: M[a, b] = sum_{i<k} C[(i-a) mod d, (i-b) mod d]."""
    d = len(c)
    at = torch.arange(d)
    # Column b - a of `diagonals` holds the entries that M[a, b] sums k consecutive ones of.
    diagonals = c[at[:, None], (at[:, None] - at) % d]
    sums = torch.cat([diagonals.new_zeros(1, d), diagonals, diagonals[:k]]).cumsum(0)
    windows = sums[k : k + d] - sums[:d]
    return windows[-at[:, None] % d, (at - at[:, None]) % d]


def _minimum(
    function: Callable[..., tuple[float, Array]], start: Array, arguments: tuple[object, ...]
) -> tuple[Array, float]:
    """The local minimum that L-BFGS finds, and its value."""
    from scipy.optimize import minimize  # starts threads when imported

    if not start.size:  # d <= 2 has no free angle
        return start, function(start, *arguments)[0]
    found = minimize(
        function, start, arguments, method="L-BFGS-B", jac=True,
        options={"maxiter": _STEPS, "gtol": 1e-9, "ftol": 1e-13},
    )  # fmt: skip
    return found.x, float(found.fun)


def _of_angles(angles: Array, d: int, nyquist: float) -> Array:
    """The real q (d,) of unit Fourier coefficients, whose circulant is orthogonal."""
    inner = np.exp(1j * angles)
    ends = [nyquist] if d % 2 == 0 else []
    return np.fft.irfft(np.concatenate([[1.0], inner, ends]), n=d)


def _hard(angles: Array, form: Array, nyquist: float) -> tuple[float, Array]:
    """-q' M q and its slope in the angles.

    q_m = 1/d sum_j qhat_j exp(2 pi i j m / d) over all d frequencies. A pair j, d - j moves with
    one angle, and sum_m g_m dq_m/dtheta_j = 2/d Re(i qhat_j conj(ghat_j)).
    """
    d = len(form)
    q = _of_angles(angles, d, nyquist)
    slope = form @ q
    spectrum = np.fft.rfft(-2 * slope)[1 : len(angles) + 1]
    return -float(q @ slope), 2 / d * np.real(1j * np.exp(1j * angles) * spectrum.conj())


def _soft(q: Array, form: Array, lam: float) -> tuple[float, Array]:
    """-q' M q + lam sum_j (|qhat_j|^2 - 1)^2 and its slope in q."""
    slope = form @ q
    spectrum = np.fft.fft(q)
    excess = np.abs(spectrum) ** 2 - 1
    value = -float(q @ slope) + lam * float((excess**2).sum())
    penalty = 4 * len(q) * np.real(np.fft.ifft(excess * spectrum))
    return value, -2 * slope + lam * penalty


def _check(c: Tensor, k: int, lam: float | None, restarts: int) -> None:
    if c.dim() != 2 or c.shape[0] != c.shape[1]:
        raise ValueError(f"learn_circulant: expected c (d, d), got shape {tuple(c.shape)}")
    if not bool(torch.isfinite(c).all()):
        raise ValueError("learn_circulant: expected finite c, got NaN or infinity")
    if not 1 <= k <= len(c):
        raise ValueError(f"learn_circulant: expected k between 1 and {len(c)}, got {k}")
    if lam is not None and not 0 < lam < math.inf:
        raise ValueError(f"learn_circulant: expected lam None or in (0, inf), got {lam}")
    if restarts < 1:
        raise ValueError(f"learn_circulant: expected restarts >= 1, got {restarts}")
