"""Drop-in layers, one file per family."""

from __future__ import annotations

from sparsecnn.nn.chain import ChainConv2d
from sparsecnn.nn.circulant import CirculantLinear, CirculantPointwise
from sparsecnn.nn.csr import CSRConv2d, CSRLinear
from sparsecnn.nn.depthwise import DepthwiseConv2d
from sparsecnn.nn.factorized import FactorizedConv2d, FactorizedLinear, PermuteChannels
from sparsecnn.nn.fused import FusedConv2d
from sparsecnn.nn.layout import apply_layout_
from sparsecnn.nn.lowrank import LowRankConvBN
from sparsecnn.nn.microbatch import microbatch_
from sparsecnn.nn.pattern import PatternConv2d
from sparsecnn.nn.pointwise import PointwiseConv2d
from sparsecnn.nn.residual import ResidualBlock
from sparsecnn.nn.winograd import WinogradConv2d
from sparsecnn.nn.winograd_relu import WinogradReLUConv2d

SPARSE_LAYERS: dict[str, type] = {"CSRConv2d": CSRConv2d, "CSRLinear": CSRLinear}
"""Layers whose weight is stored in CSR, by the name used in files."""

__all__ = [
    "SPARSE_LAYERS",
    "CSRConv2d",
    "CSRLinear",
    "ChainConv2d",
    "CirculantLinear",
    "CirculantPointwise",
    "DepthwiseConv2d",
    "FactorizedConv2d",
    "FactorizedLinear",
    "FusedConv2d",
    "LowRankConvBN",
    "PatternConv2d",
    "PermuteChannels",
    "PointwiseConv2d",
    "ResidualBlock",
    "WinogradConv2d",
    "WinogradReLUConv2d",
    "apply_layout_",
    "microbatch_",
]
