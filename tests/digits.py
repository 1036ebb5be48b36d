"""scikit-learn's digits for tests: the images, a short training, the accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def load():
    """Train and test images (N, 1, 8, 8) in [0, 1] with labels; 25 % for testing."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    cut = len(y) // 4
    return x[order[cut:]], y[order[cut:]], x[order[:cut]], y[order[:cut]]


def fit(model, digits, epochs, rate=0.05, pruner=None):
    """Train with SGD at one rate; a pruner runs along."""
    x, y, _, _ = digits
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
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
    """Top-1 accuracy on the test images."""
    _, _, x, y = digits
    return (model.eval()(x).argmax(1) == y).double().mean().item()
