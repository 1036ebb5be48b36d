"""A 3x3 weight in the Winograd domain, dense or sparse.

``F(m x m, 3 x 3)`` computes an m x m tile of outputs from ``(m + 2)^2`` *taps*, elementwise
products of the transformed input tile ``B^T d B`` and the transformed filter ``G g G^T`` (Lavin &
Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016). The weight is kept
transformed, so that it can be pruned and trained there (Liu et al., "Efficient Sparse-Winograd
Convolutional Neural Networks", ICLR 2018; Li et al., "Enabling Sparse Winograd Convolution by
Native Pruning", 2017).

Layout, for ``taps`` U of shape ``(T, K, C/G)``, one matrix for each of the ``T = (m + 2)^2`` taps:
filters in blocks of 8, the last block of a convolution group filled with zeros, ``B`` blocks in
all.

- dense: ``values`` ``(B, T, C/G, 8)``.
- sparse: CSR over the rows ``(block, tap, filter of the block)``: ``values`` ``(nnz,)``,
  ``col_idx`` ``(nnz,)`` int32 channel, ``row_ptr`` ``(B * T * 8 + 1,)`` int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecnn.formats._packed import PackedWeight
from sparsecnn.formats.csr import CSRWeight

TILES = (2, 4)
"""Edges m of the output tiles there are kernels for."""
BLOCK = 8
"""Filters of a block."""
_NEAR, _FAR = 0.625, 1.5  # interpolation points of F(4), as in csrc/core/winograd_tiles.h


def _matrices(tile: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    if tile == 2:
        return (
            [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
            [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
            [[1, 1, 1, 0], [0, 1, -1, -1]],
        )
    a, b = _NEAR, _FAR
    a2, b2 = a * a, b * b
    points = (0.0, a, -a, b, -b)
    g = []
    for p in points:
        scale = 1.0
        for q in points:
            scale *= p - q if q != p else 1.0
        g.append([1 / scale, p / scale, p * p / scale])
    bt = [
        [a2 * b2, 0, -(a2 + b2), 0, 1, 0],
        [0, -a * b2, -b2, a, 1, 0],
        [0, a * b2, -b2, -a, 1, 0],
        [0, -b * a2, -a2, b, 1, 0],
        [0, b * a2, -a2, -b, 1, 0],
        [0, a2 * b2, 0, -(a2 + b2), 0, 1],
    ]
    at = [[p**i for p in points] + [1.0 if i == 3 else 0.0] for i in range(4)]
    return [*g, [0, 0, 1]], bt, at


def transforms(
    tile: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``G`` ``(m + 2, 3)``, ``B^T`` ``(m + 2, m + 2)`` and ``A^T`` ``(m, m + 2)`` of ``F(m, 3)``.

    Interpolation points: 0, 1, -1 and infinity for m = 2; 0, +-5/8, +-3/2 and infinity for m = 4.
    """
    g, bt, at = (torch.tensor(m, dtype=dtype, device=device) for m in _matrices(tile))
    return g, bt, at


def check_tile(owner: str, tile: object) -> None:
    """Refuse a tile there is no kernel for."""
    if isinstance(tile, bool) or tile not in TILES:
        raise ValueError(f"{owner}: expected tile 2 or 4, got {tile!r}")


def error_growth(tile: int) -> float:
    """By how much an m x m tile can enlarge rounding errors of the direct convolution.

    The infinity norm of ``|A^T| (x) |A^T|`` times that of ``|B^T| (x) |B^T|`` times that of
    ``|G| (x) |G|``: a bound for the worst input; random inputs stay far below it.
    """
    growth = 1.0
    for m in transforms(tile):
        growth *= float(m.abs().sum(1).max()) ** 2
    return growth


@dataclass(frozen=True)
class WinogradWeight(PackedWeight):
    """A 3x3 convolution weight in the Winograd domain.

    Attributes:
        values: ``(B, T, C/G, 8)``, or ``(nnz,)`` where there are indices.
        col_idx: ``(nnz,)`` int32 channels of the group, ascending in each row; None: dense.
        row_ptr: ``(B * T * 8 + 1,)`` int32; None: dense.
        shape: ``(K, C/G, 3, 3)`` of the spatial weight.
        groups: G.
        tile: m, 2 or 4.
    """

    values: Tensor
    col_idx: Tensor | None
    row_ptr: Tensor | None
    shape: tuple[int, int, int, int]
    groups: int = 1
    tile: int = 4

    @classmethod
    def from_dense(cls, weight: Tensor, groups: int = 1, tile: int = 4) -> WinogradWeight:
        """Transform a spatial weight, ``U = G g G^T``, computed in float64; the result is dense.

        Args:
            weight: ``(K, C/G, 3, 3)``, floating point.
            groups: G of the convolution.
            tile: m; 4 saves most and loses most accuracy, see ``winograd_conv2d``.

        Raises:
            TypeError: ``weight`` is not a floating-point tensor.
            ValueError: a shape, groups or tile that do not fit.
        """
        check_tile("WinogradWeight", tile)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"WinogradWeight: expected weight a floating-point tensor, got {got}")
        if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
            raise ValueError(
                "WinogradWeight: expected weight of shape (K, C/G, 3, 3), "
                f"got {tuple(weight.shape)}"
            )
        g, _, _ = transforms(tile, device=weight.device)
        spatial = weight.detach().to(torch.float64)
        taps = torch.einsum("ir,kcrs,js->ijkc", g, spatial, g)
        return cls.from_taps(taps.flatten(0, 1).to(weight.dtype), groups)

    @classmethod
    def from_taps(cls, taps: Tensor, groups: int = 1, *, sparse: bool = False) -> WinogradWeight:
        """Pack matrices of the Winograd domain.

        Args:
            taps: ``(T, K, C/G)``, T = 16 or 36, floating point; tap ``i * (m + 2) + j`` belongs to
                row i and column j of the transformed tile.
            groups: G of the convolution.
            sparse: keep only the nonzeros (NaN counts as one), in CSR.

        Raises:
            TypeError: ``taps`` is not a floating-point tensor.
            ValueError: a shape or groups that do not fit.
        """
        if not isinstance(taps, Tensor) or not taps.is_floating_point():
            got = taps.dtype if isinstance(taps, Tensor) else type(taps).__name__
            raise TypeError(f"WinogradWeight: expected taps a floating-point tensor, got {got}")
        if taps.dim() != 3 or taps.shape[0] not in (16, 36):
            raise ValueError(
                "WinogradWeight: expected taps of shape (16 or 36, K, C/G), "
                f"got {tuple(taps.shape)}"
            )
        k, c = taps.shape[1:]
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or k % groups:
            raise ValueError(
                f"WinogradWeight: expected groups a positive divisor of K = {k}, got {groups!r}"
            )
        rows = groups * block_count(k, groups) * taps.shape[0] * BLOCK
        if rows * c >= 2**31:
            raise ValueError(
                "WinogradWeight: expected taps with fewer than 2^31 elements in whole blocks, "
                f"got {rows * c}"
            )
        blocks = _to_blocks(taps.detach(), groups)
        shape, tile = (k, c, 3, 3), 2 if taps.shape[0] == 16 else 4
        if not sparse:
            return cls(blocks.contiguous(), None, None, shape, groups, tile)
        csr = CSRWeight.from_dense(blocks.transpose(2, 3).reshape(rows, c))
        return cls(csr.values, csr.col_idx, csr.row_ptr, shape, groups, tile)

    def taps(self) -> Tensor:
        """``(T, K, C/G)``: one matrix for each tap; differentiable with respect to ``values``.

        Of a dense weight they may share the memory of ``values``.
        """
        k, c = self.shape[:2]
        taps = (self.tile + 2) ** 2
        blocks = self.groups * block_count(k, self.groups)
        if self.col_idx is None or self.row_ptr is None:
            values = self.values
        else:
            rows = CSRWeight(
                self.values, self.col_idx, self.row_ptr, (blocks * taps * BLOCK, c, 1, 1)
            )
            values = rows.to_dense().reshape(blocks, taps, BLOCK, c).transpose(2, 3)
        return _from_blocks(values, k, self.groups)

    def stored(self, taps: Tensor) -> Tensor:
        """Other taps in the layout of ``values``: of a sparse weight those at its positions."""
        blocks = _to_blocks(taps, self.groups)
        if self.col_idx is None or self.row_ptr is None:
            return blocks
        shape = (len(self.row_ptr) - 1, self.shape[1])
        rows = CSRWeight(self.values, self.col_idx, self.row_ptr, (*shape, 1, 1))
        matrix = blocks.transpose(2, 3).reshape(shape)
        return matrix[rows.row_indices(), self.col_idx.long()]

    def to_dense(self) -> Tensor:
        """The spatial weight ``(K, C/G, 3, 3)`` whose transform is nearest (least squares).

        The weight itself, up to rounding, unless the taps were pruned or trained: those of most
        sparse weights are not the transform of any spatial weight.
        """
        g, _, _ = transforms(self.tile, device=self.values.device)
        inverse = torch.linalg.pinv(g)
        edge = self.tile + 2
        taps = self.taps().detach().to(torch.float64).unflatten(0, (edge, edge))
        weight = torch.einsum("ri,ijkc,sj->kcrs", inverse, taps, inverse)
        return weight.to(self.values.dtype).contiguous()

    @property
    def is_sparse(self) -> bool:
        """Whether the taps are in CSR."""
        return self.col_idx is not None

    @property
    def nnz(self) -> int:
        """Stored values, without the zeros that fill a block."""
        k, c = self.shape[:2]
        return self.values.shape[0] if self.is_sparse else (self.tile + 2) ** 2 * k * c

    @property
    def density(self) -> float:
        """Stored values over all ``T * K * C/G``; 0 for an empty weight."""
        k, c = self.shape[:2]
        return self.nnz / ((self.tile + 2) ** 2 * k * c) if k * c else 0.0

    def validate(self) -> WinogradWeight:
        """Check every invariant the kernels rely on; returns itself.

        Cost: one pass over the indices. ``from_dense`` and ``from_taps`` need no check.

        Raises:
            ValueError: names the argument or array that is corrupt and why.
        """
        check_tile("WinogradWeight", self.tile)
        shape = self.shape
        if len(shape) != 4 or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(
                "WinogradWeight: expected shape (K, C/G, 3, 3) of non-negative integers, "
                f"got {shape}"
            )
        if tuple(shape[2:]) != (3, 3):
            raise ValueError(f"WinogradWeight: expected shape (K, C/G, 3, 3), got {shape}")
        groups = self.groups
        if not isinstance(groups, int) or groups < 1 or shape[0] % groups:
            raise ValueError(
                f"WinogradWeight: expected groups a positive divisor of K = {shape[0]}, "
                f"got {groups!r}"
            )
        if not self.values.is_floating_point():
            raise ValueError(
                f"WinogradWeight: expected values floating point, got {self.values.dtype}"
            )
        taps = (self.tile + 2) ** 2
        blocks = groups * block_count(shape[0], groups)
        if self.col_idx is None or self.row_ptr is None:
            if self.col_idx is not None or self.row_ptr is not None:
                raise ValueError("WinogradWeight: expected col_idx and row_ptr both or neither")
            expected = (blocks, taps, shape[1], BLOCK)
            if tuple(self.values.shape) != expected:
                raise ValueError(
                    f"WinogradWeight: expected values of shape {expected}, "
                    f"got {tuple(self.values.shape)}"
                )
            return self
        rows = (blocks * taps * BLOCK, shape[1], 1, 1)
        try:
            CSRWeight(self.values, self.col_idx, self.row_ptr, rows).validate()
        except ValueError as error:
            raise ValueError(str(error).replace("CSRWeight", "WinogradWeight", 1)) from None
        return self


def block_count(filters: int, groups: int) -> int:
    """Blocks of filters of one convolution group."""
    return -(-(filters // groups) // BLOCK)


def _to_blocks(taps: Tensor, groups: int) -> Tensor:
    """``(T, K, C/G)`` to ``(B, T, C/G, 8)``."""
    t, k, c = taps.shape
    blocks = block_count(k, groups)
    by_group = taps.reshape(t, groups, k // groups, c)
    padded = F.pad(by_group, (0, 0, 0, blocks * BLOCK - k // groups))
    split = padded.reshape(t, groups, blocks, BLOCK, c)
    return split.permute(1, 2, 0, 4, 3).reshape(groups * blocks, t, c, BLOCK)


def _from_blocks(values: Tensor, k: int, groups: int) -> Tensor:
    """The inverse of ``_to_blocks``."""
    blocks, t, c, _ = values.shape
    by_group = values.reshape(groups, blocks // groups, t, c, BLOCK).permute(2, 0, 1, 4, 3)
    filters = by_group.reshape(t, groups, blocks // groups * BLOCK, c)
    return filters[:, :, : k // groups].reshape(t, k, c)
