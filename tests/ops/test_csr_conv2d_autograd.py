"""Gradients of csr_conv2d: numerically, exactly on integers, and of second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparsecnn.ops
from sparsecnn.formats.csr import CSRWeight
from tests import reference
from tests.cases import ConvCase, Problem, build
from tests.ops.csr import geometry, weight_of

SMALL = ConvCase(n=2, c=3, h=5, w=4, k=4, dtype=torch.float64)
GEOMETRIES = [
    SMALL,
    SMALL.but(kernel=(1, 1), padding=(0, 0, 0, 0)),
    SMALL.but(stride=(2, 2)),
    SMALL.but(stride=(3, 2), h=8, w=7, padding=(0, 0, 0, 0)),
    SMALL.but(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 3), h=6, w=8),
    SMALL.but(dilation=(2, 1), padding=(2, 2, 1, 1)),
    SMALL.but(padding=(0, 1, 2, 3)),
    SMALL.but(padding=(4, 3, 5, 4)),
    SMALL.but(kernel=(2, 3), padding=(1, 0, 1, 1), stride=(1, 2)),
    SMALL.but(c=4, k=6, groups=2),
    SMALL.but(c=3, k=6, groups=3, stride=(2, 1), density=0.6),
    SMALL.but(layout="channels_last"),
    SMALL.but(layout="sliced", residual=True),
    SMALL.but(n=1, h=1, w=1),
    SMALL.but(pattern="some_empty_rows"),
    SMALL.but(pattern="full"),
]


def call(problem: Problem, x: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
    """The function of the differentiable tensors alone; `rest` is (bias, residual) as present."""
    extra = list(rest)
    bias = extra.pop(0) if problem.bias is not None else None
    residual = extra.pop(0) if problem.residual is not None else None
    return sparsecnn.ops.csr_conv2d(
        x, weight_of(problem, values), bias, residual=residual, **geometry(problem)
    )


def leaves(problem: Problem) -> tuple[Tensor, ...]:
    tensors = (problem.x, problem.values, problem.bias, problem.residual)
    return tuple(t.detach().requires_grad_() for t in tensors if t is not None)


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.id)
def test_gradcheck_of_every_geometry(case: ConvCase) -> None:
    problem = build(case)
    assert torch.autograd.gradcheck(lambda *a: call(problem, *a), leaves(problem))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradcheck_of_every_epilogue(activation: str, residual: bool) -> None:
    # Four times the usual scale, so that relu6 and hardswish see both of their corners.
    problem = build(SMALL.but(activation=activation, residual=residual))
    tensors = tuple((4 * t.detach()).requires_grad_() for t in leaves(problem))
    pre = call(build(SMALL.but(residual=residual)), *tensors).detach()
    if activation == "hardswish":
        assert bool((pre < -3).any() and (pre > 3).any() and (pre.abs() < 3).any())
    if activation == "relu6":
        assert bool((pre < 0).any() and (pre > 6).any())
    assert torch.autograd.gradcheck(lambda *a: call(problem, *a), tensors)


@pytest.mark.parametrize(
    "case",
    [
        SMALL.but(c=2, k=3, h=4, n=1),
        SMALL.but(c=2, k=2, h=4, n=1, groups=2, stride=(2, 1), padding=(0, 1, 1, 0)),
        SMALL.but(c=2, k=2, h=4, n=1, kernel=(1, 1), padding=(0, 0, 0, 0)),
        SMALL.but(c=2, k=2, h=4, n=1, activation="silu", residual=True),
        SMALL.but(c=2, k=2, h=4, n=1, activation="relu"),
    ],
    ids=lambda case: case.id,
)
def test_gradgradcheck(case: ConvCase) -> None:
    problem = build(case)
    assert torch.autograd.gradgradcheck(lambda *a: call(problem, *a), leaves(problem))


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.id)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_float32_gradients_are_exact_on_integers(
    case: ConvCase, activation: str, backend: str
) -> None:
    case = case.but(dtype=torch.float32, integers=True, activation=activation, bias=True)
    problem = build(case, backend)
    tensors = leaves(problem)
    y = call(problem, *tensors)
    generator = torch.Generator().manual_seed(5)
    grad_y = torch.randint(-3, 4, y.shape, generator=generator).to(y)
    got = torch.autograd.grad(y, tensors, grad_y)

    dense = [t.detach().cpu().double().requires_grad_() for t in tensors]
    weight = problem.weight.double().requires_grad_()
    top, bottom, left, right = case.padding
    pre = torch.nn.functional.conv2d(
        torch.nn.functional.pad(dense[0], (left, right, top, bottom)),
        weight,
        dense[2],
        stride=case.stride,
        dilation=case.dilation,
        groups=case.groups,
    )
    if case.residual:
        pre = pre + dense[3]
    out = pre.relu() if activation == "relu" else pre
    wrt = [dense[0], weight, *dense[2:]]
    want = list(torch.autograd.grad(out, wrt, grad_y.cpu().double()))
    want[1] = want[1][problem.weight != 0]
    for name, g, w, t in zip(("x", "values", "bias", "residual"), got, want, tensors, strict=False):
        assert g.dtype == torch.float32 and g.shape == t.shape
        assert torch.equal(g.cpu().double(), w), f"{case.id}: gradient of {name}"


@pytest.mark.parametrize("wanted", ["x", "values", "bias", "residual"])
def test_each_gradient_alone(wanted: str) -> None:
    """Asking for one gradient gives the same as asking for all."""
    problem = build(SMALL.but(residual=True, activation="silu"))
    names = ("x", "values", "bias", "residual")
    tensors = leaves(problem)
    everything = torch.autograd.grad(call(problem, *tensors).sum(), tensors)
    which = names.index(wanted)
    alone = [t.detach() for t in tensors]
    alone[which].requires_grad_()
    y = call(problem, *alone)
    (only,) = torch.autograd.grad(y.sum(), alone[which])
    assert torch.equal(only, everything[which])


def test_no_graph_without_requires_grad() -> None:
    problem = build(SMALL)
    assert not sparsecnn.ops.csr_conv2d(problem.x, weight_of(problem)).requires_grad
    with torch.no_grad():
        assert not call(problem, *leaves(problem)).requires_grad


def test_gradient_of_an_expanded_grad_output() -> None:
    """`.sum().backward()` hands the backward an expanded, stride-0 tensor."""
    problem = build(SMALL.but(integers=True))
    tensors = leaves(problem)
    from_sum = torch.autograd.grad(call(problem, *tensors).sum(), tensors)
    y = call(problem, *tensors)
    from_ones = torch.autograd.grad(y, tensors, torch.ones_like(y).contiguous())
    for a, b in zip(from_sum, from_ones, strict=True):
        assert torch.equal(a, b)


def test_gradient_of_an_empty_batch() -> None:
    problem = build(SMALL.but(n=0))
    tensors = leaves(problem)
    grads = torch.autograd.grad(call(problem, *tensors).sum(), tensors)
    assert grads[0].shape == problem.x.shape
    assert not grads[1].any() and grads[1].shape == problem.values.shape
    assert not grads[2].any()


def test_backward_frees_and_refuses_a_second_pass() -> None:
    problem = build(SMALL)
    tensors = leaves(problem)
    y = call(problem, *tensors).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_gradient_reaches_the_source_of_the_values() -> None:
    """values may be computed (a mask times a dense weight): the chain goes on."""
    problem = build(SMALL)
    dense = problem.weight.clone().requires_grad_()
    mask = problem.weight.detach() != 0
    weight = CSRWeight(dense[mask], problem.col_idx, problem.row_ptr, problem.case.weight_shape)
    sparsecnn.ops.csr_conv2d(problem.x, weight, problem.bias, padding=1).square().sum().backward()
    assert dense.grad is not None
    assert bool((dense.grad[mask] != 0).any())
    assert not dense.grad[~mask].any()
