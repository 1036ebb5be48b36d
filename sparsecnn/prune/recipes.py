"""The pruning methods of the literature as choices of parts.

Each function returns a `Pruner`; attach it to an optimizer and train, or call `step()`. Every
other argument of `Pruner` (`targets`, `example_inputs`, `keep_zeros`, ...) passes through.

Ticks are optimizer steps. How long to train between events is the caller's matter; the papers
train until the loss has recovered.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .importance import Magnitude, PruneConfig
from .pruner import Pruner
from .regrowth import ReactivateAll, Splice
from .schedule import Alternating, Iterative, OneShot, Probabilistic
from .threshold import Threshold


def han(
    model: nn.Module,
    quality: float = 1.0,
    *,
    fractions: tuple[float, ...] = (1.0,),
    every: int = 100,
    **options: Any,
) -> Pruner:
    """Drop the weights of each layer below quality * std(W), retrain, repeat.

    The survivors' spread grows with every round, so each round drops more at the same quality.
    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015;
    the pruning step of "Deep Compression", ICLR 2016.

    Args:
        model: the trained network.
        quality: of all layers.
        fractions: as many rounds as there are entries, see `Iterative`.
        every: ticks between rounds.
        options: of `Pruner`.
    """
    schedule = Iterative(fractions, every)
    selector = Threshold(quality, of="weight_std")
    return Pruner(model, importance=Magnitude(), selector=selector, schedule=schedule, **options)


def iht(
    model: nn.Module, sparsity: float, s1: int, s2: int, rounds: int = 1, **options: Any
) -> Pruner:
    """Sparse and dense training phases in turn, ending sparse.

    Jin et al., "Training Skinny Deep Neural Networks with Iterative Hard Thresholding Methods",
    2016.

    Args:
        model: the network, trained or not.
        sparsity: of each layer in the sparse phases.
        s1: ticks of a sparse phase.
        s2: ticks of a dense phase.
        rounds: dense phases.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        importance=Magnitude(sparsity=sparsity),
        schedule=Alternating(s1, s2, rounds),
        regrowth=ReactivateAll(),
        **options,
    )


def dns(
    model: nn.Module,
    c_rate: float = 0.0,
    gamma: float = 1e-4,
    power: float = 1.0,
    stop: int = 10_000,
    *,
    seed: int = 0,
    importance: PruneConfig | None = None,
    **options: Any,
) -> Pruner:
    """Dynamic network surgery: prune and splice at random steps while all weights learn.

    With mean and std of |W| of each layer at the start, an entry dies below
    0.9 * (mean + c_rate * std) and comes back above 1.1 times that.
    Guo et al., "Dynamic Network Surgery for Efficient DNNs", NIPS 2016.

    Args:
        model: the trained network.
        c_rate: larger prunes more.
        gamma: see `Probabilistic`.
        power: see `Probabilistic`.
        stop: tick from which the masks stay.
        seed: of the random steps.
        importance: what is compared with the lower threshold; default `Magnitude()`.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        importance=Magnitude() if importance is None else importance,
        selector=Threshold(c_rate, of="initial", margin=0.9),
        schedule=Probabilistic(gamma, power, stop, seed),
        regrowth=Splice(c_rate, initial=True, margin=1.1),
        mask_mode="ste",
        **options,
    )


def l1_filters(model: nn.Module, sparsity: float, **options: Any) -> Pruner:
    """Drop the filters with the smallest L1 norms of each layer, once.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. The zero filters cost no time
    only once they are gone: `sparsecnn.materialize` removes them.

    Args:
        model: the trained network.
        sparsity: share of the filters of each layer.
        options: of `Pruner`; with `example_inputs` the maps of dead filters are 0.
    """
    importance = Magnitude(sparsity=sparsity, granularity="filter")
    return Pruner(model, importance=importance, schedule=OneShot(), **options)
