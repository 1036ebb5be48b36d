"""Drop-in layers, one file per family."""

from __future__ import annotations

from sparsecnn.nn.csr import CSRConv2d, CSRLinear
from sparsecnn.nn.fused import FusedConv2d
from sparsecnn.nn.layout import apply_layout_
from sparsecnn.nn.pattern import PatternConv2d

SPARSE_LAYERS: dict[str, type] = {"CSRConv2d": CSRConv2d, "CSRLinear": CSRLinear}
"""Layers whose weight is stored in a packed format, by the name used in files."""

PACKED_LAYERS: tuple[type, ...] = (*SPARSE_LAYERS.values(), PatternConv2d)
"""Layers with a packed weight and ``to_dense``; not all of them can be saved."""

__all__ = [
    "PACKED_LAYERS",
    "SPARSE_LAYERS",
    "CSRConv2d",
    "CSRLinear",
    "FusedConv2d",
    "PatternConv2d",
    "apply_layout_",
]
