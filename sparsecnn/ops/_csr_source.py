"""Writes the CUDA source of a ``csr_conv2d`` that is specialized to one weight matrix.

The idea is SparseRT's (Wang, "SparseRT: Accelerating Unstructured Sparsity on GPUs for Deep
Learning Inference", PACT 2020): a stored value is an operand of an instruction, so that the inner
loop reads no weight and no index, and one loaded activation feeds all filters that keep its column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.ops._csr_template import TEMPLATE
from sparsecnn.ops._csr_tiles import Window, staged_capacity

MAX_NONZEROS = 150_000
"""Most stored entries: one is 16 bytes of code and takes 0.3 to 0.9 ms to compile, more in longer
rows (one core of a Zen 4 virtual machine, NVRTC 13.0; 59 000 of them 32 s)."""
# Fewer filters than this share too little of a staged input.
_MIN_FILTERS = 8
# Rows of base addresses that a thread keeps in registers beside its sums.
_MAX_BASES = 16
# What a block may use without asking the driver for more.
_SMEM_BYTES = 48 * 1024
_PASS = 32
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Unsuitable(Exception):
    """The reason why a weight or a shape stays with the portable kernel."""


@dataclass(frozen=True)
class Source:
    """A generated kernel.

    Attributes:
        text: CUDA C++.
        threads: of a block, and pixels of a tile.
        slabs: of filters.
        cap: most staged elements of a channel.
        smem_bytes: dynamic shared memory of a block.
        window: of the filters.
        channels: C/G.
        groups: G.
        filters: K.
        dtype: of every tensor.
    """

    text: str
    threads: int
    slabs: int
    cap: int
    smem_bytes: int
    window: Window
    channels: int
    groups: int
    filters: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Slab:
    """Filters first to first + count, of the group whose channels start at ``channel``.

    ``columns`` maps each kept column, in ascending order, to its ``(filter - first, bits)``.
    """

    first: int
    count: int
    channel: int
    columns: dict[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class _Layout:
    cap: int
    chunk: int
    channels: int


def slab_size(nnz: int, filters: int, columns: int, pointwise: bool) -> int:
    """Most filters of a slab: sums of a thread.

    A load from shared memory takes as long as four multiply-adds (derived: 32 words against 128
    multiply-adds a clock) and a staged element is read from the L2 cache once for each slab, so a
    column has to feed about six filters: 64 do at 10 % density, 128 at 5 %. A pointwise filter
    reads each staged element once and not R * S times, so it always takes the larger slab.
    """
    return 128 if pointwise or nnz < 0.08 * filters * columns else 64


def _split(total: int, most: int) -> list[int]:
    """Sizes of the fewest parts of at most ``most``, as equal as they can be."""
    parts = -(-total // most)
    return [total // parts + (i < total % parts) for i in range(parts)]


def slabs_of(weight: CSRWeight, groups: int, most: int) -> list[Slab]:
    """Cut the filters of each group into slabs of at most ``most``."""
    bits = weight.values.detach().to("cpu", torch.float32).view(torch.int32).tolist()
    columns, rows = weight.col_idx.tolist(), weight.row_ptr.tolist()
    channels = weight.shape[1]
    per_group = (len(rows) - 1) // groups
    found = []
    for group in range(groups):
        first = group * per_group
        for count in _split(per_group, most):
            kept: dict[int, list[tuple[int, int]]] = {}
            for f in range(count):
                for i in range(rows[first + f], rows[first + f + 1]):
                    kept.setdefault(columns[i], []).append((f, bits[i] & 0xFFFFFFFF))
            found.append(Slab(first, count, group * channels, dict(sorted(kept.items()))))
            first += count
    return found


def _write_slab(
    index: int, slab: Slab, source: _Layout, kernel_size: tuple[int, int], step: int, phases: int
) -> str:
    """The function of one slab."""
    r_size, s_size = kernel_size
    taps = r_size * s_size
    lines: list[str] = []
    chunks: dict[int, list[int]] = {}
    for column in slab.columns:
        chunks.setdefault(column // taps // source.chunk, []).append(column)
    bases = set()
    for chunk, columns in chunks.items():
        first = chunk * source.chunk
        count = min(source.chunk, source.channels - first)
        lines.append(f"  stage<{count}>(a, {slab.channel + first});")
        for column in columns:
            c, tap = divmod(column, taps)
            r, shift = tap // s_size, tap % s_size * step
            bases.add((r, shift % phases))
            offset = (c - first) * source.cap + shift // phases
            entries = " ".join(f"F({f},{bits:08X})" for f, bits in slab.columns[column])
            lines.append(f"  L(b{r}_{shift % phases},{offset}) {entries}")
    sums = ", ".join(f"a{f} = 0.f" for f in range(slab.count))
    head = [
        f"__device__ NOINLINE void slab{index}(const Args& a, int start) {{",
        "  SHARED_MEMORY;",
        f"  float v, {sums};",
        "  (void)v, (void)start;",
    ]
    for r, phase in sorted(bases):
        head.append(
            f"  const float* const b{r}_{phase} = tile + start + {r} * a.row_taps"
            f" + {phase} * a.phase_w;"
        )
    tail = ["  float* const out = tile;", "  __syncthreads();"]
    for done in range(0, slab.count, _PASS):
        count = min(_PASS, slab.count - done)
        tail.append("  " + " ".join(f"S({done + i},{i})" for i in range(count)))
        tail.append(f"  finish<{count}>(a, {slab.first + done});")
    return "\n".join([*head, *lines, *tail, "}", ""])


def generate(
    weight: CSRWeight,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    most_filters: int | None = None,
) -> Source:
    """The source for a weight, a pure function of its arguments.

    Args:
        weight: valid, of float32, float16 or bfloat16.
        stride: two ints.
        dilation: two ints.
        groups: G.
        most_filters: of a slab, instead of what `slab_size` says.

    Raises:
        Unsuitable: the weight is none that the kernel is made for.
    """
    k, channels, r, s = weight.shape
    nnz, dtype = weight.nnz, weight.values.dtype
    if dtype not in _DTYPES:
        raise Unsuitable(f"expected float32, float16 or bfloat16, got {dtype}")
    if not 0 < nnz <= MAX_NONZEROS:
        raise Unsuitable(f"expected 1 to {MAX_NONZEROS} nonzeros, got {nnz}")
    if k // groups < _MIN_FILTERS:
        raise Unsuitable(
            f"expected at least {_MIN_FILTERS} filters in a group, got {k // groups}"
        )
    # A filter of one column leaves gaps between the inputs it reads: they are not staged.
    phases = stride[1] if s > 1 else 1
    if r * min(phases, s) > _MAX_BASES:
        raise Unsuitable(
            f"expected R * min(S, stride) up to {_MAX_BASES}, got {r * min(phases, s)}"
        )
    most = most_filters or slab_size(nnz, k, channels * r * s, r * s == 1)
    slabs = slabs_of(weight, groups, most)
    size = max(slab.count for slab in slabs)
    threads = 256 if size <= 64 else 192  # two blocks to a multiprocessor by their registers
    window = Window((r, s), (stride[0], stride[1]), (dilation[0], dilation[1]))
    # Half of it, so that a block stages at least two channels at a time.
    limit = (_SMEM_BYTES - 8 * threads) // (8 + 2 * 4)
    cap = staged_capacity(window, threads, limit)
    if cap is None:
        raise Unsuitable(
            f"expected a tile whose halo fits into {_SMEM_BYTES // 1024} KB of shared memory, "
            f"got kernel ({r}, {s}), stride {tuple(stride)}, dilation {tuple(dilation)}"
        )
    tables = 8 * (cap + threads)
    floats = (_SMEM_BYTES - tables) // 4
    parts = -(-channels // (floats // cap))
    # Even parts, in whole batches of the eight channels that are staged together.
    chunk = -(-channels // parts)
    chunk = min(chunk + -chunk % 8, floats // cap)
    layout = _Layout(cap, chunk, channels)
    tile = max(layout.chunk * cap, min(size, _PASS) * (threads + 1))
    written = [
        _write_slab(i, slab, layout, (r, s), dilation[1], phases) for i, slab in enumerate(slabs)
    ]
    cases = [f"      case {i}:\n        slab{i}(a, start);\n        break;\n"
             for i in range(len(slabs))]  # fmt: skip
    text = TEMPLATE
    for name, replacement in {
        "THREADS": str(threads),
        "CAP": str(cap),
        "DTYPE": str(_DTYPES[dtype]),
        "BLOCKS": "2",
        "SLABS": "\n".join(written),
        "CASES": "".join(cases),
    }.items():
        text = text.replace(f"@{name}@", replacement)
    return Source(
        text, threads, len(slabs), cap, tables + 4 * tile, window, channels, groups, k, dtype
    )
