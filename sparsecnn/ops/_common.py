"""What the ops share beside their checks: dtypes, geometry, autocast, the call, fake outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsecnn.formats._packed import PackedWeight
from sparsecnn.ops._check import Geometry, conv_geometry, out_extent

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The way a kernel of torch calls itself where nothing is to be recorded.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_transform = torch._C._functorch.peek_interpreter_stack  # of torch.func, None outside of all
_autocast_anywhere = torch._C._is_any_autocast_enabled
_plain_geometry = functools.lru_cache(maxsize=1024)(conv_geometry)


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


def autocast(x: Tensor, *others: Any) -> list[Any]:
    """All of them in the autocast dtype in force on the device of x.

    Floating-point tensors but float64 are cast, also the values of a packed weight and the items of
    a list; everything else is returned as it is.
    """
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        if isinstance(t, Tensor):
            return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
        if isinstance(t, list):
            return [cast(item) for item in t]
        if isinstance(t, PackedWeight):
            return replace(t, values=cast(t.values))  # type: ignore[type-var]
        return t

    return [cast(t) for t in (x, *others)]


def geometry_of(
    op: str,
    x: object,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> Geometry:
    """`conv_geometry`, looked up where an eager call gives plain ints."""
    # Exact ints only: to a cache 1.0 is 1, but it must be refused.
    if (
        type(stride) is int
        and type(padding) is int
        and type(dilation) is int
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
    ):
        return _plain_geometry(op, kernel_size, stride, padding, dilation)
    return conv_geometry(op, kernel_size, stride, padding, dilation)


def run_op(
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    check: Callable[..., None],
    checked: tuple[Any, ...],
    is_plain: bool,
) -> Tensor:
    """``op(*arguments)``; where the op refuses, ``check(*checked)``, which says better why.

    Args:
        op: the overload.
        arguments: all of the op.
        check: the full checks. They need not run first where the op's own ones see all arguments.
        checked: arguments of ``check``.
        is_plain: the tensors are real ones outside of any tracing. A call that nothing records then
            does not visit the autograd kernel, which is Python and costs as much as the rest.
    """
    try:
        if is_plain and _records_nothing(arguments):
            with _below_autograd():
                y: Tensor = op(*arguments)
        else:
            y = op(*arguments)
        return y
    except (RuntimeError, TypeError):
        check(*checked)
        raise


def is_plain_inference() -> bool:
    """Whether neither compilation, a tape, autocast nor a transform of ``torch.func`` looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or _autocast_anywhere()
        or _transform() is not None
    )


def try_quick(
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    needed: Sequence[Tensor | None],
    optional: Sequence[Tensor | None],
) -> Tensor | None:
    """``op(*arguments)`` for a layer in a plain inference call on the CPU, else None.

    The way of `run_op` costs a layer some 10 us of Python in a warm loop and several times that
    behind a layer that has emptied the caches. This is the part of it that such a call needs. None
    also where the op refuses: the full way says better why.

    Args:
        op: the overload.
        arguments: all of the op; the first is an input with the channels of the layer.
        needed: tensors of the layer among them; None where one is no parameter or buffer.
        optional: bias and residual.
    """
    x = arguments[0]
    if type(x) is not Tensor or not x.is_cpu or not is_plain_inference():
        return None
    # Which implementation sees the arguments is decided by all of them.
    for t in needed:
        if t is None or not t.is_cpu:
            return None
    for t in optional:
        if t is not None and not t.is_cpu:
            return None
    try:
        with _below_autograd():
            y: Tensor = op(*arguments)
    except (RuntimeError, TypeError):
        return None
    return y


def _records_nothing(arguments: tuple[Any, ...]) -> bool:
    """Whether neither a tape nor a transform of ``torch.func`` looks on."""
    if torch.is_grad_enabled():
        for a in arguments:
            for t in a if type(a) is list else (a,):
                if isinstance(t, Tensor) and t.requires_grad:
                    return False
    return _transform() is None


def fake_output(
    x: Tensor,
    k: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """An uninitialised ``(N, K, P, Q)`` in the memory format an op gives its output."""
    p = out_extent(x.shape[2], padding[0], padding[1], dilation[0], kernel_size[0], stride[0])
    q = out_extent(x.shape[3], padding[2], padding[3], dilation[1], kernel_size[1], stride[1])
    return fake_image(x, k, p, q)


def fake_image(x: Tensor, k: Any, p: Any, q: Any) -> Tensor:
    """`fake_output` of a known size."""
    return torch.empty(
        (x.shape[0], k, p, q), dtype=x.dtype, device=x.device, memory_format=output_format(x)
    )


def output_format(x: Tensor) -> torch.memory_format:
    """The memory format that an op gives its output, and brings other images into."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
