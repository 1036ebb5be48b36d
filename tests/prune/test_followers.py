"""Dead filters: the bias and the batch norm behind them are held at zero too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsecnn.prune import Magnitude, Pruner, find_targets, recipes
from sparsecnn.prune.followers import find_batch_norms

from .nets import digits_net, mixed

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_batch_norms_are_found_by_what_they_read():
    model = digits_net()
    found = find_batch_norms(model, find_targets(model), X)
    assert {t.name: norm for t, norm in found.items()} == {
        "conv1": model.bn1, "conv2": model.bn2, "conv3": model.bn3,
    }  # fmt: skip
    plain = mixed()
    assert not find_batch_norms(plain, find_targets(plain), torch.randn(1, 3, 6, 6))


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_maps_of_dead_filters_are_zero_all_along(optimizer_name):
    model = digits_net()
    for norm in (model.bn1, model.bn2, model.bn3):
        nn.init.uniform_(norm.bias, 0.5, 1.0)  # relu(beta) is not 0
    pruner = recipes.l1_filters(model, 0.5, example_inputs=X)
    if optimizer_name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    else:
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
    maps = {}
    model.bn2.register_forward_hook(lambda _m, _i, out: maps.update(out=out.detach()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruner.attach(optimizer)
    labels = torch.arange(4)
    for step in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), labels).backward()
        optimizer.step()
        dead = ~pruner.masks()["conv2.weight"].flatten(1).any(1)
        assert int(dead.sum()) == 16
        for parameter in (model.bn2.weight, model.bn2.bias):
            assert not parameter[dead].any() and parameter[~dead].all()
            for value in optimizer.state[parameter].values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    assert not value[dead].any()
        if step > 0:
            assert not maps["out"][:, dead].any() and maps["out"][:, ~dead].any()
    assert not model.fc1.bias[~pruner.masks()["fc1.weight"].any(1)].any()
    assert torch.equal(model.fc2.bias != 0, before["fc2.bias"] != 0)
    final = pruner.finalize().eval()
    with torch.no_grad():
        final(X)
    assert not maps["out"][:, dead].any()


def test_single_zeros_silence_nothing():
    model = digits_net()
    bias = model.bn1.bias.detach().clone()
    Pruner(model, importance=Magnitude(sparsity=0.9), example_inputs=X).step()
    assert torch.equal(model.bn1.bias, bias)
    # Without an input nobody knows which batch norm follows.
    model = digits_net()
    nn.init.ones_(model.bn1.bias)
    recipes.l1_filters(model, 0.5).step()
    assert model.bn1.bias.all()
