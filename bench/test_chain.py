"""The suites `chain` and `pointwise` through pytest-benchmark: `pytest bench/test_chain.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import suite_chain, suite_pointwise
from bench.chains import CHAINS, POINTWISE, label
from bench.suite import LAYOUTS
from tests.chains import build_chain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("contestant", ["dense", "chain"])
@pytest.mark.parametrize("name", CHAINS)
def test_chain(benchmark: Any, name: str, contestant: str, layout: str) -> None:
    problem = suite_chain.with_input_as_residual(CHAINS[name], "cpu")
    suite_chain.verify(problem, suite_chain.by_chain(problem), LAYOUTS[layout])
    benchmark.group = f"{name}  {label(CHAINS[name])}"
    benchmark.extra_info.update(threads=torch.get_num_threads())
    with torch.inference_mode():
        benchmark(suite_chain.contestants(problem)[f"{contestant} {layout}"]())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("contestant", ["dense", "pointwise"])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(benchmark: Any, name: str, contestant: str, layout: str) -> None:
    problem = build_chain(POINTWISE[name])
    suite_chain.verify(problem, suite_pointwise.by_pointwise(problem), LAYOUTS[layout])
    benchmark.group = f"{name}  {label(POINTWISE[name])}"
    benchmark.extra_info.update(threads=torch.get_num_threads())
    with torch.inference_mode():
        benchmark(suite_pointwise.contestants(problem)[f"{contestant} {layout}"]())
