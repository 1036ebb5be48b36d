"""Settings of PyTorch's CUDA libraries while a model is measured and while results are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def _set(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def strict_float() -> Iterator[None]:
    """No TF32: what a layer is compared with must not round to 10 bits where ours does to 23.

    Also a decorator. Timing keeps the setting of the user.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        for owner in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
            stack.enter_context(_set(owner, "fp32_precision", "ieee"))
        yield


@contextmanager
def dense_at_its_best(device: torch.device) -> Iterator[None]:
    """On CUDA, cuDNN in benchmark mode, where the heuristic's choice may be slow."""
    if device.type != "cuda":
        yield
        return
    with _set(torch.backends.cudnn, "benchmark", True):
        yield


def describe(device: torch.device, images: int) -> list[str]:
    """For the report: under what settings the dense layers were measured. Empty on the CPU."""
    if device.type != "cuda":
        return []
    backends: Any = torch.backends
    tf32 = "allowed" if backends.cudnn.conv.fp32_precision == "tf32" else "off"
    return [
        f"chosen for a batch of {images} on {torch.cuda.get_device_name(device)}, cuDNN in "
        f"benchmark mode, TF32 {tf32}: run it with torch.backends.cudnn.benchmark = True, and "
        "accelerate the original again for another batch"
    ]
