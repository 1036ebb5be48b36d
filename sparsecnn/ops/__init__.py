"""Functional ops: one file per op, with its fake, autograd, autocast and FLOP formula."""

from sparsecnn.formats.chain import ChainStage
from sparsecnn.ops.chain_conv2d import chain_conv2d
from sparsecnn.ops.csr_conv2d import csr_conv2d, csr_linear
from sparsecnn.ops.depthwise_conv2d import depthwise_conv2d
from sparsecnn.ops.pattern_conv2d import pattern_conv2d
from sparsecnn.ops.pointwise_conv2d import pointwise_conv2d
from sparsecnn.ops.winograd_conv2d import winograd_conv2d

__all__ = [
    "ChainStage",
    "chain_conv2d",
    "csr_conv2d",
    "csr_linear",
    "depthwise_conv2d",
    "pattern_conv2d",
    "pointwise_conv2d",
    "winograd_conv2d",
]
