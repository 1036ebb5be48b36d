"""chain_conv2d on the emulator: the logic of its kernels and of their choice, without a GPU."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.chains import DW, ChainCase, ChainProblem, Stage, build_chain, inverted
from tests.cuda_emu import cases as shared
from tests.cuda_emu import chain, emulator
from tests.cuda_emu.emulator import Emulator

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

CASES = chain.cases()
# A device on which no tile of these chains fits.
SMALL = 12 * 1024
WIDE_FILTER = ChainCase(
    (Stage(20), Stage(6, (3, 3), dilation=(24, 20)), Stage(9)), n=1, c=5, h=60, w=50, integers=True
)
BOTH = ("contiguous", "channels_last")


def check(emu: Emulator, case: ChainCase) -> None:
    problem = build_chain(case)
    problem.check(chain.run(emu, problem))


def test_integers_are_exact(emu: Emulator) -> None:
    kernels = set()
    for index, case in enumerate(CASES):
        for layout in BOTH if index < 3 else (BOTH[index % 2],):
            check(emu, case.but(layout=layout))
            kernels.add(emu.kernel)
    assert kernels == {"launch_fused<float, 8>"}


def test_integers_in_bfloat16_are_exact(emu: Emulator) -> None:
    kernels = set()
    for index, case in enumerate((*CASES[:6], *CASES[10:12])):
        check(emu, case.but(layout=BOTH[index % 2], dtype=torch.bfloat16, n=1))
        kernels.add(emu.kernel)
    assert kernels == {f"launch_fused<__nv_bfloat16, {sums}>" for sums in (4, 8)}


def test_chains_that_do_not_fit_run_in_groups(emu: Emulator) -> None:
    types = (torch.float32, BOTH[0]), (torch.float16, BOTH[1]), (torch.bfloat16, BOTH[0])
    for dtype, layout in types:
        for case in (WIDE_FILTER, CASES[4]):
            emu.set_device(smem_bytes=SMALL)
            before = emu.launches
            check(emu, case.but(dtype=dtype, layout=layout, integers=False))
            assert emu.launches - before > 1
            assert emu.number("emu_workspace_bytes") > 0
    emu.set_device()
    check(emu, CASES[2])
    assert emu.number("emu_workspace_bytes") == 0


def test_the_direct_kernel_ends_a_chain(emu: Emulator) -> None:
    emu.set_device(smem_bytes=SMALL)
    case = WIDE_FILTER.but(stages=WIDE_FILTER.stages[:2], residual=True)
    for layout in BOTH:
        check(emu, case.but(layout=layout))
        assert emu.kernel == "launch_direct<float>"


@pytest.mark.parametrize("index", [0, 4, 6])
def test_every_type_layout_and_order(emu: Emulator, index: int, thread_order: str) -> None:
    for variant in chain.variants(CASES[index].but(n=1, h=4, w=5)):
        check(emu, variant)


def test_wide_blocks_of_halves(emu: Emulator) -> None:
    check(emu, CASES[1].but(dtype=torch.float16, integers=False, layout="channels_last"))
    assert emu.kernel == "launch_fused<__half, 8>"


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_in_every_type(emu: Emulator, activation: str) -> None:
    stages = (
        Stage(18, activation=activation), Stage(None, (3, 3), bias=False, activation=activation),
        Stage(9, bias=False, activation=activation),
    )  # fmt: skip
    case = ChainCase(stages, n=1, c=4, h=2, w=3, residual=True)
    for variant in chain.variants(case):
        check(emu, variant)


def test_intermediates_keep_24_bits(emu: Emulator) -> None:
    # 1 + 2^-22 and -1 cancel in the second stage: what was rounded in between is lost.
    for dtype in (torch.bfloat16, torch.float16):
        case = ChainCase((Stage(2, bias=False), Stage(1, bias=False)), 1, 2, 1, 1, dtype=dtype)
        problem = build_chain(case)
        problem.x.copy_(torch.tensor([1.0, 2.0**-11]).view(1, 2, 1, 1))
        problem.weights[0].copy_(torch.tensor([[1.0, 2.0**-11], [-1.0, 0.0]]).view(2, 2, 1, 1))
        problem.weights[1].fill_(1)
        assert chain.run(emu, problem).item() == 2.0**-22


def moved(problem: ChainProblem) -> ChainProblem:
    """The same problem with no tensor at a multiple of 16 bytes."""

    def move(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(1 + t.numel(), dtype=t.dtype)
        copy = memory[1:].as_strided(t.shape, t.stride(), 1)
        copy.copy_(t)
        assert copy.data_ptr() % 16 != 0
        return copy

    assert problem.residual is not None
    return dataclasses.replace(
        problem,
        x=move(problem.x),
        weights=[move(w) for w in problem.weights],
        residual=move(problem.residual),
    )


def test_unaligned_tensors(emu: Emulator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = ChainCase(inverted(16, 8), n=1, c=8, residual=True, layout="channels_last")
        problem = moved(build_chain(case.but(dtype=dtype)))
        problem.check(chain.run(emu, problem))


def test_small_images_are_shared_by_many_blocks(emu: Emulator) -> None:
    emu.set_device(sm_count=64)
    check(emu, ChainCase((Stage(8, (3, 3)), DW, Stage(130)), n=1, c=8, h=5, w=5, integers=True))
    check(emu, ChainCase((Stage(70), DW), n=1, c=8, h=5, w=5, integers=True))


def test_blocks_loop_when_the_grid_is_full(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    emu.set_device(max_grid=2)
    case = ChainCase(inverted(20, 9), n=3, h=9, w=9, residual=True, integers=True)
    for order, layout in (("0", "contiguous"), ("1", "channels_last"), ("2", "channels_last")):
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        check(emu, case.but(layout=layout))
    emu.set_device(smem_bytes=SMALL, max_grid=2)
    check(emu, WIDE_FILTER.but(h=50, w=42))


_FAULTS = {
    "no barrier before the products": (
        "chain_conv2d_dense.cuh",
        "    __syncthreads();  // weights and inputs are there, all have used the other buffer\n",
        "",
    ),
    "no barrier before a depthwise stage": (
        "chain_conv2d.cu",
        "    __syncthreads();  // its input and filters are there\n",
        "",
    ),
    "no wait for later weights": (
        "chain_conv2d_dense.cuh", "copy_async_wait<0>();", "copy_async_wait<1>();",
    ),
    "a row of the halo": (
        "chain_conv2d_plan.h", "first_h * s.stride_h - s.pad_top,",
        "first_h * s.stride_h - s.pad_top + 1,",
    ),
    "values beyond the edge": (
        "chain_conv2d_tile.cuh",
        "const bool inside = p >= 0 && p < s.p && q >= 0 && q < s.q;",
        "const bool inside = p >= 0 && p <= s.p && q >= 0 && q < s.q;",
    ),
    "the last output of a strip": (
        "chain_conv2d_tile.cuh", "if (col + j >= out.w) break;", "if (col + j >= out.w - 1) break;",
    ),
    "weights of the first chunk for the second": (
        "chain_conv2d.cu", "inputs, c0 + s.chunk, smem", "inputs, c0, smem",
    ),
}  # fmt: skip
FAULTS = {name: {file: (text, instead)} for name, (file, text, instead) in _FAULTS.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, faulty: dict[str, Future[Path]]) -> None:
    emu = Emulator(faulty[fault].result())
    with pytest.raises(AssertionError):
        for case in (*CASES[:6], CASES[16], CASES[11]):
            check(emu, case)


def test_nothing_to_compute_launches_nothing(emu: Emulator) -> None:
    before = emu.launches
    assert chain.run(emu, build_chain(CASES[0].but(n=0))).numel() == 0
    assert emu.launches == before


def test_refusals(emu: Emulator) -> None:
    with pytest.raises(ValueError, match="invalid argument"):
        chain.run(emu, build_chain(CASES[0].but(dtype=torch.float64)))
    problem = build_chain(CASES[0])
    y = torch.zeros(2, *CASES[0].shapes[-1])
    for change in ("none", "many", "grouped"):
        params = chain.params_of(problem, y)
        params.stages = {"none": 0, "many": 9}.get(change, 3)
        params.stage[0].shape.groups = 5 if change == "grouped" else 1
        with pytest.raises(ValueError, match="invalid argument"):
            chain.run_raw(emu, params)


def test_nan_and_infinity_pass(emu: Emulator) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation in reference.ACTIVATIONS:
            stages = (
                Stage(9, activation=activation), Stage(None, (3, 3), activation=activation),
                Stage(7, activation=activation),
            )  # fmt: skip
            problem = build_chain(ChainCase(stages, n=1, c=4, h=9, w=9, dtype=dtype))
            problem.x[0, 1, 4, 5] = float("nan")
            hit = torch.zeros(9, 9, dtype=torch.bool)
            hit[3:6, 4:7] = True
            assert torch.equal(chain.run(emu, problem).isnan(), hit.expand(1, 7, 9, 9)), activation
    for dtype in (torch.float32, torch.bfloat16):  # infinite in the intermediate, and no NaN
        case = ChainCase((Stage(1, bias=False), Stage(1, bias=False)), 1, 1, 1, 1, dtype=dtype)
        problem = build_chain(case)
        for tensor in (problem.x, *problem.weights):
            tensor.fill_(3e38)
        assert chain.run(emu, problem).item() == float("inf")


@pytest.mark.parametrize("layout", [0, 1])
def test_offsets_beyond_32_bits(emu: Emulator, layout: int) -> None:
    # 4.4 GB of addresses, of which the stride touches the corners only: by the direct kernel, whose
    # input is too spread for a tile, and by tiles of one pixel.
    side, stride = 33_000, 32_999
    x, corners = shared.huge_image(layout, side)
    far = {"stride": (stride, stride)}, {"kernel": (2, 2), "dilation": (stride, stride)}
    kernels = "launch_fused<__half, 4>", "launch_direct<__half>"
    for options, kernel in zip(far, kernels, strict=True):
        stage = Stage(3, padding=(0, 0, 0, 0), bias=False, **options)  # type: ignore[arg-type]
        near = dataclasses.replace(stage, stride=(1, 1), dilation=(1, 1))
        case = ChainCase((near,), n=1, c=2, h=2, w=2, dtype=torch.float16, integers=True)
        problem = build_chain(case)
        want = reference.conv2d(corners.double(), problem.weights[0].double(), None)
        case = case.but(stages=(stage,), h=side, w=side)
        assert torch.equal(
            chain.run(emu, dataclasses.replace(problem, x=x, case=case)).double(), want
        )
        assert emu.kernel == kernel
