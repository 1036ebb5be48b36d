"""Settings of PyTorch's CUDA libraries while a model is measured and while results are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Largest relative error of a product of two factors rounded to TF32, each by 2^-11 at most, times
# the largest slope of an activation, that of hardswish.
TF32_ERROR = 2 * 2.0**-11 * 1.5


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
    """No TF32 in the framework: what a layer is compared with must not round to 10 bits.

    Layers of ours keep the precision they were built for, timing keeps the setting of the user.
    Also a decorator.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        for owner in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
            stack.enter_context(_set(owner, "fp32_precision", "ieee"))
        yield


def tf32_is_allowed() -> bool:
    """Whether the user lets convolutions round to TF32, which is the default."""
    backends: Any = torch.backends
    allowed: bool = backends.cudnn.conv.fp32_precision == "tf32"
    return allowed


def may_use_tf32(weight: Tensor) -> bool:
    """Whether a convolution with this weight may round to TF32, now and on its device."""
    return weight.device.type == "cuda" and weight.dtype == torch.float32 and tf32_is_allowed()


def rounds_to_tf32(model: nn.Module) -> bool:
    """Whether a layer of ours in the model rounds to TF32, which `strict_float` does not reach."""
    return any(
        getattr(m, "is_sparsecnn_layer", False) and getattr(m, "allow_tf32", False)
        for m in model.modules()
    )


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
    tf32 = "allowed" if tf32_is_allowed() else "off"
    return [
        f"chosen for a batch of {images} on {torch.cuda.get_device_name(device)}, cuDNN in "
        f"benchmark mode, TF32 {tf32}: run it with torch.backends.cudnn.benchmark = True, and "
        "accelerate the original again for another batch"
    ]
