"""Files that are damaged, foreign or made to harm: a ValueError, a name, and nothing else."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsecnn.nn import CSRConv2d
from sparsecnn.storage import load, save
from sparsecnn.storage.manifest import checksum
from tests.storage.models import Net, converted_net, sparse_stack, thinned
from tests.storage.test_load_into import assert_unchanged, snapshot

Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def small_stack() -> nn.Sequential:
    torch.manual_seed(0)
    conv = thinned(nn.Conv2d(4, 8, 3), 0.3)
    assert isinstance(conv, nn.Conv2d)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), CSRConv2d.from_dense(conv))


def forge(path: Path, edit: Edit, version: str = "3") -> None:
    """Change a good file's manifest and arrays and make every checksum right again."""
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["sparsecnn"].split(" ", 2)[2])
        arrays = {k: file.get_tensor(k).clone() for k in file.keys()}
    text = edit(manifest, arrays)
    if "arrays" in manifest and isinstance(manifest["arrays"], dict):
        manifest["arrays"] |= {k: checksum(k, t.contiguous()) for k, t in arrays.items()}
    if not isinstance(text, str):
        text = json.dumps(manifest)
    header = f"{version} {zlib.crc32(text.encode()):08x} {text}"
    save_file(arrays, path, metadata={"sparsecnn": header})


def refused(path: Path, text: str = "load") -> str:
    """The message, after checking that neither way of loading accepts the file."""
    with pytest.raises(ValueError, match=text) as caught:
        load(path)
    assert str(caught.value).startswith(f"load: {path}: ")
    model = small_stack()
    before = snapshot(model)
    with pytest.raises(ValueError):
        load(path, model)
    assert_unchanged(model, before)
    return str(caught.value)


def test_truncation_at_every_offset(path: Path) -> None:
    save(small_stack(), path)
    data = path.read_bytes()
    offsets = {*range(0, len(data), 7), *range(16), *range(len(data) - 16, len(data))}
    for offset in offsets:
        path.write_bytes(data[:offset])
        with pytest.raises(ValueError, match="complete safetensors"):
            load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="complete safetensors"):
        load(path)


def test_every_flipped_bit_of_the_header_is_noticed(path: Path) -> None:
    """All bits of the length and the first bytes, then one of every third byte, seeded."""
    model = small_stack()
    save(model, path)
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(7)
    flips = [(i, b) for i in range(40) for b in range(8)]
    flips += [(i, rng.randrange(8)) for i in range(40, end, 3)]
    for offset, bit in flips:
        bad = bytearray(data)
        bad[offset] ^= 1 << bit
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="load: "):
            load(path)


def test_flipped_bits_of_the_data_are_noticed(path: Path) -> None:
    model = small_stack()
    save(model, path)
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(8)
    for offset in [start, len(data) - 1, *(rng.randrange(start, len(data)) for _ in range(50))]:
        bad = bytearray(data)
        bad[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        refused(path, "checksum")


def test_random_bytes_anywhere(path: Path) -> None:
    save(sparse_stack(), path)
    data = path.read_bytes()
    for seed in range(150):
        rng = random.Random(seed)
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 20)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        if bad == data:
            continue
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="load: "):
            load(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}q\x00." * 20,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 10) + b"[[[[[[[[[[",
        struct.pack("<Q", 100000) + b"[" * 100000,
    ],
    ids=["empty", "zip", "pickle", "2^63", "2^40", "no metadata", "list", "deep"],
)
def test_foreign_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused(path)


def raw_header(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("overlap", {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}),
        ("negative shape", {"dtype": "F32", "shape": [-1], "data_offsets": [4, 8]}),
        ("huge shape", {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [4, 8]}),
        ("overflow", {"dtype": "F32", "shape": [2**32, 2**32, 2**2], "data_offsets": [4, 8]}),
        ("behind the end", {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}),
        ("backwards", {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}),
        ("dtype", {"dtype": "Q32", "shape": [1], "data_offsets": [4, 8]}),
    ],
)
def test_hostile_array_tables(path: Path, name: str, entry: dict[str, Any]) -> None:
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes(raw_header({"a": good, "b": entry}, b"\0" * 8))
    refused(path, "complete safetensors")


def test_safetensors_of_others(path: Path) -> None:
    for metadata in (None, {"format": "pt"}, {"Sparsecnn": "1"}):
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        refused(path, r"written by sparsecnn\.save")


def test_other_versions(path: Path) -> None:
    for version in ("1", "2", "", "3.0", "x" * 1000):
        save(small_stack(), path)
        forge(path, lambda m, a: None, version)
        refused(path, "version 3, got")


def test_forging_alone_does_not_break_a_file(path: Path) -> None:
    save(small_stack(), path)
    forge(path, lambda m, a: None)
    load(path)


def _set(*keys: Any, value: Any) -> Edit:
    def edit(manifest: dict[str, Any], arrays: dict[str, Tensor]) -> None:
        at: Any = manifest
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return edit


def _append(*records: dict[str, Any]) -> Edit:
    return lambda m, a: m["modules"].extend({"training": False, **r} for r in records)


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda m, a: a.update({name: change(a[name])})


def _drop(manifest: dict[str, Any], arrays: dict[str, Tensor], name: str) -> None:
    del arrays[name], manifest["arrays"][name]


def _conv(**args: Any) -> Edit:
    return lambda m, a: m["modules"][1]["args"].update(args)


def _csr(**args: Any) -> Edit:
    return lambda m, a: m["modules"][3]["args"].update(args)


def _spec(**fields: Any) -> Edit:
    return lambda m, a: m["packed"]["2.weight"].update(fields)


IDENTITY = {"type": "Identity", "args": {}}
SEQUENTIAL = {"type": "Sequential", "args": {}}
EDITS: dict[str, tuple[Edit, str]] = {
    # structure
    "unknown type": (_set("modules", 2, "type", value="Evil"), "'Evil'"),
    "dotted type": (_set("modules", 2, "type", value="os.system"), "os.system"),
    "module type": (_set("modules", 2, "type", value="Module"), "'Module'"),
    "type no string": (_set("modules", 2, "type", value=["ReLU"]), "path, type"),
    "no modules": (_set("modules", value=[]), "root first"),
    "modules no list": (_set("modules", value={}), "root first"),
    "record no object": (_set("modules", 1, value=3), "module record"),
    "training": (_set("modules", 0, "training", value=1), "training"),
    "extra field": (_set("modules", 1, "hook", value="x"), "no more"),
    "args no object": (_set("modules", 1, "args", value=[1]), "args"),
    "root path": (_set("modules", 0, "path", value="x"), "root first"),
    "twice": (_append({"path": "0", **IDENTITY}), "new paths"),
    "orphan": (_append({"path": "9.1", **IDENTITY}), "parents first"),
    "empty name": (
        _append({"path": "3", **SEQUENTIAL}, {"path": "3.", **IDENTITY}),
        "parents first",
    ),
    "inside a layer": (_append({"path": "1.x", **IDENTITY}), "inside a layer"),
    "illegal name": (_append({"path": "forward", **IDENTITY}), "legal module name"),
    "deep": (
        _append(*({"path": ".".join("3" * n), **SEQUENTIAL} for n in range(1, 99))),
        "new paths",
    ),
    "same_as unknown": (_append({"path": "3", "type": "ReLU", "same_as": "7"}), "same_as"),
    "same_as root": (_append({"path": "3", "type": "Sequential", "same_as": ""}), "inside itself"),
    "same_as another type": (_append({"path": "3", "type": "GELU", "same_as": "1"}), "same_as"),
    "cycle": (
        _append(
            {"path": "a", "type": "Sequential", "args": {}},
            {"path": "b", "type": "Sequential", "same_as": "a"},
            {"path": "b.x", "type": "Sequential", "same_as": "a"},
        ),
        "every module listed",
    ),
    "exponential": (
        _append(
            {"path": "n0", "type": "Sequential", "args": {}},
            *(
                r
                for i in range(1, 60)
                for r in (
                    {"path": f"n{i}", "type": "Sequential", "args": {}},
                    {"path": f"n{i}.a", "type": "Sequential", "same_as": f"n{i - 1}"},
                    {"path": f"n{i}.b", "type": "Sequential", "same_as": f"n{i - 1}"},
                )
            ),
        ),
        "every module listed",
    ),
    "custom": (
        _append({"path": "3", "type": "custom", "class": "os.system"}),
        r"os\.system at 3.*pass model=",
    ),
    # constructor arguments
    "unknown argument": (_conv(evil=1), "arguments of Conv2d among"),
    "device": (_conv(device="cuda"), "arguments of Conv2d among"),
    "nested": (_conv(stride=[[[1]]]), "arguments of Conv2d"),
    "object": (_conv(stride={"a": 1}), "arguments of Conv2d"),
    "long": (_conv(stride=[1] * 100), "arguments of Conv2d"),
    "negative": (_conv(out_channels=-4), "Conv2d accepts"),
    "huge": (_conv(out_channels=2**50), r"for \(1125899906842624"),
    "bignum": (_conv(out_channels=10**30), "Conv2d accepts"),
    "string": (_conv(out_channels="4"), "Conv2d accepts"),
    "groups": (_conv(groups=0), "Conv2d accepts"),
    "groups negative": (_conv(groups=-1), "Conv2d accepts"),
    "padding": (_conv(padding="evil"), "Conv2d accepts"),
    "kernel": (_conv(kernel_size=[3]), r"for \("),
    "no argument": (_set("modules", 1, "args", value={}), "with .*in_channels"),
    "csr channels": (_csr(out_channels=16), "CSRConv2d accepts.*where the arguments make"),
    "csr huge": (_csr(out_channels=2**40), "CSRConv2d accepts"),
    "csr activation": (_csr(activation="evil"), "CSRConv2d accepts"),
    "csr kernel": (_csr(kernel_size=[-3, 3]), "CSRConv2d accepts"),
    "csr not packed": (_set("modules", 3, "type", value="Conv2d"), "Conv2d"),
    "packed not csr": (_set("modules", 1, "type", value="CSRConv2d"), "packed CSR weight"),
    # packed weights
    "shape": (_spec(shape=[8, 4, 3, 4]), "where the arguments make"),
    "shape huge": (_spec(shape=[2**31 - 1, 1, 1, 1]), "256 times"),
    "shape negative": (_spec(shape=[-8, 4, 3, 3]), "non-negative"),
    "shape 5-d": (_spec(shape=[8, 4, 3, 3, 1]), "shape"),
    "kind": (_spec(kind="dense"), "2.weight|tensors"),
    "layout": (_spec(layout="zip"), "layout"),
    "layout list": (_spec(layout=[]), "layout"),
    "spec extra": (_spec(evil=1), "fields"),
    "spec no object": (_set("packed", "2.weight", value=[]), "packed"),
    "packed elsewhere": (
        lambda m, a: m["packed"].update({"9.weight": m["packed"].pop("2.weight")}),
        r"9\.weight",
    ),
    "no spec": (_set("packed", value={}), "CSR weight"),
    "values short": (_replace("2.weight#values", lambda t: t[:-1].clone()), "values"),
    "values dtype": (_replace("2.weight#values", lambda t: t.int()), "floating-point"),
    "values 2-d": (_replace("2.weight#values", lambda t: t[None].clone()), "1-d"),
    "index dtype": (_replace("2.weight#gaps", lambda t: t.int()), "uint8"),
    "index noise": (_replace("2.weight#gaps", lambda t: 255 - t), "2.weight"),
    "index empty": (_replace("2.weight#gaps", lambda t: t[:0].clone()), "2.weight"),
    # tensors
    "raw shape": (_replace("0.weight", lambda t: t[1:].clone()), r"0\.weight \(3, 3, 3, 3\) for"),
    "raw dtype": (_replace("0.weight", lambda t: t.long()), "int64"),
    "missing": (lambda m, a: _drop(m, a, "0.bias"), r"missing.*0\.bias"),
    "unexpected": (lambda m, a: a.update({"0.more": torch.zeros(1)}), r"unexpected.*0\.more"),
    "twice stored": (lambda m, a: a.update({"2.values": torch.zeros(1)}), "every tensor once"),
    "list of arrays": (_set("arrays", "zz", value=1), "zz"),
    "checksum type": (_set("arrays", "zz", value="1"), "arrays an object of int"),
    "alias unknown": (_set("aliases", "0.more", value="7.weight"), "tied to a stored"),
    "alias itself": (_set("aliases", "0.more", value="0.more"), "tied to a stored"),
    "alias stored": (_set("aliases", "0.bias", value="0.weight"), "tied to a stored"),
    "alias shape": (
        lambda m, a: (_drop(m, a, "0.bias"), m["aliases"].update({"0.bias": "0.weight"})),
        r"0\.bias \(4, 3, 3, 3\) for",
    ),
    "alias type": (_set("aliases", "0.more", value=3), "aliases an object of str"),
    "channels_last of 1-d": (_set("channels_last", value=["0.bias"]), "channels_last"),
    "channels_last unknown": (_set("channels_last", value=["7"]), "channels_last"),
    "channels_last type": (_set("channels_last", value=[1]), "list of strings"),
    "layout value": (_set("layouts", value={"": "evil"}), "layout one of"),
    "layout path": (_set("layouts", value={"7": "contiguous"}), "layout one of .*for '7'"),
    "parts of nothing": (_set("microbatches", value={"": 0}), "at least one image"),
    "parts path": (_set("microbatches", value={"7": 2}), "at least one image .*for '7'"),
    "parts type": (_set("microbatches", value={"": True}), "microbatches an object of int"),
    "layout type": (_set("layouts", value=["contiguous"]), "layouts an object of str"),
    # the JSON itself
    "field missing": (lambda m, a: m.pop("frozen"), "manifest with"),
    "field more": (_set("evil", value=1), "manifest with"),
    "no JSON": (lambda m, a: "{", "JSON"),
    "JSON list": (lambda m, a: "[]", "manifest with"),
    "JSON deep": (lambda m, a: "[" * 100000, "JSON"),
    "JSON digits": (lambda m, a: "1" * 10000, "JSON|manifest with"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_forged_files(path: Path, name: str) -> None:
    edit, text = EDITS[name]
    save(small_stack(), path)
    forge(path, edit)
    refused(path, text)


def test_corrupt_csr_arrays_never_reach_a_layer(path: Path) -> None:
    """Any index bytes with right checksums: refused, or a weight that passes its own check."""
    model = small_stack()
    loaded = 0
    save(model, path)
    good = path.read_bytes()
    for seed in range(150):
        path.write_bytes(good)
        g = torch.Generator().manual_seed(seed)

        def edit(m: dict[str, Any], a: dict[str, Tensor], g: torch.Generator = g) -> None:
            gaps = a["2.weight#gaps"]
            at = torch.randint(0, len(gaps), (2,), generator=g)
            gaps[at] = torch.randint(0, 256, (2,), generator=g, dtype=torch.uint8)

        forge(path, edit)
        try:
            back = load(path)
        except ValueError:
            continue
        back[2].weight.validate()
        loaded += 1
    assert 0 < loaded < 150


def _mutate(value: Any, rng: random.Random) -> Any:
    """One random change somewhere in a JSON value."""
    odd = [None, True, -1, 0, 2**31, 2**64, 1.5, "", "x", "0", [], {}, [[]], "custom", "Sequential"]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        out = dict(value)
        if rng.random() < 0.15:
            del out[key]
        else:
            out[key] = _mutate(value[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.9:
        at, out_list = rng.randrange(len(value)), list(value)
        if rng.random() < 0.2:
            out_list.insert(at, out_list[rng.randrange(len(value))])
        else:
            out_list[at] = _mutate(value[at], rng)
        return out_list
    return rng.choice(odd)


def test_random_manifests(path: Path) -> None:
    """Seeded changes with right checksums: a model or a ValueError, and the model unchanged."""
    refusals = 0
    save(small_stack(), path)
    good = path.read_bytes()
    for seed in range(300):
        rng = random.Random(seed)
        path.write_bytes(good)

        def edit(m: dict[str, Any], a: dict[str, Tensor], rng: random.Random = rng) -> None:
            changed = m
            for _ in range(rng.randrange(1, 3)):
                changed = _mutate(changed, rng)
            if isinstance(changed, dict):
                m.clear()
                m.update(changed)

        try:
            forge(path, edit)
        except (TypeError, AttributeError):
            continue  # no longer a manifest that can be written
        model = small_stack()
        before = snapshot(model)
        try:
            load(path)
        except ValueError:
            refusals += 1
        try:
            load(path, model)
        except ValueError:
            assert_unchanged(model, before)
    assert refusals > 150


def test_custom_types_are_never_constructed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(converted_net(), path)

    def boom(*args: object) -> None:
        raise AssertionError("constructed")

    fresh = Net()
    monkeypatch.setattr(Net, "__init__", boom)
    with pytest.raises(ValueError, match="pass model="):
        load(path)
    load(path, fresh)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    with pytest.raises(TypeError):
        load(3.5)  # type: ignore[arg-type]
