r"""Low rank measured on responses, not on weights.

    y = W x + b0,    y ~ M (y - mean) + mean,    M of rank r.

A layer's responses fill a space of far fewer dimensions than its filters do, since its inputs are
correlated; M W is then a layer of rank r. All functions here take a sample per *column*, Y (T, n).

Zhang, Zou, He, Sun, "Accelerating very deep convolutional networks for classification and
detection", TPAMI 2016 (arXiv:1505.06798); Zhang, Zou, Ming, He, Sun, CVPR 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8


@dataclass(frozen=True)
class AffineLowRank:
    """The map ``y -> left @ right @ y + bias``.

    Attributes:
        left: (T, r), orthonormal columns.
        right: (r, T).
        bias: (T,).
        history: per penalty, the relaxed objective at the start and after each round.
    """

    left: Tensor
    right: Tensor
    bias: Tensor
    history: tuple[tuple[float, ...], ...] = ()

    def __call__(self, y: Tensor) -> Tensor:
        """(T, n) to (T, n)."""
        return self.left @ (self.right @ y) + self.bias[:, None]


class _Regressor:
    """Regressors Y whose Gram matrix is decomposed once, for many targets Z."""

    def __init__(self, y: Tensor, eps: float) -> None:
        self.mean = y.mean(1)
        self.centred = y - self.mean[:, None]
        size = len(y)
        ridge = eps * float(self.centred.square().sum()) / size
        # Responses that never move tell nothing: any ridge gives M = 0 for them.
        self.root = torch.linalg.cholesky(
            self.centred @ self.centred.T + (ridge or 1.0) * torch.eye(size, dtype=y.dtype)
        )

    def fit(self, z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `reduced_rank_regression`."""
        mean = z.mean(1)
        # With A = Y Y' + ridge = L L': M_ols L = Z Y' L^-T, whose SVD is that of M_ols A^(1/2).
        # No Gram matrix of it: squares would cost half of the digits. Z need not be centred: the
        # rows of Y sum to 0.
        product = z @ self.centred.T
        whitened = torch.linalg.solve_triangular(self.root, product.T, upper=False).T
        u, s, vt = torch.linalg.svd(whitened)
        left = u[:, :rank].contiguous()
        scaled = s[:rank, None] * vt[:rank]
        right = torch.linalg.solve_triangular(self.root.T, scaled.T, upper=True).T.contiguous()
        return left, right, mean - left @ (right @ self.mean), s


def reduced_rank_regression(
    z: Tensor, y: Tensor, rank: int, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The affine map of low rank that predicts Z from Y best.

        min over M, b of ||Z - (M Y + b)||^2 + eps tr(Y Y') / T ||M||^2,  rank M <= r

    on centred samples: ``M = U_r U_r' M_ols`` with ``M_ols = Z Y' (Y Y' + eps tr/T I)^-1`` and U
    the left singular vectors of ``M_ols Y``; ``b = mean(Z) - M mean(Y)``. The paper's generalized
    SVD with ``V' (Y Y') V = I`` is the same. ``error = error of M_ols + sum_{i > r} s_i^2``.

    Args:
        z: targets (T, n).
        y: regressors (T, n).
        rank: 1 to T.
        eps: ridge, relative to the mean variance of Y.

    Returns:
        left U_r (T, r), right ``U_r' M_ols`` (r, T), b (T,), and all singular values s (T,) of
        ``M_ols Y``, the ridge included.

    Cost: O(n T^2 + T^3).
    """
    return _Regressor(y, eps).fit(z, rank)


def principal_projection(covariance: Tensor, mean: Tensor, rank: int) -> AffineLowRank:
    """``y ~ U_r U_r' (y - mean) + mean``, U the eigenvectors of the covariance.

    The best map of its rank from responses to themselves; what it loses on average is the sum of
    the eigenvalues after the r-th. The mean is carried by the bias: without it a component would
    be spent on the mean.

    Args:
        covariance: (T, T), centred.
        mean: (T,).
        rank: 1 to T.
    """
    left = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :rank].contiguous()
    return AffineLowRank(left, left.T.contiguous(), mean - left @ (left.T @ mean))


def relaxed_targets(targets: Tensor, predicted: Tensor, lam: float) -> Tensor:
    r"""``argmin_z ||targets - relu(z)||^2 + lam ||z - predicted||^2``, entry by entry.

    With w = relu(y) and p the prediction, the cost is a parabola on each side of 0, with minima at
    ``z0 = min(0, p)`` and ``z1 = max(0, (lam p + w) / (lam + 1))``; the cheaper one is taken. For
    p > 0 that is z1; for p <= 0 z0 = p costs w^2 and z1 > 0 costs ``lam / (lam + 1) (w - p)^2``,
    which is less where ``w > -k p``, ``k = c / (1 - c)``, ``c^2 = lam / (lam + 1)``.

    Args:
        targets: w = relu(y), (T, n).
        predicted: p = M y + b, (T, n).
        lam: > 0.
    """
    c = math.sqrt(lam / (lam + 1))
    mixed = (targets + lam * predicted) / (lam + 1)
    return torch.where(targets + c / (1 - c) * predicted > 0, mixed, predicted)


def zhang_nonlinear(
    y: Tensor,
    y_hat: Tensor,
    rank: int,
    lams: Sequence[tuple[float, int]] = ((0.01, 25), (1.0, 25)),
    eps: float = EPS,
) -> AffineLowRank:
    r"""The map of low rank whose ReLU is nearest to the ReLU of the responses.

        min over M, b of sum ||relu(y) - relu(M y_hat + b)||^2,    rank M <= r

    relaxed to ``||relu(y) - relu(z)||^2 + lam ||z - (M y_hat + b)||^2``, in which z
    (`relaxed_targets`) and M, b (`reduced_rank_regression`) alternate; neither step raises it. It
    starts at the regression of y itself. The rounds of a small lam find the direction, those at 1
    pull z to the map. The best map met is returned, so that it is never worse than the first.

    Args:
        y: (T, n) responses of the original network.
        y_hat: (T, n) responses of the original weights to inputs from the compressed network; y
            itself if there is none.
        rank: 1 to T.
        lams: (lam, rounds), in order.
        eps: see `reduced_rank_regression`.

    Cost: per round O(n T^2) and one SVD (T, T); at T = 512, n = 10,000 about 1 s on one core.
    """
    regressor = _Regressor(y_hat, eps)
    wanted = y.relu()
    left, right, bias, _ = regressor.fit(y, rank)
    found = best = AffineLowRank(left, right, bias)
    predicted = found(y_hat)
    least = _gap(wanted, predicted.relu())
    history = []
    for lam, rounds in lams:
        z = relaxed_targets(wanted, predicted, lam)
        objectives = [_gap(wanted, z.relu()) + lam * _gap(z, predicted)]
        for _ in range(rounds):
            left, right, bias, _ = regressor.fit(z, rank)
            found = AffineLowRank(left, right, bias)
            predicted = found(y_hat)
            error = _gap(wanted, predicted.relu())
            if error < least:
                best, least = found, error
            z = relaxed_targets(wanted, predicted, lam)
            objectives.append(_gap(wanted, z.relu()) + lam * _gap(z, predicted))
        history.append(tuple(objectives))
    return AffineLowRank(best.left, best.right, best.bias, tuple(history))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum())


def whitened_svd(weight: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""The matrix of low rank whose responses are nearest, W ~ left @ right.

        min E ||W x - left right x||^2 = ||(W - left right) C^(1/2)||^2,    C = E x x'

    by the SVD of ``W C^(1/2)``, the right factor times ``C^(-1/2)``; singular values split evenly
    (Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting linear structure within convolutional
    networks for efficient evaluation", NIPS 2014, the data covariance metric). C gets a ridge of
    1e-6 of its mean diagonal: directions without data are approximated, not ignored.

    Args:
        weight: (T, D).
        second_moment: C (D, D) of the inputs, not centred.
        rank: 1 to min(T, D).

    Returns:
        left (T, rank), right (rank, D).

    Cost: O(D^3 + T D min(T, D)).
    """
    size = len(second_moment)
    ridge = 1e-6 * float(second_moment.trace()) / size
    # Inputs that are all zero weigh all directions alike.
    root = torch.linalg.cholesky(
        second_moment + (ridge or 1.0) * torch.eye(size, dtype=second_moment.dtype)
    )
    # C = L L': the orthogonal factor between L and C^(1/2) drops out of the product.
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    split = s[:rank].sqrt()
    scaled = split[:, None] * vt[:rank]
    right = torch.linalg.solve_triangular(root.T, scaled.T, upper=True).T.contiguous()
    return u[:, :rank] * split, right


def greedy_pca_ranks(
    eigenvalues: Sequence[Tensor], costs: Sequence[float], speedup: float
) -> list[int]:
    r"""Ranks of all layers that share one budget.

        max prod_l sum_{a <= r_l} sigma_{l,a}    s.t.    sum_l (r_l / d_l) C_l <= sum_l C_l / v

    The product of the kept energies follows the accuracy of a network (the TPAMI paper, section
    2.4). From full ranks on, a component is dropped where
    ``(sigma_{l,r_l} / sum_{a <= r_l} sigma_{l,a}) / (C_l / d_l)`` is least, until the budget holds.
    The last component may have been a dear one: what it leaves of the budget is filled again, the
    greatest share first (ours).

    Args:
        eigenvalues: per layer (d_l,), descending.
        costs: C_l of the layer as it is.
        speedup: v >= 1.

    Returns:
        r_l, at least 1. Of equal layers the first loses a component first.

    Raises:
        ValueError: no speedup, or more than rank 1 everywhere gives.

    Cost: O(number of components times number of layers).
    """
    total = float(sum(costs))
    least = sum(cost / len(values) for cost, values in zip(costs, eigenvalues, strict=True))
    if not 1 <= speedup <= total / least * (1 + 1e-12):
        raise ValueError(
            f"greedy_pca_ranks: expected speedup from 1 to {total / least:.4g} (rank 1 in every "
            f"layer), got {speedup:g}"
        )
    # Rounding leaves tiny negative eigenvalues where there is no variance.
    clamped = [values.double().clamp(min=0) for values in eigenvalues]
    spectra = [values.tolist() for values in clamped]
    energies = [values.cumsum(0).tolist() for values in clamped]
    steps = [cost / len(values) for cost, values in zip(costs, spectra, strict=True)]
    ranks = [len(values) for values in spectra]
    budget = total / speedup * (1 + 1e-12)

    def share(layer: int, component: int) -> float:
        """Of the energy up to a component, what it brings, per unit of cost."""
        energy = energies[layer][component]
        return spectra[layer][component] / energy / steps[layer] if energy > 0 else 0.0

    def spent() -> float:
        return sum(rank * step for rank, step in zip(ranks, steps, strict=True))

    while spent() > budget:
        layers = [layer for layer, rank in enumerate(ranks) if rank > 1]
        ranks[min(layers, key=lambda layer: share(layer, ranks[layer] - 1))] -= 1
    while True:
        layers = [
            layer
            for layer, rank in enumerate(ranks)
            if rank < len(spectra[layer]) and spent() + steps[layer] <= budget
        ]
        if not layers:
            return ranks
        ranks[max(layers, key=lambda layer: share(layer, ranks[layer]))] += 1
