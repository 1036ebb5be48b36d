"""Zeros of other tools: masks of torch.nn.utils.prune, of torch.ao.pruning, and plain zeros."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.ao.pruning import BaseSparsifier, WeightNormSparsifier
from torch.nn.utils import parametrizations, parametrize

import sparsecnn as sc
from sparsecnn.prune import Magnitude, Pruner, find_targets, prune_, sparsity

from .nets import mixed

LAYERS = ("plain", "grouped", "depthwise", "pointwise", "hidden")


def by_torch_prune(model):
    for name in LAYERS:
        torch_prune.random_unstructured(model.get_submodule(name), "weight", 0.4)
        torch_prune.l1_unstructured(model.get_submodule(name), "weight", 0.3)


class SmallestSparsifier(BaseSparsifier):
    """Drops 60 % of a weight of any shape; torch's `WeightNormSparsifier` takes matrices only."""

    def __init__(self):
        super().__init__(defaults={})

    def update_mask(self, module, tensor_name, **kwargs):
        mask = module.parametrizations[tensor_name][0].mask
        values = module.parametrizations[tensor_name].original.abs()
        mask.copy_(values > values.quantile(0.6))


def by_torch_ao(model):
    sparsifiers = {"hidden": WeightNormSparsifier(0.6, (1, 1), 1)}
    for name in LAYERS:
        sparsifier = sparsifiers.get(name, SmallestSparsifier())
        sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"}])
        sparsifier.step()


def by_two_masks_of_torch_ao(model):
    by_torch_ao(model)
    more = WeightNormSparsifier()
    more.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in LAYERS])
    for name in LAYERS:
        model.get_submodule(name).parametrizations.weight[1].mask.view(-1)[::5] = 0
    for name in LAYERS:
        assert len(model.get_submodule(name).parametrizations.weight) == 2


def by_plain_zeros(model):
    keep = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in LAYERS:
            weight = model.get_submodule(name).weight
            weight.mul_(torch.rand(weight.shape, generator=keep) > 0.6)


TOOLS = {
    "torch.nn.utils.prune": by_torch_prune,
    "torch.ao.pruning": by_torch_ao,
    "torch.ao.pruning twice": by_two_masks_of_torch_ao,
    "plain zeros": by_plain_zeros,
}


def zeroed(tool):
    """The model and where the tool has left zeros."""
    torch.manual_seed(0)
    model = mixed()
    TOOLS[tool](model)
    model(torch.randn(1, 3, 6, 6))  # torch.nn.utils.prune refreshes its weights there
    zeros = {name: model.get_submodule(name).weight.detach() == 0 for name in LAYERS}
    assert all(0.2 < float(z.float().mean()) < 0.9 for z in zeros.values())
    return model, zeros


@pytest.mark.parametrize("tool", TOOLS)
def test_foreign_masks_are_read(tool):
    model, zeros = zeroed(tool)
    x = torch.randn(2, 3, 6, 6)
    want = model(x)
    targets = find_targets(model)
    assert [t.name for t in targets] == list(LAYERS)
    for t in targets:
        assert torch.equal(t.weight == 0, zeros[t.name])
        assert isinstance(t.dense, nn.Parameter)
        if tool != "plain zeros":  # the values behind a mask are still there
            assert t.foreign_mask is not None
            assert bool((t.dense[zeros[t.name]] != 0).all())
    report = sparsity(model)
    assert {n: report[n].zeros for n in LAYERS} == {n: int(z.sum()) for n, z in zeros.items()}
    assert torch.equal(model(x), want)  # looking changes nothing


@pytest.mark.parametrize("tool", TOOLS)
def test_foreign_masks_are_folded_by_prune(tool):
    model, zeros = zeroed(tool)
    x = torch.randn(2, 3, 6, 6)
    parameters = {t.name: t.dense for t in find_targets(model)}
    want = model(x)
    # Fewer zeros than there are: nothing to do but to fold.
    prune_(model, Magnitude(sparsity=0.1), keep_zeros=True)
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert layer.weight is parameters[name]
        assert list(layer._parameters) == ["weight", "bias"]
        assert torch.equal(layer.weight == 0, zeros[name])
        assert not layer._forward_pre_hooks
    assert torch.equal(model(x), want)
    # More than there are: theirs stay and others join them.
    prune_(model, Magnitude(sparsity=0.95), keep_zeros=True)
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        assert bool((weight[zeros[name]] == 0).all())
        assert int((weight == 0).sum()) == round(0.95 * weight.numel())


@pytest.mark.parametrize("tool", TOOLS)
def test_foreign_masks_hold_in_training(tool):
    model, zeros = zeroed(tool)
    parameters = {t.name: t.dense for t in find_targets(model)}
    # Built before the pruner: the Parameters must stay the same objects.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x = torch.randn(8, 3, 6, 6)
    want = model(x)
    pruner = Pruner(
        model, importance=Magnitude(sparsity=0.1), keep_zeros=tool == "plain zeros"
    ).attach(optimizer)
    assert torch.equal(model(x), want)
    assert {n: torch.equal(~pruner.masks()[f"{n}.weight"], z) for n, z in zeros.items()} == {
        n: True for n in LAYERS
    }
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        assert bool((weight[zeros[name]] == 0).all())
        assert bool((weight[~zeros[name]] != 0).any())
    pruner.finalize()
    assert all(model.get_submodule(n).weight is p for n, p in parameters.items())
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_plain_zeros_may_come_back_unless_kept():
    model, zeros = zeroed("plain zeros")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    Pruner(model, importance=Magnitude(sparsity=0.0)).attach(optimizer)
    model(torch.randn(8, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert bool((model.plain.weight[zeros["plain"]] != 0).any())


def test_foreign_masks_that_scale_are_folded_as_they_compute():
    layer = nn.Linear(4, 2)
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1))
    sparsifier.prepare(layer, [{"tensor_fqn": "weight"}])
    with torch.no_grad():
        layer.parametrizations.weight[0].mask.fill_(0.5)[0].zero_()
    want = layer.weight.detach().clone()
    prune_(layer, Magnitude(sparsity=0.1))
    assert torch.equal(layer.weight, want)
    assert not layer.weight[0].any() and not layer.weight[0].signbit().any()


def test_foreign_masks_that_are_not_alone_are_refused():
    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    def sparsify(model, name):
        WeightNormSparsifier().prepare(model, [{"tensor_fqn": name}])
        return model

    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    cases = [
        (sparsify(tied(), "0.weight"), "only on unshared weights"),
        (sparsify(tied(), "1.weight"), "to own its weight as a Parameter"),
        (sparsify(normed, "0.weight"), "got _WeightNorm, FakeSparsity"),
    ]
    for model, message in cases:
        before = copy.deepcopy(model.state_dict())
        for call in (find_targets, lambda m: prune_(m, Magnitude(sparsity=0.5))):
            with pytest.raises(ValueError, match=message):
                call(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("tool", [*TOOLS, "Pruner"])
def test_foreign_masks_are_accelerated(tool):
    if tool == "Pruner":
        model = mixed()
        pruner = Pruner(model, importance=Magnitude(sparsity=0.6))
        pruner.step()
        zeros = {n: ~pruner.masks()[f"{n}.weight"] for n in LAYERS}
    else:
        model, zeros = zeroed(tool)
    model.eval()
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        want = model(x)
    before = list(model.state_dict())
    fast = sc.accelerate(model, x)
    with torch.no_grad():
        assert float((fast(x) - want).abs().max()) <= 1e-4 * float(want.abs().max())
        assert torch.equal(model(x), want)
    assert list(model.state_dict()) == before
    assert not any(parametrize.is_parametrized(m) for m in fast.modules())
    found = {layer.name: layer.density for layer in fast.report.layers}
    for name in LAYERS:
        assert found[name] == pytest.approx(1 - float(zeros[name].float().mean()), abs=1e-6)
        assert sparsity(fast)[name].zeros == int(zeros[name].sum())
