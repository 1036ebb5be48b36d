"""How the tests call `depthwise_conv2d`: the registered operator and its Python function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparsecnn.ops
from tests.cases import ConvCase, Problem, memory_format
from tests.conftest import nan_filled_allocations
from tests.ops.csr import stain_scratch

DEPTHWISE = ConvCase(c=5, k=5, groups=5, pattern="full")


def depthwise(case: ConvCase, multiplier: int = 1) -> ConvCase:
    """A case with a dense filter for each of `multiplier` outputs of every channel."""
    return case.but(k=case.c * multiplier, groups=case.c, pattern="full", density=0.3)


def op_args(problem: Problem) -> tuple[Any, ...]:
    """Positional arguments of `torch.ops.sparsecnn.depthwise_conv2d`."""
    case = problem.case
    return (
        problem.x,
        problem.weight.to(problem.x.device),
        problem.bias,
        problem.residual,
        list(case.stride),
        list(case.padding),
        list(case.dilation),
        case.activation,
    )


def run_op(problem: Problem) -> Tensor:
    """The registered operator, its allocations and its scratch memory filled with NaN first."""
    if problem.x.device.type == "cpu":
        stain_scratch()
    with nan_filled_allocations():
        y: Tensor = torch.ops.sparsecnn.depthwise_conv2d.default(*op_args(problem))
    return y


def geometry(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of `sparsecnn.ops.depthwise_conv2d` that are not tensors."""
    case = problem.case
    return {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "activation": case.activation,
    }


def run_function(problem: Problem) -> Tensor:
    """The Python function, with everything from the problem."""
    return sparsecnn.ops.depthwise_conv2d(
        problem.x, problem.weight, problem.bias, residual=problem.residual, **geometry(problem)
    )


def check(problem: Problem) -> Tensor:
    """Run the operator and check values, memory format and that the inputs are untouched."""
    before = problem.x.clone(), problem.weight.clone()
    y = run_op(problem)
    problem.check(y)
    want = memory_format(problem.x)
    assert y.is_contiguous(memory_format=want), f"{problem.case.id}: {y.stride()}, want {want}"
    assert torch.equal(problem.x, before[0]), f"{problem.case.id}: x was modified"
    assert torch.equal(problem.weight, before[1]), f"{problem.case.id}: the weight was modified"
    return y
