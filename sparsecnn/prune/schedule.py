"""When to prune: events as a function of the step, without hidden state.

A schedule is asked once per tick, so resuming needs only the step counter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

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
        regrow: for "prune", let the regrowth bring entries back in the same tick.
        layer: for "prune", the position of the only target that is pruned; None for all.

    Raises:
        ValueError: an unknown kind or a number out of range.
    """

    kind: EventKind
    fraction: float = 1.0
    initial: float = 0.0
    regrow: bool = False
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("prune", "regrow", "freeze"):
            raise ValueError(f"Event: expected kind prune, regrow or freeze, got {self.kind!r}")
        check_share(self.fraction, "fraction", "Event")
        check_share(self.initial, "initial", "Event")
        if self.layer is not None:
            check_tick(self.layer, "layer", "Event", 0)


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
        check_tick(self.at, "at", "OneShot", 0)

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
        check_tick(self.begin, "begin", "Polynomial", 0)
        check_tick(self.end, "end", "Polynomial", self.begin + 1)
        check_tick(self.every, "every", "Polynomial", 1)
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


@dataclass(frozen=True)
class Iterative:
    """Prune in rounds with training between them (LeCun et al., "Optimal Brain Damage", 1989).

    Attributes:
        fractions: how much of the way to the budget after each round, ascending in (0, 1]; the
            last one is 1.
        every: ticks between rounds.
        begin: tick of the first round.

    Raises:
        TypeError: a tick is not an int.
        ValueError: out of range.
    """

    fractions: tuple[float, ...] = (0.5, 0.75, 0.9, 1.0)
    every: int = 100
    begin: int = 0

    def __post_init__(self) -> None:
        check_tick(self.every, "every", "Iterative", 1)
        check_tick(self.begin, "begin", "Iterative", 0)
        rounds = tuple(check_share(f, "fractions", "Iterative") for f in self.fractions)
        if not rounds or rounds[-1] != 1.0 or any(a >= b for a, b in pairwise((0.0, *rounds))):
            raise ValueError(
                f"Iterative: expected fractions ascending in (0, 1] up to 1, got {self.fractions}"
            )
        object.__setattr__(self, "fractions", rounds)

    def event(self, step: int, epoch: int) -> Event | None:
        """The prune event of a round."""
        number, rest = divmod(step - self.begin, self.every)
        if step < self.begin or rest or number >= len(self.fractions):
            return None
        return Event("prune", self.fractions[number])


@dataclass(frozen=True)
class Alternating:
    """Sparse and dense phases in turn, as iterative hard thresholding has them.

    Jin et al., "Training Skinny Deep Neural Networks with Iterative Hard Thresholding Methods",
    2016. Tick 0 of a round prunes to the budget; s1 ticks later everything is re-activated; s2
    ticks later the next round prunes. The last event prunes, so that the run ends sparse.

    Attributes:
        s1: ticks of a sparse phase, >= 1.
        s2: ticks of a dense phase, >= 1.
        rounds: dense phases, >= 1; there is one sparse phase more.
        begin: tick of the first prune event.
        progressive: let the sparsity grow linearly over the rounds, the budget at the last one.

    Raises:
        TypeError: a tick is not an int.
        ValueError: out of range.
    """

    s1: int
    s2: int
    rounds: int = 1
    begin: int = 0
    progressive: bool = False

    def __post_init__(self) -> None:
        for name, least in (("s1", 1), ("s2", 1), ("rounds", 1), ("begin", 0)):
            check_tick(getattr(self, name), name, "Alternating", least)

    def event(self, step: int, epoch: int) -> Event | None:
        """The prune or regrow event of this tick."""
        number, phase = divmod(step - self.begin, self.s1 + self.s2)
        if step < self.begin or number > self.rounds:
            return None
        if phase == 0:
            share = (number + 1) / (self.rounds + 1) if self.progressive else 1.0
            return Event("prune", share)
        return Event("regrow") if phase == self.s1 and number < self.rounds else None


@dataclass(frozen=True)
class Probabilistic:
    """Prune and regrow at random ticks, less and less often.

    Tick t has an event with probability (1 + gamma * t)^-power (Guo et al., "Dynamic Network
    Surgery for Efficient DNNs", 2016). The draw of a tick depends on the seed and the tick alone,
    so a resumed run continues with the events of the uninterrupted one.

    Attributes:
        gamma: decay of the frequency, >= 0.
        power: exponent, >= 0.
        stop: no event at this tick or later.
        seed: of the draws.

    Raises:
        TypeError: `stop` or `seed` is not an int.
        ValueError: out of range.
    """

    gamma: float = 1e-4
    power: float = 1.0
    stop: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_tick(self.stop, "stop", "Probabilistic", 1)
        check_tick(self.seed, "seed", "Probabilistic", 0)
        for name in ("gamma", "power"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"Probabilistic: expected {name} in [0, inf), got {getattr(self, name)}"
                )

    def event(self, step: int, epoch: int) -> Event | None:
        """A prune event with regrowth, or nothing."""
        if step >= self.stop:
            return None
        mixed = (self.seed * 0x9E3779B97F4A7C15 + step) % 2**63
        draw = torch.rand((), generator=torch.Generator().manual_seed(mixed), dtype=torch.float64)
        happens = float(draw) < (1.0 + self.gamma * step) ** -self.power
        return Event("prune", regrow=True) if happens else None


@dataclass(frozen=True)
class LayerByLayer:
    """Prune one target after the other, in their order, with training between them.

    ThiNet (Luo et al., 2017) fine-tunes the network after every layer.

    Attributes:
        every: ticks between layers.
        layers: how many targets there are.
        begin: tick of the first one.

    Raises:
        TypeError: a tick is not an int.
        ValueError: out of range.
    """

    every: int
    layers: int
    begin: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("layers", 1), ("begin", 0)):
            check_tick(getattr(self, name), name, "LayerByLayer", least)

    def event(self, step: int, epoch: int) -> Event | None:
        """The prune event of one layer."""
        number, rest = divmod(step - self.begin, self.every)
        if step < self.begin or rest or number >= self.layers:
            return None
        return Event("prune", layer=number)


def check_tick(value: object, name: str, what: str, least: int) -> None:
    """Refuse what is no whole number of ticks of at least `least`.

    Raises:
        TypeError: not an int (a bool is none).
        ValueError: too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: expected {name} to be an int (a tick), got {value!r}")
    if value < least:
        raise ValueError(f"{what}: expected {name} >= {least}, got {value}")
