"""WinogradWeight: the transform and its packing, the way back, and what is refused by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecnn.formats import winograd
from sparsecnn.formats.winograd import WinogradWeight, error_growth, transforms
from tests import reference

SHAPES = [(16, 4, 1), (6, 5, 1), (20, 3, 2), (9, 1, 9), (1, 1, 1), (24, 2, 3), (65, 7, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
tiles = pytest.mark.parametrize("tile", [2, 4])


def spatial(k: int = 6, c: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(k, c, 3, 3, generator=torch.Generator().manual_seed(seed))


def sparse_taps(tile: int = 4, k: int = 6, c: int = 5, keep: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    taps = torch.randn((tile + 2) ** 2, k, c, generator=generator)
    return taps * (torch.rand(taps.shape, generator=generator) < keep)


@tiles
def test_the_matrices_are_those_of_the_reference(tile: int) -> None:
    for mine, theirs in zip(transforms(tile), reference.winograd_matrices(tile), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-15, atol=0)
    assert transforms(tile, torch.float32)[1].dtype == torch.float32
    # In every type: the kernels compute with numbers of few bits.
    _, bt, at = transforms(tile)
    for m in (bt, at):
        assert torch.equal(m.to(torch.float32).double(), m)


@tiles
def test_error_growth_is_the_product_of_the_norms(tile: int) -> None:
    growth = 1.0
    for m in reference.winograd_matrices(tile):
        growth *= float(torch.linalg.matrix_norm(torch.kron(m, m), float("inf")))
    assert math.isclose(error_growth(tile), growth, rel_tol=1e-12)


@pytest.mark.parametrize("k, c, groups", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@tiles
def test_a_spatial_weight_is_transformed(
    tile: int, dtype: torch.dtype, k: int, c: int, groups: int
) -> None:
    weight = spatial(k, c).to(dtype)
    packed = WinogradWeight.from_dense(weight, groups, tile).validate()
    assert packed.shape == (k, c, 3, 3) and packed.groups == groups and packed.tile == tile
    assert packed.values.dtype == dtype and not packed.is_sparse
    # Computed in float64 and rounded once: half a unit (torch goes through float32 to the 16-bit
    # types) of the result, or of the smallest normal number.
    want = reference.winograd_taps(weight, tile)
    info = torch.finfo(dtype)
    bound = 0.501 * info.eps * want.abs().clamp(min=info.smallest_normal)
    if dtype == torch.float64:  # there the sums of both round, of 9 products of 3 factors
        g = reference.winograd_matrices(tile)[0].abs()
        magnitude = torch.einsum("ir,kcrs,js->ijkc", g, weight.abs(), g).flatten(0, 1)
        bound = 2 * (9 + 3) * info.eps / 2 * magnitude
    assert bool(((packed.taps().double() - want).abs() <= bound).all())
    # And back: least squares, exact up to the rounding of the taps.
    back = packed.to_dense()
    assert back.shape == weight.shape and back.dtype == dtype and back.is_contiguous()
    error = (back.double() - weight.double()).abs().max()
    assert float(error) <= 4 * torch.finfo(dtype).eps * float(weight.abs().max())


def test_the_format_is_what_it_says() -> None:
    """Filters in blocks of eight of one group, the last filled with zeros."""
    taps = torch.arange(1.0, 1 + 36 * 20 * 2).reshape(36, 20, 2)
    packed = WinogradWeight.from_taps(taps, 2)
    assert packed.values.shape == (4, 36, 2, 8) and packed.values.is_contiguous()
    for block, (first, filters) in enumerate(((0, 8), (8, 2), (10, 8), (18, 2))):
        for t, c in ((0, 0), (7, 1), (35, 1)):
            want = torch.zeros(8)
            want[:filters] = taps[t, first : first + filters, c]
            assert torch.equal(packed.values[block, t, c], want)
    rows = WinogradWeight.from_taps(taps, 2, sparse=True)
    assert rows.row_ptr is not None and rows.col_idx is not None
    assert rows.row_ptr.dtype == rows.col_idx.dtype == torch.int32
    lengths = rows.row_ptr.diff().reshape(4, 36, 8)
    assert torch.equal(lengths[0], torch.full_like(lengths[0], 2))
    assert lengths[1, :, :2].eq(2).all() and not lengths[1, :, 2:].any()
    row = (2 * 36 + 7) * 8 + 3  # block 2, tap 7, its filter 3, which is 13
    start = int(rows.row_ptr[row])
    assert rows.col_idx[start : start + 2].tolist() == [0, 1]
    assert torch.equal(rows.values[start : start + 2], taps[7, 13])


@pytest.mark.parametrize("k, c, groups", SHAPES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@tiles
def test_taps_are_kept_to_the_bit(
    tile: int, dtype: torch.dtype, sparse: bool, k: int, c: int, groups: int
) -> None:
    taps = sparse_taps(tile, k, c).to(dtype)
    packed = WinogradWeight.from_taps(taps, groups, sparse=sparse).validate()
    assert packed.tile == tile and packed.is_sparse == sparse
    assert torch.equal(packed.taps(), taps)
    assert torch.equal(packed.stored(taps), packed.values)
    whole = (tile + 2) ** 2 * k * c
    if sparse:
        assert packed.nnz == int(taps.count_nonzero()) == packed.values.numel()
        assert packed.row_ptr is not None
        size = packed.nnz * (taps.element_size() + 4) + packed.row_ptr.numel() * 4
    else:
        blocks = groups * math.ceil(k / groups / 8)
        assert packed.nnz == whole
        size = blocks * 8 * (tile + 2) ** 2 * c * taps.element_size()
    assert math.isclose(packed.density, packed.nnz / whole)
    assert packed.nbytes == size


@tiles
def test_stored_picks_other_taps_at_the_same_places(tile: int) -> None:
    packed = WinogradWeight.from_taps(sparse_taps(tile, 10, 3), 2, sparse=True)
    others = torch.randn((tile + 2) ** 2, 10, 3)
    swapped = dataclasses.replace(packed, values=packed.stored(others)).validate()
    assert torch.equal(swapped.taps(), others * (packed.taps() != 0))


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
@pytest.mark.parametrize("k, c", [(8, 3), (3, 0), (0, 3), (1, 1)])
@tiles
def test_corners(tile: int, k: int, c: int, value: float) -> None:
    taps = torch.full(((tile + 2) ** 2, k, c), value)
    for sparse in (False, True):
        packed = WinogradWeight.from_taps(taps, sparse=sparse).validate()
        torch.testing.assert_close(packed.taps(), taps, equal_nan=True)
        stored = 0 if sparse and value == 0 else taps.numel()
        assert packed.nnz == stored and packed.density == (stored / taps.numel() if k * c else 0)
        assert packed.to_dense().shape == (k, c, 3, 3)


@tiles
def test_the_way_back_is_the_nearest_spatial_weight(tile: int) -> None:
    """The residual of least squares is orthogonal to all transforms of spatial weights."""
    taps = sparse_taps(tile, 4, 3).double()
    packed = WinogradWeight.from_taps(taps, sparse=True)
    nearest = packed.to_dense()
    residual = taps - reference.winograd_taps(nearest, tile)
    assert float(residual.abs().max()) > 0.1
    g, _, _ = reference.winograd_matrices(tile)
    edge = tile + 2
    image = torch.einsum("ir,ijkc,js->kcrs", g, residual.unflatten(0, (edge, edge)), g)
    assert float(image.abs().max()) < 1e-12


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@tiles
def test_taps_are_differentiable(tile: int, sparse: bool) -> None:
    packed = WinogradWeight.from_taps(sparse_taps(tile, 10, 3), 2, sparse=sparse)
    values = packed.values.clone().requires_grad_()
    factor = torch.randn((tile + 2) ** 2, 10, 3)
    (dataclasses.replace(packed, values=values).taps() * factor).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, packed.stored(factor))
    factor.requires_grad_()
    packed.stored(factor).sum().backward()
    assert factor.grad is not None
    kept = packed.taps() != 0 if sparse else torch.ones_like(factor)
    assert torch.equal(factor.grad, kept.to(factor))


@pytest.mark.parametrize("c", [1, 4])
def test_the_source_is_not_shared_or_changed(c: int) -> None:
    weight = spatial(8, c)
    copy, taps = weight.clone(), sparse_taps(4, 8, c)
    before = taps.clone()
    WinogradWeight.from_dense(weight).values.zero_()
    for sparse in (False, True):
        WinogradWeight.from_taps(taps, sparse=sparse).values.zero_()
    assert torch.equal(weight, copy) and torch.equal(taps, before)


BAD_DENSE = [
    ((torch.zeros(4, 3, 3),), ValueError, r"weight of shape \(K, C/G, 3, 3\), got \(4, 3, 3\)"),
    ((torch.zeros(4, 3, 3, 1),), ValueError, r"weight of shape .*got \(4, 3, 3, 1\)"),
    ((torch.zeros(4, 3, 5, 5),), ValueError, r"weight of shape .*got \(4, 3, 5, 5\)"),
    ((torch.zeros(4, 3, 3, 3).int(),), TypeError, r"weight a floating-point tensor, got torch.int"),
    (([1.0],), TypeError, r"weight a floating-point tensor, got list"),
    ((spatial(4), 3), ValueError, r"groups a positive divisor of K = 4, got 3"),
    ((spatial(4), 0), ValueError, r"groups .*got 0"),
    ((spatial(4), 2.0), ValueError, r"groups .*got 2\.0"),
    ((spatial(4), True), ValueError, r"groups .*got True"),
    ((spatial(4), 1, 3), ValueError, r"tile 2 or 4, got 3"),
    ((spatial(4), 1, 6), ValueError, r"tile 2 or 4, got 6"),
    ((spatial(4), 1, "4"), ValueError, r"tile 2 or 4, got '4'"),
    ((spatial(4), 1, True), ValueError, r"tile 2 or 4, got True"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_DENSE, ids=lambda v: str(v)[-30:])
def test_bad_spatial_weights(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"WinogradWeight: expected {message}"):
        WinogradWeight.from_dense(*arguments)


BAD_TAPS = [
    ((torch.zeros(36, 4),), ValueError, r"taps of shape \(16 or 36, K, C/G\), got \(36, 4\)"),
    ((torch.zeros(9, 4, 3),), ValueError, r"taps of shape .*got \(9, 4, 3\)"),
    ((torch.zeros(6, 6, 4, 3),), ValueError, r"taps of shape .*got \(6, 6, 4, 3\)"),
    ((torch.zeros(16, 4, 3).long(),), TypeError, r"taps a floating-point tensor, got torch.int64"),
    ((None,), TypeError, r"taps a floating-point tensor, got NoneType"),
    ((torch.zeros(16, 4, 3), 3), ValueError, r"groups a positive divisor of K = 4, got 3"),
    ((torch.zeros(16, 1, 1).expand(16, 2**14, 2**13),), ValueError, r"taps .*, got 2147483648"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_TAPS, ids=lambda v: str(v)[-30:])
def test_bad_taps(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"WinogradWeight: expected {message}"):
        WinogradWeight.from_taps(*arguments)


def corruptions() -> list[Any]:
    p = WinogradWeight.from_taps(sparse_taps(4, 10, 5), 2, sparse=True)
    assert p.row_ptr is not None and p.col_idx is not None

    def entry(name: str, index: int, value: int) -> dict[str, Tensor]:
        changed = getattr(p, name).clone()
        changed[index] = value
        return {name: changed}

    twice = p.col_idx.clone()
    first = int((p.row_ptr.diff() > 1).nonzero()[0])
    place = int(p.row_ptr[first])
    twice[place + 1] = twice[place]
    return [
        (entry("row_ptr", 0, 1), r"row_ptr"),
        (entry("row_ptr", -1, p.nnz - 1), r"row_ptr"),
        (entry("row_ptr", 9, 10**6), r"row_ptr"),
        ({"row_ptr": p.row_ptr[:-1]}, r"row_ptr .*577"),
        ({"row_ptr": p.row_ptr.long()}, r"row_ptr a 1-d int32 tensor, got 1-d torch.int64"),
        ({"row_ptr": None}, r"col_idx and row_ptr both or neither"),
        ({"col_idx": None}, r"col_idx and row_ptr both or neither"),
        ({"col_idx": None, "row_ptr": None}, r"values of shape \(2, 36, 5, 8\), got \(\d+,\)"),
        (entry("col_idx", 0, -1), r"col_idx in \[0, 5\)"),
        (entry("col_idx", 0, 5), r"col_idx in \[0, 5\)"),
        ({"col_idx": twice}, r"col_idx ascending"),
        ({"col_idx": p.col_idx[:-1]}, r"col_idx"),
        ({"values": p.values[:-1]}, rf"nnz = {p.nnz - 1} entries, got {p.nnz}"),
        ({"values": p.values[None]}, r"values"),
        ({"values": p.values.int()}, r"values floating point, got torch.int32"),
        ({"shape": (10, 5, 3)}, r"shape \(K, C/G, 3, 3\)"),
        ({"shape": (10, 5, 1, 1)}, r"shape \(K, C/G, 3, 3\), got \(10, 5, 1, 1\)"),
        ({"shape": (10, -5, 3, 3)}, r"shape .*non-negative integers"),
        ({"shape": (40, 5, 3, 3)}, r"row_ptr"),
        ({"groups": 3}, r"groups a positive divisor of K = 10, got 3"),
        ({"groups": 0}, r"groups a positive divisor of K = 10, got 0"),
        ({"groups": 5}, r"row_ptr"),
        ({"tile": 2}, r"row_ptr"),
        ({"tile": 3}, r"tile 2 or 4, got 3"),
    ]


@pytest.mark.parametrize("change, message", corruptions(), ids=lambda v: str(v)[:30])
def test_corrupt_arrays_are_named(change: dict[str, Any], message: str) -> None:
    packed = WinogradWeight.from_taps(sparse_taps(4, 10, 5), 2, sparse=True).validate()
    with pytest.raises(ValueError, match=rf"^WinogradWeight: expected .*{message}"):
        dataclasses.replace(packed, **change).validate()


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v[:1], lambda v: v[:, :16], lambda v: v[:, :, :4], lambda v: v[..., :7],
        lambda v: v.reshape(-1), lambda v: v.transpose(2, 3),
    ],
)  # fmt: skip
def test_dense_values_of_another_shape_are_refused(change: Any) -> None:
    packed = WinogradWeight.from_taps(sparse_taps(4, 10, 5), 2)
    with pytest.raises(ValueError, match=r"expected values of shape \(2, 36, 5, 8\), got"):
        dataclasses.replace(packed, values=change(packed.values)).validate()


def test_the_names_it_offers() -> None:
    assert winograd.TILES == (2, 4) and winograd.BLOCK == 8
    counts = [winograd.block_count(k, g) for k, g in ((8, 1), (9, 1), (18, 2), (0, 1))]
    assert counts == [1, 2, 2, 0]
