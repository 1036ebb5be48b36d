"""Files of layers whose weight is in a pattern: exact round trips, and files made to harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.formats.pattern import INDEX_ARRAYS
from sparsecnn.nn import CSRConv2d, PatternConv2d, apply_layout_
from sparsecnn.storage import load, save
from tests.storage.test_hostile import forge
from tests.storage.test_load_into import assert_unchanged, snapshot
from tests.storage.test_save_load import as_bytes, assert_same, manifest

ARRAYS = ("values", *INDEX_ARRAYS)
PATTERNS = ("none", "shape", "filter", "vector2", "vector4", "kernel", "cluster", "2:4", "1:2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def mask_of(pattern: str, shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """A mask of the weight of one group that has the pattern."""
    g = torch.Generator().manual_seed(seed)
    k, c, r, s = shape

    def half(*size: int) -> Tensor:
        return torch.rand(size, generator=g) < 0.5

    if pattern == "shape":
        return half(1, c, r, s).expand(shape)
    if pattern == "filter":
        return (torch.arange(k) % 3 != 1).reshape(-1, 1, 1, 1).expand(shape)
    if pattern.startswith("vector"):
        v = int(pattern[6:])
        return half(-(-k // v), c, r, s).repeat_interleave(v, 0)[:k]
    if pattern == "kernel":
        return half(k, c, 1, 1).expand(shape)
    if pattern == "cluster":
        return half(3, c, r, s)[torch.arange(k) % 3]
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        scores = torch.rand((k, c // m, m, r, s), generator=g)
        return (scores.argsort(2).argsort(2) < n).reshape(shape)
    return half(*shape)


def layer(
    pattern: str, seed: int = 0, activation: str = "relu", **arguments: Any
) -> PatternConv2d:
    """A layer of 8 channels and 12 filters with a random weight in the pattern."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(8, 12, **({"kernel_size": 3, "padding": 1} | arguments))
    k, c, r, s = conv.weight.shape
    shape = k // conv.groups, c, r, s
    with torch.no_grad():
        conv.weight.mul_(torch.cat([mask_of(pattern, shape, seed + i) for i in range(conv.groups)]))
    return PatternConv2d.from_dense(conv, pattern, activation=activation)


def dense_of(packed: PatternConv2d) -> nn.Conv2d:
    """Its architecture: the same arguments, another weight."""
    like = packed.to_dense()
    return nn.Conv2d(
        like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding,
        like.dilation, like.groups, packed.bias is not None, like.padding_mode,
    )  # fmt: skip


def assert_comes_back(packed: PatternConv2d, path: Path, x: Tensor) -> None:
    """Both ways of loading: the same bits in every array and in the output, the same pattern."""
    save(nn.Sequential(packed), path)
    for model in (None, nn.Sequential(dense_of(packed))):
        back = load(path, model)
        assert_same(back, nn.Sequential(packed))
        assert back[0].pattern == packed.pattern
        assert back[0].weight_shape == packed.weight_shape
        with torch.no_grad():
            assert torch.equal(as_bytes(back(x)), as_bytes(packed(x)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_comes_back(path: Path, pattern: str) -> None:
    packed = layer(pattern)
    assert packed.pattern == pattern and packed.density < 1
    assert_comes_back(packed, path, torch.randn(2, 8, 9, 7))
    spec = manifest(path)["packed"]["0.weight"]
    assert spec == {"kind": "pattern", "shape": [12, 8, 3, 3], "groups": 1, "pattern": pattern}


ARGUMENTS: list[dict[str, Any]] = [
    {"groups": 2},
    {"groups": 4, "bias": False},
    {"bias": False, "activation": "silu"},
    {"stride": (1, 2), "dilation": (2, 1), "activation": "none"},
    {"padding": "same", "kernel_size": (2, 5)},
    {"padding_mode": "reflect", "padding": (1, 2)},
    {"kernel_size": 1, "padding": 0},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16, "groups": 2},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("pattern", ["shape", "none"])
def test_arguments_and_dtypes_come_back(
    path: Path, pattern: str, arguments: dict[str, Any]
) -> None:
    packed = layer(pattern, **arguments)
    assert_comes_back(packed, path, torch.randn(1, 8, 9, 7).to(packed.values.dtype))


def test_odd_values_come_back(path: Path) -> None:
    """Padding, -0.0 and NaN keep their bits; flags come along."""
    packed = layer("vector4")
    with torch.no_grad():
        packed.values[:3] = torch.tensor([0.0, -0.0, float("nan")])
    packed.values.requires_grad_(False)
    packed.train()
    assert_comes_back(packed, path, torch.randn(1, 8, 5, 5))


def test_weights_with_nothing_kept_come_back(path: Path) -> None:
    conv = nn.Conv2d(64, 128, 3)  # far larger than what the file holds of it
    nn.init.zeros_(conv.weight)
    packed = PatternConv2d.from_dense(conv)
    assert packed.nnz == 0
    assert_comes_back(packed, path, torch.randn(1, 64, 5, 5))
    assert path.stat().st_size < 8192


def test_a_shared_layer_stays_one(path: Path) -> None:
    conv = nn.Conv2d(4, 4, 1)
    shared = PatternConv2d.from_dense(conv)
    save(nn.Sequential(shared, nn.ReLU(), shared), path)
    alone, into = load(path), load(path, nn.Sequential(conv, nn.ReLU(), conv))
    for back in (alone, into):
        assert back[0] is back[2] and torch.equal(back[0].values, shared.values)


@pytest.mark.parametrize("old", ["another pattern", "csr", "dense"])
def test_into_models_that_were_converted(path: Path, old: str) -> None:
    packed = layer("shape")
    model = nn.Sequential(dense_of(packed))
    if old == "another pattern":
        model[0] = layer("kernel", seed=1)
        assert model[0].values.shape != packed.values.shape
    elif old == "csr":
        model[0] = CSRConv2d.from_dense(model[0])
    source = apply_layout_(nn.Sequential(packed), "channels_last")
    save(source, path)
    assert_same(load(path, model), source)
    # And back: the dense architecture's own file into the converted model.
    dense = nn.Sequential(dense_of(packed))
    save(dense, path)
    assert_same(load(path, model), dense)


def test_into_another_geometry_is_refused(path: Path) -> None:
    save(nn.Sequential(layer("shape")), path)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"with padding \(1, 1\), the model \(2, 2\)"):
        load(path, model)
    assert_unchanged(model, before)


def test_a_modified_layer_is_refused(path: Path) -> None:
    packed = layer("shape")
    packed.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="PatternConv2d at 0 with its own attributes"):
        save(nn.Sequential(packed), path)
    packed = layer("shape")
    packed.pattern = "evil"
    with pytest.raises(ValueError, match="expected pattern the name of one, got 'evil'"):
        save(nn.Sequential(packed), path)
    packed = layer("shape")
    packed.columns = packed.columns + 100
    with pytest.raises(ValueError, match=r"expected columns in \[0, 72\)"):
        save(nn.Sequential(packed), path)
    assert not path.exists()


Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]


def _array(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda m, a: a.update({f"0.weight#{name}": change(a[f"0.weight#{name}"]).contiguous()})


def _at(name: str, index: int, value: int) -> Edit:
    def change(t: Tensor) -> Tensor:
        t[index] = value
        return t

    return _array(name, change)


def _swapped(name: str, i: int, j: int) -> Edit:
    def change(t: Tensor) -> Tensor:
        t[[i, j]] = t[[j, i]]
        return t

    return _array(name, change)


def _spec(**fields: Any) -> Edit:
    return lambda m, a: m["packed"]["0.weight"].update(fields)


def _args(**fields: Any) -> Edit:
    return lambda m, a: m["modules"][1]["args"].update(fields)


def _huge(manifest: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """A filter group of 2^31 - 1 filters, of which none is stored."""
    k = 2**31 - 1
    manifest["packed"]["0.weight"].update(shape=[k, 1, 1, 1], groups=1)
    manifest["modules"][1]["args"].update(out_channels=k, in_channels=1, kernel_size=[1, 1])
    manifest["modules"][1]["args"].update(groups=1)
    arrays["0.weight#group_rows"] = torch.tensor([0, k], dtype=torch.int32)
    arrays["0.weight#group_columns"] = torch.zeros(2, dtype=torch.int32)
    arrays["0.weight#columns"] = torch.zeros(0, dtype=torch.int32)
    arrays["0.weight#values"] = torch.zeros(0)


def _drop(name: str) -> Edit:
    def edit(m: dict[str, Any], a: dict[str, Tensor]) -> None:
        del a[f"0.weight#{name}"], m["arrays"][f"0.weight#{name}"]

    return edit


# The layer: 12 filters of 8 channels in 2 groups, in filter groups of 4 filters and the last of 2.
EDITS: dict[str, tuple[Edit, str]] = {
    # each array: dtype, dimensions, length, range, order
    "values dtype": (_array("values", Tensor.int), "values a 1-d floating-point"),
    "values 2-d": (_array("values", lambda t: t[None]), "values a 1-d floating-point"),
    "values short": (_array("values", lambda t: t[:-1]), r"expected \d+ values, got"),
    "values long": (_array("values", lambda t: torch.cat([t, t])), r"expected \d+ values, got"),
    "values empty": (_array("values", lambda t: t[:0]), r"expected \d+ values, got 0"),
    "columns dtype": (_array("columns", Tensor.long), "columns a 1-d int32"),
    "columns float": (_array("columns", Tensor.float), "columns a 1-d int32"),
    "columns 2-d": (_array("columns", lambda t: t[None]), "columns a 1-d int32"),
    "columns short": (_array("columns", lambda t: t[:-1]), "expected group_columns from 0 to"),
    "columns empty": (_array("columns", lambda t: t[:0]), "expected group_columns from 0 to 0"),
    "columns below": (_at("columns", 0, -1), r"columns in \[0, 36\), got \[-1"),
    "columns above": (_at("columns", 0, 36), r"columns in \[0, 36\)"),
    "columns int32 min": (_at("columns", 0, -(2**31)), r"columns in \[0, 36\)"),
    "columns unsorted": (_swapped("columns", 0, 1), "columns ascending"),
    "columns twice": (_array("columns", lambda t: t - t), "columns ascending"),
    "filters dtype": (_array("filters", Tensor.short), "filters a 1-d int32"),
    "filters 2-d": (_array("filters", lambda t: t[:, None]), "filters a 1-d int32"),
    "filters short": (_array("filters", lambda t: t[:-1]), "permutation of 0 to 11, got 11"),
    "filters long": (_array("filters", lambda t: torch.cat([t, t])), "permutation of .* got 24"),
    "filters below": (_at("filters", 0, -1), "filters a permutation"),
    "filters above": (_at("filters", 0, 12), "filters a permutation"),
    "filters twice": (_at("filters", 0, 1), "filters a permutation"),
    "filters astray": (_swapped("filters", 0, 11), "filters to stay in their group"),
    "rows dtype": (_array("group_rows", Tensor.long), "group_rows a 1-d int32"),
    "rows 2-d": (_array("group_rows", lambda t: t[None]), "group_rows a 1-d int32"),
    "rows empty": (_array("group_rows", lambda t: t[:0]), "of one length"),
    "rows short": (_array("group_rows", lambda t: t[:-1]), "of one length"),
    "rows start": (_at("group_rows", 0, 1), "group_rows from 0 to 12, got 1"),
    "rows end": (_at("group_rows", -1, 2**31 - 1), "group_rows from 0 to 12"),
    "rows falling": (_at("group_rows", 1, 11), "group_rows to rise"),
    "rows negative": (_at("group_rows", 1, -4), "group_rows to rise"),
    "rows equal": (_at("group_rows", 1, 0), "group_rows to rise"),
    "rows astray": (_at("group_rows", 2, 7), "inside one group of the convolution"),
    "ends dtype": (_array("group_columns", Tensor.long), "group_columns a 1-d int32"),
    "ends 2-d": (_array("group_columns", lambda t: t[None]), "group_columns a 1-d int32"),
    "ends short": (_array("group_columns", lambda t: t[1:]), "of one length"),
    "ends start": (_at("group_columns", 0, -1), "group_columns from 0 to"),
    "ends end": (_at("group_columns", -1, 2**31 - 1), "group_columns from 0 to"),
    "ends falling": (_at("group_columns", 1, 2**31 - 1), "group_columns not to fall"),
    "ends negative": (_at("group_columns", 1, -5), "group_columns not to fall"),
    "ends moved": (
        _array("group_columns", lambda t: t + torch.tensor([0, 0, 0, 1, 0]).int()),
        r"expected \d+ values|ascending",
    ),
    **{f"no {name}": (_drop(name), r"expected fields .* and arrays") for name in ARRAYS},
    "one array more": (
        lambda m, a: a.update({"0.weight#mask": torch.zeros(1, dtype=torch.uint8)}),
        "and arrays",
    ),
    # the specification
    "kind csr": (_spec(kind="csr"), "kind csr with layout|layout"),
    "kind dense": (_spec(kind="dense"), "kind dense with layout"),
    "kind list": (_spec(kind=[]), "kind dense"),
    "spec extra": (_spec(evil=1), "expected fields"),
    "shape other": (_spec(shape=[12, 2, 6, 3]), "where the arguments make"),
    "shape 2-d": (_spec(shape=[12, 36]), r"expected shape \(K"),
    "shape negative": (_spec(shape=[-12, 4, 3, 3]), "non-negative"),
    "shape bool": (_spec(shape=[True, 4, 3, 3]), "non-negative"),
    "shape empty": (_spec(shape=[0, 2**32, 2**32, 1]), "fewer than 2"),
    "shape huge": (_spec(shape=[12, 2**30, 1, 1]), "fewer than 2"),
    "filters huge": (_huge, "filters a permutation of 0 to 2147483646, got 12"),
    "groups zero": (_spec(groups=0), "groups a positive divisor"),
    "groups negative": (_spec(groups=-2), "groups a positive divisor"),
    "groups no divisor": (_spec(groups=5), "groups a positive divisor"),
    "groups bool": (_spec(groups=True), "groups an integer"),
    "groups float": (_spec(groups=2.0), "groups an integer"),
    "groups other": (_spec(groups=1), "weight of 1 groups where they are 2"),
    "pattern unknown": (_spec(pattern="evil"), "the name of one, got .*'evil'"),
    "pattern number": (_spec(pattern=3), "the name of one"),
    "pattern vector0": (_spec(pattern="vector0"), "the name of one"),
    "pattern digits": (_spec(pattern="vector" + "9" * 99), "the name of one"),
    "pattern 4:2": (_spec(pattern="4:2"), "the name of one"),
    # the arguments
    "channels": (_args(out_channels=24), "where the arguments make"),
    "channels huge": (_args(in_channels=2**40), "PatternConv2d accepts"),
    "groups argument": (_args(groups=4), "where the arguments make"),
    "kernel negative": (_args(kernel_size=[-3, 3]), "PatternConv2d accepts"),
    "activation": (_args(activation="evil"), "PatternConv2d accepts"),
    "padding_mode": (_args(padding_mode="evil"), "PatternConv2d accepts"),
    "argument pattern": (_args(pattern="shape"), "arguments of PatternConv2d among"),
    "not packed": (lambda m, a: m["modules"][1].update(type="CSRConv2d"), "packed CSR weight for"),
    "as FusedConv2d": (lambda m, a: m["modules"][1].update(type="FusedConv2d"), "no packed weight"),
    "nothing packed": (lambda m, a: m.update(packed={}), "weight in a pattern for"),
    "stored twice": (lambda m, a: a.update({"0.values": torch.zeros(1)}), "every tensor once"),
}


def small() -> nn.Sequential:
    return nn.Sequential(layer("vector4", groups=2))


def test_the_layer_that_is_forged_has_the_structure_the_edits_rely_on(path: Path) -> None:
    packed = small()[0]
    assert packed.group_rows.tolist() == [0, 4, 6, 10, 12]
    save(nn.Sequential(packed), path)
    forge(path, lambda m, a: None)
    assert_same(load(path), nn.Sequential(packed))


@pytest.mark.parametrize("name", EDITS)
def test_forged_files_are_refused(path: Path, name: str) -> None:
    edit, text = EDITS[name]
    save(small(), path)
    forge(path, edit)
    with pytest.raises(ValueError, match=text) as caught:
        load(path)
    assert str(caught.value).startswith(f"load: {path}: ")
    for model in (small(), nn.Sequential(dense_of(layer("vector4", groups=2)))):
        before = snapshot(model)
        with pytest.raises(ValueError):
            load(path, model)
        assert_unchanged(model, before)


def test_random_indices_never_reach_a_layer(path: Path) -> None:
    """Any index with right checksums: refused, or a weight that passes its own check."""
    save(small(), path)
    good, loaded = path.read_bytes(), 0
    x = torch.randn(1, 8, 5, 5)
    for seed in range(200):
        path.write_bytes(good)
        g = torch.Generator().manual_seed(seed)

        def edit(m: dict[str, Any], a: dict[str, Tensor], g: torch.Generator = g) -> None:
            array = a[f"0.weight#{INDEX_ARRAYS[seed % 4]}"]  # noqa: B023
            at = torch.randint(0, len(array), (1,), generator=g)
            array[at] += torch.randint(-2, 3, (1,), generator=g, dtype=torch.int32)

        forge(path, edit)
        try:
            back = load(path)
        except ValueError:
            continue
        back[0].weight.validate()
        assert back(x).shape == (1, 12, 5, 5)
        loaded += 1
    assert 0 < loaded < 200
