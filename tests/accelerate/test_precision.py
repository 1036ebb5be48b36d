"""Settings of PyTorch's CUDA libraries around measurements and comparisons; they need no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsecnn._accelerate import choice, precision
from sparsecnn._accelerate.choice import GRAPH_CALLS, Settings, time_layers
from sparsecnn.measure import LatencyStats

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = Settings(warmup=2, runs=7, tie_margin=0.03, candidates=())


def float_precision() -> list[str]:
    backends: Any = torch.backends
    owners = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    return [owner.fp32_precision for owner in owners]


def test_comparisons_allow_no_tf32_and_put_the_setting_back() -> None:
    backends: Any = torch.backends
    before = float_precision()
    backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with precision.strict_float():
            assert float_precision() == ["ieee"] * 3
        assert float_precision() == [*before[:2], "tf32"]

        @precision.strict_float()
        def fails() -> None:
            assert float_precision() == ["ieee"] * 3
            raise ValueError("inside")

        for _ in range(2):
            with pytest.raises(ValueError, match="inside"):
                fails()
            assert float_precision() == [*before[:2], "tf32"]
    finally:
        backends.cuda.matmul.fp32_precision = before[2]
    assert float_precision() == before


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_searches_while_measuring(before: bool) -> None:
    own = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before
    try:
        with precision.dense_at_its_best(CUDA):
            assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark == before
        with precision.dense_at_its_best(CPU):
            assert torch.backends.cudnn.benchmark == before
    finally:
        torch.backends.cudnn.benchmark = own


def test_the_report_names_batch_gpu_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of the test")
    (note,) = precision.describe(CUDA, 32)
    assert "batch of 32 on GPU of the test" in note and "TF32 allowed" in note
    with precision.strict_float():
        assert "TF32 off" in precision.describe(CUDA, 32)[0]
    assert precision.describe(CPU, 32) == []


def fake_timer(asked: list[int], fails: bool) -> Callable[..., dict[str, LatencyStats]]:
    def timer(fns: object, **options: Any) -> dict[str, LatencyStats]:
        asked.append(options["graph_calls"])
        assert options["runs"] == 28 and options["max_time_s"] == 6.0
        if fails and options["graph_calls"]:
            raise RuntimeError("expected fns['a'] to be capturable")
        return {"a": LatencyStats.from_ns([1])}

    return timer


def test_layers_on_cuda_are_timed_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, fails, want in (
        (CPU, False, [0]),
        (CUDA, False, [GRAPH_CALLS]),
        (CUDA, True, [GRAPH_CALLS, 0]),
    ):
        asked: list[int] = []
        monkeypatch.setattr(choice, "time_interleaved", fake_timer(asked, fails))
        if fails:
            with pytest.warns(UserWarning, match=r"timed with their launches: .*fns\['a'\]"):
                time_layers({"a": lambda: None}, SETTINGS, 1.5, device, effort=4)
        else:
            time_layers({"a": lambda: None}, SETTINGS, 1.5, device, effort=4)
        assert asked == want
