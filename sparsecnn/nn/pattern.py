"""``PatternConv2d``: a drop-in whose weight is stored in groups of filters with shared columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sparsecnn.formats.pattern import INDEX_ARRAYS, PatternWeight
from sparsecnn.nn._common import ConvDropIn
from sparsecnn.ops.pattern_conv2d import run_pattern_conv2d

_ARRAYS = ("values", *INDEX_ARRAYS)


class PatternConv2d(ConvDropIn):
    """``nn.Conv2d`` with structured sparsity, and a fused activation and residual.

    The arguments are those of ``nn.Conv2d`` and all are honoured; a fresh layer is initialised as
    ``nn.Conv2d`` is, with every entry stored. Usually made by ``from_dense``, which finds the
    pattern of a pruned layer.

    State dict: ``values``, ``columns``, ``filters``, ``group_rows``, ``group_columns``, ``bias``; a
    dense ``weight`` loads too, in the pattern that it has. The name of the pattern is not in it and
    is found again. ``values`` and ``bias`` are trainable;
    training moves kept entries only, padding among them.
    """

    weight_shape: tuple[int, int, int, int]
    values: nn.Parameter
    columns: Tensor
    filters: Tensor
    group_rows: Tensor
    group_columns: Tensor
    pattern: str

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, pattern: str | None = None, *, activation: str = "none"
    ) -> Self:
        """Pack a convolution: its weight in a pattern, its bias, flags and hooks.

        Args:
            conv: the layer to take the place of; masks and parametrizations are baked in.
            pattern: as ``PatternWeight.from_dense`` takes it; None finds it.
            activation: fused behind it.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
            ValueError: an unknown pattern, or one that the weight does not have.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(
                f"{cls.__name__}: expected conv an nn.Conv2d, got {type(conv).__name__}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt_conv(conv, activation, pattern=pattern)
        return self

    @classmethod
    def _from_packed(cls, conv: nn.Conv2d, packed: PatternWeight, activation: str) -> Self:
        """A layer with the arguments and the bias of a convolution and a weight packed before.

        Args:
            conv: its weight is not read and may be on the meta device.
            packed: a valid weight of the convolution's shape and groups.
            activation: fused behind it.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt_conv(conv, activation, packed=packed)
        return self

    def _pack(
        self, conv: nn.Conv2d, pattern: str | None = None, packed: PatternWeight | None = None
    ) -> None:
        if packed is None:
            packed = PatternWeight.from_dense(conv.weight, conv.groups, pattern)
        self.weight_shape, self.pattern = packed.shape, packed.pattern
        self.values = nn.Parameter(packed.values, requires_grad=conv.weight.requires_grad)
        for name in _ARRAYS[1:]:
            self.register_buffer(name, getattr(packed, name))

    @property
    def weight(self) -> PatternWeight:
        """The packed weight, sharing the layer's tensors."""
        return PatternWeight(
            self.values, self.columns, self.filters, self.group_rows, self.group_columns,
            self.weight_shape, self.groups, self.pattern,
        )  # fmt: skip

    @property
    def nnz(self) -> int:
        """Stored values, padding included."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Stored values over all entries of the dense weight."""
        return self.weight.density

    def _dense_weight(self) -> Tensor:
        return self.weight.to_dense().detach()

    def _weight_requires_grad(self) -> bool:
        return self.values.requires_grad

    def _format_repr(self) -> str:
        return f", pattern={self.pattern}, density={self.density:.3f}"

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return run_pattern_conv2d(
            x, self.weight, self.bias, residual, self._geometry, self.groups, self.activation
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
        strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Also accepts a dense ``weight``, and packed arrays of other sizes."""
        name = type(self).__name__
        state = dict(state_dict)
        dense = state.pop(prefix + "weight", None)
        if dense is not None:
            if tuple(dense.shape) != self.weight_shape:
                error_msgs.append(
                    f"{name}: expected {prefix}weight of shape {self.weight_shape}, "
                    f"got {tuple(dense.shape)}"
                )
                return
            packed = PatternWeight.from_dense(dense, self.groups)
            state |= {prefix + key: getattr(packed, key) for key in _ARRAYS}
        arrays: list[Any] = [state.get(prefix + key) for key in _ARRAYS]
        if all(isinstance(a, Tensor) for a in arrays):
            values, columns, filters, rows, ends = arrays
            loaded = PatternWeight(
                values, columns, filters, rows, ends, self.weight_shape, self.groups
            )
            try:
                loaded.validate()
            except ValueError as error:
                error_msgs.append(f"{name}: {prefix.rstrip('.')}: {error}")
                return
            own_indices = (self.columns, self.filters, self.group_rows, self.group_columns)
            if not all(torch.equal(a, b) for a, b in zip(arrays[1:], own_indices, strict=True)):
                self.pattern = PatternWeight.from_dense(loaded.to_dense(), self.groups).pattern
            if arrays[0].shape != self.values.shape:
                self.values = nn.Parameter(
                    self.values.new_empty(arrays[0].shape),
                    requires_grad=self.values.requires_grad,
                )
            for key, array in zip(_ARRAYS[1:], arrays[1:], strict=True):
                own = getattr(self, key)
                if array.shape != own.shape:
                    setattr(self, key, own.new_empty(array.shape))
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
