"""Rank policies: how small the factors are.

Ranks that several layers decide together are in `global_ranks`, ranks by measured time in
`latency`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from .method import Method, Stage, chain_macs, chain_params
from .problem import LayerProblem


@runtime_checkable
class RankPolicy(Protocol):
    """Chooses the ranks of one layer."""

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """Ranks, possibly out of range: `factorize` clamps them to [1, full]."""
        ...


Trial = Callable[[str, tuple[int, ...] | None, Callable[[nn.Module], float]], float]


@runtime_checkable
class GlobalPolicy(Protocol):
    """Chooses the ranks of all layers of a network together; `factorize_` asks it once."""

    @property
    def needs_data(self) -> bool:
        """Whether the problems must hold moments, which takes calibration data."""
        ...

    def select_all(
        self, problems: Mapping[str, LayerProblem], method: Method, trial: Trial
    ) -> dict[str, tuple[int, ...]]:
        """Ranks by name.

        Args:
            problems: the layers by name, in the order of their calls.
            method: the method.
            trial: `trial(name, ranks, evaluate)`: what `evaluate(model)` says of the network with
                that layer alone factorized, or with none where ranks is None.
        """
        ...


def check_number(
    policy: str, name: str, value: object, low: float, high: float = math.inf
) -> float:
    """A number in (low, high], or an error that names the policy."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{policy}: expected {name} a number, got {type(value).__name__}")
    if not low < value <= high:
        bound = f"in ({low:g}, {high:g}]" if math.isfinite(high) else f"> {low:g}"
        raise ValueError(f"{policy}: expected {name} {bound}, got {value:g}")
    return float(value)


@dataclass(frozen=True)
class Fixed:
    """The ranks themselves.

    Attributes:
        ranks: one number for all ranks of the method, or one for each.

    Raises:
        TypeError: not an integer or a sequence of them.
        ValueError: a rank below 1.
    """

    ranks: int | tuple[int, ...]

    def __post_init__(self) -> None:
        given = self.ranks if isinstance(self.ranks, tuple) else (self.ranks,)
        for rank in given:
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"Fixed: expected rank an integer, got {type(rank).__name__}")
            if rank < 1:
                raise ValueError(f"Fixed: expected rank >= 1, got {rank}")
        if not given:
            raise ValueError("Fixed: expected at least one rank, got none")

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """As given.

        Raises:
            ValueError: another number of ranks than the method has, or a rank above full.
        """
        full = method.full_ranks(p)
        ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks,) * len(full)
        if len(ranks) != len(full):
            raise ValueError(
                f"factorize: {p.name}: expected rank with {len(full)} entries for method "
                f"{method.name!r}, got {len(ranks)}"
            )
        for rank, bound in zip(ranks, full, strict=True):
            if rank > bound and isinstance(self.ranks, tuple):
                raise ValueError(
                    f"factorize: {p.name}: expected ranks at most {full} (full), got {ranks}"
                )
        if min(ranks) > max(full):
            raise ValueError(
                f"factorize: {p.name}: expected rank at most {full} (full), got {ranks}"
            )
        return ranks


@dataclass(frozen=True)
class Ratio:
    """``round(q * full)`` of each rank.

    Attributes:
        q: in (0, 1].
    """

    q: float

    def __post_init__(self) -> None:
        check_number("Ratio", "q", self.q, 0, 1)

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """The share of each full rank."""
        return tuple(round(self.q * full) for full in method.full_ranks(p))


def energy_rank(energies: Tensor, tau: float) -> int:
    """The least r with ``sum_{i <= r} e_i >= tau * sum e_i``.

    Args:
        energies: in descending order: squared singular values, or eigenvalues of a covariance.
        tau: in (0, 1].
    """
    total = energies.sum()
    if float(total) == 0:
        return 1
    # Rounding must not ask for a rank more than there is at tau = 1.
    reached = energies.cumsum(0) >= tau * total * (1 - 1e-12)
    return int(reached.to(energies.dtype).argmax()) + 1


@dataclass(frozen=True)
class Energy:
    """The least rank that keeps a share of the energy, the squared singular values.

    Attributes:
        tau: in (0, 1].
    """

    tau: float

    def __post_init__(self) -> None:
        check_number("Energy", "tau", self.tau, 0, 1)

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """From the spectra of the method.

        Raises:
            UnsupportedLayer: the method has no spectrum.
        """
        return tuple(energy_rank(spectrum, self.tau) for spectrum in method.spectra(p))


@dataclass(frozen=True)
class TargetSpeedup:
    """The largest ranks, in a common ratio to the full ones, at v times fewer MACs.

    MACs are counted at the stages' true resolutions. For the schemes with one rank this is the
    closed form of the literature, ``floor``; for Tucker-2 its quadratic equation.

    Attributes:
        v: above 1: dense MACs over those of the chain.
    """

    v: float

    def __post_init__(self) -> None:
        check_number("TargetSpeedup", "v", self.v, 1)

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """Ranks within the target.

        Raises:
            ValueError: even rank 1 is dearer.
        """
        return largest_within(p, method, p.dense_macs / self.v, chain_macs, "MACs", self.v)


@dataclass(frozen=True)
class ParamRatio:
    """The largest ranks, in a common ratio to the full ones, with v times fewer weights.

    Attributes:
        v: above 1.
    """

    v: float

    def __post_init__(self) -> None:
        check_number("ParamRatio", "v", self.v, 1)

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """Ranks within the target.

        Raises:
            ValueError: even rank 1 has more weights.
        """
        return largest_within(p, method, p.dense_params / self.v, chain_params, "weights", self.v)


def ranks_at(p: LayerProblem, method: Method, ratio: float) -> tuple[int, ...]:
    """``floor(ratio * full)`` of each rank, at least 1."""
    # A ratio that stands for a whole number may be an ulp below it.
    return method.clamp(p, [math.floor(ratio * full + 1e-9) for full in method.full_ranks(p)])


def largest_within(
    p: LayerProblem,
    method: Method,
    bound: float,
    cost: Callable[[LayerProblem, Sequence[Stage]], int],
    unit: str,
    v: float,
) -> tuple[int, ...]:
    """The largest common ratio whose cost is within a bound, by bisection.

    Raises:
        ValueError: none is.
    """
    full = method.full_ranks(p)
    # Every ratio at which some rank changes.
    every = {(rank, n) for n in set(full) for rank in range(1, n + 1)}
    steps = sorted(every, key=lambda step: step[0] / step[1])
    low, high = -1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        rank, n = steps[middle]
        if cost(p, method.stages(p, ranks_at(p, method, rank / n))) <= bound:
            low = middle
        else:
            high = middle
    if low < 0:
        least = cost(p, method.stages(p, ranks_at(p, method, 0.0)))
        raise ValueError(
            f"factorize: {p.name}: expected a target within reach of method {method.name!r}, got "
            f"{v:g} times fewer {unit}; rank 1 has {least} of {bound:.0f} allowed"
        )
    rank, n = steps[low]
    return ranks_at(p, method, rank / n)


Rank = RankPolicy | GlobalPolicy | int | tuple[int, ...]


def policy_of(rank: Rank) -> RankPolicy | GlobalPolicy:
    """The policy, or `Fixed` for numbers.

    Raises:
        TypeError: none of these.
    """
    if isinstance(rank, (int, tuple)):
        return Fixed(rank)
    if not isinstance(rank, (RankPolicy, GlobalPolicy)) or isinstance(rank, type):
        raise TypeError(
            "factorize: expected rank an integer, a tuple or a policy such as TargetSpeedup(2), "
            f"got {type(rank).__name__ if not isinstance(rank, type) else rank.__name__}"
        )
    return rank
