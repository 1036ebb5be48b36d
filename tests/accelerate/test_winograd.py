"""The Winograd kernels among the candidates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsecnn import accelerate, densify, load, save
from sparsecnn._accelerate.choice import difference
from sparsecnn._accelerate.kernels import CANDIDATES, Layer
from sparsecnn.nn import WinogradConv2d
from tests.accelerate.conftest import FakeTimer, assert_same_function

X = (2, 16, 9, 10)
NAMES = ("winograd2", "winograd4")


def _layer(conv: nn.Module, density: float = 1.0, shape: tuple[int, ...] = X) -> Layer:
    return Layer(conv, "relu", {shape: 1}, density)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module, density, shape, reason",
    [
        (nn.Conv2d(16, 32, 3), 1.0, X, None),
        (nn.Conv2d(16, 32, 3, padding=1, groups=2), 0.28, X, None),
        (nn.Conv2d(16, 32, 3), 0.25, X, "density 0.25 below 0.28"),
        (nn.Conv2d(16, 32, 1), 1.0, X, "not a 3x3 convolution"),
        (nn.Linear(16, 8), 1.0, (1, 16), "not a 3x3 convolution"),
        (nn.Conv2d(16, 32, 3, stride=2), 1.0, X, "stride (2, 2), dilation (1, 1)"),
        (nn.Conv2d(16, 32, 3, dilation=2), 1.0, X, "stride (1, 1), dilation (2, 2)"),
        (nn.Conv2d(16, 32, 3, groups=4), 1.0, X, "fewer than 8 channels a group"),
        (nn.Conv2d(16, 32, 3).bfloat16(), 1.0, X, "no kernel for bfloat16 on cpu"),
        (nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"), 1.0, X, "padding_mode 'reflect'"),
        (nn.Conv2d(16, 32, 3), 1.0, X[1:], "input without a batch dimension"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_where_it_applies(
    module: nn.Module, density: float, shape: tuple[int, ...], reason: str | None
) -> None:
    for name in NAMES:
        assert CANDIDATES[name].applies(_layer(module, density, shape)) == reason


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_within_what_the_candidate_states(name: str) -> None:
    """Wide layers too: the check that lets a candidate in must not depend on luck."""
    candidate = CANDIDATES[name]
    for channels in (8, 64, 512):
        torch.manual_seed(channels)
        layer = _layer(nn.Conv2d(channels, 32, 3, padding=1), shape=(1, channels, 14, 14))
        built = candidate.build(layer)
        assert isinstance(built, WinogradConv2d) and built.activation == "relu"
        worst, wrong = difference(layer, built, candidate.error_growth)
        assert not wrong and 0 < worst < 1e-4
        with torch.no_grad():  # and a wrong weight must not pass
            built.values[0, 5] *= 1.01
        assert difference(layer, built, candidate.error_growth)[1]


@pytest.mark.parametrize("name", NAMES)
def test_model_with_winograd_layers(
    name: str, timer: Callable[..., FakeTimer], tmp_path: object
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 12, 3), nn.Flatten(),
    ).eval()  # fmt: skip
    timer(**{name: 1.0})
    x = torch.randn(X)
    fast = accelerate(net, x)
    assert [layer.kernel for layer in fast.report.layers] == [name, name]
    layers = [m for m in fast.modules() if isinstance(m, WinogradConv2d)]
    assert [m.tile for m in layers] == [int(name[-1])] * 2
    assert_same_function(net, fast, torch.randn(X))
    save(fast, f"{tmp_path}/net.safetensors")
    assert torch.equal(load(f"{tmp_path}/net.safetensors")(x), fast(x))
    dense = densify(fast)
    assert not any(isinstance(m, WinogradConv2d) for m in dense.modules())
    assert_same_function(net, dense, torch.randn(X))
