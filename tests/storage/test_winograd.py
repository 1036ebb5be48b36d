"""Files of layers whose weight is in the Winograd domain: exact round trips, and forged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.nn import WinogradConv2d
from sparsecnn.storage import load, save
from tests.storage.test_hostile import forge
from tests.storage.test_save_load import assert_same

Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def layer(
    tile: int = 2, sparse: bool = True, activation: str = "relu", **arguments: Any
) -> WinogradConv2d:
    """8 channels and 20 filters in 2 groups; about a fifth of the taps where it is sparse."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 20, 3, **({"padding": 1, "groups": 2} | arguments))
    mask = None
    if sparse:
        mask = torch.rand((tile + 2) ** 2, 20, 8 // conv.groups) < 0.2
    return WinogradConv2d.from_dense(conv, tile, mask=mask, activation=activation)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"groups": 1, "bias": False, "padding": "same"}, {"padding_mode": "circular"}],
    ids=str,
)
def test_layers_come_back(
    path: Path, tile: int, sparse: bool, dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    model = nn.Sequential(layer(tile, sparse, "silu", **arguments).to(dtype)).eval()
    model[0].values.requires_grad_(False)
    save(model, path)
    again = load(path)
    assert_same(again, model)
    assert type(again[0]) is WinogradConv2d and again[0].tile == tile  # type: ignore[index]
    assert not again[0].values.requires_grad  # type: ignore[index]
    x = torch.randn(2, 8, 9, 7).to(dtype)
    assert torch.equal(again(x), model(x))
    assert repr(again) == repr(model)


def test_a_weight_with_nothing_kept_comes_back(path: Path) -> None:
    conv = nn.Conv2d(3, 5, 3)
    model = nn.Sequential(
        WinogradConv2d.from_dense(conv, mask=torch.zeros(36, 5, 3, dtype=torch.bool))
    )
    save(model, path)
    assert_same(load(path), model)


def test_into_a_dense_model(path: Path) -> None:
    model = nn.Sequential(layer(4), nn.ReLU())
    save(model, path)
    twin = nn.Sequential(nn.Conv2d(8, 20, 3, padding=1, groups=2), nn.ReLU())
    filled = load(path, twin)
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(filled(x), model(x))


def test_a_corrupt_layer_is_not_saved(path: Path) -> None:
    bad = layer()
    bad.col_idx[0] = 77  # type: ignore[index]
    with pytest.raises(ValueError, match=r"expected col_idx in \[0, 4\)"):
        save(nn.Sequential(bad), path)
    assert not path.exists()


def _array(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda m, a: a.update({f"0.weight#{name}": change(a[f"0.weight#{name}"]).contiguous()})


def _at(name: str, index: int, value: int) -> Edit:
    def change(t: Tensor) -> Tensor:
        t[index] = value
        return t

    return _array(name, change)


def _spec(**fields: Any) -> Edit:
    return lambda m, a: m["packed"]["0.weight"].update(fields)


def _args(**fields: Any) -> Edit:
    return lambda m, a: m["modules"][1]["args"].update(fields)


def _drop(*names: str) -> Edit:
    def edit(m: dict[str, Any], a: dict[str, Tensor]) -> None:
        for name in names:
            del a[f"0.weight#{name}"], m["arrays"][f"0.weight#{name}"]

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "values dtype": (_array("values", Tensor.int), "values floating point"),
    "values 2-d": (_array("values", lambda t: t[None]), "values a 1-d"),
    "values short": (_array("values", lambda t: t[:-1]), "col_idx with nnz"),
    "columns dtype": (_array("col_idx", Tensor.long), "col_idx a 1-d int32"),
    "columns above": (_at("col_idx", 0, 4), r"col_idx in \[0, 4\)"),
    "columns below": (_at("col_idx", 0, -1), r"col_idx in \[0, 4\)"),
    "columns unsorted": (_array("col_idx", lambda t: t.flip(0)), "col_idx ascending"),
    "rows dtype": (_array("row_ptr", Tensor.long), "row_ptr a 1-d int32"),
    "rows short": (_array("row_ptr", lambda t: t[:-1]), "row_ptr with K"),
    "rows start": (_at("row_ptr", 0, 1), "row_ptr from 0"),
    "rows end": (_at("row_ptr", -1, 2**31 - 1), "row_ptr from 0"),
    "rows falling": (_at("row_ptr", 3, 2**31 - 1), "row_ptr non-decreasing"),
    "no values": (_drop("values"), r"expected fields .* and arrays"),
    "no columns": (_drop("col_idx"), r"expected fields .* and arrays"),
    "no rows": (_drop("row_ptr"), r"expected fields .* and arrays"),
    "no indices": (_drop("col_idx", "row_ptr"), "values of shape"),
    "tile 3": (_spec(tile=3), "tile 2 or 4, got 3"),
    "tile 4": (_spec(tile=4), "row_ptr with K"),
    "tile bool": (_spec(tile=True), "tile an integer"),
    "tile text": (_spec(tile="2"), "tile an integer"),
    "tile argument": (_args(tile=4), "weight of tile 2 where it is 4"),
    "groups": (_spec(groups=1), "row_ptr with K"),
    "groups zero": (_spec(groups=0), "groups a positive divisor"),
    "shape": (_spec(shape=[20, 4, 3, 1]), r"shape \(K, C/G, 3, 3\)"),
    "shape huge": (_spec(shape=[2**30, 4, 3, 3]), "fewer than 2"),
    "channels": (_spec(shape=[20, 5, 3, 3]), "where the arguments make"),
    "stride": (_args(stride=[2, 2]), "stride 1, got"),
    "dilation": (_args(dilation=[2, 2]), "dilation 1, got"),
    "kind": (_spec(kind="pattern"), "expected fields"),
    "as FusedConv2d": (lambda m, a: m["modules"][1].update(type="FusedConv2d"), "among"),
    "as PatternConv2d": (lambda m, a: m["modules"][1].update(type="PatternConv2d"), "among"),
    "nothing packed": (lambda m, a: m.update(packed={}), "in the Winograd domain for"),
}


@pytest.mark.parametrize("name", EDITS)
def test_forged_files_are_refused(path: Path, name: str) -> None:
    edit, text = EDITS[name]
    save(nn.Sequential(layer()), path)
    forge(path, edit)
    with pytest.raises(ValueError, match=text):
        load(path)
