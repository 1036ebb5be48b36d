r"""Rank and noise of a matrix by empirical variational Bayesian matrix factorization.

Y (L, M), L <= M, a = L / M, is taken for a matrix of low rank plus white noise of variance s. With
x_h = g_h^2 / (M s) of the singular values g_h the global minimum of the free energy is analytic:
g_h stays where x_h > xbar and is noise below, with

    Phi(z) = log(1 + z) / z - 1/2,    Phi(tbar) + Phi(tbar / a) = 0,
    xbar = (1 + tbar) (1 + a / tbar),

and what is left to search is s, which minimizes

    sum_{x_h <= xbar} (x_h - log x_h)
        + sum_{x_h > xbar} (x_h - t + log((t + 1) / x_h) + a log(t / a + 1)),
    t(x) = (x - (1 + a) + sqrt((x - (1 + a))^2 - 4 a)) / 2.

Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational
Bayesian matrix factorization", JMLR 14 (2013); the search for s and its bounds: Nakajima, Tomioka,
Sugiyama, Babacan, "Perfect dimensionality recovery by variational Bayesian PCA", NIPS 2012. As a
rule for the ranks of layers: Kim et al., "Compression of deep convolutional neural networks for
fast and low power mobile applications", ICLR 2016.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
# Between two singular values at the threshold the free energy is smooth and bends within a factor e
# of s; over all of them it has many minima, most of all with spectra that fall exponentially, where
# one bounded search over everything ends at variances that are wrong by orders of magnitude.
_STEP = 0.1  # of log s


@dataclass(frozen=True)
class EVBMF:
    """What is signal in a matrix.

    Attributes:
        rank: number of singular values above the threshold; 0 for pure noise.
        sigma2: variance of the noise, per entry.
        threshold: sqrt(M sigma2 xbar), the greatest singular value taken for noise.
        shrunk: (rank,) float64, descending: the singular values of the posterior mean,
            g/2 (1 - (L+M) s / g^2 + sqrt((1 - (L+M) s / g^2)^2 - 4 L M s^2 / g^4)). For reports:
            layers keep their own singular values.
    """

    rank: int
    sigma2: float
    threshold: float
    shrunk: Tensor


def evbmf(matrix: Tensor) -> EVBMF:
    """Rank, noise and threshold of a matrix.

    Args:
        matrix: Y, of any shape (rows, columns); a tall one is transposed. Computed in float64:
            the free energy is a difference of numbers that float32 does not tell apart.

    Returns:
        See `EVBMF`. Scaling Y scales sigma2, threshold and shrunk, and nothing else.

    Raises:
        ValueError: not a matrix with at least one entry, or values that are not finite.

    Cost: the singular values, O(L^2 M). For very wide matrices the eigenvalues of Y Y^T and
    `evbmf_spectrum` are several times cheaper.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(
            f"evbmf: expected matrix to have shape (rows, columns), got {tuple(matrix.shape)}"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("evbmf: expected matrix to be finite, got NaN or infinity")
    values = torch.linalg.svdvals(matrix.detach().to("cpu", torch.float64))
    return evbmf_spectrum(values, (matrix.shape[0], matrix.shape[1]))


def evbmf_spectrum(values: Tensor, shape: tuple[int, int]) -> EVBMF:
    """`evbmf` of a matrix of which only the singular values are known.

    Args:
        values: all min(shape) singular values, in any order; square roots of the eigenvalues of
            Y Y^T do, clamped at 0: what they lose lies far below the noise.
        shape: of the matrix.

    Returns:
        See `EVBMF`.

    Raises:
        ValueError: another number of values, or values that are negative or not finite.

    Cost: O(L) evaluations of the free energy, O(L) each: 0.05 s for 512 values.
    """
    rows, columns = min(shape), max(shape)
    if values.shape != (rows,) or rows < 1:
        raise ValueError(
            f"evbmf_spectrum: expected values of shape ({rows},) for a matrix of shape "
            f"{tuple(shape)}, got {tuple(values.shape)}"
        )
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError("evbmf_spectrum: expected values to be finite and >= 0, got others")
    g = values.detach().to("cpu", torch.float64).sort(descending=True).values.numpy()
    if g[0] == 0:
        return EVBMF(0, 0.0, 0.0, torch.zeros(0, dtype=torch.float64))
    alpha = rows / columns
    bound = _xbar(alpha)
    unit = g / g[0]  # so that neither bounds nor tolerances depend on the scale
    variance = _noise(unit, columns, alpha, bound)
    # Python floats, so that a threshold is compared with the very values it was made from.
    threshold = math.sqrt(columns * variance * bound)
    kept = unit[unit > threshold]
    part = 1 - (rows + columns) * variance / kept**2
    root = np.sqrt(np.maximum(part**2 - 4 * rows * columns * variance**2 / kept**4, 0.0))
    shrunk = torch.from_numpy(kept / 2 * (part + root) * g[0])
    return EVBMF(len(kept), float(variance * g[0] ** 2), float(threshold * g[0]), shrunk)


def _tbar(alpha: float) -> float:
    """The root of Phi(t) + Phi(t / alpha), 0 < alpha <= 1.

    2.5129 sqrt(alpha) is exact for square matrices only and 11 % off at alpha = 0.01. Phi falls,
    from 1/2 at 0, so that the sum is positive at t = alpha (Phi(1) > 0) and negative at 3.
    """
    from scipy.optimize import brentq  # starts threads when imported

    return float(brentq(lambda t: _phi(t) + _phi(t / alpha), alpha, 3.0, xtol=1e-15, rtol=1e-14))


def _phi(z: float) -> float:
    return math.log1p(z) / z - 0.5


def _xbar(alpha: float) -> float:
    root = _tbar(alpha)
    return (1 + root) * (1 + alpha / root)


def _noise(g: Array, columns: int, alpha: float, bound: float) -> float:
    """The variance of least free energy; g descending with g[0] = 1."""
    from scipy.optimize import minimize_scalar

    rows = len(g)
    energy = g**2
    # More components than `most` cannot be told from noise: the rest bounds s from below.
    most = min(math.ceil(rows / (1 + alpha)) - 1, rows)
    high = float(energy.sum()) / (rows * columns)
    low = max(float(energy[most]) / (columns * bound), float(energy[most:].mean()) / columns)
    # A matrix of exactly low rank has no noise but that of rounding, (M eps g_0) at most.
    low = max(low, (columns * float(np.finfo(np.float64).eps)) ** 2 / (columns * bound))
    if low >= high:  # a single row: all of it may be noise
        return high

    def free_energy(logarithm: float) -> float:
        return _free_energy(energy, columns * math.exp(logarithm), alpha, bound)

    ends = (math.log(low), math.log(high))
    kinks = np.log(np.maximum(energy, low) / (columns * bound))
    even = np.linspace(*ends, 2 + int((ends[1] - ends[0]) / _STEP))
    points = np.unique(np.concatenate([even, np.clip(kinks, *ends)]))
    # A minimum may lie alone between two kinks.
    points = np.sort(np.concatenate([points, (points[1:] + points[:-1]) / 2]))
    heights = np.array([free_energy(point) for point in points])
    padded = np.pad(heights, 1, constant_values=np.inf)
    dips = (heights <= padded[:-2]) & (heights <= padded[2:])
    # The curvature is the sum of x over the noise, about L at a minimum, so that between two points
    # the free energy goes no deeper than this.
    deepest = heights.min() + rows * _STEP**2 / 8
    candidates = [float(points[heights.argmin()])]
    for i in np.flatnonzero(dips & (heights <= deepest)).tolist():
        around = (points[max(i - 1, 0)], points[min(i + 1, len(points) - 1)])
        found = minimize_scalar(
            free_energy, bounds=around, method="bounded", options={"xatol": 1e-10}
        )
        candidates.append(float(found.x))
    return math.exp(min(candidates, key=free_energy))


def _free_energy(energy: Array, unit: float, alpha: float, bound: float) -> float:
    """Without -sum log g^2, which is the same for every s, and finite so for g = 0."""
    x = energy / unit
    signal = x[x > bound]
    shifted = signal - (1 + alpha)
    t = (shifted + np.sqrt(shifted**2 - 4 * alpha)) / 2
    # x - t = 1 + a + a / t, which does not cancel where x is 1e20.
    kept = 1 + alpha + alpha / t + np.log1p(t) + alpha * np.log1p(t / alpha)
    return float(x[x <= bound].sum() + kept.sum() + len(x) * math.log(unit))
