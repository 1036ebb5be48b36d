"""Checks of convolution arguments that every op shares; all raise before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
"""Activations that kernels fuse, as the ops spell them."""


def _as_list(value: object) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else []


def pair(op: str, name: str, value: int | Sequence[int], low: int) -> list[int]:
    """An int or a pair of ints >= low, as a list of two; anything else is a ValueError."""
    pair = [value, value] if isinstance(value, int) else _as_list(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < low for v in pair):
        raise ValueError(f"{op}: expected {name} an int or a pair of ints >= {low}, got {value!r}")
    return pair


def resolve_padding(
    op: str,
    padding: int | Sequence[int] | str,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
) -> list[int]:
    """Padding as ``[top, bottom, left, right]``.

    Args:
        op: name for the messages.
        padding: an int, ``(h, w)``, ``(top, bottom, left, right)``, ``"same"`` or ``"valid"``.
        kernel_size: ``(R, S)``.
        dilation: two ints.
        stride: two ints; ``"same"`` needs 1.

    Raises:
        ValueError: anything else, a negative pad, or ``"same"`` with a stride.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        if padding != "same":
            raise ValueError(f"{op}: expected padding 'same' or 'valid', got {padding!r}")
        if any(s != 1 for s in stride):
            raise ValueError(f"{op}: expected stride 1 with padding 'same', got {tuple(stride)}")
        out = []
        for k, d in zip(kernel_size, dilation, strict=True):
            total = d * (k - 1)
            out += [total // 2, total - total // 2]
        return out
    pads = [padding] * 4 if isinstance(padding, int) else _as_list(padding)
    if len(pads) == 2:
        pads = [pads[0], pads[0], pads[1], pads[1]]
    if len(pads) != 4 or any(not isinstance(p, int) or p < 0 for p in pads):
        raise ValueError(
            f"{op}: expected padding an int, 2 or 4 ints >= 0, 'same' or 'valid', got {padding!r}"
        )
    return pads


def out_extent(size: Any, lo: int, hi: int, dilation: int, kernel: int, stride: int) -> Any:
    """Output size along one axis; below 1 when the dilated kernel does not fit."""
    return (size + lo + hi - dilation * (kernel - 1) - 1) // stride + 1
