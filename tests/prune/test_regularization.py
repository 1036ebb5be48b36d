from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.prune import Magnitude, OneShot, Pruner, find_targets
from sparsecnn.prune.group_lasso import GroupLasso
from sparsecnn.prune.regularization import (
    L1,
    L0Ball,
    MaxNorm,
    TensorNuclear,
    UnitBias,
    shrink_singular_values,
)

from .nets import mixed


def linear(values):
    """A bare linear layer with these weights in float64, and its target."""
    weight = torch.as_tensor(values, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer, find_targets(layer)


def targets_of_all_geometries(dtype=torch.float64):
    return find_targets(mixed().to(dtype), include_classifier=True)


def flow(part, targets, steps, lr):
    """Gradient descent on the penalty alone, with the proximal steps."""
    for step in range(steps):
        for t in targets:
            t.dense.grad = None
        part.penalty(targets).backward()
        with torch.no_grad():
            for t in targets:
                t.dense.sub_(lr * t.dense.grad)
        part.prox_(targets, lr, step)


@pytest.mark.parametrize("kind", ["hyperbolic", "exponential"])
def test_unit_bias_gradient_is_the_closed_form(kind):
    lam, beta = 0.7, 0.3
    for t in targets_of_all_geometries():
        UnitBias(kind, lam, beta).penalty([t]).backward()
        w = t.dense.detach().numpy()
        size = np.abs(w).reshape(len(w), -1).sum(1).reshape(-1, *[1] * (w.ndim - 1))
        if kind == "hyperbolic":
            value, slope = size / (1 + lam * size), 1 / (1 + lam * size) ** 2
        else:
            value, slope = 1 - np.exp(-lam * size), lam * np.exp(-lam * size)
        np.testing.assert_allclose(t.dense.grad, beta * np.sign(w) * slope, rtol=0, atol=1e-6)
        found = UnitBias(kind, lam, beta).penalty([t]).item()
        assert found == pytest.approx(beta * value.sum(), abs=1e-6)


def test_unit_bias_pulls_small_units_more():
    _, (t,) = linear([[0.1], [10.0]])
    part = UnitBias("hyperbolic", lam=1.0)
    part.penalty([t]).backward()
    pull = t.dense.grad.flatten()
    assert (pull[0] / pull[1]).item() == pytest.approx((11 / 1.1) ** 2, rel=1e-9)
    flow(part, [t], 300, 0.01)
    small, large = t.dense.detach().flatten().tolist()
    assert small == 0.0
    assert 10 * 0.98 < large < 10

    # The same flow under the quadratic penalty shrinks both by one factor.
    w = torch.tensor([0.1, 10.0])
    for _ in range(300):
        w -= 0.01 * w
    assert (w[1] / w[0]).item() == pytest.approx(100, rel=1e-4)
    assert w[0] > 0


def test_unit_bias_zeroes_whole_units_in_training():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=source, dtype=torch.float64)
    layer, (t,) = linear(torch.randn(4, 6, generator=source))
    wanted = torch.randn(4, 6, generator=source, dtype=torch.float64)
    wanted[1] = 0
    pruner = Pruner(
        layer, importance=Magnitude(sparsity=0), schedule=OneShot(at=10**6),
        regularizers=[UnitBias(lam=0.5, beta=0.02)],
    )  # fmt: skip
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    pruner.attach(optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (layer(x) - x @ wanted.T).square().sum(1).mean() / 2
        (loss + pruner.penalty()).backward()
        optimizer.step()
    zero_units = (t.dense == 0).all(1)
    assert zero_units.tolist() == [False, True, False, False]
    assert (t.dense[~zero_units] - wanted[~zero_units]).norm() < 0.1 * wanted.norm()


def test_l1_shrinks_by_the_rate_times_lam():
    for t in targets_of_all_geometries():
        before = t.dense.detach().clone()
        L1(0.5).prox_([t], 0.2, 0)
        expected = before.sign() * (before.abs() - 0.1).clamp(min=0)
        torch.testing.assert_close(t.dense.detach(), expected, rtol=0, atol=1e-12)
        small = before.abs() <= 0.1
        assert small.any() and not t.dense[small].any()
        assert not t.dense[small].signbit().any()
        assert L1(0.5).penalty([t]) == 0
        assert L1(0.5, "subgrad").penalty([t]).item() == pytest.approx(
            0.5 * t.dense.abs().sum().item()
        )
        now = t.dense.detach().clone()
        L1(0.5, "subgrad").prox_([t], 0.2, 0)
        assert torch.equal(t.dense, now)


@pytest.mark.parametrize("regularizer", [L1(0.5), GroupLasso("filter", 0.5)])
def test_prox_takes_the_rate_of_its_parameter_group_now(regularizer):
    layers = nn.Sequential(*(nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2)))
    for layer in layers:
        nn.init.ones_(layer.weight)
    pruner = Pruner(
        layers, targets=find_targets(layers, include_classifier=True),
        importance=Magnitude(sparsity=0), schedule=OneShot(at=10**6), regularizers=[regularizer],
    )  # fmt: skip
    first, second = (t.dense for t in pruner.targets)
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.01}])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    pruner.attach(optimizer)
    for p in (first, second):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [first.item(), second.item()] == pytest.approx([1 - 0.05, 1 - 0.005], abs=1e-12)
    scheduler.step()
    optimizer.step()
    assert [first.item(), second.item()] == pytest.approx([1 - 0.075, 1 - 0.0075], abs=1e-12)


def test_collins_l0_projection_equals_brute_force():
    source = torch.Generator().manual_seed(1)
    for k in range(9):
        v = torch.randn(2, 4, generator=source, dtype=torch.float64)
        _, (t,) = linear(v)
        L0Ball(count=k).prox_([t], 0.1, 0)
        flat = v.flatten()
        best = min(
            itertools.combinations(range(8), k),
            key=lambda kept: sum(float(flat[i]) ** 2 for i in range(8) if i not in kept),
        )
        expected = torch.zeros(8, dtype=torch.float64)
        expected[list(best)] = flat[list(best)]
        assert torch.equal(t.dense.detach().flatten(), expected)


def test_collins_l0_projection_counts_exactly_with_ties():
    _, (t,) = linear(torch.full((2, 4), -3.0))
    L0Ball(count=5).prox_([t], 0.1, 0)
    assert t.dense.detach().flatten().tolist() == [-3.0] * 5 + [0.0] * 3
    for t in targets_of_all_geometries():
        with torch.no_grad():
            t.dense.copy_(t.dense.sign())
        L0Ball(density=0.3).prox_([t], 0.1, 0)
        assert int(t.dense.count_nonzero()) == round(0.3 * t.dense.numel())


def test_collins_l0_projection_lets_zeros_move_between():
    source = torch.Generator().manual_seed(2)
    layer, (t,) = linear(torch.randn(3, 5, generator=source))
    x = torch.randn(8, 5, generator=source, dtype=torch.float64)
    y = torch.randn(8, 3, generator=source, dtype=torch.float64)
    pruner = Pruner(
        layer, importance=Magnitude(sparsity=0), schedule=OneShot(at=10**6),
        regularizers=[L0Ball(count=4, every=3)],
    )  # fmt: skip
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner.attach(optimizer)
    counts = []
    for _ in range(7):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        was_zero = t.dense == 0
        gradient = t.dense.grad.clone()
        optimizer.step()
        counts.append(int(t.dense.count_nonzero()))
        if len(counts) % 3:
            assert torch.equal((t.dense != 0)[was_zero], (gradient != 0)[was_zero])
    assert counts == [15, 15, 4, 15, 15, 4, 15]


def test_fbs_prox_singular_values():
    source = torch.Generator().manual_seed(3)
    matrix = torch.randn(2, 5, 7, generator=source, dtype=torch.float64)
    sigma = torch.linalg.svdvals(matrix)
    c = float(sigma.flatten().median())
    shrunk = shrink_singular_values(matrix, c)
    for one, values in zip(shrunk, sigma, strict=True):
        count = int((values > c).sum())
        assert 0 < count < 5
        assert int(torch.linalg.matrix_rank(one, atol=1e-9, rtol=0)) == count
    torch.testing.assert_close(torch.linalg.svdvals(shrunk), (sigma - c).clamp(min=0))
    assert not shrink_singular_values(torch.zeros(3, 4), 0.1).any()
    # It is the minimizer of ||X - M||^2 / 2 + c ||X||_*: no step away from it is better.
    for _ in range(50):
        other = shrunk + 0.01 * torch.randn(shrunk.shape, generator=source, dtype=torch.float64)
        cost, best = (
            (z - matrix).square().sum() / 2 + c * torch.linalg.svdvals(z).sum()
            for z in (other, shrunk)
        )
        assert cost > best


def test_tensor_nuclear_averages_the_unfoldings_of_each_conv_group():
    c = 0.2 * 0.5 * 3
    for t in targets_of_all_geometries():
        groups = getattr(t.module, "groups", 1)
        w = t.dense.detach().numpy().copy()
        expected = []
        for part in np.split(w, groups):
            mean = np.zeros_like(part)
            for mode in range(part.ndim):
                front = np.moveaxis(part, mode, 0)
                u, s, vh = np.linalg.svd(front.reshape(len(front), -1), full_matrices=False)
                low = (u * np.maximum(s - c, 0)) @ vh
                mean += np.moveaxis(low.reshape(front.shape), 0, mode) / part.ndim
            expected.append(mean)
        part = TensorNuclear(0.5, every=3)
        for step in (0, 1):
            part.prox_([t], 0.2, step)
            assert np.array_equal(t.dense.detach().numpy(), w)
        part.prox_([t], 0.2, 2)
        np.testing.assert_allclose(t.dense.detach(), np.concatenate(expected), rtol=0, atol=1e-10)
        assert part.penalty([t]) == 0


def test_max_norm_leaves_smaller_groups_bitwise():
    for granularity in ("filter", "channel", "layer"):
        for t in targets_of_all_geometries(torch.float32):
            part = MaxNorm(1.0, granularity)
            before = t.dense.detach().clone()
            c = float(part.granularity.reduce(before, t, "l2").median())
            part = MaxNorm(c, granularity)
            norms = part.granularity.reduce(before, t, "l2")
            part.prox_([t], 0.1, 0)
            inside = part.granularity.expand(norms <= c, t)
            assert inside.any()
            assert torch.equal(t.dense[inside], before[inside])
            after = part.granularity.reduce(t.dense.detach(), t, "l2")
            torch.testing.assert_close(after, norms.clamp(max=c))
            assert part.penalty([t]) == 0
    _, (t,) = linear(torch.zeros(2, 3))
    MaxNorm(1.0).prox_([t], 0.1, 0)
    assert not t.dense.isnan().any()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: L1("0.1"), TypeError, "L1: expected lam to be a number, got '0.1'"),
        (lambda: L1(-1.0), ValueError, "L1: expected lam >= 0 and finite, got -1"),
        (lambda: L1(float("nan")), ValueError, "L1: expected lam >= 0 and finite, got nan"),
        (lambda: L1(0.1, "soft"), ValueError, "L1: expected mode to be one of prox, subgrad, got"),
        (lambda: L0Ball(), ValueError, "L0Ball: expected exactly one of density and count, got no"),
        (lambda: L0Ball(0.5, 3), ValueError, "L0Ball: expected exactly one of .* got both"),
        (lambda: L0Ball(50.0), ValueError, r"expected density in \[0, 1\], got 50"),
        (lambda: L0Ball(0.5, every=0), ValueError, "L0Ball: expected every to be an int >= 1"),
        (lambda: UnitBias("cubic"), ValueError, "UnitBias: expected kind to be one of hyperbolic"),
        (lambda: UnitBias(lam=0), ValueError, "UnitBias: expected lam > 0 and finite, got 0"),
        (lambda: UnitBias(beta=-1), ValueError, "UnitBias: expected beta >= 0 and finite, got -1"),
        (lambda: MaxNorm(0.0), ValueError, "MaxNorm: expected c > 0 and finite, got 0"),
        (lambda: MaxNorm(1.0, "row"), ValueError, "granularity: expected one of"),
        (lambda: TensorNuclear(True), TypeError, "TensorNuclear: expected lam to be a number"),
        (lambda: TensorNuclear(1.0, True), ValueError, "TensorNuclear: expected every to be an"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()
