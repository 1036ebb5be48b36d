"""``WinogradReLUConv2d``: a layer that is trained, rectified and pruned in the Winograd domain.

``Y = A^T [sum_c U_kc . ReLU(B^T d_c B)] A + bias`` for every 2x2 tile of outputs, d_c the 4x4 tile
of input channel c around it (Liu, Pool, Han, Dally, "Efficient Sparse-Winograd Convolutional Neural
Networks", ICLR 2018). The weight U (K, C/G, 4, 4) is the parameter: it has 16/9 of the entries of a
3x3 weight and is pruned where it is multiplied. Pruning a 3x3 weight and transforming it would fill
the zeros again: 2 of 9 nonzero entries become up to 12 of 16.

The ReLU inside replaces the one in front, so that activations are sparse where they are multiplied
too. No spatial convolution computes the same: a network of these layers is trained as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from sparsecnn.formats.winograd import transforms
from sparsecnn.nn._common import inherit, own_bias
from sparsecnn.ops._check import resolve_padding

_TILE = 2
_EDGE = _TILE + 2


class WinogradReLUConv2d(nn.Module):
    """3x3, stride 1, ``F(2x2, 3x3)`` with the ReLU in the Winograd domain; trainable and prunable.

    It takes the place of a ReLU *and* the 3x3 convolution behind it. In the networks of the paper a
    batch norm comes in front, and pooling takes the place of strides.

    Args:
        in_channels: C.
        out_channels: K.
        m: edge of the output tiles; 2, for which the transforms take no multiplication.
        padding: int, ``(h, w)``, ``(top, bottom, left, right)``, ``"same"`` or ``"valid"``; zeros.
        groups: G, divides C and K.
        bias: whether there is a bias (K,), zero at first.
        device: of the parameters.
        dtype: of the parameters, floating point.

    Attributes:
        weight: U (K, C/G, 4, 4); normal with variance ``2 * 9/32 / (16 C/G)`` at first.

    Raises:
        ValueError: names the argument, what was expected and the value.

    Cost: ``16 K C/G`` multiplications a tile, nonzero weights or not: framework operations that
    are the reference and made for training. Memory 4 times x and 4 times y.
    """

    input_transform: Tensor
    output_transform: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        m: int = _TILE,
        padding: int | Sequence[int] | str = 0,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if m != _TILE or isinstance(m, bool):
            raise ValueError(f"{name}: expected m 2, got {m!r}; larger tiles train badly")
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
        for argument, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected {argument} an int >= 1, got {value!r}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: expected groups to divide in_channels {in_channels} and out_channels "
                f"{out_channels}, got {groups}"
            )
        self._pads = resolve_padding(name, padding, (3, 3), (1, 1), (1, 1))
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.padding = padding
        shape = (out_channels, in_channels // groups, _EDGE, _EDGE)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        empty = torch.empty(out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        # Both passes of a transform as one matrix on a flat tile. Entries 0 and +-1: exact in any
        # dtype; known, so not part of the state.
        _, bt, at = transforms(_TILE, self.weight.dtype, self.weight.device)
        self.register_buffer("input_transform", torch.kron(bt, bt), persistent=False)
        self.register_buffer("output_transform", torch.kron(at, at), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U anew from the default generator, zero the bias.

        He's variance 2/fan-in times 9/32, with the fan-in 16 C/G of U, as in the authors' code.
        """
        fan_in = self.weight[0].numel()
        nn.init.normal_(self.weight, std=math.sqrt(2 * 9 / 32 / fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d) -> Self:
        """Start from a trained convolution: ``U = G g G^T``, its bias, flags and hooks.

        A start for training only: the rectified domain makes another function of it, and the ReLU
        in front of ``conv`` has to go.

        Args:
            conv: 3x3, stride 1, dilation 1, zero padding.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
            NotImplementedError: a geometry that the transform does not cover.
            ValueError: a kernel with some zeros. The transform would fill them, so a pruned
                convolution does not make a pruned layer; prune this layer's own weight.
        """
        name = cls.__name__
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{name}: expected conv an nn.Conv2d, got {type(conv).__name__}")
        wanted = {
            "kernel_size": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding_mode": "zeros",
        }  # fmt: skip
        for argument, expected in wanted.items():
            got = getattr(conv, argument)
            if got != expected:
                raise NotImplementedError(f"{name}: expected {argument} {expected}, got {got}")
        g = conv.weight.detach()
        zeros = (g == 0).sum((2, 3))
        partly = int(((zeros > 0) & (zeros < 9)).sum())
        if partly:
            raise ValueError(
                f"{name}: expected conv without zeros inside its kernels, got {partly} kernels "
                "with some: the transform fills them; prune the weight of the new layer instead"
            )
        biased = conv.bias is not None
        new = cls(
            conv.in_channels, conv.out_channels, _TILE, conv.padding, conv.groups, biased,
            g.device, g.dtype,
        )  # fmt: skip
        to_domain, _, _ = transforms(_TILE, torch.float64, g.device)
        with torch.no_grad():
            new.weight.copy_(to_domain @ g.double() @ to_domain.t())
        new.weight.requires_grad_(conv.weight.requires_grad)
        new.bias = own_bias(conv)
        inherit(new, conv)
        return new

    def tiles_of(self, x: Tensor) -> Tensor:
        """``B^T d B`` of every tile, before the ReLU.

        Args:
            x: ``(N, C, H, W)``.

        Returns:
            ``(N, G, C/G, rows, cols, 16)``.

        Raises:
            ValueError: another number of axes or channels, or an image smaller than the kernel.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: expected x of shape (N, {self.in_channels}, H, W), got "
                f"{tuple(x.shape)}"
            )
        p, q = self._output_size(x)
        if p < 1 or q < 1:
            raise ValueError(
                f"{type(self).__name__}: expected x of at least 3x3 with its padding "
                f"{self.padding!r}, got {tuple(x.shape)}"
            )
        top, bottom, left, right = self._pads
        # An odd output is computed in whole tiles: one more row or column of zeros.
        x = F.pad(x, (left, right + q % _TILE, top, bottom + p % _TILE))
        d = x.unfold(2, _EDGE, _TILE).unfold(3, _EDGE, _TILE)
        v: Tensor = d.flatten(-2) @ self.input_transform.t()
        return v.reshape(v.shape[0], self.groups, self.in_channels // self.groups, *v.shape[2:])

    def output_of(self, v: Tensor, x: Tensor) -> Tensor:
        """``A^T [sum_c U_c . V_c] A + bias``, tiles put together.

        Args:
            v: V as `tiles_of` gives it, rectified or not.
            x: the input it comes from, for its size.

        Returns:
            ``(N, K, P, Q)``.
        """
        p, q = self._output_size(x)
        n, _, _, rows, cols, _ = v.shape
        k = self.weight.shape[0]
        u = self.weight.reshape(self.groups, -1, self.weight.shape[1], _EDGE * _EDGE)
        products = torch.einsum("ngcrst,gkct->ngkrst", v, u)
        y = (products @ self.output_transform.t()).reshape(n, k, rows, cols, _TILE, _TILE)
        y = y.permute(0, 1, 2, 4, 3, 5).reshape(n, k, rows * _TILE, cols * _TILE)[..., :p, :q]
        return y if self.bias is None else y + self.bias[:, None, None]

    def _output_size(self, x: Tensor) -> tuple[int, int]:
        top, bottom, left, right = self._pads
        return x.shape[2] + top + bottom - 2, x.shape[3] + left + right - 2

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, P, Q)``; x comes without a ReLU."""
        return self.output_of(self.tiles_of(x).relu(), x)

    def weight_uses(self, output_shape: Sequence[int]) -> int:
        """How often each weight is multiplied: once a tile. Read by ``measure.count_macs``."""
        n, _, p, q = output_shape
        return n * -(-p // _TILE) * -(-q // _TILE)

    def multiplications(self, output_shape: Sequence[int]) -> dict[str, int]:
        """Multiplications for an output ``(N, K, P, Q)``, with both baselines.

        Zeros that the ReLU makes are not counted; the transforms of ``F(2x2, 3x3)`` are additions.

        Returns:
            ``kept``: with the nonzero weights, ``sum over the 16 points of nnz(U_p) * tiles``;
            ``winograd``: with all of them; ``direct``: a dense 3x3 convolution of that output.
        """
        n, _, p, q = output_shape
        tiles, weight = self.weight_uses(output_shape), self.weight
        return {
            "kept": int(torch.count_nonzero(weight)) * tiles,
            "winograd": weight.numel() * tiles,
            "direct": weight.shape[0] * weight.shape[1] * 9 * n * p * q,
        }

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, m={_TILE}, padding={self.padding}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )
