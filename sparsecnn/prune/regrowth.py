"""What comes back from the dead at a regrow event."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .protocols import Stats
from .targets import Target


@dataclass(frozen=True)
class ReactivateAll:
    """Every entry lives again, from the value 0 in mask mode "hard".

    The dense phase of iterative hard thresholding (Jin et al., 2016).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def regrow(self, t: Target, mask: Tensor, stats: Stats | None) -> Tensor:
        """All True."""
        return torch.ones_like(mask)


@dataclass(frozen=True)
class Splice:
    """Dead entries come back once their dense weight has grown: |W| >= limit.

    The upper threshold of dynamic network surgery (Guo et al., 2016). Only mask mode "ste" lets
    dead entries move, so that they can grow.

    Attributes:
        value: the limit itself, or with `initial` the c of margin * max(mean + c * std, 0).
        initial: take mean and std of |W| when the pruner was built.
        margin: factor of the limit under `initial`; 1.1 in the authors' code, 0.9 for the lower
            threshold.

    Raises:
        ValueError: a number that is not finite, or a negative limit.
    """

    value: float
    initial: bool = False
    margin: float = 1.1

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or (self.value < 0 and not self.initial):
            raise ValueError(f"Splice: expected value >= 0, got {self.value}")
        if not 0 < self.margin < math.inf:
            raise ValueError(f"Splice: expected margin in (0, inf), got {self.margin}")

    @property
    def needs(self) -> frozenset[str]:
        """The initial statistics, if the limit depends on them."""
        return frozenset({"running:initial"}) if self.initial else frozenset()

    def regrow(self, t: Target, mask: Tensor, stats: Stats | None) -> Tensor:
        """The mask, and what has grown over the limit."""
        limit = self.value
        if self.initial:
            assert stats is not None, "a part with needs is given statistics"
            limit = initial_limit(stats, t, self.value, self.margin)
        return mask | (t.values().abs() >= limit).to(mask.device)


def initial_limit(stats: Stats, t: Target, c: float, margin: float) -> float:
    """Margin * max(mean + c * std, 0) of |W| when the pruner was built."""
    mean, std = stats.get("running:initial", t).tolist()
    return float(margin * max(mean + c * std, 0.0))
