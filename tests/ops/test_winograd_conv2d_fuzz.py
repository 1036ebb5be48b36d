"""Random cases against the reference. A failure prints the command that repeats it alone."""

from __future__ import annotations

import random

import pytest
import torch

from tests import reference
from tests.cases import LAYOUTS, PATTERNS, ConvCase
from tests.conftest import ISAS, active_isa
from tests.ops.winograd import KINDS, check, make

_MAX_PRODUCTS = 600_000  # keeps a case to about a millisecond in the slowest (scalar) kernel
_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)


def draw(seed: int) -> tuple[ConvCase, int, bool]:
    """Case, tile and sparsity number `seed`: 3x3, stride 1, all that the operator takes."""
    rng = random.Random(seed)
    while True:
        case = _attempt(rng, seed)
        tile, sparse = rng.choice(KINDS)
        p, q = case.out_size
        if p < 1 or q < 1:
            continue
        tiles = case.n * -(-p // tile) * -(-q // tile)
        if tiles * (tile + 2) ** 2 * case.k * case.c // case.groups <= _MAX_PRODUCTS:
            return case, tile, sparse


def _attempt(rng: random.Random, seed: int) -> ConvCase:
    groups = rng.choice((1, 1, 1, 1, 2, 3, 5))
    side = rng.choice((3, 5, 9, 20, 40, 90))
    kind = rng.random()
    padding = (1, 1, 1, 1)
    if kind < 0.2:
        padding = (0, 0, 0, 0)
    elif kind < 0.6:
        padding = (rng.randint(0, 6), rng.randint(0, 6), rng.randint(0, 6), rng.randint(0, 6))
    return ConvCase(
        n=rng.choice((1, 1, 2, 3, rng.randint(1, 40))),
        c=groups * rng.choice((1, 2, 3, rng.randint(1, 24), rng.randint(1, 240))),
        h=rng.randint(1, side),
        w=rng.randint(1, side),
        k=groups * rng.choice((1, 2, 9, rng.randint(1, 24), rng.randint(1, 90))),
        padding=padding,
        groups=groups,
        density=rng.choice((0.02, 0.1, 0.3, 0.5, 0.8)),
        pattern=rng.choices(PATTERNS, (12, 1, 1, 2, 1))[0],
        bias=rng.random() < 0.5,
        residual=rng.random() < 0.3,
        activation=rng.choice(reference.ACTIVATIONS),
        dtype=rng.choice(_DTYPES),
        layout=rng.choices(LAYOUTS, (6, 6, 1, 1, 1, 1, 1, 1, 1))[0],
        integers=rng.random() < 0.5,
        seed=seed,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--fuzz-seed")
        metafunc.parametrize(
            "fuzz_seed", range(first, first + metafunc.config.getoption("--fuzz-cases"))
        )


def test_fuzz(fuzz_seed: int) -> None:
    case, tile, sparse = draw(fuzz_seed)
    p = make(case, tile, sparse)
    skipped = 0
    for name in ISAS:
        try:
            with active_isa(name):
                check(p)
        except pytest.skip.Exception:
            skipped += 1
        except Exception as error:
            raise AssertionError(
                f"{name}: {case}, tile {tile}, sparse {sparse}\nrepeat: python -m pytest "
                f"tests/ops/test_winograd_conv2d_fuzz.py --fuzz-cases 1 --fuzz-seed {fuzz_seed}"
            ) from error
    assert skipped < len(ISAS)


def test_cases_are_repeatable_and_varied() -> None:
    drawn = [draw(seed) for seed in range(400)]
    assert drawn == [draw(seed) for seed in range(400)]
    cases = [case for case, _, _ in drawn]
    assert {(tile, sparse) for _, tile, sparse in drawn} == set(KINDS)
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert {case.pattern for case in cases} == set(PATTERNS)
    assert {case.groups for case in cases} == {1, 2, 3, 5}
    # Several superblocks of filters, wide layers, maps of one row or column, large pads.
    for rare in (
        lambda case: case.k // case.groups > 32,
        lambda case: case.c // case.groups > 64,
        lambda case: 1 in (case.h, case.w),
        lambda case: max(case.padding) > 4,
        lambda case: case.n > 16,
    ):
        assert sum(map(rare, cases)) > 15
