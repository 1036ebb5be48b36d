"""Functional ops: one file per op, with its fake, autograd, autocast and FLOP formula."""

from sparsecnn.ops.csr_conv2d import csr_conv2d, csr_linear
from sparsecnn.ops.pattern_conv2d import pattern_conv2d

__all__ = ["csr_conv2d", "csr_linear", "pattern_conv2d"]
