"""How the tests call `csr_conv2d`: the registered operator and its Python function."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import sparsecnn.ops
from sparsecnn.formats.csr import CSRWeight
from tests.cases import ConvCase, Problem, build, memory_format
from tests.conftest import nan_filled_allocations

POINTWISE: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0, 0, 0)}


def op_args(problem: Problem) -> tuple[Any, ...]:
    """Positional arguments of `torch.ops.sparsecnn.csr_conv2d`."""
    case = problem.case
    return (
        problem.x,
        problem.values,
        problem.col_idx,
        problem.row_ptr,
        problem.bias,
        problem.residual,
        list(case.kernel),
        list(case.stride),
        list(case.padding),
        list(case.dilation),
        case.groups,
        case.activation,
    )


def grad_values_args(problem: Problem, grad_y: Tensor) -> tuple[Any, ...]:
    """Positional arguments of `torch.ops.sparsecnn.csr_conv2d_grad_values`."""
    case = problem.case
    return (
        grad_y,
        problem.x,
        problem.col_idx,
        problem.row_ptr,
        list(case.kernel),
        list(case.stride),
        list(case.padding),
        list(case.dilation),
        case.groups,
    )


@functools.cache
def _nan_problem() -> Problem:
    problem = build(ConvCase(n=1, c=256, k=64, h=16, w=16, density=0.1).but(**POINTWISE))
    problem.x.fill_(float("nan"))
    return problem


def stain_scratch() -> None:
    """Leave NaN in the memory that the CPU kernels keep from call to call.

    It is not allocated through torch, so `nan_filled_allocations` cannot reach it; a convolution
    of NaN can. A kernel that reads what this call has not written shows.
    """
    torch.ops.sparsecnn.csr_conv2d.default(*op_args(_nan_problem()))


def run_op(problem: Problem) -> Tensor:
    """The registered operator, its allocations and its scratch memory filled with NaN first."""
    if problem.x.device.type == "cpu":
        stain_scratch()
    with nan_filled_allocations():
        y: Tensor = torch.ops.sparsecnn.csr_conv2d.default(*op_args(problem))
    return y


def weight_of(problem: Problem, values: Tensor | None = None) -> CSRWeight:
    """The weight of a problem, with other values if given (for gradients)."""
    return CSRWeight(
        problem.values if values is None else values,
        problem.col_idx,
        problem.row_ptr,
        problem.case.weight_shape,
    )


def geometry(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of `sparsecnn.ops.csr_conv2d` that are not tensors."""
    case = problem.case
    return {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
        "activation": case.activation,
    }


def run_function(problem: Problem) -> Tensor:
    """The Python function, with everything from the problem."""
    return sparsecnn.ops.csr_conv2d(
        problem.x,
        weight_of(problem),
        problem.bias,
        residual=problem.residual,
        **geometry(problem),
    )


def check(problem: Problem) -> Tensor:
    """Run the operator and check values, memory format and that the inputs are untouched."""
    inputs = (problem.x, problem.values, problem.col_idx, problem.row_ptr)
    before = [t.clone() for t in inputs]
    y = run_op(problem)
    problem.check(y)
    want = memory_format(problem.x)
    assert y.is_contiguous(memory_format=want), f"{problem.case.id}: {y.stride()}, want {want}"
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy), f"{problem.case.id}: an input was modified"
    return y
