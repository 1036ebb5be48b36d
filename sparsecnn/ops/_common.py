"""What the ops share beside their checks: dtypes, autocast, fake outputs, slopes of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecnn.ops._check import out_extent

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtypes_for(x: object) -> tuple[torch.dtype, ...]:
    """The dtypes of x that the kernels of its device take."""
    return CUDA_DTYPES if isinstance(x, Tensor) and x.is_cuda else CPU_DTYPES


def is_eager(x: object) -> bool:
    """Whether an op's own checks will see x: a real tensor outside any tracing."""
    return type(x) is Tensor and (x.is_cpu or x.is_cuda) and not torch.compiler.is_compiling()


def autocast_is_on(x: object) -> bool:
    """Whether autocast applies to the device of x."""
    if not isinstance(x, Tensor):
        return False
    kind = x.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def autocast_to(x: Tensor) -> Callable[[Any], Any]:
    """A function that casts to the autocast dtype in force on the device of x.

    Floating-point tensors but float64 are cast, everything else is returned as it is.
    """
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return cast


def fake_output(
    x: Tensor,
    k: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """An uninitialised ``(N, K, P, Q)`` in the memory format an op gives its output."""
    n, _, h, w = x.shape
    p = out_extent(h, padding[0], padding[1], dilation[0], kernel_size[0], stride[0])
    q = out_extent(w, padding[2], padding[3], dilation[1], kernel_size[1], stride[1])
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (n, k, p, q),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def activation_slope(activation: str, y: Tensor, z: Tensor | None) -> Tensor:
    """Derivative of the activation, from its output y (relu, relu6) or its input z."""
    if activation == "relu":
        return (y > 0).to(y.dtype)
    if activation == "relu6":
        return ((y > 0) & (y < 6)).to(y.dtype)
    assert z is not None
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    slope = torch.where(z < -3, torch.zeros_like(z), z / 3 + 0.5)
    return torch.where(z > 3, torch.ones_like(z), slope)
