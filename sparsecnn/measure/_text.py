"""Numbers as text, and text into files; shared by the table, the JSON and the HTML report."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def ratio(numerator: float, denominator: float) -> float:
    """`numerator / denominator`; NaN for a zero denominator."""
    return numerator / denominator if denominator else math.nan


def number(value: float | str | None) -> float:
    """A float field from a caller or from JSON: `None` is NaN, "inf" is infinity."""
    return math.nan if value is None else float(value)


def ms(value: float) -> str:
    """Milliseconds, to the microsecond below 10 ms; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def times(value: float) -> str:
    """A ratio as "1.23x"; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}x"


def scientific(value: float) -> str:
    """Two significant digits; "-" for NaN."""
    return "-" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def count(value: float) -> str:
    """A count with a decimal prefix: 460416 -> "460 k"; "-" for NaN."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        # Half a unit of the last digit early, so that 999 999 reads "1 M", not "1e+03 k".
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def size(n_bytes: float) -> str:
    """Bytes with a binary prefix: 1536 -> "1.50 KiB"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if n_bytes >= 1024**power:
            return f"{n_bytes / 1024**power:.2f} {unit}"
    return f"{n_bytes:.0f} B"


def shape(dims: Iterable[int]) -> str:
    """A shape as "64x64x3x3"."""
    return "x".join(str(dim) for dim in dims) or "-"


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text so that `path` holds either the old or the whole new content.

    Raises:
        OSError: the folder does not exist or cannot be written; `path` is then untouched.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        # mkstemp files are private to the user; a report gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
