"""Fixtures and options shared by all tests: devices, instruction sets, threads, fuzzing."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# pytest puts the repository's root first on the path, where the source tree would hide an installed
# package; the first import decides for the whole run. An editable install leads back to the tree.
_ROOT = str(Path(__file__).resolve().parent.parent)
_path = sys.path[:]
sys.path[:] = [entry for entry in _path if entry not in ("", _ROOT)]
import sparsecnn  # noqa: E402

sys.path[:] = _path
# The same for the processes that tests start: the installed package first, then the tests' helpers.
_INSTALLED = str(Path(sparsecnn.__file__).resolve().parents[1])
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join((_INSTALLED, _ROOT))

ISAS = ("scalar", "avx2", "avx512")
# What the kernel must name in /proc/cpuinfo before an instruction set may be skipped. Read from
# the system and not from the package, which is the thing under test.
_ISA_FLAGS = {
    "scalar": frozenset[str](),
    "avx2": frozenset({"avx2", "fma"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fuzz tests."""
    group = parser.getgroup("sparsecnn")
    group.addoption("--fuzz-cases", type=int, default=400, help="random cases per fuzz test")
    group.addoption("--fuzz-seed", type=int, default=20_000, help="seed of the first random case")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread a run of the whole suite over two processes, files kept together.

    A run of chosen files stays in one process: starting more takes longer than most of them.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    inside = "PYTEST_XDIST_WORKER" in os.environ  # this hook runs in every process
    debugging = config.getoption("usepdb", False)
    if whole and not inside and not debugging and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses = min(2, os.cpu_count() or 1)
        config.option.dist = "loadfile"


def pytest_configure(config: pytest.Config) -> None:
    """Processes beside each other share the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_finish() -> None:
    """Leave the items of the run, tens of thousands of objects each, out of garbage collections.

    They live to the end. A full collection took half a second with them, and tests of memory ask
    for two each.
    """
    gc.collect()
    gc.freeze()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of the first processor as the operating system reports them."""
    path = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not path.exists():
        return frozenset()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def can_run(name: str) -> bool:
    """Whether the operating system says that the processor has an instruction set."""
    return _ISA_FLAGS[name] <= cpu_flags()


@contextlib.contextmanager
def active_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set; skip where the processor lacks it.

    Args:
        name: one of `ISAS`.

    Raises:
        AssertionError: if the processor has it and the kernels do not switch to it.
    """
    missing = _ISA_FLAGS[name] - cpu_flags()
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    before = sparsecnn.isa()
    sparsecnn.set_isa(name)
    try:
        assert sparsecnn.isa() == name, f"asked for {name}, running {sparsecnn.isa()}"
        yield
    finally:
        sparsecnn.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor, one after the other."""
    with active_isa(request.param):
        yield request.param


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not sparsecnn.build_info()["cuda_kernels"]:
        pytest.skip("sparsecnn was built without CUDA kernels")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Both device types; "cuda" is skipped without a GPU or without CUDA kernels."""
    if request.param == "cuda":
        _require_cuda()
    return str(request.param)


@pytest.fixture
def cuda() -> str:
    """The device type "cuda"; skipped without a GPU or without CUDA kernels."""
    _require_cuda()
    return "cuda"


@pytest.fixture(params=[*(f"cpu-{name}" for name in ISAS), "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Device type of each place a kernel can run: each CPU instruction set, and CUDA."""
    if request.param == "cuda":
        _require_cuda()
        yield "cuda"
        return
    with active_isa(request.param.removeprefix("cpu-")):
        yield "cpu"


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def nan_filled_allocations() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN: an output element nobody writes shows.

    Uses torch's deterministic mode, which reaches allocations made inside operators too
    (`tests/ops/test_reference.py` checks that it does).
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
