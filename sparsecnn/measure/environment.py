"""The stamp that makes a measurement repeatable: machine, threads, versions, time."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Describe the machine and the software a measurement runs on.

    Returns:
        Plain strings, numbers and `None` (for what could not be found out): "cpu", "cores" (those
        this process may use), "threads" (of PyTorch), "cuda" (name of the current GPU if CUDA is
        in use), "torch", "sparsecnn", "isa" (of the CPU kernels in use), "python", "platform",
        "date" (UTC, ISO 8601).
    """
    return {
        "cpu": _cpu_name(Path("/proc/cpuinfo")),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "cuda": _gpu_name(),
        "torch": torch.__version__,
        "sparsecnn": _version("sparsecnn"),
        "isa": _isa(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name(cpuinfo: Path) -> str | None:
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or None


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _gpu_name() -> str | None:
    # Asking for the name would create a CUDA context of some hundred megabytes; a process that
    # measures on the GPU has one already.
    cuda: Any = torch.cuda  # `is_initialized` carries no type hints
    if not cuda.is_initialized():
        return None
    return torch.cuda.get_device_name()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _isa() -> str | None:
    # Looked up, not imported: measuring must work, and be importable, without the kernels.
    isa = getattr(sys.modules.get("sparsecnn"), "isa", None)
    if not callable(isa):
        return None
    try:
        return str(isa())
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
