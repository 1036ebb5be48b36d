"""Real architectures at 90 % sparsity: same outputs, and an answer for every layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsecnn.accelerate import accelerate, densify
from sparsecnn.nn import SPARSE_LAYERS, CSRConv2d, ResidualBlock

from .conftest import FakeTimer, assert_same_function, import_timm, liven_norms, zero_weights

# name, image side, least number of batch norms folded, layout that the timer favours
MODELS = [
    ("resnet18", 64, 20, "contiguous"),
    ("resnet18", 64, 20, "channels_last"),
    ("mobilenetv2_100", 64, 52, "channels_last"),
    ("vgg16", 32, 0, "contiguous"),
    ("densenet121", 64, 59, "contiguous"),
    ("efficientnet_b0", 64, 49, "channels_last"),
    ("mobilenetv3_small_100", 64, 34, "contiguous"),
    ("tf_efficientnet_b0", 64, 0, "contiguous"),
    ("resnetv2_50", 32, 0, "channels_last"),
    ("convnext_atto", 64, 0, "channels_last"),
    ("vit_tiny_patch16_224", 224, 0, "contiguous"),
]
# Its first fully connected layer has 100 million weights, of which a test needs no more than a few.
OPTIONS = {"vgg16": {"mlp_ratio": 1 / 32}}


@pytest.mark.parametrize(("name", "side", "norms", "layout"), MODELS)
def test_timm_model(
    name: str, side: int, norms: int, layout: str, timer: Callable[..., FakeTimer]
) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **OPTIONS.get(name, {})).eval()
    liven_norms(zero_weights(model, 0.9))
    x = torch.randn(1, 3, side, side)
    timer(**{f"swapped {layout}": 1.0})
    fast = accelerate(model, x)
    report = fast.report
    layers = {layer.name: layer for layer in report.layers}
    convs = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert list(layers) == convs
    assert report.layout == layout
    for layer in report.layers:
        assert layer.reason, layer.name
        assert layer.kernel == "csr" or layer.reason.endswith("left as is"), layer
    before = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    after = sum(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert before - after >= norms, f"{before} batch norms before, {after} after"
    assert not any("undone" in note for note in report.notes), report.notes
    assert_same_function(model, fast, torch.randn(1, 3, side, side))
    assert_same_function(fast, densify(fast), torch.randn(1, 3, side, side))


def test_swapped_layers_of_a_resnet_are_all_convolutions(
    timer: Callable[..., FakeTimer],
) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    model = liven_norms(zero_weights(timm.create_model("resnet18").eval(), 0.9))
    timer()
    fast = accelerate(model, torch.randn(1, 3, 64, 64))
    swapped = [m for m in fast.modules() if isinstance(m, tuple(SPARSE_LAYERS.values()))]
    assert len(swapped) == 21
    # relu1 of every block follows its batch norm; relu2 the addition, which is fused with it.
    fused = [m for m in swapped if isinstance(m, CSRConv2d) and m.activation == "relu"]
    assert len(fused) == 1 + 8 + 8
    blocks = [m for m in fast.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 8
    assert sum(len(block.shortcut) for block in blocks) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
