"""Memory of csr_conv2d on the CPU: scratch within its bound, copies of weights of known size."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import ConvCase, Problem, build
from tests.ops.csr import POINTWISE, grad_values_args, op_args

# Input and output times this is what a call may take, output included and weight excluded.
SHARE = 1.2
# A layer too small for its share still gets this, per thread.
FLOOR = 32 << 10
# The scratch is rounded up to a page; the output's tensor and heap headers take under 3 KB.
SLACK = 7 << 10
CALLS_UNTIL_KEPT = 2

BASE = ConvCase(n=1, density=0.1, bias=False)
STRIDED: dict[str, Any] = {"stride": (2, 2)}
LAYERS = [
    BASE.but(c=64, k=64, h=56, w=56),
    BASE.but(c=128, k=128, h=28, w=28),
    BASE.but(c=256, k=256, h=14, w=14),
    BASE.but(c=512, k=512, h=7, w=7),
    BASE.but(c=256, k=64, h=56, w=56, **POINTWISE),
    BASE.but(c=1024, k=256, h=14, w=14, **POINTWISE),
    BASE.but(c=512, k=2048, h=7, w=7, **POINTWISE),
    BASE.but(c=128, k=128, h=56, w=56, **STRIDED),
]


class _Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns; malloc(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def in_use() -> int:
    """Bytes that are allocated now: all heaps of the process and blocks mapped on their own."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def excess_of_a_block(size: int) -> int:
    """How much more than its size a tensor's memory adds to what is in use."""
    before = in_use()
    block = torch.empty(size, dtype=torch.uint8)
    return in_use() - before - block.numel()


@pytest.fixture(autouse=True)
def allocator_that_counts(threads: None) -> None:
    """One thread, no garbage collection in between, and an allocator that tells."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    torch.set_num_threads(1)
    gc.collect()
    if min(excess_of_a_block(1 << 22) for _ in range(3)) not in range(SLACK):
        pytest.skip("another allocator serves torch")


def call(problem: Problem) -> Tensor:
    y: Tensor = torch.ops.sparsecnn.csr_conv2d.default(*op_args(problem))
    return y


@functools.cache
def _empty() -> Problem:
    return build(BASE.but(n=0))


def in_new_thread(work: Callable[[], int], threads: int = 1) -> int:
    """The result of `work` in a thread that has no scratch yet, and one for its arithmetic."""
    found: list[int] = []

    def run() -> None:
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        call(_empty())  # what torch and the op allocate once in each thread; takes no scratch
        found.append(work())

    thread = threading.Thread(target=run)
    gc.collect()
    gc.disable()
    try:
        thread.start()
        thread.join()
    finally:
        gc.enable()
    assert found, "the thread failed"
    return found[0]


def growth_of_a_call(problem: Problem) -> int:
    """Bytes that a call leaves allocated while its output lives; scratch is kept by the thread."""
    before = in_use()
    y = call(problem)
    grown = in_use() - before
    assert y.numel() > 0
    return grown


def size_of(t: Tensor) -> int:
    return t.numel() * t.element_size()


def measured(problem: Problem, threads: int = 1) -> tuple[int, int, int]:
    """Bytes of input, of output and of the scratch of a new thread's first call."""
    torch.set_num_threads(threads)
    for _ in range(CALLS_UNTIL_KEPT + 1):  # the weight's copy is not scratch
        y = call(problem)
    out = size_of(y)
    del y
    grown = in_new_thread(lambda: growth_of_a_call(problem), threads)
    return size_of(problem.x), out, grown - out


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.id)
def test_scratch_stays_in_its_share(layer: ConvCase, layout: str, isa: str) -> None:
    into, out, scratch = measured(build(layer.but(layout=layout)))
    assert scratch >= 4096, "no scratch seen: the test shows nothing"
    bound = SHARE * (into + out) - out
    assert scratch <= bound + SLACK, (
        f"{isa}: {scratch} bytes of scratch, at most {bound:.0f}: "
        f"{(scratch + out) / (into + out):.3f} of input and output"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS[1:6:2], ids=lambda layer: layer.id)
def test_scratch_of_other_types(layer: ConvCase, dtype: torch.dtype, isa: str) -> None:
    into, out, scratch = measured(build(layer.but(dtype=dtype)))
    assert scratch <= max(SHARE * (into + out) - out, FLOOR) + SLACK


@pytest.mark.parametrize("layer", LAYERS[:8:3], ids=lambda layer: layer.id)
def test_two_threads_share_the_scratch(layer: ConvCase, isa: str) -> None:
    into, out, scratch = measured(build(layer), threads=2)
    assert scratch <= max(SHARE * (into + out) - out, 2 * FLOOR) + SLACK


def test_tiny_layers_stay_at_the_floor(isa: str) -> None:
    layer = BASE.but(c=16, k=16, h=7, w=7)
    assert measured(build(layer))[2] <= FLOOR + SLACK


def test_scratch_is_kept_and_given_back(isa: str) -> None:
    """More calls take no more; a smaller layer takes none; the end of a thread returns it."""
    large, small = build(LAYERS[1]), build(BASE.but(c=64, k=64, h=14, w=14))
    scratch = measured(large)[2]
    for _ in range(CALLS_UNTIL_KEPT + 1):
        call(small)

    def more_calls() -> int:
        call(large)
        before = in_use()
        for _ in range(5):
            call(large)
            call(small)
        return in_use() - before

    in_new_thread(more_calls)  # what the interpreter keeps of a first time
    before = in_use()
    for _ in range(4):
        assert in_new_thread(more_calls) <= SLACK
    # Four threads that keep theirs would hold four times the scratch. The last one may still be
    # on its way out: Python joins a thread before the system has taken down its storage.
    assert in_use() - before < 2 * scratch


@pytest.mark.parametrize("op", ["csr_conv2d", "csr_conv2d_grad_values"])
@pytest.mark.parametrize("case", [BASE, BASE.but(bias=True, residual=True, activation="hardswish")])
def test_calls_leave_nothing_behind(case: ConvCase, op: str) -> None:
    """Neither the op nor the conversion of its arguments: a service makes millions of calls."""
    problem = build(case)
    grad_y = torch.ones(case.n, case.k, *case.out_size)
    args = op_args(problem) if op == "csr_conv2d" else grad_values_args(problem, grad_y)
    function = getattr(torch.ops.sparsecnn, op).default
    calls = 2000
    for _ in range(100):
        function(*args)
    before = in_use()
    for _ in range(calls):
        function(*args)
    assert (in_use() - before) / calls < 8, "bytes per call"


@pytest.mark.parametrize("layer", [BASE.but(c=32, k=64, h=28, w=28), LAYERS[2].but(c=64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scratch_of_few_channels(layer: ConvCase, dtype: torch.dtype, isa: str) -> None:
    """A panel of all channels is not a reason to take more than the share."""
    into, out, scratch = measured(build(layer.but(dtype=dtype)))
    assert scratch <= max(SHARE * (into + out) - out, FLOOR) + SLACK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def check_the_copy_of_a_weight(dtype: torch.dtype, isa: str) -> None:
    """At most 16 bytes per entry and small tables, however often and with whatever it is called.

    Nothing is kept of contents that were seen once, which is what training shows.
    """
    problem = build(LAYERS[3].but(density=0.05, dtype=dtype))
    call(problem)  # the scratch is there
    tables = 256 << 10
    fresh = dataclasses.replace(problem, values=problem.values.clone())
    before = in_use()
    for _ in range(5):
        fresh.values.mul_(-1).add_(1)
        call(fresh)
    unkept = in_use() - before
    assert unkept <= fresh.nnz, "contents seen once were kept"  # a copy has 8 bytes per entry
    for _ in range(5):
        call(fresh)
    kept = in_use() - before
    entry = 16 if dtype == torch.float64 else 8
    assert kept >= entry * fresh.nnz / 2, "no copy seen: the test shows nothing"
    assert kept <= 16 * fresh.nnz + tables
    if dtype != torch.float64:
        assert kept <= 8 * fresh.nnz + tables


def test_copies_in_a_fresh_process() -> None:
    """Behind other tests the cache of programs may be full: a new copy then replaces old ones."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", root, "-v"]
    command += ["-o", "python_functions=check_*", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout
    assert "collected 9 items" in done.stdout, done.stdout
