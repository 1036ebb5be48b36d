"""depthwise_conv2d on the emulator: the logic of its three kernels, without a GPU."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.cases import ConvCase, build
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

BASE = cases.DEPTHWISE[0]


def test_integers_are_exact(emu: Emulator) -> None:
    kernels = set()
    for case in cases.DEPTHWISE:
        for layout in ("contiguous", "channels_last"):
            problem = build(case.but(layout=layout))
            problem.check(emu.depthwise(problem))
            kernels.add(emu.kernel)
    fixed = [f"<float, {size}, {stride}>" for size in (3, 5, 7) for stride in (1, 2)]
    want = {f"launch_{kind}{what}" for kind in ("planes", "channels") for what in fixed}
    assert kernels == want | {"launch_direct<float>"}


@pytest.mark.parametrize("index", [0, 3, 7, 12, 21, -1])
def test_every_type_layout_and_order(emu: Emulator, index: int, thread_order: str) -> None:
    for variant in cases.variants(cases.DEPTHWISE[index]):
        problem = build(variant)
        problem.check(emu.depthwise(problem))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_in_every_type(emu: Emulator, activation: str) -> None:
    for variant in cases.variants(BASE.but(activation=activation, residual=True, n=1)):
        problem = build(variant)
        problem.check(emu.depthwise(problem))


def test_all_kernels_give_the_same_bits(emu: Emulator) -> None:
    # The same products in the same order: as planes, as channels, and two filters a channel.
    for kernel, stride in (((3, 3), (1, 1)), ((5, 5), (2, 2)), ((7, 7), (1, 1))):
        case = BASE.but(kernel=kernel, stride=stride, integers=False, bias=False)
        planes = build(case)
        others = [
            build(case.but(k=k, layout="channels_last")) for k in (case.k, 2 * case.k)
        ]
        for problem in others:
            problem.x.copy_(planes.x)
            problem.weight.copy_(planes.weight.repeat_interleave(problem.case.k // case.k, 0))
        results, kernels = [], []
        for problem in (planes, *others):
            results.append(emu.depthwise(problem))
            kernels.append(emu.kernel.split("<")[0])
        assert kernels == ["launch_planes", "launch_channels", "launch_direct"]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2][:, ::2])


def test_unaligned_tensors_are_not_read_as_vectors(emu: Emulator) -> None:
    problem = build(BASE.but(layout="channels_last"))
    n, c, h, w = problem.x.shape
    memory = torch.empty(1 + problem.x.numel())
    moved = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    moved.copy_(problem.x)
    assert moved.data_ptr() % 16 != 0
    problem = dataclasses.replace(problem, x=moved)
    problem.check(emu.depthwise(problem))
    assert emu.kernel == "launch_direct<float>"


def test_blocks_loop_when_the_grid_is_full(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    emu.set_device(max_grid=2)
    case = BASE.but(n=3, h=40, w=33, c=260, k=260, groups=260)
    for order, layout in (("0", "contiguous"), ("1", "channels_last"), ("2", "channels_last")):
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        problem = build(case.but(layout=layout))
        problem.check(emu.depthwise(problem))
    direct = build(case.but(dilation=(2, 2), c=40, k=40, groups=40))
    problem.check(emu.depthwise(problem))
    direct.check(emu.depthwise(direct))


_FAULTS = {
    "no barrier behind the filters": (
        """    __syncthreads();
    const int64_t strip = chunk""",
        "    const int64_t strip = chunk",
    ),
    "a row of the halo": ("clamp(s.h - row0, kRows)", "clamp(s.h - row0 - 1, kRows)"),
    "a column of the halo": ("clamp(-col0, kFilter)", "clamp(1 - col0, kFilter)"),
    "one tap off": ("const int t = j - i * kStride;", "const int t = j - i * kStride + 1;"),
    "the last row left out": ("if (p0 + i < s.p)", "if (p0 + i < s.p - 1)"),
    "the last column left out": ("if (q0 + i >= s.q) break;", "if (q0 + i >= s.q - 1) break;"),
}  # fmt: skip
FAULTS = {name: {"depthwise_conv2d.cu": edit} for name, edit in _FAULTS.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, faulty: dict[str, Future[Path]]) -> None:
    emu = Emulator(faulty[fault].result())
    with pytest.raises(AssertionError):
        for case in cases.DEPTHWISE:
            for layout in ("contiguous", "channels_last"):
                problem = build(case.but(layout=layout))
                problem.check(emu.depthwise(problem))


def test_nothing_to_compute_launches_nothing(emu: Emulator) -> None:
    before = emu.launches
    assert emu.depthwise(build(BASE.but(n=0))).numel() == 0
    assert emu.launches == before


def test_refusals(emu: Emulator) -> None:
    with pytest.raises(ValueError, match="invalid argument"):
        emu.depthwise(build(BASE.but(dtype=torch.float64)))
    with pytest.raises(ValueError, match="invalid argument"):
        emu.depthwise(build(ConvCase(c=4, k=4, groups=2, pattern="full")))


def test_nan_passes_every_activation(emu: Emulator) -> None:
    cases.check_nan_passes(emu.depthwise, BASE)


@pytest.mark.parametrize("layout", [0, 1])
def test_offsets_beyond_32_bits(emu: Emulator, layout: int) -> None:
    weight = torch.tensor([3.0, 5.0], dtype=torch.float16).view(2, 1, 1, 1)
    problem, corners = cases.huge_problem(layout, weight, groups=2)
    assert torch.equal(emu.depthwise(problem), corners * weight.view(1, 2, 1, 1))
