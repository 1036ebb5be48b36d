"""What csr_conv2d keeps of a weight between calls must never show: changes, reuse, threads."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import reference
from tests.cases import LAYOUTS, ConvCase, Problem, build, lay_out
from tests.ops.csr import POINTWISE, op_args

# From the third call with the same contents on, the second one's copy of the weight is used.
CALLS_UNTIL_KEPT = 2
CASE = ConvCase(n=1, c=64, k=32, h=8, w=8, bias=False, integers=True)
# One vector of output or less, where the weight is read as it is stored.
SMALL = CASE.but(h=2, w=2)
# Late, so that even a single entry lies before it.
EMPTY_ROW = 30
# Around one word, one block and several blocks of the contents' hash.
NNZ = (1, 7, 63, 64, 65, 1000, 5000)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def call(problem: Problem) -> Tensor:
    y: Tensor = torch.ops.sparsecnn.csr_conv2d.default(*op_args(problem))
    return y


def keep(problem: Problem) -> None:
    """Call until the next call finds the weight's copy, if its contents stay the same."""
    for _ in range(CALLS_UNTIL_KEPT):
        call(problem)


def dense_of(problem: Problem) -> Tensor:
    """The dense weight of the CSR arrays as they are now, float64."""
    rows = torch.repeat_interleave(torch.arange(problem.case.k), problem.row_ptr.diff().long())
    dense = torch.zeros(problem.case.k, math.prod(problem.case.weight_shape[1:])).double()
    dense[rows, problem.col_idx.long()] = problem.values.detach().double()
    return dense.reshape(problem.case.weight_shape)


def now(problem: Problem) -> Problem:
    """The problem with the dense weight that its CSR arrays hold now."""
    return dataclasses.replace(problem, weight=dense_of(problem))


def check_now(problem: Problem) -> None:
    now(problem).check(call(problem))


def weight_with(problem: Problem, nnz: int, seed: int = 0) -> Problem:
    """The problem with another weight of exactly nnz entries; row EMPTY_ROW stays empty.

    Neither x nor values have zeros, so that every change of the weight changes the output.
    """
    case = problem.case
    generator = torch.Generator().manual_seed(seed)
    columns = math.prod(case.weight_shape[1:])
    place = torch.randperm((case.k - 1) * columns, generator=generator)[:nnz].sort().values
    row = place // columns
    row += row >= EMPTY_ROW
    row_ptr = torch.zeros(case.k + 1, dtype=torch.int32)
    row_ptr[1:] = torch.bincount(row, minlength=case.k).cumsum(0)
    changed = dataclasses.replace(
        problem,
        x=torch.where(problem.x == 0, torch.ones_like(problem.x), problem.x),
        values=torch.randint(1, 5, (nnz,), generator=generator).to(case.dtype),
        col_idx=(place % columns).to(torch.int32),
        row_ptr=row_ptr,
    )
    return now(changed)


def by_index(values: Tensor, i: int, new: float) -> None:
    values[i] = new


def by_data(values: Tensor, i: int, new: float) -> None:
    values.data[i] = new


def by_numpy(values: Tensor, i: int, new: float) -> None:
    word = torch.int16 if values.dtype == torch.bfloat16 else values.dtype
    values.view(word).numpy()[i] = torch.tensor(new, dtype=values.dtype).view(word).item()


def by_copy(values: Tensor, i: int, new: float) -> None:
    changed = values.clone()
    changed[i] = new
    with torch.no_grad():
        values.copy_(changed)


CHANGES: list[Callable[[Tensor, int, float], None]] = [by_index, by_data, by_numpy, by_copy]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nnz", NNZ)
def test_a_value_changed_in_place(nnz: int, dtype: torch.dtype, isa: str) -> None:
    for case in (CASE, SMALL):
        problem = weight_with(build(case.but(dtype=dtype)), nnz)
        for change, i in itertools.product(CHANGES, sorted({0, nnz // 2, nnz - 1})):
            keep(problem)
            before = call(problem)
            change(problem.values, i, float(problem.values[i]) + 1)
            after = call(problem)
            assert not torch.equal(before, after), f"{change.__name__} of {i} did not show"
            now(problem).check(after)
        check_now(problem)


# 2 is the next 8-byte word of the hash, 64 the next word of the same lane for 4-byte values.
@pytest.mark.parametrize("distance", [1, 2, 32, 64, 128])
def test_two_values_swapped(distance: int, isa: str) -> None:
    problem = weight_with(build(CASE), 1000)
    for i in (0, 300, 999 - distance):
        j = i + distance
        problem.values[i], problem.values[j] = 2.0, 7.0
        keep(problem)
        before = call(problem)
        problem.values[i], problem.values[j] = 7.0, 2.0
        after = call(problem)
        assert not torch.equal(before, after)
        now(problem).check(after)


@pytest.mark.parametrize("nnz", NNZ)
def test_a_column_changed_in_place(nnz: int, isa: str) -> None:
    for case in (CASE, SMALL):
        problem = weight_with(build(case), nnz)
        columns = math.prod(case.weight_shape[1:])
        row_ends = set(problem.row_ptr.tolist())

        def limit(
            i: int, problem: Problem = problem, ends: set[int] = row_ends, columns: int = columns
        ) -> int:
            return columns if i + 1 in ends else int(problem.col_idx[i + 1])

        movable = [i for i in range(nnz) if int(problem.col_idx[i]) + 1 < limit(i)]
        for i in {movable[0], movable[len(movable) // 2], movable[-1]}:
            keep(problem)
            before = call(problem)
            problem.col_idx[i] += 1
            after = call(problem)
            assert not torch.equal(before, after)
            now(problem).check(after)


@pytest.mark.parametrize("nnz", NNZ)
def test_a_row_pointer_changed_in_place(nnz: int, isa: str) -> None:
    """The last entry before the empty row moves into it and back."""
    for case in (CASE, SMALL):
        problem = weight_with(build(case), nnz, seed=1)
        end = int(problem.row_ptr[EMPTY_ROW])
        assert end > 0
        # With few entries the rows just before are empty too: their bounds go along.
        moved = problem.row_ptr[: EMPTY_ROW + 1] == end
        for step in (-1, 1):
            keep(problem)
            before = call(problem)
            problem.row_ptr[: EMPTY_ROW + 1][moved] += step
            after = call(problem)
            assert not torch.equal(before, after)
            now(problem).check(after)


@pytest.mark.parametrize("name", ["values", "col_idx"])
def test_two_changes_whose_hashes_would_cancel(name: str, isa: str) -> None:
    """Bit 34 of an 8-byte word moves to bit 63 of its lane's state; the next word may undo it.

    A hash of one rotate and one odd multiplication per word does not see the pair of changes.
    """
    problem = weight_with(build(CASE), 1000)
    keep(problem)
    before = call(problem)
    words = getattr(problem, name).view(torch.int32)
    words[1] ^= 4  # bit 34 of the first word
    words[65] ^= -(1 << 31)  # bit 63 of the word 256 bytes on: a sign
    if name == "col_idx":
        with pytest.raises(RuntimeError, match="col_idx"):
            call(problem)
        return
    after = call(problem)
    assert not torch.equal(before, after)
    want = reference.conv2d(problem.x, dense_of(problem), padding=CASE.padding)
    torch.testing.assert_close(after.double(), want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("case", [CASE, SMALL], ids=["streamed", "stored"])
@pytest.mark.parametrize("nnz", [300, 5000])
def test_columns_corrupted_in_place(nnz: int, case: ConvCase, isa: str) -> None:
    problem = weight_with(build(case), nnz)
    columns = math.prod(case.weight_shape[1:])
    sound = problem.col_idx.clone()
    # One row in the middle, and the last entry of all: the hash's tail.
    row = next(r for r in range(case.k // 2, case.k) if int(problem.row_ptr.diff()[r]) > 1)
    first, last = int(problem.row_ptr[row]), int(problem.row_ptr[row + 1]) - 1
    corruptions: list[dict[int, int]] = [
        {first: int(sound[first + 1]), first + 1: int(sound[first])},
        {first + 1: int(sound[first])},
        {last: columns},
        {last: 2**31 - 1},
        {first: -1},
        {first: -(2**31)},
        {nnz - 1: columns},
    ]
    for corruption in corruptions:
        keep(problem)
        for i, column in corruption.items():
            problem.col_idx[i] = column
        for _ in range(CALLS_UNTIL_KEPT + 1):
            with pytest.raises(RuntimeError, match="col_idx"):
                call(problem)
        problem.col_idx.copy_(sound)
        for _ in range(CALLS_UNTIL_KEPT + 1):
            problem.check(call(problem))


def test_one_weight_in_many_calls(isa: str, threads: None) -> None:
    """Sizes, layouts, strides, paddings, dtypes and thread counts take turns on one weight."""
    base = ConvCase(n=1, c=16, k=24, h=9, w=9, density=0.2, integers=True)
    changes: list[dict[str, object]] = [
        {},
        {"n": 3},
        {"h": 16, "w": 16},
        {"h": 3, "w": 4},
        {"stride": (2, 2)},
        {"stride": (1, 2), "n": 2},
        {"stride": (2, 1)},
        {"padding": (0, 0, 0, 0)},
        {"padding": (2, 1, 0, 3)},
        {"padding": (0, 1, 1, 1)},
        {"padding": (1, 1, 0, 1)},
        {"dilation": (2, 2)},
        {"dilation": (2, 1), "padding": (1, 3, 1, 1)},
        {"activation": "relu"},
        {"residual": True},
        {"bias": False},
    ]
    first = build(base)
    problems = []
    for dtype in DTYPES:
        values = first.values.to(dtype)
        for change, layout in itertools.product(changes, ("contiguous", "channels_last")):
            case = base.but(dtype=dtype, layout=layout, **change)
            problems.append(
                dataclasses.replace(
                    build(case),
                    weight=first.weight,
                    values=values,
                    col_idx=first.col_idx,
                    row_ptr=first.row_ptr,
                )
            )
    wants = [p.expected().to(p.case.dtype) for p in problems]
    for _ in range(CALLS_UNTIL_KEPT + 1):
        for count in (1, 2):
            torch.set_num_threads(count)
            for problem, want in zip(problems, wants, strict=True):
                assert torch.equal(call(problem), want), f"{problem.case.id}, {count} threads"


def test_a_pointwise_weight_in_both_layouts(isa: str) -> None:
    """A batch of pixels is one row in channels_last and a row per image otherwise."""
    base = ConvCase(n=3, c=16, k=24, h=4, w=12, integers=True).but(**POINTWISE)
    first = build(base)
    problems = [first]
    for layout, n in (("channels_last", 3), ("contiguous", 1), ("channels_last", 1)):
        moved = lay_out(first.x[:n], layout)
        problems.append(dataclasses.replace(first, case=base.but(n=n, layout=layout), x=moved))
    for _ in range(CALLS_UNTIL_KEPT + 1):
        for problem in problems:
            problem.check(call(problem))


def test_geometries_of_one_matrix(isa: str) -> None:
    """The same arrays on the same image are kernels of several shapes, in one group or two."""
    base = ConvCase(n=1, c=8, k=12, h=8, w=8, integers=True)
    first = build(base)
    problems = [first]
    # Top, left and the output's size are those of the 3x3 kernel: only R, S and G tell them apart.
    for kernel, groups, padding in (
        ((9, 1), 1, (1, 7, 1, -1)),
        ((1, 9), 1, (1, -1, 1, 7)),
        ((3, 6), 2, (1, 1, 1, 4)),
        ((6, 3), 2, (1, 4, 1, 1)),
    ):
        case = base.but(kernel=kernel, groups=groups, padding=padding)
        assert case.out_size == base.out_size
        weight = first.weight.reshape(case.weight_shape)
        problems.append(dataclasses.replace(first, case=case, weight=weight))
    for _ in range(CALLS_UNTIL_KEPT + 1):
        for problem in problems:
            problem.check(call(problem))


@pytest.mark.parametrize("case", [CASE, SMALL], ids=["streamed", "stored"])
def test_memory_reused_by_another_weight(case: ConvCase, isa: str) -> None:
    base, nnz, rounds = build(case), 1000, 40
    addresses = set()
    for seed in range(rounds):
        problem = weight_with(base, nnz, seed)
        addresses.add((problem.values.data_ptr(), problem.col_idx.data_ptr()))
        for _ in range(CALLS_UNTIL_KEPT + 1):
            y = call(problem)
        problem.check(y)
        del problem
    assert len(addresses) < rounds, "no memory was reused: the test shows nothing"


def test_more_weights_than_are_remembered(isa: str) -> None:
    """4096 weights are remembered; the first ones are forgotten and must still work."""
    case = ConvCase(n=1, c=2, k=4, h=8, w=8, kernel=(1, 1), padding=(0, 0, 0, 0)).but(
        pattern="full", bias=False, integers=True
    )
    problem = build(case)
    values = (torch.arange(4200.0)[:, None] % 13 + 1) * problem.values
    want = call(problem)
    for _ in range(CALLS_UNTIL_KEPT + 1):
        for i in range(len(values)):
            y = call(dataclasses.replace(problem, values=values[i]))
            assert torch.equal(y, want * (i % 13 + 1)), i


def test_python_threads_share_and_mix_weights(isa: str, threads: None) -> None:
    torch.set_num_threads(1)
    problems = [weight_with(build(CASE), 1000, seed) for seed in range(4)]
    problems += [
        weight_with(build(CASE.but(h=5, layout=layout)), 1000, 4) for layout in LAYOUTS[:2]
    ]
    wants = [p.expected().float() for p in problems]

    def work(worker: int) -> list[int]:
        wrong = []
        for turn in range(60):
            # First all workers on one weight that nobody has called, then each on its own.
            i = turn // 10 if turn < 30 else (worker + turn) % len(problems)
            if not torch.equal(call(problems[i]), wants[i]):
                wrong.append(turn)
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [[]] * 6


# Offsets in elements from a 64-byte boundary; 16 is a boundary again.
@pytest.mark.parametrize("offset", [1, 4, 8, 15, 16])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16), (4, 12), (7, 7), (5, 9)])
def test_pointwise_image_at_any_address(size: tuple[int, int], offset: int, isa: str) -> None:
    """Images of whole vectors may be read where they lie, which needs an aligned address."""
    for n, dtype, integers in (
        (1, torch.float32, True),
        (3, torch.float32, False),
        (1, torch.float64, True),
        (2, torch.bfloat16, True),
    ):
        case = ConvCase(n=n, c=40, k=24, h=size[0], w=size[1], density=0.2).but(
            dtype=dtype, integers=integers, **POINTWISE
        )
        aligned = build(case)
        assert aligned.x.data_ptr() % 64 == 0
        count = aligned.x.numel()
        buffer = aligned.x.new_full((count + 32,), float("nan"))
        buffer[offset : offset + count] = aligned.x.reshape(-1)
        moved = dataclasses.replace(
            aligned, x=buffer[offset : offset + count].view(aligned.x.shape)
        )
        for first, second in ((aligned, moved), (moved, aligned)):
            keep(first)
            y = call(first)
            aligned.check(y)
            assert torch.equal(call(second), y)


GUARDED = """
import ctypes, mmap, sys
import torch
import sparsecnn
from tests.cases import ConvCase, build
from tests.ops.csr import POINTWISE, op_args

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE

def at_the_end_of_a_page(t):
    # Behind the last element, and before the page of the first, lies memory nobody may touch.
    size = t.numel() * t.element_size()
    room = (size + PAGE - 1) // PAGE * PAGE
    area = mmap.mmap(-1, room + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (start, start + PAGE + room):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    copy = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=PAGE + room - size)
    return copy.copy_(t)

for name in sys.argv[1:]:
    sparsecnn.set_isa(name)
    for size in ((4, 4), (8, 8), (4, 12), (7, 7), (5, 9), (1, 3)):
        for channels in (1, 16, 37):
            for layout in ("contiguous", "channels_last"):
                for extra in (POINTWISE, {}, {"stride": (2, 2)}):
                    for dtype in (torch.float32, torch.bfloat16, torch.float64):
                        case = ConvCase(
                            n=1, c=channels, k=19, h=size[0], w=size[1], layout=layout, dtype=dtype,
                            integers=True, residual=True,
                        ).but(**extra)
                        problem = build(case)
                        args = list(op_args(problem))
                        for i in range(6):
                            t = args[i]
                            if t.numel() == 0:
                                continue
                            if t.dim() == 4 and not t.is_contiguous():
                                flat = at_the_end_of_a_page(t.permute(0, 2, 3, 1).reshape(-1))
                                n, c, h, w = t.shape
                                args[i] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
                            else:
                                args[i] = at_the_end_of_a_page(t.reshape(-1)).view(t.shape)
                        print(name, case.id, flush=True)
                        for _ in range(3):
                            problem.check(torch.ops.sparsecnn.csr_conv2d.default(*args))
print("done")
"""


def test_nothing_is_read_outside_the_tensors() -> None:
    """Every input ends where the next page may not be read; a fault ends the other process."""
    if sys.platform != "linux":
        pytest.skip("protects pages through Linux's libc")
    import sparsecnn

    isas = sparsecnn.build_info()["supported_isas"]
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *isas], capture_output=True, text=True, timeout=300
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0 and last == ["done"], f"{last}: {done.returncode}\n{done.stderr}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_training_steps(dtype: torch.dtype, isa: str) -> None:
    """SGD changes the values in place; steps and the calls between them match a dense layer's."""
    case = ConvCase(n=2, c=8, k=12, h=8, w=8, bias=False, dtype=dtype)
    problem = build(case)
    values = problem.values.clone().requires_grad_()
    problem = dataclasses.replace(problem, values=values)
    target = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    stored = problem.weight != 0
    dense = problem.weight.double().requires_grad_()
    sparse_sgd = torch.optim.SGD([values], lr=0.5, momentum=0.9)
    dense_sgd = torch.optim.SGD([dense], lr=0.5, momentum=0.9)
    tight = 1e-11 if dtype == torch.float64 else 1e-4
    start = values.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            for _ in range(CALLS_UNTIL_KEPT + 1):
                y = call(problem)
        want = F.conv2d(problem.x.double(), dense * stored, padding=1)
        torch.testing.assert_close(y.double(), want, rtol=tight, atol=tight)
        sparse_sgd.zero_grad()
        F.mse_loss(call(problem), target.to(dtype)).backward()
        sparse_sgd.step()
        dense_sgd.zero_grad()
        F.mse_loss(want, target).backward()
        dense_sgd.step()
        torch.testing.assert_close(values.double(), dense[stored], rtol=tight, atol=tight)
    assert (values - start).abs().max() > 100 * tight, "the steps were too short to show"
