"""csr_conv2d and its value gradient on the emulator: the kernels' logic, without a GPU."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import reference, tolerance
from tests.cases import ConvCase, Problem, build
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator, ForwardParams, GradParams

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

LARGE, MEDIUM, SMALL = "2, 32, 4, 8", "1, 32, 2, 16", "1, 16, 2, 16"
# (multiprocessors of the pretended GPU, a case) and what they get: block shape, blocks per cluster.
CHOICES = {
    (1, cases.SPLIT[0]): (LARGE, 1),
    (3, cases.SPLIT[0]): (SMALL, 1),
    (4, cases.SPLIT[0]): (MEDIUM, 1),
    (4, cases.SPLIT[1]): (SMALL, 2),
    (8, cases.SPLIT[1]): (SMALL, 4),
    (4, cases.SPLIT[2]): (LARGE, 2),
    (16, cases.SPLIT[2]): (LARGE, 8),
    (64, cases.SPLIT[3]): (SMALL, 8),
}
# Faults that clusters, half warps, strips and sorted filters can have: (text, replacement).
KERNEL_FAULTS = {
    "sums of the cluster read too early": (
        "cluster_sync();\n    else\n      __syncthreads();\n    const int share",
        "__syncthreads();\n    else\n      __syncthreads();\n    const int share",
    ),
    "a block ends while others read its sums": (
        "cluster_sync();\n    else\n      __syncthreads();\n  }\n}",
        "__syncthreads();\n    else\n      __syncthreads();\n  }\n}",
    ),
    "no barrier after describing the work": ("header);\n    __syncthreads();", "header);"),
    "half warps are not added up": ("if (kTogether == 2)", "if (kTogether == 3)"),
    "filters are not put back": (
        "const int f = header->filter[rank_of(j)]",
        "const int f = header->filter[j * kWarps + warp]",
    ),
}
PART_FAULTS = {
    "equal rows share a rank": ("(theirs == mine && other < lane)", "false"),
    "the search skips the first entry": ("(count - 1) * step + 1 : 0", "count * step : 0"),
    "a strip's last row is outside": (
        "ceil_div(extent - origin, step) : 0",
        "ceil_div(extent - origin, step) - 1 : 0",
    ),
}
FAULTS = {name: {"csr_conv2d.cu": fault} for name, fault in KERNEL_FAULTS.items()}
FAULTS |= {name: {"csr_conv2d_tile.cuh": fault} for name, fault in PART_FAULTS.items()}


def check_grad(problem: Problem, emu: Emulator) -> Tensor:
    """Run the value gradient and compare with autograd through the dense float64 convolution."""
    case = problem.case
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.n, case.k, *case.out_size)
    if case.integers:
        grad_y = torch.randint(-3, 4, shape, generator=generator).to(case.dtype)
    else:
        grad_y = torch.randn(shape, generator=generator).to(case.dtype)

    def stored(dense: Tensor) -> Tensor:
        rows = torch.repeat_interleave(torch.arange(case.k), problem.row_ptr.diff().long())
        return dense.reshape(case.k, -1)[rows, problem.col_idx.long()]

    def exact(g: Tensor, x: Tensor) -> Tensor:
        dense = reference.conv2d_grad_weight(
            g,
            x,
            case.weight_shape,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
        )
        return stored(dense)

    got = emu.grad_values(problem, grad_y)
    want = exact(grad_y, problem.x)
    if case.integers:
        assert torch.equal(got, want.to(case.dtype)), case.id
    else:
        terms = case.n * case.out_size[0] * case.out_size[1]
        magnitude = exact(grad_y.abs(), problem.x.abs())
        bound = tolerance.conv_bound(magnitude, want, terms, case.dtype)
        tolerance.assert_within(got, want, bound, case.id)
    return got


@pytest.mark.parametrize("sm_count", [1, 100_000])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_integers_are_exact(emu: Emulator, family: str, sm_count: int) -> None:
    # Large blocks where possible, then small ones everywhere; each case in both layouts in all.
    emu.set_device(sm_count)
    for index, case in enumerate(cases.FAMILIES[family]):
        layout = "channels_last" if index % 2 == (sm_count == 1) else "contiguous"
        problem = build(case.but(layout=layout))
        problem.check(emu.forward(problem))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: f"{c[0]} x {c[1].id}")
def test_every_block_and_split(
    emu: Emulator, choice: tuple[int, ConvCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    sm_count, case = choice
    emu.set_device(sm_count)
    for order, layout, residual in (
        ("0", "contiguous", False),
        ("1", "channels_last", True),
        ("2", "contiguous", True),
    ):
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        problem = build(case.but(layout=layout, residual=residual))
        problem.check(emu.forward(problem))
        assert (emu.kernel, emu.cluster) == (
            f"launch_tiled<float, {CHOICES[choice][0]}>",
            CHOICES[choice][1],
        )


def test_many_chunks(emu: Emulator, thread_order: str) -> None:
    # Little shared memory; where nothing is stored, all chunks but the first are skipped.
    some = cases.SPLIT[1].but(density=0.3)
    one_in_many = some.but(c=150, k=8, density=0.002)
    for case in (some, some.but(layout="channels_last"), one_in_many, some.but(pattern="empty")):
        for sm_count in (1, 8):
            emu.set_device(sm_count, smem_bytes=48 * 1024)
            problem = build(case)
            problem.check(emu.forward(problem))
            assert "tiled" in emu.kernel


def test_split_in_every_type(emu: Emulator) -> None:
    emu.set_device(8)
    for variant in cases.variants(cases.SPLIT[1].but(residual=True, activation="relu")):
        problem = build(variant)
        problem.check(emu.forward(problem))
        assert emu.cluster > 1


def test_no_split_without_clusters(emu: Emulator) -> None:
    for sm_count, case in CHOICES:
        emu.set_device(sm_count, clusters=False)
        problem = build(case)
        problem.check(emu.forward(problem))
        assert emu.cluster == 1


def test_blocks_loop_when_the_grid_is_full(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    # No test can fill a grid of 2^31 blocks: a limit of 3, or of one cluster, takes its place.
    emu.set_device(1, max_grid=3)
    for case in cases.CORE:
        for order, layout in (("0", "contiguous"), ("1", "contiguous"), ("2", "channels_last")):
            monkeypatch.setenv("CUDA_EMU_ORDER", order)
            problem = build(case.but(layout=layout))
            problem.check(emu.forward(problem))
            check_grad(problem, emu)
    for (sm_count, case), (_, splits) in CHOICES.items():
        emu.set_device(sm_count, max_grid=splits)
        problem = build(case)
        problem.check(emu.forward(problem))
        assert emu.cluster == splits


@pytest.mark.parametrize("case", cases.CORE, ids=lambda c: c.id)
def test_core_in_every_type_layout_and_order(
    emu: Emulator, case: ConvCase, thread_order: str
) -> None:
    for variant in cases.variants(case):
        problem = build(variant)
        problem.check(emu.forward(problem))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_in_every_type(emu: Emulator, activation: str) -> None:
    for variant in cases.variants(cases.BASE.but(activation=activation, residual=True, k=8, n=1)):
        problem = build(variant)
        problem.check(emu.forward(problem))


def test_whole_warps_and_the_direct_kernel_give_the_same_bits(emu: Emulator) -> None:
    # Same products in the same order with the same rounding: an entry a time, not split.
    case = cases.SPLIT[0].but(integers=False)
    problem = build(case)
    results, kernels = [], set()
    for sm_count in (1, 4):
        emu.set_device(sm_count, clusters=False)
        results.append(emu.forward(problem))
        kernels.add(emu.kernel)
    results.append(emu.forward(problem_with_direct_kernel(case)))
    kernels.add(emu.kernel)
    assert kernels == {
        f"launch_tiled<float, {LARGE}>",
        f"launch_tiled<float, {MEDIUM}>",
        "launch_direct<float>",
    }
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("choice", list(CHOICES)[1:6:2], ids=lambda c: f"{c[0]} x {c[1].id}")
def test_any_order_of_threads_gives_the_same_bits(
    emu: Emulator, choice: tuple[int, ConvCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = build(choice[1].but(integers=False))
    results = []
    for order in ("0", "1", "2"):
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        emu.set_device(choice[0])
        results.append(emu.forward(problem))
    problem.check(results[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(
    fault: str, faulty: dict[str, Future[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    emu = Emulator(faulty[fault].result())
    emu.set_device(8)
    problem = build(cases.SPLIT[1])
    for order in ("0", "1", "2"):  # a race may be hidden by one order of execution, not by all
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        try:
            problem.check(emu.forward(problem))
        except (AssertionError, RuntimeError):
            assert emu.cluster == 4
            return
    raise AssertionError(f"not caught: {fault}")


def problem_with_direct_kernel(case: ConvCase) -> Problem:
    """The same convolution as one filter per group would see it: repeated input channels."""
    problem = build(case)
    x = problem.x.repeat(1, case.k, 1, 1)
    grouped = case.but(c=case.c * case.k, groups=case.k)
    return Problem(
        grouped,
        x,
        problem.weight,
        problem.values,
        problem.col_idx,
        problem.row_ptr,
        problem.bias,
        problem.residual,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_halo_beyond_shared_memory_goes_direct(emu: Emulator, layout: str) -> None:
    base = cases.BASE.but(layout=layout, n=1, c=2, k=8)
    far = base.but(dilation=(300, 300), padding=(0, 0, 0, 0), h=603, w=605, density=0.6)
    huge_filter = base.but(kernel=(200, 200), padding=(100, 100, 100, 100), h=4, w=4, c=1)
    for case in (far, huge_filter.but(density=0.01)):
        problem = build(case)
        problem.check(emu.forward(problem))
        assert "direct" in emu.kernel, emu.kernel


def test_wide_halo_asks_for_more_shared_memory(emu: Emulator) -> None:
    # One channel of the staged tile needs more than a half of what the GPU may grant.
    case = cases.BASE.but(dilation=(50, 50), padding=(50, 50, 50, 50), n=1, c=2, k=8, w=20)
    problem = build(case)
    problem.check(emu.forward(problem))
    assert "tiled" in emu.kernel
    emu.set_device(smem_bytes=48 * 1024)
    problem.check(emu.forward(problem))
    assert "direct" in emu.kernel


def test_nothing_to_compute_launches_nothing(emu: Emulator) -> None:
    for case in (cases.BASE.but(n=0), cases.BASE.but(k=0, bias=False)):
        problem = build(case)
        before = emu.launches
        assert emu.forward(problem).numel() == 0
        assert emu.launches == before
    before = emu.launches
    emu.grad_values(build(cases.BASE.but(k=0)), torch.empty(2, 0, 9, 8))
    assert emu.launches == before


def test_unsupported_type_is_refused(emu: Emulator) -> None:
    problem = build(cases.BASE.but(dtype=torch.float64))
    with pytest.raises(ValueError, match="invalid argument"):
        emu.forward(problem)
    with pytest.raises(ValueError, match="invalid argument"):
        emu.grad_values(problem, torch.zeros(2, 9, 9, 8, dtype=torch.float64))
    assert emu.error_string(0) == "no error"


def test_nan_passes_every_activation(emu: Emulator) -> None:
    for activation in reference.ACTIVATIONS:
        case = cases.BASE.but(integers=False, activation=activation, k=8, n=1, h=3, w=3)
        problem = build(case)
        assert problem.bias is not None
        problem.bias[3] = float("nan")
        y = emu.forward(problem)
        assert bool(y[:, 3].isnan().all()) and not bool(y[:, :3].isnan().any()), activation


@pytest.mark.parametrize("layout", [0, 1])
def test_offsets_beyond_32_bits(emu: Emulator, layout: int) -> None:
    # 4.4 GB of addresses, of which the stride touches the corners only.
    side, stride = 33_000, 32_999
    x, corners = cases.huge_image(layout, side)
    for k in (3, 8):  # direct and tiled
        case = ConvCase(n=1, c=2, h=side, w=side, k=k, kernel=(1, 1)).but(
            padding=(0, 0, 0, 0), stride=(stride, stride), bias=False, dtype=torch.float16
        )
        values = torch.arange(1, 2 * k + 1).half()
        pattern = torch.arange(2).repeat(k).int(), torch.arange(0, 2 * k + 1, 2).int()
        y = torch.full((1, k, 2, 2), float("nan"), dtype=torch.float16)
        y = y.contiguous(memory_format=torch.channels_last) if layout else y
        problem = Problem(case, x, values.view(k, 2, 1, 1), values, *pattern, None, None)
        common = {
            "shape": emulator.shape_of(problem),
            "dtype": 2,
            "layout": layout,
            "x": x.data_ptr(),
            "col_idx": pattern[0].data_ptr(),
            "row_ptr": pattern[1].data_ptr(),
        }
        emu.forward_raw(ForwardParams(**common, values=values.data_ptr(), y=y.data_ptr()))
        want = reference.conv2d(corners, problem.weight)
        assert torch.equal(y.double(), want)
        gradient = torch.full((2 * k,), float("nan"), dtype=torch.float16)
        ones = torch.ones(1, k, 2, 2, dtype=torch.float16)
        emu.grad_raw(GradParams(**common, grad_y=ones.data_ptr(), grad_values=gradient.data_ptr()))
        assert torch.equal(gradient, corners.sum((0, 2, 3)).repeat(k))


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_grad_values_of_integers_are_exact(emu: Emulator, family: str) -> None:
    for case in cases.FAMILIES[family]:
        for layout in ("contiguous", "channels_last"):
            check_grad(build(case.but(layout=layout)), emu)


@pytest.mark.parametrize("case", cases.CORE, ids=lambda c: c.id)
def test_grad_values_in_every_type_and_order(
    emu: Emulator, case: ConvCase, thread_order: str
) -> None:
    for variant in cases.variants(case):
        check_grad(build(variant), emu)


def test_grad_values_summed_by_a_block(emu: Emulator, thread_order: str) -> None:
    case = cases.BASE.but(n=5, c=2, k=3, h=29, w=30, density=0.5)
    for variant in (case, case.but(layout="channels_last"), case.but(integers=False)):
        problem = build(variant)
        first = check_grad(problem, emu)
        assert emu.kernel.endswith(", 8>")
        assert torch.equal(first, check_grad(problem, emu))


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    library = emulator.build(tmp_path / "sanitized.so", flags=emulator.SANITIZED)
    emulator.run_sanitized("tests.cuda_emu.sanitized", library)
