"""pattern_conv2d of 2:4 weights on the emulator: packing and the sparse tensor-core kernel."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsecnn.formats.pattern import PatternWeight
from tests import reference
from tests.cases import ConvCase, build
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator, pattern_params
from tests.ops.pattern import NAMES, PatternProblem
from tests.ops.two_four import BASE, BFLOAT, GEOMETRIES, HALF, ONE, SPLIT, two_four

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

# With these numbers of multiprocessors the launcher takes each tile.
TILES = {
    "Wide": (ONE.but(k=248, h=9, w=14), 1),
    "Middle": (ONE.but(k=120, h=10, w=13), 1),
    "Small": (ONE.but(k=72, h=10, w=13), 1000),
}
# Padding below zero crops; the operator has it in gradients only.
CROPPED = BASE.but(kernel=(1, 2), padding=(0, 0, -1, 1), c=32)


def check(emu: Emulator, case: ConvCase, share: int = 1) -> Tensor:
    packed = two_four(case, share)
    y = emu.pattern_2_4(packed)
    packed.problem.check(y)
    return y


def launcher(emu: Emulator) -> str:
    return emu.kernel.replace("sparsecnn::cuda::two_four::", "")


def test_integers_are_exact(emu: Emulator) -> None:
    for number, case in enumerate([CROPPED, *GEOMETRIES]):
        check(emu, case, share=1 + number % 3)
    assert launcher(emu) == "launch_sum<__half>"
    check(emu, SPLIT.but(dtype=BFLOAT, residual=False, bias=False, c=384), share=2)
    assert launcher(emu) == "launch_sum<__nv_bfloat16>"
    for dtype, name in ((HALF, "__half"), (BFLOAT, "__nv_bfloat16")):
        for tile, (case, sm_count) in TILES.items():
            emu.set_device(sm_count)
            check(emu, case.but(dtype=dtype))
            assert launcher(emu) == f"launch_gemm<{name}, {tile}>"


def test_less_shared_memory_takes_a_smaller_tile(emu: Emulator) -> None:
    case = TILES["Wide"][0]
    for kib, tile in ((227, "Wide"), (99, "Middle"), (64, "Small")):
        emu.set_device(1, kib * 1024)
        check(emu, case)
        assert launcher(emu) == f"launch_gemm<__half, {tile}>"


def test_every_type_and_order(emu: Emulator, thread_order: str) -> None:
    for tile, types in (("Wide", [HALF]), ("Middle", [BFLOAT]), ("Small", [HALF, BFLOAT])):
        case, sm_count = TILES[tile]
        emu.set_device(sm_count)
        for dtype in types:
            floats = case.but(dtype=dtype, integers=False, residual=True, activation="silu")
            check(emu, floats.but(c=96))
    emu.set_device()
    check(emu, SPLIT.but(integers=False))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(emu: Emulator, activation: str) -> None:
    for dtype in (HALF, BFLOAT):
        for ends in ({"residual": True}, {"bias": False}):
            check(emu, ONE.but(dtype=dtype, activation=activation, **ends))
    check(emu, SPLIT.but(activation=activation))


def test_a_wide_filter_is_packed_in_passes(emu: Emulator) -> None:
    check(emu, BASE.but(kernel=(12, 16), padding=(6, 6, 8, 8), c=96, h=1, w=2, k=32), share=4)


def test_blocks_loop_when_the_grid_is_full(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMU_ORDER", "1")
    emu.set_device(max_grid=2)
    check(emu, ONE.but(k=136, h=10, w=13), share=3)
    check(emu, SPLIT.but(k=72))


def test_what_breaks_the_pattern_is_nan(emu: Emulator) -> None:
    packed = two_four(BASE.but(activation="relu"))
    problem = packed.problem
    expected = problem.expected().to(HALF)
    dense = problem.weight.clone()
    dense[3, 8:11, 2, 0] = 1  # three of four channels of a tap
    dense[5, 10:13, 1, 1] = 1  # three neighbours, but of two quads
    dense[5, 8:10, 1, 1] = dense[5, 13:16, 1, 1] = 0
    broken = PatternWeight.from_dense(dense, 1, "none")
    y = emu.pattern_2_4(dataclasses.replace(packed, arrays=tuple(
        getattr(broken, name) for name in NAMES
    )))  # fmt: skip
    assert bool(y[:, 3].isnan().all())
    others = [k for k in range(BASE.k) if k not in (3, 5)]
    assert torch.equal(y[:, others], expected[:, others])
    assert not bool(y[:, 5].isnan().any())


def test_nan_passes_every_activation(emu: Emulator) -> None:
    for activation in reference.ACTIVATIONS:
        packed = two_four(ONE.but(activation=activation))
        assert packed.problem.bias is not None
        bias = packed.problem.bias.clone()
        bias[3] = float("nan")
        problem = dataclasses.replace(packed.problem, bias=bias)
        y = emu.pattern_2_4(dataclasses.replace(packed, problem=problem))
        others = [k for k in range(ONE.k) if k != 3]
        assert bool(y[:, 3].isnan().all()) and not bool(y[:, others].isnan().any()), activation


def test_it_applies_to_what_it_can_do(emu: Emulator) -> None:
    def workspace(case: ConvCase, **fields: int) -> int:
        problem = build(case)
        size = (case.n, case.k, *case.out_size)
        y = torch.empty(size, dtype=case.dtype, memory_format=torch.channels_last)
        params = pattern_params(PatternProblem(problem, (problem.values,) * 5), y)
        for name, value in fields.items():
            setattr(params, name, value)
        return emu.pattern_2_4_workspace(params)

    # 9 steps of one block of 64 filters.
    assert workspace(BASE) == workspace(BASE.but(dtype=BFLOAT)) == 9 * (4096 + 512)
    for change in (
        {"dtype": torch.float32}, {"layout": "contiguous"}, {"c": 48}, {"c": 16}, {"k": 36},
        {"k": 24}, {"groups": 2}, {"kernel": (20, 20), "padding": (10, 10, 10, 10)},
    ):  # fmt: skip
        assert workspace(BASE.but(**change)) == 0, change
    for name in ("x", "y", "residual"):
        assert workspace(BASE, **{name: 8}) == 0, name
    with pytest.raises(ValueError, match="invalid argument"):
        problem = build(BASE.but(c=48))
        params = pattern_params(PatternProblem(problem, (problem.values,) * 5), problem.x)
        emu.pattern_2_4_raw(params, torch.empty(0))


def test_nothing_to_compute_launches_nothing(emu: Emulator) -> None:
    packed = two_four(BASE.but(n=0))
    before, y = emu.launches, torch.empty(0, dtype=HALF)
    params = pattern_params(packed, y)
    params.layout = 1  # an empty tensor counts as contiguous
    workspace = torch.empty(emu.pattern_2_4_workspace(params), dtype=torch.uint8)
    assert workspace.numel() == 9 * (4096 + 512)
    emu.pattern_2_4_raw(params, workspace)
    assert emu.launches == before


def test_offsets_beyond_32_bits(emu: Emulator) -> None:
    # 4.4 GB of addresses, of which the stride touches the corners only.
    side, stride = 8_300, 8_299
    x, corners = cases.huge_image(1, side, channels=32)
    case = ONE.but(n=1, c=32, h=side, w=side, k=32, stride=(stride, stride), bias=False)
    weight = torch.zeros(32, 32, 1, 1, dtype=HALF)
    weight[torch.arange(32), (5 * torch.arange(32)) % 32] = 3
    packed = PatternWeight.from_dense(weight, 1, "2:4")
    problem = dataclasses.replace(build(BASE), case=case, x=x, weight=weight, bias=None)
    y = emu.pattern_2_4(PatternProblem(problem, tuple(getattr(packed, name) for name in NAMES)))
    assert torch.equal(y, 3 * corners[:, (5 * torch.arange(32)) % 32])


GEMM, PACK, SUM = (f"pattern_conv2d_2_4{part}.cu" for part in ("", "_pack", "_sum"))
# File, a case that shows it, text and what stands there instead; FAULT asks for it.
FAULTS = {
    "no barrier behind the copies": (
        GEMM, ONE, "      __syncthreads();\n      copy_next();",
        "      if (!FAULT) __syncthreads();\n      copy_next();",
    ),
    "a wait too short": (
        GEMM, ONE, "copy_async_wait<kStages - 2>();",
        "FAULT ? copy_async_wait<kStages - 1>() : copy_async_wait<kStages - 2>();",
    ),
    "no barrier before the turn": (
        GEMM, ONE, "    __syncthreads();  // the stages", "    if (!FAULT) __syncthreads();  // the"
    ),
    "a column of the halo": (GEMM, BASE, "<uint32_t>(s.w);", "<uint32_t>(s.w - FAULT);"),
    "pieces not permuted": (
        GEMM, ONE, "lane / 8) ^ (lane % 8)) * 16", "lane / 8) ^ (FAULT ? 0 : lane % 8)) * 16"
    ),
    "a step less": (GEMM, BASE, "step < end; ++step", "step < end - FAULT; ++step"),
    "the first slice twice": (GEMM, ONE, "m * 2 + kSlice_", "m * 2 + (FAULT ? 0 : kSlice_)"),
    "rows of a group not told apart": (
        PACK, ONE, "before + row - top", "before + (FAULT ? 0 : row - top)"
    ),
    "no barrier before the quads": (
        PACK, ONE, "      __syncthreads();\n      // A thread closes",
        "      if (!FAULT) __syncthreads();\n      // A thread closes",
    ),
    "places of a quad": (PACK, ONE, "(kPlaces >>", "((kPlaces + (FAULT ? 0x100000 : 0)) >>"),
    "a part left out": (SUM, SPLIT, "part < parts; ++part", "part < parts - FAULT; ++part"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One library with every fault; PLANTED picks one."""
    edits: dict[str, list[tuple[str, str]]] = {}
    for number, (name, _, text, instead) in enumerate(FAULTS.values()):
        asked = f'(atoi(getenv("PLANTED")) == {number})'
        edits.setdefault(name, []).append((text, instead.replace("FAULT", asked)))
    folder = tmp_path_factory.mktemp("faulty")
    return emulator.build(folder / "faulty.so", flags=emulator.QUICK, edits=edits)


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=list(FAULTS))
def test_planted_faults_are_found(
    number: int, faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", str(number))
    # A wrong result, or metadata that the stand-in for mma.sp refuses.
    with pytest.raises((AssertionError, RuntimeError)):
        check(Emulator(faulty), list(FAULTS.values())[number][1], share=2)


def test_nothing_is_found_without_a_fault(faulty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "-1")
    for case in (ONE, BASE, SPLIT):
        check(Emulator(faulty), case, share=2)
