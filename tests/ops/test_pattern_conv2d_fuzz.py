"""Random cases against the reference. A failure prints the command that repeats it alone."""

from __future__ import annotations

import random

import pytest
import torch

from tests.cases import build
from tests.conftest import ISAS, active_isa
from tests.fuzz import draw
from tests.ops.pattern import CUTS, check, pack


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--fuzz-seed")
        metafunc.parametrize(
            "fuzz_seed", range(first, first + metafunc.config.getoption("--fuzz-cases"))
        )


def test_fuzz(fuzz_seed: int) -> None:
    case = draw(fuzz_seed, (torch.float32, torch.float32, torch.bfloat16, torch.float64))
    cut, permuted = random.Random(fuzz_seed).choice(CUTS)
    p = pack(build(case), cut, permuted)
    skipped = 0
    for name in ISAS:
        try:
            with active_isa(name):
                check(p)
        except pytest.skip.Exception:
            skipped += 1
        except Exception as error:
            raise AssertionError(
                f"{name}: {case}, cut {cut}, permuted {permuted}\nrepeat: python -m pytest "
                f"tests/ops/test_pattern_conv2d_fuzz.py --fuzz-cases 1 --fuzz-seed {fuzz_seed}"
            ) from error
    assert skipped < len(ISAS)
