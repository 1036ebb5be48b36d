"""Values of pattern_conv2d: every hand-picked case, on every instruction set and on CUDA."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sparsecnn.formats.pattern import PatternWeight
from tests import cases as families
from tests import reference
from tests.cases import ConvCase, build
from tests.ops.pattern import (
    CUTS,
    NAMES,
    check,
    make,
    op_args,
    pack,
    run_function,
    run_op,
    weight_of,
)  # fmt: skip

CASES = list(enumerate(families.all_cases()))
DTYPES = {
    "cpu": (torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.bfloat16, torch.float32, torch.float16),
}
POINTWISE = {"kernel": (1, 1), "padding": (0, 0, 0, 0)}


@pytest.mark.parametrize("number, case", CASES, ids=lambda v: getattr(v, "id", str(v)))
def test_result(number: int, case: ConvCase, backend: str) -> None:
    """With real and integer data, in both memory formats; dtypes and cuts take turns."""
    layouts: tuple[str, ...] = (case.layout,)
    if case.layout == "contiguous":
        layouts = ("contiguous", "channels_last")
    for i, layout in enumerate(layouts):
        check(make(case.but(layout=layout), number + i, backend))
        dtype = DTYPES[backend][(number + i) % 3]
        exact = case.but(layout=layout, dtype=dtype, integers=True)
        check(make(exact, number + 4 * i + 1, backend))


CUT_CASES = [
    ConvCase(n=1, c=40, k=37, h=14, w=14, density=0.05),
    ConvCase(n=2, c=24, k=30, h=9, w=9, groups=2, residual=True, activation="relu6"),
    ConvCase(n=1, c=64, k=29, h=16, w=16, density=0.1).but(**POINTWISE),
    ConvCase(n=3, c=50, k=33, h=7, w=7, density=0.1, layout="channels_last").but(**POINTWISE),
    ConvCase(n=2, c=9, k=26, h=12, w=15, stride=(2, 2), layout="channels_last"),
    ConvCase(n=20, c=70, k=45, h=1, w=1, density=0.05).but(**POINTWISE),
]


@pytest.mark.parametrize("cut, permuted", CUTS)
@pytest.mark.parametrize("case", CUT_CASES, ids=lambda case: case.id)
def test_every_cut(case: ConvCase, cut: int | str, permuted: bool, backend: str) -> None:
    for dtype in DTYPES[backend]:
        check(pack(build(case.but(dtype=dtype, integers=True), backend), cut, permuted))
    check(pack(build(case, backend), cut, permuted))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", CUT_CASES[:4], ids=lambda case: case.id)
def test_channels_that_no_filter_reads_are_not_read(
    case: ConvCase, layout: str, backend: str
) -> None:
    """They may hold anything: the rest of the network may not even have written them."""
    for dtype in DTYPES[backend]:
        problem = build(case.but(layout=layout, dtype=dtype, integers=True), backend)
        weight = problem.weight.clone()
        weight[:, ::3] = 0
        weight[: case.k // case.groups, 1::4] = 0  # of the first group only
        p = pack(dataclasses.replace(problem, weight=weight), "all")
        read = (p.problem.weight != 0).any(3).any(2).reshape(case.groups, -1, weight.shape[1])
        unread = ~read.any(1).reshape(-1)
        assert bool(unread.any())
        want = run_op(p)
        p.problem.check(want)
        p.problem.x[:, unread.to(p.problem.x.device)] = float("nan")
        got = run_op(p)
        # A group that reads fewer channels than another may have some of its own packed with it;
        # they never meet a weight.
        assert torch.equal(got, want)


def test_function_calls_the_operator(backend: str) -> None:
    for layout in ("contiguous", "channels_last"):
        p = make(ConvCase(layout=layout, residual=True, activation="silu"), 5, backend)
        assert torch.equal(run_function(p), run_op(p))


@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
def test_residual_may_lie_differently(x_layout: str, residual_layout: str, backend: str) -> None:
    p = make(ConvCase(residual=True, layout=x_layout, activation="relu"), 3, backend)
    assert p.problem.residual is not None
    moved = families.lay_out(p.problem.residual.contiguous(), residual_layout)
    check(dataclasses.replace(p, problem=dataclasses.replace(p.problem, residual=moved)))


def test_views_of_the_weight_arrays(backend: str) -> None:
    """Values, indices and bias as every-other-element views of larger buffers."""

    def view(t: Tensor) -> Tensor:
        big = t.new_full((2 * t.numel(),), 77)
        big[::2] = t
        return big[::2]

    p = make(ConvCase(c=17, k=9), 9, backend)
    assert p.problem.bias is not None
    moved = dataclasses.replace(p.problem, bias=view(p.problem.bias))
    check(dataclasses.replace(p, problem=moved, arrays=tuple(map(view, p.arrays))))


def test_stored_zeros_are_legal(backend: str) -> None:
    p = make(ConvCase(integers=True), 4, backend)
    values = p.values.clone()
    values[::3] = 0
    changed = p.but(values=values)
    weight = reference.pattern_to_dense(*changed.arrays, p.problem.case.weight_shape)
    check(dataclasses.replace(changed, problem=dataclasses.replace(p.problem, weight=weight)))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinities_stay_where_they_are_read(
    kernel: tuple[int, int], layout: str, backend: str
) -> None:
    """An infinite pixel reaches exactly the outputs that multiply it by a stored weight."""
    pad = kernel[0] // 2
    case = ConvCase(
        n=2, c=5, k=7, h=9, w=11, kernel=kernel, padding=(pad, pad, pad, pad), density=0.5,
        layout=layout, pattern="some_empty_rows",
    )  # fmt: skip
    hit = torch.zeros(case.n, case.c, case.h, case.w)
    places = (0, 2, 0, 0), (1, 4, 8, 10), (0, 0, 4, 5)
    for place in places:
        hit[place] = 1
    for number, dtype in enumerate(DTYPES[backend] * 2):  # one filter a group, and all
        p = make(case.but(dtype=dtype), number // 3, backend)
        for place in places:
            p.problem.x[place] = float("inf")
        reached = reference.conv2d(hit, p.problem.weight.abs(), padding=case.padding) > 0
        y = run_op(p).cpu()
        assert bool(reached.any()) and not bool(reached.all())
        assert torch.equal(y.isfinite(), ~reached)


THREAD_CASES = [
    ConvCase(n=1, c=64, k=33, h=28, w=28, density=0.1),
    ConvCase(n=5, c=64, k=70, h=14, w=14, density=0.1).but(**POINTWISE),
    ConvCase(n=3, c=24, k=48, h=15, w=13, groups=3, stride=(2, 2), residual=True),
    ConvCase(n=2, c=40, k=64, h=9, w=9, layout="channels_last", activation="silu"),
    ConvCase(n=1, c=512, k=40, h=7, w=7, density=0.05, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("cut", [1, 4, "ragged", "all"])
@pytest.mark.parametrize("case", THREAD_CASES, ids=lambda case: case.id)
def test_threads_do_not_change_a_bit(
    case: ConvCase, cut: int | str, isa: str, threads: None
) -> None:
    p = pack(build(case), cut, permuted=cut == "ragged")
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(check(p))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", CUT_CASES[:4], ids=lambda case: case.id)
def test_the_cut_does_not_change_a_bit(case: ConvCase, backend: str) -> None:
    """Outputs are one chain by column, whoever shares the columns and wherever filters lie."""
    whole = pack(build(case, backend), "all")
    want = run_op(whole)
    for cut, permuted in CUTS:
        p = pack(whole.problem, cut, permuted)
        assert torch.equal(p.problem.weight, whole.problem.weight)
        assert torch.equal(run_op(p), want), (cut, permuted)
    other = PatternWeight.from_dense(whole.problem.weight, case.groups, "vector3")
    arrays = tuple(getattr(other, name).to(backend) for name in NAMES)
    assert torch.equal(run_op(dataclasses.replace(whole, arrays=arrays)), want)


def test_a_weight_changed_in_place_is_seen(isa: str) -> None:
    """Programs are kept between calls; what they are made of may change without notice."""
    p = make(ConvCase(c=32, k=16, integers=True), 6)
    for _ in range(3):
        check(p)
    for name in ("values", "columns", "filters"):
        array = dict(zip(("values", "columns", "filters"), p.arrays, strict=False))[name]
        if name == "values":
            array.data[-1] += 1
        elif name == "columns":
            missing = sorted(set(range(288)) - set(array[: p.arrays[4][1]].tolist()))
            array[int(p.arrays[4][1]) - 1] = max(missing[-1], int(array[p.arrays[4][1] - 1]))
        else:
            array[[0, 1]] = array[[1, 0]]
        weight = reference.pattern_to_dense(*p.arrays, p.problem.case.weight_shape)
        p = dataclasses.replace(p, problem=dataclasses.replace(p.problem, weight=weight))
        for _ in range(3):
            check(p)


@pytest.mark.parametrize("n", [1, 3])
def test_many_shapes_share_one_weight(n: int, backend: str) -> None:
    weight = weight_of(make(ConvCase(c=12, k=18), 8, backend))
    for h, w in ((5, 5), (9, 8), (17, 3), (1, 1), (30, 31)):
        case = ConvCase(n=n, c=12, k=18, h=h, w=w)
        p = make(case, 8, backend)
        assert torch.equal(weight.values, p.values)
        check(p)
        assert op_args(p)[0].shape == (n, 12, h, w)
