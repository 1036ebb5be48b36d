"""FusedConv2d and apply_layout_: dense layers with their activation, models in one layout."""

from __future__ import annotations

import copy
import pickle
import unittest.mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsecnn.nn import FusedConv2d, apply_layout_
from tests import reference


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_fused_conv_is_conv_then_activation(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    fused = FusedConv2d.from_dense(conv, activation=name)
    x = 5 * torch.randn(2, 3, 6, 6)
    want = reference.activate(conv(x), name)
    torch.testing.assert_close(fused(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), want)
    assert type(fused.to_dense()) is nn.Conv2d
    assert torch.equal(fused.to_dense()(x), conv(x))
    # In place only where autograd does not need the input of the activation.
    x.requires_grad_()
    got = torch.autograd.grad(fused(x).square().sum(), [x, conv.weight])
    expected = torch.autograd.grad(
        reference.activate(conv(x), name).square().sum(), [x, conv.weight]
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
def test_a_filter_as_large_as_its_input_is_linear(
    layout: torch.memory_format, weight_layout: torch.memory_format
) -> None:
    conv = nn.Conv2d(6, 5, (3, 4))
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=layout)
    r = torch.randn(2, 5, 1, 1)
    with torch.no_grad():
        want = conv.double()(x.double())
    conv = conv.float().to(memory_format=weight_layout)  # type: ignore[call-overload]
    fused = FusedConv2d.from_dense(conv, activation="relu")
    torch.testing.assert_close(fused(x, r), (want.float() + r).relu())
    with torch.no_grad():
        with unittest.mock.patch.object(F, "linear", wraps=F.linear) as linear:
            torch.testing.assert_close(fused(x), want.float().relu())
            assert linear.call_count == 1
            fused(torch.randn(2, 6, 3, 5))
            assert linear.call_count == 1
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        FusedConv2d(6, 5, 3, dilation=2)(torch.randn(1, 6, 3, 3))


def test_fused_conv_does_not_touch_its_input() -> None:
    fused = FusedConv2d(3, 3, 1, bias=False, activation="relu")
    with torch.no_grad():
        fused.weight.copy_(torch.eye(3)[:, :, None, None])
        x = torch.randn(1, 3, 4, 4)
        before = x.clone()
        assert torch.equal(fused(x), before.relu())
    assert torch.equal(x, before)


def test_fused_conv_keeps_state_hooks_and_flags() -> None:
    seen: list[int] = []
    conv = nn.Conv2d(3, 4, 3).eval()
    conv.weight.requires_grad_(False)
    conv.register_forward_hook(lambda m, a, y: seen.append(1))
    fused = FusedConv2d.from_dense(conv, activation="silu")
    assert set(fused.state_dict()) == {"weight", "bias"}
    assert not fused.training and not fused.weight.requires_grad
    fused(torch.randn(1, 3, 5, 5))
    assert seen == [1]
    assert isinstance(fused, nn.Conv2d) and not hasattr(conv, "activation")
    plain = FusedConv2d(3, 4, 3, activation="relu6")
    other = pickle.loads(pickle.dumps(copy.deepcopy(plain)))
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(other(x), plain(x))
    assert "activation=relu6" in repr(other)
    fused.register_forward_pre_hook(lambda m, a: None)
    assert not conv._forward_pre_hooks


def test_fused_conv_refuses_unknown_activations() -> None:
    for make in (
        lambda: FusedConv2d(3, 4, 3, activation="gelu"),
        lambda: FusedConv2d.from_dense(nn.Conv2d(3, 4, 3), activation="gelu"),
    ):
        with pytest.raises(ValueError, match=r"FusedConv2d: expected activation .*got 'gelu'"):
            make()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_of_a_model(layout: str) -> None:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    x = torch.randn(2, 3, 8, 9)
    want = model(x)
    assert apply_layout_(model, layout) is model
    assert model[0].weight.is_contiguous(memory_format=form)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        y = model(given)
        assert y.is_contiguous(memory_format=form)
        torch.testing.assert_close(y, want)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert again(x).is_contiguous(memory_format=form)


def test_a_second_layout_replaces_the_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    apply_layout_(model, "channels_last")
    apply_layout_(model, "contiguous")
    assert len(model._forward_pre_hooks) == 1
    x = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    assert model(x).is_contiguous()
    with pytest.raises(ValueError, match=r"apply_layout_: expected layout .*got 'nhwc'"):
        apply_layout_(model, "nhwc")
