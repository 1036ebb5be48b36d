"""The suite `winograd` through pytest-benchmark: `pytest bench/test_winograd.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import LAYERS, random_input
from bench.suite_winograd import NAMES, contestants, verify, winograd_weight

CONTESTANTS = (
    "dense contiguous", "dense channels_last", "winograd contiguous", "winograd channels_last",
)  # fmt: skip


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("sparsity", [0, 0.8])
@pytest.mark.parametrize("case", NAMES)
def test_winograd(benchmark: Any, case: str, sparsity: float, name: str) -> None:
    if name.startswith("dense") and sparsity:
        pytest.skip("the dense kernels do not see the zeros: measured once")
    letter, _, tile = case.partition(":F")
    layer = LAYERS[letter]
    packed, x = winograd_weight(layer, int(tile), 1 - sparsity), random_input(layer, 1)
    factories, ours = contestants(layer, packed, x)
    verify(layer, packed, x, ours, torch.float32)
    benchmark.group = f"{letter} {layer.label}"
    benchmark.extra_info.update(sparsity=sparsity, threads=torch.get_num_threads())
    with torch.inference_mode():
        benchmark(factories[name]())
