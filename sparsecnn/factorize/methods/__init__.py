"""The methods, one file per family; importing a file registers what is in it."""

from __future__ import annotations

from . import cp, dct, denton, jaderberg, svd, tucker, zhang  # noqa: F401
