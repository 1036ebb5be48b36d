"""Values of pointwise_conv2d: every instruction set, both kernels, weights in every order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import sparsecnn.ops
from tests import cases as families
from tests.cases import LANE_BOUNDARIES, ConvCase, Problem, build, lay_out, memory_format
from tests.chains import WEIGHT_ORDERS, in_order
from tests.conftest import ISAS, active_isa
from tests.fuzz import draw
from tests.ops.chain import pointwise_args, run_pointwise

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pointwise(case: ConvCase) -> ConvCase:
    """The case as a dense 1x1 layer without groups."""
    return case.but(
        kernel=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, pattern="full", density=1.0
    )


def all_cases() -> Iterator[ConvCase]:
    for count in LANE_BOUNDARIES:
        yield ConvCase(c=count, k=3, h=5, w=6)
        yield ConvCase(c=3, k=count, h=9, w=11)
        yield ConvCase(c=50, k=count, h=7, w=10)  # planes packed
    for size in range(1, 21):
        yield ConvCase(n=1, c=4, h=size, w=size, k=9)
        yield ConvCase(n=1, c=49, h=3, w=size, k=17)
    for pixels in LANE_BOUNDARIES:
        yield ConvCase(n=3, c=17, h=1, w=pixels, k=18)
        yield ConvCase(n=1, c=17, h=pixels, w=1, k=33)
    for n in (0, 1, 5, 16):
        yield ConvCase(n=n, c=8, k=8, h=7, w=7)
    for stride in ((2, 2), (3, 1), (1, 2), (5, 7)):
        yield ConvCase(stride=stride, h=14, w=15, c=9, k=20)
        yield ConvCase(stride=stride, h=5, w=6, residual=True, activation="relu")
    yield from families.epilogue_cases()
    for case in families.epilogue_cases():
        yield case.but(c=20, k=37, h=11, w=9, stride=(1, 1))
    yield from families.layout_cases()
    for count in (256, 512, 1024):  # pitches that fold onto a few cache sets
        yield ConvCase(n=1, c=count, k=18, h=3, w=9)
        yield ConvCase(n=1, c=9, k=count, h=3, w=9)
    yield ConvCase(n=1, c=64, k=40, h=28, w=28)
    yield ConvCase(n=1, c=40, k=300, h=3, w=3)


CASES = list(dict.fromkeys(pointwise(case) for case in all_cases()))


def check(problem: Problem, order: str = "innermost") -> Tensor:
    weight = in_order(problem.weight, order)
    before = problem.x.clone()
    y = run_pointwise(problem, weight)
    problem.check(y)
    want = memory_format(problem.x)
    assert y.is_contiguous(memory_format=want), f"{problem.case.id}: {y.stride()}, want {want}"
    assert torch.equal(problem.x, before), f"{problem.case.id}: x was modified"
    return y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_result(case: ConvCase, backend: str) -> None:
    layouts = {case.layout, "channels_last"} if case.layout == "contiguous" else {case.layout}
    for layout in sorted(layouts):
        for dtype in DTYPES if backend == "cpu" else CUDA_DTYPES:
            check(build(case.but(layout=layout, dtype=dtype, integers=True), backend))
            check(build(case.but(layout=layout, dtype=dtype), backend), "contiguous")


BITWISE = [
    pointwise(ConvCase(n=3, c=24, k=40, h=13, w=11, activation="relu")),
    pointwise(ConvCase(n=2, c=60, k=33, h=20, w=12, residual=True)),
    pointwise(ConvCase(n=1, c=40, k=300, h=3, w=3, activation="silu")),
    pointwise(ConvCase(n=2, c=16, k=64, h=9, w=9, stride=(2, 2))),
    pointwise(ConvCase(n=1, c=128, k=64, h=28, w=28)),
]


@pytest.mark.parametrize("case", BITWISE, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_numbers_changes_a_bit(
    case: ConvCase, dtype: torch.dtype, isa: str, threads: None
) -> None:
    """Threads, memory formats of input and weight, the other images, neighbouring filters."""
    problem = build(case.but(dtype=dtype))
    torch.set_num_threads(1)
    want = check(problem)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        for layout in ("contiguous", "channels_last", "sliced"):
            moved = dataclasses.replace(problem, x=lay_out(problem.x, layout))
            for order in WEIGHT_ORDERS:
                y = run_pointwise(moved, in_order(problem.weight, order))
                assert torch.equal(y.contiguous(), want), (count, layout, order)
    assert problem.bias is not None
    for n in range(case.n):
        residual = None if problem.residual is None else problem.residual[n : n + 1]
        alone = dataclasses.replace(problem, x=problem.x[n : n + 1], residual=residual)
        assert torch.equal(run_pointwise(alone, problem.weight), want[n : n + 1])
    half = case.k // 2
    residual = None if problem.residual is None else problem.residual[:, :half].contiguous()
    part = dataclasses.replace(problem, bias=problem.bias[:half], residual=residual)
    assert torch.equal(run_pointwise(part, problem.weight[:half]), want[:, :half])


def test_function_calls_the_operator() -> None:
    for layout in ("contiguous", "channels_last"):
        case = pointwise(ConvCase(layout=layout, residual=True, activation="silu", stride=(2, 2)))
        problem = build(case)
        y = sparsecnn.ops.pointwise_conv2d(
            problem.x, problem.weight, problem.bias, stride=2, activation="silu",
            residual=problem.residual,
        )  # fmt: skip
        assert torch.equal(y, run_pointwise(problem, problem.weight))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tf32_is_for_float32_on_cuda(layout: str, backend: str) -> None:
    for size in (dict(c=9, k=20, h=9, w=9), dict(n=12, c=96, k=80, h=28, w=28, residual=True)):
        case = pointwise(ConvCase(layout=layout, activation="silu").but(**size))
        for dtype in DTYPES if backend == "cpu" else CUDA_DTYPES:
            problem = build(case.but(dtype=dtype), backend)
            strict = run_pointwise(problem, problem.weight)
            assert torch.equal(run_pointwise(problem, problem.weight, False), strict)
            y = run_pointwise(problem, problem.weight, True)
            problem.check(y, tf32=True)
            changes = backend == "cuda" and dtype == torch.float32
            assert torch.equal(y, strict) != changes
        exact = build(case.but(integers=True, activation="relu"), backend)
        exact.check(run_pointwise(exact, exact.weight, True))


def test_gradients_with_tf32() -> None:
    for activation in ("none", "relu6", "silu"):  # silu computes the sum again
        problem = build(pointwise(ConvCase(n=2, c=5, k=4, h=4, w=3, activation=activation)))
        x = problem.x.requires_grad_()
        grads = []
        for flags in ((), (False,), (True,)):
            y = torch.ops.sparsecnn.pointwise_conv2d.default(
                *pointwise_args(problem, problem.weight, *flags)
            )
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_nan_is_not_hidden(backend: str) -> None:
    for layout in ("contiguous", "channels_last"):
        for activation in ("none", "relu", "relu6", "silu", "hardswish"):
            case = pointwise(ConvCase(n=1, c=9, k=20, h=9, w=9, layout=layout))
            problem = build(case.but(activation=activation), backend)
            problem.x[0, 3, 2, 5] = float("nan")
            y = run_pointwise(problem, problem.weight)
            hit = torch.zeros(9, 9, dtype=torch.bool)
            hit[2, 5] = True
            assert torch.equal(y.isnan().cpu(), hit.expand_as(y)), activation


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--fuzz-seed")
        metafunc.parametrize(
            "fuzz_seed", range(first, first + metafunc.config.getoption("--fuzz-cases"))
        )


def test_fuzz(fuzz_seed: int) -> None:
    drawn = draw(fuzz_seed, (torch.float32, torch.float32, torch.bfloat16, torch.float64))
    problem = build(pointwise(drawn))
    order = WEIGHT_ORDERS[fuzz_seed % len(WEIGHT_ORDERS)]
    skipped = 0
    for name in ISAS:
        try:
            with active_isa(name):
                check(problem, order)
        except pytest.skip.Exception:
            skipped += 1
        except Exception as error:
            raise AssertionError(
                f"{name}: {problem.case}, weight {order}\nrepeat: python -m pytest "
                f"tests/ops/test_pointwise_conv2d.py -k fuzz --fuzz-cases 1 "
                f"--fuzz-seed {fuzz_seed}"
            ) from error
    assert skipped < len(ISAS)
