"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

`python -m tests.cuda_resources` compiles all of csrc/cuda and writes the table that
`tests/test_cuda_compile.py` compares with; with `--check LOG` it compares a build that has been
made. Runs no kernel and needs no GPU, only nvcc.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
TABLE = CUDA / "resources.tsv"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xptxas -v,-warn-spills -c".split()
COLUMNS = ("kernel", *(f"registers {a}" for a in ARCHITECTURES), "static smem bytes", "spill bytes")


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


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    smem_bytes: int


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, CUDA_PATH or PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable, "/nonexistent")) / "bin" / "nvcc"
        if nvcc.exists():
            return str(nvcc)
    return shutil.which("nvcc")


def nvcc_version(nvcc: str) -> str:
    """Such as "13.0, V13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (.*)", text)
    assert found, text
    return found[1].strip()


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


def compile_usage(nvcc: str, source: Path) -> list[Usage]:
    """Compile one file for every architecture, with warnings as errors.

    Raises:
        AssertionError: it does not compile; with the compiler's output.
    """
    targets = []
    for architecture in ARCHITECTURES:
        virtual = architecture.replace("sm_", "compute_")
        targets += ["-gencode", f"arch={virtual},code={architecture}"]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [nvcc, *FLAGS, *targets, f"-I{CUDA.parent}", str(source), "-o", f"{folder}/out.o"],
            capture_output=True,
            text=True,
        )
    log = run.stdout + run.stderr
    assert run.returncode == 0, log
    return parse_usage(log)


def readable(mangled: Iterable[str]) -> list[str]:
    """Names with their template arguments, without namespaces and parameters."""
    text = "\n".join(mangled)
    run = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True)
    names = []
    for line in run.stdout.splitlines():
        name = re.sub(r"sparsecnn::cuda::|\(anonymous namespace\)::|sparsecnn::", "", line)
        name = name.removeprefix("void ").replace("__nv_bfloat16", "bfloat16")
        names.append(name.replace("__half", "half").split("(", 1)[0])
    return names


def rows_of(usage: Iterable[Usage]) -> list[str]:
    """A line of the table for each kernel."""
    usage = list(usage)
    by_name: dict[str, dict[str, Usage]] = {}
    for name, u in zip(readable(u.kernel for u in usage), usage, strict=True):
        by_name.setdefault(name, {})[u.architecture] = u
    rows = []
    for name, found in sorted(by_name.items()):
        assert set(found) == set(ARCHITECTURES), f"{name}: compiled for {sorted(found)} only"
        registers = [str(found[a].registers) for a in ARCHITECTURES]
        smem = max(u.smem_bytes for u in found.values())
        spills = max(u.spill_bytes for u in found.values())
        rows.append("\t".join([name, *registers, str(smem), str(spills)]))
    return rows


def committed_table() -> tuple[str, list[str]]:
    """The compiler's version and the rows of the committed table."""
    head, columns, *rows = TABLE.read_text().splitlines()
    assert columns == "\t".join(COLUMNS)
    found = re.match(r"# nvcc (.*);", head)
    assert found, head
    return found[1], rows


def check_usage(usage: Sequence[Usage], version: str) -> None:
    """Compare some kernels with their budgets and with the committed table.

    Raises:
        AssertionError: a spill, too many registers, an architecture that is missing, or another
            row in the table.
    """
    found = {u.architecture for u in usage}
    assert found == set(ARCHITECTURES), f"expected {ARCHITECTURES}, got {sorted(found)}"
    for u in usage:
        assert u.spill_bytes == 0 and u.stack_bytes == 0, u
        budgets = [limit for pattern, limit in BUDGETS.items() if re.search(pattern, u.kernel)]
        assert len(budgets) == 1, f"expected one register budget for {u.kernel}, got {budgets}"
        assert u.registers <= budgets[0], u
    # Another compiler may need another register or two, but has the same kernels.
    of_table, committed = committed_table()
    rows = rows_of(usage)
    names = {row.split("\t")[0] for row in rows}
    want = {row for row in committed if row.split("\t")[0] in names}
    remedy = f"{TABLE.name} is out of date; run `python -m tests.cuda_resources`"
    assert {row.split("\t")[0] for row in want} == names, f"expected the same kernels: {remedy}"
    assert version != of_table or set(rows) == want, remedy


def check_log(log: str, version: str) -> int:
    """Check the output of a whole build with ``-Xptxas -v``; returns the number of kernels.

    Raises:
        AssertionError: see `check_usage`, or a kernel of the table is not in the log.
    """
    usage = parse_usage(log)
    check_usage(usage, version)
    missing = {row.split("\t")[0] for row in committed_table()[1]} - set(
        readable(u.kernel for u in usage)
    )
    assert not missing, f"expected all kernels of {TABLE.name} in the log, got none of {missing}"
    return len(usage)


def main() -> None:
    """Write the table, or compare a build with it."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_resources", description=__doc__)
    parser.add_argument(
        "--check", type=Path, metavar="LOG",
        help="compare the output of a build under NVCC_APPEND_FLAGS='-Xptxas -v' instead",
    )  # fmt: skip
    options = parser.parse_args()
    nvcc = find_nvcc()
    assert nvcc is not None, "expected nvcc in CUDA_HOME, CUDA_PATH or PATH"
    if options.check:
        count = check_log(options.check.read_text(), nvcc_version(nvcc))
        print(f"{count} kernels within their budgets, as in {TABLE.name}")
        return
    lines = [f"# nvcc {nvcc_version(nvcc)}; shared memory that launchers ask for is not counted"]
    lines.append("\t".join(COLUMNS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for usage in pool.map(functools.partial(compile_usage, nvcc), sorted(CUDA.glob("*.cu"))):
            lines += rows_of(usage)
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{TABLE}: {len(lines) - 2} kernels")


if __name__ == "__main__":
    main()
