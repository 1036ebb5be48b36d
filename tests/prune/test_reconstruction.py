"""Channels chosen by reconstruction, against numpy, scikit-learn and brute force."""

from __future__ import annotations

import copy
import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.prune import (
    Batches,
    Budget,
    Pruner,
    Random,
    TopK,
    parse_granularity,
)
from sparsecnn.prune.lasso import lasso, lasso_support
from sparsecnn.prune.reconstruction import (
    GreedyReconstruction,
    LassoPath,
    LeastSquares,
    channel_problem,
    filter_contributions,
    greedy_keep,
)
from sparsecnn.prune.samples import io_of

from .nets import mixed
from .test_samples import collect, only, pairs, rand

CHANNEL = parse_granularity("channel")


# ---- LASSO channel pruning -----------------------------------------------------------------------


def planted(seed=0):
    """A 1x1 layer of 12 filters on 16 channels, of which 8 are combinations of the other 8."""
    free = rand(400, 8, seed=seed).double()
    x = torch.cat([free, free @ rand(8, 8, seed=seed + 1).double()], 1)
    x = x[:, torch.randperm(16, generator=torch.Generator().manual_seed(seed + 2))]
    layer = nn.Conv2d(16, 12, 1).double()
    with torch.no_grad():
        layer.weight.copy_(rand(12, 16, 1, 1, seed=seed + 3))
        layer.bias.copy_(rand(12, seed=seed + 4))
    return layer, x.reshape(4, 10, 10, 16).permute(0, 3, 1, 2).contiguous()


def explicit(x, y, t):
    """Z (N * K, C) and y (N * K,) with one column per channel, built the long way."""
    groups, rows, channels, _ = t.grouped_shape
    w = t.values().reshape(t.grouped_shape)
    if t.module.bias is not None:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    z = torch.zeros(groups, x.shape[1], rows, groups, channels, dtype=torch.float64)
    for g in range(groups):
        z[g, :, :, g] = torch.einsum("ncs,kcs->nkc", x[g], w[g])
    return z.reshape(-1, groups * channels), y.reshape(-1)


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "hidden"])
def test_lasso_channel_problem_is_that_of_the_explicit_columns(name):
    model = mixed()
    t = only(model, name)
    x, y = pairs(model, t, rand(12, 3, 6, 6), samples=90)
    z, target = explicit(x, y, t)
    gram, moment = channel_problem(x, y, t)
    torch.testing.assert_close(gram, z.mT @ z / len(z), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(moment, z.mT @ target / len(z), atol=1e-12, rtol=1e-10)


def test_lasso_channel_support_and_optimality():
    layer, images = planted()
    t = only(layer)
    x, y = pairs(layer, t, images)
    with torch.no_grad():  # the rule ||W_c|| = 1, so that the explicit columns are normalized
        layer.weight.div_(layer.weight.square().sum((0, 2, 3), keepdim=True).sqrt())
    z, target = explicit(x, y, t)
    gram, moment = channel_problem(x, y, t)
    beta = torch.from_numpy(lasso_support(gram.numpy(), moment.numpy(), 8))
    assert int((beta != 0).sum()) == 8
    slope = z.mT @ (target - z @ beta) / len(z)
    lam = slope.abs().max().item()
    assert lam > 0
    on = beta != 0
    torch.testing.assert_close(slope[on], lam * beta[on].sign(), atol=1e-6, rtol=0)
    assert bool((slope[~on].abs() <= lam + 1e-6).all())
    assert np.allclose(lasso(gram.numpy(), moment.numpy(), lam), beta.numpy(), atol=1e-6)


def test_lasso_channel_solver_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    for seed, (rows, columns) in enumerate([(60, 10), (30, 40), (200, 25)]):
        z = rand(rows, columns, seed=seed).double()
        z[:, 1] = z[:, 0] + 0.1 * z[:, 1]  # strongly correlated
        target = z @ rand(columns, seed=9).double() + rand(rows, seed=8).double()
        z, target = z.numpy(), target.numpy()
        gram, moment = z.T @ z / rows, z.T @ target / rows
        for share in (0.7, 0.2, 0.03):
            lam = share * np.abs(moment).max()
            oracle = linear_model.Lasso(lam, fit_intercept=False, tol=1e-12, max_iter=200_000)
            expected = oracle.fit(z, target).coef_
            found = lasso(gram, moment, lam)
            assert np.allclose(found, expected, atol=1e-5)
            assert np.array_equal(found != 0, np.abs(expected) > 1e-9)
    assert not lasso(gram, moment, np.abs(moment).max()).any()


def test_lasso_channel_solver_with_redundant_channels(monkeypatch):
    """Each column twice, and one that is 0: no support of the wanted size, yet an optimum."""
    z = rand(80, 5, seed=1).double().numpy()
    z = np.concatenate([z, z, np.zeros((80, 1))], 1)
    gram, moment = z.T @ z / 80, z.T @ z.sum(1) / 80
    beta = lasso_support(gram, moment, 11)
    assert 5 <= np.count_nonzero(beta) <= 10
    assert beta[10] == 0
    assert np.abs(z @ beta - z.sum(1)).max() < 1e-4
    assert np.count_nonzero(lasso_support(gram, moment, 3)) >= 3
    monkeypatch.setattr(sys.modules[lasso.__module__], "_SWEEPS", 0)
    with pytest.raises(RuntimeError, match="lasso: expected convergence within 0 sweeps"):
        lasso(gram, moment, 0.1)


def relative_error(layer, before, images):
    spread = before - before.mean((0, 2, 3), keepdim=True)
    return float((layer(images).detach() - before).norm() / spread.norm())


def pruned_planted(selector, compensator, importance=None):
    layer, images = planted()
    before = layer(images).detach()
    pruner = Pruner(
        layer, granularity="channel", budget=Budget(count=8), importance=importance,
        selector=selector, compensator=compensator, targets=[only(layer)],
        calibration=Batches([(images, torch.zeros(4))], reference=copy.deepcopy(layer)),
    )  # fmt: skip
    pruner.step()
    kept = pruner.masks()["weight"]
    assert int(kept[0].sum()) == 8
    assert torch.equal(kept, kept[:1].expand_as(kept))
    return relative_error(layer, before, images)


def test_lasso_channel_needs_the_refit():
    assert pruned_planted(LassoPath(), LeastSquares()) < 1e-4
    assert pruned_planted(LassoPath(), None) > 0.1
    assert pruned_planted(LassoPath(), LeastSquares("channel_scale")) > 0.1


GEOMETRIES = ["plain", "grouped", "depthwise", "pointwise", "hidden"]


def channel_pruner(model, name, selector, compensator=None, sparsity=0.5, importance=None, x=None):
    """Prune the input channels of one layer of `mixed` and return the pruner."""
    x = rand(64, 3, 6, 6, seed=5) if x is None else x
    data = [(part, torch.zeros(len(part))) for part in x.split(16)]
    return Pruner(
        model, granularity="channel", budget=Budget(sparsity=sparsity), selector=selector,
        compensator=compensator, importance=importance, targets=[only(model, name)],
        calibration=Batches(data, reference=copy.deepcopy(model)),
    )  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False])
def test_lasso_channel_refit_is_least_squares(name, bias):
    model = mixed().double()
    if not bias:
        getattr(model, name).bias = None
    t = only(model, name)
    x = rand(64, 3, 6, 6, seed=5).double()
    before = t.values().clone()
    _, ys = pairs(model, t, x, samples=5000)
    pruner = channel_pruner(model, name, LassoPath(), LeastSquares(), x=x)
    pruner.step()
    groups, rows, channels, _ = t.grouped_shape
    kept = CHANNEL.reduce(pruner.masks()[t.key], t, "max").reshape(groups, channels)
    total = groups * channels
    assert int(kept.sum()) == total - np.ceil(0.5 * total - 0.5)
    # Its inputs do not depend on the layer itself, and the positions are drawn alike.
    xs, _ = pairs(model, t, x, samples=5000)
    w = t.values().reshape(t.grouped_shape)
    for g in range(groups):
        if not kept[g].any():
            assert not w[g].any()
            if bias:
                fitted = t.module.bias.detach().reshape(groups, rows)[g]
                torch.testing.assert_close(fitted, ys[g].mean(0))
            continue
        columns = xs[g][:, kept[g]].flatten(1)
        if bias:
            columns = torch.cat([columns, torch.ones(len(columns), 1).double()], 1)
        best = np.linalg.lstsq(columns.numpy(), ys[g].numpy(), rcond=None)[0]
        found = w[g][:, kept[g]].flatten(1)
        if bias:
            found = torch.cat([found, t.module.bias.detach().reshape(groups, rows)[g][:, None]], 1)
        rest = (torch.from_numpy(best) - found.mT).abs().max()
        assert rest < 1e-8
    assert not torch.equal(t.values(), before)


def error_after(name, selector, compensator, importance=None, seed=0):
    """Relative error of one layer of `mixed`, in which some channels matter less than others."""
    model = mixed(seed)
    t = only(model, name)
    gain = torch.logspace(0, -2, CHANNEL.n_groups(t))
    gain = gain[torch.randperm(len(gain), generator=torch.Generator().manual_seed(seed))]
    with torch.no_grad():
        t.dense.mul_(CHANNEL.expand(gain, t))
    x = rand(64, 3, 6, 6, seed=5)
    _, before = pairs(model, t, x)
    pruner = channel_pruner(model, name, selector, compensator, importance=importance)
    pruner.step()
    inputs, _ = pairs(model, t, x)
    groups, rows, _, _ = t.grouped_shape
    w = t.weight.detach().double().reshape(t.grouped_shape)
    after = torch.einsum("gncs,gkcs->gnk", inputs, w)
    after += t.module.bias.detach().reshape(groups, 1, rows)
    return float((after - before).norm() / (before - before.mean(1, keepdim=True)).norm())


@pytest.mark.parametrize("name", ["grouped", "depthwise", "pointwise", "hidden"])
@pytest.mark.parametrize("selector", [LassoPath(), GreedyReconstruction()], ids=["lasso", "greedy"])
def test_lasso_channel_and_thinet_greedy_beat_random_channels(name, selector):
    informed = error_after(name, selector, LeastSquares())
    chance = [
        error_after(name, TopK(), LeastSquares(), Random(seed=seed)) for seed in range(4)
    ]
    assert informed < 0.7 * sum(chance) / len(chance)


def test_lasso_channel_errors_do_not_add_up():
    """Layer by layer, fitted to the original outputs from the inputs that pruning has changed."""
    model, x = mixed(), rand(64, 3, 6, 6, seed=5)
    original = copy.deepcopy(model)
    names = ["grouped", "pointwise", "hidden"]

    def run(reference):
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            pruned.plain.weight[:3] *= 0.5  # an error that is there already
        Pruner(
            pruned, granularity="channel", budget=Budget(sparsity=0.3), selector=LassoPath(),
            compensator=LeastSquares(), targets=[only(pruned, name) for name in names],
            calibration=Batches([(x, torch.zeros(64))], reference=reference),
        ).step()  # fmt: skip
        return float((pruned(x) - original(x)).detach().norm())

    assert run(original) < 0.8 * run(None)


@pytest.mark.parametrize("per", ["filter", "channel_scale"])
def test_a_dead_channel_stays_dead(per):
    model = mixed()
    t = only(model, "pointwise")
    with torch.no_grad():
        t.dense[:, 3] = 0
        model.depthwise.weight[5] = 0
        model.depthwise.bias[5] = -1  # channel 5 never fires
    before = t.dense.detach().clone()
    keep = torch.ones(24, dtype=torch.bool)
    keep[7] = False
    part = LeastSquares(per)
    x = rand(64, 3, 6, 6, seed=5)
    _, stats = collect(model, t, x, samples=part.samples, reference=mixed(1))
    part.apply(t, keep, stats)
    assert not t.dense[:, 3].any()
    assert torch.equal(t.dense[:, 7], before[:, 7])  # still holds its values
    torch.testing.assert_close(t.dense[:, 5], before[:, 5], atol=1e-6, rtol=0)
    assert (t.dense - before).abs().max() > 0.01
def test_few_samples_change_little():
    """4 samples for 24 weights per filter: fitted exactly, by the least change."""
    model, x = mixed(), rand(64, 3, 6, 6, seed=5)
    t = only(model, "pointwise")
    part = LeastSquares(samples=4)
    need, stats = collect(model, t, x, samples=4, reference=mixed(2))
    xs, ys = io_of(stats, need, t)
    before = t.values()
    part.apply(t, torch.ones(24, dtype=torch.bool), stats)
    predicted = torch.einsum("gncs,gkcs->gnk", xs, t.values().reshape(t.grouped_shape))
    torch.testing.assert_close(
        predicted + t.module.bias.detach().double(), ys, atol=1e-5, rtol=0
    )
    change = (t.values() - before).flatten(1)
    span = (xs - xs.mean(1, keepdim=True))[0, :, :, 0]
    inside = change @ torch.linalg.pinv(span, rtol=1e-9) @ span
    torch.testing.assert_close(change, inside, atol=1e-5, rtol=0)


def test_ridge_pulls_towards_the_present_weights():
    layer, images = planted()
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.mul_(2.0)
    for per in ("filter", "channel_scale"):
        moved = []
        for ridge in (0.0, 1.0, 1e9):
            trial = copy.deepcopy(layer)
            t = only(trial)
            _, stats = collect(trial, t, images, samples=300, reference=reference)
            part = LeastSquares(per, ridge=ridge, samples=300)
            part.apply(t, torch.ones(16, dtype=torch.bool), stats)
            moved.append(float((t.values() - only(layer).values()).norm()))
        assert moved[0] > moved[1] > 1e3 * moved[2] > 0


# ---- the residual target -------------------------------------------------------------------------


class Residual(nn.Module):
    """x -> shortcut(x) + last(relu(first(x)))."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(3, 6, 1)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.shortcut(x) + self.last(self.first(x).relu())


def residual():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual().double()


def test_residual_target():
    """The shortcut errs by D, which the features of the branch span: the branch makes up for it."""
    original, x = residual(), rand(8, 3, 6, 6).double()
    with torch.no_grad():  # the shortcut reads what `first` computes linearly, before the ReLU
        original.first.bias.fill_(50.0)
    model = copy.deepcopy(original)
    with torch.no_grad():
        kernel = rand(6, 8, seed=4).double() @ original.first.weight.flatten(1)
        model.shortcut = nn.Conv2d(3, 6, 3, padding=1).double()
        model.shortcut.weight.copy_(kernel.reshape(6, 3, 3, 3))
        model.shortcut.weight[:, :, 1:2, 1:2] += original.shortcut.weight
        model.shortcut.bias.copy_(original.shortcut.bias)
    error = (model(x) - original(x)).norm()
    assert error > 1

    def refit(shortcuts):
        trial = copy.deepcopy(model)
        part = LeastSquares(shortcuts=shortcuts)
        t = only(trial, "last")
        _, stats = collect(trial, t, x, part.samples, original, shortcuts)
        part.apply(t, torch.ones(8, dtype=torch.bool), stats)
        return (trial(x) - original(x)).norm()

    assert refit({"last": "shortcut"}) < 1e-4
    torch.testing.assert_close(refit({}), error, rtol=1e-6, atol=0)


def test_residual_target_reaches_the_selector():
    original = residual()
    model, x = copy.deepcopy(original), rand(8, 3, 6, 6).double()
    with torch.no_grad():
        model.shortcut.weight.mul_(0.2)
    shortcuts = {"last": "shortcut"}
    pruner = Pruner(
        model, granularity="channel", budget=Budget(count=5), selector=LassoPath(100, shortcuts),
        compensator=LeastSquares(samples=100, shortcuts=shortcuts), targets=[only(model, "last")],
        calibration=Batches([(x, torch.zeros(8))], reference=original),
    )  # fmt: skip
    assert pruner.needs == {"io:100:last=shortcut"}
    before = (model(x) - original(x)).norm()
    pruner.step()
    assert (model(x) - original(x)).norm() < before


# ---- ThiNet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIES)
def test_thinet_greedy_contributions_sum_to_the_output_without_bias(name):
    model = mixed()
    t = only(model, name)
    x, y = pairs(model, t, rand(16, 3, 6, 6), samples=200)
    found, filters = filter_contributions(x, t, 3)
    groups, rows, _, _ = t.grouped_shape
    assert len(filters.unique()) == rows  # random filters, all of them in use
    output = y.gather(2, filters[:, :, None])[:, :, 0]
    bias = t.module.bias.detach().double().reshape(groups, rows).gather(1, filters)
    torch.testing.assert_close(found.sum(2), output - bias, atol=1e-5, rtol=0)


def brute(x, removed):
    channels = x.shape[2]
    total = torch.zeros(x.shape[:2], dtype=x.dtype)
    for c in removed:
        total[c // channels] += x[c // channels, :, c % channels]
    return float(total.square().sum())


@pytest.mark.parametrize("groups", [1, 2, 9])
def test_thinet_greedy_equals_brute_force(groups):
    x = rand(groups, 50, 18 // groups, seed=groups).double()
    alive = torch.ones(18, dtype=torch.bool)
    removed = []
    for count in range(17, 0, -1):
        keep = greedy_keep(x, count, alive)
        chosen = min(
            (c for c in range(18) if c not in removed), key=lambda c: brute(x, [*removed, c])
        )
        removed.append(chosen)
        assert sorted(removed) == (~keep).nonzero().flatten().tolist()
    # One removal is the global optimum; ties go to the last.
    assert removed[0] == min(range(18), key=lambda c: brute(x, [c]))
    assert greedy_keep(torch.ones(1, 5, 4).double(), 3, alive[:4]).tolist() == [True] * 3 + [False]
    alive[4] = False
    assert not greedy_keep(x, 17, alive)[4]


def test_thinet_greedy_uses_that_channels_cancel():
    x = rand(1, 60, 5).double()
    x[:, :, 3] = -x[:, :, 1] + 1e-3 * x[:, :, 0]  # both are big, together they are nothing
    keep = greedy_keep(10 * x * torch.tensor([0.5, 1.0, 0.5, 1.0, 0.5]), 3, torch.ones(5).bool())
    best = min(itertools.combinations(range(5), 2), key=lambda pair: brute(x, pair))
    assert best == (1, 3)
    assert int(keep.sum()) == 3  # greedy sees single channels first: it need not find the pair
    assert keep[[1, 3]].all() or not keep[[1, 3]].any()


def test_thinet_greedy_looks_at_the_next_layer():
    """A filter with a huge norm, of which the next layer reads next to nothing, goes first."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        model[0].weight[2] *= 100
        model[2].weight[:, 2] = 1e-6
    x = rand(8, 2, 8, 8)
    calibration = Batches([(x, torch.zeros(8))])
    pruner = Pruner(
        model, granularity="channel", budget=Budget(count=5), selector=GreedyReconstruction(500),
        targets=[only(model, "2")], calibration=calibration,
    )  # fmt: skip
    pruner.step()
    assert not pruner.masks()["2.weight"][:, 2].any()
    assert pruner.masks()["2.weight"].sum() == 4 * 5 * 9
    norms = model[0].weight.detach().abs().sum((1, 2, 3))
    assert int(norms.argmax()) == 2  # the ranking of filters by their own norm would keep it


@pytest.mark.parametrize("name", GEOMETRIES)
def test_thinet_greedy_scale_equals_numpy(name):
    model = mixed().double()
    t = only(model, name)
    images = rand(64, 3, 6, 6, seed=5).double()
    part = LeastSquares("channel_scale")
    need, stats = collect(model, t, images, part.samples)
    x, y = io_of(stats, need, t)
    count = CHANNEL.n_groups(t) // 2
    contributions, _ = filter_contributions(x, t, 0)
    keep = greedy_keep(contributions, max(count, 1), torch.ones(CHANNEL.n_groups(t)).bool())
    z, target = explicit(x, y, t)
    best = np.linalg.lstsq(z[:, keep].numpy(), target.numpy(), rcond=None)[0]
    before = t.values().clone()
    part.apply(t, keep, stats)
    expected = torch.ones(len(keep)).double()
    expected[keep] = torch.from_numpy(best)
    torch.testing.assert_close(
        t.values(), before * CHANNEL.expand(expected, t), atol=1e-8, rtol=1e-8
    )
    scaled = (z[:, keep] @ torch.from_numpy(best) - target).norm()
    assert scaled <= (z[:, keep].sum(1) - target).norm()
    # The bias takes up the mean.
    groups, rows, _, _ = t.grouped_shape
    w = (t.values() * CHANNEL.expand(keep, t)).reshape(t.grouped_shape)
    output = torch.einsum("gncs,gkcs->gnk", x, w) + t.module.bias.detach().reshape(groups, 1, rows)
    torch.testing.assert_close(output.mean(1), y.mean(1), atol=1e-10, rtol=0)
    torch.testing.assert_close((output - y).norm(), scaled)


# ---- refusals ------------------------------------------------------------------------------------


def test_reconstruction_refuses_bad_arguments():
    for build in (LassoPath, GreedyReconstruction, lambda n: LeastSquares(samples=n)):
        for samples in (0, True, 2.5):
            with pytest.raises(ValueError, match="expected samples to be an int >= 1"):
                build(samples)
    for build in (LassoPath, LeastSquares):
        with pytest.raises(ValueError, match="expected shortcuts of module names without"):
            build(shortcuts={"a:b": "c"})
    with pytest.raises(ValueError, match="expected per 'filter' or 'channel_scale', got 'x'"):
        LeastSquares("x")
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected ridge"):
            LeastSquares(ridge=ridge)
    with pytest.raises(ValueError, match="expected seed to be an int >= 0, got -1"):
        GreedyReconstruction(seed=-1)
    model = mixed()
    t = only(model, "grouped")
    x = rand(8, 3, 6, 6)
    for selector in (LassoPath(), GreedyReconstruction()):
        _, stats = collect(model, t, x, samples=5000)
        with pytest.raises(ValueError, match="expected granularity channel, got filter"):
            selector.select([t], {}, parse_granularity("filter"), Budget(count=2), stats, {})
        with pytest.raises(ValueError, match="expected a budget, got None"):
            selector.select([t], {}, CHANNEL, None, stats, {})
        with pytest.raises(ValueError, match="got 9 where 'grouped' has 8"):
            selector.select([t], {}, CHANNEL, Budget(count=9), stats, {})
        # All of it may go by the budget: one channel is left.
        for share in (1.0, 0.99):
            keep = selector.select([t], {}, CHANNEL, Budget(sparsity=share), stats, {})
            assert int(keep[t].sum()) == 1
        keep = selector.select([t], {}, CHANNEL, Budget(sparsity=0.0), stats, {})
        assert keep[t].all()
    with pytest.raises(ValueError, match="with 8 groups in layer 'grouped', got 12"):
        LeastSquares().apply(t, torch.ones(12, dtype=torch.bool), stats)
    with pytest.raises(ValueError, match="expected lam >= 0"):
        lasso(np.eye(2), np.ones(2), -1.0)
    with pytest.raises(ValueError, match="expected finite gram and moment"):
        lasso(np.eye(2) * np.nan, np.ones(2), 1.0)
