"""What a conversion did, layer by layer: the data, its text table and its JSON.

Nothing here measures anything; `accelerate` fills these dataclasses with what it measured.
Durations are in milliseconds (`_ms`), sizes in bytes, `macs` in multiply-accumulates. NaN stands
for "not measured" and is written as `null` in JSON, because JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ._text import count, ms, number, ratio, scientific, size, times, write_atomic
from .latency import LatencyStats

if TYPE_CHECKING:
    from rich.console import RenderableType

_NAN = math.nan
_T = TypeVar("_T")


@dataclass(kw_only=True)
class LayerReport:
    """One convolution or linear layer of the model: what was tried and what was taken.

    Attributes:
        name: fully qualified name in the model.
        type: class name of the original layer.
        input_shape: (N, C, H, W) or (N, I) of what the layer was measured on: the example, or one
            image of it where the model takes its batch in parts and a note says so.
        output_shape: (N, K, P, Q) or (N, O).
        weight_shape: (K, C/G, R, S) or (O, I).
        density: share of nonzero weights in [0, 1].
        macs: multiply-accumulates of the dense layer for this input.
        effective_macs: those whose weight is not zero.
        dense_ms: median of the best dense candidate.
        chosen_ms: median of what the layer runs now; equals `dense_ms` where dense was kept.
        kernel: what the layer runs now: "dense contiguous", "dense channels_last", "csr", ...
        candidates_ms: candidate name -> median, the rejected ones included.
        reason: why this kernel and no other, one sentence.
        max_abs_diff: largest difference between the old and the new output of this layer.
        folded: names of the batch norm and activation modules folded into this layer.
    """

    name: str
    type: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    density: float
    macs: int
    effective_macs: int
    dense_ms: float
    chosen_ms: float
    kernel: str
    candidates_ms: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    max_abs_diff: float = _NAN
    folded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.density = number(self.density)
        self.dense_ms = number(self.dense_ms)
        self.chosen_ms = number(self.chosen_ms)
        self.max_abs_diff = number(self.max_abs_diff)
        self.candidates_ms = {name: number(ms) for name, ms in self.candidates_ms.items()}

    @property
    def speedup(self) -> float:
        """`dense_ms / chosen_ms`; NaN where either was not measured."""
        return ratio(self.dense_ms, self.chosen_ms)

    @property
    def is_dense(self) -> bool:
        """Whether the layer still runs a dense kernel."""
        return self.kernel.startswith("dense")


@dataclass(kw_only=True)
class ModelTiming:
    """Run time of the whole model on the example: percentiles in ms, images per second."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    iqr_ms: float
    images_per_s: float

    def __post_init__(self) -> None:
        for item in fields(self):
            setattr(self, item.name, number(getattr(self, item.name)))

    @classmethod
    def from_stats(cls, stats: LatencyStats, images: int) -> ModelTiming:
        """From the statistics of a timer run with `images` images per run."""
        return cls(
            p50_ms=stats.median_s * 1e3,
            p90_ms=stats.p90_s * 1e3,
            p99_ms=stats.p99_s * 1e3,
            iqr_ms=stats.iqr_s * 1e3,
            images_per_s=stats.throughput(images),
        )


@dataclass(kw_only=True)
class Report:
    """The result of converting one model.

    Attributes:
        layers: one entry per layer considered, in execution order; may be empty.
        before: the original model, timed in turn with `after`.
        after: the converted model.
        speedup: `before.p50_ms / after.p50_ms`, computed when not given.
        bytes_before: stored bytes of the original parameters and buffers.
        bytes_after: the same of the converted model.
        macs: multiply-accumulates of all layers for the whole example, zeros included.
        effective_macs: those whose weight is not zero.
        max_abs_diff: largest difference of the two models' outputs on the example.
        layout: memory format the model runs in, "contiguous" or "channels_last".
        notes: what the reader should know, one sentence each.
        environment: stamp of `environment()`.
    """

    schema_version: ClassVar[int] = 1

    layers: list[LayerReport]
    before: ModelTiming
    after: ModelTiming
    speedup: float = _NAN
    bytes_before: int = 0
    bytes_after: int = 0
    macs: int = 0
    effective_macs: int = 0
    max_abs_diff: float = _NAN
    layout: str = "contiguous"
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.max_abs_diff = number(self.max_abs_diff)
        self.speedup = number(self.speedup)
        if math.isnan(self.speedup):
            self.speedup = ratio(self.before.p50_ms, self.after.p50_ms)

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> RenderableType:
        from .report_table import render_table

        return render_table(self)

    def to_text(self, width: int = 120) -> str:
        """The report as plain text without colour codes, at most `width` columns wide."""
        if isinstance(width, bool) or not isinstance(width, int) or width < 80:
            raise ValueError(f"to_text: expected width to be an int >= 80, got {width!r}")
        from .report_table import render_text

        return render_text(self, width)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain dicts and lists plus `schema_version`; NaN stays NaN."""
        return {"schema_version": self.schema_version, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`, also for what came back from JSON.

        Raises:
            TypeError: `data` is no mapping.
            ValueError: another schema version, or a missing, unknown or ill-typed field.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"Report: expected data to be a mapping, got {type(data).__name__}")
        version = data.get("schema_version")
        if version != cls.schema_version or isinstance(version, bool):
            raise ValueError(
                f"Report: expected schema_version {cls.schema_version}, got {version!r}; "
                "read the file with the version of sparsecnn that wrote it"
            )
        values = {key: value for key, value in data.items() if key != "schema_version"}
        layers = values.get("layers")
        if not isinstance(layers, (list, tuple)):
            raise ValueError(f"Report: expected layers to be a list, got {layers!r}")
        values["layers"] = [_build(LayerReport, f"layers[{i}]", v) for i, v in enumerate(layers)]
        for key in ("before", "after"):
            values[key] = _build(ModelTiming, key, values.get(key))
        return _build(cls, "Report", values)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; also written to `path`, atomically, when one is given.

        NaN becomes `null`, infinities become the strings "inf" and "-inf".
        """
        text = json.dumps(_jsonable(self.to_dict()), indent=2, allow_nan=False) + "\n"
        if path is not None:
            write_atomic(path, text)
        return text

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of `to_json`.

        Raises:
            ValueError: the text is no JSON or no report of this schema version.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"Report: expected a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML page without scripts or links, plots inline as SVG.

        Also written to `path`, atomically, when one is given.
        """
        from .report_html import render_html

        text = render_html(self)
        if path is not None:
            write_atomic(path, text)
        return text


def summary_rows(report: Report) -> list[tuple[str, str]]:
    """Label and value of the lines that sum a report up, for the table and the HTML page."""
    before, after = report.before, report.after
    sparse = sum(not layer.is_dense for layer in report.layers)
    share = ratio(report.effective_macs, report.macs)
    return [
        (
            "latency p50",
            f"{ms(before.p50_ms)} -> {ms(after.p50_ms)} ms ({times(report.speedup)}), "
            f"IQR {ms(before.iqr_ms)} / {ms(after.iqr_ms)} ms",
        ),
        (
            "latency p90, p99",
            f"{ms(before.p90_ms)} -> {ms(after.p90_ms)} ms, "
            f"{ms(before.p99_ms)} -> {ms(after.p99_ms)} ms",
        ),
        (
            "throughput",
            f"{count(before.images_per_s)} -> {count(after.images_per_s)} images/s",
        ),
        ("stored", f"{size(report.bytes_before)} -> {size(report.bytes_after)}"),
        (
            "MACs",
            f"{count(report.macs)}, with a nonzero weight {count(report.effective_macs)}"
            + ("" if math.isnan(share) else f" ({share:.1%})"),
        ),
        ("layers", f"{len(report.layers)} considered, {sparse} swapped, layout {report.layout}"),
        ("max |difference|", scientific(report.max_abs_diff)),
    ]


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _all(value: Iterable[Any], kinds: tuple[type, ...], of: type) -> bool:
    return isinstance(value, kinds) and all(_is(item, of) for item in value)


def _is(value: Any, kind: type) -> bool:
    """`isinstance`, except that a bool is no int and that JSON spells NaN and infinity its way."""
    if kind is float:
        return value in (None, "inf", "-inf") or _is(value, int) or isinstance(value, float)
    return isinstance(value, kind) and not isinstance(value, bool)


# Annotation (a string in this module) -> whether a value read from a file fits it.
_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda v: _is(v, str),
    "int": lambda v: _is(v, int),
    "float": lambda v: _is(v, float),
    "tuple[int, ...]": lambda v: _all(v, (list, tuple), int),
    "tuple[str, ...]": lambda v: _all(v, (list, tuple), str),
    "list[str]": lambda v: _all(v, (list,), str),
    "dict[str, float]": lambda v: isinstance(v, dict) and _all(list(v.values()), (list,), float),
    "dict[str, Any]": lambda v: isinstance(v, dict),
    "list[LayerReport]": lambda v: _all(v, (list,), LayerReport),
    "ModelTiming": lambda v: _is(v, ModelTiming),
}


def _build(cls: type[_T], what: str, data: Any) -> _T:
    """Construct a dataclass from a mapping, naming the first field that does not fit."""
    if not isinstance(data, Mapping):
        raise ValueError(f"Report: expected {what} to be a mapping, got {data!r}")
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    required = {
        n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    }
    for wrong, label in ((set(data) - set(known), "known"), (required - set(data), "all")):
        if wrong:
            names = ", ".join(sorted(str(name) for name in wrong))
            verb = "unknown" if label == "known" else "missing"
            raise ValueError(f"Report: expected {what} with {label} fields, got {verb} {names}")
    for key, value in data.items():
        if not _FITS[str(known[key].type)](value):
            raise ValueError(
                f"Report: expected {what}.{key} of type {known[key].type}, got {value!r}"
            )
    return cls(
        **{
            # JSON has no tuples.
            key: tuple(value) if str(known[key].type).startswith("tuple") else value
            for key, value in data.items()
        }
    )
