"""When to prune: events as a function of the step, without hidden state.

A schedule is asked once per tick, so resuming needs only the step counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .budget import check_share

EventKind = Literal["prune", "regrow", "freeze"]


@dataclass(frozen=True)
class Event:
    """Something to do at one tick.

    Attributes:
        kind: "prune" selects and masks, "regrow" asks the regrowth for a new mask, "freeze" ends
            all events: the masks never change again.
        fraction: for "prune", how much of the way from `initial` to the budget, in [0, 1].
        initial: sparsity at fraction 0.

    Raises:
        ValueError: an unknown kind or a number out of range.
    """

    kind: EventKind
    fraction: float = 1.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("prune", "regrow", "freeze"):
            raise ValueError(f"Event: expected kind prune, regrow or freeze, got {self.kind!r}")
        check_share(self.fraction, "fraction", "Event")
        check_share(self.initial, "initial", "Event")


@dataclass(frozen=True)
class OneShot:
    """Prune to the whole budget at one tick.

    Attributes:
        at: the tick, from 0.

    Raises:
        ValueError: a negative tick.
    """

    at: int = 0

    def __post_init__(self) -> None:
        _check_tick(self.at, "at", "OneShot", 0)

    def event(self, step: int, epoch: int) -> Event | None:
        """The prune event at tick `at`."""
        return Event("prune") if step == self.at else None


@dataclass(frozen=True)
class Polynomial:
    """Prune gradually, fast at first (Zhu & Gupta, "To prune, or not to prune", 2017).

    s_t = s_f + (s_i - s_f) * (1 - (t - begin) / (end - begin))^power at t = begin,
    begin + every, ..., and at t = end, where s_t is the budget exactly.

    Attributes:
        begin: first tick with an event.
        end: last tick with an event, > begin.
        every: ticks between events.
        power: 3 in the paper.
        initial: s_i, the sparsity at `begin`.

    Raises:
        TypeError: a tick is not an int.
        ValueError: out of range.
    """

    begin: int
    end: int
    every: int = 1
    power: float = 3.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_tick(self.begin, "begin", "Polynomial", 0)
        _check_tick(self.end, "end", "Polynomial", self.begin + 1)
        _check_tick(self.every, "every", "Polynomial", 1)
        check_share(self.initial, "initial", "Polynomial")
        if not 0.0 < self.power < float("inf"):
            raise ValueError(f"Polynomial: expected power in (0, inf), got {self.power}")

    def event(self, step: int, epoch: int) -> Event | None:
        """The prune event of this tick, if it is one of the schedule's."""
        if not self.begin <= step <= self.end:
            return None
        # The end is an event even if `every` does not divide the span: the budget is a promise.
        if (step - self.begin) % self.every and step != self.end:
            return None
        progress = (step - self.begin) / (self.end - self.begin)
        return Event("prune", 1.0 - (1.0 - progress) ** self.power, self.initial)


def _check_tick(value: object, name: str, what: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: expected {name} to be an int (a tick), got {value!r}")
    if value < least:
        raise ValueError(f"{what}: expected {name} >= {least}, got {value}")
