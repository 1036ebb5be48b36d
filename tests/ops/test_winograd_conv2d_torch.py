"""winograd_conv2d inside torch: opcheck, gradients, compile, export, autocast, FLOP counting."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import sparsecnn.ops
from sparsecnn.formats.winograd import WinogradWeight
from sparsecnn.nn import WinogradConv2d
from tests import reference, tolerance
from tests.cases import LAYOUTS, ConvCase
from tests.ops.winograd import (
    KINDS,
    WinogradProblem,
    geometry,
    make,
    op_args,
    pack,
    run_function,
    run_op,
    weight_of,
)

OPCHECK_CASES = [
    ConvCase(),
    ConvCase(layout="channels_last", residual=True, activation="silu"),
    ConvCase(layout="sliced", padding=(0, 1, 2, 3), bias=False),
    ConvCase(c=6, k=4, groups=2, activation="relu"),
    ConvCase(n=0),
    ConvCase(padding=(0, 0, 0, 0), dtype=torch.bfloat16),
    ConvCase(pattern="empty"),
]
kinds = pytest.mark.parametrize("tile, sparse", KINDS)


def name_of(value: object) -> str:
    return value.id if isinstance(value, ConvCase) else str(value)


@pytest.mark.parametrize("number, case", list(enumerate(OPCHECK_CASES)), ids=name_of)
@kinds
def test_opcheck(number: int, case: ConvCase, tile: int, sparse: bool) -> None:
    args = op_args(make(case, tile, sparse))
    results = torch.library.opcheck(
        torch.ops.sparsecnn.winograd_conv2d.default, args, raise_exception=True
    )
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


# Tracing a backward takes seconds.
@pytest.mark.parametrize("case", [OPCHECK_CASES[1], OPCHECK_CASES[3]], ids=name_of)
def test_opcheck_of_training(case: ConvCase) -> None:
    tile, sparse = (2, False) if case.residual else (4, True)
    args = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in op_args(make(case, tile, sparse))
    ]
    results = torch.library.opcheck(
        torch.ops.sparsecnn.winograd_conv2d.default, args, raise_exception=True
    )
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


SMALL = ConvCase(n=1, c=2, h=4, w=3, k=3, dtype=torch.float64)
GEOMETRIES = [
    SMALL.but(n=2),
    SMALL.but(h=6, w=5, padding=(0, 0, 0, 0), c=1, k=2),
    SMALL.but(padding=(0, 1, 2, 3)),
    SMALL.but(padding=(4, 3, 5, 0), c=1, k=1),
    SMALL.but(c=4, k=6, groups=2, h=3),
    SMALL.but(layout="channels_last"),
    SMALL.but(layout="sliced", residual=True),
    SMALL.but(h=1, w=1),
    SMALL.but(k=9, c=1, h=2),
    SMALL.but(pattern="some_empty_rows"),
    SMALL.but(pattern="full", h=2),
]


def call(p: WinogradProblem, x: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
    """The function of the differentiable tensors alone; `rest` is (bias, residual) as present."""
    extra = list(rest)
    bias = extra.pop(0) if p.problem.bias is not None else None
    residual = extra.pop(0) if p.problem.residual is not None else None
    return sparsecnn.ops.winograd_conv2d(
        x, weight_of(p, values), bias, residual=residual, **geometry(p)
    )


def leaves(p: WinogradProblem) -> tuple[Tensor, ...]:
    tensors = (p.problem.x, p.values, p.problem.bias, p.problem.residual)
    return tuple(t.detach().clone().requires_grad_() for t in tensors if t is not None)


@pytest.mark.parametrize("number, case", list(enumerate(GEOMETRIES)), ids=name_of)
def test_gradcheck_of_every_geometry(number: int, case: ConvCase) -> None:
    """Both tiles; sparse and dense weights take turns, since a numeric derivative is slow."""
    for tile, sparse in (KINDS[number % 2], KINDS[2 + number % 2]):
        p = make(case, tile, sparse)
        if sparse or tile == 2:
            assert torch.autograd.gradcheck(lambda *a, p=p: call(p, *a), leaves(p))
        else:  # zeros that fill a block are no parameters, and no gradient reaches them
            taps = p.taps.clone().requires_grad_()

            def of_taps(
                x: Tensor, taps: Tensor, *rest: Tensor, p: WinogradProblem = p
            ) -> Tensor:
                return call(p, x, weight_of(p).stored(taps), *rest)

            x, _, *rest = leaves(p)
            assert torch.autograd.gradcheck(of_taps, (x, taps, *rest), fast_mode=True)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradcheck_of_every_epilogue(activation: str, residual: bool) -> None:
    # Four times the usual scale, so that relu6 and hardswish see both of their corners.
    p = make(SMALL.but(h=3, w=3, activation=activation, residual=residual), 2, True)
    tensors = tuple((4 * t.detach()).requires_grad_() for t in leaves(p))
    assert torch.autograd.gradcheck(lambda *a: call(p, *a), tensors)


@pytest.mark.parametrize(
    "case",
    [
        SMALL.but(k=2, h=3, density=0.1),
        SMALL.but(k=2, h=3, groups=2, padding=(0, 1, 1, 0), density=0.2),
        SMALL.but(c=1, k=2, h=2, activation="silu", residual=True, density=0.2),
        SMALL.but(c=1, k=2, h=3, activation="relu", density=0.2),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("tile", [2, 4])
def test_gradgradcheck(tile: int, case: ConvCase) -> None:
    p = make(case, tile, True)
    assert torch.autograd.gradgradcheck(lambda *a: call(p, *a), leaves(p))


@kinds
@pytest.mark.parametrize("case", GEOMETRIES, ids=name_of)
def test_gradients_are_exact_on_integers(case: ConvCase, tile: int, sparse: bool) -> None:
    """In float32 with tiles of two, in float64 with tiles of four, against autograd."""
    dtype = torch.float32 if tile == 2 else torch.float64
    p = make(case.but(dtype=dtype, integers=True, activation="relu", bias=True), tile, sparse)
    tensors = leaves(p)
    y = call(p, *tensors)
    grad_y = torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    got = torch.autograd.grad(y, tensors, grad_y)

    x, _, *rest = (t.detach().double().requires_grad_() for t in tensors)
    taps = p.taps.double().requires_grad_()
    pre = reference.winograd_conv2d(x, taps, rest[0], padding=case.padding, groups=case.groups)
    if case.residual:
        pre = pre + rest[1]
    want = torch.autograd.grad(pre.relu(), (x, taps, *rest), grad_y.double())
    assert torch.equal(got[0].double(), want[0])
    # Where values are kept, in their order.
    kept = p.taps != 0 if sparse else None
    placed = pack(p.problem, tile, want[1].to(dtype), kept).values
    assert torch.equal(got[1], placed)
    for mine, theirs in zip(got[2:], want[2:], strict=True):
        assert torch.equal(mine.double(), theirs)


def test_each_gradient_alone() -> None:
    p = make(SMALL.but(residual=True, activation="silu"), 4, True)
    tensors = leaves(p)
    everything = torch.autograd.grad(call(p, *tensors).sum(), tensors)
    for which in range(4):
        alone = [t.detach() for t in tensors]
        alone[which].requires_grad_()
        (only,) = torch.autograd.grad(call(p, *alone).sum(), alone[which])
        assert torch.equal(only, everything[which])


@kinds
def test_gradient_of_an_empty_batch(tile: int, sparse: bool) -> None:
    p = make(SMALL.but(n=0), tile, sparse)
    tensors = leaves(p)
    grads = torch.autograd.grad(call(p, *tensors).sum(), tensors)
    assert grads[0].shape == p.problem.x.shape
    assert not grads[1].any() and grads[1].shape == p.values.shape
    assert not grads[2].any()


@pytest.mark.parametrize("tile", [2, 4])
def test_gradient_reaches_a_spatial_weight(tile: int) -> None:
    """values may be computed, here by the transform: then it is the direct convolution's."""
    p = make(ConvCase(dtype=torch.float64, groups=2, c=4, k=6), tile)
    g, _, _ = reference.winograd_matrices(tile)
    dense = p.problem.weight.clone().requires_grad_()
    taps = torch.einsum("ir,kcrs,js->ijkc", g, dense, g).flatten(0, 1)
    call(p, p.problem.x, weight_of(p).stored(taps), p.problem.bias).square().sum().backward()
    y = reference.conv2d(p.problem.x, p.problem.weight, p.problem.bias, padding=(1,) * 4, groups=2)
    want = reference.conv2d_grad_weight(
        2 * y, p.problem.x, dense.shape, padding=(1, 1, 1, 1), groups=2
    )
    torch.testing.assert_close(dense.grad, want, rtol=1e-10, atol=1e-10)


@kinds
def test_float32_gradients_are_near_the_exact_ones(tile: int, sparse: bool) -> None:
    case = ConvCase(n=3, c=9, k=10, h=11, w=14, residual=True, activation="silu")
    p = make(case, tile, sparse)
    tensors = leaves(p)
    got = torch.autograd.grad(call(p, *tensors).sum(), tensors)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    want = torch.autograd.grad(call(p, *doubles).sum(), doubles)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max())
        )


class Net(nn.Module):
    """A sparse and a dense layer of different tiles around a dense operation."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, second = nn.Conv2d(3, 8, 3, 1, (2, 1)), nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            for conv in (first, second):
                conv.weight.normal_(generator=generator)
        mask = torch.rand(36, 8, 3, generator=generator) < 0.5
        self.first = WinogradConv2d.from_dense(first, 4, mask=mask, activation="relu")
        self.second = WinogradConv2d.from_dense(second, 2, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, H, W - 2)."""
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
    dims = {"x": {0: Dim("n", min=1), 2: Dim("h", min=3), 3: Dim("w", min=4)}}
    exported = torch.export.export(net, (torch.randn(2, 3, 9, 8),), dynamic_shapes=dims)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("sparsecnn.winograd_conv2d.default") == 2
    for shape in [*SHAPES, (1, 3, 3, 4)]:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), net(x)), shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 2])
def test_fake_and_meta_predict_the_result(layout: str, n: int) -> None:
    for tile, sparse in KINDS:
        p = make(ConvCase(n=n, layout=layout, residual=True, c=7), tile, sparse)
        y = run_op(p)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in op_args(p)]
            fake = torch.ops.sparsecnn.winograd_conv2d.default(*fakes)
        metas = [a.to("meta") if isinstance(a, Tensor) else a for a in op_args(p)]
        meta = torch.ops.sparsecnn.winograd_conv2d.default(*metas)
        assert fake.shape == meta.shape == y.shape
        assert fake.dtype == meta.dtype == y.dtype
        assert fake.device == y.device and meta.device.type == "meta"
        assert fake.stride() == y.stride()


@kinds
def test_autocast_runs_in_bfloat16(tile: int, sparse: bool) -> None:
    p = make(ConvCase(residual=True, activation="relu"), tile, sparse)
    names = ("x", "bias", "residual")
    cast = {name: getattr(p.problem, name).bfloat16() for name in names}
    want = run_op(p.but(values=p.values.bfloat16(), **cast))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_function(p)
        direct = torch.ops.sparsecnn.winograd_conv2d.default(*op_args(p))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want) and torch.equal(direct, want)


@kinds
def test_autocast_trains_float32_parameters(tile: int, sparse: bool) -> None:
    p = make(ConvCase(integers=True, bias=False), tile, sparse)
    values = p.values.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(p, p.problem.x, values)
    # The gradient is a sum of products of the two; ones on one side leave what x gives.
    y.float().sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.float32
    exact = values.detach().double().requires_grad_()
    call(p, p.problem.x.double(), exact).sum().backward()
    assert exact.grad is not None
    # Both transforms, the sum over tiles and the result round to bfloat16.
    magnitude = float(exact.grad.abs().max())
    error = float((values.grad.double() - exact.grad).abs().max())
    assert error < 8 * tolerance.unit_roundoff(torch.bfloat16) * magnitude


@pytest.mark.parametrize("number, case", list(enumerate(OPCHECK_CASES)), ids=name_of)
def test_flops_count_stored_values(number: int, case: ConvCase) -> None:
    for tile, sparse in KINDS:
        p = make(case, tile, sparse)
        stored = p.values.numel() if sparse else p.taps.numel()
        tiles = case.n
        for size in case.out_size:
            tiles *= (size + tile - 1) // tile
        with FlopCounterMode(display=False) as counter:
            run_function(p)
        assert counter.get_total_flops() == 2 * stored * tiles


def test_parameters_that_were_trained_need_no_spatial_weight() -> None:
    """The taps follow the gradient on their own; the loss falls."""
    p = make(ConvCase(n=4, c=3, k=5, bias=False, dtype=torch.float64), 4)
    target = torch.randn(4, 5, 9, 8, dtype=torch.float64)
    values = p.values.clone().requires_grad_()
    losses = []
    for _ in range(5):
        loss = (call(p, p.problem.x, values) - target).square().mean()
        losses.append(loss.item())
        (grad,) = torch.autograd.grad(loss, values)
        with torch.no_grad():
            values -= 1e-3 * grad
    assert losses == sorted(losses, reverse=True) and losses[4] < losses[0]
    weight: WinogradWeight = weight_of(p, values.detach())
    # No spatial weight has these taps.
    again = WinogradWeight.from_dense(weight.to_dense(), tile=4)
    assert not torch.allclose(again.values, weight.values)
