from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.storage.pack import pack_csr, pack_dense, unpack_csr, unpack_dense

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DENSITIES = [0.0, 0.003, 0.02, 0.1, 0.3, 0.5, 0.9]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(WORDS[t.element_size()])


def random_weight(density: float, dtype: torch.dtype, *shape: int, signed: bool = False) -> Tensor:
    """A weight with random bits, so NaNs of all payloads, infinities and subnormals occur."""
    g = torch.Generator().manual_seed(int(density * 1000) + shape[0])
    size = torch.empty((), dtype=dtype).element_size()
    w = torch.randint(0, 256, (*shape, size), generator=g, dtype=torch.uint8).view(dtype)
    w = w.reshape(shape).clone()
    gone = torch.rand(shape, generator=g) >= density
    w[gone] = 0.0
    if signed:
        w[gone & (torch.rand(shape, generator=g) < 0.5)] = -0.0
    return w


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("signed", [False, True])
def test_dense_round_trip_bit_for_bit(dtype: torch.dtype, density: float, signed: bool) -> None:
    w = random_weight(density, dtype, 40, 37, 3, 3, signed=signed)
    packed = pack_dense(w)
    assert packed is not None
    back = unpack_dense(packed.spec, packed.arrays)
    assert back.dtype == dtype and back.shape == w.shape
    assert torch.equal(bits(back), bits(w))
    # Never larger than the simplest index, its values and one sign per zero.
    n, size = w.numel(), w.element_size()
    stored = int((w != 0).sum())  # NaN != 0
    signs = (n - stored + 7) // 8 if signed else 0
    assert packed.nbytes <= stored * size + (n + 7) // 8 + signs
    assert packed.nbytes < n * size


def test_the_smallest_layout_is_chosen() -> None:
    layouts = {}
    for density in (0.01, 0.1, 0.5, 0.9):
        packed = pack_dense(random_weight(density, torch.float32, 64, 64, 3, 3))
        assert packed is not None
        layouts[density] = (packed.spec["layout"], packed.spec.get("bits"))
    assert layouts[0.5][0] == layouts[0.9][0] == "bitmask"
    assert layouts[0.01][0] == layouts[0.1][0] == "relative"
    assert layouts[0.01][1] > layouts[0.1][1]  # long gaps want wide fields


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_per_entry_against_the_budget(dtype: torch.dtype) -> None:
    """Index bytes by the closed form: (entries and fillers) * bits + one flag per longest gap."""
    w = random_weight(0.05, dtype, 64, 64, 3, 3)
    packed = pack_dense(w)
    assert packed is not None and packed.spec["layout"] == "relative"
    positions = np.flatnonzero(bits(w).numpy().reshape(-1))
    runs = np.diff(positions, prepend=-1) - 1
    best = min(
        int(
            b * (len(runs) + (runs >> b).sum())
            + (runs >> b).sum()
            + ((runs & (2**b - 1)) == 2**b - 1).sum()
        )
        for b in range(1, 9)
    )
    assert packed.arrays["gaps"].numel() == (best + 7) // 8


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4000, dtype=torch.int64),
        torch.zeros(4000, dtype=torch.bool),
        torch.zeros(0),
        torch.zeros(0, 3, 3, 3),
        torch.tensor(0.0),
        torch.zeros(16),
        torch.ones(4000),
        torch.randn(4000, dtype=torch.float16),
    ],
    ids=["int", "bool", "empty", "empty4", "scalar", "small", "ones", "random"],
)
def test_raw_where_packing_saves_nothing(tensor: Tensor) -> None:
    assert pack_dense(tensor) is None


def test_memory_formats_and_views() -> None:
    w = random_weight(0.1, torch.float32, 32, 16, 3, 3)
    for view in (w.contiguous(memory_format=torch.channels_last), w[::2], w.transpose(0, 1)):
        packed = pack_dense(view)
        assert packed is not None
        assert torch.equal(bits(unpack_dense(packed.spec, packed.arrays)), bits(view))


def test_all_zero_stays_within_the_expansion_limit() -> None:
    for value in (0.0, -0.0):
        w = torch.full((512, 512, 3, 3), value)
        packed = pack_dense(w)
        assert packed is not None
        assert torch.equal(bits(unpack_dense(packed.spec, packed.arrays)), bits(w))


@pytest.mark.parametrize("dtype", FLOATS)
def test_csr_round_trip_keeps_explicit_zeros(dtype: torch.dtype) -> None:
    w = random_weight(0.2, dtype, 30, 20, 3, 3)
    weight = CSRWeight.from_dense(w)
    weight.values[::3] = 0.0  # as after training
    weight.values[1::3] = -0.0
    packed = pack_csr(weight)
    back = unpack_csr(packed.spec, packed.arrays)
    assert back.shape == weight.shape
    assert torch.equal(bits(back.values), bits(weight.values))
    assert torch.equal(back.col_idx, weight.col_idx)
    assert torch.equal(back.row_ptr, weight.row_ptr)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3), (1, 1, 1, 1), (7, 5)])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_csr_edges(shape: tuple[int, ...], density: float) -> None:
    weight = CSRWeight.from_dense(torch.full(shape, density))
    packed = pack_csr(weight)
    back = unpack_csr(packed.spec, packed.arrays)
    assert back.shape == weight.shape
    assert torch.equal(back.to_dense(), weight.to_dense())


def test_corrupt_csr_is_not_packed() -> None:
    weight = CSRWeight.from_dense(random_weight(0.2, torch.float32, 8, 8, 3, 3))
    bad = dataclasses.replace(weight, col_idx=weight.col_idx.flip(0))
    with pytest.raises(ValueError, match="col_idx"):
        pack_csr(bad)


def test_damage_is_refused() -> None:
    for density in (0.05, 0.5):
        w = random_weight(density, torch.float32, 16, 16, 3, 3, signed=True)
        packed = pack_dense(w)
        assert packed is not None
        index = next(n for n in packed.arrays if n in ("mask", "gaps"))
        arrays, spec = packed.arrays, packed.spec
        bad_arrays: list[dict[str, Tensor]] = [
            arrays | {"values": arrays["values"][:-1]},
            arrays | {"values": torch.cat([arrays["values"], torch.zeros(1)])},
            arrays | {"values": arrays["values"].int()},
            arrays | {"values": arrays["values"][None]},
            arrays | {"values": torch.zeros(len(arrays["values"]), dtype=torch.complex64)},
            arrays | {index: arrays[index][:-1]},
            arrays | {index: torch.cat([arrays[index], torch.zeros(1, dtype=torch.uint8)])},
            arrays | {index: arrays[index].to(torch.int8)},
            arrays | {index: 255 - arrays[index]},
            arrays | {"signs": arrays["signs"][:-1]},
            arrays | {"signs": arrays["signs"].bool()},
            arrays | {"other": arrays["values"]},
            {"values": arrays["values"]},
            {},
        ]
        for bad in bad_arrays:
            with pytest.raises(ValueError):
                unpack_dense(spec, bad)
        shape = spec["shape"]
        changes: list[dict[str, object]] = [
            {"shape": [-1, *shape[1:]]},
            {"shape": [2**62, *shape[1:]]},
            {"shape": [10**30]},
            {"shape": [1.5]},
            {"shape": "x"},
            {"shape": [True]},
            {"shape": [1] * 9},
            {"shape": shape[1:]},
            {"shape": None},
            {"layout": "zip"},
            {"layout": ["bitmask"]},
            {"layout": None},
            {"kind": "csr"},
            {"kind": None},
            {"signs": False},
            {"signs": 1},
            {"more": 1},
        ]
        if "bits" in spec:
            changes += [{"bits": b} for b in (0, 9, -1, spec["bits"] + 1, 2**70, None, "4", 4.0)]
            changes += [{"entries": e} for e in (-1, 0, spec["entries"] + 9, 2**40, 2**70)]
        for change in changes:
            with pytest.raises(ValueError):
                unpack_dense(spec | change, arrays)


def test_few_bytes_cannot_claim_much_memory() -> None:
    spec = {
        "kind": "csr",
        "layout": "relative",
        "shape": [2**31 - 2, 1, 1, 1],
        "signs": False,
        "bits": 8,
        "entries": 0,
    }
    arrays = {"values": torch.zeros(0), "gaps": torch.zeros(0, dtype=torch.uint8)}
    for shape in ([2**31 - 2, 1, 1, 1], [2**31, 0, 1, 1], [0, 2**33, 1, 1], [2**33] * 4):
        for unpack, kind in ((unpack_csr, "csr"), (unpack_dense, "dense")):
            with pytest.raises(ValueError, match="256 times"):
                unpack(spec | {"shape": shape, "kind": kind}, arrays)  # type: ignore[operator]


def test_random_specifications_give_tensors_or_value_errors() -> None:
    rng = np.random.default_rng(11)
    accepted = 0
    for _ in range(2000):
        layout = ("bitmask", "relative")[int(rng.integers(2))]
        shape = [int(n) for n in rng.integers(0, 5, int(rng.integers(1, 5)))]
        spec: dict[str, object] = {
            "kind": "dense",
            "layout": layout,
            "shape": shape,
            "signs": bool(rng.integers(2)),
        }
        index = torch.from_numpy(rng.integers(0, 256, int(rng.integers(0, 4)), dtype=np.uint8))
        arrays = {"values": torch.ones(int(rng.integers(0, 6)))}
        if layout == "relative":
            spec |= {"bits": int(rng.integers(0, 10)), "entries": int(rng.integers(0, 6))}
            arrays["gaps"] = index
        else:
            arrays["mask"] = index
        if spec["signs"]:
            arrays["signs"] = torch.zeros(int(rng.integers(0, 3)), dtype=torch.uint8)
        try:
            dense = unpack_dense(spec, arrays)
        except ValueError:
            continue
        accepted += 1
        assert list(dense.shape) == shape
        assert int((dense != 0).sum()) == len(arrays["values"])
    assert accepted > 10
