"""The pruning methods of the literature as choices of parts.

Each function returns a `Pruner`; attach it to an optimizer and train, or call `step()`. Every
other argument of `Pruner` (`targets`, `example_inputs`, `keep_zeros`, ...) passes through.

Ticks are optimizer steps. How long to train between events is the caller's matter; the papers
train until the loss has recovered.
"""

from .after_training import (
    apoz,
    data_free,
    fisher,
    han,
    l1_filters,
    lasso_channel,
    obd,
    obs,
    random_masks,
    thinet,
    winograd_relu,
)
from .while_training import (
    collins,
    dns,
    group_brain_damage,
    iht,
    l0,
    less_is_more,
    ssl,
    unit_bias,
)

__all__ = [
    "apoz",
    "collins",
    "data_free",
    "dns",
    "fisher",
    "group_brain_damage",
    "han",
    "iht",
    "l0",
    "l1_filters",
    "lasso_channel",
    "less_is_more",
    "obd",
    "obs",
    "random_masks",
    "ssl",
    "thinet",
    "unit_bias",
    "winograd_relu",
]
