"""How the tests call `winograd_conv2d`: problems, the operator, the function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparsecnn.ops
from sparsecnn.formats.winograd import WinogradWeight
from tests import reference, tolerance
from tests.cases import ConvCase, Problem, build, memory_format
from tests.conftest import nan_filled_allocations

BLOCK = 8  # filters of a block of the format
# Tile, and whether the weight is sparse.
KINDS = ((4, False), (2, True), (2, False), (4, True))
LANES = {"scalar": 4, "avx2": 8, "avx512": 16}
DOUBLE_LANES = 2
EXACT_ACTIVATIONS = ("none", "relu", "relu6")


def fits(case: ConvCase) -> bool:
    """Whether the operator takes the geometry of a case."""
    return (case.kernel, case.stride, case.dilation) == ((3, 3), (1, 1), (1, 1))


@dataclass(frozen=True)
class WinogradProblem:
    """A problem whose weight is in the Winograd domain.

    Attributes:
        problem: input, bias and residual; its weight is the spatial one of a dense problem.
        tile: m.
        taps: U, ((m + 2)^2, K, C/G), of the case's dtype.
        values: as the operator takes them.
        col_idx: likewise, None if dense.
        row_ptr: likewise.
    """

    problem: Problem
    tile: int
    taps: Tensor
    values: Tensor
    col_idx: Tensor | None
    row_ptr: Tensor | None

    @property
    def id(self) -> str:
        """What distinguishes it from others of its test, for messages."""
        sparse = "sparse" if self.col_idx is not None else "dense"
        return f"{self.problem.case.id}, tile {self.tile}, {sparse}"

    def but(self, **changes: Any) -> WinogradProblem:
        """With some fields of this or of the problem exchanged."""
        own = {f.name for f in dataclasses.fields(self)}
        inner = {name: changes.pop(name) for name in [*changes] if name not in own}
        problem = dataclasses.replace(self.problem, **inner)
        return dataclasses.replace(self, **({"problem": problem} | changes))

    def on(self, device: str) -> WinogradProblem:
        """With x, bias and residual on a device."""
        named = {name: getattr(self.problem, name) for name in ("x", "bias", "residual")}
        return self.but(**{name: t if t is None else t.to(device) for name, t in named.items()})

    def expected(self) -> Tensor:
        """The reference result, float64."""
        case, p = self.problem.case, self.on("cpu").problem
        return reference.winograd_conv2d(
            p.x,
            self.taps,
            p.bias,
            padding=case.padding,
            groups=case.groups,
            activation=case.activation,
            residual=p.residual,
        )

    def check(self, y: Tensor, cuda: bool = False) -> None:
        """Fail unless `y` is the right result: exact where sums are, else within the bound.

        Args:
            y: the result.
            cuda: whether a CUDA kernel made it, though on the CPU.
        """
        cuda = cuda or y.is_cuda
        case, p, expected = self.problem.case, self.on("cpu").problem, self.expected()
        assert y.dtype == case.dtype, f"{self.id}: dtype {y.dtype}"
        if case.integers and case.activation in EXACT_ACTIVATIONS:
            # Coefficients of F(2) are 1 and -1, taps quarters: exact in float32. Those of F(4) have
            # up to 9 bits behind the point, four of which multiply a term: exact in float64.
            if self.tile == 2 or case.dtype == torch.float64:
                zero = torch.zeros_like(expected)
                want = expected.to(case.dtype).double()
                tolerance.assert_within(y.cpu(), want, zero, self.id)
                return
        magnitude = reference.winograd_magnitude(
            p.x, self.taps, p.bias, padding=case.padding, groups=case.groups, residual=p.residual
        )
        channels, sparse = self.taps.shape[2], self.col_idx is not None
        how = tolerance.winograd_on_cuda(channels, self.tile, sparse, case.dtype) if cuda else {}
        bound = tolerance.winograd_bound(
            magnitude,
            expected,
            channels,
            (p.bias is not None) + (p.residual is not None),
            self.tile,
            case.dtype,
            case.activation,
            **how,
        )
        tolerance.assert_within(y.cpu(), expected, bound, self.id)


def blocks_of(taps: Tensor, groups: int) -> list[Tensor]:
    """Eight filters of one group of the convolution in each: (T, 8, C/G), zeros beyond the last."""
    t, k, c = taps.shape
    blocks = []
    for group in taps.split(k // groups, 1) if k else ():
        for part in group.split(BLOCK, 1):
            block = taps.new_zeros(t, BLOCK, c)
            block[:, : part.shape[1]] = part
            blocks.append(block)
    return blocks


def pack(problem: Problem, tile: int, taps: Tensor, mask: Tensor | None = None) -> WinogradProblem:
    """Lay out taps as the operator takes them, with plain code; sparse at the places of `mask`."""
    groups, device = problem.case.groups, problem.x.device
    blocks = blocks_of(taps, groups)
    if mask is None:
        none = taps.new_zeros(0, len(taps), BLOCK, taps.shape[2])
        values = torch.cat([none, *(block[None] for block in blocks)]).transpose(2, 3).contiguous()
        return WinogradProblem(problem, tile, taps, values.to(device), None, None)
    taps = taps * mask
    stored, columns, row_ptr = [taps.new_empty(0)], [torch.empty(0)], [0]
    for block, kept in zip(blocks, blocks_of(mask, groups), strict=True):
        counts = kept.sum(2).reshape(-1)
        row_ptr += (counts.cumsum(0) + row_ptr[-1]).tolist()
        columns.append(kept.nonzero()[:, 2])
        stored.append(block[kept])
    indices = torch.cat(columns).to(torch.int32), torch.tensor(row_ptr, dtype=torch.int32)
    arrays = (t.to(device) for t in (torch.cat(stored), *indices))
    return WinogradProblem(problem, tile, taps, *arrays)


def make(
    case: ConvCase, tile: int = 4, sparse: bool = False, device: str = "cpu"
) -> WinogradProblem:
    """The problem of a case: its spatial weight transformed, or sparse taps of its pattern.

    F(4) divides by numbers that are no powers of two: with integer data its taps are integers.
    """
    problem = build(case, device)
    t, k, c = (tile + 2) ** 2, case.k, case.c // case.groups
    if not sparse and not (case.integers and tile == 4):
        return pack(problem, tile, reference.winograd_taps(problem.weight, tile).to(case.dtype))
    generator = torch.Generator().manual_seed(case.seed + 2)
    mask = torch.rand(t, k, c, generator=generator) < case.density
    if case.pattern == "full":
        mask[:] = True
    elif case.pattern == "empty":
        mask[:] = False
    elif case.pattern == "some_empty_rows":
        mask[:, ::2] = False
        mask[::3] = False
    elif case.pattern == "one_full_row":
        mask[:] = False
        mask[t // 2, k // 2] = True
    if case.integers:
        taps = torch.randint(-4, 4, mask.shape, generator=generator).double()
        taps += taps >= 0  # a stored value may be zero only by intent
    else:
        taps = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return pack(problem, tile, taps.to(case.dtype), mask if sparse else None)


def op_args(p: WinogradProblem) -> tuple[Any, ...]:
    """Positional arguments of `torch.ops.sparsecnn.winograd_conv2d`."""
    case = p.problem.case
    return (
        p.problem.x,
        p.values,
        p.col_idx,
        p.row_ptr,
        p.problem.bias,
        p.problem.residual,
        case.k,
        p.tile,
        list(case.padding),
        case.groups,
        case.activation,
    )


@functools.cache
def _nan_problem(dtype: torch.dtype) -> WinogradProblem:
    p = make(ConvCase(n=1, c=512, k=8, h=16, w=16, dtype=dtype))
    p.problem.x.fill_(float("nan"))
    return p


def stain_scratch(dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the kernels keep from call to call; see `tests/ops/csr.py`.

    Half a megabyte or more, all of it transformed input: whatever the tested problem keeps there.
    """
    torch.ops.sparsecnn.winograd_conv2d.default(
        *op_args(_nan_problem(tolerance.accumulator(dtype)))
    )


def run_op(p: WinogradProblem) -> Tensor:
    """The registered operator, its allocations and its scratch memory filled with NaN first."""
    if p.problem.x.device.type == "cpu":
        stain_scratch(p.problem.case.dtype)
    with nan_filled_allocations():
        y: Tensor = torch.ops.sparsecnn.winograd_conv2d.default(*op_args(p))
    return y


def weight_of(p: WinogradProblem, values: Tensor | None = None) -> WinogradWeight:
    """The weight of a problem, with other values if given (for gradients)."""
    case = p.problem.case
    first = p.values if values is None else values
    return WinogradWeight(first, p.col_idx, p.row_ptr, case.weight_shape, case.groups, p.tile)


def geometry(p: WinogradProblem) -> dict[str, Any]:
    """Keyword arguments of `sparsecnn.ops.winograd_conv2d` that are not tensors."""
    case = p.problem.case
    return {"padding": case.padding, "groups": case.groups, "activation": case.activation}


def run_function(p: WinogradProblem) -> Tensor:
    """The Python function, with everything from the problem."""
    return sparsecnn.ops.winograd_conv2d(
        p.problem.x, weight_of(p), p.problem.bias, residual=p.problem.residual, **geometry(p)
    )


def tensors_of(p: WinogradProblem) -> Iterable[Tensor]:
    """All tensors the operator is given."""
    return [a for a in op_args(p) if isinstance(a, Tensor)]


def check(p: WinogradProblem) -> Tensor:
    """Run the operator and check values, memory format and that the inputs are untouched."""
    before = [t.clone() for t in tensors_of(p)]
    y = run_op(p)
    p.check(y)
    want = memory_format(p.problem.x)
    assert y.is_contiguous(memory_format=want), f"{p.id}: {y.stride()}, want {want}"
    for tensor, copy in zip(tensors_of(p), before, strict=True):
        assert torch.equal(tensor, copy), f"{p.id}: an input was modified"
    return y
