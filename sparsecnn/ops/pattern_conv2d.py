"""``pattern_conv2d``: convolution with a weight in groups of filters that share their columns.

``y = act(conv(x, W) + bias + residual)``: the loop of ``csr_conv2d``, with each loaded input vector
multiplied by the weights of several filters. What structured sparsity is worth on a CPU: Mao et
al., "Exploring the Granularity of Sparsity in Convolutional Neural Networks", 2017. The cost is
``2 * stored * N * P * Q`` FLOPs; no lowered copy of the input is made.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

import sparsecnn._library  # noqa: F401  (defines torch.ops.sparsecnn)
from sparsecnn.formats.pattern import PatternWeight, flat_indices
from sparsecnn.ops._check import Geometry, check_conv, conv_geometry
from sparsecnn.ops._common import (
    CPU_DTYPES,
    activation_slope,
    autocast_is_on,
    autocast_to,
    fake_output,
    is_eager,
)

_OP = "pattern_conv2d"
_pattern_conv2d_op = torch.ops.sparsecnn.pattern_conv2d.default
_plain_geometry = functools.lru_cache(maxsize=256)(functools.partial(conv_geometry, _OP))


def _check(
    x: Tensor,
    weight: PatternWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
) -> None:
    if not isinstance(weight, PatternWeight):
        raise TypeError(
            f"{_OP}: expected weight a PatternWeight, got {type(weight).__name__}; "
            "pack a dense weight with PatternWeight.from_dense"
        )
    names = ("values", "columns", "filters", "group_rows", "group_columns")
    arrays = {name: getattr(weight, name) for name in names}
    check_conv(
        _OP, x, weight.shape, arrays, bias, residual, geometry, groups, activation, CPU_DTYPES
    )
    if groups != weight.groups:
        raise ValueError(
            f"{_OP}: expected groups {weight.groups}, for which the weight was packed, got {groups}"
        )
    if x.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"{_OP}: expected x on the CPU, got {x.device}; use csr_conv2d or the dense layer there"
        )


def pattern_conv2d(
    x: Tensor,
    weight: PatternWeight,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """2-d convolution with structured sparsity, fused with bias, residual and activation.

    ``y = act(conv(x, W) + bias + residual)``. CPU only.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last; another layout is copied first. float32,
            bfloat16 or float64.
        weight: ``(K, C/G, R, S)`` in filter groups, values of the dtype of ``x``.
        bias: ``(K,)``.
        stride: one or two ints.
        padding: int, ``(h, w)``, ``(top, bottom, left, right)``, ``"same"`` or ``"valid"``.
        dilation: one or two ints.
        groups: G, as the weight was packed.
        activation: ``none``, ``relu``, ``relu6``, ``silu`` or ``hardswish``.
        residual: like the output, added before the activation.

    Returns:
        ``(N, K, P, Q)`` in the memory format of ``x``.

    Accuracy: each output is one chain of float32 FMAs (float64 for float64 input) over the L
    columns of its filter group, ascending, so the error is at most
    ``L * eps * conv(|x|, |W|)``; the result is bitwise the same at any thread count. Cost:
    ``2 * stored * N * P * Q`` FLOPs; channels that no filter reads are not touched. A weight called
    again is kept in kernel order: 4 bytes per value and per column, 512 MiB in all.

    Gradients: exact, not fast. Those for ``x`` and the values are the framework's dense ones, at
    the cost of the dense layer; double backward works.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match.
    """
    # Exact ints only: to a cache 1.0 is 1, but it must be refused.
    if type(stride) is int and type(padding) is int and type(dilation) is int and is_eager(x):
        shape = weight.shape if isinstance(weight, PatternWeight) else (0, 0, 1, 1)
        geometry = _plain_geometry(shape[2:], stride, padding, dilation)
    else:
        kernel_size = weight.shape[2:] if isinstance(weight, PatternWeight) else (1, 1)
        geometry = conv_geometry(_OP, kernel_size, stride, padding, dilation)
    return run_pattern_conv2d(x, weight, bias, residual, geometry, groups, activation)


def run_pattern_conv2d(
    x: Tensor,
    weight: PatternWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
) -> Tensor:
    """``pattern_conv2d`` with a geometry from ``conv_geometry``; what layers call.

    A call is a few microseconds next to its kernel: in eager mode the op's own checks come first
    and the full ones only say better what was wrong.
    """
    if autocast_is_on(x):
        cast = autocast_to(x)
        if isinstance(weight, PatternWeight):
            weight = replace(weight, values=cast(weight.values))
        x, bias, residual = cast(x), cast(bias), cast(residual)
    arguments = (x, weight, bias, residual, geometry, groups, activation)
    seen_by_op = (
        is_eager(x)
        and x.is_cpu
        and isinstance(weight, PatternWeight)
        and x.dim() == 4
        # What the op cannot know, and what decides which implementation sees the arguments.
        and x.shape[1] == weight.shape[1] * groups
        and groups == weight.groups
        and weight.values.is_cpu
        and weight.columns.is_cpu
        and weight.filters.is_cpu
        and weight.group_rows.is_cpu
        and weight.group_columns.is_cpu
        and (bias is None or bias.is_cpu)
        and (residual is None or residual.is_cpu)
    )
    if not seen_by_op:
        _check(*arguments)
        return _call(*arguments)
    try:
        return _call(*arguments)
    except (RuntimeError, TypeError):
        _check(*arguments)  # says it better, if it was an argument
        raise


def _call(
    x: Tensor,
    weight: PatternWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
) -> Tensor:
    y: Tensor = _pattern_conv2d_op(
        x, weight.values, weight.columns, weight.filters, weight.group_rows, weight.group_columns,
        bias, residual, *geometry, groups, activation,
    )  # fmt: skip
    return y


@torch.library.register_fake("sparsecnn::pattern_conv2d")
def _fake(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    filters: Tensor,
    group_rows: Tensor,
    group_columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"{_OP}: expected x of shape (N, C, H, W), got {x.shape}")
    torch._check(
        group_rows.shape[0] == group_columns.shape[0],
        lambda: (
            f"{_OP}: expected group_rows and group_columns of one length, got "
            f"{group_rows.shape[0]} and {group_columns.shape[0]}"
        ),
    )
    return fake_output(x, filters.shape[0], kernel_size, stride, padding, dilation)


@register_flop_formula(torch.ops.sparsecnn.pattern_conv2d)
def _flops(x_shape: Any, values_shape: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    n, _, p, q = out_shape
    return int(2 * values_shape[0] * n * p * q)


# A direct call of the op casts to the default of its device; pattern_conv2d to the one in force.
torch.library.register_autocast("sparsecnn::pattern_conv2d", "cpu", torch.bfloat16)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, residual, kernel_size, stride, padding, dilation, groups, activation = inputs
    by_output = activation in ("relu", "relu6")
    ctx.save_for_backward(
        *tensors,
        bias,
        residual if activation in ("silu", "hardswish") else None,
        output if by_output else None,
    )
    ctx.geometry, ctx.activation = (kernel_size, stride, padding, dilation, groups), activation


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, *indices, bias, residual, y = ctx.saved_tensors
    kernel_size, stride, padding, dilation, groups = ctx.geometry
    if ctx.activation != "none":
        z = None
        if y is None:  # silu and hardswish: the input of the activation is computed again
            z = _pattern_conv2d_op(x, values, *indices, bias, residual, *ctx.geometry, "none")
        grad = grad * activation_slope(ctx.activation, y, z)
    need = ctx.needs_input_grad
    grad_x = grad_values = None
    if need[0] or need[1]:
        r, s = kernel_size
        shape = (indices[1].shape[0], x.shape[1] // groups, r, s)
        columns, filters, rows, ends = indices
        places = flat_indices(columns, filters, rows, ends, shape, values.shape[0])
        dense = values.new_zeros(shape[0] * shape[1] * shape[2] * shape[3])
        dense = dense.index_put((places,), values).reshape(shape)
        top, bottom, left, right = padding
        # The framework pads both sides alike: anything else is padded in front of it.
        alike = top == bottom and left == right
        image = x if alike else F.pad(x, (left, right, top, bottom))
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, image, dense, None, stride, [top, left] if alike else [0, 0], dilation, False,
            [0, 0], groups, [need[0], need[1], False],
        )  # fmt: skip
        if need[0] and not alike:
            grad_x = grad_x[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        grad_values = grad_weight.reshape(-1)[places] if need[1] else None
    grad_bias = grad.sum((0, 2, 3)) if need[6] else None
    grad_residual = grad if need[7] else None
    return grad_x, grad_values, *([None] * 4), grad_bias, grad_residual, *([None] * 6)


torch.library.register_autograd("sparsecnn::pattern_conv2d", _backward, setup_context=_setup)
