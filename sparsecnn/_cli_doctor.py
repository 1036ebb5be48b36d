"""`sparsecnn doctor`: one verdict per layer on why a pruned model is, or is not, faster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsecnn.accelerate import accelerate, densify
from sparsecnn.measure import LayerReport, Report, environment
from sparsecnn.prune import LayerSparsity, sparsity

if TYPE_CHECKING:
    from rich.table import Table

# Expectations without a measurement, from the layers of `bench/` in float32: below the first
# density the CSR kernels won almost everywhere, above the second nowhere.
LIKELY_DENSITY = 0.25
HOPELESS_DENSITY = 0.5
# From this gain of a layer alone on, the reason to keep it dense is the whole model.
CLEAR_GAIN = 1.03
# Whole zero groups below this share are not worth a step of their own.
GROUP_SHARE = 0.1
# A pattern is named when whole groups hold this share of the zeros. Single elements alone empty
# groups too: at 90 % random zeros 39 % of all 3x3 kernels.
PATTERN_SHARE = 0.8


@dataclass(frozen=True)
class Verdict:
    """What the doctor says about one layer.

    Attributes:
        name: of the layer.
        type: class, or what a checkpoint's weight looks like.
        shape: of the weight.
        density: share of nonzero weights.
        pattern: how the zeros lie.
        kernel: what runs, or would run, the layer fastest.
        gain: dense time over that kernel's time; NaN where not measured.
        dense_ms: time of the best dense layer; NaN where not measured.
        verdict: if measured "faster", "not faster", "kept dense" (faster alone, but not in the
            whole model) or "dense" (no kernel applies); else "likely faster", "maybe faster" or
            "dense".
        why: one sentence.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    density: float
    pattern: str
    kernel: str
    gain: float
    dense_ms: float
    verdict: str
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """All verdicts and what to do.

    Attributes:
        model: name.
        verdicts: one per layer.
        advice: sentences about the whole model.
        report: of the measurement; None for a static diagnosis.
    """

    model: str
    verdicts: list[Verdict]
    advice: list[str]
    report: Report | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None stands for "not measured"."""
        layers = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(e).items()}
            for e in self.verdicts
        ]
        return {
            "schema_version": 1,
            "model": self.model,
            "measured": self.report is not None,
            "speedup": None if self.report is None else self.report.speedup,
            "before_ms": None if self.report is None else self.report.before.p50_ms,
            "after_ms": None if self.report is None else self.report.after.p50_ms,
            "layers": layers,
            "advice": self.advice,
            "environment": environment(),
        }

    def table(self) -> Table:
        """The verdicts for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("layer", overflow="fold", min_width=8)
        table.add_column("weight", overflow="fold")
        table.add_column("density", justify="right", no_wrap=True)
        table.add_column("zeros", overflow="fold", max_width=24)
        table.add_column("kernel", overflow="fold")
        table.add_column("gain", justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("why", overflow="fold", min_width=16)
        colours = {
            "faster": "green",
            "likely faster": "green",
            "not faster": "yellow",
            "kept dense": "yellow",
        }
        for v in self.verdicts:
            gain = "-" if math.isnan(v.gain) else f"{v.gain:.2f}x"
            cells = (
                v.name or "(model)", "x".join(map(str, v.shape)), f"{v.density:.1%}", v.pattern,
                v.kernel, gain,
            )  # fmt: skip
            verdict = Text(v.verdict, style=colours.get(v.verdict, ""))
            table.add_row(*(Text(cell) for cell in cells), verdict, Text(v.why))
        return table


def examine_tensors(name: str, tensors: Mapping[str, Tensor]) -> Diagnosis:
    """Static verdicts for the weights of a checkpoint, by their zeros alone.

    Args:
        name: of the checkpoint.
        tensors: state dict; 4-d weights count as convolutions, 2-d ones as linear layers.

    Raises:
        ValueError: no such weight.
    """
    verdicts = []
    for key, tensor in tensors.items():
        stem, _, last = key.rpartition(".")
        if last != "weight" or tensor.dim() not in (2, 4) or not tensor.is_floating_point():
            continue
        if tensor.numel() == 0:
            continue
        verdicts.append(_static(_sparsity_of(stem, tensor)))
    if not verdicts:
        raise ValueError(
            f"expected {name} to hold a convolution or linear weight, got {len(tensors)} tensors "
            "and none"
        )
    advice = [
        "verdicts by density alone; give the architecture (--arch) and the input (--input) to "
        "measure every layer"
    ]
    return Diagnosis(name, verdicts, _advice(verdicts) + advice, None)


def examine_model(name: str, model: nn.Module, x: Tensor, progress: bool) -> Diagnosis:
    """Measured verdicts, by `accelerate`.

    Args:
        name: of the model.
        model: in evaluation mode; sparse layers are judged from their dense form.
        x: input (N, C, H, W).
        progress: show a progress bar.

    Raises:
        ValueError: no layer to judge, or the model does not run on `x`.
    """
    model = densify(model)
    zeros = {entry.name: entry for entry in sparsity(model).layers}
    fast = accelerate(model, x, progress=progress)
    report = fast.report
    assert isinstance(report, Report)
    verdicts = [_measured(layer, zeros.get(layer.name)) for layer in report.layers]
    advice = _advice(verdicts)
    faster = sum(v.verdict == "faster" for v in verdicts)
    advice.append(
        f"accelerate makes {faster} of {len(verdicts)} layers and the whole model "
        f"{report.speedup:.2f}x faster ({report.before.p50_ms:.3g} -> {report.after.p50_ms:.3g} ms "
        "median, folding of batch norms included)"
    )
    return Diagnosis(name, verdicts, advice + report.notes, report)


def _sparsity_of(name: str, weight: Tensor) -> LayerSparsity:
    layer: nn.Module
    with torch.device("meta"):
        if weight.dim() == 4:
            k, c, r, s = weight.shape
            layer = nn.Conv2d(c, k, (r, s), bias=False)
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    found = sparsity(layer).layers[0]
    return LayerSparsity(**(asdict(found) | {"name": name, "shape": found.shape}))


def _pattern(zeros: LayerSparsity | None) -> str:
    if zeros is None:
        return "not counted"
    if zeros.zeros == 0:
        return "none"
    shares = {
        "filters": zeros.filter, "channels": zeros.channel, "kernels": zeros.kernel,
        "columns": zeros.column,
    }  # fmt: skip
    # For a 1x1 or linear weight a kernel is one entry and a column one channel.
    if math.prod(zeros.shape[2:]) == 1:
        del shares["kernels"], shares["columns"]
    for kind, share in shares.items():
        if share >= PATTERN_SHARE * zeros.element:
            return f"whole {kind} ({share:.0%})"
    kind, share = max(shares.items(), key=lambda item: item[1])
    return "elements" + (f" ({share:.0%} of {kind} empty)" if share >= 0.01 else "")


def _static(zeros: LayerSparsity) -> Verdict:
    density = 1 - zeros.element
    if density > HOPELESS_DENSITY:
        kernel, verdict = "dense", "dense"
        why = (
            "no zeros to skip"
            if zeros.zeros == 0
            else f"a sparse kernel needs a density of at most about {HOPELESS_DENSITY}"
        )
    elif density > LIKELY_DENSITY:
        kernel, verdict = "csr", "maybe faster"
        why = "near break-even: measure"
    else:
        kernel, verdict = "csr", "likely faster"
        why = "sparse enough for the csr kernel on most shapes"
    return Verdict(
        name=zeros.name,
        type=zeros.type,
        shape=zeros.shape,
        density=density,
        pattern=_pattern(zeros),
        kernel=kernel,
        gain=math.nan,
        dense_ms=math.nan,
        verdict=verdict,
        why=why + _removable(zeros),
    )


def _measured(layer: LayerReport, zeros: LayerSparsity | None) -> Verdict:
    candidates = {
        name: time for name, time in layer.candidates_ms.items() if not name.startswith("dense")
    }
    if not layer.is_dense:
        verdict, gain = "faster", layer.speedup
    elif candidates:
        gain = layer.dense_ms / min(candidates.values())
        verdict = "not faster" if gain < CLEAR_GAIN else "kept dense"
    else:
        verdict, gain = "dense", math.nan
    reason = layer.reason
    if verdict == "dense" and zeros is not None and zeros.zeros == 0:
        reason = f"no zeros to skip ({reason})"
    return Verdict(
        name=layer.name,
        type=layer.type,
        shape=layer.weight_shape,
        density=layer.density,
        pattern=_pattern(zeros),
        kernel=layer.kernel,
        gain=gain,
        dense_ms=layer.dense_ms,
        verdict=verdict,
        why=reason + _removable(zeros),
    )


def _removable(zeros: LayerSparsity | None) -> str:
    if zeros is None or zeros.filter < GROUP_SHARE:
        return ""
    return (
        f"; {zeros.filter:.0%} of the filters are all zero: a smaller dense layer without them is "
        "faster everywhere"
    )


def _advice(verdicts: list[Verdict]) -> list[str]:
    advice = []
    if all(v.density > 0.999 for v in verdicts):
        advice.append(
            "the model has no zeros: prune it first, e.g. sparsecnn.prune_(model, "
            "sparsecnn.Magnitude(sparsity=0.9)), and fine-tune"
        )
    elif all(v.density > HOPELESS_DENSITY for v in verdicts):
        advice.append(
            f"no layer has a density below {HOPELESS_DENSITY}: prune to about 90 % zeros for a gain"
        )
    return advice
