"""Build backend: setuptools, except that torch is asked of the index only where none is installed.

Listing torch in ``build-system.requires`` would make an isolated build download a second torch,
often another version than the one the extension will run on. The stable ABI needs only headers, so
the build uses those of the torch that is already there.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

TORCH_REQUIREMENT = "torch>=2.10,<2.14"
_STABLE_HEADER = "include/torch/csrc/stable/library.h"


def find_torch() -> str | None:
    """Directory of an installed torch with stable-ABI headers, or None.

    An isolated build runs the target's own interpreter, whose ``sysconfig`` still names the
    site-packages outside the isolation; a build front end with an environment of its own is covered
    by ``VIRTUAL_ENV``. ``SPARSECNN_TORCH_DIR`` overrides both.
    """
    candidates = [os.environ.get("SPARSECNN_TORCH_DIR")]
    candidates += [os.path.join(sysconfig.get_path(k), "torch") for k in ("platlib", "purelib")]
    if venv := os.environ.get("VIRTUAL_ENV"):
        candidates += map(str, Path(venv).glob("lib/python3*/site-packages/torch"))
    try:  # build isolation off, torch outside site-packages (conda, system packages)
        from importlib.util import find_spec

        spec = find_spec("torch")
        candidates += list(spec.submodule_search_locations or []) if spec else []
    except (ImportError, ValueError):
        pass
    return next((c for c in candidates if c and (Path(c) / _STABLE_HEADER).exists()), None)


def _with_torch(requires: list[str]) -> list[str]:
    return requires if find_torch() else [*requires, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103
    return _with_torch(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):  # noqa: D103
    return _with_torch(_setuptools.get_requires_for_build_editable(config_settings))
