"""CP by damped Gauss-Newton steps on all factors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cp import cp_als
from .cp_tensor import CP, Unfolded, check_init, checked, effort, hadamard, normalized

_CG_TOLERANCE = 1e-3  # of the gradient; closer solutions cost more than they win
_FIRST_DAMPING = 1e-3  # times the greatest diagonal entry of J'J
_LAST_DAMPING = 1e8
_ROUNDING = 1e-15


def cp_nls(
    x: Tensor,
    rank: int,
    *,
    init: CP | None = None,
    l2: float = 0.0,
    max_iter: int | None = None,
    tol: float = 1e-6,
    seed: int = 0,
) -> CP:
    """The objective of `cp_als` by Levenberg-Marquardt steps on all factors jointly.

    Step p: (J'J + mu I) p = -g by conjugate gradients, preconditioned with the blocks
    (H_m + mu I)^-1. J is never formed: with G_m = A_m' A_m and H_m the elementwise product of the
    other G,

        (J'J v)_m = V_m H_m + A_m sum_{q != m} (V_q' A_q) * prod_{k != m, q} G_k,

    R^2 sum_m n_m multiply-adds in place of N R (Sorber, Van Barel, De Lathauwer, SIAM J. Optim.
    23 (2013)); `scipy.optimize.least_squares` would work with vectors of N residuals. The damping
    mu follows Nielsen's rule. Only steps that lower the objective are taken, so the result is at
    least as good as the start.

    Args:
        x: (n_1 .. n_d).
        rank: R.
        init: start; default the best of `cp_als` with the same l2 and seed.
        l2: >= 0, penalty on sum_r w_r^2.
        max_iter: most steps; 50 on small tensors, else 10.
        tol: stop when a step lowers the root of the objective by less than this share of it.
        seed: of `cp_als`.

    Returns:
        CP.

    Raises:
        ValueError: see `checked`; l2 or max_iter out of range; an `init` of other shape.

    Cost: per step two products of N R multiply-adds and up to 60 iterations of conjugate
    gradients, 20 on large tensors.

    Source: Lebedev et al., ICLR 2015, who start from scratch with the toolbox of the authors above.
    """
    x = checked("cp_nls", x, rank)
    max_iter = effort(x, rank, 50, 10) if max_iter is None else max_iter
    if not l2 >= 0 or max_iter < 1:
        raise ValueError(f"cp_nls: expected l2 >= 0 and max_iter >= 1, got {l2} and {max_iter}")
    if init is None:
        init = cp_als(x, rank, l2=l2, seed=seed)
    check_init("cp_nls", x, rank, init)
    u = Unfolded.of(x.unsqueeze(0))
    iterations = effort(x, rank, 60, 20)
    factors = _descend(u, u.arranged(init.split()), l2, max_iter, iterations, tol)
    return normalized(torch.ones(rank, dtype=torch.float64), u.restored(factors))


def _descend(
    u: Unfolded, factors: list[Tensor], l2: float, max_iter: int, iterations: int, tol: float
) -> list[Tensor]:
    """Factors (n_m, R) after up to `max_iter` steps of up to `iterations` each."""
    square = float(u.matrix.square().sum())
    objective, gradient = _evaluate(u, factors, square, l2)
    damping, growth = _FIRST_DAMPING * _Model(factors, l2).greatest, 2.0
    for _ in range(max_iter):
        if objective <= _ROUNDING * square:
            break
        model = _Model(factors, l2)
        step = model.step(gradient, damping, iterations)
        trial = [f + s for f, s in zip(factors, step, strict=True)]
        found, slope = _evaluate(u, trial, square, l2)
        predicted = -_dot(gradient, step) - _dot(step, model.times(step)) / 2
        gain = (objective - found) / predicted if predicted > 0 else -1.0
        if not gain > 0:
            damping, growth = damping * growth, growth * 2
            if damping > _LAST_DAMPING * model.greatest:
                break
            continue
        damping *= max(1 / 3, 1 - (2 * gain - 1) ** 3)
        growth = 2.0
        finished = objective**0.5 - found**0.5 <= tol * found**0.5
        factors, objective, gradient = trial, found, slope
        if finished:
            break
    return factors


def _evaluate(
    u: Unfolded, factors: list[Tensor], square: float, l2: float
) -> tuple[float, list[Tensor]]:
    """Half the objective and its gradient per mode."""
    products: list[Tensor] = []

    def keep(m: int, product: Tensor) -> Tensor:
        products.append(product[0])
        return factors[m].unsqueeze(0)

    u.sweep([f.unsqueeze(0) for f in factors], keep)
    grams = [f.T @ f for f in factors]
    every = hadamard(grams)
    weights = every.diagonal()  # w_r^2
    gradient = [
        f @ hadamard([g for q, g in enumerate(grams) if q != m])
        - products[m]
        + f * (l2 * weights / grams[m].diagonal().clamp_min(torch.finfo(torch.float64).tiny))
        for m, f in enumerate(factors)
    ]
    fitted = float(every.sum() - 2 * (products[-1] * factors[-1]).sum())
    return (max(square + fitted, 0.0) + l2 * float(weights.sum())) / 2, gradient


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((p * q).sum() for p, q in zip(a, b, strict=True)))


class _Model:
    """J'J at given factors; the residuals of the penalty are sqrt(l2) w_r."""

    def __init__(self, factors: list[Tensor], l2: float) -> None:
        self.factors = factors
        modes = range(len(factors))
        grams = [f.T @ f for f in factors]
        self.others = [hadamard([grams[q] for q in modes if q != m]) for m in modes]
        ones = torch.ones_like(grams[0])
        self.pairs = {
            (m, q): hadamard([ones, *[grams[k] for k in modes if k not in (m, q)]])
            for m in modes
            for q in modes
            if m != q
        }
        # d w_r / d a = w_r a / ||a||^2, of length sqrt(diagonal of H_m).
        root = [
            (l2 * other.diagonal() / gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)).sqrt()
            for other, gram in zip(self.others, grams, strict=True)
        ]
        self.penalty = [f * r for f, r in zip(factors, root, strict=True)]
        self.l2 = l2
        self.greatest = max(float(h.diagonal().max()) for h in self.others)

    def times(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J'J v."""
        crossed = [s.T @ f for s, f in zip(v, self.factors, strict=True)]
        pull = sum((p * s).sum(0) for p, s in zip(self.penalty, v, strict=True))
        found = []
        for m, f in enumerate(self.factors):
            mixed = sum(crossed[q] * self.pairs[m, q] for q in range(len(v)) if q != m)
            found.append(v[m] @ self.others[m] + f @ mixed + self.penalty[m] * pull)
        return found

    def step(self, gradient: list[Tensor], damping: float, iterations: int) -> list[Tensor]:
        """The solution of (J'J + damping I) p = -g, by preconditioned conjugate gradients."""
        eye = torch.eye(len(self.others[0]), dtype=torch.float64)
        blocks = [
            torch.linalg.cholesky(h + self.l2 * torch.diag(h.diagonal()) + damping * eye)
            for h in self.others
        ]

        def solved(r: list[Tensor]) -> list[Tensor]:
            return [torch.cholesky_solve(s.T, b).T for s, b in zip(r, blocks, strict=True)]

        residual = [-g for g in gradient]
        step = [torch.zeros_like(g) for g in gradient]
        z = solved(residual)
        direction, along = z, _dot(residual, z)
        enough = _CG_TOLERANCE**2 * _dot(residual, residual)
        for _ in range(iterations):
            if along <= 0 or _dot(residual, residual) <= enough:
                break
            image = [
                t + damping * d for t, d in zip(self.times(direction), direction, strict=True)
            ]
            length = along / _dot(direction, image)
            step = [s + length * d for s, d in zip(step, direction, strict=True)]
            residual = [r - length * i for r, i in zip(residual, image, strict=True)]
            z = solved(residual)
            before, along = along, _dot(residual, z)
            direction = [a + along / before * d for a, d in zip(z, direction, strict=True)]
        return step
