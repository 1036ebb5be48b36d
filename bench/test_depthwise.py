"""The suite `depthwise` through pytest-benchmark: `pytest bench/test_depthwise.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import random_input, sparse_weight
from bench.suite_depthwise import LAYERS, contestants, verify

NAMES = (
    "dense contiguous", "dense channels_last", "depthwise contiguous", "depthwise channels_last",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("letter", LAYERS)
def test_depthwise(benchmark: Any, letter: str, name: str) -> None:
    layer = LAYERS[letter]
    weight, x = sparse_weight(layer, 1.0), random_input(layer, 1)
    factories, checks = contestants(layer, weight, x)
    if name in checks:
        verify(layer, weight, x, checks[name], torch.float32)
    benchmark.group = f"{letter} {layer.label}"
    benchmark.extra_info.update(threads=torch.get_num_threads())
    with torch.inference_mode():
        benchmark(factories[name]())
