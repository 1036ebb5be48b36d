"""Memory: the peak while a function runs, and what a model stores."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import safetensors.torch
import torch
from torch import Tensor, nn

from ._inputs import check_model

_CPU = 0  # device type of the profiler's memory events


class ModelSize(TypedDict):
    """Sizes of a model. Tied parameters are counted and stored once.

    Keys:
        params: number of parameters, as stored (a sparse layer stores its nonzeros only).
        nonzero: number of parameters that are not zero.
        params_bytes: bytes of the parameters.
        buffers_bytes: bytes of the buffers: running statistics, indices of sparse layers.
        file_bytes: bytes of the state dict as a safetensors file, header included.
    """

    params: int
    nonzero: int
    params_bytes: int
    buffers_bytes: int
    file_bytes: int


def peak_memory(
    fn: Callable[[], object],
    *,
    device: torch.device | str | None = None,
    warmup: int = 1,
    inference: bool = True,
) -> int:
    """Most bytes alive at once of those that PyTorch's allocator hands out during `fn`.

    On the CPU the allocations are replayed from the events of `torch.profiler`, which does not
    report the end of a tensor from before: freeing one makes no room. On CUDA the result is
    `torch.cuda.max_memory_allocated` minus what was allocated at the start. Scratch memory that
    libraries get past PyTorch's allocator (oneDNN, cuDNN plans) is not seen on either; `peak_rss`
    sees it on the CPU.

    Args:
        fn: function without arguments.
        device: where `fn` allocates; `None` means CPU.
        warmup: calls beforehand, for what is allocated once and cached.
        inference: run under `torch.inference_mode()`; False to include what autograd keeps.

    Returns:
        Bytes, at least 0.

    Raises:
        TypeError: `fn` is not callable.
        ValueError: `warmup` is negative or the device is neither cpu nor cuda.

    Cost: the profiler slows `fn` down by a multiple; nothing here is a timing.
    """
    if not callable(fn):
        raise TypeError(f"peak_memory: expected fn to be callable, got {fn!r}")
    if warmup < 0:
        raise ValueError(f"peak_memory: expected warmup >= 0, got {warmup}")
    place = torch.device("cpu" if device is None else device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"peak_memory: expected device cpu or cuda, got {place}")
    with torch.inference_mode(inference):
        for _ in range(warmup):
            fn()
        return _cuda_peak(fn, place) if place.type == "cuda" else _cpu_peak(fn)


def peak_rss(fn: Callable[[], object], *, inference: bool = True) -> int | None:
    """Growth of the resident memory of the process at its peak during `fn`, in bytes.

    Includes what libraries allocate for themselves, excludes memory that the process already held
    free, so the first call in a process is the informative one.

    Returns:
        Bytes, or `None` where the kernel does not let a process reset its peak (needs Linux with
        a writable `/proc/self/clear_refs`).
    """
    if not callable(fn):
        raise TypeError(f"peak_rss: expected fn to be callable, got {fn!r}")
    before = _status_bytes("VmRSS")
    with torch.inference_mode(inference):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak to the present
        except OSError:
            return None
        fn()
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def model_size(model: nn.Module) -> ModelSize:
    """Count the parameters of `model` and the bytes that it really stores.

    Raises:
        TypeError: `model` is no module, or its state dict holds something else than tensors.

    Cost: a copy of the state dict in memory, twice.
    """
    check_model("model_size", model)
    return ModelSize(
        params=sum(p.numel() for p in model.parameters()),
        nonzero=sum(int(torch.count_nonzero(p)) for p in model.parameters()),
        params_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        buffers_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        file_bytes=len(safetensors.torch.save(_stored(model))),
    )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous, nothing shared, tied tensors once."""
    stored: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"model_size: expected a state dict of tensors, got {type(value).__name__} "
                f"under {name!r}"
            )
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and identity in seen:
            continue
        seen.add(identity)
        stored[name] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return stored


def _cpu_peak(fn: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        fn()
    # The exported trace is the public form of the single allocations; the profiler's tables only
    # have sums per operator, from which no peak can be told.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == _CPU
    ]
    now = peak = 0
    for _, n_bytes in sorted(sizes, key=lambda item: float(item[0])):
        now += int(n_bytes)
        peak = max(peak, now)
    return peak


def _cuda_peak(fn: Callable[[], object], place: torch.device) -> int:
    torch.cuda.synchronize(place)
    torch.cuda.reset_peak_memory_stats(place)
    before = torch.cuda.memory_allocated(place)
    fn()
    torch.cuda.synchronize(place)
    return max(0, torch.cuda.max_memory_allocated(place) - before)


def _status_bytes(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
