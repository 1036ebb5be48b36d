"""``CSRConv2d`` and ``CSRLinear``: drop-ins whose weight is stored and multiplied in CSR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.nn._common import ConvDropIn, check_activation, inherit, own_bias
from sparsecnn.nn._packed import PackedLayer
from sparsecnn.ops._common import try_quick
from sparsecnn.ops.csr_conv2d import CSR_CONV2D, csr_linear, run_csr_conv2d


class _CSRLayer(PackedLayer):
    """Packing and state dict that both layers share."""

    _arrays = ("values", "col_idx", "row_ptr")
    bias: nn.Parameter | None
    col_idx: Tensor
    row_ptr: Tensor
    activation: str

    def _pack(self, dense: nn.Conv2d | nn.Linear) -> None:
        self._hold(self._pack_dense(dense.weight), dense.weight.requires_grad)

    def _pack_dense(self, dense: Tensor) -> CSRWeight:
        return CSRWeight.from_dense(dense)

    @property
    def weight(self) -> CSRWeight:
        """The packed weight, sharing the layer's tensors."""
        return CSRWeight(self.values, self.col_idx, self.row_ptr, self.weight_shape)

    def _format_repr(self) -> str:
        return f", density={self.density:.3f}"


class CSRConv2d(_CSRLayer, ConvDropIn):
    """``nn.Conv2d`` with a sparse weight, and a fused activation and residual.

    The arguments are those of ``nn.Conv2d`` and all are honoured; a fresh layer is initialised as
    ``nn.Conv2d`` is, with every entry stored. Usually made by ``from_dense``, which packs the exact
    nonzeros of a pruned layer.

    State dict: ``values``, ``col_idx``, ``row_ptr``, ``bias``; a dense ``weight`` loads too.
    ``values`` and ``bias`` are trainable; training moves kept entries only.
    """

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        own, kept = self._parameters, self._buffers
        # Values and biases that are computed (parametrized, pruned) are no parameters.
        if x.shape[1] == self.in_channels and "bias" in own:
            weight = own.get("values"), kept.get("col_idx"), kept.get("row_ptr")
            ends = own["bias"], residual
            arguments = (x, *weight, *ends, *self._geometry, self.groups, self.activation)
            y = try_quick(CSR_CONV2D, arguments, weight, ends)
            if y is not None:
                return y
        return run_csr_conv2d(
            x, self.weight, self.bias, residual, self._geometry, self.groups, self.activation
        )


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
        check_activation(type(self).__name__, activation)
        self._pack(linear)
        self.register_parameter("bias", own_bias(linear))
        self.activation = activation
        inherit(self, linear)
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
        dense = self._dense_weight()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", dense.dtype
        )
        linear.weight = nn.Parameter(dense, requires_grad=self._weight_requires_grad())
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
            f"bias={self.bias is not None}{self._format_repr()}, "
            f"activation={self.activation}"
        )
