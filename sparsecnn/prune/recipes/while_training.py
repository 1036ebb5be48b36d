"""Methods that make zeros while the network trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..gates import Gates, L0Penalty, add_gates_
from ..group_lasso import GroupLasso
from ..importance import Magnitude, PruneConfig
from ..protocols import Regularizer
from ..pruner import Pruner
from ..regrowth import ReactivateAll, Splice
from ..regularization import L1, TensorNuclear, UnitBias, UnitBiasKind
from ..schedule import Alternating, OneShot, Polynomial, Probabilistic
from ..search import GreedyLayerSearch
from ..targets import find_targets
from ..threshold import Threshold


def unit_bias(
    model: nn.Module,
    beta: float,
    at: int,
    *,
    lam: float = 1.0,
    kind: UnitBiasKind = "hyperbolic",
    tol: float = 0.0,
    **options: Any,
) -> Pruner:
    """A penalty under which small units vanish and large ones stay; small units go at the end.

    Hanson & Pratt, "Comparing Biases for Minimal Network Construction with Back-Propagation",
    NIPS 1988.

    Args:
        model: the network; the penalty acts from the first step.
        beta: weight of the penalty.
        at: tick at which small units die and the penalty ends.
        lam: see `UnitBias`.
        kind: see `UnitBias`.
        tol: mean |w| of a unit below which it dies; 0 for exact zeros only.
        options: of `Pruner`.
    """
    selector = Threshold(tol)
    return _zeros_stay(model, "neuron", (UnitBias(kind, lam, beta),), at, options, selector)


def collins(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    budget_bytes: int,
    *,
    lam: float = 0.0,
    at: int = 0,
    **options: Any,
) -> Pruner:
    """A greedy search for the layers' densities under a bound on the bytes, with L1 shrinkage.

    Collins & Kohli, "Memory Bounded Deep Convolutional Networks", 2014.

    Args:
        model: the network.
        evaluate: `evaluate(model)`, higher = better, on validation data.
        budget_bytes: of the pruned weights in CSR.
        lam: weight of the L1 penalty of every step.
        at: tick of the search.
        options: of `Pruner`, except `tolerance`, `grid` and `finetune` of `GreedyLayerSearch`.
    """
    names = ("tolerance", "grid", "finetune")
    search = {name: options.pop(name) for name in names if name in options}
    return Pruner(
        model,
        importance=Magnitude(),
        selector=GreedyLayerSearch(model, evaluate, budget_bytes, **search),
        schedule=OneShot(at),
        regularizers=(L1(lam),) if lam else (),
        **options,
    )


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


def less_is_more(
    model: nn.Module, lam: float, at: int, *, lam_rank: float = 0.0, **options: Any
) -> Pruner:
    """The group lasso on filters and neurons by forward-backward splitting.

    Zhou, Alvarez, Porikli, "Less Is More: Towards Compact CNNs", ECCV 2016.

    Args:
        model: the network.
        lam: weight of the group lasso.
        at: tick from which filters at 0 stay dead.
        lam_rank: weight of the tensor low-rank term, 0 for none.
        options: of `Pruner`.
    """
    parts: list[Regularizer] = [GroupLasso("filter", lam)]
    if lam_rank:
        parts.append(TensorNuclear(lam_rank))
    return _zeros_stay(model, "filter", parts, at, options)


def ssl(
    model: nn.Module,
    lam: float | Sequence[float],
    at: int,
    granularities: Sequence[str] = ("channel", "filter"),
    **options: Any,
) -> Pruner:
    """Structured sparsity learning: group lassos on several structures at once.

    Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NIPS 2016.

    Args:
        model: the network.
        lam: weight of each lasso, or one for all.
        at: tick from which zeros stay.
        granularities: filter, channel, shape, layer.
        options: of `Pruner`.
    """
    kept = granularities[0] if len(granularities) == 1 else "element"
    return _zeros_stay(model, kept, (GroupLasso(tuple(granularities), lam),), at, options)


def group_brain_damage(
    model: nn.Module,
    sparsity: float,
    begin: int,
    end: int,
    *,
    every: int = 10,
    lam: float = 1e-3,
    growth: float = 0.0,
    **options: Any,
) -> Pruner:
    """Columns of the lowered weight shrink under a growing group lasso, the smallest die first.

    Lebedev & Lempitsky, "Fast ConvNets Using Group-wise Brain Damage", CVPR 2016.

    Args:
        model: the trained network.
        sparsity: share of the columns of each layer at the end.
        begin: tick of the first prune event.
        end: tick of the last.
        every: ticks between events.
        lam: weight of the lasso at first.
        growth: what a step adds to it.
        options: of `Pruner`.
    """
    return Pruner(
        model,
        importance=Magnitude(2, sparsity=sparsity, granularity="shape"),
        schedule=Polynomial(begin, end, every),
        regularizers=(GroupLasso("shape", lam, growth=growth, target_sparsity=sparsity),),
        **options,
    )


def l0(
    model: nn.Module,
    lam: float,
    at: int,
    example_inputs: Tensor | Sequence[Any],
    *,
    droprate: float = 0.2,
    **options: Any,
) -> Pruner:
    """Hard-concrete gates on filters and units; gates that are shut at the end take them along.

    Build the optimizer after this call: the gates are parameters. After `finalize`, `fold_gates_`
    multiplies open gates into the weights. Louizos, Welling, Kingma, "Learning Sparse Neural
    Networks through L0 Regularization", ICLR 2018.

    Args:
        model: the network; gates are added to it.
        lam: weight of the expected number of open weights.
        at: tick at which shut gates become dead filters.
        example_inputs: of the model.
        droprate: at first, see `add_gates_`.
        options: of `Pruner`.
    """
    targets = options.pop("targets", None) or find_targets(model, example_inputs)
    add_gates_(model, targets, example_inputs, droprate=droprate)
    return Pruner(
        model,
        importance=Gates(granularity="filter"),
        selector=Threshold(0.0),
        schedule=OneShot(at),
        regularizers=(L0Penalty(lam),),
        regularize_until=at + 1,
        targets=targets,
        example_inputs=example_inputs,
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


def _zeros_stay(
    model: nn.Module,
    granularity: str,
    regularizers: Sequence[Regularizer],
    at: int,
    options: dict[str, Any],
    selector: Threshold = Threshold(0.0),  # noqa: B008 (frozen)
) -> Pruner:
    """What the regularizers have driven to 0 by tick `at` is dead from then on; then they rest."""
    return Pruner(
        model,
        granularity=granularity,
        importance=Magnitude(),
        selector=selector,
        schedule=OneShot(at),
        regularizers=regularizers,
        regularize_until=at + 1,
        **options,
    )
