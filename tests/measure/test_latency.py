"""The timer, driven by a clock that only the timed functions advance: every figure is exact."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import nn

from sparsecnn.measure import LatencyStats, latency, throughput, time_interleaved

# `sparsecnn.measure.latency` as an attribute is the function.
timer = importlib.import_module("sparsecnn.measure.latency")


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1_000_000
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.now_ns

    def task(self, name: str, *durations_ns: int) -> Callable[[], None]:
        """A function that takes the given durations in turn, over and over."""
        count = 0

        def run() -> None:
            nonlocal count
            self.now_ns += durations_ns[count % len(durations_ns)]
            count += 1
            self.calls.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timer, "perf_counter_ns", clock)
    return clock


def test_statistics_of_known_times():
    stats = LatencyStats.from_ns([n * 1_000_000 for n in (5, 1, 3, 2, 4)])
    assert stats.runs == 5
    assert stats.to_dict() == pytest.approx(
        {
            "runs": 5,
            "median_s": 3e-3,
            "p90_s": 4.6e-3,  # rank 0.9 * 4 = 3.6: 4 + 0.6 * (5 - 4)
            "p99_s": 4.96e-3,
            "iqr_s": 2e-3,
            "min_s": 1e-3,
        },
        rel=1e-12,
    )


def test_one_slow_run_moves_neither_median_nor_spread():
    stats = LatencyStats.from_ns([1000] * 20 + [10**9])
    assert (stats.median_s, stats.iqr_s) == (pytest.approx(1e-6), 0.0)
    assert stats.p99_s > 0.1


def test_throughput_of_statistics():
    stats = LatencyStats.from_ns([2_000_000])
    assert stats.throughput(16) == pytest.approx(8000.0)
    assert LatencyStats.from_ns([0]).throughput(1) != LatencyStats.from_ns([0]).throughput(1)  # NaN


def test_durations_are_charged_to_their_function(clock: Clock):
    fns = {"a": clock.task("a", 100), "b": clock.task("b", 7000, 9000)}
    stats = time_interleaved(fns, warmup=0, runs=4)
    assert list(stats) == ["a", "b"]
    assert stats["a"] == LatencyStats.from_ns([100] * 4)
    assert stats["b"] == LatencyStats.from_ns([7000, 9000] * 2)


def test_warmup_is_not_counted(clock: Clock):
    stats = time_interleaved({"a": clock.task("a", 900, 900, 10, 10, 10)}, warmup=2, runs=3)
    assert stats["a"].runs == 3
    assert stats["a"].p99_s == pytest.approx(10e-9)


@pytest.mark.parametrize(("rotate", "order"), [(True, "abcbcacab"), (False, "abcabcabc")])
def test_order_is_interleaved(clock: Clock, rotate: bool, order: str):
    fns = {name: clock.task(name, 1) for name in "abc"}
    time_interleaved(fns, warmup=0, runs=3, rotate=rotate)
    assert "".join(clock.calls) == order


def test_settling_runs_come_before_each_timed_one_and_are_not_counted(clock: Clock):
    # The two settling runs of `a` take 9 ms each, the timed one 1 ms.
    fns = {"a": clock.task("a", 9_000_000, 9_000_000, 1_000_000), "b": clock.task("b", 5_000_000)}
    stats = time_interleaved(fns, warmup=0, runs=2, settle=2)
    assert "".join(clock.calls) == "aaabbbbbbaaa"
    assert stats["a"].median_s == pytest.approx(1e-3)
    assert stats["a"].runs == stats["b"].runs == 2


def test_warmup_is_interleaved_too(clock: Clock):
    time_interleaved({name: clock.task(name, 1) for name in "ab"}, warmup=2, runs=1)
    assert "".join(clock.calls) == "abab" + "ab"


def test_budget_ends_early_with_five_runs_each(clock: Clock):
    second = 10**9
    fns = {"a": clock.task("a", second), "b": clock.task("b", second)}
    stats = time_interleaved(fns, warmup=10, runs=50, max_time_s=0.5)
    assert {s.runs for s in stats.values()} == {5}
    assert len(clock.calls) == 2 + 10  # one warm-up round, five timed


def test_budget_never_adds_runs(clock: Clock):
    stats = time_interleaved({"a": clock.task("a", 10**9)}, warmup=0, runs=2, max_time_s=0.5)
    assert stats["a"].runs == 2


def test_budget_counts_the_warmup_and_leaves_time_for_runs(clock: Clock):
    stats = time_interleaved({"a": clock.task("a", 10**8)}, warmup=100, runs=100, max_time_s=4.0)
    assert len(clock.calls) == 40
    assert stats["a"].runs == 30  # a quarter of the budget went to the warm-up


def test_minimum_time_adds_runs(clock: Clock):
    fns = {"a": clock.task("a", 10**6), "b": clock.task("b", 10**7)}
    stats = time_interleaved(fns, warmup=0, runs=3, min_time_s=0.1)
    assert {s.runs for s in stats.values()} == {100}  # until the fast one has 0.1 s


def test_budget_ends_the_minimum_time(clock: Clock):
    stats = time_interleaved(
        {"a": clock.task("a", 10**6), "b": clock.task("b", 10**8)},
        warmup=0, runs=5, min_time_s=0.5, max_time_s=1.0,
    )  # fmt: skip
    assert stats["a"].runs == 10


def test_runs_in_inference_mode_without_garbage_collection():
    seen = []
    time_interleaved(
        {"a": lambda: seen.append((torch.is_inference_mode_enabled(), gc.isenabled()))},
        warmup=1,
        runs=2,
    )
    assert seen == [(True, False)] * 3
    assert gc.isenabled() and not torch.is_inference_mode_enabled()


def test_an_error_restores_the_state():
    def fail() -> None:
        raise RuntimeError("from the function")

    with pytest.raises(RuntimeError, match="from the function"):
        time_interleaved({"a": fail})
    assert gc.isenabled() and not torch.is_inference_mode_enabled()


def test_garbage_collection_stays_off_if_it_was():
    gc.disable()
    try:
        time_interleaved({"a": lambda: None}, runs=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


class Recorder(nn.Module):
    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(2).eval()
        self.clock = clock
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        if self.clock is not None:
            self.clock.now_ns += 4_000_000
        return x + len(more)


def test_latency_runs_in_eval_mode_and_restores_each_mode():
    model = Recorder().train()
    model.frozen.eval()
    stats = latency(model, torch.ones(1, 2), warmup=2, runs=6)
    assert stats.runs == 6
    assert model.modes == [False] * 8
    assert model.training and not model.frozen.training


def test_latency_and_throughput_of_a_model(clock: Clock):
    model = Recorder(clock)
    assert latency(model, torch.ones(1, 2)).median_s == pytest.approx(4e-3)
    assert throughput(model, torch.ones(8, 2)) == pytest.approx(2000.0)
    assert throughput(model, (torch.ones(2, 2), torch.ones(5, 2))) == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fns": {}}, ValueError, "expected fns with at least one function, got none"),
        ({"fns": [print]}, TypeError, "expected fns to be a mapping, got list"),
        ({"fns": {"a": 3}}, TypeError, r"expected fns\['a'\] to be callable, got 3"),
        ({"warmup": -1}, ValueError, "expected warmup >= 0, got -1"),
        ({"warmup": True}, TypeError, "expected warmup to be an int, got True"),
        ({"settle": -1}, ValueError, "expected settle >= 0, got -1"),
        ({"graph_calls": -1}, ValueError, "expected graph_calls >= 0, got -1"),
        ({"runs": 0}, ValueError, "expected runs >= 1, got 0"),
        ({"runs": 2.0}, TypeError, "expected runs to be an int, got 2.0"),
        ({"min_time_s": -0.1}, ValueError, "expected min_time_s >= 0 and finite, got -0.1"),
        ({"min_time_s": float("nan")}, ValueError, "expected min_time_s >= 0 and finite, got nan"),
        ({"min_time_s": "1"}, TypeError, "expected min_time_s to be a number, got '1'"),
        ({"max_time_s": 0}, ValueError, "expected max_time_s > 0 and finite, got 0"),
        ({"max_time_s": float("inf")}, ValueError, "expected max_time_s > 0 and finite, got inf"),
        ({"min_time_s": 2, "max_time_s": 1}, ValueError, "min_time_s <= max_time_s, got 2 > 1"),
        ({"device": "meta"}, ValueError, "expected device cpu or cuda, got meta"),
        ({"device": "abacus"}, ValueError, "expected device to name a torch device, got 'abacus'"),
        ({"device": "cuda:99"}, ValueError, "expected device to be present, got cuda:99"),
    ],
)
def test_bad_arguments(changes: dict[str, object], error: type[Exception], message: str):
    calls: list[int] = []
    arguments: dict[str, object] = {"fns": {"a": lambda: calls.append(1)}, **changes}
    with pytest.raises(error, match=f"time_interleaved: .*{message}"):
        time_interleaved(**arguments)  # type: ignore[arg-type]
    assert not calls


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: latency(print, torch.ones(1)), TypeError, "latency: expected model to be an nn.M"),
        (lambda: latency(Recorder(), [1]), TypeError, "latency: expected x to be a tensor .*list"),
        (lambda: latency(Recorder(), ()), TypeError, "got an empty tuple"),
        (lambda: throughput(Recorder(), torch.ones(0, 2)), ValueError, "at least one image"),
        (lambda: LatencyStats.from_ns([]), ValueError, "at least one run, got none"),
        (lambda: LatencyStats.from_ns([1]).throughput(0), ValueError, "images >= 1, got 0"),
        (lambda: LatencyStats.from_ns([1]).throughput(1.5), TypeError, "images to be an int"),
    ],
)
def test_bad_models_and_inputs(call: Callable[[], object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


class FakeCuda:
    """Stands in for `torch.cuda`: a device whose work is done when somebody waits for it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done_ms = 0.0
        self.queued_ms = 0.0
        self.capturing: FakeGraph | None = None

    def device_count(self) -> int:
        return 1

    def device(self, place: torch.device) -> AbstractContextManager[None]:
        self.log.append(f"device {place}")
        return nullcontext()

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.done_ms += self.queued_ms
        self.queued_ms = 0.0

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def launch(self, work_ms: float) -> None:
        self.log.append("launch")
        if self.capturing is None:
            self.queued_ms += work_ms
        else:
            self.capturing.work_ms += work_ms

    def Stream(self) -> FakeStream:
        return FakeStream()

    current_stream = Stream

    def stream(self, stream: FakeStream) -> AbstractContextManager[None]:
        self.log.append("side stream")
        return nullcontext()

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph: FakeGraph) -> Iterator[None]:
        self.log.append("capture")
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        assert isinstance(other, FakeStream)


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.work_ms = 0.0

    def replay(self) -> None:
        self.cuda.log.append("replay")
        self.cuda.queued_ms += self.work_ms


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.reached = False

    def record(self) -> None:
        self.cuda.log.append("record")
        self.at_ms = self.cuda.done_ms + self.cuda.queued_ms

    def synchronize(self) -> None:
        self.cuda.synchronize()
        self.reached = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.reached, "read before the work was done"
        return end.at_ms - self.at_ms


def test_cuda_is_timed_by_events_on_an_idle_device(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda()
    monkeypatch.setattr(timer.torch, "cuda", cuda)
    stats = time_interleaved(
        {"a": lambda: cuda.launch(3.0), "b": lambda: cuda.launch(0.5)},
        warmup=1, runs=4, device="cuda:0",
    )  # fmt: skip
    assert stats["a"] == LatencyStats.from_ns([3_000_000] * 4)
    assert stats["b"] == LatencyStats.from_ns([500_000] * 4)
    warm = ["device cuda:0", "launch", "launch", "synchronize"]
    assert cuda.log == warm + ["synchronize", "record", "launch", "record", "synchronize"] * 8


def test_cuda_graphs_are_timed_per_call(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda()
    monkeypatch.setattr(timer.torch, "cuda", cuda)
    stats = time_interleaved(
        {"a": lambda: cuda.launch(3.0), "b": lambda: cuda.launch(0.5)},
        warmup=1, runs=4, device="cuda:0", graph_calls=5,
    )  # fmt: skip
    assert stats["a"] == LatencyStats.from_ns([3_000_000] * 4)
    assert stats["b"] == LatencyStats.from_ns([500_000] * 4)
    prepared = ["side stream", *["launch"] * 3, "capture", *["launch"] * 5]
    begin = ["device cuda:0", *prepared * 2, "replay", "replay", "synchronize"]
    assert cuda.log == begin + ["synchronize", "record", "replay", "record", "synchronize"] * 8


def test_what_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda()
    monkeypatch.setattr(timer.torch, "cuda", cuda)

    def waits() -> None:
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match=r"fns\['b'\] to be capturable .* not permitted"):
        time_interleaved({"a": lambda: None, "b": waits}, device="cuda", graph_calls=2)
    assert cuda.log.count("capture") == 2 and "replay" not in cuda.log


def test_the_cpu_needs_no_graphs():
    clock: list[int] = []
    time_interleaved({"a": lambda: clock.append(1)}, warmup=0, runs=6, graph_calls=3)
    assert len(clock) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graph_calls", [0, 10])
def test_cuda_times_are_positive(graph_calls: int):
    x = torch.randn(512, 512, device="cuda")
    fns = {"a": lambda: x @ x}
    stats = time_interleaved(fns, warmup=2, runs=5, device="cuda", graph_calls=graph_calls)["a"]
    assert stats.runs == 5 and 0 < stats.min_s <= stats.median_s <= stats.p99_s
