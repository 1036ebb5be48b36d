"""Dense convolution with its activation: a conv, BN and activation that stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn.nn._common import check_activation, inherit


def activate_(y: Tensor, activation: str) -> Tensor:
    """Apply an activation in place where autograd allows it."""
    if activation == "none":
        return y
    inplace = not (torch.is_grad_enabled() and y.requires_grad)
    if activation == "relu":
        return F.relu(y, inplace=inplace)
    if activation == "relu6":
        return F.relu6(y, inplace=inplace)
    if activation == "silu":
        return F.silu(y, inplace=inplace)
    return F.hardswish(y, inplace=inplace)


def covers(conv: nn.Conv2d, shape: Sequence[int]) -> bool:
    """Whether the filters, larger than 1x1, are as large as an input ``(N, C, H, W)``, unpadded."""
    size = conv.kernel_size
    return (
        len(shape) == 4
        and size[0] * size[1] > 1
        and tuple(shape[2:]) == size
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
    )


class FusedConv2d(nn.Conv2d):
    """``nn.Conv2d`` followed by an activation, in one module: ``y = act(conv(x) + residual)``.

    Same arguments and parameters as ``nn.Conv2d``; ``activation`` is one of ``none``, ``relu``,
    ``relu6``, ``silu``, ``hardswish``. A filter that covers its whole input, as in VGG's first
    fully connected layer written as a convolution, is computed as ``F.linear``: on the CPU the
    framework's convolution is 15 times slower there (512 > 4096 channels, 7x7: 354 ms against 24).
    """

    def __init__(self, *args: Any, activation: str = "none", **kwargs: Any) -> None:
        check_activation("FusedConv2d", activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, activation: str = "none") -> FusedConv2d:
        """Take over a convolution: its parameters are shared, hooks and flags kept."""
        check_activation("FusedConv2d", activation)
        self = cls.__new__(cls)
        self.__dict__.update(conv.__dict__)
        self._parameters = conv._parameters.copy()
        self._buffers = conv._buffers.copy()
        self._modules = conv._modules.copy()
        inherit(self, conv)
        self.activation = activation
        return self

    def to_dense(self) -> nn.Conv2d:
        """The plain convolution, sharing the parameters; the activation is not in it."""
        conv = nn.Conv2d.__new__(nn.Conv2d)
        conv.__dict__.update({k: v for k, v in self.__dict__.items() if k != "activation"})
        conv._parameters = self._parameters.copy()
        conv._buffers = self._buffers.copy()
        conv._modules = self._modules.copy()
        inherit(conv, self)
        return conv

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, P, Q)``; ``residual`` is like the output."""
        y = self._as_linear(x) if covers(self, x.shape) else super().forward(x)
        if residual is not None:
            y = y + residual if y.requires_grad else y.add_(residual)
        return activate_(y, self.activation)

    def _as_linear(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not weight.is_contiguous():  # channels_last: the order in which it lies is as good
            x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
        return F.linear(x.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]

    def extra_repr(self) -> str:
        """Arguments of the convolution, then the activation."""
        conv: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{conv}, activation={self.activation}"
