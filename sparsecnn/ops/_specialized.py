"""``csr_conv2d`` by code made for one weight: generated, compiled and loaded once, then called."""

from __future__ import annotations

import copy
import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.ops._check import ACTIVATIONS, Geometry, out_extent
from sparsecnn.ops._common import is_plain_inference, output_format
from sparsecnn.ops._csr_source import Source, Unsuitable, generate
from sparsecnn.ops._csr_tiles import plan
from sparsecnn.ops._cuda_driver import DriverError, Function
from sparsecnn.ops._nvrtc import NvrtcError, cubin_of

_KERNEL = "csr_conv2d_specialized"
_MAX_PLANS = 64


def launch_arguments(
    source: Source, shape: Sequence[int], channels_last: bool, padding: Sequence[int]
) -> ctypes.Structure:
    """What the kernel is told of an input's shape and memory format."""
    return plan(
        source.window, source.threads, source.cap, source.slabs, shape, source.filters, padding,
        channels_last,
    )  # fmt: skip


def set_tensors(
    args: ctypes.Structure,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    activation: str,
) -> None:
    """Fill in what changes from call to call."""
    args.x, args.y = x.data_ptr(), y.data_ptr()
    args.bias = None if bias is None else bias.data_ptr()
    args.residual = None if residual is None else residual.data_ptr()
    args.activation = ACTIVATIONS.index(activation)


def _architecture(device: torch.device) -> str:
    """The name that the compiler has for a device."""
    if device.type != "cuda":
        raise Unsuitable(f"expected the weight on a CUDA device, got {device}")
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


# Loaded kernels by hash of their code and device: equal weights share one.
_functions: dict[tuple[bytes, int], Function] = {}


def _loaded(cubin: bytes, source: Source, device: int) -> Function:
    key = hashlib.sha256(cubin).digest(), device
    if key not in _functions:
        _functions[key] = Function(cubin, _KERNEL, source.threads, source.smem_bytes, device)
    return _functions[key]


def _launcher(
    source: Source, architecture: str, device: torch.device
) -> tuple[Callable[[Any], None], str]:
    """Compile and load: what launches the kernel on the current stream, and a description."""
    try:
        cubin = cubin_of(source.text, architecture)
        function = _loaded(cubin, source, device.index)
    except (NvrtcError, DriverError) as error:
        raise Unsuitable(str(error)) from error

    def launch(args: Any) -> None:
        function.launch(args, args.work, torch.cuda.current_stream(device).cuda_stream)

    return launch, f"{architecture} cubin, {-(-len(cubin) // 1024)} KB"


class SpecializedConv:
    """The compiled form of one weight on one device, valid while the weight stays as it was.

    In-place changes of the weight's tensors are seen by their version counters, other tensors by
    their addresses; the originals are kept, so that no address is used twice. What torch does not
    count is not seen: a change through ``values.data``.
    """

    def __init__(self, weight: CSRWeight, geometry: Geometry, groups: int) -> None:
        """Generate, compile and load.

        Raises:
            Unsuitable: with the reason why the portable kernel has to do.
            ValueError: the weight is corrupt.
        """
        self.device = weight.values.device
        architecture = _architecture(self.device)
        self._arrays = tuple(
            t.detach() for t in (weight.values, weight.col_idx, weight.row_ptr)
        )
        if any(t.is_inference() for t in self._arrays):
            raise Unsuitable("expected a weight whose changes are counted, got inference tensors")
        self._seen = tuple(t._version for t in self._arrays)
        self._geometry, self._groups = copy.deepcopy(geometry), groups
        _, stride, _, dilation = geometry
        weight.validate()  # its columns become addresses
        source = generate(weight, stride, dilation, groups)
        self._launch, self.description = _launcher(source, architecture, self.device)
        self._source = replace(source, text="")  # megabytes
        self._plans: dict[tuple[object, ...], ctypes.Structure] = {}

    def matches(self, weight: CSRWeight, geometry: Geometry, groups: int) -> bool:
        """Whether the weight is still the one that was compiled."""
        arrays = (weight.values, weight.col_idx, weight.row_ptr)
        return (
            all(
                t.data_ptr() == own.data_ptr() and t.shape == own.shape and t.dtype == own.dtype
                for t, own in zip(arrays, self._arrays, strict=True)
            )
            and tuple(t._version for t in arrays) == self._seen
            and geometry == self._geometry
            and groups == self._groups
        )

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor | None:
        """The convolution, or None where the arguments are not plain ones that fit each other.

        Args:
            x: (N, C, H, W).
            bias: (K,).
            residual: like the output.
            activation: fused.
        """
        source = self._source
        if not self._takes(x) or activation not in ACTIVATIONS:
            return None
        kernel_size, stride, padding, dilation = self._geometry
        p, q = (
            out_extent(
                x.shape[2 + i], padding[2 * i], padding[2 * i + 1], dilation[i], kernel_size[i],
                stride[i],
            )
            for i in (0, 1)
        )  # fmt: skip
        shape = (x.shape[0], source.filters, p, q)
        if min(shape) < 1:
            return None
        if bias is not None and (not self._is_ours(bias) or bias.shape != shape[1:2]):
            return None
        if residual is not None and (not self._is_ours(residual) or residual.shape != shape):
            return None
        order = output_format(x)
        channels_last = order is torch.channels_last
        key = (*x.shape, channels_last)
        planned = self._plans.get(key)
        if planned is None:
            planned = launch_arguments(source, x.shape, channels_last, padding)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = planned
        args = type(planned).from_buffer_copy(planned)
        x = x.contiguous(memory_format=order)
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else residual.contiguous(memory_format=order)
        y = torch.empty(shape, dtype=x.dtype, device=self.device, memory_format=order)
        set_tensors(args, x, bias, residual, y, activation)
        self._launch(args)
        return y

    def _is_ours(self, t: Tensor) -> bool:
        return (
            type(t) in (Tensor, torch.nn.Parameter)
            and t.device == self.device
            and t.dtype == self._source.dtype
        )

    def _takes(self, x: Tensor) -> bool:
        source = self._source
        return (
            type(x) is Tensor
            and self._is_ours(x)
            and x.dim() == 4
            and x.shape[1] == source.channels * source.groups
        )


def is_plain_call() -> bool:
    """Whether nothing but the result is asked for: no tape, tracing, autocast or other mode.

    The op can be called under tracing and dispatch modes, which see it; this code they would not.
    """
    return (
        is_plain_inference()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )
