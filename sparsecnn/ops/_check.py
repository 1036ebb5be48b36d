"""Checks of convolution arguments that every op shares; all raise before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
"""Activations that kernels fuse, as the ops spell them."""
Geometry: TypeAlias = "tuple[list[int], list[int], list[int], list[int]]"
"""Kernel size, stride, padding (top, bottom, left, right) and dilation, as ops take them."""


def _as_list(value: object) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else []


def pair(op: str, name: str, value: int | Sequence[int], low: int) -> list[int]:
    """An int or a pair of ints >= low, as a list of two; anything else is a ValueError."""
    pair = [value, value] if isinstance(value, int) else _as_list(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < low for v in pair):
        raise ValueError(f"{op}: expected {name} an int or a pair of ints >= {low}, got {value!r}")
    return pair


def check_allow_tf32(op: str, value: object) -> None:
    """Refuse what is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: expected allow_tf32 a bool, got {value!r}")


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


def conv_geometry(
    op: str,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> Geometry:
    """Check and normalise the geometry of a convolution; a layer does it once.

    Raises:
        ValueError: names the argument, what was expected and the value.
    """
    stride_, dilation_ = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    padding_ = resolve_padding(op, padding, kernel_size, dilation_, stride_)
    return [*kernel_size], stride_, padding_, dilation_


def check_conv(
    op: str,
    x: Tensor,
    weight_shape: Sequence[int],
    weight: Mapping[str, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
    dtypes: Sequence[torch.dtype],
) -> None:
    """Check the tensors of a convolution against each other.

    Args:
        op: name for the messages.
        x: should be (N, C, H, W).
        weight_shape: (K, C/G, R, S).
        weight: name -> array of the packed weight, or "" -> a dense one; floating-point ones have
            the dtype of x.
        bias: should be (K,).
        residual: should have the output's shape.
        geometry: from `conv_geometry`.
        groups: should divide C and K.
        activation: one of `ACTIVATIONS`.
        dtypes: legal dtypes of x.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match.
    """
    _, stride, padding, dilation = geometry
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: expected x of shape (N, C, H, W), got {got}")
    k, cg, r, s = weight_shape
    if not isinstance(groups, int) or groups < 1 or k % groups:
        raise ValueError(f"{op}: expected groups a positive divisor of K = {k}, got {groups!r}")
    if x.shape[1] != cg * groups:
        raise ValueError(
            f"{op}: expected x with {cg * groups} channels (weight {tuple(weight_shape)}, "
            f"groups {groups}), got {x.shape[1]}"
        )
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: expected x of dtype {names} on {x.device.type}, got {x.dtype}; "
            "convert the layer and its input"
        )
    tensors: dict[str, Tensor | None] = {
        f"weight.{name}" if name else "weight": t for name, t in weight.items()
    }
    indices = [name for name, t in weight.items() if not t.is_floating_point()]
    tensors |= {"bias": bias, "residual": residual}
    for name, t in tensors.items():
        if t is not None and t.dtype != x.dtype and name.removeprefix("weight.") not in indices:
            raise TypeError(f"{op}: expected {name} of the dtype of x, {x.dtype}, got {t.dtype}")
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{op}: expected {name} on the device of x, {x.device}, got {t.device}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: expected activation one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if bias is not None and tuple(bias.shape) != (k,):
        raise ValueError(f"{op}: expected bias of shape ({k},), got {tuple(bias.shape)}")
    p = out_extent(x.shape[2], padding[0], padding[1], dilation[0], r, stride[0])
    q = out_extent(x.shape[3], padding[2], padding[3], dilation[1], s, stride[1])
    if p < 1 or q < 1:
        raise ValueError(
            f"{op}: expected a kernel that fits the padded input, got kernel ({r}, {s}), "
            f"dilation {tuple(dilation)}, padding {tuple(padding)} on "
            f"({x.shape[2]}, {x.shape[3]})"
        )
    if residual is not None and tuple(residual.shape) != (x.shape[0], k, p, q):
        raise ValueError(
            f"{op}: expected residual of the output's shape {(x.shape[0], k, p, q)}, "
            f"got {tuple(residual.shape)}"
        )
