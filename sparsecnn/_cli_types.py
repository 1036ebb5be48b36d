"""Types of command line arguments: text to value, with an error that says what was expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch


def number(kind: Callable[[str], Any], text: str, what: str, fits: Callable[[Any], bool]) -> Any:
    """Convert and check a text; the error says what was expected."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value


def positive(text: str) -> int:
    """An int >= 1."""
    return int(number(int, text, "an int >= 1", lambda n: n >= 1))


def seed(text: str) -> int:
    """A seed of PyTorch, NumPy and scikit-learn."""
    # scikit-learn's limit, the smaller one.
    return int(number(int, text, "an int in [0, 2^32)", lambda n: 0 <= n < 2**32))


def sparsity(text: str) -> float:
    """A share of zeros."""
    what = "a share of zeros in [0, 1)"
    value = number(float, text, what + ", e.g. 0.9 for 90 %", lambda s: 0 <= s < 1)
    return float(value)


def shape(text: str) -> tuple[int, ...]:
    """The shape of an image batch."""
    def parse(given: str) -> tuple[int, ...]:
        return tuple(int(part) for part in given.replace("x", ",").split(","))

    what = "four positive sizes N,C,H,W such as 1,3,224,224"
    value = number(parse, text, what, lambda s: len(s) == 4 and all(n >= 1 for n in s))
    return tuple(value)


def device(text: str) -> str:
    """A device that is there."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"expected a device that is present, got {text!r} with {torch.cuda.device_count()} "
            "CUDA devices visible; use --device cpu"
        )
    return text


def shares(text: str) -> tuple[float, ...]:
    """Ascending shares of zeros."""

    def parse(given: str) -> tuple[float, ...]:
        return tuple(float(part) for part in given.split(","))

    what = "ascending shares of zeros in (0, 1) such as 0.5,0.8,0.9"
    fits = lambda s: all(0 < v < 1 for v in s) and list(s) == sorted(set(s))  # noqa: E731
    return tuple(number(parse, text, what, fits))
