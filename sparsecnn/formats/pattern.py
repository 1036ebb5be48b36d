"""Groups of filters that share their columns: one format for structured sparsity.

The lowered matrix ``(K, C/G * R * S)`` of a weight is cut into filter groups, each within one group
of the convolution. A filter group keeps a list of columns and a dense block, so that a kernel loads
an input once for all filters of the group and reads one index for all their weights.

| pattern   | filter group                        | kept columns                                |
|-----------|-------------------------------------|---------------------------------------------|
| `shape`   | all filters that are not empty      | those not zero in all of them               |
| `filter`  | all filters that are not empty      | all                                         |
| `vectorV` | V neighbouring filters              | those not zero in all of them               |
| `kernel`  | filters with the same kernels       | whole kernels; nonzeros of a lone filter    |
| `cluster` | filters with the same support       | the support; the filters are permuted       |
| `n:m`     | one filter, or several of a support | at most n of m consecutive channels per tap |
| `none`    | one filter                          | its nonzeros, no pattern                    |

Layout:

1. ``values``: block after block, column by column, the filters of a column together.
2. ``columns`` int32: of every filter group, ascending, ``(c * R + r) * S + s``.
3. ``filters`` ``(K,)`` int32: the filter of each packed row; a permutation inside each group of the
   convolution.
4. ``group_rows`` int32: filter group i owns packed rows ``group_rows[i]`` to ``group_rows[i + 1]``.
5. ``group_columns`` int32: and columns ``group_columns[i]`` to ``group_columns[i + 1]``.

Vector-wise sparsity: Mao et al., "Exploring the Granularity of Sparsity in Convolutional Neural
Networks" (CVPR workshops 2017); shape-wise: Wen et al., "Learning Structured Sparsity in Deep
Neural Networks" (NeurIPS 2016); n:m: Mishra et al., "Accelerating Sparse Deep Neural Networks"
(2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecnn.formats._packed import PackedWeight
from sparsecnn.formats._patterns import find_pattern, pattern_of, ratio_of

INDEX_ARRAYS = ("columns", "filters", "group_rows", "group_columns")


@dataclass(frozen=True)
class PatternWeight(PackedWeight):
    """A convolution weight as dense blocks of filters and columns.

    Attributes:
        values: stored weights; zeros among them are padding.
        columns: int32, ascending in each filter group.
        filters: ``(K,)`` int32 filter of each packed row.
        group_rows: int32, one more than filter groups.
        group_columns: int32, likewise.
        shape: ``(K, C/G, R, S)`` of the dense weight.
        groups: G; no filter group crosses a group of the convolution.
        pattern: what was found, see the module. Other than ``n:m`` it is a mere name.
    """

    values: Tensor
    columns: Tensor
    filters: Tensor
    group_rows: Tensor
    group_columns: Tensor
    shape: tuple[int, int, int, int]
    groups: int = 1
    pattern: str = "none"

    @classmethod
    def from_dense(
        cls, weight: Tensor, groups: int = 1, pattern: str | None = None
    ) -> PatternWeight:
        """Pack a dense weight in the pattern that is there, or in the one asked for.

        A pattern is there when it drops at least half of the zeros and stores at most one zero in
        ten values. Of several the one with the lowest predicted cost is taken: stored values, at
        1.16 each where a filter is alone, 1.04 where two or three share a column, 1 from four on
        (what a multiply-add takes in cycles); on a tie the one further up in this list: ``shape``,
        ``filter``, ``vectorV`` from the largest V down, ``kernel``, ``cluster``, ``n:m``, ``none``.
        V is tried as the powers of two below K/G, m as 2, 4, 8 and 16, if they divide C/G, for the
        least n/m; n:m needs n <= m/2 and at least 0.8 of what it allows. A pattern that is asked
        for only has to hold with one zero in ten.

        Args:
            weight: ``(K, C/G, R, S)`` or ``(O, I)``, floating point. NaN counts as a nonzero.
            groups: G of the convolution.
            pattern: a name of the table, e.g. ``"vector8"`` or ``"2:4"``; None finds it.

        Raises:
            TypeError: ``weight`` is not a floating-point tensor.
            ValueError: a bad shape or number of groups, an unknown pattern, or one that the weight
                does not have; says what was found instead.
        """
        cls._check_dense(weight)
        k, c = weight.shape[:2]
        r, s = weight.shape[2:] if weight.dim() == 4 else (1, 1)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or k % groups:
            raise ValueError(
                f"PatternWeight: expected groups a positive divisor of K = {k}, got {groups!r}"
            )
        matrix = weight.detach().reshape(k, c * r * s)
        keep = matrix != 0
        if pattern is None:
            found = find_pattern(keep, (k, c, r, s), groups)
        else:
            found = pattern_of(keep, (k, c, r, s), groups, pattern)
        order, sizes, kept = found.filters, found.sizes, found.keep
        device = weight.device
        group_rows = torch.zeros(len(sizes) + 1, dtype=torch.int32, device=device)
        group_rows[1:] = sizes.cumsum(0)
        group_columns = torch.zeros(len(sizes) + 1, dtype=torch.int32, device=device)
        group_columns[1:] = kept.sum(1).cumsum(0)
        self = cls(
            matrix.new_empty(0),
            kept.nonzero()[:, 1].to(torch.int32),
            order.to(torch.int32),
            group_rows,
            group_columns,
            (k, c, r, s),
            groups,
            found.name,
        )
        values = matrix.reshape(-1)[self.flat_indices(int((sizes * kept.sum(1)).sum()))]
        object.__setattr__(self, "values", values)
        return self

    def flat_indices(self, count: int | None = None) -> Tensor:
        """int64 place of each value in the dense weight, row-major; ``count`` is their number."""
        count = self.values.shape[0] if count is None else count
        arrays = (self.columns, self.filters, self.group_rows, self.group_columns)
        return flat_indices(*arrays, self.shape, count)

    def to_dense(self) -> Tensor:
        """The dense weight ``(K, C/G, R, S)``; differentiable with respect to ``values``."""
        k, c, r, s = self.shape
        zeros = self.values.new_zeros(k * c * r * s)
        return zeros.index_put((self.flat_indices(),), self.values).reshape(k, c, r, s)

    @property
    def padding(self) -> float:
        """Share of the stored values that are zero."""
        return 1 - int(self.values.count_nonzero()) / self.nnz if self.nnz else 0.0

    def validate(self) -> PatternWeight:
        """Check every invariant the kernels rely on; returns itself.

        Cost: a few passes over the arrays. Construction by ``from_dense`` needs no check.

        Raises:
            ValueError: names the array that is corrupt and why.
        """
        self._check_arrays(*INDEX_ARRAYS)
        k, columns = self.shape[0], self.shape[1] * self.shape[2] * self.shape[3]
        if not isinstance(self.groups, int) or self.groups < 1 or k % self.groups:
            raise ValueError(
                f"PatternWeight: expected groups a positive divisor of K = {k}, got {self.groups!r}"
            )
        rows, ends = self.group_rows.long(), self.group_columns.long()
        if rows.shape != ends.shape or not len(rows):
            raise ValueError(
                "PatternWeight: expected group_rows and group_columns of one length >= 1, got "
                f"{len(rows)} and {len(ends)}"
            )
        for name, array, last in (("rows", rows, k), ("columns", ends, self.columns.shape[0])):
            if int(array[0]) != 0 or int(array[-1]) != last:
                raise ValueError(
                    f"PatternWeight: expected group_{name} from 0 to {last}, "
                    f"got {int(array[0])} to {int(array[-1])}"
                )
        sizes, kept = rows.diff(), ends.diff()
        if bool((sizes < 1).any()) or bool((kept < 0).any()):
            raise ValueError(
                "PatternWeight: expected group_rows to rise and group_columns not to fall"
            )
        per_group = max(k // self.groups, 1)
        if bool((rows[:-1] // per_group != (rows[1:] - 1) // per_group).any()):
            raise ValueError(
                "PatternWeight: expected each filter group inside one group of the convolution, "
                f"K/G = {per_group}"
            )
        f = self.filters.long()
        if len(f) != k:  # before anything of that size is made
            raise ValueError(
                f"PatternWeight: expected filters a permutation of 0 to {k - 1}, "
                f"got {len(f)} entries"
            )
        packed = torch.arange(k, device=rows.device)
        if not torch.equal(f.sort().values, packed):
            raise ValueError(f"PatternWeight: expected filters a permutation of 0 to {k - 1}")
        if bool((f // per_group != packed // per_group).any()):
            raise ValueError("PatternWeight: expected filters to stay in their group")
        stored = int((sizes * kept).sum())
        if self.values.shape[0] != stored:
            raise ValueError(f"PatternWeight: expected {stored} values, got {self.values.shape[0]}")
        if len(self.columns):
            low, high = int(self.columns.min()), int(self.columns.max())
            if low < 0 or high >= columns:
                raise ValueError(
                    f"PatternWeight: expected columns in [0, {columns}), got [{low}, {high}]"
                )
            owner = torch.repeat_interleave(torch.arange(len(kept), device=kept.device), kept)
            if bool(((owner * columns + self.columns.long()).diff() <= 0).any()):
                raise ValueError(
                    "PatternWeight: expected columns ascending without repeats in each filter "
                    "group, got one out of order"
                )
            self._check_ratio(owner)
        return self

    def _check_ratio(self, owner: Tensor) -> None:
        """The pattern that kernels rely on, n:m; `owner` is the filter group of each column."""
        ratio = ratio_of(self.pattern)
        if ratio is None:
            return
        n, m = ratio
        _, c, r, s = self.shape
        columns = self.columns.long()
        window = torch.div(columns, r * s * m, rounding_mode="floor")
        places = (owner * (c // m + 1) + window) * (r * s) + columns % (r * s)
        most = int(places.unique(return_counts=True)[1].max())
        if most > n:
            raise ValueError(
                f"PatternWeight: expected the pattern {self.pattern!r} of its name, got {most} "
                f"columns in a window of {m} channels"
            )


def flat_indices(
    columns: Tensor,
    filters: Tensor,
    group_rows: Tensor,
    group_columns: Tensor,
    shape: tuple[int, int, int, int],
    count: int,
) -> Tensor:
    """``PatternWeight.flat_indices`` of bare arrays."""
    rows, ends = group_rows.long(), group_columns.long()
    sizes, kept = rows.diff(), ends.diff()
    owner = torch.repeat_interleave(
        torch.arange(sizes.shape[0], device=rows.device), sizes * kept, output_size=count
    )
    first = (sizes * kept).cumsum(0) - sizes * kept
    inside = torch.arange(count, device=rows.device) - first[owner]
    size = sizes[owner]
    column = columns.long()[ends[owner] + torch.div(inside, size, rounding_mode="floor")]
    row = filters.long()[rows[owner] + inside % size]
    return row * (shape[1] * shape[2] * shape[3]) + column
