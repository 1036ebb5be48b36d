"""pointwise_conv2d in TF32 on the emulator: float32 through the tensor cores, rounded first."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.cases import ConvCase, Problem, build
from tests.chains import WEIGHT_ORDERS, in_order
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator
from tests.cuda_emu.test_pointwise_conv2d_emu import BASE, LARGE, LAYOUTS, kernel_names

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")


ORDERS = ("contiguous", "innermost")


def rounded(t: Tensor) -> Tensor:
    """To TF32, nearest, ties away from zero; of normal numbers."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view_as(t)


def fine(t: Tensor, seed: int) -> Tensor:
    """Every element with two bits more than TF32 has."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 4, t.shape, generator=generator) / 4096
    return (t.sign() * (1 + bits)).clone(memory_format=torch.preserve_format)


def with_low_bits(case: ConvCase) -> list[tuple[Problem, Problem]]:
    """Problems whose x or weight must be rounded, and the same with it rounded: exact sums."""
    plain = build(case)
    weight = fine(plain.weight, 1)
    x = torch.empty_like(plain.x).copy_(fine(plain.x, 2))
    near = torch.empty_like(x).copy_(rounded(x))
    assert not torch.equal(near, x) and not torch.equal(rounded(weight), weight)
    replace = dataclasses.replace
    return [
        (replace(plain, x=x), replace(plain, x=near)),
        (replace(plain, weight=weight), replace(plain, weight=rounded(weight))),
    ]


def test_integers_are_exact(emu: Emulator) -> None:
    kernels = set()
    for case in cases.POINTWISE:
        for layout in LAYOUTS:
            problem = build(case.but(layout=layout))
            for order in ORDERS:
                weight = in_order(problem.weight, order)
                problem.check(emu.pointwise(problem, weight, tf32=True))
                kernels.add(emu.kernel)
    assert kernels == kernel_names("float", "true")


def test_eleven_bits_are_exact(emu: Emulator) -> None:
    for layout in LAYOUTS:
        problem = build(BASE.but(c=16, layout=layout, bias=False))
        generator = torch.Generator().manual_seed(5)
        x = torch.randint(-1024, 1025, problem.x.shape, generator=generator).float()
        problem = dataclasses.replace(problem, x=torch.empty_like(problem.x).copy_(x))
        problem.check(emu.pointwise(problem, tf32=True))


def test_factors_are_rounded_to_nearest(emu: Emulator, thread_order: str) -> None:
    for case in (BASE, LARGE):
        for layout in LAYOUTS:
            for problem, near in with_low_bits(case.but(layout=layout)):
                for order in ORDERS:
                    weight = in_order(problem.weight, order)
                    near.check(emu.pointwise(problem, weight, tf32=True))
                with pytest.raises(AssertionError, match="out of bound"):
                    near.check(emu.pointwise(problem))


def test_floats_stay_within_the_bound(emu: Emulator) -> None:
    for case in (BASE.but(stride=(2, 1)), LARGE.but(n=1, c=50, residual=True, activation="silu")):
        for layout in LAYOUTS:
            for order in WEIGHT_ORDERS:
                problem = build(case.but(layout=layout, integers=False))
                y = emu.pointwise(problem, in_order(problem.weight, order), tf32=True)
                problem.check(y, tf32=True)
                with pytest.raises(AssertionError, match="out of bound"):
                    problem.check(y)


def test_half_types_ignore_it(emu: Emulator) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        problem = build(BASE.but(dtype=dtype, integers=False))
        assert torch.equal(emu.pointwise(problem, tf32=True), emu.pointwise(problem))


def test_nan_and_infinity_pass(emu: Emulator) -> None:
    for activation in reference.ACTIVATIONS:
        for layout in LAYOUTS:
            problem = build(BASE.but(integers=False, activation=activation, layout=layout))
            problem.x[0, 3, 2, 5] = float("nan")
            y = emu.pointwise(problem, tf32=True)
            hit = torch.zeros(y.shape[0], *y.shape[2:], dtype=torch.bool)
            hit[0, 2, 5] = True
            assert torch.equal(y.isnan(), hit[:, None].expand_as(y)), activation
    problem.x[0, 3, 2, 5] = float("inf")
    assert bool(emu.pointwise(problem, tf32=True)[0, :, 2, 5].isinf().any())


TILE, KERNEL = "pointwise_conv2d_tile.cuh", "pointwise_conv2d.cu"
_FAULTS = {
    "fragments not rounded": (
        TILE,
        "for (uint32_t& v : part) v = to_tf32(__uint_as_float(v));",
        "for (uint32_t& v : part) v += 0;",
    ),
    "outputs not rounded": (
        TILE,
        "b[v] = to_tf32(tile[",
        "b[v] = [](float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }(tile[",
    ),
    "channels of a fragment in pairs": (TILE, "lane % 4 + v % 2 * 4)", "lane % 4 * 2 + v % 2)"),
    "halves of a fragment swapped": (
        TILE, "c + lane / 8 % 2 * kVector<T>);", "c + (lane / 8 + 1) % 2 * kVector<T>);",
    ),
    "half of a step": (KERNEL, "c < kDepth; c += kStep<T>) {", "c < kDepth; c += 2 * kStep<T>) {"),
    "outputs of the left half twice": (TILE, "lane / 4 + v / 2 * 8]", "lane / 4]"),
    "filters of the upper half twice": (TILE, "row + lane / 4 + v % 2 * 8]", "row + lane / 4]"),
}  # fmt: skip
FAULTS = {name: {file: (text, instead)} for name, (file, text, instead) in _FAULTS.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, faulty: dict[str, Future[Path]]) -> None:
    emu = Emulator(faulty[fault].result())
    with pytest.raises(AssertionError, match="out of bound"):
        for case in (BASE.but(c=130, k=10, h=3, w=7), LARGE):
            for layout in LAYOUTS:
                for problem, near in with_low_bits(case.but(layout=layout)):
                    for order in ORDERS:
                        weight = in_order(problem.weight, order)
                        near.check(emu.pointwise(problem, weight, tf32=True))
