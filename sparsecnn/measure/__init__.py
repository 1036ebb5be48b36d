"""Measuring models: cost, run time, memory, energy, accuracy, and the report of a conversion.

Some functions share the name of the module that defines them (`accuracy`, `energy`, `environment`,
`latency`): as attributes of this package these names are the functions.
"""

from .accuracy import accuracy
from .cost import CostReport, LayerCost, count_macs
from .energy import ENERGY_45NM_PJ, EnergyResult, energy, modelled_energy
from .environment import environment
from .latency import LatencyStats, latency, throughput, time_interleaved
from .memory import ModelSize, model_size, peak_memory, peak_rss
from .report import LayerReport, ModelTiming, Report

__all__ = [
    "ENERGY_45NM_PJ",
    "CostReport",
    "EnergyResult",
    "LatencyStats",
    "LayerCost",
    "LayerReport",
    "ModelSize",
    "ModelTiming",
    "Report",
    "accuracy",
    "count_macs",
    "energy",
    "environment",
    "latency",
    "model_size",
    "modelled_energy",
    "peak_memory",
    "peak_rss",
    "throughput",
    "time_interleaved",
]
