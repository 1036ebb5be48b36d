"""Build of the native libraries, by one ninja file written here.

Three kinds of source, kept apart: kernels (``csrc/cpu``, ``csrc/cuda``: no torch header), glue
(``csrc/ops``: stable-ABI headers only) and the numpy-facing codec (``csrc/codec``: pybind11, no
torch). Sources are found by glob, so that adding an op needs no edit here.

Environment: ``SPARSECNN_CUDA`` = auto (default: kernels when torch is a CUDA build and nvcc is
there) | 0 | 1; ``SPARSECNN_CUDA_ARCH`` = list like ``80;90a``; the usual ``CXX``, ``CXXFLAGS``,
``CUDA_HOME``, ``MAX_JOBS``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "_build"))
from backend import TORCH_REQUIREMENT, find_torch  # noqa: E402

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020A000000000000ULL"  # torch 2.10
# Every unit in csrc/cpu/kernels is compiled once per instruction set.
ISA_FLAGS = {
    "scalar": "",
    "avx2": "-DSPARSECNN_ISA_AVX2 -mavx2 -mfma -mf16c",
    # The intrinsics of GCC 12 pass an undefined register on purpose, which it then warns about.
    "avx512": "-DSPARSECNN_ISA_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
    " -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized",
}
WARNINGS = "-Wall -Wextra -Werror=return-type"


def find_nvcc() -> str | None:
    """Path of nvcc from CUDA_HOME, CUDA_PATH or PATH."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin/nvcc").exists():
            return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc")


def torch_version(torch: str) -> dict[str, object]:
    """``torch.version`` without ``import torch``, which takes seconds and has side effects."""
    namespace: dict[str, object] = {}
    exec((Path(torch) / "version.py").read_text(), namespace)
    return namespace


def quote(path: object) -> str:
    """Escape a path for a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """Collects rules and object files; ``write`` gives the build file."""

    def __init__(self, build_dir: Path, cxx: str, nvcc: str | None) -> None:
        flags = os.environ.get("CXXFLAGS", "")
        base = (
            f"-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fno-math-errno {WARNINGS} "
            f"-fmacro-prefix-map={quote(ROOT)}/= -I{quote(CSRC)} {flags}"
        )
        self.build_dir = build_dir
        self.lines = [
            f"rule cxx\n command = {cxx} -MMD -MF $out.d {base} $fl -c $in -o $out\n"
            " depfile = $out.d\n deps = gcc",
            f"rule nvcc\n command = {nvcc} -MD -MF $out.d -std=c++17 -O3 -Werror all-warnings"
            f" -Xcompiler -fPIC,-fvisibility=hidden -I{quote(CSRC)} $fl -c $in -o $out\n"
            " depfile = $out.d\n deps = gcc",
            "rule link\n command = $ld -shared $in -o $out $fl",
        ]

    def objects(
        self, folder: str, pattern: str, rule: str = "cxx", flags: str = "", prefix: str = ""
    ) -> list[str]:
        """One object per matching source, sorted so that builds are reproducible."""
        out = []
        for src in sorted((CSRC / folder).glob(pattern)):
            obj = self.build_dir / f"{prefix or folder}_{src.name}.o"
            self.lines.append(f"build {quote(obj)}: {rule} {quote(src)}\n fl = {flags}")
            out.append(quote(obj))
        return out

    def kernels(self) -> list[str]:
        """One object per CPU kernel unit and instruction set of this kind of machine."""
        names = ISA_FLAGS if os.uname().machine == "x86_64" else ("scalar",)
        out = []
        for name in names:
            out += self.objects("cpu/kernels", "*.cpp", flags=ISA_FLAGS[name], prefix=name)
        return out

    def link(self, target: Path, objects: list[str], linker: str, flags: str) -> None:
        """One shared library."""
        self.lines.append(
            f"build {quote(target)}: link {' '.join(objects)}\n ld = {linker}\n fl = {flags}"
        )

    def run(self) -> None:
        """Write the file and build, with as many jobs as this process may use cores."""
        (self.build_dir / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        ninja = shutil.which("ninja") or "ninja"
        subprocess.check_call([ninja, "-C", str(self.build_dir), "-j", jobs])


class NinjaBuild(build_ext):
    """Builds ``libsparsecnn.so`` (ops) and ``_codec`` (file formats)."""

    def run(self) -> None:
        """Configure from the environment, write the ninja file, build."""
        import pybind11

        torch, nvcc = find_torch(), find_nvcc()
        if not torch:
            raise SystemExit(
                f"sparsecnn: expected an installed {TORCH_REQUIREMENT}, got none; "
                "install torch first or set SPARSECNN_TORCH_DIR"
            )
        version = torch_version(torch)
        want = os.environ.get("SPARSECNN_CUDA", "auto")
        if want not in ("auto", "0", "1"):
            raise SystemExit(f"sparsecnn: expected SPARSECNN_CUDA auto, 0 or 1, got {want!r}")
        if want == "1" and not nvcc:
            raise SystemExit("sparsecnn: SPARSECNN_CUDA=1 but no nvcc in CUDA_HOME or PATH")
        cuda = want == "1" or (want == "auto" and bool(version["cuda"]) and bool(nvcc))
        print(f"sparsecnn: headers of torch {version['__version__']}, CUDA kernels: {cuda}")

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        ninja = NinjaFile(build_dir, cxx, nvcc)
        glue = f"-isystem {quote(torch)}/include {STABLE_ABI}"
        if cuda:
            glue += " -DSPARSECNN_CUDA"
        kernels = ninja.objects("cpu", "*.cpp") + ninja.kernels()
        ops = kernels + ninja.objects("ops", "*.cpp", flags=glue)
        linker, link_flags = cxx, f"-L{quote(torch)}/lib -ltorch_cpu"
        if cuda:
            assert nvcc is not None
            archs = os.environ.get("SPARSECNN_CUDA_ARCH", "80;90a").split(";")
            gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
            gencode += " -gencode arch=compute_80,code=compute_80 -Xfatbin -compress-all"
            ops += ninja.objects("cuda", "*.cu", rule="nvcc", flags=gencode)
            home = Path(os.path.realpath(nvcc)).parent.parent
            linker = nvcc  # brings its static runtime; -L for the layout of the pip packages
            link_flags += f" -L{quote(home)}/lib64 -L{quote(home)}/lib"
        library, codec = (Path(o).resolve() for o in self.get_outputs())
        library.parent.mkdir(parents=True, exist_ok=True)
        ninja.link(library, ops, linker, link_flags)
        python = sysconfig.get_path("include")
        codec_flags = f"-isystem {quote(python)} -isystem {quote(pybind11.get_include())}"
        ninja.link(codec, ninja.objects("codec", "*.cpp", flags=codec_flags), cxx, "")
        ninja.run()

    def get_outputs(self) -> list[str]:
        """Paths of both libraries, beside the package's Python files."""
        codec = Path(self.get_ext_fullpath("sparsecnn._codec"))
        return [str(codec.with_name("libsparsecnn.so")), str(codec)]

    def copy_extensions_to_source(self) -> None:
        """Ninja already wrote to the in-place paths of an editable install."""


setup(ext_modules=[Extension("sparsecnn._codec", [])], cmdclass={"build_ext": NinjaBuild})
