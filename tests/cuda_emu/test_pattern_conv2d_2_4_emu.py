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
from tests.cuda_emu.emulator import Emulator
from tests.ops.pattern import NAMES, PatternProblem

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")

HALF, BFLOAT = torch.float16, torch.bfloat16
BASE = ConvCase(
    n=1, c=64, h=5, w=7, k=40, integers=True, pattern="full", dtype=HALF, layout="channels_last"
)
ONE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
# Numbers of multiprocessors with which the launcher takes each tile.
WIDE = ONE.but(k=504, h=9, w=14), 1
MIDDLE = ONE.but(k=120, h=10, w=13, dtype=BFLOAT), 1
SMALL = ONE.but(k=264, h=10, w=13, dtype=BFLOAT), 1000

GEOMETRIES = [
    BASE,
    BASE.but(stride=(2, 3), padding=(0, 2, 1, 0), n=2),
    BASE.but(dilation=(2, 1), padding=(2, 2, 3, 3), bias=False, dtype=BFLOAT),
    BASE.but(kernel=(2, 3), padding=(4, 0, 0, 4), residual=True, activation="relu"),
    BASE.but(kernel=(1, 2), padding=(0, 0, -1, 1), c=32, dtype=BFLOAT),  # a lone slice, cropped
    BASE.but(h=1, w=1, c=96, k=72),  # a step of one slice, filters in two blocks
    BASE.but(kernel=(5, 5), padding=(2, 2, 2, 2), h=3, w=3, c=160, k=32, n=3),
    ONE.but(n=5, h=7, w=7, k=72, c=96, residual=True, activation="relu6", dtype=BFLOAT),
]


def two_four(case: ConvCase, share: int = 1) -> PatternProblem:
    """A problem whose weight keeps zero, one or two of four channels.

    Every `share` filters have one support, and some of the stored values are zeros.
    """
    generator = torch.Generator().manual_seed(case.seed + 3)
    k, c, r, s = case.weight_shape
    leaders = -(-k // share)
    order = torch.rand(leaders, c // 4, 4, r, s, generator=generator).argsort(2)
    kept = torch.tensor([0, 1, 2, 2])[torch.randint(0, 4, (leaders, c // 4, 1, r, s),
                                                    generator=generator)]  # fmt: skip
    mask = (order < kept).reshape(leaders, c, r, s)[torch.arange(k) % leaders]
    problem = build(case)
    weight = torch.where(problem.weight == 0, torch.ones_like(problem.weight), problem.weight)
    packed = PatternWeight.from_dense(weight * mask, 1, "2:4")
    packed.values[::5] = 0
    row_ptr = torch.tensor([0, int(mask.sum((1, 2, 3)).max())], dtype=torch.int32)
    problem = dataclasses.replace(problem, weight=packed.to_dense(), row_ptr=row_ptr)
    return PatternProblem(problem, tuple(getattr(packed, name) for name in NAMES))


def check(emu: Emulator, case: ConvCase, share: int = 1) -> None:
    packed = two_four(case, share)
    packed.problem.check(emu.pattern_2_4(packed))


def test_integers_are_exact(emu: Emulator) -> None:
    for number, case in enumerate(GEOMETRIES):
        check(emu, case, share=1 + number % 3)
    kernels = set()
    for (case, sm_count), dtype in zip((WIDE, MIDDLE, SMALL) * 2, [HALF] * 3 + [BFLOAT] * 3):
        emu.set_device(sm_count)
        check(emu, case.but(dtype=dtype))
        kernels.add(emu.kernel.replace("sparsecnn::cuda::two_four::", ""))
    types = ("__half", "__nv_bfloat16")
    tiles = ("Wide", "Middle", "Small")
    assert kernels == {f"launch_gemm<{t}, {tile}>" for t in types for tile in tiles}
