"""``PointwiseConv2d``: a dense 1x1 convolution with a fused activation and residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecnn.nn._common import ChannelsInnermost, ConvDropIn
from sparsecnn.ops._common import try_quick
from sparsecnn.ops.pointwise_conv2d import POINTWISE_CONV2D, run_pointwise_conv2d


class PointwiseConv2d(ChannelsInnermost, ConvDropIn):
    """``nn.Conv2d`` of kernel size 1, without padding or groups, fused with its activation.

    The arguments are those of ``nn.Conv2d``; a kernel other than 1x1, padding and groups are
    refused by name. State dict: ``weight`` and ``bias`` as in ``nn.Conv2d``; the weight keeps its
    output channels innermost in memory, whatever is loaded into it.
    """

    def _pack(self, conv: nn.Conv2d) -> None:
        name = type(self).__name__
        if tuple(conv.kernel_size) != (1, 1):
            raise NotImplementedError(
                f"{name}: expected kernel_size 1, got {tuple(conv.kernel_size)}"
            )
        if conv.groups != 1:
            raise NotImplementedError(f"{name}: expected groups 1, got {conv.groups}")
        if any(conv._reversed_padding_repeated_twice):
            raise NotImplementedError(f"{name}: expected padding 0, got {conv.padding!r}")
        self._take_weight(conv)

    def _dense_weight(self) -> Tensor:
        return self.weight.detach().clone(memory_format=torch.contiguous_format)

    def _weight_requires_grad(self) -> bool:
        return self.weight.requires_grad

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        own = self._parameters
        if "weight" in own and "bias" in own:  # else computed: parametrized, pruned
            weight, ends = (own["weight"],), (own["bias"], residual)
            arguments = (x, *weight, *ends, self._geometry[1], self.activation)
            y = try_quick(POINTWISE_CONV2D, arguments, weight, ends)
            if y is not None:
                return y
        return run_pointwise_conv2d(
            x, self.weight, self.bias, residual, self._geometry[1], self.activation
        )
