"""pattern_conv2d on the emulator: the logic of its three kernels, without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.cases import build
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator
from tests.ops.pattern import CUTS, PatternProblem, pack

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

BASE = cases.BASE
# Multiprocessors of the pretended GPU: the fewer, the larger the block that fills them twice.
LARGE, SMALL = 0, 100_000
HALVES = (torch.bfloat16, torch.float16)


def launched(kind: str, *shapes: str, dtype: str = "float") -> set[str]:
    return {f"launch_{kind}<{dtype}, {shape}>" for shape in shapes}


def run(emu: Emulator, packed: PatternProblem) -> str:
    """Run, check, and say which kernel it was."""
    packed.problem.check(emu.pattern(packed))
    return emu.kernel


def test_integers_are_exact(emu: Emulator) -> None:
    kernels = set()
    for number, case in enumerate(cases.ALL):
        emu.set_device(SMALL if number % 3 else LARGE)
        layout = ("contiguous", "channels_last")[number // 3 % 2]
        kernels.add(run(emu, pack(build(case.but(layout=layout)), *CUTS[number % len(CUTS)])))
    want = launched("tiled", "8, 8, 1, 8", "4, 4, 1, 8", "1, 4, 1, 4", "4, 1, 4, 8", "1, 1, 1, 8")
    assert kernels == want | {"launch_direct<float>"}


SHARED: tuple[tuple[int | str, bool], ...] = (
    ("all", False), (8, True), ("ragged", False), (7, True), (24, False),
)


def mma_problems(layouts: tuple[str, ...]) -> Iterator[PatternProblem]:
    turns = itertools.cycle(SHARED)
    for number, case in enumerate(cases.TENSOR_CORES):
        for layout in layouts:
            dtype = HALVES[number % 2]
            yield pack(build(case.but(layout=layout, dtype=dtype)), *next(turns))


# The third is a third filled by blocks of the third shape, but not by the larger ones.
@pytest.mark.parametrize("sm_count", [LARGE, SMALL, 4])
def test_tensor_cores_are_exact_with_integers(emu: Emulator, sm_count: int) -> None:
    emu.set_device(sm_count)
    problems = mma_problems(("contiguous", "channels_last"))
    kernels = {run(emu, packed).replace("__nv_bfloat16", "__half") for packed in problems}
    shapes = {LARGE: ("4, 8, 2, 2, 1", "4, 8, 1, 4, 1"), SMALL: ("1, 2, 1, 1, 4",)}
    assert kernels >= launched("mma", *shapes.get(sm_count, ("2, 8, 1, 2, 2",)), dtype="__half")


@pytest.mark.parametrize("number", [0, 3, 4])
def test_every_type_layout_and_order(emu: Emulator, number: int, thread_order: str) -> None:
    case = (BASE, *cases.TENSOR_CORES[1:])[number].but(n=1, h=5)
    emu.set_device(SMALL if thread_order == "1" else LARGE)
    for turn, variant in enumerate(cases.variants(case)):
        run(emu, pack(build(variant), *SHARED[(turn + number) % 3]))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_in_every_type(emu: Emulator, activation: str) -> None:
    for variant in cases.variants(BASE.but(activation=activation, residual=True, n=1, h=5)):
        run(emu, pack(build(variant), 9))


def test_all_kernels_and_cuts_give_the_same_bits(emu: Emulator) -> None:
    whole = pack(build(BASE.but(k=34, c=20, integers=False)), "all")
    results, kernels = [], set()
    cuts: tuple[int | str, ...] = ("all", 3, 1)
    for sm_count, cut in itertools.product((LARGE, 3, SMALL), cuts):
        emu.set_device(sm_count)
        results.append(emu.pattern(pack(whole.problem, cut, permuted=cut == 3)))
        kernels.add(emu.kernel)
    emu.set_device(smem_bytes=1024)
    results.append(emu.pattern(whole))
    assert len(kernels | {emu.kernel}) == 5, kernels  # large, medium, small, of one filter, direct
    for other in results[1:]:
        assert torch.equal(results[0], other)


def check_kept(emu: Emulator, layout: str, dtype: torch.dtype) -> None:
    """Infinities in channels that no filter keeps reach nothing, in those of some only these."""
    # Nine whole octets: the second half of the fifth product has no column and must not be read.
    problem = build(BASE.but(n=1, c=16, k=16, layout=layout, dtype=dtype, pattern="full"))
    weight = problem.weight.clone()
    weight[:, 0:8:3] = 0
    weight[:8, 1:8:4] = 0
    packed = pack(dataclasses.replace(problem, weight=weight), 8)
    want = emu.pattern(packed)
    packed.problem.check(want)
    packed.problem.x[:, 0:8:3] = float("inf")
    assert torch.equal(emu.pattern(packed), want)
    packed.problem.x[:, 1:8:4] = float("nan")  # of the first filter group only
    assert torch.equal(emu.pattern(packed)[:, :8], want[:, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_kept_columns_are_read(emu: Emulator, layout: str, dtype: torch.dtype) -> None:
    check_kept(emu, layout, dtype)


@pytest.mark.parametrize("moved", ["x", "values"])
def test_unaligned_tensors_are_not_read_as_vectors(emu: Emulator, moved: str) -> None:
    # The emulator refuses an asynchronous copy whose ends are not aligned.
    packed = pack(build(BASE.but(c=16, k=16, layout="channels_last", dtype=torch.float16)), 8)
    if moved == "values":
        packed = packed.but(values=torch.cat([packed.values[:1], packed.values])[1:])
        assert packed.values.data_ptr() % 16 != 0
    else:
        n, c, h, w = packed.problem.x.shape
        x = torch.empty(1 + packed.problem.x.numel(), dtype=torch.float16)[1:]
        x = x.view(n, h, w, c).permute(0, 3, 1, 2)
        x.copy_(packed.problem.x)
        assert x.data_ptr() % 16 != 0
        packed = dataclasses.replace(packed, problem=dataclasses.replace(packed.problem, x=x))
    assert "mma" in run(emu, packed)


def test_wide_halo_asks_for_more_shared_memory(emu: Emulator) -> None:
    case = BASE.but(dilation=(22, 22), padding=(22, 22, 22, 22), n=1, c=2, k=8, w=20)
    for dtype, kernel in ((torch.float32, "tiled"), (torch.float16, "mma")):
        packed = pack(build(case.but(dtype=dtype)), "all")
        emu.set_device()
        assert kernel in run(emu, packed)
        emu.set_device(smem_bytes=48 * 1024)
        assert "direct" in run(emu, packed)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_does_not_fit_goes_direct(emu: Emulator, layout: str) -> None:
    base = BASE.but(layout=layout, n=1, c=2, k=8)
    far = base.but(dilation=(300, 300), padding=(0, 0, 0, 0), h=601, w=602)
    huge_filter = base.but(kernel=(200, 200), padding=(100, 100, 100, 100), h=2, w=3, c=1, k=4)
    for case in (far, huge_filter.but(density=5e-4), far.but(dtype=torch.float16)):
        assert "direct" in run(emu, pack(build(case), "all"))


# Where, what, and what instead; FAULT is 1 while the fault is asked for.
_WAIT = "copy_async_wait<0>();"
_ROW = "prm.filters[of.row + i % kRows]"
FAULTS = {
    "no barrier behind a chunk": (
        ".cu", "__syncthreads();  // this", "if (!FAULT) __syncthreads();  // this",
    ),
    "no wait for a chunk": (".cu", _WAIT, "if (!FAULT) copy_async_wait<0>();"),
    "a batch's first column left out": (".cu", "e = 0; e < count;", "e = FAULT; e < count;"),
    "values of another row": (".cu", "slot.values + lane %", "slot.values + (lane + FAULT) %"),
    "direct: a row of the halo": (
        "direct_filter.cuh", "h >= 0 && h < s.h", "h >= FAULT && h < s.h",
    ),
    "a row of the halo": ("_blocks.cuh", "h < t.h &&", "h < t.h - FAULT &&"),
    "a column of the halo": ("_blocks.cuh", "w >= 0 &&", "w >= FAULT &&"),
    "values of other groups": ("_blocks.cuh", "-= own_values;", "-= own_values, value >>= FAULT;"),
    "filters not permuted": ("_blocks.cuh", _ROW, f"(FAULT ? of.row + i % kRows : {_ROW})"),
    "mma: no wait": ("_mma.cu", _WAIT, "if (!FAULT) copy_async_wait<0>();"),
    "mma: no barrier before a round": (
        "_mma.cu", "__syncthreads();  // what", "if (!FAULT) __syncthreads();  // what",
    ),
    "mma: no barrier behind the map": (
        "_mma.cu", "__syncthreads();  // the map", "if (!FAULT) __syncthreads();  // the map",
    ),
    "mma: columns ahead of others": ("_mma.cu", "first + j * Sh", "first + !FAULT * j * Sh"),
    "mma: no sum of splits": ("_mma.cu", "part == 0 ? sum", "part == 0 || FAULT ? sum"),
    "mma: half a step too much": (
        "_mma.cu", "if (2 * s + 1 == header.full)", "if (!FAULT && 2 * s + 1 == header.full)",
    ),
    "mma: one octet twice": ("_mma.cu", "lane / 16 * kEight];", "lane / 16 * kEight * !FAULT];"),
    "mma: the first values again": ("_mma.cu", "+ round * Sh", "+ !FAULT * round * Sh"),
    "list: map not cleared": ("_lists.cuh", "kEight + v] = -1;", "kEight + v] = FAULT - 1;"),
    "list: one gap for all": ("_lists.cuh", "(lane_of) + extra;", "(lane_of) + extra * !FAULT;"),
    "list: values in another order": (
        "_lists.cuh", "j % 2 + j / 2 * 8]", "(FAULT ? j / 2 + j % 2 * 8 : j % 2 + j / 2 * 8)]",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One library with every fault; PLANTED picks one."""
    edits: dict[str, list[tuple[str, str]]] = {}
    for number, (where, text, instead) in enumerate(FAULTS.values()):
        asked = f'(atoi(getenv("PLANTED")) == {number})'
        edit = text, instead.replace("FAULT", asked)
        name = where if where[0].isalpha() else f"pattern_conv2d{where}"
        edits.setdefault(name, []).append(edit)
    folder = tmp_path_factory.mktemp("edited")
    return emulator.build(folder / "edited.so", flags=emulator.QUICK, edits=edits)


def test_blocks_loop_when_the_grid_is_full(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    emu.set_device(SMALL, max_grid=2)
    case = BASE.but(n=3, k=40, c=9)
    orders = ("0", "contiguous"), ("1", "channels_last"), ("2", "channels_last")
    kinds: tuple[tuple[torch.dtype, int | str], ...] = (
        (torch.float32, 3), (torch.float32, 1), (torch.float16, "ragged"),
    )  # fmt: skip
    for (order, layout), (dtype, cut) in itertools.product(orders, kinds):
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        run(emu, pack(build(case.but(layout=layout, dtype=dtype)), cut))
    assert "direct" in run(emu, pack(build(case.but(c=20, k=60, groups=20)), 2))


def check_some(emu: Emulator) -> None:
    """Cases of every kernel."""
    emu.set_device(SMALL)
    for number, case in enumerate((BASE.but(k=18), BASE.but(c=40), cases.CORE[3])):
        for cut in (1, 3):
            run(emu, pack(build(case), cut, permuted=number == 0))
    check_kept(emu, "channels_last", torch.float16)
    for packed in mma_problems(("contiguous",)):
        run(emu, packed)


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=list(FAULTS))
def test_planted_faults_are_found(
    number: int, edited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", str(number))
    with pytest.raises(AssertionError):
        check_some(Emulator(edited))


def test_nothing_is_found_without_a_fault(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", str(len(FAULTS)))
    check_some(Emulator(edited))


def test_nothing_to_compute_launches_nothing(emu: Emulator) -> None:
    for case in (BASE.but(n=0), BASE.but(n=0, dtype=torch.float16)):
        before = emu.launches
        assert emu.pattern(pack(build(case))).numel() == 0
        assert emu.launches == before


def test_refusals(emu: Emulator) -> None:
    with pytest.raises(ValueError, match="invalid argument"):
        emu.pattern(pack(build(BASE.but(dtype=torch.float64))))
    packed = pack(build(BASE), 2)
    ends = torch.cat([packed.arrays[3], packed.arrays[3]])  # more groups than filters
    with pytest.raises(ValueError, match="invalid argument"):
        emu.pattern(packed.but(group_rows=ends, group_columns=ends))


def test_nan_passes_every_activation(emu: Emulator) -> None:
    for activation, dtype in itertools.product(reference.ACTIVATIONS, (torch.float32, *HALVES)):
        case = BASE.but(integers=False, activation=activation, dtype=dtype, k=8, n=1, h=3, w=3)
        packed = pack(build(case), "all")
        assert packed.problem.bias is not None
        packed.problem.bias[3] = float("nan")
        y = emu.pattern(packed)
        assert bool(y[:, 3].isnan().all()) and not bool(y[:, :3].isnan().any()), activation


@pytest.mark.parametrize("layout", [0, 1])
def test_offsets_beyond_32_bits(emu: Emulator, layout: int) -> None:
    for k, cut, kernel in ((3, 3, "direct"), (8, 2, "tiled"), (8, 8, "mma")):
        weight = torch.arange(1, 2 * k + 1).half().view(k, 2, 1, 1)
        problem, corners = cases.huge_problem(layout, weight)
        y = emu.pattern(pack(problem, cut))
        assert kernel in emu.kernel
        assert torch.equal(y.double(), reference.conv2d(corners, weight))
