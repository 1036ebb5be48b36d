"""Packing of one tensor: the smallest of raw, bitmask and relative index; packed weights.

A packed tensor of ``n`` elements, flattened in row-major order, is these arrays:

1. ``values`` ``(nnz,)``, in the dtype of the tensor: the stored entries in ascending position. Of a
   dense tensor these are the elements whose bits are not those of +0.0 (with ``signs``: of neither
   zero), so -0.0 and NaN survive; of a CSR weight the entries it stores, whatever their value.
2. One index, uint8:

   a. layout ``bitmask``, array ``mask``: ``ceil(n / 8)`` bytes, bit ``i % 8`` of byte ``i // 8``
      says that element ``i`` is stored; padding bits are zero.
   b. layout ``relative``, array ``gaps``: the relative index of Deep Compression (Han, Mao, Dally,
      ICLR 2016) with ``bits`` per gap, 1 to 8, whichever is smallest for this tensor. ``entries``
      counts entries and fillers. The bit stream is described in ``csrc/codec/relative_index.h``.

3. ``signs``, uint8, of a dense tensor with many -0.0 only: a bitmask over the elements that are not
   stored, in ascending position, 1 for -0.0. A weight multiplied by a mask of zeros and ones is
   full of them, and one bit each is far less than a value each.

The specification beside them (JSON) holds ``kind`` (``dense`` or ``csr``), ``layout``, ``shape``,
``signs`` (whether that array is there) and, for a relative index, ``bits`` and ``entries``.

A weight in a pattern (kind ``pattern``) keeps its five arrays as they are (see
``formats/pattern.py``): they share columns between filters, which is already smaller than an index
per entry. Its specification holds ``kind``, ``shape``, ``groups`` and ``pattern``, the name. So
does a weight in the Winograd domain (kind ``winograd``, see ``formats/winograd.py``), whose
specification has ``tile`` instead of ``pattern``.

A file may claim a large tensor with few bytes. No tensor may unpack to more than ``MAX_EXPANSION``
times its stored bytes (plus a small allowance), so what a file can make the reader allocate is
bounded by its size; where a relative index would be too small for that, packing takes the bitmask.
Those two kinds are never unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsecnn import _codec
from sparsecnn.formats._patterns import is_pattern_name
from sparsecnn.formats.csr import CSRWeight
from sparsecnn.formats.pattern import INDEX_ARRAYS, PatternWeight
from sparsecnn.formats.winograd import WinogradWeight

MAX_EXPANSION = 256
_EXPANSION_FLOOR_BYTES = 64 * 1024
# What one more array and its specification take in the header; packing must save more than this.
_OVERHEAD_BYTES = 256
_BITS_OF = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
INDEX_NAME = {"bitmask": "mask", "relative": "gaps"}
ARRAY_NAMES = ("values", "mask", "gaps", "signs", *INDEX_ARRAYS, "col_idx", "row_ptr")


@dataclass(frozen=True)
class _Form:
    """A format that files hold as its arrays: the weight's class, and what describes it."""

    weight: Any
    indices: tuple[str, ...]
    field: str  # of the class, beside shape and groups
    indices_are_optional: bool = False


_FORMS = {
    "pattern": _Form(PatternWeight, INDEX_ARRAYS, "pattern"),
    "winograd": _Form(WinogradWeight, ("col_idx", "row_ptr"), "tile", True),
}
ARRAY_KINDS = tuple(_FORMS)


@dataclass(frozen=True)
class Packed:
    """A packed tensor.

    Attributes:
        spec: JSON-able description, see the module's text.
        arrays: 1-d tensors by name: ``values``, ``mask`` or ``gaps``, maybe ``signs``; of a weight
            in a pattern its five arrays.
    """

    spec: dict[str, Any]
    arrays: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(t.numel() * t.element_size() for t in self.arrays.values())


def pack_dense(tensor: Tensor) -> Packed | None:
    """Pack a dense tensor, or say that raw storage is the smallest.

    Args:
        tensor: any shape, dtype and memory format; not modified.

    Returns:
        The packed tensor, or None for integer and boolean tensors and where packing saves nothing.

    Cost: one pass over the elements, and for a sparse tensor one over its entries.
    """
    if tensor.dtype not in _BITS_OF or not 0 < tensor.numel() <= _codec.MAX_POSITIONS:
        return None
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    words = flat.view(_BITS_OF[tensor.dtype]).numpy()
    total, size = flat.numel(), flat.element_size()
    negative = words == np.iinfo(words.dtype).min  # the bits of -0.0
    negatives = int(np.count_nonzero(negative))
    zeros = total - int(np.count_nonzero(words)) + negatives
    # No index is below zero bytes: skip the search where even that would not pay.
    if zeros * size <= _OVERHEAD_BYTES:
        return None
    signs = None
    if negatives * size > zeros // 8 + _OVERHEAD_BYTES:
        stored = (words != 0) & ~negative
        signs = _codec.bitmask_pack(negative[~stored])
        positions = np.flatnonzero(stored).astype(np.int64, copy=False)
    else:
        positions = np.flatnonzero(words).astype(np.int64, copy=False)
    values = torch.from_numpy(words[positions]).view(tensor.dtype)
    packed = _pack(values, positions, tuple(tensor.shape), "dense", total)
    if signs is not None:
        packed.arrays["signs"] = torch.from_numpy(signs)
        packed.spec["signs"] = True
    return packed if packed.nbytes + _OVERHEAD_BYTES < total * size else None


def pack_csr(weight: CSRWeight) -> Packed:
    """Pack a CSR weight: every stored entry, also those that have become zero.

    Args:
        weight: a valid CSR weight on any device.

    Raises:
        ValueError: its arrays are corrupt.
    """
    weight.validate()
    k, columns = weight.shape[0], math.prod(weight.shape[1:])
    positions = _codec.csr_to_positions(
        weight.row_ptr.detach().cpu().contiguous().numpy(),
        weight.col_idx.detach().cpu().contiguous().numpy(),
        columns,
    )
    values = weight.values.detach().cpu().contiguous()
    return _pack(values, positions, tuple(weight.shape), "csr", k * columns)


def pack_arrays(weight: PatternWeight | WinogradWeight) -> Packed:
    """The arrays of a weight in a pattern or in the Winograd domain, and what describes them.

    Args:
        weight: a valid weight on any device.

    Raises:
        ValueError: its arrays are corrupt, or its pattern has no name that a file can hold.
    """
    weight.validate()
    if isinstance(weight, PatternWeight) and not is_pattern_name(weight.pattern):
        raise ValueError(f"save: expected pattern the name of one, got {weight.pattern!r:.40}")
    kind = next(kind for kind, form in _FORMS.items() if type(weight) is form.weight)
    form = _FORMS[kind]
    spec: dict[str, Any] = {"kind": kind, "shape": list(weight.shape), "groups": weight.groups}
    spec |= {form.field: getattr(weight, form.field)}
    held = {name: getattr(weight, name) for name in ("values", *form.indices)}
    arrays = {n: t.detach().cpu().contiguous() for n, t in held.items() if t is not None}
    return Packed(spec, arrays)


def _pack(
    values: Tensor, positions: NDArray[np.int64], shape: tuple[int, ...], kind: str, total: int
) -> Packed:
    """The smaller of both indices over ascending positions."""
    spec: dict[str, Any] = {"kind": kind, "shape": list(shape), "signs": False}
    _, sizes = _codec.relative_index_cost(positions, total)
    bits = int(np.argmin(sizes)) + 1
    gap_bytes = int(sizes[bits - 1])
    stored = values.numel() * values.element_size() + gap_bytes
    fits = _unpacked_bytes(shape, values.element_size()) <= _allowed_bytes(stored)
    if fits and gap_bytes < (total + 7) // 8:
        stream, entries = _codec.relative_index_encode(positions, bits, total)
        spec |= {"layout": "relative", "bits": bits, "entries": entries}
        return Packed(spec, {"values": values, "gaps": torch.from_numpy(stream)})
    mask = np.zeros(total, dtype=np.bool_)
    mask[positions] = True
    spec["layout"] = "bitmask"
    return Packed(spec, {"values": values, "mask": torch.from_numpy(_codec.bitmask_pack(mask))})


def unpack_dense(spec: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Tensor:
    """The dense tensor, contiguous, bit for bit as it was packed.

    Raises:
        ValueError: specification and arrays do not fit, or an index is corrupt.
    """
    values, positions, shape = _unpack(spec, arrays, "dense")
    words = values.contiguous().view(_BITS_OF[values.dtype]).numpy()
    dense = np.zeros(math.prod(shape), dtype=words.dtype)
    if spec["signs"]:
        zero = np.ones(dense.size, dtype=np.bool_)
        zero[positions] = False
        negative = _codec.bitmask_unpack(arrays["signs"].numpy(), dense.size - len(positions))
        dense[zero] = np.where(negative, np.iinfo(dense.dtype).min, 0)
    dense[positions] = words
    return torch.from_numpy(dense).view(values.dtype).reshape(shape)


def unpack_csr(spec: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> CSRWeight:
    """The CSR weight as it was packed, validated.

    Raises:
        ValueError: specification and arrays do not fit, or an index is corrupt.
    """
    values, positions, shape = _unpack(spec, arrays, "csr")
    weight_shape = _weight_shape(shape)
    row_ptr, col_idx = _codec.positions_to_csr(positions, shape[0], math.prod(shape[1:]))
    return CSRWeight(
        values, torch.from_numpy(col_idx), torch.from_numpy(row_ptr), weight_shape
    ).validate()


def unpack_arrays(
    spec: Mapping[str, Any], arrays: Mapping[str, Tensor]
) -> PatternWeight | WinogradWeight:
    """The weight that `pack_arrays` packed, validated.

    The name of a pattern is checked to be one; no kernel relies on it.

    Raises:
        ValueError: specification and arrays do not fit, or an array is corrupt.

    Cost: memory for a few int64 copies of the arrays, whatever the shape claims.
    """
    form = _FORMS[spec["kind"]]
    want, names = {"kind", "shape", "groups", form.field}, {"values", *form.indices}
    present = set(arrays)
    if form.indices_are_optional and present == {"values"}:
        names = present
    if set(spec) != want or present != names:
        raise ValueError(
            f"unpack: expected fields {sorted(want)} and arrays {sorted(names)}, "
            f"got {sorted(map(str, spec))} and {sorted(arrays)}"
        )
    groups, value = spec["groups"], spec[form.field]
    known = is_pattern_name(value) if form.field == "pattern" else type(value) is int
    if type(groups) is not int or not known:
        what = "the name of one" if form.field == "pattern" else "an integer"
        raise ValueError(
            f"unpack: expected groups an integer and {form.field} {what}, "
            f"got {groups!r:.40} and {value!r:.40}"
        )
    shape = _weight_shape(checked_shape(spec["shape"]))
    held = {name: arrays.get(name) for name in ("values", *form.indices)}
    weight: PatternWeight | WinogradWeight = form.weight(
        **held, shape=shape, groups=groups, **{form.field: value}
    )
    return weight.validate()


def _weight_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    if len(shape) != 4 or math.prod(max(n, 1) for n in shape) >= 2**31:
        raise ValueError(
            "unpack: expected shape (K, C/G, R, S) with fewer than 2^31 elements, "
            f"got {list(shape)}"
        )
    return shape[0], shape[1], shape[2], shape[3]


def _unpack(
    spec: Mapping[str, Any], arrays: Mapping[str, Tensor], kind: str
) -> tuple[Tensor, NDArray[np.int64], tuple[int, ...]]:
    """Values, their positions and the shape; checks all sizes before it allocates."""
    layout, shape = spec.get("layout"), checked_shape(spec.get("shape"))
    if spec.get("kind") != kind or layout not in ("bitmask", "relative"):
        raise ValueError(
            f"unpack: expected kind {kind} with layout {' or '.join(INDEX_NAME)}, "
            f"got {spec.get('kind')!r} with {layout!r}"
        )
    want = {"kind", "layout", "shape", "signs"}
    want |= {"bits", "entries"} if layout == "relative" else set()
    names = {"values", INDEX_NAME[str(layout)]} | ({"signs"} if spec.get("signs") else set())
    if set(spec) != want or set(arrays) != names:
        raise ValueError(
            f"unpack: expected fields {sorted(want)} and arrays {sorted(names)}, "
            f"got {sorted(map(str, spec))} and {sorted(arrays)}"
        )
    values, index = arrays["values"], arrays[INDEX_NAME[str(layout)]]
    if type(spec["signs"]) is not bool or (spec["signs"] and kind != "dense"):
        raise ValueError(f"unpack: expected signs true for dense tensors only, got {kind}")
    if values.dim() != 1 or values.dtype not in _BITS_OF:
        raise ValueError(
            f"unpack: expected values 1-d of a floating-point dtype, "
            f"got {values.dim()}-d {values.dtype}"
        )
    for name in sorted(names - {"values"}):
        if arrays[name].dim() != 1 or arrays[name].dtype != torch.uint8:
            raise ValueError(
                f"unpack: expected {name} 1-d of uint8, "
                f"got {arrays[name].dim()}-d {arrays[name].dtype}"
            )
    stored = values.numel() * values.element_size() + index.numel()
    if _unpacked_bytes(shape, values.element_size()) > _allowed_bytes(stored):
        raise ValueError(
            f"unpack: expected at most {MAX_EXPANSION} times the {stored} stored bytes, "
            f"got shape {list(shape)}"
        )
    total = math.prod(shape)
    bits_array = index.contiguous().numpy()
    if layout == "relative":
        if type(spec["bits"]) is not int or type(spec["entries"]) is not int:
            raise ValueError(
                "unpack: expected bits and entries integers, "
                f"got {spec['bits']!r:.40} and {spec['entries']!r:.40}"
            )
        positions = _codec.relative_index_decode(bits_array, spec["bits"], spec["entries"], total)
    else:
        positions = np.flatnonzero(_codec.bitmask_unpack(bits_array, total)).astype(
            np.int64, copy=False
        )
    if len(positions) != values.numel():
        raise ValueError(
            f"unpack: expected {len(positions)} values for the stored index, got {values.numel()}"
        )
    return values, positions, shape


def checked_shape(value: object) -> tuple[int, ...]:
    """A shape from JSON.

    Raises:
        ValueError: not a list of at most 8 non-negative integers below 2^33.
    """
    if (
        not isinstance(value, list)
        or len(value) > 8
        or any(type(n) is not int or not 0 <= n <= _codec.MAX_POSITIONS for n in value)
    ):
        raise ValueError(
            f"unpack: expected shape a list of at most 8 non-negative integers, got {value!r:.80}"
        )
    return tuple(value)


def _unpacked_bytes(shape: tuple[int, ...], element_bytes: int) -> int:
    # Counts an extent of zero as one: the row pointers of (2^31, 0, 1, 1) take memory too.
    return math.prod(max(n, 1) for n in shape) * element_bytes


def _allowed_bytes(stored_bytes: int) -> int:
    return _EXPANSION_FLOOR_BYTES + MAX_EXPANSION * stored_bytes
