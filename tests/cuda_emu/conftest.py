"""The emulated kernels, built once, and the orders in which the emulator runs threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.cuda_emu import emulator
from tests.cuda_emu.emulator import Emulator


@pytest.fixture(scope="session")
def emu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.build(tmp_path_factory.mktemp("emu") / "emu.so")


@pytest.fixture
def emu(emu_library: Path) -> Emulator:
    return Emulator(emu_library)


@pytest.fixture(scope="module")
def faulty(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[Path]]:
    """A library for each of the module's `FAULTS`, see `emulator.build_faulty`."""
    return emulator.build_faulty(tmp_path_factory.mktemp("faulty"), request.module.FAULTS)


@pytest.fixture(params=["0", "1", "2"])
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("CUDA_EMU_ORDER", request.param)
    yield request.param
