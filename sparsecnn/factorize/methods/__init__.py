"""The methods, one file per family; importing a file registers what is in it."""

from __future__ import annotations

from . import dct, svd, tucker  # noqa: F401
