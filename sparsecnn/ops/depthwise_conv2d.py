"""``depthwise_conv2d``: one filter per channel, dense, with bias, activation and residual fused.

``y[n, k] = act(x[n, k // m] (*) W[k, 0] + bias[k] + residual[n, k])`` with the channel multiplier
``m = K / C``: the depthwise half of a separable convolution (Sifre, "Rigid-Motion Scattering for
Image Classification", 2014; Howard et al., "MobileNets", 2017). The cost is
``2 * N * K * P * Q * R * S`` FLOPs for ``N * (C * H * W + K * P * Q)`` elements moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import sparsecnn._library  # noqa: F401  (defines torch.ops.sparsecnn)
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

_OP = "depthwise_conv2d"
DEPTHWISE_CONV2D = torch.ops.sparsecnn.depthwise_conv2d.default


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{_OP}: expected weight a Tensor, got {type(weight).__name__}")
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(
            f"{_OP}: expected weight of shape (K, 1, R, S), one input channel per filter, "
            f"got {tuple(weight.shape)}"
        )
    groups = 1
    if isinstance(x, Tensor) and x.dim() == 4:
        groups = x.shape[1]
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(
                f"{_OP}: expected weight with a multiple of the {groups} channels of x as its "
                f"number of filters K, got K = {weight.shape[0]}"
            )
    check_conv(
        _OP, x, weight.shape, {"": weight}, bias, residual, geometry, groups, activation,
        dtypes_for(x),
    )  # fmt: skip


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Depthwise 2-d convolution, fused with bias, residual and activation.

    ``y = act(conv(x, W, groups=C) + bias + residual)``.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last; another layout is copied first.
            float32, bfloat16 or float64 (CPU) or float16 (CUDA).
        weight: ``(K, 1, R, S)`` of the dtype of ``x``, as ``nn.Conv2d`` with ``groups=C`` has it;
            ``K = m * C`` with a channel multiplier ``m >= 1``.
        bias: ``(K,)``.
        stride: one or two ints.
        padding: int, ``(h, w)``, ``(top, bottom, left, right)``, ``"same"`` or ``"valid"``.
        dilation: one or two ints.
        activation: ``none``, ``relu``, ``relu6``, ``silu`` or ``hardswish``.
        residual: like the output, added before the activation.

    Returns:
        ``(N, K, P, Q)`` in the memory format of ``x``.

    Accuracy: each output is one chain of float32 FMAs (float64 for float64 input) over the R * S
    taps, so the error is at most ``(R * S + 2) * eps * conv(|x|, |W|)``; the result is bitwise the
    same at any thread count. Cost: ``2 * N * K * P * Q * R * S`` FLOPs and every element moved
    once; 3x3 filters are bound by memory, 5x5 and larger by arithmetic. Scratch: the filters of a
    few channels per thread, in bfloat16 NCHW also the input rows of 14 output rows as float32.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match.
    """
    kernel_size = weight.shape[2:] if isinstance(weight, Tensor) and weight.dim() == 4 else (1, 1)
    geometry = geometry_of(_OP, x, kernel_size, stride, padding, dilation)
    return run_depthwise_conv2d(x, weight, bias, residual, geometry, activation)


def run_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """``depthwise_conv2d`` with a geometry from ``conv_geometry``; what layers call."""
    if autocast_is_on(x):
        x, weight, bias, residual = autocast(x, weight, bias, residual)
    checked = (x, weight, bias, residual, geometry, activation)
    _, stride, padding, dilation = geometry
    arguments = (x, weight, bias, residual, stride, padding, dilation, activation)
    is_plain = (
        is_eager(x)
        and isinstance(weight, Tensor)
        # What decides which implementation sees the arguments.
        and x.is_cpu
        and weight.is_cpu
        and (bias is None or bias.is_cpu)
        and (residual is None or residual.is_cpu)
    )
    if not is_plain:
        _check(*checked)
    return run_op(DEPTHWISE_CONV2D, arguments, _check, checked, is_plain)


@torch.library.register_fake("sparsecnn::depthwise_conv2d")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"{_OP}: expected x of shape (N, C, H, W), got {x.shape}")
    torch._check(
        weight.dim() == 4 and weight.shape[1] == 1,
        lambda: f"{_OP}: expected weight of shape (K, 1, R, S), got {tuple(weight.shape)}",
    )
    return fake_output(x, weight.shape[0], weight.shape[2:], stride, padding, dilation)


@register_flop_formula(torch.ops.sparsecnn.depthwise_conv2d)
def _flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    n, k, p, q = out_shape
    return int(2 * n * k * p * q * weight_shape[2] * weight_shape[3])


# A direct call of the op casts to the default of its device; depthwise_conv2d to that in force.
torch.library.register_autocast("sparsecnn::depthwise_conv2d", "cpu", torch.bfloat16)


def _grad_conv(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    return grad_dense(grad, x, weight, stride, padding, dilation, x.shape[1], need)


register_fused(DEPTHWISE_CONV2D, 1, _grad_conv)
