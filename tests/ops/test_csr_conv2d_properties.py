"""Symmetries of csr_conv2d that hold to the bit: every output is one chain of FMAs by column."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.cases import ConvCase, Problem, build, lay_out
from tests.ops.csr import POINTWISE, op_args

# Layers of several kinds; the smallest maps make the kernel read the weight as it is stored.
CASES = [
    ConvCase(n=3, c=24, k=20, h=13, w=11),
    ConvCase(n=2, c=150, k=17, h=9, w=9, density=0.1, activation="relu"),
    ConvCase(n=3, c=20, k=33, h=15, w=14, stride=(2, 2), kernel=(5, 3), padding=(2, 2, 1, 1)),
    ConvCase(n=2, c=12, k=9, h=17, w=18, dilation=(2, 3), stride=(1, 2), residual=True),
    ConvCase(n=4, c=70, k=24, h=8, w=8, activation="hardswish").but(**POINTWISE),
    ConvCase(n=5, c=70, k=24, h=7, w=7, residual=True).but(**POINTWISE),
    ConvCase(n=3, c=40, k=16, h=3, w=3),
    ConvCase(n=17, c=300, k=20, h=1, w=1, density=0.1).but(**POINTWISE),
    ConvCase(n=2, c=24, k=16, h=10, w=10, groups=4, density=0.5),
    ConvCase(n=2, c=18, k=18, h=9, w=9, groups=18, density=0.8, activation="relu6"),
]


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> ConvCase:
    found: ConvCase = request.param
    return found


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def conv(problem: Problem, **changes: object) -> Tensor:
    """The op on the problem with some of its tensors exchanged."""
    changed = dataclasses.replace(problem, **changes)  # type: ignore[arg-type]
    y: Tensor = torch.ops.sparsecnn.csr_conv2d.default(*op_args(changed))
    return y


def rows_of(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """Values and columns of each filter."""
    ends = problem.row_ptr.tolist()
    return [(problem.values[a:b], problem.col_idx[a:b]) for a, b in itertools.pairwise(ends)]


def from_rows(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The three arrays of a weight given filter by filter."""
    lengths = torch.tensor([0] + [len(values) for values, _ in rows])
    return {
        "values": torch.cat([values for values, _ in rows]),
        "col_idx": torch.cat([columns for _, columns in rows]),
        "row_ptr": lengths.cumsum(0).to(torch.int32),
    }


def test_a_shifted_image_gives_a_shifted_output(
    case: ConvCase, dtype: torch.dtype, isa: str
) -> None:
    """Shift by whole strides: a reorganised tile, block or lane, the same chain of FMAs."""
    case = case.but(dtype=dtype, residual=False)
    if case.out_size == (1, 1):
        pytest.skip("an image of one pixel has no interior")
    y = conv(build(case))
    problem = build(case)
    for down, right in ((1, 0), (0, 1), (2, 1)):
        dy, dx = down * case.stride[0], right * case.stride[1]
        x = torch.full_like(problem.x, 3.0)
        x[:, :, : case.h - dy, : case.w - dx] = problem.x[:, :, dy:, dx:]
        moved = conv(problem, x=x)

        def interior(axis: int, shift: int) -> tuple[int, int]:
            """Outputs of the shifted image that see neither padding nor what is new."""
            size, pad = (case.h, case.w)[axis], case.padding[2 * axis]
            stride, reach = case.stride[axis], case.dilation[axis] * (case.kernel[axis] - 1)
            last = (size - shift - 1 - reach + pad) // stride
            return math.ceil(pad / stride), last + 1

        (p0, p1), (q0, q1) = interior(0, dy), interior(1, dx)
        if p1 <= p0 or q1 <= q0:
            assert case.h == 3, "only the smallest map has no interior"
            continue
        want = y[:, :, p0 + down : p1 + down, q0 + right : q1 + right]
        assert torch.equal(moved[:, :, p0:p1, q0:q1], want), (down, right)


@pytest.mark.parametrize("exponent", [-9, 5])
def test_powers_of_two_scale_exactly(
    exponent: int, case: ConvCase, dtype: torch.dtype, isa: str
) -> None:
    problem = build(case.but(dtype=dtype, activation="none", bias=False, residual=False))
    y, scale = conv(problem), 2.0**exponent
    assert torch.equal(conv(problem, x=problem.x * scale), y * scale)
    assert torch.equal(conv(problem, values=problem.values * scale), y * scale)


def test_permuted_filters_permute_the_outputs(case: ConvCase, dtype: torch.dtype, isa: str) -> None:
    """Filters change their chunk, their neighbours and their place in the kernel's order."""
    problem = build(case.but(dtype=dtype))
    generator = torch.Generator().manual_seed(11)
    per_group = case.k // case.groups
    order = torch.cat(
        [g * per_group + torch.randperm(per_group, generator=generator) for g in range(case.groups)]
    )
    rows = rows_of(problem)
    assert problem.bias is not None
    changes = from_rows([rows[k] for k in order.tolist()])
    changes["bias"] = problem.bias[order]
    if problem.residual is not None:
        changes["residual"] = problem.residual[:, order].contiguous()
    assert torch.equal(conv(problem, **changes), conv(problem)[:, order])


def test_permuted_channels_change_nothing(case: ConvCase, dtype: torch.dtype, isa: str) -> None:
    """Input channels with their columns of the weight; integers, since the order of sums changes.

    Channels change their panel.
    """
    problem = build(case.but(dtype=dtype, integers=True))
    generator = torch.Generator().manual_seed(12)
    per_group, taps = case.c // case.groups, math.prod(case.kernel)
    order = torch.randperm(per_group, generator=generator)
    place = torch.empty(per_group, dtype=torch.int32)
    place[order] = torch.arange(per_group, dtype=torch.int32)
    rows = []
    for values, columns in rows_of(problem):
        moved = place[(columns // taps).long()] * taps + columns % taps
        by_column = moved.argsort()
        rows.append((values[by_column], moved[by_column]))
    first = torch.arange(case.groups)[:, None] * per_group
    x = problem.x[:, (first + order).reshape(-1)].contiguous()
    assert torch.equal(conv(problem, x=x, **from_rows(rows)), conv(problem))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_is_its_images(layout: str, case: ConvCase, dtype: torch.dtype, isa: str) -> None:
    """Lanes hold images, tiles or pixels as the batch asks for, and outputs keep every bit."""
    problem = build(case.but(dtype=dtype, layout=layout))
    y = conv(problem)
    for n in range(case.n):
        residual = None if problem.residual is None else problem.residual[n : n + 1]
        image = conv(problem, x=problem.x[n : n + 1], residual=residual)
        assert torch.equal(image, y[n : n + 1]), n


def test_a_group_is_a_convolution_of_its_own(dtype: torch.dtype, isa: str) -> None:
    for case in (case for case in CASES if case.groups > 1):
        problem = build(case.but(dtype=dtype))
        assert problem.bias is not None and problem.residual is None
        y, rows = conv(problem), rows_of(problem)
        c, k = case.c // case.groups, case.k // case.groups
        parts = []
        for g in range(case.groups):
            alone = case.but(c=c, k=k, groups=1, dtype=dtype)
            arrays = from_rows(rows[g * k : (g + 1) * k])
            x = problem.x[:, g * c : (g + 1) * c].contiguous()
            bias = problem.bias[g * k : (g + 1) * k].contiguous()
            parts.append(conv(problem, case=alone, x=x, bias=bias, **arrays))
        assert torch.equal(torch.cat(parts, dim=1), y), case.id


@pytest.mark.parametrize("layout", ["channels_last", "channels_last_offset", "sliced"])
def test_the_layout_does_not_change_a_bit(
    layout: str, case: ConvCase, dtype: torch.dtype, isa: str
) -> None:
    problem = build(case.but(dtype=dtype))
    moved = conv(problem, x=lay_out(problem.x, layout))
    assert torch.equal(moved.contiguous(), conv(problem))


def test_the_weight_may_be_cut_into_two_layers(
    case: ConvCase, dtype: torch.dtype, isa: str
) -> None:
    """Half of the filters each: other chunks and blocks, the same outputs."""
    problem = build(case.but(dtype=dtype, residual=False))
    if case.groups > 1:
        pytest.skip("halves of a group are no layer")
    assert problem.bias is not None
    rows, half = rows_of(problem), case.k // 2
    parts = [
        conv(
            problem,
            case=problem.case.but(k=len(rows[part])),
            bias=problem.bias[part].contiguous(),
            **from_rows(rows[part]),
        )
        for part in (slice(half), slice(half, None))
    ]
    assert torch.equal(torch.cat(parts, dim=1), conv(problem))
