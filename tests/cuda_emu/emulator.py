"""Builds the CUDA kernels for the host emulator and calls their launchers through ctypes.

The library is the product's own ``csrc/cuda/*.cu``, compiled by the host compiler with
``CUDA_EMU`` defined (see ``cuda_emu.h``). Needs g++ and no CUDA toolkit.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cases import Problem, memory_format
from tests.ops import pattern
from tests.ops.winograd import WinogradProblem

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
CXX = shutil.which("g++")

_FLAGS = (
    "-std=c++17 -g1 -DCUDA_EMU -fPIC -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas"
).split()
OPTIMIZED = ("-O1",)
# Without optimization the sanitizers' checks compile in half the time.
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
QUICK = ("-O0",)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
_SHAPE_FIELDS = "n c h w k r s p q stride_h stride_w pad_top pad_left dil_h dil_w groups".split()


class ConvShape(ctypes.Structure):
    """Mirror of ``core/conv_shape.h``."""

    _fields_ = [(name, ctypes.c_int64) for name in _SHAPE_FIELDS]


class ConvParams(ctypes.Structure):
    """Mirror of ``ConvParams`` in ``core/params.h``."""

    _fields_ = [
        ("shape", ConvShape),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


class ForwardParams(ConvParams):
    """Mirror of ``CsrConv2dParams``."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("col_idx", ctypes.c_void_p),
        ("row_ptr", ctypes.c_void_p),
    ]


class DepthwiseParams(ConvParams):
    """Mirror of ``DepthwiseConv2dParams``."""

    _fields_ = [("weight", ctypes.c_void_p)]


class PatternParams(ConvParams):
    """Mirror of ``PatternConv2dParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in pattern.NAMES),
        ("filter_groups", ctypes.c_int64),
    ]


class WinogradParams(ConvParams):
    """Mirror of ``WinogradConv2dParams``."""

    _fields_ = [
        ("tile", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("col_idx", ctypes.c_void_p),
        ("row_ptr", ctypes.c_void_p),
    ]


class PointwiseParams(ConvParams):
    """Mirror of ``PointwiseConv2dParams``."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64 * 2),
        ("allow_tf32", ctypes.c_bool),
    ]


class GradParams(ctypes.Structure):
    """Mirror of ``CsrConv2dGradValuesParams``."""

    _fields_ = [
        ("shape", ConvShape),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p),
        ("col_idx", ctypes.c_void_p),
        ("row_ptr", ctypes.c_void_p),
        ("grad_values", ctypes.c_void_p),
    ]


def build(
    output: Path,
    *,
    flags: tuple[str, ...] = OPTIMIZED,
    edits: Edits | None = None,
) -> Path:
    """Compile harness and kernels into one shared library.

    Args:
        output: path of the library; its folder takes edited copies of the sources.
        flags: optimization and sanitizers.
        edits: {file name: (text, replacement), or several}; the text must occur exactly once. Only
            a copy is edited: this is how the tests plant faults.

    Returns:
        `output`.
    """
    edits = edits or {}
    folder = output.parent / (output.stem + "_src")
    for name, pairs in edits.items():
        source = (CSRC / "cuda" / name).read_text()
        for text, replacement in pairs if isinstance(pairs, list) else [pairs]:
            assert source.count(text) == 1, f"{name}: {source.count(text)} times {text!r}"
            source = source.replace(text, replacement)
        (folder / "cuda").mkdir(parents=True, exist_ok=True)
        (folder / "cuda" / name).write_text(source)

    def compiled(path: Path) -> Path:
        if path.name not in edits and not _includes(path, edits):
            return _sound_object(path, flags)
        copy = folder / "cuda" / path.name
        source_path = copy if copy.exists() else path
        return _compile(source_path, output.parent / f"{path.stem}.o", flags, folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = (HERE / "harness.cpp", *sorted((CSRC / "cuda").glob("*.cu")))
        objects = list(pool.map(compiled, sources))
    _run(*flags, "-shared", *map(str, objects), "-o", str(output))
    return output


_MIRRORS: dict[str, type[ctypes.Structure]] = {
    "params": ForwardParams,
    "depthwise_params": DepthwiseParams,
    "pattern_params": PatternParams,
    "winograd_params": WinogradParams,
    "pointwise_params": PointwiseParams,
}
Edits = Mapping[str, "tuple[str, str] | list[tuple[str, str]]"]


def build_faulty(folder: Path, faults: Mapping[str, Edits]) -> dict[str, Future[Path]]:
    """A library for each planted fault, being built on all cores while the first are in use.

    Args:
        folder: where they go.
        faults: name -> edits, as `build` takes them.
    """
    build(folder / "sound.so", flags=QUICK)  # what all of them share
    pool = ThreadPoolExecutor(os.cpu_count())
    libraries = {}
    for number, (name, edits) in enumerate(faults.items()):
        own = folder / str(number)
        own.mkdir()
        libraries[name] = pool.submit(build, own / "faulty.so", flags=QUICK, edits=edits)
    pool.shutdown(wait=False)
    return libraries


def _includes(source: Path, names: Mapping[str, object]) -> bool:
    """Whether a source includes one of the product's CUDA headers, directly or not."""
    headers = re.findall(r'#include "cuda/([^"]+)"', source.read_text())
    return any(h in names or _includes(CSRC / "cuda" / h, names) for h in headers)


def _compile(source: Path, output: Path, flags: tuple[str, ...], *first: Path) -> Path:
    """One object file; folders in `first` are searched for headers before the product's."""
    include = [f"-I{folder}" for folder in (*first, CSRC, HERE)]
    _run("-x", "c++", *_FLAGS, *flags, *include, "-c", str(source), "-o", str(output))
    return output


def build_one(source: Path, flags: tuple[str, ...]) -> Path:
    """Compile one file of the tests' own into a library beside it."""
    output = source.with_suffix(".so")
    compiled = _compile(source, source.with_suffix(".o"), flags)
    _run(*flags, "-shared", str(compiled), "-o", str(output))
    return output


@functools.cache
def _objects_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cuda_emu_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _sound_object(source: Path, flags: tuple[str, ...]) -> Path:
    """The object of an unedited source, compiled once per process."""
    name = "_".join((source.stem, *flags)).replace("/", "_")
    return _compile(source, _objects_folder() / f"{name}.o", flags)


def _run(*arguments: str) -> None:
    assert CXX is not None
    done = subprocess.run([CXX, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def sanitizer_environment() -> dict[str, str]:
    """Environment for a Python process that loads a library built with `SANITIZED`."""
    assert CXX is not None
    runtimes = [
        subprocess.run(
            [CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Fibers move the stack under the sanitizer's feet: its fake stacks cannot be used. Leaks are
    # those of the interpreter.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": options}


def run_sanitized(module: str, library: Path) -> None:
    """Run a module of cases, `python -m`, on a library built with `SANITIZED`.

    Raises:
        AssertionError: a sanitizer or a case objects; with the end of what they say.
    """
    child = subprocess.run(
        [sys.executable, "-m", module, str(library)],
        env=sanitizer_environment(),
        cwd=CSRC.parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert "cases passed" in child.stdout


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Emulator:
    """The launchers of one built library, called with CPU tensors."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        for name in ("emu_message", "emu_kernel", "emu_error_string"):
            getattr(self._lib, name).restype = ctypes.c_char_p
        self._lib.emu_pattern_conv2d_2_4_workspace_bytes.restype = ctypes.c_int64
        self._lib.emu_launches.restype = ctypes.c_int64
        self._lib.emu_half_value.restype = ctypes.c_float
        for name in ("emu_half_bits", "emu_bfloat16_bits", "emu_tf32_bits"):
            getattr(self._lib, name).argtypes = [ctypes.c_float]
        for name, mirror in _MIRRORS.items():
            size = getattr(self._lib, f"emu_sizeof_{name}")
            size.restype = ctypes.c_size_t
            assert size() == ctypes.sizeof(mirror), name
        self.set_device()

    def set_device(
        self,
        sm_count: int = 4,
        smem_bytes: int = 227 * 1024,
        max_grid: int = 2**31 - 1,
        clusters: bool = True,
    ) -> None:
        """What the launchers are told about the GPU; it steers their choice of kernel.

        With `max_grid` they ask for no more blocks than that, so that blocks have to loop.
        """
        self._lib.emu_set_device(sm_count, smem_bytes, ctypes.c_int64(max_grid))
        self._lib.emu_set_clusters(int(clusters))

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._lib.emu_launches())

    @property
    def cluster(self) -> int:
        """Blocks per cluster of the last launch."""
        return int(self._lib.emu_cluster())

    @property
    def kernel(self) -> str:
        """The function that launched last, such as ``launch_tiled<float, 8, 4, 8>``."""
        text = bytes(self._lib.emu_kernel()).decode()
        found = re.search(r"launch_\w+<[^>]*>", text)
        assert found, text
        return found[0]

    def error_string(self, error: int) -> str:
        """The launchers' text of an error."""
        return bytes(self._lib.emu_error_string(error)).decode()

    def half_bits(self, value: float) -> int:
        """Bits of the stand-in for __half."""
        return int(self._lib.emu_half_bits(value)) & 0xFFFF

    def half_value(self, bits: int) -> float:
        """Value of the stand-in for __half."""
        return float(self._lib.emu_half_value(bits))

    def bfloat16_bits(self, value: float) -> int:
        """Bits of the stand-in for __nv_bfloat16."""
        return int(self._lib.emu_bfloat16_bits(value)) & 0xFFFF

    def tf32_bits(self, value: float) -> int:
        """Bits of a float32 rounded to TF32."""
        return int(self._lib.emu_tf32_bits(value)) & 0xFFFFFFFF

    def multiply(self, a: Tensor, b: Tensor, *, by_column: bool, wait: bool = True) -> Tensor:
        """A (16, 16) times B (16, 8) by one warp, in float32.

        B goes through shared memory as [column][k] if `by_column`, else as [k][column]. Without
        `wait`, the last copy into shared memory is not waited for.
        """
        a, b = a.contiguous(), (b.t() if by_column else b).contiguous()
        d = torch.empty(16, 8)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, d)]
        flags = a.dtype == torch.bfloat16, by_column, wait
        bfloat16, *others = (ctypes.c_bool(flag) for flag in flags)
        self._raise(self._lib.emu_multiply(bfloat16, *pointers[:2], *others, pointers[2]))
        return d

    def multiply_sparse(self, a: Tensor, b: Tensor, metadata: Tensor, selector: int) -> Tensor:
        """2:4 sparse A (16, 32), stored as (16, 16), times B (32, 8); metadata of each lane."""
        a, b, d = a.contiguous(), b.contiguous(), torch.empty(16, 8)
        bfloat16 = ctypes.c_bool(a.dtype == torch.bfloat16)
        a_, b_, words, d_ = (ctypes.c_void_p(t.data_ptr()) for t in (a, b, metadata, d))
        self._raise(self._lib.emu_multiply_sparse(bfloat16, a_, b_, words, selector, d_))
        return d

    def multiply_tf32(
        self, a: Tensor, b: Tensor, *, by_column: bool, rounded: bool = True
    ) -> Tensor:
        """A (16, 8) times B (8, 8) by one warp in TF32; as `multiply`.

        Without `rounded` the tensor core gets all bits of the factors.
        """
        a, b = a.contiguous(), (b.t() if by_column else b).contiguous()
        d = torch.empty(16, 8)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, d)]
        flags = [ctypes.c_bool(flag) for flag in (by_column, rounded)]
        self._raise(self._lib.emu_multiply_tf32(*pointers[:2], *flags, pointers[2]))
        return d

    def divergent_barrier(self) -> None:
        """Runs a kernel in which half of a block skips a barrier."""
        self._raise(self._lib.emu_divergent_barrier())

    def _raise(self, error: int) -> None:
        if error == -1:
            raise RuntimeError(bytes(self._lib.emu_message()).decode())
        if error:
            raise ValueError(f"cuda error {error}: {self.error_string(error)}")

    def call(self, name: str, params: ctypes.Structure) -> None:
        """The harness's function of an op on its parameter block; raises as `forward_raw`."""
        self._raise(getattr(self._lib, name)(ctypes.byref(params)))

    def number(self, name: str) -> int:
        """A number that the harness tells."""
        tells = getattr(self._lib, name)
        tells.restype = ctypes.c_int64
        return int(tells())

    def forward_raw(self, params: ForwardParams) -> None:
        """csr_conv2d on a parameter block.

        Raises:
            RuntimeError: what the emulator objects to.
            ValueError: the error that the launcher returned.
        """
        self._raise(self._lib.emu_csr_conv2d(ctypes.byref(params)))

    def grad_raw(self, params: GradParams) -> None:
        """csr_conv2d_grad_values on a parameter block; raises as `forward_raw`."""
        self._raise(self._lib.emu_csr_conv2d_grad_values(ctypes.byref(params)))

    def forward(self, problem: Problem) -> Tensor:
        """csr_conv2d; the output starts as NaN."""
        y = _poisoned(problem)
        self.forward_raw(
            ForwardParams(
                **_common(problem, y),
                values=problem.values.data_ptr(),
                col_idx=problem.col_idx.data_ptr(),
                row_ptr=problem.row_ptr.data_ptr(),
            )
        )
        return y

    def depthwise_raw(self, params: DepthwiseParams) -> None:
        """depthwise_conv2d on a parameter block; raises as `forward_raw`."""
        self._raise(self._lib.emu_depthwise_conv2d(ctypes.byref(params)))

    def depthwise(self, problem: Problem) -> Tensor:
        """depthwise_conv2d; the output starts as NaN."""
        y = _poisoned(problem)
        weight = problem.weight.to(problem.case.dtype).contiguous()
        self.depthwise_raw(DepthwiseParams(**_common(problem, y), weight=weight.data_ptr()))
        return y

    def pattern_raw(self, params: PatternParams) -> None:
        """pattern_conv2d on a parameter block; raises as `forward_raw`."""
        self._raise(self._lib.emu_pattern_conv2d(ctypes.byref(params)))

    def pattern(self, packed: pattern.PatternProblem) -> Tensor:
        """pattern_conv2d; the output starts as NaN."""
        y = _poisoned(packed.problem)
        self.pattern_raw(pattern_params(packed, y))
        return y

    def pattern_2_4_workspace(self, params: PatternParams) -> int:
        """Bytes that pattern_conv2d_2_4 wants, 0 where it does not apply."""
        return int(self._lib.emu_pattern_conv2d_2_4_workspace_bytes(ctypes.byref(params)))

    def pattern_2_4_raw(self, params: PatternParams, workspace: Tensor) -> None:
        """pattern_conv2d_2_4 on a parameter block; raises as `forward_raw`."""
        pointer = ctypes.c_void_p(workspace.data_ptr())
        self._raise(self._lib.emu_pattern_conv2d_2_4(ctypes.byref(params), pointer))

    def pattern_2_4(self, packed: pattern.PatternProblem) -> Tensor:
        """pattern_conv2d_2_4; output and workspace start as NaN."""
        y = _poisoned(packed.problem)
        params = pattern_params(packed, y)
        words = self.pattern_2_4_workspace(params) // 8
        self.pattern_2_4_raw(params, torch.full((words,), -1, dtype=torch.int64))
        return y

    def winograd_raw(self, params: WinogradParams) -> None:
        """winograd_conv2d on a parameter block; raises as `forward_raw`."""
        self._raise(self._lib.emu_winograd_conv2d(ctypes.byref(params)))

    def winograd(self, p: WinogradProblem) -> Tensor:
        """winograd_conv2d; the output starts as NaN."""
        y = _poisoned(p.problem)
        self.winograd_raw(
            WinogradParams(
                **_common(p.problem, y),
                tile=p.tile,
                values=p.values.data_ptr(),
                col_idx=pointer(p.col_idx),
                row_ptr=pointer(p.row_ptr),
            )
        )
        return y

    def pointwise_raw(self, params: PointwiseParams) -> None:
        """pointwise_conv2d on a parameter block; raises as `forward_raw`."""
        self._raise(self._lib.emu_pointwise_conv2d(ctypes.byref(params)))

    def pointwise(
        self, problem: Problem, weight: Tensor | None = None, *, tf32: bool = False
    ) -> Tensor:
        """pointwise_conv2d, with a weight of other strides if given; the output starts as NaN."""
        y = _poisoned(problem)
        weight = problem.weight if weight is None else weight
        weight = weight.to(problem.case.dtype)
        strides = (ctypes.c_int64 * 2)(*weight.stride()[:2])
        self.pointwise_raw(
            PointwiseParams(
                **_common(problem, y),
                weight=weight.data_ptr(),
                weight_stride=strides,
                allow_tf32=tf32,
            )
        )
        return y

    def grad_values(self, problem: Problem, grad_y: Tensor) -> Tensor:
        """csr_conv2d_grad_values; the result starts as NaN."""
        grad_y = grad_y.contiguous(memory_format=memory_format(problem.x))
        result = torch.full_like(problem.values, float("nan"))
        self.grad_raw(
            GradParams(
                shape=shape_of(problem),
                dtype=DTYPES[problem.case.dtype],
                layout=_layout(problem),
                x=problem.x.data_ptr(),
                grad_y=grad_y.data_ptr(),
                col_idx=problem.col_idx.data_ptr(),
                row_ptr=problem.row_ptr.data_ptr(),
                grad_values=result.data_ptr(),
            )
        )
        return result


def pattern_params(packed: pattern.PatternProblem, y: Tensor) -> PatternParams:
    """The block of a problem, which has to outlive it."""
    pointers = zip(pattern.NAMES, (array.data_ptr() for array in packed.arrays), strict=True)
    groups = packed.arrays[3].numel() - 1
    return PatternParams(**_common(packed.problem, y), **dict(pointers), filter_groups=groups)


def _poisoned(problem: Problem) -> Tensor:
    """An output of NaN in the layout of the input."""
    case = problem.case
    y = torch.full((case.n, case.k, *case.out_size), float("nan"), dtype=case.dtype)
    return y.contiguous(memory_format=memory_format(problem.x))


def _common(problem: Problem, y: Tensor) -> dict[str, Any]:
    """The fields of ConvParams."""
    return {
        "shape": shape_of(problem),
        "dtype": DTYPES[problem.case.dtype],
        "layout": _layout(problem),
        "activation": ACTIVATIONS.index(problem.case.activation),
        "x": problem.x.data_ptr(),
        "bias": pointer(problem.bias),
        "residual": pointer(problem.residual),
        "y": y.data_ptr(),
    }


def shape_of(problem: Problem) -> ConvShape:
    """The geometry block of a problem."""
    case = problem.case
    (n, c, h, w), (r, s), (p, q) = problem.x.shape, case.kernel, case.out_size
    sizes = (n, c, h, w, case.k, r, s, p, q, *case.stride)
    return ConvShape(*sizes, case.padding[0], case.padding[2], *case.dilation, case.groups)


def _layout(problem: Problem) -> int:
    return int(memory_format(problem.x) is torch.channels_last)
