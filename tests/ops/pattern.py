"""How the tests call `pattern_conv2d`: problems in filter groups, the operator, the function."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparsecnn.ops
from sparsecnn.formats.pattern import PatternWeight
from tests.cases import ConvCase, Problem, build, memory_format
from tests.conftest import nan_filled_allocations

NAMES = ("values", "columns", "filters", "group_rows", "group_columns")
# Filters of a group: a size, "all", or "ragged" (1, 2, 3, ... of them); and whether filters are
# permuted. The sizes are around the register blocks of the kernel: 1, 2, 4 and 8.
CUTS: tuple[tuple[int | str, bool], ...] = (
    (1, False), ("all", False), (2, False), (8, True), (3, True), ("ragged", False), (4, False),
    ("all", True), (5, False), ("ragged", True), (7, True), (16, False), (1, True),
)  # fmt: skip


@dataclass(frozen=True)
class PatternProblem:
    """A problem whose weight has every position that a filter group keeps.

    Attributes:
        problem: input, bias, residual, the dense weight and what checks the result.
        arrays: the five arrays of the weight, on the device of the input.
        pattern: its name.
    """

    problem: Problem
    arrays: tuple[Tensor, ...]
    pattern: str = "none"

    @property
    def values(self) -> Tensor:
        """Stored values."""
        return self.arrays[0]

    def but(self, **changes: Tensor) -> PatternProblem:
        """With some of the arrays exchanged."""
        arrays = dict(zip(NAMES, self.arrays, strict=True)) | changes
        return dataclasses.replace(self, arrays=tuple(arrays[name] for name in NAMES))


def cut_rows(per_group: int, cut: int | str) -> list[int]:
    """Sizes of the filter groups of one group of the convolution."""
    sizes: list[int] = []
    while sum(sizes) < per_group:
        size = {"all": per_group, "ragged": len(sizes) + 1}.get(str(cut), cut)
        sizes.append(min(int(size), per_group - sum(sizes)))
    return sizes


def pack(problem: Problem, cut: int | str = "all", permuted: bool = False) -> PatternProblem:
    """Give all filters of a group the columns of any of them, and pack with plain loops."""
    case = problem.case
    k, per_group = case.k, case.k // case.groups
    generator = torch.Generator().manual_seed(case.seed + 2)
    order = torch.arange(k)
    if permuted:
        parts = order.split(per_group)
        order = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in parts])
    weight = problem.weight.reshape(k, -1).clone()
    # The columns of a row that is missing now: nonzero, and different everywhere.
    filler = torch.randint(1, 5, weight.shape, generator=generator).to(weight)
    values: list[Tensor] = []
    columns: list[Tensor] = []
    group_rows, group_columns = [0], [0]
    for size in cut_rows(per_group, cut) * case.groups:
        rows = order[group_rows[-1] : group_rows[-1] + size]
        kept = (weight[rows] != 0).any(0).nonzero()[:, 0]
        places = rows[:, None], kept[None]
        block = torch.where(weight[places] == 0, filler[places], weight[places])
        weight[places] = block
        values.append(block.t().reshape(-1))
        columns.append(kept)
        group_rows.append(group_rows[-1] + size)
        group_columns.append(group_columns[-1] + len(kept))
    row_ptr = torch.zeros(k + 1, dtype=torch.int32)
    row_ptr[1:] = (weight != 0).sum(1).cumsum(0)
    whole = dataclasses.replace(
        problem, weight=weight.reshape(problem.weight.shape), row_ptr=row_ptr
    )
    indices = (torch.cat(columns), order, torch.tensor(group_rows), torch.tensor(group_columns))
    arrays = (torch.cat(values), *(t.to(torch.int32) for t in indices))
    return PatternProblem(whole, tuple(t.to(problem.x.device) for t in arrays))


def make(case: ConvCase, number: int = 0, device: str = "cpu") -> PatternProblem:
    """The problem of a case, cut in one of the ways of `CUTS`."""
    return pack(build(case, device), *CUTS[number % len(CUTS)])


def op_args(p: PatternProblem) -> tuple[Any, ...]:
    """Positional arguments of `torch.ops.sparsecnn.pattern_conv2d`."""
    case = p.problem.case
    return (
        p.problem.x,
        *p.arrays,
        p.problem.bias,
        p.problem.residual,
        list(case.kernel),
        list(case.stride),
        list(case.padding),
        list(case.dilation),
        case.groups,
        p.pattern,
        case.activation,
    )


@functools.cache
def _nan_problem() -> PatternProblem:
    case = ConvCase(n=1, c=256, k=64, h=16, w=16, kernel=(1, 1), padding=(0, 0, 0, 0), density=0.1)
    p = pack(build(case), 4)
    p.problem.x.fill_(float("nan"))
    return p


def stain_scratch() -> None:
    """Leave NaN in the memory that the kernels keep from call to call; see `tests/ops/csr.py`."""
    torch.ops.sparsecnn.pattern_conv2d.default(*op_args(_nan_problem()))


def run_op(p: PatternProblem) -> Tensor:
    """The registered operator, its allocations and its scratch memory filled with NaN first."""
    if p.problem.x.is_cpu:
        stain_scratch()
    with nan_filled_allocations():
        y: Tensor = torch.ops.sparsecnn.pattern_conv2d.default(*op_args(p))
    return y


def weight_of(p: PatternProblem, values: Tensor | None = None) -> PatternWeight:
    """The weight of a problem, with other values if given (for gradients)."""
    case = p.problem.case
    first = p.values if values is None else values
    return PatternWeight(first, *p.arrays[1:], case.weight_shape, case.groups, p.pattern)


def geometry(p: PatternProblem) -> dict[str, Any]:
    """Keyword arguments of `sparsecnn.ops.pattern_conv2d` that are not tensors."""
    case = p.problem.case
    return {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
        "activation": case.activation,
    }


def run_function(p: PatternProblem) -> Tensor:
    """The Python function, with everything from the problem."""
    return sparsecnn.ops.pattern_conv2d(
        p.problem.x,
        weight_of(p),
        p.problem.bias,
        residual=p.problem.residual,
        **geometry(p),
    )


def check(p: PatternProblem) -> Tensor:
    """Run the operator and check values, memory format and that the inputs are untouched."""
    inputs = (p.problem.x, *p.arrays)
    before = [t.clone() for t in inputs]
    y = run_op(p)
    p.problem.check(y)
    want = memory_format(p.problem.x)
    assert y.is_contiguous(memory_format=want), f"{p.problem.case.id}: {y.stride()}, want {want}"
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy), f"{p.problem.case.id}: an input was modified"
    return y
