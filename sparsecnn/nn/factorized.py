"""``FactorizedConv2d`` and ``FactorizedLinear``: a layer as smaller layers in a row.

They are ordinary layers in an ``nn.Sequential``: they train, trace and export like any other, and
`sparsecnn.accelerate` fuses them into one `ChainConv2d` where that measures faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn.nn._common import inherit, own_bias
from sparsecnn.nn.chain import ChainConv2d


def is_permutation(index: Tensor) -> bool:
    """Whether a vector holds every integer from 0 to its length, as int64."""
    return (
        index.dim() == 1
        and index.dtype == torch.int64
        and torch.equal(index.sort().values.cpu(), torch.arange(len(index)))
    )


def _check_labels(layer: str, method: object, ranks: Sequence[int], groups: object) -> None:
    """Refuse labels that no file and no report could hold."""
    if not isinstance(method, str):
        raise TypeError(f"{layer}: expected method a name, got {type(method).__name__}")
    if any(type(r) is not int or r < 1 for r in ranks):
        raise ValueError(f"{layer}: expected ranks integers >= 1, got {tuple(ranks)!r:.80}")
    if type(groups) is not int or groups < 1:
        raise ValueError(f"{layer}: expected groups an integer >= 1, got {groups!r:.80}")


class PermuteChannels(nn.Module):
    """``y[:, i] = x[:, index[i]]``.

    Args:
        channels: of input and output; `index` is the identity at first.

    Raises:
        ValueError: channels no integer >= 1.
    """

    index: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if type(channels) is not int or channels < 1:
            raise ValueError(
                f"PermuteChannels: expected channels an integer >= 1, got {channels!r:.80}"
            )
        self.channels = channels
        self.register_buffer("index", torch.arange(channels))

    @classmethod
    def of(cls, index: Tensor) -> PermuteChannels:
        """The layer of a permutation.

        Raises:
            ValueError: `index` is no permutation of 0 to its length.
        """
        if not is_permutation(index):
            raise ValueError(
                f"PermuteChannels: expected index a permutation in int64, got {index.dtype} of "
                f"shape {tuple(index.shape)}"
            )
        self = cls(len(index))
        self.index = index
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

    Raises:
        TypeError: method no string.
        ValueError: ranks or groups no integers >= 1.
    """

    def __init__(
        self,
        *stages: nn.Module,
        method: str = "",
        ranks: Sequence[int] = (),
        groups: int = 1,
    ) -> None:
        super().__init__(*stages)
        _check_labels("FactorizedConv2d", method, ranks, groups)
        self.method = method
        self.ranks = tuple(ranks)
        self.groups = groups

    def _stages(self) -> list[nn.Conv2d | PermuteChannels]:
        """The stages, which must be linear."""
        stages: list[nn.Conv2d | PermuteChannels] = []
        for name, stage in self.named_children():
            # A layer with an activation inside, or swapped for one, has no dense kernel.
            if type(stage) is not nn.Conv2d and not isinstance(stage, PermuteChannels):
                raise TypeError(
                    f"FactorizedConv2d: expected stages of nn.Conv2d and PermuteChannels, got "
                    f"{type(stage).__name__} {name!r}"
                )
            stages.append(stage)
        if not any(isinstance(stage, nn.Conv2d) for stage in stages):
            raise ValueError("FactorizedConv2d: expected at least one nn.Conv2d, got none")
        return stages

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The kernel (K, C/G, R, S) of the one convolution that computes the same.

        Raises:
            TypeError: a stage of another type.
            ValueError: no stage.

        Cost: the stages applied to C one-pixel images.
        """
        stages = self._stages()
        first = next(stage for stage in stages if isinstance(stage, nn.Conv2d))
        # Image c is an impulse in channel c, so what comes out is column c of the kernel.
        y = torch.eye(first.in_channels, dtype=first.weight.dtype, device=first.weight.device)
        y = y[:, :, None, None]
        for stage in stages:
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

    @torch.no_grad()
    def _dense_bias(self) -> nn.Parameter | None:
        """The bias behind all stages: the last stage's own where it alone has one."""
        stages = self._stages()
        *first, last = stages
        if isinstance(last, nn.Conv2d) and all(getattr(s, "bias", None) is None for s in first):
            return own_bias(last)
        total: Tensor | None = None
        learns = False
        for i, stage in enumerate(stages):
            if not isinstance(stage, nn.Conv2d):
                total = total if total is None else total[stage.index]
                continue
            bias = stage.bias
            if total is not None:
                # Other padding modes keep a constant map constant.
                if any(stage._reversed_padding_repeated_twice) and stage.padding_mode == "zeros":
                    raise NotImplementedError(
                        f"FactorizedConv2d: expected no bias in front of stage {i}, which pads "
                        "with zeros: no convolution has a bias that differs at the border"
                    )
                image = total[:, None, None].expand(-1, *stage.kernel_size)
                total = F.conv2d(image[None], stage.weight, bias, groups=stage.groups).flatten()
            elif bias is not None:
                total = bias.detach().clone()
            learns = learns or (bias is not None and bias.requires_grad)
        return None if total is None else nn.Parameter(total, requires_grad=learns)

    def to_dense(self) -> nn.Conv2d:
        """The one convolution that computes the same, with this layer's flags and hooks.

        Raises:
            TypeError: a stage of another type.
            ValueError: no stage.
            NotImplementedError: a bias between the stages in front of padding with zeros.
        """
        convs = [stage for stage in self._stages() if isinstance(stage, nn.Conv2d)]
        weight, bias = self.dense_weight(), self._dense_bias()
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
        pads: Any = "same" if same else tuple(padding)
        dense = nn.Conv2d(
            convs[0].in_channels, convs[-1].out_channels, (weight.shape[2], weight.shape[3]),
            (stride[0], stride[1]), pads, (dilation[0], dilation[1]), self.groups,
            bias is not None, mode, "meta", weight.dtype,
        )  # fmt: skip
        learns = any(conv.weight.requires_grad for conv in convs)
        dense.weight = nn.Parameter(weight, requires_grad=learns)
        dense.register_parameter("bias", bias)
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

    Raises:
        TypeError: method no string.
        ValueError: ranks no integers >= 1.
    """

    def __init__(
        self, *stages: nn.Module, method: str = "", ranks: Sequence[int] = ()
    ) -> None:
        super().__init__(*stages)
        _check_labels("FactorizedLinear", method, ranks, 1)
        self.method = method
        self.ranks = tuple(ranks)

    def _linears(self) -> list[nn.Linear]:
        linears: list[nn.Linear] = []
        for name, stage in self.named_children():
            if type(stage) is not nn.Linear:
                raise TypeError(
                    f"FactorizedLinear: expected stages of nn.Linear, got {type(stage).__name__} "
                    f"{name!r}"
                )
            linears.append(stage)
        if not linears:
            raise ValueError("FactorizedLinear: expected at least one nn.Linear, got none")
        return linears

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The matrix (O, I) of the one linear layer that computes the same.

        Raises:
            TypeError: a stage of another type.
            ValueError: no stage.
        """
        first, *others = (stage.weight for stage in self._linears())
        product = first
        for weight in others:
            product = weight @ product
        return product.clone()

    @torch.no_grad()
    def _dense_bias(self) -> nn.Parameter | None:
        *first, last = self._linears()
        if all(linear.bias is None for linear in first):
            return own_bias(last)
        total = torch.zeros_like(first[0].weight[0])
        for linear in self:
            total = linear(total)
        learns = any(s.bias is not None and s.bias.requires_grad for s in (*first, last))
        return nn.Parameter(total, requires_grad=learns)

    def to_dense(self) -> nn.Linear:
        """The one linear layer that computes the same, with this layer's flags and hooks.

        Raises:
            TypeError: a stage of another type.
            ValueError: no stage.
        """
        weight, bias = self.dense_weight(), self._dense_bias()
        dense = nn.Linear(
            weight.shape[1], weight.shape[0], bias is not None, "meta", weight.dtype
        )
        learns = any(linear.weight.requires_grad for linear in self._linears())
        dense.weight = nn.Parameter(weight, requires_grad=learns)
        dense.register_parameter("bias", bias)
        inherit(dense, self)
        return dense

    def extra_repr(self) -> str:
        """Method and ranks."""
        return f"method={self.method!r}, ranks={self.ranks}"
