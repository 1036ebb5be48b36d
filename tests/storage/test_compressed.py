"""Files of deep compression: size, exactness, and what is refused."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsecnn import _codec
from sparsecnn.data import DigitsNet
from sparsecnn.nn import CSRLinear
from sparsecnn.storage import save
from sparsecnn.storage.codebook import bake_weights_, share_weights_
from sparsecnn.storage.compressed import (
    KEY,
    _checksum,
    gap_symbols,
    load_compressed,
    positions_of,
    save_compressed,
)
from tests.storage.test_load_into import assert_unchanged, snapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def thin_(model: nn.Module, sparsity: float) -> nn.Module:
    """Zero the smallest weights of every layer, by count."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            flat = layer.weight.data.reshape(-1)
            flat[flat.abs().argsort()[: round(sparsity * flat.numel())]] = 0
    return model


def digits_net(sparsity: float = 0.9, bits: int | None = 4, seed: int = 0) -> DigitsNet:
    """A pruned and quantized network with statistics of its own in the norms."""
    torch.manual_seed(seed)
    model = DigitsNet()
    model(torch.randn(64, 1, 8, 8))
    model.eval()
    thin_(model, sparsity)
    if bits is not None:
        bake_weights_(share_weights_(model, bits, bits))
    return model


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    thin_(model, 0.8)
    return bake_weights_(share_weights_(model, 3, 3)).eval()  # type: ignore[return-value]


def blank() -> nn.Sequential:
    """The architecture of `small` with other values."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    for parameter in model.parameters():
        parameter.data.fill_(0.25)
    return model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        t.dtype == second[k].dtype and t.numpy().tobytes() == second[k].numpy().tobytes()
        for k, t in first.items()
    )


def huffman_bits(symbols: np.ndarray[Any, Any]) -> int:
    """Bits of the best prefix code, by the sum of the merged counts."""
    counts = sorted(np.unique(symbols, return_counts=True)[1].tolist())
    total = 0
    while len(counts) > 1:
        merged = counts[0] + counts[1]
        total += merged
        counts = sorted([merged, *counts[2:]])
    return total


def budget_bytes(model: nn.Module, bits: int) -> float:
    """What the paper's scheme needs for a network, counted from the weights alone."""
    total = 0.0
    for tensor in model.state_dict().values():
        flat = tensor.numpy().reshape(-1)
        if tensor.dim() < 2:
            total += flat.nbytes
            continue
        nonzero = np.flatnonzero(flat)
        runs = (np.diff(nonzero, prepend=-1) - 1).tolist()
        best = np.inf
        for width in range(1, 9):
            gaps = [g for z in runs for g in (*[-1] * (z // 2**width), z % 2**width)]
            best = min(best, huffman_bits(np.array(gaps)) + 8 * (2**width + 1))
        total += (huffman_bits(flat[nonzero]) + best) / 8 + 2**bits * (4 + 1)
    return total


def test_deep_compression_file_size(path: Path) -> None:
    model = digits_net()
    save_compressed(model, path)
    stored = path.stat().st_size
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    expected = budget_bytes(model, 4) + header
    assert abs(stored - expected) <= 0.02 * expected
    raw = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert raw == 92_800
    assert raw / stored >= 12
    # Codebooks of 256 values dominate a network this small.
    wide = digits_net(bits=8)
    save_compressed(wide, path)
    assert raw / path.stat().st_size < 10
    codebooks = 4 * sum(len(t[t != 0].unique()) for t in wide.state_dict().values() if t.dim() > 1)
    assert codebooks > 0.25 * (path.stat().st_size - header)


CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
from sparsecnn.data import DigitsNet
from sparsecnn.storage.compressed import load_compressed
model = load_compressed(sys.argv[1], DigitsNet()).eval()
with torch.no_grad():
    save_file({"y": model(load_file(sys.argv[2])["x"])}, sys.argv[3])
"""


def test_deep_compression_file_in_a_fresh_process(path: Path) -> None:
    model = digits_net(seed=3)
    torch.manual_seed(1)
    for parameter in model.parameters():  # biases and norms are no default values
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(50, 1, 8, 8)
    save_compressed(model, path)
    source, result = path.with_name("x"), path.with_name("y")
    save_file({"x": x}, source)
    with torch.no_grad():
        want = model(x)
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(source), str(result)], check=True, cwd=root
    )
    assert torch.equal(load_file(result)["y"], want)
    back = load_compressed(path, DigitsNet())
    assert same(back, model)
    assert not same(DigitsNet(), model)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_deep_compression_file_is_exact(path: Path, sparsity: float, bits: int) -> None:
    model = digits_net(sparsity, bits)
    before = snapshot(model)
    save_compressed(model, path)
    assert_unchanged(model, before)
    assert same(load_compressed(path, DigitsNet()), model)


@pytest.mark.parametrize("index_bits", range(1, 9))
def test_deep_compression_file_index_bits(path: Path, index_bits: int) -> None:
    model = digits_net()
    save_compressed(model, path, index_bits)
    fixed = path.stat().st_size
    assert same(load_compressed(path, DigitsNet()), model)
    save_compressed(model, path)
    assert path.stat().st_size <= fixed


def test_deep_compression_file_odd_values(path: Path) -> None:
    """Any bits survive; what does not fit the scheme is stored as it is."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 300, dtype=torch.float64))
    model.append(nn.Linear(300, 8))
    with torch.no_grad():
        model[0].weight.zero_()
        odd = torch.tensor([-0.0, torch.nan, -torch.inf, 1e-45, -1e-45])
        model[0].weight[2, :5] = odd
        model[0].weight[:, -1] = 1
    save_compressed(model, path)
    with safe_open(path, framework="pt") as file:
        coded = json.loads(file.metadata()[KEY].split(" ", 2)[2])["coded"]
    assert list(coded) == ["0.weight"]
    back = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 300, dtype=torch.float64))
    back.append(nn.Linear(300, 8))
    assert same(load_compressed(path, back), model)
    tied = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    nn.init.constant_(tied[0].weight, 0.5)
    tied[1].weight = tied[0].weight
    save_compressed(tied, path)
    other = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    other[1].weight = other[0].weight
    assert same(load_compressed(path, other), tied) and other[1].weight is other[0].weight


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaps_are_the_relative_index(bits: int) -> None:
    """The same symbols as those of the packed index of fixed width."""
    b = 2**bits
    for runs in ([0, 1, b - 1, b, b + 1, 5 * b + 3], [5 * b + 3], [0], []):
        positions = np.cumsum(np.array(runs, np.int64) + 1) - 1
        total = int(positions[-1]) + 100 if runs else 100
        symbols = gap_symbols(positions, bits)
        fillers, _ = _codec.relative_index_cost(positions, total)
        assert int((symbols == b).sum()) == sum(z // b for z in runs) == int(fillers[bits - 1])
        stream, entries = _codec.relative_index_encode(positions, bits, total)
        assert entries == len(symbols)
        np.testing.assert_array_equal(
            positions_of(symbols, bits), _codec.relative_index_decode(stream, bits, entries, total)
        )


def test_what_cannot_be_written(path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got dict"):
        save_compressed({}, path)  # type: ignore[arg-type]
    for bad in (0, 9, True):
        with pytest.raises(ValueError, match="index_bits from 1 to 8"):
            save_compressed(small(), path, bad)
    with pytest.raises(ValueError, match="expected a weight of at most 256 values, got none"):
        save_compressed(digits_net(0.0, None), path)
    with pytest.raises(ValueError, match="parametrized '0'; call bake_weights_"):
        save_compressed(share_weights_(nn.Sequential(nn.Linear(4, 4))), path)
    with pytest.raises(ValueError, match="dense layers, got CSRLinear at '0'"):
        save_compressed(nn.Sequential(CSRLinear.from_dense(nn.Linear(4, 4))), path)
    with pytest.raises(ValueError, match="complex64"):
        save_compressed(nn.Linear(4, 4, dtype=torch.complex64), path)
    with pytest.raises(FileNotFoundError):
        save_compressed(small(), path / "none" / "x")
    with pytest.raises(OSError):
        save_compressed(small(), path.parent)
    assert not list(path.parent.iterdir())
    save_compressed(small(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        save_compressed(digits_net(0.0, None), path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_other_models(path: Path) -> None:
    save_compressed(small(), path)
    cases: list[tuple[Callable[[nn.Sequential], object], str]] = [
        (lambda m: m.append(nn.Linear(2, 2)), "difference at"),
        (lambda m: setattr(m[0], "bias", None), "difference at"),
        (lambda m: m.__setitem__(0, nn.Conv2d(4, 8, 5, groups=2)), r"0\.weight .*as in the model"),
        (lambda m: m.double(), "float64"),
    ]
    for change, text in cases:
        model = blank()
        change(model)
        before = snapshot(model)
        with pytest.raises(ValueError, match=text) as caught:
            load_compressed(path, model)
        assert str(caught.value).startswith(f"load_compressed: {path}: ")
        assert_unchanged(model, before)
    with pytest.raises(TypeError, match=r"nn\.Module, got NoneType"):
        load_compressed(path, None)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        load_compressed(path.with_name("none"), small())
    with pytest.raises(ValueError, match="parametrized"):
        load_compressed(path, share_weights_(small()))


def refused(path: Path, text: str = "load_compressed") -> None:
    model = blank()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        load_compressed(path, model)
    assert_unchanged(model, before)


def test_damaged_files(path: Path) -> None:
    save_compressed(small(), path)
    data = path.read_bytes()
    for offset in {*range(0, len(data), 7), *range(16), *range(len(data) - 16, len(data))}:
        path.write_bytes(data[:offset])
        refused(path, "complete safetensors")
    start = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    offsets = [rng.randrange(start, len(data)) for _ in range(50)]
    for offset in [*range(8, start, 5), start, *offsets]:
        bad = bytearray(data)
        bad[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        refused(path)
    for foreign in (b"", b"PK\x03\x04" + b"\0" * 100, struct.pack("<Q", 2**63) + b"{}"):
        path.write_bytes(foreign)
        refused(path)
    save(small(), path)
    refused(path, "written by save_compressed")


Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]


def forge(path: Path, edit: Edit, version: str = "1") -> None:
    """Change a good file and make every checksum right again."""
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()[KEY].split(" ", 2)[2])
        arrays = {k: file.get_tensor(k).clone() for k in file.keys()}
    text = edit(data, arrays)
    if not isinstance(text, str):
        if "crc" in data:
            data["crc"] = _checksum(arrays)
        text = json.dumps(data)
    save_file(arrays, path, metadata={KEY: f"{version} {zlib.crc32(text.encode()):08x} {text}"})


def spec(**fields: Any) -> Edit:
    return lambda d, a: d["coded"]["0.weight"].update(fields)


def array(change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda d, a: a.update({"0.weight": change(a["0.weight"])})


def at(index: int, value: int) -> Edit:
    def edit(d: dict[str, Any], a: dict[str, Tensor]) -> None:
        a["0.weight"][index] = value

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "shape": (spec(shape=[8, 2, 3, 4]), "as in the model"),
    "shape of others": (spec(shape=[2, 8, 3, 3]), "as in the model"),
    "shape huge": (spec(shape=[2**40, 2**40, 2**40]), "nonzeros <= gaps <= elements"),
    "shape zero": (spec(shape=[0, 2, 3, 3]), "elements"),
    "shape negative": (spec(shape=[-8, 2, 3, 3]), "integers >= 0"),
    "shape no list": (spec(shape=8), "integers >= 0"),
    "shape long": (spec(shape=[1] * 9), "integers >= 0"),
    "values none": (spec(values=0), "load_compressed"),
    "values many": (spec(values=257), "values"),
    "values other": (spec(values=7), "load_compressed"),
    "nonzeros more": (spec(nonzeros=30), "load_compressed"),
    "nonzeros less": (spec(nonzeros=20), "load_compressed"),
    "nonzeros float": (spec(nonzeros=1.0), "integers >= 0"),
    "nonzeros bool": (spec(nonzeros=True), "integers >= 0"),
    "gaps more": (spec(gaps=144), "symbols in the stream, got 144"),
    "gaps huge": (spec(gaps=2**70), "gaps <= elements"),
    "index_bits zero": (spec(index_bits=0), "index_bits"),
    "index_bits many": (spec(index_bits=9), "index_bits"),
    "index_bits other": (spec(index_bits=8), "load_compressed"),
    "index_bytes": (spec(index_bytes=2**60), "at least"),
    "index_bytes less": (spec(index_bytes=0), "load_compressed"),
    "field more": (spec(evil=1), "expected fields"),
    "field less": (lambda d, a: d["coded"]["0.weight"].pop("gaps"), "expected fields"),
    "spec no object": (lambda d, a: d["coded"].update({"0.weight": 3}), "expected fields"),
    "spec of raw": (
        lambda d, a: d["coded"].update({"0.bias": d["coded"]["0.weight"]}), "at least",
    ),
    "spec of nothing": (
        lambda d, a: d["coded"].update({"x": d["coded"]["0.weight"]}), "difference at",
    ),
    "spec missing": (lambda d, a: d["coded"].pop("0.weight"), "uint8"),
    "array missing": (lambda d, a: a.pop("0.bias"), "difference at"),
    "array more": (lambda d, a: a.update(x=torch.zeros(2)), "difference at"),
    "array dtype": (array(lambda t: t.int()), "at least"),
    "array 2-d": (array(lambda t: t[None].clone()), "at least"),
    "array short": (array(lambda t: t[:-1].clone()), "load_compressed"),
    "array long": (array(lambda t: torch.cat([t, t[:1]])), "load_compressed"),
    "array empty": (array(lambda t: t[:0].clone()), "at least"),
    "lengths": (at(8 * 4, 9), "complete prefix code"),
    "lengths of gaps": (at(8 * 5, 200), "complete prefix code"),
    "raw dtype": (lambda d, a: a.update({"0.bias": a["0.bias"].double()}), "float64"),
    "coded no object": (lambda d, a: d.update(coded=[1]), "coded tensors by name"),
    "more": (lambda d, a: d.update(evil=1), "coded and crc"),
    "less": (lambda d, a: d.pop("crc"), "coded and crc"),
    "no JSON": (lambda d, a: "{", "JSON"),
    "JSON list": (lambda d, a: "[]", "coded and crc"),
    "JSON deep": (lambda d, a: "[" * 100000, "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_forged_files(path: Path, name: str) -> None:
    save_compressed(small(), path)
    forge(path, lambda d, a: None)
    assert same(load_compressed(path, blank()), small())
    edit, text = EDITS[name]
    forge(path, edit)
    refused(path, text)


def test_other_versions(path: Path) -> None:
    for version in ("0", "2", "", "x" * 1000):
        save_compressed(small(), path)
        forge(path, lambda d, a: None, version)
        refused(path, "version 1, got")


def test_random_bytes_with_right_checksums(path: Path) -> None:
    """A weight of the right shape, or a refusal; never anything else."""
    save_compressed(small(), path)
    good = path.read_bytes()
    loaded = 0
    for seed in range(150):
        rng = random.Random(seed)
        path.write_bytes(good)

        def edit(d: dict[str, Any], a: dict[str, Tensor], rng: random.Random = rng) -> None:
            blob = a["0.weight"]
            blob[rng.randrange(len(blob))] = rng.randrange(256)

        forge(path, edit)
        try:
            load_compressed(path, blank())
        except ValueError:
            continue
        loaded += 1
    assert 0 < loaded < 150
