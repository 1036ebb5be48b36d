"""Bad arguments of pattern_conv2d: each is refused by name, with the value, before any work."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecnn.ops
from tests.cases import ConvCase
from tests.conftest import ISAS, can_run
from tests.ops.pattern import NAMES, PatternProblem, make, op_args, weight_of

CASE = ConvCase(n=2, c=6, h=9, w=8, k=4, groups=2)


def function(p: PatternProblem, **changes: Any) -> Tensor:
    """The Python function with good arguments, some of them replaced."""
    arguments: dict[str, Any] = {
        "x": p.problem.x,
        "weight": weight_of(p),
        "bias": p.problem.bias,
        "padding": 1,
        "groups": p.problem.case.groups,
    }
    arguments.update(changes)
    return sparsecnn.ops.pattern_conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)


BAD_OPTIONS = [
    ({"stride": 0}, ValueError, r"stride .*>= 1, got 0"),
    ({"stride": 1.5}, (ValueError, TypeError), r"stride .*got 1\.5"),
    ({"dilation": (1, -2)}, ValueError, r"dilation .*got \(1, -2\)"),
    ({"padding": -1}, ValueError, r"padding .*got -1"),
    ({"padding": "same", "stride": 2}, ValueError, r"stride 1 .*'same', got \(2, 2\)"),
    ({"groups": 0}, ValueError, r"groups .*got 0"),
    ({"groups": 3}, ValueError, r"groups .*4.*got 3"),
    ({"groups": 1}, ValueError, r"x with 3 channels .*got 6"),
    ({"groups": 2.0}, (ValueError, TypeError), r"groups .*got 2\.0"),
    ({"activation": "gelu"}, ValueError, r"activation .*hardswish, got 'gelu'"),
    ({"dilation": 5}, ValueError, r"kernel .*\(5, 5\).*\(9, 8\)"),
]


@pytest.mark.parametrize("changes, error, message", BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_option(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"pattern_conv2d: expected .*{message}"):
        function(make(CASE, 2), **changes)


def bad_tensors() -> list[Any]:
    f = torch.zeros
    return [
        ("x", f(2, 5, 9, 8), ValueError, r"x with 6 channels .*got 5"),
        ("x", f(6, 9, 8), ValueError, r"x of shape \(N, C, H, W\), got \(6, 9, 8\)"),
        ("x", f(2, 6, 9, 8).half(), TypeError, r"x of dtype float32.*got torch.float16"),
        ("x", f(2, 6, 9, 8).double(), TypeError, r"values .*float64, got torch.float32"),
        ("x", [1, 2], (TypeError, ValueError), r"x .*got list"),
        ("bias", f(5), ValueError, r"bias of shape \(4,\), got \(5,\)"),
        ("bias", f(4).double(), TypeError, r"bias .*float32, got torch.float64"),
        ("bias", f(4, device="meta"), ValueError, r"bias on the device of x, cpu, got meta"),
        ("residual", f(2, 4, 9, 7), ValueError, r"residual .*\(2, 4, 9, 8\), got \(2, 4, 9, 7\)"),
        ("residual", f(2, 4, 9, 8).bfloat16(), TypeError, r"residual .*got torch.bfloat16"),
        ("weight", f(4, 3, 3, 3), TypeError, r"weight a PatternWeight, got .*Tensor"),
        ("weight", None, TypeError, r"weight a PatternWeight, got NoneType"),
    ]


@pytest.mark.parametrize("name, value, error, message", bad_tensors(), ids=lambda v: str(v)[:30])
def test_bad_tensor(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"pattern_conv2d: expected .*{message}"):
        function(make(CASE, 2), **{name: value})


def test_groups_must_be_those_of_the_weight() -> None:
    p = make(ConvCase(n=1, c=4, k=4), 2)
    with pytest.raises(ValueError, match=r"groups 1, for which the weight was packed, got 2"):
        function(p, x=torch.zeros(1, 8, 9, 8), groups=2, bias=None)


@pytest.mark.parametrize("name", NAMES)
def test_weight_on_another_device(name: str) -> None:
    weight = weight_of(make(CASE, 2))
    moved = dataclasses.replace(weight, **{name: getattr(weight, name).to("meta")})
    with pytest.raises(ValueError, match=rf"expected weight\.{name} on the device of x, cpu"):
        function(make(CASE, 2), weight=moved)


# ---- the registered operator, called without the Python layer ------------------------------------

ORDER = (
    "x", *NAMES, "bias", "residual", "kernel_size", "stride", "padding", "dilation", "groups",
    "pattern", "activation",
)  # fmt: skip


def corrupt() -> list[Any]:
    """Arguments to exchange; the weight has filter groups of two."""
    p = make(CASE, 2)
    _, columns, filters, rows, ends = p.arrays

    def with_entry(t: Tensor, index: int, value: int) -> Tensor:
        changed = t.clone()
        changed[index] = value
        return changed

    unsound = "sound weight"
    return [
        ("group_rows", with_entry(rows, 1, 10**6), unsound),
        ("group_rows", with_entry(rows, 1, -5), unsound),
        ("group_rows", with_entry(rows, 1, 3), unsound),  # across groups of the convolution
        ("group_rows", with_entry(rows, 1, 4), unsound),  # an empty filter group
        ("group_rows", with_entry(rows, -1, 5), unsound),
        ("group_rows", with_entry(rows, 0, 1), unsound),
        ("group_rows", rows[:-1], "one length"),
        ("group_rows", rows[:0], "one length"),
        ("group_rows", rows.long(), "int32"),
        ("group_rows", rows[None], "1-d"),
        ("group_columns", with_entry(ends, 1, 10**6), unsound),
        ("group_columns", with_entry(ends, 1, -5), unsound),
        ("group_columns", with_entry(ends, -1, int(ends[-1]) - 1), unsound),
        ("group_columns", with_entry(ends, 0, 1), unsound),
        ("filters", with_entry(filters, 0, 1), unsound),
        ("filters", with_entry(filters, 0, 4), unsound),
        ("filters", with_entry(filters, 0, -1), unsound),
        ("filters", filters.flip(0), unsound),  # into the other group of the convolution
        ("filters", filters[:-1], "groups"),
        ("filters", filters.long(), "int32"),
        ("columns", columns.long(), "int32"),
        ("columns", columns[:-1], unsound),
        ("columns", with_entry(columns, 0, 27), unsound),
        ("columns", with_entry(columns, 0, -1), unsound),
        ("columns", with_entry(columns, 1, int(columns[0])), unsound),
        ("values", p.values[:-1], unsound),
        ("values", p.values[None], "1-d"),
        ("values", p.values.double(), "dtype of x"),
        ("x", p.problem.x[0], "4 dimensions"),
        ("x", p.problem.x.int(), "dtype of x"),
        ("x", p.problem.x[:, :5], "groups"),
        ("bias", torch.zeros(3), "bias"),
        ("residual", torch.zeros(2, 4, 9, 9), "residual"),
        ("kernel_size", [3], "kernel_size"),
        ("stride", [0, 1], "stride"),
        ("padding", [1, 1], "padding"),
        ("dilation", [9, 1], "fits"),
        ("groups", 0, "groups"),
        ("groups", 3, "groups"),
        ("activation", "tanh", "activation .*tanh"),
    ]


@pytest.mark.parametrize("name, value, message", corrupt(), ids=lambda v: str(v)[:30])
def test_operator_refuses(name: str, value: Any, message: str) -> None:
    arguments = list(op_args(make(CASE, 2)))
    arguments[ORDER.index(name)] = value
    with pytest.raises(RuntimeError, match=rf"pattern_conv2d: expected [\s\S]*{message}"):
        torch.ops.sparsecnn.pattern_conv2d.default(*arguments)


FUZZED = """
import random, sys
import torch
import sparsecnn
from tests.cases import ConvCase
from tests.ops.pattern import make, op_args

sparsecnn.set_isa(sys.argv[1])
rng = random.Random(0)
refused = 0
for number in range(200):
    layout = ("contiguous", "channels_last")[number % 2]
    args = list(op_args(make(ConvCase(n=2, c=6, h=9, w=8, k=8, groups=2, layout=layout), number)))
    which = rng.randrange(2, 6)
    changed = args[which].clone()
    entry = rng.choice((-1, 0, 1, 3, 7, 8, 27, 54, 2**20, 2**31 - 1, -(2**31)))
    changed[rng.randrange(len(changed))] = entry
    args[which] = changed
    try:
        y = torch.ops.sparsecnn.pattern_conv2d.default(*args)
    except RuntimeError as error:
        assert "expected a sound weight" in str(error), error
        refused += 1
    else:
        assert y.isfinite().all()
assert 100 < refused < 200, refused
"""


@pytest.mark.parametrize("name", ISAS)
def test_operator_survives_corrupt_indices(name: str) -> None:
    """Nothing in the arrays becomes an address unchecked; a process of its own, lest it crash."""
    if not can_run(name):
        pytest.skip(f"this processor cannot run {name}")
    done = subprocess.run(
        [sys.executable, "-c", FUZZED, name],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"


def test_float16_on_the_cpu_names_the_legal_dtypes() -> None:
    p = make(CASE, 2)
    half = weight_of(p, p.values.half())
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        function(p, x=p.problem.x.half(), weight=half, bias=None)
    arguments = [
        a.half() if isinstance(a, Tensor) and a.is_floating_point() else a for a in op_args(p)
    ]
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float64 on the CPU, got float16"):
        torch.ops.sparsecnn.pattern_conv2d.default(*arguments)
