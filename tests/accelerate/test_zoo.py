"""Pruned networks through `accelerate` with real measurements: an answer for every convolution.

One round of each measurement: which kernel wins is left to chance, whichever it is must be
reported, be in the model and compute the same. `test_models.py` has the choices that a fake timer
dictates.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from sparsecnn import Magnitude, accelerate, prune_
from sparsecnn.nn import CSRConv2d, DepthwiseConv2d, PatternConv2d, PointwiseConv2d
from sparsecnn.nn.chain import ChainStageWeights
from tests import models

from .conftest import assert_same_function, import_timm

SIDE = 96  # inception_v3 takes no less than 75
# What the network is made with: the first layer of vgg16's classifier is a convolution of 4096
# filters 7x7, three quarters of all its weights; 81 are as good here.
NETS: dict[str, dict[str, Any]] = {
    "mobilenetv2_100": {},
    "convnext_tiny": {},
    "regnety_008": {},
    "efficientnet_b0": {},
    "densenet121": {},
    "inception_v3": {},
    "resnet50": {},
    "vgg16": {"mlp_ratio": 0.02},
}
# Kernel of the report -> the type that holds the weight of such a layer.
TYPES: dict[str, type[nn.Module]] = {
    "csr": CSRConv2d,
    "pattern": PatternConv2d,
    "depthwise": DepthwiseConv2d,
    "pointwise": PointwiseConv2d,
    "chain": ChainStageWeights,
    "dense": nn.Conv2d,
}


@pytest.fixture(scope="module", params=NETS)
def nets(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A network with 90 % of its convolutions' weights zero, and the accelerated one."""
    import_timm()
    model = models.create(request.param, num_classes=10, **NETS[request.param])
    prune_(model, Magnitude(sparsity=0.9), lambda module, _: isinstance(module, nn.Conv2d))
    example = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return model, accelerate(model, example, warmup=0, runs=1)


def test_every_convolution_has_its_kernel_or_the_reason(
    nets: tuple[nn.Module, nn.Module],
) -> None:
    model, fast = nets
    layers = {layer.name: layer for layer in fast.report.layers}
    assert len(layers) == len(fast.report.layers)
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert set(convs) <= set(layers)
    for layer in (layers[name] for name in convs):
        kernel = layer.kernel.split(" ")[0]
        assert kernel in TYPES, layer
        assert layer.reason.strip(" ;"), layer
        assert layer.density == pytest.approx(0.1, abs=0.02), layer
        if kernel not in ("dense", "chain"):  # a kernel that took the layer was measured there
            assert any(name.split(" ")[0] == kernel for name in layer.candidates_ms), layer
            assert kernel in layer.reason, layer
    # The model holds what the report says, no layer more or less.
    told = Counter(layers[name].kernel.split(" ")[0] for name in convs)
    found = Counter(
        kernel
        for m in fast.modules()
        for kernel, kind in TYPES.items()
        if isinstance(m, kind)
    )
    assert found == told


def test_outputs_stay_in_the_documented_bound(nets: tuple[nn.Module, nn.Module]) -> None:
    model, fast = nets
    for seed in (1, 2):  # the example, and an image nobody has seen
        x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        assert_same_function(model, fast, x)
