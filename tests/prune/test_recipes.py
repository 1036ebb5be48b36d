"""Methods of the literature are choices of parts: each runs, can be changed and resumed."""

from __future__ import annotations

import copy
import importlib
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsecnn.data import DigitsNet
from sparsecnn.nn import WinogradReLUConv2d
from sparsecnn.prune import (
    OBD,
    Batches,
    Magnitude,
    Pruner,
    find_targets,
    fold_gates_,
    protocols,
    recipes,
)

# `sparsecnn.prune` as an attribute is the function of that name.
package = importlib.import_module("sparsecnn.prune")
X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 10
DATA = [(X[:16], Y[:16]), (X[16:], Y[16:])]


def network(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if name == "winograd_relu":
            return nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4),
                WinogradReLUConv2d(4, 6, padding=1), nn.BatchNorm2d(6),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
            )  # fmt: skip
        return DigitsNet()


def some_value(model):
    """An evaluation that depends on the weights, without data."""
    with torch.no_grad():
        return -float(model(X[:4]).square().mean())


def build(name, model, **options):
    """Every recipe with small settings; nets train for 60 steps at most."""
    data = Batches(DATA, reference=copy.deepcopy(model))
    makers = {
        "unit_bias": lambda: recipes.unit_bias(model, 0.5, 20, tol=0.02, **options),
        "collins": lambda: recipes.collins(model, some_value, 40_000, lam=1e-3, at=4, **options),
        "iht": lambda: recipes.iht(model, 0.8, 12, 4, 2, **options),
        "less_is_more": lambda: recipes.less_is_more(model, 3.0, 20, lam_rank=1e-4, **options),
        "ssl": lambda: recipes.ssl(model, 0.8, 20, **options),
        "group_brain_damage": lambda: recipes.group_brain_damage(
            model, 0.5, 2, 30, every=6, lam=0.01, growth=1e-4, **options
        ),
        "l0": lambda: recipes.l0(model, 0.05, 30, X[:2], **options),
        "obd": lambda: recipes.obd(model, 0.6, data, every=8, **options),
        "obs": lambda: recipes.obs(model, 0.3, data, block=8, **options),
        "fisher": lambda: recipes.fisher(model, 0.4, data, events=4, every=5, **options),
        "apoz": lambda: recipes.apoz(model, data, rounds=2, every=10, **options),
        "han": lambda: recipes.han(model, 0.8, fractions=(0.5, 1.0), every=10, **options),
        "data_free": lambda: recipes.data_free(model, 0.4, **options),
        "dns": lambda: recipes.dns(model, 0.3, 0.05, stop=40, **options),
        "winograd_relu": lambda: recipes.winograd_relu(model, 0.4, every=8, **options),
        "lasso_channel": lambda: recipes.lasso_channel(model, 0.5, data, **options),
        "l1_filters": lambda: recipes.l1_filters(model, 0.5, **options),
        "thinet": lambda: recipes.thinet(model, 0.5, data, every=8, **options),
        "random_masks": lambda: recipes.random_masks(
            model, 0.5, "kernel", some_value, n_masks=4, **options
        ),
    }
    assert set(makers) == set(recipes.__all__)
    return makers[name]()


def train(model, pruner, steps, optimizer=None, start=0):
    if optimizer is None:
        # The clipping of `UnitBias` is made for steps without momentum.
        clipped = any(isinstance(part, package.UnitBias) for part in pruner.regularizers)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.0 if clipped else 0.9)
    pruner.attach(optimizer)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:8]
        torch.manual_seed(step)  # gates draw
        (functional.cross_entropy(model(X[rows]), Y[rows]) + pruner.penalty()).backward()
        optimizer.step()
    return optimizer


PARTS = {
    "granularity": protocols.Granularity,
    "importance": protocols.Importance,
    "selector": protocols.Selector,
    "compensator": protocols.Compensator,
    "schedule": protocols.Schedule,
    "regrowth": protocols.Regrowth,
}


@pytest.mark.parametrize("name", recipes.__all__)
def test_recipes_are_configuration(name):
    """A plain Pruner of public parts, whose zeros stay zeros in the finished network."""
    model = network(name)
    pruner = build(name, model)
    assert type(pruner) is Pruner
    for attribute, protocol in PARTS.items():
        part = getattr(pruner, attribute)
        if part is not None:
            assert isinstance(part, protocol)
            public = type(part).__name__ in package.__all__ or attribute == "granularity"
            assert public, f"{type(part).__name__} of {name} is not exported"
    assert all(type(part).__name__ in package.__all__ for part in pruner.regularizers)
    train(model, pruner, 45)
    masks = pruner.masks()
    assert any(not bool(mask.all()) for mask in masks.values()), f"{name} pruned nothing"
    final = pruner.finalize()
    weights = dict(final.named_parameters())
    for key, mask in masks.items():
        assert not weights[key][~mask].any()
    if name == "l0":
        before = final.eval()(X)
        torch.testing.assert_close(fold_gates_(final).eval()(X), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", recipes.__all__)
def test_recipes_are_configuration_that_resumes(name):
    """A run that is stopped and resumed ends with bitwise the masks of the uninterrupted one."""
    model = network(name)
    pruner = build(name, model)
    optimizer = train(model, pruner, 15)
    files = [io.BytesIO() for _ in range(3)]
    for holder, file in zip((pruner, model, optimizer), files, strict=True):
        torch.save(holder.state_dict(), file)
        file.seek(0)
    states = [torch.load(file, weights_only=True) for file in files]

    again = network(name)
    resumed = build(name, again)
    second = torch.optim.SGD(again.parameters(), lr=0.05)
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    second.load_state_dict(states[2])
    if "reference" in dir(resumed.calibration):  # data is the caller's to pass again
        resumed.calibration.reference = pruner.calibration.reference

    steps = 50
    for number in range(15, 15 + steps):
        for net, part, opt in ((model, pruner, optimizer), (again, resumed, second)):
            opt.zero_grad()
            rows = torch.randperm(24, generator=torch.Generator().manual_seed(number))[:8]
            torch.manual_seed(number)
            loss = functional.cross_entropy(net(X[rows]), Y[rows]) + part.penalty()
            loss.backward()
            if part is resumed and number == 15:
                part.attach(opt)
            opt.step()
    for key, mask in pruner.masks().items():
        assert torch.equal(mask, resumed.masks()[key]), key
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_recipes_are_configuration_whose_parts_can_be_swapped():
    model = network("dns")
    pruner = recipes.dns(
        model, 0.0, 0.01, stop=30, importance=OBD("levenberg"), calibration=Batches(DATA)
    )
    assert isinstance(pruner.importance, OBD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, pruner, 5, optimizer)
    assert any(not bool(mask.all()) for mask in pruner.masks().values())
    model = network("iht")
    targets = find_targets(model, types=(nn.Conv2d,))
    pruner = recipes.iht(model, 0.5, 2, 2, targets=targets)
    assert [t.name for t in pruner.targets] == [t.name for t in targets]
    with pytest.raises(TypeError, match="unexpected keyword"):
        recipes.iht(model, 0.5, 2, 2, colour="red")


def test_movement_goes_with_any_schedule():
    model = network("dns")
    pruner = Pruner(
        model, importance=package.Movement(sparsity=0.5), mask_mode="ste",
        schedule=package.Polynomial(2, 10, 2),
    )  # fmt: skip
    train(model, pruner, 12)
    for entry in pruner.sparsity().layers:
        assert entry.element == pytest.approx(0.5, abs=0.01)
    model = network("dns")
    by_size = Pruner(model, importance=Magnitude(sparsity=0.5), schedule=package.OneShot(0))
    by_size.step()
    assert any(not torch.equal(m, by_size.masks()[k]) for k, m in pruner.masks().items())
