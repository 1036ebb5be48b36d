from __future__ import annotations

import pytest
import torch

from sparsecnn.prune import Magnitude
from sparsecnn.prune.channels import prune_channels_
from tests.models import prepare_torchvision

if not prepare_torchvision():
    pytest.skip("torchvision does not fit this torch", allow_module_level=True)
timm = pytest.importorskip("timm")

SMALL = ["resnet18", "mobilenetv2_050", "mobilenetv3_small_050", "regnetx_002", "mnasnet_small"]


@pytest.mark.parametrize("name", SMALL)
def test_architecture_shrinks(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    before = sum(p.numel() for p in model.parameters())
    _, report = prune_channels_(model, x, Magnitude(sparsity=0.3))
    assert report.layers
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before
    for training in (False, True):
        assert model.train(training)(x).shape == (2, 10)
