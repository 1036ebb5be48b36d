r"""The orthonormal discrete cosine transform (DCT-II), as matrices.

    C[u, i] = sqrt((2 - [u = 0]) / n) cos(pi (2 i + 1) u / (2 n)),    C C^T = I,

and in two dimensions one transform per axis, ``X = C_h x C_w^T``: n^3 instead of n^4
multiplications. Ahmed, Natarajan, Rao, "Discrete cosine transform", IEEE Transactions on Computers
C-23 (1974).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(n: int) -> Tensor:
    """C (n, n) float64; row u is the atom of frequency u.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"dct_matrix: expected n >= 1, got {n}")
    u = torch.arange(n, dtype=torch.float64)[:, None]
    i = torch.arange(n, dtype=torch.float64)
    atoms = math.sqrt(2 / n) * torch.cos(math.pi * (2 * i + 1) * u / (2 * n))
    atoms[0] = math.sqrt(1 / n)
    return atoms


def dct2d_separable(x: Tensor) -> Tensor:
    """The 2-D transform over the last two dimensions.

    Args:
        x: (..., h, w), floating point.

    Returns:
        Coefficients, same shape and dtype; their energy is that of x.

    Raises:
        ValueError: fewer than two dimensions, or an empty one of these.
        TypeError: not floating point.

    Cost: h w (h + w) multiply-accumulates.
    """
    if x.dim() < 2:
        raise ValueError(f"dct2d_separable: expected x (..., h, w), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"dct2d_separable: expected x in floating point, got {x.dtype}")
    rows, columns = (dct_matrix(n).to(x) for n in x.shape[-2:])
    return rows @ x @ columns.T


def zigzag(h: int, w: int) -> Tensor:
    """Frequencies (u, v) from low to high: (h*w, 2) int64, along the diagonals u + v as in JPEG.

    Diagonals are walked in alternating directions, the first one that has two entries from (0, 1)
    to (1, 0).
    """
    pairs = [(u, v) for u in range(h) for v in range(w)]
    pairs.sort(key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]))
    return torch.tensor(pairs)
