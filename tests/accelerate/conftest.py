"""A timer that returns what a test wants, and a timm that imports beside a CPU build of torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.measure import LatencyStats
from tests.models import prepare_torchvision

_TIMED = tuple(f"_accelerate.{name}" for name in ("choice", "model"))


def stats(
    ms: float, iqr_ms: float = 0.0, runs: int = 20, min_ms: float | None = None
) -> LatencyStats:
    """Statistics of a machine without tails."""
    s = ms * 1e-3
    fastest = s if min_ms is None else min_ms * 1e-3
    return LatencyStats(runs, s, s, s, iqr_ms * 1e-3, fastest)


class FakeTimer:
    """Stands in for the timer: runs everything once and returns the time set for its name.

    Times are looked up by full name ("csr channels_last") and then by the first word.
    """

    def __init__(self, times_ms: Mapping[str, float]) -> None:
        self.times_ms = dict(times_ms)
        self.asked: list[list[str]] = []
        self.iqr_ms = 0.0
        self.iqr_shrinks = False
        self.noisy_model_rounds = 0  # comparisons of whole models whose spread hides everything

    def __call__(
        self, fns: Mapping[str, Callable[[], object]], **options: Any
    ) -> dict[str, LatencyStats]:
        self.asked.append(list(fns))
        with torch.inference_mode():
            for fn in fns.values():
                fn()
        iqr = self.iqr_ms
        if self.iqr_shrinks:
            self.iqr_ms /= 100
        if self.models() and self.models()[-1] is self.asked[-1]:
            iqr = 100.0 if len(self.models()) <= self.noisy_model_rounds else iqr
        return {name: stats(self._ms(name), iqr) for name in fns}

    def _ms(self, name: str) -> float:
        first = name.split(" ")[0]
        # Every other kernel loses unless a test says otherwise.
        return self.times_ms.get(name, self.times_ms.get(first, LOSES))

    def models(self) -> list[list[str]]:
        """Names of the whole-model comparisons made."""
        return [names for names in self.asked if names[0].split(" ")[0] in MODEL_KINDS]


MODEL_KINDS = ("original", "folded", "fused", "swapped")
SPARSE_WINS = {
    "dense": 2.0, "csr": 1.0, "original": 9.0, "folded": 8.0, "fused": 7.0, "swapped": 5.0,
    "apart": 1.0,
}  # fmt: skip
LOSES = 20.0


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeTimer]:
    """Install a `FakeTimer`; by default sparse kernels and swapped models win."""

    def install(**changes: float) -> FakeTimer:
        fake = FakeTimer({**SPARSE_WINS, **changes})
        for name in _TIMED:
            module = importlib.import_module(f"sparsecnn.{name}")
            monkeypatch.setattr(module, "time_interleaved", fake)
        return fake

    return install


def zero_weights(model: nn.Module, sparsity: float, seed: int = 0) -> nn.Module:
    """Set a share of every convolution and linear weight to zero, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                keep = torch.rand(module.weight.shape, generator=generator) >= sparsity
                module.weight.mul_(keep)
    return model


def liven_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and scales as after training; fresh ones are the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            size = module.running_var.shape
            with torch.no_grad():
                module.running_mean.copy_(0.2 * torch.randn(size, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
                if module.weight is not None:
                    module.weight.copy_(0.5 + torch.rand(size, generator=generator))
                    module.bias.copy_(0.2 * torch.randn(size, generator=generator))
    return model


def assert_same_function(old: nn.Module, new: nn.Module, *inputs: Tensor) -> None:
    """Both models agree within the documented bound on the inputs, which are fresh data."""
    with torch.no_grad():
        want, got = old(*inputs), new(*inputs)
    error = float((want - got).abs().max())
    assert error <= 1e-3 * float(want.abs().max()), f"differ by {error}"
    assert float(want.abs().max()) > 0


def import_timm() -> Any:
    """The timm package; skips the test where it is not installed.

    torchvision, which it imports, may be built for another torch: `prepare_torchvision` helps it.
    """
    if importlib.util.find_spec("timm") is None or not prepare_torchvision():
        pytest.skip("timm is not installed")
    return importlib.import_module("timm")
