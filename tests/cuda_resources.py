"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

`python -m tests.cuda_resources` compiles all of csrc/cuda and writes the table that
`tests/test_cuda_compile.py` compares with. Runs no kernel and needs no GPU, only nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
TABLE = CUDA / "resources.tsv"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xptxas -v,-warn-spills -c".split()
COLUMNS = ("kernel", *(f"registers {a}" for a in ARCHITECTURES), "static smem bytes", "spill bytes")


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


def main() -> None:
    """Write the table."""
    nvcc = find_nvcc()
    assert nvcc is not None, "expected nvcc in CUDA_HOME, CUDA_PATH or PATH"
    lines = [f"# nvcc {nvcc_version(nvcc)}; shared memory that launchers ask for is not counted"]
    lines.append("\t".join(COLUMNS))
    for source in sorted(CUDA.glob("*.cu")):
        lines += rows_of(compile_usage(nvcc, source))
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{TABLE}: {len(lines) - 2} kernels")


if __name__ == "__main__":
    main()
