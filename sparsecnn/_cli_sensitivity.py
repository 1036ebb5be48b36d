"""`sparsecnn sensitivity`: labelled images from an argument, and the curves of a model on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsecnn._cli_models import CliError, call_factory
from sparsecnn.data import digits
from sparsecnn.measure import accuracy
from sparsecnn.prune import Magnitude, Sensitivity, sensitivity
from sparsecnn.prune.sensitivity import SPARSITIES

Batches = Sequence[tuple[Tensor, Tensor]]
DIGITS_BATCH = 128


def open_data(spec: str, shape: tuple[int, ...]) -> Batches:
    """Labelled batches from a DATA argument.

    Args:
        spec: "digits" (the validation images) or module.path:factory.
        shape: of the model's input; its height is the size of the digits.

    Raises:
        CliError: nothing of that name, or it yields no (images, labels).
    """
    if spec == "digits":
        if shape[1] != 1:
            raise CliError(
                f"expected --input with 1 channel for --data digits, got {shape[1]}; e.g. 1,1,8,8"
            )
        return list(DataLoader(digits(shape[2]).val, DIGITS_BATCH))
    module, _, name = spec.partition(":")
    if not module or not name:
        raise CliError(f"expected --data as digits or module.path:factory, got {spec!r}")
    made = call_factory(module, name, "data is written as digits or module.path:factory")
    try:
        batches = [(x, y) for x, y in made]
    except (TypeError, ValueError) as error:
        raise CliError(f"expected {spec} to return (images, labels) batches: {error}") from error
    if not batches or not all(isinstance(part, Tensor) for batch in batches for part in batch):
        raise CliError(f"expected {spec} to return (images, labels) batches of tensors, got others")
    return batches


def examine(
    model: nn.Module, data: Batches, granularity: str, sparsities: tuple[float, ...] | None
) -> Sensitivity:
    """Top-1 accuracy with one layer pruned by magnitude, for all layers."""
    first = next(model.parameters())
    data = [(x.to(first.device, first.dtype), y.to(first.device)) for x, y in data]

    def top1(candidate: nn.Module) -> float:
        with torch.inference_mode():
            return accuracy(candidate, data)["top1"]

    return sensitivity(
        model, top1, Magnitude(granularity=granularity), sparsities or SPARSITIES, progress=True
    )
