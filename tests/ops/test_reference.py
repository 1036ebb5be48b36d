"""The test tools themselves: a wrong reference, a bound that accepts all or a poison that does not
poison would make every other test worthless."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import reference, tolerance
from tests.cases import LAYOUTS, ConvCase, all_cases, build, lay_out
from tests.conftest import nan_filled_allocations
from tests.fuzz import draw
from tests.ops.csr import op_args

TINY = [
    ConvCase(n=1, c=2, k=2, h=4, w=5),
    ConvCase(n=2, c=2, k=2, h=5, w=4, stride=(2, 1), padding=(0, 2, 1, 0), residual=True),
    ConvCase(n=1, c=4, k=6, h=4, w=4, groups=2, dilation=(2, 1), activation="relu"),
    ConvCase(n=1, c=3, k=6, h=3, w=4, groups=3, kernel=(2, 1), activation="silu"),
    ConvCase(n=1, c=2, k=2, h=3, w=3, activation="hardswish", bias=False),
    ConvCase(n=1, c=2, k=2, h=3, w=3, activation="relu6", density=1.0),
    ConvCase(n=1, c=1, k=1, h=1, w=1, kernel=(1, 1), padding=(2, 1, 0, 3)),
]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_reference_agrees_with_plain_loops(case: ConvCase) -> None:
    problem = build(case.but(dtype=torch.float64))
    loops = reference.conv2d_loops(
        problem.x,
        problem.weight,
        problem.bias,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        activation=case.activation,
        residual=problem.residual,
    )
    torch.testing.assert_close(problem.expected(), loops, rtol=1e-13, atol=1e-13)


WINOGRAD_TINY = [
    ConvCase(n=2, c=2, k=3, h=5, w=7, activation="silu", residual=True),
    ConvCase(n=1, c=4, k=6, h=8, w=6, groups=2, padding=(0, 2, 3, 0), bias=False),
    ConvCase(n=1, c=3, k=3, h=3, w=9, groups=3, padding=(0, 0, 0, 0)),
    ConvCase(n=1, c=1, k=1, h=1, w=1),
]


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("case", WINOGRAD_TINY, ids=lambda case: case.id)
def test_winograd_of_a_spatial_weight_is_the_convolution(case: ConvCase, tile: int) -> None:
    """One identity checks all three matrices; a wrong entry of any breaks it."""
    problem = build(case.but(dtype=torch.float64, pattern="full"))
    y = reference.winograd_conv2d(
        problem.x,
        reference.winograd_taps(problem.weight, tile),
        problem.bias,
        padding=case.padding,
        groups=case.groups,
        activation=case.activation,
        residual=problem.residual,
    )
    loops = reference.conv2d_loops(
        problem.x,
        problem.weight,
        problem.bias,
        padding=case.padding,
        groups=case.groups,
        activation=case.activation,
        residual=problem.residual,
    )
    torch.testing.assert_close(y, loops, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_magnitude_is_that_of_the_worst_signs(tile: int) -> None:
    """No choice of signs gives more, and the signs of one output's terms give exactly that."""
    _, bt, at = reference.winograd_matrices(tile)
    edge = tile + 2
    for i, j in ((0, 0), (tile - 1, 1)):
        for a, b in ((0, 1), (edge - 1, 2)):
            taps = torch.zeros(edge * edge, 1, 1)
            taps[a * edge + b] = -3
            # The one tap that is not zero meets each pixel by one product of coefficients.
            signs = torch.outer(bt[a], bt[b]).sign()[None, None]
            y = reference.winograd_conv2d(signs, taps)
            most = reference.winograd_magnitude(signs, taps)
            torch.testing.assert_close(y.abs(), most, rtol=1e-14, atol=0)
            worst = 3 * at[i, a].abs() * at[j, b].abs() * bt[a].abs().sum() * bt[b].abs().sum()
            torch.testing.assert_close(most[0, 0, i, j], worst)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_agree_with_torch(name: str) -> None:
    y = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    if name != "none":
        want = getattr(torch.nn.functional, name)(y)
        torch.testing.assert_close(reference.activate(y, name), want)
    scalars = [reference.activate_scalar(v, name) for v in y.tolist()]
    want = reference.activate(y, name)
    torch.testing.assert_close(torch.tensor(scalars, dtype=torch.float64), want)


def test_grad_weight_is_the_derivative() -> None:
    problem = build(ConvCase(n=2, c=4, k=2, groups=2, stride=(2, 1), dtype=torch.float64))
    grad_y = torch.randn(problem.expected().shape, dtype=torch.float64)
    geometry: dict[str, Any] = {
        "stride": problem.case.stride,
        "padding": problem.case.padding,
        "dilation": problem.case.dilation,
        "groups": problem.case.groups,
    }
    shape = problem.case.weight_shape
    grad = reference.conv2d_grad_weight(grad_y, problem.x, shape, **geometry)
    # The convolution is linear in the weight: moving one entry by 1 moves <y, grad_y> by its
    # gradient, exactly up to rounding.
    for index in ((0, 0, 0, 0), (1, 1, 2, 1), (0, 1, 1, 2)):
        one = torch.zeros(shape, dtype=torch.float64)
        one[index] = 1
        moved = reference.conv2d(problem.x, one, **geometry)
        torch.testing.assert_close((moved * grad_y).sum(), grad[index])


def test_csr_arrays_describe_the_dense_weight() -> None:
    for case in all_cases():
        if case.c * case.k > 2000:
            continue
        problem = build(case)
        dense = reference.csr_to_dense(
            problem.values, problem.col_idx, problem.row_ptr, case.weight_shape
        )
        assert torch.equal(dense, problem.weight.double()), case.id


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_say(layout: str) -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    laid = lay_out(x, layout)
    assert laid.shape == x.shape
    assert laid.is_contiguous() == (layout in ("contiguous", "offset"))
    is_channels_last = laid.is_contiguous(memory_format=torch.channels_last)
    assert is_channels_last == (layout in ("channels_last", "channels_last_offset"))
    assert (laid.storage_offset() > 0) == (layout in ("offset", "channels_last_offset", "sliced"))
    if not layout.startswith("expanded"):
        assert torch.equal(laid, x)


def test_bound_rejects_errors_of_a_few_roundings() -> None:
    problem = build(ConvCase(n=1, c=8, k=4))
    expected = problem.expected()
    problem.check(expected.float())
    # Forgetting one term, the mistake a kernel makes at an edge, is far outside.
    dropped = problem.weight.clone()
    dropped.view(-1)[int(dropped.abs().view(-1).argmax())] = 0
    wrong = reference.conv2d(problem.x, dropped, problem.bias, padding=problem.case.padding)
    with pytest.raises(AssertionError, match="out of bound; worst at"):
        problem.check(wrong.float())
    bound = problem.bound(expected)
    with pytest.raises(AssertionError, match="1 of"):
        nudged = expected.clone()
        nudged[0, 0, 0, 0] += 2.1 * float(bound[0, 0, 0, 0])
        tolerance.assert_within(nudged, expected, bound, "nudged")
    with pytest.raises(AssertionError, match="got nan"):
        broken = expected.clone()
        broken[0, 1, 2, 3] = float("nan")
        tolerance.assert_within(broken, expected, bound, "nan")


def test_bound_is_tight_for_float32_and_covers_bfloat16_storage() -> None:
    problem = build(ConvCase(n=1, c=8, k=4))
    expected = problem.expected()
    assert float((problem.bound(expected) / expected.abs().clamp(min=1e-3)).median()) < 1e-4
    half = build(ConvCase(n=1, c=8, k=4, dtype=torch.bfloat16))
    half.check(half.expected().to(torch.bfloat16))
    with pytest.raises(AssertionError):
        half.check((half.expected() * 1.02).to(torch.bfloat16))


def test_integer_check_is_exact() -> None:
    problem = build(ConvCase(integers=True))
    result = problem.expected().float()
    problem.check(result)
    result[1, 2, 3, 4] += 1
    with pytest.raises(AssertionError):
        problem.check(result)


def test_fuzz_cases_are_valid_varied_and_repeatable() -> None:
    drawn = [draw(seed) for seed in range(300)]
    assert drawn == [draw(seed) for seed in range(300)]
    assert all(case.out_size[0] > 0 and case.out_size[1] > 0 for case in drawn)
    for field, least in (
        ("kernel", 8),
        ("stride", 5),
        ("layout", 9),
        ("pattern", 5),
        ("groups", 4),
    ):
        assert len({getattr(case, field) for case in drawn}) >= least, field
    assert sum(build(case).nnz == 0 for case in drawn) < 60


def test_poison_reaches_allocations_inside_the_operator() -> None:
    problem = build(ConvCase())
    with nan_filled_allocations():
        assert torch.empty(7).isnan().all()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.ops.sparsecnn.csr_conv2d.default(*op_args(problem))
    names = [event.name for event in profile.events()]
    assert "sparsecnn::csr_conv2d" in names
    # The operator calls no fill itself: the fill is the one of the deterministic mode.
    assert "aten::fill_" in names, names
