"""Evaluation mode for the length of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in evaluation mode and restore the mode of every module afterwards.

    `model.train(was_training)` would not do: users freeze single layers (a batch norm in eval
    mode inside a training model), so the flag of each module is remembered on its own.

    Args:
        model: the network; shared submodules are fine.

    Yields:
        The same model, in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
