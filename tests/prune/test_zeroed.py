"""What zeros have made useless is removed, and the outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecnn.data import ResDigitsNet
from sparsecnn.prune import Magnitude, prune_
from sparsecnn.prune.zeroed import remove_zeroed_

from .nets import digits_net, mixed

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def settled(model):
    """Batch norms with other statistics, scales and shifts than fresh ones."""
    source = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=source) + 0.3
    return model.eval()


def silence(model, conv, norm, maps):
    with torch.no_grad():
        conv.weight[maps] = 0
        if norm is not None:
            norm.bias[maps] = 0
            norm.weight[maps] = 0
    return model


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


def unchanged(model, x, shapes, kept=()):
    """Remove, compare the outputs on other images, and look at the shapes."""
    before = outputs(model, x.flip(0) * 1.7)
    report = remove_zeroed_(model, x)
    after = outputs(model, x.flip(0) * 1.7)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    modules = dict(model.named_modules())
    assert {n: tuple(modules[n].weight.shape) for n in shapes} == shapes
    assert set(report.kept) == set(kept), report
    return report


def test_silent_maps_go_through_batch_norm_pooling_and_flatten():
    model = settled(digits_net())
    silence(model, model.conv1, model.bn1, [0, 5])
    silence(model, model.conv3, model.bn3, [1, 2, 31])
    report = unchanged(
        model, X,
        {"conv1": (14, 1, 3, 3), "conv2": (32, 14, 3, 3), "conv3": (29, 32, 3, 3),
         "fc1": (64, 29 * 4)},
    )  # fmt: skip
    assert report.layers == {"conv1": (16, 14), "conv3": (32, 29)}
    assert model.bn3.num_features == 29 and model.fc1.in_features == 116


def test_a_constant_map_is_folded_where_nothing_is_padded():
    model = settled(digits_net())
    with torch.no_grad():
        model.conv3.weight[[3, 4]] = 0  # relu(beta) remains, and fc1 reads it without padding
    bias = model.fc1.bias.detach().clone()
    unchanged(model, X, {"conv3": (30, 32, 3, 3), "fc1": (64, 120)})
    assert not torch.equal(bias, model.fc1.bias)


def test_a_constant_map_in_front_of_padding_stays_with_a_reason():
    model = settled(digits_net())
    with torch.no_grad():
        model.conv1.weight[7] = 0
    report = unchanged(model, X, {"conv1": (16, 1, 3, 3)}, kept=["conv1"])
    assert "1 filters are zero" in report.kept["conv1"] and "padded" in report.kept["conv1"]
    # Without its shift it is zero and may go.
    with torch.no_grad():
        norm = model.bn1
        norm.bias[7] = norm.running_mean[7] * norm.weight[7] / (
            norm.running_var[7] + norm.eps
        ).sqrt()
        norm.bias[7] = float(norm.bias[7]) * 0.999 - 1.0  # negative before the ReLU
    unchanged(model, X, {"conv1": (15, 1, 3, 3)})


def test_a_bias_is_made_where_a_constant_needs_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ReLU(),
        nn.Conv2d(6, 2, 1, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0
        model[0].bias[[1, 2]] = torch.tensor([0.7, 0.9])
    x = torch.randn(2, 3, 9, 9)
    unchanged(model, x, {"0": (2, 3, 3, 3), "2": (6, 1, 3, 3)})
    assert model[2].bias is not None and model[4].bias is None


def test_convolution_groups_lose_equally_many():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    with torch.no_grad():
        model[0].weight[[0, 1]] = 0  # both in the first group
        model[0].bias[[0, 1]] = 0
    unchanged(model, torch.randn(2, 3, 9, 9), {"0": (4, 3, 3, 3), "2": (6, 2, 3, 3)})


def test_unread_channels_take_their_filters_and_what_is_in_front():
    model = settled(digits_net())
    with torch.no_grad():
        model.conv3.weight[:, 4:] = 0  # conv2 makes 28 maps for nobody
        model.conv2.weight[:4, 3:] = 0  # and what is left of it reads three maps
    report = unchanged(
        model, X,
        {"conv1": (3, 1, 3, 3), "conv2": (4, 3, 3, 3), "conv3": (32, 4, 3, 3)},
    )  # fmt: skip
    assert report.layers == {"conv1": (16, 3), "conv2": (32, 4)}


def test_residual_partners_decide_together():
    model = settled(ResDigitsNet())
    block = model.blocks[1]
    silence(model, block.conv1, block.bn1, [0, 1])
    with torch.no_grad():
        block.conv2.weight[5] = 0  # the shortcut's map 5 is still there
    unchanged(
        model, X,
        {"blocks.1.conv1": (30, 16, 3, 3), "blocks.1.conv2": (32, 30, 3, 3)},
        kept=["blocks.1.conv2", "blocks.1.shortcut.0"],
    )  # fmt: skip
    silence(model, block.conv2, block.bn2, [5])
    silence(model, block.shortcut[0], block.shortcut[1], [5])
    unchanged(
        model, X,
        {"blocks.1.conv2": (31, 30, 3, 3), "blocks.1.shortcut.0": (31, 16, 1, 1), "fc": (10, 31)},
    )  # fmt: skip


def test_a_layer_keeps_a_filter():
    model = settled(digits_net())
    silence(model, model.conv2, model.bn2, list(range(32)))
    unchanged(
        model, X,
        {"conv1": (1, 1, 3, 3), "conv2": (1, 1, 3, 3), "conv3": (32, 1, 3, 3)},
    )  # fmt: skip


def test_grouped_and_depthwise_layers():
    model = mixed()
    with torch.no_grad():
        model.pointwise.weight[:, [0, 1, 6, 7]] = 0
    x = torch.randn(2, 3, 6, 6)
    before = outputs(model, x)
    remove_zeroed_(model, x)
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-5, atol=1e-5)


def test_nothing_to_do_touches_nothing():
    model = digits_net()
    prune_(model, Magnitude(sparsity=0.5))
    parameters = list(model.parameters())
    report = remove_zeroed_(model, X)
    assert not report.layers and not report.kept
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_an_untraceable_network_stays_whole():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.idle = nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    model = Strange()
    with torch.no_grad():
        model.conv.weight[0] = 0
    state = copy.deepcopy(model.state_dict())
    report = remove_zeroed_(model, X)
    assert "idle" in report.kept["(model)"]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_swapped_layers_are_refused():
    import sparsecnn

    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    swapped = nn.Sequential(sparsecnn.nn.CSRConv2d.from_dense(model[0]))
    with pytest.raises(ValueError, match="without swapped sparse layers"):
        remove_zeroed_(swapped, torch.randn(1, 2, 3, 3))
