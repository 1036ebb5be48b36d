"""Convolutions that exercise the CUDA kernels: every path, few enough pixels for the emulator."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.cases import ConvCase, Problem, build

# 9 filters: two warps of the smallest block get a second filter block, most stay without a row.
BASE = ConvCase(n=2, c=5, h=9, w=8, k=9, density=0.3, integers=True)


def _pad(kernel: tuple[int, int]) -> tuple[int, int, int, int]:
    return (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)


def _kernels() -> list[ConvCase]:
    cases = []
    for kernel in ((1, 1), (3, 3), (5, 5), (1, 7), (7, 1), (2, 4)):
        for stride in ((1, 1), (2, 2), (3, 3)):
            cases.append(BASE.but(kernel=kernel, padding=_pad(kernel), stride=stride, h=11))
    for padding in ((0, 0, 0, 0), (2, 2, 2, 2), (1, 0, 2, 3), (0, 2, 0, 1), (9, 0, 0, 9)):
        cases.append(BASE.but(padding=padding))
    for dilation in ((2, 2), (1, 3), (4, 2)):
        for stride in ((1, 1), (2, 2), (1, 3)):
            cases.append(BASE.but(dilation=dilation, padding=(2, 2, 2, 2), stride=stride))
    cases.append(BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(5, 4)))
    cases.append(BASE.but(kernel=(1, 1), padding=(1, 2, 0, 3)))
    return cases


def _maps() -> list[ConvCase]:
    cases = [BASE.but(h=h, w=w) for h, w in ((1, 1), (1, 17), (17, 1), (3, 70), (40, 3))]
    one = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
    cases += [one.but(h=h, w=w, n=n) for h, w, n in ((1, 1, 70), (1, 40, 3), (7, 7, 3), (5, 1, 1))]
    cases += [BASE.but(n=n) for n in (0, 1, 3)]
    return cases


def _channels() -> list[ConvCase]:
    cases = [BASE.but(c=c, k=k) for c, k in ((1, 8), (3, 17), (17, 33), (33, 15), (7, 1))]
    cases += [
        BASE.but(c=6, k=18, groups=2),
        BASE.but(c=9, k=27, groups=3, stride=(2, 2)),
        BASE.but(c=6, k=4, groups=2),
        BASE.but(c=6, k=6, groups=6, density=0.6),
        BASE.but(c=5, k=15, groups=5, pattern="full"),
        # More channels than the shared memory takes at once.
        BASE.but(c=150, k=9, h=7, w=7, density=0.05),
        BASE.but(c=260, k=17, kernel=(1, 1), padding=(0, 0, 0, 0), density=0.3, n=1),
    ]
    return cases


def _patterns() -> list[ConvCase]:
    cases = [BASE.but(pattern=p) for p in ("full", "empty", "some_empty_rows", "one_full_row")]
    cases += [BASE.but(density=0.02, k=17), BASE.but(density=0.6, c=40, k=8)]
    return cases


def _epilogues() -> list[ConvCase]:
    cases = []
    for activation in ("none", "relu", "relu6", "silu", "hardswish"):
        for bias in (False, True):
            cases.append(BASE.but(activation=activation, bias=bias, residual=not bias))
            cases.append(BASE.but(activation=activation, bias=bias, residual=True, n=1, seed=2))
    return cases


FAMILIES = {
    "kernels": _kernels(),
    "maps": _maps(),
    "channels": _channels(),
    "patterns": _patterns(),
    "epilogues": _epilogues(),
}
ALL = list(dict.fromkeys(case for family in FAMILIES.values() for case in family))
def _depthwise() -> list[ConvCase]:
    base = ConvCase(n=2, c=8, h=9, w=8, k=8, groups=8, pattern="full", integers=True)
    cases = []
    for size in (3, 5, 7):  # filters of their own
        for stride in ((1, 1), (2, 2)):
            fixed = base.but(kernel=(size, size), padding=_pad((size, size)), stride=stride)
            cases += [fixed, fixed.but(h=19, w=11, n=1), fixed.but(h=1, w=2)]
    cases += [base.but(padding=padding) for padding in ((0, 0, 0, 0), (2, 1, 0, 3), (9, 0, 0, 9))]
    # Channels: a vector of each type, several blocks of them, no whole vector.
    cases += [base.but(c=c, k=c, groups=c, n=1, h=5, w=5) for c in (1, 4, 7, 24, 136, 260)]
    # What the direct kernel is for.
    cases += [base.but(c=4, k=12, groups=4), base.but(dilation=(2, 1), padding=(2, 2, 1, 1))]
    for kernel in ((1, 1), (1, 7), (4, 2), (9, 9)):
        cases.append(base.but(kernel=kernel, padding=_pad(kernel)))
    cases += [base.but(stride=stride, h=11) for stride in ((3, 3), (1, 2))]
    ends = [base.but(bias=False), base.but(residual=True), base.but(bias=False, residual=True)]
    return cases + ends + [end.but(h=33, w=33, n=1, activation="relu6") for end in ends]


def _winograd() -> list[ConvCase]:
    base = ConvCase(n=2, c=5, h=9, w=8, k=9, integers=True)
    cases = [base, base.but(c=18, k=20, groups=2, residual=True, activation="relu", h=5, w=6)]
    # Tiles of several images in a block, several blocks of tiles, maps of one row or column.
    for n, h, w in ((70, 1, 2), (1, 17, 19), (3, 1, 9), (1, 9, 1)):
        cases.append(base.but(n=n, h=h, w=w))
    # Filters and channels around blocks and chunks, or none.
    cases += [base.but(n=1, h=5, c=c, k=k) for c, k in ((1, 8), (16, 1), (33, 33), (8, 64), (0, 5))]
    cases += [base.but(padding=pad) for pad in ((0, 0, 0, 0), (9, 0, 0, 7), (0, 2, 3, 1))]
    # More channels than the shared memory takes at once; full batches of entries and empty rows.
    cases += [base.but(n=1, c=70, h=4, w=4, k=17, density=0.9), base.but(density=0.02, c=40)]
    cases += [base.but(pattern=p, c=19) for p in ("empty", "one_full_row")]
    return [*cases, base.but(bias=False), base.but(bias=False, residual=True, activation="relu6")]


def _pointwise() -> list[ConvCase]:
    base = ConvCase(n=2, c=9, h=5, w=6, k=9, kernel=(1, 1), padding=(0, 0, 0, 0), pattern="full")
    base = base.but(integers=True)
    cases = [base.but(c=c, k=k) for c, k in ((1, 1), (16, 32), (33, 7), (40, 33), (150, 40))]
    cases += [base.but(n=n, h=h, w=w) for n, h, w in ((1, 1, 1), (3, 4, 8), (1, 7, 7), (1, 2, 3))]
    # Tiles of 128 x 64; widths of copies that divide no image.
    cases += [base.but(c=c, k=70, h=14, w=14) for c in (8, 12, 18, 21)]
    cases += [base.but(c=24, k=48, h=9, w=15, n=1), base.but(k=70, h=14, w=14, n=1)]
    cases += [base.but(stride=stride, h=11, w=14) for stride in ((2, 2), (3, 1), (1, 2))]
    cases.append(base.but(stride=(2, 2), h=41, w=40, k=40))
    ends = [base.but(bias=False), base.but(residual=True), base.but(bias=False, residual=True)]
    return cases + ends + [end.but(h=17, w=18, k=40, activation="relu6") for end in ends]


DEPTHWISE = _depthwise()
# What the shapes of a block are for, and channels for several blocks of a cluster to share.
SPLIT = [
    BASE.but(c=40, k=34),
    BASE.but(c=64, k=33, h=7, w=7, n=1, density=0.1),
    BASE.but(c=130, k=40, h=14, w=14, n=1, density=0.05),
    # A last block of the cluster without channels; rows that have no entry for most of them.
    BASE.but(c=65, k=34, h=5, w=5, n=1, density=0.02, pattern="some_empty_rows"),
]
POINTWISE = _pointwise()
# Of pattern_conv2d on tensor cores: every block shape, filter groups that share a team and that
# fill several, chunks in which all columns of eight channels are kept, some or none.
TENSOR_CORES = [
    BASE.but(n=1, c=24, k=72, pattern="full"),
    BASE.but(n=1, c=40, k=150, h=5, density=0.1),
    BASE.but(n=1, c=150, k=24, h=7, w=7, kernel=(1, 1), padding=(0, 0, 0, 0), density=0.05),
    BASE.but(c=48, k=36, groups=2, h=5, density=0.02, stride=(2, 2), residual=True),
    BASE.but(n=1, c=20, k=24, kernel=(5, 5), padding=(2, 2, 2, 2), density=0.02),
    BASE.but(n=1, c=17, k=21, kernel=(1, 7), padding=(0, 0, 3, 3), dilation=(1, 2), w=25),
]
WINOGRAD = _winograd()
# A few that together reach every path, for what multiplies the cases.
CORE = [
    BASE,
    BASE.but(stride=(2, 2), residual=True, k=17, activation="relu"),
    BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), c=17, k=33),
    BASE.but(c=6, k=6, groups=6, density=0.6),
    BASE.but(c=150, k=9, h=7, w=7, n=1, density=0.05),
    BASE.but(kernel=(1, 7), padding=(0, 0, 3, 3), stride=(1, 3), dilation=(1, 2), w=25),
]


def variants(case: ConvCase) -> list[ConvCase]:
    """The case in both layouts, and as random floats in each storage type."""
    cases = [case, case.but(layout="channels_last")]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            cases.append(dataclasses.replace(case, integers=False, dtype=dtype, layout=layout))
    return cases


def huge_image(layout: int, side: int, channels: int = 2) -> tuple[Tensor, Tensor]:
    """Side x side half floats of each channel in NCHW (0) or NHWC (1), and their four corners.

    The corners, 1, 2, 3 ..., are all that is written: untouched pages of the mapping take no
    memory.
    """
    try:
        memory = mmap.mmap(-1, 2 * channels * side * side)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    x = torch.frombuffer(memory, dtype=torch.float16)
    sides = (side, side)
    x = x.view(1, *sides, channels).permute(0, 3, 1, 2) if layout else x.view(1, channels, *sides)
    corners = x[:, :, :: side - 1, :: side - 1]
    corners.copy_(torch.arange(1, 4 * channels + 1).view(1, channels, 2, 2))
    return x, corners


def huge_problem(layout: int, weight: Tensor, groups: int = 1) -> tuple[Problem, Tensor]:
    """A half-precision 1x1 layer on a `huge_image`, whose stride touches the corners only.

    4.4 GB of addresses.

    Args:
        layout: NCHW (0) or NHWC (1).
        weight: (K, 2 / groups, 1, 1).
        groups: of the layer.

    Returns:
        The problem, without a bias, and the corners (1, 2, 2, 2).
    """
    side = 33_000
    x, corners = huge_image(layout, side)
    case = ConvCase(n=1, c=2, h=side, w=side, k=len(weight), kernel=(1, 1), groups=groups).but(
        padding=(0, 0, 0, 0), stride=(side - 1, side - 1), bias=False, dtype=torch.float16,
        pattern="full", density=1.0,
    )  # fmt: skip
    empty = torch.empty(0, dtype=torch.int32)
    return Problem(case, x, weight, weight.view(-1), empty, empty, None, None), corners


def check_nan_passes(run: Callable[[Problem], Tensor], base: ConvCase) -> None:
    """A NaN in the bias reaches its channel through every activation, and no other channel."""
    for activation in reference.ACTIVATIONS:
        for layout in ("contiguous", "channels_last"):
            problem = build(base.but(integers=False, activation=activation, layout=layout))
            assert problem.bias is not None
            problem.bias[3] = float("nan")
            hit = run(problem).isnan()
            assert bool(hit[:, 3].all()) and int(hit.sum()) == hit[:, 3].numel(), activation
