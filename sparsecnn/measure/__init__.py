"""Measuring models: cost, run time, memory, energy, accuracy, and the report of a conversion.

Functions share the names of the modules that define them (`latency`, `energy`, `accuracy`): here
and through `sparsecnn.measure` they are the functions.
"""

from .latency import LatencyStats, latency, throughput, time_interleaved
from .report import LayerReport, ModelTiming, Report

__all__ = [
    "LatencyStats",
    "LayerReport",
    "ModelTiming",
    "Report",
    "latency",
    "throughput",
    "time_interleaved",
]
