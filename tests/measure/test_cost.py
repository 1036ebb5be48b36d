"""Counted against hand counts: the digits network has 460 416 MACs and 23 034 parameters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import sparsecnn
from sparsecnn.measure import count_macs
from sparsecnn.nn import CSRConv2d, CSRLinear

from .helpers import SparseLinear, digits_net

DIGITS = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)


def zero_half(weight: torch.Tensor) -> None:
    """Zero every other element; all weights of the digits network have an even number of them."""
    with torch.no_grad():
        weight.view(-1)[::2] = 0
        weight.view(-1)[1::2] = 1


def test_metrics_digits_net_matches_the_hand_count():
    model = digits_net()
    cost = count_macs(model, DIGITS)
    by_layer = [layer.dense_macs for layer in cost.layers.values()]
    assert by_layer == [
        16 * 1 * 9 * 8 * 8,
        32 * 16 * 9 * 8 * 8,
        32 * 32 * 9 * 4 * 4,
        64 * 128,
        10 * 64,
    ]
    assert cost.dense_macs == cost.effective_macs == sum(by_layer) == 460_416
    assert cost.params == 23_034
    assert cost.nonzero_params == 23_034 - 80  # the biases of the batch norms are zero
    assert list(cost.layers) == ["0.0", "1.0", "3.0", "6", "8"]
    assert cost.layers["1.0"].output_shape == (1, 32, 8, 8)
    assert cost.layers["1.0"].weight_shape == (32, 16, 3, 3)


def test_metrics_flops_of_the_framework_are_twice_the_macs():
    model = digits_net()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(DIGITS)
    assert counter.get_total_flops() == 2 * count_macs(model, DIGITS).dense_macs


def test_metrics_half_the_filters_match_a_second_hand_count():
    cost = count_macs(digits_net(width=16), DIGITS)
    assert cost.dense_macs == 8 * 9 * 64 + 16 * 8 * 9 * 64 + 16 * 16 * 9 * 16 + 64 * 64 + 640


def test_metrics_zeroing_half_of_every_layer_halves_the_effective_macs_only():
    model = digits_net()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            zero_half(module.weight)
    cost = count_macs(model, DIGITS)
    assert (cost.dense_macs, cost.effective_macs) == (460_416, 230_208)
    assert cost.params - cost.nonzero_params == 22_800 // 2 + 80
    assert all(layer.density == 0.5 for layer in cost.layers.values())


def test_macs_scale_with_the_batch():
    model = digits_net()
    assert count_macs(model, DIGITS.repeat(3, 1, 1, 1)).dense_macs == 3 * 460_416


@pytest.mark.parametrize(
    ("module", "x", "macs"),
    [
        (nn.Conv2d(4, 6, (3, 2), groups=2, bias=True), (2, 4, 7, 5), 6 * 2 * 3 * 2 * 2 * 5 * 4),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 6, 6), 8 * 9 * 36),
        (nn.Conv2d(3, 5, 3, stride=2, dilation=2), (1, 3, 9, 11), 5 * 3 * 9 * 3 * 4),
        (nn.Conv1d(2, 4, 3), (1, 2, 10), 4 * 2 * 3 * 8),
        (nn.ConvTranspose2d(3, 5, 2, stride=2), (1, 3, 4, 4), 3 * 5 * 4 * 16),
        (nn.Linear(7, 3), (2, 5, 7), 7 * 3 * 10),
    ],
    ids=["groups", "depthwise", "stride-dilation", "1d", "transposed", "linear-3d"],
)
def test_single_layers(module: nn.Module, x: tuple[int, ...], macs: int):
    cost = count_macs(module, torch.ones(x))
    assert cost.dense_macs == cost.layers[""].dense_macs == macs
    with torch.no_grad():
        module.weight.view(-1)[0] = 0
    one = macs // module.weight.numel()
    assert count_macs(module, torch.ones(x)).effective_macs == macs - one


def test_a_shared_layer_counts_every_call_and_its_weights_once():
    layer = nn.Linear(6, 6, bias=False)
    cost = count_macs(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(1, 6))
    assert cost.dense_macs == 72 and cost.params == 36
    assert cost.layers["0"].calls == 2


def test_a_layer_that_never_runs_is_listed_without_macs():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    cost = count_macs(Unused(), torch.ones(1, 4))
    assert cost.dense_macs == 16 and cost.params == 20 + 45
    assert cost.layers["idle"].calls == 0 and math.isnan(cost.layers["idle"].density)


def test_products_outside_layers_count_as_dense():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            zero_half(self.layer.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) @ torch.ones(4, 5)

    cost = count_macs(Product(), torch.ones(1, 4))
    assert (cost.dense_macs, cost.effective_macs) == (16 + 20, 8 + 20)


def test_a_layer_inside_a_layer_is_charged_once():
    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.inner(x))

    cost = count_macs(Outer(), torch.ones(1, 4))
    assert cost.dense_macs == 32
    assert [layer.dense_macs for layer in cost.layers.values()] == [16, 16]


def test_a_sparse_layer_counts_like_the_dense_layer_it_replaced():
    model = digits_net()
    zero_half(model[6].weight)
    before = count_macs(model, DIGITS)
    model[6] = SparseLinear(model[6])
    after = count_macs(model, DIGITS)
    assert after.layers["6"].dense_macs == before.layers["6"].dense_macs == 64 * 128
    assert after.layers["6"].effective_macs == before.layers["6"].effective_macs == 32 * 128
    assert (after.dense_macs, after.effective_macs) == (before.dense_macs, before.effective_macs)
    assert (after.params, after.nonzero_params) == (before.params, before.nonzero_params)


def test_csr_layers_keep_all_counts():
    model = digits_net()
    zero_half(model[1][0].weight)
    zero_half(model[6].weight)
    before = count_macs(model, DIGITS)
    model[1][0] = CSRConv2d.from_dense(model[1][0])
    model[6] = CSRLinear.from_dense(model[6])
    after = count_macs(model, DIGITS)
    assert before.effective_macs == 460_416 - (32 * 16 * 9 * 64 + 64 * 128) // 2
    for field in ("dense_macs", "effective_macs", "params", "nonzero_params"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.layers["1.0"].type == "CSRConv2d"


def test_masks_count_as_zeros():
    layer = nn.Linear(4, 4, bias=False)
    zero_half(layer.weight)
    plain = count_macs(layer, torch.ones(1, 4))
    masked = nn.Linear(4, 4, bias=False)
    nn.init.ones_(masked.weight)
    mask = (layer.weight != 0).float()
    pruned = prune.custom_from_mask(copy.deepcopy(masked), "weight", mask)
    cost = count_macs(pruned, torch.ones(1, 4))
    assert (cost.effective_macs, cost.nonzero_params) == (8, 8)
    assert (plain.effective_macs, plain.nonzero_params) == (8, 8)

    class Mask(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * mask

    parametrize.register_parametrization(masked, "weight", Mask())
    assert count_macs(masked, torch.ones(1, 4)).effective_macs == 8


def test_the_model_is_left_as_it_was():
    model = digits_net().train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    count_macs(model, DIGITS)
    assert model.training and not model[1].training and model[0][1].training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_forward_leaves_no_hooks():
    model = digits_net()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.ones(1, 3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_to_dict_is_plain():
    data = count_macs(nn.Linear(2, 3), torch.ones(1, 2)).to_dict()
    assert data["layers"][""]["dense_macs"] == 6


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"count_macs: expected model to be an nn\.Module, got int"):
        count_macs(3, DIGITS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"count_macs: expected x to be a tensor .* got str"):
        count_macs(digits_net(), "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(("tile", "tiles"), [(2, 4 * 5), (4, 2 * 3)])
def test_values_of_a_winograd_layer_are_used_once_a_tile(tile: int, tiles: int) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer = sparsecnn.nn.WinogradConv2d.from_dense(conv, tile)
    cost = count_macs(nn.Sequential(layer), torch.ones(2, 3, 7, 9))
    assert cost.dense_macs == 2 * 3 * 5 * 9 * 7 * 9
    assert cost.effective_macs == 2 * 3 * 5 * (tile + 2) ** 2 * tiles
