"""Pruning a trained network of real digits: what informed scores are worth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecnn.prune import Magnitude, Polynomial, Pruner, Random, prune, sparsity

from .nets import digits_net

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits():
    """Train and test images (N, 1, 8, 8) in [0, 1] with labels; 25 % for testing."""
    data = datasets.load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    cut = len(y) // 4
    return x[order[cut:]], y[order[cut:]], x[order[:cut]], y[order[:cut]]


def fit(model, digits, epochs, pruner=None):
    x, y, _, _ = digits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    if pruner is not None:
        pruner.attach(optimizer)
    source = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=source).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model, digits):
    _, _, x, y = digits
    return (model.eval()(x).argmax(1) == y).double().mean().item()


@pytest.fixture(scope="module")
def trained(digits):
    model = digits_net()
    fit(model, digits, 8)
    assert accuracy(model, digits) > 0.95
    return model


@pytest.mark.parametrize(
    ("granularity", "share"), [("element", 0.6), ("filter", 0.4), ("kernel", 0.5)]
)
def test_magnitude_beats_random_before_finetuning(trained, digits, granularity, share):
    informed = prune(trained, Magnitude(sparsity=share, granularity=granularity))
    baseline = [
        accuracy(prune(trained, Random(sparsity=share, granularity=granularity, seed=s)), digits)
        for s in range(5)
    ]
    for entry in sparsity(informed).layers[:-1]:
        assert getattr(entry, granularity) == pytest.approx(share, abs=0.03)
    assert accuracy(informed, digits) >= sum(baseline) / len(baseline) + 0.05


def test_gradual_pruning_recovers_what_one_shot_loses(trained, digits):
    dense = accuracy(trained, digits)
    at_once = prune(trained, Magnitude(sparsity=0.9))
    model = copy.deepcopy(trained)
    pruner = Pruner(model, importance=Magnitude(sparsity=0.9), schedule=Polynomial(0, 60, 10))
    fit(model, digits, 12, pruner)
    model = pruner.finalize()
    for entry in sparsity(model).layers[:-1]:
        assert entry.element == pytest.approx(0.9, abs=0.5 / entry.elements + 1e-9)
    assert accuracy(model, digits) >= dense - 0.02
    assert accuracy(model, digits) > accuracy(at_once, digits)
