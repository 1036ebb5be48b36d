from __future__ import annotations

import numpy as np
import pytest

from sparsecnn import _codec

COUNTS = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 4097]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_matches_numpy_and_round_trips(count: int, density: float) -> None:
    mask = np.random.default_rng(count).random(count) < density
    bits = _codec.bitmask_pack(mask)
    assert bits.dtype == np.uint8
    np.testing.assert_array_equal(bits, np.packbits(mask, bitorder="little"))
    back = _codec.bitmask_unpack(bits, count)
    assert back.dtype == np.bool_
    np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize("count", COUNTS)
def test_any_nonzero_byte_is_one(count: int) -> None:
    mask = np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)
    mask[::3] = 0
    expected = np.packbits(mask != 0, bitorder="little")
    np.testing.assert_array_equal(_codec.bitmask_pack(mask), expected)
    odd = mask.view(np.bool_)  # a boolean array whose bytes are not 0 and 1
    np.testing.assert_array_equal(_codec.bitmask_pack(odd), expected)


def test_every_byte_value() -> None:
    bits = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        _codec.bitmask_unpack(bits, 2048), np.unpackbits(bits, bitorder="little").astype(bool)
    )
    np.testing.assert_array_equal(_codec.bitmask_pack(_codec.bitmask_unpack(bits, 2048)), bits)


def test_strided_input() -> None:
    mask = np.random.default_rng(0).random(200) < 0.3
    np.testing.assert_array_equal(
        _codec.bitmask_pack(mask[::-2]), _codec.bitmask_pack(mask[::-2].copy())
    )


@pytest.mark.parametrize(
    ("bits", "count", "error", "text"),
    [
        (np.zeros(2, np.uint8), 17, ValueError, "3 bytes"),
        (np.zeros(2, np.uint8), 8, ValueError, "1 bytes"),
        (np.zeros(2, np.uint8), -1, ValueError, "count"),
        (np.zeros(2, np.uint8), 2**62 - 1, ValueError, "bytes of bits"),
        (np.zeros(2, np.uint8), 2**63, ValueError, "beyond 64 bits"),
        (np.zeros(2, np.uint8), 16.0, TypeError, "float"),
        (np.zeros(2, np.uint8), True, TypeError, "bool"),
        (np.zeros(2, np.int8), 16, TypeError, "int8"),
        (np.zeros((1, 2), np.uint8), 16, ValueError, "2"),
        ([0, 0], 16, TypeError, "list"),
        (None, 16, TypeError, "NoneType"),
        (np.array([255, 255], np.uint8), 9, ValueError, "padding"),
        (np.array([1, 2], np.uint8), 9, ValueError, "padding"),
    ],
)
def test_unpack_refuses(bits: object, count: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        _codec.bitmask_unpack(bits, count)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mask", [np.zeros(3), np.zeros(3, np.int64), [True], np.zeros((2, 2), bool)]
)
def test_pack_refuses(mask: object) -> None:
    with pytest.raises((TypeError, ValueError), match="mask"):
        _codec.bitmask_pack(mask)  # type: ignore[arg-type]
