"""Searches over masks and over densities, against the trials done by hand."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn

from sparsecnn.nn import PatternConv2d
from sparsecnn.prune import (
    NM,
    Budget,
    Magnitude,
    Pruner,
    find_targets,
    parse_granularity,
)
from sparsecnn.prune.search import GreedyLayerSearch, RandomMaskSearch, csr_bytes, unchanged

from .nets import digits_net, mixed

GRANULARITIES = ["element", "kernel", "filter", "channel", "shape", "block(2,3)", "layer"]


def images(seed=0, shape=(16, 3, 6, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everything(model):
    """Copies of all parameters and buffers, and the modes."""
    state = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    return state, [m.training for m in model.modules()]


def assert_same(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


class Closeness:
    """-||model(x) - y||: how near the outputs are to those of the unpruned network."""

    def __init__(self, model, x):
        self.x, self.y = x, copy.deepcopy(model).eval()(x).detach()
        self.values = []
        self.masks = []

    def __call__(self, model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        self.values.append(-float((model(self.x) - self.y).norm()))
        self.masks.append([m.weight != 0 for m in layers_of(model)])
        return self.values[-1]


def ones(targets):
    return {t: torch.ones(t.shape, dtype=torch.bool) for t in targets}


def search(model, evaluate, n_masks, granularity, sparsity=0.5, seed=0):
    targets = find_targets(model)
    part = RandomMaskSearch(model, evaluate, n_masks, seed)
    budget = Budget(sparsity=sparsity)
    keep = part.select(targets, {}, granularity, budget, None, ones(targets))
    drawn = list(part.draw(targets, granularity, budget, ones(targets)))
    return targets, keep, drawn


@pytest.mark.parametrize("name", GRANULARITIES)
def test_random_mask_search_is_the_argmax_over_its_masks(name):
    granularity = parse_granularity(name)
    model = mixed().train()
    evaluate = Closeness(model, images())
    before = everything(model)
    targets, keep, drawn = search(model, evaluate, 12, granularity)
    assert_same(before, everything(model))
    assert len(drawn) == len(evaluate.values) == 12
    by_hand = []
    for masks in drawn:
        trial = copy.deepcopy(model).eval()
        with torch.no_grad():
            for t, twin in zip(targets, find_targets(trial), strict=True):
                twin.dense.mul_(granularity.expand(masks[t], t))
        by_hand.append(-float((trial(evaluate.x) - evaluate.y).detach().norm()))
    assert evaluate.values == pytest.approx(by_hand, abs=1e-6)
    assert len(set(evaluate.values)) >= 3
    best = max(range(12), key=evaluate.values.__getitem__)
    for t in targets:
        assert torch.equal(keep[t], drawn[best][t])


@pytest.mark.parametrize("name", GRANULARITIES)
def test_random_mask_search_meets_the_count_in_every_layer(name):
    granularity = parse_granularity(name)
    for sparsity in (0.3, 0.9, 1.0):
        _, _, drawn = search(mixed(), lambda model: 0.0, 5, granularity, sparsity)
        for masks in drawn:
            if name == "layer":
                continue
            for t, flags in masks.items():
                groups = granularity.n_groups(t)
                assert flags.any(), t.name  # no layer is emptied
                if name != "block(2,3)":
                    dropped = min(math.ceil(sparsity * groups - 0.5), groups - 1)
                    assert int((~flags).sum()) == dropped
    if name == "layer":  # all layers share the budget
        assert {int(flags) for masks in drawn for flags in masks.values()} == {0}
        _, _, drawn = search(mixed(), lambda model: 0.0, 9, granularity, 0.5)
        assert len({tuple(int(f) for f in masks.values()) for masks in drawn}) > 1


def test_random_mask_search_gets_no_worse_with_more_masks():
    model = mixed()
    kernel = parse_granularity("kernel")
    targets, _, drawn = search(model, lambda model: 0.0, 40, kernel)
    best = []
    for n in (1, 5, 10, 20, 40):
        evaluate = Closeness(model, images())
        _, _, first = search(model, evaluate, n, kernel)
        for mine, long in zip(first, drawn, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(mine.values(), long.values(), strict=True))
        best.append(max(evaluate.values))
    assert best == sorted(best)
    assert best[-1] > best[0]
    _, _, other = search(model, lambda model: 0.0, 1, kernel, seed=1)
    assert not torch.equal(other[0][other_key(other)], drawn[0][targets[0]])


def other_key(drawn):
    return next(iter(drawn[0]))


def test_random_mask_search_does_not_depend_on_the_order_of_targets():
    model = mixed()
    part = RandomMaskSearch(model, Closeness(model, images()), 6)
    targets = find_targets(model)
    arguments = ({}, parse_granularity("filter"), Budget(sparsity=0.5), None, ones(targets))
    keep = part.select(targets, *arguments)
    reverse = part.select(targets[::-1], *arguments)
    assert all(torch.equal(keep[t], reverse[t]) for t in targets)


def test_random_mask_search_leaves_batch_norm_alone():
    model = digits_net().train()
    x = images(shape=(32, 1, 8, 8))
    model(x)  # statistics that are not the initial ones
    before = everything(model)

    def evaluate(trial):
        assert not trial.bn1.training
        trial.train()  # even an evaluation that should not is undone
        trial(x)
        assert not torch.equal(trial.bn1.running_mean, before[0]["bn1.running_mean"])
        return float(trial.bn1.running_mean.sum())

    pruner = Pruner(
        model, granularity="kernel", budget=Budget(sparsity=0.6),
        selector=RandomMaskSearch(model, evaluate, 4),
    )  # fmt: skip
    pruner.step()
    for name, value in model.named_buffers():
        if "bn" in name:
            assert torch.equal(value, before[0][name]), name
    for t in pruner.targets:
        kept = pruner.masks()[t.key]
        assert torch.equal(t.dense[kept], before[0][t.key][kept])
        assert not t.dense[~kept].any()
    assert all(m.training for m in model.modules())


def test_random_mask_search_in_two_steps_and_after_a_failure():
    """Feature maps first, kernels of the rest then; what is dead stays dead."""
    model = mixed()
    evaluate = Closeness(model, images())

    def prune(granularity, sparsity):
        pruner = Pruner(
            model, granularity=granularity, budget=Budget(sparsity=sparsity), keep_zeros=True,
            selector=RandomMaskSearch(model, evaluate, 5),
        )  # fmt: skip
        pruner.step()
        masks = pruner.masks()
        pruner.finalize()
        return masks

    maps = prune("filter", 0.25)
    kernels = prune("kernel", 0.5)
    for key, mask in kernels.items():
        assert not (mask & ~maps[key]).any()
        if "hidden" not in key:
            assert int((~mask).sum()) == mask.numel() // 2
    before = everything(model)

    def fail(trial):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        search(model, fail, 3, parse_granularity("element"))
    assert_same(before, everything(model))


def test_random_mask_search_knows_the_windows_of_n_m():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Conv2d(4, 8, 3))
    x = images(shape=(2, 8, 7, 7))
    targets = find_targets(model)
    part = RandomMaskSearch(model, Closeness(model, x), 3)
    keep = part.select(targets, {}, NM(2, 4), Budget(sparsity=0.5), None, ones(targets))
    for t in targets:
        assert bool((keep[t].reshape(t.shape).unflatten(1, (-1, 4)).sum(2) == 2).all())


def test_random_mask_search_refuses_bad_arguments():
    model = mixed()
    for bad in (None, "model"):
        with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
            RandomMaskSearch(bad, float)
    with pytest.raises(TypeError, match=r"expected evaluate\(model\) -> float, got 3"):
        RandomMaskSearch(model, 3)
    for n in (0, True, 1.5):
        with pytest.raises(ValueError, match="expected n_masks to be an int >= 1"):
            RandomMaskSearch(model, float, n)
    with pytest.raises(ValueError, match="expected seed to be an int >= 0, got -1"):
        RandomMaskSearch(model, float, 1, -1)
    element = parse_granularity("element")
    with pytest.raises(ValueError, match="expected evaluate to return a number, got NaN"):
        search(model, lambda model: math.nan, 2, element)
    targets = find_targets(mixed())
    with pytest.raises(ValueError, match="expected targets of model, got 'plain' of another"):
        RandomMaskSearch(model, float).select(
            targets, {}, element, Budget(sparsity=0.5), None, ones(targets)
        )
    with pytest.raises(ValueError, match="expected a budget, got None"):
        targets = find_targets(model)
        RandomMaskSearch(model, float).select(targets, {}, element, None, None, ones(targets))


@pytest.mark.parametrize("groups", [1, 2])
def test_kernel_csr(groups):
    """The kernels that a search keeps are what the sparse layer stores and computes with."""
    conv = nn.Conv2d(16, 12, 3, padding=1, groups=groups)
    x = images(shape=(2, 16, 9, 9))
    pruner = Pruner(
        conv, granularity="kernel", budget=Budget(sparsity=0.6),
        selector=RandomMaskSearch(conv, Closeness(conv, x), 20),
    )  # fmt: skip
    pruner.step()
    mask = pruner.masks()["weight"]
    pruner.finalize()
    total = 12 * 16 // groups
    kept = total - round(0.6 * total)
    assert int(mask.flatten(2).all(2).sum()) == int(mask.flatten(2).any(2).sum()) == kept
    layer = PatternConv2d.from_dense(conv)
    expected = nn.functional.conv2d(x, conv.weight * mask, conv.bias, 1, 1, 1, groups)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    # One stored value is one multiplication per output position.
    assert layer.weight.values.numel() == kept * 3 * 3
    assert torch.equal(layer.weight.to_dense(), conv.weight)


# ---- densities of layers -------------------------------------------------------------------------


class Middle(nn.Module):
    """Three convolutions; the middle one is a residual branch whose output scale is 0."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        x = self.first(x).relu()
        x = x + self.scale * self.middle(x)
        return self.last(x)


def middle():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Middle()


GRID = (1.0, 0.5, 0.25, 0.1, 0.05)


def greedy(model, evaluate, budget_bytes, **options):
    part = GreedyLayerSearch(model, evaluate, budget_bytes, **options)
    pruner = Pruner(model, granularity="element", importance=Scores(), selector=part)
    pruner.step()
    return pruner


class Scores(Magnitude):
    """Magnitudes without a budget of their own."""


def stored(layer):
    """Bytes of the arrays that a CSR file of the layer's lowered weight would hold."""
    matrix = layer.weight.detach().flatten(1).to_sparse_csr()
    index = 1 if matrix.shape[1] <= 256 else 2
    return (
        matrix.values().numel() * 4
        + matrix.col_indices().numel() * index
        + matrix.crow_indices().numel() * 4
    )


def test_collins_greedy_takes_the_idle_layer_first():
    model = middle()
    layers = (model.first, model.middle, model.last)
    evaluate = Closeness(model, images())
    full = sum(stored(layer) for layer in layers)
    before = everything(model)
    idle = [csr_bytes(t, round(d * 576)) for t in find_targets(model)[1:2] for d in GRID]
    # A budget that the middle layer alone can meet: nobody else is touched.
    budget = full - idle[0] + idle[4]
    pruner = greedy(model, evaluate, budget)
    assert densities(pruner) == [1.0, 0.05, 1.0]
    assert sum(stored(layer) for layer in layers) <= budget
    # The state before, then 4 rounds of 3 layers.
    assert len(evaluate.values) == 1 + 4 * 3
    assert evaluate.values[0] == 0.0
    first_round = evaluate.masks[1:4]
    changed = [[bool((~m).any()) for m in masks] for masks in first_round]
    assert changed == [[True, False, False], [False, False, True], [False, True, False]]
    # No weight but the dropped ones has changed.
    for t in pruner.targets:
        kept = pruner.masks()[t.key]
        assert torch.equal(t.dense[kept], before[0][t.key][kept])


def densities(pruner):
    return [round(float(m.double().mean()), 2) for m in pruner.masks().values()]


def test_collins_greedy_equals_the_search_by_hand():
    model = middle()
    with torch.no_grad():
        model.scale.fill_(0.3)
    original = copy.deepcopy(model)
    x, y = images(), original(images()).detach()
    targets = find_targets(original)
    names = sorted(t.name for t in targets)
    table = {t.name: t for t in targets}

    def trial(levels):
        other = copy.deepcopy(original)
        with torch.no_grad():
            for name, level in levels.items():
                w = getattr(other, name).weight
                k = round(GRID[level] * w.numel())
                order = w.abs().flatten().double().argsort(descending=True, stable=True)
                mask = torch.zeros(w.numel(), dtype=torch.bool)
                mask[order[:k]] = True
                w.mul_(mask.reshape(w.shape))
        size = sum(
            csr_bytes(table[n], int((getattr(other, n).weight != 0).sum())) for n in names
        )
        return -float((other(x) - y).detach().norm()), size

    levels = dict.fromkeys(names, 0)
    now, size = trial(levels)
    bound = int(0.3 * size)
    calls = 1
    while size > bound:
        found = []
        for name in names:
            if levels[name] + 1 < len(GRID):
                value, after = trial(levels | {name: levels[name] + 1})
                calls += 1
                found.append(((now - value) / (size - after), value, after, name))
        _, now, size, name = min(found)
        levels[name] += 1
    evaluate = Closeness(model, x)
    pruner = greedy(model, evaluate, bound)
    assert len(evaluate.values) == calls
    got = {t.name: float(pruner.masks()[t.key].double().mean()) for t in pruner.targets}
    assert got == pytest.approx({n: GRID[level] for n, level in levels.items()}, abs=0.003)
    assert len(set(levels.values())) > 1
    assert sum(stored(getattr(model, n)) for n in names) == size <= bound


def test_collins_greedy_stops_at_the_tolerance():
    model = middle()
    evaluate = Closeness(model, images())
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("sparsecnn.prune.search")
    log.addHandler(handler)
    try:
        pruner = greedy(model, evaluate, 2000, tolerance=1e-3)
    finally:
        log.removeHandler(handler)
    # The idle layer costs nothing; the next step of any other costs more than that.
    assert densities(pruner) == [1.0, 0.05, 1.0]
    (line,) = lines
    spent = sum(stored(layer) for layer in (model.first, model.middle, model.last))
    assert f"stopped at {spent} bytes, more than budget_bytes 2000" in line
    assert "tolerance 0.001" in line


def test_collins_greedy_finetunes_a_copy():
    model = middle()
    x = images()
    evaluate = Closeness(model, x)
    before = everything(model)
    seen = []

    def finetune(trial):
        assert trial is model
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in trial.parameters())
        masks = [layer.weight != 0 for layer in layers_of(trial)]
        optimizer = torch.optim.SGD(trial.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            (trial(x) - evaluate.y).square().mean().backward()
            optimizer.step()
        for layer, mask in zip(layers_of(trial), masks, strict=True):
            assert not layer.weight[~mask].any()  # the dropped weights have not moved
        kept = masks[0]
        moved = (trial.first.weight - before[0]["first.weight"]).detach()[kept]
        seen.append(float(moved.norm()))

    untrained = Closeness(model, x)
    greedy(copy.deepcopy(model), untrained, 2500)
    model.first.bias.grad = torch.ones(8)
    pruner = greedy(model, evaluate, 2500, finetune=finetune)
    assert len(seen) == len(evaluate.values)
    assert max(seen) > 0
    assert evaluate.values[-1] > untrained.values[-1]
    assert torch.equal(model.first.bias.grad, torch.ones(8))
    for t in pruner.targets:
        kept = pruner.masks()[t.key]
        assert torch.equal(t.dense[kept], before[0][t.key][kept])
    assert torch.equal(model.scale, before[0]["scale"])


def test_collins_greedy_works_on_groups_of_every_geometry():
    model = mixed()
    targets = find_targets(model)
    full = sum(csr_bytes(t, t.dense.numel()) for t in targets)
    pruner = Pruner(
        model, granularity="kernel", importance=Scores(),
        selector=GreedyLayerSearch(model, Closeness(model, images()), full // 2),
    )  # fmt: skip
    pruner.step()
    spent = sum(csr_bytes(t, int(pruner.masks()[t.key].sum())) for t in pruner.targets)
    assert spent <= full // 2
    assert len(set(densities(pruner))) > 1
    for t in pruner.targets:
        assert pruner.masks()[t.key].any()


def test_collins_greedy_refuses_bad_arguments():
    model = mixed()
    for grid in ((), (0.5, 1.0), (0.5, 0.5)):
        with pytest.raises(ValueError, match="expected grid of falling densities"):
            GreedyLayerSearch(model, float, 10, grid)
    with pytest.raises(ValueError, match=r"expected grid in \[0, 1\], got 50"):
        GreedyLayerSearch(model, float, 10, (50, 10))
    with pytest.raises(ValueError, match="expected budget_bytes >= 0, got -1"):
        GreedyLayerSearch(model, float, -1)
    with pytest.raises(ValueError, match="expected tolerance >= 0, got nan"):
        GreedyLayerSearch(model, float, 1, tolerance=math.nan)
    with pytest.raises(TypeError, match=r"expected finetune\(model\) or None, got 3"):
        GreedyLayerSearch(model, float, 1, finetune=3)
    with pytest.raises(TypeError, match="expected model"):
        GreedyLayerSearch(None, float, 1)
    with pytest.raises(ValueError, match=r"expected budget_bytes >= \d+, .*got 100; add lower"):
        greedy(model, float, 100)
    with pytest.raises(ValueError, match="expected targets of model"):
        Pruner(
            mixed(), importance=Scores(), selector=GreedyLayerSearch(mixed(), float, 10**6)
        ).step()


def test_csr_bytes_of_column_counts():
    for columns, index in ((256, 1), (257, 2), (2**15, 2), (2**15 + 1, 4)):
        (t,) = find_targets(nn.Linear(columns, 3), include_classifier=True)
        assert csr_bytes(t, 10) == 10 * (4 + index) + 4 * 4
    (t,) = find_targets(nn.Linear(8, 3).half())
    assert csr_bytes(t, 10) == 10 * (2 + 1) + 4 * 4


def test_unchanged_restores_gradients_and_modes():
    model = digits_net().train()
    model.bn1.eval()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    gradient = model.conv1.weight.grad
    before = everything(model)
    with pytest.raises(KeyError), unchanged(model):
        model.eval()
        model(images(shape=(2, 1, 8, 8))).sum().backward()
        model.train()(images(shape=(2, 1, 8, 8)))
        model.conv2.requires_grad_(False)
        with torch.no_grad():
            model.fc1.weight.fill_(float("nan"))
        raise KeyError
    assert_same(before, everything(model))
    assert model.conv1.weight.grad is gradient
    assert bool((gradient == 1).all())
    assert model.fc1.weight.grad is None
    assert model.conv2.weight.requires_grad


@pytest.mark.parametrize("build", [RandomMaskSearch, GreedyLayerSearch])
def test_the_first_rank_decides(build, monkeypatch):
    """The other ranks evaluate too, on data of their own, and choose the same masks."""
    model = mixed()
    targets = find_targets(model)
    scores = {t: t.values().abs().flatten() for t in targets}
    element = parse_granularity("element")
    number = 8 if build is RandomMaskSearch else 2000

    def keep(seed):
        source = torch.Generator().manual_seed(seed)
        part = build(model, lambda model: torch.rand((), generator=source), number)
        found = part.select(targets, scores, element, Budget(sparsity=0.5), None, ones(targets))
        return torch.cat([found[t] for t in targets])

    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, rank: sent.append((x, rank)))
    first = keep(0)
    assert sent and all(rank == 0 for _, rank in sent)
    assert not torch.equal(first, keep(1))  # left alone they would differ
    values = iter([x.clone() for x, _ in sent])
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, rank: x.copy_(next(values)))
    assert torch.equal(first, keep(1))
