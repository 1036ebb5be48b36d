"""Values of chain_conv2d: every hand-picked chain on every instruction set, threads, symmetries."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests import chains, reference
from tests.cases import lay_out
from tests.chains import ChainCase, ChainProblem, Stage, build_chain, inverted
from tests.conftest import ISAS, active_isa
from tests.ops.chain import check, op_args, run_function, run_op, stain_scratch

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16)


def variants(case: ChainCase, device: str) -> list[ChainCase]:
    """A case with real and integer data, in both memory formats and in every dtype."""
    layouts = (case.layout,)
    if case.layout == "contiguous":
        layouts = ("contiguous", "channels_last")
    found = []
    for layout in layouts:
        found.append(case.but(layout=layout))
        dtypes = DTYPES if device == "cpu" else CUDA_DTYPES
        found += [case.but(layout=layout, dtype=t, integers=True) for t in dtypes]
        if device == "cuda":  # of its integers some would be infinite
            found.append(case.but(layout=layout, dtype=torch.float16))
    found.append(case.but(dtype=torch.bfloat16, layout=layouts[-1]))
    return found


@pytest.mark.parametrize("case", chains.all_chains(), ids=lambda case: case.id)
def test_result(case: ChainCase, backend: str) -> None:
    for variant in variants(case, backend):
        check(build_chain(variant).to(backend))


def test_most_integer_cases_are_exact() -> None:
    """The exact comparison must not be an empty promise."""
    cases = [c.but(integers=True) for c in chains.all_chains() if c.n]
    exact = [build_chain(c).expected()[2] < 2**24 for c in cases]
    assert sum(exact) > 0.8 * len(exact)


def test_function_calls_the_operator() -> None:
    for layout in ("contiguous", "channels_last"):
        case = ChainCase(inverted(20, 5), layout=layout, residual=True)
        problem = build_chain(case)
        assert torch.equal(run_function(problem), run_op(problem))


@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_residual_may_lie_differently(residual_layout: str, backend: str) -> None:
    for layout in ("contiguous", "channels_last"):
        case = ChainCase(inverted(20, 5), residual=True, layout=layout)
        problem = build_chain(case).to(backend)
        assert problem.residual is not None
        moved = lay_out(problem.residual.contiguous(), residual_layout)
        check(dataclasses.replace(problem, residual=moved))


def test_views_of_weights_and_biases(backend: str) -> None:
    def view(t: Tensor) -> Tensor:
        big = torch.full((2 * t.numel(),), 77.0, dtype=t.dtype, device=t.device)
        big[::2] = t
        return big[::2]

    problem = build_chain(ChainCase(inverted(20, 5))).to(backend)
    biases = [None if b is None else view(b) for b in problem.biases]
    check(dataclasses.replace(problem, biases=biases))


def test_nan_is_not_hidden(backend: str) -> None:
    """A NaN pixel reaches exactly the outputs whose windows hold it, through every activation."""
    for activation in reference.ACTIVATIONS:
        stages = (
            Stage(18, activation=activation), Stage(None, (3, 3), activation=activation),
            Stage(17, activation=activation),
        )  # fmt: skip
        problem = build_chain(ChainCase(stages, n=1, c=4, h=9, w=9)).to(backend)
        problem.x[0, 1, 4, 5] = float("nan")
        y = run_op(problem)
        hit = torch.zeros(9, 9, dtype=torch.bool)
        hit[3:6, 4:7] = True
        assert torch.equal(y.isnan().cpu(), hit.expand_as(y)), activation


def test_large_sums_do_not_overflow_silu(backend: str) -> None:
    case = ChainCase((Stage(18, activation="silu"), Stage(5, (3, 3), activation="silu")))
    problem = build_chain(case).to(backend)
    big = dataclasses.replace(problem, x=problem.x * 300)
    big.check(run_op(big))


# ---- what holds to the bit -----------------------------------------------------------------------

CASES = [
    ChainCase(inverted(72, 40), n=3, c=24, h=13, w=11),
    ChainCase(inverted(96, 24, 5, 2), n=2, c=16, h=17, w=15),
    ChainCase((Stage(16, (7, 1)), Stage(33, (1, 7), activation="silu")), n=3, c=20, h=14, w=14),
    ChainCase((Stage(16), Stage(16, (3, 3), (2, 1)), Stage(70)), n=2, c=33, h=12, w=10),
    ChainCase((Stage(None, (3, 3), dilation=(2, 2)), Stage(24)), n=2, c=48, h=15, w=9),
    ChainCase(inverted(64, 8), n=1, c=8, h=40, w=60),  # several bands
    ChainCase((Stage(300),), n=1, c=40, h=3, w=3),  # threads share channels, not rows
]


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> ChainCase:
    found: ChainCase = request.param
    return found


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(case: ChainCase, layout: str, isa: str, threads: None) -> None:
    for dtype in DTYPES:
        problem = build_chain(case.but(layout=layout, dtype=dtype))
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            stain_scratch()
            results.append(run_op(problem))
        for other in results[1:]:
            assert torch.equal(results[0], other)


def one_stage(problem: ChainProblem, i: int, x: Tensor) -> Tensor:
    """Stage i alone, as a chain of its own."""
    case = problem.case.but(stages=problem.case.stages[i : i + 1])
    part = ChainProblem(
        case, x, problem.weights[i : i + 1], problem.biases[i : i + 1],
        problem.groups[i : i + 1], None,
    )  # fmt: skip
    y: Tensor = torch.ops.sparsecnn.chain_conv2d.default(*op_args(part))
    return y


def test_a_chain_is_its_stages(case: ChainCase, isa: str) -> None:
    for dtype in (torch.float32, torch.float64):
        problem = build_chain(case.but(dtype=dtype))
        x = problem.x
        for i in range(len(case.stages)):
            x = one_stage(problem, i, x)
        assert torch.equal(run_op(problem), x)


@pytest.mark.parametrize("layout", ["channels_last", "channels_last_offset", "sliced"])
def test_the_layout_does_not_change_a_bit(layout: str, case: ChainCase, isa: str) -> None:
    for dtype in DTYPES:
        problem = build_chain(case.but(dtype=dtype))
        moved = dataclasses.replace(problem, x=lay_out(problem.x, layout))
        assert torch.equal(run_op(moved).contiguous(), run_op(problem))


def test_the_order_of_the_weights_does_not_change_a_bit(case: ChainCase, isa: str) -> None:
    for dtype in DTYPES:
        problem = build_chain(case.but(dtype=dtype))
        want = run_op(problem)
        for order in chains.WEIGHT_ORDERS[1:]:
            weights = [chains.in_order(w, order) for w in problem.weights]
            assert torch.equal(run_op(dataclasses.replace(problem, weights=weights)), want), order


def test_a_batch_is_its_images(case: ChainCase, isa: str) -> None:
    for layout in ("contiguous", "channels_last"):
        problem = build_chain(case.but(layout=layout, n=3))
        y = run_op(problem)
        for n in range(3):
            alone = dataclasses.replace(problem, x=problem.x[n : n + 1])
            assert torch.equal(run_op(alone), y[n : n + 1])


def test_powers_of_two_scale_exactly(case: ChainCase, isa: str) -> None:
    stages = tuple(dataclasses.replace(s, activation="relu", bias=False) for s in case.stages)
    problem = build_chain(case.but(stages=stages))
    assert torch.equal(
        run_op(dataclasses.replace(problem, x=problem.x * 2.0**-9)), run_op(problem) * 2.0**-9
    )


# ---- random chains -------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--fuzz-seed")
        metafunc.parametrize(
            "fuzz_seed", range(first, first + metafunc.config.getoption("--fuzz-cases"))
        )


def test_random_chains_on_cuda(cuda: str) -> None:
    """What no hand-picked chain has, in the types of CUDA."""
    for seed in range(20_000, 20_100):
        case = chains.draw_chain(seed)
        dtype = torch.float16 if case.dtype == torch.float64 else case.dtype
        integers = case.integers and dtype != torch.float16
        check(build_chain(case.but(dtype=dtype, integers=integers)).to(cuda))


def test_fuzz(fuzz_seed: int) -> None:
    case = chains.draw_chain(fuzz_seed)
    problem = build_chain(case)
    skipped = 0
    for name in ISAS:
        try:
            with active_isa(name):
                check(problem)
        except pytest.skip.Exception:
            skipped += 1
        except Exception as error:
            raise AssertionError(
                f"{name}: {case}\nrepeat: python -m pytest tests/ops/test_chain_conv2d.py -k fuzz "
                f"--fuzz-cases 1 --fuzz-seed {fuzz_seed}"
            ) from error
    assert skipped < len(ISAS)
