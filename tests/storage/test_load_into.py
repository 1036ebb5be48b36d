"""Loading into an architecture: swaps, refusals, and nothing changed on failure."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.nn import CSRConv2d, CSRLinear, FusedConv2d, apply_layout_
from sparsecnn.storage import load, save
from tests.storage.models import Net, converted_net, sparse_stack, thinned
from tests.storage.test_save_load import assert_same


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a failed load must leave alone, by identity and by bits."""
    return {
        "modules": {n: (id(m), m.training) for n, m in model.named_modules()},
        "tensors": {
            n: (id(t), t.dtype, t.detach().clone(), t.requires_grad)
            for n, t in [*model.named_parameters(), *model.named_buffers()]
        },
        "hooks": len(model._forward_pre_hooks),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"] and after["hooks"] == before["hooks"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (ident, dtype, value, needs) in before["tensors"].items():
        now = after["tensors"][name]
        assert (ident, dtype, needs) == (now[0], now[1], now[3]), name
        assert torch.equal(value, now[2]), name


def test_converted_model_into_the_fresh_architecture(path: Path) -> None:
    model = converted_net()
    save(model, path)
    with pytest.raises(ValueError, match=r"Net at the root.*pass model="):
        load(path)
    fresh = Net()
    stem = fresh.stem.weight
    assert load(path, fresh) is fresh
    assert_same(fresh, model)
    assert fresh.stem.weight is stem  # an optimizer made before still knows it
    assert isinstance(fresh.blocks[0].conv, CSRConv2d)
    assert isinstance(fresh.blocks[1].conv, FusedConv2d)
    assert isinstance(fresh.head, CSRLinear) and isinstance(fresh.blocks[0].bn, nn.Identity)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_into_a_model_that_is_already_converted(path: Path) -> None:
    model, other = converted_net(0.1), converted_net(0.4)
    assert model.blocks[0].conv.nnz != other.blocks[0].conv.nnz
    save(model, path)
    assert_same(load(path, other), model)


def test_dense_file_into_a_converted_model(path: Path) -> None:
    """Convolutions and linear layers go back; a folded norm does not, and is named."""
    stack = sparse_stack()
    dense = copy.deepcopy(stack)
    dense[5], dense[8] = stack[5].to_dense(), stack[8].to_dense()
    save(dense, path)
    assert_same(load(path, stack), dense)
    save(Net(), path)
    net = converted_net()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"blocks\.0\.bn.*BatchNorm2d, the model Identity"):
        load(path, net)
    assert_unchanged(net, before)


def test_a_root_that_is_one_layer(path: Path) -> None:
    layer = CSRConv2d.from_dense(thinned(nn.Conv2d(8, 8, 3), 0.1))
    save(layer, path)
    assert_same(load(path, nn.Conv2d(8, 8, 3)), layer)


def test_dtype_layout_flags_come_from_the_file(path: Path) -> None:
    model = apply_layout_(converted_net().to(torch.bfloat16), "channels_last")
    model.blocks[1].train()
    save(model, path)
    fresh = Net()
    fresh.stem.weight.requires_grad_(False)
    fresh.stem.weight.grad = None
    back = load(path, fresh)
    assert back._sparsecnn_layout == "channels_last"
    assert not fresh.stem.weight.requires_grad  # the model's own choice for what it keeps
    fresh.stem.weight.requires_grad_(True)
    assert_same(back, model)
    plain = converted_net()
    save(plain, path)
    assert_same(load(path, back), plain)  # and back again
    assert back._sparsecnn_layout == "contiguous"


def test_hooks_of_swapped_layers_stay(path: Path) -> None:
    save(converted_net(), path)
    fresh, calls = Net(), []
    fresh.head.register_forward_hook(lambda m, a, y: calls.append(type(m).__name__))
    load(path, fresh)(torch.randn(1, 3, 8, 8))
    assert calls == ["CSRLinear"]


def test_ties(path: Path) -> None:
    """Ties of the model stay; a tie of the file alone does not tie the model."""

    def pair(tied: bool) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if tied:
            model[1].weight = model[0].weight
        return model

    save(pair(True), path)
    tied, loose = load(path, pair(True)), load(path, pair(False))
    assert tied[0].weight is tied[1].weight
    assert torch.equal(loose[0].weight, loose[1].weight)
    with torch.no_grad():
        loose[0].weight.zero_()
    assert not torch.equal(loose[0].weight, loose[1].weight)
    save(pair(False), path)
    model = pair(True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"1\.weight and 0\.weight tied"):
        load(path, model)
    assert_unchanged(model, before)


def test_ties_of_swapped_layers(path: Path) -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    fast = CSRConv2d.from_dense(shared)
    save(nn.Sequential(fast, nn.ReLU(), fast), path)
    load(path, model)
    assert isinstance(model[0], CSRConv2d) and model[0] is model[2]


def test_a_densified_linear_with_its_activation(path: Path) -> None:
    model = Net()
    model.head = nn.Sequential(nn.Linear(32, 10), nn.ReLU())
    save(model, path)
    assert_same(load(path, Net()), model)


class NormAct(nn.BatchNorm2d):
    """A norm with its activation inside, as some libraries have it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@pytest.mark.parametrize("act", [nn.GELU, Swish, nn.PReLU])
def test_the_activation_left_of_a_folded_norm(path: Path, act: type[nn.Module]) -> None:
    def build(folded: bool) -> nn.Sequential:
        torch.manual_seed(int(folded))
        norm: nn.Module = NormAct(4, act())
        return nn.Sequential(nn.Conv2d(3, 4, 1, bias=folded), norm.act if folded else norm)

    model, fresh = build(True).eval(), build(False)
    save(model, path)
    if act is nn.PReLU:  # has parameters of its own: not what folding leaves
        before = snapshot(fresh)
        with pytest.raises(ValueError, match="PReLU"):
            load(path, fresh)
        assert_unchanged(fresh, before)
        return
    load(path, fresh)
    x = torch.randn(1, 3, 4, 4)
    assert type(fresh[1]) is act and torch.equal(fresh(x), model(x))


def _changed(change: str) -> nn.Module:
    """The architecture of `converted_net`, different in one way."""
    net = Net()
    conv = net.blocks[0].conv
    if change == "channels":
        return Net(channels=48)
    if change == "classes":
        return Net(classes=11)
    if change == "missing block":
        net.blocks = nn.ModuleList([net.blocks[0]])
    elif change == "more blocks":
        net.blocks.append(nn.ReLU())
    elif change == "stride":
        conv.stride = (2, 2)
    elif change == "padding":
        conv.padding = "same"
    elif change == "kept layer":
        net.stem.dilation = (2, 2)
    elif change == "type":
        net.blocks[0].conv = nn.ConvTranspose2d(32, 32, 3)
    elif change == "buffer":
        net.blocks[0].register_buffer("more", torch.zeros(1))
    elif change == "no buffer":
        del net.blocks[0].scale
    elif change == "buffer shape":
        net.blocks[0].scale = torch.ones(2)
    elif change == "buffer dtype":
        net.blocks[0].scale = torch.ones(1, dtype=torch.int64)
    elif change == "meta":
        return net.to("meta")
    elif change == "another model":
        return sparse_stack()
    return net


CHANGES = {
    "channels": r"blocks\.0\.conv.*in_channels 32, the model 48",
    "classes": "head.*out_features 10, the model 11",
    "missing block": r"no module at blocks\.1",
    "more blocks": r"ReLU at blocks\.2, which the file lacks",
    "stride": r"blocks\.0\.conv.*stride \(1, 1\), the model \(2, 2\)",
    "padding": r"blocks\.0\.conv.*padding \(1, 1\), the model same",
    "kept layer": r"stem.*dilation \(1, 1\), the model \(2, 2\)",
    "type": r"blocks\.0\.conv.*CSRConv2d, the model ConvTranspose2d",
    "buffer": r"missing in the file: blocks\.0\.more",
    "no buffer": r"unexpected in the file: blocks\.0\.scale",
    "buffer shape": r"blocks\.0\.scale \(1,\) for \(2,\)",
    "buffer dtype": r"blocks\.0\.scale of torch.float32 for torch.int64",
    "meta": "meta device",
    "another model": "no module at stem, where the file has Conv2d",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_does_not_fit_is_named_and_unchanged(path: Path, change: str) -> None:
    save(converted_net(), path)
    model = _changed(change)
    is_meta = change == "meta"
    before = snapshot(model if not is_meta else nn.Identity())
    with pytest.raises(ValueError, match=CHANGES[change]) as caught:
        load(path, model)
    assert str(path) in str(caught.value)
    if not is_meta:
        assert_unchanged(model, before)


def test_arguments_that_do_not_matter_in_evaluation_may_differ(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Dropout(0.5))
    save(model, path)
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(0.1))
    load(path, other)
    assert not other[1].inplace and other[2].p == 0.1
    for wrong in (nn.ReLU6(), nn.Identity(), nn.GELU()):
        with pytest.raises(ValueError, match="at 1: the file has ReLU, the model"):
            load(path, nn.Sequential(nn.Conv2d(3, 4, 1), wrong, nn.Dropout()))
    with pytest.raises(ValueError, match="eps"):
        save(nn.BatchNorm2d(3), path)
        load(path, nn.BatchNorm2d(3, eps=1e-3))


def test_accelerated_model(path: Path) -> None:
    """What acceleration really makes goes through a file, whichever kernels it chose."""
    from sparsecnn.accelerate import accelerate

    torch.manual_seed(0)
    model = Net(channels=16).eval()
    for block in model.blocks:
        thinned(block.conv, 0.1)
    x = torch.randn(1, 3, 16, 16)
    fast = accelerate(model, x, warmup=1, runs=2)
    save(fast, path)
    back = load(path, Net(channels=16))
    with torch.no_grad():
        assert torch.equal(back(x), fast(x))
    assert_same(back, fast)
