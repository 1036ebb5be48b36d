"""Factorizing a trained network of real digits: what the factors carry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecnn.factorize import (
    METHODS,
    Factorize,
    LayerProblem,
    TargetSpeedup,
    collect_gradients,
    factorize_,
)
from sparsecnn.factorize.timing import placeholder
from sparsecnn.measure.batchnorm import recalibrate_batchnorm

from ..digits import accuracy, fit, load

INNER = {"3": (8, 8), "7": (4, 4)}
"""The layers that are factorized, and the sizes of their maps."""
CONVS = sorted(name for name in METHODS if name not in ("fc_svd", "cp_nls"))


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for c_in, c_out in ((1, 16), (16, 32), (32, 32)):
        conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    fit(model, digits, 6, 0.05)
    assert accuracy(model, digits) > 0.96
    return model


@pytest.fixture(scope="module")
def gradients(trained, digits):
    labelled = digits[0][:200], digits[1][:200]
    return collect_gradients(copy.deepcopy(trained), list(INNER), [labelled])


@pytest.mark.parametrize("method", CONVS)
def test_factors_carry_what_the_network_knows(method, trained, digits, gradients):
    x = digits[0]
    calib = list(x[:512].split(64))
    model, noise = copy.deepcopy(trained).eval(), copy.deepcopy(trained).eval()
    config = {name: Factorize(method, TargetSpeedup(2)) for name in INNER}
    report = factorize_(model, config, x[:1], calib, gradients=gradients, measure=False)
    assert all(2 * r.macs <= r.dense_macs for r in report)
    for r in report:
        layer = trained.get_submodule(r.name)
        p = LayerProblem.of(layer, in_hw=INNER[r.name])
        noise.set_submodule(r.name, placeholder(p, METHODS[method](), r.ranks))
    recalibrate_batchnorm(noise, calib)  # as factorize_ does
    before = accuracy(model, digits)
    assert before > accuracy(noise, digits) + 0.2
    for rate, epochs in ((0.03, 2), (0.003, 1)):
        fit(model, digits, epochs, rate)
    assert accuracy(model, digits) > accuracy(trained, digits) - 0.02
