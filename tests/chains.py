"""Chains of convolutions for the operator tests: a dataclass describes one, `build_chain` makes it.

As in `tests/cases.py`, nothing here imports the package under test, and a case's `id` is enough to
rebuild it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests import reference, tolerance
from tests.cases import LANE_BOUNDARIES, LAYOUTS, lay_out, memory_format

# How a weight lies in memory; the first is the order the kernel reads in place.
WEIGHT_ORDERS = ("innermost", "contiguous", "channels_last", "swapped", "transposed", "strided")


@dataclass(frozen=True)
class Stage:
    """One convolution of a chain; sizes as in `torch.nn.Conv2d`.

    Attributes:
        k: output channels; None for a depthwise stage, which keeps them.
        kernel: (R, S).
        stride: (vertical, horizontal).
        padding: (top, bottom, left, right); None for what keeps H and W at stride 1.
        dilation: (vertical, horizontal).
        bias: with a bias.
        activation: behind it.
        order: one of `WEIGHT_ORDERS`.
    """

    k: int | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] | None = None
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    activation: str = "none"
    order: str = "innermost"

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)."""
        if self.padding is not None:
            return self.padding
        v, h = (d * (n - 1) for d, n in zip(self.dilation, self.kernel, strict=True))
        return v // 2, v - v // 2, h // 2, h - h // 2

    def __str__(self) -> str:
        """The fields that differ from the defaults, for test names."""
        kind = "dw" if self.k is None else str(self.k)
        parts = [f"{kind}:{self.kernel[0]}x{self.kernel[1]}"]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value}".replace(" ", ""))
        return "/".join(parts)


@dataclass(frozen=True)
class ChainCase:
    """A chain, its input and how its data is drawn.

    Attributes:
        stages: 1 to 8.
        n: batch N.
        c: input channels C.
        h: input height H.
        w: input width W.
        residual: with a residual like the output.
        dtype: of all tensors.
        layout: of x, one of `tests.cases.LAYOUTS`.
        integers: small integer data; exact as long as no sum reaches 2^24.
        seed: of the data.
    """

    stages: tuple[Stage, ...]
    n: int = 2
    c: int = 5
    h: int = 9
    w: int = 8
    residual: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    integers: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        """What tells this case from others."""
        parts = [">".join(str(s) for s in self.stages)]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value}".replace("torch.", ""))
        return ",".join(parts)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of the input and behind every stage; below 1 where a filter is too big."""
        found = [(self.c, self.h, self.w)]
        for s in self.stages:
            c, h, w = found[-1]
            top, bottom, left, right = s.pads
            found.append(
                (
                    c if s.k is None else s.k,
                    reference.out_extent(h, top, bottom, s.dilation[0], s.kernel[0], s.stride[0]),
                    reference.out_extent(w, left, right, s.dilation[1], s.kernel[1], s.stride[1]),
                )
            )
        return found

    @property
    def macs(self) -> int:
        """Multiply-adds of all stages."""
        total = 0
        for s, (c, _, _), (k, p, q) in zip(
            self.stages, self.shapes[:-1], self.shapes[1:], strict=True
        ):
            total += self.n * p * q * k * (1 if s.k is None else c) * s.kernel[0] * s.kernel[1]
        return total

    def but(self, **changes: object) -> ChainCase:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ChainProblem:
    """The tensors of one chain.

    Attributes:
        case: what it was built from.
        x: (N, C, H, W) in the layout of the case.
        weights: (K, C/G, R, S) of each stage.
        biases: (K,) or None of each stage.
        groups: of each stage.
        residual: like the output, or None.
    """

    case: ChainCase
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    groups: list[int]
    residual: Tensor | None

    def to(self, device: str) -> ChainProblem:
        """The same with every tensor on a device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return dataclasses.replace(
            self,
            x=self.x.to(device),
            weights=[w.to(device) for w in self.weights],
            biases=[move(b) for b in self.biases],
            residual=move(self.residual),
        )

    def expected(self) -> tuple[Tensor, Tensor, float]:
        """The exact result, how far from it a kernel may be, and the largest sum there may be."""
        if self.x.device.type != "cpu":
            return self.to("cpu").expected()
        last = len(self.case.stages) - 1
        y, error = self.x.double(), torch.zeros_like(self.x, dtype=torch.float64)
        largest = 0.0
        for i, stage in enumerate(self.case.stages):
            residual = self.residual if i == last else None
            weight, bias = self.weights[i], self.biases[i]
            options = {
                "stride": stage.stride,
                "padding": stage.pads,
                "dilation": stage.dilation,
                "groups": self.groups[i],
            }
            magnitude = reference.conv2d_magnitude(
                y.abs() + error, weight, bias, residual=residual, **options
            )
            propagated = reference.conv2d(error, weight.abs(), **options)
            y = reference.conv2d(
                y, weight, bias, activation=stage.activation, residual=residual, **options
            )
            terms = weight[0].numel() + int(bias is not None) + int(residual is not None)
            error = tolerance.stage_bound(
                magnitude, propagated, terms, self.case.dtype, stage.activation
            )
            largest = max(largest, float(magnitude.max()) if magnitude.numel() else 0.0)
        return y, tolerance.stored_bound(error, y, self.case.dtype), largest

    def check(self, y: Tensor) -> None:
        """Fail unless `y` is the right result: exact for integers, else within the bound."""
        case = self.case
        want, bound, largest = self.expected()
        assert y.dtype == case.dtype, f"{case.id}: dtype {y.dtype}"
        exact = case.integers and largest < 2**24
        exact &= all(s.activation in ("none", "relu", "relu6") for s in case.stages)
        if exact:
            want = want.to(case.dtype).double()
            bound = torch.zeros_like(want)
        tolerance.assert_within(y, want, bound, case.id)
        form = memory_format(self.x)
        assert y.is_contiguous(memory_format=form), f"{case.id}: {y.stride()}, want {form}"


def in_order(weight: Tensor, order: str) -> Tensor:
    """The same values, lying in memory as `order` says."""
    if order == "innermost":
        return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    if order == "channels_last":
        return weight.contiguous(memory_format=torch.channels_last)
    if order == "swapped":  # output channels innermost, but filter columns before filter rows
        return weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if order == "transposed":
        return weight.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    if order == "strided":
        big = torch.full((*weight.shape[:3], 2 * weight.shape[3]), float("nan"), dtype=weight.dtype)
        big[..., ::2] = weight
        return big[..., ::2]
    return weight.contiguous()


def build_chain(case: ChainCase) -> ChainProblem:
    """Make the tensors of a case; equal for equal cases."""
    generator = torch.Generator().manual_seed(case.seed + 1)

    def draw(shape: tuple[int, ...]) -> Tensor:
        if case.integers:
            return torch.randint(-2, 3, shape, generator=generator).to(case.dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    x = lay_out(draw((case.n, case.c, case.h, case.w)), case.layout)
    weights, groups = [], []
    biases: list[Tensor | None] = []
    for stage, (c, _, _), (k, _, _) in zip(
        case.stages, case.shapes[:-1], case.shapes[1:], strict=True
    ):
        groups.append(c if stage.k is None else 1)
        weight = draw((k, c // groups[-1], *stage.kernel))
        if not case.integers:
            weight = (weight.double() / max(1, weight[0].numel()) ** 0.5).to(case.dtype)
        weights.append(in_order(weight, stage.order))
        biases.append(draw((k,)) if stage.bias else None)
    residual = None
    if case.residual:
        residual = draw((case.n, *case.shapes[-1])).contiguous(memory_format=memory_format(x))
    return ChainProblem(case, x, weights, biases, groups, residual)


# ---- hand-picked cases ---------------------------------------------------------------------------

DW = Stage(kernel=(3, 3), activation="relu6")


def inverted(t: int, k: int, kernel: int = 3, stride: int = 1) -> tuple[Stage, ...]:
    """The stages of a MobileNetV2 block."""
    return (
        Stage(t, activation="relu6"),
        Stage(kernel=(kernel, kernel), stride=(stride, stride), activation="relu6"),
        Stage(k),
    )


def channel_cases() -> Iterator[ChainCase]:
    """Channel counts around the vector widths, in every position."""
    for count in LANE_BOUNDARIES:
        yield ChainCase(inverted(count, 4), h=5, w=6)
        yield ChainCase((Stage(7, (3, 3)), DW, Stage(count)), c=count, h=4, w=5)
    yield ChainCase((DW, Stage(48)), c=64, h=6, w=6)
    yield ChainCase(inverted(64, 64), c=64, h=6, w=6)
    for count in (256, 512, 1024):  # pitches that fold onto a few cache sets
        yield ChainCase((Stage(count), Stage(9)), c=9, n=1, h=3, w=5)
        yield ChainCase((Stage(17),), c=count, n=1, h=3, w=5)


def spatial_cases() -> Iterator[ChainCase]:
    """Every width 1 to 20, images of one row or one column, and no image at all."""
    for size in range(1, 21):
        yield ChainCase(inverted(9, 3), n=1, h=3, w=size)
        yield ChainCase((Stage(9, (3, 3)), Stage(3, (1, 7)), Stage(4)), n=1, h=size, w=4)
    yield ChainCase(inverted(9, 3), h=1, w=1)
    yield ChainCase(inverted(9, 5), h=1, w=17, residual=True)
    yield ChainCase((DW, Stage(3)), h=17, w=1)
    yield ChainCase(inverted(9, 3), n=0)
    yield ChainCase(inverted(9, 5), n=0, residual=True)
    for n in (1, 3, 5):
        yield ChainCase(inverted(9, 5), n=n, residual=True)


def geometry_cases() -> Iterator[ChainCase]:
    """Filters, strides, dilations and pads, in the first, a middle and the last stage."""
    kinds = [
        Stage(6, (7, 1)), Stage(6, (1, 7)), Stage(6, (2, 2)),
        Stage(6, (4, 3), padding=(0, 0, 0, 0)), Stage(6, (3, 3), stride=(2, 2)),
        Stage(6, (3, 3), stride=(1, 2)), Stage(6, stride=(2, 2)),
        Stage(6, stride=(3, 1)), Stage(6, (2, 2), stride=(4, 3)), Stage(6, (3, 3), dilation=(2, 3)),
        Stage(6, padding=(1, 2, 3, 0)), Stage(6, (3, 3), padding=(0, 3, 0, 2)),
        Stage(6, (3, 3), padding=(4, 4, 5, 5)),
        Stage(None, (5, 5)), Stage(None, (3, 1)), Stage(None, (1, 3)), Stage(None, (7, 7)),
        Stage(None, (3, 3), stride=(2, 2)), Stage(None, (5, 5), stride=(2, 2)),
        Stage(None, (3, 3), stride=(2, 1)), Stage(None, (3, 3), stride=(1, 2)),
        Stage(None, (2, 2), stride=(3, 4)), Stage(None, (3, 3), dilation=(2, 2)),
        Stage(None, (3, 3), dilation=(1, 2)), Stage(None, (3, 3), padding=(0, 0, 0, 0)),
        Stage(None, (3, 3), padding=(3, 1, 0, 4)), Stage(None, (1, 1)), Stage(None, (9, 9)),
    ]  # fmt: skip
    for kind in kinds:
        yield ChainCase((kind,), c=6, h=14, w=15)
        yield ChainCase((Stage(6, activation="relu"), kind, Stage(5)), h=13, w=16)
        yield ChainCase((Stage(9, (3, 3)), kind), n=1, h=14, w=15)
    yield ChainCase((Stage(4, (3, 3), (2, 2)),) * 3, n=1, h=29, w=31)
    yield ChainCase((Stage(None, (3, 3), padding=(0, 0, 0, 0)),) * 4, h=12, w=13)
    yield ChainCase((Stage(5, (3, 3)),) * 8, n=1, h=7, w=9, c=3)
    # Strides that skip what earlier stages could have computed.
    yield ChainCase((Stage(8), Stage(8, (1, 1), (3, 3)), DW), h=16, w=16)


def order_cases() -> Iterator[ChainCase]:
    """Weights in every order in memory, biases with all activations, every layout of x."""
    for order in WEIGHT_ORDERS:
        stages = (
            Stage(37, order=order), Stage(kernel=(3, 3), order=order),
            Stage(35, kernel=(3, 2), order=order),
        )  # fmt: skip
        yield ChainCase(stages, c=19, h=6, w=7)
        yield ChainCase(stages[2:], c=19, h=6, w=7)
        yield ChainCase((Stage(16, kernel=(3, 3), order=order),), c=1, h=6, w=7)
        yield ChainCase((Stage(64, kernel=(1, 1), order=order),), c=16, h=3, w=4)
        yield ChainCase((Stage(32, kernel=(3, 2), order=order),), c=5, h=6, w=7)
    for activation in reference.ACTIVATIONS:
        for bias in (False, True):
            first = Stage(18, (3, 3), bias=bias, activation=activation)
            window = Stage(None, (3, 3), bias=bias, activation=activation)
            for residual in (False, True):
                last = Stage(5, bias=bias, activation=activation)
                yield ChainCase((first, window, last), residual=residual)
                yield ChainCase((window,), residual=residual, c=17)
    for layout in LAYOUTS:
        yield ChainCase(inverted(20, 5), layout=layout, residual=True)
        yield ChainCase((DW, Stage(16)), layout=layout, c=16, w=5)
        yield ChainCase((Stage(16), Stage(3)), layout=layout, c=16, w=5)


def network_cases() -> Iterator[ChainCase]:
    """Blocks of real networks, small enough for the slowest kernels; several bands, wide maps."""
    yield ChainCase(inverted(64, 8), n=1, c=8, h=40, w=60)
    yield ChainCase(inverted(96, 16, 5, 2), n=1, c=16, h=30, w=44)
    yield ChainCase(inverted(96, 16), n=2, c=16, h=14, w=14, residual=True)
    yield ChainCase(inverted(192, 40), n=1, c=40, h=7, w=7, residual=True)
    yield ChainCase((Stage(16, (7, 1)), Stage(32, (1, 7))), n=1, c=16, h=28, w=28)
    yield ChainCase((Stage(16), Stage(16, (3, 3)), Stage(64)), n=1, c=64, h=28, w=28)
    tall, wide = Stage(None, (3, 1)), Stage(None, (1, 3))
    yield ChainCase((Stage(40), tall, wide, Stage(32)), n=1, c=32, h=28, w=28)
    yield ChainCase((Stage(24, (3, 3), activation="relu"), Stage(32)), n=1, c=24, h=20, w=20)
    # A pointwise stage whose input ring wraps in the middle of a run of rows.
    yield ChainCase((Stage(48), Stage(48), DW, Stage(4)), n=1, c=4, h=40, w=60)
    # Rings a few rows high: more than half a megabyte in a row of pixels or two.
    yield ChainCase((Stage(300), DW, Stage(2)), n=1, c=1, h=6, w=300)


def all_chains() -> list[ChainCase]:
    """Every hand-picked case once."""
    cases: dict[ChainCase, None] = {}
    for family in (channel_cases, spatial_cases, geometry_cases, order_cases, network_cases):
        cases.update(dict.fromkeys(family()))
    return list(cases)


# ---- random cases --------------------------------------------------------------------------------

_MAX_MACS = 400_000


def draw_chain(seed: int) -> ChainCase:
    """The random case number `seed`: valid, and of at most `_MAX_MACS` multiply-adds."""
    rng = random.Random(seed)
    while True:
        case = _attempt(rng, seed)
        if all(min(shape) > 0 for shape in case.shapes) and case.macs <= _MAX_MACS:
            return case


def _attempt(rng: random.Random, seed: int) -> ChainCase:
    stages = []
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4, rng.randint(1, 8)))):
        depthwise = rng.random() < 0.4
        r = rng.choice((1, 1, 2, 3, 3, 5, 7))
        same = rng.random() < 0.6
        stages.append(
            Stage(
                k=None if depthwise else rng.choice((1, 2, 8, 16, 24, 32, rng.randint(1, 70))),
                kernel=(r, rng.choice((r, r, 1, 3))),
                stride=(1, 1) if rng.random() < 0.7 else (rng.randint(1, 3), rng.randint(1, 3)),
                padding=None
                if same
                else (rng.randint(0, 4), rng.randint(0, 4), rng.randint(0, 4), rng.randint(0, 4)),
                dilation=(1, 1) if rng.random() < 0.8 else (rng.randint(1, 3), rng.randint(1, 3)),
                bias=rng.random() < 0.6,
                activation=rng.choice(reference.ACTIVATIONS),
                order=rng.choices(WEIGHT_ORDERS, (6, 3, 1, 1, 1, 1))[0],
            )
        )
    side = rng.choice((5, 9, 20, 40))
    return ChainCase(
        tuple(stages),
        n=rng.choice((1, 1, 2, 3)),
        c=rng.choice((1, 3, 8, 16, 17, 32, rng.randint(1, 70))),
        h=rng.randint(1, side),
        w=rng.randint(1, side),
        residual=rng.random() < 0.3,
        dtype=rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64)),
        layout=rng.choices(LAYOUTS, (6, 6, 1, 1, 1, 1, 1, 1, 1))[0],
        integers=rng.random() < 0.5,
        seed=seed,
    )
