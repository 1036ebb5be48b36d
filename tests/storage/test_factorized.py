"""Files of factorized networks: round trips, into the dense architecture, and forged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn import accelerate, load, save
from sparsecnn.factorize import factorize
from sparsecnn.nn import FactorizedConv2d, FactorizedLinear, PermuteChannels
from sparsecnn.nn.circulant import CirculantLinear, CirculantPointwise
from tests.storage.models import Net
from tests.storage.test_hostile import forge
from tests.storage.test_load_into import assert_unchanged, snapshot
from tests.storage.test_save_load import assert_same

Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]
METHODS = ("tucker2", "vh", "cp", "mono", "dct")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def dense(groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=(2, 1), padding=1, groups=groups),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


def factorized(method: str = "tucker2", groups: int = 1, rank: int = 2) -> nn.Sequential:
    model = dense(groups)
    model[0] = factorize(model[0], method, rank)
    model[4] = factorize(model[4], "fc_svd", 3)
    return model


def computes_the_same(a: nn.Module, b: nn.Module, channels: int = 4) -> None:
    x = torch.randn(2, channels, 9, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("into", [False, True], ids=["alone", "into"])
@pytest.mark.parametrize(
    ("method", "groups"), [*((m, 1) for m in METHODS), ("tucker2", 2), ("vh", 4)]
)
def test_factorized_networks_come_back(path: Path, method: str, groups: int, into: bool) -> None:
    model = factorized(method, groups)
    save(model, path)
    back = load(path, dense(groups) if into else None)
    assert_same(back, model)
    one, two = model[0], back[0]
    assert type(two) is FactorizedConv2d and type(back[4]) is FactorizedLinear
    assert (two.method, two.ranks, two.groups) == (one.method, one.ranks, one.groups)
    assert (back[4].method, back[4].ranks) == ("fc_svd", (3,))
    computes_the_same(back, model)
    assert torch.equal(two.dense_weight(), one.dense_weight())


def test_stages_with_fixed_bases_stay_fixed(path: Path) -> None:
    model = factorized("dct")
    fixed = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert fixed  # the cosines
    save(model, path)
    for back in (load(path), load(path, dense())):
        assert [n for n, p in back.named_parameters() if not p.requires_grad] == fixed


def test_a_permutation_comes_back(path: Path) -> None:
    model = factorized("mono")
    places = [i for i, m in enumerate(model[0]) if isinstance(m, PermuteChannels)]
    assert places
    index = model[0][places[0]].index
    assert not torch.equal(index, torch.arange(len(index)))
    save(model, path)
    for back in (load(path), load(path, dense())):
        assert torch.equal(back[0][places[0]].index, index)


def test_other_ranks_or_another_method_in_the_model(path: Path) -> None:
    model = factorized("tucker2")
    save(model, path)
    for other in (factorized("tucker2", rank=4), factorized("vh"), factorized("cp")):
        assert_same(load(path, other), model)
    twin = factorized("tucker2")
    weight = twin[0][0].weight
    load(path, twin)
    assert twin[0][0].weight is weight  # an optimizer made before still knows it


def test_hooks_of_the_dense_layer_stay(path: Path) -> None:
    model, fresh = factorized(), dense()
    save(model, path)
    calls: list[str] = []
    fresh[0].register_forward_hook(lambda m, a, y: calls.append(type(m).__name__))
    load(path, fresh)(torch.randn(1, 4, 9, 7))
    assert calls == ["FactorizedConv2d"]


def test_inside_the_users_own_block(path: Path) -> None:
    model, fresh = Net(8).eval(), Net(8)
    model.blocks[0].conv = factorize(model.blocks[0].conv, "tucker2", 2)
    model.head = factorize(model.head, "fc_svd", 3)
    save(model, path)
    assert_same(load(path, fresh), model)
    computes_the_same(fresh, model, 3)


def test_an_accelerated_factorized_network(path: Path) -> None:
    model = factorized()
    fast = accelerate(model, torch.randn(1, 4, 9, 7), warmup=1, runs=2)
    save(fast, path)
    back = load(path, dense())
    assert_same(back, fast)
    computes_the_same(back, fast)


@pytest.mark.parametrize(
    ("swap", "text"),
    [
        (lambda m: m.__setitem__(0, nn.Conv2d(4, 9, 3, (2, 1), 1)), "outputs 8, the model 9"),
        (lambda m: m.__setitem__(0, nn.Conv2d(3, 8, 3, (2, 1), 1)), "inputs 4, the model 3"),
        (lambda m: m.__setitem__(0, nn.Conv2d(4, 8, 3, 1, 1)), r"stride \(2, 1\), the model \(1, "),
        (lambda m: m.__setitem__(0, nn.Conv2d(4, 8, 3, (2, 1), 1, groups=2)), "with groups 1, the"),
        (lambda m: m.__setitem__(0, nn.Linear(4, 8)), "has FactorizedConv2d, the model Linear"),
        (lambda m: m.__setitem__(0, nn.ReLU()), "has FactorizedConv2d, the model ReLU"),
        (lambda m: m.__setitem__(4, nn.Linear(32, 11)), "outputs 10, the model 11"),
        (lambda m: m.__setitem__(4, nn.Conv2d(32, 10, 1)), "has FactorizedLinear, the model Conv"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(
    path: Path, swap: Callable[[nn.Module], None], text: str
) -> None:
    save(factorized(), path)
    model = dense()
    swap(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        load(path, model)
    assert_unchanged(model, before)


def circulants(sign_flip: bool = True, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        CirculantPointwise(4, bias, sign_flip=sign_flip, seed=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        CirculantLinear(4, bias, sign_flip=sign_flip, seed=4),
    ).eval()


def with_dense_layers(bias: bool = True) -> nn.Sequential:
    model = circulants(bias=bias)
    model[0], model[3] = nn.Conv2d(4, 4, 1, bias=bias), nn.Linear(4, 4, bias=bias)
    return model


@pytest.mark.parametrize("sign_flip", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_circulant_layers_come_back(path: Path, sign_flip: bool, bias: bool) -> None:
    model = circulants(sign_flip, bias)
    save(model, path)
    for into in (None, with_dense_layers(bias), circulants(sign_flip, bias)):
        back = load(path, into)
        assert_same(back, model)
        assert type(back[0]) is CirculantPointwise and type(back[3]) is CirculantLinear
        computes_the_same(back, model)


@pytest.mark.parametrize(
    ("place", "layer", "text"),
    [
        (0, nn.Conv2d(4, 4, 3, padding=1), r"kernel_size \(1, 1\), the model \(3, 3\)"),
        (0, nn.Conv2d(4, 4, 1, 2), r"stride \(1, 1\), the model \(2, 2\)"),
        (0, nn.Conv2d(4, 4, 1, groups=2), "groups 1, the model 2"),
        (0, nn.Conv2d(4, 8, 1), "out_channels 4, the model 8"),
        (3, nn.Linear(4, 5), "out_features 4, the model 5"),
        (3, nn.ReLU(), "the file has CirculantLinear, the model ReLU"),
        (3, CirculantLinear(4, sign_flip=False), "CirculantLinear, the model CirculantLinear|sign"),
    ],
)
def test_a_circulant_layer_that_does_not_fit(
    path: Path, place: int, layer: nn.Module, text: str
) -> None:
    save(circulants(), path)
    model = with_dense_layers()
    model[place] = layer
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        load(path, model)
    assert_unchanged(model, before)


def _args(kind: str, **fields: Any) -> Edit:
    def edit(m: dict[str, Any], a: dict[str, Tensor]) -> None:
        next(r for r in m["modules"] if r["type"] == kind)["args"].update(fields)

    return edit


def _array(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(m: dict[str, Any], a: dict[str, Tensor]) -> None:
        key = next(k for k in a if k.endswith(name))
        a[key] = change(a[key]).contiguous()

    return edit


def _at(name: str, value: int) -> Edit:
    return _array(name, lambda t: torch.cat([torch.full_like(t[:1], value), t[1:]]))


CONV, LINEAR, RANKS = "FactorizedConv2d", "FactorizedLinear", "ranks integers >= 1, got"
EDITS: dict[str, tuple[Edit, str]] = {
    "rank 0": (_args(CONV, ranks=[0, 2]), RANKS),
    "rank negative": (_args(LINEAR, ranks=[-1]), RANKS),
    "rank float": (_args(CONV, ranks=[2.0, 2]), RANKS),
    "rank bool": (_args(CONV, ranks=[True]), RANKS),
    "rank text": (_args(LINEAR, ranks="12"), RANKS),
    "rank nested": (_args(CONV, ranks=[[2]]), RANKS),
    "ranks no list": (_args(CONV, ranks=2), "FactorizedConv2d accepts"),
    "ranks none": (_args(CONV, ranks=None), "FactorizedConv2d accepts"),
    "ranks long": (_args(CONV, ranks=[1] * 99), "arguments of FactorizedConv2d among"),
    "method": (_args(CONV, method=3), "method a name, got int"),
    "method none": (_args(LINEAR, method=None), "method a name, got NoneType"),
    "groups 0": (_args(CONV, groups=0), "groups an integer >= 1, got 0"),
    "groups negative": (_args(CONV, groups=-2), "groups an integer >= 1, got -2"),
    "groups text": (_args(CONV, groups="1"), "groups an integer >= 1, got '1'"),
    "unknown argument": (_args(CONV, evil=1), "arguments of FactorizedConv2d among"),
    "groups of linear": (_args(LINEAR, groups=1), "arguments of FactorizedLinear among"),
    "channels": (_args("PermuteChannels", channels=7), r"index \(8,\) for \(7,\)"),
    "channels 0": (_args("PermuteChannels", channels=0), "channels an integer >= 1, got 0"),
    "channels float": (_args("PermuteChannels", channels=8.0), "channels an integer >= 1"),
    "channels huge": (_args("PermuteChannels", channels=2**50), r"index \(8,\) for \(11258"),
    "index twice": (_at("index", 1), r"index a permutation in int64, got torch\.int64"),
    "index above": (_at("index", 8), "index a permutation in int64"),
    "index below": (_at("index", -1), "index a permutation in int64"),
    "index short": (_array("index", lambda t: t[:-1]), r"index \(7,\) for \(8,\)"),
    "index dtype": (_array("index", Tensor.int), r"a permutation in int64, got torch\.int32"),
    "index float": (_array("index", Tensor.float), "float32 for torch.int64"),
}


@pytest.mark.parametrize("name", EDITS)
def test_forged_factorized_layers_are_refused(path: Path, name: str) -> None:
    edit, text = EDITS[name]
    save(_permuted(), path)
    forge(path, edit)
    with pytest.raises(ValueError, match=text):
        load(path)
    model = dense()
    before = snapshot(model)
    with pytest.raises(ValueError):
        load(path, model)
    assert_unchanged(model, before)


def _permuted() -> nn.Sequential:
    """With a stage that really permutes, one index per output channel."""
    model = factorized()
    index = torch.tensor([3, 0, 2, 1, 7, 5, 6, 4])
    model[0].append(PermuteChannels.of(index))
    return model


CIRCULANT_EDITS: dict[str, tuple[Edit, str]] = {
    "channels 0": (_args("CirculantLinear", channels=0), "channels an integer >= 1, got 0"),
    "channels": (_args("CirculantLinear", channels=5), r"\(4,\) for \(5,\)"),
    "channels text": (_args("CirculantPointwise", channels="4"), "channels an integer >= 1"),
    # Nothing of that size is allocated.
    "channels huge": (_args("CirculantPointwise", channels=2**50), r"\(4,\) for \(11258"),
    "channels bignum": (_args("CirculantPointwise", channels=10**30), "Pointwise accepts"),
    "no channels": (lambda m, a: m["modules"][1]["args"].pop("channels"), "with .'channels'"),
    "sign_flip": (_args("CirculantLinear", sign_flip="yes"), "sign_flip a bool, got 'yes'"),
    "no signs": (_args("CirculantLinear", sign_flip=False), r"unexpected.*3\.signs"),
    "signs": (_at("signs", 2), r"signs 1 or -1 everywhere, got \[2\.0"),
    "seed": (_args("CirculantLinear", seed=1), "arguments of CirculantLinear among"),
}


@pytest.mark.parametrize("name", CIRCULANT_EDITS)
def test_forged_circulant_layers_are_refused(path: Path, name: str) -> None:
    edit, text = CIRCULANT_EDITS[name]
    save(circulants(), path)
    forge(path, edit)
    with pytest.raises(ValueError, match=text):
        load(path)
