"""Bad input is refused by name before any work."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from sparsecnn.accelerate import accelerate, accelerate_, densify, densify_
from sparsecnn.nn import CSRConv2d

X = torch.zeros(1, 3, 8, 8)


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


class Locked(nn.Module):
    """Holds something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def _named_report() -> nn.Module:
    net = _net()
    net.report = "mine"  # type: ignore[assignment]
    return net


def _compiled() -> nn.Module:
    return torch.compile(_net())  # type: ignore[return-value]


BAD: list[tuple[str, Any, Any, dict[str, Any], type[Exception], str]] = [
    ("no module", "resnet", X, {}, TypeError, "model to be an nn.Module, got str"),
    ("no layers", nn.Sequential(nn.ReLU()), X, {}, ValueError, "Conv2d or nn.Linear"),
    ("only 1-d", nn.Conv1d(3, 4, 1), X, {}, ValueError, "Conv2d or nn.Linear"),
    ("swapped", nn.Sequential(CSRConv2d(3, 4, 3)), X, {}, ValueError, "densify first"),
    ("wrapped", nn.DataParallel(_net()), X, {}, TypeError, "pass model.module"),
    ("compiled", _compiled, X, {}, TypeError, "_orig_mod"),
    ("lazy", nn.Sequential(nn.LazyConv2d(4, 3)), X, {}, ValueError, "lazy '0.weight'"),
    ("meta", nn.Conv2d(3, 4, 3, device="meta"), X, {}, ValueError, "one real device"),
    ("locked", Locked(), X, {}, ValueError, "copy.deepcopy"),
    ("has report", _named_report, X, {}, ValueError, "attribute 'report'"),
    ("list example", _net, [X], {}, TypeError, "got list"),
    ("empty tuple", _net, (), {}, TypeError, "an empty tuple"),
    ("no tensor", _net, (X, 3), {}, TypeError, "got Tensor, int"),
    ("empty batch", _net, torch.zeros(0, 3, 8, 8), {}, ValueError, r"shape \(0, 3, 8, 8\)"),
    ("channels", _net, torch.zeros(1, 5, 8, 8), {}, ValueError, r"got \(1, 5, 8, 8\)"),
    ("dtype", _net, X.double(), {}, ValueError, "torch.float64"),
    ("filter", _net, X, {"filter_fn": "conv"}, TypeError, "filter_fn to be callable"),
    ("candidates str", _net, X, {"candidates": "csr"}, TypeError, "sequence of names"),
    ("candidate", _net, X, {"candidates": ["fft"]}, ValueError, "among csr, pattern, got 'fft'"),
    ("warmup", _net, X, {"warmup": -1}, ValueError, "warmup >= 0, got -1"),
    ("runs", _net, X, {"runs": 0}, ValueError, "runs >= 1, got 0"),
    ("runs type", _net, X, {"runs": 2.5}, TypeError, "runs to be an int, got 2.5"),
    ("margin", _net, X, {"tie_margin": 3}, ValueError, r"tie_margin in \[0, 1\), got 3"),
    ("margin nan", _net, X, {"tie_margin": float("nan")}, ValueError, "got nan"),
    ("margin type", _net, X, {"tie_margin": "3%"}, TypeError, "tie_margin to be a number"),
]


@pytest.mark.filterwarnings("ignore:.*training mode")
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
@pytest.mark.parametrize("case", BAD, ids=[case[0] for case in BAD])
def test_bad_input(
    case: tuple[str, Any, Any, dict[str, Any], type[Exception], str], in_place: bool
) -> None:
    _, model, example, options, kind, text = case
    made = model() if callable(model) and not isinstance(model, nn.Module) else model
    verb = accelerate_ if in_place else accelerate
    with pytest.raises(kind, match=text) as caught:
        verb(made, example, **options)
    assert str(caught.value).startswith("accelerate")


def test_scripted_model() -> None:
    try:
        scripted = torch.jit.script(_net())
    except RuntimeError as error:  # gone from newer Pythons
        pytest.skip(str(error))
    with pytest.raises(TypeError, match="ScriptModule"):
        accelerate(scripted, X)


def test_bare_layer_in_place() -> None:
    with pytest.raises(ValueError, match="use accelerate"):
        accelerate_(nn.Conv2d(3, 4, 3), X)
    with pytest.raises(ValueError, match="use densify"):
        densify_(CSRConv2d(3, 4, 3))


@pytest.mark.parametrize("verb", [densify, densify_])
def test_densify_refuses_what_is_no_module(verb: Any) -> None:
    with pytest.raises(TypeError, match=r"densify_?: expected model to be an nn.Module, got str"):
        verb("model")
