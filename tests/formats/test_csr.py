"""CSRWeight: packing keeps every bit, and corrupt arrays are named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from sparsecnn.formats.csr import CSRWeight
from tests import reference


def sparse(*shape: int, density: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return weight * (torch.rand(*shape, generator=generator) < density)


SHAPES = [(4, 3, 3, 3), (1, 1, 1, 1), (7, 5, 1, 1), (6, 1, 5, 5), (3, 8, 1, 7), (64, 32, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_is_bitwise(shape: tuple[int, ...], density: float, dtype: torch.dtype) -> None:
    weight = sparse(*shape, density=density).to(dtype)
    packed = CSRWeight.from_dense(weight).validate()
    assert packed.shape == shape
    assert packed.values.dtype == dtype
    assert packed.col_idx.dtype == packed.row_ptr.dtype == torch.int32
    assert torch.equal(packed.to_dense(), weight)
    assert packed.nnz == int((weight != 0).sum())
    assert math.isclose(packed.density, packed.nnz / weight.numel())
    assert packed.nbytes == packed.nnz * (weight.element_size() + 4) + 4 * (shape[0] + 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_are_those_of_scipy(shape: tuple[int, ...]) -> None:
    weight = sparse(*shape)
    packed = CSRWeight.from_dense(weight)
    oracle = scipy.sparse.csr_array(weight.reshape(shape[0], -1).numpy())
    oracle.sort_indices()
    np.testing.assert_array_equal(packed.values.numpy(), oracle.data)
    np.testing.assert_array_equal(packed.col_idx.numpy(), oracle.indices)
    np.testing.assert_array_equal(packed.row_ptr.numpy(), oracle.indptr)


def test_columns_count_channels_then_rows_then_columns() -> None:
    weight = torch.zeros(2, 3, 4, 5)
    weight[1, 2, 3, 1] = 7
    packed = CSRWeight.from_dense(weight)
    assert packed.col_idx.tolist() == [(2 * 4 + 3) * 5 + 1]
    assert packed.row_ptr.tolist() == [0, 0, 1]
    dense = reference.csr_to_dense(packed.values, packed.col_idx, packed.row_ptr, packed.shape)
    assert torch.equal(dense, weight.double())


def test_linear_weights_become_one_by_one_filters() -> None:
    weight = sparse(6, 11)
    packed = CSRWeight.from_dense(weight)
    assert packed.shape == (6, 11, 1, 1)
    assert torch.equal(packed.to_dense(), weight[:, :, None, None])


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_memory_layout_of_the_dense_weight_does_not_matter(layout: str) -> None:
    weight = sparse(5, 4, 3, 3)
    if layout == "channels_last":
        moved = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        moved = weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    else:
        moved = torch.nn.functional.pad(weight, (1, 2, 1, 0))[:, :, 1:, 1:-2]
    assert not moved.is_contiguous() and torch.equal(moved, weight)
    packed, plain = CSRWeight.from_dense(moved), CSRWeight.from_dense(weight)
    for name in ("values", "col_idx", "row_ptr"):
        assert torch.equal(getattr(packed, name), getattr(plain, name)), name
        assert getattr(packed, name).is_contiguous()


def test_special_values_are_kept() -> None:
    weight = torch.zeros(2, 1, 1, 4)
    weight[0, 0, 0] = torch.tensor([float("nan"), 0.0, float("inf"), -0.0])
    weight[1, 0, 0, 2] = 1e-45  # the smallest subnormal is not a zero
    packed = CSRWeight.from_dense(weight)
    assert packed.row_ptr.tolist() == [0, 2, 3]
    assert packed.values[0].isnan() and packed.values[1].isinf() and packed.values[2] > 0


def test_packing_is_a_copy_without_a_graph() -> None:
    weight = torch.nn.Parameter(sparse(3, 2, 3, 3))
    packed = CSRWeight.from_dense(weight)
    assert not packed.values.requires_grad
    before = packed.values.clone()
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(packed.values, before)


def test_to_dense_is_differentiable() -> None:
    packed = CSRWeight.from_dense(sparse(3, 2, 3, 3))
    values = packed.values.double().requires_grad_()
    weight = dataclasses.replace(packed, values=values)
    factors = torch.arange(54.0, dtype=torch.float64).reshape(3, 2, 3, 3)
    (weight.to_dense() * factors).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, factors[packed.to_dense() != 0])


@pytest.mark.parametrize(
    "weight, error, message",
    [
        (torch.ones(2, 3, 3), ValueError, r"weight of shape .*got \(2, 3, 3\)"),
        (torch.ones(3), ValueError, r"weight of shape .*got \(3,\)"),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, r"floating-point .*got torch.int32"),
        ([[1.0]], TypeError, r"floating-point tensor, got list"),
        (None, TypeError, r"got NoneType"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_from_dense_refuses(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"CSRWeight: expected .*{message}"):
        CSRWeight.from_dense(weight)


def _set(name: str, index: int, value: int) -> Callable[[CSRWeight], CSRWeight]:
    def change(weight: CSRWeight) -> CSRWeight:
        array = getattr(weight, name).clone()
        array[index] = value
        return dataclasses.replace(weight, **{name: array})

    return change


def _map(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[CSRWeight], CSRWeight]:
    def change(weight: CSRWeight) -> CSRWeight:
        changed: dict[str, Any] = {name: function(getattr(weight, name))}
        return dataclasses.replace(weight, **changed)

    return change


CORRUPTIONS = [
    (_set("row_ptr", 0, 1), r"row_ptr from 0 .*got 1"),
    (_set("row_ptr", 1, 10_000), r"row_ptr non-decreasing"),
    (_set("row_ptr", 2, -1), r"row_ptr non-decreasing"),
    (_set("row_ptr", -1, 3), r"row_ptr .*to 3"),
    (_set("col_idx", 0, -1), r"col_idx in \[0, 27\), got \[-1"),
    (_set("col_idx", -1, 27), r"col_idx in \[0, 27\), got .*27\]"),
    (_map("col_idx", lambda t: t.flip(0)), r"col_idx ascending"),
    (_map("col_idx", lambda t: t[:-1]), r"col_idx with nnz = \d+ entries, got \d+"),
    (_map("col_idx", lambda t: t.long()), r"col_idx .*int32.*got 1-d torch.int64"),
    (_map("row_ptr", lambda t: t[:-1]), r"row_ptr with K \+ 1 = 5 entries, got 4"),
    (_map("row_ptr", lambda t: t.float()), r"row_ptr .*int32.*got 1-d torch.float32"),
    (_map("values", lambda t: t[None]), r"values .*1-d.*got 2-d"),
    (_map("values", lambda t: t.int()), r"values .*floating-point.*torch.int32"),
]


@pytest.mark.parametrize("change, message", CORRUPTIONS, ids=[m for _, m in CORRUPTIONS])
def test_validate_names_what_is_corrupt(
    change: Callable[[CSRWeight], CSRWeight], message: str
) -> None:
    good = CSRWeight.from_dense(sparse(4, 3, 3, 3, density=0.5))
    assert good.validate() is good
    with pytest.raises(ValueError, match=f"CSRWeight: expected .*{message}"):
        change(good).validate()


def test_validate_refuses_repeated_columns_and_bad_shapes() -> None:
    good = CSRWeight.from_dense(torch.ones(2, 1, 2, 2))
    repeated = good.col_idx.clone()
    repeated[1] = repeated[0]
    with pytest.raises(ValueError, match="ascending without repeats"):
        dataclasses.replace(good, col_idx=repeated).validate()
    for shape in ((2, 1, 2), (2, 1, 2, -2), (2.0, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"CSRWeight: expected shape \(K, C/G, R, S\)"):
            dataclasses.replace(good, shape=shape).validate()  # type: ignore[arg-type]
    # A row may begin below the end of the row before it.
    falling = torch.zeros(2, 1, 1, 4)
    falling[0, 0, 0, 3] = falling[1, 0, 0, 0] = 1
    CSRWeight.from_dense(falling).validate()


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (4, 0, 3, 3)])
def test_weights_without_entries(shape: tuple[int, ...]) -> None:
    packed = CSRWeight.from_dense(torch.zeros(shape)).validate()
    assert packed.nnz == 0 and packed.density == 0.0
    assert packed.to_dense().shape == shape


def test_a_packed_weight_cannot_be_reassigned() -> None:
    packed = CSRWeight.from_dense(sparse(2, 2, 1, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.values = packed.values * 2  # type: ignore[misc]
