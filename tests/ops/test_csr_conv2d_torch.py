"""csr_conv2d inside torch: opcheck, compile, export, fake tensors, autocast, FLOP counting."""

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
from tests.cases import LAYOUTS, ConvCase, Problem, build, memory_format
from tests.ops.csr import geometry, grad_values_args, op_args, run_function, run_op, weight_of

OPCHECK_CASES = [
    ConvCase(),
    ConvCase(layout="channels_last", residual=True, activation="silu"),
    ConvCase(layout="sliced", stride=(2, 1), padding=(0, 1, 2, 3), bias=False),
    ConvCase(c=6, k=4, groups=2, dilation=(2, 1), activation="relu"),
    ConvCase(n=0),
    ConvCase(kernel=(1, 1), padding=(0, 0, 0, 0), dtype=torch.bfloat16),
    ConvCase(pattern="empty"),
]


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(case: ConvCase, grad: bool, device: str) -> None:
    args = op_args(build(case, device))
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
        torch.ops.sparsecnn.csr_conv2d.default, args, raise_exception=True, **tolerance
    )
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", OPCHECK_CASES[:4], ids=lambda case: case.id)
def test_opcheck_grad_values(case: ConvCase, device: str) -> None:
    problem = build(case, device)
    grad_y = torch.randn(case.n, case.k, *case.out_size, device=device, requires_grad=True)
    args = grad_values_args(problem, grad_y)
    results = torch.library.opcheck(torch.ops.sparsecnn.csr_conv2d_grad_values.default, args)
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


class Net(nn.Module):
    """Two sparse convolutions of different geometry around a dense operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = build(ConvCase(c=3, k=6, stride=(2, 1), padding=(1, 1, 0, 2)))
        self.second = build(ConvCase(c=6, k=4, kernel=(1, 1), padding=(0, 0, 0, 0), seed=1))
        for name, problem in (("first", self.first), ("second", self.second)):
            self.register_parameter(f"{name}_values", nn.Parameter(problem.values.clone()))
            self.register_buffer(f"{name}_col", problem.col_idx)
            self.register_buffer(f"{name}_row", problem.row_ptr)

    def _conv(self, x: Tensor, name: str, problem: Problem, activation: str) -> Tensor:
        weight = sparsecnn.formats.csr.CSRWeight(
            getattr(self, f"{name}_values"),
            getattr(self, f"{name}_col"),
            getattr(self, f"{name}_row"),
            problem.case.weight_shape,
        )
        options = geometry(problem) | {"activation": activation}
        return sparsecnn.ops.csr_conv2d(x, weight, problem.bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, P, Q)."""
        y = self._conv(x, "first", self.first, "relu")
        return self._conv(y * 2, "second", self.second, "silu")


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
    # Sizes of 1 are constants for the compiler: one more function, not a failure.
    x = torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))


def test_compile_training_step() -> None:
    torch._dynamo.reset()
    net = Net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        want = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *net.parameters()])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    # The pads of the input gradient depend on H modulo the stride of 2: one function for each.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor(layout: str, device: str) -> None:
    """The default backend, which plans memory from the strides the fake kernel promises."""
    torch._dynamo.reset()
    net = Net().eval().to(device)
    for problem in (net.first, net.second):
        assert problem.bias is not None
        object.__setattr__(problem, "bias", problem.bias.to(device))
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in SHAPES[:2]:
            x = torch.randn(shape).to(device)
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
    assert targets.count("sparsecnn.csr_conv2d.default") == 2
    for shape in [*SHAPES, (1, 3, 4, 4)]:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), net(x)), shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 2])
def test_fake_and_meta_predict_the_result(layout: str, n: int, device: str) -> None:
    problem = build(ConvCase(n=n, layout=layout, residual=True, stride=(2, 1), c=7), device)
    y = run_op(problem)

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in op_args(problem)]
        fake = torch.ops.sparsecnn.csr_conv2d.default(*fakes)
    metas = [a.to("meta") if isinstance(a, Tensor) else a for a in op_args(problem)]
    # .to("meta") keeps strides only of dense tensors; the exact layout is the fake tensor's job.
    meta = torch.ops.sparsecnn.csr_conv2d.default(*metas)
    assert fake.shape == meta.shape == y.shape
    assert fake.dtype == meta.dtype == y.dtype
    assert fake.device == y.device and meta.device.type == "meta"
    assert fake.stride() == y.stride()


def test_autocast_runs_in_bfloat16(device: str) -> None:
    problem = build(ConvCase(residual=True, activation="relu"), device)
    cast = build(ConvCase(residual=True, activation="relu"), device)
    tensors = {name: getattr(cast, name).bfloat16() for name in ("x", "values", "bias", "residual")}
    for name, tensor in tensors.items():
        object.__setattr__(cast, name, tensor)
    want = run_op(cast)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run_function(problem)
        direct = torch.ops.sparsecnn.csr_conv2d.default(*op_args(problem))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    assert torch.equal(direct, want)


def test_autocast_trains_float32_parameters() -> None:
    problem = build(ConvCase(residual=False))
    values = problem.values.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparsecnn.ops.csr_conv2d(problem.x, weight_of(problem, values), padding=1)
    y.float().square().sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.float32
    reference_values = problem.values.clone().requires_grad_()
    plain = sparsecnn.ops.csr_conv2d(problem.x, weight_of(problem, reference_values), padding=1)
    plain.square().sum().backward()
    # Data of magnitude one, a few hundred terms: bfloat16 keeps 8 bits of each.
    torch.testing.assert_close(values.grad, reference_values.grad, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_output_feeds_dense_layers_in_its_own_format(channels_last: bool) -> None:
    """A chain conv > csr > conv in channels_last never falls back to contiguous."""
    case = ConvCase(c=8, k=8, layout="channels_last" if channels_last else "contiguous")
    y = run_op(build(case))
    dense = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last if channels_last else None)
    assert memory_format(y) == (torch.channels_last if channels_last else torch.contiguous_format)
    assert memory_format(dense(y)) == memory_format(y)


@pytest.mark.parametrize(
    "case",
    [
        ConvCase(),
        ConvCase(stride=(2, 3), padding=(0, 1, 2, 3)),
        ConvCase(c=6, k=4, groups=2),
        ConvCase(n=0),
        ConvCase(pattern="empty"),
    ],
    ids=lambda case: case.id,
)
def test_flops_count_stored_positions(case: ConvCase) -> None:
    problem = build(case)
    p, q = case.out_size
    with FlopCounterMode(display=False) as counter:
        run_function(problem)
    assert counter.get_total_flops() == 2 * problem.nnz * case.n * p * q


def test_dense_weight_flops_agree_with_a_full_matrix() -> None:
    """At density one our count is the count torch has for the dense convolution."""
    problem = build(ConvCase(pattern="full", stride=(2, 1)))
    with FlopCounterMode(display=False) as ours:
        run_function(problem)
    with FlopCounterMode(display=False) as dense:
        nn.functional.conv2d(problem.x, problem.weight, stride=(2, 1), padding=1)
    assert ours.get_total_flops() == dense.get_total_flops()
