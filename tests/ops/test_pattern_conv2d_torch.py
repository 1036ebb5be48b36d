"""pattern_conv2d inside torch: opcheck, gradients, compile, export, autocast, FLOP counting."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import sparsecnn.ops
from sparsecnn.formats.pattern import PatternWeight
from sparsecnn.nn import PatternConv2d
from tests import reference, tolerance
from tests.cases import LAYOUTS, ConvCase
from tests.ops.pattern import (
    PatternProblem,
    geometry,
    make,
    op_args,
    run_function,
    run_op,
    weight_of,
)

OPCHECK_CASES = [
    ConvCase(),
    ConvCase(layout="channels_last", residual=True, activation="silu"),
    ConvCase(layout="sliced", stride=(2, 1), padding=(0, 1, 2, 3), bias=False),
    ConvCase(c=6, k=4, groups=2, dilation=(2, 1), activation="relu"),
    ConvCase(n=0),
    ConvCase(kernel=(1, 1), padding=(0, 0, 0, 0), dtype=torch.bfloat16),
    ConvCase(pattern="empty"),
]


def name_of(value: int | ConvCase) -> str:
    return value.id if isinstance(value, ConvCase) else str(value)


@pytest.mark.parametrize("number, case", list(enumerate(OPCHECK_CASES)), ids=name_of)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(number: int, case: ConvCase, grad: bool) -> None:
    args = op_args(make(case, number + 2))
    if grad:
        args = tuple(
            a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in args
        )
    # Autograd of one dtype is compared with itself: bfloat16 rounds, so it gets a wide tolerance.
    tolerance: dict[str, Any] = {}
    if case.dtype == torch.bfloat16:
        tolerance = {"rtol": 2e-2, "atol": 2e-2}
    results = torch.library.opcheck(
        torch.ops.sparsecnn.pattern_conv2d.default, args, raise_exception=True, **tolerance
    )
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


SMALL = ConvCase(n=1, c=3, h=4, w=3, k=4, dtype=torch.float64)
GEOMETRIES = [
    SMALL,
    SMALL.but(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 3), h=6, w=8),
    SMALL.but(stride=(3, 2), h=8, w=7, padding=(0, 0, 0, 0)),
    SMALL.but(dilation=(2, 1), padding=(2, 2, 1, 1)),
    SMALL.but(padding=(0, 1, 2, 3)),
    SMALL.but(padding=(4, 3, 5, 4), stride=(2, 1)),
    SMALL.but(c=4, k=6, groups=2),
    SMALL.but(layout="channels_last"),
    SMALL.but(layout="sliced", residual=True),
    SMALL.but(n=1, h=1, w=1),
    SMALL.but(pattern="some_empty_rows"),
    SMALL.but(pattern="full"),
]


def call(p: PatternProblem, x: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
    """The function of the differentiable tensors alone; `rest` is (bias, residual) as present."""
    extra = list(rest)
    bias = extra.pop(0) if p.problem.bias is not None else None
    residual = extra.pop(0) if p.problem.residual is not None else None
    return sparsecnn.ops.pattern_conv2d(
        x, weight_of(p, values), bias, residual=residual, **geometry(p)
    )


def leaves(p: PatternProblem) -> tuple[Tensor, ...]:
    tensors = (p.problem.x, p.values, p.problem.bias, p.problem.residual)
    return tuple(t.detach().requires_grad_() for t in tensors if t is not None)


@pytest.mark.parametrize("number, case", list(enumerate(GEOMETRIES)), ids=name_of)
def test_gradcheck_of_every_geometry(number: int, case: ConvCase) -> None:
    p = make(case, number)
    assert torch.autograd.gradcheck(lambda *a: call(p, *a), leaves(p))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradcheck_of_every_epilogue(activation: str, residual: bool) -> None:
    # Four times the usual scale, so that relu6 and hardswish see both of their corners.
    p = make(SMALL.but(n=1, h=3, w=3, activation=activation, residual=residual), 2)
    tensors = tuple((4 * t.detach()).requires_grad_() for t in leaves(p))
    assert torch.autograd.gradcheck(lambda *a: call(p, *a), tensors)


@pytest.mark.parametrize(
    "case",
    [
        SMALL.but(c=2, k=3, h=4, n=1),
        SMALL.but(c=2, k=2, h=4, n=1, groups=2, stride=(2, 1), padding=(0, 1, 1, 0)),
        SMALL.but(c=2, k=2, h=4, n=1, activation="silu", residual=True),
        SMALL.but(c=2, k=2, h=4, n=1, activation="relu"),
    ],
    ids=lambda case: case.id,
)
def test_gradgradcheck(case: ConvCase) -> None:
    p = make(case, 2)
    assert torch.autograd.gradgradcheck(lambda *a: call(p, *a), leaves(p))


@pytest.mark.parametrize("number, case", list(enumerate(GEOMETRIES)), ids=name_of)
def test_float32_gradients_are_exact_on_integers(number: int, case: ConvCase) -> None:
    p = make(case.but(dtype=torch.float32, integers=True, activation="relu", bias=True), number)
    tensors = leaves(p)
    y = call(p, *tensors)
    generator = torch.Generator().manual_seed(5)
    grad_y = torch.randint(-3, 4, y.shape, generator=generator).to(y)
    got = torch.autograd.grad(y, tensors, grad_y)

    dense = [t.detach().double().requires_grad_() for t in tensors]
    weight = p.problem.weight.double().requires_grad_()
    top, bottom, left, right = case.padding
    padded = nn.functional.pad(dense[0], (left, right, top, bottom))
    pre = nn.functional.conv2d(
        padded, weight, dense[2], stride=case.stride, dilation=case.dilation, groups=case.groups
    )
    if case.residual:
        pre = pre + dense[3]
    wrt = [dense[0], weight, *dense[2:]]
    want = list(torch.autograd.grad(pre.relu(), wrt, grad_y.double()))
    # The gradient of the values, put where they are, is the dense one at the kept positions.
    placed = reference.pattern_to_dense(got[1], *p.arrays[1:], case.weight_shape)
    assert torch.equal(placed, want[1] * (p.problem.weight != 0))
    for i, name in ((0, "x"), (2, "bias"), (3, "residual")):
        if i < len(got):
            assert torch.equal(got[i].double(), want[i]), name


def test_each_gradient_alone() -> None:
    p = make(SMALL.but(residual=True, activation="silu"), 3)
    tensors = leaves(p)
    everything = torch.autograd.grad(call(p, *tensors).sum(), tensors)
    for which in range(4):
        alone = [t.detach() for t in tensors]
        alone[which].requires_grad_()
        (only,) = torch.autograd.grad(call(p, *alone).sum(), alone[which])
        assert torch.equal(only, everything[which])


def test_gradient_of_an_empty_batch() -> None:
    p = make(SMALL.but(n=0), 2)
    tensors = leaves(p)
    grads = torch.autograd.grad(call(p, *tensors).sum(), tensors)
    assert grads[0].shape == p.problem.x.shape
    assert not grads[1].any() and grads[1].shape == p.values.shape
    assert not grads[2].any()


def test_gradient_reaches_the_source_of_the_values() -> None:
    """values may be computed (a mask times a dense weight): the chain goes on."""
    p = make(SMALL, 4)
    dense = p.problem.weight.clone().requires_grad_()
    places = weight_of(p).flat_indices()
    weight = weight_of(p, dense.reshape(-1)[places])
    sparsecnn.ops.pattern_conv2d(p.problem.x, weight, padding=1).square().sum().backward()
    mask = p.problem.weight != 0
    assert dense.grad is not None
    assert bool((dense.grad[mask] != 0).any()) and not dense.grad[~mask].any()


class Net(nn.Module):
    """Two structured convolutions of different geometry around a dense operation."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, second = nn.Conv2d(3, 8, 3, (2, 1), 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            for conv in (first, second):
                conv.weight.normal_(generator=generator)
                conv.weight[:, 1] = 0
        self.first = PatternConv2d.from_dense(first, activation="relu")
        self.second = PatternConv2d.from_dense(second, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, P, Q)."""
        y: Tensor = self.second(self.first(x) * 2)
        return y


SHAPES = [(2, 3, 9, 8), (3, 3, 12, 10), (5, 3, 7, 17), (4, 3, 30, 21)]


def test_compile_once_for_all_shapes() -> None:
    torch._dynamo.reset()
    net = Net().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for shape in SHAPES:
            x = torch.randn(shape)
            assert torch.equal(compiled(x), net(x)), shape
    assert counter.frame_count == 1


def test_compile_training_step() -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in SHAPES[:2]:
        x = torch.randn(shape)
        net.zero_grad()
        net(x).square().sum().backward()
        want = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        compiled(x).square().sum().backward()
        got = [p.grad for p in net.parameters()]
        assert len(want) == len(got) == 4
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a)


def test_export_with_dynamic_shapes_and_load() -> None:
    net = Net().eval()
    dims = {"x": {0: Dim("n", min=1), 2: Dim("h", min=3), 3: Dim("w", min=3)}}
    exported = torch.export.export(net, (torch.randn(2, 3, 9, 8),), dynamic_shapes=dims)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("sparsecnn.pattern_conv2d.default") == 2
    for shape in [*SHAPES, (1, 3, 4, 4)]:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), net(x)), shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 2])
def test_fake_and_meta_predict_the_result(layout: str, n: int) -> None:
    p = make(ConvCase(n=n, layout=layout, residual=True, stride=(2, 1), c=7), 5)
    y = run_op(p)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in op_args(p)]
        fake = torch.ops.sparsecnn.pattern_conv2d.default(*fakes)
    metas = [a.to("meta") if isinstance(a, Tensor) else a for a in op_args(p)]
    meta = torch.ops.sparsecnn.pattern_conv2d.default(*metas)
    assert fake.shape == meta.shape == y.shape
    assert fake.dtype == meta.dtype == y.dtype
    assert fake.device == y.device and meta.device.type == "meta"
    assert fake.stride() == y.stride()


def test_autocast_runs_in_bfloat16() -> None:
    case = ConvCase(residual=True, activation="relu")
    p, cast = make(case, 3), make(case, 3)
    assert cast.problem.bias is not None and cast.problem.residual is not None
    for name in ("x", "bias", "residual"):
        object.__setattr__(cast.problem, name, getattr(cast.problem, name).bfloat16())
    want = run_op(cast.but(values=cast.values.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_function(p)
        direct = torch.ops.sparsecnn.pattern_conv2d.default(*op_args(p))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want) and torch.equal(direct, want)


def test_autocast_trains_float32_parameters() -> None:
    p = make(ConvCase(), 3)
    values = p.values.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparsecnn.ops.pattern_conv2d(p.problem.x, weight_of(p, values), padding=1)
    y.float().square().sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.float32
    # y' = fl(sum x' w') of rounded x' and w', then fl(sum x' 2 y') rounded once; u is bfloat16's.
    u, x, weight = tolerance.unit_roundoff(torch.bfloat16), p.problem.x, p.problem.weight
    around: dict[str, Any] = {"padding": (1, 1, 1, 1)}
    exact = reference.conv2d(x, weight, **around)
    off = ((1 + u) ** 3 - 1) * reference.conv2d_magnitude(x, weight, **around)

    def of_weight(grad: Tensor, image: Tensor) -> Tensor:
        """Places of the weight that are stored, in the order of the values."""
        places = weight_of(p).flat_indices()
        shape = p.problem.case.weight_shape
        return reference.conv2d_grad_weight(grad, image, shape, **around).reshape(-1)[places]

    want = of_weight(2 * exact, x)
    magnitude = of_weight(2 * (exact.abs() + off), x.abs() * (1 + u))
    bound = of_weight(2 * off, x.abs() * (1 + u)) + u * of_weight(2 * exact.abs(), x.abs())
    bound += 2 * 9 * 8 * tolerance.unit_roundoff(torch.float32) * 2 * magnitude
    bound += u * (want.abs() + bound)
    tolerance.assert_within(values.grad, want, bound, "values")


@pytest.mark.parametrize("number, case", list(enumerate(OPCHECK_CASES)), ids=name_of)
def test_flops_count_stored_values(number: int, case: ConvCase) -> None:
    p = make(case, number)
    height, width = case.out_size
    with FlopCounterMode(display=False) as counter:
        run_function(p)
    assert counter.get_total_flops() == 2 * p.values.numel() * case.n * height * width


def test_linear_layers_as_one_by_one_filters() -> None:
    weight = torch.randn(12, 20)
    weight[:, ::2] = 0
    packed = PatternWeight.from_dense(weight)
    x = torch.randn(5, 20)
    y = sparsecnn.ops.pattern_conv2d(x[:, :, None, None], packed)
    torch.testing.assert_close(y[:, :, 0, 0], x @ weight.t())
