"""sparsecnn: make a trained PyTorch CNN smaller and measurably faster, without leaving PyTorch."""

from sparsecnn import formats, nn, ops
from sparsecnn._library import build_info, isa, set_isa, supported_isas
from sparsecnn.formats import CSRWeight

__version__ = "0.1.0"

__all__ = [
    "CSRWeight",
    "build_info",
    "formats",
    "isa",
    "nn",
    "ops",
    "set_isa",
    "supported_isas",
]
