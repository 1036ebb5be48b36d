"""Importances as configs, schedules, and the sparsity report."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

from sparsecnn.prune import (
    NM,
    Event,
    Magnitude,
    OneShot,
    Polynomial,
    PruneConfig,
    Pruner,
    Random,
    SparsityReport,
    block,
    config_from_dict,
    config_to_dict,
    filter_,
    find_targets,
    prune_,
    register_importance,
    sparsity,
)

from ..toml import to_toml
from .nets import digits_net, mixed, weights


@register_importance
def FromValue(t, stats, *, value: float = 0.0):
    """Distance from a value."""
    return (t.values() - value).abs()


CONFIGS = [
    Magnitude(sparsity=0.9),
    Magnitude(p=2, density=0.25, granularity="filter", scope="global", normalize="layer"),
    Magnitude(granularity=NM(2, 4)),
    Magnitude(count=4, granularity=block(4, 1)),
    Magnitude(count=4, granularity="strided(3)"),
    Random(sparsity=0.5, seed=7),
    FromValue(sparsity=0.5, value=0.25),
    {"conv1": None, "re:conv[23]": Magnitude(sparsity=0.5), "_default": Random(sparsity=0.1)},
    {"fc1": None, "conv2": Magnitude(sparsity=0.5)},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_round_trip_through_json_and_toml(config):
    tomllib = pytest.importorskip("tomllib")
    data = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(data))) == config
    assert config_from_dict(tomllib.loads(to_toml(data))) == config


def test_configs_are_frozen_and_hashable():
    assert len({Magnitude(sparsity=0.5), Magnitude(sparsity=0.5), Random(sparsity=0.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Magnitude(sparsity=0.5).sparsity = 0.9


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Magnitude(sparsity=90), ValueError, r"did you mean 0.9\?"),
        (lambda: Magnitude(sparsity=0.5, density=0.5), ValueError, "exactly one of"),
        (lambda: Magnitude(sparsity=0.5, scope="model"), ValueError, "scope 'layer' or 'global'"),
        (lambda: Magnitude(sparsity=0.5, granularity="rows"), ValueError, "'block\\(bh,bw\\)'"),
        (lambda: Magnitude(p=0, sparsity=0.5), ValueError, r"p in \(0, inf\), got 0"),
        (lambda: Magnitude(p="2", sparsity=0.5), TypeError, "p to be a number, got '2'"),
        (lambda: Magnitude(sparsity=0.5, normalize="net"), ValueError, "None or 'layer'"),
        (lambda: Random(sparsity=0.5, seed=1.5), TypeError, "seed to be an int, got 1.5"),
        (lambda: Random(seed=1, generator=torch.Generator()), ValueError, "got both"),
        (lambda: PruneConfig.from_dict({"importance": "Oracle"}), ValueError, "got 'Oracle'"),
        (lambda: PruneConfig.from_dict({"ratio": 0.5}), ValueError, "got ratio"),
        (lambda: config_from_dict("Magnitude"), TypeError, "a mapping, got 'Magnitude'"),
    ],
)
def test_bad_configs(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_magnitude_filter_ranking_is_the_lp_norm():
    conv = nn.Conv2d(4, 16, 3)
    for p in (1.0, 2.0):
        copy = nn.Conv2d(4, 16, 3)
        copy.load_state_dict(conv.state_dict())
        prune_(copy, Magnitude(p=p, sparsity=0.5, granularity="filter"))
        norms = conv.weight.detach().flatten(1).norm(p=p, dim=1)
        gone = (copy.weight == 0).flatten(1).all(1)
        assert set(gone.nonzero().flatten().tolist()) == set(norms.argsort()[:8].tolist())


def test_magnitude_survives_squares_that_underflow():
    conv = nn.Conv2d(1, 1, 3)
    with torch.no_grad():
        conv.weight.copy_(1e-30 * torch.tensor([9.0, 2, 7, 1, 5, 3, 8, 4, 6]).reshape(1, 1, 3, 3))
    prune_(conv, Magnitude(p=2, sparsity=4 / 9))
    assert conv.weight.detach().flatten().ne(0).tolist() == [
        True, False, True, False, True, False, True, False, True,
    ]  # fmt: skip


def test_normalize_protects_layers_with_small_weights():
    def zeros(normalize):
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
        with torch.no_grad():
            model[0].weight.mul_(1e-3)
        prune_(model, Magnitude(sparsity=0.3, scope="global", normalize=normalize))
        return sparsity(model)["0"].element

    assert zeros(None) > 0.85
    assert 0.2 < zeros("layer") < 0.4


def test_random_depends_on_seed_and_name_only():
    def pruned(seed):
        model = mixed()
        prune_(model, Random(sparsity=0.5, seed=seed))
        return weights(model)

    first, again, other = pruned(1), pruned(1), pruned(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    # The global seed is neither read nor moved.
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert all(torch.equal(first[n], w) for n, w in pruned(1).items())
    assert torch.equal(torch.random.get_rng_state(), before)
    # Layers of the same size get different draws.
    twins = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3))
    a, b = (Random(seed=0).score(t, None) for t in find_targets(twins))
    assert not torch.equal(a, b)
    drawn = [Random(generator=torch.Generator().manual_seed(s)).seed for s in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_new_importance_is_one_function():
    conv = nn.Conv2d(2, 4, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.linspace(-1, 1, 72).reshape(conv.weight.shape))
    prune_(conv, FromValue(sparsity=0.5, value=1.0))
    kept = conv.weight.detach().flatten() != 0
    assert kept.tolist() == [True] * 36 + [False] * 36
    assert FromValue.__doc__ == "Distance from a value."

    def Bad(t, stats, extra):
        return t.values()

    with pytest.raises(TypeError, match=r"expected Bad\(t, stats, \*, option=default\)"):
        register_importance(Bad)

    def Clash(t, stats, *, sparsity=0.5):
        return t.values()

    with pytest.raises(TypeError, match="expected option 'sparsity' of Clash"):
        register_importance(Clash)
    with pytest.raises(ValueError, match="expected a new name, got 'Magnitude'"):

        def Magnitude(t, stats):
            return t.values()

        register_importance(Magnitude)


def test_scores_of_another_shape_are_refused():
    @register_importance
    def Transposed(t, stats):
        return t.values().transpose(0, 1)

    with pytest.raises(ValueError, match=r"expected scores of shape \(8, 3, 3, 3\) or \(216,\)"):
        prune_(nn.Conv2d(3, 8, 3), Transposed(sparsity=0.5))


def test_polynomial_is_zhu_and_gupta():
    schedule = Polynomial(begin=10, end=110, every=25, initial=0.1)
    final = 0.9
    seen = {}
    for step in range(150):
        event = schedule.event(step, 0)
        if event is not None:
            assert event.kind == "prune"
            seen[step] = event.initial + (final - event.initial) * event.fraction
    expected = {t: final + (0.1 - final) * (1 - (t - 10) / 100) ** 3 for t in (10, 35, 60, 85, 110)}
    assert seen == pytest.approx(expected)
    assert schedule.event(110, 0).fraction == 1.0
    # A span that `every` does not divide still ends on the whole budget.
    ragged = [s for s in range(40) if Polynomial(0, 20, 8).event(s, 0)]
    assert ragged == [0, 8, 16, 20]
    assert [s for s in range(9) if OneShot(at=4).event(s, 0)] == [4]


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: Polynomial(5, 5), ValueError),
        (lambda: Polynomial(-1, 5), ValueError),
        (lambda: Polynomial(0, 5, every=0), ValueError),
        (lambda: Polynomial(0, 5.0), TypeError),
        (lambda: Polynomial(0, 5, initial=1.5), ValueError),
        (lambda: Polynomial(0, 5, power=0), ValueError),
        (lambda: OneShot(-1), ValueError),
        (lambda: Event("grow"), ValueError),
        (lambda: Event("prune", 2.0), ValueError),
    ],
)
def test_bad_schedules(build, error):
    with pytest.raises(error, match=r"expected .* got"):
        build()


def test_report_counts_whole_groups():
    conv = nn.Conv2d(4, 4, 3, groups=2)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.weight[0] = 0  # one filter, hence two kernels
        conv.weight[3, 1] = 0  # one kernel
        conv.weight[2, 1, 0, 0] = 0  # with it a column of the second group: (2:4, 1, 0, 0)
        conv.weight[1, 0, 2, 2] = 0  # with filter 0 a column of the first group
    (entry,) = sparsity(conv).layers
    assert entry.zeros == 18 + 9 + 1 + 1
    assert entry.element == 29 / 72
    assert entry.kernel == 3 / 8
    assert entry.filter == 1 / 4
    assert entry.column == 2 / 36
    assert entry.channel == 0.0


def test_element_zeros_are_not_reported_as_kernels():
    model = digits_net()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4:
                p[:, :, 1:] = 0  # two thirds of each kernel, no whole kernel
    for name in ("conv1", "conv2", "conv3"):
        entry = sparsity(model)[name]
        assert entry.element == pytest.approx(2 / 3)
        assert entry.kernel == entry.filter == entry.channel == 0.0
        assert entry.column == pytest.approx(2 / 3)


class Swapped(nn.Module):
    is_sparsecnn_layer = True

    def __init__(self, conv):
        super().__init__()
        self.conv = [conv]

    def to_dense(self):
        return self.conv[0]


def test_report_reads_every_kind_of_zero():
    model = mixed()
    torch_prune.l1_unstructured(model.plain, "weight", 0.25)
    with torch.no_grad():
        # A step's worth of change: the attribute `weight` is stale now, one more entry is zero.
        model.plain.weight_orig.add_(1.0)
        model.plain.weight_orig.view(-1)[model.plain.weight_mask.flatten().nonzero()[0]] = 0
        model.pointwise.weight[0] = 0
    masked = Pruner(
        model,
        importance=Magnitude(sparsity=0.5),
        targets=[t for t in find_targets(model) if t.name == "grouped"],
        mask_mode="ste",
    )
    masked.step()
    model.depthwise = Swapped(nn.Conv2d(12, 24, 3, groups=12))
    with torch.no_grad():
        model.depthwise.to_dense().weight[:6] = 0
    report = sparsity(model)
    assert [e.name for e in report.layers] == [
        "plain", "grouped", "depthwise", "pointwise", "hidden", "head",
    ]  # fmt: skip
    assert [e.element for e in report.layers] == [55 / 216, 0.5, 0.25, 0.125, 0.0, 0.0]
    assert report["depthwise"].filter == 0.25
    assert report["grouped"].type == "Conv2d"
    assert SparsityReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    text = str(report)
    for name in ("plain", "grouped", "8x3x3x3", "55/216", "12.5%", "all"):
        assert name in text
    with pytest.raises(KeyError, match="expected one of 'plain'"):
        report["conv"]
    with pytest.raises(ValueError, match="schema_version 1"):
        SparsityReport.from_dict({"schema_version": 2})


def test_filter_alias():
    assert Magnitude(sparsity=0.1, granularity="neuron").granularity == filter_
