"""Convolution problems for the operator tests: one dataclass describes one, `build` makes it.

A case holds everything (shape, sparsity pattern, memory layout, dtype, seed), so that its `id` in
a test report is enough to rebuild it. Nothing here imports the package under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests import reference, tolerance

# Stored positions: "random" honours `density`; the others are the corners of the format.
PATTERNS = ("random", "full", "empty", "some_empty_rows", "one_full_row")
# How x lies in memory; the first two are the operator's own layouts, the rest are views.
LAYOUTS = (
    "contiguous",
    "channels_last",
    "offset",
    "channels_last_offset",
    "transposed",
    "sliced",
    "strided",
    "expanded_batch",
    "expanded_channels",
)


@dataclass(frozen=True)
class ConvCase:
    """One convolution with a sparse weight; sizes as in `torch.nn.Conv2d`.

    Attributes:
        n: batch N.
        c: input channels C.
        h: input height H.
        w: input width W.
        k: output channels K.
        kernel: (R, S).
        stride: (vertical, horizontal).
        padding: (top, bottom, left, right).
        dilation: (vertical, horizontal).
        groups: G.
        density: share of stored positions for the pattern "random".
        pattern: one of `PATTERNS`.
        bias: with a bias (K,).
        residual: with a residual (N, K, P, Q).
        activation: fused activation.
        dtype: of all tensors.
        layout: one of `LAYOUTS`.
        integers: small integer data, so that fp32 sums are exact.
        seed: of the data.
    """

    n: int = 2
    c: int = 5
    h: int = 9
    w: int = 8
    k: int = 6
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.3
    pattern: str = "random"
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    integers: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        """The fields that differ from the defaults, for test names and messages."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = str(value).replace("torch.", "").replace(" ", "")
                parts.append(f"{field.name}={text}")
        return ",".join(parts) or "default"

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(K, C/G, R, S)."""
        return (self.k, self.c // self.groups, *self.kernel)

    @property
    def out_size(self) -> tuple[int, int]:
        """(P, Q)."""
        top, bottom, left, right = self.padding
        return (
            reference.out_extent(
                self.h, top, bottom, self.dilation[0], self.kernel[0], self.stride[0]
            ),
            reference.out_extent(
                self.w, left, right, self.dilation[1], self.kernel[1], self.stride[1]
            ),
        )

    def but(self, **changes: object) -> ConvCase:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Problem:
    """The tensors of one case.

    Attributes:
        case: what it was built from.
        x: (N, C, H, W) in the layout of the case.
        weight: dense (K, C/G, R, S) on the CPU, zeros at the positions that are not stored.
        values: (nnz,).
        col_idx: (nnz,) int32.
        row_ptr: (K + 1,) int32.
        bias: (K,) or None.
        residual: (N, K, P, Q) or None, in the memory format of x.
    """

    case: ConvCase
    x: Tensor
    weight: Tensor
    values: Tensor
    col_idx: Tensor
    row_ptr: Tensor
    bias: Tensor | None
    residual: Tensor | None

    @property
    def nnz(self) -> int:
        """Stored positions."""
        return self.values.numel()

    def expected(self) -> Tensor:
        """The reference result, float64."""
        case = self.case
        return reference.conv2d(
            self.x,
            self.weight,
            self.bias,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
            activation=case.activation,
            residual=self.residual,
        )

    def bound(self, expected: Tensor, tf32: bool = False) -> Tensor:
        """Allowed error of each output, see `tests/tolerance.py`."""
        case = self.case
        magnitude = reference.conv2d_magnitude(
            self.x,
            self.weight,
            self.bias,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
            residual=self.residual,
        )
        row_nnz = self.row_ptr.cpu().diff()
        terms = int(row_nnz.max()) + int(case.bias) + int(case.residual)
        return tolerance.conv_bound(
            magnitude, expected, terms, case.dtype, case.activation, tf32=tf32
        )

    def check(self, y: Tensor, tf32: bool = False) -> None:
        """Fail unless `y` is the right result: exact for integers, else within the bound."""
        expected = self.expected()
        exact_activation = self.case.activation in ("none", "relu", "relu6")
        assert y.dtype == self.case.dtype, f"{self.case.id}: dtype {y.dtype}"
        assert y.device.type == self.x.device.type
        if self.case.integers and exact_activation:
            # Sums of small integers are exact in float32; one rounding to the storage type.
            want = expected.to(self.case.dtype)
            got = y.detach().cpu()
            assert got.shape == want.shape, f"{self.case.id}: {got.shape} != {want.shape}"
            if not torch.equal(got, want):
                tolerance.assert_within(
                    got, want.double(), torch.zeros_like(expected), self.case.id
                )
                raise AssertionError(f"{self.case.id}: differs from the exact result")
            return
        tolerance.assert_within(y, expected, self.bound(expected, tf32), self.case.id)


def _generator(case: ConvCase) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed + 1)


def _draw(shape: tuple[int, ...], case: ConvCase, generator: torch.Generator) -> Tensor:
    if case.integers:
        drawn = torch.randint(-4, 5, shape, generator=generator).double()
    else:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(case.dtype)


def _mask(case: ConvCase, generator: torch.Generator) -> Tensor:
    rows, columns = case.k, case.c // case.groups * case.kernel[0] * case.kernel[1]
    mask = torch.rand(rows, columns, generator=generator) < case.density
    if case.pattern == "full":
        mask[:] = True
    elif case.pattern == "empty":
        mask[:] = False
    elif case.pattern == "some_empty_rows":
        mask[::2] = False
    elif case.pattern == "one_full_row":
        mask[:] = False
        mask[rows // 2] = True
    return mask


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in a tensor of another memory layout.

    Args:
        x: contiguous (N, C, H, W).
        layout: one of `LAYOUTS`. The two "expanded" ones repeat the first image or channel, so
            their values differ from `x`; the result is what counts.

    Returns:
        (N, C, H, W); a view of a larger or permuted buffer except for the first two layouts.
    """
    n, c, h, w = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        buffer = x.new_full((x.numel() + 3,), float("nan"))
        buffer[3:] = x.reshape(-1)
        return buffer[3:].view(n, c, h, w)
    if layout == "channels_last_offset":
        buffer = x.new_full((x.numel() + 5,), float("nan"))
        buffer[5:] = x.permute(0, 2, 3, 1).reshape(-1)
        return buffer[5:].view(n, h, w, c).permute(0, 3, 1, 2)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        big = x.new_full((n, c + 2, h + 3, w + 1), float("nan"))
        big[:, 1 : 1 + c, 2 : 2 + h, :w] = x
        return big[:, 1 : 1 + c, 2 : 2 + h, :w]
    if layout == "strided":
        big = x.new_full((n, c, h, 2 * w), float("nan"))
        big[..., ::2] = x
        return big[..., ::2]
    if layout == "expanded_batch":
        return x[:1].expand(n, c, h, w) if n else x
    if layout == "expanded_channels":
        return x[:, :1].expand(n, c, h, w)
    raise ValueError(f"unknown layout {layout}")


def memory_format(x: Tensor) -> torch.memory_format:
    """The format the operator must answer in: that of x, contiguous where x is neither."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def build(case: ConvCase, device: str = "cpu") -> Problem:
    """Make the tensors of a case; the CSR arrays are built here, not by the package.

    Args:
        case: the description.
        device: where all tensors but the dense `weight` live.

    Returns:
        The problem; equal for equal cases.
    """
    generator = _generator(case)
    mask = _mask(case, generator)
    weight = _draw(tuple(mask.shape), case, generator)
    # A stored value may be zero only by intent: a kernel that skips zeros is not being tested.
    weight = torch.where(weight == 0, torch.ones_like(weight), weight) * mask
    row_ptr = torch.zeros(case.k + 1, dtype=torch.int32)
    row_ptr[1:] = mask.sum(1).cumsum(0)
    col_idx = mask.nonzero()[:, 1].to(torch.int32)
    x = _draw((case.n, case.c, case.h, case.w), case, generator)
    bias = _draw((case.k,), case, generator) if case.bias else None
    x = lay_out(x.to(device), case.layout)
    residual = None
    if case.residual:
        residual = _draw((case.n, case.k, *case.out_size), case, generator).to(device)
        residual = residual.contiguous(memory_format=memory_format(x))
    return Problem(
        case=case,
        x=x,
        weight=weight.reshape(case.weight_shape),
        values=weight[mask].to(device),
        col_idx=col_idx.to(device),
        row_ptr=row_ptr.to(device),
        bias=None if bias is None else bias.to(device),
        residual=residual,
    )


# Vector widths of the ISAs in floats (SSE/scalar 1, AVX2 8, AVX-512 16), pairs of vectors, and
# their neighbours: where a lane-wise kernel changes code path.
LANE_BOUNDARIES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33)


def channel_cases() -> Iterator[ConvCase]:
    """Channel counts around the vector widths."""
    for count in LANE_BOUNDARIES:
        yield ConvCase(c=count, k=3, h=5, w=6)
        yield ConvCase(c=3, k=count, h=5, w=6)
    yield ConvCase(c=1, k=1, h=4, w=4)


def spatial_cases() -> Iterator[ConvCase]:
    """Every width 1..20, the sizes of real networks, and images of one row or one column."""
    for size in range(1, 21):
        yield ConvCase(n=1, h=3, w=size)
        yield ConvCase(n=1, h=size, w=size, kernel=(1, 1), padding=(0, 0, 0, 0))
    for size in (27, 28, 33, 55, 56, 57):
        yield ConvCase(n=1, c=3, k=2, h=size, w=size)
    yield ConvCase(h=1, w=1)
    yield ConvCase(h=1, w=17)
    yield ConvCase(h=17, w=1)
    yield ConvCase(h=1, w=17, kernel=(1, 1), padding=(0, 0, 0, 0))
    yield ConvCase(h=7, w=1, kernel=(1, 1), padding=(0, 0, 0, 0))


def batch_cases() -> Iterator[ConvCase]:
    """Batches around the vector widths, and none."""
    for n in (0, 1, 2, 3, 5, 15, 16, 17):
        yield ConvCase(n=n, h=5, w=5)
    yield ConvCase(n=0, residual=True, activation="relu")
    yield ConvCase(n=16, c=8, k=8, h=7, w=7, kernel=(1, 1), padding=(0, 0, 0, 0))


def kernel_cases() -> Iterator[ConvCase]:
    """Filter sizes, strides, dilations and pads, each beyond what the others allow."""
    for kernel in ((1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (1, 7), (7, 1), (11, 11), (4, 3)):
        pad = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
        yield ConvCase(kernel=kernel, padding=pad, h=12, w=13)
        yield ConvCase(kernel=kernel, padding=(0, 0, 0, 0), h=12, w=13)
    for stride in ((2, 2), (3, 3), (2, 1), (1, 2), (5, 4)):
        yield ConvCase(stride=stride, h=14, w=15)
        yield ConvCase(stride=stride, h=14, w=15, kernel=(1, 1), padding=(0, 0, 0, 0))
        yield ConvCase(stride=stride, h=14, w=15, kernel=(2, 2), padding=(0, 0, 0, 0))
    for dilation in ((2, 2), (3, 3), (12, 12), (1, 4), (3, 2)):
        pad = (dilation[0], dilation[0], dilation[1], dilation[1])
        yield ConvCase(dilation=dilation, padding=pad, h=13, w=14)
        yield ConvCase(dilation=dilation, padding=(0, 0, 0, 0), h=26, w=27, c=2, k=2)
    yield ConvCase(dilation=(2, 3), stride=(2, 2), padding=(2, 2, 3, 3), h=11, w=17)
    for padding in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 2, 3)):
        yield ConvCase(padding=padding)
        yield ConvCase(padding=padding, stride=(2, 2))
    yield ConvCase(padding=(5, 4, 6, 7), h=4, w=4)
    yield ConvCase(padding=(2, 3, 1, 2), kernel=(1, 1), h=4, w=4)
    yield ConvCase(padding=(9, 0, 0, 9), h=2, w=2, stride=(2, 2))


def group_cases() -> Iterator[ConvCase]:
    """Grouped and depthwise convolutions, with channel multiplier."""
    yield ConvCase(c=6, k=4, groups=2)
    yield ConvCase(c=9, k=6, groups=3, stride=(2, 2))
    yield ConvCase(c=6, k=6, groups=6, density=0.6)
    yield ConvCase(c=6, k=6, groups=6, pattern="full")
    yield ConvCase(c=5, k=15, groups=5, density=0.6)
    yield ConvCase(c=16, k=16, groups=16, h=7, w=7, kernel=(5, 5), padding=(2, 2, 2, 2))
    yield ConvCase(c=8, k=4, groups=4, kernel=(1, 1), padding=(0, 0, 0, 0), pattern="full")


def pattern_cases() -> Iterator[ConvCase]:
    """Corners of the format: empty rows, empty and full matrices, one lonely row, one entry."""
    for pattern in PATTERNS[1:]:
        yield ConvCase(pattern=pattern)
        yield ConvCase(pattern=pattern, bias=False, activation="relu")
        yield ConvCase(pattern=pattern, kernel=(1, 1), padding=(0, 0, 0, 0), k=7, c=20)
    yield ConvCase(density=0.02, k=17, c=9)
    yield ConvCase(density=0.9, k=5, c=40, kernel=(1, 1), padding=(0, 0, 0, 0))
    # Long rows: several blocks of input channels.
    yield ConvCase(density=0.2, k=4, c=200, h=5, w=5)
    yield ConvCase(density=0.1, k=64, c=300, h=4, w=4, kernel=(1, 1), padding=(0, 0, 0, 0))


def epilogue_cases() -> Iterator[ConvCase]:
    """Bias, residual and activation in all combinations."""
    for activation in reference.ACTIVATIONS:
        for bias in (False, True):
            for residual in (False, True):
                yield ConvCase(activation=activation, bias=bias, residual=residual)
    yield ConvCase(residual=True, activation="relu", stride=(2, 2), k=17)
    yield ConvCase(residual=True, activation="hardswish", pattern="empty")


def layout_cases() -> Iterator[ConvCase]:
    """Every memory layout, with and without a residual."""
    for layout in LAYOUTS:
        yield ConvCase(layout=layout)
        yield ConvCase(layout=layout, c=17, k=16, w=5, residual=True)
        yield ConvCase(layout=layout, kernel=(1, 1), padding=(0, 0, 0, 0), c=8, k=9)


def network_cases() -> Iterator[ConvCase]:
    """Layers of real networks with few filters: large maps, many channels, several blocks."""
    one = {"kernel": (1, 1), "padding": (0, 0, 0, 0)}
    yield ConvCase(n=1, c=64, k=9, h=56, w=56, density=0.1)
    yield ConvCase(n=1, c=128, k=9, h=28, w=28, density=0.05)
    yield ConvCase(n=3, c=256, k=9, h=14, w=14, density=0.1)
    yield ConvCase(n=1, c=512, k=9, h=7, w=7, density=0.1)
    yield ConvCase(n=17, c=96, k=9, h=7, w=7, density=0.1)
    yield ConvCase(n=1, c=256, k=9, h=56, w=56, density=0.1).but(**one)
    yield ConvCase(n=1, c=1024, k=33, h=14, w=14, density=0.05).but(**one)
    yield ConvCase(n=2, c=512, k=70, h=7, w=7, density=0.1).but(**one)
    yield ConvCase(n=1, c=128, k=9, h=56, w=56, stride=(2, 2), density=0.1)
    yield ConvCase(n=1, c=3, k=17, h=112, w=112, kernel=(7, 7), stride=(2, 2)).but(
        padding=(3, 3, 3, 3)
    )
    yield ConvCase(n=1, c=64, k=24, h=28, w=28, groups=4, density=0.2, residual=True)


def all_cases() -> list[ConvCase]:
    """Every hand-picked case once, in contiguous layout unless the case is about layouts."""
    cases: dict[ConvCase, None] = {}
    for family in (
        channel_cases,
        spatial_cases,
        batch_cases,
        kernel_cases,
        group_cases,
        pattern_cases,
        epilogue_cases,
        layout_cases,
        network_cases,
    ):
        cases.update(dict.fromkeys(family()))
    return list(cases)
