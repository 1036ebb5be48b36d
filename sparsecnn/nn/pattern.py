"""``PatternConv2d``: a drop-in whose weight is stored in groups of filters with shared columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sparsecnn.formats._packed import PackedWeight
from sparsecnn.formats.pattern import INDEX_ARRAYS, PatternWeight
from sparsecnn.nn._common import ConvDropIn
from sparsecnn.nn._packed import PackedLayer
from sparsecnn.ops.pattern_conv2d import run_pattern_conv2d


class PatternConv2d(PackedLayer, ConvDropIn):
    """``nn.Conv2d`` with structured sparsity, and a fused activation and residual.

    The arguments are those of ``nn.Conv2d`` and all are honoured; a fresh layer is initialised as
    ``nn.Conv2d`` is, with every entry stored. Usually made by ``from_dense``, which finds the
    pattern of a pruned layer.

    State dict: ``values``, ``columns``, ``filters``, ``group_rows``, ``group_columns``, ``bias``; a
    dense ``weight`` loads too, in the pattern that it has. The name of the pattern is not in it and
    is found again. ``values`` and ``bias`` are trainable;
    training moves kept entries only, padding among them.
    """

    _arrays = ("values", *INDEX_ARRAYS)
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
        return cls._made_of(conv, activation, pattern=pattern)

    def _pack(
        self, conv: nn.Conv2d, pattern: str | None = None, packed: PatternWeight | None = None
    ) -> None:
        """Where there is a packed weight, that of ``conv`` is not read and may be on meta."""
        if packed is None:
            packed = PatternWeight.from_dense(conv.weight, conv.groups, pattern)
        self.pattern = packed.pattern
        self._hold(packed, conv.weight.requires_grad)

    def _pack_dense(self, dense: Tensor) -> PatternWeight:
        return PatternWeight.from_dense(dense, self.groups)

    def _weight_of(self, arrays: dict[str, Any]) -> PatternWeight:
        return replace(self.weight, **arrays, pattern="none")

    def _loading(self, packed: PackedWeight) -> None:
        same = (torch.equal(getattr(packed, key), getattr(self, key)) for key in self._arrays[1:])
        if all(same):
            return
        assert isinstance(packed, PatternWeight)
        self.pattern = self._pack_dense(packed.to_dense()).pattern
        try:
            replace(packed, pattern=self.pattern).validate()
        except ValueError:  # zeros are stored that are not part of the pattern
            self.pattern = "none"

    @property
    def weight(self) -> PatternWeight:
        """The packed weight, sharing the layer's tensors."""
        return PatternWeight(
            self.values, self.columns, self.filters, self.group_rows, self.group_columns,
            self.weight_shape, self.groups, self.pattern,
        )  # fmt: skip

    def _format_repr(self) -> str:
        return f", pattern={self.pattern}, density={self.density:.3f}"

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return run_pattern_conv2d(
            x, self.weight, self.bias, residual, self._geometry, self.groups, self.activation
        )
