"""winograd_conv2d on the emulator: the logic of its three kernels, without a GPU."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.cases import Problem
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator, WinogradParams
from tests.ops.winograd import KINDS, WinogradProblem, make

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

BASE = cases.WINOGRAD[0]
LAYOUTS = ("contiguous", "channels_last")
HALVES = (torch.float16, torch.bfloat16)
DENSE, SPARSE, MMA = (f"winograd_conv2d{end}.cu" for end in ("", "_sparse", "_mma"))
FEW, MANY = 1, 1000  # SMs: few are kept busy by wide blocks already


def check(emu: Emulator, p: WinogradProblem) -> Tensor:
    y = emu.winograd(p)
    p.check(y, cuda=True)
    return y


def test_integers_are_exact(emu: Emulator) -> None:
    """With m = 2; within the bound with m = 4. Wide and narrow blocks take turns."""
    kernels = set()
    for number, case in enumerate(cases.WINOGRAD):
        for turn, (tile, sparse) in enumerate(KINDS):
            emu.set_device(FEW if (number + turn) % 2 else MANY)
            check(emu, make(case.but(layout=LAYOUTS[(number + turn // 2) % 2]), tile, sparse))
            kernels.add(emu.kernel)
    dense = {"2, 32, 32", "2, 8, 16", "4, 32, 16", "4, 8, 16"}
    sparse_ = {"2, 4, 2, 16", "2, 1, 1, 8", "4, 2, 1, 16", "4, 1, 1, 8"}
    want = {f"launch_dense<float, {block}>" for block in dense}
    assert kernels == want | {f"launch_sparse<float, {block}>" for block in sparse_}


def test_every_type_layout_and_order(emu: Emulator, thread_order: str) -> None:
    kernels = set()
    for number, case in enumerate(cases.variants(cases.WINOGRAD[1].but(n=1))):
        for turn, (tile, sparse) in enumerate(KINDS):
            emu.set_device(FEW if (number // 2 + turn // 2) % 2 else MANY)
            check(emu, make(case, tile, sparse))
            kernels.add(emu.kernel.split(",")[0])
    types = ("float", "__half", "__nv_bfloat16")
    want = {f"launch_{kind}<{name}" for kind in ("dense", "sparse") for name in types}
    assert kernels == want | {f"launch_mma<{name}" for name in types[1:]}


def test_tensor_cores_are_exact_on_integers(emu: Emulator) -> None:
    kernels = set()
    for number, case in enumerate(cases.WINOGRAD):
        emu.set_device(FEW if number % 2 else MANY)
        for turn, layout in enumerate(LAYOUTS):
            dtype = HALVES[(number // 2 + turn) % 2]
            check(emu, make(case.but(dtype=dtype, layout=layout), 2))
            kernels.add(emu.kernel)
    types = ("__half", "__nv_bfloat16")
    assert kernels == {f"launch_mma<{name}, {k}>" for name in types for k in ("16, 16", "64, 32")}


def test_less_shared_memory_takes_smaller_blocks(emu: Emulator) -> None:
    emu.set_device(FEW, 99 * 1024)
    case = BASE.but(k=40, c=40)
    for tile, sparse in KINDS:
        check(emu, make(case, tile, sparse))
    check(emu, make(case.but(dtype=torch.float16), 2))
    assert emu.kernel == "launch_mma<__half, 16, 16>"


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_in_every_type(emu: Emulator, activation: str) -> None:
    case = BASE.but(activation=activation, residual=True, n=1, h=5, w=6, integers=False)
    for number, dtype in enumerate((torch.float32, *HALVES)):
        for turn, (tile, sparse) in enumerate(KINDS):
            layout = LAYOUTS[(number + turn) % 2]
            check(emu, make(case.but(dtype=dtype, layout=layout), tile, sparse))


def test_dense_and_full_sparse_weights_agree(emu: Emulator) -> None:
    """Different kernels, the same sums of one chunk: equal where the products are exact."""
    case = BASE.but(c=16, k=16, pattern="full")
    for layout in LAYOUTS:
        dense, sparse = make(case.but(layout=layout), 2), make(case.but(layout=layout), 2, True)
        taps = sparse.taps
        values = taps.reshape(16, 2, 8, 16).permute(1, 0, 3, 2).contiguous()
        same = dataclasses.replace(dense, taps=taps, values=values)
        assert torch.equal(check(emu, same), check(emu, sparse))


def test_large_half_floats_do_not_overflow(emu: Emulator) -> None:
    """A transformed pixel is up to four times as large as x."""
    p = make(BASE.but(n=1, c=2, k=8, h=4, w=4, bias=False, dtype=torch.float16, integers=False), 2)
    big = torch.where(torch.arange(4) % 3 == 0, 1.0, -1.0) * 30_000
    p.problem.x.copy_(torch.outer(big.sign(), big)[None, None].expand(1, 2, 4, 4))
    p = dataclasses.replace(p, values=p.values / 64, taps=p.taps / 64)
    assert bool(check(emu, p).isfinite().all())


def unaligned(t: Tensor) -> Tensor:
    """A copy one element behind an aligned address."""
    memory = t.new_empty(1 + t.numel())
    flat = memory[1:]
    assert flat.data_ptr() % 16 != 0
    if t.dim() == 4 and not t.is_contiguous():
        n, c, h, w = t.shape
        moved = flat.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        moved = flat.view(t.shape)
    return moved.copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_unaligned_tensors_are_not_read_as_vectors(emu: Emulator, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        for tile, sparse in KINDS:
            p = make(BASE.but(dtype=dtype, layout=layout, c=6, residual=True), tile, sparse)
            assert p.problem.residual is not None
            moved = {"x": unaligned(p.problem.x), "residual": unaligned(p.problem.residual)}
            check(emu, p.but(values=unaligned(p.values), **moved))


def test_blocks_loop_when_the_grid_is_full(emu: Emulator, thread_order: str) -> None:
    case = BASE.but(n=1, k=36, h=11, w=9, c=12, groups=2)
    for turn, (tile, sparse) in enumerate(KINDS):
        emu.set_device(FEW if turn % 2 else MANY, max_grid=1)
        check(emu, make(case.but(layout=LAYOUTS[turn // 2]), tile, sparse))
    check(emu, make(case.but(dtype=torch.bfloat16), 2))


# Where, and what is planted.
_FAULTS = {
    "no barrier behind the tiles": (
        DENSE,
        ("__syncthreads();  // and what all have copied and transformed is there", ""),
    ),
    "no wait for the weight": (DENSE, ("      copy_async_wait<0>();\n", "")),
    "no barrier behind the spans": (
        SPARSE,
        ("""    __syncthreads();

    float z""", "    float z"),
    ),
    "entries of a full batch left out": (SPARSE, ("} while (more);", "} while (false);")),
    "the buffer that is being read": (
        MMA, ("own + (buffer ^ 1) * B::kInput", "own + buffer * B::kInput"),
    ),
    "the second channel of a pair": (MMA, ("if (pixel && second)", "if (pixel && !second)")),
}  # fmt: skip
FAULTS = {name: {file: edit} for name, (file, edit) in _FAULTS.items()}


def run_all(emu: Emulator, name: str) -> None:
    """The kernels of a file on cases of several chunks, both layouts."""
    case = BASE.but(c=35, k=20, n=1, h=5, w=5, pattern="full", bias=False)
    for layout in LAYOUTS:
        for width in (FEW, MANY):
            emu.set_device(width)
            at = case.but(layout=layout)
            if name == MMA:
                check(emu, make(at.but(dtype=torch.bfloat16), 2))
                continue
            for tile in (2, 4):
                check(emu, make(at, tile, name == SPARSE))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, faulty: dict[str, Future[Path]]) -> None:
    with pytest.raises(AssertionError):
        run_all(Emulator(faulty[fault].result()), _FAULTS[fault][0])


def test_a_row_of_the_halo_left_out_is_found(tmp_path: Path) -> None:
    """In what the kernels share."""
    edit = ("if (row + i >= 0 && row + i < s.h)", "if (row + i >= 0 && row + i < s.h - 1)")
    edits = {"winograd_tiles.cuh": edit}
    emu = Emulator(emulator.build(tmp_path / "faulty.so", flags=emulator.QUICK, edits=edits))
    for name in (DENSE, SPARSE, MMA):
        with pytest.raises(AssertionError):
            run_all(emu, name)


def test_nothing_to_compute_launches_nothing(emu: Emulator) -> None:
    before = emu.launches
    for tile, sparse in KINDS:
        for case in (BASE.but(n=0), BASE.but(k=0)):
            assert emu.winograd(make(case, tile, sparse)).numel() == 0
    assert emu.launches == before


def test_refusals(emu: Emulator) -> None:
    for tile, sparse in KINDS:
        with pytest.raises(ValueError, match="invalid argument"):
            emu.winograd(make(BASE.but(dtype=torch.float64), tile, sparse))
        with pytest.raises(ValueError, match="invalid argument"):
            emu.winograd(dataclasses.replace(make(BASE, tile, sparse), tile=3))


def test_nan_passes_every_activation(emu: Emulator) -> None:
    for activation in reference.ACTIVATIONS:
        for turn, (tile, sparse) in enumerate(KINDS):
            case = BASE.but(integers=False, activation=activation, layout=LAYOUTS[turn % 2])
            for dtype in (torch.float32, torch.bfloat16):
                p = make(case.but(dtype=dtype), tile, sparse)
                assert p.problem.bias is not None
                p.problem.bias[3] = float("nan")
                y = emu.winograd(p)
                others = [k for k in range(case.k) if k != 3]
                assert bool(y[:, 3].isnan().all()) and not bool(y[:, others].isnan().any())


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("tile, sparse", KINDS)
def test_offsets_beyond_32_bits(emu: Emulator, tile: int, sparse: bool, layout: int) -> None:
    """4.4 GB of addresses, of which a crop leaves one tile in the last corner."""
    side = 33_000
    x, corners = cases.huge_image(layout, side)
    case = BASE.but(n=1, c=2, k=2, h=3, w=3, bias=False, dtype=torch.float16)
    case = case.but(padding=(0, 0, 0, 0), pattern="full")
    p = make(case, tile, sparse)
    p.problem.x.zero_()
    p.problem.x[0, :, 2, 2] = corners[0, :, 1, 1]
    small: Problem = p.problem
    y = torch.full((1, 2, 1, 1), float("nan"), dtype=torch.float16)
    shape = emulator.shape_of(small)
    shape.h = shape.w = side
    shape.pad_top = shape.pad_left = -(side - 3)
    emu.winograd_raw(
        WinogradParams(
            shape=shape,
            dtype=2,
            layout=layout,
            x=x.data_ptr(),
            y=y.data_ptr(),
            tile=tile,
            values=p.values.data_ptr(),
            col_idx=None if p.col_idx is None else p.col_idx.data_ptr(),
            row_ptr=None if p.row_ptr is None else p.row_ptr.data_ptr(),
        )
    )
    p.check(y, cuda=True)
