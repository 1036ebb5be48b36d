"""The methods, one file per family; importing a file registers what is in it."""

from __future__ import annotations

from . import (  # noqa: F401
    cp,
    dct,
    denil,
    denton,
    jaderberg,
    mahalanobis,
    separable,
    svd,
    tucker,
    zhang,
)
