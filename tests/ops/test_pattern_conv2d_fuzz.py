"""Random cases against the reference. A failure prints the command that repeats it alone."""

from __future__ import annotations

import random

import pytest
import torch

from tests.cases import ConvCase, build
from tests.conftest import ISAS, active_isa
from tests.fuzz import draw
from tests.ops.pattern import CUTS, check, pack


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--fuzz-seed")
        count = metafunc.config.getoption("--fuzz-cases")
        if metafunc.function is test_fuzz_cuda and not torch.cuda.is_available():
            count = 1  # one skip says it
        metafunc.parametrize("fuzz_seed", range(first, first + count))


def message(seed: int, case: ConvCase, how: object, test: str) -> str:
    """What failed, and the shell command that runs that case of that test alone."""
    file = "tests/ops/test_pattern_conv2d_fuzz.py"
    command = f"python -m pytest {file} -k {test} --fuzz-cases 1 --fuzz-seed {seed}"
    return f"{case}, cut and permuted {how}\nrepeat: {command}"


def test_fuzz_cpu(fuzz_seed: int) -> None:
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
            text = message(fuzz_seed, case, (cut, permuted), "cpu")
            raise AssertionError(f"{name}: {text}") from error
    assert skipped < len(ISAS)


def test_fuzz_cuda(fuzz_seed: int, cuda: str) -> None:
    case = draw(fuzz_seed, (torch.float32, torch.float16, torch.bfloat16))
    cut, permuted = random.Random(fuzz_seed).choice(CUTS)
    try:
        check(pack(build(case, cuda), cut, permuted))
    except Exception as error:
        text = message(fuzz_seed, case, (cut, permuted), "cuda")
        raise AssertionError(text) from error
