"""The LASSO by coordinate descent, and the point of its path with a wanted number of nonzeros."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_SWEEPS = 10_000
_STEPS = 30  # solved systems per sweep
# At 2^-20 of the greatest lam the penalty is gone: what is still 0 there is redundant.
_HALVINGS = 20
_BISECTIONS = 60


def lasso(
    gram: Array, moment: Array, lam: float, start: Array | None = None, tolerance: float = 1e-10
) -> Array:
    """Minimize 1/2 beta' A beta - q' beta + lam ||beta||_1 by cyclic coordinate descent.

    With A = Z'Z/n and q = Z'y/n this is 1/(2n) ||y - Z beta||^2 + lam ||beta||_1 up to a constant:
    the problem of scikit-learn's `Lasso(alpha=lam, fit_intercept=False)`. After every sweep the
    linear system of the present signs is solved, and beta goes there or until a coefficient is 0
    (feature-sign search: Lee, Battle, Raina, Ng, "Efficient sparse coding algorithms", NIPS 2006);
    with correlated columns descent alone would only creep.

    Args:
        gram: A (C, C), symmetric and positive semidefinite.
        moment: q (C,).
        lam: >= 0.
        start: where to begin; default 0.
        tolerance: greatest violation of the optimality conditions, |q - A beta| <= lam off the
            support and q - A beta = lam sign(beta) on it, as a share of max |q|.

    Returns:
        beta (C,). Coordinates with A_cc = 0 stay 0.

    Raises:
        ValueError: a negative or NaN lam, or values that are not finite.
        RuntimeError: no convergence; a half-solved problem would keep the wrong channels.
    """
    if not lam >= 0:
        raise ValueError(f"lasso: expected lam >= 0, got {lam}")
    if not (np.isfinite(gram).all() and np.isfinite(moment).all()):
        raise ValueError("lasso: expected finite gram and moment, got NaN or infinity")
    beta = np.zeros_like(moment) if start is None else start.copy()
    allowed = tolerance * float(np.abs(moment).max(initial=0.0))
    diagonal = np.diag(gram).copy()
    free = np.flatnonzero(diagonal > 0)
    beta[diagonal <= 0] = 0.0
    slope = moment - gram @ beta
    violation = np.inf
    for _ in range(_SWEEPS):
        for i in free:
            old = beta[i]
            pull = slope[i] + diagonal[i] * old
            new = np.sign(pull) * max(abs(pull) - lam, 0.0) / diagonal[i]
            if new != old:
                slope -= gram[:, i] * (new - old)
                beta[i] = new
        beta = _descended(gram, moment, lam, beta)
        violation = _violation(gram, moment, lam, beta, free)
        if violation <= allowed:
            return beta
        slope = moment - gram @ beta  # updates by differences gather rounding errors
    raise RuntimeError(
        f"lasso: expected convergence within {_SWEEPS} sweeps, got a violation of "
        f"{violation:.3g} where {allowed:.3g} is allowed"
    )


def lasso_support(gram: Array, moment: Array, count: int) -> Array:
    """The coefficients at the lam where `count` of them are nonzero.

    lam is halved from the value that makes all of them 0 until at least `count` are nonzero, then
    the interval is bisected; warm starts make the sparse end the cheap one (the authors of channel
    pruning double lam from the dense end). Where the number of nonzeros jumps over `count`, the
    nearest point with more is taken.

    Args:
        gram: see `lasso`.
        moment: see `lasso`.
        count: wanted nonzeros.

    Returns:
        (C,); fewer nonzeros than `count` only if the others are redundant at every lam.

    Raises:
        ValueError: values that are not finite.
        RuntimeError: no convergence.
    """
    high = float(np.abs(moment).max(initial=0.0))
    low, beta = high, np.zeros_like(moment)
    for _ in range(_HALVINGS):
        low /= 2
        beta = lasso(gram, moment, low, beta)
        if np.count_nonzero(beta) >= count:
            break
        high = low
    for _ in range(_BISECTIONS):
        if np.count_nonzero(beta) <= count:
            break
        middle = (low + high) / 2
        found = lasso(gram, moment, middle, beta)
        if np.count_nonzero(found) >= count:
            low, beta = middle, found
        else:
            high = middle
    return beta


def _descended(gram: Array, moment: Array, lam: float, beta: Array) -> Array:
    """Beta after steps to the minimum with its own signs; as it was where they do not help."""
    found = beta.copy()
    for _ in range(_STEPS):
        support = np.flatnonzero(found)
        old = found[support]
        signs = np.sign(old)
        try:
            new: Any = np.linalg.solve(
                gram[np.ix_(support, support)], moment[support] - lam * signs
            )
        except np.linalg.LinAlgError:
            break
        crossing = np.sign(new) != signs
        if not crossing.any():
            found[support] = new
            break
        shares = np.full_like(old, np.inf)
        shares[crossing] = old[crossing] / (old[crossing] - new[crossing])
        first = int(shares.argmin())
        found[support] = old + shares[first] * (new - old)
        found[support[first]] = 0.0
    # Not with a nearly singular system.
    better = _objective(gram, moment, lam, found) <= _objective(gram, moment, lam, beta)
    return found if better else beta


def _objective(gram: Array, moment: Array, lam: float, beta: Array) -> float:
    return float(beta @ (gram @ beta) / 2 - moment @ beta + lam * np.abs(beta).sum())


def _violation(gram: Array, moment: Array, lam: float, beta: Array, free: Any) -> float:
    slope = moment - gram @ beta
    off = np.maximum(np.abs(slope) - lam, 0.0)
    on = np.abs(slope - lam * np.sign(beta))
    return float(np.where(beta != 0, on, off)[free].max(initial=0.0))
