"""Canonical Huffman codes over small alphabets, written and read with numpy.

A code is its lengths: symbols ordered by (length, symbol) get ascending code words, so that the
lengths alone rebuild it. Bits are packed most significant first and the last byte is padded with
zeros. An alphabet of one used symbol takes no bits at all: its length is 1 to mark it, its stream
is empty and the number of symbols says the rest.

Huffman, "A method for the construction of minimum-redundancy codes", Proc. IRE 40 (1952).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SYMBOLS = 512
# 2^33 symbols, with counts like Fibonacci numbers, make code words of 47 bits and no longer ones.
MAX_LENGTH = 48
_CHUNK_BITS = 2**20


@dataclass(frozen=True, eq=False)
class HuffmanCode:
    """A prefix code of least mean length.

    Attributes:
        lengths: bits of every symbol's code word, (symbols,) uint8; 0 for symbols that never occur.

    Raises:
        ValueError: lengths that no complete prefix code has.
    """

    lengths: NDArray[np.uint8]

    def __post_init__(self) -> None:
        lengths = self.lengths
        if lengths.ndim != 1 or lengths.dtype != np.uint8 or lengths.size > MAX_SYMBOLS:
            raise ValueError(
                f"HuffmanCode: expected lengths of at most {MAX_SYMBOLS} symbols, 1-d of uint8, "
                f"got {lengths.dtype} {lengths.shape}"
            )
        used = [int(n) for n in lengths if n]
        kraft = sum(2 ** (MAX_LENGTH - n) for n in used if n <= MAX_LENGTH)
        complete = kraft == 2**MAX_LENGTH and max(used, default=0) <= MAX_LENGTH
        if not (complete or used in ([], [1])):
            raise ValueError(
                f"HuffmanCode: expected lengths of a complete prefix code, got {used!r:.80}"
            )

    @classmethod
    def from_counts(cls, counts: ArrayLike) -> HuffmanCode:
        """The best code for symbols that occur so often.

        Args:
            counts: (symbols,) integers >= 0.

        Raises:
            ValueError: negative counts, or too many symbols.

        Cost: O(symbols log symbols).
        """
        numbers = np.asarray(counts)
        if numbers.ndim != 1 or numbers.size > MAX_SYMBOLS or np.any(numbers < 0):
            raise ValueError(
                f"HuffmanCode.from_counts: expected counts >= 0 of at most {MAX_SYMBOLS} symbols, "
                f"got {counts!r:.80}"
            )
        lengths = np.zeros(numbers.size, dtype=np.uint8)
        # (count, age): of equal counts the older tree first, which keeps code words short.
        heap = [(int(n), s, [s]) for s, n in enumerate(numbers.tolist()) if n]
        if len(heap) == 1:
            lengths[heap[0][2]] = 1
        heapq.heapify(heap)
        age = numbers.size
        while len(heap) > 1:
            first, second = heapq.heappop(heap), heapq.heappop(heap)
            members = first[2] + second[2]
            lengths[members] += 1
            heapq.heappush(heap, (first[0] + second[0], age, members))
            age += 1
        return cls(lengths)

    def bits(self, counts: ArrayLike) -> int:
        """Length of a stream of symbols that occur so often, before padding."""
        if np.count_nonzero(self.lengths) < 2:
            return 0
        return int(np.dot(np.asarray(counts, dtype=np.int64), self.lengths.astype(np.int64)))

    def _canonical(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Used symbols in the order of their code words, and these, left-justified."""
        used = np.flatnonzero(self.lengths)
        order = used[np.argsort(self.lengths[used], kind="stable")]
        widths = (MAX_LENGTH - self.lengths[order]).astype(np.uint64)
        steps = np.left_shift(np.uint64(1), widths)
        return order, np.concatenate([np.zeros(1, np.uint64), np.cumsum(steps)[:-1]])

    def encode(self, symbols: NDArray[np.integer]) -> NDArray[np.uint8]:
        """The packed stream.

        Args:
            symbols: (n,) integers, each of a length > 0.

        Raises:
            ValueError: a symbol without a code word.

        Cost: O(n) and a byte per bit of the stream.
        """
        used = self.lengths.astype(bool)
        if symbols.size and (symbols.min() < 0 or symbols.max() >= used.size):
            raise ValueError(
                f"HuffmanCode.encode: expected symbols in [0, {used.size}), got "
                f"{int(symbols.min())} to {int(symbols.max())}"
            )
        if not used[symbols].all():
            raise ValueError(
                "HuffmanCode.encode: expected symbols with a code word, got "
                f"{int(symbols[~used[symbols]][0])}"
            )
        if used.sum() < 2:
            return np.zeros(0, np.uint8)
        order, starts = self._canonical()
        words = np.zeros(used.size, np.uint64)
        words[order] = starts
        lengths = self.lengths[symbols].astype(np.int64)
        offsets = np.cumsum(lengths) - lengths
        bits = np.zeros(int(lengths.sum()), np.uint8)
        for k in range(int(lengths.max(initial=0))):
            long = lengths > k
            word = words[symbols[long]]
            bits[offsets[long] + k] = (word >> np.uint64(MAX_LENGTH - 1 - k)) & np.uint64(1)
        return np.packbits(bits)

    def decode(self, stream: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
        """The symbols of a stream.

        Args:
            stream: (bytes,) uint8, as `encode` made it.
            count: symbols in it.

        Returns:
            (count,) int64.

        Raises:
            ValueError: the stream holds fewer symbols, or another byte or bit behind them.

        Cost: O(bits of the stream), whatever count claims.
        """
        order, starts = self._canonical()
        if order.size < 2:
            if stream.size or count < 0 or (count and not order.size):
                raise ValueError(
                    f"HuffmanCode.decode: expected an empty stream for {order.size} symbols in "
                    f"use, got {stream.size} bytes for {count} symbols"
                )
            return np.full(count, order[0] if count else 0, np.int64)
        total = stream.size * 8
        if not 0 <= count <= total:
            raise ValueError(
                f"HuffmanCode.decode: expected at most {total} symbols in the stream, got {count}"
            )
        widest = int(self.lengths.max())
        bits = np.concatenate([np.unpackbits(stream), np.zeros(widest, np.uint8)])
        found = np.empty(count, np.int64)
        at = done = 0
        for begin in range(0, total, _CHUNK_BITS):
            if done == count:
                break
            end = min(begin + _CHUNK_BITS, total)
            # What each bit position would start, as if a code word began there; then hop along.
            window = np.zeros(end - begin, np.uint64)
            for k in range(widest):
                window = (window << np.uint64(1)) | bits[begin + k : end + k]
            window <<= np.uint64(MAX_LENGTH - widest)
            rank = np.searchsorted(starts, window, side="right") - 1
            symbols = order[rank]
            jumps = self.lengths[symbols].tolist()
            hops: list[int] = []
            while at < end and done + len(hops) < count:
                hops.append(at - begin)
                at += jumps[at - begin]
            found[done : done + len(hops)] = symbols[hops]
            done += len(hops)
        if done < count or -(-at // 8) != stream.size or bits[at:].any():
            raise ValueError(
                f"HuffmanCode.decode: expected a stream of exactly {count} symbols, got {done} in "
                f"{at} of {total} bits"
            )
        return found
