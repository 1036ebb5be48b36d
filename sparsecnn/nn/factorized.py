"""``FactorizedConv2d`` and ``FactorizedLinear``: a layer as smaller layers in a row.

They are ordinary layers in an ``nn.Sequential``: they train, trace and export like any other, and
`sparsecnn.accelerate` fuses them into one `ChainConv2d` where that measures faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn.nn._common import inherit
from sparsecnn.nn.chain import ChainConv2d


class PermuteChannels(nn.Module):
    """``y[:, i] = x[:, index[i]]``.

    Args:
        channels: of input and output; `index` is the identity at first.
    """

    index: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"PermuteChannels: expected channels >= 1, got {channels}")
        self.channels = channels
        self.register_buffer("index", torch.arange(channels))

    @classmethod
    def of(cls, index: Tensor) -> PermuteChannels:
        """The layer of a permutation.

        Raises:
            ValueError: `index` is no permutation of 0 to its length.
        """
        if index.dim() != 1 or not torch.equal(
            index.sort().values.cpu(), torch.arange(len(index))
        ):
            raise ValueError(
                f"PermuteChannels: expected index a permutation, got shape {tuple(index.shape)}"
            )
        self = cls(len(index))
        self.index = index.to(torch.int64)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{self.channels}"


class FactorizedConv2d(nn.Sequential):
    """A convolution as convolutions in a row, without an activation between them.

    ``W[k, c] = (stage_n * ... * stage_1)[k, c]``, a full convolution of the stages' kernels. The
    bias is the last stage's; a convolution along one axis carries that axis' stride, padding and
    dilation. Made by `sparsecnn.factorize`.

    State dict: that of the stages, ``<i>.weight`` and ``<i>.bias``.

    Args:
        stages: ``nn.Conv2d`` and `PermuteChannels`.
        method: that made the factors.
        ranks: of the factors.
        groups: of the convolution that the stages stand for.
    """

    def __init__(
        self,
        *stages: nn.Module,
        method: str = "",
        ranks: Sequence[int] = (),
        groups: int = 1,
    ) -> None:
        super().__init__(*stages)
        self.method = method
        self.ranks = tuple(ranks)
        self.groups = groups

    def _convs(self) -> Iterator[nn.Conv2d]:
        for stage in self:
            if isinstance(stage, nn.Conv2d):
                yield stage

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The kernel (K, C/G, R, S) of the one convolution that computes the same.

        Cost: the stages applied to C one-pixel images.
        """
        first = next(self._convs())
        # Image c is an impulse in channel c, so what comes out is column c of the kernel.
        y = torch.eye(first.in_channels, dtype=first.weight.dtype, device=first.weight.device)
        y = y[:, :, None, None]
        for stage in self:
            if isinstance(stage, nn.Conv2d):
                pads = [k - 1 for k in stage.kernel_size]
                # conv2d correlates: turned kernels and full padding make it a convolution.
                y = F.conv2d(
                    y, stage.weight.flip(2, 3), None, 1, (pads[0], pads[1]), 1, stage.groups
                )
            else:
                y = stage(y)
        weight = y.transpose(0, 1)
        per_group = weight.shape[1] // self.groups
        blocks = [
            rows[:, g * per_group : (g + 1) * per_group]
            for g, rows in enumerate(weight.chunk(self.groups))
        ]
        return torch.cat(blocks).contiguous()

    def to_dense(self) -> nn.Conv2d:
        """The one convolution that computes the same, with this layer's flags and hooks."""
        convs = list(self._convs())
        weight = self.dense_weight()
        stride, padding, dilation = [1, 1], [0, 0], [1, 1]
        same = any(conv.padding == "same" for conv in convs)
        mode: Any = "zeros"
        for conv in convs:
            for axis in (0, 1):
                stride[axis] *= conv.stride[axis]
                dilation[axis] = max(dilation[axis], conv.dilation[axis])
                if not isinstance(conv.padding, str):
                    padding[axis] += conv.padding[axis]
            if isinstance(conv.padding, str) or any(conv.padding):
                mode = conv.padding_mode
        last = convs[-1]
        pads: Any = "same" if same else tuple(padding)
        dense = nn.Conv2d(
            convs[0].in_channels, last.out_channels, (weight.shape[2], weight.shape[3]),
            (stride[0], stride[1]), pads, (dilation[0], dilation[1]), self.groups,
            last.bias is not None, mode, "meta", weight.dtype,
        )  # fmt: skip
        dense.weight = nn.Parameter(weight)
        dense.bias = last.bias
        behind = list(self)[-1]
        if last.bias is not None and isinstance(behind, PermuteChannels):
            permuted = last.bias.detach()[behind.index]
            dense.bias = nn.Parameter(permuted, requires_grad=last.bias.requires_grad)
        inherit(dense, self)
        return dense

    def to_chain(self) -> ChainConv2d:
        """All stages as one kernel, sharing no weight.

        Raises:
            NotImplementedError: a stage that the kernel has no form for (grouped but not
                depthwise, a permutation, padding that is not zeros), by name.
        """
        return ChainConv2d.from_sequential(self)

    def extra_repr(self) -> str:
        """Method and ranks."""
        return f"method={self.method!r}, ranks={self.ranks}"


class FactorizedLinear(nn.Sequential):
    """A linear layer as linear layers in a row: ``W = W_n ... W_1``, the bias on the last.

    Args:
        stages: ``nn.Linear``.
        method: that made the factors.
        ranks: of the factors.
    """

    def __init__(
        self, *stages: nn.Module, method: str = "", ranks: Sequence[int] = ()
    ) -> None:
        super().__init__(*stages)
        self.method = method
        self.ranks = tuple(ranks)

    def _linears(self) -> Iterator[nn.Linear]:
        for stage in self:
            assert isinstance(stage, nn.Linear)
            yield stage

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The matrix (O, I) of the one linear layer that computes the same."""
        weights = [stage.weight for stage in self._linears()]
        product = weights[0]
        for weight in weights[1:]:
            product = weight @ product
        return product.clone()

    def to_dense(self) -> nn.Linear:
        """The one linear layer that computes the same, with this layer's flags and hooks."""
        weight = self.dense_weight()
        bias = list(self._linears())[-1].bias
        dense = nn.Linear(
            weight.shape[1], weight.shape[0], bias is not None, "meta", weight.dtype
        )
        dense.weight = nn.Parameter(weight)
        dense.bias = bias
        inherit(dense, self)
        return dense

    def extra_repr(self) -> str:
        """Method and ranks."""
        return f"method={self.method!r}, ranks={self.ranks}"
