"""Statistics of the training run itself, kept by the `Pruner` from step to step.

A part asks for one by a need that starts with "running:". Running statistics belong to the
pruner's state: a resumed run goes on with the sums of the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .protocols import Stats
from .targets import Target

PREFIX = "running:"


def _initial(t: Target) -> Tensor:
    """Mean and standard deviation (of the population) of |W| when the pruner was built, (2,)."""
    size = t.values().abs()
    return torch.stack([size.mean(), size.std(correction=0)])


def _nothing_moved(t: Target) -> Tensor:
    return torch.zeros(t.shape, dtype=torch.float64)


def _movement(t: Target, lr: float) -> Tensor:
    """-lr * dL/dW * W of this step: positive where the weight moves away from 0."""
    gradient = t.dense.grad
    if gradient is None:
        return _nothing_moved(t)
    return -lr * gradient.detach().to("cpu", torch.float64) * t.values()


# need -> (value at the start, what a step adds or None)
_STATISTICS: dict[
    str, tuple[Callable[[Target], Tensor], Callable[[Target, float], Tensor] | None]
] = {
    "running:initial": (_initial, None),
    "running:movement": (_nothing_moved, _movement),
}


class Running:
    """The running statistics that one pruner needs.

    Args:
        needs: all needs of its parts; only those that start with "running:" count.
        targets: the pruned weights.

    Raises:
        ValueError: an unknown one.
    """

    def __init__(self, needs: Iterable[str], targets: Iterable[Target]) -> None:
        names = sorted(need for need in needs if need.startswith(PREFIX))
        for name in names:
            if name not in _STATISTICS:
                raise ValueError(
                    f"Pruner: expected needs among {', '.join(sorted(_STATISTICS))}, got {name!r}"
                )
        self.targets = tuple(targets)
        self.values = {n: {t: _STATISTICS[n][0](t) for t in self.targets} for n in names}

    def observe(self, targets: Iterable[Target], lr: float) -> None:
        """Note what the optimizer's next step is about to do to weights of one parameter group."""
        for name, values in self.values.items():
            update = _STATISTICS[name][1]
            if update is not None:
                for t in targets:
                    values[t] += update(t, lr)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Copies by need and weight name."""
        return {
            name: {t.key: value.clone() for t, value in values.items()}
            for name, values in self.values.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `state_dict`; the pruner has checked names and shapes."""
        self.values = {
            name: {t: state[name][t.key].clone() for t in self.targets} for name in self.values
        }

    def over(self, measured: Stats | None) -> Stats:
        """Look-up of both these and what a calibration measured."""
        return _Both(self, measured)


@dataclass(frozen=True)
class _Both:
    running: Running
    measured: Stats | None

    def get(self, need: str, t: Target) -> Tensor:
        """See `Stats.get`."""
        if need in self.running.values:
            return self.running.values[need][t]
        if self.measured is None:
            raise KeyError(f"Stats: expected {need!r} among the needs of a part, got none")
        return self.measured.get(need, t)
