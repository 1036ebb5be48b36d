"""chain_conv2d and pointwise_conv2d inside torch: opcheck, gradients, compile, export, FLOPs."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparsecnn.ops
from tests import reference
from tests.cases import LAYOUTS, ConvCase, build
from tests.chains import ChainCase, ChainProblem, Stage, build_chain, inverted
from tests.ops.chain import op_args, pointwise_args, run_function, run_op, stages_of

POINTWISE: dict[str, Any] = {
    "kernel": (1, 1), "padding": (0, 0, 0, 0), "pattern": "full",
}  # fmt: skip
CHAIN_OP = torch.ops.sparsecnn.chain_conv2d.default
POINTWISE_OP = torch.ops.sparsecnn.pointwise_conv2d.default

OPCHECK = [
    ChainCase(inverted(9, 5), residual=True),
    ChainCase(inverted(9, 5, 3, 2), layout="channels_last"),
    ChainCase((Stage(4, (3, 2), bias=False, padding=(0, 1, 2, 3), activation="silu"),)),
    ChainCase((Stage(6, bias=False), Stage(kernel=(3, 3))), layout="sliced"),
    ChainCase((Stage(6), Stage(3, activation="hardswish")), n=0),
]


def differentiable(value: Any) -> Any:
    """Floating-point tensors, also in lists, as leaves that want gradients."""
    if isinstance(value, list):
        return [differentiable(v) for v in value]
    return value.detach().requires_grad_() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("case", OPCHECK, ids=lambda case: case.id)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_chain(case: ChainCase, grad: bool) -> None:
    args = op_args(build_chain(case))
    if grad:
        args = tuple(differentiable(a) for a in args)
    results = torch.library.opcheck(CHAIN_OP, args, raise_exception=True)
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_pointwise(layout: str, grad: bool) -> None:
    for activation, stride in (("none", (1, 1)), ("silu", (2, 1)), ("relu6", (1, 1))):
        case = ConvCase(layout=layout, residual=True, activation=activation, stride=stride)
        problem = build(case.but(**POINTWISE))
        for flags in ((), (True,)) if activation == "silu" else ((),):
            args = pointwise_args(problem, problem.weight, *flags)
            if grad:
                args = tuple(differentiable(a) for a in args)
            results = torch.library.opcheck(POINTWISE_OP, args, raise_exception=True)
            assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


# ---- gradients -----------------------------------------------------------------------------------

SMALL = ChainCase((Stage(4),), n=2, c=3, h=6, w=5, dtype=torch.float64)
GRADIENT_CASES = [
    SMALL.but(stages=inverted(4, 3), residual=True),
    SMALL.but(stages=inverted(4, 5, 3, 2)),
    SMALL.but(stages=(Stage(4, (3, 2), (2, 1), (0, 3, 2, 1), (1, 2)), Stage(2, (1, 3)))),
    SMALL.but(stages=(Stage(4, bias=False), Stage(None, (3, 3), bias=False), Stage(2))),
    SMALL.but(stages=inverted(4, 3), layout="channels_last"),
    *(
        SMALL.but(stages=(Stage(4, activation=a), Stage(3, (3, 3), activation=a)), residual=True)
        for a in reference.ACTIVATIONS
    ),
]


def leaves(problem: ChainProblem, scale: float = 1.0) -> tuple[Tensor, ...]:
    tensors = [problem.x, *problem.weights, *(b for b in problem.biases if b is not None)]
    if problem.residual is not None:
        tensors.append(problem.residual)
    return tuple((scale * t.detach()).requires_grad_() for t in tensors)


def call(problem: ChainProblem, *tensors: Tensor) -> Tensor:
    """The function of the differentiable tensors alone."""
    count = len(problem.weights)
    rest = iter(tensors[1 + count :])
    biases = [None if b is None else next(rest) for b in problem.biases]
    residual = None if problem.residual is None else next(rest)
    stages = stages_of(problem, list(tensors[1 : 1 + count]), biases)
    return sparsecnn.ops.chain_conv2d(tensors[0], stages, residual=residual)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.id)
def test_gradcheck_chain(case: ChainCase) -> None:
    problem = build_chain(case)
    assert torch.autograd.gradcheck(lambda *a: call(problem, *a), leaves(problem, 1.5))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradgradcheck_chain(activation: str) -> None:
    stages = (Stage(3, activation=activation), Stage(None, (3, 1), activation=activation))
    problem = build_chain(SMALL.but(stages=stages, n=1, c=2, h=4, w=3))
    assert torch.autograd.gradgradcheck(lambda *a: call(problem, *a), leaves(problem))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradcheck_pointwise(activation: str) -> None:
    for stride in (1, 2):
        case = ConvCase(
            n=2, c=3, h=4, w=5, k=4, dtype=torch.float64, residual=True, stride=(stride, stride)
        )
        problem = build(case.but(**POINTWISE))
        tensors = tuple(
            (3 * t.detach()).requires_grad_()
            for t in (problem.x, problem.weight, problem.bias, problem.residual)
            if t is not None
        )

        def run(x: Tensor, w: Tensor, b: Tensor, r: Tensor, stride: int = stride) -> Tensor:
            return sparsecnn.ops.pointwise_conv2d(
                x, w, b, stride=stride, activation=activation, residual=r
            )

        assert torch.autograd.gradcheck(run, tensors)
        if activation == "silu":
            assert torch.autograd.gradgradcheck(run, tensors)


def plain(problem: ChainProblem, *tensors: Tensor) -> Tensor:
    """The chain by the framework's convolutions."""
    count = len(problem.weights)
    y, rest = tensors[0], iter(tensors[1 + count :])
    biases = [None if b is None else next(rest) for b in problem.biases]
    for i, stage in enumerate(problem.case.stages):
        top, bottom, left, right = stage.pads
        y = F.conv2d(
            F.pad(y, (left, right, top, bottom)), tensors[1 + i], biases[i], stage.stride, 0,
            stage.dilation, problem.groups[i],
        )  # fmt: skip
        if i == count - 1 and problem.residual is not None:
            y = y + next(rest)
        # The framework's own, whose slopes at the corners are the ones to have.
        y = y if stage.activation == "none" else getattr(F, stage.activation)(y)
    return y


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.id)
def test_float32_gradients_are_exact_on_integers(case: ChainCase, isa: str) -> None:
    if any(s.activation in ("silu", "hardswish") for s in case.stages):
        pytest.skip("not exact")
    problem = build_chain(case.but(dtype=torch.float32, integers=True))
    tensors = leaves(problem)
    y = call(problem, *tensors)
    generator = torch.Generator().manual_seed(5)
    grad_y = torch.randint(-3, 4, y.shape, generator=generator).to(y)
    got = torch.autograd.grad(y, tensors, grad_y)
    doubles = tuple(t.detach().double().requires_grad_() for t in tensors)
    want = torch.autograd.grad(plain(problem, *doubles), doubles, grad_y.double())
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == torch.float32
        assert torch.equal(g.double(), w), f"{case.id}: gradient {i}"


def test_gradients_of_some_inputs_only() -> None:
    problem = build_chain(SMALL.but(stages=inverted(4, 3), residual=True))
    everything = leaves(problem)
    want = torch.autograd.grad(call(problem, *everything).sum(), everything)
    for i in range(len(everything)):
        tensors = [t.detach() for t in everything]
        tensors[i].requires_grad_()
        (only,) = torch.autograd.grad(call(problem, *tensors).sum(), tensors[i])
        assert torch.equal(only, want[i]), i
    with torch.no_grad():
        assert not call(problem, *everything).requires_grad


def test_the_input_as_its_own_residual() -> None:
    """x twice in one call: both gradients arrive."""
    problem = build_chain(SMALL.but(stages=inverted(4, 3)))
    x = problem.x.clone().requires_grad_()
    y = sparsecnn.ops.chain_conv2d(x, stages_of(problem), residual=x)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    tensors = (x, *problem.weights, *(b for b in problem.biases if b is not None))
    (want,) = torch.autograd.grad((plain(problem, *tensors) + x).square().sum(), x)
    torch.testing.assert_close(got, want)


# ---- compiler, export, fakes, autocast, FLOPs ----------------------------------------------------


class Net(nn.Module):
    """A chain and a pointwise layer around a dense operation."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = build_chain(ChainCase((*inverted(10, 6, 3, 2)[:2], Stage(6)), c=3))
        self.weights = nn.ParameterList(self.problem.weights)
        self.last = nn.Parameter(torch.randn(4, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, P, Q)."""
        y = sparsecnn.ops.chain_conv2d(x, stages_of(self.problem, list(self.weights)))
        return sparsecnn.ops.pointwise_conv2d(y * 2, self.last, activation="silu", allow_tf32=True)


SHAPES = [(2, 3, 9, 8), (3, 3, 12, 10), (5, 3, 7, 17)]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_compile_once_for_all_shapes(train: bool) -> None:
    torch._dynamo.reset()
    net = Net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=train)
        with torch.set_grad_enabled(train):
            got, want = compiled(x), net(x)
        assert torch.equal(got, want), shape
        if train:
            inputs = [x, *net.parameters()]
            for a, b in zip(
                torch.autograd.grad(got.square().sum(), inputs),
                torch.autograd.grad(want.square().sum(), inputs),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor(layout: str) -> None:
    torch._dynamo.reset()
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in SHAPES[:2]:
            x = torch.randn(shape)
            if layout == "channels_last":
                x = x.contiguous(memory_format=torch.channels_last)
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
    assert targets.count("sparsecnn.chain_conv2d.default") == 1
    assert targets.count("sparsecnn.pointwise_conv2d.default") == 1
    last = next(node for node in exported.graph.nodes if node.target is POINTWISE_OP)
    assert last.args[-1] is True
    for shape in [*SHAPES, (1, 3, 4, 4)]:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), net(x)), shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 2])
def test_fakes_predict_the_result(layout: str, n: int) -> None:
    chain = build_chain(ChainCase(inverted(9, 5, 3, 2), n=n, layout=layout, residual=True))
    dense = build(ConvCase(n=n, layout=layout, stride=(2, 1), c=7).but(**POINTWISE))
    runs: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = [
        (CHAIN_OP, op_args(chain)), (POINTWISE_OP, pointwise_args(dense, dense.weight)),
    ]  # fmt: skip
    for op, args in runs:
        y = op(*args)
        with FakeTensorMode() as mode:

            def convert(value: Any, mode: FakeTensorMode = mode) -> Any:
                if isinstance(value, list):
                    return [convert(v) for v in value]
                return mode.from_tensor(value) if isinstance(value, Tensor) else value

            fake = op(*(convert(a) for a in args))
        assert fake.shape == y.shape and fake.dtype == y.dtype and fake.device == y.device
        assert fake.stride() == y.stride()


def test_autocast_runs_in_bfloat16() -> None:
    problem = build_chain(ChainCase(inverted(9, 5), residual=True))

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.bfloat16()

    x, residual = problem.x.bfloat16(), cast(problem.residual)
    stages = stages_of(problem, [w.bfloat16() for w in problem.weights],
                       [cast(b) for b in problem.biases])  # fmt: skip
    want = sparsecnn.ops.chain_conv2d(x, stages, residual=residual)
    dense = build(ConvCase(activation="relu").but(**POINTWISE))
    assert dense.bias is not None
    want_dense = sparsecnn.ops.pointwise_conv2d(
        dense.x.bfloat16(), dense.weight.bfloat16(), dense.bias.bfloat16(), activation="relu"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run_function(problem), want)
        assert torch.equal(CHAIN_OP(*op_args(problem)), want)
        got = sparsecnn.ops.pointwise_conv2d(dense.x, dense.weight, dense.bias, activation="relu")
        assert torch.equal(got, want_dense)
        assert torch.equal(POINTWISE_OP(*pointwise_args(dense, dense.weight)), want_dense)


def test_flops_are_those_of_the_dense_layers() -> None:
    for case in (ChainCase(inverted(9, 5, 3, 2)), ChainCase((Stage(4, (3, 2)),), n=0)):
        problem = build_chain(case)
        with FlopCounterMode(display=False) as ours:
            run_function(problem)
        assert ours.get_total_flops() == 2 * case.macs
        tensors = (problem.x, *problem.weights, *(b for b in problem.biases if b is not None))
        with FlopCounterMode(display=False) as dense:
            plain(problem, *tensors)
        if case.n:
            assert dense.get_total_flops() == ours.get_total_flops()
    layer = build(ConvCase(stride=(2, 1)).but(**POINTWISE))
    with FlopCounterMode(display=False) as ours:
        sparsecnn.ops.pointwise_conv2d(layer.x, layer.weight, stride=(2, 1))
    with FlopCounterMode(display=False) as dense:
        F.conv2d(layer.x, layer.weight, stride=(2, 1))
    assert ours.get_total_flops() == dense.get_total_flops() > 0


def test_no_memory_is_lost_between_calls() -> None:
    """Lists and strings cross the stable ABI by hand: a thousand calls may not leave anything."""
    problem = build_chain(ChainCase(inverted(9, 5), residual=True))

    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    for _ in range(500):
        run_function(problem)
    before = resident()
    for _ in range(20_000):
        run_function(problem)
    assert resident() - before < 1 << 20


def test_output_keeps_its_format_for_the_next_layer() -> None:
    for layout in ("contiguous", "channels_last"):
        y = run_op(build_chain(ChainCase(inverted(9, 8), layout=layout)))
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        dense = nn.Conv2d(8, 4, 3).to(memory_format=form)
        assert dense(y).is_contiguous(memory_format=form)
