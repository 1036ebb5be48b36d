from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sparsecnn.prune import OneShot, Pruner, Random, Threshold, find_targets
from sparsecnn.prune.gates import (
    Gates,
    HardConcreteGate,
    L0Penalty,
    add_gates_,
    fold_gates_,
    gate_of,
)
from sparsecnn.prune.importance import PruneConfig

from .nets import digits_net, mixed

LIMIT = math.log(11)  # sigmoid(a) * 1.2 - 0.1 leaves (0, 1) at a = -log 11 and log 11


def gate_with(values, **options):
    gate = HardConcreteGate(len(values), **options)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor(values))
    return gate


def spread_gates(gates, seed=0):
    """Give every gate closed, half-open and open groups."""
    source = torch.Generator().manual_seed(seed)
    for gate in gates.values():
        with torch.no_grad():
            gate.log_alpha.copy_(torch.empty(gate.n).uniform_(-4, 4, generator=source))
            gate.log_alpha[0], gate.log_alpha[1] = -4.0, 0.3


def run_in_statistics(model, shape):
    """Batch norms that do something: random statistics, weights and biases."""
    source = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for values in (module.running_mean, module.bias):
                    values.copy_(torch.randn(values.shape, generator=source))
                for values in (module.running_var, module.weight):
                    values.copy_(torch.rand(values.shape, generator=source) + 0.5)
    return torch.randn(5, *shape, generator=source)


def test_l0_gates_open_as_often_as_the_closed_form_says():
    values = [-3.0, -1.0, 0.0, 0.7, 2.0]
    gate = gate_with(values, generator=torch.Generator().manual_seed(0))
    draws = 10**5
    z = gate.sample(draws).detach()
    p = gate.open_probability().detach()
    error = (p * (1 - p) / draws).sqrt()
    assert (((z > 0).float().mean(0) - p).abs() < 4 * error).all()
    expected = torch.sigmoid(torch.tensor(values) + 1.5986)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-4)
    # Some are bitwise 0 and bitwise 1 in training, the rest lies between: no plain sigmoid.
    for column in z.T:
        assert (column == 0).any() and (column == 1).any()
        assert ((column > 0) & (column < 1)).any()
        assert column.min() == 0 and column.max() == 1


@pytest.mark.parametrize("on", ["output", "input"])
def test_l0_gates_penalty_and_its_gradient(on):
    lam = 0.3
    model = mixed().double()
    targets = find_targets(model)
    gates = add_gates_(model, targets, torch.zeros(1, 3, 5, 5).double(), on=on)
    spread_gates(gates)
    loss = L0Penalty(lam).penalty(targets)
    loss.backward()
    total = 0.0
    for t in targets:
        gate = gates[t.name]
        p = torch.sigmoid(gate.log_alpha.detach() - 2 / 3 * math.log(0.1 / 1.1))
        # Entries of W behind one gate; an input map of a grouped convolution feeds K/G filters.
        size = t.dense.numel() // gate.n
        groups = getattr(t.module, "groups", 1)
        assert gate.n == (t.shape[0] if on == "output" else t.shape[1] * groups)
        torch.testing.assert_close(gate.log_alpha.grad, lam * size * p * (1 - p))
        total += lam * size * p.sum().item()
    assert loss.item() == pytest.approx(total)

    decayed = L0Penalty(lam, decay=0.2).penalty(targets) - loss
    expected = 0.0
    for t in targets:
        w = t.values()
        groups = getattr(t.module, "groups", 1)
        if on == "input":  # a row of this matrix is what one input map is read by
            w = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
        w = w.reshape(gates[t.name].n, -1)
        expected += 0.1 * (gates[t.name].open_probability() * w.square().sum(1)).sum().item()
    assert decayed.item() == pytest.approx(expected)


def test_l0_gates_in_evaluation_do_not_depend_on_beta():
    eps = 1e-3
    values = [-4.0, -LIMIT - eps, -LIMIT + eps, 0.0, LIMIT - eps, LIMIT + eps, 4.0]
    for beta in (0.3, 2 / 3, 1.0):
        z = gate_with(values, beta=beta).eval().test_gate()
        assert z[:2].tolist() == [0.0, 0.0]
        assert z[-2:].tolist() == [1.0, 1.0]
        assert ((z[2:5] > 0) & (z[2:5] < 1)).all()
        assert z[3].item() == pytest.approx(0.5)
    gate = gate_with(values).eval()
    x = torch.randn(3, 7, 2, 2)
    assert torch.equal(gate(x), gate(x))
    assert torch.equal(gate(x), x * gate.test_gate().view(1, 7, 1, 1))


def test_l0_gates_draw_per_pass_or_per_sample():
    x = torch.ones(64, 5, 3, 3)
    for per_sample in (False, True):
        source = torch.Generator().manual_seed(0)
        gate = HardConcreteGate(5, per_sample=per_sample, generator=source)
        y = gate(x)
        assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
        assert bool((y == y[:1]).all()) != per_sample
        assert not torch.equal(gate(x), y)
        again = HardConcreteGate(
            5, per_sample=per_sample, generator=torch.Generator().manual_seed(0)
        )
        assert torch.equal(again(x), y)
    tokens = HardConcreteGate(5, dim=-1).eval()
    assert tokens(torch.ones(2, 3, 5)).shape == (2, 3, 5)
    p = torch.sigmoid(HardConcreteGate(4000, droprate=0.2).log_alpha)
    assert abs(p.mean().item() - 0.8) < 1e-2


def test_l0_gates_clamp_log_alpha_after_the_step():
    model = mixed()
    targets = find_targets(model)
    gates = add_gates_(model, targets, torch.zeros(1, 3, 5, 5))
    with torch.no_grad():
        for gate in gates.values():
            gate.log_alpha[0], gate.log_alpha[1] = -9.0, 9.0
    inside = {name: gate.log_alpha.detach()[2:].clone() for name, gate in gates.items()}
    L0Penalty(0.1).prox_(targets, 0.1, 0)
    for name, gate in gates.items():
        assert gate.log_alpha[:2].tolist() == pytest.approx([math.log(1e-2), math.log(1e2)])
        assert torch.equal(gate.log_alpha[2:], inside[name])


def test_l0_gates_act_behind_the_batch_norm():
    model = digits_net()
    x = run_in_statistics(model, (1, 8, 8))
    targets = find_targets(model)
    gates = add_gates_(model, targets, x, generator=torch.Generator().manual_seed(0))
    assert [n for n, _ in model.named_modules() if n.endswith("gate")] == [
        "conv1.output_gate", "conv2.output_gate", "conv3.output_gate", "fc1.output_gate",
    ]  # fmt: skip
    spread_gates(gates)
    seen = {}
    model.bn1.register_forward_hook(lambda _m, _a, out: seen.update(bn1=out))
    model.conv1.register_forward_hook(lambda _m, _a, out: seen.update(conv1=out))
    for training in (True, False):
        model.train(training)
        model(x)
        # A closed map is 0 behind the norm, where a gate in front would leave the norm's bias.
        closed = seen["bn1"].detach().abs().amax((0, 2, 3)) == 0
        assert closed[0]
        if not training:
            assert torch.equal(closed, gates["conv1"].test_gate() == 0)
        assert (seen["conv1"].detach().abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("on", ["output", "input"])
@pytest.mark.parametrize("net", ["digits", "mixed"])
def test_l0_gates_folded_net_equals_the_eval_net(net, on):
    model = digits_net() if net == "digits" else mixed()
    x = run_in_statistics(model, (1, 8, 8) if net == "digits" else (3, 6, 6))
    names = list(model.state_dict())
    ignore = ["conv1"] if net == "digits" and on == "input" else []  # it has one input map
    targets = find_targets(model, ignore=ignore)
    plain = model.eval()(x).detach()
    gates = add_gates_(model, targets, x, on=on)
    spread_gates(gates)
    with torch.no_grad():
        expected = model(x)
    assert not torch.allclose(expected, plain, atol=1e-3)
    for gated in (copy.deepcopy(model), model):
        pruner = Pruner(
            gated, granularity="filter" if on == "output" else "channel",
            importance=Gates(), selector=Threshold(0), targets=find_targets(gated, ignore=ignore),
        )  # fmt: skip
        pruner.step()
        closed = {
            t.key: pruner.granularity.expand(gate_of(t, on).test_gate() == 0, t)
            for t in pruner.targets
        }
        assert all(flags.any() and not flags.all() for flags in closed.values())
        assert {k: (~m).tolist() for k, m in pruner.masks().items()} == {
            k: flags.tolist() for k, flags in closed.items()
        }
        with torch.no_grad():  # masks of closed gates change nothing
            torch.testing.assert_close(gated(x), expected, rtol=0, atol=1e-6)
        folded = fold_gates_(pruner.finalize())
        assert list(folded.state_dict()) == names
        assert not any(isinstance(m, HardConcreteGate) for m in folded.modules())
        with torch.no_grad():
            torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-6)
        weights = dict(folded.named_parameters())
        assert all(not weights[k][flags].any() for k, flags in closed.items())
    with pytest.raises(ValueError, match="expected a model with gates, got none"):
        fold_gates_(model)


def test_l0_gates_survive_state_dict_and_deepcopy():
    model = digits_net()
    x = run_in_statistics(model, (1, 8, 8))
    gates = add_gates_(model, find_targets(model), x)
    spread_gates(gates)
    other = digits_net(1)
    add_gates_(other, find_targets(other), x)
    other.load_state_dict(model.state_dict())
    clone = copy.deepcopy(model)
    expected = model.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(clone.eval()(x), expected)
    with torch.no_grad():  # the copy has gates of its own
        clone.conv1.output_gate.log_alpha.fill_(-4)
    assert torch.equal(model(x), expected)
    assert not torch.equal(clone(x), expected)


def noisy_inputs(importance):
    """Train one gated layer whose inputs 2, 5, 11 and 12 carry noise only; its pruned columns."""
    source = torch.Generator().manual_seed(0)
    noise = [2, 5, 11, 12]
    x = torch.randn(512, 16, generator=source)
    wanted = torch.randn(4, 16, generator=source)
    wanted += wanted.sign() * 0.5
    wanted[:, noise] = 0
    y = x @ wanted.T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(16, 4)
    targets = find_targets(model)
    add_gates_(model, targets, on="input", generator=source)
    pruner = Pruner(
        model, targets=targets, granularity="channel", importance=importance,
        selector=Threshold(0 if isinstance(importance, Gates) else 0.25),
        schedule=OneShot(at=10**6), regularizers=[L0Penalty(0.05)],
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    pruner.attach(optimizer)
    for _ in range(500):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum(1).mean() / 2
        (loss + pruner.penalty()).backward()
        optimizer.step()
    model.eval()
    pruner.step(force=True)
    open_gates = model.input_gate.test_gate() > 0
    before = model(x)
    folded = fold_gates_(pruner.finalize())
    if isinstance(importance, Gates):
        torch.testing.assert_close(folded(x), before, rtol=0, atol=1e-5)
    dead = (folded.weight == 0).all(0)
    return noise, open_gates, dead.nonzero().flatten().tolist()


def test_l0_gates_close_exactly_on_noise_inputs():
    noise, open_gates, dead = noisy_inputs(Gates())
    assert (~open_gates).nonzero().flatten().tolist() == noise
    assert int(open_gates.sum()) == 12
    assert dead == noise


def test_l0_gates_random_scores_drop_other_inputs():
    noise, _, dead = noisy_inputs(Random(seed=0))
    assert dead != noise


class Norms(nn.Module):
    """A layer whose batch norm is followed by an activation inside, or has no weight."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x))


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).sigmoid()


def test_errors_leave_the_model_as_it_is():
    x = torch.zeros(2, 3, 4, 4)
    for norm in (nn.BatchNorm2d(4, affine=False), Activated(4)):
        model = Norms(norm)
        with pytest.raises(ValueError, match="expected a plain batch norm with weight and bias be"):
            add_gates_(model, find_targets(model), x)
        assert not any(isinstance(m, HardConcreteGate) for m in model.modules())
        assert not norm._forward_hooks and not model.conv._forward_hooks
    model = mixed()
    targets = find_targets(model)
    with pytest.raises(ValueError, match="L0Penalty: expected targets with gates, got none"):
        L0Penalty(0.1).penalty(targets)
    with pytest.raises(ValueError, match="add_gates_: expected at least one target, got none"):
        add_gates_(model, [], x)
    with pytest.raises(ValueError, match="add_gates_: expected example_inputs for gates on outp"):
        add_gates_(model, targets)
    with pytest.raises(ValueError, match="add_gates_: expected on to be one of output, input"):
        add_gates_(model, targets, x, on="weight")
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="add_gates_: expected unshared weights, got 0, 1"):
        add_gates_(shared, find_targets(shared), x)
    norm = nn.BatchNorm2d(3)
    one_norm = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)
    with pytest.raises(ValueError, match="add_gates_: expected one layer per batch norm, got"):
        add_gates_(one_norm, find_targets(one_norm), x)
    add_gates_(model, targets, x)
    with pytest.raises(ValueError, match="expected layer 'plain' without output_gate, got one"):
        add_gates_(model, targets, x)
    with pytest.raises(ValueError, match="Gates: expected gates per channel on layer 'plain'"):
        Pruner(model, granularity="channel", importance=Gates(), selector=Threshold(0)).step()
    with pytest.raises(ValueError, match="fold_gates_: expected layer 'plain' with a plain weight"):
        fold_gates_(model)
    assert gate_of(targets[0]) is not None and gate_of(targets[0], "input") is None


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: HardConcreteGate(0), ValueError, "expected n to be an int >= 1, got 0"),
        (lambda: HardConcreteGate(3, droprate=1.0), ValueError, r"droprate in \(0, 1\), got 1"),
        (lambda: HardConcreteGate(3, droprate=0.0), ValueError, "expected droprate > 0"),
        (lambda: HardConcreteGate(3, beta=0.0), ValueError, "expected beta > 0 and finite"),
        (lambda: HardConcreteGate(3, gamma=0.1), ValueError, "expected gamma < 0 and zeta > 1"),
        (lambda: L0Penalty(-1.0), ValueError, "L0Penalty: expected lam >= 0 and finite, got -1"),
        (lambda: L0Penalty(1.0, "no"), TypeError, "L0Penalty: expected decay to be a number"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_gates_are_a_config():
    assert PruneConfig.from_dict(Gates(granularity="filter").to_dict()) == Gates(
        granularity="filter"
    )
