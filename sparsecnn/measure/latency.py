"""Run time: the only timer of the project.

Two candidates are comparable only when they were timed in one process, on the same threads, run
by run in turn (A B C A B C ...), because clock frequency, temperature and neighbours drift by more
than the differences of interest. Results are medians with a spread; there is no mean.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn._models import evaluating

from ._inputs import as_inputs, check_count, check_model, check_seconds

# Fewer runs than this give a median that a single disturbance can move; a time budget never
# pushes the number of runs below it.
MIN_RUNS = 5

# Share of `max_time_s` that the warm-up may use, so that a slow model still gets measured runs.
_WARMUP_SHARE = 0.25

# What PyTorch's notes on CUDA graphs ask for.
_CALLS_BEFORE_CAPTURE = 3


@dataclass(frozen=True)
class LatencyStats:
    """Order statistics of the run times of one function, in seconds.

    Attributes:
        runs: number of timed runs.
        median_s: median.
        p90_s: 90th percentile (linear interpolation between order statistics, as all here).
        p99_s: 99th percentile; below 100 runs it lies between the two slowest runs.
        iqr_s: 75th minus 25th percentile, the spread that a difference of medians must exceed.
        min_s: fastest run.
    """

    runs: int
    median_s: float
    p90_s: float
    p99_s: float
    iqr_s: float
    min_s: float

    @classmethod
    def from_ns(cls, times_ns: list[int]) -> LatencyStats:
        """Summarize raw run times.

        Args:
            times_ns: one duration per run, in nanoseconds; at least one.

        Raises:
            ValueError: no duration was given.
        """
        if not times_ns:
            raise ValueError("LatencyStats: expected times_ns with at least one run, got none")
        seconds = torch.tensor(times_ns, dtype=torch.float64) * 1e-9
        points = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)
        low, q25, median, q75, p90, p99 = torch.quantile(seconds, points).tolist()
        return cls(len(times_ns), median, p90, p99, q75 - q25, low)

    def throughput(self, images: int) -> float:
        """Images per second at the median, for `images` images per run (NaN for a zero median)."""
        check_count("throughput", "images", images, 1)
        return images / self.median_s if self.median_s > 0 else math.nan

    def to_dict(self) -> dict[str, float | int]:
        """Plain dict of the fields, for JSON."""
        return asdict(self)


def time_interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 10,
    runs: int = 50,
    min_time_s: float = 0.0,
    max_time_s: float | None = None,
    rotate: bool = True,
    settle: int = 0,
    device: torch.device | str | None = None,
    graph_calls: int = 0,
) -> dict[str, LatencyStats]:
    """Time functions in turn: A B C, then B C A, then C A B, ...

    Everything runs under `torch.inference_mode()` with the garbage collector paused. On the CPU a
    run is wall time (`perf_counter_ns`); on CUDA it is the time between two events on the current
    stream, recorded on an idle device and synchronized after every run, so launch gaps count: the
    host needs 5 to 20 us for every kernel that it launches. `graph_calls` takes them out.

    Args:
        fns: name -> function without arguments. The results are dropped outside the timed span.
        warmup: untimed rounds.
        runs: timed rounds.
        min_time_s: go on beyond `runs` until every function has this much timed time.
        max_time_s: budget for the whole call, warm-up included: a quarter of it ends the warm-up
            (after one round), all of it ends the timed rounds (after `min(MIN_RUNS, runs)`).
        rotate: start every round one function later. A fixed order would always run B on the
            caches and clock that A left behind.
        settle: untimed runs of a function in front of each timed one. With 0 a function finds the
            caches as its rival left them; with 1 or more, as itself did.
        device: where the functions run; `None` means CPU.
        graph_calls: on CUDA, capture so many calls of each function into one CUDA graph, and take
            the replay of the graph over the calls for a run: what the device needs, however slow
            the host launches. 0 calls the functions as they are; other devices do so anyway.

    Returns:
        name -> statistics, in the order of `fns`; all have the same number of runs.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the CUDA device does not exist.
        RuntimeError: a function cannot be captured into a CUDA graph.
    """
    _check(fns, warmup, runs, settle, min_time_s, max_time_s)
    check_count("time_interleaved", "graph_calls", graph_calls, 0)
    place = _device(device)
    calls = graph_calls if place.type == "cuda" else 0
    names = list(fns)
    times: dict[str, list[int]] = {name: [] for name in names}
    totals_ns = dict.fromkeys(names, 0)
    budget_ns = math.inf if max_time_s is None else max_time_s * 1e9
    guard: AbstractContextManager[object] = nullcontext()
    run_once = _cpu_run_ns
    if place.type == "cuda":
        guard, run_once = torch.cuda.device(place), _cuda_run_ns

    collecting = gc.isenabled()
    gc.disable()  # a collection inside a run would be charged to whoever is running
    try:
        with torch.inference_mode(), guard:
            begin = perf_counter_ns()
            if calls:
                fns = {name: _captured(name, fn, calls) for name, fn in fns.items()}
            for _ in range(warmup):
                for name in names:
                    fns[name]()
                if place.type == "cuda":
                    torch.cuda.synchronize()
                if perf_counter_ns() - begin >= budget_ns * _WARMUP_SHARE:
                    break
            round_ = 0
            while True:
                shift = round_ % len(names) if rotate else 0
                for name in names[shift:] + names[:shift]:
                    for _ in range(settle):
                        fns[name]()
                    elapsed = run_once(fns[name])
                    times[name].append(round(elapsed / calls) if calls else elapsed)
                    totals_ns[name] += elapsed
                round_ += 1
                if round_ >= min(MIN_RUNS, runs) and perf_counter_ns() - begin >= budget_ns:
                    break
                if round_ >= runs and min(totals_ns.values()) >= min_time_s * 1e9:
                    break
    finally:
        if collecting:
            gc.enable()
    return {name: LatencyStats.from_ns(t) for name, t in times.items()}


def latency(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    *,
    warmup: int = 10,
    runs: int = 50,
    max_time_s: float | None = None,
) -> LatencyStats:
    """Time one forward pass of `model` in evaluation mode (each module's mode is restored).

    To compare two models use `time_interleaved` with both of them, not two calls of this.

    Args:
        model: the network.
        x: input (N, C, H, W), or the tuple of its positional inputs, on the model's device.
        warmup: untimed passes.
        runs: timed passes.
        max_time_s: time budget, see `time_interleaved`.

    Raises:
        TypeError: `model` is no module or `x` no tensor or tuple of tensors.
        ValueError: a count is out of range.
    """
    check_model("latency", model)
    inputs = as_inputs("latency", x)
    with evaluating(model):
        stats = time_interleaved(
            {"model": lambda: model(*inputs)},
            warmup=warmup,
            runs=runs,
            max_time_s=max_time_s,
            device=inputs[0].device,
        )
    return stats["model"]


def throughput(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    *,
    warmup: int = 10,
    runs: int = 50,
    max_time_s: float | None = None,
) -> float:
    """Images per second at the batch size of `x`: N over the median of `latency`.

    Args and errors are those of `latency`; in addition N must be at least 1 (ValueError).
    """
    images = as_inputs("throughput", x)[0]
    if images.dim() == 0 or images.shape[0] < 1:
        raise ValueError(
            f"throughput: expected x with at least one image, got shape {tuple(images.shape)}"
        )
    stats = latency(model, x, warmup=warmup, runs=runs, max_time_s=max_time_s)
    return stats.throughput(images.shape[0])


def _cpu_run_ns(fn: Callable[[], object]) -> int:
    begin = perf_counter_ns()
    result = fn()
    elapsed = perf_counter_ns() - begin
    del result  # kept until here: freeing a large output is not part of the function
    return elapsed


def _cuda_run_ns(fn: Callable[[], object]) -> int:
    event: Any = torch.cuda.Event  # its constructor carries no type hints
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()  # work on other streams must not run into the timed span
    begin.record()
    result = fn()
    end.record()
    end.synchronize()
    del result
    elapsed_ms: float = begin.elapsed_time(end)
    return round(elapsed_ms * 1e6)


def _captured(name: str, fn: Callable[[], object], calls: int) -> Callable[[], object]:
    """Replays `calls` calls, without what the host does for them."""
    cuda: Any = torch.cuda  # graphs and streams carry no type hints
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):  # lazy initializations and the search for algorithms happen here
        for _ in range(_CALLS_BEFORE_CAPTURE):
            fn()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    try:
        with cuda.graph(graph):
            for _ in range(calls):
                fn()
    except RuntimeError as error:
        raise RuntimeError(
            f"time_interleaved: expected fns[{name!r}] to be capturable into a CUDA graph, "
            f"got {error}"
        ) from error
    replay: Callable[[], object] = graph.replay
    return replay


def _device(device: torch.device | str | None) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"time_interleaved: expected device to name a torch device, got {device!r}"
        ) from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"time_interleaved: expected device cpu or cuda, got {place}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"time_interleaved: expected device to be present, got {place} with "
            f"{torch.cuda.device_count()} CUDA devices visible"
        )
    return place


def _check(
    fns: Mapping[str, Callable[[], object]],
    warmup: int,
    runs: int,
    settle: int,
    min_time_s: float,
    max_time_s: float | None,
) -> None:
    what = "time_interleaved"
    if not isinstance(fns, Mapping):
        raise TypeError(f"{what}: expected fns to be a mapping, got {type(fns).__name__}")
    if not fns:
        raise ValueError(f"{what}: expected fns with at least one function, got none")
    for name, fn in fns.items():
        if not callable(fn):
            raise TypeError(f"{what}: expected fns[{name!r}] to be callable, got {fn!r}")
    check_count(what, "warmup", warmup, 0)
    check_count(what, "runs", runs, 1)
    check_count(what, "settle", settle, 0)
    check_seconds(what, "min_time_s", min_time_s)
    if max_time_s is None:
        return
    check_seconds(what, "max_time_s", max_time_s, positive=True)
    if min_time_s > max_time_s:
        raise ValueError(
            f"{what}: expected min_time_s <= max_time_s, got {min_time_s} > {max_time_s}"
        )
