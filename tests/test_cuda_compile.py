"""Every CUDA file compiles for sm_80 and sm_90a: no warning, no spill, within its registers.

Runs no kernel and needs no GPU, only nvcc (the packages nvidia-cuda-nvcc, -crt, -nvvm, -runtime and
-cccl contain one).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xptxas -v,-warn-spills -c".split()

# Most registers a thread may take, by kernel: 65536 over the threads that are meant to share an
# SM. The tiled convolution has blocks of 256 threads, two, three or four of them by its sums.
BUDGETS = {
    r"csr_conv2d_tiledI.*Li8ELi4ELi8E": 128,
    r"csr_conv2d_tiledI.*Li4ELi2ELi8E": 80,
    r"csr_conv2d_tiledI.*Li2ELi1ELi8E": 64,
    r"csr_conv2d_directI": 128,
    r"csr_conv2d_grad_values_kernelI": 128,
    # Blocks of 256 threads, two of them to an SM at least.
    r"depthwise_conv2d_(planes|channels|direct)I": 128,
    # 512, 768 or 1024 threads to an SM by the sums of a thread; on tensor cores 256 or 384.
    r"pattern_conv2d_tiledI.*Li8ELi8ELi1ELi8E": 128,
    r"pattern_conv2d_tiledI.*(Li4ELi4ELi1ELi8E|Li1ELi4ELi1ELi4E|Li4ELi1ELi4ELi8E)": 80,
    r"pattern_conv2d_tiledI.*Li1ELi1ELi1ELi8E": 64,
    r"pattern_conv2d_directI": 128,
    r"pattern_conv2d_mmaI.*MmaShapeILi4E": 255,
    r"pattern_conv2d_mmaI.*MmaShapeILi[12]E": 168,
}


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, CUDA_PATH or PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable, "/nonexistent")) / "bin" / "nvcc"
        if nvcc.exists():
            return str(nvcc)
    return shutil.which("nvcc")


NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME, CUDA_PATH or PATH")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    smem_bytes: int


def parse_usage(log: str) -> list[Usage]:
    """The kernels in the output of ``-Xptxas -v``; their names are mangled."""
    found = []
    entries = re.split(r"Compiling entry function '", log)[1:]
    for entry in entries:
        head = re.match(r"(\w+)' for '(\w+)'", entry)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert head and stack and registers, entry
        smem = re.search(r"(\d+) bytes smem", entry)
        found.append(
            Usage(
                kernel=head[1],
                architecture=head[2],
                registers=int(registers[1]),
                spill_bytes=int(stack[2]) + int(stack[3]),
                stack_bytes=int(stack[1]),
                smem_bytes=int(smem[1]) if smem else 0,
            )
        )
    return found


def test_parser_reads_ptxas() -> None:
    log = """ptxas info    : Compiling entry function '_Z1kIfEvv' for 'sm_80'
ptxas info    : Function properties for _Z1kIfEvv
    8 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 4096 bytes smem, 824 bytes cmem[0]
"""
    assert parse_usage(log) == [Usage("_Z1kIfEvv", "sm_80", 64, 44, 8, 4096)]


@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda p: p.stem)
def test_compiles_within_budget(source: Path, tmp_path: Path) -> None:
    assert NVCC is not None
    targets = []
    for architecture in ARCHITECTURES:
        virtual = architecture.replace("sm_", "compute_")
        targets += ["-gencode", f"arch={virtual},code={architecture}"]
    run = subprocess.run(
        [NVCC, *FLAGS, *targets, f"-I{CUDA.parent}", str(source), "-o", str(tmp_path / "out.o")],
        capture_output=True,
        text=True,
    )
    log = run.stdout + run.stderr
    assert run.returncode == 0, log
    usage = parse_usage(log)
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


def test_kernels_include_no_torch() -> None:
    for path in CUDA.iterdir():
        for include in re.findall(r'#include ["<]([^">]+)', path.read_text()):
            local = include.startswith(("core/", "cuda/"))
            system = re.fullmatch(r"cuda_\w+\.h|cstdint|cstddef", include)
            assert local or system, f"{path.name} includes {include}"
