"""The short way of a layer in plain inference: the same results, and left where it does not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from sparsecnn.nn import ChainConv2d, CSRConv2d, DepthwiseConv2d, PointwiseConv2d
from sparsecnn.ops import _common
from tests.conftest import nan_filled_allocations


def _csr() -> nn.Module:
    conv = nn.Conv2d(6, 9, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape) < 0.3)
    return CSRConv2d.from_dense(conv, activation="relu")


def _depthwise() -> nn.Module:
    return DepthwiseConv2d.from_dense(nn.Conv2d(6, 6, 3, padding=1, groups=6), activation="relu6")


def _pointwise() -> nn.Module:
    return PointwiseConv2d.from_dense(nn.Conv2d(6, 9, 1), activation="silu")


def _chain() -> nn.Module:
    return ChainConv2d.from_sequential(
        nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    )


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "csr": _csr, "depthwise": _depthwise, "pointwise": _pointwise, "chain": _chain
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[request.param]().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 7, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call since took the short way."""
    taken: list[bool] = []
    original = _common.try_quick

    def spy(*args: object) -> Tensor | None:
        y = original(*args)  # type: ignore[arg-type]
        taken.append(y is not None)
        return y

    for name in LAYERS:
        monkeypatch.setattr(f"sparsecnn.nn.{name}.try_quick", spy)
    return taken


def test_the_same_bits_either_way(layer: nn.Module, x: Tensor, quick: list[bool]) -> None:
    for image in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2]):
        want = layer(image)  # a tape looks on
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), nan_filled_allocations():
                got = layer(image)
            assert torch.equal(got, want)
            assert not got.requires_grad
        residual = torch.randn(want.shape)
        want = layer(image, residual)
        with torch.no_grad():
            assert torch.equal(layer(image, residual), want)
    assert quick == [False, True, True, False, True] * 3


def test_not_under_a_watcher(layer: nn.Module, x: Tensor, quick: list[bool]) -> None:
    want = layer(x)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert quick == [False] * 2
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)
        assert True not in quick
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0


def test_computed_tensors_are_used(layer: nn.Module, x: Tensor, quick: list[bool]) -> None:
    class Double(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * t

    stage = layer.stages[1] if isinstance(layer, ChainConv2d) else layer
    with torch.no_grad():
        before = layer(x)
        prune.l1_unstructured(stage, "bias", amount=0.5)
        pruned = layer(x)
        assert not torch.equal(pruned, before)
        prune.remove(stage, "bias")
        assert torch.equal(layer(x), pruned)
        if isinstance(layer, CSRConv2d):  # torch cannot parametrize what is called "values"
            prune.l1_unstructured(stage, "values", amount=0.5)
            changed = layer(x)
            prune.remove(stage, "values")
        else:
            parametrize.register_parametrization(stage, "weight", Double())
            changed = layer(x)
            parametrize.remove_parametrizations(stage, "weight")
        assert not torch.equal(changed, pruned)
        torch.testing.assert_close(layer(x), changed)
    assert quick[0]


def test_depthwise_wants_its_own_channels(x: Tensor) -> None:
    layer = _depthwise()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="x with 6 channels"):
            layer(x[:, :3])  # the op would take two filters a channel


def test_refusals_keep_their_words(layer: nn.Module, x: Tensor) -> None:
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=r"expected x .*channels"):
                layer(x[:, :3])
            with pytest.raises(ValueError, match="expected residual"):
                layer(x, torch.zeros(1, 1, 1, 1))
            with pytest.raises(TypeError, match="of the dtype of x"):
                layer(x.double())
            with pytest.raises((ValueError, NotImplementedError), match=r"expected .* (?:on|CPU)"):
                layer(x.to("meta"))
