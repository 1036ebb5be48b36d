"""Random cases against the reference. A failure prints the command that repeats it alone."""

from __future__ import annotations

import pytest
import torch

from tests.cases import build
from tests.conftest import ISAS, active_isa
from tests.fuzz import draw
from tests.ops.csr import check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--fuzz-seed")
        count = metafunc.config.getoption("--fuzz-cases")
        if metafunc.function is test_fuzz_cuda and not torch.cuda.is_available():
            count = 1  # one skip says it
        metafunc.parametrize("fuzz_seed", range(first, first + count))


def repeat_command(seed: int, test: str) -> str:
    """The shell command that runs one case of one test."""
    file = "tests/ops/test_csr_conv2d_fuzz.py"
    return f"python -m pytest {file} -k {test} --fuzz-cases 1 --fuzz-seed {seed}"


def test_fuzz_cpu(fuzz_seed: int) -> None:
    # float64 is drawn too: it has a kernel of its own.
    case = draw(fuzz_seed, (torch.float32, torch.float32, torch.bfloat16, torch.float64))
    problem = build(case)
    skipped = 0
    for name in ISAS:
        try:
            with active_isa(name):
                check(problem)
        except pytest.skip.Exception:
            skipped += 1
        except Exception as error:
            raise AssertionError(
                f"{name}: {case}\nrepeat: {repeat_command(fuzz_seed, 'cpu')}"
            ) from error
    assert skipped < len(ISAS)


def test_fuzz_cuda(fuzz_seed: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = draw(fuzz_seed, (torch.float32, torch.float16, torch.bfloat16))
    try:
        check(build(case, "cuda"))
    except Exception as error:
        raise AssertionError(f"{case}\nrepeat: {repeat_command(fuzz_seed, 'cuda')}") from error
