"""Suite `pointwise`: dense 1x1 layers, our kernel against the framework's, both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sparsecnn
from bench.chains import POINTWISE, label
from bench.suite import LAYOUTS, Settings, in_layouts, measured, result
from bench.suite_chain import by_framework, verify
from bench.timing import Run
from tests.chains import ChainProblem, build_chain, in_order

NAMES = tuple(POINTWISE)
QUICK = ("256_64_56", "96_576_14", "320_1280_7")
DENSITIES = QUICK_DENSITIES = (1.0,)  # dense layers
__all__ = ["DENSITIES", "NAMES", "QUICK", "QUICK_DENSITIES", "contestants", "rows"]


def by_pointwise(problem: ChainProblem) -> Callable[[Tensor], Tensor]:
    """The layer by our op, its weight in the order the kernel reads."""
    weight, bias = in_order(problem.weights[0], "innermost").clone(), problem.biases[0]
    return lambda x: sparsecnn.ops.pointwise_conv2d(x, weight, bias)


def contestants(problem: ChainProblem) -> dict[str, Callable[[], Run]]:
    """Factories with buffers of their own for the timer."""

    def ours(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        return by_pointwise(problem)

    return {
        **in_layouts("dense", problem.x, lambda form: by_framework(problem, form)),
        **in_layouts("pointwise", problem.x, ours),
    }


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure layer after layer; one row of the results at a time."""
    for name in settings.names:
        case = POINTWISE[name].but(n=settings.batch, dtype=settings.dtype)
        problem = build_chain(case).to(settings.device)
        ours = by_pointwise(problem)
        error = max(verify(problem, ours, form) for form in LAYOUTS.values())
        k, p, q = case.shapes[-1]
        element = problem.x.element_size()
        touched = problem.x.nbytes + (settings.batch * k * p * q + k * case.c) * element
        yield result(
            case=name,
            label=label(case),
            sparsity=0,
            stats=measured(contestants(problem), touched, settings),
            settings=settings,
            flops=2 * case.macs,
            dense_flops=2 * case.macs,
            error=error,
            ours=("pointwise",),
        )
