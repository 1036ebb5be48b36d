"""Which structured pattern a mask has: the search behind ``PatternWeight.from_dense``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_LIMIT = 0.1
"""Largest share of zeros among the stored values of a pattern that counts as being there."""
NM_FILLED = 0.8
"""Least share of what n:m allows that must be stored: a random mask of 98 % zeros is not 2:4."""
NM_WINDOWS = (2, 4, 8, 16)
_VECTOR = re.compile(r"vector([1-9]\d{0,9})")
_RATIO = re.compile(r"([1-9]\d{0,9}):([1-9]\d{0,9})")
_PLAIN_NAMES = ("none", "shape", "filter", "kernel", "cluster")

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Found:
    """A way to cut the filters.

    Attributes:
        name: of the pattern.
        filters: (K,) filter of each packed row.
        sizes: (filter groups,) filters of each.
        keep: (filter groups, columns) bool.
        entries: nonzeros of the weight.
    """

    name: str
    filters: Tensor
    sizes: Tensor
    keep: Tensor
    entries: int

    @property
    def stored(self) -> int:
        return int((self.sizes * self.keep.sum(1)).sum())

    @property
    def padding(self) -> float:
        """Share of zeros among the stored values."""
        return 1 - self.entries / self.stored if self.stored else 0.0

    @property
    def cost(self) -> float:
        """Predicted cycles per output vector."""
        per_value = torch.full(self.sizes.shape, 1.0, dtype=torch.float64)
        per_value[self.sizes < 4] = 1.04
        per_value[self.sizes < 2] = 1.16
        return float((self.sizes * self.keep.sum(1)).double().cpu() @ per_value)


def _blocks(name: str, keep: Tensor, groups: int, v: int) -> Found:
    """V neighbouring filters together, the last of a group of the convolution maybe fewer."""
    k, columns = keep.shape
    per_group = k // groups
    down = -(-per_group // v) if per_group else 0
    padded = keep.new_zeros((groups, down * v, columns))
    padded[:, :per_group] = keep.reshape(groups, per_group, columns)
    union = padded.reshape(groups * down, v, columns).any(1)
    sizes = torch.full((groups, down), v, device=keep.device)
    if down:
        sizes[:, -1] = per_group - (down - 1) * v
    filters = torch.arange(k, device=keep.device)
    return Found(name, filters, sizes.reshape(-1), union, int(keep.sum()))


def _clusters(name: str, keep: Tensor, groups: int, entries: int) -> Found:
    """Filters of one support together, in the order of their first filters."""
    k, columns = keep.shape
    per_group = max(k // groups, 1)
    group = torch.arange(k, device=keep.device) // per_group
    if k == 0 or columns == 0:
        return _blocks(name, keep, groups, max(k // groups, 1))
    _, cluster = torch.unique(keep, dim=0, return_inverse=True)
    # A cluster in each group of the convolution is one of its own.
    _, cluster = torch.unique(cluster * groups + group, return_inverse=True)
    n = int(cluster.max()) + 1
    index = torch.arange(k, device=keep.device)
    first = torch.full((n,), k, device=keep.device).scatter_reduce(0, cluster, index, "amin")
    filters = torch.argsort(first[cluster] * k + index)
    leaders = first.sort().values
    sizes = torch.zeros(k, dtype=torch.int64, device=keep.device)
    sizes.scatter_add_(0, first[cluster], torch.ones_like(index))
    return Found(name, filters, sizes[leaders], keep[leaders], entries)


def _shared(name: str, keep: Tensor, groups: int, whole: bool) -> Found:
    """All filters of a group that are not empty together, with what any of them keeps or all."""
    k, columns = keep.shape
    filled = keep.any(1)
    union = keep.reshape(groups, k // groups, columns).any(1) | whole
    spread = union.repeat_interleave(k // groups, 0) & filled[:, None]
    return _clusters(name, spread, groups, int(keep.sum()))


def _whole_kernels(keep: Tensor, shape: Shape) -> Tensor:
    k, c, r, s = shape
    return keep.reshape(k, c, r * s).any(2, keepdim=True).expand(-1, -1, r * s).reshape(k, -1)


def _kernels(keep: Tensor, shape: Shape, groups: int) -> Found | None:
    """Filters with the same kernels together; a filter alone keeps its nonzeros."""
    entries = int(keep.sum())
    found = _clusters("kernel", _whole_kernels(keep, shape), groups, entries)
    if not _is_there(found, keep):
        return None
    if len(found.sizes) < shape[0]:
        return found
    return Found("kernel", found.filters, found.sizes, keep, entries)


def _is_there(found: Found, keep: Tensor) -> bool:
    zeros, padding = keep.numel() - found.entries, found.stored - found.entries
    return found.padding <= PADDING_LIMIT and padding <= zeros / 2


def _windows(keep: Tensor, shape: Shape, m: int) -> int:
    """The most entries kept of m consecutive channels of one tap."""
    k, c, r, s = shape
    if keep.numel() == 0:
        return 0
    padded = keep.new_zeros((k, -(-c // m) * m, r * s))
    padded[:, :c] = keep.reshape(k, c, r * s)
    return int(padded.reshape(k, -1, m, r * s).sum(2).max())


def _candidates(keep: Tensor, shape: Shape, groups: int) -> Iterator[Found]:
    """Patterns that drop something, the preferred first."""
    k, c, r, s = shape
    size, entries, per_group = keep.numel(), int(keep.sum()), k // groups
    found = _shared("shape", keep, groups, whole=False)
    whole = _shared("filter", keep, groups, whole=True)
    if found.stored < whole.stored:
        yield found
    if whole.stored < size:
        yield whole
    for power in range(max(per_group - 1, 0).bit_length() - 1, 0, -1):
        found = _blocks(f"vector{2**power}", keep, groups, 2**power)
        if found.stored < size:
            yield found
    if r * s > 1:
        kernels = _kernels(keep, shape, groups)
        if kernels is not None and kernels.stored < size:
            yield kernels
    found = _clusters("cluster", keep, groups, entries)
    if entries < size and len(found.sizes) < k:
        yield found
    ratios = ((_windows(keep, shape, m), m) for m in NM_WINDOWS if c % m == 0)
    tight = [
        (n / m, m, n) for n, m in ratios if 0 < n <= m // 2 and entries >= NM_FILLED * n / m * size
    ]
    if tight:
        _, m, n = min(tight)
        yield _clusters(f"{n}:{m}", keep, groups, entries)


def find_pattern(keep: Tensor, shape: Shape, groups: int) -> Found:
    """The cheapest pattern that is there; ``none`` if there is none.

    Args:
        keep: (K, columns) bool.
        shape: (K, C/G, R, S).
        groups: G.
    """
    best = _blocks("none", keep, groups, 1)
    cost = best.cost
    for found in reversed(list(_candidates(keep, shape, groups))):
        if _is_there(found, keep) and found.cost <= cost:
            best, cost = found, found.cost
    return best


def ratio_of(name: str) -> tuple[int, int] | None:
    """N and m of a pattern ``n:m``."""
    found = _RATIO.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


def is_pattern_name(name: object) -> bool:
    """Whether a weight can be of a pattern of this name."""
    if not isinstance(name, str):
        return False
    ratio = ratio_of(name)
    is_ratio = ratio is not None and ratio[0] <= ratio[1]
    return name in _PLAIN_NAMES or _VECTOR.fullmatch(name) is not None or is_ratio


def pattern_of(keep: Tensor, shape: Shape, groups: int, name: str) -> Found:
    """The cut of the pattern ``name``, or a ValueError that says what is there instead."""
    if not is_pattern_name(name):
        raise ValueError(
            "PatternWeight: expected pattern 'shape', 'filter', 'vectorV', 'kernel', 'cluster', "
            f"'n:m' or 'none', got {name!r}"
        )
    vector, ratio = _VECTOR.fullmatch(name), ratio_of(name)
    entries = int(keep.sum())
    trouble = ""
    if name == "none":
        return _blocks(name, keep, groups, 1)
    if name in ("shape", "filter"):
        found = _shared(name, keep, groups, whole=name == "filter")
    elif vector:
        found = _blocks(name, keep, groups, int(vector[1]))
    elif name == "kernel":
        whole = _clusters(name, _whole_kernels(keep, shape), groups, entries)
        found = _kernels(keep, shape, groups) or whole
    elif name == "cluster":
        found = _clusters(name, keep, groups, entries)
        if len(found.sizes) == shape[0] > 1:
            trouble = "filters of which no two have the same support"
    else:
        assert ratio is not None
        found = _clusters(name, keep, groups, entries)
        most = _windows(keep, shape, ratio[1])
        if most > ratio[0]:
            trouble = f"{most} entries in a window of {ratio[1]} channels"
    if not trouble and found.padding > PADDING_LIMIT:
        trouble = f"{found.padding:.0%} zeros among the kept positions"
    if trouble:
        there = find_pattern(keep, shape, groups).name
        raise ValueError(
            f"PatternWeight: expected a weight with pattern {name!r} (at most "
            f"{PADDING_LIMIT:.0%} zeros stored), got {trouble}; its pattern is {there!r}"
        )
    return found
