"""The emulator itself: it must catch planted faults, and its 16-bit types must round as torch's.

Without these tests, a green run of the others would say little.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.cases import ConvCase, build
from tests.cuda_emu import cases, emulator
from tests.cuda_emu.emulator import Emulator

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

FORWARD, GRADIENT = "csr_conv2d.cu", "csr_conv2d_grad_values.cu"
# {name: (file, text, replacement)}: each line is a mistake that someone could make.
FAULTS = {
    "no barrier after staging": (
        FORWARD,
        "channels);\n      __syncthreads();",
        "channels);",
    ),
    "no barrier before staging": (
        FORWARD,
        "if (!__syncthreads_or(stored)) continue;",
        "(void)stored;",
    ),
    "no warp barrier after writing entries": (
        FORWARD,
        "__syncwarp();\n          cursor[j] += count;",
        "cursor[j] += count;",
    ),
    "halo shifted by one": (
        "csr_conv2d_tile.cuh",
        "q0 * t.stride_w - t.pad_left;",
        "q0 * t.stride_w + 1 - t.pad_left;",
    ),
    "no barrier in the team sum": (
        GRADIENT,
        "__syncthreads();\n        if (threadIdx.x <",
        "if (threadIdx.x <",
    ),
    "gradient tap shifted by one": (GRADIENT, "s.dil_h - s.pad_top", "s.dil_h + 1 - s.pad_top"),
}
ORDERS = ("0", "1", "2")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    folder = tmp_path_factory.mktemp("sound")
    return Emulator(emulator.build(folder / "sound.so", flags=emulator.QUICK))


def is_wrong(emu: Emulator, case: ConvCase, gradient: bool) -> bool:
    """Whether the emulator objects or the result differs from the sound kernels' rules."""
    problem = build(case)
    emu.set_device(1, smem_bytes=64 * 1024)  # for several chunks of channels
    try:
        if not gradient:
            problem.check(emu.forward(problem))
            return False
        ones = torch.ones(case.n, case.k, *case.out_size)
        got = emu.grad_values(problem, ones)
    except (AssertionError, RuntimeError):
        return True
    dense = reference.conv2d_grad_weight(ones, problem.x, case.weight_shape, padding=case.padding)
    rows = torch.repeat_interleave(torch.arange(case.k), problem.row_ptr.diff().long())
    return not torch.equal(got.double(), dense.reshape(case.k, -1)[rows, problem.col_idx.long()])


# Several chunks of channels in a cluster; a batch large enough for a block to sum together.
FORWARD_CASE = cases.BASE.but(c=150, k=17, h=7, w=7, n=1, density=0.3)
GRADIENT_CASE = cases.BASE.but(n=5, c=2, k=3, h=29, w=30, density=0.5)


def test_sound_kernels_pass_the_fault_cases(
    sound: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for order in ORDERS:
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        assert not is_wrong(sound, FORWARD_CASE, gradient=False)
        assert not is_wrong(sound, GRADIENT_CASE, gradient=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name, text, replacement = FAULTS[fault]
    edits = {name: (text, replacement)}
    emu = Emulator(emulator.build(tmp_path / "faulty.so", flags=emulator.QUICK, edits=edits))
    gradient = name == GRADIENT
    case = GRADIENT_CASE if gradient else FORWARD_CASE
    for order in ORDERS:  # a race may be hidden by one order of execution, not by all three
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        if is_wrong(emu, case, gradient):
            return
    raise AssertionError(f"not caught: {fault}")


def test_divergent_barrier_is_reported(sound: Emulator) -> None:
    with pytest.raises(RuntimeError, match="never reach"):
        sound.divergent_barrier()


def test_16_bit_types_round_as_torch(sound: Emulator) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (4000,), generator=generator)
    values = torch.randn(4000, generator=generator) * torch.pow(2.0, exponents)
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0, 65520.0, 2.0**-25, 3 * 2.0**-25])
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 2047 * 2.0**-25, 1 + 2.0**-8])
    for value in torch.cat([values, ties, special]).tolist():
        one = torch.tensor([value])
        assert sound.half_bits(value) == int(one.half().view(torch.int16)) & 0xFFFF, value
        assert sound.bfloat16_bits(value) == int(one.bfloat16().view(torch.int16)) & 0xFFFF, value
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.float16)
    for bits, value in enumerate(every.tolist()):
        got = sound.half_value(bits)
        assert got == value or (math.isnan(got) and math.isnan(value)), bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_products(
    sound: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    for order in ORDERS:
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        for by_column in (False, True):
            assert torch.equal(sound.multiply(a, b, by_column=by_column), a.float() @ b.float())


def test_a_copy_is_not_there_before_the_wait(sound: Emulator) -> None:
    ones = torch.ones(16, 16, dtype=torch.float16)
    got = sound.multiply(ones, ones[:, :8], by_column=True, wait=False)
    assert bool(got.isnan().all())


def test_tf32_rounds_to_nearest_and_ties_away(sound: Emulator) -> None:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-140, 120, (2000,), generator=generator)
    values = torch.randn(2000, generator=generator) * torch.pow(2.0, exponents)
    ties = [1 + k * 2.0**-12 for k in range(-8, 9)] + [-1 - 2.0**-11, 0.0, -0.0]
    for value in torch.cat([values, torch.tensor(ties)]).tolist():
        got = sound.tf32_bits(value)
        assert got & 0x1FFF == 0, value
        unit = max(2.0 ** (math.frexp(value)[1] - 11), 2.0**-136)  # of the last place; subnormal
        want = math.copysign(math.floor(abs(value) / unit + 0.5) * unit, value)
        assert struct.unpack("f", struct.pack("I", got))[0] == want, value
    assert sound.tf32_bits(math.inf) == 0x7F800000
    assert sound.tf32_bits(math.nan) & 0x7FFFE000 > 0x7F800000


def test_tf32_products(sound: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randint(-1024, 1025, (16, 8), generator=generator).float()
    b = torch.randint(-1024, 1025, (8, 8), generator=generator).float()
    # Two bits more than TF32 has, and a product that drops them: towards zero.
    fine = a.sign() * (1 + torch.randint(0, 4, a.shape, generator=generator) / 4096)
    down = fine.sign() * (fine.abs() * 1024).floor() / 1024
    near = fine.sign() * (fine.abs() * 1024 + 0.5).floor() / 1024
    for order in ORDERS:
        monkeypatch.setenv("CUDA_EMU_ORDER", order)
        for by_column in (False, True):
            assert torch.equal(sound.multiply_tf32(a, b, by_column=by_column), a @ b)
            got = sound.multiply_tf32(fine, b, by_column=by_column)
            assert torch.equal(got, near @ b)
            got = sound.multiply_tf32(fine, b, by_column=by_column, rounded=False)
            assert torch.equal(got, down @ b)
    assert not torch.equal(near, down)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_matrix_products(sound: Emulator, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randint(1, 9, (16, 32), generator=generator).to(dtype)
    kept = torch.rand(16, 8, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values
    a = dense.view(16, 8, 4).gather(-1, kept).reshape(16, 16)
    dense = torch.zeros_like(dense).view(16, 8, 4).scatter(-1, kept, a.view(16, 8, 2)).view(16, 32)
    b = torch.randint(-8, 9, (32, 8), generator=generator).to(dtype)
    # Two bits a stored column, eight columns a half word; rows g and g + 8 share a word.
    halves = (kept.reshape(16, 2, 8) << torch.arange(0, 16, 2)).sum(-1)
    for selector in (0, 1):
        metadata = torch.full((8, 4), -1, dtype=torch.int64)
        metadata[:, 2 * selector : 2 * selector + 2] = halves[:8] | halves[8:] << 16
        words = (metadata & 0xFFFFFFFF).to(torch.uint32).flatten()
        got = sound.multiply_sparse(a, b, words, selector)
        assert torch.equal(got, dense.float() @ b.float())
