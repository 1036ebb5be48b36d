"""How much may stay: exactly one of a sparsity, a density or a count of groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Budget:
    """Target of a selection, per layer or over all layers, as the selector's scope says.

    Attributes:
        sparsity: share of W's entries to zero, in [0, 1].
        density: 1 - sparsity.
        count: number of groups to keep (not entries, unless the granularity is "element").
        fraction: how much of the way from `initial` to the target is asked for, in [0, 1]; set by
            the schedule.
        initial: sparsity at fraction 0.

    Raises:
        TypeError: a value is not a number.
        ValueError: not exactly one target, or a value out of range.
    """

    sparsity: float | None = None
    density: float | None = None
    count: int | None = None
    fraction: float = 1.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        given = [n for n in ("sparsity", "density", "count") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "Budget: expected exactly one of sparsity, density and count, got "
                + (" and ".join(given) if given else "none")
            )
        for name in ("sparsity", "density", "fraction", "initial"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_share(value, name))
        if self.count is not None:
            if isinstance(self.count, bool) or not isinstance(self.count, int):
                raise TypeError(
                    f"Budget: expected count to be an int (groups to keep), got {self.count!r}"
                )
            if self.count < 0:
                raise ValueError(f"Budget: expected count >= 0, got {self.count}")

    @property
    def target_sparsity(self) -> float | None:
        """The final sparsity, None for a count."""
        if self.density is not None:
            return 1.0 - self.density
        return self.sparsity

    def at(self, fraction: float, initial: float = 0.0) -> Budget:
        """The budget part of the way: fraction 0 is `initial` sparsity, 1 the target."""
        return Budget(self.sparsity, self.density, self.count, fraction, initial)

    def to_drop(self, total: float) -> float:
        """How many of `total` units to drop: entries, or groups for a count. Not rounded."""
        if self.count is not None:
            final = total - self.count
        elif self.density is not None:
            final = total - self.density * total
        else:
            assert self.sparsity is not None
            final = self.sparsity * total
        if self.fraction == 1.0:
            return final
        start = self.initial * total
        return start + (final - start) * self.fraction

    def to_dict(self) -> dict[str, float | int]:
        """Only what differs from the defaults, for TOML and JSON."""
        data: dict[str, float | int] = {}
        for name, default in (
            ("sparsity", None),
            ("density", None),
            ("count", None),
            ("fraction", 1.0),
            ("initial", 0.0),
        ):
            value = getattr(self, name)
            if value != default:
                data[name] = value
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Budget:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown field.
        """
        known = {"sparsity", "density", "count", "fraction", "initial"}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"Budget: expected fields {sorted(known)}, got {unknown}")
        return cls(**data)


def check_share(value: object, name: str, what: str = "Budget") -> float:
    """A number in [0, 1] as float.

    Raises:
        TypeError: not a real number (a bool is not one).
        ValueError: NaN or outside [0, 1]; percentages get a hint.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what}: expected {name} to be a number in [0, 1], got {value!r}")
    number = float(value)
    if math.isnan(number) or not 0.0 <= number <= 1.0:
        hint = f"; did you mean {number / 100:g}?" if 1.0 < number <= 100.0 else ""
        raise ValueError(f"{what}: expected {name} in [0, 1], got {number:g}{hint}")
    return number
