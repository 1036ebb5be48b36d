"""Compressed sparse rows over the lowered weight matrix of a convolution.

Layout, for a weight ``W`` of shape ``(K, C/G, R, S)``:

1. ``values`` ``(nnz,)``: the nonzeros, filter by filter, columns ascending.
2. ``col_idx`` ``(nnz,)`` int32: column of each, ``(c * R + r) * S + s`` with ``c`` in the group.
3. ``row_ptr`` ``(K + 1,)`` int32: filter ``k`` owns entries ``row_ptr[k]`` to ``row_ptr[k + 1]``.

A linear weight ``(O, I)`` is stored as ``(O, I, 1, 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecnn.formats._packed import PackedWeight


@dataclass(frozen=True)
class CSRWeight(PackedWeight):
    """A convolution weight in CSR.

    Attributes:
        values: ``(nnz,)`` nonzeros.
        col_idx: ``(nnz,)`` int32 columns of the lowered matrix, ascending in each row.
        row_ptr: ``(K + 1,)`` int32.
        shape: ``(K, C/G, R, S)`` of the dense weight.
    """

    values: Tensor
    col_idx: Tensor
    row_ptr: Tensor
    shape: tuple[int, int, int, int]

    @classmethod
    def from_dense(cls, weight: Tensor) -> CSRWeight:
        """Pack a dense weight, keeping exactly its nonzeros (NaN counts as one).

        Args:
            weight: ``(K, C/G, R, S)`` or ``(O, I)``, floating point.

        Raises:
            TypeError: ``weight`` is not a floating-point tensor.
            ValueError: ``weight`` is neither 2-d nor 4-d, or too large for 32-bit indices.
        """
        cls._check_dense(weight)
        dense = weight.detach()
        k, c = dense.shape[:2]
        r, s = dense.shape[2:] if dense.dim() == 4 else (1, 1)
        matrix = dense.reshape(k, c * r * s)
        keep = matrix != 0
        counts = keep.sum(dim=1)
        row_ptr = torch.zeros(k + 1, dtype=torch.int32, device=dense.device)
        row_ptr[1:] = counts.cumsum(0)
        col_idx = keep.nonzero()[:, 1].to(torch.int32)
        return cls(matrix[keep].contiguous(), col_idx, row_ptr, (k, c, r, s))

    def to_dense(self) -> Tensor:
        """The dense weight ``(K, C/G, R, S)``; differentiable with respect to ``values``."""
        k, c, r, s = self.shape
        rows = self.row_indices()
        flat = rows.long() * (c * r * s) + self.col_idx.long()
        zeros = self.values.new_zeros(k * c * r * s)
        return zeros.index_put((flat,), self.values).reshape(k, c, r, s)

    def row_indices(self) -> Tensor:
        """``(nnz,)`` int64 filter of each stored entry."""
        k = self.shape[0]
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).long()
        return torch.repeat_interleave(
            torch.arange(k, device=self.row_ptr.device), counts, output_size=self.nnz
        )

    def validate(self) -> CSRWeight:
        """Check every invariant the kernels rely on; returns itself.

        Cost: one pass over the arrays. Construction by ``from_dense`` needs no check.

        Raises:
            ValueError: names the array that is corrupt and why.
        """
        self._check_arrays("col_idx", "row_ptr")
        k, columns = self.shape[0], self.shape[1] * self.shape[2] * self.shape[3]
        nnz = self.values.shape[0]
        if self.col_idx.shape[0] != nnz:
            raise ValueError(
                f"CSRWeight: expected col_idx with nnz = {nnz} entries, got {self.col_idx.shape[0]}"
            )
        if self.row_ptr.shape[0] != k + 1:
            raise ValueError(
                f"CSRWeight: expected row_ptr with K + 1 = {k + 1} entries, "
                f"got {self.row_ptr.shape[0]}"
            )
        if int(self.row_ptr[0]) != 0 or int(self.row_ptr[-1]) != nnz:
            raise ValueError(
                f"CSRWeight: expected row_ptr from 0 to nnz = {nnz}, "
                f"got {int(self.row_ptr[0])} to {int(self.row_ptr[-1])}"
            )
        if bool((self.row_ptr[1:] < self.row_ptr[:-1]).any()):
            raise ValueError("CSRWeight: expected row_ptr non-decreasing, got a falling entry")
        if nnz:
            low, high = int(self.col_idx.min()), int(self.col_idx.max())
            if low < 0 or high >= columns:
                raise ValueError(
                    f"CSRWeight: expected col_idx in [0, {columns}), got [{low}, {high}]"
                )
            order = self.row_indices() * columns + self.col_idx.long()
            if bool((order[1:] <= order[:-1]).any()):
                raise ValueError(
                    "CSRWeight: expected col_idx ascending without repeats in each row, "
                    "got an entry out of order"
                )
        return self


def transpose_indices(
    col_idx: Tensor,
    row_ptr: Tensor,
    channels_per_group: int,
    kernel_size: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the weight of the input gradient: filters and channels swapped, taps flipped.

    Returns:
        ``(permutation, col_idx, row_ptr)`` of the transposed weight ``(C, K/G, R, S)``; its values
        are ``values[permutation]``. Cost: one sort of nnz keys.
    """
    k = row_ptr.shape[0] - 1
    r, s = kernel_size
    taps = r * s
    rows = CSRWeight(col_idx, col_idx, row_ptr, (k, channels_per_group, r, s)).row_indices()
    columns = col_idx.long()
    kg = max(k // groups, 1)
    row_t = rows // kg * channels_per_group + columns // taps
    col_t = rows % kg * taps + (taps - 1 - columns % taps)
    permutation = torch.argsort(row_t * (kg * taps) + col_t)
    counts = torch.zeros(channels_per_group * groups + 1, dtype=torch.int64, device=col_idx.device)
    counts = counts.scatter_add(0, row_t + 1, torch.ones_like(row_t))
    return permutation, col_t[permutation].to(torch.int32), counts.cumsum(0).to(torch.int32)
