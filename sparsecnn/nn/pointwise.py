"""``PointwiseConv2d``: a dense 1x1 convolution with a fused activation and residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sparsecnn.nn._common import ChannelsInnermost, ConvDropIn
from sparsecnn.ops._check import check_allow_tf32
from sparsecnn.ops._common import try_quick
from sparsecnn.ops.pointwise_conv2d import POINTWISE_CONV2D, run_pointwise_conv2d


class PointwiseConv2d(ChannelsInnermost, ConvDropIn):
    """``nn.Conv2d`` of kernel size 1, without padding or groups, fused with its activation.

    The arguments are those of ``nn.Conv2d``; a kernel other than 1x1, padding and groups are
    refused by name. ``allow_tf32`` lets float32 layers on CUDA round x and the weight to TF32, see
    ``ops.pointwise_conv2d``; it may be set at any time. State dict: ``weight`` and ``bias`` as in
    ``nn.Conv2d``; the weight keeps its output channels innermost in memory, whatever is loaded into
    it.
    """

    allow_tf32: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
        allow_tf32: bool = False,
    ) -> None:
        check_allow_tf32(type(self).__name__, allow_tf32)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype, activation=activation,
        )  # fmt: skip
        self.allow_tf32 = allow_tf32

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, *, activation: str = "none", allow_tf32: bool = False
    ) -> Self:
        """Take the place of a convolution: its weight, bias, flags and hooks.

        Masks of ``torch.nn.utils.prune`` and parametrizations are baked in.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``, or ``allow_tf32`` no bool.
        """
        return cls._made_of(conv, activation, allow_tf32=allow_tf32)

    def _pack(self, conv: nn.Conv2d, allow_tf32: bool = False) -> None:
        name = type(self).__name__
        check_allow_tf32(name, allow_tf32)
        self.allow_tf32 = allow_tf32
        if tuple(conv.kernel_size) != (1, 1):
            raise NotImplementedError(
                f"{name}: expected kernel_size 1, got {tuple(conv.kernel_size)}"
            )
        if conv.groups != 1:
            raise NotImplementedError(f"{name}: expected groups 1, got {conv.groups}")
        if any(conv._reversed_padding_repeated_twice):
            raise NotImplementedError(f"{name}: expected padding 0, got {conv.padding!r}")
        self._take_weight(conv)

    def _format_repr(self) -> str:
        return ", allow_tf32=True" if self.allow_tf32 else ""

    def _dense_weight(self) -> Tensor:
        return self.weight.detach().clone(memory_format=torch.contiguous_format)

    def _weight_requires_grad(self) -> bool:
        return self.weight.requires_grad

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        own = self._parameters
        if "weight" in own and "bias" in own:  # else computed: parametrized, pruned
            weight, ends = (own["weight"],), (own["bias"], residual)
            arguments = (x, *weight, *ends, self._geometry[1], self.activation, self.allow_tf32)
            y = try_quick(POINTWISE_CONV2D, arguments, weight, ends)
            if y is not None:
                return y
        return run_pointwise_conv2d(
            x, self.weight, self.bias, residual, self._geometry[1], self.activation,
            self.allow_tf32,
        )  # fmt: skip
