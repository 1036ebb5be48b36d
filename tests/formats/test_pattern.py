"""PatternWeight: patterns are found and named, packing keeps every bit, bad arrays are named."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecnn.formats.pattern import PatternWeight
from tests import reference

SHAPE = (32, 16, 3, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(name: str, shape: tuple[int, ...] = SHAPE, keep: float = 0.5, groups: int = 1) -> Tensor:
    """A weight with one pattern, drawn at random."""
    k, c, r, s = shape
    g = generator(3)
    mask = torch.ones(shape)
    if name == "shape":
        mask = (torch.rand(groups, 1, c, r, s, generator=g) < keep).float()
        mask = mask.expand(groups, k // groups, c, r, s).reshape(shape)
    elif name == "filter":
        mask[torch.randperm(k, generator=g)[: k // 2]] = 0
    elif name.startswith("vector"):
        v = int(name.removeprefix("vector"))
        blocks = torch.rand(-(-k // v), c, r, s, generator=g) < keep
        mask = blocks.repeat_interleave(v, 0)[:k].float()
    elif name == "kernel":
        mask = (torch.rand(k, c, 1, 1, generator=g) < keep).float().expand(shape)
    elif name == "cluster":
        supports = torch.rand(4, c, r, s, generator=g) < keep
        mask = supports[torch.randint(4, (k,), generator=g)].float()
    elif ":" in name:
        n, m = map(int, name.split(":"))
        scores = torch.rand(k, c // m, m, r, s, generator=g)
        kept = scores.argsort(2).argsort(2) < n
        mask = kept.reshape(shape).float()
    elif name == "random":
        mask = (torch.rand(shape, generator=g) < keep).float()
    return torch.randn(shape, generator=g) * mask


NAMED = ["shape", "filter", "vector16", "vector8", "vector4", "vector2", "kernel", "cluster",
         "2:4", "1:4", "1:2", "3:8"]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_a_pattern_is_found_and_kept_to_the_bit(name: str, dtype: torch.dtype) -> None:
    weight = masked(name).to(dtype)
    packed = PatternWeight.from_dense(weight).validate()
    assert packed.pattern == name
    assert packed.shape == SHAPE and packed.values.dtype == dtype
    assert torch.equal(packed.to_dense(), weight)
    assert packed.nnz == int(weight.count_nonzero()) and packed.padding == 0
    assert math.isclose(packed.density, packed.nnz / weight.numel())
    integers = sum(
        t.numel() for t in (packed.columns, packed.filters, packed.group_rows, packed.group_columns)
    )
    assert packed.nbytes == packed.nnz * weight.element_size() + 4 * integers
    arrays = (packed.columns, packed.filters, packed.group_rows, packed.group_columns)
    dense = reference.pattern_to_dense(packed.values, *arrays, SHAPE)
    assert torch.equal(dense, weight.double())


@pytest.mark.parametrize("name", NAMED)
def test_a_named_pattern_is_the_one_found(name: str) -> None:
    weight = masked(name)
    found, asked = PatternWeight.from_dense(weight), PatternWeight.from_dense(weight, 1, name)
    assert asked.pattern == found.pattern == name
    for field in ("values", "columns", "filters", "group_rows", "group_columns"):
        assert torch.equal(getattr(found, field), getattr(asked, field)), field


@pytest.mark.parametrize(
    "name, sizes",
    [("shape", [32]), ("vector8", [8] * 4), ("vector5", [5] * 6 + [2]), ("none", [1] * 32)],
)
def test_filters_of_a_group(name: str, sizes: list[int]) -> None:
    packed = PatternWeight.from_dense(masked(name if name != "none" else "random"), 1, name)
    assert packed.group_rows.diff().tolist() == sizes
    assert packed.filters.tolist() == list(range(32))


def test_clusters_bring_equal_filters_together_in_order() -> None:
    weight = torch.zeros(6, 1, 1, 4)
    for k, column in enumerate((1, 0, 1, 3, 0, 1)):
        weight[k, 0, 0, column] = k + 1
    packed = PatternWeight.from_dense(weight)
    assert packed.pattern == "cluster"
    assert packed.filters.tolist() == [0, 2, 5, 1, 4, 3]
    assert packed.group_rows.tolist() == [0, 3, 5, 6]
    assert packed.columns.tolist() == [1, 0, 3]
    assert packed.values.tolist() == [1, 3, 6, 2, 5, 4]
    assert torch.equal(packed.to_dense(), weight)


def test_empty_filters_cost_nothing() -> None:
    weight = masked("shape")
    weight[[3, 17, 31]] = 0
    packed = PatternWeight.from_dense(weight)
    assert packed.pattern == "shape"
    assert packed.nnz == int(weight.count_nonzero())
    assert sorted(packed.group_rows.diff().tolist()) == [3, 29]
    assert torch.equal(packed.to_dense(), weight)


def test_groups_of_the_convolution_are_kept_apart() -> None:
    weight = masked("shape", (24, 8, 3, 3), groups=3)
    packed = PatternWeight.from_dense(weight, groups=3).validate()
    assert packed.pattern == "shape" and packed.groups == 3
    assert packed.group_rows.tolist() == [0, 8, 16, 24]
    assert torch.equal(packed.to_dense(), weight)
    # As one group it is what it looks like there.
    assert PatternWeight.from_dense(weight).pattern == "vector8"
    same = torch.randn(6, 1, 3, 3) * torch.tensor([1.0, 0, 1])
    packed = PatternWeight.from_dense(same, groups=6).validate()
    assert packed.group_rows.tolist() == list(range(7)) and torch.equal(packed.to_dense(), same)


@pytest.mark.parametrize("name", ["shape", "vector8", "kernel"])
def test_a_few_zeros_inside_a_pattern_are_padding(name: str) -> None:
    weight = masked(name)
    places = weight.reshape(-1).nonzero()[:, 0]
    weight.reshape(-1)[places[::40]] = 0
    packed = PatternWeight.from_dense(weight)
    assert packed.pattern == name
    if name == "kernel":  # each filter is alone: nothing is gained by storing them
        assert packed.padding == 0 and packed.nnz == int(weight.count_nonzero())
    else:
        assert 0.02 < packed.padding < 0.03 and packed.nnz == len(places)
    assert torch.equal(packed.to_dense(), weight)


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3, 0.5, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (64, 64, 1, 1), (17, 3, 5, 5), (16, 9, 3, 3)])
def test_random_zeros_are_no_pattern(shape: tuple[int, ...], keep: float) -> None:
    weight = masked("random", shape, keep)
    packed = PatternWeight.from_dense(weight).validate()
    # Nearly empty or full, some rows are alike: a cluster, and rightly so.
    assert packed.pattern in (("none", "cluster") if keep < 0.05 or keep > 0.95 else ("none",))
    assert packed.nnz == int(weight.count_nonzero())
    assert torch.equal(packed.to_dense(), weight)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (1, 1, 1, 1), (7, 5, 1, 1), (6, 0, 3, 3), (3, 4)])
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_corners(shape: tuple[int, ...], value: float) -> None:
    weight = torch.full(shape, value)
    packed = PatternWeight.from_dense(weight).validate()
    four = shape if len(shape) == 4 else (*shape, 1, 1)
    assert packed.shape == four
    assert packed.nnz == (0 if value == 0 else weight.numel())
    torch.testing.assert_close(packed.to_dense(), weight.reshape(four), equal_nan=True)


REFUSED = [
    ("vector8", "random", r"pattern 'vector8' .*got \d+% zeros among .*its pattern is 'none'"),
    ("shape", "vector8", r"pattern 'shape' .*zeros among .*its pattern is 'vector8'"),
    ("2:4", "random", r"pattern '2:4' .*got [34] entries in a window of 4 .*'none'"),
    ("kernel", "2:4", r"pattern 'kernel' .*zeros among .*its pattern is '2:4'"),
    ("cluster", "random", r"pattern 'cluster' .*no two have the same support.*'none'"),
    ("filter", "random", r"pattern 'filter' .*zeros among"),
    ("block8", "shape", r"expected pattern 'shape', .*got 'block8'"),
    ("vector0", "shape", r"expected pattern .*got 'vector0'"),
    ("4:2", "shape", r"expected pattern .*got '4:2'"),
    (8, "shape", r"expected pattern .*got 8"),
]


@pytest.mark.parametrize("asked, there, message", REFUSED, ids=str)
def test_a_pattern_that_is_not_there_is_refused(asked: Any, there: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"PatternWeight: {message}|PatternWeight: expected a "
                                         f"weight with {message}"):  # fmt: skip
        PatternWeight.from_dense(masked(there), 1, asked)


@pytest.mark.parametrize(
    "weight, groups, error, message",
    [
        (
            torch.zeros(4, 3, 3),
            1,
            ValueError,
            r"weight of shape \(K, C/G, R, S\) or \(O, I\), got \(4",
        ),
        (torch.zeros(4, 3).int(), 1, TypeError, r"weight a floating-point tensor, got torch"),
        ([1.0], 1, TypeError, r"weight a floating-point tensor, got list"),
        (torch.zeros(4, 3, 1, 1), 3, ValueError, r"groups a positive divisor of K = 4, got 3"),
        (torch.zeros(4, 3, 1, 1), 0, ValueError, r"groups .*got 0"),
        (torch.zeros(4, 3, 1, 1), 2.0, ValueError, r"groups .*got 2\.0"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_bad_weights(weight: Any, groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"PatternWeight: expected {message}"):
        PatternWeight.from_dense(weight, groups)


def corruptions() -> list[Any]:
    p = PatternWeight.from_dense(masked("vector8", (16, 4, 3, 3)), 2)

    def entry(name: str, index: int, value: int) -> dict[str, Tensor]:
        changed = getattr(p, name).clone()
        changed[index] = value
        return {name: changed}

    return [
        (entry("group_rows", 0, 1), r"group_rows from 0 to 16, got 1"),
        (entry("group_rows", -1, 15), r"group_rows from 0 to 16, got 0 to 15"),
        (entry("group_rows", 1, 0), r"group_rows to rise"),
        (entry("group_rows", 1, 9), r"inside one group of the convolution, K/G = 8"),
        ({"group_rows": p.group_rows[:-1]}, r"of one length >= 1, got 2 and 3"),
        ({"group_rows": p.group_rows.long()}, r"group_rows a 1-d int32 tensor, got 1-d torch.int"),
        (entry("group_columns", 1, 10**6), r"group_columns not to fall"),
        (entry("group_columns", -1, 3), r"group_columns from 0 to"),
        (entry("filters", 0, 1), r"filters a permutation of 0 to 15"),
        (entry("filters", 0, 99), r"filters a permutation of 0 to 15"),
        ({"filters": p.filters.flip(0)}, r"filters to stay in their group"),
        ({"filters": p.filters[:-1]}, r"filters a permutation"),
        (entry("columns", 0, -1), r"columns in \[0, 36\), got \[-1"),
        (entry("columns", -1, 36), r"columns in \[0, 36\), got \[.*36\]"),
        (entry("columns", 1, int(p.columns[0])), r"columns ascending without repeats"),
        ({"values": p.values[:-1]}, r"expected \d+ values, got \d+"),
        ({"values": p.values[None]}, r"values a 1-d floating-point tensor, got 2-d"),
        ({"values": p.values.int()}, r"values .*got 1-d torch.int32"),
        ({"shape": (16, 4, 3)}, r"shape \(K, C/G, R, S\)"),
        ({"groups": 3}, r"groups a positive divisor of K = 16, got 3"),
    ]


@pytest.mark.parametrize("change, message", corruptions(), ids=lambda v: str(v)[:30])
def test_corrupt_arrays_are_named(change: dict[str, Any], message: str) -> None:
    packed = PatternWeight.from_dense(masked("vector8", (16, 4, 3, 3)), 2).validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(packed, **change).validate()


@pytest.mark.parametrize("shape", [(8, 8, 3, 3), (8, 8, 1, 1)])
def test_a_ratio_that_does_not_hold_is_named(shape: tuple[int, int, int, int]) -> None:
    packed = PatternWeight.from_dense(masked("2:4", shape), 1, "2:4").validate()
    with pytest.raises(ValueError, match=r"pattern '1:4' of its name, got 2 columns in a window"):
        dataclasses.replace(packed, pattern="1:4").validate()
    # Two of eight channels of a tap would do if they were counted over the taps.
    dense = torch.zeros(shape)
    dense[0, 4:7, -1, 0] = 1
    full = PatternWeight.from_dense(dense, 1, "none")
    with pytest.raises(ValueError, match=r"pattern '2:4' of its name, got 3 columns in a window"):
        dataclasses.replace(full, pattern="2:4").validate()
    dense[0, 4:7, -1, 0] = torch.tensor([1.0, 0, 0])
    dense[0, 3, -1, 0] = dense[0, 2, -1, 0] = 1
    split = PatternWeight.from_dense(dense, 1, "none")
    assert dataclasses.replace(split, pattern="2:4").validate().nnz == 3


def test_to_dense_is_differentiable() -> None:
    packed = PatternWeight.from_dense(masked("vector4").double())
    values = packed.values.clone().requires_grad_()
    dense = dataclasses.replace(packed, values=values).to_dense()
    factor = torch.randn(SHAPE, dtype=torch.float64)
    (dense * factor).sum().backward()
    assert torch.equal(values.grad, factor.reshape(-1)[packed.flat_indices()])


def test_large_layers_take_no_longer_than_a_moment() -> None:
    """The search is a few passes and one sort; a quadratic one would not end here."""
    weight = masked("random", (2048, 512, 1, 1), 0.5)
    assert PatternWeight.from_dense(weight).pattern == "none"
