"""What only a GPU can show of the CUDA operators: graphs, streams, other devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecnn.formats.winograd import WinogradWeight
from tests.cases import ConvCase, Problem, build
from tests.ops import csr, depthwise, pattern
from tests.ops.chain import pointwise_args


@functools.cache
def winograd_values(weight: Tensor) -> Tensor:
    """The transform of a weight, made by the first call: a graph cannot record it."""
    return WinogradWeight.from_dense(weight, tile=2).values


def winograd_conv2d(p: Problem) -> Tensor:
    """The operator with the transform of a dense weight."""
    values, case = winograd_values(p.weight).to(p.x.device), p.case
    y: Tensor = torch.ops.sparsecnn.winograd_conv2d.default(
        p.x, values, None, None, p.bias, p.residual, case.k, 2, list(case.padding), case.groups,
        case.activation,
    )  # fmt: skip
    return y


CASE = ConvCase(n=2, c=8, h=13, w=11, k=8, residual=True, activation="relu", integers=True)


@functools.cache
def _pattern_arrays(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A weight in groups of three filters; kept, as packing waits for the device."""
    return pattern.pack(build(CASE.but(density=0.3, dtype=dtype), str(device)), 3).arrays


def _pattern_args(problem: Problem) -> tuple[Any, ...]:
    arrays = _pattern_arrays(problem.x.device, problem.x.dtype)
    return pattern.op_args(pattern.PatternProblem(problem, arrays))


OPS: dict[str, tuple[ConvCase, Callable[[Problem], Tensor]]] = {
    "csr_conv2d": (
        CASE.but(density=0.3),
        lambda p: torch.ops.sparsecnn.csr_conv2d.default(*csr.op_args(p)),
    ),
    "depthwise_conv2d": (
        depthwise.depthwise(CASE),
        lambda p: torch.ops.sparsecnn.depthwise_conv2d.default(*depthwise.op_args(p)),
    ),
    "pattern_conv2d": (
        CASE.but(density=0.3),
        lambda p: torch.ops.sparsecnn.pattern_conv2d.default(*_pattern_args(p)),
    ),
    "winograd_conv2d": (CASE.but(pattern="full"), winograd_conv2d),
    "pointwise_conv2d": (
        CASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), pattern="full"),
        lambda p: torch.ops.sparsecnn.pointwise_conv2d.default(*pointwise_args(p, p.weight)),
    ),
}
LAYOUTS = ("contiguous", "channels_last")


def _as_chain(problem: Problem) -> Tensor:
    """A dense 3x3 stage, a depthwise one and a pointwise one with the residual."""
    w, eye = problem.weight, torch.eye(8, device=problem.x.device, dtype=problem.x.dtype)
    weights = [w, w[:, :1].contiguous(), eye.view(8, 8, 1, 1)]
    y: Tensor = torch.ops.sparsecnn.chain_conv2d.default(
        problem.x, weights, [], problem.residual, [0, 0, 0], [1] * 6, [1] * 8 + [0] * 4, [1] * 6,
        [1, 8, 1], "none,relu,relu",
    )  # fmt: skip
    return y


OPS["chain_conv2d"] = (CASE.but(pattern="full"), _as_chain)


def on(device: str, name: str, layout: str) -> tuple[Problem, Callable[[Problem], Tensor]]:
    """A problem of an op with every tensor on a device, and the call."""
    case, call = OPS[name]
    problem = build(case.but(layout=layout), device)
    return dataclasses.replace(problem, weight=problem.weight.to(device)), call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_graph_capture(name: str, layout: str, cuda: str) -> None:
    problem, call = on(cuda, name, layout)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(problem)  # what a first call allocates stays out of the graph
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(problem)
    for scale in (1, -2):
        problem.x.mul_(scale)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, call(problem))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name: str, layout: str, cuda: str) -> None:
    problem, call = on(cuda, name, layout)
    want = call(problem)
    late = dataclasses.replace(problem, x=torch.full_like(problem.x, float("nan")))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some 30 ms: another stream would read the NaN
        late.x.copy_(problem.x)
        y = call(late)
    side.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("name", OPS)
def test_tensors_on_another_device(name: str, cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    first, call = on("cuda:0", name, "contiguous")
    second, _ = on("cuda:1", name, "contiguous")
    y = call(second)  # device 0 is the current one
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), call(first).cpu())


@pytest.mark.parametrize("name", OPS)
def test_float64_is_refused(name: str, cuda: str) -> None:
    case, call = OPS[name]
    with pytest.raises(RuntimeError, match=f"{name}: expected float32, float16 or bfloat16"):
        call(build(case.but(dtype=torch.float64), cuda))
