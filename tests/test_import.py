"""Importing the package does nothing: no output, logging, thread, GPU or heavy library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparsecnn

ROOT = Path(sparsecnn.__file__).resolve().parents[1]

PROBE = """
import json, logging, os, sys, threading
import torch
def threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
before = dict(
    threads=threads(), handlers=list(logging.getLogger().handlers), environ=dict(os.environ),
    determinism=torch.are_deterministic_algorithms_enabled(), count=torch.get_num_threads(),
    default_dtype=torch.get_default_dtype(), seed=torch.initial_seed(),
    state=torch.get_rng_state().clone(), path=list(sys.path), grad=torch.is_grad_enabled(),
)
known = set(sys.modules)
import sparsecnn
loggers = [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "sparsecnn"]
facts = dict(
    new=sorted({m.split(".")[0] for m in set(sys.modules) - known}),
    new_threads=threads() - before["threads"],
    python_threads=threading.active_count(),
    root_handlers=len(logging.getLogger().handlers) - len(before["handlers"]),
    own_handlers=sum(
        not isinstance(h, logging.NullHandler) for n in loggers
        for h in logging.getLogger(n).handlers
    ),
    cuda=torch.cuda.is_initialized(),
    environ=before["environ"] == dict(os.environ),
    settings=[
        torch.are_deterministic_algorithms_enabled() == before["determinism"],
        torch.get_num_threads() == before["count"],
        torch.get_default_dtype() == before["default_dtype"],
        torch.initial_seed() == before["seed"],
        torch.equal(torch.get_rng_state(), before["state"]),
        torch.is_grad_enabled() == before["grad"],
        sys.path == before["path"],
    ],
)
sys.stderr.write("FACTS" + json.dumps(facts))
"""


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that imports the package under test."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    done = run_python(PROBE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", f"importing printed {done.stdout!r}"
    noise, _, text = done.stderr.partition("FACTS")
    assert noise == "", f"importing printed {noise!r}"
    found: dict[str, Any] = json.loads(text)
    return found


def test_no_logging_is_configured(facts: dict[str, Any]) -> None:
    assert facts["root_handlers"] == 0
    assert facts["own_handlers"] == 0


def test_no_thread_is_started(facts: dict[str, Any]) -> None:
    assert facts["new_threads"] == 0
    assert facts["python_threads"] == 1


def test_no_gpu_is_touched(facts: dict[str, Any]) -> None:
    assert facts["cuda"] is False


def test_no_heavy_library_is_imported(facts: dict[str, Any]) -> None:
    heavy = {
        "IPython", "matplotlib", "onnx", "onnxruntime", "pandas", "pynvml", "ray", "rich",
        "sklearn", "tensorly", "timm", "torch_pruning", "torchvision",
    }  # fmt: skip
    assert not heavy & set(facts["new"]), sorted(heavy & set(facts["new"]))
    assert "sparsecnn" in facts["new"]


def test_nothing_global_is_changed(facts: dict[str, Any]) -> None:
    assert facts["environ"] is True
    assert all(facts["settings"]), facts["settings"]


@pytest.mark.parametrize("name", sparsecnn.build_info()["supported_isas"])
def test_environment_lowers_the_instruction_set(name: str) -> None:
    done = run_python("import sparsecnn; print(sparsecnn.isa())", SPARSECNN_ISA=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name and done.stderr == ""


def test_an_unknown_instruction_set_warns_and_lists_the_legal_ones() -> None:
    done = run_python("import sparsecnn; print(sparsecnn.isa())", SPARSECNN_ISA="sse9")
    assert done.returncode == 0
    assert done.stdout.strip() == sparsecnn.build_info()["supported_isas"][-1]
    for word in ("SPARSECNN_ISA", "sse9", "scalar", "avx2", "avx512"):
        assert word in done.stderr
    empty = run_python("import sparsecnn; print(sparsecnn.isa())", SPARSECNN_ISA="")
    assert empty.stderr == "" and empty.stdout == done.stdout


def test_a_missing_library_says_what_to_do(tmp_path: Path) -> None:
    """A source tree that was never built."""
    package = tmp_path / "sparsecnn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    source = Path(sparsecnn.__file__).with_name("_library.py").read_text()
    (package / "_library.py").write_text(source)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sparsecnn._library"
    done = run_python(code)
    assert done.returncode != 0
    assert "ImportError: sparsecnn: expected the compiled library at" in done.stderr
    assert "start Python in another folder" in done.stderr
    assert "pip install" in done.stderr


def test_build_info_is_plain_data() -> None:
    info = sparsecnn.build_info()
    json.dumps(info)
    assert info["isa"] == sparsecnn.isa() in info["supported_isas"]
    assert isinstance(info["cuda_kernels"], bool)
    assert sparsecnn.__version__.count(".") == 2
