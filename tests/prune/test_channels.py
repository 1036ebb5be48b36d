from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.measure import count_macs
from sparsecnn.prune import Batches, Magnitude, Random
from sparsecnn.prune.channels import prune_channels, prune_channels_
from sparsecnn.prune.saliency import Fisher, Taylor


class Net(nn.Module):
    """One topology behind a first convolution; `form` says which."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        if form == "plain":
            self.b = nn.Conv2d(8, 6, 3, padding=1)
        elif form == "grouped":
            self.b = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        elif form == "depthwise":
            self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.b = nn.Conv2d(8, 6, 1)
        elif form == "residual":
            self.p = nn.Conv2d(3, 8, 1)
            self.b = nn.Conv2d(8, 6, 3)
        elif form == "concat":
            self.p = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(12, 6, 3)
        self.fc = nn.Linear(8 * 16 if form == "flatten" else 6, 5)

    def forward(self, x):
        y = self.bn(self.a(x)).relu()
        if self.form == "flatten":
            return self.fc(nn.functional.max_pool2d(y, 2).flatten(1))
        if self.form == "depthwise":
            y = self.dw(y).relu()
        if self.form == "residual":
            y = y + self.p(x)
        if self.form == "concat":
            y = torch.cat([self.p(x), y], 1)
        return self.fc(self.b(y).relu().mean((2, 3)))


def net(form):
    torch.manual_seed(1)
    model = Net(form)
    for entry in (model.bn.weight, model.bn.bias, model.bn.running_mean):
        nn.init.normal_(entry)
    return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FORMS = ("plain", "flatten", "residual", "concat", "depthwise", "grouped")


def l1(module):
    return module.weight.detach().double().abs().flatten(1).numpy().mean(1)


def expected_kept(model, form):
    """The half of the filters of `a` that stays, by numpy."""
    score = l1(model.a)
    if form == "residual":
        score = (score + l1(model.p)) / 2
    if form == "depthwise":
        score = (score + l1(model.dw)) / 2
    if form == "grouped":
        return sorted([*np.argsort(score[:4])[2:], *(4 + np.argsort(score[4:])[2:])])
    return sorted(np.argsort(score)[4:])


def config(form, kind=Magnitude):
    return {"a": (c := kind(sparsity=0.5)), **({"p": c} if form == "residual" else {}),
            **({"dw": c} if form == "depthwise" else {})}  # fmt: skip


def consumer_masked(model, form, kept):
    """`model` with the other maps multiplied by 0 right before the consumer."""
    gone = [i for i in range(8) if i not in kept]
    maps = torch.ones(1, 8, 1, 1)
    maps[:, gone] = 0

    def mask(_module, args):
        if form == "flatten":
            return (args[0] * maps.expand(1, 8, 4, 4).flatten(1),)
        if form == "concat":
            return (args[0] * torch.cat([torch.ones(1, 4, 1, 1), maps], 1),)
        return (args[0] * maps,)

    masked = copy.deepcopy(model)
    (masked.fc if form == "flatten" else masked.b).register_forward_pre_hook(mask)
    return masked


@pytest.mark.parametrize("form", FORMS)
def test_filter_pruning_surgery(form):
    model = net(form)
    kept = expected_kept(model, form)
    small, report = prune_channels(model, X, config(form))
    assert report.layers["a"] == (8, 4)
    assert torch.equal(small.a.weight, model.a.weight[kept])
    assert torch.equal(small.bn.running_mean, model.bn.running_mean[kept])
    with torch.no_grad():
        torch.testing.assert_close(
            small(X), consumer_masked(model, form, kept)(X), rtol=0, atol=1e-5
        )
    random, _ = prune_channels(model, X, config(form, Random))
    assert not torch.equal(random.a.weight, small.a.weight)
    optimizer = torch.optim.SGD(small.parameters(), 0.1, momentum=0.9)
    before = small.a.weight.detach().clone()
    small.train()(X).sum().backward()
    optimizer.step()
    assert not torch.equal(before, small.a.weight)


def test_filter_pruning_surgery_counts():
    model = net("plain")
    small, _ = prune_channels(model, X, config("plain"))
    old, new = count_macs(model, X), count_macs(small, X)
    # 4 filters of a with bias, 8 entries of batch norm, 4 columns of every filter of b.
    assert old.params - new.params == 4 * (27 + 1) + 8 + 6 * 4 * 9
    assert old.dense_macs - new.dense_macs == 2 * 64 * (4 * 27 + 6 * 4 * 9)


def test_filter_pruning_surgery_greedy_differs():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1))
        # In full filter 0 has the larger norm, but only through map 0, which goes.
        model[1].weight.copy_(torch.tensor([[9.0, 1.0], [1.0, 2.0]]).reshape(2, 2, 1, 1))
    x = torch.ones(1, 1, 2, 2)
    chosen = {"0": (c := Magnitude(sparsity=0.5)), "1": c}
    full, _ = prune_channels(model, x, chosen)
    greedy, _ = prune_channels(model, x, chosen, greedy=True)
    assert full[1].weight.flatten().tolist() == [1.0]
    assert greedy[1].weight.flatten().tolist() == [2.0]


def test_ties_floor_round_to_and_global():
    model = nn.Sequential(nn.Conv2d(1, 20, 1), nn.Conv2d(20, 12, 1), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        for module in model:
            module.weight.fill_(1.0)
        model[0].bias.copy_(torch.arange(20.0))
        model[1].weight.fill_(1e-3)
    x = torch.ones(1, 1, 2, 2)
    chosen = {"0": (c := Magnitude(sparsity=0.3)), "1": c}
    small, _ = prune_channels(model, x, chosen)
    assert small[0].bias.tolist() == list(range(14)) and small[1].out_channels == 8
    lanes, _ = prune_channels(model, x, chosen, round_to=8)
    assert (lanes[0].out_channels, lanes[1].out_channels) == (16, 8)
    wide = nn.Sequential(nn.Conv2d(1, 64, 1), nn.Conv2d(64, 2, 1))
    by_itself, _ = prune_channels(wide, x, {"0": c})
    assert by_itself[0].out_channels == 48  # of 45: whole vectors pay in wide layers
    every, _ = prune_channels(wide, x, {"0": c}, round_to=1)
    assert every[0].out_channels == 45
    everything = Magnitude(sparsity=1.0, scope="global")
    floor, _ = prune_channels(model, x, {"0": everything, "1": everything})
    assert (floor[0].out_channels, floor[1].out_channels) == (1, 1)
    pooled = Magnitude(sparsity=0.25, scope="global")
    uneven, _ = prune_channels(model, x, {"0": pooled, "1": pooled})
    assert (uneven[0].out_channels, uneven[1].out_channels) == (20, 4)


def test_reduce_sum_counts_every_coupled_layer():
    model = net("residual")
    with torch.no_grad():
        for module, weight in ((model.a, 1.0), (model.p, 1.0), (model.b, 1.5)):
            module.weight.fill_(weight)
    pooled = Magnitude(count=8, scope="global")
    chosen = {"a": pooled, "p": pooled, "b": pooled}
    mean, _ = prune_channels(model, X, chosen)
    assert (mean.a.out_channels, mean.b.out_channels) == (2, 6)
    total, _ = prune_channels(model, X, chosen, reduce="sum")
    assert (total.a.out_channels, total.b.out_channels) == (7, 1)


@pytest.mark.parametrize("chosen", [Taylor(sparsity=0.5, level="map"), Fisher(sparsity=0.5)])
def test_importance_with_calibration(chosen):
    model = net("plain")
    model.bn.reset_parameters()  # all maps live behind the ReLU
    labels = torch.tensor([0, 3])
    before = [p.detach().clone() for p in model.parameters()]
    small, _ = prune_channels(model, X, {"a": chosen}, calibration=Batches([(X, labels)]))
    # What each map contributes, sample by sample, by the formulas of the papers.
    maps = model.a(X).detach().requires_grad_(True)
    out = model.fc(model.b(model.bn(maps).relu()).relu().mean((2, 3)))
    losses = nn.functional.cross_entropy(out, labels, reduction="none")
    gradient = torch.autograd.grad(losses.sum(), maps)[0]
    change = (maps * gradient).detach()
    if isinstance(chosen, Fisher):
        score = change.sum((2, 3)).square().mean(0)
    else:
        score = change.mean((2, 3)).abs().mean(0)
    kept = sorted(score.argsort()[4:].tolist())
    assert torch.equal(small.a.weight, model.a.weight[kept])
    assert kept != expected_kept(model, "plain")
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="expected calibration to collect"):
        prune_channels(model, X, {"a": chosen})


def unchanged_after(error, model, chosen, **options):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    owned = dict(model.named_parameters())
    modes = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=error):
        prune_channels_(model, X, chosen, **options)
    assert all(owned[n] is p for n, p in model.named_parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_a_removal_that_cannot_be_proven_is_refused():
    model = net("plain")
    # To the tracer this is an operation on each map; in truth it swaps them.
    model.bn.register_forward_hook(lambda _m, _i, output: output.flip(1))
    unchanged_after("removal to equal ignoring the maps", model, config("plain"))
    fixed = net("plain")
    fixed.bn.register_forward_hook(lambda _m, _i, output: output * torch.ones(1, 8, 1, 1))
    unchanged_after("couplings can be traced, got .* after removal", fixed, config("plain"))


def test_an_untraceable_model_is_refused():
    model = net("plain")
    with pytest.raises(ValueError, match="expected model to be traceable, got TypeError"):
        prune_channels_(model, (X, X), config("plain"))
    assert model.a.out_channels == 8
    model.fc.register_forward_hook(lambda _m, _i, output: output.detach())
    unchanged_after("expected every layer to reach the outputs", model, config("plain"))


def test_masked_and_shared_weights_are_refused():
    masked = net("plain")
    torch.nn.utils.prune.l1_unstructured(masked.a, "weight", 0.5)
    with pytest.raises(ValueError, match="layer 'a' with a plain weight of its own, got a masked"):
        prune_channels_(masked, X, config("plain"))
    assert masked.a.weight_orig.shape[0] == 8
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)).eval()
    shared[1].weight = shared[0].weight
    unchanged_after("with a plain weight of its own", shared, {"0": Magnitude(sparsity=0.5)})


def test_coupled_layers_need_one_config():
    model = net("residual")
    differing = {"a": Magnitude(sparsity=0.5), "p": Magnitude(sparsity=0.25)}
    unchanged_after("coupled layers .* have different configs", model, differing)
    # One of two that is left dense keeps both; the rest shrinks.
    small, report = prune_channels(
        model, X, {"a": None, "p": Magnitude(sparsity=0.5), "b": Magnitude(sparsity=0.5)}
    )
    assert set(report.kept) == {"p"} and report.layers == {"b": (6, 3)}
    assert small.p.out_channels == 8


def test_the_outputs_of_the_model_stay():
    model = net("plain")
    unchanged_after("they are the model's output", model, {"fc": Magnitude(sparsity=0.5)})
    with pytest.raises(TypeError, match="expected config"):
        prune_channels_(model, X, 0.5)


@pytest.mark.parametrize(
    "chosen, options, error",
    [
        (Magnitude(), {}, "expected a budget"),
        (Magnitude(sparsity=0.5, granularity="kernel"), {}, "expected granularity 'filter'"),
        (Magnitude(sparsity=0.5), {"round_to": 0}, "expected round_to"),
        (Magnitude(sparsity=0.5), {"reduce": "max"}, "expected reduce"),
        (Magnitude(sparsity=0.5, scope="global"), {"greedy": True}, "expected scope 'layer'"),
    ],
)
def test_errors_leave_the_model_unchanged(chosen, options, error):
    unchanged_after(error, net("plain"), chosen, **options)
