"""Every CUDA file compiles for sm_80 and sm_90a: no warning, no spill, within its registers.

Runs no kernel and needs no GPU, only nvcc (the packages nvidia-cuda-nvcc, -crt, -nvvm, -runtime and
-cccl contain one).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_resources import (
    ARCHITECTURES,
    COLUMNS,
    CUDA,
    TABLE,
    Usage,
    compile_usage,
    find_nvcc,
    nvcc_version,
    parse_usage,
    rows_of,
)

# Most registers a thread may take, by kernel: 65536 over the threads that are meant to share an
# SM. The tiled convolution has two blocks, of 256 threads the largest and of 512 the others.
BUDGETS = {
    r"csr_conv2d_tiledI.*Li2ELi32ELi4ELi8E": 128,
    r"csr_conv2d_tiledI.*Li1ELi(32|16)ELi2ELi16E": 64,
    r"csr_conv2d_directI": 128,
    r"csr_conv2d_grad_values_kernelI": 128,
    # Blocks of 256 threads, two of them to an SM at least.
    r"depthwise_conv2d_(planes|channels|direct)I": 128,
    r"pointwise_conv2d_tiledI": 128,
    # Of the sums, 64 x 64 a warp, 128 lie in registers: 256 threads to an SM. Of the small tile 32.
    r"pattern_conv2d_2_4_gemmI.*(4WideE|6MiddleE)": 255,
    r"pattern_conv2d_2_4_gemmI.*5SmallE": 128,
    r"pattern_conv2d_2_4_(pack|sum)": 64,
    # 512, 768 or 1024 threads to an SM by the sums of a thread; on tensor cores 256 or 384.
    r"pattern_conv2d_tiledI.*Li8ELi8ELi1ELi8E": 128,
    r"pattern_conv2d_tiledI.*(Li4ELi4ELi1ELi8E|Li1ELi4ELi1ELi4E|Li4ELi1ELi4ELi8E)": 80,
    r"pattern_conv2d_tiledI.*Li1ELi1ELi1ELi8E": 64,
    r"pattern_conv2d_directI": 128,
    r"pattern_conv2d_mmaI.*MmaShapeILi4E": 255,
    r"pattern_conv2d_mmaI.*MmaShapeILi[12]E": 168,
    # Two blocks of 256 or of 192 (m = 4) threads; blocks of 512, or two of 256.
    r"winograd_conv2d_denseI.*Li2ELi": 128,
    r"winograd_conv2d_denseI.*Li4ELi": 168,
    r"winograd_conv2d_(mma|sparse)I": 128,
    # The same; and with twice the sums one block to an SM.
    r"chain_conv2d_fusedI.*Li4EE": 128,
    r"chain_conv2d_fusedI.*Li8EE": 255,
    r"chain_conv2d_directI": 128,
}


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
    assert {u.architecture for u in usage} == set(ARCHITECTURES)
    for u in usage:
        print(f"{u.architecture} {u.kernel}: {u.registers} registers, {u.smem_bytes} bytes smem")
        assert u.spill_bytes == 0 and u.stack_bytes == 0, u
        budgets = [limit for pattern, limit in BUDGETS.items() if re.search(pattern, u.kernel)]
        assert len(budgets) == 1, f"expected one register budget for {u.kernel}, got {budgets}"
        assert u.registers <= budgets[0], u
    # Another compiler may need another register or two, but has the same kernels.
    version, committed = committed_table()
    names = {row.split("\t")[0] for row in rows_of(usage)}
    want = {row for row in committed if row.split("\t")[0] in names}
    if version == nvcc_version(NVCC):
        remedy = "run `python -m tests.cuda_resources`"
        assert set(rows_of(usage)) == want, f"{TABLE.name} is out of date; {remedy}"
    else:
        assert {row.split("\t")[0] for row in want} == names


def committed_table() -> tuple[str, list[str]]:
    """The compiler's version and the rows of the committed table."""
    head, columns, *rows = TABLE.read_text().splitlines()
    assert columns == "\t".join(COLUMNS)
    found = re.match(r"# nvcc (.*);", head)
    assert found, head
    return found[1], rows


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
