"""Compare two result files: `python bench/compare.py OLD NEW`. Exit 1 on any regression.

What is compared is the ratio to the best dense layout of the same run: a slower machine slows both.
A ratio has regressed when it fell by more than the noise of the four medians it stands on, taken as
the root of the sum of their squared standard errors times three, and by at least 3 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOOR = 0.03
_SIGMAS = 3.0
# Of a normal distribution: IQR = 1.349 sigma, standard error of a median = 1.2533 sigma / sqrt(n).
_MEDIAN_ERROR_PER_IQR = 1.2533 / 1.349
_SAME = ("suite", "mode", "threads", "batch", "device", "dtype", "tf32")
_SAME_ENVIRONMENT = ("cpu", "isa", "cuda")


@dataclass(frozen=True)
class Change:
    """One case in both files.

    Attributes:
        case: name of the layer or model.
        sparsity: share of zeros.
        old: ratio to the best dense layout before.
        new: the same now.
        noise: relative change that the spreads explain.
    """

    case: str
    sparsity: float
    old: float
    new: float
    noise: float

    @property
    def relative(self) -> float:
        """`new / old - 1`; negative is slower."""
        return self.new / self.old - 1

    @property
    def regressed(self) -> bool:
        """Slower beyond noise."""
        return self.relative < -self.noise

    @property
    def improved(self) -> bool:
        """Faster beyond noise."""
        return self.relative > self.noise


def load(path: Path) -> dict[str, Any]:
    """Read a result file of `bench/run.py`.

    Raises:
        ValueError: it is no such file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"compare: expected a result file, got {path}: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != 1 or "rows" not in document:
        raise ValueError(f"compare: expected {path} with schema 1, got something else")
    return document


def median_error(row: dict[str, Any], name: str) -> float:
    """Relative standard error of one median."""
    spread: float = row["spread"][name]
    return _MEDIAN_ERROR_PER_IQR * spread / math.sqrt(row["runs"])


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """Match the rows of two files.

    Returns:
        The cases in both, and a line for every case that is missing in the new file.

    Raises:
        ValueError: the files measure different things, or on different machines.
    """
    for key in _SAME:
        if old.get(key) != new.get(key):
            raise ValueError(
                f"compare: expected the same {key}, got {old.get(key)!r} and {new.get(key)!r}"
            )
    for key in _SAME_ENVIRONMENT:
        a, b = old["environment"].get(key), new["environment"].get(key)
        if a != b:
            raise ValueError(f"compare: expected one machine ({key}), got {a!r} and {b!r}")
    after = {(r["case"], r["sparsity"]): r for r in new["rows"]}
    found, missing = [], []
    for before in old["rows"]:
        case, sparsity = before["case"], before["sparsity"]
        now = after.get((case, sparsity))
        if now is None:
            missing.append(f"{case} at {100 * sparsity:.0f} %: missing in the new results")
            continue
        errors = [
            median_error(r, r[which]) for r in (before, now) for which in ("best", "best_dense")
        ]
        noise = max(FLOOR, _SIGMAS * math.sqrt(sum(e * e for e in errors)))
        found.append(Change(case, sparsity, before["ratio"], now["ratio"], noise))
    return found, missing


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files; returns 0, 1 (regression or missing case) or 2 (not comparable)."""
    parser = argparse.ArgumentParser(prog="bench/compare.py", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(argv)
    try:
        found, missing = changes(load(options.old), load(options.new))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for change in sorted(found, key=lambda c: c.relative):
        verdict = "REGRESSED" if change.regressed else "improved" if change.improved else "same"
        print(
            f"{verdict:9}  {change.case:12} {100 * change.sparsity:3.0f} %  "
            f"{change.old:6.2f}x -> {change.new:6.2f}x  "
            f"({100 * change.relative:+.1f} %, noise {100 * change.noise:.1f} %)"
        )
    for line in missing:
        print(f"MISSING    {line}")
    regressed = sum(c.regressed for c in found)
    improved = sum(c.improved for c in found)
    print(f"{len(found)} cases: {regressed} regressed, {improved} improved, {len(missing)} missing")
    return 1 if regressed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
