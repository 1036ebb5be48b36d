"""Methods that prune a trained network, at once or in rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sparsecnn.nn import WinogradReLUConv2d

from ..importance import Magnitude
from ..merge import MergeIntoNearest, PairMerge, linear_consumers
from ..obs import OBSUpdate, SequentialOBS
from ..protocols import Calibration
from ..pruner import Pruner
from ..reconstruction import GreedyReconstruction, LassoPath, LeastSquares
from ..saliency import OBD, APoZ, Fisher
from ..schedule import Iterative, LayerByLayer, OneShot
from ..search import RandomMaskSearch
from ..targets import Target, find_targets
from ..threshold import Threshold


def obd(
    model: nn.Module,
    sparsity: float,
    calibration: Calibration,
    *,
    mode: str = "backprop",
    fractions: tuple[float, ...] = (0.5, 0.8, 1.0),
    every: int = 100,
    **options: Any,
) -> Pruner:
    """Optimal brain damage: second-order saliencies, in rounds with retraining.

    LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989.

    Args:
        model: the trained network.
        sparsity: over all layers together.
        calibration: `Batches` of training data.
        mode: see `OBD`; "fisher" or "hutchinson" for networks with branches.
        fractions: see `Iterative`.
        every: ticks between rounds.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        importance=OBD(mode, sparsity=sparsity, scope="global"),  # type: ignore[arg-type]
        schedule=Iterative(fractions, every),
        calibration=calibration,
        **options,
    )


def obs(
    model: nn.Module,
    sparsity: float,
    calibration: Calibration,
    *,
    block: str | int | None = "row",
    **options: Any,
) -> Pruner:
    """Optimal brain surgeon: after each deletion all other weights move; no retraining needed.

    Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS
    1992.

    Args:
        model: the trained network.
        sparsity: of each layer.
        calibration: `Batches` of training data.
        block: of the inverse Hessian, see `SequentialOBS`.
        options: of `Pruner`.
    """
    budget = Magnitude(sparsity=sparsity).budget()
    return Pruner(
        model,
        granularity="element",
        budget=budget,
        selector=SequentialOBS(block),  # type: ignore[arg-type]
        compensator=OBSUpdate(block),  # type: ignore[arg-type]
        calibration=calibration,
        **options,
    )


def fisher(
    model: nn.Module,
    sparsity: float,
    calibration: Calibration,
    *,
    events: int = 10,
    every: int = 10,
    cost_weight: float = 0.0,
    **options: Any,
) -> Pruner:
    """Fisher pruning of feature maps, a few at a time with training between.

    Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks and Fisher
    pruning", 2018; there one map at a time: take as many `events` as maps are to go.

    Args:
        model: the trained network.
        sparsity: share of the weights in whole filters, over all layers.
        calibration: `Batches` of training data.
        events: prune events.
        every: ticks between them.
        cost_weight: see `Fisher`.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        importance=Fisher(cost_weight=cost_weight, sparsity=sparsity, scope="global"),
        schedule=Iterative(tuple((i + 1) / events for i in range(events)), every),
        calibration=calibration,
        **options,
    )


def apoz(
    model: nn.Module, calibration: Calibration, *, rounds: int = 1, every: int = 100, **options: Any
) -> Pruner:
    """Network trimming: maps that are 0 more often than mean + std of their layer go.

    Hu, Peng, Tai, Tang, "Network Trimming", 2016.

    Args:
        model: the trained network.
        calibration: `Batches` of many images.
        rounds: prune events.
        every: ticks between them.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        importance=APoZ(),
        selector=Threshold(1.0, of="scores"),
        schedule=Iterative(tuple((i + 1) / rounds for i in range(rounds)), every),
        calibration=calibration,
        **options,
    )


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


def data_free(model: nn.Module, sparsity: float, **options: Any) -> Pruner:
    """Merge the most similar neurons of linear layers; needs neither data nor training.

    Srinivas & Babu, "Data-free Parameter Pruning for Deep Neural Networks", BMVC 2015.

    Args:
        model: the trained network.
        sparsity: share of the neurons of each linear layer that another one alone reads.
        options: of `Pruner`.
    """
    readers = linear_consumers(model)
    targets = options.pop("targets", None) or [
        t for t in find_targets(model) if t.name in readers
    ]
    return Pruner(
        model,
        granularity="neuron",
        budget=Magnitude(sparsity=sparsity).budget(),
        selector=PairMerge(readers),
        compensator=MergeIntoNearest(readers),
        targets=targets,
        **options,
    )


def winograd_relu(
    model: nn.Module,
    density: float,
    *,
    fractions: tuple[float, ...] = (0.5, 0.8, 1.0),
    every: int = 100,
    **options: Any,
) -> Pruner:
    """Prune the weights of `WinogradReLUConv2d` layers where they are trained.

    Liu, Pool, Han, Dally, "Efficient Sparse-Winograd Convolutional Neural Networks", ICLR 2018.

    Args:
        model: a network with such layers.
        density: of each of them.
        fractions: see `Iterative`.
        every: ticks between rounds.
        options: of `Pruner`.
    """
    targets = options.pop("targets", None) or find_targets(model, types=(WinogradReLUConv2d,))
    return Pruner(
        model,
        importance=Magnitude(density=density, granularity="winograd"),
        schedule=Iterative(fractions, every),
        targets=targets,
        **options,
    )


def lasso_channel(
    model: nn.Module, sparsity: float, calibration: Calibration, **options: Any
) -> Pruner:
    """Drop input channels by LASSO and refit the layer, from shallow to deep.

    He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017.

    Args:
        model: the trained network; give a copy of it to `Batches` as `reference`.
        sparsity: share of the channels of each convolution that reads several.
        calibration: `Batches` of training data.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        granularity="channel",
        budget=Magnitude(sparsity=sparsity).budget(),
        selector=LassoPath(),
        compensator=LeastSquares("filter"),
        targets=options.pop("targets", None) or _readers_of_maps(model),
        calibration=calibration,
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


def thinet(
    model: nn.Module,
    sparsity: float,
    calibration: Calibration,
    *,
    every: int = 100,
    **options: Any,
) -> Pruner:
    """Drop the channels that the next layer misses least, rescale the rest, train, next layer.

    Luo, Wu, Lin, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression",
    ICCV 2017.

    Args:
        model: the trained network.
        sparsity: share of the channels of each convolution that reads several.
        calibration: `Batches` of training data.
        every: ticks of training after each layer.
        options: of `Pruner`.
    """
    targets = options.pop("targets", None) or _readers_of_maps(model)
    return Pruner(
        model,
        granularity="channel",
        budget=Magnitude(sparsity=sparsity).budget(),
        selector=GreedyReconstruction(),
        compensator=LeastSquares("channel_scale"),
        schedule=LayerByLayer(every, len(targets)),
        targets=targets,
        calibration=calibration,
        **options,
    )


def random_masks(
    model: nn.Module,
    sparsity: float,
    granularity: str,
    evaluate: Callable[[nn.Module], float],
    *,
    n_masks: int = 100,
    seed: int = 0,
    **options: Any,
) -> Pruner:
    """The best of many random masks, without training any of them.

    Anwar & Sung, "Coarse Pruning of Convolutional Neural Networks with Random Masks", 2016.

    Args:
        model: the trained network.
        sparsity: share of the groups of each layer.
        granularity: layer, filter, kernel, strided(s), ...
        evaluate: `evaluate(model)`, higher = better, on validation data.
        n_masks: trials.
        seed: of the masks.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        granularity=granularity,
        budget=Magnitude(sparsity=sparsity).budget(),
        selector=RandomMaskSearch(model, evaluate, n_masks, seed),
        **options,
    )


def _readers_of_maps(model: nn.Module) -> list[Target]:
    """Convolutions with several input channels per conv group."""
    convolutions = find_targets(model, types=(nn.Conv2d,))
    return [t for t in convolutions if t.grouped_shape[2] > 1]
