"""Energy counters fed from a folder that looks like /sys/class/powercap, and the 45 nm model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sparsecnn.measure import energy, modelled_energy

module = importlib.import_module("sparsecnn.measure.energy")
RANGE_UJ = 999_999


class Machine:
    """Fake packages and a fake clock: `spend` moves both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_ns = 0

    def add(self, domain: str, name: str, energy_uj: int) -> None:
        folder = self.root / domain
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")

    def spend(self, seconds: float, **microjoules: int) -> None:
        """Let time pass; keywords name packages: p0 for intel-rapl:0."""
        self.now_ns += round(seconds * 1e9)
        for package, spent in microjoules.items():
            path = self.root / f"intel-rapl:{package[1:]}" / "energy_uj"
            path.write_text(str((int(path.read_text()) + spent) % (RANGE_UJ + 1)))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path / "powercap")
    clock = SimpleNamespace(perf_counter_ns=lambda: machine.now_ns, sleep=lambda s: None)
    monkeypatch.setattr(module, "time", clock)
    return machine


def test_joules_per_call(machine: Machine):
    machine.add("intel-rapl:0", "package-0", 1000)
    result = energy(lambda: machine.spend(0.25, p0=50_000), rapl_root=machine.root)
    assert result.joules == pytest.approx(0.05, rel=1e-12)
    assert (result.source, result.runs, result.seconds) == ("rapl", 4, 1.0)
    assert "idle power included" in result.reason


def test_metrics_of_a_wrapped_counter(machine: Machine):
    machine.add("intel-rapl:0", "package-0", RANGE_UJ - 60_000)  # wraps within the second call
    result = energy(lambda: machine.spend(0.5, p0=50_000), rapl_root=machine.root)
    assert result.joules == pytest.approx(0.05, rel=1e-12)


def test_a_counter_that_wraps_more_than_once_in_a_long_window(machine: Machine):
    machine.add("intel-rapl:0", "package-0", 0)
    result = energy(lambda: machine.spend(1.5, p0=600_000), rapl_root=machine.root, min_time_s=15.0)
    assert result.runs == 10
    assert result.joules == pytest.approx(0.6, rel=1e-12)


def test_packages_are_summed_and_their_parts_are_not(machine: Machine):
    machine.add("intel-rapl:0", "package-0", 0)
    machine.add("intel-rapl:1", "package-1", RANGE_UJ)
    machine.add("intel-rapl:0:0", "core", 0)
    machine.add("intel-rapl:2", "psys", 0)
    machine.add("intel-rapl-mmio:0", "package-0", 0)  # the same package once more

    def run() -> None:
        machine.spend(1.0, p0=30_000, p1=20_000, p2=500_000)
        for domain in ("intel-rapl:0:0", "intel-rapl-mmio:0"):
            # Moves with every call, or a part read by mistake would add nothing.
            path = machine.root / domain / "energy_uj"
            path.write_text(str(int(path.read_text()) + 25_000))

    assert energy(run, rapl_root=machine.root).joules == pytest.approx(0.05, rel=1e-12)


def test_the_warmup_call_is_not_charged(machine: Machine):
    machine.add("intel-rapl:0", "package-0", 0)
    costs = iter([900_000, 1000, 1000])
    result = energy(lambda: machine.spend(0.5, p0=next(costs)), rapl_root=machine.root)
    assert result.joules == pytest.approx(1e-3, rel=1e-12)


def idle_at(machine: Machine, monkeypatch: pytest.MonkeyPatch, watts: float) -> None:
    def sleep(seconds: float) -> None:
        machine.spend(seconds, p0=round(watts * seconds * 1e6))

    monkeypatch.setattr(module.time, "sleep", sleep)


def test_idle_power_is_subtracted(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine.add("intel-rapl:0", "package-0", RANGE_UJ)
    idle_at(machine, monkeypatch, watts=0.1)
    result = energy(lambda: machine.spend(0.5, p0=150_000), rapl_root=machine.root, idle_s=2.0)
    assert result.joules == pytest.approx(0.15 - 0.1 * 0.5, rel=1e-9)
    assert result.idle_w == pytest.approx(0.1)
    assert "subtracted" in result.reason


def test_below_idle_power_is_unknown_not_zero(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine.add("intel-rapl:0", "package-0", 0)
    idle_at(machine, monkeypatch, watts=0.4)
    result = energy(lambda: machine.spend(0.5, p0=100_000), rapl_root=machine.root, idle_s=1.0)
    assert result.joules is None and "not above the idle power" in result.reason


def test_a_counter_that_stands_still_is_unknown_not_zero(machine: Machine):
    machine.add("intel-rapl:0", "package-0", 5)
    result = energy(lambda: machine.spend(0.5), rapl_root=machine.root)
    assert result.joules is None and "did not move" in result.reason


def test_no_counter_is_none_with_the_reason_and_runs_nothing(tmp_path: Path):
    calls: list[int] = []
    result = energy(lambda: calls.append(1), rapl_root=tmp_path / "missing")
    assert result.joules is None and result.source == "rapl" and not calls
    assert "no RAPL counter" in result.reason and "No such file" in result.reason
    assert "no CPU package domain" in energy(print, rapl_root=tmp_path).reason


def test_an_unreadable_counter_is_none_with_the_reason(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    machine.add("intel-rapl:0", "package-0", 0)
    read_text = Path.read_text

    def guarded(path: Path, *args: str, **kwargs: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    result = energy(print, rapl_root=machine.root)
    assert result.joules is None
    assert "energy_uj" in result.reason and "Permission denied" in result.reason


def test_a_corrupt_counter_is_none_with_the_reason(machine: Machine):
    machine.add("intel-rapl:0", "package-0", 0)
    (machine.root / "intel-rapl:0" / "energy_uj").write_text("abc")
    assert "holds 'abc'" in energy(print, rapl_root=machine.root).reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_nvml_without_a_gpu_is_none():
    result = energy(print, source="nvml")
    assert (result.joules, result.source) == (None, "nvml")
    assert "no CUDA device" in result.reason
    assert energy(print, device="cuda").source == "nvml"


def test_nvml_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    result = energy(print, source="nvml")
    assert result.joules is None and "pip install 'sparsecnn[energy]'" in result.reason


def test_nvml_reads_the_gpu_by_uuid(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    nvml = ModuleType("pynvml")
    spent_mj = 70_000
    nvml.NVMLError = RuntimeError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-abc": "handle"}[uuid]
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"handle": spent_mj}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(uuid="abc"),
    }.items():
        monkeypatch.setattr(module.torch.cuda, name, value)

    def run() -> None:
        nonlocal spent_mj
        spent_mj += 2500
        machine.now_ns += 500_000_000

    result = energy(run, source="nvml")
    assert (result.joules, result.source, result.runs) == (2.5, "nvml", 2)


def test_the_model_by_hand():
    result = energy(source="modelled", macs=1_000_000, dram_bytes=4_000, sram_bytes=8_000)
    picojoules = 1_000_000 * (0.9 + 3.7) + 1_000 * 640 + 2_000 * 5
    assert result.joules == pytest.approx(picojoules * 1e-12, rel=1e-12)
    assert result.source == "modelled" and "not a measurement" in result.reason


def test_auto_never_models(tmp_path: Path):
    result = energy(print, macs=10, dram_bytes=10, rapl_root=tmp_path)
    assert result.joules is None and result.source == "rapl"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: energy(print, source="guess"), ValueError, "auto, rapl, nvml or .*got 'guess'"),
        (lambda: energy(), TypeError, "energy: expected fn to be callable, got None"),
        (lambda: energy(print, min_time_s=0), ValueError, "min_time_s > 0 and finite, got 0"),
        (lambda: energy(print, idle_s=-1), ValueError, "idle_s >= 0 and finite, got -1"),
        (lambda: energy(print, min_time_s=None), TypeError, "min_time_s to be a number, got None"),
        (lambda: energy(source="modelled", macs=1), ValueError, "macs and dram_bytes .*1 and None"),
        (lambda: modelled_energy(-1, 0), ValueError, "expected macs >= 0, got -1"),
        (lambda: modelled_energy(1, -2), ValueError, "expected dram_bytes >= 0, got -2"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
