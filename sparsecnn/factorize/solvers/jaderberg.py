"""Separable filters per input channel, and vertical by horizontal filters across channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .cp import cp_als_batch
from .svd import vh_matrix

_ITERATIONS = 500


def separable_per_channel(
    weight: Tensor, count: int, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """M separable filters per channel: W[t, s, i, j] ~ sum_m A[t, s, m] V[s, m, i] H[s, m, j].

    For every channel by itself a CP of rank M of (T, kh, kw), all channels in one batch of
    alternating least squares. Of the T filters only their coordinates in the space that they span,
    of at most kh kw dimensions, take part, which changes no error. With M = kh kw the filters are
    the unit ones and the result is exact.

    Args:
        weight: (T, S, kh, kw) float64.
        count: M >= 1.
        seed: of the random starts.

    Returns:
        V (S, M, kh), H (S, M, kw), A (T, S, M), the three of equal length per filter.

    Raises:
        ValueError: M below 1.

    Cost: one QR decomposition and up to 200 sweeps over (kh kw, kh, kw) per channel.

    Source: Jaderberg, Vedaldi, Zisserman, "Speeding up convolutional neural networks with low rank
    expansions", BMVC 2014, scheme 1.
    """
    if count < 1:
        raise ValueError(f"separable_per_channel: expected count >= 1, got {count}")
    t, s, kh, kw = weight.shape
    if count >= kh * kw:
        norms = weight.norm(dim=0).reshape(s, kh * kw)
        vertical = torch.eye(kh, dtype=weight.dtype).repeat_interleave(kw, 0).expand(s, -1, -1)
        horizontal = torch.eye(kw, dtype=weight.dtype).repeat(kh, 1).expand(s, -1, -1)
        mixing = weight.reshape(t, s, kh * kw) / torch.where(norms > 0, norms, 1.0)
    else:
        per_channel = weight.transpose(0, 1)  # (S, T, kh, kw)
        basis = None
        if t > kh * kw:
            basis, small = torch.linalg.qr(per_channel.flatten(2))
            per_channel = small.reshape(s, -1, kh, kw)
        norms, (a, v, h) = cp_als_batch(per_channel, count, seed=seed)
        a = a if basis is None else basis @ a
        vertical, horizontal, mixing = v.mT, h.mT, a.transpose(0, 1)
    root = norms ** (1 / 3)  # (S, M)
    return vertical * root.unsqueeze(2), horizontal * root.unsqueeze(2), mixing * root


def vh_als(
    weight: Tensor, rank: int, *, seed: int = 0, tol: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    """`vh_closed_form` by alternating least squares from a random start.

    W[t, s, i, j] ~ sum_k V[k, s, i] H[t, k, j]: H for given V, then V for given H, each exactly.
    With orthonormal factors in between this is subspace iteration, so it tends to the closed form
    from above and is here to be compared with it.

    Args:
        weight: (T, S, kh, kw) float64.
        rank: K, 1 to min(S kh, T kw).
        seed: of the start.
        tol: stop when a round lowers the squared error by less than this share of ||W||^2.

    Returns:
        V (K, S, kh), H (T, K, kw), and the squared error after every round.

    Cost: two products of S kh T kw K multiply-adds per round.

    Source: Jaderberg, Vedaldi, Zisserman, BMVC 2014, scheme 2 (there by conjugate gradients).
    """
    t, s, kh, kw = weight.shape
    matrix = vh_matrix(weight)
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(matrix.shape[1], rank, dtype=matrix.dtype, generator=generator)
    square = matrix.square().sum()
    errors = [square]
    for _ in range(_ITERATIONS):
        left = torch.linalg.qr(matrix @ torch.linalg.qr(right)[0])[0]
        right = matrix.T @ left  # (T kw, K), the best H for this V
        errors.append((square - right.square().sum()).clamp_min(0))
        if errors[-2] - errors[-1] <= tol * square:
            break
    root = right.norm(dim=0).sqrt()
    vertical = (left * root).T.reshape(rank, s, kh)
    scaled = right / torch.where(root > 0, root, 1.0)
    horizontal = scaled.reshape(t, kw, rank).permute(0, 2, 1)
    return vertical, horizontal, torch.stack(errors[1:])
