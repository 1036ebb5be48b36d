"""The slots of a pruning run: which part decides what, and when it is called.

A method of the literature is a choice of parts, not a class: an importance scores, a granularity
groups, a selector turns scores into masks, a compensator repairs what stays, a schedule says when,
a regrowth brings weights back, a regularizer acts on every step. `Pruner` calls them; any object
with the right methods fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from .budget import Budget
from .schedule import Event
from .targets import Target


@runtime_checkable
class Granularity(Protocol):
    """A partition of W's entries into `n_groups` groups that live or die together."""

    def n_groups(self, t: Target) -> int:
        """Number of groups of the weight of `t`."""
        ...

    def reduce(self, x: Tensor, t: Target, how: str = "l2") -> Tensor:
        """Shape of W -> (n_groups,), by sum, mean, max, min, l1 or l2 over each group."""
        ...

    def expand(self, g: Tensor, t: Target) -> Tensor:
        """(n_groups,) -> shape of W: every entry gets the value of its group."""
        ...


@runtime_checkable
class Stats(Protocol):
    """What a calibration pass measured, looked up by what was needed and for which target."""

    def get(self, need: str, t: Target) -> Tensor:
        """The tensor collected for `need` ("grad", "act", ...) at `t`."""
        ...


@runtime_checkable
class Calibration(Protocol):
    """Runs data through the model and collects everything the parts declared in `needs`."""

    def collect(self, model: nn.Module, targets: Sequence[Target], needs: frozenset[str]) -> Stats:
        """Called once per prune event, before scoring, only if some part needs something."""
        ...


@runtime_checkable
class Importance(Protocol):
    """Scores, higher = keep.

    A score shaped like W is reduced over each group by the attribute `reduction` ("mean" where
    there is none); a score of shape (n_groups,) is used as it is. An importance that draws its
    own group scores has `group_score(t, granularity, stats)` instead.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What `Stats` must hold for this part; empty for nothing."""
        ...

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """Scores shaped like W or (n_groups,); finite or infinite, never NaN."""
        ...


@runtime_checkable
class Selector(Protocol):
    """The only kind of part that turns scores into masks.

    Optional attributes: `uses_scores` and `uses_budget` (True where there is none) say whether
    `Pruner` must be given an importance and a budget. `sequential` (False where there is none)
    asks for the targets one by one, in their order: each is selected, compensated and masked
    before the statistics of the next one are collected.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What `Stats` must hold for this part; empty for nothing."""
        ...

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per group.

        Args:
            targets: the weights to decide about.
            scores: (n_groups,) float64 on the CPU per target; empty without an importance.
            granularity: the partition the scores and the result refer to.
            budget: how much may stay at this event.
            stats: what the calibration measured, None if nobody needed anything.
            current: bool, shape of W on the CPU: entries that may live. False stays dead. In mask
                mode "ste" without a regrowth all entries may come back; with one, those that
                are dead now wait for it.

        Returns:
            (n_groups,) bool on the CPU per target, True = keep.
        """
        ...


@runtime_checkable
class Compensator(Protocol):
    """Changes the surviving weights to make up for the ones about to be zeroed."""

    @property
    def needs(self) -> frozenset[str]:
        """What `Stats` must hold for this part; empty for nothing."""
        ...

    def apply(self, t: Target, keep: Tensor, stats: Stats | None) -> None:
        """Update `t.dense` in place; the entries to be dropped still hold their values.

        Called without gradient recording, after selection and before the mask is applied.
        """
        ...


@runtime_checkable
class Schedule(Protocol):
    """When something happens."""

    def event(self, step: int, epoch: int) -> Event | None:
        """What to do at tick `step` (from 0) of epoch `epoch` (from 0), None for nothing."""
        ...


@runtime_checkable
class Regrowth(Protocol):
    """Which dead entries come back at a regrow event."""

    @property
    def needs(self) -> frozenset[str]:
        """What `Stats` must hold for this part; empty for nothing."""
        ...

    def regrow(self, t: Target, mask: Tensor, stats: Stats | None) -> Tensor:
        """New bool mask, shape and device of `mask`. Revived entries restart from 0 in "hard"."""
        ...


@runtime_checkable
class Regularizer(Protocol):
    """Acts on every step: a differentiable penalty, a proximal step, or both."""

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """Scalar to add to the loss; zero if the regularizer has only a proximal step."""
        ...

    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Update `t.dense` in place after the optimizer's step.

        Args:
            targets: those whose parameter is in one parameter group of the optimizer.
            lr: the learning rate of that group now. Under Adam this is the scalar rate.
            step: ticks so far.
        """
        ...
