"""Pieces every drop-in layer needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod
from typing_extensions import Self

from sparsecnn.formats.chain import channels_innermost
from sparsecnn.ops._check import ACTIVATIONS, Geometry, conv_geometry

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def check_activation(layer: str, activation: str) -> None:
    """Refuse an activation that no kernel fuses."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{layer}: expected activation one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Carry over what belongs to the user: training flag and hooks.

    Hooks of ``torch.nn.utils.prune`` are left behind: they would rebuild a dense weight, and the
    weight they computed has already been taken.
    """
    new.training = old.training
    new._is_full_backward_hook = old._is_full_backward_hook
    for name in _HOOKS:
        hooks = getattr(old, name)
        kept = {k: h for k, h in hooks.items() if not isinstance(h, BasePruningMethod)}
        setattr(new, name, type(hooks)(kept))


class ConvDropIn(nn.Module):
    """A layer that takes the place of an ``nn.Conv2d``: its arguments, flags and hooks.

    A subclass says how the weight is kept: ``_pack`` makes parameters and buffers of a convolution,
    ``_dense_weight`` gives the weight back, ``_run`` computes. All arguments of ``nn.Conv2d`` are
    honoured, or refused by name in ``_pack``.
    """

    is_sparsecnn_layer: ClassVar[bool] = True
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: Any
    bias: nn.Parameter | None
    activation: str
    _geometry: Geometry
    _padded_first: tuple[int, int, int, int] | None

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
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._adopt_conv(conv, activation)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, activation: str = "none") -> Self:
        """Take the place of a convolution: its weight, bias, flags and hooks.

        Masks of ``torch.nn.utils.prune`` and parametrizations are baked in.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
        """
        return cls._made_of(conv, activation)

    @classmethod
    def _made_of(cls, conv: nn.Conv2d, activation: str, **options: Any) -> Self:
        """A layer with everything a convolution has; options go to ``_pack``."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(
                f"{cls.__name__}: expected conv an nn.Conv2d, got {type(conv).__name__}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt_conv(conv, activation, **options)
        return self

    def _adopt_conv(self, conv: nn.Conv2d, activation: str, **options: Any) -> None:
        """Everything a layer takes from a convolution; options go to ``_pack``."""
        check_activation(type(self).__name__, activation)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
            "groups", "padding_mode",
        ):  # fmt: skip
            setattr(self, name, getattr(conv, name))
        self._pack(conv, **options)
        self.register_parameter("bias", own_bias(conv))
        self.activation = activation
        inherit(self, conv)
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        pads = [top, bottom, left, right]
        # What F.pad does in front of the op, for a padding_mode that is not zeros.
        self._padded_first = None
        if self.padding_mode != "zeros" and any(pads):
            self._padded_first = left, right, top, bottom
            pads = [0, 0, 0, 0]
        self._geometry = conv_geometry(
            type(self).__name__, conv.kernel_size, conv.stride, pads, conv.dilation
        )

    def _pack(self, conv: nn.Conv2d) -> None:
        """Set the parameters and buffers that hold the weight."""
        raise NotImplementedError

    def _dense_weight(self) -> Tensor:
        """``(K, C/G, R, S)``, detached, sharing no memory with the layer."""
        raise NotImplementedError

    def _weight_requires_grad(self) -> bool:
        raise NotImplementedError

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The op, with geometry, bias and activation of the layer; x is (N, C, H, W)."""
        raise NotImplementedError

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution with the same weight and bias; the activation is not in it."""
        dense = self._dense_weight()
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
            self.dilation, self.groups, self.bias is not None, self.padding_mode, "meta",
            dense.dtype,
        )  # fmt: skip
        conv.weight = nn.Parameter(dense, requires_grad=self._weight_requires_grad())
        conv.register_parameter("bias", self.bias)
        inherit(conv, self)
        return conv

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(N, C, H, W)`` or ``(C, H, W)`` to ``(N, K, P, Q)`` or ``(K, P, Q)``.

        Args:
            x: input in either memory format, which the output keeps.
            residual: like the output, added before the activation.
        """
        if x.dim() == 3:
            r = None if residual is None else residual.unsqueeze(0)
            return self.forward(x.unsqueeze(0), r).squeeze(0)
        if self._padded_first is not None:
            x = F.pad(x, self._padded_first, mode=self.padding_mode)
        return self._run(x, residual)

    def extra_repr(self) -> str:
        """Arguments of the convolution, then what the format adds, then the activation."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )
        return f"{text}{self._format_repr()}, activation={self.activation}"

    def _format_repr(self) -> str:
        """What to print about the weight's format, starting with a comma, or nothing."""
        return ""


class ChannelsInnermost(nn.Module):
    """A dense weight whose output channels stay innermost in memory, whatever is done to it."""

    keeps_memory_format: ClassVar[bool] = True
    weight: nn.Parameter

    def _take_weight(self, conv: nn.Conv2d) -> None:
        """Its own copy of the weight of a convolution."""
        weight = channels_innermost(conv.weight.detach())
        if weight.data_ptr() == conv.weight.data_ptr():
            weight = weight.clone()
        self.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Moves and casts; the order of the weight in memory survives ``memory_format``."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.device.type != "meta":
            self.weight.data = channels_innermost(self.weight.data)
        return self


def own_bias(dense: nn.Conv2d | nn.Linear) -> nn.Parameter | None:
    """The bias as a parameter, also where a mask of ``torch.nn.utils.prune`` made it a tensor."""
    bias = dense.bias
    if bias is None or isinstance(bias, nn.Parameter):
        return bias
    return nn.Parameter(bias.detach().clone())
