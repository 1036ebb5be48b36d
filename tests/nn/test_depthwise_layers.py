"""DepthwiseConv2d is the nn.Conv2d it replaces: arguments, values, state, hooks, training."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparsecnn.nn import DepthwiseConv2d
from tests import reference

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"kernel_size": (3, 5)},
    {"kernel_size": 1},
    {"out_channels": 18},
    {"stride": 2},
    {"stride": (1, 3)},
    {"padding": 2},
    {"padding": (0, 3)},
    {"padding": "valid"},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "same", "kernel_size": (4, 2), "dilation": (2, 3)},
    {"dilation": (1, 3), "padding": 3},
    {"bias": False},
    {"padding_mode": "reflect", "padding": (1, 2)},
    {"padding_mode": "circular", "padding": "same", "kernel_size": (2, 3)},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"device": "cpu"},
]


def conv(**arguments: Any) -> nn.Conv2d:
    """A depthwise convolution of six channels."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"out_channels": 6, "kernel_size": 3, "groups": 6} | arguments
    return nn.Conv2d(6, options.pop("out_channels"), options.pop("kernel_size"), **options)


def image(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def test_constructor_has_the_arguments_of_the_dense_layer() -> None:
    mine, theirs = (inspect.signature(c).parameters for c in (DepthwiseConv2d, nn.Conv2d))
    assert list(mine)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert mine[name].default == parameter.default, name
    assert set(mine) - set(theirs) == {"activation"}
    exercised = {name for arguments in ARGUMENTS for name in arguments} | {"in_channels", "groups"}
    assert exercised == set(theirs)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_every_argument_is_honoured_and_comes_back(arguments: dict[str, Any]) -> None:
    dense = conv(**arguments)
    options: dict[str, Any] = {"out_channels": 6, "kernel_size": 3, "groups": 6} | arguments
    torch.manual_seed(0)
    fresh = DepthwiseConv2d(6, options.pop("out_channels"), options.pop("kernel_size"), **options)
    assert torch.equal(fresh.weight, dense.weight)  # the initialisation of nn.Conv2d
    ours = DepthwiseConv2d.from_dense(dense)
    x = image(2, 6, 9, 11).to(dense.weight.dtype)
    got, want = ours(x), dense(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 3e-2}[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    back = ours.to_dense()
    assert type(back) is nn.Conv2d and back.extra_repr() == dense.extra_repr()
    assert torch.equal(back(x), want)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_is_applied_after_the_residual(name: str) -> None:
    dense = conv(padding=1)
    ours = DepthwiseConv2d.from_dense(dense, activation=name)
    x, residual = 3 * image(2, 6, 6, 7), 3 * image(2, 6, 6, 7).flip(0)
    y = dense(x)
    torch.testing.assert_close(ours(x), reference.activate(y, name))
    torch.testing.assert_close(ours(x, residual), reference.activate(y + residual, name))
    torch.testing.assert_close(ours.to_dense()(x), y)
    assert f"activation={name}" in repr(ours)


def test_unbatched_and_empty_input_and_memory_format() -> None:
    dense = conv(stride=2)
    ours = DepthwiseConv2d.from_dense(dense)
    x = image(6, 7, 8)
    torch.testing.assert_close(ours(x), dense(x))
    assert ours(image(0, 6, 7, 8)).shape == (0, 6, 3, 3)
    nhwc = image(2, 6, 7, 8).contiguous(memory_format=torch.channels_last)
    ours = ours.to(memory_format=torch.channels_last)
    assert ours(nhwc).is_contiguous(memory_format=torch.channels_last)


def test_state_dicts_are_interchangeable() -> None:
    dense, ours = conv(), DepthwiseConv2d(6, 6, 3, groups=6)
    assert list(ours.state_dict()) == list(dense.state_dict())
    x = image(2, 6, 7, 8)
    ours.load_state_dict(dense.state_dict())
    torch.testing.assert_close(ours(x), dense(x))
    with torch.no_grad():
        ours.weight.mul_(2)
    dense.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), dense(x))
    with pytest.raises(RuntimeError, match="weight"):
        ours.load_state_dict({"weight": torch.zeros(6, 1, 5, 5), "bias": torch.zeros(6)})


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_independent(copier: str) -> None:
    ours = DepthwiseConv2d.from_dense(conv(padding="same"), activation="silu")
    x = image(2, 6, 7, 8)
    want = ours(x)
    if copier == "deepcopy":
        other = copy.deepcopy(ours)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), want) and repr(other) == repr(ours)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(ours(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_moves(dtype: torch.dtype) -> None:
    ours = DepthwiseConv2d.from_dense(conv(padding=1)).to(dtype)
    x = image(2, 6, 7, 8).to(dtype)
    bits = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours(x), conv(padding=1).to(dtype)(x), rtol=bits, atol=bits)
    assert ours.to("meta")(x.to("meta")).shape == (2, 6, 7, 8)
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        DepthwiseConv2d.from_dense(conv()).half()(image(1, 6, 7, 8).half())


def test_flags_are_kept() -> None:
    for frozen in (False, True):
        for training in (False, True):
            dense = conv().train(training)
            dense.weight.requires_grad_(not frozen)
            assert dense.bias is not None
            dense.bias.requires_grad_(frozen)
            for layer in (ours := DepthwiseConv2d.from_dense(dense), ours.to_dense()):
                assert layer.training == training
                assert layer.weight.requires_grad == (not frozen)
                assert layer.bias is not None and layer.bias.requires_grad == frozen


def test_training_moves_it_as_the_dense_layer() -> None:
    dense = conv(padding=1)
    ours = DepthwiseConv2d.from_dense(copy.deepcopy(dense), activation="relu")
    x = image(2, 6, 7, 8)
    for layer, function in ((dense, lambda x: dense(x).relu()), (ours, ours)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            function(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, dense.weight)
    torch.testing.assert_close(ours.bias, dense.bias)


def test_hooks_come_along() -> None:
    dense = conv()
    seen: list[str] = []
    dense.register_forward_hook(lambda *a: seen.append("after"))
    dense.register_forward_pre_hook(lambda *a: seen.append("before"))
    DepthwiseConv2d.from_dense(dense)(image(1, 6, 7, 8))
    assert seen == ["before", "after"]


def test_masks_and_parametrizations_are_baked_in() -> None:
    masked = prune.random_unstructured(conv(), "weight", amount=0.5)
    x = image(1, 6, 7, 8)
    ours = DepthwiseConv2d.from_dense(masked)
    assert isinstance(ours.weight, nn.Parameter) and not ours._forward_pre_hooks
    torch.testing.assert_close(ours(x), masked(x))

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrized = conv()
    parametrize.register_parametrization(parametrized, "weight", Double())
    torch.testing.assert_close(DepthwiseConv2d.from_dense(parametrized)(x), parametrized(x))


def test_what_is_not_depthwise_is_refused_by_name() -> None:
    message = r"DepthwiseConv2d: expected groups = in_channels = 6, got"
    with pytest.raises(ValueError, match=rf"{message} 2"):
        DepthwiseConv2d.from_dense(nn.Conv2d(6, 6, 3, groups=2))
    with pytest.raises(ValueError, match=rf"{message} 1"):
        DepthwiseConv2d(6, 6, 3)
    with pytest.raises(TypeError, match=r"expected conv an nn\.Conv2d, got Linear"):
        DepthwiseConv2d.from_dense(nn.Linear(2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected activation one of none, .*got 'tanh'"):
        DepthwiseConv2d(6, 6, 3, groups=6, activation="tanh")
    with pytest.raises(ValueError, match=r"expected x with 6 channels, got \(1, 5"):
        DepthwiseConv2d.from_dense(conv())(image(1, 5, 7, 8))
