"""Importances that look at data, against plain loops over samples."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsecnn.prune import (
    Batches,
    OneShot,
    PruneConfig,
    Pruner,
    Random,
    Threshold,
    find_targets,
    prune,
)
from sparsecnn.prune.granularity import channel, element, filter_, kernel
from sparsecnn.prune.saliency import OBD, SNIP, APoZ, Fisher, Movement, Taylor, Wanda

from .nets import mixed


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.fixture
def case():
    """`Mixed` in double precision with 33 samples: convolutions of every kind and linear layers."""
    return mixed().double(), randn(33, 3, 5, 5), torch.arange(33) % 4


def batches(x, y, size, **options):
    return Batches(zip(x.split(size), y.split(size), strict=True), **options)


def scores(config, model, x, y, size=32):
    targets = find_targets(model)
    stats = batches(x, y, size).collect(model, targets, config.needs)
    return {t.name: config.score(t, stats) for t in targets}


def gate_gradients(model, x, y):
    """dL_n / d(gate of map k) at 1 for every sample alone, by layer: (N, K); positions too."""
    found, positions = {}, {}
    for t in find_targets(model):
        rows = []
        for n in range(len(x)):
            gate = torch.ones(t.shape[0], dtype=torch.double, requires_grad=True)

            def gated(_module, _inputs, out, gate=gate, t=t):
                positions[t.name] = out.numel() // t.shape[0]
                return out * gate.reshape(-1, *[1] * (out.dim() - 2))

            handle = t.module.register_forward_hook(gated)
            loss = functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            handle.remove()
            rows.append(torch.autograd.grad(loss, gate)[0])
        found[t.name] = torch.stack(rows)
    return found, positions


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_fisher_per_sample(case):
    model, x, y = case
    gates, _ = gate_gradients(model, x, y)
    one, many = scores(Fisher(), model, x, y, 1), scores(Fisher(), model, x, y, 32)
    for name, d in gates.items():
        expected = d.square().mean(0) / 2
        same(one[name], expected)
        same(many[name], expected)
        assert not torch.allclose(d.mean(0).square() / 2, expected, rtol=0.1)


def test_fisher_per_sample_of_a_map_nobody_reads_is_zero(case):
    model, x, y = case
    model.pointwise.weight.data[:, 5] = 0
    found = scores(Fisher(), model, x, y)["depthwise"]
    assert found[5] == 0.0
    assert int((found > 0).sum()) >= 3  # ReLU has silenced some of the others for all samples


def test_fisher_per_sample_survives_activations_in_place():
    def net(inplace):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Conv2d(3, 4, 3), nn.SiLU(inplace), nn.Flatten(), nn.Linear(36, 4)]
            return nn.Sequential(*layers).double()

    x, y = randn(6, 3, 5, 5), torch.arange(6) % 4
    same(scores(Fisher(), net(True), x, y)["0"], scores(Fisher(), net(False), x, y)["0"])
    frozen = net(True).requires_grad_(False)
    same(scores(Fisher(), frozen, x, y)["0"], scores(Fisher(), net(False), x, y)["0"])
    same(scores(Fisher("weight"), frozen, x, y)["0"], scores(OBD("fisher"), net(0), x, y)["0"])


def test_fisher_charges_for_macs(case):
    model, x, y = case
    free, charged = scores(Fisher(), model, x, y), scores(Fisher(cost_weight=0.5), model, x, y)
    macs = {"plain": 25 * 27, "grouped": 25 * 12, "depthwise": 25 * 9, "hidden": 8}
    for name, cost in macs.items():
        same(free[name] - charged[name], torch.full_like(free[name], 0.5 * cost))
    weight = scores(Fisher("weight", cost_weight=2.0), model, x, y)["plain"]
    same(weight, scores(Fisher("weight"), model, x, y)["plain"] - 2.0 * 25)
    with pytest.raises(ValueError, match=r"cost_weight in \[0, inf\), got -1"):
        Fisher(cost_weight=-1)


def test_taylor_of_maps(case):
    model, x, y = case
    gates, positions = gate_gradients(model, x, y)
    for size in (1, 32):
        for name, found in scores(Taylor("map"), model, x, y, size).items():
            same(found, gates[name].abs().mean(0) / positions[name])


def mean_gradients(model, x, y):
    targets = find_targets(model)
    total = {t.name: torch.zeros(t.shape).double() for t in targets}
    for n in range(len(x)):
        loss = functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for t in targets:
            total[t.name] += torch.autograd.grad(loss, t.dense, retain_graph=True)[0] / len(x)
    return total


def test_taylor_and_snip_of_weights(case):
    model, x, y = case
    gradients = mean_gradients(model, x, y)
    taylor, snip = scores(Taylor(), model, x, y), scores(SNIP(), model, x, y)
    targets = find_targets(model)
    stats = batches(x, y, 7).collect(model, targets, SNIP().needs)
    for t in targets:
        change = gradients[t.name] * t.values()
        same(taylor[t.name], change**2)
        same(snip[t.name], change.abs())
        same(Taylor().group_score(t, element, stats), (change**2).flatten())
        groups = Taylor().group_score(t, filter_, stats)
        same(groups, torch.stack([w.sum() ** 2 for w in change]))
        if change.dim() == 4:
            kernels = torch.stack([w.sum() ** 2 for row in change for w in row])
            same(Taylor().group_score(t, kernel, stats), kernels)
    grouped = next(t for t in targets if t.name == "grouped")
    change = gradients["grouped"] * grouped.values()
    halves = [change[half : half + 6, c].sum() ** 2 for half in (0, 6) for c in range(4)]
    same(Taylor().group_score(grouped, channel, stats), torch.stack(halves))


def test_wanda_norms(case):
    model, x, y = case
    inputs = {}
    handles = [
        t.module.register_forward_pre_hook(lambda m, a: inputs.update({m: a[0].detach()}))
        for t in find_targets(model)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    for size in (4, 32):
        for name, found in scores(Wanda(), model, x, y, size).items():
            layer = getattr(model, name)
            w, seen = layer.weight.detach(), inputs[layer]
            expected = torch.empty_like(w)
            for k in range(len(w)):
                for c in range(w.shape[1]):
                    if isinstance(layer, nn.Linear):
                        expected[k, c] = w[k, c].abs() * seen[:, c].square().mean().sqrt()
                        continue
                    first = k // (len(w) // layer.groups) * w.shape[1]
                    columns = functional.unfold(
                        seen[:, first + c, None], layer.kernel_size, padding=layer.padding
                    )
                    norm = (columns.square().sum((0, 2)) / len(x)).sqrt()
                    expected[k, c] = w[k, c].abs() * norm.reshape(w.shape[2:])
            same(found, expected)


def test_wanda_decides_against_magnitude():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 2.0, 1.0]])
    x = torch.tensor([[0.1, 1.0, 9.0], [-0.1, 1.0, -9.0]])  # scores 0.3, 2, 9
    data = Batches([(x, torch.zeros(2, dtype=torch.long))])
    dead = prune(layer, Wanda(count=2), calibration=data).weight[0] == 0
    assert dead.tolist() == [True, False, False]
    drawn = {
        tuple((prune(layer, Random(seed=s, count=2)).weight[0] == 0).tolist()) for s in range(20)
    }
    assert len(drawn) == 3


@pytest.mark.parametrize("mode", ["hard", "ste"])
def test_movement_adds_up_over_steps(mode):
    model = mixed().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    importance = Movement(sparsity=0.5)
    pruner = Pruner(model, importance=importance, schedule=OneShot(5), mask_mode=mode)
    pruner.attach(optimizer)
    expected = {t.name: torch.zeros(t.shape).double() for t in pruner.targets}
    x, y = randn(8, 3, 5, 5), torch.arange(8) % 4
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for t in pruner.targets:
            expected[t.name] -= 0.1 / (step + 1) * t.dense.grad * t.values()
        optimizer.step()
    for t in pruner.targets:
        same(importance.score(t, pruner.running.over(None)), expected[t.name])
    pruner.step()
    for t in pruner.targets:
        kept = pruner.masks()[t.key]
        assert expected[t.name][kept].min() >= expected[t.name][~kept].max()
        assert expected[t.name][kept].max() > expected[t.name][~kept].min()


def identity_net(*rest):
    conv = nn.Conv2d(3, 3, 1, bias=False).double()
    conv.weight.data = torch.eye(3, dtype=torch.double).reshape(3, 3, 1, 1)
    return nn.Sequential(conv, *rest).double()


class Functional(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.conv, self.relu = identity_net()[0], relu

    def forward(self, x):
        return functional.max_pool2d(self.relu(self.conv(x)), 2)


RELUS = {
    "module": lambda: identity_net(nn.ReLU(), nn.MaxPool2d(2)),
    "in place": lambda: identity_net(nn.Dropout(), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "function": lambda: Functional(functional.relu),
    "method": lambda: Functional(lambda x: x.relu()),
    "method in place": lambda: Functional(lambda x: x.relu_()),
    "relu6": lambda: identity_net(nn.ReLU6(), nn.MaxPool2d(2)),
    "batch norm": lambda: identity_net(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("name", RELUS)
def test_apoz_exact(name):
    model = RELUS[name]()
    x = torch.ones(8, 3, 2, 2).double()
    x[:6, 0, 0, 0] = -1  # 1 of 4 zeros in 6 samples, none in 2: 6/32
    x[6:, 1] = -2  # none in 6 samples, all in 2: 8/32
    x[:, 2, :, 1] = 0  # half of the positions, which max pooling would hide: 16/32
    data = Batches([(x[:6], torch.zeros(6)), (x[6:], torch.zeros(2))])
    (t,) = find_targets(model)
    found = APoZ().score(t, data.collect(model, [t], APoZ().needs))
    shares = [Fraction(score).limit_denominator(64) for score in found.tolist()]
    assert shares == [Fraction(-6, 32), Fraction(-8, 32), Fraction(-16, 32)]
    assert found.tolist() == [-6 / 32, -8 / 32, -16 / 32]  # not (1/4 + 0) / 2 and so on
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_apoz_exact_removes_a_dead_map():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(),
            nn.Linear(5, 3),
        ).double()  # fmt: skip
    model[0].bias.data[4] = -100
    model[3].bias.data[1] = -100
    x = randn(9, 2, 4, 4)
    data = Batches([(x, torch.zeros(9, dtype=torch.long))])
    before = model(x)

    def without_one_map(conv, linear):
        found = prune(model, {"0": conv, "3": linear}, calibration=data)
        gone = [(layer.weight.flatten(1) == 0).all(1).tolist() for layer in (found[0], found[3])]
        return gone, bool(torch.allclose(found(x), before, rtol=0, atol=1e-6))

    dead = [[k == 4 for k in range(6)], [k == 1 for k in range(5)]]
    assert without_one_map(APoZ(count=5), APoZ(count=4)) == (dead, True)
    drawn = [
        without_one_map(
            Random(seed=s, count=5, granularity="filter"),
            Random(seed=s, count=4, granularity="filter"),
        )
        for s in range(5)
    ]
    assert not all(unchanged for _, unchanged in drawn)
    # The rule of the paper: one standard deviation more zeros than the layer's mean.
    pruner = Pruner(
        model, importance=APoZ(), selector=Threshold(1.0, of="scores"), calibration=data
    )
    pruner.step(force=True)
    masks = pruner.masks()
    assert not masks["0.weight"][4].any() and not masks["3.weight"][1].any()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return (x + self.conv(x)).relu()


NO_RELU = {
    "add": (Residual, "add"),
    "pool": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2), nn.ReLU()), "max_pool2d"),
    "gelu": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU()), "gelu"),
    "clipped": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Hardtanh()), "hardtanh"),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()), "conv2d"),
    "last": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "the output of the network"),
}


@pytest.mark.parametrize("name", NO_RELU)
def test_apoz_refuses_layers_without_a_relu(name):
    build, got = NO_RELU[name]
    model = build()
    data = Batches([(torch.randn(2, 3, 4, 4), torch.zeros(2))])
    with pytest.raises(ValueError, match=rf"APoZ: expected a ReLU .* got {got}; give this layer"):
        prune(model, APoZ(sparsity=0.4), calibration=data)
    assert all(not m._forward_hooks for m in model.modules())


def test_apoz_refuses_layers_out_of_reach():
    model = identity_net(nn.ReLU())
    model[1].register_module("spare", nn.Linear(3, 3))
    data = Batches([(torch.randn(2, 3, 4, 4).double(), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"'1\.spare', got a layer that these inputs do not"):
        data.collect(model, find_targets(model, include_classifier=True), frozenset({"apoz"}))


def test_map_gradients_refuse_coupled_and_merged_samples(case):
    model, x, y = case
    model.hidden = nn.Sequential(model.hidden, nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(ValueError, match=r"running statistics, got 'hidden.1'"):
        scores(Fisher(), model.double(), x, y)

    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.reshape(-1, 4)).reshape(len(x), -1)

    with pytest.raises(ValueError, match=r"'inner' to count the 3 samples, got \(6, 4\)"):
        scores(Fisher(), Merged().double(), randn(3, 2, 4), torch.arange(3))


@pytest.mark.parametrize("kind", [Fisher, APoZ, lambda **o: Taylor("map", **o)])
def test_scores_of_maps_need_filters(kind):
    assert kind(sparsity=0.5).granularity == filter_
    with pytest.raises(ValueError, match=r"expected granularity 'filter' .*, got element"):
        kind(sparsity=0.5, granularity="element")


@pytest.mark.parametrize("kind", [Fisher, Taylor])
def test_levels(kind):
    assert kind("weight", granularity="kernel").granularity == kernel
    with pytest.raises(ValueError, match=r"expected level 'map' or 'weight', got 'filter'"):
        kind("filter")


@pytest.mark.parametrize(
    "config",
    [
        OBD("hutchinson", probes=7, density=0.5),
        Fisher("weight", cost_weight=0.5, count=3),
        Taylor("map", sparsity=0.5),
        SNIP(scope="global"),
        Movement(sparsity=0.1),
        Wanda(granularity="2:4"),
        APoZ(sparsity=0.5),
    ],
)
def test_config_round_trip_and_missing_statistics(config):
    assert PruneConfig.from_dict(config.to_dict()) == config
    (t,) = find_targets(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match=r"score: expected statistics with .*, got None"):
        config.score(t, None)
