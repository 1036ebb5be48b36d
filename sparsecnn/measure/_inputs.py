"""Checks of the two arguments that most measurements share."""

from __future__ import annotations

import math

from torch import Tensor, nn


def check_model(what: str, model: object) -> None:
    """Raise TypeError unless `model` is an `nn.Module`; `what` names the caller."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: expected model to be an nn.Module, got {type(model).__name__}")


def as_inputs(what: str, x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The positional inputs of a model as a tuple.

    Raises:
        TypeError: `x` is neither a tensor nor a non-empty tuple of tensors.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    if not inputs or not all(isinstance(item, Tensor) for item in inputs):
        kinds = ", ".join(type(item).__name__ for item in inputs) or "an empty tuple"
        raise TypeError(f"{what}: expected x to be a tensor or a tuple of tensors, got {kinds}")
    return inputs


def check_seconds(what: str, name: str, value: object, *, positive: bool = False) -> None:
    """Raise unless `value` is a finite number of seconds, >= 0 or (with `positive`) > 0.

    Raises:
        TypeError: no number.
        ValueError: negative, NaN, infinite, or zero where it must be positive.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: expected {name} to be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(f"{what}: expected {name} {bound} and finite, got {value!r}")


def check_count(what: str, name: str, value: object, least: int) -> None:
    """Raise unless `value` is an int >= `least`.

    Raises:
        TypeError: no int (a bool is none).
        ValueError: too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: expected {name} to be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{what}: expected {name} >= {least}, got {value}")
