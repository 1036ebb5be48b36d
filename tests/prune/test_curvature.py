"""The diagonal of the Hessian against loops over the equations of the paper."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.nn import functional

from sparsecnn.prune import Batches, Magnitude, OneShot, Pruner, Random, find_targets, prune
from sparsecnn.prune.saliency import OBD, Fisher
from sparsecnn.prune.targets import candidate_targets

from .nets import digits_net, mixed


def squared_error(outputs, labels):
    return (outputs - labels).square().flatten(1).sum(1).mean()


def hessian(model, x, y, mode, loss_fn=functional.cross_entropy, split=5):
    data = Batches(zip(x.split(split), y.split(split), strict=True), loss_fn)
    targets = candidate_targets(model)
    need = f"hessian:{mode}"
    stats = data.collect(model, targets, frozenset({need}))
    return {t.name: stats.get(need, t) for t in targets}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def same(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["backprop", "levenberg", "exact"])
def test_obd_saliency_of_a_linear_layer(mode):
    model = seeded(lambda: nn.Linear(4, 3))
    x, y = randn(11, 4), randn(11, 3, seed=1)
    expected = np.tile(2 * (x.numpy() ** 2).mean(0), (3, 1))
    same(hessian(model, x, y, mode, squared_error)[""], torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize("mode", ["backprop", "levenberg"])
def test_obd_saliency_recursion_of_a_tanh_network(mode):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()))
    x, y = randn(7, 4), randn(7, 3, seed=1)
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    bends = float(mode == "backprop")
    h1, h2 = np.zeros_like(w1), np.zeros_like(w2)
    for sample, wanted in zip(x.numpy(), y.numpy(), strict=True):
        hidden = np.tanh(w1 @ sample + b1)
        out = np.tanh(w2 @ hidden + b2)
        first, curvature = np.zeros(3), np.zeros(3)
        for i in range(3):  # dE/da_i and d2E/da_i^2 of E = sum (d - x)^2
            slope = 1 - out[i] ** 2
            bend = -2 * out[i] * slope
            first[i] = -2 * (wanted[i] - out[i]) * slope
            curvature[i] = 2 * slope**2 - bends * 2 * (wanted[i] - out[i]) * bend
            for j in range(5):
                h2[i, j] += curvature[i] * hidden[j] ** 2 / 7
        for j in range(5):
            slope = 1 - hidden[j] ** 2
            bend = -2 * hidden[j] * slope
            below = slope**2 * sum(w2[i, j] ** 2 * curvature[i] for i in range(3))
            below += bends * bend * sum(w2[i, j] * first[i] for i in range(3))
            for k in range(4):
                h1[j, k] += below * sample[k] ** 2 / 7
    found = hessian(model, x, y, mode, squared_error)
    same(found["0"], torch.from_numpy(h1))
    same(found["2"], torch.from_numpy(h2))
    if mode == "backprop":  # the last layer has one path only: nothing is neglected
        same(found["2"], hessian(model, x, y, "exact", squared_error)["2"])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_obd_saliency_of_convolutions_sums_over_positions(groups):
    def build():
        conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=groups)
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    model = seeded(build)
    x, y = randn(6, 4, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    conv, head = model[0], model[3].weight.detach()
    expected = torch.zeros_like(conv.weight)
    padded = functional.pad(x, (1, 1, 1, 1))
    with torch.no_grad():
        probability = model(x).softmax(1)
        alive = conv(x) > 0
    for n in range(6):
        start = probability[n] * (1 - probability[n])
        for k in range(4):
            for p in range(2):
                for q in range(2):
                    column = head[:, (k * 2 + p) * 2 + q]
                    curvature = float(alive[n, k, p, q]) * (column**2 * start).sum()
                    channels = 4 // groups
                    first = k * groups // 4 * channels
                    window = padded[
                        n, first : first + channels, 2 * p : 2 * p + 3, 2 * q : 2 * q + 3
                    ]
                    expected[k] += curvature * window**2 / 6
    found = hessian(model, x, y, "backprop", split=4)
    same(found["0"], expected.detach())
    same(found["3"], hessian(model, x, y, "exact", split=2)["3"])


STEPS = {
    "batch norm": lambda: nn.BatchNorm2d(3),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "dropout": nn.Dropout,
    "max pool": lambda: nn.MaxPool2d(2),
    "average pool": lambda: nn.AvgPool2d(2),
    "padded average pool": lambda: nn.AvgPool2d(3, 1, 1),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d((3, 1)),
    "depthwise": lambda: nn.Conv2d(3, 6, 2, groups=3),
}


@pytest.mark.parametrize("name", STEPS)
def test_obd_saliency_recursion_is_exact_along_single_paths(name):
    # One pixel is lit and the weights of the layer above it do not overlap: no cross terms.
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 1, bias=False), STEPS[name](), nn.Tanh(), nn.Flatten()
        )
    )
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(randn(*buffer.shape, seed=3).square() + 0.5)
    x = torch.zeros(5, 2, 4, 4).double()
    x[:, :, 1, 2] = randn(5, 2)
    with torch.no_grad():
        y = model.eval()(x)
    y = y + randn(*y.shape, seed=4)
    backprop = hessian(model, x, y, "backprop", squared_error)
    assert backprop["0"].abs().min() > 0
    same(backprop["0"], hessian(model, x, y, "exact", squared_error)["0"])


def test_obd_saliency_hutchinson():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = randn(8, 3), randn(8, 2, seed=1)

    def diagonal(mode):
        h = hessian(model, x, y, mode, squared_error, split=8)
        return torch.cat([value.flatten() for value in h.values()])

    exact, found, few = diagonal("exact"), diagonal("hutchinson:4000"), diagonal("hutchinson:1")
    assert (found - exact).norm() < 0.05 * exact.norm()
    assert (few - exact).norm() > 0.05 * exact.norm()  # it is the probes that converge
    assert torch.equal(few, diagonal("hutchinson:1"))


def quadratic(h, w):
    """A linear layer at the minimum of 0.5 (v - w)' H (v - w), and its data."""
    rows = torch.linalg.cholesky(h).T * math.sqrt(len(w))
    model = nn.Linear(len(w), 1, bias=False).double()
    model.weight.data = w[None].clone()
    return model, Batches([(rows, (rows @ w)[:, None])], lambda o, y: squared_error(o, y) / 2)


@pytest.mark.parametrize("mode", ["backprop", "levenberg", "exact"])
def test_obd_saliency_is_the_change_of_a_diagonal_quadratic(mode):
    model, data = quadratic(
        torch.diag(torch.tensor([5.0, 10.0, 4.0]).double()),
        torch.tensor([2.5, 2.0, 3.0]).double(),
    )
    (t,) = find_targets(model)
    config = OBD(mode)
    score = config.score(t, data.collect(model, [t], config.needs))
    ((x, y),) = data.batches
    for k in range(3):
        changed = copy.deepcopy(model)
        changed.weight.data[0, k] = 0
        same(score[0, k], data.loss_fn(changed(x), y).detach())


@pytest.mark.parametrize("mode", ["backprop", "exact"])
def test_obd_saliency_decides_against_magnitude(mode):
    h = torch.tensor([[5.0, 1.0, -1.0], [1.0, 10.0, -3.0], [-1.0, -3.0, 4.0]]).double()
    model, data = quadratic(h, torch.tensor([2.5, 2.0, 3.0]).double())

    def deleted(config):
        return (prune(model, config, calibration=data).weight[0] == 0).nonzero().flatten().tolist()

    assert deleted(OBD(mode, count=2)) == [0]
    assert deleted(Magnitude(count=2)) == [1]
    assert {deleted(Random(seed=s, count=2))[0] for s in range(20)} == {0, 1, 2}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(x + self.a(x).relu())


class Standardized(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight - self.weight.mean(), self.bias)


class Twice(Residual):
    def forward(self, x):
        self.a(x)
        return self.b(x)


class Noisy(nn.Linear):
    def forward(self, x):
        return functional.dropout(super().forward(x), training=True)


class Unconnected(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x)
        y.relu()
        return y


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x)
        return self.a(y).relu() if float(y.sum()) > -1e9 else y


REFUSED = {
    "readers": (Residual, "add"),
    "twice": (Twice, "a value with several readers at linear"),
    "glu": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GLU()), "glu"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), "softmax"),
    "weight": (lambda: Standardized(4, 4), "a function of the weight of ''"),
    "output": (Unconnected, "an output that does not come from the last"),
    "value": (Gated, "sum"),
    "batch": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), "an output whose first"),
    "random": (lambda: Noisy(4, 4), "dropout in training mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_backprop_refuses_what_it_does_not_cover(name):
    build, reason = REFUSED[name]
    model = seeded(build)
    message = rf"for mode 'backprop', got {reason}.*; use mode 'fisher'"
    with pytest.raises(ValueError, match=message):
        hessian(model, randn(5, 4), randn(5, 4, seed=1), "backprop", squared_error)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_backprop_covers_networks_written_with_functions():
    model = digits_net().double().eval()
    x, y = randn(6, 1, 8, 8), torch.arange(6)
    found = hessian(model, x, y, "backprop")
    assert all(h.min() >= 0 and h.max() > 0 for h in found.values())
    same(found["fc2"], hessian_of_head(model, x, y))
    assert model.bn1.training is False and model.conv1.weight.grad is None


def hessian_of_head(model, x, y):
    """Exact for the last layer: p(1 - p) x^2."""
    inputs = []
    handle = model.fc2.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        p = model(x).softmax(1)
    handle.remove()
    return torch.einsum("nk,nc->kc", p * (1 - p), inputs[0].square()) / len(x)


@pytest.mark.parametrize("mode", ["backprop", "exact", "hutchinson:3", "fisher"])
def test_masks_do_not_disturb_the_measurement(mode):
    def net():
        return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))

    x, y = randn(9, 4), torch.arange(9) % 3
    plain, masked, foreign = net(), net(), net()
    torch_prune.l1_unstructured(foreign[0], "weight", 0.5)
    mask = foreign[0].weight_mask.bool()
    plain[0].weight.data *= mask
    masked[0].weight.data *= mask
    Pruner(masked, importance=Magnitude(sparsity=0.5), schedule=OneShot(9), keep_zeros=True)
    # Probes through dead weights add to the noise of an estimate: compare masked ones there.
    expected = hessian(masked if mode.startswith("hutchinson") else plain, x, y, mode)
    for model in (masked, foreign):
        found = hessian(model, x, y, mode)
        same(found["0"][mask], expected["0"][mask])
        same(found["2"], expected["2"])
        model(x).sum().backward()
    copied = prune(foreign, Magnitude(sparsity=0.1))  # a deep copy: no dead tensor is left inside
    assert bool((copied[0].weight[~mask] == 0).all())


def test_hessian_refuses():
    model = seeded(lambda: nn.Linear(4, 3))
    x, y = randn(5, 4), torch.arange(5) % 3
    with pytest.raises(ValueError, match=r"hessian: expected mode among .*, got 'newton'"):
        hessian(model, x, y, "newton")
    with pytest.raises(ValueError, match=r"OBD: expected mode among .*, got 'newton'"):
        OBD("newton")
    with pytest.raises(ValueError, match="OBD: expected probes to be an int >= 1, got 0"):
        OBD("hutchinson", probes=0)
    big = nn.Linear(400, 300)
    with pytest.raises(ValueError, match=r"expected at most 100000 weights .* got 120000"):
        hessian(big, torch.randn(2, 400), torch.tensor([0, 1]), "exact")
    batch = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(ValueError, match="running statistics, got '1'"):
        hessian(batch, x, y, "backprop")


def test_a_fisher_pass_survives_control_flow_on_values():
    class Branching(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out * 2 if bool((x[:, 0] > 0).all()) else out

    model = seeded(lambda: Branching(4, 3))
    x, y = randn(9, 4), torch.arange(9) % 3
    expected = torch.zeros(3, 4).double()
    for n in range(9):
        loss = functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        (g,) = torch.autograd.grad(loss, model.weight)
        expected += g**2 / 9
    same(hessian(model, x, y, "fisher")[""], expected)


@pytest.mark.parametrize("config", [OBD("fisher"), Fisher("weight")])
def test_fisher_per_sample_weights(config):
    model = mixed().double()
    x, y = randn(33, 3, 5, 5), torch.arange(33) % 4
    targets = find_targets(model)
    expected = {t: torch.zeros(t.shape).double() for t in targets}
    mean = {t: torch.zeros(t.shape).double() for t in targets}
    for n in range(33):
        loss = functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for t, g in zip(
            targets, torch.autograd.grad(loss, [t.dense for t in targets]), strict=True
        ):
            expected[t] += g**2 / 33
            mean[t] += g / 33
    for size in (1, 32):
        data = Batches(zip(x.split(size), y.split(size), strict=True))
        stats = data.collect(model, targets, config.needs)
        for t in targets:
            same(config.score(t, stats), expected[t] * t.values() ** 2 / 2)
            assert not torch.allclose(expected[t], mean[t] ** 2, rtol=0.1)
