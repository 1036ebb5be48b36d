"""Random convolution cases: one integer determines the whole case.

`draw(seed)` picks shape, sparsity, layout, dtype and data. A failing test prints the command that
runs this one case again.
"""

from __future__ import annotations

import random

import torch

from tests import reference
from tests.cases import LAYOUTS, PATTERNS, ConvCase

_MAX_MACS = 400_000  # keeps a case to about a millisecond in the slowest (scalar) kernel
_KERNELS = (1, 1, 1, 2, 3, 3, 3, 5, 7)


def draw(seed: int, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> ConvCase:
    """The case number `seed`.

    Args:
        seed: any integer; equal seeds give equal cases.
        dtypes: to choose from.

    Returns:
        A valid case (the filter fits the padded image) of at most `_MAX_MACS` dense MACs.
    """
    rng = random.Random(seed)
    while True:
        case = _attempt(rng, seed, dtypes)
        p, q = case.out_size
        macs = case.n * p * q * case.k * case.c // case.groups * case.kernel[0] * case.kernel[1]
        if p > 0 and q > 0 and macs <= _MAX_MACS:
            return case


def _attempt(rng: random.Random, seed: int, dtypes: tuple[torch.dtype, ...]) -> ConvCase:
    groups = rng.choice((1, 1, 1, 1, 2, 3, 5))
    group_channels = rng.choice((1, 1, 2, 3, rng.randint(1, 70)))
    group_filters = rng.choice((1, 1, 2, 3, rng.randint(1, 40)))
    side = rng.choice((5, 9, 20, 40))
    square = rng.choice(_KERNELS)
    kernel = (square, square)
    if rng.random() < 0.3:
        kernel = (rng.choice(_KERNELS), rng.choice(_KERNELS))
    # At least about two entries a row, or tiny weights would come out empty most of the time.
    columns = group_channels * kernel[0] * kernel[1]
    density = max(rng.choice((0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)), min(1.0, 2 / columns))
    dilation = (1, 1) if rng.random() < 0.7 else (rng.randint(1, 4), rng.randint(1, 4))
    stride = (1, 1) if rng.random() < 0.6 else (rng.randint(1, 4), rng.randint(1, 4))
    kind = rng.random()
    if kind < 0.4:  # "same" for odd kernels
        vertical, horizontal = (d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
        padding = (vertical, vertical, horizontal, horizontal)
    elif kind < 0.6:
        padding = (0, 0, 0, 0)
    else:
        padding = (rng.randint(0, 4), rng.randint(0, 4), rng.randint(0, 4), rng.randint(0, 4))
    return ConvCase(
        n=rng.choice((1, 1, 2, 3, rng.randint(1, 18))),
        c=groups * group_channels,
        h=rng.randint(1, side),
        w=rng.randint(1, side),
        k=groups * group_filters,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        density=density,
        pattern=rng.choices(PATTERNS, (12, 1, 1, 2, 1))[0],
        bias=rng.random() < 0.5,
        residual=rng.random() < 0.3,
        activation=rng.choice(reference.ACTIVATIONS),
        dtype=rng.choice(dtypes),
        layout=rng.choices(LAYOUTS, (6, 6, 1, 1, 1, 1, 1, 1, 1))[0],
        integers=rng.random() < 0.5,
        seed=seed,
    )
