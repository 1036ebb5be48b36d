"""Backward of the fused convolutions: slope of the activation, bias, residual, dense gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BY_INPUT = ("silu", "hardswish")
"""Activations whose slope follows from what went in; that of relu and relu6 from what came out."""


def activation_slope(activation: str, y: Tensor | None, z: Tensor | None) -> Tensor:
    """Derivative of the activation, from its output y (relu, relu6) or its input z."""
    if activation in BY_INPUT:
        assert z is not None
        if activation == "silu":
            sigmoid = torch.sigmoid(z)
            return sigmoid * (1 + z * (1 - sigmoid))
        slope = torch.where(z < -3, torch.zeros_like(z), z / 3 + 0.5)
        return torch.where(z > 3, torch.ones_like(z), slope)
    assert y is not None
    return ((y > 0) & (y < 6) if activation == "relu6" else y > 0).to(y.dtype)


def register_fused(
    op: Any, arrays: int, grad_conv: Callable[..., Sequence[Tensor | None]], flags: int = 0
) -> None:
    """Autograd of ``y = op(x, *arrays, bias, residual, *options, activation, *flags)``.

    The input of the activation is not kept: where the slope needs it, it is computed again.

    Args:
        op: the overload; its schema has these arguments in this order.
        arrays: number of tensors that hold the weight.
        grad_conv: the gradients of x and the arrays, None where there is none, from
            ``(grad, x, *arrays, *options, need)``: the gradient of the convolution's output and
            whether x and each array want theirs, of which at least one does.
        flags: number of arguments behind the activation, which change how the op computes only.
    """
    first = 1 + arrays  # of bias and residual
    last = -1 - flags  # the activation

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, bias, residual = inputs[: first + 2]
        ctx.options, ctx.activation = inputs[first + 2 : last], inputs[last]
        ctx.flags = inputs[last + 1 :] if flags else ()
        if ctx.activation in BY_INPUT:
            ctx.save_for_backward(*tensors, bias, residual, None)
        else:
            ctx.save_for_backward(
                *tensors, None, None, None if ctx.activation == "none" else output
            )

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, bias, residual, y = ctx.saved_tensors
        if ctx.activation != "none":
            z = None
            if ctx.activation in BY_INPUT:
                z = op(*tensors, bias, residual, *ctx.options, "none", *ctx.flags)
            grad = grad * activation_slope(ctx.activation, y, z)
        need = ctx.needs_input_grad
        grads: Sequence[Tensor | None] = [None] * first
        if any(need[:first]):
            grads = grad_conv(grad, *tensors, *ctx.options, need[:first])
        grad_bias = grad.sum((0, 2, 3)) if need[first] else None
        grad_residual = grad if need[first + 1] else None
        return *grads, grad_bias, grad_residual, *([None] * (len(ctx.options) + 1 + flags))

    torch.library.register_autograd(op, backward, setup_context=setup)


def pad_unlike(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """What aten is to pad, which pads both sides alike: other pads are put on here."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom)), [0, 0]


def grad_dense(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the dense weight ``(K, C/G, R, S)`` by the framework.

    Args:
        grad: ``(N, K, P, Q)``, of the output.
        x: ``(N, C, H, W)``.
        weight: of the convolution.
        stride: two ints.
        padding: top, bottom, left, right.
        dilation: two ints.
        groups: G.
        need: which of the two are wanted; the other is None.
    """
    padded, pads = pad_unlike(x, padding)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, padded, weight, None, stride, pads, dilation, False, [0, 0], groups,
        [need[0], need[1], False],
    )  # fmt: skip
    if need[0] and padded is not x:
        top, left = padding[0], padding[2]
        grad_x = grad_x[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return grad_x, grad_weight
