"""Peak memory against sizes known beforehand, model size against a file on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sparsecnn.measure import memory, model_size, peak_memory, peak_rss

from .helpers import digits_net

MIB = 1 << 20


def buffer(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def one_after_the_other() -> None:
    for mib in (3, 5, 2):
        buffer(mib)


def all_at_once() -> list[torch.Tensor]:
    return [buffer(mib) for mib in (3, 5, 2)]


@pytest.mark.parametrize(("fn", "mib"), [(one_after_the_other, 5), (all_at_once, 10)])
def test_peak_is_what_is_alive_together(fn, mib: int):
    assert peak_memory(fn) == mib * MIB


def test_memory_from_before_neither_counts_nor_makes_room():
    held = [buffer(8)]

    def swap() -> None:
        held.clear()
        held.append(buffer(2))

    assert peak_memory(swap, warmup=0) == 2 * MIB
    assert peak_memory(lambda: None) == 0


def test_what_autograd_keeps_counts_only_outside_inference():
    layers = nn.Sequential(*[nn.Sigmoid() for _ in range(8)])
    x = torch.ones(MIB // 4, requires_grad=True)
    assert 2 * MIB <= peak_memory(lambda: layers(x)) < 4 * MIB
    assert peak_memory(lambda: layers(x), inference=False) >= 8 * MIB


def test_warmup_calls():
    calls: list[int] = []
    peak_memory(lambda: calls.append(1), warmup=3)
    assert len(calls) == 4


def test_resident_peak_sees_touched_memory():
    grown = peak_rss(lambda: torch.ones(64 * MIB, dtype=torch.uint8).sum())
    if grown is None:
        pytest.skip("this kernel does not let a process reset its peak")
    # Far below the 64 MiB touched: other threads may give memory back meanwhile.
    assert grown >= 32 * MIB


def test_resident_peak_is_none_where_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError

    calls: list[int] = []
    monkeypatch.setattr(memory.Path, "write_text", refuse)
    assert peak_rss(lambda: calls.append(1)) is None
    assert not calls


def test_metrics_model_size_equals_the_saved_file(tmp_path: Path):
    model = digits_net()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    size = model_size(model)
    assert size["file_bytes"] == path.stat().st_size
    assert size["params"] == 23_034 and size["params_bytes"] == 4 * 23_034
    # Three batch norms: mean and variance in float32, the batch counter in int64.
    assert size["buffers_bytes"] == 2 * 4 * (16 + 32 + 32) + 3 * 8
    assert size["nonzero"] == 23_034 - 80


def test_zeros_are_counted_and_still_stored():
    model = nn.Linear(8, 4)
    nn.init.ones_(model.bias)
    dense = model_size(model)
    nn.init.zeros_(model.weight)
    size = model_size(model)
    assert size["nonzero"] == 4
    assert size["file_bytes"] == dense["file_bytes"]


def test_half_precision_halves_the_bytes():
    assert model_size(nn.Linear(8, 4).half())["params_bytes"] == 2 * (32 + 4)


def test_tied_and_strided_weights(tmp_path: Path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    model[2].to(memory_format=torch.channels_last)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    del state["1.weight"]
    safetensors.torch.save_file(state, tmp_path / "tied.safetensors")
    size = model_size(model)
    assert size["file_bytes"] == (tmp_path / "tied.safetensors").stat().st_size
    assert size["params"] == 64 * 64 + 2 * 64 + 4 * 4 * 9 + 4


def test_a_model_without_parameters():
    size = model_size(nn.ReLU())
    assert (size["params"], size["params_bytes"], size["buffers_bytes"]) == (0, 0, 0)


class ExtraState(nn.Module):
    def get_extra_state(self) -> str:
        return "text"

    def set_extra_state(self, state: object) -> None: ...


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: peak_memory(3), TypeError, "peak_memory: expected fn to be callable, got 3"),
        (lambda: peak_memory(print, warmup=-1), ValueError, "expected warmup >= 0, got -1"),
        (lambda: peak_memory(print, device="meta"), ValueError, "device cpu or cuda, got meta"),
        (lambda: peak_rss(None), TypeError, "peak_rss: expected fn to be callable, got None"),
        (lambda: model_size({}), TypeError, "model_size: expected model to be an nn.Module"),
        (lambda: model_size(ExtraState()), TypeError, "tensors, got str under '_extra_state'"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda():
    def both() -> list[torch.Tensor]:
        return [torch.empty(m * MIB, dtype=torch.uint8, device="cuda") for m in (4, 8)]

    assert peak_memory(both, device="cuda") == 12 * MIB
