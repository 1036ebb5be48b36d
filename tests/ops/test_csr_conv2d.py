"""Values of csr_conv2d: every hand-picked case, on every instruction set and on CUDA."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecnn
from tests import cases as families
from tests import reference, tolerance
from tests.cases import ConvCase, Problem, build
from tests.conftest import ISAS, can_run, nan_filled_allocations
from tests.ops.csr import check, grad_values_args, op_args, run_function, run_op

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def variants(case: ConvCase, device: str) -> list[ConvCase]:
    """A case with real and with integer data, in both memory formats and in every dtype."""
    layouts: tuple[str, ...] = (case.layout,)
    if case.layout == "contiguous":
        layouts = ("contiguous", "channels_last")
    found = []
    for layout in layouts:
        found.append(case.but(layout=layout))
        for dtype in DTYPES[device]:
            found.append(case.but(layout=layout, dtype=dtype, integers=True))
    found.append(case.but(dtype=torch.bfloat16, layout=layouts[-1]))
    return found


@pytest.mark.parametrize("case", families.all_cases(), ids=lambda case: case.id)
def test_result(case: ConvCase, backend: str) -> None:
    for variant in variants(case, backend):
        check(build(variant, backend))


def random_grad(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (problem.case.n, problem.case.k, *problem.case.out_size)
    if problem.case.integers:
        grad = torch.randint(-3, 4, shape, generator=generator).double()
    else:
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return grad.to(problem.case.dtype).to(problem.x.device)


@pytest.mark.parametrize("case", families.all_cases(), ids=lambda case: case.id)
def test_grad_values(case: ConvCase, backend: str) -> None:
    for integers in (True, False):
        for layout in {case.layout, "channels_last"}:
            problem = build(case.but(integers=integers, layout=layout), backend)
            grad_y = random_grad(problem)
            with nan_filled_allocations():
                got = torch.ops.sparsecnn.csr_conv2d_grad_values.default(
                    *grad_values_args(problem, grad_y)
                )
            geometry: dict[str, Any] = {
                "stride": case.stride,
                "padding": case.padding,
                "dilation": case.dilation,
                "groups": case.groups,
            }
            shape = case.weight_shape
            stored = problem.weight != 0
            x = problem.x
            want = reference.conv2d_grad_weight(grad_y, x, shape, **geometry)[stored]
            assert got.shape == problem.values.shape
            assert got.dtype == problem.values.dtype
            if integers:
                assert torch.equal(got.cpu().double(), want), problem.case.id
                continue
            magnitude = reference.conv2d_grad_weight(grad_y.abs(), x.abs(), shape, **geometry)[
                stored
            ]
            terms = max(1, case.n * case.out_size[0] * case.out_size[1])
            bound = tolerance.conv_bound(magnitude, want, terms, case.dtype)
            tolerance.assert_within(got, want, bound, problem.case.id)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_function_calls_the_operator(layout: str, backend: str) -> None:
    problem = build(ConvCase(layout=layout, residual=True, activation="silu"), backend)
    assert torch.equal(run_function(problem), run_op(problem))


@pytest.mark.parametrize(
    "padding, pads",
    [
        (0, (0, 0, 0, 0)),
        (2, (2, 2, 2, 2)),
        ((1, 3), (1, 1, 3, 3)),
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ("valid", (0, 0, 0, 0)),
        # torch puts the odd zero of an even filter at the bottom and the right.
        ("same", (0, 1, 2, 2)),
    ],
)
def test_function_accepts_every_spelling_of_padding(
    padding: int | tuple[int, ...] | str, pads: tuple[int, int, int, int]
) -> None:
    problem = build(ConvCase(kernel=(2, 5), padding=pads, integers=True))
    y = sparsecnn.ops.csr_conv2d(
        problem.x,
        sparsecnn.formats.csr.CSRWeight(
            problem.values, problem.col_idx, problem.row_ptr, problem.case.weight_shape
        ),
        problem.bias,
        padding=padding,
    )
    problem.check(y)
    if isinstance(padding, str):
        dense = torch.nn.functional.conv2d(problem.x, problem.weight, problem.bias, padding=padding)
        assert torch.equal(y, dense)


@pytest.mark.parametrize("stride, dilation", [(2, 1), (1, 3), ((1, 2), (2, 1))])
def test_function_accepts_one_int_for_both_axes(
    stride: int | tuple[int, int], dilation: int | tuple[int, int]
) -> None:
    def pair(v: int | tuple[int, int]) -> tuple[int, int]:
        return (v, v) if isinstance(v, int) else v

    problem = build(ConvCase(stride=pair(stride), dilation=pair(dilation), integers=True))
    y = sparsecnn.ops.csr_conv2d(
        problem.x,
        sparsecnn.formats.csr.CSRWeight(
            problem.values, problem.col_idx, problem.row_ptr, problem.case.weight_shape
        ),
        problem.bias,
        stride=stride,
        padding=1,
        dilation=dilation,
    )
    problem.check(y)


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_residual_may_lie_differently(x_layout: str, residual_layout: str, backend: str) -> None:
    problem = build(ConvCase(residual=True, layout=x_layout, activation="relu"), backend)
    assert problem.residual is not None
    moved = families.lay_out(problem.residual.contiguous(), residual_layout)
    check(dataclasses.replace(problem, residual=moved))


def test_views_of_the_weight_arrays(backend: str) -> None:
    """values, indices and bias as every-other-element views of larger buffers."""

    def view(t: Tensor) -> Tensor:
        big = torch.full((2 * t.numel(),), 77, dtype=t.dtype, device=t.device)
        big[::2] = t
        return big[::2]

    problem = build(ConvCase(c=17, k=9), backend)
    assert problem.bias is not None
    check(
        dataclasses.replace(
            problem,
            values=view(problem.values),
            col_idx=view(problem.col_idx),
            row_ptr=view(problem.row_ptr),
            bias=view(problem.bias),
        )
    )


def test_stored_zeros_are_legal(backend: str) -> None:
    problem = build(ConvCase(integers=True), backend)
    values = problem.values.clone()
    values[::3] = 0
    weight = reference.csr_to_dense(
        values, problem.col_idx, problem.row_ptr, problem.case.weight_shape
    )
    check(dataclasses.replace(problem, values=values, weight=weight))


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
    problem = build(case, backend)
    hit = torch.zeros(case.n, case.c, case.h, case.w)
    for place in ((0, 2, 0, 0), (1, 4, 8, 10), (0, 0, 4, 5)):
        hit[place] = 1
        problem.x[place] = float("inf")
    reached = reference.conv2d(hit, problem.weight.abs(), padding=case.padding) > 0
    y = run_op(problem).cpu()
    assert bool(reached.any()) and not bool(reached.all())
    assert torch.equal(y.isfinite(), ~reached)


def test_relu_passes_nan_and_silu_saturates(backend: str) -> None:
    """NaN must not be hidden by an activation; large pre-activations must not overflow exp."""
    case = ConvCase(c=3, k=3, kernel=(1, 1), padding=(0, 0, 0, 0), pattern="full", bias=False)
    for activation in reference.ACTIVATIONS:
        problem = build(case.but(activation=activation), backend)
        problem.x[0, 0, 0, 0] = float("nan")
        y = run_op(problem).cpu()
        assert y[0, :, 0, 0].isnan().all(), activation
        assert y.isnan().sum() == case.k, activation
    problem = build(case.but(activation="silu"), backend)
    big = dataclasses.replace(problem, x=problem.x * 200)
    big.check(run_op(big))


THREAD_CASES = [
    ConvCase(n=1, c=64, k=33, h=28, w=28, density=0.1),
    ConvCase(n=5, c=64, k=70, h=14, w=14, density=0.1, kernel=(1, 1), padding=(0, 0, 0, 0)),
    ConvCase(n=3, c=24, k=48, h=15, w=13, groups=3, stride=(2, 2), residual=True),
    ConvCase(n=2, c=40, k=64, h=9, w=9, layout="channels_last", activation="silu"),
    ConvCase(n=1, c=512, k=40, h=7, w=7, density=0.05, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", THREAD_CASES, ids=lambda case: case.id)
def test_threads_do_not_change_a_bit(case: ConvCase, isa: str, threads: None) -> None:
    problem = build(case)
    grad_y = random_grad(problem)
    results, gradients = [], []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(check(problem))
        gradients.append(
            torch.ops.sparsecnn.csr_conv2d_grad_values.default(*grad_values_args(problem, grad_y))
        )
    for other in (1, 2):
        assert torch.equal(results[0], results[other])
        assert torch.equal(gradients[0], gradients[other])


@pytest.mark.parametrize("case", THREAD_CASES[:3], ids=lambda case: case.id)
def test_python_threads_get_the_same_bits(case: ConvCase, isa: str) -> None:
    problem = build(case)
    want = run_op(problem)
    found: list[Tensor] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                found.append(torch.ops.sparsecnn.csr_conv2d.default(*op_args(problem)))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert len(found) == 15
    assert all(torch.equal(y, want) for y in found)


def test_every_listed_instruction_set_can_be_chosen_and_the_best_is_the_default() -> None:
    listed = sparsecnn.build_info()["supported_isas"]
    runnable = [name for name in ISAS if can_run(name)]
    assert listed == runnable
    before = sparsecnn.isa()
    try:
        for name in listed:
            sparsecnn.set_isa(name)
            assert sparsecnn.isa() == sparsecnn.build_info()["isa"] == name
    finally:
        sparsecnn.set_isa(before)


def test_unknown_isa_is_refused() -> None:
    before = sparsecnn.isa()
    with pytest.raises(ValueError, match=r"avx1024"):
        sparsecnn.set_isa("avx1024")
    assert sparsecnn.isa() == before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 4, 28])
@pytest.mark.parametrize("kernel", [1, 3])
def test_no_channels_leave_the_bias(
    kernel: int, size: int, layout: torch.memory_format, isa: str
) -> None:
    weight = sparsecnn.CSRWeight.from_dense(torch.zeros(3, 0, kernel, kernel))
    x = torch.zeros(2, 0, size, size).contiguous(memory_format=layout)
    bias = torch.tensor([1.0, -2.0, 3.0])
    y = sparsecnn.ops.csr_conv2d(x, weight, bias, padding=kernel // 2, activation="relu")
    assert torch.equal(y, bias.relu()[None, :, None, None].expand(2, 3, size, size))
