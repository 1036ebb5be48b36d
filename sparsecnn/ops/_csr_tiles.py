"""Tiles of the specialized ``csr_conv2d``: how an image is cut, and what its kernel is told."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from sparsecnn.ops._check import out_extent

_POINTERS = ("x", "bias", "residual", "y")
_I64 = (
    "x_n x_c x_h x_w y_n y_k y_p y_q n h w p q stride_h stride_w pad_top pad_left"
    " tiles_q tiles work"
).split()
_I32 = (
    "tq tile_rows slots pitch phase_w staged_w row_taps row_stride gap row_step phases col_step"
    " channels_last activation"
).split()
_IDLE = 65535
_BANKS = 32
_NARROW = 8
# (P, Q) of the maps that the shared memory of a block is laid out for; others take smaller tiles.
_USUAL_MAPS = ((7, 7), (14, 14), (28, 28), (56, 56), (112, 112))


@functools.cache
def args_type(threads: int) -> type[ctypes.Structure]:
    """Mirror of ``Args`` in the kernel's source."""
    fields: list[tuple[str, Any]] = [(name, ctypes.c_void_p) for name in _POINTERS]
    fields += [(name, ctypes.c_int64) for name in _I64]
    fields += [(name, ctypes.c_int32) for name in _I32]
    fields += [("pixel", ctypes.c_uint16 * threads)]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


@dataclass(frozen=True)
class Window:
    """What a filter sees: sizes of one axis pair, (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def staged_stride(self) -> tuple[int, int]:
        """Staged rows and columns from an output to the next.

        A filter of extent 1 leaves gaps between its inputs: they are not staged.
        """
        return tuple(  # type: ignore[return-value]
            1 if k == 1 else s for k, s in zip(self.kernel_size, self.stride, strict=True)
        )

    @property
    def reach(self) -> tuple[int, int]:
        """Staged rows and columns of one output."""
        return tuple(  # type: ignore[return-value]
            d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)
        )


@dataclass(frozen=True)
class Tile:
    """``rows`` output rows, counted on from image to image, times ``columns`` output columns."""

    rows: int
    columns: int
    staged_w: int
    phase_w: int
    pitch: int
    gap: int
    slots: int


def _crossings(rows: int, p: int) -> int:
    """Most ends of images inside a tile; tiles start at multiples of ``rows``."""
    if p % rows == 0:
        return 0
    if rows % p == 0:
        return rows // p - 1
    return (p + rows - 2) // p


def _tile(window: Window, rows: int, columns: int, p: int) -> Tile:
    (down, across), (reach_h, reach_w) = window.staged_stride, window.reach
    staged_w = (columns - 1) * across + reach_w
    phase_w = -(-staged_w // across)
    gap = max(0, reach_h - down)
    height = (rows - 1) * down + reach_h + _crossings(rows, p) * gap
    pitch = phase_w * across
    return Tile(rows, columns, staged_w, phase_w, pitch, gap, height * pitch)


def best_tile(
    window: Window, threads: int, cap: int, images: int, p: int, q: int
) -> Tile | None:
    """The tile of at most ``threads`` pixels and ``cap`` staged elements that costs least.

    A tile costs its multiply-adds, idle threads included, and its staging; an element of the
    latter is taken for a sixteenth of a pixel.
    """
    total = images * p
    fewest = -(-q // threads)
    widths = {-(-q // parts) for parts in range(fewest, fewest + 16)}
    widths |= {min(q, width) for width in (_NARROW, 16, 32, 64)}
    best, best_cost = None, 0
    for columns in sorted(widths):
        rows = min(threads // columns, total)
        while rows > 1 and _tile(window, rows, columns, p).slots > cap:
            rows -= 1
        # Also: rows shared evenly, and whole images or whole parts of one.
        even = -(-total // -(-total // rows))
        for candidate in {rows, even, rows // p * p, -(-p // -(-p // rows))} - {0}:
            tile = _tile(window, candidate, columns, p)
            if tile.slots > cap:
                continue
            cost = -(-total // candidate) * -(-q // columns) * (16 * threads + tile.slots)
            if best is None or cost < best_cost:
                best, best_cost = tile, cost
    return best


def _by_bank(tile: Tile, window: Window) -> list[list[int]]:
    """Pixels of a tile by the bank of shared memory that their first input lies in."""
    banks: list[list[int]] = [[] for _ in range(_BANKS)]
    for row in range(tile.rows):
        for column in range(tile.columns):
            slot = row * window.staged_stride[0] * tile.pitch + column
            banks[slot % _BANKS].append(row * tile.columns + column)
    return banks


def spread_rows(tile: Tile, window: Window, threads: int, cap: int) -> Tile:
    """The tile with up to three unused floats behind a staged row, for pixels in all banks.

    A pitch of 16 leaves four banks without a pixel of a map of 14 columns, one of 17 none.
    """

    def padded(pad: int) -> Tile:
        height = tile.slots // tile.pitch
        return replace(tile, pitch=tile.pitch + pad, slots=height * (tile.pitch + pad))

    def crowded(candidate: Tile) -> int:
        return sum(max(0, len(b) - threads // _BANKS) for b in _by_bank(candidate, window))

    candidates = [padded(pad) for pad in range(4)]
    return min((c for c in candidates if c.slots <= cap), key=crowded)


def spread(tile: Tile, window: Window, threads: int) -> list[int]:
    """The pixel of each thread, so that the lanes of a warp read different banks.

    Neighbours in a row do; where a row ends the next one starts some banks further, and a warp
    that simply went on would read a bank twice.
    """
    pixels = [_IDLE] * threads
    rest = []
    for lane, bank in enumerate(_by_bank(tile, window)):
        for warp, pixel in enumerate(bank):
            if warp < threads // _BANKS:
                pixels[warp * _BANKS + lane] = pixel
            else:
                rest.append(pixel)
    for thread, pixel in enumerate(pixels):
        if pixel == _IDLE and rest:
            pixels[thread] = rest.pop()
    return pixels


def staged_capacity(window: Window, threads: int, limit: int) -> int | None:
    """Floats of a staged channel, odd, that hold a good tile of every usual map; or None.

    Args:
        window: of the filters.
        threads: pixels of a tile.
        limit: most floats.
    """
    pointwise = window.reach == (1, 1)
    # One row of the narrowest tile, which every map has: no input is refused later.
    most = _tile(window, 1, _NARROW, 1).slots
    for p, q in _USUAL_MAPS:
        p, q = (1, p * q) if pointwise else (p, q)
        tile = best_tile(window, threads, limit, 1024, p, q)
        if tile is not None:
            most = max(most, spread_rows(tile, window, threads, limit).slots)
    return most | 1 if most < limit else None


def plan(
    window: Window,
    threads: int,
    cap: int,
    slabs: int,
    shape: Sequence[int],
    filters: int,
    padding: Sequence[int],
    channels_last: bool,
) -> ctypes.Structure:
    """``Args`` without tensors, activation none.

    Args:
        window: of the filters.
        threads: of a block.
        cap: most staged elements of a channel.
        slabs: of filters.
        shape: (N, C, H, W) of x, with N > 0.
        filters: K.
        padding: top, bottom, left, right.
        channels_last: memory format of x and y.
    """
    n, c, h, w = shape
    (r, s), (down, across) = window.kernel_size, window.stride
    p = out_extent(h, padding[0], padding[1], window.dilation[0], r, down)
    q = out_extent(w, padding[2], padding[3], window.dilation[1], s, across)
    args: Any = args_type(threads)()
    if (r, s, down, across) == (1, 1, 1, 1) and not any(padding):
        # Pixels of a pointwise convolution are one row, with channels last that of all images.
        h, w = (1, n * h * w) if channels_last else (1, h * w)
        n = 1 if channels_last else n
        p, q = h, w
    tile = best_tile(window, threads, cap, n, p, q)
    assert tile is not None  # what staged_capacity sees to
    tile = spread_rows(tile, window, threads, cap)
    if channels_last:
        args.x_n, args.x_c, args.x_h, args.x_w = h * w * c, 1, w * c, c
        args.y_n, args.y_k, args.y_p, args.y_q = p * q * filters, 1, q * filters, filters
    else:
        args.x_n, args.x_c, args.x_h, args.x_w = c * h * w, h * w, w, 1
        args.y_n, args.y_k, args.y_p, args.y_q = filters * p * q, p * q, q, 1
    args.n, args.h, args.w, args.p, args.q = n, h, w, p, q
    args.stride_h, args.stride_w = down, across
    args.pad_top, args.pad_left = padding[0], padding[2]
    args.tiles_q = -(-q // tile.columns)
    args.tiles = -(-n * p // tile.rows) * args.tiles_q
    args.work = args.tiles * slabs
    args.tq, args.tile_rows = tile.columns, tile.rows
    args.slots, args.pitch, args.phase_w = tile.slots, tile.pitch, tile.phase_w
    args.staged_w, args.gap = tile.staged_w, tile.gap
    args.row_stride, args.phases = window.staged_stride
    args.row_taps = window.dilation[0] * tile.pitch
    args.row_step = down if r == 1 else 1
    args.col_step = across if s == 1 else 1
    args.channels_last = int(channels_last)
    args.pixel[:] = spread(tile, window, threads)
    return cast(ctypes.Structure, args)
