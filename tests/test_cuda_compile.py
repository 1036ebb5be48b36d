"""Every CUDA file compiles for sm_80 and sm_90a: no warning, no spill, within its registers.

Runs no kernel and needs no GPU, only nvcc (the packages nvidia-cuda-nvcc, -crt, -nvvm, -runtime and
-cccl contain one).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_resources import (
    ARCHITECTURES,
    COLUMNS,
    CUDA,
    TABLE,
    Usage,
    check_log,
    check_usage,
    committed_table,
    compile_usage,
    find_nvcc,
    nvcc_version,
    parse_usage,
)

NVCC = find_nvcc()
SOURCES = sorted(CUDA.glob("*.cu"))
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME, CUDA_PATH or PATH")


def test_parser_reads_ptxas() -> None:
    log = """ptxas info    : Compiling entry function '_Z1kIfEvv' for 'sm_80'
ptxas info    : Function properties for _Z1kIfEvv
    8 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 4096 bytes smem, 824 bytes cmem[0]
"""
    assert parse_usage(log) == [Usage("_Z1kIfEvv", "sm_80", 64, 44, 8, 4096)]


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[Path, Future[list[Usage]]]]:
    """Every file being compiled, on all cores."""
    assert NVCC is not None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {source: pool.submit(compile_usage, NVCC, source) for source in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_within_budget(
    source: Path, compilations: dict[Path, Future[list[Usage]]]
) -> None:
    assert NVCC is not None
    usage = compilations[source].result()
    if "__global__" not in source.read_text():
        assert usage == []
        return
    check_usage(usage, nvcc_version(NVCC))


def test_check_finds_what_is_wrong() -> None:
    version, rows = committed_table()
    (row,) = [row for row in rows if row.startswith("csr_conv2d_direct<float>\t")]
    good = [
        Usage("_Z17csr_conv2d_directIfEvv", architecture, int(count), 0, 0, 0)
        for architecture, count in zip(ARCHITECTURES, row.split("\t")[1:3], strict=True)
    ]
    check_usage(good, version)

    def changed(**change: Any) -> list[Usage]:
        return [dataclasses.replace(usage, **change) for usage in good]

    for wrong, message in (
        (changed(registers=129), "registers=129"),
        (changed(spill_bytes=8), "spill_bytes=8"),
        (changed(stack_bytes=8), "stack_bytes=8"),
        (changed(kernel="_Z1kIfEvv"), "one register budget"),
        (changed(kernel="_Z17csr_conv2d_directIcEvv"), "the same kernels"),
        (changed(registers=good[0].registers + 1), "is out of date"),
        (good[:1], r"got \['sm_80'\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_usage(wrong, version)
    check_usage(changed(registers=good[0].registers + 1), "another compiler")
    log = """ptxas info    : Compiling entry function '_Z17csr_conv2d_directIfEvv' for '{}'
ptxas info    : Function properties for _Z17csr_conv2d_directIfEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used {} registers
"""
    whole = "".join(log.format(usage.architecture, usage.registers) for usage in good)
    with pytest.raises(AssertionError, match=r"expected all kernels of .* in the log"):
        check_log(whole, version)


def test_the_table_has_no_spill_and_no_kernel_that_is_gone() -> None:
    sources = "".join(path.read_text() for path in CUDA.glob("*.cu*"))
    _, rows = committed_table()
    assert len({row.split("\t")[0] for row in rows}) == len(rows) > 20
    for row in rows:
        kernel, *numbers = row.split("\t")
        assert len(numbers) == len(COLUMNS) - 1 and numbers[-1] == "0", row
        name = kernel.split("<")[0].split("::")[-1]
        assert re.search(rf"\b{name}\b", sources), f"{name} is in {TABLE.name} only"


def test_kernels_include_no_torch() -> None:
    for path in CUDA.iterdir():
        for include in re.findall(r'#include ["<]([^">]+)', path.read_text()):
            local = include.startswith(("core/", "cuda/"))
            system = re.fullmatch(r"cuda_\w+\.h|cstdint|cstddef", include)
            assert local or system, f"{path.name} includes {include}"
