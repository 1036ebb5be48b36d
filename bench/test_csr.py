"""The suite `csr` through pytest-benchmark: `pytest bench/test_csr.py`, any of its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import LAYERS, random_input, sparse_weight
from bench.suite_csr import contestants, verify

NAMES = ("dense contiguous", "dense channels_last", "csr contiguous", "csr channels_last")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("letter", LAYERS)
def test_csr(benchmark: Any, letter: str, sparsity: float, name: str) -> None:
    layer = LAYERS[letter]
    if name.startswith("dense") and sparsity != 0.9:
        pytest.skip("the dense kernels do not see the zeros: measured at 90 % only")
    weight, x = sparse_weight(layer, 1 - sparsity), random_input(layer, 1)
    factories, checks = contestants(layer, weight, x)
    if name in checks:
        verify(layer, weight, x, checks[name], torch.float32)
    benchmark.group = f"{letter} {layer.label}"
    benchmark.extra_info.update(
        nnz=int(weight.count_nonzero()), sparsity=sparsity, threads=torch.get_num_threads()
    )
    with torch.inference_mode():
        benchmark(factories[name]())
