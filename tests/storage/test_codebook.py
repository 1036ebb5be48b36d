"""Weight sharing: k-means of one dimension, and the training of centroids."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsecnn.storage.codebook import (
    Codebook,
    Init,
    bake_weights_,
    initial_centroids,
    lloyd,
    share_weights_,
)

INITS = get_args(Init)


def weight(seed: int = 0, shape: tuple[int, ...] = (8, 6, 3, 3), sparsity: float = 0.7) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=source) * 0.1
    return values.masked_fill(torch.rand(shape, generator=source) < sparsity, 0)


def squares(w: Tensor, centroids: Tensor) -> float:
    nonzero = w[w != 0].double()
    return float((nonzero[:, None] - centroids.double()).square().min(1).values.sum())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_codebook_k_means(init: Init, seed: int, bits: int) -> None:
    w = weight(seed)
    generator = torch.Generator().manual_seed(seed)
    book = Codebook.fit(w, bits, init, generator)
    values = np.sort(w[w != 0].double().numpy())
    start = initial_centroids(values, 2**bits, init, torch.Generator().manual_seed(seed))
    assert (np.diff(start) > 0).all() and len(start) == 2**bits
    history = [total for _, total in lloyd(values, start)]
    assert len(history) > 1
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(history))
    reached = squares(w, book.centroids)
    assert abs(reached - history[-1]) < 1e-6 * (1 + history[-1])
    # Every centroid is the mean of its cluster: a fixed point of the iteration.
    labels = book.assign(w)
    for k, centroid in enumerate(book.centroids):
        torch.testing.assert_close(w[labels == k + 1].mean(), centroid, rtol=1e-4, atol=1e-6)
    if init == "linear":
        grid = torch.linspace(float(values[0]), float(values[-1]), 2**bits, dtype=torch.float64)
        assert reached <= squares(w, grid)
    shuffled = torch.linspace(-1, 1, 2**bits)
    assert reached < squares(w, shuffled)


def test_codebook_reaches_planted_clusters() -> None:
    centers = torch.tensor([-2.0, -0.5, 0.75, 3.0])
    source = torch.Generator().manual_seed(0)
    w = centers.repeat(40) + 0.01 * torch.randn(160, generator=source)
    torch.testing.assert_close(Codebook.fit(w, 2).centroids, centers, rtol=0, atol=0.01)


def test_codebook_empty_clusters_are_seeded_anew() -> None:
    """A grid over an outlier leaves most cells empty; none may stay so."""
    source = torch.Generator().manual_seed(1)
    w = torch.cat([0.01 * torch.randn(500, generator=source), torch.tensor([100.0])])
    book = Codebook.fit(w, 4)
    assert len(book.centroids) == 16 and float(book.centroids[-1]) == 100
    assert len(book.assign(w).unique()) == 16
    only_grid = torch.linspace(float(w.min()), 100, 16)
    assert squares(w, book.centroids) < 0.1 * squares(w, only_grid)


@pytest.mark.parametrize("init", INITS)
def test_codebook_few_values_are_kept_exactly(init: Init) -> None:
    values = torch.tensor([-0.3, 0.1, 0.100001, 5.0])
    w = values.repeat(9).reshape(4, 9)
    w[0, 3:] = 0
    for bits in (2, 3, 8):
        book = Codebook.fit(w, bits, init)
        assert torch.equal(book.centroids, values)
        assert torch.equal(book.quantize(w), w)


@pytest.mark.parametrize("seed", range(3))
def test_codebook_zeros_stay_zeros(seed: int) -> None:
    w = weight(seed)
    for bits in (1, 4, 8):
        book = Codebook.fit(w, bits)
        quantized = book.quantize(w)
        assert torch.equal(quantized == 0, w == 0) and not quantized[w == 0].signbit().any()
        assert (book.centroids != 0).all() and (book.centroids.diff() > 0).all()
        assert len(quantized[quantized != 0].unique()) <= 2**bits
    # A cluster whose mean is 0.
    even = torch.tensor([-9.0, -1.0, 1.0, 9.0, -9.5])
    assert (Codebook.fit(even.repeat(2), 1).centroids != 0).all()
    symmetric = torch.tensor([-9.0, -9.1, -0.5, 0.5, 9.0, 9.1, 20.0, 20.1])
    book = Codebook.fit(symmetric, 2)
    assert (book.centroids != 0).all() and (book.quantize(symmetric) != 0).all()
    assert float(book.centroids[1]) == -0.5


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 2, groups=8), nn.Flatten(), nn.Linear(8 * 9, 5),
    )  # fmt: skip
    with torch.no_grad():
        for seed, layer in enumerate(model):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                mask = weight(seed, tuple(layer.weight.shape), 0.5) != 0
                layer.weight.mul_(mask)
                layer.weight.add_(0.0)  # no -0.0
    return model


def test_codebook_gradient_is_the_scatter_add() -> None:
    model = network()
    x, y = torch.randn(6, 2, 8, 8), torch.randint(5, (6,))
    share_weights_(model, conv_bits=3, linear_bits=4)
    for layer in (model[0], model[2], model[4], model[6]):
        shared = layer.parametrizations.weight
        dense = layer.weight.detach().clone().requires_grad_()
        nn.functional.cross_entropy(model(x), y).backward()
        got = shared.original.grad.clone()
        # The same network with this weight as a leaf.
        handle = shared.register_forward_hook(lambda m, i, o, d=dense: d)
        nn.functional.cross_entropy(model(x), y).backward()
        handle.remove()
        assert dense.grad is not None and bool(dense.grad.any())
        want = torch.zeros(len(shared.original) + 1)
        want.index_add_(0, shared[0].labels.flatten().long(), dense.grad.flatten())
        torch.testing.assert_close(got, want[1:], rtol=1e-5, atol=1e-6)
        model.zero_grad()


def test_codebook_fine_tuning() -> None:
    model = network()
    zeros = [p.detach() == 0 for p in model.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in model.parameters() if p.dim() > 1]
    torch.manual_seed(1)
    x, y = torch.randn(40, 2, 8, 8), torch.randint(5, (40,))
    share_weights_(model, conv_bits=3, linear_bits=2)
    labels = [m.labels.clone() for m in model.modules() if hasattr(m, "labels")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(
        torch.equal(a, m.labels)
        for a, m in zip(labels, (m for m in model.modules() if hasattr(m, "labels")), strict=True)
    )
    outputs = model(x)
    assert bake_weights_(model) is model
    assert torch.equal(model(x), outputs)
    assert [n for n, _ in model[0].named_parameters()] == ["weight", "bias"]
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    for w, zero, old, bits in zip(weights, zeros, before, (3, 3, 3, 2), strict=True):
        assert torch.equal(w == 0, zero)
        assert len(w[w != 0].unique()) <= 2**bits
        assert not torch.equal(w, old)


def test_codebook_of_zeros() -> None:
    model = network()
    nn.init.zeros_(model[6].weight)
    share_weights_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(3, 2, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not bake_weights_(model)[6].weight.any()  # type: ignore[index]


def test_codebook_refuses() -> None:
    w = weight()
    for bits in (0, 9, True, 2.0):
        with pytest.raises(ValueError, match="bits an int from 1 to 8"):
            Codebook.fit(w, bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init among linear, forgy, density"):
        Codebook.fit(w, 3, "random")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float32 weight, got"):
        Codebook.fit(w.half(), 3)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite weight, got 1"):
            Codebook.fit(torch.tensor([1.0, bad]), 3)
    with pytest.raises(ValueError, match="expected model with convolutions"):
        share_weights_(nn.ReLU())
    model = network()
    nn.init.constant_(model[6].weight, torch.nan)
    with pytest.raises(ValueError, match="expected a finite weight"):
        share_weights_(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in network().named_parameters()]
    model = share_weights_(network())
    with pytest.raises(ValueError, match="finalize the pruner first"):
        share_weights_(model)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"one that Linear.* shares"):
        share_weights_(tied)
