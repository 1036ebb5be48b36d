"""Pruning: zeros in the weights of a model, and masks that hold them during training.

`prune_` prunes once; `Pruner` prunes on a schedule while an optimizer runs. Both are built from
the same parts: granularity (what lives or dies together), importance (what a weight is worth),
selection (scores to masks), budget and schedule (how much, when).
"""

from . import recipes
from .api import config_from_dict, config_to_dict, prune, prune_
from .batchnorm import recalibrate_batchnorm
from .budget import Budget
from .calibration import Batches, register_collector
from .granularity import (
    NM,
    Block,
    Strided,
    block,
    channel,
    element,
    filter_,
    kernel,
    layer,
    neuron,
    shape,
    strided,
    winograd,
)
from .granularity import parse as parse_granularity
from .importance import Magnitude, PruneConfig, Random, register_importance
from .mask import Mask
from .protocols import (
    Calibration,
    Compensator,
    Granularity,
    Importance,
    Regrowth,
    Regularizer,
    Schedule,
    Selector,
    Stats,
)
from .pruner import Pruner
from .regrowth import ReactivateAll, Splice
from .report import LayerSparsity, SparsityReport, sparsity
from .schedule import (
    Alternating,
    Event,
    Iterative,
    LayerByLayer,
    OneShot,
    Polynomial,
    Probabilistic,
)
from .selection import TopK
from .sensitivity import Sensitivity, sensitivity
from .targets import Target, find_targets
from .threshold import Threshold

__all__ = [
    "NM",
    "Alternating",
    "Batches",
    "Block",
    "Budget",
    "Calibration",
    "Compensator",
    "Event",
    "Granularity",
    "Importance",
    "Iterative",
    "LayerByLayer",
    "LayerSparsity",
    "Magnitude",
    "Mask",
    "OneShot",
    "Polynomial",
    "Probabilistic",
    "PruneConfig",
    "Pruner",
    "Random",
    "ReactivateAll",
    "Regrowth",
    "Regularizer",
    "Schedule",
    "Selector",
    "Sensitivity",
    "SparsityReport",
    "Splice",
    "Stats",
    "Strided",
    "Target",
    "Threshold",
    "TopK",
    "block",
    "channel",
    "config_from_dict",
    "config_to_dict",
    "element",
    "filter_",
    "find_targets",
    "kernel",
    "layer",
    "neuron",
    "parse_granularity",
    "prune",
    "prune_",
    "recalibrate_batchnorm",
    "recipes",
    "register_collector",
    "register_importance",
    "sensitivity",
    "shape",
    "sparsity",
    "strided",
    "winograd",
]
