from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.prune import (
    NM,
    Budget,
    Magnitude,
    Random,
    TopK,
    block,
    element,
    filter_,
    find_targets,
    kernel,
    layer,
)
from sparsecnn.prune.selection import score_targets

from .nets import mixed


def all_alive(targets):
    return {t: torch.ones(t.shape, dtype=torch.bool) for t in targets}


def select(targets, scores, granularity, budget, current=None, **options):
    selector = TopK(**options)
    current = all_alive(targets) if current is None else current
    return selector.select(targets, scores, granularity, budget, None, current)


def nearest(x):
    """round, halves towards fewer dropped."""
    return math.ceil(x - 0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.35, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("granularity", [element, kernel, filter_, block(2, 3)], ids=str)
def test_layer_scope_matches_a_stable_argsort(granularity, sparsity):
    targets = find_targets(mixed())
    scores = score_targets(Magnitude(), targets, granularity, None)
    keep = select(targets, scores, granularity, Budget(sparsity=sparsity))
    for t in targets:
        sizes = granularity.reduce(torch.ones(t.shape), t, "sum").numpy()
        order = np.argsort(-scores[t].numpy(), kind="stable")[::-1]
        after = np.concatenate([[0], np.cumsum(sizes[order])])
        dropped = int(np.argmin(np.abs(after - sparsity * t.dense.numel())))
        dropped = min(dropped, len(order) - 1)  # the floor
        assert set((~keep[t]).nonzero().flatten().tolist()) == set(order[:dropped].tolist())


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_exact_count_with_ties(sparsity, levels):
    conv = nn.Conv2d(8, 16, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(1152).remainder(levels).add(1).reshape(conv.weight.shape))
    (t,) = find_targets(conv)
    scores = score_targets(Magnitude(), [t], element, None)
    keep = select([t], scores, element, Budget(sparsity=sparsity))[t]
    assert int((~keep).sum()) == nearest(sparsity * 1152)
    # Nothing dropped outranks anything kept, and of equals the first ones stay.
    flat = scores[t]
    if 0 < sparsity:
        assert flat[~keep].max() <= flat[keep].min()
    boundary = keep[flat == flat[keep].min()]
    assert bool((boundary[:-1] | ~boundary[1:]).all())


def test_global_scope_is_exact_and_lets_layers_compete():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1))
    with torch.no_grad():
        model[2].weight.mul_(100)
    targets = find_targets(model)
    scores = score_targets(Magnitude(), targets, element, None)
    keep = select(targets, scores, element, Budget(sparsity=0.6), scope="global")
    total = sum(t.dense.numel() for t in targets)
    assert sum(int((~k).sum()) for k in keep.values()) == nearest(0.6 * total)
    pooled = torch.cat([scores[t] for t in targets])
    flags = torch.cat([keep[t] for t in targets])
    assert set((~flags).nonzero().flatten().tolist()) == set(
        pooled.argsort()[: nearest(0.6 * total)].tolist()
    )
    assert keep[targets[2]].float().mean() > keep[targets[0]].float().mean()


@pytest.mark.parametrize("floor", [None, 1, 3])
def test_global_floor_saves_a_layer_of_tiny_weights(floor):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    targets = find_targets(model)
    scores = score_targets(Magnitude(), targets, filter_, None)
    budget = Budget(sparsity=0.5)
    keep = select(targets, scores, filter_, budget, scope="global", floor=floor)
    assert int(keep[targets[0]].sum()) == (floor or 1)
    best = scores[targets[0]].argsort(descending=True)[: floor or 1]
    assert keep[targets[0]][best].all()
    empty = select(targets, scores, filter_, budget, scope="global", floor=0)
    assert not empty[targets[0]].any()


def test_global_groups_of_different_sizes_hit_the_nearest_share_of_entries():
    targets = find_targets(mixed())
    for granularity in (filter_, kernel, block(3, 2)):
        scores = score_targets(Magnitude(), targets, granularity, None)
        for sparsity in (0.2, 0.5, 0.8):
            keep = select(targets, scores, granularity, Budget(sparsity=sparsity), scope="global")
            total = sum(t.dense.numel() for t in targets)
            masks = [granularity.expand(keep[t], t) for t in targets]
            dropped = sum(int((~m).sum()) for m in masks)
            largest = max(
                int(granularity.reduce(torch.ones(t.shape), t, "sum").max()) for t in targets
            )
            assert abs(dropped - sparsity * total) <= largest / 2
            assert all(m.any() for m in masks)


def test_ties_between_groups_of_different_sizes_drop_the_last():
    conv = nn.Conv2d(2, 5, 3)
    with torch.no_grad():
        conv.weight.fill_(0.5)
    targets = find_targets(conv)
    granularity = block(2, 18)  # rows 0-1, 2-3 and a block of row 4 alone: 36, 36, 18 entries
    scores = score_targets(Magnitude(), targets, granularity, None)
    for sparsity, kept in ((0.2, [1, 1, 0]), (0.6, [1, 0, 0]), (0.1, [1, 1, 1])):
        keep = select(targets, scores, granularity, Budget(sparsity=sparsity))[targets[0]]
        assert keep.int().tolist() == kept


def test_count_keeps_exactly_that_many_groups():
    targets = find_targets(mixed())
    scores = score_targets(Magnitude(), targets, filter_, None)
    keep = select(targets, scores, filter_, Budget(count=5))
    assert [int(k.sum()) for k in keep.values()] == [5] * len(targets)
    keep = select(targets, scores, filter_, Budget(count=17), scope="global")
    assert sum(int(k.sum()) for k in keep.values()) == 17
    with pytest.raises(ValueError, match=r"expected count at most .* got 7 where 'hidden' has 6"):
        select(targets, scores, filter_, Budget(count=7))


def test_result_does_not_depend_on_the_order_of_targets():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(4)))
    with torch.no_grad():
        for conv in model:
            conv.weight.fill_(1.0)  # all ties: only the order rule decides
    targets = find_targets(model)
    for scope in ("layer", "global"):
        for importance in (Magnitude(), Random(seed=3)):
            first = None
            for order in (targets, targets[::-1], [targets[i] for i in (2, 0, 3, 1)]):
                scores = score_targets(importance, order, kernel, None)
                keep = select(order, scores, kernel, Budget(sparsity=0.4), scope=scope)
                flat = torch.cat([keep[t] for t in targets])
                first = flat if first is None else first
                assert torch.equal(flat, first)
            assert not first.all()


def test_dead_groups_go_first():
    (t,) = find_targets(nn.Conv2d(4, 8, 3))
    current = torch.ones(t.shape, dtype=torch.bool)
    strongest = t.values().abs().sum((1, 2, 3)).argmax()
    current[strongest] = False
    scores = score_targets(Magnitude(), [t], filter_, None)
    keep = select([t], scores, filter_, Budget(sparsity=0.25), {t: current})[t]
    assert not keep[strongest]
    assert int((~keep).sum()) == 2


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4)])
def test_nm_keeps_exactly_n_of_every_m_channels(n, m):
    convs = [nn.Conv2d(8, 6, 3), nn.Conv2d(16, 4, 1, groups=2), nn.Linear(12, 5)]
    for module in convs:
        (t,) = find_targets(module)
        with torch.no_grad():
            module.weight[0] = 1.0  # ties in the first filter
        granularity = NM(n, m)
        scores = score_targets(Magnitude(), [t], granularity, None)
        keep = select([t], scores, granularity, Budget(density=n / m))[t]
        mask = keep.reshape(t.shape).numpy()
        weight = module.weight.detach().abs().numpy().reshape(t.shape[0], t.shape[1], -1)
        mask = mask.reshape(weight.shape)
        for k in range(weight.shape[0]):
            for start in range(0, weight.shape[1], m):
                for position in range(weight.shape[2]):
                    values = weight[k, start : start + m, position]
                    best = np.argsort(-values, kind="stable")[:n]
                    kept = mask[k, start : start + m, position].nonzero()[0]
                    assert set(kept.tolist()) == set(best.tolist())


def test_nm_refusals():
    targets = find_targets(mixed())
    scores = score_targets(Magnitude(), targets, element, None)
    with pytest.raises(ValueError, match=r"multiple of 4 input channels.*'plain' \(3\)"):
        select(targets, scores, NM(2, 4), Budget(density=0.5))
    with pytest.raises(ValueError, match=r"expected sparsity 0.5 for granularity 2:4, got 0.9"):
        select(targets, scores, NM(2, 4), Budget(sparsity=0.9))
    with pytest.raises(ValueError, match="at once"):
        select(targets, scores, NM(2, 4), Budget(density=0.5).at(0.5))


def test_layer_granularity_competes_globally():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[1].weight.mul_(0.01)
    targets = find_targets(model)
    scores = score_targets(Magnitude(), targets, layer, None)
    keep = select(targets, scores, layer, Budget(sparsity=1 / 3), scope="global")
    assert [bool(keep[t]) for t in targets] == [True, False, True]
    with pytest.raises(ValueError, match="scope 'global' for granularity 'layer'"):
        select(targets, scores, layer, Budget(sparsity=1 / 3))


def test_nan_scores_name_the_layer():
    model = mixed()
    with torch.no_grad():
        model.grouped.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"without NaN, got 1 in layer 'grouped'"):
        score_targets(Magnitude(), find_targets(model), element, None)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sparsity": float("nan")}, ValueError, r"in \[0, 1\], got nan"),
        ({"sparsity": 1.5}, ValueError, r"in \[0, 1\], got 1.5"),
        ({"sparsity": -0.1}, ValueError, r"in \[0, 1\], got -0.1"),
        ({"sparsity": 90}, ValueError, r"got 90; did you mean 0.9\?"),
        ({"density": 25.0}, ValueError, r"got 25; did you mean 0.25\?"),
        ({"sparsity": float("inf")}, ValueError, r"got inf"),
        ({"sparsity": "0.9"}, TypeError, r"a number in \[0, 1\], got '0.9'"),
        ({"sparsity": True}, TypeError, r"got True"),
        ({"count": 2.0}, TypeError, r"an int .* got 2.0"),
        ({"count": -1}, ValueError, r"count >= 0, got -1"),
        ({}, ValueError, r"exactly one of .* got none"),
        ({"sparsity": 0.5, "count": 3}, ValueError, r"got sparsity and count"),
    ],
)
def test_bad_budgets(fields, error, message):
    with pytest.raises(error, match=message):
        Budget(**fields)


def test_budget_steps_and_round_trip():
    budget = Budget(sparsity=0.9)
    assert budget.at(0.5, 0.1).to_drop(1000) == pytest.approx(500)
    assert budget.at(0.0, 0.1).to_drop(1000) == pytest.approx(100)
    assert Budget(count=30).at(0.5).to_drop(100) == pytest.approx(35)
    assert Budget(density=0.1).at(1.0).to_drop(1000) == 900.0
    for each in (budget, budget.at(0.25, 0.1), Budget(count=3), Budget(density=0.2)):
        assert Budget.from_dict(each.to_dict()) == each
    with pytest.raises(ValueError, match="got \\['macs'\\]"):
        Budget.from_dict({"macs": 3})


@pytest.mark.parametrize("options", [{"scope": "net"}, {"floor": -1}, {"floor": 0.5}])
def test_bad_selector(options):
    with pytest.raises(ValueError, match=r"TopK: expected (scope|floor)"):
        TopK(**options)
