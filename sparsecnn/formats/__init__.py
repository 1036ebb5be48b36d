"""Packed weight formats: dense to packed and back, validated once."""

from sparsecnn.formats.chain import ChainStage
from sparsecnn.formats.csr import CSRWeight
from sparsecnn.formats.pattern import PatternWeight
from sparsecnn.formats.winograd import WinogradWeight

__all__ = ["CSRWeight", "ChainStage", "PatternWeight", "WinogradWeight"]
