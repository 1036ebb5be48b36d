"""Problems with a 2:4 weight, for the operator and for the kernel behind it on CUDA."""

from __future__ import annotations

import dataclasses
import functools

import torch

from sparsecnn.formats.pattern import PatternWeight
from tests.cases import ConvCase, build
from tests.ops.pattern import NAMES, PatternProblem

HALF, BFLOAT = torch.float16, torch.bfloat16
BASE = ConvCase(
    n=1, c=64, h=5, w=7, k=40, integers=True, pattern="full", dtype=HALF, layout="channels_last"
)
ONE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
# Seven chunks of 3 x 3 taps: the steps are split into parts.
SPLIT = BASE.but(c=416, h=3, w=4, k=32, residual=True, activation="relu")
GEOMETRIES = [
    BASE,
    BASE.but(stride=(2, 3), padding=(0, 2, 1, 0), n=2),
    BASE.but(dilation=(2, 1), padding=(2, 2, 3, 3), bias=False, dtype=BFLOAT),
    BASE.but(kernel=(2, 3), padding=(4, 0, 0, 4), residual=True, activation="relu"),
    BASE.but(kernel=(1, 2), padding=(0, 0, 2, 1), c=32, dtype=BFLOAT),  # a lone slice
    BASE.but(h=1, w=1, c=96, k=72),  # a chunk of one slice, two blocks of filters, one pixel
    ONE.but(n=5, h=7, w=7, k=72, c=96, residual=True, activation="relu6", dtype=BFLOAT),
    SPLIT,
]


@functools.cache
def two_four(case: ConvCase, share: int = 1, device: str = "cpu") -> PatternProblem:
    """A problem whose weight keeps zero, one or two of four channels; not to be changed.

    Every `share` filters have one support, and some of the stored values are zeros.
    """
    generator = torch.Generator().manual_seed(case.seed + 3)
    k, c, r, s = case.weight_shape
    leaders = -(-k // share)
    order = torch.rand(leaders, c // 4, 4, r, s, generator=generator).argsort(2)
    drawn = torch.randint(0, 4, (leaders, c // 4, 1, r, s), generator=generator)
    mask = (order < drawn.clamp(max=2)).reshape(leaders, c, r, s)[torch.arange(k) % leaders]
    problem = build(case, device)
    weight = torch.where(problem.weight == 0, torch.ones_like(problem.weight), problem.weight)
    packed = PatternWeight.from_dense(weight * mask, 1, "2:4")
    packed.values[::5] = 0
    row_ptr = torch.tensor([0, int(mask.sum((1, 2, 3)).max())], dtype=torch.int32)
    problem = dataclasses.replace(problem, weight=packed.to_dense(), row_ptr=row_ptr)
    arrays = tuple(getattr(packed, name).to(device) for name in NAMES)
    return PatternProblem(problem, arrays, packed.pattern)
