"""``DepthwiseConv2d``: a drop-in for a depthwise ``nn.Conv2d``, with activation and residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecnn.nn._common import ConvDropIn
from sparsecnn.ops._common import try_quick
from sparsecnn.ops.depthwise_conv2d import DEPTHWISE_CONV2D, run_depthwise_conv2d


class DepthwiseConv2d(ConvDropIn):
    """``nn.Conv2d`` with ``groups = in_channels``, and a fused activation and residual.

    The arguments are those of ``nn.Conv2d`` and all are honoured; ``out_channels`` is a multiple of
    ``in_channels``. Parameters and state dict are those of ``nn.Conv2d``: either loads the other's.

    Raises:
        ValueError: ``groups`` differs from ``in_channels``.
    """

    weight: nn.Parameter

    def _pack(self, conv: nn.Conv2d) -> None:
        if conv.groups != conv.in_channels:
            raise ValueError(
                f"DepthwiseConv2d: expected groups = in_channels = {conv.in_channels}, "
                f"got {conv.groups}"
            )
        weight = conv.weight
        if not isinstance(weight, nn.Parameter):  # a mask or a parametrization computes it
            weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        self.register_parameter("weight", weight)

    def _dense_weight(self) -> Tensor:
        return self.weight.detach().clone(memory_format=torch.preserve_format)

    def _weight_requires_grad(self) -> bool:
        return self.weight.requires_grad

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        # The op would take fewer channels for more filters a channel.
        if x.dim() == 4 and x.shape[1] != self.in_channels:
            raise ValueError(
                f"DepthwiseConv2d: expected x with {self.in_channels} channels, "
                f"got {tuple(x.shape)}"
            )
        own = self._parameters
        if "weight" in own and "bias" in own:  # else computed: parametrized, pruned
            weight, ends = (own["weight"],), (own["bias"], residual)
            arguments = (x, *weight, *ends, *self._geometry[1:], self.activation)
            y = try_quick(DEPTHWISE_CONV2D, arguments, weight, ends)
            if y is not None:
                return y
        return run_depthwise_conv2d(
            x, self.weight, self.bias, residual, self._geometry, self.activation
        )
