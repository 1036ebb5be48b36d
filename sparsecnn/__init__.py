"""sparsecnn: make a trained PyTorch CNN smaller and measurably faster, without leaving PyTorch.

The verbs ``prune``, ``factorize`` and ``accelerate`` (and their in-place forms with a trailing
underscore) are functions of this package; the modules of the same names hold the parts they are
made of.
"""

from sparsecnn import formats, measure, nn, ops, storage
from sparsecnn._library import build_info, isa, set_isa, supported_isas
from sparsecnn.accelerate import accelerate, accelerate_, densify, densify_
from sparsecnn.factorize import Factorize, Latency, TargetSpeedup, factorize, factorize_
from sparsecnn.formats import CSRWeight, PatternWeight, WinogradWeight
from sparsecnn.materialize import materialize
from sparsecnn.measure import Report
from sparsecnn.prune import (
    NM,
    Budget,
    Magnitude,
    OneShot,
    Polynomial,
    Pruner,
    Random,
    SparsityReport,
    TopK,
    find_targets,
    prune,
    prune_,
    sparsity,
)
from sparsecnn.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Budget",
    "CSRWeight",
    "Factorize",
    "Latency",
    "Magnitude",
    "OneShot",
    "PatternWeight",
    "Polynomial",
    "Pruner",
    "Random",
    "Report",
    "SparsityReport",
    "TargetSpeedup",
    "TopK",
    "WinogradWeight",
    "accelerate",
    "accelerate_",
    "build_info",
    "densify",
    "densify_",
    "factorize",
    "factorize_",
    "find_targets",
    "formats",
    "isa",
    "load",
    "materialize",
    "measure",
    "nn",
    "ops",
    "prune",
    "prune_",
    "save",
    "set_isa",
    "sparsity",
    "storage",
    "supported_isas",
]
