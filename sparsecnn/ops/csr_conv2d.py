"""``csr_conv2d``: convolution with an unstructured sparse weight in CSR.

``y = act(conv(x, W) + bias + residual)``: direct sparse convolution in the sense of Park et al.,
"Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017. The cost is
``2 * nnz * N * P * Q`` FLOPs; no lowered copy of the input is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import sparsecnn._library  # noqa: F401  (defines torch.ops.sparsecnn)
from sparsecnn.formats.csr import CSRWeight, transpose_indices
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

_OP = "csr_conv2d"
CSR_CONV2D = torch.ops.sparsecnn.csr_conv2d.default


def _check(
    x: Tensor,
    weight: CSRWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
) -> None:
    if not isinstance(weight, CSRWeight):
        raise TypeError(
            f"{_OP}: expected weight a CSRWeight, got {type(weight).__name__}; "
            "pack a dense weight with CSRWeight.from_dense"
        )
    arrays = {"values": weight.values, "col_idx": weight.col_idx, "row_ptr": weight.row_ptr}
    check_conv(
        _OP, x, weight.shape, arrays, bias, residual, geometry, groups, activation, dtypes_for(x)
    )


def csr_conv2d(
    x: Tensor,
    weight: CSRWeight,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """2-d convolution with a sparse weight, fused with bias, residual and activation.

    ``y = act(conv(x, W) + bias + residual)``.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last; another layout is copied first.
            float32, bfloat16 or float64 on the CPU; float32, float16 or bfloat16 on CUDA.
        weight: ``(K, C/G, R, S)`` in CSR, values of the dtype of ``x``.
        bias: ``(K,)``.
        stride: one or two ints.
        padding: int, ``(h, w)``, ``(top, bottom, left, right)``, ``"same"`` or ``"valid"``.
        dilation: one or two ints.
        groups: divides C and K.
        activation: ``none``, ``relu``, ``relu6``, ``silu`` or ``hardswish``.
        residual: like the output, added before the activation.

    Returns:
        ``(N, K, P, Q)`` in the memory format of ``x``.

    Accuracy: each output is one chain of float32 FMAs (float64 for float64 input) over the
    filter's L nonzeros, so the error is at most ``L * eps * conv(|x|, |W|)``; the result is bitwise
    the same at any thread count. Cost: ``2 * nnz * N * P * Q`` FLOPs. On the CPU, scratch and
    output stay within 1.2 times input and output (32 KB a thread for the smallest), and a weight
    called again is kept in kernel order: 8 bytes per nonzero, 512 MiB in all.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match.
    """
    kernel_size = weight.shape[2:] if isinstance(weight, CSRWeight) else (1, 1)
    geometry = geometry_of(_OP, x, kernel_size, stride, padding, dilation)
    return run_csr_conv2d(x, weight, bias, residual, geometry, groups, activation)


def run_csr_conv2d(
    x: Tensor,
    weight: CSRWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    groups: int,
    activation: str,
) -> Tensor:
    """`csr_conv2d` with its geometry already checked.

    Python and dispatcher take 18 us of a call in a warm loop, 50 to 110 behind another layer that
    has emptied the caches.
    """
    if autocast_is_on(x):
        x, weight, bias, residual = autocast(x, weight, bias, residual)
    checked = (x, weight, bias, residual, geometry, groups, activation)
    is_plain = (
        is_eager(x)
        and isinstance(weight, CSRWeight)
        and x.dim() == 4
        # What the op cannot know, and what decides which implementation sees the arguments.
        and x.shape[1] == weight.shape[1] * groups
        and weight.values.device == weight.col_idx.device == weight.row_ptr.device == x.device
        and (bias is None or bias.device == x.device)
        and (residual is None or residual.device == x.device)
    )
    if not is_plain:
        _check(*checked)
    arguments = (
        x, weight.values, weight.col_idx, weight.row_ptr, bias, residual, *geometry, groups,
        activation,
    )  # fmt: skip
    return run_op(CSR_CONV2D, arguments, _check, checked, is_plain)


def csr_linear(
    x: Tensor, weight: CSRWeight, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """Linear layer with a sparse weight: ``act(x W^T + bias)`` through ``csr_conv2d``.

    The rows of ``x`` are the pixels of a channels_last 1x1 convolution.

    Args:
        x: ``(..., I)``.
        weight: shape ``(O, I, 1, 1)``.
        bias: ``(O,)``.
        activation: as in ``csr_conv2d``.

    Returns:
        ``(..., O)``.

    Raises:
        ValueError: ``x`` has another number of features than the weight; else as ``csr_conv2d``.
        TypeError: as ``csr_conv2d``.
    """
    o, i = weight.shape[:2]
    if x.dim() < 1 or x.shape[-1] != i:
        raise ValueError(f"csr_linear: expected x of shape (..., {i}), got {tuple(x.shape)}")
    rows = x.reshape(-1, i)
    if rows.shape[0] == 0:
        # No pixel for the kernel; the dense product keeps the graph and costs only unpacking.
        dense = weight.to_dense().reshape(o, i)
        return torch.nn.functional.linear(x, dense, bias)
    image = rows[None, None].permute(0, 3, 1, 2)
    y = csr_conv2d(image, weight, bias, activation=activation)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], o)


@torch.library.register_fake("sparsecnn::csr_conv2d")
def _fake(
    x: Tensor,
    values: Tensor,
    col_idx: Tensor,
    row_ptr: Tensor,
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
        values.shape[0] == col_idx.shape[0],
        lambda: (
            f"{_OP}: expected values and col_idx of one length, got {values.shape[0]} and "
            f"{col_idx.shape[0]}"
        ),
    )
    return fake_output(x, row_ptr.shape[0] - 1, kernel_size, stride, padding, dilation)


@torch.library.register_fake("sparsecnn::csr_conv2d_grad_values")
def _fake_grad_values(
    grad_y: Tensor,
    x: Tensor,
    col_idx: Tensor,
    row_ptr: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return x.new_empty(col_idx.shape)


@register_flop_formula(torch.ops.sparsecnn.csr_conv2d)
def _flops(x_shape: Any, values_shape: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    n, _, p, q = out_shape
    return int(2 * values_shape[0] * n * p * q)


@register_flop_formula(torch.ops.sparsecnn.csr_conv2d_grad_values)
def _flops_grad_values(
    grad_y_shape: Any,
    x_shape: Any,
    col_idx_shape: Any,
    *args: Any,
    out_shape: Any = None,
    **kw: Any,
) -> int:
    n, _, p, q = grad_y_shape
    return int(2 * col_idx_shape[0] * n * p * q)


# A direct call of the op casts to the default of its device; csr_conv2d to the dtype in force.
torch.library.register_autocast("sparsecnn::csr_conv2d", "cpu", torch.bfloat16)


def _grad_input(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    col_idx: Tensor,
    row_ptr: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Gradient for x: a stride-1 csr_conv2d of the zero-stuffed gradient with the transpose."""
    (_, c, h, w), (n, k, p, q) = x.shape, grad.shape
    permutation, col_t, row_t = transpose_indices(
        col_idx, row_ptr, c // groups, kernel_size, groups
    )
    if stride != [1, 1]:
        up = grad.new_zeros((n, k, (p - 1) * stride[0] + 1, (q - 1) * stride[1] + 1))
        if not grad.is_contiguous():
            up = up.contiguous(memory_format=torch.channels_last)
        up[:, :, :: stride[0], :: stride[1]] = grad
        grad = up
    reach = [dilation[0] * (kernel_size[0] - 1), dilation[1] * (kernel_size[1] - 1)]
    top, left = reach[0] - padding[0], reach[1] - padding[2]
    pads = [
        top, h - grad.shape[2] - top + reach[0],
        left, w - grad.shape[3] - left + reach[1],
    ]  # fmt: skip
    out: Tensor = CSR_CONV2D(
        grad,
        values[permutation],
        col_t,
        row_t,
        None,
        None,
        kernel_size,
        [1, 1],
        pads,
        dilation,
        groups,
        "none",
    )
    return out


def _grad_conv(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    col_idx: Tensor,
    row_ptr: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    *geometry, need = rest
    grad_x = _grad_input(grad, x, values, col_idx, row_ptr, *geometry) if need[0] else None
    grad_values = None
    if need[1]:
        grad_values = torch.ops.sparsecnn.csr_conv2d_grad_values.default(
            grad, x, col_idx, row_ptr, *geometry
        )
    return grad_x, grad_values, None, None


def _setup_grad_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_y, x, col_idx, row_ptr, *geometry = inputs
    ctx.save_for_backward(grad_y, x, col_idx, row_ptr)
    ctx.geometry = geometry


def _backward_grad_values(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    grad_y, x, col_idx, row_ptr = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad_grad_y = None
    if need[0]:
        grad_grad_y = CSR_CONV2D(
            x, g, col_idx, row_ptr, None, None, *ctx.geometry, "none"
        )
    grad_x = _grad_input(grad_y, x, g, col_idx, row_ptr, *ctx.geometry) if need[1] else None
    return grad_grad_y, grad_x, *([None] * 7)


register_fused(CSR_CONV2D, 3, _grad_conv)
torch.library.register_autograd(
    "sparsecnn::csr_conv2d_grad_values", _backward_grad_values, setup_context=_setup_grad_values
)
