"""How the tests call `chain_conv2d` and `pointwise_conv2d`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import sparsecnn.ops
from sparsecnn.ops import ChainStage
from tests.cases import Problem
from tests.chains import ChainCase, ChainProblem, Stage, build_chain
from tests.conftest import nan_filled_allocations


def op_args(problem: ChainProblem) -> tuple[Any, ...]:
    """Positional arguments of `torch.ops.sparsecnn.chain_conv2d`."""
    stages = problem.case.stages
    return (
        problem.x,
        problem.weights,
        [b for b in problem.biases if b is not None],
        problem.residual,
        [int(b is not None) for b in problem.biases],
        [v for s in stages for v in s.stride],
        [v for s in stages for v in s.pads],
        [v for s in stages for v in s.dilation],
        problem.groups,
        ",".join(s.activation for s in stages),
    )


@functools.cache
def _nan_problem() -> ChainProblem:
    problem = build_chain(ChainCase((Stage(), Stage()), n=1, c=96, h=24, w=24))
    problem.x.fill_(float("nan"))
    return problem


def stain_scratch() -> None:
    """Leave NaN in the memory that the CPU kernels keep from call to call."""
    torch.ops.sparsecnn.chain_conv2d.default(*op_args(_nan_problem()))


def run_op(problem: ChainProblem) -> Tensor:
    """The registered operator, its allocations and its scratch memory filled with NaN first."""
    if problem.x.device.type == "cpu":
        stain_scratch()
    with nan_filled_allocations():
        y: Tensor = torch.ops.sparsecnn.chain_conv2d.default(*op_args(problem))
    return y


def check(problem: ChainProblem) -> Tensor:
    """Run the operator, check its result and that the inputs are untouched."""
    inputs = [problem.x, *problem.weights]
    before = [t.clone() for t in inputs]
    y = run_op(problem)
    problem.check(y)
    for tensor, copy in zip(inputs, before, strict=True):
        same = torch.equal(tensor.nan_to_num(7), copy.nan_to_num(7))
        assert same, f"{problem.case.id}: an input was modified"
    return y


def stages_of(
    problem: ChainProblem,
    weights: list[Tensor] | None = None,
    biases: list[Tensor | None] | None = None,
) -> list[ChainStage]:
    """The stages as the Python function takes them, with other tensors if given."""
    return [
        ChainStage(w, b, s.stride, s.pads, s.dilation, g, s.activation)
        for w, b, s, g in zip(
            weights or problem.weights, biases or problem.biases, problem.case.stages,
            problem.groups, strict=True,
        )
    ]  # fmt: skip


def run_function(problem: ChainProblem) -> Tensor:
    """The Python function, with everything from the problem."""
    return sparsecnn.ops.chain_conv2d(problem.x, stages_of(problem), residual=problem.residual)


def pointwise_args(problem: Problem, weight: Tensor, *flags: bool) -> tuple[Any, ...]:
    """Positional arguments of `torch.ops.sparsecnn.pointwise_conv2d`; `flags` have defaults."""
    case, weight = problem.case, weight.to(problem.x.device)
    return (
        problem.x, weight, problem.bias, problem.residual, list(case.stride), case.activation,
        *flags,
    )  # fmt: skip


def run_pointwise(problem: Problem, weight: Tensor, *flags: bool) -> Tensor:
    """The registered operator on stained scratch and NaN-filled outputs."""
    stain_scratch()
    args = pointwise_args(problem, weight, *flags)
    with nan_filled_allocations():
        y: Tensor = torch.ops.sparsecnn.pointwise_conv2d.default(*args)
    return y
