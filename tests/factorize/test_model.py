"""Whole networks: which layers, in which order, and what the report says."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from sparsecnn import accelerate
from sparsecnn.factorize import (
    Factorize,
    Fixed,
    PCAEnergyGlobal,
    Ratio,
    Sensitivity,
    TargetSpeedup,
    UnsupportedLayer,
    factorize,
    factorize_,
)
from sparsecnn.factorize.global_ranks import share
from sparsecnn.measure import count_macs
from sparsecnn.nn import CSRConv2d, FactorizedConv2d, FactorizedLinear
from sparsecnn.prune import Magnitude, prune_


class Net(nn.Module):
    """Two convolutions with batch norm, a pointwise one, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 24, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.relu(self.conv3(x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(8, 3, 12, 12))  # statistics that are not the initial ones
    return model.eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
CALIB = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def run_on(model, config, x, **options):
    return factorize_(model, config, x, measure=False, **options)


def run(model, config, **options):
    return run_on(model, config, X, **options)


def test_full_ranks_compute_the_same_and_the_report_is_complete():
    model = net()
    wanted = model(X)
    config = {"_default": Factorize("tucker2", Ratio(1.0), min_gain=1e-9),
              "fc": Factorize("fc_svd", 10, min_gain=1e-9)}  # fmt: skip
    report = factorize_(model, config, X)
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
    assert isinstance(model.conv2, FactorizedConv2d) and isinstance(model.fc, FactorizedLinear)
    assert [r.name for r in report] == ["conv1", "conv2", "conv3", "fc"]
    for r in report:
        assert r.reason == "" and r.weight_error < 1e-6 and r.response_error < 1e-6
        assert r.dense_us > 0 and r.convs_us > 0
    assert report["conv2"].chain_us > 0 and report["fc"].chain_us is None
    text = str(report)
    assert "conv2" in text and "tucker2" in text and "factorized 4 of 4 layers" in text
    assert report.to_dict()["layers"][0]["name"] == "conv1"


def test_counts_of_the_report_are_the_counted_ones():
    model = net()
    dense = count_macs(model, X[:1])
    report = run(model, Factorize("vh", TargetSpeedup(2)))
    assert report["conv2"].ranks and report["conv2"].macs * 2 <= report["conv2"].dense_macs
    counted = count_macs(model, X[:1])
    outside = dense.dense_macs - report.dense_macs
    assert counted.dense_macs == report.macs + outside
    assert report["conv2"].weight_error > 0.05


def test_layers_that_cannot_gain_stay_dense_with_a_reason_and_their_time():
    model = net()
    report = factorize_(model, Factorize("tucker2", Ratio(1.0)), X)
    assert all("no gain" in r.reason and not r.ranks for r in report)
    assert type(model.conv2) is nn.Conv2d and report.macs == report.dense_macs
    assert "no gain" in str(report)
    assert all(r.dense_us > 0 and r.convs_us == 0 for r in report)
    row = next(line for line in str(report).splitlines() if "conv2" in line)
    assert f"{report['conv2'].dense_us:.0f}" in row
    unmeasured = run(net(), Factorize("tucker2", Ratio(1.0)))
    assert all(r.dense_us == 0 for r in unmeasured)


def test_names_expressions_and_filters():
    model = net()
    report = run(
        model,
        {"re:conv[23]": Factorize("tucker2", 4), "conv3": None, "_default": Factorize("vh", 2)},
        filter_fn=lambda module, name: name != "conv1",
    )
    assert [(r.name, r.method) for r in report] == [("conv2", "tucker2")]
    assert type(model.conv3) is nn.Conv2d and type(model.fc) is nn.Linear


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (3, {}, TypeError, "expected config a Factorize or a mapping"),
        ({"conv1": 3}, {}, TypeError, "expected config a Factorize or a mapping"),
        ({"conv9": Factorize("vh", 2)}, {}, ValueError, "did you mean 'conv"),
        ({"re:con(": Factorize("vh", 2)}, {}, ValueError, "valid regular expression"),
        ({"re:conv.": Factorize("vh", 2), "re:.*1": Factorize("vh", 3)}, {}, ValueError, "one con"),
        (Factorize("fc_svd", 2), {"filter_fn": lambda m, n: False}, ValueError, "at least one"),
        (Factorize("vh", 2), {"order": "all"}, ValueError, "one_shot or layerwise, got 'all'"),
        (Factorize("vh", 2), {"reconstruct": -1}, ValueError, "reconstruct an integer >= 0, got"),
        (Factorize("vh", 2), {"reconstruct": 5}, ValueError, "expected calib for reconstruct"),
        (Factorize("vh", 2), {"calib": X}, TypeError, "put a tensor in a list"),
        (Factorize("vh", 2), {"finetune": 3}, TypeError, "finetune a function, got int"),
        (Factorize("zhang", 2), {}, ValueError, "expected calib for a method that works on resp"),
        (Factorize("vh", (2, 3)), {}, ValueError, "conv1: expected rank with 1 entries"),
        (Factorize("vh", TargetSpeedup(500)), {}, ValueError, "conv1: expected a target within"),
    ],
)
def test_wrong_arguments_change_nothing(config, options, error, message):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        run(model, config, **options)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(TypeError, match=r"expected model an nn\.Module, got str"):
        factorize_("net", Factorize("vh", 2), X)


def test_not_finite_weights_change_nothing():
    model = net()
    with torch.no_grad():
        model.conv3.weight[0] = math.inf
    with pytest.raises(ValueError, match="conv3: expected finite weights, got 24"):
        run(model, Factorize("tucker2", 2))
    assert type(model.conv1) is nn.Conv2d


def test_masks_and_swapped_layers_are_refused():
    model = net()
    nn.utils.prune.random_unstructured(model.conv2, "weight", 0.5)
    with pytest.raises(ValueError, match=r"without masks or parametrizations.*factorize first"):
        run(model, Factorize("tucker2", 2))
    model = net()
    prune_(model, Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match=r"at most 30% zero weights, got 4\d%; factorize first"):
        run(model, Factorize("tucker2", 2))
    model = net()
    model.conv2 = CSRConv2d.from_dense(model.conv2)
    with pytest.raises(ValueError, match="densify"):
        run(model, Factorize("tucker2", 2))


class Odd(nn.Module):
    """A shared module, a shared weight, a transposed layer, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=1)
        self.d.weight = self.c.weight
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.idle = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.up(self.d(self.c(self.b(self.a(x)))))


def test_shared_transposed_and_idle_layers():
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(1, 8, 6, 6)
    config = Factorize("tucker2", 3)
    report = factorize_(model, config, x, measure=False)
    assert isinstance(model.a, FactorizedConv2d) and model.a is model.b
    assert report["a"].ranks == (3, 3)
    assert "shares its weight with 'd'" in report["c"].reason
    assert "shares its weight with 'c'" in report["d"].reason
    assert "ConvTranspose2d" in report["up"].reason
    assert "not called on example_inputs" in report["idle"].reason
    with pytest.raises(UnsupportedLayer, match=r"up: expected nn\.Conv2d or nn\.Linear"):
        factorize_(Odd(), {"up": config}, x, measure=False)
    with pytest.raises(UnsupportedLayer, match="c: shares its weight"):
        factorize_(Odd(), config, x, measure=False, strict=True)


def test_layerwise_calls_finetune_after_every_layer_in_order():
    model = net()
    seen = []

    def finetune(network, name):
        done = [n for n, m in network.named_modules() if isinstance(m, FactorizedConv2d)]
        seen.append((name, done))

    run(model, Factorize("cp_tpm", 4), order="layerwise", finetune=finetune)
    assert seen == [
        ("conv1", ["conv1"]),
        ("conv2", ["conv1", "conv2"]),
        ("conv3", ["conv1", "conv2", "conv3"]),
    ]
    seen.clear()
    run(net(), Factorize("cp_tpm", 4), finetune=finetune)
    assert seen == [("", ["conv1", "conv2", "conv3"])]


def test_reconstruction_helps_and_leaves_finished_layers_alone():
    plain, model = net(), net()
    reference = copy.deepcopy(plain)
    config = Factorize("vh", 4)
    run(plain, config, recalibrate=False)
    states = {}

    def keep(network, name):
        for other, state in states.items():
            now = network.get_submodule(other).state_dict()
            assert all(torch.equal(state[k], now[k]) for k in state), other
        module = network.get_submodule(name)
        states[name] = {k: v.clone() for k, v in module.state_dict().items()}

    report = run(model, config, calib=CALIB, order="layerwise", reconstruct=60, finetune=keep)
    assert len(states) == 3
    assert sum("reconstructed" in note for note in report.notes) == 3
    held = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        wanted = reference(held)
        assert (model(held) - wanted).norm() < 0.9 * (plain(held) - wanted).norm()


def test_batch_norms_are_estimated_anew():
    model, stale = net(), net()
    config = Factorize("vh", 3)
    report = run(model, config, calib=CALIB)
    assert "re-estimated 2 batch norms" in report.notes
    run(stale, config, calib=CALIB, recalibrate=False)
    assert torch.equal(stale.bn2.running_mean, net().bn2.running_mean)
    with torch.no_grad():
        wanted = model.conv1(torch.cat(CALIB)).mean((0, 2, 3))
    torch.testing.assert_close(model.bn1.running_mean, wanted, rtol=1e-4, atol=1e-5)
    assert (stale.bn1.running_mean - wanted).abs().max() > 1e-2


def test_zhang_folds_the_batch_norm_and_sees_what_the_relu_sees():
    model = net()
    wanted = model(X)
    report = run(model, Factorize("zhang", Ratio(1.0), min_gain=1e-9), calib=CALIB)
    assert "folded bn1 into conv1" in report.notes and isinstance(model.bn1, nn.Identity)
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-3)


def test_a_failing_pass_brings_the_folded_batch_norms_back():
    model = net()
    wanted = model(X)
    with pytest.raises(ValueError, match="conv1: expected a target within reach"):
        run(model, Factorize("zhang", TargetSpeedup(500)), calib=CALIB)
    assert isinstance(model.bn1, nn.BatchNorm2d) and model.conv2.bias is None
    assert torch.equal(model(X), wanted)


def test_a_failing_reconstruction_brings_all_layers_back(monkeypatch):
    module = importlib.import_module("sparsecnn.factorize.model")
    calls = []

    def failing(chain, *args, **options):
        calls.append(chain)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return 1.0, 0.5

    monkeypatch.setattr(module, "reconstruct_", failing)
    model = net()
    layers = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, Factorize("zhang", 3), calib=CALIB, reconstruct=2)
    assert isinstance(calls[0], FactorizedConv2d)
    assert dict(model.named_modules()) == layers and model.conv2.bias is None


def test_what_a_method_says_of_its_solution_is_in_the_report():
    # a o a o b + a o b o a + b o a o a has rank 3, and rank-2 terms come near by cancelling.
    model = nn.Sequential(nn.Conv2d(2, 2, (1, 2), bias=False)).double()
    a, b = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)
    terms = [torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a))]
    model[0].weight.data = sum(terms)[:, :, None]
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    config = Factorize("cp_nls", 2, min_gain=1e-9)
    report = factorize_(model, config, x, measure=False)
    assert report["0"].note.startswith("terms cancel") and report["0"].note in str(report)
    assert report.to_dict()["layers"][0]["note"] == report["0"].note
    assert all(r.note == "" for r in run(net(), Factorize("vh", 2)))


def test_ranks_by_all_responses_take_one_pass_over_the_data():
    model, passes = net(), []
    model.conv1.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="expected calib for a method that works on responses"):
        run(model, Factorize("channel_svd", PCAEnergyGlobal(2.0)))
    passes.clear()
    config = Factorize("zhang", PCAEnergyGlobal(2.0), min_gain=1e-9)
    report = run(model, config, calib=CALIB, recalibrate=False)
    assert all(r.ranks for r in report)
    surveyed = 1 + 2 * 2  # of the example; before and after each of two folded batch norms
    assert len(passes) <= surveyed + len(CALIB)
    # Only the ranks need the data here: not once more for every layer.
    model, passes = net(), []
    model.conv1.register_forward_hook(lambda *_: passes.append(1))
    config = Factorize("channel_svd", PCAEnergyGlobal(2.0), min_gain=1e-9)
    report = run(
        model, config, calib=CALIB, recalibrate=False, order="layerwise", asymmetric=False
    )
    assert all(r.ranks for r in report) and len(passes) == 1 + len(CALIB)


def test_sensitivity_gives_the_rank_to_the_layer_that_needs_it():
    def evaluate(network):
        # Only the first layer counts here.
        return 0.0 if isinstance(network.conv1, FactorizedConv2d) else 1.0

    model = net()
    report = run(model, Factorize("cp", Sensitivity(6, evaluate), min_gain=1e-9))
    assert [r.ranks for r in report] == [(16,), (1,), (1,)]
    assert share({"a": 3.0, "b": 1.0}, {"a": 100, "b": 100}, 8) == {"a": 12, "b": 4}
    assert share({"a": 3.0, "b": 1.0}, {"a": 5, "b": 100}, 8) == {"a": 5, "b": 11}


def test_flags_and_hooks_are_kept():
    model = net().train()
    model.conv2.eval()
    called = []
    model.conv2.register_forward_hook(lambda *_: called.append(1))
    run(model, Factorize("tucker2", 4))
    called.clear()
    model(X)
    assert called == [1] and model.conv1.training and not model.conv2.training
    assert all(not m.training for m in model.conv2.modules())


def test_what_trains_and_the_memory_format_are_kept():
    for frozen in ("weight", "bias"):
        model = net()
        getattr(model.conv1, frozen).requires_grad_(False)
        model.fc.requires_grad_(False)
        config = {"_default": Factorize("tucker2", 4), "fc": Factorize("fc_svd", 3)}
        run(model, config)
        weights = [stage.weight.requires_grad for stage in model.conv1]
        assert weights == [frozen != "weight"] * 3
        assert model.conv1[-1].bias.requires_grad == (frozen != "bias")
        assert all(p.requires_grad for p in model.conv2.parameters())
        assert not any(p.requires_grad for p in model.fc.parameters())
    model = net().to(memory_format=torch.channels_last)
    run(model, Factorize("tucker2", 4))
    core = model.conv2[1].weight
    assert core.is_contiguous(memory_format=torch.channels_last) and not core.is_contiguous()
    assert all(stage.weight.is_contiguous() for stage in factorize(net().conv2, "tucker2", 4))
    # Zhang's chain has a bias where the layer had none; it trains as the weight does.
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False)).requires_grad_(False)
    x = torch.randn(64, 8, 5, 5)
    report = run_on(model, Factorize("zhang", 3), x, calib=[x], reconstruct=5)
    assert isinstance(model[0], FactorizedConv2d) and model[0][-1].bias is not None
    assert not any(p.requires_grad for p in model.parameters())
    assert "not reconstructed 0: its weights are frozen" in report.notes


def test_half_precision_layers_are_fitted_in_double_and_stored_in_half():
    layer = nn.Conv2d(16, 16, 3, padding=1).bfloat16()
    model = nn.Sequential(layer)
    factorize_(model, Factorize("tucker2", 4), X.new_zeros(1, 16, 8, 8).bfloat16(), measure=False)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_accelerate_takes_a_factorized_network():
    model = net()
    run(model, Factorize("tucker2", Fixed(4)))
    wanted = model(X)
    fast = accelerate(model, X)
    torch.testing.assert_close(fast(X), wanted, rtol=1e-4, atol=1e-5)
