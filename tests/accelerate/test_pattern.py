"""The pattern kernel among the candidates, with a timer that says what the test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsecnn._accelerate.kernels import CANDIDATES, Layer
from sparsecnn.accelerate import accelerate, densify
from sparsecnn.nn import PatternConv2d

from .conftest import FakeTimer, assert_same_function, zero_weights

X = (1, 16, 12, 12)


def _conv(kind: str, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, **options)
    generator = torch.Generator().manual_seed(1)
    rows = {"shape": 1, "vector8": 4, "random": 32}[kind]
    mask = torch.rand(rows, 16, 3, 3, generator=generator) < 0.3
    with torch.no_grad():
        conv.weight.mul_(mask.repeat_interleave(32 // rows, 0))
    return conv


def _layer(module: nn.Module, shape: tuple[int, ...] = X) -> Layer:
    weight = module.weight
    density = float(weight.detach().ne(0).float().mean())  # type: ignore[operator, union-attr]
    return Layer(module, "relu", {shape: 1}, density)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module, shape, reason",
    [
        (_conv("shape"), X, None),
        (_conv("vector8"), X, None),
        (_conv("random"), X, "zeros without a pattern"),
        (nn.Conv2d(16, 32, 3), X, "density 1.00 above 0.9"),
        (_conv("shape").half(), X, "no kernel for float16 on cpu"),
        (_conv("shape", padding=1, padding_mode="reflect"), X, "padding_mode 'reflect'"),
        (_conv("shape"), X[1:], "input without a batch dimension"),
        (nn.Linear(16, 8), (1, 16), "not a convolution"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_where_it_applies(module: nn.Module, shape: tuple[int, ...], reason: str | None) -> None:
    assert CANDIDATES["pattern"].applies(_layer(module, shape)) == reason


def test_layers_of_another_pattern_are_timed_by_themselves() -> None:
    first, second = _layer(_conv("shape")), _layer(_conv("vector8"))
    second.density = first.density
    assert first.pattern == "shape" and second.pattern == "vector8"
    assert first.key() != second.key()
    assert first.key() == _layer(_conv("shape")).key()


def test_it_builds_a_layer_with_the_activation() -> None:
    layer = _layer(_conv("vector8"))
    built = CANDIDATES["pattern"].build(layer)
    assert isinstance(built, PatternConv2d) and built.activation == "relu"
    assert built is not CANDIDATES["pattern"].build(layer)
    x = torch.randn(X)
    torch.testing.assert_close(built(x), torch.relu(layer.module(x)))


def test_the_faster_of_two_kernels_is_taken(timer: Callable[..., FakeTimer]) -> None:
    net = nn.Sequential(_conv("shape"), nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()
    zero_weights(net[2], 0.8)
    for pattern_ms, kind in ((0.5, PatternConv2d), (1.5, None)):
        timer(pattern=pattern_ms)
        fast = accelerate(net, torch.randn(X))
        assert isinstance(fast[0], PatternConv2d) == (kind is PatternConv2d)
        assert fast.report.layers[0].kernel.split(" ")[0] == ("pattern" if kind else "csr")
        assert_same_function(net, fast, torch.randn(X))
        assert_same_function(net, densify(fast), torch.randn(X))
