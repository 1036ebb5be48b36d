from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from sparsecnn.prune import Magnitude, Pruner, find_targets
from sparsecnn.prune.dropout import (
    Dropout,
    EvolutionalDropout,
    MultinomialDropout,
    multinomial_factors,
    rescale_dropout_,
)
from sparsecnn.prune.regularization import MaxNorm


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(form, p=0.4, generator=None, nonlinear=True):
    """A dropout between two layers, seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()
    between = nn.Tanh() if nonlinear else nn.Identity()
    return nn.Sequential(first, between, Dropout(p, form, generator=generator), last)


def test_dropout_forms_agree_in_evaluation_and_in_training():
    x = torch.randn(4, 5, generator=seeded(), dtype=torch.float64)
    inverted = net("inverted", generator=seeded(1))
    scaling = net("weight_scaling", generator=seeded(1))
    # The paper's form trains outgoing weights 1 / (1 - p) times as large.
    with torch.no_grad():
        scaling[3].weight.div_(1 - 0.4)
    torch.testing.assert_close(inverted(x), scaling(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(inverted.eval()(x), scaling.eval()(x), rtol=0, atol=1e-6)
    without = nn.Sequential(*(m for m in inverted if not isinstance(m, Dropout)))
    assert torch.equal(inverted(x), without(x))


@pytest.mark.parametrize("form", ["inverted", "weight_scaling"])
def test_dropout_forms_mean_of_a_linear_net_is_its_evaluation(form):
    draws = 20_000
    model = net(form, generator=seeded(2), nonlinear=False)
    x = torch.randn(1, 5, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        samples = model(x.expand(draws, -1))
        expected = model.eval()(x)
    error = samples.std(0) / draws**0.5
    assert ((samples.mean(0) - expected).abs() < 4 * error).all()
    assert (samples.std(0) > 0).all()


def test_dropout_forms_geometric_mean_of_a_softmax_unit_is_the_mean_network():
    source = seeded(3)
    hidden = torch.randn(6, generator=source, dtype=torch.float64)
    w = torch.randn(4, 6, generator=source, dtype=torch.float64)
    b = torch.randn(4, generator=source, dtype=torch.float64)
    logs = [
        torch.log_softmax(w @ (hidden * torch.tensor(mask, dtype=torch.float64)) + b, 0)
        for mask in itertools.product((0, 1), repeat=6)
    ]
    assert len(logs) == 2**6
    geometric = torch.stack(logs).mean(0).exp()
    layer = Dropout(0.5, "weight_scaling").eval()
    mean_network = torch.softmax(w @ layer(hidden) + b, 0)
    torch.testing.assert_close(geometric / geometric.sum(), mean_network, rtol=0, atol=1e-6)
    assert not torch.allclose(torch.softmax(w @ hidden + b, 0), mean_network, atol=1e-2)


@pytest.mark.parametrize("form", ["inverted", "weight_scaling"])
def test_dropout_forms_masks(form):
    x = torch.full((200, 300), 3.0)
    layer = Dropout(0.25, form, generator=seeded(4))
    y = layer(x)
    kept = 3.0 / 0.75 if form == "inverted" else 3.0
    assert set(y.unique().tolist()) == {0.0, kept}
    assert abs((y == 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert not torch.equal(layer(x), y)
    assert torch.equal(Dropout(0.25, form, generator=seeded(4))(x), y)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    none = Dropout(0.0, form)
    for training in (True, False):
        assert torch.equal(none.train(training)(x), x)


def test_dropout_forms_max_norm_is_its_companion():
    model = net("inverted", generator=seeded(5))
    targets = find_targets(model, include_classifier=True)
    part = MaxNorm(0.6)
    before = {t: t.dense.detach().clone() for t in targets}
    part.prox_(targets, 0.1, 0)
    for t in targets:
        inside = before[t].norm(dim=1) <= 0.6
        assert torch.equal(t.dense[inside], before[t][inside])
        scaled = before[t][~inside]
        expected = scaled / scaled.norm(dim=1, keepdim=True) * 0.6
        torch.testing.assert_close(t.dense.detach()[~inside], expected)
    assert any((before[t].norm(dim=1) <= 0.6).any() for t in targets)
    assert any((before[t].norm(dim=1) > 0.6).any() for t in targets)


def test_evolutional_dropout_draws_are_multinomial():
    probs = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4], dtype=torch.float64)
    k, draws = 4, 10**5
    factors = multinomial_factors(probs, k, draws, seeded(6))
    counts = factors * k * probs
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    assert torch.equal(counts.round().sum(1), torch.full((draws,), float(k), dtype=torch.float64))
    assert counts.max() > 1.5  # with replacement
    error = factors.std(0) / draws**0.5
    assert ((factors.mean(0) - 1).abs() < 4 * error).all()
    variance = (1 - probs) / (k * probs)
    torch.testing.assert_close(factors.var(0), variance, rtol=0.03, atol=0)


@pytest.mark.parametrize("shape", [(64, 10), (64, 10, 3, 2)])
def test_evolutional_dropout_draws_for_each_sample(shape):
    x = torch.ones(shape)
    probs = torch.arange(1.0, 11.0)
    layer = MultinomialDropout(7, probs, generator=seeded(7))
    y = layer(x)
    flat = y.reshape(64, 10, -1)
    assert torch.equal(flat, flat[:, :, :1].expand_as(flat))  # whole maps
    counts = flat[:, :, 0] * 7 * probs / probs.sum()
    torch.testing.assert_close(counts.sum(1), torch.full((64,), 7.0))
    assert len(counts.round().unique(dim=0)) > 32
    assert torch.equal(MultinomialDropout(7, probs, generator=seeded(7))(x), y)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("shape", [(32, 12), (32, 12, 4, 3)])
def test_evolutional_dropout_probabilities(shape):
    source = seeded(8)
    scale = torch.linspace(0.1, 3, 12).reshape(12, *[1] * (len(shape) - 2))
    x = torch.randn(shape, generator=source, dtype=torch.float64) * scale
    moments = x.square().transpose(0, 1).flatten(1).mean(1)
    p = EvolutionalDropout.probabilities(x)
    torch.testing.assert_close(p, moments.sqrt() / moments.sqrt().sum(), rtol=0, atol=1e-12)

    def variance(q):
        return (moments * (1 - q) / (6 * q)).sum().item()

    random = torch.distributions.Dirichlet(torch.ones(12, dtype=torch.float64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        others = random.sample((1000,))
    best = variance(p)
    assert all(variance(q) > best for q in others)
    assert variance(torch.full_like(p, 1 / 12)) > best

    layer = EvolutionalDropout(0.5, generator=seeded(9))
    y = layer(x)
    ratio = (y / x).reshape(32, 12, -1)[:, :, 0]
    torch.testing.assert_close(
        (ratio * 6 * p).sum(1), torch.full((32,), 6.0, dtype=torch.float64)
    )
    assert len((ratio * 6 * p).round().unique(dim=0)) > 16  # a draw per sample, not per batch
    assert torch.equal(layer.eval()(x), x)


def test_evolutional_dropout_without_gradient_through_the_probabilities():
    x = torch.randn(8, 6, generator=seeded(10), dtype=torch.float64, requires_grad=True)
    y = EvolutionalDropout(generator=seeded(11))(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


def test_evolutional_dropout_of_units_at_zero():
    x = torch.randn(16, 6, generator=seeded(12))
    x[:, 2] = 0
    p = EvolutionalDropout.probabilities(x)
    assert p[2] == 0 and p.sum().item() == pytest.approx(1)
    y = EvolutionalDropout(generator=seeded(13))(x)
    assert y.isfinite().all() and not y[:, 2].any()
    dead = torch.zeros(4, 6)
    assert torch.equal(EvolutionalDropout.probabilities(dead), torch.full((6,), 1 / 6))
    assert torch.equal(EvolutionalDropout(generator=seeded(14))(dead), dead)
    probs = torch.tensor([0.0, 1.0, 1.0])
    dropped = MultinomialDropout(2, probs, generator=seeded(15))(torch.ones(50, 3))
    assert dropped.isfinite().all() and not dropped[:, 0].any() and dropped[:, 1:].any()
    empty = torch.zeros(0, 6)
    assert EvolutionalDropout()(empty).shape == (0, 6)


class Dropping(nn.Module):
    """Dropouts in front of a grouped convolution, a linear layer and nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)  # registered out of order: calls count
        self.drop_head = Dropout(0.5)
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.drop_conv = nn.Dropout2d(0.2)
        self.conv2 = nn.Conv2d(6, 8, 3, groups=2)
        self.last = nn.Dropout(0.3)

    def forward(self, x):
        x = self.conv2(self.drop_conv(self.conv1(x).relu())).relu()
        return self.last(self.head(self.drop_head(x.mean((2, 3)))))


def test_rescale_dropout_follows_the_surviving_weights():
    model = Dropping()
    x = torch.zeros(1, 3, 8, 8)
    targets = find_targets(model, include_classifier=True)
    pruner = Pruner(model, targets=targets, importance=Magnitude(sparsity=0.75))
    pruner.step()
    rates = rescale_dropout_(model, targets, x)
    assert rates == {"drop_conv": 0.2, "drop_head": 0.5}
    assert model.drop_conv.p == pytest.approx(0.2 * 0.25**0.5)
    assert model.drop_head.p == pytest.approx(0.5 * 0.25**0.5)
    assert model.last.p == 0.3  # nobody reads what it drops
    # After more pruning the dense rates are scaled again, not the scaled ones.
    again = copy.deepcopy(pruner.finalize())
    with torch.no_grad():
        again.head.weight.zero_()
    later = find_targets(again, include_classifier=True)
    assert rescale_dropout_(again, later, x, rates) == rates
    assert again.drop_conv.p == pytest.approx(0.1)
    assert again.drop_head.p == 0
    with pytest.raises(ValueError, match="expected rates of drop_conv, drop_head, got drop_c"):
        rescale_dropout_(again, later, x, {"drop_conv": 0.2})
    plain = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="expected a dropout in front of a target, got none"):
        rescale_dropout_(plain, find_targets(plain), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Dropout(1.0), ValueError, r"Dropout: expected p in \[0, 1\), got 1"),
        (lambda: Dropout(-0.1), ValueError, r"Dropout: expected p in \[0, 1\], got -0.1"),
        (lambda: Dropout(0.5, "mean"), ValueError, "Dropout: expected form to be one of inverted"),
        (lambda: MultinomialDropout(0, torch.ones(3)), ValueError, "expected k to be an int >= 1"),
        (
            lambda: MultinomialDropout(2, torch.tensor([0.5, -0.5])),
            ValueError,
            r"MultinomialDropout: expected probs \(d,\), finite, >= 0 and not all 0, got shape",
        ),
        (lambda: MultinomialDropout(2, torch.zeros(3)), ValueError, "and not all 0, got shape"),
        (
            lambda: MultinomialDropout(2, torch.tensor([1.0, float("inf")])),
            ValueError,
            "expected probs",
        ),
        (lambda: EvolutionalDropout(0.0), ValueError, "expected k_ratio > 0 and finite, got 0"),
        (
            lambda: MultinomialDropout(2, torch.ones(3))(torch.ones(2, 4)),
            ValueError,
            r"MultinomialDropout: expected x of shape \(N, 3\) or \(N, 3, H, W\), got \(2, 4\)",
        ),
        (
            lambda: EvolutionalDropout()(torch.ones(3)),
            ValueError,
            r"EvolutionalDropout: expected x of shape \(N, d\) or \(N, d, H, W\), got \(3,\)",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()
