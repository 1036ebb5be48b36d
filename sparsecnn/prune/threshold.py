"""Selection by a threshold on the scores: how much goes is what falls below it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from .budget import Budget
from .protocols import Granularity, Stats
from .regrowth import initial_limit
from .selection import alive_first, top
from .targets import Target

Of = Literal["absolute", "weight_std", "scores", "initial"]


@dataclass(frozen=True)
class Threshold:
    r"""Keep the groups of each layer whose score reaches a limit; a budget plays no part.

    | `of`         | limit of a layer                                      | paper              |
    |--------------|-------------------------------------------------------|--------------------|
    | "absolute"   | value; 0 drops what scores exactly 0                  | zeros of a prox    |
    | "weight_std" | value * std(W)                                        | Han et al., 2015   |
    | "scores"     | mean - value * std of the layer's living scores       | Hu et al., 2016    |
    | "initial"    | margin * max(mean + value * std, 0) of \|W\| at first | Guo et al., 2016   |

    Attributes:
        value: see the table.
        of: what the value refers to.
        floor: groups that every layer keeps whatever their scores, its best ones.
        margin: factor under "initial".

    Raises:
        ValueError: a number that is not finite, or an unknown `of`.
    """

    uses_scores: ClassVar[bool] = True
    uses_budget: ClassVar[bool] = False

    value: float
    of: Of = "absolute"
    floor: int = 1
    margin: float = 0.9

    def __post_init__(self) -> None:
        if self.of not in get_args(Of):
            raise ValueError(
                f"Threshold: expected of among {', '.join(get_args(Of))}, got {self.of!r}"
            )
        if not (math.isfinite(self.value) and math.isfinite(self.margin)):
            raise ValueError(f"Threshold: expected finite numbers, got {self}")
        if isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 0:
            raise ValueError(f"Threshold: expected floor to be an int >= 0, got {self.floor!r}")

    @property
    def needs(self) -> frozenset[str]:
        """The initial statistics, if the limit depends on them."""
        return frozenset({"running:initial"}) if self.of == "initial" else frozenset()

    def limit(self, t: Target, scores: Tensor, stats: Stats | None) -> float:
        """The score that a group of this layer must reach. `scores`: those of living groups."""
        if self.of == "weight_std":
            return self.value * float(t.values().std(correction=0))
        if self.of == "scores":
            return float(scores.mean() - self.value * scores.std(correction=0))
        if self.of == "initial":
            assert stats is not None, "a part with needs is given statistics"
            return initial_limit(stats, t, self.value, self.margin)
        return self.value

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per group; see `Selector.select` for shapes."""
        keep = {}
        for t in targets:
            ranked = alive_first(scores[t], granularity, t, current.get(t))
            living = ranked > -math.inf
            limit = self.limit(t, scores[t][living], stats) if bool(living.any()) else 0.0
            above = ranked > 0 if limit == 0 and self.of == "absolute" else ranked >= limit
            keep[t] = above | top(ranked, min(self.floor, ranked.numel()))
        return keep
