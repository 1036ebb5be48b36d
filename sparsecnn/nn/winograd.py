"""``WinogradConv2d``: a 3x3 convolution whose weight is kept in the Winograd domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sparsecnn.formats.winograd import WinogradWeight, check_tile
from sparsecnn.nn._common import ConvDropIn
from sparsecnn.nn._packed import PackedLayer
from sparsecnn.ops.winograd_conv2d import run_winograd_conv2d


class WinogradConv2d(PackedLayer, ConvDropIn):
    """``nn.Conv2d`` 3x3 of stride 1 by ``F(m x m, 3 x 3)``, dense or sparse, with fused activation.

    The arguments are those of ``nn.Conv2d``, and ``tile``, which is m; a kernel other than 3x3,
    stride and dilation are refused by name. ``values`` and ``bias`` are trainable: the weight is
    trained where it is kept, in the Winograd domain, and a sparse one at its positions only.

    State dict: ``values``, ``bias`` and of a sparse weight ``col_idx`` and ``row_ptr``. A dense
    ``weight`` loads too; a sparse layer keeps its positions.
    """

    keeps_memory_format: ClassVar[bool] = True
    _arrays = ("values", "col_idx", "row_ptr")
    col_idx: Tensor | None
    row_ptr: Tensor | None
    tile: int

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
        tile: int = 4,
    ) -> None:
        check_tile(type(self).__name__, tile)
        self.__dict__["tile"] = tile  # `_pack` needs it, before there is a module to set it on
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype, activation=activation,
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        tile: int = 4,
        *,
        mask: Tensor | None = None,
        activation: str = "none",
    ) -> Self:
        """Take the place of a convolution: its transformed weight, its bias, flags and hooks.

        Args:
            conv: 3x3, stride 1, dilation 1; masks and parametrizations are baked in.
            tile: m, 2 or 4: what 4 saves and loses, see ``ops.winograd_conv2d``.
            mask: ``(T, K, C/G)`` boolean, ``T = (m + 2)^2``: taps to keep, the others are pruned
                and the weight becomes sparse.
            activation: fused behind it.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``, or ``mask`` is not boolean.
            ValueError: another tile, or a mask of another shape.
            NotImplementedError: a geometry that the transform does not cover.
        """
        return cls._made_of(conv, activation, tile=tile, mask=mask)

    def _pack(
        self,
        conv: nn.Conv2d,
        tile: int | None = None,
        mask: Tensor | None = None,
        packed: WinogradWeight | None = None,
    ) -> None:
        """Where there is a packed weight, that of ``conv`` is not read and may be on meta."""
        name = type(self).__name__
        if packed is not None:
            tile = packed.tile
        if tile is not None:  # else the constructor has set it
            check_tile(name, tile)
            self.tile = tile
        for argument, expected in (("kernel_size", (3, 3)), ("stride", (1, 1))):
            if tuple(getattr(conv, argument)) != expected:
                raise NotImplementedError(
                    f"{name}: expected {argument} {expected[0]}, "
                    f"got {tuple(getattr(conv, argument))}"
                )
        if tuple(conv.dilation) != (1, 1):
            raise NotImplementedError(f"{name}: expected dilation 1, got {tuple(conv.dilation)}")
        if packed is None:
            packed = WinogradWeight.from_dense(conv.weight, conv.groups, self.tile)
        if mask is not None:
            packed = _masked(name, packed, mask)
        self._hold(packed, conv.weight.requires_grad)

    def _pack_dense(self, dense: Tensor) -> WinogradWeight:
        packed = WinogradWeight.from_dense(dense, self.groups, self.tile)
        if self.col_idx is None:
            return packed
        values = self.weight.stored(packed.taps())
        return WinogradWeight(
            values, self.col_idx, self.row_ptr, packed.shape, self.groups, self.tile
        )

    @property
    def weight(self) -> WinogradWeight:
        """The packed weight, sharing the layer's tensors."""
        return WinogradWeight(
            self.values, self.col_idx, self.row_ptr, self.weight_shape, self.groups, self.tile
        )

    @property
    def nnz(self) -> int:
        """Stored values, without the zeros that fill a block of filters."""
        return self.weight.nnz

    def weight_uses(self, output_shape: Sequence[int]) -> int:
        """How often each stored value is multiplied: once a tile. Read by ``count_macs``."""
        n, _, p, q = output_shape
        return n * -(-p // self.tile) * -(-q // self.tile)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Moves and casts; the order of the weight in memory survives ``memory_format``."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values.data = self.values.data.contiguous()
        return self

    def _format_repr(self) -> str:
        sparse = f", density={self.density:.3f}" if self.col_idx is not None else ""
        return f", tile={self.tile}{sparse}"

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return run_winograd_conv2d(
            x, self.weight, self.bias, residual, self._geometry, self.groups, self.activation
        )


def _masked(name: str, packed: WinogradWeight, mask: Tensor) -> WinogradWeight:
    taps = packed.taps()
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected mask a boolean tensor, got {got}")
    if mask.shape != taps.shape:
        raise ValueError(
            f"{name}: expected mask of shape {tuple(taps.shape)}, got {tuple(mask.shape)}"
        )
    # By the mask, not by the values: a kept tap that is zero now can still be trained.
    places = WinogradWeight.from_taps(mask.to(taps), packed.groups, sparse=True)
    return replace(places, values=places.stored(taps))
