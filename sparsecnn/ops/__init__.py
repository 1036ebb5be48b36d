"""Functional ops: one file per op, with its fake, autograd, autocast and FLOP formula."""

from sparsecnn.ops.csr_conv2d import csr_conv2d, csr_linear
from sparsecnn.ops.depthwise_conv2d import depthwise_conv2d

__all__ = ["csr_conv2d", "csr_linear", "depthwise_conv2d"]
