"""Trained networks of scikit-learn's digits, and how they are trained: what tables start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from sparsecnn.data import Digits, digits
from sparsecnn.measure import accuracy
from sparsecnn.prune import Pruner

BATCH = 64
EPOCHS = 20
RATE = 0.05


@dataclass
class Context:
    """What a method works with.

    Attributes:
        seed: of the split, the weights and the order of the images.
        networks: the trained dense networks by name.
        data: images (N, 1, 8, 8) in three parts.
    """

    seed: int
    networks: dict[str, nn.Module]
    data: Digits = field(init=False)

    def __post_init__(self) -> None:
        self.data = digits(8, self.seed)

    def dense(self, network: str) -> nn.Module:
        """A copy of a trained network."""
        return copy.deepcopy(self.networks[network]).eval()


def accuracy_of(model: nn.Module, part: TensorDataset) -> float:
    """Top-1 accuracy in [0, 1]."""
    return float(accuracy(model, [part.tensors])["top1"])


def fit(
    model: nn.Module,
    data: Digits,
    seed: int,
    epochs: int = EPOCHS,
    pruner: Pruner | None = None,
    rate: float = RATE,
) -> nn.Module:
    """Train with SGD and a one-cycle rate; a pruner runs along."""
    images, labels = data.train.tensors
    named = list(model.named_parameters())
    gates = [p for name, p in named if name.endswith("log_alpha")]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if not name.endswith("log_alpha")], "lr": rate},
    ]
    if gates:  # they move on the scale of 1, and have a few hundred steps
        groups.append({"params": gates, "lr": 20 * rate, "momentum": 0.0, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=5e-4)
    if pruner is not None:
        pruner.attach(optimizer)
    plan = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=epochs * steps_per_epoch(data),
        cycle_momentum=False,
    )
    source = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=source).split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            if pruner is not None:
                loss = loss + pruner.penalty()
            loss.backward()
            optimizer.step()
            plan.step()
    return model.eval()


def steps_per_epoch(data: Digits) -> int:
    """Optimizer steps of one pass over the training images."""
    return -(-len(data.train) // BATCH)


def dense_networks(
    makers: Mapping[str, Callable[[], nn.Module]], seed: int
) -> dict[str, nn.Module]:
    """The networks by name, trained from one seed."""
    data = digits(8, seed)
    trained = {}
    for name, make in makers.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained[name] = fit(make(), data, seed)
    return trained


def example(context: Context) -> Tensor:
    """One image."""
    return context.data.train.tensors[0][:1]
