"""Rank policies that look at all layers of a network at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from .method import Method
from .methods.zhang import Zhang, pca_eigenvalues
from .problem import LayerProblem, UnsupportedLayer
from .ranks import Trial, check_number
from .solvers.response import greedy_pca_ranks


@dataclass(frozen=True)
class PCAEnergyGlobal:
    r"""One budget for all layers, spent where the responses need it.

        max prod_l sum_{a <= r_l} sigma_{l,a}    s.t.    sum_l (r_l / T_l) C_l <= sum_l C_l / v

    with sigma the eigenvalues of the covariance of layer l's responses and C_l its MACs as it is,
    greedily (Zhang, Zou, He, Sun, TPAMI 2016, section 2.4; see `greedy_pca_ranks`). As there, the
    1x1 stages do not count: the MACs of the chains are above the budget by ``r_l T_l`` per output
    position. `Zhang` of variant "3d" gets r_l at sqrt(v) and the K_l at which V x H is another
    sqrt(v) times faster than r_l filters.

    Attributes:
        speedup: v > 1.

    Raises:
        TypeError: no number.
        ValueError: out of range.
    """

    speedup: float

    def __post_init__(self) -> None:
        check_number("PCAEnergyGlobal", "speedup", self.speedup, 1)

    @property
    def needs_data(self) -> bool:
        """It works on responses."""
        return True

    def select_all(
        self, problems: Mapping[str, LayerProblem], method: Method, trial: Trial | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Ranks of every layer, by name.

        Raises:
            UnsupportedLayer: a method whose only rank is not that of the responses.
            ValueError: no moments, or a speedup out of reach.

        Cost: an eigenproblem (T, T) per layer and group.
        """
        split = isinstance(method, Zhang) and method.variant == "3d"
        for p in problems.values():
            full = method.full_ranks(p)
            if (len(full) > 1 and not split) or full[0] > p.T:
                raise UnsupportedLayer(
                    f"factorize: {p.name}: PCAEnergyGlobal chooses a rank of the responses, which "
                    f"method {method.name!r} does not have; use zhang or channel_svd"
                )
        part = math.sqrt(self.speedup) if split else self.speedup
        found = greedy_pca_ranks(
            [pca_eigenvalues(p) for p in problems.values()],
            [float(p.dense_macs) for p in problems.values()],
            part,
        )
        ranks: dict[str, tuple[int, ...]] = {}
        for (name, p), rank in zip(problems.items(), found, strict=True):
            if split:
                assert isinstance(method, Zhang)
                ranks[name] = (rank, method.pairs_for(p, rank, part))
            else:
                ranks[name] = method.clamp(p, (rank,))
        return ranks


@dataclass(frozen=True)
class Sensitivity:
    """Ranks in proportion to what each layer loses when it alone is factorized.

    With every layer at the average rank in turn, s_l is the drop of `evaluate`; R_l is s_l's share
    of the sum of all ranks, between 1 and full, what a bound takes away going to the others (Astrid
    & Lee, "CP-decomposition with tensor power method for convolutional neural networks
    compression", BigComp 2017).

    Attributes:
        average: mean rank of the layers.
        evaluate: `evaluate(model)`, higher = better, on validation data.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: out of range.
    """

    average: int
    evaluate: Callable[[nn.Module], float]

    def __post_init__(self) -> None:
        check_number("Sensitivity", "average", self.average, 0)
        if not callable(self.evaluate):
            raise TypeError(
                "Sensitivity: expected evaluate a function, got "
                f"{type(self.evaluate).__name__}"
            )

    @property
    def needs_data(self) -> bool:
        """`evaluate` has its own."""
        return False

    def select_all(
        self, problems: Mapping[str, LayerProblem], method: Method, trial: Trial
    ) -> dict[str, tuple[int, ...]]:
        """Ranks of every layer, by name.

        Raises:
            UnsupportedLayer: a method with more than one rank.

        Cost: a factorization and an evaluation per layer.
        """
        full = {}
        for name, p in problems.items():
            ranks = method.full_ranks(p)
            if len(ranks) != 1:
                raise UnsupportedLayer(
                    f"factorize: {name}: Sensitivity chooses one rank, method {method.name!r} has "
                    f"{len(ranks)}"
                )
            full[name] = ranks[0]
        if not problems:
            return {}
        base = trial(next(iter(problems)), None, self.evaluate)
        drops = {
            name: max(0.0, base - trial(name, method.clamp(p, (self.average,)), self.evaluate))
            for name, p in problems.items()
        }
        if not any(drops.values()):
            drops = dict.fromkeys(drops, 1.0)  # nothing hurts: all alike
        return {name: (rank,) for name, rank in share(drops, full, self.average).items()}


def share(
    drops: Mapping[str, float], full: Mapping[str, int], average: int
) -> dict[str, int]:
    """Whole numbers in proportion to `drops` with a fixed sum, each between 1 and its `full`.

    The sum is ``average * len(drops)``, or as near as the bounds allow. One by one, each goes to
    the layer that is furthest below its share; of equals the first one.
    """
    total = sum(drops.values())
    goal = {name: average * len(drops) * drop / total for name, drop in drops.items()}
    found = dict.fromkeys(drops, 1)
    for _ in range(average * len(drops) - len(drops)):
        open_ = [name for name in found if found[name] < full[name]]
        if not open_:
            break
        furthest = max(open_, key=lambda name: goal[name] - found[name])
        found[furthest] += 1
    return found
