from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional

from sparsecnn.nn import PatternConv2d
from sparsecnn.prune import (
    Budget,
    Magnitude,
    OneShot,
    Polynomial,
    Pruner,
    Random,
    Threshold,
    find_targets,
)
from sparsecnn.prune.granularity import channel, filter_, kernel, layer, parse, shape
from sparsecnn.prune.group_lasso import GroupLasso

from .nets import mixed
from .test_regularization import linear, targets_of_all_geometries

GRANULARITIES = ["element", "kernel", "filter", "channel", "shape", "layer", "block(2,3)"]


def labels(name, t):
    """Group of each entry, by loops over what the names mean."""
    groups, rows, channels, spatial = t.grouped_shape
    found = np.empty((groups, rows, channels, spatial), dtype=object)
    for g, k, c, s in np.ndindex(groups, rows, channels, spatial):
        found[g, k, c, s] = {
            "element": (g, k, c, s),
            "kernel": (g, k, c),
            "filter": (g, k),
            "channel": (g, c),
            "shape": (g, c, s),
            "layer": (),
            "block(2,3)": (g, k // 2, (c * spatial + s) // 3),
        }[name]
    return found.reshape(-1)


def loop_norms(name, t):
    """||w_g|| and |g| per group from a plain loop."""
    squares, sizes = {}, {}
    for label, value in zip(labels(name, t), t.values().flatten().tolist(), strict=True):
        squares[label] = squares.get(label, 0.0) + value * value
        sizes[label] = sizes.get(label, 0) + 1
    return {g: (squares[g] ** 0.5, sizes[g]) for g in squares}


@pytest.mark.parametrize("name", GRANULARITIES)
def test_ssl_groups_penalty_equals_a_loop(name):
    for t in targets_of_all_geometries():
        norms = loop_norms(name, t).values()
        plain = GroupLasso(name, 0.3, "subgrad").penalty([t])
        assert plain.item() == pytest.approx(0.3 * sum(n for n, _ in norms), rel=1e-12)
        sized = GroupLasso(name, 0.3, "subgrad", scale_by_size=True).penalty([t])
        assert sized.item() == pytest.approx(0.3 * sum(n * s**0.5 for n, s in norms), rel=1e-12)
    targets = targets_of_all_geometries()
    both = GroupLasso([name, "layer"], [0.3, 0.1], "subgrad").penalty(targets)
    parts = GroupLasso(name, 0.3, "subgrad"), GroupLasso("layer", 0.1, "subgrad")
    assert both.item() == pytest.approx(sum(p.penalty(targets).item() for p in parts))
    assert GroupLasso(name, 0.3).penalty(targets) == 0


@pytest.mark.parametrize("name", GRANULARITIES)
def test_fbs_prox_of_every_granularity(name):
    for t in targets_of_all_geometries():
        before = t.values().clone()
        norms = loop_norms(name, t)
        c = 1.001 * float(np.median([n for n, _ in norms.values()]))
        GroupLasso(name, 2 * c).prox_([t], 0.5, 0)
        expected = [
            max(0.0, 1 - c / norms[g][0]) * value
            for g, value in zip(labels(name, t), before.flatten().tolist(), strict=True)
        ]
        np.testing.assert_allclose(t.values().flatten(), expected, rtol=0, atol=1e-12)
        assert (t.dense == 0).any()
        assert not t.dense[t.dense == 0].signbit().any()


def test_fbs_prox_is_the_minimizer():
    source = np.random.default_rng(0)
    for _ in range(100):
        v = source.normal(size=3)
        c = source.uniform(0.2, 2.5)
        _, (t,) = linear(v[None])
        GroupLasso("filter", c / 0.1).prox_([t], 0.1, 0)
        found = t.dense.detach().numpy()[0]

        def cost(w, v=v, c=c):
            return 0.5 * np.sum((w - v) ** 2) + c * np.linalg.norm(w)

        if np.linalg.norm(v) <= c:
            assert not found.any()
            best = min(cost(x) for x in source.normal(size=(50, 3)) * 0.1)
            assert cost(found) <= best
        else:
            assert found.all()
            numeric = minimize(cost, v, method="BFGS", options={"gtol": 1e-9}).x
            np.testing.assert_allclose(found, numeric, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_fbs_prox_of_zero_is_zero_and_so_is_the_gradient(name):
    for t in targets_of_all_geometries(torch.float32):
        with torch.no_grad():
            t.dense.zero_()
        for lam in (0.5, 0.0):
            GroupLasso(name, lam).prox_([t], 0.1, 0)
            assert torch.equal(t.dense, torch.zeros_like(t.dense))
        GroupLasso(name, 0.5, "subgrad").penalty([t]).backward()
        assert torch.equal(t.dense.grad, torch.zeros_like(t.dense))


def test_fbs_prox_keeps_a_diverged_weight_visible():
    _, (t,) = linear([[1.0, float("nan")], [3.0, 4.0]])
    GroupLasso("filter", 1.0).prox_([t], 1.0, 0)
    assert t.dense[0].isnan().all()
    assert t.dense[1].tolist() == pytest.approx([3 * 0.8, 4 * 0.8])


def test_fbs_prox_reaches_the_closed_form_of_an_orthonormal_design():
    source = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(24, 24, generator=source, dtype=torch.float64))
    y = torch.randn(24, generator=source, dtype=torch.float64)
    v = (q.T @ y).reshape(6, 4)
    lam = float(v.norm(dim=1).sort().values[2:4].mean())
    layer_, (t,) = linear(torch.randn(6, 4, generator=source))
    pruner = Pruner(
        layer_, importance=Magnitude(sparsity=0), schedule=OneShot(at=10**6),
        regularizers=[GroupLasso("filter", lam)],
    )  # fmt: skip
    optimizer = torch.optim.SGD(layer_.parameters(), lr=0.3)
    pruner.attach(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (q @ layer_.weight.flatten() - y).square().sum() / 2
        (loss + pruner.penalty()).backward()
        optimizer.step()
    norm = v.norm(dim=1, keepdim=True)
    expected = (1 - lam / norm).clamp(min=0) * v
    torch.testing.assert_close(t.dense.detach(), expected, rtol=0, atol=1e-5)
    dead = (norm <= lam).flatten()
    assert 0 < int(dead.sum()) < 6
    assert torch.equal((t.dense == 0).all(1), dead)


def test_every_uses_the_accumulated_step():
    _, (t,) = linear([[3.0, 4.0]])
    part = GroupLasso("filter", 0.5, every=4)
    for step in range(3):
        part.prox_([t], 0.25, step)
        assert t.dense[0].tolist() == [3.0, 4.0]
    part.prox_([t], 0.25, 3)
    factor = 1 - 4 * 0.25 * 0.5 / 5
    assert t.dense[0].tolist() == pytest.approx([3 * factor, 4 * factor])


def planted(seed=0, channels=2):
    """Inputs, outputs and weights of a convolution with 3 dead filters and 4 dead positions."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, channels, 3, 3, generator=source)
    weight += weight.sign() * 0.3
    weight[[1, 4, 6]] = 0
    dead = torch.zeros(9, dtype=torch.bool)
    dead[[0, 2, 5, 7]] = True
    weight.reshape(8, channels, 9)[:, :, dead] = 0
    x = torch.randn(64, channels, 8, 8, generator=source)
    return x, functional.conv2d(x, weight), weight


def fit(regularizer, steps=400):
    """Train a convolution on `planted` under a regularizer."""
    x, y, wanted = planted()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        conv = nn.Conv2d(2, 8, 3, bias=False)
    pruner = Pruner(
        conv, importance=Magnitude(2), granularity="filter", selector=Threshold(0, floor=0),
        schedule=OneShot(at=10**6), regularizers=[regularizer],
    )  # fmt: skip
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    pruner.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (conv(x) - y).square().sum(1).mean() / 2
        (loss + pruner.penalty()).backward()
        optimizer.step()
    pruner.step(force=True)
    return pruner.finalize(), wanted, x


def test_ssl_groups_prox_finds_the_planted_groups():
    conv, wanted, x = fit(GroupLasso([filter_, shape], 0.05))
    weight = conv.weight.detach()
    assert torch.equal(weight == 0, wanted == 0)
    assert not weight[weight == 0].signbit().any()
    assert int((weight == 0).flatten(1).all(1).sum()) == 3
    assert int((weight == 0).transpose(0, 1).flatten(2).all(1).sum()) == 4 * 2

    packed = PatternConv2d.from_dense(conv, "shape")
    torch.testing.assert_close(packed(x), functional.conv2d(x, weight), rtol=0, atol=1e-5)
    rows, columns = packed.group_rows.diff(), packed.group_columns.diff()
    stored = columns > 0
    assert rows[stored].tolist() == [5]
    assert columns[stored].tolist() == [5 * 2]
    assert packed.values.numel() == 5 * 5 * 2


def test_ssl_groups_subgradient_gives_no_zeros_without_a_threshold():
    conv, wanted, _ = fit(GroupLasso([filter_, shape], 0.05, "subgrad"))
    assert conv.weight.count_nonzero() == conv.weight.numel()
    conv, wanted, _ = fit(GroupLasso([filter_, shape], 0.05, "subgrad", zero_below=2e-2))
    assert torch.equal(conv.weight == 0, wanted == 0)


def test_ssl_groups_that_lie_inside_groups_have_an_exact_prox():
    # Kernels lie inside filters: the two steps minimize the sum of both penalties.
    source = torch.Generator().manual_seed(4)
    conv = nn.Conv2d(3, 2, (1, 2), dtype=torch.float64)
    (t,) = find_targets(conv)
    with torch.no_grad():
        t.dense.copy_(torch.randn(t.shape, generator=source))
    v = t.values().clone()
    GroupLasso([kernel, filter_], [0.4, 0.6]).prox_([t], 1.0, 0)

    def cost(w):
        norms = w.flatten(2).norm(dim=2).sum(), w.flatten(1).norm(dim=1).sum()
        return float((w - v).square().sum() / 2 + 0.4 * norms[0] + 0.6 * norms[1])

    found = t.values()
    for scale in (1e-1, 1e-3):
        for _ in range(100):
            away = torch.randn(v.shape, generator=source, dtype=torch.float64)
            assert cost(found + scale * away) > cost(found)


def shape_masked(groups, stride, padding, depthwise=False, seed=0):
    """A convolution with a random mask per column, and the columns kept."""
    source = torch.Generator().manual_seed(seed)
    c, k = 8, 8 if depthwise else 12
    conv = nn.Conv2d(c, k, 3, stride, padding, groups=c if depthwise else groups)
    (t,) = find_targets(conv)
    kept = torch.rand(shape.n_groups(t), generator=source) < 0.4
    kept[: 9 * 2] = False  # the first two input channels are not read by anybody
    kept[18] = True
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=source))
        conv.weight.masked_fill_(~shape.expand(kept, t), 0)
    return conv.requires_grad_(False), kept, torch.randn(2, c, 9, 7, generator=source)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [1, 2, "depthwise"])
def test_gbd_column_gemm(groups, padding, stride):
    conv, kept, x = shape_masked(groups, stride, padding, groups == "depthwise")
    packed = PatternConv2d.from_dense(conv, "shape")
    torch.testing.assert_close(packed(x), conv(x), rtol=0, atol=1e-5)
    # Columns are those of each conv group's lowered weight; nothing else is stored.
    per_group = kept.reshape(conv.groups, -1)
    expected = torch.cat([flags.nonzero().flatten() for flags in per_group])
    assert packed.columns.tolist() == expected.tolist()
    assert packed.values.numel() == int(kept.sum()) * (conv.out_channels // conv.groups)
    # An input channel without columns is not read: garbage in it does no harm.
    poisoned = x.clone()
    poisoned[:, :2] = float("nan")
    assert packed(poisoned).isfinite().all()
    torch.testing.assert_close(packed(poisoned), conv(x), rtol=0, atol=1e-5)
    assert conv(poisoned).isnan().any()


def test_gbd_growing_lam_stops_at_the_target():
    _, (t,) = linear(torch.arange(1.0, 21.0).reshape(1, 20))
    # 10.4 of 20 groups is 10, as a selection by count rounds it.
    part = GroupLasso("shape", 0.0, growth=0.01, target_sparsity=0.52)
    zeros = []
    shrunk = 0.0
    for step in range(200):
        before = t.dense.detach().clone()
        part.prox_([t], 1.0, step)
        if int((before == 0).sum()) < 10:
            shrunk += 0.01 * step
            expected = (torch.arange(1.0, 21.0).double() - shrunk).clamp(min=0)
            torch.testing.assert_close(t.dense.detach()[0], expected, rtol=0, atol=1e-9)
        else:
            assert torch.equal(t.dense, before)
        zeros.append(int((t.dense == 0).sum()))
    assert zeros[0] == 0 and zeros[-1] == 10
    assert zeros == sorted(zeros)
    assert len(set(zeros)) > 5


@pytest.mark.parametrize("informed", [True, False])
def test_gbd_recipe_keeps_the_planted_columns(informed):
    x, y, wanted = planted()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        conv = nn.Conv2d(2, 8, 3, bias=False)
    pruner = Pruner(
        conv,
        granularity="shape",
        budget=Budget(sparsity=8 / 18),
        importance=Magnitude(2) if informed else Random(seed=0),
        schedule=Polynomial(50, 150, 10),
        regularizers=[GroupLasso("shape", 0.0, growth=1e-3, target_sparsity=8 / 18)],
    )
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    pruner.attach(optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        ((conv(x) - y).square().sum(1).mean() / 2 + pruner.penalty()).backward()
        optimizer.step()
    column = (conv.weight != 0).any(0).flatten()
    planted_column = (wanted != 0).any(0).flatten()
    assert int(column.sum()) == 10 or not informed
    assert torch.equal(column, planted_column) == informed
    # The layer is left alone once the target is reached, so the survivors lose their bias.
    error = (conv.weight - wanted).norm() / wanted.norm()
    assert (error < 1e-3) == informed


def test_layer_granularity_removes_whole_layers():
    model = mixed().double()
    targets = find_targets(model)
    norms = {t.name: t.values().norm().item() for t in targets}
    c = sum(sorted(norms.values())[2:4]) / 2
    GroupLasso(layer, c).prox_(targets, 1.0, 0)
    dead = {t.name for t in targets if not t.dense.any()}
    assert dead == {name for name, norm in norms.items() if norm <= c}


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: GroupLasso([], 0.1), ValueError, "expected at least one granularity, got none"),
        (lambda: GroupLasso("row", 0.1), ValueError, "granularity: expected one of"),
        (lambda: GroupLasso(3, 0.1), TypeError, "granularity: expected a name or a granularity"),
        (
            lambda: GroupLasso(["filter", "shape"], [0.1]),
            ValueError,
            "GroupLasso: expected one lam or 2, one per granularity, got 1",
        ),
        (lambda: GroupLasso("filter", -0.1), ValueError, "expected lam >= 0 and finite, got -0.1"),
        (lambda: GroupLasso("filter", 0.1, "both"), ValueError, "expected mode to be one of"),
        (lambda: GroupLasso("filter", 0.1, growth=-1), ValueError, "expected growth >= 0"),
        (lambda: GroupLasso("filter", 0.1, every=0), ValueError, "expected every to be an int"),
        (
            lambda: GroupLasso("filter", 0.1, target_sparsity=90),
            ValueError,
            r"GroupLasso: expected target_sparsity in \[0, 1\], got 90; did you mean 0.9",
        ),
        (
            lambda: GroupLasso("filter", 0.1, zero_below=1e-4),
            ValueError,
            "GroupLasso: expected zero_below 0 in mode 'prox', got 0.0001",
        ),
        (
            lambda: GroupLasso("filter", 0.1, "subgrad", growth=0.1),
            ValueError,
            "GroupLasso: expected every, growth and target_sparsity only in mode 'prox'",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_names_and_granularities_are_the_same():
    assert GroupLasso(["filter", "channel"], 0.1) == GroupLasso([filter_, channel], (0.1, 0.1))
    assert GroupLasso("block(2,3)", 0.1).granularity == (parse("block(2,3)"),)
