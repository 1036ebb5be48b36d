"""Drop-in layers, one file per family."""

from __future__ import annotations

from sparsecnn.nn.csr import CSRConv2d, CSRLinear
from sparsecnn.nn.depthwise import DepthwiseConv2d
from sparsecnn.nn.fused import FusedConv2d
from sparsecnn.nn.layout import apply_layout_

SPARSE_LAYERS: dict[str, type] = {"CSRConv2d": CSRConv2d, "CSRLinear": CSRLinear}
"""Layers whose weight is stored in a packed format, by the name used in files."""

__all__ = [
    "SPARSE_LAYERS",
    "CSRConv2d",
    "CSRLinear",
    "DepthwiseConv2d",
    "FusedConv2d",
    "apply_layout_",
]
