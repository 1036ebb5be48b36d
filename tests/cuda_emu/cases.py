"""Convolutions that exercise the CUDA kernels: every path, few enough pixels for the emulator."""

from __future__ import annotations

import dataclasses
import mmap

import pytest
import torch
from torch import Tensor

from tests.cases import ConvCase

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
POINTWISE = _pointwise()
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


def huge_image(layout: int, side: int) -> tuple[Tensor, Tensor]:
    """Two channels of side x side half floats in NCHW (0) or NHWC (1), and their four corners.

    The corners, 1 to 8, are all that is written: untouched pages of the mapping take no memory.
    """
    try:
        memory = mmap.mmap(-1, 4 * side * side)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    x = torch.frombuffer(memory, dtype=torch.float16)
    x = x.view(1, side, side, 2).permute(0, 3, 1, 2) if layout else x.view(1, 2, side, side)
    corners = x[:, :, :: side - 1, :: side - 1]
    corners.copy_(torch.arange(1, 9).view(1, 2, 2, 2))
    return x, corners
