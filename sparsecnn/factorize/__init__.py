"""Tensor factorization: layers as chains of smaller ones, exact at full rank.

A method (`methods/`) says which chain and solves for its numbers, a policy (`ranks`) says how
small, the rest is shared: geometry, assembling, whole networks. `sparsecnn.accelerate` then fuses
the chains that run faster as one kernel.
"""

from __future__ import annotations

from . import methods  # noqa: F401
from .api import Factorize, NoGain, factorize
from .circulant import CompactMaps, compact_maps_
from .collect import collect_moments, layer_inputs
from .configs import config_from_dict, config_to_dict
from .global_ranks import PCAEnergyGlobal, Sensitivity
from .gradients import collect_gradients
from .latency import Latency
from .method import METHODS, Factors, Method, Stage, register_method
from .methods.cp import CP, CPNLS, CPTPM
from .methods.dct import DCT
from .methods.denil import Denil
from .methods.denton import BiclusterOuter, BiclusterSVD, Monochromatic
from .methods.jaderberg import Jaderberg1, Jaderberg2
from .methods.mahalanobis import Mahalanobis
from .methods.separable import Rigamonti
from .methods.svd import FCSVD, VH, ChannelSVD
from .methods.tucker import Tucker2, Tucker4
from .methods.zhang import Zhang
from .model import factorize_
from .moments import Moments
from .problem import LayerProblem, UnsupportedLayer
from .ranks import Energy, Fixed, GlobalPolicy, ParamRatio, RankPolicy, Ratio, TargetSpeedup
from .reconstruct import reconstruct_
from .report import FactorizeReport, LayerReport
from .variational import EVBMF, kim

__all__ = [
    "BiclusterOuter",
    "BiclusterSVD",
    "CP",
    "CPNLS",
    "CPTPM",
    "ChannelSVD",
    "CompactMaps",
    "DCT",
    "Denil",
    "EVBMF",
    "Energy",
    "FCSVD",
    "Factorize",
    "FactorizeReport",
    "Factors",
    "Fixed",
    "GlobalPolicy",
    "Jaderberg1",
    "Jaderberg2",
    "Latency",
    "LayerProblem",
    "LayerReport",
    "METHODS",
    "Mahalanobis",
    "Method",
    "Moments",
    "Monochromatic",
    "NoGain",
    "PCAEnergyGlobal",
    "ParamRatio",
    "RankPolicy",
    "Ratio",
    "Rigamonti",
    "Sensitivity",
    "Stage",
    "TargetSpeedup",
    "Tucker2",
    "Tucker4",
    "UnsupportedLayer",
    "VH",
    "Zhang",
    "collect_gradients",
    "collect_moments",
    "compact_maps_",
    "config_from_dict",
    "config_to_dict",
    "factorize",
    "factorize_",
    "kim",
    "layer_inputs",
    "reconstruct_",
    "register_method",
]
