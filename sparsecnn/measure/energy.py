"""Energy per call: measured by the machine's own counters, or modelled and labelled as such.

Sources: RAPL, the energy counters of x86 CPU packages that Linux shows under
`/sys/class/powercap`; NVML, the energy counter of NVIDIA GPUs since Volta. Both count everything
the package or board does, other processes included. A counter that cannot be read gives `None` and
the reason, never 0.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ._inputs import check_seconds

#: Picojoules per operation at 45 nm, from Han et al., "Learning both weights and connections for
#: efficient neural networks" (2015), table 1. Good for ratios, not for a present-day chip.
ENERGY_45NM_PJ = MappingProxyType(
    {"fp32_add": 0.9, "fp32_mul": 3.7, "sram_32bit": 5.0, "dram_32bit": 640.0}
)

# Domain names of whole CPU packages: `intel-rapl:0`, also on AMD. Not `intel-rapl:0:0` (cores, a
# part of the package) and not `intel-rapl-mmio:0` (the same package once more).
_PACKAGE = re.compile(r"intel-rapl:\d+")


class CounterError(RuntimeError):
    """An energy counter is absent or unreadable; the message is the reason."""


@dataclass(frozen=True)
class EnergyResult:
    """Energy of one call of a function.

    Attributes:
        joules: per call, the idle power subtracted if it was measured; `None` when unknown.
        source: "rapl", "nvml" or "modelled".
        reason: why `joules` is `None`, or how it came about.
        runs: calls it is the average of; 0 when nothing ran.
        seconds: length of the window that was measured.
        idle_w: power of the idle machine that was subtracted, `None` when not measured.
    """

    joules: float | None
    source: str
    reason: str
    runs: int = 0
    seconds: float = 0.0
    idle_w: float | None = None


class Counter(Protocol):
    """A running energy counter."""

    source: str

    def joules(self) -> float:
        """Joules since the counter was opened; raises `CounterError` when it cannot be read."""


class RaplCounter:
    """Sum of all CPU packages; single wrap-arounds between two readings are undone.

    Args:
        root: folder of the powercap tree.

    Raises:
        CounterError: no package domain below `root`, or one that cannot be read.
    """

    source = "rapl"

    def __init__(self, root: str | os.PathLike[str] = "/sys/class/powercap") -> None:
        base = Path(root)
        try:
            names = sorted(p.name for p in base.iterdir() if _PACKAGE.fullmatch(p.name))
        except OSError as error:
            raise CounterError(f"no RAPL counter: {base}: {error.strerror}") from error
        self._packages = [
            base / name for name in names if _read(base / name / "name").startswith("package")
        ]
        if not self._packages:
            raise CounterError(f"no RAPL counter: no CPU package domain in {base}")
        self._range_uj = [self._int(p / "max_energy_range_uj") for p in self._packages]
        self._last_uj = [self._int(p / "energy_uj") for p in self._packages]
        self._total_uj = 0

    def joules(self) -> float:
        """Joules since construction. Call it more often than a package wraps around."""
        for i, package in enumerate(self._packages):
            now = self._int(package / "energy_uj")
            step = now - self._last_uj[i]
            # The counter runs through 0 .. max_energy_range_uj inclusive and starts again.
            self._total_uj += step if step >= 0 else step + self._range_uj[i] + 1
            self._last_uj[i] = now
        return self._total_uj * 1e-6

    @staticmethod
    def _int(path: Path) -> int:
        text = _read(path)
        try:
            return int(text)
        except ValueError as error:
            raise CounterError(f"RAPL counter unreadable: {path} holds {text!r}") from error


class NvmlCounter:
    """Energy of one NVIDIA GPU, through the optional package `nvidia-ml-py`.

    Args:
        device: CUDA device as PyTorch numbers it; found by UUID, because NVML ignores
            `CUDA_VISIBLE_DEVICES`.

    Raises:
        CounterError: no CUDA device, no `pynvml`, or a GPU without the counter.
    """

    source = "nvml"

    def __init__(self, device: torch.device | str | None = None) -> None:
        if not torch.cuda.is_available():
            raise CounterError("no NVML counter: no CUDA device")
        try:
            import pynvml
        except ImportError as error:
            raise CounterError(
                "no NVML counter: the package nvidia-ml-py is not installed; "
                "pip install 'sparsecnn[energy]'"
            ) from error
        self._nvml: Any = pynvml
        self._device = torch.device("cuda" if device is None else device)
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise CounterError(f"no NVML counter: {error}") from error
        self._start_mj = 0
        self._start_mj = self._millijoules()

    def joules(self) -> float:
        """Joules since construction; waits for the work queued on the GPU first."""
        return (self._millijoules() - self._start_mj) * 1e-3

    def _millijoules(self) -> int:
        torch.cuda.synchronize(self._device)
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            raise CounterError(f"NVML counter unreadable: {error}") from error


def energy(
    fn: Callable[[], object] | None = None,
    source: str = "auto",
    *,
    device: torch.device | str | None = None,
    min_time_s: float = 1.0,
    idle_s: float = 0.0,
    macs: int | None = None,
    dram_bytes: int | None = None,
    sram_bytes: int = 0,
    rapl_root: str | os.PathLike[str] = "/sys/class/powercap",
) -> EnergyResult:
    """Energy of one call of `fn`.

    `fn` runs once untimed, then again and again under `torch.inference_mode()` for `min_time_s`
    between two readings of the counter. The counters tick about every millisecond (RAPL) to tenth
    of a second (NVML): a window much shorter than the default measures the tick.

    Args:
        fn: function without arguments; unused by "modelled".
        source: "rapl", "nvml", "modelled", or "auto": nvml for a CUDA `device`, else rapl. "auto"
            never falls back on the model.
        device: where `fn` runs; `None` means CPU.
        min_time_s: least length of the window.
        idle_s: first measure the idle machine for so long and subtract its power; 0 for not.
        macs: for "modelled", multiply-accumulates of one call.
        dram_bytes: for "modelled", bytes moved to and from main memory.
        sram_bytes: for "modelled", bytes moved to and from caches.
        rapl_root: folder of the powercap tree.

    Returns:
        The energy, or `None` with the reason where no counter can be read.

    Raises:
        TypeError: `fn` is needed and not callable, or a number has the wrong type.
        ValueError: unknown source, a number out of range, or `macs` or `dram_bytes` missing.
    """
    if source not in ("auto", "rapl", "nvml", "modelled"):
        raise ValueError(
            f"energy: expected source to be auto, rapl, nvml or modelled, got {source!r}"
        )
    if source == "modelled":
        if macs is None or dram_bytes is None:
            raise ValueError(
                "energy: expected macs and dram_bytes for source modelled, "
                f"got {macs!r} and {dram_bytes!r}"
            )
        return modelled_energy(macs, dram_bytes, sram_bytes)
    if not callable(fn):
        raise TypeError(f"energy: expected fn to be callable, got {fn!r}")
    check_seconds("energy", "min_time_s", min_time_s, positive=True)
    check_seconds("energy", "idle_s", idle_s)
    on_gpu = device is not None and torch.device(device).type == "cuda"
    if source == "auto":
        source = "nvml" if on_gpu else "rapl"
    try:
        counter: Counter = (
            NvmlCounter(device if on_gpu else None) if source == "nvml" else RaplCounter(rapl_root)
        )
        return _measure(fn, counter, min_time_s, idle_s)
    except CounterError as error:
        return EnergyResult(None, source, str(error))


def modelled_energy(macs: int, dram_bytes: int, sram_bytes: int = 0) -> EnergyResult:
    """Energy by the 45 nm table: macs * (add + mul) + words moved * energy per 32-bit word.

    Raises:
        ValueError: a negative or infinite count.
    """
    for name, value in (("macs", macs), ("dram_bytes", dram_bytes), ("sram_bytes", sram_bytes)):
        if not 0 <= value < math.inf:
            raise ValueError(f"modelled_energy: expected {name} >= 0, got {value!r}")
    table = ENERGY_45NM_PJ
    picojoules = (
        macs * (table["fp32_add"] + table["fp32_mul"])
        + dram_bytes / 4 * table["dram_32bit"]
        + sram_bytes / 4 * table["sram_32bit"]
    )
    reason = "modelled: 45 nm table of Han et al. 2015, not a measurement"
    return EnergyResult(picojoules * 1e-12, "modelled", reason)


def _measure(
    fn: Callable[[], object], counter: Counter, min_time_s: float, idle_s: float
) -> EnergyResult:
    with torch.inference_mode():
        fn()
        idle_w = _idle_power(counter, idle_s) if idle_s > 0 else None
        runs = 0
        start_j = counter.joules()
        begin = read_at = now = time.perf_counter_ns()
        while now - begin < min_time_s * 1e9:
            fn()
            runs += 1
            now = time.perf_counter_ns()
            if now - read_at > 1e9:  # often enough for a package that wraps within minutes
                counter.joules()
                read_at = now
        used_j = counter.joules() - start_j
        # Read again: on a GPU the calls return before their work is done.
        seconds = (time.perf_counter_ns() - begin) * 1e-9
    if used_j <= 0:
        reason = f"the {counter.source} counter did not move in {seconds:.3f} s"
        return EnergyResult(None, counter.source, reason, runs, seconds, idle_w)
    if idle_w is None:
        reason = f"measured by {counter.source}, idle power included"
        return EnergyResult(used_j / runs, counter.source, reason, runs, seconds)
    net_j = used_j - idle_w * seconds
    if net_j <= 0:
        reason = f"not above the idle power of {idle_w:.1f} W in {seconds:.3f} s"
        return EnergyResult(None, counter.source, reason, runs, seconds, idle_w)
    reason = f"measured by {counter.source}, idle power of {idle_w:.1f} W subtracted"
    return EnergyResult(net_j / runs, counter.source, reason, runs, seconds, idle_w)


def _idle_power(counter: Counter, idle_s: float) -> float:
    start_j, begin = counter.joules(), time.perf_counter_ns()
    time.sleep(idle_s)
    used_j = counter.joules() - start_j
    return used_j / max((time.perf_counter_ns() - begin) * 1e-9, 1e-9)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        # The counters have been readable by root only since 2020 (CVE-2020-8694).
        raise CounterError(f"RAPL counter unreadable: {path}: {error.strerror}") from error
