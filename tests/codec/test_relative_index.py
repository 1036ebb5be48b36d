"""The relative index against the rule written out in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsecnn import _codec

BITS = range(1, 9)


def fillers_by_rule(positions: NDArray[np.int64], bits: int) -> int:
    runs = np.diff(positions, prepend=-1) - 1
    return int(sum(int(z) // 2**bits for z in runs))


def stream_by_rule(positions: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """The stream one bit at a time: an independent writer."""
    out: list[int] = []

    def put(gap: int, filler: bool) -> None:
        out.extend((gap >> i) & 1 for i in range(bits))
        if gap == 2**bits - 1:
            out.append(int(filler))

    for z in (np.diff(positions, prepend=-1) - 1).tolist():
        for _ in range(z // 2**bits):
            put(2**bits - 1, True)
        put(z % 2**bits, False)
    return np.packbits(np.array(out, dtype=np.uint8), bitorder="little")


def check(positions: NDArray[np.int64], bits: int, total: int) -> None:
    stream, entries = _codec.relative_index_encode(positions, bits, total)
    assert entries == len(positions) + fillers_by_rule(positions, bits)
    np.testing.assert_array_equal(stream, stream_by_rule(positions, bits))
    back = _codec.relative_index_decode(stream, bits, entries, total)
    assert back.dtype == np.int64
    np.testing.assert_array_equal(back, positions)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("trailing", [0, 1, 1000])
def test_relative_index(bits: int, trailing: int) -> None:
    b = 2**bits
    runs = [0, 1, b - 1, b, b + 1, 2 * b - 1, 5 * b + 3, 0]
    for order in (runs, runs[::-1], [5 * b + 3], [0], [b - 1], []):
        positions = np.cumsum(np.array(order, dtype=np.int64) + 1) - 1
        total = (int(positions[-1]) + 1 if len(positions) else 0) + trailing
        check(positions.astype(np.int64), bits, total)


@pytest.mark.parametrize("bits", BITS)
def test_random_densities(bits: int) -> None:
    for seed, density in enumerate([0.001, 0.01, 0.1, 0.3, 0.9, 1.0]):
        mask = np.random.default_rng([seed, bits]).random(5000) < density
        check(np.flatnonzero(mask).astype(np.int64), bits, 5000)


def test_cost_is_that_of_the_streams() -> None:
    for seed, density in enumerate([0.0, 0.002, 0.05, 0.5]):
        mask = np.random.default_rng(seed).random(3001) < density
        positions = np.flatnonzero(mask).astype(np.int64)
        fillers, sizes = _codec.relative_index_cost(positions, 3001)
        for bits in BITS:
            stream, entries = _codec.relative_index_encode(positions, bits, 3001)
            assert (entries - len(positions), len(stream)) == (fillers[bits - 1], sizes[bits - 1])


@pytest.mark.parametrize(
    "positions",
    [[3, 3], [4, 2], [-1, 2], [0, 10], [-(2**63)], [2**62]],
    ids=["repeat", "falling", "negative", "behind", "lowest", "huge"],
)
def test_encode_refuses_positions(positions: list[int]) -> None:
    array = np.array(positions, dtype=np.int64)
    with pytest.raises(ValueError, match="positions strictly ascending"):
        _codec.relative_index_encode(array, 4, 10)
    with pytest.raises(ValueError, match="positions strictly ascending"):
        _codec.relative_index_cost(array, 10)


@pytest.mark.parametrize("bits", [0, 9, -1, 10**30])
def test_refuses_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        _codec.relative_index_encode(np.zeros(0, np.int64), bits, 10)
    with pytest.raises(ValueError, match="bits"):
        _codec.relative_index_decode(np.zeros(1, np.uint8), bits, 1, 10)


def test_refuses_types() -> None:
    with pytest.raises(TypeError, match="int32"):
        _codec.relative_index_encode(np.zeros(1, np.int32), 4, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dimension"):
        _codec.relative_index_encode(np.zeros((1, 1), np.int64), 4, 10)
    with pytest.raises(TypeError, match="list"):
        _codec.relative_index_decode([0], 4, 1, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total"):
        _codec.relative_index_encode(np.zeros(1, np.int64), 4, 2**33 + 1)


def test_huge_claims_cost_nothing() -> None:
    stream = np.zeros(4, np.uint8)
    for entries in (2**33, 2**33 + 1, 2**63, -1):
        with pytest.raises(ValueError):
            _codec.relative_index_decode(stream, 1, entries, 2**33)
    one = np.array([0b111], np.uint8)  # a stream of one entry in 8 G positions
    assert _codec.relative_index_decode(np.array([2], np.uint8), 2, 1, 2**33).tolist() == [2]
    with pytest.raises(ValueError, match="filler"):
        _codec.relative_index_decode(one, 2, 1, 2**33)


@pytest.mark.parametrize("bits", BITS)
def test_decode_refuses_damage(bits: int) -> None:
    total = 700
    positions = np.flatnonzero(np.random.default_rng(bits).random(total) < 0.1).astype(np.int64)
    stream, entries = _codec.relative_index_encode(positions, bits, total)
    last = int(positions[-1])
    with pytest.raises(ValueError, match="below total"):
        _codec.relative_index_decode(stream, bits, entries, last)
    for cut in range(len(stream)):
        with pytest.raises(ValueError, match="ends before"):
            _codec.relative_index_decode(stream[:cut].copy(), bits, entries, total)
    with pytest.raises(ValueError, match="data behind"):
        longer = np.append(stream, np.uint8(0))
        _codec.relative_index_decode(longer, bits, entries, total)
    with pytest.raises(ValueError):
        _codec.relative_index_decode(stream, bits, entries + 20, total)
    with pytest.raises(ValueError):
        _codec.relative_index_decode(stream, bits, entries - 20, total)


def test_random_streams_decode_or_refuse() -> None:
    """Whatever the bytes: ascending positions below total, or a ValueError."""
    rng = np.random.default_rng(5)
    decoded = 0
    for _ in range(3000):
        bits = int(rng.integers(1, 9))
        stream = rng.integers(0, 256, int(rng.integers(0, 12)), dtype=np.uint8)
        entries, total = int(rng.integers(0, 40)), int(rng.integers(0, 500))
        try:
            positions = _codec.relative_index_decode(stream, bits, entries, total)
        except ValueError:
            continue
        decoded += 1
        again, count = _codec.relative_index_encode(positions, bits, total)
        assert count == entries  # the code is canonical: one stream per set of positions
        np.testing.assert_array_equal(again, stream)
    assert decoded > 10


def test_csr_round_trip() -> None:
    rng = np.random.default_rng(1)
    for rows, columns, density in [(1, 1, 1.0), (5, 9, 0.3), (0, 4, 0.5), (7, 0, 0.5), (40, 27, 0)]:
        positions = np.flatnonzero(rng.random(rows * columns) < density).astype(np.int64)
        row_ptr, col_idx = _codec.positions_to_csr(positions, rows, columns)
        assert (row_ptr.dtype, col_idx.dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(col_idx, positions % max(columns, 1))
        np.testing.assert_array_equal(
            row_ptr, np.searchsorted(positions, np.arange(rows + 1) * columns)
        )
        for dtype in (np.int32, np.int64):
            back = _codec.csr_to_positions(row_ptr.astype(dtype), col_idx.astype(dtype), columns)
            np.testing.assert_array_equal(back, positions)


@pytest.mark.parametrize(
    ("row_ptr", "col_idx", "text"),
    [
        ([], [], "at least 1"),
        ([1, 2], [0, 1], "row_ptr"),
        ([0, 2, 1], [0, 1], "row_ptr"),
        ([0, 3], [0, 1], "row_ptr"),
        ([0, 1], [0, 1], "row_ptr"),
        ([0, -1], [], "row_ptr"),
        ([0, 2], [1, 1], "col_idx"),
        ([0, 2], [1, 0], "col_idx"),
        ([0, 1], [4], "col_idx"),
        ([0, 1], [-1], "col_idx"),
    ],
)
def test_csr_refuses(row_ptr: list[int], col_idx: list[int], text: str) -> None:
    for dtype in (np.int32, np.int64):
        with pytest.raises(ValueError, match=text):
            _codec.csr_to_positions(np.array(row_ptr, dtype), np.array(col_idx, dtype), 4)


def test_csr_refuses_mixed_types_and_sizes() -> None:
    with pytest.raises(TypeError, match="col_idx"):
        mixed: Any = np.zeros(0, np.int64)
        _codec.csr_to_positions(np.zeros(1, np.int32), mixed, 4)
    with pytest.raises(ValueError, match="rows"):
        _codec.positions_to_csr(np.zeros(0, np.int64), 2**31, 1)
    with pytest.raises(ValueError, match=r"2\^33"):
        _codec.positions_to_csr(np.zeros(0, np.int64), 2**30, 2**30)
