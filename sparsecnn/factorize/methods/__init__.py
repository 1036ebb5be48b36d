"""The methods, one file per family; importing a file registers what is in it."""

from __future__ import annotations

from . import cp, dct, denil, denton, jaderberg, separable, svd, tucker, zhang  # noqa: F401
