"""Loads the shared library with the ops, or says what to do when it cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

_MINIMUM_TORCH = (2, 10)
_LIBRARY = Path(__file__).with_name("libsparsecnn.so")
ISAS = ("scalar", "avx2", "avx512")


def _load() -> None:
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < _MINIMUM_TORCH:
        raise ImportError(
            f"sparsecnn: expected torch >= 2.10, got {torch.__version__}; "
            "upgrade torch and reinstall sparsecnn"
        )
    if not _LIBRARY.exists():
        raise ImportError(
            f"sparsecnn: expected the compiled library at {_LIBRARY}, got none; "
            "build it with `pip install .` (or `pip install -e .`) in the source tree; if that is "
            "done, start Python in another folder: here the sources hide the installed package"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        raise ImportError(
            f"sparsecnn: expected a library that loads beside torch {torch.__version__}, "
            f"got {error}; reinstall sparsecnn against this torch"
        ) from error


_load()


def isa() -> str:
    """Instruction set of the CPU kernels in force: ``scalar``, ``avx2`` or ``avx512``."""
    return str(torch.ops.sparsecnn._isa())


def supported_isas() -> tuple[str, ...]:
    """Instruction sets this machine can run, least capable first."""
    return tuple(i for i in ISAS if torch.ops.sparsecnn._isa_is_supported(i))


def set_isa(name: str) -> None:
    """Choose the instruction set of the CPU kernels for the whole process.

    Meant for tests and measurements; ``SPARSECNN_ISA`` does the same at start-up.

    Raises:
        ValueError: unknown name, or not supported by this machine.
    """
    if not isinstance(name, str) or not torch.ops.sparsecnn._set_isa(name):
        raise ValueError(
            f"set_isa: expected name one of {', '.join(supported_isas())} on this machine, "
            f"got {name!r}"
        )


def build_info() -> dict[str, Any]:
    """Facts about the compiled library: kernels, instruction sets, torch."""
    return {
        "library": _LIBRARY.name,
        "library_bytes": _LIBRARY.stat().st_size,
        "cuda_kernels": bool(torch.ops.sparsecnn._has_cuda()),
        "isa": isa(),
        "supported_isas": list(supported_isas()),
        "torch": torch.__version__,
    }
