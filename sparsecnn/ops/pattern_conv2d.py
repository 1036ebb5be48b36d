"""``pattern_conv2d``: convolution with a weight in groups of filters that share their columns.

``y = act(conv(x, W) + bias + residual)``: the loop of ``csr_conv2d``, with each loaded input vector
multiplied by the weights of several filters. What structured sparsity is worth on a CPU: Mao et
al., "Exploring the Granularity of Sparsity in Convolutional Neural Networks", 2017. The cost is
``2 * stored * N * P * Q`` FLOPs; no lowered copy of the input is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import sparsecnn._library  # noqa: F401  (defines torch.ops.sparsecnn)
from sparsecnn.formats.pattern import PatternWeight, flat_indices
from sparsecnn.ops._autograd import grad_dense, register_fused
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

_OP = "pattern_conv2d"
_pattern_conv2d_op = torch.ops.sparsecnn.pattern_conv2d.default


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
        _OP, x, weight.shape, arrays, bias, residual, geometry, groups, activation, dtypes_for(x)
    )
    if groups != weight.groups:
        raise ValueError(
            f"{_OP}: expected groups {weight.groups}, for which the weight was packed, got {groups}"
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

    ``y = act(conv(x, W) + bias + residual)``.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last; another layout is copied first. float32,
            bfloat16 or, on the CPU, float64, on CUDA float16.
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
    ``L * eps * conv(|x|, |W|)``; the result is bitwise the same at any thread count. On CUDA
    float16 and bfloat16 are multiplied by tensor cores where filter groups have 6 filters or more
    on average: sums are float32 as well, in another order. Cost: ``2 * stored * N * P * Q`` FLOPs;
    channels that no filter reads are multiplied with nothing. A weight called again on the CPU is
    kept in kernel order: 4 bytes per value and per column, 512 MiB in all. CUDA reads the arrays as
    they are and trusts them: the host does not wait for what lies in them. There a weight of the
    pattern ``2:4`` goes to sparse tensor cores if x is float16 or bfloat16 in channels_last, G is
    1, C a multiple of 32 and K one of 8, 32 or more; it is packed in every call. A filter that
    breaks the pattern of its name has outputs of NaN there, and where one keeps fewer than two of
    four channels, an infinity or NaN in another of them may reach it, as in the dense convolution.

    Gradients: exact, not fast. Those for ``x`` and the values are the framework's dense ones, at
    the cost of the dense layer; double backward works.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match.
    """
    kernel_size = weight.shape[2:] if isinstance(weight, PatternWeight) else (1, 1)
    geometry = geometry_of(_OP, x, kernel_size, stride, padding, dilation)
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
    """``pattern_conv2d`` with a geometry from ``conv_geometry``; what layers call."""
    if autocast_is_on(x):
        x, weight, bias, residual = autocast(x, weight, bias, residual)
    checked = (x, weight, bias, residual, geometry, groups, activation)
    is_plain = (
        is_eager(x)
        and isinstance(weight, PatternWeight)
        and x.dim() == 4
        # What the op cannot know, and what decides which implementation sees the arguments.
        and x.shape[1] == weight.shape[1] * groups
        and groups == weight.groups
        and weight.values.device == weight.columns.device == weight.filters.device == x.device
        and weight.group_rows.device == weight.group_columns.device == x.device
        and (bias is None or bias.device == x.device)
        and (residual is None or residual.device == x.device)
    )
    if not is_plain:
        _check(*checked)
    arguments = (
        x, weight.values, weight.columns, weight.filters, weight.group_rows, weight.group_columns,
        bias, residual, *geometry, groups, weight.pattern, activation,
    )  # fmt: skip
    return run_op(_pattern_conv2d_op, arguments, _check, checked, is_plain)


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
    pattern: str,
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


def _grad_conv(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    filters: Tensor,
    group_rows: Tensor,
    group_columns: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pattern: str,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    r, s = kernel_size
    shape = (filters.shape[0], x.shape[1] // groups, r, s)
    places = flat_indices(columns, filters, group_rows, group_columns, shape, values.shape[0])
    dense = values.new_zeros(shape[0] * shape[1] * shape[2] * shape[3])
    dense = dense.index_put((places,), values).reshape(shape)
    grad_x, grad_weight = grad_dense(grad, x, dense, stride, padding, dilation, groups, need)
    grad_values = None if grad_weight is None else grad_weight.reshape(-1)[places]
    return grad_x, grad_values, None, None, None, None


register_fused(_pattern_conv2d_op, 5, _grad_conv)
