"""Values of depthwise_conv2d: hand-picked and random cases, on every instruction set."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch

import sparsecnn
from tests import cases as families
from tests import reference
from tests.cases import ConvCase, build
from tests.conftest import ISAS, active_isa
from tests.fuzz import draw
from tests.ops.depthwise import check, depthwise, run_function, run_op

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
FIXED = ((3, 3), (5, 5), (7, 7))  # filters with kernels of their own


def same(kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> tuple[int, int, int, int]:
    """Padding that keeps the size at stride 1, for odd kernels."""
    vertical, horizontal = (d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
    return vertical, vertical, horizontal, horizontal


def channel_cases() -> Iterator[ConvCase]:
    """Channels around the vector widths, with one and with several filters each."""
    for count in families.LANE_BOUNDARIES:
        for multiplier in (1, 2, 3):
            yield depthwise(ConvCase(c=count, h=5, w=6), multiplier)
    yield depthwise(ConvCase(c=2, h=5, w=6), 40)
    yield depthwise(ConvCase(n=1, c=1, h=5, w=6), 33)
    yield depthwise(ConvCase(n=1, c=200, h=7, w=7, kernel=(5, 5), padding=(2, 2, 2, 2)))


def size_cases() -> Iterator[ConvCase]:
    """Every size 1..33 at both strides: each tile, its remainder, halves of a vector."""
    for kernel in FIXED:
        for size in (*range(1, 18), 20, 23, 28, 30, 31, 32, 33, 56):
            for stride in ((1, 1), (2, 2)):
                case = ConvCase(n=1, c=2, kernel=kernel, padding=same(kernel), stride=stride)
                yield depthwise(case.but(h=size, w=size))
    for height, width in ((1, 17), (17, 1), (29, 8), (8, 29), (15, 100), (100, 7)):
        yield depthwise(ConvCase(c=3, h=height, w=width))
        yield depthwise(ConvCase(c=3, h=height, w=width, stride=(2, 2)))


def filter_cases() -> Iterator[ConvCase]:
    """Filters beside the fixed ones, strides and dilations in all mixtures, uneven pads."""
    shared = (*families.kernel_cases(), *families.batch_cases())
    yield from (depthwise(case) for case in shared)
    yield from (depthwise(case, 2) for case in shared[::3])
    for kernel in ((3, 3), (3, 5), (5, 3), (7, 2)):
        for stride in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3)):
            for dilation in ((1, 1), (2, 2), (1, 3), (3, 1)):
                yield depthwise(
                    ConvCase(c=3, h=19, w=21, kernel=kernel, stride=stride, dilation=dilation).but(
                        padding=same(kernel, dilation)
                    )
                )
    yield depthwise(ConvCase(c=3, h=40, w=41, kernel=(31, 31), padding=(15, 15, 15, 15)))
    yield depthwise(ConvCase(c=3, h=9, w=70, kernel=(3, 66), padding=(1, 1, 33, 32)))


def end_cases() -> Iterator[ConvCase]:
    """Bias, residual and activation; every memory layout."""
    for case in families.epilogue_cases():
        yield depthwise(case)
        yield depthwise(case.but(w=23, h=17))
    for case in families.layout_cases():
        yield depthwise(case)


def variants(case: ConvCase, turn: int, device: str) -> Iterator[ConvCase]:
    """Exact integers in both memory formats, and in turn other types and real data."""
    layouts = (case.layout,)
    if case.layout == "contiguous":
        layouts = ("contiguous", "channels_last")
    for layout in layouts:
        yield case.but(layout=layout, integers=True)
    others = [(dtype, layout) for dtype in DTYPES[device] for layout in layouts]
    dtype, layout = others[turn % len(others)]
    yield case.but(dtype=dtype, layout=layout)


@pytest.mark.parametrize(
    "family", [channel_cases, size_cases, filter_cases, end_cases], ids=lambda f: f.__name__
)
def test_result(family: object, backend: str) -> None:
    seen = 0
    for turn, case in enumerate(family()):  # type: ignore[arg-type,operator]
        if min(case.out_size) < 1:
            continue
        for variant in variants(case, turn, backend):
            check(build(variant, backend))
            seen += 1
    assert seen > 80


NETWORK = [
    ConvCase(n=1, c=96, h=56, w=56),
    ConvCase(n=2, c=48, h=56, w=56, stride=(2, 2)),
    ConvCase(n=1, c=240, h=28, w=28, kernel=(5, 5)),
    ConvCase(n=1, c=480, h=7, w=7),
    ConvCase(n=1, c=40, h=28, w=28, kernel=(7, 7), residual=True, activation="silu"),
    # Above the size from which input is prefetched.
    ConvCase(n=5, c=40, h=112, w=112, stride=(2, 2), activation="relu6"),
    ConvCase(n=2, c=44, h=112, w=112),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", NETWORK, ids=lambda case: case.id)
def test_layers_of_networks(case: ConvCase, layout: str, backend: str) -> None:
    case = case.but(padding=same(case.kernel), layout=layout, integers=True)
    check(build(depthwise(case), backend))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        depthwise(ConvCase(n=1, c=3, h=30, w=23)),
        depthwise(ConvCase(n=1, c=3, h=29, w=40, stride=(2, 2), residual=True)),
        depthwise(ConvCase(n=1, c=80, h=7, w=7, kernel=(5, 5), padding=(2, 2, 2, 2))),
        depthwise(ConvCase(n=3, c=17, h=9, w=9, dilation=(2, 2)), 2),
        depthwise(ConvCase(n=2, c=5, h=33, w=8, dtype=torch.bfloat16)),
        depthwise(ConvCase(n=1, c=1, h=1, w=1)),
    ],
    ids=lambda case: case.id,
)
def test_threads_do_not_change_a_bit(case: ConvCase, layout: str, isa: str, threads: None) -> None:
    problem = build(case.but(layout=layout))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(check(problem))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_is_its_images_and_a_channel_is_a_layer(layout: str, isa: str) -> None:
    case = depthwise(ConvCase(n=3, c=21, h=15, w=18, layout=layout), 2)
    problem = build(case)
    y = run_op(problem)
    for n in range(case.n):
        assert torch.equal(run_op(dataclasses.replace(problem, x=problem.x[n : n + 1])), y[[n]])
    assert problem.bias is not None
    for c in (0, 7, 20):
        one = dataclasses.replace(
            problem,
            x=problem.x[:, c : c + 1].contiguous(),
            weight=problem.weight[2 * c : 2 * c + 2],
            bias=problem.bias[2 * c : 2 * c + 2],
        )
        # One channel is contiguous in both formats: the order of sums is that of NCHW.
        if layout == "contiguous":
            assert torch.equal(run_op(one), y[:, 2 * c : 2 * c + 2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (4, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_infinities_stay_where_they_are_read(
    kernel: tuple[int, int], stride: int, layout: str, isa: str
) -> None:
    """An infinite pixel reaches the outputs whose window covers it, and padding is no pixel."""
    case = depthwise(
        ConvCase(n=2, c=5, h=17, w=21, kernel=kernel, stride=(stride, stride), layout=layout)
    ).but(padding=(1, 1, 1, 1))
    problem = build(case)
    hit = torch.zeros(case.n, case.c, case.h, case.w)
    for place in ((0, 2, 0, 0), (1, 4, 16, 20), (0, 0, 8, 15), (1, 1, 3, 16)):
        hit[place] = 1
        problem.x[place] = float("inf")
    reached = (
        reference.conv2d(
            hit, problem.weight.abs(), padding=case.padding, stride=case.stride, groups=case.c
        )
        > 0
    )
    y = run_op(problem)
    assert bool(reached.any()) and not bool(reached.all())
    assert torch.equal(y.isfinite(), ~reached)


def test_relu_passes_nan_and_silu_saturates(isa: str) -> None:
    for activation in reference.ACTIVATIONS:
        for layout in ("contiguous", "channels_last"):
            problem = build(depthwise(ConvCase(c=3, activation=activation, layout=layout)))
            problem.x[0, 0, 4, 4] = float("nan")
            y = run_op(problem)
            assert y[0, 0, 3:6, 3:6].isnan().all(), activation
            assert y.isnan().sum() == 9, activation
    problem = build(depthwise(ConvCase(activation="silu")))
    big = dataclasses.replace(problem, x=problem.x * 200)
    big.check(run_op(big))


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_residual_and_weight_may_lie_anyhow(x_layout: str, residual_layout: str, isa: str) -> None:
    problem = build(depthwise(ConvCase(residual=True, layout=x_layout, activation="relu")))
    assert problem.residual is not None and problem.bias is not None
    spread = torch.full((*problem.weight.shape[:-1], 6), 77.0)
    spread[..., ::2] = problem.weight
    moved = families.lay_out(problem.residual.contiguous(), residual_layout)
    check(dataclasses.replace(problem, residual=moved, weight=spread[..., ::2]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_function_calls_the_operator(layout: str, isa: str) -> None:
    problem = build(depthwise(ConvCase(layout=layout, residual=True, activation="silu"), 2))
    assert torch.equal(run_function(problem), run_op(problem))


@pytest.mark.parametrize(
    "padding, pads",
    [
        (2, (2, 2, 2, 2)),
        ((1, 3), (1, 1, 3, 3)),
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ("valid", (0, 0, 0, 0)),
        ("same", (0, 1, 2, 2)),
    ],
)
def test_function_accepts_every_spelling_of_padding(
    padding: int | tuple[int, ...] | str, pads: tuple[int, int, int, int]
) -> None:
    problem = build(depthwise(ConvCase(kernel=(2, 5), padding=pads, integers=True)))
    problem.check(
        sparsecnn.ops.depthwise_conv2d(problem.x, problem.weight, problem.bias, padding=padding)
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--fuzz-seed")
        count = metafunc.config.getoption("--fuzz-cases")
        metafunc.parametrize("fuzz_seed", range(first, first + count))


def test_fuzz(fuzz_seed: int) -> None:
    case = draw(fuzz_seed, (torch.float32, torch.float32, torch.bfloat16, torch.float64))
    multiplier = random.Random(fuzz_seed).choice((1, 1, 1, 2, 3))
    problem = build(depthwise(case.but(c=min(case.c, 70)), multiplier))
    skipped = 0
    for name in ISAS:
        try:
            with active_isa(name):
                check(problem)
        except pytest.skip.Exception:
            skipped += 1
        except Exception as error:
            raise AssertionError(
                f"{name}: {problem.case}\nrepeat: python -m pytest "
                f"tests/ops/test_depthwise_conv2d.py -k fuzz --fuzz-cases 1 "
                f"--fuzz-seed {fuzz_seed}"
            ) from error
    assert skipped < len(ISAS)
