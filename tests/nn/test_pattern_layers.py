"""PatternConv2d is what it replaces: arguments, values, state, hooks, training."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import sparsecnn
from sparsecnn.nn import PatternConv2d
from tests import reference

ARRAYS = {"values", "columns", "filters", "group_rows", "group_columns"}


def conv(*args: Any, seed: int = 0, keep: float = 0.5, **kwargs: Any) -> nn.Conv2d:
    """A dense convolution of which some columns are zero in all filters of a group."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(*args, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    k, c, r, s = layer.weight.shape
    g = layer.groups
    mask = torch.rand(g, 1, c, r, s, generator=generator) < keep
    with torch.no_grad():
        layer.weight.mul_(mask.expand(g, k // g, c, r, s).reshape(k, c, r, s).to(layer.weight))
    return layer


# Every argument of nn.Conv2d away from its default, alone and in pairs that interact.
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"kernel_size": (3, 5)},
    {"kernel_size": 1},
    {"stride": (1, 3)},
    {"padding": (0, 3)},
    {"padding": "valid"},
    {"padding": "same"},
    {"padding": "same", "kernel_size": (4, 2), "dilation": (2, 3)},
    {"dilation": (1, 3), "padding": 3},
    {"groups": 2},
    {"groups": 6},
    {"bias": False},
    {"padding_mode": "reflect", "padding": (1, 2)},
    {"padding_mode": "replicate", "padding": (2, 1)},
    {"padding_mode": "circular", "padding": "same", "kernel_size": (2, 3)},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"device": "cpu"},
]


def test_constructor_has_the_arguments_of_the_dense_layer() -> None:
    mine = inspect.signature(PatternConv2d).parameters
    theirs = inspect.signature(nn.Conv2d).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert mine[name].default == parameter.default, name
    assert set(mine) - set(theirs) == {"activation"}
    exercised = {name for arguments in ARGUMENTS for name in arguments}
    assert exercised | {"in_channels", "out_channels"} == set(theirs)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_every_argument_is_honoured(arguments: dict[str, Any]) -> None:
    arguments = {"kernel_size": 3} | arguments
    torch.manual_seed(1)
    fresh = nn.Conv2d(6, 12, **arguments)
    torch.manual_seed(1)
    ours = PatternConv2d(6, 12, **arguments)
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(fresh, name), name
    # A fresh layer starts with the weights nn.Conv2d draws from the same seed.
    assert torch.equal(ours.weight.to_dense(), fresh.weight)

    dense = conv(6, 12, **arguments)
    packed = PatternConv2d.from_dense(dense)
    x = torch.randn(2, 6, 9, 11).to(dense.weight.dtype)
    got, want = packed(x), dense(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 3e-2}[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    back = packed.to_dense()
    assert type(back) is nn.Conv2d and back.extra_repr() == dense.extra_repr()
    assert torch.equal(back.weight, dense.weight) and torch.equal(back(x), want)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_is_applied_after_the_residual(name: str) -> None:
    dense = conv(4, 8, 3, padding=1)
    packed = PatternConv2d.from_dense(dense, activation=name)
    x, residual = 3 * torch.randn(2, 4, 6, 7), 3 * torch.randn(2, 8, 6, 7)
    y = dense(x)
    torch.testing.assert_close(packed(x), reference.activate(y, name))
    torch.testing.assert_close(packed(x, residual), reference.activate(y + residual, name))
    torch.testing.assert_close(packed.to_dense()(x), y)


def test_unbatched_and_empty_inputs() -> None:
    dense = conv(4, 8, 3)
    packed = PatternConv2d.from_dense(dense)
    x = torch.randn(4, 6, 7)
    torch.testing.assert_close(packed(x), dense(x))
    y = packed(torch.randn(0, 4, 9, 8, requires_grad=True))
    assert y.shape == (0, 8, 7, 6)
    y.sum().backward()
    assert packed.values.grad is not None and not packed.values.grad.any()


def test_a_pattern_can_be_asked_for_and_is_printed() -> None:
    dense = conv(4, 8, 3)
    found, asked = PatternConv2d.from_dense(dense), PatternConv2d.from_dense(dense, "vector2")
    assert found.pattern == "shape" and asked.pattern == "vector2"
    assert asked.group_rows.tolist() == [0, 2, 4, 6, 8]
    assert f"pattern=shape, density={found.density:.3f}" in repr(found)
    assert found.nnz == asked.nnz == int(dense.weight.count_nonzero())
    with pytest.raises(ValueError, match=r"pattern '2:4' .*its pattern is 'shape'"):
        PatternConv2d.from_dense(dense, "2:4")
    with pytest.raises(TypeError, match=r"PatternConv2d: expected conv an nn\.Conv2d, got Linear"):
        PatternConv2d.from_dense(nn.Linear(3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected activation .*got 'gelu'"):
        PatternConv2d.from_dense(dense, activation="gelu")


# ---- what belongs to the user --------------------------------------------------------------------


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_independent(copier: str) -> None:
    packed = PatternConv2d.from_dense(conv(4, 8, 3, padding="same"), activation="silu")
    data = torch.randn(2, 4, 6, 7)
    want = packed(data)
    if copier == "deepcopy":
        other = copy.deepcopy(packed)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(packed))
    else:
        buffer = io.BytesIO()
        torch.save(packed, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(data), want) and repr(other) == repr(packed)
    with torch.no_grad():
        other.values.zero_()
    assert torch.equal(packed(data), want)


def test_state_dict_with_another_pattern_and_number_of_values() -> None:
    source = PatternConv2d.from_dense(conv(4, 8, 3, keep=0.3, seed=1))
    for assign in (False, True):
        target = PatternConv2d.from_dense(conv(4, 8, 3, keep=0.8, seed=2), "none")
        assert set(source.state_dict()) == ARRAYS | {"bias"}
        assert source.nnz != target.nnz and target.pattern == "none"
        result = target.load_state_dict(source.state_dict(), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        x = torch.randn(2, 4, 6, 6)
        assert torch.equal(target(x), source(x))
        assert target.values.requires_grad and isinstance(target.values, nn.Parameter)
        assert target.pattern == "shape"
        target.weight.validate()


def two_of_four() -> nn.Conv2d:
    """A dense convolution that keeps two of four channels of each tap, each filter its own."""
    layer = nn.Conv2d(8, 6, 3)
    order = torch.rand(6, 2, 4, 3, 3, generator=torch.Generator().manual_seed(4)).argsort(2)
    with torch.no_grad():
        layer.weight.mul_((order < 2).reshape(6, 8, 3, 3))
    return layer


def test_the_operator_is_told_the_pattern() -> None:
    layer = PatternConv2d.from_dense(two_of_four(), activation="relu").eval()
    assert layer.pattern == "2:4"
    graph = torch.export.export(layer, (torch.randn(1, 8, 5, 5),)).graph
    (call,) = (node for node in graph.nodes if "pattern_conv2d" in str(node.target))
    assert call.args[-2:] == ("2:4", "relu")


def test_a_ratio_goes_with_the_arrays_that_have_it() -> None:
    there = two_of_four()
    whole = nn.Conv2d(8, 6, 3)
    target = PatternConv2d.from_dense(there)
    target.load_state_dict(PatternConv2d.from_dense(whole, "none").state_dict())
    assert target.pattern != "2:4"
    target.load_state_dict(PatternConv2d.from_dense(there).state_dict())
    assert target.pattern == "2:4"
    # The same weight with its zeros stored: they train, and out of the pattern.
    padded = PatternConv2d.from_dense(whole, "none")
    with torch.no_grad():
        padded.values.copy_(there.weight.reshape(-1)[padded.weight.flat_indices()])
    target.load_state_dict(padded.state_dict())
    assert target.pattern == "none" and target.nnz == whole.weight.numel()
    target.weight.validate()


def test_a_dense_weight_loads() -> None:
    dense = conv(4, 8, 3, seed=5)
    packed = PatternConv2d(4, 8, 3)
    assert packed.density == 1
    packed.load_state_dict(dense.state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(packed(x), dense(x))
    assert packed.nnz == int(dense.weight.count_nonzero()) and packed.pattern == "shape"
    model, other = nn.Sequential(packed), nn.Sequential(PatternConv2d(4, 8, 3))
    other.load_state_dict({f"0.{name}": t for name, t in dense.state_dict().items()})
    assert torch.equal(other(x), model(x))


def test_bad_states_are_refused_by_name_and_leave_the_layer_alone() -> None:
    packed = PatternConv2d.from_dense(conv(4, 8, 3))
    good = packed.state_dict()
    before = {name: value.clone() for name, value in good.items()}
    wrong = {name: good[name].clone() for name in ARRAYS}
    wrong["columns"][0] = 36
    wrong["group_rows"][1] = -1
    wrong["filters"][0] = 1
    for change, message in (
        ({"columns": wrong["columns"]}, r"columns in \[0, 36\)"),
        ({"group_rows": wrong["group_rows"]}, r"group_rows"),
        ({"filters": wrong["filters"]}, r"filters a permutation"),
        ({"values": good["values"][:-1]}, r"expected \d+ values"),
    ):
        with pytest.raises(RuntimeError, match=f"PatternConv2d: .*{message}"):
            packed.load_state_dict(good | change)
        for name, value in packed.state_dict().items():
            assert torch.equal(value, before[name]), f"{message}: {name} changed"
    with pytest.raises(RuntimeError, match=r"PatternConv2d: expected weight of shape \(8, 4, 3, 3"):
        packed.load_state_dict({"weight": torch.zeros(8, 4, 1, 1), "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match="values"):
        packed.load_state_dict({"bias": torch.zeros(8)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_moves(dtype: torch.dtype) -> None:
    dense = conv(4, 8, 3)
    packed = PatternConv2d.from_dense(dense).to(dtype)
    assert packed.values.dtype == dtype and packed.bias is not None and packed.bias.dtype == dtype
    assert all(getattr(packed, name).dtype == torch.int32 for name in ARRAYS - {"values"})
    x = torch.randn(2, 4, 6, 6).to(dtype)
    bits = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(packed(x), dense.to(dtype)(x), rtol=bits, atol=bits)
    half = PatternConv2d.from_dense(conv(4, 8, 3)).half()
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        half(torch.randn(1, 4, 6, 6).half())


def test_flags_and_hooks_are_kept() -> None:
    dense = conv(4, 8, 3).eval()
    dense.weight.requires_grad_(False)
    seen: list[str] = []
    dense.register_forward_hook(lambda *_: seen.append("forward"))
    dense.register_forward_pre_hook(lambda *_: seen.append("pre"))
    packed = PatternConv2d.from_dense(dense)
    assert not packed.training and not packed.values.requires_grad
    assert packed.bias is dense.bias
    packed(torch.randn(1, 4, 5, 5))
    assert seen == ["pre", "forward"]
    back = packed.to_dense()
    assert not back.training and not back.weight.requires_grad
    back(torch.randn(1, 4, 5, 5))
    assert seen == ["pre", "forward"] * 2


def test_masks_and_parametrizations_are_baked_in() -> None:
    x = torch.randn(1, 4, 6, 6)
    dense = nn.Conv2d(4, 8, 3)
    prune.ln_structured(dense, "weight", amount=2, n=2, dim=1)
    packed = PatternConv2d.from_dense(dense)
    torch.testing.assert_close(packed(x), dense(x))
    assert packed.pattern == "shape" and packed.density == 0.5

    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    dense = conv(4, 8, 3)
    parametrize.register_parametrization(dense, "weight", Double())
    torch.testing.assert_close(PatternConv2d.from_dense(dense)(x), dense(x))


def test_training_moves_kept_entries_as_the_dense_layer_does() -> None:
    dense = conv(4, 8, 3, padding=1)
    packed = PatternConv2d.from_dense(copy.deepcopy(dense))
    mask = dense.weight.detach() != 0
    x = torch.randn(3, 4, 6, 6)
    for layer in (dense, packed):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            if layer is dense:
                assert dense.weight.grad is not None
                dense.weight.grad.mul_(mask)
            optimizer.step()
    torch.testing.assert_close(packed.weight.to_dense(), dense.weight)
    torch.testing.assert_close(packed.bias, dense.bias)


def test_channels_last_stays() -> None:
    packed = PatternConv2d.from_dense(conv(4, 8, 3))
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    y = packed(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def test_densify_gives_the_dense_layer_back() -> None:
    dense = conv(4, 8, 3)
    model = nn.Sequential(PatternConv2d.from_dense(dense), nn.ReLU())
    back = sparsecnn.densify(model)
    assert type(back[0]) is nn.Conv2d and torch.equal(back[0].weight, dense.weight)
    with pytest.raises(ValueError, match=r"dense layers, got PatternConv2d at '0'"):
        sparsecnn.accelerate(model, torch.randn(1, 4, 6, 6))
