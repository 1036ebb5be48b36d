"""pattern_conv2d of 2:4 weights: on CUDA they have a kernel of their own."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from sparsecnn.formats.pattern import PatternWeight
from sparsecnn.nn import PatternConv2d
from tests.ops import two_four
from tests.ops.pattern import NAMES, check, op_args, run_function, run_op

TYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("case", two_four.GEOMETRIES, ids=lambda case: case.id)
def test_result(case: two_four.ConvCase, backend: str) -> None:
    for number, dtype in enumerate(TYPES[backend]):
        check(two_four.two_four(case.but(dtype=dtype), 1 + number, backend))


@pytest.mark.parametrize("size", [14, 56])
def test_larger_layers(size: int, backend: str) -> None:
    case = two_four.BASE.but(n=3, c=128, k=256, h=size, w=size, residual=True, integers=False)
    for dtype in TYPES[backend]:
        p = two_four.two_four(case.but(dtype=dtype), 1, backend)
        y = check(p)
        assert torch.equal(run_function(p), y)
        assert torch.equal(run_op(p), y)  # the same sums in every call


def test_a_name_that_does_not_hold(backend: str) -> None:
    """A CPU takes the weight as it is; CUDA says NaN where it would have to leave one out."""
    p = two_four.two_four(two_four.BASE.but(dtype=torch.bfloat16), 1, backend)
    dense = p.problem.weight.cpu().clone()
    dense[3, 8:11, 2, 0] = 1
    broken = PatternWeight.from_dense(dense, 1, "none")
    arrays = tuple(getattr(broken, name).to(backend) for name in NAMES)
    problem = dataclasses.replace(p.problem, weight=dense)
    y = run_op(dataclasses.replace(p, problem=problem, arrays=arrays)).cpu()
    if backend == "cuda":
        assert bool(y[:, 3].isnan().all())
        y[:, 3] = problem.expected()[:, 3].to(y.dtype)
    assert torch.equal(y, problem.expected().to(y.dtype))


def test_a_layer_in_channels_last(backend: str) -> None:
    p = two_four.two_four(two_four.BASE.but(dtype=torch.bfloat16, c=128, bias=False), 1, backend)
    conv = torch.nn.Conv2d(128, 40, 3, padding=1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        conv.weight.copy_(p.problem.weight)
    layer = PatternConv2d.from_dense(conv, "2:4").to(backend).eval()
    with torch.no_grad():
        p.problem.check(layer(p.problem.x))


@pytest.mark.parametrize("channels", [64, 2048])  # whole, split into parts
def test_graph_capture_with_a_workspace(channels: int, cuda: str) -> None:
    p = two_four.two_four(two_four.BASE.but(c=channels), 1, cuda)
    x = p.problem.x.clone()
    p = dataclasses.replace(p, problem=dataclasses.replace(p.problem, x=x))
    run = functools.partial(torch.ops.sparsecnn.pattern_conv2d.default, *op_args(p))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for scale in (1, -2):
        x.mul_(scale)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, run())
