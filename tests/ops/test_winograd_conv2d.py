"""Values of winograd_conv2d: every hand-picked case, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecnn
import sparsecnn.ops
from sparsecnn.formats.csr import CSRWeight
from sparsecnn.formats.winograd import WinogradWeight, error_growth
from tests import cases as families
from tests import reference, tolerance
from tests.cases import ConvCase, build, lay_out
from tests.ops.winograd import (
    DOUBLE_LANES,
    KINDS,
    LANES,
    WinogradProblem,
    check,
    fits,
    make,
    op_args,
    pack,
    run_function,
    run_op,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DTYPES_OF = {"cpu": DTYPES, "cuda": (torch.float32, torch.bfloat16, torch.float16)}
BOTH_LAYOUTS = ("contiguous", "channels_last")
kinds = pytest.mark.parametrize("tile, sparse", KINDS)


def extra_cases() -> list[ConvCase]:
    """What the shared families lack: filters around blocks, nothing at all, pads beyond a tile."""
    return [
        *(ConvCase(k=k, h=6, w=7, c=4) for k in (7, 8, 9, 24, 31, 32, 33, 40, 65, 70)),
        ConvCase(c=12, k=15, groups=3, h=7, w=10),
        ConvCase(c=4, k=80, groups=2, h=5, w=6, residual=True),
        *(ConvCase(padding=p, h=5, w=6) for p in ((0, 0, 0, 0), (9, 7, 0, 12), (0, 1, 11, 0))),
        ConvCase(h=3, w=3, padding=(0, 0, 0, 0)),
        ConvCase(h=0, padding=(2, 1, 1, 1)),
        ConvCase(w=0, padding=(1, 1, 2, 2)),
        ConvCase(c=0),
        ConvCase(k=0),
    ]


CASES = list(enumerate([*filter(fits, families.all_cases()), *extra_cases()]))


@pytest.mark.parametrize("number, case", CASES, ids=lambda v: getattr(v, "id", str(v)))
def test_result(number: int, case: ConvCase, backend: str) -> None:
    """With real and integer data, in both memory formats; tiles, kinds and dtypes take turns."""
    layouts = BOTH_LAYOUTS if case.layout == "contiguous" else (case.layout,)
    for i, layout in enumerate(layouts):
        turn = number + 2 * i
        check(make(case.but(layout=layout), *KINDS[turn % 4], backend))
        dtype = DTYPES_OF[backend][turn // 4 % 3]
        exact = case.but(layout=layout, dtype=dtype, integers=True)
        check(make(exact, *KINDS[(turn + 1) % 4], backend))


def lanes_of(isa: str, dtype: torch.dtype) -> int:
    """Tiles in a vector."""
    return DOUBLE_LANES if dtype == torch.float64 else LANES[isa]


# Vectors of tiles of one run, up to what the sparse kernel takes; then two runs, three, many.
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 6, 7, 8, 13, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_every_number_of_vectors(
    tile: int, sparse: bool, dtype: torch.dtype, vectors: int, isa: str
) -> None:
    """Runs of each length, the last vector full, with one lane missing and with one lane."""
    lanes = lanes_of(isa, dtype)
    for missing, layout in ((0, "contiguous"), (1, "contiguous"), (lanes - 1, "channels_last")):
        tiles = vectors * lanes - missing
        rows = next(r for r in (4, 3, 2, 1) if tiles % r == 0)
        h, w = rows * tile, tiles // rows * tile - missing % tile  # a last tile that is narrower
        case = ConvCase(n=1, c=3, k=5, h=h, w=w, dtype=dtype, integers=True, layout=layout)
        check(make(case, tile, sparse))
        # As many images of one tile: each lane has its own.
        few = case.but(n=tiles, h=tile, w=tile - 1, c=2, k=2)
        check(make(few, tile, sparse))


@pytest.mark.parametrize("c", [64, 70, 96, 128, 190, 300, 400, 640, 1200])
@kinds
def test_wide_layers_take_shorter_runs(tile: int, sparse: bool, c: int, backend: str) -> None:
    """The transformed input of a run is limited: every number of vectors from 6 down to 1."""
    side = tile * math.isqrt(7 * LANES[sparsecnn.isa()])
    case = ConvCase(n=1, c=c, k=3, h=side, w=side, density=0.1, integers=True)
    check(make(case, tile, sparse, backend))
    check(make(case.but(integers=False, layout="channels_last", k=1), tile, sparse, backend))


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("spare", range(-4, 5))
@kinds
def test_widths_around_vectors(
    tile: int, sparse: bool, spare: int, layout: str, isa: str
) -> None:
    """The masks of the last columns of a tile row, where it ends in, at or behind a vector."""
    for vectors in (1, 2):
        width = vectors * LANES[isa] * tile + spare
        case = ConvCase(n=2, c=2, k=2, h=tile + 1, w=width, layout=layout, integers=tile == 2)
        check(make(case, tile, sparse))
        check(make(case.but(padding=(0, 2, 2, 1), dtype=torch.bfloat16), tile, sparse))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_tile_rows_that_share_a_vector(
    tile: int, sparse: bool, dtype: torch.dtype, rows: int, isa: str
) -> None:
    """m tile rows of an m-th of a vector each: all there or not, of one image or several."""
    width = max(1, lanes_of(isa, dtype) // tile) * tile
    for n, spare in ((1, 0), (2, 1), (3, tile - 1)):
        case = ConvCase(
            n=n, c=3, k=4, h=rows * tile - spare, w=width - spare, dtype=dtype, integers=True,
            residual=n == 2, activation="relu",
        )  # fmt: skip
        check(make(case, tile, sparse))
        moved = case.but(padding=(0, 2, 0, 2), h=case.h + spare, w=case.w + spare)
        check(make(moved, tile, sparse))


@pytest.mark.parametrize("lengths", [(0, 0, 0, 5), (5, 1, 0, 3), (4, 4, 4, 4), (1, 2, 3, 7)])
def test_rows_of_all_lengths_side_by_side(lengths: tuple[int, ...], isa: str) -> None:
    """Few vectors take several rows of the sparse matrix together, each to its own end."""
    for tile, vectors in ((2, 1), (4, 1), (2, 2), (4, 3), (2, 4)):
        case = ConvCase(n=vectors * LANES[isa], c=7, k=19, h=tile, w=tile, density=1)
        p = make(case.but(integers=True), tile, True)
        mask = torch.zeros_like(p.taps, dtype=torch.bool)
        for row in range(p.taps.shape[0] * 19):
            first = row % 3 if lengths[row % 4] < 5 else 0
            mask.view(-1, 7)[row, first : first + lengths[row % 4]] = True
        check(pack(p.problem, tile, p.taps, mask))


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("integers", [False, True])
def test_small_integers_are_exact_with_tiles_of_two(
    integers: bool, layout: str, backend: str
) -> None:
    """A spatial weight of integers has taps that are quarters; and those of torch are the same."""
    case = ConvCase(n=3, c=40, k=21, h=17, w=23, pattern="full", integers=True, layout=layout)
    for dtype in DTYPES_OF[backend]:
        problem = build(case.but(dtype=dtype), backend)
        if not integers:  # quarters all over
            problem.x.div_(4)
        weight = WinogradWeight.from_dense(problem.weight.to(backend), tile=2)
        y = sparsecnn.ops.winograd_conv2d(problem.x, weight, problem.bias, padding=1)
        assert problem.bias is not None
        x, w, b = (t.cpu().double() for t in (problem.x, problem.weight, problem.bias))
        assert torch.equal(y.cpu(), F.conv2d(x, w, b, 1, 1).to(dtype))


@kinds
def test_function_calls_the_operator(tile: int, sparse: bool, backend: str) -> None:
    for layout in BOTH_LAYOUTS:
        case = ConvCase(layout=layout, residual=True, activation="silu")
        p = make(case, tile, sparse, backend)
        assert torch.equal(run_function(p), run_op(p))


@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("x_layout", BOTH_LAYOUTS)
def test_residual_may_lie_differently(x_layout: str, residual_layout: str, backend: str) -> None:
    for tile, sparse in KINDS:
        case = ConvCase(residual=True, layout=x_layout, activation="relu")
        p = make(case, tile, sparse, backend)
        assert p.problem.residual is not None
        check(p.but(residual=lay_out(p.problem.residual.contiguous(), residual_layout)))


@pytest.mark.parametrize("layout", families.LAYOUTS)
@kinds
def test_every_layout(tile: int, sparse: bool, layout: str, backend: str) -> None:
    for dtype in DTYPES_OF[backend]:
        case = ConvCase(layout=layout, c=17, k=9, w=11, dtype=dtype)
        check(make(case, tile, sparse, backend))


@kinds
def test_views_of_the_weight_arrays(tile: int, sparse: bool, backend: str) -> None:
    """Values, indices and bias as every-other-element views of larger buffers."""

    def view(t: Tensor) -> Tensor:
        big = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 77)
        big[..., ::2] = t
        return big[..., ::2]

    p = make(ConvCase(c=17, k=9), tile, sparse, backend)
    assert p.problem.bias is not None
    changes = {"values": view(p.values), "bias": view(p.problem.bias)}
    if p.col_idx is not None and p.row_ptr is not None:
        changes |= {"col_idx": view(p.col_idx), "row_ptr": view(p.row_ptr)}
    else:
        changes["values"] = p.values.transpose(0, 3).contiguous().transpose(0, 3)
    assert not changes["values"].is_contiguous()
    check(p.but(**changes))


@pytest.mark.parametrize("tile", [2, 4])
def test_stored_zeros_are_legal(tile: int, backend: str) -> None:
    p = make(ConvCase(integers=True), tile, True, backend)
    mask = p.taps != 0
    taps = p.taps.clone()
    taps[:, ::3] = 0
    zeros = pack(p.problem, tile, taps, mask)
    assert zeros.values.numel() == p.values.numel() and not bool(zeros.values.all())
    check(zeros)


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("tile", [2, 4])
def test_dense_and_full_sparse_weights_agree_to_the_bit(tile: int, layout: str, isa: str) -> None:
    """One chain of sums over ascending channels, whatever the kernel."""
    for dtype in DTYPES:
        case = ConvCase(n=2, c=33, k=19, h=21, w=18, dtype=dtype, layout=layout, residual=True)
        dense = make(case, tile)
        full = pack(dense.problem, tile, dense.taps, torch.ones_like(dense.taps, dtype=torch.bool))
        assert torch.equal(run_op(dense), run_op(full))


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@kinds
def test_infinities_stay_in_their_tiles(tile: int, sparse: bool, layout: str, backend: str) -> None:
    """A pixel that is not finite reaches the tiles that read it, and no other output."""
    case = ConvCase(n=3, c=5, k=7, h=19, w=26, layout=layout, density=0.5)
    p = make(case, tile, sparse, backend)
    clean = run_op(p).cpu()
    hit = torch.zeros(case.n, 1, case.h, case.w)
    for n, c, h, w in ((0, 2, 0, 0), (1, 4, 18, 25), (1, 0, 8, 12)):
        hit[n, 0, h, w] = 1
        p.problem.x[n, c, h, w] = (float("inf"), float("nan"))[c % 2]
    # All of a tile is reached when any of its inputs is hit.
    rows, columns = -(-case.h // tile), -(-case.w // tile)
    padded = F.pad(hit, (1, columns * tile + 1 - case.w, 1, rows * tile + 1 - case.h))
    read = F.max_pool2d(padded, tile + 2, tile).repeat_interleave(tile, 2)
    read = read.repeat_interleave(tile, 3)[:, :, : case.h, : case.w].expand_as(clean) > 0
    y = run_op(p).cpu()
    assert not bool(read.all()) and torch.equal(y[~read], clean[~read])
    assert bool((~y.isfinite() & read).any((1, 2, 3))[:2].all())


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@kinds
def test_nothing_beside_the_image_is_read(
    tile: int, sparse: bool, layout: str, backend: str
) -> None:
    """The memory before and behind x holds NaN."""
    for dtype, w in zip(DTYPES_OF[backend], (13, 37, 6), strict=True):
        case = ConvCase(n=1, c=3, k=4, h=7, w=w, dtype=dtype, layout=layout)
        p = make(case, tile, sparse, backend)
        x = p.problem.x
        around = x.new_full((x.numel() + 200,), float("nan"))
        inside = around[100:-100].as_strided(x.shape, x.stride(), 100)
        inside.copy_(x)
        check(p.but(x=inside))


THREAD_CASES = [
    # One vector of tiles and many filters: shared out by filters.
    ConvCase(n=1, c=24, k=130, h=8, w=8, density=0.1),
    ConvCase(n=1, c=16, k=70, h=7, w=5, layout="channels_last", residual=True),
    ConvCase(n=1, c=64, k=33, h=28, w=28, density=0.1),
    ConvCase(n=3, c=24, k=48, h=15, w=13, groups=3, residual=True, activation="silu"),
    ConvCase(n=1, c=320, k=40, h=9, w=9, density=0.05, dtype=torch.bfloat16),
    ConvCase(n=5, c=9, k=9, h=30, w=31, layout="channels_last", dtype=torch.float64),
]


@pytest.mark.parametrize("case", THREAD_CASES, ids=lambda case: case.id)
@kinds
def test_threads_do_not_change_a_bit(
    case: ConvCase, tile: int, sparse: bool, isa: str, threads: None
) -> None:
    p = make(case, tile, sparse)
    want = check(p)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(run_op(p), want), count


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@kinds
def test_a_batch_is_its_images_to_the_bit(
    tile: int, sparse: bool, layout: str, backend: str
) -> None:
    """Whichever lanes and runs an image's tiles fall into."""
    for case in (
        ConvCase(n=7, c=9, k=11, h=10, w=13, layout=layout),
        ConvCase(n=19, c=4, k=6, groups=2, h=3, w=4, layout=layout, dtype=torch.bfloat16),
    ):
        p = make(case.but(activation="hardswish"), tile, sparse, backend)
        y = run_op(p)
        for n in range(case.n):
            alone = p.but(x=p.problem.x[n : n + 1], case=p.problem.case.but(n=1))
            assert torch.equal(run_op(alone), y[n : n + 1]), n


@pytest.mark.parametrize("tile", [2, 4])
def test_many_shapes_share_one_weight(tile: int, backend: str) -> None:
    for sparse in (False, True):
        want = make(ConvCase(c=12, k=18), tile, sparse, backend).values
        for h, w in ((5, 5), (9, 8), (17, 3), (1, 1), (30, 31)):
            p = make(ConvCase(n=1, c=12, k=18, h=h, w=w), tile, sparse, backend)
            assert torch.equal(p.values, want) and op_args(p)[0].shape == (1, 12, h, w)
            check(p)


# ---- against the direct convolution --------------------------------------------------------------


def transformed(problem: families.Problem, tile: int) -> Tensor:
    """Through the package's own transform, with the padding 1."""
    weight = WinogradWeight.from_dense(problem.weight, problem.case.groups, tile)
    return sparsecnn.ops.winograd_conv2d(
        problem.x, weight, problem.bias, padding=1, groups=problem.case.groups
    )


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_the_error_grows_no_more_than_it_may(layout: str, tile: int, isa: str) -> None:
    """|y - conv| <= n u error_growth * sum over c of max |w_c| max |x_c|, for the worst inputs too.

    n counts the roundings of a term: those of `tolerance.winograd_bound`, and one of its tap.
    """
    for case in (
        ConvCase(n=2, c=37, k=12, h=19, w=14, pattern="full", layout=layout),
        ConvCase(n=1, c=8, k=6, h=9, w=9, groups=2, pattern="full", dtype=torch.float64),
    ):
        problem = build(case)
        group_channels = case.c // case.groups
        largest = float(problem.weight.abs().max() * problem.x.abs().max()) * group_channels
        u = tolerance.unit_roundoff(case.dtype)
        terms = (2 if case.dtype == torch.float64 else 1) * (group_channels + 18 + 1 + 1)
        bound = terms * u * error_growth(tile) * largest + terms * u
        error = (transformed(problem, tile).double() - problem.expected()).abs().max()
        assert 0 < float(error) <= bound
        # And by far not as much on average, which is what makes the tiles worth having.
        assert float(error) < bound / 20


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("positive", [False, True], ids=["normal", "rectified"])
def test_the_accuracy_that_is_documented(channels: int, positive: bool, isa: str) -> None:
    """Root mean squares of the error with random data, of the output's and of csr_conv2d's."""
    problem = build(
        ConvCase(n=1, c=channels, k=16, h=24, w=24, pattern="full", bias=False, seed=channels)
    )
    if positive:
        problem.x.relu_()
    expected = problem.expected()

    def rms(y: Tensor) -> float:
        return float((y.double() - expected).square().mean() / expected.square().mean()) ** 0.5

    csr = CSRWeight.from_dense(problem.weight)
    direct = rms(sparsecnn.ops.csr_conv2d(problem.x, csr, padding=1))
    small, large = (rms(transformed(problem, tile)) for tile in (2, 4))
    assert 2e-7 < small < 5e-7 and 6e-7 < large < 1.5e-6
    assert 0.55 < small / direct < 0.8 and 1.65 < large / direct < 2.3


@pytest.mark.parametrize("tile, percent", [(2, 0.5), (4, 2)])
def test_the_accuracy_of_bfloat16_that_is_documented(tile: int, percent: float, isa: str) -> None:
    case = ConvCase(n=1, c=64, k=16, h=24, w=24, pattern="full", dtype=torch.bfloat16, bias=False)
    problem = build(case)
    expected = problem.expected()
    error = (transformed(problem, tile).double() - expected).abs().max() / expected.abs().max()
    assert percent / 3 < 100 * float(error) < percent


def test_problems_are_what_they_say() -> None:
    """The packing of these tests is not the package's; both describe the same taps."""
    for tile, sparse in KINDS:
        for case in (ConvCase(c=6, k=20, groups=2), ConvCase(pattern="some_empty_rows")):
            p: WinogradProblem = make(case, tile, sparse)
            packed = WinogradWeight.from_taps(p.taps, case.groups, sparse=sparse)
            assert torch.equal(packed.values, p.values)
            if sparse:
                assert torch.equal(packed.col_idx, p.col_idx)
                assert torch.equal(packed.row_ptr, p.row_ptr)
            else:
                spatial = reference.winograd_taps(p.problem.weight, tile)
                assert torch.equal(p.taps, spatial.float())
