"""How benchmarks time: the project's interleaved timer, warm or cold, and the roof of the machine.

A contestant is a factory: called once it makes its own buffers and returns the function to time.
Warm means one set of buffers, and a few untimed runs in front of every timed one, so that a run
finds caches and branch predictors as the contestant itself left them and not as its rival did. Cold
means as many sets as overflow the last-level cache twice, used in turn, so that every run finds its
input and weights in memory and everything else as the rival left it.

On CUDA a run is the replay of a graph of many calls, over the calls: what the device needs, without
the host's launches, which would hide every kernel below 10 us.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sparsecnn.measure.latency import LatencyStats, time_interleaved

Run = Callable[[], object]
MIN_RUNS = 20
SETTLE = 3  # untimed runs in front of each timed one of a warm measurement
GRAPH_CALLS = 20  # of a contestant in one CUDA graph, whose launch takes some 10 us
_MAX_SETS = 64  # a cold set per run is plenty beyond this
_DEFAULT_CACHE_BYTES = 64 << 20


def keep_memory() -> bool:
    """Make the C library keep freed memory instead of returning it to the system.

    With the defaults of glibc a rival's large temporaries decide whether the next output lies on
    fresh pages, which the system must clear while the clock runs: at batch 16 as much as half of a
    sparse layer's time. Servers run with allocators that keep memory; so do all contestants here.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    never = 2**31 - 1
    return bool(mallopt(trim_threshold, never) and mallopt(mmap_threshold, never))


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first core; 64 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def buffer_sets(bytes_per_set: int, device: str = "cpu") -> int:
    """How many sets of buffers a cold measurement rotates through.

    Args:
        bytes_per_set: what one run touches.
        device: "cpu" or "cuda".
    """
    cache = last_level_cache_bytes()
    if device == "cuda":
        cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(2, min(_MAX_SETS, -(-2 * cache // max(1, bytes_per_set))))


def rotating(runs: Sequence[Run]) -> Run:
    """One function that calls the given ones in turn."""
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def measure(
    contestants: Mapping[str, Callable[[], Run]],
    *,
    cold_bytes: int | None = None,
    runs: int = 30,
    warmup: int = 5,
    min_time_s: float = 0.05,
    max_time_s: float | None = None,
    settle: int = SETTLE,
    device: str = "cpu",
    graph_calls: int = GRAPH_CALLS,
) -> dict[str, LatencyStats]:
    """Time contestants against each other, run by run in turn.

    Args:
        contestants: name -> factory of the function to time.
        cold_bytes: bytes one run touches, for a cold measurement; None for a warm one.
        runs: timed rounds, at least 20.
        warmup: untimed rounds.
        min_time_s: timed time each contestant gets at least.
        max_time_s: budget of the whole measurement.
        settle: untimed runs in front of each timed one of a warm measurement; 0 for networks,
            which are larger than the caches.
        device: "cpu" or "cuda".
        graph_calls: at least, on CUDA; a cold measurement has every set in the graph.

    Returns:
        name -> statistics.

    Raises:
        ValueError: fewer than 20 runs.
    """
    if runs < MIN_RUNS:
        raise ValueError(f"measure: expected runs >= {MIN_RUNS}, got {runs}")
    sets = 1 if cold_bytes is None else buffer_sets(cold_bytes, device)
    functions = {
        name: rotating([make() for _ in range(sets)]) if sets > 1 else make()
        for name, make in contestants.items()
    }
    return time_interleaved(
        functions,
        warmup=warmup,
        runs=runs,
        min_time_s=min_time_s,
        max_time_s=max_time_s,
        settle=settle if sets == 1 else 0,
        device=device,
        graph_calls=max(graph_calls, sets),
    )


# Twelve independent chains hide the latency of an FMA on every x86 core of the last ten years.
_ROOF_SOURCE = """
typedef float vec __attribute__((vector_size(BYTES)));
float roof(long n) {
  vec a[12], b, c;
  for (int j = 0; j < BYTES / 4; ++j) { b[j] = 0.999f; c[j] = 0.001f; }
  for (int i = 0; i < 12; ++i) a[i] = b + (float)i;
  for (long k = 0; k < n; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = a[i] * b + c;
  vec s = a[0];
  for (int i = 1; i < 12; ++i) s += a[i];
  float t = 0;
  for (int j = 0; j < BYTES / 4; ++j) t += s[j];
  return t;
}
"""
_ROOF_STEPS = 2_000_000


def _vector_bytes() -> int:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return 64 if "avx512f" in flags else 32 if " fma" in flags else 16


def fma_roof_gflops(threads: int) -> float | None:
    """Measured peak of float32 fused multiply-adds in registers, all threads together.

    Args:
        threads: how many run at once.

    Returns:
        GFLOP/s of the fastest run (a peak is what was reached), or None without a C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    width = _vector_bytes()
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "roof.c"), Path(folder, "roof.so")
        source.write_text(_ROOF_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        done = subprocess.run(
            [compiler, *flags, f"-DBYTES={width}", str(source), "-o", str(library)],
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            return None
        roof = ctypes.CDLL(str(library)).roof
        roof.argtypes, roof.restype = [ctypes.c_long], ctypes.c_float

        def work() -> None:
            # ctypes releases the interpreter lock, so the threads really run at once.
            team = [threading.Thread(target=roof, args=(_ROOF_STEPS,)) for _ in range(threads - 1)]
            for member in team:
                member.start()
            roof(_ROOF_STEPS)
            for member in team:
                member.join()

        stats = time_interleaved({"roof": work}, warmup=3, runs=MIN_RUNS)["roof"]
    return threads * _ROOF_STEPS * 12 * (width // 4) * 2 / stats.min_s * 1e-9
