"""The measured choice between the kernels that may replace a layer."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..measure import LatencyStats, time_interleaved
from .copy import MEMORY_FORMATS, duplicate
from .fold import crop_input, rounding, term_magnitude
from .kernels import CANDIDATES, OTHER_KIND, Layer, build_dense
from .precision import TF32_ERROR, rounds_to_tf32, strict_float

# Time for all candidates of one layer, both layouts; at least 5 rounds run whatever it takes.
LAYER_BUDGET_S = 1.5
# Calls of a layer in one CUDA graph, beside which the launch of the graph, some 10 us, is little.
GRAPH_CALLS = 20
# From so many runs on, the fastest one is taken for undisturbed.
SURE_RUNS = 40


@dataclass
class Choice:
    """The measured decision for one layer.

    Attributes:
        times: "<kernel> <layout>" -> statistics; "<kernel>" where there is one layout only.
        kernel: layout of the model -> "dense" or a candidate's name.
        reason: layout of the model -> one sentence.
        best_dense: key in `times` of the fastest dense layer, "" when nothing was timed.
    """

    times: dict[str, LatencyStats] = field(default_factory=dict)
    kernel: dict[str, str] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)
    best_dense: str = ""

    def kernel_in(self, layout: str) -> str:
        """Kernel to use in a model of that layout."""
        return self.kernel.get(layout, self.kernel["contiguous"])

    def reason_in(self, layout: str) -> str:
        """Why `kernel_in`."""
        return self.reason.get(layout, self.reason["contiguous"])

    def dense_beside(self, label: str) -> LatencyStats:
        """Statistics of the dense layer in the layout that a label names."""
        _, space, layout = label.partition(" ")
        return self.times[f"dense{space}{layout}"]

    def timing(self, kernel: str, layout: str) -> LatencyStats | None:
        """Statistics of a kernel in a layout; None where it was not timed."""
        return self.times.get(f"{kernel} {layout}", self.times.get(kernel))


@dataclass(frozen=True)
class Winner:
    """A built layer and its largest difference to the dense one on a small random input."""

    module: nn.Module
    max_abs_diff: float


@dataclass(frozen=True)
class Settings:
    """How to measure: rounds, and by how much a candidate must win."""

    warmup: int
    runs: int
    tie_margin: float
    candidates: tuple[str, ...]


def spread(stats: LatencyStats) -> float:
    """Half-width in seconds of the 95 % notch of a median: 1.57 IQR / sqrt(runs).

    McGill, Tukey and Larsen, Variations of box plots, The American Statistician 32 (1978).
    """
    return 1.57 * stats.iqr_s / math.sqrt(stats.runs)


def faster(new: LatencyStats, old: LatencyStats, margin: float) -> bool:
    """Whether `new` beats `old` by more than the margin and by more than the spread of either."""
    needed = max(margin * old.median_s, spread(new), spread(old))
    return new.median_s + needed < old.median_s


def unclear(new: LatencyStats, old: LatencyStats, margin: float) -> bool:
    """Whether `new` wins by the margin but not by the spread: more runs may tell."""
    gain = old.median_s - new.median_s
    return gain > margin * old.median_s and not faster(new, old, margin)


def surely_faster(new: LatencyStats, old: LatencyStats, margin: float) -> bool:
    """`faster` for the longest measurement there will be, which a busy machine may still blur.

    Other processes only ever add time, so over many interleaved runs the fastest ones are clean.
    Where the spread alone stands in the way, the medians and the fastest runs must agree.
    """
    if faster(new, old, margin):
        return True
    best = (1 - margin) * old.min_s
    return unclear(new, old, margin) and new.runs >= SURE_RUNS and new.min_s < best


def choose(
    layer: Layer, settings: Settings, cache: dict[object, Choice]
) -> tuple[Choice, dict[str, Winner]]:
    """Time the candidates of a layer in both layouts and decide for each.

    Layers with the same `Layer.key` share one measurement, taken on random input of the recorded
    shapes. What a candidate needs in front of its kernel, conversions included, is inside its
    time. A candidate that fails on the layer, or computes something else, is out with the reason.

    Returns:
        The choice, whose `times` hold at least the dense layer, and the layers that won in some
        layout: kernel -> layer.
    """
    built: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    refusals: dict[str, str] = {}
    for name in (n for n in settings.candidates if n in CANDIDATES):
        candidate = CANDIDATES[name]
        why = candidate.applies(layer)
        if why is None:
            try:
                built[name] = candidate.build(layer)
                errors[name], why = difference(layer, built[name], candidate.error_growth)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                why = f"{type(error).__name__}: {error}"
        if why:
            refusals[name] = why
            built.pop(name, None)
    # The refusals are part of the key: they may come from the values and not from the geometry.
    key = (layer.key(), tuple(refusals.items()))
    if key not in cache:
        cache[key] = _measure(layer, built, refusals, settings)
    winners = set(cache[key].kernel.values())
    won = {name: Winner(m, errors[name]) for name, m in built.items() if name in winners}
    return cache[key], won


def time_layers(
    fns: Mapping[str, Callable[[], object]],
    settings: Settings,
    budget_s: float,
    device: torch.device,
    effort: int = 1,
) -> dict[str, LatencyStats]:
    """Time layers in turn, with `effort` times the usual runs and time.

    On CUDA by the replays of graphs: launched one by one, small layers would all take the time that
    the host needs for a launch. Whole models are timed as the user runs them.
    """

    def timed(graph_calls: int) -> dict[str, LatencyStats]:
        return time_interleaved(
            fns,
            warmup=settings.warmup,
            runs=settings.runs * effort,
            max_time_s=budget_s * effort,
            device=device,
            graph_calls=graph_calls,
        )

    if device.type != "cuda":
        return timed(0)
    try:
        return timed(GRAPH_CALLS)
    except RuntimeError as error:
        warnings.warn(f"accelerate: layers timed with their launches: {error}", stacklevel=2)
        return timed(0)


def _measure(
    layer: Layer, built: Mapping[str, nn.Module], refusals: Mapping[str, str], settings: Settings
) -> Choice:
    fns: dict[str, Callable[[], object]] = {}
    kernels = ("dense", *built)
    for layout in layer.layouts:
        inputs = random_inputs(layer, layout)
        dense = quiet(build_dense(layer, layout))
        for name in kernels:
            module = dense if name == "dense" else quiet(built[name])
            label = f"{name} {layout}" if isinstance(layer.module, nn.Conv2d) else name
            fns[label] = _call(module, inputs)
    dense_labels = [label for label in fns if label.split(" ")[0] == "dense"]
    choice = Choice()
    # A busy machine widens the spread: when only that stands in the way of a win, measure longer.
    for effort in (1, 4, 16):
        choice.times = time_layers(
            fns, settings, LAYER_BUDGET_S, layer.module.weight.device, effort
        )
        choice.best_dense = min(dense_labels, key=lambda label: choice.times[label].median_s)
        close = (
            unclear(stats, choice.dense_beside(label), settings.tie_margin)
            for label, stats in choice.times.items()
            if label not in dense_labels
        )
        if not any(close):
            break
    for layout in layer.layouts:
        _decide(choice, layout, tuple(built), refusals, settings.tie_margin)
    return choice


def _decide(
    choice: Choice,
    layout: str,
    names: Sequence[str],
    refusals: Mapping[str, str],
    margin: float,
) -> None:
    # A model runs in one layout: what a kernel must beat is the dense layer in that one. Which
    # layout is better is for whole models to say.
    dense = choice.timing("dense", layout)
    assert dense is not None
    label = f"dense {layout}" if f"dense {layout}" in choice.times else "dense"
    base = f"{dense.median_s * 1e3:.3g} ms {label}"
    choice.kernel[layout] = "dense"
    # That a kernel is for layers of another kind says nothing about this one.
    told = [f"{name}: {why}" for name, why in refusals.items() if not why.startswith(OTHER_KIND)]
    timed = {name: stats for name in names if (stats := choice.timing(name, layout)) is not None}
    if timed:
        best = min(timed, key=lambda name: timed[name].median_s)
        mine = f"{best} {timed[best].median_s * 1e3:.3g} ms"
        if surely_faster(timed[best], dense, margin):
            choice.kernel[layout] = best
            choice.reason[layout] = f"{mine} vs {base}"
            return
        tie = timed[best].median_s < dense.median_s
        told.insert(0, f"{mine} vs {base}" + (", a tie: dense wins ties" if tie else ""))
    none = "no kernel for layers of its kind" if refusals else "no candidate asked for"
    choice.reason[layout] = "; ".join(told) or none


def quiet(module: nn.Module) -> nn.Module:
    """The layer as measured: without the user's hooks, which may collect or print."""
    quiet = duplicate(module, share=True)
    quiet._forward_hooks = OrderedDict()
    quiet._forward_pre_hooks = OrderedDict()
    return quiet.eval()


def random_inputs(layer: Layer, layout: str) -> list[Tensor]:
    """Random inputs of the recorded shapes, one per call of a forward pass."""
    weight = layer.module.weight
    generator = torch.Generator().manual_seed(0)
    inputs: list[Tensor] = []
    for shape, calls in layer.inputs.items():
        x = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=MEMORY_FORMATS[layout])
        inputs += [x] * calls
    return inputs


def _call(module: nn.Module, inputs: list[Tensor]) -> Callable[[], object]:
    if len(inputs) == 1:
        x = inputs[0]
        return lambda: module(x)

    def run() -> object:
        for x in inputs:
            module(x)
        return None

    return run


@torch.no_grad()
@strict_float()
def difference(layer: Layer, module: nn.Module, growth: float = 1.0) -> tuple[float, str]:
    """Compare a candidate with the dense layer on a small random input.

    Returns:
        The largest absolute difference, and what is wrong with it: empty while every output is
        within `rounding` of the magnitude of its terms for either side, ours times `growth`, and
        within `TF32_ERROR` of it where ours rounds to TF32.
    """
    m = layer.module
    shape = next(iter(layer.inputs))
    if isinstance(m, nn.Conv2d):
        x = crop_input(m, shape)
        magnitude = term_magnitude(m, x)
        limit = rounding(m)
        if m.bias is not None:
            magnitude = magnitude + m.bias.detach().abs()[:, None, None]
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((2, shape[-1]), generator=generator).to(m.weight.device, m.weight.dtype)
        magnitude = nn.functional.linear(
            x.abs(), m.weight.abs(), None if m.bias is None else m.bias.abs()
        )
        limit = (16 + 8 * math.sqrt(m.in_features)) * torch.finfo(m.weight.dtype).eps
    want, got = quiet(build_dense(layer, "contiguous"))(x), quiet(module)(x)
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf, f"returned {tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)}"
    limit = (1 + growth) * limit + (TF32_ERROR if rounds_to_tf32(module) else 0.0)
    error = (got - want).abs().double()
    worst = float(error.max()) if error.numel() else 0.0
    if bool((error <= limit * magnitude.double()).all()):
        return worst, ""
    return worst, f"differs by {worst:.3g} from the dense layer on random data"
