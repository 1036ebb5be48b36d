"""Suite `chain`: blocks of networks as one op, against the same stages by the framework.

The rival runs the stages one after the other in its better memory format, batch normalization
folded, activations and the sum in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecnn
from bench.chains import CHAINS, label
from bench.suite import LAYOUTS, Settings, in_layouts, measured, result
from bench.timing import Run
from sparsecnn.ops import ChainStage
from tests.chains import ChainCase, ChainProblem, build_chain, in_order

NAMES = tuple(CHAINS)
QUICK = ("dw_pw_144_24", "mbv2_96_576_96", "mbv2_160_960_160")
DENSITIES = QUICK_DENSITIES = (1.0,)  # dense layers
__all__ = ["DENSITIES", "NAMES", "QUICK", "QUICK_DENSITIES", "contestants", "rows", "verify"]

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0),
}


def with_input_as_residual(case: ChainCase, device: str) -> ChainProblem:
    """The tensors of a case on a device; a residual is the input itself, as in the networks."""
    problem = build_chain(case).to(device)
    if problem.residual is None:
        return problem
    return ChainProblem(case, problem.x, problem.weights, problem.biases, problem.groups, problem.x)


def by_framework(problem: ChainProblem, form: torch.memory_format) -> Callable[[Tensor], Tensor]:
    """The stages one after the other by the framework's convolutions."""
    weights = [w.contiguous().clone(memory_format=form) for w in problem.weights]
    case, biases, groups = problem.case, problem.biases, problem.groups
    last = len(case.stages) - 1
    pads = [(s.pads[0], s.pads[2]) for s in case.stages]
    assert all(s.pads[0] == s.pads[1] and s.pads[2] == s.pads[3] for s in case.stages)

    def run(x: Tensor) -> Tensor:
        y = x
        for i, s in enumerate(case.stages):
            y = F.conv2d(y, weights[i], biases[i], s.stride, pads[i], s.dilation, groups[i])
            if i == last and case.residual:
                y += x
            y = _IN_PLACE[s.activation](y)
        return y

    return run


def by_chain(problem: ChainProblem) -> Callable[[Tensor], Tensor]:
    """The chain as one op, its weights in the order the kernel reads."""
    stages = [
        ChainStage(in_order(w, "innermost").clone(), b, s.stride, s.pads, s.dilation, g,
                   s.activation)
        for s, w, b, g in zip(
            problem.case.stages, problem.weights, problem.biases, problem.groups, strict=True
        )
    ]  # fmt: skip
    residual = problem.case.residual
    return lambda x: sparsecnn.ops.chain_conv2d(x, stages, residual=x if residual else None)


def verify(problem: ChainProblem, run: Callable[[Tensor], Tensor], form: Any) -> float:
    """Compare a kernel with the float64 reference on the first and the last image.

    Returns:
        Largest absolute difference.

    Raises:
        AssertionError: a difference is out of the derived bound: there is nothing to time.
    """
    images = sorted({0, problem.x.shape[0] - 1})
    x = problem.x[images].contiguous(memory_format=form)
    part = ChainProblem(
        problem.case, x, problem.weights, problem.biases, problem.groups,
        None if problem.residual is None else problem.residual[images],
    )  # fmt: skip
    got = run(problem.x.contiguous(memory_format=form))[images].contiguous(memory_format=form)
    part.check(got)
    return float((got.double().cpu() - part.expected()[0]).abs().max())


def contestants(problem: ChainProblem) -> dict[str, Callable[[], Run]]:
    """Factories with buffers of their own for the timer."""
    return {
        **in_layouts("dense", problem.x, lambda form: by_framework(problem, form)),
        **in_layouts("chain", problem.x, lambda form: by_chain(problem)),
    }


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure chain after chain; one row of the results at a time."""
    for name in settings.names:
        case = CHAINS[name].but(n=settings.batch, dtype=settings.dtype)
        problem = with_input_as_residual(case, settings.device)
        ours = by_chain(problem)
        error = max(verify(problem, ours, form) for form in LAYOUTS.values())
        k, p, q = case.shapes[-1]
        element = problem.x.element_size()
        touched = problem.x.nbytes + settings.batch * k * p * q * element
        touched += sum(w.numel() for w in problem.weights) * element
        yield result(
            case=name,
            label=label(case),
            sparsity=0,
            stats=measured(contestants(problem), touched, settings),
            settings=settings,
            flops=2 * case.macs,
            dense_flops=2 * case.macs,
            error=error,
            ours=("chain",),
        )
