"""``pointwise_conv2d``: 1x1 convolution with a dense weight as a matrix product over pixels.

``y = act(W x + bias + residual)`` at every pixel. The cost is ``2 * N * P * Q * K * C`` FLOPs; no
lowered or transposed copy of the whole input is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import sparsecnn._library  # noqa: F401  (defines torch.ops.sparsecnn)
from sparsecnn.ops._autograd import grad_dense, register_fused
from sparsecnn.ops._check import check_allow_tf32, check_conv, pair
from sparsecnn.ops._common import (
    autocast,
    autocast_is_on,
    dtypes_for,
    fake_output,
    is_eager,
    run_op,
)

_OP = "pointwise_conv2d"
POINTWISE_CONV2D = torch.ops.sparsecnn.pointwise_conv2d.default


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """1x1 convolution without padding or groups, fused with bias, residual and activation.

    ``y = act(conv(x, W) + bias + residual)``.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last; another layout is copied first. float32,
            bfloat16 or float64 (CPU) or float16 (CUDA).
        weight: ``(K, C, 1, 1)`` of the dtype of ``x``. In the order of
            `formats.chain.channels_innermost` it is read in place in both layouts; otherwise
            channels_last calls copy it block by block.
        bias: ``(K,)``.
        stride: one or two ints.
        activation: ``none``, ``relu``, ``relu6``, ``silu`` or ``hardswish``.
        residual: like the output, added before the activation.
        allow_tf32: on CUDA, float32 may go through the tensor cores, which round x and the weight
            to the 10 bits of TF32. Nothing else depends on it.

    Returns:
        ``(N, K, P, Q)`` in the memory format of ``x``.

    Accuracy: each output is one chain of float32 FMAs (float64 for float64 input) over the C
    channels, so the error is at most ``C * eps * conv(|x|, |W|)``; the result is bitwise the same
    at any thread count. On CUDA, float16 and bfloat16 go through the tensor cores, with float32
    sums; float32 does only with ``allow_tf32``, which adds ``2^-10 * conv(|x|, |W|)``. The
    backward pass is the framework's, with its own settings. Cost: ``2 * N * P * Q * K * C`` FLOPs.
    Scratch: on the CPU, up to about 1 MB a thread.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match, or ``allow_tf32`` no bool.
    """
    steps = pair(_OP, "stride", stride, 1)
    check_allow_tf32(_OP, allow_tf32)
    return run_pointwise_conv2d(x, weight, bias, residual, steps, activation, allow_tf32)


def run_pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
    allow_tf32: bool,
) -> Tensor:
    """`pointwise_conv2d` with its stride and `allow_tf32` already checked."""
    if autocast_is_on(x):
        x, weight, bias, residual = autocast(x, weight, bias, residual)
    arguments = (x, weight, bias, residual, stride, activation, allow_tf32)
    is_plain = (
        is_eager(x)
        and x.dim() == 4
        and isinstance(weight, Tensor)
        # What decides which implementation sees the arguments.
        and x.is_cpu
        and weight.is_cpu
        and (bias is None or bias.is_cpu)
        and (residual is None or residual.is_cpu)
    )
    checked = arguments[:-1]
    if not is_plain:
        _check(*checked)
    return run_op(POINTWISE_CONV2D, arguments, _check, checked, is_plain)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{_OP}: expected weight of shape (K, C, 1, 1), got {got}")
    geometry = [1, 1], stride, [0, 0, 0, 0], [1, 1]
    check_conv(
        _OP, x, weight.shape, {"dense": weight}, bias, residual, geometry, 1, activation,
        dtypes_for(x),
    )  # fmt: skip
    if x.shape[1] < 1:
        raise ValueError(f"{_OP}: expected x with channels, got {tuple(x.shape)}")


@torch.library.register_fake("sparsecnn::pointwise_conv2d")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
    allow_tf32: bool = False,
) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"{_OP}: expected x of shape (N, C, H, W), got {x.shape}")
    return fake_output(x, weight.shape[0], [1, 1], stride, [0, 0, 0, 0], [1, 1])


@register_flop_formula(torch.ops.sparsecnn.pointwise_conv2d)
def _flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    n, k, p, q = out_shape
    return int(2 * n * k * p * q * weight_shape[1])


# A direct call of the op casts to the default of its device; the function to the dtype in force.
torch.library.register_autocast("sparsecnn::pointwise_conv2d", "cpu", torch.bfloat16)


def _grad_conv(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], need: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return grad_dense(grad, x, weight, stride, [0, 0, 0, 0], [1, 1], 1, need)


register_fused(POINTWISE_CONV2D, 1, _grad_conv, flags=1)
