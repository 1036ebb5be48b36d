"""Generated csr_conv2d kernels on the emulator: their logic, without NVRTC and without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.ops import _csr_source
from sparsecnn.ops._csr_source import Unsuitable, generate
from sparsecnn.ops._specialized import launch_arguments, set_tensors
from tests import reference
from tests.cases import ConvCase, Problem, build
from tests.cuda_emu import cases, emulator, specialized
from tests.cuda_emu.emulator import Emulator
from tests.cuda_emu.specialized import Kernels, source_of
from tests.cuda_emu.test_csr_conv2d_emu import problem_with_direct_kernel

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

POINTWISE = {"kernel": (1, 1), "padding": (0, 0, 0, 0)}
WEIGHTS = specialized.WEIGHTS
NAMES = list(WEIGHTS)
# Images: one pixel, one row and column, several in a tile, tiles that start inside one, wide rows.
MAPS = ((1, 1, 1), (1, 1, 40), (70, 1, 1), (9, 7, 7), (3, 14, 14), (1, 31, 30), (1, 3, 300))
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [source_of(build(case)) for case in WEIGHTS.values()]
    return specialized.build(tmp_path_factory.mktemp("specialized"), sources)


@pytest.fixture
def kernels(library: Path) -> Kernels:
    return Kernels(library, [source_of(build(case)) for case in WEIGHTS.values()])


def fits(case: ConvCase) -> bool:
    """Whether there is an output."""
    return min(case.out_size) > 0


def on_maps(case: ConvCase) -> list[ConvCase]:
    """The same weight on other images."""
    found = [case.but(n=n, h=h, w=w) for n, h, w in MAPS]
    found += [case.but(padding=padding) for padding in ((0, 0, 0, 0), (9, 0, 0, 9), (2, 1, 0, 3))]
    return [changed for changed in found if fits(changed)]


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_exact(kernels: Kernels, name: str) -> None:
    count = 0
    for case in on_maps(WEIGHTS[name]):
        for layout in LAYOUTS:
            problem = build(case.but(layout=layout))
            problem.check(kernels(NAMES.index(name), problem))
            count += 1
    assert count >= 8


def test_the_weights_reach_every_kind_of_code(kernels: Kernels) -> None:
    sources = dict(zip(NAMES, kernels.sources, strict=True))
    assert {source.threads for source in sources.values()} == {256, 192}
    assert sources["slabs"].slabs == 2 and sources["groups"].slabs == 2
    stages = {name: source.text.count("  stage<") for name, source in sources.items()}
    assert stages["chunks"] > 4 and stages["3x3"] == 1 and stages["one row"] == 1
    assert "finish<32>(a, 0)" in sources["pointwise"].text
    assert {source.dtype for source in sources.values()} == {
        torch.float32, torch.float16, torch.bfloat16
    }  # fmt: skip


@pytest.mark.parametrize("name", ["chunks", "pointwise", "strided", "groups"])
def test_every_order_of_threads(kernels: Kernels, name: str, thread_order: str) -> None:
    for layout in LAYOUTS:
        for n, h, w in ((3, 9, 8), (2, 14, 14)):
            problem = build(WEIGHTS[name].but(n=n, h=h, w=w, layout=layout, residual=True))
            problem.check(kernels(NAMES.index(name), problem))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("name", ["3x3", "half", "bfloat16"])
def test_ends(kernels: Kernels, name: str, activation: str) -> None:
    for layout in LAYOUTS:
        for bias in (False, True):
            for residual in (False, True):
                case = WEIGHTS[name].but(activation=activation, bias=bias, residual=residual)
                problem = build(case.but(layout=layout))
                problem.check(kernels(NAMES.index(name), problem))


def test_floats_have_the_bits_of_the_portable_kernel(emu: Emulator, tmp_path: Path) -> None:
    chosen = [WEIGHTS[name].but(integers=False) for name in ("chunks", "pointwise", "dilated")]
    ends = {"residual": True, "activation": "silu"}
    sources = [source_of(build(case)) for case in chosen]
    kernels = Kernels(specialized.build(tmp_path, sources), sources)
    for i, case in enumerate(chosen):
        case = case.but(**ends)
        want = emu.forward(problem_with_direct_kernel(case))  # which never splits a sum
        assert "direct" in emu.kernel
        for layout in LAYOUTS:
            problem = build(case.but(layout=layout))
            y = kernels(i, problem)
            problem.check(y)
            assert torch.equal(y, want), problem.case.id


def test_blocks_loop(kernels: Kernels, thread_order: str) -> None:
    for name in ("slabs", "pointwise"):
        for layout in LAYOUTS:
            problem = build(WEIGHTS[name].but(n=3, h=20, w=21, layout=layout))
            for grid in (1, 3):
                problem.check(kernels(NAMES.index(name), problem, grid))


def test_slab_size_changes_no_bit(tmp_path: Path) -> None:
    problem = build(ConvCase(c=9, k=40, n=2).but(**POINTWISE))
    sources = [source_of(problem, most) for most in (1, 13, 40)]
    assert [source.slabs for source in sources] == [40, 4, 1]
    kernels = Kernels(specialized.build(tmp_path, sources), sources)
    results = [kernels(i, problem) for i in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_special_values(tmp_path: Path) -> None:
    # Stored zeros, infinities, NaN and subnormal numbers are operands like any other.
    problem = build(ConvCase(c=8, k=8, n=1, pattern="full", bias=False).but(**POINTWISE))
    for i, value in enumerate((0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-44, 3e30)):
        problem.values[i * 8 : i * 8 + 8] = value
    dense = CSRWeight(problem.values, problem.col_idx, problem.row_ptr, (8, 8, 1, 1)).to_dense()
    problem.x[0, 2, 0, 0] = float("inf")  # 0 * inf is NaN
    source = source_of(problem)
    y = Kernels(specialized.build(tmp_path, [source]), [source])(0, problem)
    want = torch.zeros_like(y)
    for c in range(8):
        want += dense[:, c, 0, 0].view(1, 8, 1, 1) * problem.x[:, c : c + 1]
    torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert bool(y[:, 4].isnan().all()) and bool(y[0, 0, 0, 0].isnan()) and y[0, 0, 1, 1] == 0


def test_nan_passes_every_activation(kernels: Kernels) -> None:
    for activation in reference.ACTIVATIONS:
        for layout in LAYOUTS:
            problem = build(WEIGHTS["3x3"].but(activation=activation, layout=layout))
            assert problem.bias is not None
            problem.bias[3] = float("nan")
            y = kernels(NAMES.index("3x3"), problem)
            assert bool(y[:, 3].isnan().all()) and not bool(y[:, :3].isnan().any()), activation


@pytest.mark.parametrize("layout", [0, 1])
def test_offsets_beyond_32_bits(layout: int, tmp_path: Path) -> None:
    # 4.4 GB of addresses, of which the stride touches the corners only.
    side, stride = 33_000, 32_999
    x, corners = cases.huge_image(layout, side)
    case = ConvCase(n=1, c=2, h=side, w=side, k=8, dtype=torch.float16, bias=False).but(
        **POINTWISE, stride=(stride, stride)
    )
    values = torch.arange(1, 17).half()
    pattern = torch.arange(2).repeat(8).int(), torch.arange(0, 17, 2).int()
    problem = Problem(case, x, values.view(8, 2, 1, 1), values, *pattern, None, None)
    source = source_of(problem)
    y = torch.full((1, 8, 2, 2), float("nan"), dtype=torch.float16)
    y = y.contiguous(memory_format=torch.channels_last) if layout else y
    args = launch_arguments(source, x.shape, bool(layout), case.padding)
    set_tensors(args, x, None, None, y, "none")
    Kernels(specialized.build(tmp_path, [source]), [source]).raw(0, args)
    assert torch.equal(y.double(), reference.conv2d(corners, problem.weight))


CAUGHT = (AssertionError, RuntimeError)
# The text of each occurs in the source that is built with it.
FAULTS = {
    "none": ("kIdle = 65535", "kIdle = 65535"),
    "no barrier behind the tile": ("  }\n  __syncthreads();\n}\n", "  }\n}\n"),
    "no barrier in front of the tile": ("  ASSUME_GLOBAL(x);\n  __syncthreads();", ""),
    "no barrier before the sums": ("= tile;\n  __syncthreads();", "= tile;"),
    "no barrier behind the sums": (
        "    }\n    __syncthreads();\n  } else {  // each",
        "    }\n  } else {  // each",
    ),
    "a row of the halo": ("h >= 0 && h < a.h", "h >= 0 && h < a.h - 1"),
    "a column of the halo": ("w >= 0 &&", "w >= 1 &&"),
    "the next image's halo": ("+ image * a.gap) * a.pitch", ") * a.pitch"),
    "one filter row off": ("+ 2 * a.row_taps", "+ 1 * a.row_taps"),
    "the last column left out": ("q0 + column < a.q)", "q0 + column < a.q - 1)"),
    "an epilogue of the wrong filter": ("end.bias[k]", "end.bias[k ? k - 1 : k]"),
    "a slab's code for another": ("case 1:\n        slab1", "case 1:\n        slab0"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Kernels]:
    """A kernel for each fault."""
    case = ConvCase(c=60, k=80, groups=2, density=0.1, integers=True, residual=True)
    problem = build(case)
    sources = [source_of(problem)] * len(FAULTS)
    folder = tmp_path_factory.mktemp("faulty")
    return problem, Kernels(specialized.build(folder, sources, list(FAULTS.values())), sources)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(
    fault: str, faulty: tuple[Problem, Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, (many, kernels) = list(FAULTS).index(fault), faulty
    with contextlib.nullcontext() if fault == "none" else pytest.raises(CAUGHT):
        for order in ("0", "1"):
            monkeypatch.setenv("CUDA_EMU_ORDER", order)
            for layout in LAYOUTS:
                for n, h, w in ((9, 7, 7), (1, 20, 21)):
                    problem = build(many.case.but(n=n, h=h, w=w, layout=layout))
                    problem.check(kernels(index, problem, 2))


def test_the_source_is_a_function_of_the_weight() -> None:
    problem = build(WEIGHTS["slabs"])
    text = source_of(problem).text
    assert text == source_of(problem).text
    entries = re.findall(r" F\((\d+),([0-9A-F]{8})\)", text)
    assert len(entries) == problem.nnz
    words = problem.values.view(torch.int32).tolist()
    stored = sorted(f"{word & 0xFFFFFFFF:08X}" for word in words)
    assert sorted(bits for _, bits in entries) == stored
    other = problem.values.clone()
    other[5] += 1
    assert source_of(dataclasses.replace(problem, values=other)).text != text
    assert not re.search(r"#include (?!\"cuda_emu.h\")", text)


def refusal(case: ConvCase) -> str:
    with pytest.raises(Unsuitable) as caught:
        source_of(build(case))
    return str(caught.value)


def test_refusals_give_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    base = WEIGHTS["3x3"]
    assert "float32, float16 or bfloat16, got torch.float64" in refusal(
        base.but(dtype=torch.float64)
    )
    assert "8 filters in a group, got 1" in refusal(base.but(k=5, groups=5))
    assert "nonzeros, got 0" in refusal(base.but(pattern="empty"))
    assert "dilation (90, 90)" in refusal(base.but(dilation=(90, 90)))
    assert "up to 16, got 44" in refusal(
        base.but(kernel=(11, 11), stride=(4, 4), h=20, w=20)
    )
    monkeypatch.setattr(_csr_source, "MAX_NONZEROS", 10)
    assert "expected 1 to 10 nonzeros" in refusal(base)
    weight = specialized.weight_of(build(base))
    with pytest.raises(Unsuitable, match="nonzeros"):
        generate(weight, (1, 1), (1, 1), 1)


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    sources = [source_of(build(WEIGHTS[name])) for name in specialized.SANITIZED]
    library = specialized.build(tmp_path, sources, flags=emulator.SANITIZED)
    emulator.run_sanitized("tests.cuda_emu.specialized", library)
