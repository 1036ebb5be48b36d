"""Back to dense layers, with the function of the model kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsecnn.accelerate import accelerate, densify, densify_
from sparsecnn.nn import SPARSE_LAYERS, CSRConv2d, CSRLinear, FusedConv2d

from .conftest import FakeTimer, assert_same_function, liven_norms, zero_weights

X = (2, 3, 12, 12)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, groups=2, dilation=2, padding="same"),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )
    return liven_norms(zero_weights(net, 0.8)).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_round_trip(in_place: bool, timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net()
    fast = accelerate(net, torch.randn(X))
    assert sum(isinstance(m, tuple(SPARSE_LAYERS.values())) for m in fast.modules()) == 3
    dense = densify_(fast) if in_place else densify(fast)
    assert (dense is fast) == in_place
    assert not any(isinstance(m, tuple(SPARSE_LAYERS.values())) for m in dense.modules())
    assert isinstance(fast[0], CSRConv2d) != in_place
    assert isinstance(dense[0], FusedConv2d) and dense[0].activation == "silu"
    assert type(dense[3]) is nn.Conv2d and type(dense[5]) is nn.Linear
    assert torch.equal(dense[5].weight, net[5].weight)
    assert_same_function(net, dense, torch.randn(X))

    again = accelerate(dense, torch.randn(X))
    assert isinstance(again[0], CSRConv2d) and again[0].activation == "silu"
    assert_same_function(net, again, torch.randn(X))


def test_fused_activation_of_a_linear_layer_becomes_a_module() -> None:
    linear = zero_weights(nn.Linear(6, 4), 0.5)
    sparse = CSRLinear.from_dense(linear, activation="relu6")  # type: ignore[arg-type]
    dense = densify(nn.Sequential(sparse))
    assert [type(m) for m in dense[0]] == [nn.Linear, nn.ReLU6]
    x = torch.randn(3, 6)
    assert_same_function(nn.Sequential(sparse), dense, x)


def test_bare_layer_and_model_without_sparse_layers() -> None:
    conv = zero_weights(nn.Conv2d(3, 4, 3), 0.5)
    dense = densify(CSRConv2d.from_dense(conv))  # type: ignore[arg-type]
    assert type(dense) is nn.Conv2d and torch.equal(dense.weight, conv.weight)
    net = _net()
    same = densify(net)
    assert same is not net and [type(m) for m in same] == [type(m) for m in net]
    assert_same_function(net, same, torch.randn(X))


def test_training_flag_is_kept() -> None:
    conv = CSRConv2d(3, 4, 3, activation="relu").train()
    dense = densify(nn.Sequential(conv, CSRConv2d(4, 4, 1).eval()))
    assert dense[0].training and not dense[1].training
