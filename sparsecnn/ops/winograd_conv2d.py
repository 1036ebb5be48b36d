"""``winograd_conv2d``: 3x3 convolution of stride 1 with a weight in the Winograd domain.

``y = act(A^T [sum_c U_c . (B^T d_c B)] A + bias + residual)`` for every m x m tile of outputs, m =
2 or 4 (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016), ``U`` dense
or sparse (Liu et al., "Efficient Sparse-Winograd Convolutional Neural Networks", ICLR 2018). A tile
and channel takes ``(m + 2)^2`` products instead of ``9 m^2``: 2.25 times fewer for m = 2, 4 times
for m = 4, and of a sparse weight only those stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

import sparsecnn._library  # noqa: F401  (defines torch.ops.sparsecnn)
from sparsecnn.formats.winograd import WinogradWeight, transforms
from sparsecnn.ops._autograd import register_fused
from sparsecnn.ops._check import Geometry, check_conv
from sparsecnn.ops._common import (
    autocast,
    autocast_is_on,
    dtypes_for,
    fake_output,
    geometry_of,
    is_eager,
    run_op,
)

_OP = "winograd_conv2d"
_winograd_conv2d_op = torch.ops.sparsecnn.winograd_conv2d.default


def _check(
    x: Tensor,
    weight: WinogradWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
) -> None:
    if not isinstance(weight, WinogradWeight):
        raise TypeError(
            f"{_OP}: expected weight a WinogradWeight, got {type(weight).__name__}; "
            "transform a dense weight with WinogradWeight.from_dense"
        )
    arrays = {"values": weight.values, "col_idx": weight.col_idx, "row_ptr": weight.row_ptr}
    present = {name: t for name, t in arrays.items() if t is not None}
    check_conv(
        _OP, x, weight.shape, present, bias, residual, geometry, groups, activation, dtypes_for(x)
    )
    if groups != weight.groups:
        raise ValueError(
            f"{_OP}: expected groups {weight.groups}, for which the weight was packed, got {groups}"
        )


def winograd_conv2d(
    x: Tensor,
    weight: WinogradWeight,
    bias: Tensor | None = None,
    *,
    padding: int | Sequence[int] | str = 0,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """3x3 convolution of stride 1 in the Winograd domain, fused with its surroundings.

    ``y = act(conv(x, W) + bias + residual)`` where ``weight`` is the transform of ``W``; a weight
    pruned or trained in the Winograd domain is in general not the transform of any ``W``.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last; another layout is copied first. float32,
            bfloat16 or float64 on the CPU; float32, float16 or bfloat16 on CUDA.
        weight: of ``(K, C/G, 3, 3)``, values of the dtype of ``x``.
        bias: ``(K,)``.
        padding: int, ``(h, w)``, ``(top, bottom, left, right)``, ``"same"`` or ``"valid"``.
        groups: G, as the weight was packed.
        activation: ``none``, ``relu``, ``relu6``, ``silu`` or ``hardswish``.
        residual: like the output, added before the activation.

    Returns:
        ``(N, K, P, Q)`` in the memory format of ``x``.

    Accuracy: within ``n * u / (1 - n * u)`` of ``|A^T| [sum |U| . (|B^T| |x| |B|)] |A| + |bias| +
    |residual|``, n = C/G + 8 for m = 2 and C/G + 20 for m = 4, u = 2^-24 (2^-53 in float64); then
    the activation, and one rounding to bfloat16. Against the direct convolution the worst case is
    up to `formats.winograd.error_growth` times larger, random data of 64 to 256 channels are far
    from it: their root mean square error is 2e-7 to 5e-7 of the output's for m = 2 and 6e-7 to
    1.5e-6 for m = 4, that is 0.6 to 0.8 and 1.7 to 2.3 times that of ``csr_conv2d`` and, growing
    with the channels, 1.2 to 2.5 and 3.5 to 7 times that of torch. Small integers are exact with
    m = 2. Bitwise the same at any thread count. A bfloat16 weight is rounded in the Winograd
    domain: errors up to 0.5 % of the largest output for m = 2 and 1 to 2 % for m = 4, where the
    direct convolution has 0.3 %. A NaN or infinity in x spreads over its tiles. On CUDA a sparse
    weight adds ``(m + 1) * (ceil(C/G / 16) - 1)`` to n, and a dense one in 16 bits with m = 2,
    which runs on tensor cores, has its transformed input rounded to the dtype: another ``eps / 2``
    times ``|A^T| [...] |A|``, and 2 n for n where tensor cores cut instead of rounding.

    Cost: ``2 * stored * N * ceil(P / m) * ceil(Q / m)`` FLOPs and the transforms, about 10 cycles
    a tap, channel and 16 tiles, which narrow layers (C + K below about 64) do not earn back.
    Scratch: on the CPU up to about 2 MB a thread, 4.7 KB a channel and tap-row for wide layers; on
    CUDA none.

    Gradients: exact, not fast: computed by the framework from all transformed tiles, 2.25 (m = 4)
    or 4 (m = 2) times the size of x; double backward works.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match.
    """
    geometry = geometry_of(_OP, x, (3, 3), 1, padding, 1)
    return run_winograd_conv2d(x, weight, bias, residual, geometry, groups, activation)


def run_winograd_conv2d(
    x: Tensor,
    weight: WinogradWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
) -> Tensor:
    """``winograd_conv2d`` with a geometry from ``conv_geometry``; what layers call."""
    if autocast_is_on(x):
        x, weight, bias, residual = autocast(x, weight, bias, residual)
    checked = (x, weight, bias, residual, geometry, groups, activation)
    is_plain = (
        is_eager(x)
        and isinstance(weight, WinogradWeight)
        and x.dim() == 4
        # What the op cannot know, and what decides which implementation sees the arguments.
        and x.shape[1] == weight.shape[1] * groups
        and groups == weight.groups
        and weight.values.device == x.device
        and (weight.col_idx is None or weight.col_idx.device == x.device)
        and (weight.row_ptr is None or weight.row_ptr.device == x.device)
        and (bias is None or bias.device == x.device)
        and (residual is None or residual.device == x.device)
    )
    if not is_plain:
        _check(*checked)
    arguments = (
        x, weight.values, weight.col_idx, weight.row_ptr, bias, residual, weight.shape[0],
        weight.tile, geometry[2], groups, activation,
    )  # fmt: skip
    return run_op(_winograd_conv2d_op, arguments, _check, checked, is_plain)


@torch.library.register_fake("sparsecnn::winograd_conv2d")
def _fake(
    x: Tensor,
    values: Tensor,
    col_idx: Tensor | None,
    row_ptr: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    filters: int,
    tile: int,
    padding: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"{_OP}: expected x of shape (N, C, H, W), got {x.shape}")
    return fake_output(x, filters, (3, 3), (1, 1), padding, (1, 1))


@register_flop_formula(torch.ops.sparsecnn.winograd_conv2d)
def _flops(
    x_shape: Any, values_shape: Any, col_idx: Any, row_ptr: Any, bias: Any, residual: Any,
    filters: int, tile: int, *args: Any, out_shape: Any = None, **kw: Any,
) -> int:  # fmt: skip
    n, _, p, q = out_shape
    stored = values_shape[0]
    if len(values_shape) == 4:
        stored = values_shape[1] * values_shape[2] * filters
    return int(2 * stored * n * -(-p // tile) * -(-q // tile))


# A direct call of the op casts to the default of its device; winograd_conv2d to the one in force.
torch.library.register_autocast("sparsecnn::winograd_conv2d", "cpu", torch.bfloat16)


def _tiles_of(x: Tensor, rows: Any, cols: Any, tile: int, padding: Sequence[int]) -> Tensor:
    """``(N, C, rows, cols, m + 2, m + 2)``: the input tiles."""
    top, _, left, _ = padding
    height, width = rows * tile + 2, cols * tile + 2
    padded = F.pad(x, (left, width - x.shape[3] - left, top, height - x.shape[2] - top))
    return padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)


def _grad_conv(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    col_idx: Tensor | None,
    row_ptr: Tensor | None,
    filters: int,
    tile: int,
    padding: list[int],
    groups: int,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The adjoint of each step, in reverse: output transform, products, input transform."""
    n, channels, h, w = x.shape
    p, q = grad.shape[2:]
    rows, cols, edge = -(-p // tile), -(-q // tile), tile + 2
    taps = edge * edge
    # On a tile in one row both passes of a transform are one matrix: few operations to trace.
    _, bt, at = (torch.kron(m, m) for m in transforms(tile, x.dtype, x.device))
    whole = F.pad(grad, (0, cols * tile - q, 0, rows * tile - p))
    outputs = whole.reshape(n, filters, rows, tile, cols, tile).permute(3, 5, 1, 0, 2, 4)
    products = at.t() @ outputs.reshape(tile * tile, -1)
    products = products.reshape(taps * groups, filters // groups, n * rows * cols)
    weight = WinogradWeight(
        values, col_idx, row_ptr, (filters, channels // groups, 3, 3), groups, tile
    )
    grad_x = grad_values = None
    if need[0]:
        u = weight.taps().reshape(taps * groups, filters // groups, channels // groups)
        transformed = torch.bmm(u.transpose(1, 2), products).reshape(taps, -1)
        tiles = (bt.t() @ transformed).reshape(taps, channels, n, rows * cols)
        height, width = rows * tile + 2, cols * tile + 2
        columns = tiles.permute(2, 1, 0, 3).reshape(n, channels * taps, rows * cols)
        image = F.fold(columns, (height, width), (edge, edge), stride=(tile, tile))
        top, left = padding[0], padding[2]
        grad_x = F.pad(image, (-left, w + left - width, -top, h + top - height))
    if need[1]:
        tiles = _tiles_of(x, rows, cols, tile, padding).permute(4, 5, 1, 0, 2, 3)
        transformed = (bt @ tiles.reshape(taps, -1)).reshape(
            taps * groups, channels // groups, n * rows * cols
        )
        grad_taps = torch.bmm(products, transformed.transpose(1, 2))
        grad_values = weight.stored(grad_taps.reshape(taps, filters, channels // groups))
    return grad_x, grad_values, None, None


register_fused(_winograd_conv2d_op, 3, _grad_conv)
