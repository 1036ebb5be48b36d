"""depthwise_conv2d inside torch: gradients, opcheck, compile, export, autocast, errors."""

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
from tests import reference
from tests.cases import LAYOUTS, ConvCase, Problem, build
from tests.ops.depthwise import depthwise, geometry, op_args, run_function, run_op

OPCHECK_CASES = [
    depthwise(ConvCase()),
    depthwise(ConvCase(layout="channels_last", residual=True, activation="silu")),
    depthwise(ConvCase(layout="sliced", stride=(2, 1), padding=(0, 1, 2, 3), bias=False)),
    depthwise(ConvCase(c=3, dilation=(2, 1), activation="relu"), 2),
    depthwise(ConvCase(n=0)),
    depthwise(ConvCase(kernel=(1, 1), padding=(0, 0, 0, 0), dtype=torch.bfloat16)),
]


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(case: ConvCase, grad: bool) -> None:
    args = op_args(build(case))
    if grad:
        args = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)
    tolerance: dict[str, Any] = {}
    if case.dtype == torch.bfloat16:
        tolerance = {"rtol": 2e-2, "atol": 2e-2}
    results = torch.library.opcheck(
        torch.ops.sparsecnn.depthwise_conv2d.default, args, raise_exception=True, **tolerance
    )
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


# ---- gradients -----------------------------------------------------------------------------------

SMALL = depthwise(ConvCase(n=2, c=3, h=5, w=4, dtype=torch.float64))
GEOMETRIES = [
    SMALL,
    SMALL.but(stride=(2, 2)),
    SMALL.but(stride=(3, 2), h=8, w=7, padding=(0, 0, 0, 0)),
    SMALL.but(dilation=(2, 1), padding=(2, 2, 1, 1)),
    SMALL.but(padding=(0, 1, 2, 3)),
    SMALL.but(kernel=(2, 3), padding=(1, 0, 1, 1), stride=(1, 2)),
    depthwise(SMALL, 2).but(stride=(2, 1)),
    SMALL.but(layout="channels_last"),
    SMALL.but(layout="sliced", residual=True),
    SMALL.but(n=1, h=1, w=1),
]


def leaves(problem: Problem) -> tuple[Tensor, ...]:
    tensors = (problem.x, problem.weight, problem.bias, problem.residual)
    return tuple(t.detach().requires_grad_() for t in tensors if t is not None)


def call(problem: Problem, x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    extra = list(rest)
    bias = extra.pop(0) if problem.bias is not None else None
    residual = extra.pop(0) if problem.residual is not None else None
    return sparsecnn.ops.depthwise_conv2d(x, weight, bias, residual=residual, **geometry(problem))


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.id)
def test_gradcheck_of_every_geometry(case: ConvCase) -> None:
    problem = build(case)
    assert torch.autograd.gradcheck(lambda *a: call(problem, *a), leaves(problem))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradcheck_of_every_epilogue(activation: str, residual: bool) -> None:
    problem = build(SMALL.but(activation=activation, residual=residual))
    tensors = tuple((4 * t.detach()).requires_grad_() for t in leaves(problem))
    assert torch.autograd.gradcheck(lambda *a: call(problem, *a), tensors)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 1, 2)])
def test_gradgradcheck(activation: str, padding: tuple[int, int, int, int]) -> None:
    problem = build(SMALL.but(n=1, c=2, k=2, groups=2, activation=activation, padding=padding))
    assert torch.autograd.gradgradcheck(lambda *a: call(problem, *a), leaves(problem))


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.id)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_float32_gradients_are_exact_on_integers(case: ConvCase, activation: str) -> None:
    problem = build(case.but(dtype=torch.float32, integers=True, activation=activation))
    tensors = leaves(problem)
    y = call(problem, *tensors)
    grad_y = torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    got = torch.autograd.grad(y, tensors, grad_y)
    dense = [t.detach().double().requires_grad_() for t in tensors]
    top, bottom, left, right = case.padding
    pre = torch.nn.functional.conv2d(
        torch.nn.functional.pad(dense[0], (left, right, top, bottom)), dense[1], dense[2],
        stride=case.stride, dilation=case.dilation, groups=case.groups,
    )  # fmt: skip
    if case.residual:
        pre = pre + dense[3]
    out = pre.relu() if activation == "relu" else pre
    for g, w in zip(got, torch.autograd.grad(out, dense, grad_y.double()), strict=True):
        assert g.dtype == torch.float32 and torch.equal(g.double(), w), case.id


@pytest.mark.parametrize("which", range(4))
def test_each_gradient_alone(which: int) -> None:
    problem = build(SMALL.but(residual=True, activation="silu"))
    tensors = leaves(problem)
    everything = torch.autograd.grad(call(problem, *tensors).sum(), tensors)
    alone = [t.detach() for t in tensors]
    alone[which].requires_grad_()
    (only,) = torch.autograd.grad(call(problem, *alone).sum(), alone[which])
    assert torch.equal(only, everything[which])


def test_no_graph_where_none_is_wanted_and_none_is_lost() -> None:
    """The way past autograd is taken only where nothing looks on."""
    problem = build(SMALL)
    assert not call(problem, problem.x, problem.weight, problem.bias).requires_grad
    with torch.no_grad():
        assert not call(problem, *leaves(problem)).requires_grad
    assert call(problem, *leaves(problem)).requires_grad
    x, weight, bias = (t.detach() for t in leaves(problem))
    # torch.func has no formula for an op of torch.library: an error, not a constant.
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda w: call(problem, x, w, bias).square().sum())(weight)


# ---- compile, export, fakes, autocast, FLOPs -----------------------------------------------------


class Net(nn.Module):
    """Two depthwise convolutions of different geometry."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 1, 3, 3))
        self.second = nn.Parameter(torch.randn(6, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 6, P, Q)."""
        y = sparsecnn.ops.depthwise_conv2d(
            x, self.first, stride=(2, 1), padding=(1, 1, 0, 2), activation="relu"
        )
        return sparsecnn.ops.depthwise_conv2d(y * 2, self.second, padding=2, activation="silu")


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
        x = torch.randn(shape, requires_grad=True)
        want = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *net.parameters()])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_inductor(form: torch.memory_format) -> None:
    torch._dynamo.reset()
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    with torch.no_grad():
        x = torch.randn(SHAPES[0]).contiguous(memory_format=form)
        torch.testing.assert_close(compiled(x), net(x))


def test_export_with_dynamic_shapes() -> None:
    net = Net().eval()
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("h", min=4, max=512), 3: Dim("w", min=4)}
    exported = torch.export.export(net, (torch.randn(2, 3, 9, 8),), dynamic_shapes=(sizes,))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("sparsecnn.depthwise_conv2d.default") == 2
    for shape in [*SHAPES, (1, 3, 4, 4)]:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), net(x)), shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 2])
def test_fake_and_meta_predict_the_result(layout: str, n: int) -> None:
    problem = build(depthwise(ConvCase(n=n, layout=layout, residual=True, stride=(2, 1), c=7), 2))
    y = run_op(problem)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in op_args(problem)]
        fake = torch.ops.sparsecnn.depthwise_conv2d.default(*fakes)
    metas = [a.to("meta") if isinstance(a, Tensor) else a for a in op_args(problem)]
    meta = torch.ops.sparsecnn.depthwise_conv2d.default(*metas)
    assert fake.shape == meta.shape == y.shape and fake.dtype == meta.dtype == y.dtype
    assert fake.stride() == y.stride() and meta.device.type == "meta"


def test_autocast_runs_in_bfloat16() -> None:
    problem = build(depthwise(ConvCase(residual=True, activation="relu")))
    cast = [a.bfloat16() if isinstance(a, Tensor) else a for a in op_args(problem)]
    want = torch.ops.sparsecnn.depthwise_conv2d.default(*cast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_function(problem)
        direct = torch.ops.sparsecnn.depthwise_conv2d.default(*op_args(problem))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want) and torch.equal(direct, want)


def test_flops_agree_with_those_of_the_dense_convolution() -> None:
    problem = build(depthwise(ConvCase(stride=(2, 1)), 2))
    p, q = problem.case.out_size
    with FlopCounterMode(display=False) as counter:
        run_function(problem)
    assert counter.get_total_flops() == 2 * 2 * 10 * p * q * 9
    with torch.no_grad(), FlopCounterMode(display=False) as past_autograd:
        run_function(problem)
    assert past_autograd.get_total_flops() == counter.get_total_flops()


# ---- errors --------------------------------------------------------------------------------------

CASE = depthwise(ConvCase(n=2, c=6, h=9, w=8))


def function(**changes: Any) -> Tensor:
    problem = build(CASE)
    arguments: dict[str, Any] = {
        "x": problem.x, "weight": problem.weight, "bias": problem.bias, "padding": 1,
    }  # fmt: skip
    arguments.update(changes)
    return sparsecnn.ops.depthwise_conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)


def bad_arguments() -> list[Any]:
    f = torch.zeros
    return [
        ("stride", 0, ValueError, r"stride .*>= 1, got 0"),
        ("stride", 1.0, ValueError, r"stride .*got 1\.0"),
        ("dilation", (1, -2), ValueError, r"dilation .*got \(1, -2\)"),
        ("dilation", 5, ValueError, r"kernel .*\(5, 5\).*\(9, 8\)"),
        ("padding", -1, ValueError, r"padding .*got -1"),
        ("padding", "full", ValueError, r"padding .*got 'full'"),
        ("activation", "gelu", ValueError, r"activation .*hardswish, got 'gelu'"),
        ("weight", f(6, 2, 3, 3), ValueError, r"weight of shape \(K, 1, R, S\).*\(6, 2, 3, 3\)"),
        ("weight", f(6, 3, 3), ValueError, r"weight of shape \(K, 1, R, S\).*\(6, 3, 3\)"),
        ("weight", f(8, 1, 3, 3), ValueError, r"multiple of the 6 channels .*K = 8"),
        ("weight", f(3, 1, 3, 3), ValueError, r"multiple of the 6 channels .*K = 3"),
        ("weight", f(6, 1, 3, 3).double(), TypeError, r"weight of the dtype.*got torch.float64"),
        ("weight", f(6, 1, 3, 3, device="meta"), ValueError, r"weight.*cpu, got meta"),
        ("weight", None, TypeError, r"weight a Tensor, got NoneType"),
        ("x", f(2, 5, 9, 8), ValueError, r"multiple of the 5 channels .*K = 6"),
        ("x", f(6, 9, 8), ValueError, r"x of shape \(N, C, H, W\), got \(6, 9, 8\)"),
        ("x", f(2, 6, 9, 8).int(), TypeError, r"x of dtype .*got torch.int32"),
        ("x", f(2, 6, 0, 8), ValueError, r"kernel that fits .*\(0, 8\)"),
        ("x", f(2, 0, 9, 8), ValueError, r"multiple of the 0 channels"),
        ("x", [1], ValueError, r"x .*got list"),
        ("bias", f(5), ValueError, r"bias of shape \(6,\), got \(5,\)"),
        ("bias", f(6).double(), TypeError, r"bias .*float32, got torch.float64"),
        ("bias", f(6, device="meta"), ValueError, r"bias on the device of x, cpu, got meta"),
        ("residual", f(2, 6, 9, 7), ValueError, r"residual .*\(2, 6, 9, 8\), got \(2, 6, 9, 7\)"),
        ("residual", f(2, 6, 9, 8).bfloat16(), TypeError, r"residual .*got torch.bfloat16"),
    ]


@pytest.mark.parametrize("name, value, error, message", bad_arguments(), ids=lambda v: str(v)[:30])
def test_function_refuses(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"depthwise_conv2d: expected .*{message}"):
        function(**{name: value})


def test_float16_names_the_legal_dtypes() -> None:
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        function(x=torch.zeros(2, 6, 9, 8).half(), weight=torch.zeros(6, 1, 3, 3).half(), bias=None)


POSITION = ("x", "weight", "bias", "residual", "stride", "padding", "dilation", "activation")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.zeros(6, 9, 8), "4 dimensions"),
        ("x", torch.zeros(2, 0, 9, 8), "at least one channel"),
        ("x", torch.zeros(2, 6, 9, 8).half(), "dtype of x"),
        ("weight", torch.zeros(6, 2, 3, 3), "weight of shape"),
        ("weight", torch.zeros(6, 1, 9), "weight of shape"),
        ("weight", torch.zeros(7, 1, 3, 3), "groups to divide"),
        ("weight", torch.zeros(6, 1, 0, 3), "kernel_size"),
        ("bias", torch.zeros(5), "bias"),
        ("residual", torch.zeros(2, 6, 9, 9), "residual"),
        ("stride", [1], "stride"),
        ("stride", [0, 1], "stride"),
        ("padding", [1, 1], "padding"),
        ("dilation", [9, 1], "fits"),
        ("activation", "tanh", "activation .*tanh"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_operator_refuses(name: str, value: Any, message: str) -> None:
    arguments = list(op_args(build(CASE)))
    arguments[POSITION.index(name)] = value
    with pytest.raises(RuntimeError, match=rf"depthwise_conv2d: expected [\s\S]*{message}"):
        torch.ops.sparsecnn.depthwise_conv2d.default(*arguments)
