"""``chain_conv2d``: dense and depthwise convolutions in a row, intermediates kept in the cache.

``y = act_n(W_n * ... act_1(W_1 * x + b_1) ... + b_n + residual)``: separable convolutions (Howard
et al., "MobileNets", 2017), inverted residuals (Sandler et al., "MobileNetV2", CVPR 2018), Tucker-2
(Kim et al., ICLR 2016), CP (Lebedev et al., ICLR 2015) and kx1 > 1xk factorizations (Jaderberg et
al., BMVC 2014). The cost is the sum of the stages' FLOPs; the bytes moved are those of the input,
the weights and the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

import sparsecnn._library  # noqa: F401  (defines torch.ops.sparsecnn)
from sparsecnn.formats.chain import MAX_STAGES, ChainGeometry, ChainStage
from sparsecnn.ops._autograd import activation_slope, grad_dense, pad_unlike
from sparsecnn.ops._check import check_conv, conv_geometry, out_extent
from sparsecnn.ops._common import autocast, autocast_is_on, dtypes_for, fake_image, is_eager, run_op

_OP = "chain_conv2d"
CHAIN_CONV2D = torch.ops.sparsecnn.chain_conv2d.default


def check_stage(op: str, weight_shape: Sequence[int], groups: int) -> None:
    """Refuse by name a stage that the kernel has no form for.

    Raises:
        NotImplementedError: grouped but not depthwise, a channel multiplier, or no channels.
    """
    k, cg = weight_shape[:2]
    if groups != 1 and not (cg == 1 and k == groups):
        raise NotImplementedError(
            f"{op}: expected every stage dense (groups 1) or depthwise (groups = C = K), got "
            f"groups {groups} with C = {cg * groups} and K = {k}"
        )
    if k < 1 or cg < 1:
        raise NotImplementedError(
            f"{op}: expected stages with channels, got weight {tuple(weight_shape)}"
        )


def check_stages(stages: Sequence[ChainStage]) -> list[ChainStage]:
    """Check the options of the stages and normalise them; tensors are checked with x.

    Raises:
        TypeError: a stage that is no ``ChainStage`` or a weight that is no tensor.
        ValueError: no stage or too many, or an option that is not legal.
        NotImplementedError: a stage that the kernel has no form for.
    """
    if not 1 <= len(stages) <= MAX_STAGES:
        raise ValueError(f"{_OP}: expected 1 to {MAX_STAGES} stages, got {len(stages)}")
    checked = []
    for stage in stages:
        if not isinstance(stage, ChainStage):
            raise TypeError(f"{_OP}: expected stages of ChainStage, got {type(stage).__name__}")
        if not isinstance(stage.weight, Tensor) or stage.weight.dim() != 4:
            got = (
                tuple(stage.weight.shape)
                if isinstance(stage.weight, Tensor)
                else type(stage.weight).__name__
            )
            raise ValueError(f"{_OP}: expected weights of shape (K, C/G, R, S), got {got}")
        shape = stage.weight.shape
        _, stride, padding, dilation = conv_geometry(
            _OP, shape[2:], stage.stride, stage.padding, stage.dilation
        )
        check_stage(_OP, shape, stage.groups)
        if "," in stage.activation:
            raise ValueError(f"{_OP}: expected one activation, got {stage.activation!r}")
        checked.append(
            ChainStage(
                stage.weight, stage.bias, (stride[0], stride[1]),
                (padding[0], padding[1], padding[2], padding[3]), (dilation[0], dilation[1]),
                stage.groups, stage.activation,
            )
        )  # fmt: skip
    return checked


def chain_conv2d(
    x: Tensor, stages: Sequence[ChainStage], *, residual: Tensor | None = None
) -> Tensor:
    """Convolutions in a row without storing what lies between them.

    ``y = act_n(W_n * ... act_1(W_1 * x + b_1) ... + b_n + residual)``.

    Args:
        x: ``(N, C, H, W)``, contiguous or channels_last; another layout is copied first. float32,
            bfloat16 or float64 on the CPU; float32, float16 or bfloat16 on CUDA.
        stages: 1 to 8; each dense (groups 1, any filter) or depthwise (groups = C = K), any
            stride, padding and dilation. Weights in the order of `formats.chain.channels_innermost`
            are read in place, others are copied by every call.
        residual: like the output, added before the last activation; for a MobileNetV2 block x.

    Returns:
        ``(N, K, P, Q)`` of the last stage in the memory format of ``x``.

    Accuracy: intermediates stay in float32 for bfloat16 input. Each sum is one chain of FMAs over
    (r, s, c), bitwise the same at any thread count; the error of a stage is that of a convolution
    of L = C/G * R * S terms, and errors of earlier stages pass through the later ones. On CUDA the
    dense stages of float16 and bfloat16 go through the tensor cores, which see the intermediates
    with all 24 bits, in three parts; float32 never does. Cost: ``2 * N * P * Q * K * C/G * R * S``
    FLOPs per stage, and where threads or blocks share one image the rows and columns where their
    shares overlap once more. Scratch: up to about 1 MB a thread on the CPU; on CUDA shared memory,
    and for a chain of which no tile fits there float32 intermediates in device memory. The backward
    computes all intermediates again with the framework's convolutions and keeps them until it ends:
    about the cost of training the plain sequence plus one forward.

    Raises:
        ValueError: a shape, device or option that does not fit; names it and the value.
        TypeError: a dtype that is not supported or does not match.
        NotImplementedError: a stage that is grouped but not depthwise.
    """
    checked = check_stages(stages)
    return run_chain_conv2d(
        x,
        [s.weight for s in checked],
        [s.bias for s in checked],
        residual,
        ChainGeometry.of(checked),
    )


def run_chain_conv2d(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    residual: Tensor | None,
    geometry: ChainGeometry,
) -> Tensor:
    """`chain_conv2d` with its options already checked."""
    if autocast_is_on(x):
        x, weights, biases, residual = autocast(x, weights, biases, residual)
    checked = (x, weights, biases, residual, geometry)
    is_plain = is_eager(x) and x.is_cpu and x.dim() == 4 and _on_cpu(*weights, *biases, residual)
    if not is_plain:
        _check(*checked)
    arguments = op_arguments(x, weights, biases, residual, geometry)
    return run_op(CHAIN_CONV2D, arguments, _check, checked, is_plain)


def op_arguments(
    x: Tensor,
    weights: list[Any],
    biases: list[Any],
    residual: Tensor | None,
    geometry: ChainGeometry,
) -> tuple[Any, ...]:
    """What the op takes."""
    return (
        x, weights, [b for b in biases if b is not None], residual,
        [int(b is not None) for b in biases], geometry.stride, geometry.padding,
        geometry.dilation, geometry.groups, geometry.activations,
    )  # fmt: skip


def _on_cpu(*tensors: Any) -> bool:
    """Whether the CPU implementation will see them."""
    for t in tensors:
        if t is not None and not (isinstance(t, Tensor) and t.is_cpu):
            return False
    return True


def _check(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    residual: Tensor | None,
    geometry: ChainGeometry,
) -> None:
    names = geometry.activations.split(",")
    image = x
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        options = (
            list(weight.shape[2:]),
            geometry.stride[2 * i : 2 * i + 2],
            geometry.padding[4 * i : 4 * i + 4],
            geometry.dilation[2 * i : 2 * i + 2],
        )
        check_conv(
            f"{_OP}: stage {i}", image, weight.shape, {"dense": weight}, bias,
            residual if i == len(weights) - 1 else None, options, geometry.groups[i], names[i],
            dtypes_for(x),
        )  # fmt: skip
        image = _meta_output(image, weight, options)


def _meta_output(x: Tensor, weight: Tensor, options: Any) -> Tensor:
    """A stage's output without memory, on the device of x so that checks compare devices."""
    kernel, stride, padding, dilation = options
    p = out_extent(x.shape[2], padding[0], padding[1], dilation[0], kernel[0], stride[0])
    q = out_extent(x.shape[3], padding[2], padding[3], dilation[1], kernel[1], stride[1])
    return x.new_empty(()).expand(x.shape[0], weight.shape[0], p, q)


@torch.library.register_fake("sparsecnn::chain_conv2d")
def _fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None,
    has_bias: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: list[int],
    activations: str,
) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"{_OP}: expected x of shape (N, C, H, W), got {x.shape}")
    h, w = x.shape[2:]
    for i, weight in enumerate(weights):
        r, s = weight.shape[2:]
        pads, steps, dil = padding[4 * i : 4 * i + 4], stride[2 * i :], dilation[2 * i :]
        h = out_extent(h, pads[0], pads[1], dil[0], r, steps[0])
        w = out_extent(w, pads[2], pads[3], dil[1], s, steps[1])
    return fake_image(x, weights[-1].shape[0], h, w)


@register_flop_formula(torch.ops.sparsecnn.chain_conv2d)
def _flops(
    x_shape: Any,
    weight_shapes: Any,
    bias_shapes: Any,
    residual_shape: Any,
    has_bias: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *args: Any,
    out_shape: Any = None,
    **kw: Any,
) -> int:
    n, _, h, w = x_shape
    total = 0
    for i, shape in enumerate(weight_shapes):
        pads = padding[4 * i : 4 * i + 4]
        h = out_extent(h, pads[0], pads[1], dilation[2 * i], shape[2], stride[2 * i])
        w = out_extent(w, pads[2], pads[3], dilation[2 * i + 1], shape[3], stride[2 * i + 1])
        total += 2 * n * h * w * math.prod(shape)
    return total


# A direct call of the op casts to the default of its device; chain_conv2d to the dtype in force.
torch.library.register_autocast("sparsecnn::chain_conv2d", "cpu", torch.bfloat16)


def activate(y: Tensor, activation: str) -> Tensor:
    """An activation of `ACTIVATIONS` by the framework, not in place."""
    if activation == "none":
        return y
    if activation == "relu":
        return F.relu(y)
    if activation == "relu6":
        return F.relu6(y)
    return F.silu(y) if activation == "silu" else F.hardswish(y)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, residual, *options = inputs
    # The residual is needed for the slope of the last activation alone.
    ctx.stages, ctx.options = len(weights), options
    ctx.save_for_backward(x, residual, *weights, *biases)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, residual, *tensors = ctx.saved_tensors
    has_bias, stride, padding, dilation, groups, activations = ctx.options
    weights, present = tensors[: ctx.stages], iter(tensors[ctx.stages :])
    biases = [next(present) if has else None for has in has_bias]
    names = activations.split(",")
    options = [
        (stride[2 * i : 2 * i + 2], padding[4 * i : 4 * i + 4], dilation[2 * i : 2 * i + 2])
        for i in range(ctx.stages)
    ]
    inputs, sums = [], []  # of each stage: what it convolved, what it activated
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        steps, pads, dil = options[i]
        padded, alike = pad_unlike(x, pads)
        z = torch.ops.aten.convolution.default(
            padded, weight, bias, steps, alike, dil, False, [0, 0], groups[i]
        )
        if i == ctx.stages - 1 and residual is not None:
            z = z + residual
        inputs.append(x)
        sums.append(z)
        x = activate(z, names[i])
    grad_residual = None
    grad_weights: list[Tensor | None] = [None] * ctx.stages
    grad_biases: list[Tensor | None] = []
    for i in reversed(range(ctx.stages)):
        if names[i] != "none":
            grad = grad * activation_slope(names[i], sums[i], sums[i])
        if i == ctx.stages - 1 and residual is not None:
            grad_residual = grad
        if has_bias[i]:
            grad_biases.insert(0, grad.sum((0, 2, 3)))
        grad_x, grad_weights[i] = grad_dense(
            grad, inputs[i], weights[i], *options[i], groups[i], (True, True)
        )
        assert grad_x is not None
        grad = grad_x
    return grad, grad_weights, grad_biases, grad_residual, *([None] * 6)


torch.library.register_autograd("sparsecnn::chain_conv2d", _backward, setup_context=_setup)
