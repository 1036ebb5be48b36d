"""pointwise_conv2d on the emulator: the logic of its kernels, without a GPU."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.cases import ConvCase, build
from tests.chains import WEIGHT_ORDERS, in_order
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

BASE = cases.POINTWISE[0].but(c=9, k=9)
LARGE = BASE.but(c=24, k=40, h=17, w=18)
LAYOUTS = ("contiguous", "channels_last")


def kernel_names(kind: str, tensor: str) -> set[str]:
    """All there are for a storage type, with or without tensor cores."""
    tiles = ("128, 64, 8", "32, 32, 4")
    flags = ("true", "false")
    return {
        f"launch_tiled<{kind}, {tensor}, {nhwc}, {innermost}, {tile}>"
        for nhwc in flags
        for innermost in flags
        for tile in tiles
    }


def test_integers_are_exact(emu: Emulator) -> None:
    kernels = set()
    for case in cases.POINTWISE:
        for dtype in (torch.float32, torch.float16):
            for layout in LAYOUTS:
                problem = build(case.but(layout=layout, dtype=dtype))
                for order in ("contiguous", "innermost"):
                    problem.check(emu.pointwise(problem, in_order(problem.weight, order)))
                    kernels.add(emu.kernel)
    assert kernels == kernel_names("float", "false") | kernel_names("__half", "true")


@pytest.mark.parametrize("index", [0, 2, 8, 9, 10, 18, -1])
def test_every_type_layout_and_order(emu: Emulator, index: int, thread_order: str) -> None:
    for turn, variant in enumerate(cases.variants(cases.POINTWISE[index])):
        problem = build(variant)
        order = ("contiguous", "innermost")[(turn + int(thread_order)) % 2]
        problem.check(emu.pointwise(problem, in_order(problem.weight, order)))


@pytest.mark.parametrize("order", WEIGHT_ORDERS)
def test_weights_in_every_order(emu: Emulator, order: str) -> None:
    for case in (BASE, LARGE.but(dtype=torch.bfloat16, integers=False)):
        problem = build(case)
        problem.check(emu.pointwise(problem, in_order(problem.weight.to(case.dtype), order)))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_in_every_type(emu: Emulator, activation: str) -> None:
    for variant in cases.variants(BASE.but(activation=activation, residual=True, n=1)):
        problem = build(variant)
        problem.check(emu.pointwise(problem))


def test_unaligned_tensors(emu: Emulator) -> None:
    # One element behind an address of 16 bytes, two and four: the copies become narrower.
    for dtype in (torch.float32, torch.bfloat16):
        for shift in (1, 2, 4):
            for layout in LAYOUTS:
                problem = build(BASE.but(c=16, k=16, h=4, w=4, dtype=dtype, layout=layout))
                memory = torch.empty(shift + problem.x.numel(), dtype=dtype)
                moved = memory[shift:].as_strided(problem.x.shape, problem.x.stride(), shift)
                moved.copy_(problem.x)
                moved_weight = torch.empty(shift + problem.weight.numel(), dtype=dtype)[shift:]
                weight = moved_weight.view(problem.weight.shape).copy_(problem.weight)
                dataclasses.replace(problem, x=moved).check(
                    emu.pointwise(dataclasses.replace(problem, x=moved), weight)
                )


def test_blocks_loop_when_the_grid_is_full(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    emu.set_device(max_grid=2)
    for order, dtype in (("0", torch.float32), ("1", torch.float16), ("2", torch.bfloat16)):
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        for case in (LARGE.but(k=70, n=3), BASE.but(h=11, w=13, k=20)):
            for layout in LAYOUTS:
                problem = build(case.but(dtype=dtype, layout=layout))
                problem.check(emu.pointwise(problem))


_FAULTS = {
    "no barrier behind the copies": (
        "__syncthreads();  // all copies of this step",
        "// all copies of this step",
    ),
    "no wait for the copies": ("copy_async_wait<kStages - 2>();", "copy_async_wait<kStages>();"),
    "no barrier before the results": (
        "      __syncthreads();  // the results go where the tiles were\n",
        "",
    ),
    "no barrier behind the results": (
        "    __syncthreads();\n#pragma unroll 2",
        "#pragma unroll 2",
    ),
    "the last channel of x": (
        "x_inside[i] ? s.c - c0 - c : 0",
        "x_inside[i] ? s.c - c0 - c - 1 : 0",
    ),
    "one channel left out": ("(k < s.k ? s.c - c : 0)", "(k < s.k ? s.c - 1 - c : 0)"),
    "rows of the other half": ("lane / 4 + e / 2 * 8", "lane / 4 + (1 - e / 2) * 8"),
    "vectors across images": (
        "(s.n == 1 || plan.area % kVector<T> == 0)",
        "plan.area > 0",
    ),
    "one output off": ("down * 4 + i / 4 * 4 * kDown + i % 4", "down * 4 + i / 4 * 4 * kDown + 1"),
}  # fmt: skip
FAULTS = {name: {"pointwise_conv2d.cu": edit} for name, edit in _FAULTS.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(
    fault: str, faulty: dict[str, Future[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    emu = Emulator(faulty[fault].result())
    with pytest.raises(AssertionError):
        for order in ("0", "1"):
            monkeypatch.setenv("CUDA_EMU_ORDER", order)
            for case in (BASE.but(c=130, k=10, h=3, w=7), BASE, LARGE):
                for dtype in (torch.float32, torch.float16):
                    for layout in LAYOUTS:
                        problem = build(case.but(dtype=dtype, layout=layout))
                        problem.check(emu.pointwise(problem))


def test_nothing_to_compute_launches_nothing(emu: Emulator) -> None:
    before = emu.launches
    assert emu.pointwise(build(BASE.but(n=0))).numel() == 0
    assert emu.launches == before


def test_refusals(emu: Emulator) -> None:
    with pytest.raises(ValueError, match="invalid argument"):
        emu.pointwise(build(BASE.but(dtype=torch.float64)))
    with pytest.raises(ValueError, match="invalid argument"):
        emu.pointwise(build(ConvCase(pattern="full")))


def test_nan_passes_every_activation(emu: Emulator) -> None:
    cases.check_nan_passes(emu.pointwise, BASE)


@pytest.mark.parametrize("layout", [0, 1])
def test_offsets_beyond_32_bits(emu: Emulator, layout: int) -> None:
    weight = torch.tensor([[3.0, 5.0], [-1.0, 2.0]], dtype=torch.float16).view(2, 2, 1, 1)
    problem, corners = cases.huge_problem(layout, weight)
    want = torch.einsum("kc,nchw->nkhw", weight[..., 0, 0].float(), corners.float())
    assert torch.equal(emu.pointwise(problem).float(), want)
