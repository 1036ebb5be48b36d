"""Tensor factorization: layers as chains of smaller ones, exact at full rank.

A method (`methods/`) says which chain and solves for its numbers, a policy (`ranks`) says how
small, the rest is shared: geometry, assembling, whole networks. `sparsecnn.accelerate` then fuses
the chains that run faster as one kernel.
"""

from __future__ import annotations

from . import methods  # noqa: F401
from .api import Factorize, NoGain, factorize
from .method import METHODS, Factors, Method, Stage, register_method
from .methods.svd import FCSVD, VH, ChannelSVD
from .methods.tucker import Tucker2, Tucker4
from .problem import LayerProblem, UnsupportedLayer
from .ranks import Energy, Fixed, ParamRatio, RankPolicy, Ratio, TargetSpeedup

__all__ = [
    "FCSVD",
    "METHODS",
    "VH",
    "ChannelSVD",
    "Energy",
    "Factorize",
    "Factors",
    "Fixed",
    "LayerProblem",
    "Method",
    "NoGain",
    "ParamRatio",
    "RankPolicy",
    "Ratio",
    "Stage",
    "TargetSpeedup",
    "Tucker2",
    "Tucker4",
    "UnsupportedLayer",
    "factorize",
    "register_method",
]
