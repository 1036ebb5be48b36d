"""``CSRConv2d`` and ``CSRLinear``: drop-ins whose weight is stored and multiplied in CSR."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.nn._common import ConvDropIn, check_activation, inherit, own_bias
from sparsecnn.nn._packed import PackedLayer
from sparsecnn.ops._common import is_eager, try_quick
from sparsecnn.ops._csr_source import Unsuitable
from sparsecnn.ops._specialized import SpecializedConv, is_plain_call
from sparsecnn.ops.csr_conv2d import CSR_CONV2D, csr_linear, run_csr_conv2d

_log = logging.getLogger(__name__)


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

    On CUDA, ``specialize_()`` makes code for this very weight; see there.
    """

    _specialized: SpecializedConv | None = None
    _specialization: str = "portable: not asked for, see specialize_()"

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, *, activation: str = "none", specialize: bool = False
    ) -> Self:
        """Take the place of a convolution: its weight, bias, flags and hooks.

        Masks of ``torch.nn.utils.prune`` and parametrizations are baked in.

        Args:
            conv: the convolution.
            activation: fused.
            specialize: call ``specialize_()`` on the result; ``specialization`` tells how it went.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
        """
        self = cls._made_of(conv, activation)
        if specialize:
            self.specialize_()
        return self

    def specialize_(self) -> str:
        """Compile code for this weight on its CUDA device, or say why the portable kernel stays.

        The values become operands of the instructions (SparseRT: Wang, PACT 2020), so that the
        inner loop reads no weight and no index. Meant for float32 inference at large batches, up
        to 150 000 stored entries: each is 16 bytes of code and takes 0.3 to 0.9 ms to compile (one
        core of Zen 4), once: the code is kept in ``$XDG_CACHE_HOME/sparsecnn/cubin`` and may be
        deleted there. The results are those of the portable kernel bit by bit.

        It serves calls in which nothing is recorded (``torch.no_grad`` or ``inference_mode``, no
        autocast, no tracing), CUDA graphs included, on inputs of the layer's dtype and device; all
        others take the portable kernel. When the weight changes in a way that torch counts, when
        the layer trains, moves or is copied, the code is given up until the next call of this. A
        change through ``values.data`` outside of training is not counted: call this again.

        Returns:
            ``specialization``: ``"sm_90 cubin, 59 KB"`` or ``"portable: <reason>"``. A reason is
            also logged as a warning.

        Raises:
            ValueError: the weight is corrupt.
        """
        try:
            if "values" not in self._parameters:
                raise Unsuitable("expected values that are a parameter, got computed ones")
            self._specialized = SpecializedConv(self.weight, self._geometry, self.groups)
            self._specialization = self._specialized.description
        except Unsuitable as reason:
            self._give_up(str(reason))
            _log.warning("CSRConv2d.specialize_: %s", self._specialization)
        return self._specialization

    @property
    def specialization(self) -> str:
        """What serves plain inference calls: a description of the code, or ``"portable: why"``."""
        self._current_code()
        return self._specialization

    def _give_up(self, reason: str) -> None:
        self._specialized = None
        self._specialization = f"portable: {reason}"

    def _current_code(self) -> SpecializedConv | None:
        """The code, if it is still that of the weight."""
        code = self._specialized
        if code is not None and not code.matches(self.weight, self._geometry, self.groups):
            self._give_up("the weight or its place changed after specialize_()")
        return self._specialized

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without the code, which belongs to one device and process."""
        state = self.__dict__.copy()
        if state.pop("_specialized", None) is not None:
            state["_specialization"] = "portable: a copy, see specialize_()"
        return state

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._specialized is not None:
            if is_plain_call():
                code = self._current_code()
                y = code(x, self.bias, residual, self.activation) if code else None
                if y is not None:
                    return y
            elif self.training and is_eager(x) and torch.is_grad_enabled():
                # Some optimizers write through .data, which nobody counts.
                self._give_up("a training call came after specialize_()")
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
