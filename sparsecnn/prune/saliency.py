"""Importances that look at data: what the loss or the activations say about a weight.

Each names what it needs in `needs`; `prune_` and `Pruner` collect it from a `Batches`. All of
them are estimates for the weights as they are now: after a change, measure again.

| importance | score of an entry or map                            | measured               |
|------------|-----------------------------------------------------|------------------------|
| OBD        | h_kk w^2 / 2                                        | curvature of the loss  |
| Fisher     | mean of squared per-sample gradients                | loss                   |
| Taylor     | first-order change of the loss, squared or absolute | loss                   |
| SNIP       | abs(w dL/dw)                                        | loss                   |
| Movement   | -sum over training steps of lr w dL/dw              | training               |
| Wanda      | abs(w) times the norm of its input                  | activations            |
| APoZ       | minus the share of zeros after ReLU                 | activations            |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from .curvature import Mode  # importing it makes the collectors known
from .granularity import filter_
from .importance import PruneConfig, register
from .protocols import Granularity, Stats
from .targets import Target

Level = Literal["map", "weight"]


def measured(stats: Stats | None, need: str, t: Target) -> Tensor:
    """What a calibration found, (...) float64 on the CPU.

    Raises:
        ValueError: there was no calibration.
    """
    if stats is None:
        raise ValueError(f"score: expected statistics with {need!r} for {t.name!r}, got None")
    return stats.get(need, t).detach().to("cpu").double()


def only_filters(config: PruneConfig) -> None:
    """Let a config that scores whole maps have the granularity "filter", its default then.

    Raises:
        ValueError: another granularity.
    """
    if config.granularity not in (None, filter_):
        raise ValueError(
            f"{type(config).__name__}: expected granularity 'filter' for scores of whole maps, "
            f"got {config.granularity}"
        )
    object.__setattr__(config, "granularity", filter_)


def _check_level(config: PruneConfig, level: str) -> None:
    if level not in get_args(Level):
        raise ValueError(
            f"{type(config).__name__}: expected level 'map' or 'weight', got {level!r}"
        )
    if level == "map":
        only_filters(config)


@register
@dataclass(frozen=True)
class OBD(PruneConfig):
    """Optimal brain damage: s_k = h_kk w_k^2 / 2, for a group the sum over its entries.

    The predicted increase of the loss when w_k is set to 0, at a minimum (no gradient) and
    without the off-diagonal entries of the Hessian. LeCun, Denker, Solla, "Optimal Brain Damage",
    NIPS 2 (1989), 598-605. Negative where the estimate of h_kk is.

    Attributes:
        mode: where h_kk comes from: "backprop" is the recursion of the paper, for chains of
            layers; "levenberg" the same without f'' (non-negative); "exact" double backward for
            small networks; "hutchinson" random probes and "fisher" squared per-sample gradients,
            both for any network.
        probes: of "hutchinson".

    Raises:
        ValueError: an unknown mode or no probe. The collector refuses networks that "backprop"
            does not cover, e.g. residual ones.
    """

    reduction: ClassVar[str] = "sum"

    mode: Mode = "backprop"
    probes: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise ValueError(
                f"OBD: expected mode among {', '.join(get_args(Mode))}, got {self.mode!r}"
            )
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise ValueError(f"OBD: expected probes to be an int >= 1, got {self.probes!r}")

    @property
    def _need(self) -> str:
        return f"hessian:{self.mode}" + (f":{self.probes}" if self.mode == "hutchinson" else "")

    @property
    def needs(self) -> frozenset[str]:
        """The diagonal of the Hessian."""
        return frozenset({self._need})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """Saliencies h w^2 / 2, shape of W."""
        return measured(stats, self._need, t) * t.values().square() / 2


@register
@dataclass(frozen=True)
class Fisher(PruneConfig):
    """Fisher pruning: second-order change of the loss from squared gradients of single samples.

    level "map": Delta_k = 1/(2N) sum_n d_nk^2 with d_nk = -sum over positions of a dL_n/da, a the
    output of the layer (before batch norm: what the zeroed filter takes away). level "weight":
    w^2/(2N) sum_n (dL_n/dw)^2, for a group the sum over its entries. Theis, Korshunova, Tejani,
    Huszar, "Faster gaze prediction with dense networks and Fisher pruning" (2018,
    arXiv 1801.05787).

    Attributes:
        level: "map" scores filters, "weight" single entries.
        cost_weight: beta of Delta - beta * MACs, where MACs per sample are those that the filter
            or entry itself takes; of layers with equal Delta the expensive one goes first. Acts
            between layers: use scope "global".

    Raises:
        ValueError: an unknown level, a negative cost_weight, or level "map" with another
            granularity than "filter".
    """

    reduction: ClassVar[str] = "sum"

    level: Level = "map"
    cost_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_level(self, self.level)
        if not 0.0 <= self.cost_weight < float("inf"):
            raise ValueError(
                f"Fisher: expected cost_weight in [0, inf), got {self.cost_weight!r}"
            )

    @property
    def _need(self) -> str:
        return "map_gradient:square" if self.level == "map" else "hessian:fisher"

    @property
    def needs(self) -> frozenset[str]:
        """Squared gradients, and output sizes if cost counts."""
        return frozenset({self._need, "positions"} if self.cost_weight else {self._need})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """(K,) for maps, shape of W for weights."""
        squares = measured(stats, self._need, t) / 2
        macs = 1
        if self.level == "weight":
            squares = squares * t.values().square()
        else:
            macs = t.dense.numel() // t.shape[0]
        if not self.cost_weight:
            return squares
        return squares - self.cost_weight * macs * measured(stats, "positions", t)


@register
@dataclass(frozen=True)
class Taylor(PruneConfig):
    """First-order change of the loss when a group or map is set to 0.

    level "weight": (sum over the group of w dL/dw)^2 with the gradient of the mean loss over all
    samples (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019).
    level "map": mean over samples of |mean over positions of a dL_n/da|, a the layer's output
    (Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    ICLR 2017; its division by a layer's norm is left out). At a minimum of the loss over the
    calibration samples the first form is 0: use data the network was not fitted to, or `Fisher`.

    Attributes:
        level: "map" scores filters; "weight" groups of every granularity.

    Raises:
        ValueError: an unknown level, or "map" with another granularity than "filter".
    """

    level: Level = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_level(self, self.level)

    @property
    def needs(self) -> frozenset[str]:
        """Gradients of weights or of maps."""
        return frozenset({"map_gradient:abs" if self.level == "map" else "grad"})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """(K,) for maps; (w dL/dw)^2 of single entries, shape of W, for weights."""
        if self.level == "map":
            return measured(stats, "map_gradient:abs", t)
        return (measured(stats, "grad", t) * t.values()).square()

    def group_score(self, t: Target, granularity: Granularity, stats: Stats | None) -> Tensor:
        """Changes within a group add up, and cancel, before they are squared."""
        if self.level == "map":
            return self.score(t, stats)
        change = measured(stats, "grad", t) * t.values()
        return granularity.reduce(change, t, "sum").square()


@register
@dataclass(frozen=True)
class SNIP(PruneConfig):
    """Connection sensitivity |w dL/dw|, for a group the sum over its entries.

    Meant for a network before training and the scope "global". The paper divides by the sum over
    all weights, which changes no order. Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning
    based on Connection Sensitivity", ICLR 2019.
    """

    reduction: ClassVar[str] = "sum"

    @property
    def needs(self) -> frozenset[str]:
        """The gradient of the mean loss."""
        return frozenset({"grad"})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """|w dL/dw|, shape of W."""
        return (measured(stats, "grad", t) * t.values()).abs()


@register
@dataclass(frozen=True)
class Movement(PruneConfig):
    """Movement pruning: -sum over the steps so far of lr * w * dL/dw, summed over a group.

    High where training drives a weight away from 0. Kept by the `Pruner` from step to step: it
    takes a schedule that starts after some steps, and the mask mode "ste" for dead entries to
    move on. Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020.
    """

    reduction: ClassVar[str] = "sum"

    @property
    def needs(self) -> frozenset[str]:
        """A running statistic."""
        return frozenset({"running:movement"})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """The movement, shape of W."""
        return measured(stats, "running:movement", t)


@register
@dataclass(frozen=True)
class Wanda(PruneConfig):
    """|w| times the root mean square over samples of the input it multiplies, all positions.

    For a convolution the input of W[k, c, r, s] is row (c, r, s) of the im2col matrix. The paper
    takes the norm over all samples, which only scales a layer, and compares within one output
    row; here the scope decides what is compared. No gradient is needed. Sun, Liu, Bair, Kolter,
    "A Simple and Effective Pruning Approach for Large Language Models" (2023, arXiv 2306.11695;
    ICLR 2024).
    """

    @property
    def needs(self) -> frozenset[str]:
        """Squared inputs."""
        return frozenset({"input_square"})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """|w| * ||x||, shape of W."""
        return t.values().abs() * measured(stats, "input_square", t).sqrt()


@register
@dataclass(frozen=True)
class APoZ(PruneConfig):
    """Network trimming: minus the average percentage of zeros of a map after its ReLU.

    APoZ_k = number of zeros in map k / (samples * positions), measured at the ReLU that follows
    the layer, before any pooling; batch norm and dropout may lie between. The paper prunes what
    lies more than one standard deviation above the layer's mean:
    `Threshold(1.0, of="scores")`. Hu, Peng, Tai, Tang, "Network Trimming" (2016,
    arXiv 1607.03250).

    Raises:
        ValueError: another granularity than "filter". The collector refuses layers that no ReLU
            follows, e.g. before the addition of a residual block.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        only_filters(self)

    @property
    def needs(self) -> frozenset[str]:
        """Shares of zeros."""
        return frozenset({"apoz"})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """-APoZ in [-1, 0], (K,)."""
        return -measured(stats, "apoz", t)
