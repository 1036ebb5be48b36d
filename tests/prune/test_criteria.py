"""Scores of the weights alone against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.prune import Batches, Magnitude, PruneConfig, Random, find_targets, prune, sparsity
from sparsecnn.prune.criteria import FPGM, LAMP, BNScale
from sparsecnn.prune.granularity import filter_

from .nets import digits_net, mixed


def test_lamp_scores():
    model = mixed()
    for t in find_targets(model):
        values = t.values().flatten().tolist()
        found = LAMP().score(t, None).flatten().tolist()
        for u, score in zip(values, found, strict=True):
            assert score == pytest.approx(u**2 / sum(v**2 for v in values if abs(v) >= abs(u)))
        assert max(found) == 1.0


def test_lamp_of_ties_zeros_and_groups():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[2.0, 1.0, -1.0, 1.0], [0.0, 2.0, 0.0, 0.0]])
    (t,) = find_targets(layer)
    # Of equal entries the later one is the smaller: 4/4, 4/8, then 1/9, 1/10, 1/11.
    expected = torch.tensor([[1, 1 / 9, 1 / 10, 1 / 11], [0, 4 / 8, 0, 0]]).double()
    torch.testing.assert_close(LAMP().score(t, None), expected)
    rows = torch.tensor([1.0, 4 / 11]).double()
    torch.testing.assert_close(LAMP().group_score(t, filter_, None), rows)
    layer.weight.data.zero_()
    assert LAMP().score(t, None).count_nonzero() == 0


def test_lamp_adapts_to_the_layer():
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 2))
    model[0].weight.data *= 100
    assert LAMP().scope == "global"
    assert LAMP(scope="layer").scope == "layer"

    def layers(config):
        report = sparsity(prune(model, config))
        return [layer.element for layer in report.layers[:2]]

    by_size = layers(Magnitude(sparsity=0.5, scope="global"))
    assert by_size[0] < 0.05 and by_size[1] > 0.95  # the layer of small weights goes
    assert max(abs(share - 0.5) for share in layers(LAMP(sparsity=0.5))) < 0.1


def test_fpgm_distances():
    for t in find_targets(mixed()):
        groups, rows = t.grouped_shape[:2]
        w = t.values().numpy().reshape(groups, rows, -1)
        expected = [
            sum(np.sqrt(((w[g, k] - w[g, j]) ** 2).sum()) for j in range(rows))
            for g in range(groups)
            for k in range(rows)
        ]
        torch.testing.assert_close(
            FPGM().score(t, None), torch.tensor(expected, dtype=torch.float64)
        )


def test_fpgm_prunes_what_others_can_replace():
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2))
    corners = 3 + 0.1 * torch.eye(4, 18)
    middle = corners.mean(0, keepdim=True) * 1.001  # no longer the filter of the smallest norm
    model[0].weight.data = torch.cat([corners, middle]).reshape(5, 2, 3, 3)

    def dead(config):
        return (prune(model, {"0": config})[0].weight.flatten(1) == 0).all(1).nonzero().tolist()

    assert dead(FPGM(count=4)) == [[4]]
    assert dead(Magnitude(p=2, count=4, granularity="filter")) != [[4]]
    assert any(
        dead(Random(seed=s, count=4, granularity="filter")) != [[4]] for s in range(20)
    )


def test_fpgm_refuses_depthwise():
    (t,) = find_targets(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ValueError, match=r"FPGM: expected at least two filters per conv group"):
        FPGM().score(t, None)


def scales(model, names, x):
    targets = [t for t in find_targets(model, include_classifier=True) if t.name in names]
    labels = torch.zeros(len(x), dtype=torch.long)
    stats = Batches([(x, labels)]).collect(model, targets, BNScale().needs)
    return {t.name: BNScale().score(t, stats) for t in targets}


def test_bn_scale_of_functional_and_grouped_networks():
    model = digits_net()
    for bn in (model.bn1, model.bn2, model.bn3):
        nn.init.normal_(bn.weight, generator=torch.Generator().manual_seed(bn.num_features))
    found = scales(model, {"conv1", "conv2", "conv3"}, torch.randn(2, 1, 8, 8))
    for k in (1, 2, 3):
        gamma = getattr(model, f"bn{k}").weight.detach().double().abs()
        assert torch.equal(found[f"conv{k}"], gamma)
    grouped = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Dropout(),
        nn.Identity(),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 1, groups=6),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.BatchNorm1d(5),
    )
    for bn in (grouped[3], grouped[5], grouped[8]):
        nn.init.uniform_(bn.weight, -1, 1)
    found = scales(grouped, {"0", "4", "7"}, torch.randn(2, 4, 4, 4))
    for layer, bn in (("0", 3), ("4", 5), ("7", 8)):
        assert torch.equal(found[layer], grouped[bn].weight.detach().double().abs())


def test_bn_scale_prunes_the_smallest_scale():
    model = digits_net()
    model.bn1.weight.data = torch.arange(16.0) - 5.0
    data = Batches([(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))])
    found = prune(model, {"conv1": BNScale(count=13)}, calibration=data)
    dead = (found.conv1.weight.flatten(1) == 0).all(1)
    assert dead.nonzero().flatten().tolist() == [4, 5, 6]


REFUSED = {
    "relu": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "relu"),
    "no scale": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
        r"without a scale \(affine=False\)",
    ),
    "last": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), "the output of the network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bn_scale_refuses(name):
    build, reason = REFUSED[name]
    expected = rf"BNScale: expected a batch norm with a scale after layer '0', got .*{reason};"
    with pytest.raises(ValueError, match=expected):
        scales(build(), {"0"}, torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("kind", [FPGM, BNScale])
def test_scores_of_maps_need_filters(kind):
    assert kind(sparsity=0.5).granularity == filter_
    with pytest.raises(ValueError, match=r"expected granularity 'filter' .*, got kernel"):
        kind(sparsity=0.5, granularity="kernel")


@pytest.mark.parametrize("config", [LAMP(sparsity=0.5), FPGM(count=2), BNScale(density=0.5)])
def test_config_round_trip(config):
    assert PruneConfig.from_dict(config.to_dict()) == config
