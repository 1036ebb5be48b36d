"""Bad arguments of winograd_conv2d: each is refused by name, with the value, before any work."""

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
from tests.ops.winograd import WinogradProblem, make, op_args, run_op, weight_of

CASE = ConvCase(n=2, c=6, h=9, w=8, k=4, groups=2)
sparsities = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


def function(p: WinogradProblem, **changes: Any) -> Tensor:
    """The Python function with good arguments, some of them replaced."""
    arguments: dict[str, Any] = {
        "x": p.problem.x,
        "weight": weight_of(p),
        "bias": p.problem.bias,
        "padding": 1,
        "groups": p.problem.case.groups,
    }
    arguments.update(changes)
    return sparsecnn.ops.winograd_conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)


BAD_OPTIONS = [
    ({"padding": -1}, ValueError, r"padding .*got -1"),
    ({"padding": 1.5}, ValueError, r"padding .*got 1\.5"),
    ({"padding": (1, 2, 3)}, ValueError, r"padding .*got \(1, 2, 3\)"),
    ({"padding": "full"}, ValueError, r"padding 'same' or 'valid', got 'full'"),
    ({"groups": 0}, ValueError, r"groups .*got 0"),
    ({"groups": 3}, ValueError, r"groups .*4.*got 3"),
    ({"groups": 1}, ValueError, r"x with 3 channels .*got 6"),
    ({"groups": 2.0}, (ValueError, TypeError), r"groups .*got 2\.0"),
    ({"activation": "gelu"}, ValueError, r"activation .*hardswish, got 'gelu'"),
]


@pytest.mark.parametrize("changes, error, message", BAD_OPTIONS, ids=lambda v: str(v)[:40])
@sparsities
def test_bad_option(
    sparse: bool, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"winograd_conv2d: expected .*{message}"):
        function(make(CASE, 4, sparse), **changes)


@pytest.mark.parametrize("name", ["stride", "dilation", "tile"])
def test_options_of_other_convolutions_do_not_exist(name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        function(make(CASE), **{name: 1})


def test_an_image_smaller_than_the_kernel() -> None:
    with pytest.raises(ValueError, match=r"fits the padded input, got kernel \(3, 3\).*\(2, 8\)"):
        function(make(CASE), x=torch.zeros(2, 6, 2, 8), padding=0)


def bad_tensors() -> list[Any]:
    f = torch.zeros
    return [
        ("x", f(2, 5, 9, 8), ValueError, r"x with 6 channels .*got 5"),
        ("x", f(6, 9, 8), ValueError, r"x of shape \(N, C, H, W\), got \(6, 9, 8\)"),
        ("x", f(2, 6, 9, 8).half(), TypeError, r"x of dtype float32.*got torch.float16"),
        ("x", f(2, 6, 9, 8).double(), TypeError, r"values .*float64, got torch.float32"),
        ("x", f(2, 6, 9, 8).int(), TypeError, r"x of dtype float32.*got torch.int32"),
        ("x", [1, 2], (TypeError, ValueError), r"x .*got list"),
        ("bias", f(5), ValueError, r"bias of shape \(4,\), got \(5,\)"),
        ("bias", f(4).double(), TypeError, r"bias .*float32, got torch.float64"),
        ("bias", f(4, device="meta"), ValueError, r"bias on the device of x, cpu, got meta"),
        ("residual", f(2, 4, 9, 7), ValueError, r"residual .*\(2, 4, 9, 8\), got \(2, 4, 9, 7\)"),
        ("residual", f(2, 4, 9, 8).bfloat16(), TypeError, r"residual .*got torch.bfloat16"),
        ("weight", f(4, 3, 3, 3), TypeError, r"weight a WinogradWeight, got .*Tensor"),
        ("weight", None, TypeError, r"weight a WinogradWeight, got NoneType"),
    ]


@pytest.mark.parametrize("name, value, error, message", bad_tensors(), ids=lambda v: str(v)[:30])
@sparsities
def test_bad_tensor(
    sparse: bool, name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"winograd_conv2d: expected .*{message}"):
        function(make(CASE, 2, sparse), **{name: value})


def test_groups_must_be_those_of_the_weight() -> None:
    p = make(ConvCase(n=1, c=4, k=4))
    with pytest.raises(ValueError, match=r"groups 1, for which the weight was packed, got 2"):
        function(p, x=torch.zeros(1, 8, 9, 8), groups=2, bias=None)


@pytest.mark.parametrize("name", ["values", "col_idx", "row_ptr"])
def test_weight_on_another_device(name: str) -> None:
    p = make(CASE, 4, True)
    moved = dataclasses.replace(weight_of(p), **{name: getattr(p, name).to("meta")})
    with pytest.raises(ValueError, match=rf"expected weight\.{name} on the device of x, cpu"):
        function(p, weight=moved)


# ---- the registered operator, called without the Python layer ------------------------------------

ORDER = (
    "x", "values", "col_idx", "row_ptr", "bias", "residual", "filters", "tile", "padding", "groups",
    "activation",
)  # fmt: skip


def refused_by_both() -> list[Any]:
    p = make(CASE)
    f = torch.zeros
    return [
        ("values", p.values.double(), "dtype of x"),
        ("values", p.values[0], "values"),
        ("x", p.problem.x[0], "4 dimensions"),
        ("x", p.problem.x.int(), "dtype of x"),
        ("x", p.problem.x[:, :5], "groups"),
        ("x", p.problem.x[:, :4], "values|col_idx"),
        ("bias", f(3), "bias"),
        ("bias", f(4, 1), "bias"),
        ("bias", f(4).double(), "bias"),
        ("residual", f(2, 4, 9, 9), "residual"),
        ("residual", f(4, 9, 8), "residual"),
        ("filters", -4, "filters >= 0, got -4"),
        ("filters", 5, "groups"),
        ("filters", 18, "values|row_ptr"),
        ("filters", 2**40, "2\\^31|values|row_ptr"),
        ("tile", 3, "tile 2 or 4, got 3"),
        ("tile", 2, "values|row_ptr"),
        ("tile", 4 + 2**32, "tile 2 or 4"),
        ("padding", [1, 1], "padding"),
        ("padding", [1, 1, -8, 1], "fits"),
        ("groups", 0, "groups"),
        ("groups", 4, "groups"),
        ("groups", 1, "values|row_ptr"),
        ("activation", "tanh", "activation .*tanh"),
    ]


# A full sparse weight: fewer channels are an error of one only where a stored one is missing.
@pytest.mark.parametrize("name, value, message", refused_by_both(), ids=lambda v: str(v)[:30])
@sparsities
def test_operator_refuses(sparse: bool, name: str, value: Any, message: str) -> None:
    p = make(CASE.but(density=1), 4, sparse)
    arguments = list(op_args(p))
    arguments[ORDER.index(name)] = value
    with pytest.raises(RuntimeError, match=rf"winograd_conv2d: expected [\s\S]*({message})"):
        torch.ops.sparsecnn.winograd_conv2d.default(*arguments)


def dense_shapes() -> list[Tensor]:
    values = make(CASE).values
    assert values.shape == (2, 36, 3, 8)
    return [
        values[:1],
        values[:, :16],
        values[:, :, :2],
        values[..., :4],
        values[:, :, :, :, None],
        values.reshape(-1),
        values.repeat(2, 1, 1, 1),
    ]


@pytest.mark.parametrize("values", dense_shapes(), ids=lambda v: str(tuple(v.shape)))
def test_operator_refuses_dense_values_of_another_shape(values: Tensor) -> None:
    arguments = list(op_args(make(CASE)))
    arguments[1] = values
    with pytest.raises(RuntimeError, match=r"expected values of shape \(2, 36, 3, 8\)"):
        torch.ops.sparsecnn.winograd_conv2d.default(*arguments)


def corrupt() -> list[Any]:
    p = make(CASE, 4, True)
    columns, ends = p.col_idx, p.row_ptr
    assert columns is not None and ends is not None and len(ends) == 2 * 36 * 8 + 1

    def with_entry(t: Tensor, index: int, value: int) -> Tensor:
        changed = t.clone()
        changed[index] = value
        return changed

    unsound = "sound weight"
    return [
        ("row_ptr", with_entry(ends, 5, 10**6), unsound),
        ("row_ptr", with_entry(ends, 5, -5), unsound),
        ("row_ptr", with_entry(ends, 5, 2**31 - 1), unsound),
        ("row_ptr", with_entry(ends, -1, int(ends[-1]) - 1), unsound),
        ("row_ptr", with_entry(ends, -1, int(ends[-1]) + 1), unsound),
        ("row_ptr", with_entry(ends, 0, 1), unsound),
        ("row_ptr", with_entry(ends, 0, -1), unsound),
        ("row_ptr", ends[:-1], "row_ptr of length 577, got 576"),
        ("row_ptr", ends[:0], "row_ptr of length"),
        ("row_ptr", ends.long(), "row_ptr a 1-d int32"),
        ("row_ptr", ends[None], "row_ptr a 1-d int32"),
        ("row_ptr", None, "both or neither"),
        ("col_idx", with_entry(columns, 0, 3), unsound),
        ("col_idx", with_entry(columns, -1, 3), unsound),
        ("col_idx", with_entry(columns, 7, -1), unsound),
        ("col_idx", with_entry(columns, 7, 2**31 - 1), unsound),
        ("col_idx", columns[:-1], "of one length"),
        ("col_idx", columns.long(), "col_idx a 1-d int32"),
        ("col_idx", columns[None], "col_idx a 1-d int32"),
        ("col_idx", None, "both or neither"),
        ("values", p.values[:-1], "of one length"),
        ("values", p.values[None], "1-d"),
    ]


@pytest.mark.parametrize("name, value, message", corrupt(), ids=lambda v: str(v)[:30])
def test_operator_refuses_a_corrupt_weight(name: str, value: Any, message: str) -> None:
    arguments = list(op_args(make(CASE, 4, True)))
    arguments[ORDER.index(name)] = value
    with pytest.raises(RuntimeError, match=rf"winograd_conv2d: expected [\s\S]*{message}"):
        torch.ops.sparsecnn.winograd_conv2d.default(*arguments)


def test_the_function_says_so_too() -> None:
    """What only the operator can see, it says through the function as well."""
    p = make(CASE, 4, True)
    assert p.col_idx is not None
    wrong = dataclasses.replace(weight_of(p), col_idx=p.col_idx + 3)
    with pytest.raises(RuntimeError, match=r"sound weight, got corrupt .*validate\(\) says which"):
        function(p, weight=wrong)
    with pytest.raises(ValueError, match=r"col_idx"):
        wrong.validate()


@sparsities
def test_nothing_is_changed_by_a_refusal(sparse: bool) -> None:
    """The next good call gives what it gave before."""
    p = make(CASE, 2, sparse)
    want = run_op(p)
    arguments = list(op_args(p))
    arguments[ORDER.index("tile")] = 4
    with pytest.raises(RuntimeError, match="winograd_conv2d"):
        torch.ops.sparsecnn.winograd_conv2d.default(*arguments)
    assert torch.equal(run_op(p), want)


FUZZED = """
import random, sys
import torch
import sparsecnn
from tests.cases import ConvCase
from tests.ops.winograd import make, op_args

sparsecnn.set_isa(sys.argv[1])
rng = random.Random(0)
refused = 0
for number in range(300):
    layout = ("contiguous", "channels_last")[number % 2]
    case = ConvCase(n=2, c=6, h=9, w=8, k=8, groups=2, layout=layout)
    args = list(op_args(make(case, rng.choice((2, 4)), True)))
    which = rng.choice((2, 3))
    changed = args[which].clone()
    entry = rng.choice((-1, 0, 1, 2, 3, 7, 100, 2**20, 2**31 - 1, -(2**31)))
    changed[rng.randrange(len(changed))] = entry
    args[which] = changed
    try:
        y = torch.ops.sparsecnn.winograd_conv2d.default(*args)
    except RuntimeError as error:
        assert "expected a sound weight" in str(error), error
        refused += 1
    else:
        assert y.isfinite().all()
assert 200 < refused < 300, refused
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


@sparsities
def test_float16_on_the_cpu_names_the_legal_dtypes(sparse: bool) -> None:
    p = make(CASE, 2, sparse)
    half = weight_of(p, p.values.half())
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        function(p, x=p.problem.x.half(), weight=half, bias=None)
    arguments = [
        a.half() if isinstance(a, Tensor) and a.is_floating_point() else a for a in op_args(p)
    ]
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float64 on the CPU, got float16"):
        torch.ops.sparsecnn.winograd_conv2d.default(*arguments)
