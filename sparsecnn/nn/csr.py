"""``CSRConv2d`` and ``CSRLinear``: drop-ins whose weight is stored and multiplied in CSR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.nn._common import check_activation, inherit
from sparsecnn.ops._check import Geometry, conv_geometry
from sparsecnn.ops.csr_conv2d import csr_linear, run_csr_conv2d


class _CSRLayer(nn.Module):
    """Storage, state dict and properties that both layers share."""

    is_sparsecnn_layer = True
    weight_shape: tuple[int, int, int, int]
    values: nn.Parameter
    bias: nn.Parameter | None
    col_idx: Tensor
    row_ptr: Tensor
    activation: str

    def _adopt(self, dense: nn.Conv2d | nn.Linear, activation: str) -> None:
        check_activation(type(self).__name__, activation)
        packed = CSRWeight.from_dense(dense.weight)
        self.weight_shape = packed.shape
        self.values = nn.Parameter(packed.values, requires_grad=dense.weight.requires_grad)
        self.register_buffer("col_idx", packed.col_idx)
        self.register_buffer("row_ptr", packed.row_ptr)
        bias = dense.bias
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach().clone())  # a bias with a mask attached
        self.register_parameter("bias", bias)
        self.activation = activation
        inherit(self, dense)

    @property
    def weight(self) -> CSRWeight:
        """The packed weight, sharing the layer's tensors."""
        return CSRWeight(self.values, self.col_idx, self.row_ptr, self.weight_shape)

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Stored entries over all entries of the dense weight."""
        return self.weight.density

    def _dense_shape(self) -> tuple[int, ...]:
        return self.weight_shape

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
        strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Also accepts a dense ``weight``, and packed arrays with another number of nonzeros."""
        name = type(self).__name__
        state = dict(state_dict)
        dense = state.pop(prefix + "weight", None)
        if dense is not None:
            if tuple(dense.shape) != self._dense_shape():
                error_msgs.append(
                    f"{name}: expected {prefix}weight of shape {self._dense_shape()}, "
                    f"got {tuple(dense.shape)}"
                )
                return
            packed = CSRWeight.from_dense(dense)
            state[prefix + "values"] = packed.values
            state[prefix + "col_idx"] = packed.col_idx
            state[prefix + "row_ptr"] = packed.row_ptr
        arrays: list[Any] = [state.get(prefix + key) for key in ("values", "col_idx", "row_ptr")]
        if all(isinstance(a, Tensor) for a in arrays):
            try:
                CSRWeight(arrays[0], arrays[1], arrays[2], self.weight_shape).validate()
            except ValueError as error:
                error_msgs.append(f"{name}: {prefix.rstrip('.')}: {error}")
                return
            if arrays[0].shape != self.values.shape:
                self.values = nn.Parameter(
                    self.values.new_empty(arrays[0].shape),
                    requires_grad=self.values.requires_grad,
                )
                self.col_idx = self.col_idx.new_empty(arrays[1].shape)
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class CSRConv2d(_CSRLayer):
    """``nn.Conv2d`` with a sparse weight, and a fused activation and residual.

    The arguments are those of ``nn.Conv2d`` and all are honoured; a fresh layer is initialised as
    ``nn.Conv2d`` is, with every entry stored. Usually made by ``from_dense`` from a pruned layer.

    State dict: ``values``, ``col_idx``, ``row_ptr``, ``bias``; a dense ``weight`` loads too.
    ``values`` and ``bias`` are trainable; training moves kept entries only.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: Any
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

    def _adopt_conv(self, conv: nn.Conv2d, activation: str) -> None:
        self._adopt(conv, activation)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
            "groups", "padding_mode",
        ):  # fmt: skip
            setattr(self, name, getattr(conv, name))
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        pads = [top, bottom, left, right]
        # What F.pad does in front of the op, for a padding_mode that is not zeros.
        self._padded_first = None
        if self.padding_mode != "zeros" and any(pads):
            self._padded_first = left, right, top, bottom
            pads = [0, 0, 0, 0]
        self._geometry = conv_geometry(
            "CSRConv2d", conv.kernel_size, conv.stride, pads, conv.dilation
        )

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, activation: str = "none") -> CSRConv2d:
        """Pack a convolution: its exact nonzeros, bias, flags and hooks.

        Masks of ``torch.nn.utils.prune`` and parametrizations are baked in.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"CSRConv2d: expected conv an nn.Conv2d, got {type(conv).__name__}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt_conv(conv, activation)
        return self

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution with the same weight and bias; the activation is not in it."""
        values = self.values
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
            self.dilation, self.groups, self.bias is not None, self.padding_mode, "meta",
            values.dtype,
        )  # fmt: skip
        dense = self.weight.to_dense().detach()
        conv.weight = nn.Parameter(dense, requires_grad=values.requires_grad)
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
        return run_csr_conv2d(
            x, self.weight, self.bias, residual, self._geometry, self.groups, self.activation
        )

    def extra_repr(self) -> str:
        """Arguments of the convolution, then density and activation."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )
        return f"{text}, density={self.density:.3f}, activation={self.activation}"


class CSRLinear(_CSRLayer):
    """``nn.Linear`` with a sparse weight and a fused activation; see ``CSRConv2d``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self._adopt_linear(nn.Linear(in_features, out_features, bias, device, dtype), activation)

    def _adopt_linear(self, linear: nn.Linear, activation: str) -> None:
        self._adopt(linear, activation)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, activation: str = "none") -> CSRLinear:
        """Pack a linear layer: its exact nonzeros, bias, flags and hooks.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"CSRLinear: expected linear an nn.Linear, got {type(linear).__name__}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt_linear(linear, activation)
        return self

    def _dense_shape(self) -> tuple[int, ...]:
        return self.weight_shape[:2]

    def to_dense(self) -> nn.Linear:
        """The dense layer with the same weight and bias; the activation is not in it."""
        values = self.values
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", values.dtype
        )
        dense = self.weight.to_dense().detach().reshape(self._dense_shape())
        linear.weight = nn.Parameter(dense, requires_grad=values.requires_grad)
        linear.register_parameter("bias", self.bias)
        inherit(linear, self)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        return csr_linear(x, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """Arguments of the layer, then density and activation."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={self.density:.3f}, "
            f"activation={self.activation}"
        )
