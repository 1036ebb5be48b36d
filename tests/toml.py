"""Enough TOML for the round trips of configs."""

from __future__ import annotations

import json
from typing import Any


def to_toml(data: dict[str, Any], prefix: str = "") -> str:
    """Mappings of any depth; what cannot be written raises."""
    lines, tables = [], []
    for key, value in data.items():
        name = f"{prefix}{json.dumps(key)}"
        if isinstance(value, dict):
            tables += [f"[{name}]", to_toml(value, f"{name}.")]
        else:
            assert isinstance(value, (str, int, float, list)), value
            lines.append(f"{json.dumps(key)} = {json.dumps(value)}")
    return "\n".join(lines + tables)
