"""``LowRankConvBN``: a convolution of low rank that trains from scratch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparsecnn.nn._common import inherit
from sparsecnn.nn.factorized import FactorizedConv2d


class LowRankConvBN(nn.Module):
    """``y = relu(BN(H * BN(V * x)))``: a column filter, a row filter, a norm behind each.

    ``V`` is (R, S/G, kh, 1), ``H`` (K, R/G, 1, kw): together a kernel (K, S/G, kh, kw) with
    ``W[k, s] = sum_r V[r, s] H[k, r]``, rank R. The network is twice as deep as with the plain
    layer, and without the inner batch norm its gradients explode or vanish; with it low-rank
    networks train from random weights as the dense ones do. (Tai, Xiao, Zhang, Wang, E,
    "Convolutional neural networks with low-rank regularization", ICLR 2016.) After training
    `merge_inner_bn` removes the inner norm.

    Neither convolution has a bias: the norms behind them have.

    State dict: those of ``vertical``, ``inner_norm``, ``horizontal``, ``outer_norm``.

    Args:
        in_channels: as of ``nn.Conv2d``, like the next six.
        out_channels: K.
        kernel_size: (kh, kw).
        rank: R, per conv group.
        stride: the vertical part is the column filter's, the horizontal one the row filter's.
        padding: likewise; also "same" and "valid".
        dilation: likewise.
        groups: G, of both filters.
        padding_mode: of both filters. The row filter pads what the inner norm gives.
        device: of the parameters.
        dtype: of the parameters.
        activation: with the ReLU, or linear.

    Raises:
        ValueError: a rank below 1, or what ``nn.Conv2d`` refuses.
        TypeError: activation no bool.

    Cost: R (kh S/G + kw K/G) G weights and as many MACs per pixel, at stride 1, where the dense
    layer has K S/G kh kw.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        activation: bool = True,
    ) -> None:
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ValueError(f"LowRankConvBN: expected rank an integer >= 1, got {rank!r}")
        if not isinstance(activation, bool):
            raise TypeError(f"LowRankConvBN: expected activation a bool, got {activation!r}")
        # It checks the arguments and makes pairs of them.
        plain = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False,
            padding_mode, "meta",
        )  # fmt: skip
        (kh, kw), (sh, sw), (dh, dw) = plain.kernel_size, plain.stride, plain.dilation
        pads: Any = (plain.padding, plain.padding)
        if not isinstance(plain.padding, str):
            pads = ((plain.padding[0], 0), (0, plain.padding[1]))
        inner = groups * rank
        kind: Any = {"device": device, "dtype": dtype}
        self.rank = rank
        self.vertical = nn.Conv2d(
            in_channels, inner, (kh, 1), (sh, 1), pads[0], (dh, 1), groups, False, padding_mode,
            **kind,
        )  # fmt: skip
        self.inner_norm = nn.BatchNorm2d(inner, **kind)
        self.horizontal = nn.Conv2d(
            inner, out_channels, (1, kw), (1, sw), pads[1], (1, dw), groups, False, padding_mode,
            **kind,
        )  # fmt: skip
        self.outer_norm = nn.BatchNorm2d(out_channels, **kind)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, H, W) to (N, K, P, Q)."""
        y = self.horizontal(self.inner_norm(self.vertical(x)))
        out: Tensor = self.activation(self.outer_norm(y))
        return out

    def merge_inner_bn(self) -> nn.Sequential:
        """What it computes in eval mode, without the inner norm.

            BN(V * x) = (g / sd) V * x + (b - g mean / sd)

        goes into the column filter's weight and a bias behind it, which is exact for every
        padding: the row filter pads behind that bias as it did behind the norm. The outer norm
        stays as it is, a batch norm behind a layer, for `sparsecnn.accelerate` to fold.

        Returns:
            ``nn.Sequential`` of a `FactorizedConv2d`, an ``nn.BatchNorm2d`` and, with activation,
            an ``nn.ReLU``: in eval mode, with this layer's hooks, sharing no tensor with it.

        Raises:
            ValueError: in training mode, where the norm depends on the batch.
        """
        if self.inner_norm.training:
            raise ValueError(
                "LowRankConvBN: expected the layer in eval mode, got training mode; call .eval()"
            )
        chain = FactorizedConv2d(
            fuse_conv_bn_eval(self.vertical, self.inner_norm),
            copy.deepcopy(self.horizontal),
            method="vh",
            ranks=(self.rank,),
            groups=self.vertical.groups,
        ).eval()
        layers: list[nn.Module] = [chain, copy.deepcopy(self.outer_norm)]
        if isinstance(self.activation, nn.ReLU):
            layers.append(nn.ReLU())
        merged = nn.Sequential(*layers).eval()
        inherit(merged, self)
        return merged

    def extra_repr(self) -> str:
        """The rank."""
        return f"rank={self.rank}"
