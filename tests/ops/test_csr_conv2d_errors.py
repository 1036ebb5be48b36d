"""Bad arguments of csr_conv2d: each is refused by name, with the value, before any work."""

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
from sparsecnn.formats.csr import CSRWeight
from tests.cases import ConvCase, Problem, build
from tests.conftest import ISAS, can_run
from tests.ops.csr import grad_values_args, op_args, weight_of

CASE = ConvCase(n=2, c=6, h=9, w=8, k=4, groups=2)


def function(problem: Problem, **changes: Any) -> Tensor:
    """The Python function with good arguments, some of them replaced."""
    arguments: dict[str, Any] = {
        "x": problem.x,
        "weight": weight_of(problem),
        "bias": problem.bias,
        "padding": 1,
        "groups": problem.case.groups,
    }
    arguments.update(changes)
    return sparsecnn.ops.csr_conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)


BAD_OPTIONS = [
    ({"stride": 0}, ValueError, r"stride .*>= 1, got 0"),
    ({"stride": -1}, ValueError, r"stride .*got -1"),
    ({"stride": (1, 2, 3)}, ValueError, r"stride .*got \(1, 2, 3\)"),
    ({"stride": 1.5}, (ValueError, TypeError), r"stride .*got 1\.5"),
    ({"dilation": 0}, ValueError, r"dilation .*>= 1, got 0"),
    ({"dilation": (1, -2)}, ValueError, r"dilation .*got \(1, -2\)"),
    ({"padding": -1}, ValueError, r"padding .*got -1"),
    ({"padding": (1, 2, 3)}, ValueError, r"padding .*got \(1, 2, 3\)"),
    ({"padding": "full"}, ValueError, r"padding .*got 'full'"),
    ({"padding": "same", "stride": 2}, ValueError, r"stride 1 .*'same', got \(2, 2\)"),
    ({"padding": None}, (ValueError, TypeError), r"padding .*got None"),
    ({"groups": 0}, ValueError, r"groups .*got 0"),
    ({"groups": 3}, ValueError, r"groups .*4.*got 3"),
    ({"groups": 1}, ValueError, r"x with 3 channels .*got 6"),
    ({"groups": 2.0}, (ValueError, TypeError), r"groups .*got 2\.0"),
    ({"activation": "gelu"}, ValueError, r"activation .*hardswish, got 'gelu'"),
    ({"activation": None}, (ValueError, TypeError), r"activation .*got None"),
    ({"dilation": 5}, ValueError, r"kernel .*\(5, 5\).*\(9, 8\)"),
]


@pytest.mark.parametrize("changes, error, message", BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_option(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"csr_conv2d: expected .*{message}"):
        function(build(CASE), **changes)


def bad_tensors() -> list[Any]:
    f = torch.zeros
    half = torch.float16
    return [
        ("x", f(2, 5, 9, 8), ValueError, r"x with 6 channels .*got 5"),
        ("x", f(6, 9, 8), ValueError, r"x of shape \(N, C, H, W\), got \(6, 9, 8\)"),
        ("x", f(1, 2, 6, 9, 8), ValueError, r"x of shape .*got \(1, 2, 6, 9, 8\)"),
        ("x", f(2, 6, 9, 8, dtype=half), TypeError, r"x of dtype float32.*got torch.float16"),
        ("x", f(2, 6, 9, 8, dtype=torch.int32), TypeError, r"x of dtype .*got torch.int32"),
        ("x", f(2, 6, 9, 8, dtype=torch.complex64), TypeError, r"x of dtype .*torch.complex64"),
        ("x", f(2, 6, 9, 8).double(), TypeError, r"values .*float64, got torch.float32"),
        ("x", f(2, 6, 0, 8), ValueError, r"kernel that fits .*\(0, 8\)"),
        ("bias", f(5), ValueError, r"bias of shape \(4,\), got \(5,\)"),
        ("bias", f(4, 1), ValueError, r"bias of shape \(4,\), got \(4, 1\)"),
        ("bias", f(4).double(), TypeError, r"bias .*float32, got torch.float64"),
        ("bias", f(4, device="meta"), ValueError, r"bias on the device of x, cpu, got meta"),
        ("residual", f(2, 4, 9, 7), ValueError, r"residual .*\(2, 4, 9, 8\), got \(2, 4, 9, 7\)"),
        ("residual", f(4, 9, 8), ValueError, r"residual .*\(2, 4, 9, 8\), got \(4, 9, 8\)"),
        ("residual", f(2, 4, 9, 8).bfloat16(), TypeError, r"residual .*got torch.bfloat16"),
        ("residual", f(2, 4, 9, 8, device="meta"), ValueError, r"residual .*cpu, got meta"),
        ("weight", f(4, 3, 3, 3), TypeError, r"weight a CSRWeight, got .*Tensor"),
        ("weight", None, TypeError, r"weight a CSRWeight, got NoneType"),
    ]


@pytest.mark.parametrize("name, value, error, message", bad_tensors(), ids=lambda v: str(v)[:30])
def test_bad_tensor(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"csr_conv2d: expected .*{message}"):
        function(build(CASE), **{name: value})


@pytest.mark.parametrize("name", ["values", "col_idx", "row_ptr"])
def test_weight_on_another_device(name: str) -> None:
    weight = weight_of(build(CASE))
    moved = dataclasses.replace(weight, **{name: getattr(weight, name).to("meta")})
    with pytest.raises(ValueError, match=rf"expected weight\.{name} on the device of x, cpu"):
        function(build(CASE), weight=moved)


def test_the_first_argument_may_be_wrong_altogether() -> None:
    with pytest.raises((TypeError, ValueError), match=r"csr_conv2d: expected x .*got list"):
        function(build(CASE), x=[1, 2, 3])


# ---- the registered operator, called without the Python layer ------------------------------------

POSITION = {
    name: index
    for index, name in enumerate(
        (
            "x", "values", "col_idx", "row_ptr", "bias", "residual", "kernel_size", "stride",
            "padding", "dilation", "groups", "activation",
        )
    )
}  # fmt: skip


def corrupt() -> list[Any]:
    problem = build(CASE)
    row_ptr, nnz = problem.row_ptr, problem.nnz

    def rows(*changes: tuple[int, int]) -> Tensor:
        changed = row_ptr.clone()
        for index, value in changes:
            changed[index] = value
        return changed

    return [
        ("row_ptr", rows((1, 10**6)), "row_ptr"),
        ("row_ptr", rows((2, -5)), "row_ptr"),
        ("row_ptr", rows((-1, nnz + 1)), "row_ptr"),
        ("row_ptr", rows((-1, nnz - 1)), "row_ptr"),
        ("row_ptr", rows((0, 1)), "row_ptr"),
        ("row_ptr", row_ptr.long(), "int32"),
        ("row_ptr", row_ptr[:0], "row_ptr"),
        ("row_ptr", row_ptr[None], "1-d"),
        ("row_ptr", torch.zeros(4, dtype=torch.int32), "groups"),
        ("col_idx", problem.col_idx.long(), "int32"),
        ("col_idx", problem.col_idx[:-1], "length"),
        ("values", problem.values[:-1], "length"),
        ("values", problem.values[None], "values"),
        ("values", problem.values.double(), "dtype of x"),
        ("x", problem.x[0], "4 dimensions"),
        ("x", problem.x.int(), "dtype of x"),
        ("x", problem.x[:, :5], "groups"),
        ("bias", torch.zeros(3), "bias"),
        ("bias", torch.zeros(4).bfloat16(), "bias"),
        ("residual", torch.zeros(2, 4, 9, 9), "residual"),
        ("kernel_size", [3], "kernel_size"),
        ("kernel_size", [3, 0], "kernel_size"),
        ("stride", [0, 1], "stride"),
        ("padding", [1, 1], "padding"),
        ("dilation", [1, -1], "dilation"),
        ("dilation", [9, 1], "fits"),
        ("groups", 0, "groups"),
        ("groups", 3, "groups"),
        ("activation", "tanh", "activation .*tanh"),
    ]


@pytest.mark.parametrize("name, value, message", corrupt(), ids=lambda v: str(v)[:30])
def test_operator_refuses(name: str, value: Any, message: str) -> None:
    arguments = list(op_args(build(CASE)))
    arguments[POSITION[name]] = value
    with pytest.raises(RuntimeError, match=rf"csr_conv2d: expected [\s\S]*{message}"):
        torch.ops.sparsecnn.csr_conv2d.default(*arguments)


OUT_OF_RANGE = """
import sys
import torch
import sparsecnn
from tests.cases import ConvCase, build
from tests.ops.csr import grad_values_args, op_args

sparsecnn.set_isa(sys.argv[1])
for layout in ("contiguous", "channels_last"):
    for column in (-1, 27, 2**20, 2**31 - 1, -(2**31)):
        for where in (0, 0.5, 1):
            problem = build(ConvCase(n=2, c=6, h=9, w=8, k=4, groups=2, layout=layout))
            problem.col_idx[int(where * (problem.nnz - 1))] = column
            try:
                y = torch.ops.sparsecnn.csr_conv2d.default(*op_args(problem))
            except RuntimeError as error:
                assert "expected col_idx" in str(error), error
            else:
                assert y.isfinite().all(), (layout, column, where)
            try:
                torch.ops.sparsecnn.csr_conv2d_grad_values.default(
                    *grad_values_args(problem, torch.randn(2, 4, 9, 8))
                )
            except RuntimeError as error:
                assert "expected col_idx in [0, 27)" in str(error), error
            else:
                raise AssertionError("the gradient of the values followed a bad column")
"""


@pytest.mark.parametrize("name", ISAS)
def test_operator_survives_columns_out_of_range(name: str) -> None:
    """A column outside the weight never becomes an address, in any instruction set.

    The forward may refuse it or leave it out; the gradient of the values has to refuse it. In a
    process of its own, because the alternative is a segmentation fault.
    """
    if not can_run(name):
        pytest.skip(f"this processor cannot run {name}")
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_RANGE, name],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"


def test_grad_values_refuses_a_gradient_of_another_shape() -> None:
    problem = build(CASE)
    for grad_y in (torch.zeros(2, 4, 9, 7), torch.zeros(2, 4, 9), torch.zeros(2, 4, 9, 8).double()):
        with pytest.raises(RuntimeError, match="expected grad_y"):
            torch.ops.sparsecnn.csr_conv2d_grad_values.default(*grad_values_args(problem, grad_y))


def test_float16_on_the_cpu_names_the_legal_dtypes() -> None:
    problem = build(CASE)
    half = weight_of(problem, problem.values.half())
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        function(problem, x=problem.x.half(), weight=half, bias=None)
    arguments = [a.half() if isinstance(a, Tensor) and a.is_floating_point() else a
                 for a in op_args(problem)]  # fmt: skip
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float64 on the CPU, got float16"):
        torch.ops.sparsecnn.csr_conv2d.default(*arguments)


def test_csr_linear_refuses_a_wrong_feature_count() -> None:
    weight = CSRWeight.from_dense(torch.ones(3, 5))
    with pytest.raises(
        ValueError, match=r"csr_linear: expected x of shape \(\.\.\., 5\), got \(2, 4\)"
    ):
        sparsecnn.ops.csr_linear(torch.ones(2, 4), weight)
    with pytest.raises(ValueError, match=r"csr_linear: expected x .*got \(\)"):
        sparsecnn.ops.csr_linear(torch.tensor(1.0), weight)
