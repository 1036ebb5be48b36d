"""Data-free pruning: exact for duplicates, bounded for near ones."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from torch import nn

from sparsecnn.prune import (
    Budget,
    Iterative,
    Magnitude,
    Pruner,
    Random,
    element,
    find_targets,
    neuron,
)
from sparsecnn.prune.merge import MergeIntoNearest, PairMerge, linear_consumers, merge_path


class MLP(nn.Module):
    def __init__(self, *widths, activation=torch.relu):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation = activation

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def mlp(*widths, seed=0, activation=torch.relu):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(*widths, activation=activation).double().requires_grad_(False)


def duplicate(layer, pairs):
    for original, copy in pairs:
        layer.weight[copy] = layer.weight[original]
        layer.bias[copy] = layer.bias[original]


def inputs(n=1000, d=12, seed=9):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pruned(model, count, compensate=True, selector=None, importance=None, **options):
    consumers = linear_consumers(model)
    pruner = Pruner(
        model,
        granularity=neuron,
        budget=Budget(count=count),
        selector=PairMerge(consumers) if selector is None and importance is None else selector,
        importance=importance,
        compensator=MergeIntoNearest(consumers) if compensate else None,
        targets=[t for t in find_targets(model) if t.name in consumers],
        **options,
    )
    pruner.step()
    return pruner


PAIRS = [(0, 7), (3, 12), (3, 19), (5, 6), (9, 15)]  # 3, 12 and 19 are equal


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, torch.sigmoid])
def test_data_free_merge_duplicates(activation):
    def make():
        model = mlp(12, 20, 6, seed=1, activation=activation)
        duplicate(model.layers[0], PAIRS)
        return model

    x = inputs()
    want = make()(x)
    merged = pruned(make(), 15)
    masks = merged.masks()["layers.0.weight"]
    gone = ~masks.any(1)
    assert int(gone.sum()) == 5
    model = merged.finalize()
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)
    # Nothing is left of the dropped: the smaller network is the same one.
    first, second = model.layers
    assert not first.bias[gone].any() and not second.weight[:, gone].any()
    small = mlp(12, 15, 6, activation=activation)
    small.layers[0].weight.data, small.layers[0].bias.data = first.weight[~gone], first.bias[~gone]
    small.layers[1].weight.data, small.layers[1].bias.data = second.weight[:, ~gone], second.bias
    torch.testing.assert_close(small(x), want, rtol=0, atol=1e-6)
    # Without the surgery, and with neurons chosen by others, it does not work.
    assert (pruned(make(), 15, compensate=False).model(x) - want).abs().max() > 1e-2
    for importance in (Random(seed=0), Magnitude(p=2)):
        assert (pruned(make(), 15, importance=importance).model(x) - want).abs().max() > 1e-2


def test_data_free_merge_sums_in_sequence():
    """Three equal neurons become one that carries all three."""
    model = mlp(5, 4, 3)
    duplicate(model.layers[0], [(1, 2), (1, 3)])
    model.layers[0].weight[0] += 10
    outgoing = model.layers[1].weight.clone()
    path = merge_path(model.layers[0].weight, outgoing, 2)
    assert [s for _, _, s in path] == [0, 0] and len({j for _, j, _ in path}) == 2
    pruner = pruned(model, 2)
    (survivor,) = (pruner.masks()["layers.0.weight"].any(1)[1:].nonzero().flatten() + 1).tolist()
    merged = model.layers[1].weight
    torch.testing.assert_close(merged[:, survivor], outgoing[:, 1:].sum(1), rtol=0, atol=1e-12)
    assert torch.equal(merged[:, 0], outgoing[:, 0])
    assert int(merged.any(0).sum()) == 2


def test_data_free_merge_chain_of_near_neurons():
    """What was merged into a neuron moves on with it when that one is merged too."""
    rows = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 1.05, 0], [0.2, 1, 0]], dtype=torch.float64)
    outgoing = torch.tensor([[4.0, 3.0, 0.1, 0.3]], dtype=torch.float64)
    path = merge_path(rows, outgoing, 2)
    assert [(i, j) for i, j, _ in path] == [(1, 2), (1, 3)]
    outgoing = torch.tensor([[4.0, 0.2, 0.1, 3.0]], dtype=torch.float64)
    path = merge_path(rows, outgoing, 2)
    assert [(i, j) for i, j, _ in path] == [(1, 2), (3, 1)]
    assert abs(path[1].saliency - 0.3**2 * 0.2**2) < 1e-12  # with the sum, not with 0.2


@pytest.mark.parametrize("seed", range(3))
def test_data_free_merge_bound(seed):
    model = mlp(12, 20, 6, seed=seed)
    x = inputs(seed=seed)
    first, second = model.layers
    incoming = torch.cat([first.weight, first.bias[:, None]], dim=1)
    ((i, j, saliency),) = merge_path(incoming, second.weight, 1)
    want, a = model(x), second.weight[:, j].clone()
    bound = a.square().sum() * (incoming[i] - incoming[j]).square().sum()
    assert abs(float(bound) - 6 * saliency) < 1e-9
    pruned(model, 19)
    change = (model(x) - want).square().sum(1)
    assert (change <= bound * (x.square().sum(1) + 1) * (1 + 1e-9)).all()
    assert change.max() > 0


def brute_force(incoming, outgoing, alive):
    best = None
    for i in alive:
        for j in alive:
            if i == j:
                continue
            strength = sum(float(a) ** 2 for a in outgoing[:, j]) / len(outgoing)
            s = strength * sum(float(d) ** 2 for d in incoming[i] - incoming[j])
            if best is None or s < best[2]:
                best = (i, j, s)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_data_free_merge_equals_brute_force(seed):
    source = torch.Generator().manual_seed(seed)
    incoming = torch.randn(11, 4, generator=source, dtype=torch.float64)
    incoming[5] = incoming[2]
    outgoing = torch.randn(3, 11, generator=source, dtype=torch.float64)
    path = merge_path(incoming, outgoing, 10)
    assert len(path) == 10
    alive, a = list(range(11)), outgoing.clone()
    for merge in path:
        i, j, s = brute_force(incoming, a, alive)
        assert (merge.into, merge.dropped) == (i, j) and abs(merge.saliency - s) < 1e-9 * (1 + s)
        a[:, i] += a[:, j]
        alive.remove(j)
    assert len(merge_path(incoming, outgoing, 99)) == 10  # one stays
    # Restricted to what the whole path dropped, the path is the same.
    flags = torch.zeros(11, dtype=torch.bool)
    flags[[m.dropped for m in path[:6]]] = True
    assert merge_path(incoming, outgoing, 99, flags) == path[:6]


def test_data_free_merge_needs_no_data():
    for part in (PairMerge, MergeIntoNearest):
        assert list(inspect.signature(part).parameters) == ["consumers"]
        assert part.needs == frozenset()
    assert set(inspect.signature(merge_path).parameters) == {
        "incoming", "outgoing", "count", "may_drop"
    }  # fmt: skip


def test_the_bias_counts():
    """Equal weights with other biases are other neurons."""
    model = mlp(12, 20, 6, seed=2)
    duplicate(model.layers[0], [(4, 8)])
    model.layers[0].bias[8] += 5
    duplicate(model.layers[0], [(1, 2)])
    mask = pruned(model, 19).masks()["layers.0.weight"].any(1)
    assert not mask[[1, 2]].all() and mask[[4, 8]].all()


def test_layers_one_after_the_other():
    """The second layer is judged by what the merges of the first one made of it."""
    model = mlp(6, 10, 8, 4, seed=5)
    duplicate(model.layers[0], [(0, 1)])
    second = model.layers[1]
    duplicate(second, [(5, 6)])
    # Neurons 5 and 6 are equal only once columns 0 and 1 are added up.
    second.weight[6, 0] += 3
    second.weight[6, 1] -= 3
    x = inputs(d=6)
    want = model(x)
    consumers = linear_consumers(model)
    targets = find_targets(model)
    assert [t.name for t in targets] == ["layers.0", "layers.1"] == list(consumers)
    pruner = Pruner(
        model,
        granularity=neuron,
        budget=Budget(sparsity=0.12),  # 1 of 10 and 1 of 8
        selector=PairMerge(consumers),
        compensator=MergeIntoNearest(consumers),
        targets=targets,
    )
    pruner.step()
    gone = [(~m.any(1)).nonzero().flatten().tolist() for m in pruner.masks().values()]
    assert gone[0] in ([0], [1]) and gone[1] in ([5], [6])
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)


def test_several_events():
    model = mlp(12, 20, 6, seed=1)
    duplicate(model.layers[0], PAIRS)
    x = inputs()
    want = model(x)
    pruner = pruned(model, 15, schedule=Iterative((0.4, 1.0), every=1))
    gone = ~pruner.masks()["layers.0.weight"].any(1)
    assert int(gone.sum()) == 2
    pruner.step()
    later = ~pruner.masks()["layers.0.weight"].any(1)
    assert int(later.sum()) == 5 and bool(later[gone].all())
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)


def test_one_neuron_stays():
    model = mlp(3, 4, 2)
    pruner = pruned(model, 0)
    assert int(pruner.masks()["layers.0.weight"].any(1).sum()) == 1
    assert int(model.layers[1].weight.any(0).sum()) == 1


def test_consumers_are_proven():
    def names(*layers):
        return list(linear_consumers(nn.Sequential(*layers)))

    a, b = nn.Linear(4, 5), nn.Linear(5, 3)
    assert names(a, nn.ReLU(), b) == names(a, nn.Tanh(), nn.Identity(), b) == ["0"]
    assert names(a, b) == ["0"]
    for between in (nn.Dropout(0.1), nn.BatchNorm1d(5), nn.Softmax(1), nn.LayerNorm(5), nn.PReLU()):
        assert names(a, nn.ReLU(), between, b) == []
    assert names(a, nn.ReLU()) == names(nn.Conv2d(1, 2, 3), nn.Flatten(), b) == []
    square = nn.Linear(5, 5)
    assert names(a, nn.ReLU(), square, nn.ReLU(), square, b) == []  # one layer called twice

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(y) + y

    assert linear_consumers(Residual()) == {}

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.fx can trace, got Branching .*by hand"):
        linear_consumers(Branching())


def test_what_is_refused():
    model = mlp(4, 5, 3)
    consumers = linear_consumers(model)
    t = find_targets(model)[0]
    part = PairMerge(consumers)
    half = Budget(sparsity=0.5)
    with pytest.raises(ValueError, match="granularity 'neuron', got element"):
        part.select([t], {}, element, half, None, {})
    with pytest.raises(ValueError, match="expected a budget"):
        part.select([t], {}, neuron, None, None, {})
    for wrong in ({}, {t.name: nn.Linear(4, 3)}, {t.name: nn.ReLU()}):
        with pytest.raises(ValueError, match=r"consumers to hold, for 'layers.0'.*5 outputs, got"):
            PairMerge(wrong).select([t], {}, neuron, half, None, {})
        with pytest.raises(ValueError, match="MergeIntoNearest: expected consumers"):
            MergeIntoNearest(wrong).apply(t, torch.ones(5, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="one flag for each of the 5 neurons"):
        MergeIntoNearest(consumers).apply(t, torch.ones(4, dtype=torch.bool), None)
    for conv in (nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3, groups=2)):
        (other,) = find_targets(conv)
        with pytest.raises(ValueError, match="expected linear layers, got Conv2d"):
            PairMerge({"": nn.Linear(4, 2)}).select([other], {}, neuron, half, None, {})


def test_a_masked_consumer_is_not_silently_wrong():
    model = mlp(4, 5, 3)
    duplicate(model.layers[0], [(0, 1)])
    masked = Pruner(
        model,
        budget=Budget(sparsity=0.5),
        importance=Magnitude(),
        targets=[t for t in find_targets(model, include_classifier=True) if t.name == "layers.1"],
    )
    masked.step()
    consumer = model.layers[1]
    (t,) = [t for t in find_targets(model) if t.name == "layers.0"]
    keep = torch.tensor([True, False, False, False, False])
    before = consumer.weight.clone()
    assert not before.all()
    with pytest.raises(ValueError, match="a mask that swallows merged ones"):
        MergeIntoNearest({"layers.0": consumer}).apply(t, keep, None)
    assert torch.equal(consumer.weight, before)
