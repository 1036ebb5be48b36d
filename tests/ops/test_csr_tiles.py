"""Tiles of the specialized csr_conv2d: every pixel once, lanes in different banks, few idle."""

from __future__ import annotations

from collections import Counter

import pytest

from sparsecnn.ops._csr_tiles import (
    Tile,
    Window,
    best_tile,
    plan,
    spread,
    spread_rows,
    staged_capacity,
)

IDLE = 65535
WINDOWS = {
    "3x3": Window((3, 3), (1, 1), (1, 1)),
    "strided": Window((3, 3), (2, 2), (1, 1)),
    "pointwise": Window((1, 1), (1, 1), (1, 1)),
    "5x5": Window((5, 5), (1, 1), (1, 1)),
    "dilated": Window((3, 3), (1, 1), (2, 2)),
}
LIMIT = 2900  # what generate() has for a channel


def tile_on(window: Window, threads: int, images: int, p: int, q: int) -> Tile:
    cap = staged_capacity(window, threads, LIMIT)
    assert cap is not None and cap % 2 == 1 and cap <= LIMIT
    tile = best_tile(window, threads, cap, images, p, q)
    assert tile is not None and tile.slots <= cap and tile.rows * tile.columns <= threads
    return tile


@pytest.mark.parametrize("threads", [192, 256])
@pytest.mark.parametrize("name", WINDOWS)
def test_usual_maps_fill_the_threads(name: str, threads: int) -> None:
    for size in (7, 14, 28, 56):
        p, q = (1, size * size) if name == "pointwise" else (size, size)
        tile = tile_on(WINDOWS[name], threads, 64, p, q)
        tiles = -(-64 * p // tile.rows) * -(-q // tile.columns)
        used = 64 * p * q / (tiles * threads)
        assert used > (0.55 if name in ("5x5", "dilated", "strided") else 0.8), (size, tile, used)


@pytest.mark.parametrize("name", WINDOWS)
def test_every_map_has_a_tile(name: str) -> None:
    maps = ((1, 1, 1), (1, 1, 5000), (1, 5000, 1), (3, 7, 8), (1, 63, 65), (500, 1, 1))
    for images, p, q in maps:
        tile_on(WINDOWS[name], 256, images, p, q)


@pytest.mark.parametrize("size", [7, 14, 28, 56])
def test_lanes_read_different_banks(size: int) -> None:
    window = WINDOWS["3x3"]
    tile = tile_on(window, 256, 64, size, size)
    plain = tile
    tile = spread_rows(tile, window, 256, LIMIT)
    pixels = spread(tile, window, 256)
    assert sorted(p for p in pixels if p != IDLE) == list(range(tile.rows * tile.columns))

    def passes(order: list[int], tile: Tile) -> int:
        """Accesses that the shared memory needs for one load of all warps."""
        total = 0
        for warp in range(0, 256, 32):
            lanes = [p for p in order[warp : warp + 32] if p != IDLE]
            slots = [p // tile.columns * tile.pitch + p % tile.columns for p in lanes]
            total += max(Counter(slot % 32 for slot in slots).values(), default=0)
        return total

    count = tile.rows * tile.columns
    in_order = list(range(count)) + [IDLE] * (256 - count)
    assert 8 == passes(pixels, tile) < passes(in_order, plain)


def test_a_far_halo_has_no_capacity() -> None:
    assert staged_capacity(Window((3, 3), (1, 1), (90, 90)), 256, LIMIT) is None


def test_sizes_beyond_32_bits() -> None:
    shape = (3, 64, 100_000, 100_000)
    args = plan(WINDOWS["3x3"], 256, 433, 2, shape, 128, (1, 1, 1, 1), False)
    assert args.x_n == 64 * 10**10 and args.y_n == 128 * 10**10
    assert args.work == 2 * args.tiles and args.tiles * args.tq * args.tile_rows >= 3 * 10**10
