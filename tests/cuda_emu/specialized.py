"""Generated kernels of the specialized csr_conv2d, built for the emulator and called on problems.

Many sources become one library: each is included in a namespace of its own.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.ops._csr_source import Source, generate
from sparsecnn.ops._specialized import launch_arguments, set_tensors
from tests import cases
from tests.cases import ConvCase, Problem, memory_format
from tests.cuda_emu import emulator

_BASE = ConvCase(n=2, c=5, h=9, w=8, k=9, density=0.3, integers=True)
_ONE: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0, 0, 0)}
# One source each; together they have every kind of generated code.
WEIGHTS = {
    "3x3": _BASE,
    "slabs": _BASE.but(c=7, k=70),
    "chunks": _BASE.but(c=150, density=0.05),
    "groups": _BASE.but(c=6, k=18, groups=2),
    "pointwise": _BASE.but(c=70, k=140, **_ONE),
    "strided": _BASE.but(stride=(2, 2), k=17, c=12),
    "dilated": _BASE.but(dilation=(2, 3), padding=(2, 2, 3, 3)),
    "1x7": _BASE.but(kernel=(1, 7), padding=(0, 0, 3, 3), stride=(1, 3), dilation=(1, 2), w=25),
    "7x1": _BASE.but(kernel=(7, 1), padding=(3, 3, 0, 0), stride=(3, 1)),
    "2x4": _BASE.but(kernel=(2, 4), stride=(3, 2), padding=(1, 1, 2, 2)),
    "strided pointwise": _BASE.but(stride=(5, 4), **_ONE),
    "empty rows": _BASE.but(pattern="some_empty_rows", k=20),
    "one row": _BASE.but(pattern="one_full_row", k=140, **_ONE),
    "half": _BASE.but(dtype=torch.float16),
    "bfloat16": _BASE.but(dtype=torch.bfloat16),
}
SANITIZED = ("3x3", "2x4", "bfloat16")

_HEAD = """
#include <exception>
#include <string>
#include "cuda_emu.h"
static std::string text;
extern "C" const char* message() { return text.c_str(); }
"""
# One kernel behind a C interface; what the emulator objects to becomes a message.
_KERNEL = """
namespace kernel{index} {{
#include "{file}"
}}
extern "C" int run{index}(const void* args, unsigned grid, unsigned threads, size_t smem_bytes) {{
  try {{
    emu::launch("specialized", grid, threads, smem_bytes, [&] {{
      kernel{index}::csr_conv2d_specialized(*static_cast<const kernel{index}::Args*>(args));
    }});
    return 0;
  }} catch (const std::exception& e) {{
    text = e.what();
    return -1;
  }}
}}
extern "C" size_t size{index}() {{ return sizeof(kernel{index}::Args); }}
"""


def weight_of(problem: Problem) -> CSRWeight:
    """The packed weight of a problem."""
    arrays = problem.values, problem.col_idx, problem.row_ptr
    return CSRWeight(*arrays, problem.case.weight_shape)


def source_of(problem: Problem, most_filters: int | None = None) -> Source:
    """The generated source of a problem's weight."""
    case = problem.case
    return generate(
        weight_of(problem), case.stride, case.dilation, case.groups, most_filters=most_filters
    )


def build(
    folder: Path,
    sources: Sequence[Source],
    edits: Sequence[tuple[str, str]] | None = None,
    flags: tuple[str, ...] = emulator.QUICK,
) -> Path:
    """Compile kernels into one library.

    Args:
        folder: for the files.
        sources: what to compile.
        edits: (text, replacement) for each source, in which the text must occur: this is how the
            tests plant faults.
        flags: of the compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for index, source in enumerate(sources):
        text = source.text
        if edits:
            assert edits[index][0] in text, edits[index]
            text = text.replace(*edits[index])
        (folder / f"{index}.h").write_text(text)
        parts.append(_KERNEL.format(index=index, file=folder / f"{index}.h"))
    (folder / "all.cpp").write_text("".join(parts))
    return emulator.build_one(folder / "all.cpp", flags)


class Kernels:
    """The kernels of a library that `build` made, called by index."""

    def __init__(self, library: Path, sources: Sequence[Source]) -> None:
        self.sources = sources
        self._lib = ctypes.CDLL(str(library))
        self._lib.message.restype = ctypes.c_char_p

    def raw(self, index: int, args: Any, grid: int | None = None) -> None:
        """Run a kernel on complete arguments.

        Args:
            index: of the source.
            args: `Args` of the kernel.
            grid: blocks, instead of one for each tile and slab.

        Raises:
            RuntimeError: what the emulator objects to.
        """
        source = self.sources[index]
        size = getattr(self._lib, f"size{index}")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(args)
        run = getattr(self._lib, f"run{index}")
        run.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t]
        blocks = min(grid or args.work, args.work)
        if run(ctypes.addressof(args), blocks, source.threads, source.smem_bytes):
            raise RuntimeError(self._lib.message().decode())

    def __call__(self, index: int, problem: Problem, grid: int | None = None) -> Tensor:
        """Run a kernel on a problem that fits the weight; the output starts as NaN."""
        case, order = problem.case, memory_format(problem.x)
        y = torch.full((case.n, case.k, *case.out_size), float("nan"), dtype=case.dtype)
        y = y.contiguous(memory_format=order)
        is_last = order is torch.channels_last
        args = launch_arguments(self.sources[index], problem.x.shape, is_last, case.padding)
        set_tensors(args, problem.x, problem.bias, problem.residual, y, case.activation)
        self.raw(index, args, grid)
        return y


def main() -> None:
    """`SANITIZED` on a library built with sanitizers; started by a test, with its path."""
    problems = [cases.build(WEIGHTS[name]) for name in SANITIZED]
    kernels = Kernels(Path(sys.argv[1]), [source_of(problem) for problem in problems])
    count = 0
    for index, name in enumerate(SANITIZED):
        for layout in ("contiguous", "channels_last"):
            for n, h, w in ((1, 1, 1), (9, 7, 7), (1, 19, 20)):
                case = WEIGHTS[name].but(n=n, h=h, w=w, layout=layout, residual=True)
                if min(case.out_size) < 1:
                    continue
                # The sanitizer guards both ends of every tensor's allocation.
                problem = cases.build(case)
                problem.check(kernels(index, problem))
                count += 1
    print(f"{count} cases passed")


if __name__ == "__main__":
    main()
