"""Huffman codes against entropy, brute force and known counts."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement, permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsecnn.storage.huffman import MAX_LENGTH, HuffmanCode


def entropy(counts: NDArray[np.int64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def mean_length(counts: NDArray[np.int64]) -> float:
    return HuffmanCode.from_counts(counts).bits(counts) / int(counts.sum())


def check(symbols: NDArray[np.int64], alphabet: int) -> HuffmanCode:
    counts = np.bincount(symbols, minlength=alphabet)
    code = HuffmanCode.from_counts(counts)
    stream = code.encode(symbols)
    assert len(stream) == -(-code.bits(counts) // 8)
    np.testing.assert_array_equal(code.decode(stream, len(symbols)), symbols)
    again = HuffmanCode(code.lengths.copy())  # the lengths alone are the code
    np.testing.assert_array_equal(again.decode(stream, len(symbols)), symbols)
    if np.count_nonzero(counts) >= 2:
        assert sum(2.0 ** -int(n) for n in code.lengths if n) == 1.0  # Kraft
        h = entropy(counts)
        assert h - 1e-12 <= mean_length(counts) < h + 1
    return code


def test_huffman_round_trips() -> None:
    rng = np.random.default_rng(0)
    check(np.zeros(1000, np.int64), 1)
    check(np.full(77, 3), 9)
    check(np.zeros(0, np.int64), 5)
    check(rng.integers(0, 2, 1001), 2)
    check(rng.geometric(0.5, 5000).clip(1, 40) - 1, 40)
    check(np.arange(256).repeat(3), 256)
    check(rng.integers(0, 256, 20000), 256)
    check(np.minimum(rng.geometric(0.02, 20000), 257) - 1, 257)


def test_huffman_one_symbol_takes_no_bits() -> None:
    code = HuffmanCode.from_counts([0, 0, 5])
    assert code.lengths.tolist() == [0, 0, 1] and code.bits([0, 0, 5]) == 0
    assert code.encode(np.full(5, 2)).size == 0
    assert code.decode(np.zeros(0, np.uint8), 5).tolist() == [2] * 5


def test_huffman_known_counts() -> None:
    dyadic = np.array([8, 4, 2, 1, 1])
    assert mean_length(dyadic) == 1.875 == entropy(dyadic)
    counts = np.array([40, 20, 10, 5, 3, 1])
    assert HuffmanCode.from_counts(counts).lengths.tolist() == [1, 2, 3, 4, 5, 5]
    assert abs(mean_length(counts) - 1.8987) < 5e-5
    assert abs(entropy(counts) - 1.8873) < 5e-5


@cache
def complete_lengths(n: int) -> list[tuple[int, ...]]:
    """All length vectors of complete prefix codes of n words, from the Kraft sum alone."""
    found = [
        lengths
        for lengths in combinations_with_replacement(range(1, n), n)
        if sum(2 ** (n - w) for w in lengths) == 2**n
    ]
    return [p for lengths in found for p in set(permutations(lengths))]


@pytest.mark.parametrize("n", range(2, 6))
def test_huffman_is_optimal(n: int) -> None:
    table = np.array(complete_lengths(n))
    for counts in product(range(1, 6), repeat=n):
        best = int((table @ np.array(counts)).min())
        assert HuffmanCode.from_counts(counts).bits(counts) == best


def test_huffman_long_words() -> None:
    """Counts like Fibonacci numbers make the longest words."""
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    code = HuffmanCode.from_counts(counts)
    assert code.lengths.max() == 29 <= MAX_LENGTH
    symbols = np.random.default_rng(2).integers(0, 30, 4000)
    np.testing.assert_array_equal(code.decode(code.encode(symbols), 4000), symbols)


def test_huffman_canonical_words() -> None:
    code = HuffmanCode(np.array([2, 0, 1, 3, 3], np.uint8))
    # 2: 0, 0: 10, 3: 110, 4: 111
    stream = code.encode(np.array([2, 0, 3, 4]))
    assert stream.tolist() == [0b01011011, 0b10000000]


def test_huffman_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = np.minimum(np.random.default_rng(3).geometric(0.1, 3000), 60)
    code = HuffmanCode.from_counts(np.bincount(symbols))
    stream = code.encode(symbols)
    for bits in (1, 7, 64, 1000):
        monkeypatch.setattr("sparsecnn.storage.huffman._CHUNK_BITS", bits)
        np.testing.assert_array_equal(code.decode(stream, 3000), symbols)


@pytest.mark.parametrize(
    "lengths", [[1, 1, 1], [2, 2], [0, 2], [1, 2], [49, 49], [1, 255], [1] * 600]
)
def test_huffman_refuses_lengths(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="HuffmanCode: expected lengths"):
        HuffmanCode(np.array(lengths, np.uint8))


def test_huffman_refuses_the_rest() -> None:
    with pytest.raises(ValueError, match="1-d of uint8"):
        HuffmanCode(np.array([1, 1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counts >= 0"):
        HuffmanCode.from_counts([1, -1])
    code = HuffmanCode.from_counts([3, 2, 0, 1])
    for bad in ([4], [-1], [2]):
        with pytest.raises(ValueError, match=r"HuffmanCode\.encode: expected symbols"):
            code.encode(np.array(bad))
    stream = code.encode(np.array([0, 1, 3, 0, 1, 0, 0, 3]))
    for count in (-1, 0, 3, 7, 13, 10**12):
        with pytest.raises(ValueError, match=r"HuffmanCode\.decode: expected"):
            code.decode(stream, count)
    with pytest.raises(ValueError, match="exactly 8 symbols"):
        code.decode(np.append(stream, np.uint8(0)), 8)
    with pytest.raises(ValueError, match="exactly 8 symbols"):
        code.decode(stream[:-1], 8)
    single = HuffmanCode.from_counts([7])
    with pytest.raises(ValueError, match="empty stream"):
        single.decode(np.zeros(1, np.uint8), 3)
    with pytest.raises(ValueError, match="empty stream"):
        HuffmanCode(np.zeros(4, np.uint8)).decode(np.zeros(0, np.uint8), 1)


def test_huffman_any_bytes_decode_or_refuse() -> None:
    rng = np.random.default_rng(4)
    code = HuffmanCode.from_counts([9, 5, 3, 1, 1])
    decoded = 0
    for _ in range(500):
        stream = rng.integers(0, 256, int(rng.integers(0, 4)), dtype=np.uint8)
        count = int(rng.integers(0, 20))
        try:
            symbols = code.decode(stream, count)
        except ValueError:
            continue
        decoded += 1
        np.testing.assert_array_equal(code.encode(symbols), stream)
    assert decoded > 10
