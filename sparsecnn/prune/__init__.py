"""Pruning: zeros in the weights of a model, and masks that hold them during training.

`prune_` prunes once; `Pruner` prunes on a schedule while an optimizer runs. Both are built from
the same parts: granularity (what lives or dies together), importance (what a weight is worth),
selection (scores to masks), budget and schedule (how much, when).
"""

from sparsecnn.measure.batchnorm import recalibrate_batchnorm

from . import recipes
from .api import config_from_dict, config_to_dict, prune, prune_
from .budget import Budget
from .calibration import Batches, register_collector
from .channels import ChannelReport, prune_channels, prune_channels_
from .criteria import FPGM, LAMP, BNScale
from .depth import remove_layers
from .dropout import Dropout, EvolutionalDropout, MultinomialDropout, rescale_dropout_
from .gates import Gates, HardConcreteGate, L0Penalty, add_gates_, fold_gates_
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
from .group_lasso import GroupLasso
from .importance import Magnitude, PruneConfig, Random, register_importance
from .mask import Mask
from .merge import MergeIntoNearest, PairMerge, linear_consumers
from .obs import OBSUpdate, SequentialOBS
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
from .reconstruction import GreedyReconstruction, LassoPath, LeastSquares
from .regrowth import ReactivateAll, Splice
from .regularization import L1, L0Ball, MaxNorm, TensorNuclear, UnitBias
from .report import LayerSparsity, SparsityReport, sparsity
from .saliency import OBD, SNIP, APoZ, Fisher, Movement, Taylor, Wanda
from .schedule import (
    Alternating,
    Event,
    Iterative,
    LayerByLayer,
    OneShot,
    Polynomial,
    Probabilistic,
)
from .search import GreedyLayerSearch, RandomMaskSearch
from .selection import TopK
from .sensitivity import Sensitivity, sensitivity
from .targets import Target, find_targets
from .threshold import Threshold
from .zeroed import remove_zeroed_

__all__ = [
    "APoZ",
    "Alternating",
    "BNScale",
    "Batches",
    "Block",
    "Budget",
    "Calibration",
    "ChannelReport",
    "Compensator",
    "Dropout",
    "Event",
    "EvolutionalDropout",
    "FPGM",
    "Fisher",
    "Gates",
    "Granularity",
    "GreedyLayerSearch",
    "GreedyReconstruction",
    "GroupLasso",
    "HardConcreteGate",
    "Importance",
    "Iterative",
    "L0Ball",
    "L0Penalty",
    "L1",
    "LAMP",
    "LassoPath",
    "LayerByLayer",
    "LayerSparsity",
    "LeastSquares",
    "Magnitude",
    "Mask",
    "MaxNorm",
    "MergeIntoNearest",
    "Movement",
    "MultinomialDropout",
    "NM",
    "OBD",
    "OBSUpdate",
    "OneShot",
    "PairMerge",
    "Polynomial",
    "Probabilistic",
    "PruneConfig",
    "Pruner",
    "Random",
    "RandomMaskSearch",
    "ReactivateAll",
    "Regrowth",
    "Regularizer",
    "SNIP",
    "Schedule",
    "Selector",
    "Sensitivity",
    "SequentialOBS",
    "SparsityReport",
    "Splice",
    "Stats",
    "Strided",
    "Target",
    "Taylor",
    "TensorNuclear",
    "Threshold",
    "TopK",
    "UnitBias",
    "Wanda",
    "add_gates_",
    "block",
    "channel",
    "config_from_dict",
    "config_to_dict",
    "element",
    "filter_",
    "find_targets",
    "fold_gates_",
    "kernel",
    "layer",
    "linear_consumers",
    "neuron",
    "parse_granularity",
    "prune",
    "prune_",
    "prune_channels",
    "prune_channels_",
    "recalibrate_batchnorm",
    "recipes",
    "register_collector",
    "register_importance",
    "remove_layers",
    "remove_zeroed_",
    "rescale_dropout_",
    "sensitivity",
    "shape",
    "sparsity",
    "strided",
    "winograd",
]
