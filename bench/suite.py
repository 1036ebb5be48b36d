"""What every suite shares: its settings, contestants with buffers of their own, rows of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.timing import Run, measure
from sparsecnn.measure import LatencyStats

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Settings:
    """How to run a suite.

    Attributes:
        names: cases to run, of the suite's `NAMES`.
        densities: shares of nonzeros; a suite of dense layers ignores them.
        batch: N.
        device: "cpu" or "cuda".
        dtype: of data and weights.
        cold: rotate buffers past the last-level cache.
        settle: untimed runs in front of each timed one of a warm measurement.
        runs: timed rounds of each measurement.
        max_time_s: budget of one measurement.
        roof_gflops: to give rates as a share of, if known.
    """

    names: Sequence[str]
    densities: Sequence[float]
    batch: int
    device: str
    dtype: torch.dtype
    cold: bool
    settle: int
    runs: int
    max_time_s: float | None
    roof_gflops: float | None


class Suite(Protocol):
    """A module of benchmarks.

    Attributes:
        NAMES: of its cases.
        QUICK: the few that `--quick` runs.
        DENSITIES: that run when none are asked for.
        QUICK_DENSITIES: those of `--quick`.
    """

    NAMES: Sequence[str]
    QUICK: Sequence[str]
    DENSITIES: Sequence[float]
    QUICK_DENSITIES: Sequence[float]

    def rows(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """Measure case by case; outputs are verified before anything is timed."""
        ...


def in_layouts(
    name: str, x: Tensor, make: Callable[[torch.memory_format], Callable[[Tensor], object]]
) -> dict[str, Callable[[], Run]]:
    """One contestant in both memory layouts.

    Args:
        name: of the contestant.
        x: the input, copied into every set of buffers.
        make: gives the function to time with weights of its own, stored as the layout asks.
    """

    def factory(form: torch.memory_format) -> Callable[[], Run]:
        def build() -> Run:
            image, function = x.clone(memory_format=form), make(form)
            return lambda: function(image)

        return build

    return {f"{name} {layout}": factory(form) for layout, form in LAYOUTS.items()}


def measured(
    factories: Mapping[str, Callable[[], Run]], touched_bytes: int, settings: Settings
) -> dict[str, LatencyStats]:
    """Time the contestants of one case in turn.

    Args:
        factories: name -> contestant.
        touched_bytes: that one run reads and writes, to rotate buffers past the caches.
        settings: of the suite.
    """
    return measure(
        factories,
        cold_bytes=touched_bytes if settings.cold else None,
        settle=settings.settle,
        runs=settings.runs,
        max_time_s=settings.max_time_s,
        device=settings.device,
    )


def result(
    *,
    case: str,
    label: str,
    sparsity: float,
    stats: Mapping[str, LatencyStats],
    settings: Settings,
    flops: int,
    dense_flops: int,
    error: float,
    ours: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """One line of the results, plain data.

    Args:
        case: name that tells it from all others of the suite at this sparsity.
        label: readable description.
        sparsity: share of zeros, 0 for dense cases.
        stats: contestant -> statistics; names that start with "dense" are the baselines.
        settings: of the suite.
        flops: that our kernel does.
        dense_flops: that the dense layer does.
        error: largest absolute error found by the check.
        ours: first words of the names of our contestants.
        more: further columns.

    Returns:
        Times in ms per call, spreads as IQR over median, rates in GFLOP/s of our best contestant,
        ratios of the best dense time to ours (above 1 we win).
    """
    ms = {name: s.median_s * 1e3 for name, s in stats.items()}
    mine = {name: t for name, t in ms.items() if name.split(" ")[0] in ours}
    dense = {name: t for name, t in ms.items() if name.startswith("dense")}
    best, best_dense = min(mine, key=mine.__getitem__), min(dense, key=dense.__getitem__)
    rate = flops / ms[best] * 1e-6
    roof = settings.roof_gflops
    return {
        "case": case,
        "label": label,
        "sparsity": round(sparsity, 6),
        "batch": settings.batch,
        "ms": ms,
        "spread": {name: s.iqr_s / s.median_s for name, s in stats.items()},
        "runs": min(s.runs for s in stats.values()),
        "best": best,
        "best_dense": best_dense,
        "gflops": rate,
        "effective_gflops": dense_flops / ms[best] * 1e-6,
        "roof_share": None if roof is None else rate / roof,
        "ratios": {name: ms[best_dense] / t for name, t in mine.items()},
        "ratio": ms[best_dense] / ms[best],
        "max_abs_error": error,
        **more,
    }
