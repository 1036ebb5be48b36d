"""TF32 as the user set it: which kernels get it, and what they are then compared with. No GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn import accelerate
from sparsecnn._accelerate import fold, survey
from sparsecnn._accelerate.assemble import Plan
from sparsecnn._accelerate.choice import difference
from sparsecnn._accelerate.fold import Folded
from sparsecnn._accelerate.kernels import CANDIDATES, Layer
from sparsecnn._accelerate.model import Variants
from sparsecnn._accelerate.outputs import OUTPUT_BOUND, compare
from sparsecnn._accelerate.precision import may_use_tf32, rounds_to_tf32
from sparsecnn._accelerate.record import Call
from sparsecnn.nn import FusedConv2d, PointwiseConv2d
from tests.accelerate.conftest import FakeTimer


class OnCuda:
    """What is asked of a weight, of one on a GPU."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def on_cuda(dtype: torch.dtype) -> bool:
    """`may_use_tf32` of a weight there."""
    return may_use_tf32(OnCuda(dtype))  # type: ignore[arg-type]


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on the CPU are built as those on CUDA would be."""
    monkeypatch.setattr(survey, "may_use_tf32", lambda weight: on_cuda(weight.dtype))


def rounded(t: Tensor) -> Tensor:
    """To TF32."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Rounding(PointwiseConv2d):
    """What the layer computes on CUDA."""

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.allow_tf32:
            x = rounded(x)
            self.weight.data = rounded(self.weight.data)
        return super()._run(x, residual)


def test_where_the_user_allows_it() -> None:
    backends: Any = torch.backends
    assert on_cuda(torch.float32)
    assert not on_cuda(torch.float16)
    assert not may_use_tf32(torch.zeros(1))
    before = backends.cudnn.conv.fp32_precision
    try:
        backends.cudnn.conv.fp32_precision = "ieee"
        assert not on_cuda(torch.float32)
    finally:
        backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("allowed", [True, False])
def test_candidates_are_built_with_it(allowed: bool) -> None:
    conv = nn.Conv2d(6, 4, 1)
    layer = Layer(conv, "relu", {(2, 6, 5, 5): 1}, 1.0, allow_tf32=allowed)
    built = CANDIDATES["pointwise"].build(layer)
    assert isinstance(built, PointwiseConv2d) and built.allow_tf32 is allowed
    assert rounds_to_tf32(nn.Sequential(nn.ReLU(), built)) is allowed
    assert allowed in layer.key() or not allowed


def test_another_module_with_such_a_name_is_not_ours() -> None:
    module = nn.ReLU()
    module.allow_tf32 = True  # type: ignore[assignment]
    assert not rounds_to_tf32(module)


@pytest.mark.parametrize("channels", [1, 16, 64])
@pytest.mark.parametrize("activation", ["none", "hardswish"])
def test_a_layer_is_compared_within_its_rounding(channels: int, activation: str) -> None:
    torch.manual_seed(channels)
    conv = nn.Conv2d(channels, 24, 1).requires_grad_(False)
    layer = Layer(conv, activation, {(1, channels, 12, 12): 1}, 1.0, allow_tf32=True)
    built = Rounding.from_dense(conv, activation=activation, allow_tf32=True)
    worst, wrong = difference(layer, built)
    assert not wrong and worst > 0
    built.allow_tf32 = False  # its weight stays rounded: more than float32 may differ
    assert "differs by" in difference(layer, built)[1]
    built.allow_tf32 = True
    built.weight[3] *= 1.05
    assert "differs by" in difference(layer, built)[1]


def test_outputs_are_compared_as_those_of_float16() -> None:
    old = [torch.tensor([1.0, 100.0])]
    near = [old[0] * (1 + 0.5 * OUTPUT_BOUND[torch.float16])]
    far = [old[0] * (1 + 2 * OUTPUT_BOUND[torch.float16])]
    assert "differ by" in compare(old, near)[1] and not compare(old, near, tf32=True)[1]
    assert "differ by" in compare(old, far, tf32=True)[1]
    double = [old[0].double()], [near[0].double()]
    assert "differ by" in compare(*double, tf32=True)[1]


class Block(nn.Module):
    """Two pointwise layers and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


class Net(nn.Module):
    """A block whose last layer is built again, with its activation, while outputs are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.block(torch.relu(self.first(x))))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_models_follow_the_setting(
    precision: str, like_cuda: None, timer: Callable[..., FakeTimer]
) -> None:
    timer(pointwise=1.0)
    backends: Any = torch.backends
    before = backends.cudnn.conv.fp32_precision
    backends.cudnn.conv.fp32_precision = precision
    try:
        fast = accelerate(Net().eval(), torch.randn(1, 3, 9, 9), candidates=["pointwise"])
        assert backends.cudnn.conv.fp32_precision == precision
    finally:
        backends.cudnn.conv.fp32_precision = before
    found = [m for m in fast.modules() if isinstance(m, PointwiseConv2d)]
    assert len(found) == 2 and {m.allow_tf32 for m in found} == {precision == "tf32"}
    assert found[1].activation == "relu"


def test_models_on_the_cpu_never_use_it(timer: Callable[..., FakeTimer]) -> None:
    timer(pointwise=1.0)
    fast = accelerate(Net().eval(), torch.randn(1, 3, 9, 9), candidates=["pointwise"])
    found = [m for m in fast.modules() if isinstance(m, PointwiseConv2d)]
    assert len(found) == 2 and not rounds_to_tf32(fast)


@pytest.mark.parametrize("allowed", [True, False])
def test_variants_with_it_get_its_bound(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        reference = model(x)
    variants = Variants(model, (x,), [reference], [], stable=True)
    kernel = PointwiseConv2d.from_dense(model[0], allow_tf32=allowed)
    with torch.no_grad():
        kernel.weight *= 1 + 0.3 * OUTPUT_BOUND[torch.float16]
    monkeypatch.setattr(variants, "build", lambda plan: nn.Sequential(kernel))
    assert bool(variants.disagreement(Plan("contiguous"))[1]) is not allowed


def test_foldings_are_compared_in_full_float32() -> None:
    seen: list[str] = []
    backends: Any = torch.backends

    class Watched(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(backends.cudnn.conv.fp32_precision)
            return super().forward(x)

    conv = Watched(3, 4, 1).eval()
    result = Folded(FusedConv2d.from_dense(nn.Conv2d(3, 4, 1)).to_dense(), "relu")
    call = Call(conv, None, (1, 3, 5, 5), torch.float32, False)
    fold._disagreement(conv, [nn.ReLU()], result, [call])
    assert seen and set(seen) == {"ieee"}
