"""Messages of chain_conv2d and pointwise_conv2d: the argument, what was expected, the value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecnn.ops
from sparsecnn.ops import ChainStage
from tests.chains import ChainCase, build_chain, inverted
from tests.ops.chain import op_args, stages_of

X = torch.randn(2, 6, 5, 7)
DENSE = ChainStage(torch.randn(4, 6, 3, 3), torch.randn(4), padding=(1, 1, 1, 1))
WINDOW = ChainStage(torch.randn(4, 1, 3, 3), padding=(1, 1, 1, 1), groups=4)


def chain(*stages: ChainStage, x: Any = X, residual: Tensor | None = None) -> Tensor:
    return sparsecnn.ops.chain_conv2d(x, stages, residual=residual)


def but(stage: ChainStage, **changes: Any) -> ChainStage:
    return dataclasses.replace(stage, **changes)


CHAIN_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: chain(), ValueError, r"chain_conv2d: expected 1 to 8 stages, got 0"),
    (lambda: chain(*[WINDOW] * 9), ValueError, r"expected 1 to 8 stages, got 9"),
    (lambda: chain("conv"), TypeError, r"expected stages of ChainStage, got str"),
    (lambda: chain(but(DENSE, weight=3)), ValueError, r"shape \(K, C/G, R, S\), got int"),
    (lambda: chain(but(DENSE, weight=torch.ones(3, 3))), ValueError, r"got \(3, 3\)"),
    (
        lambda: chain(but(DENSE, stride=(0, 1))),
        ValueError,
        r"expected stride .* >= 1, got \(0, 1\)",
    ),
    (lambda: chain(but(DENSE, padding=(1, -1, 0, 0))), ValueError, r"expected padding .* >= 0"),
    (
        lambda: chain(but(DENSE, dilation=(1, 1.5))),
        ValueError,
        r"expected dilation .* got \(1, 1.5",
    ),
    (
        lambda: chain(but(DENSE, activation="gelu")),
        ValueError,
        r"expected activation one of .*gelu",
    ),
    (lambda: chain(but(DENSE, activation="relu,relu")), ValueError, r"one activation, got 'relu,"),
    (
        lambda: chain(but(DENSE, groups=2, weight=torch.randn(4, 3, 3, 3))),
        NotImplementedError,
        r"dense \(groups 1\) or depthwise \(groups = C = K\), got groups 2 with C = 6 and K = 4",
    ),
    (
        lambda: chain(but(DENSE, groups=6, weight=torch.randn(12, 1, 3, 3), bias=None)),
        NotImplementedError,
        r"got groups 6 with C = 6 and K = 12",
    ),
    (
        lambda: chain(but(DENSE, weight=torch.randn(0, 6, 1, 1), bias=None)),
        NotImplementedError,
        r"expected stages with channels, got weight \(0, 6, 1, 1\)",
    ),
    (lambda: chain(DENSE, x=X[0]), ValueError, r"stage 0: expected x of shape \(N, C, H, W\), got"),
    (lambda: chain(DENSE, x=[1]), ValueError, r"expected x of shape \(N, C, H, W\), got list"),
    (lambda: chain(DENSE, x=X[:, :5]), ValueError, r"stage 0: expected x with 6 channels .* got 5"),
    (lambda: chain(DENSE, DENSE), ValueError, r"stage 1: expected x with 6 channels .* got 4"),
    (
        lambda: chain(but(DENSE, bias=torch.ones(5))),
        ValueError,
        r"bias of shape \(4,\), got \(5,\)",
    ),
    (
        lambda: chain(DENSE, but(WINDOW, padding=(0, 0, 0, 0), weight=torch.ones(4, 1, 9, 1))),
        ValueError,
        r"stage 1: expected a kernel that fits the padded input, got kernel \(9, 1\)",
    ),
    (
        lambda: chain(DENSE, residual=X),
        ValueError,
        r"stage 0: expected residual of the output's shape \(2, 4, 5, 7\), got \(2, 6, 5, 7\)",
    ),
    (lambda: chain(DENSE, x=X.half()), TypeError, r"float32, bfloat16, float64 on cpu, got .*16"),
    (lambda: chain(DENSE, x=X.double()), TypeError, r"weight.dense of the dtype of x, .*64, got"),
    (lambda: chain(but(DENSE, bias=torch.ones(4).double())), TypeError, r"bias of the dtype of x"),
    (lambda: chain(but(DENSE, weight=DENSE.weight.to("meta"))), ValueError, r"device of x, cpu"),
]


@pytest.mark.parametrize(
    "call, kind, message", CHAIN_ERRORS, ids=[message for _, _, message in CHAIN_ERRORS]
)
def test_chain_errors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


W = torch.randn(4, 6, 1, 1)


def pointwise(x: Any = X, weight: Any = W, bias: Any = None, **options: Any) -> Tensor:
    return sparsecnn.ops.pointwise_conv2d(x, weight, bias, **options)


POINTWISE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X[0]}, ValueError, r"pointwise_conv2d: expected x of shape \(N, C, H, W\), got \(6, 5"),
    ({"x": X[:, :5]}, ValueError, r"expected x with 6 channels .* got 5"),
    ({"x": X[:, :0], "weight": W[:, :0]}, ValueError, r"expected x with channels, got \(2, 0"),
    ({"x": X.half(), "weight": W.half()}, TypeError, r"float64 on cpu, got torch.float16"),
    ({"weight": W.double()}, TypeError, r"expected weight.dense of the dtype of x"),
    ({"weight": torch.randn(4, 6, 3, 1)}, ValueError, r"shape \(K, C, 1, 1\), got \(4, 6, 3, 1\)"),
    ({"weight": torch.randn(4, 6)}, ValueError, r"expected weight of shape \(K, C, 1, 1\), got"),
    ({"weight": "w"}, ValueError, r"expected weight of shape \(K, C, 1, 1\), got str"),
    ({"bias": torch.randn(5)}, ValueError, r"expected bias of shape \(4,\), got \(5,\)"),
    ({"stride": 0}, ValueError, r"expected stride an int or a pair of ints >= 1, got 0"),
    ({"stride": (1, 2, 3)}, ValueError, r"expected stride an int or a pair"),
    ({"stride": 1.0}, ValueError, r"expected stride an int or a pair .* got 1.0"),
    ({"activation": "tanh"}, ValueError, r"expected activation one of none, .* got 'tanh'"),
    ({"residual": X}, ValueError, r"residual of the output's shape \(2, 4, 5, 7\), got \(2, 6"),
    ({"x": X.to("meta")}, ValueError, r"expected weight.dense on the device of x, meta, got cpu"),
    ({"allow_tf32": 1}, TypeError, r"pointwise_conv2d: expected allow_tf32 a bool, got 1"),
    ({"allow_tf32": "no"}, TypeError, r"expected allow_tf32 a bool, got 'no'"),
]


@pytest.mark.parametrize(
    "options, kind, message", POINTWISE_ERRORS, ids=[message for _, _, message in POINTWISE_ERRORS]
)
def test_pointwise_errors(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        pointwise(**options)


def changed(args: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*args[:place], value, *args[place + 1 :])


def test_a_direct_call_of_the_op_touches_no_foreign_memory() -> None:
    """The C++ checks, which stand alone against a call that Python has not checked."""
    problem = build_chain(ChainCase(inverted(9, 5), residual=True))
    op, args = torch.ops.sparsecnn.chain_conv2d.default, op_args(problem)
    wrong = {
        "expected x with 4 dimensions": (0, problem.x[0]),
        "1 to 8 stages, got 0": (1, []),
        "as many biases": (2, args[2][:2]),
        "residual of the output's shape": (3, problem.x[:, :3]),
        "has_bias for 3 stages": (4, [1, 1]),
        "2 strides, 4 pads": (5, [1, 1]),
        "padding >= 0": (6, [0, 0, 0, 0, -1, *args[6][5:]]),
        "dilation >= 1": (7, [1, 1, 0, 1, 1, 1]),
        "dense .groups 1. or depthwise": (8, [1, 3, 1]),
        "expected activation": (9, "none,gelu,none"),
    }
    for message, (place, value) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            op(*changed(args, place, value))
    with pytest.raises(RuntimeError, match="a weight for 5 channels, got 4"):
        op(*changed(args, 1, [args[1][0][:, :4], *args[1][1:]]))
    with pytest.raises(RuntimeError, match="bias of shape"):
        op(*changed(args, 2, [args[2][0][:3], *args[2][1:]]))
    with pytest.raises(RuntimeError, match="kernel that fits"):
        op(*changed(changed(args, 6, [0] * 12), 7, [1, 1, 9, 9, 1, 1]))
    dense = torch.ops.sparsecnn.pointwise_conv2d.default
    for message, call in {
        "weight of shape": (X, W[:, :, 0], None, None, [1, 1], "none"),
        "for the 6 channels of x, got 5": (X, W[:, :5], None, None, [1, 1], "none"),
        "stride": (X, W, None, None, [1], "none"),
        "bias of shape": (X, W, torch.ones(3), None, [1, 1], "none"),
        "got float16": (X.half(), W.half(), None, None, [1, 1], "none"),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            dense(*call)


def test_a_failed_call_leaves_the_next_one_alone() -> None:
    problem = build_chain(ChainCase(inverted(9, 5)))
    want = sparsecnn.ops.chain_conv2d(problem.x, stages_of(problem))
    with pytest.raises(ValueError):
        chain(DENSE, DENSE)
    assert torch.equal(sparsecnn.ops.chain_conv2d(problem.x, stages_of(problem)), want)
