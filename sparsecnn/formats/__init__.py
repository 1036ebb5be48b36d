"""Packed weight formats: dense to packed and back, validated once."""

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.formats.pattern import PatternWeight

__all__ = ["CSRWeight", "PatternWeight"]
