"""Who may import whom, and how long a file may be: read from the sources, not run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparsecnn"

# Layer -> layers of this package it may import. A layer is a subpackage or a top-level module;
# `_accelerate` holds the parts of `accelerate`. `_version` and the like would be leaves: add them
# here with an empty set.
MAY_IMPORT: dict[str, set[str]] = {
    "_library": set(),
    "_models": set(),
    "_codec": set(),
    "formats": set(),
    "measure": {"_models"},
    "distill": set(),
    "ops": {"formats", "_library"},
    "nn": {"ops", "formats"},
    "prune": {"_models", "nn", "measure"},
    "factorize": {"_models", "nn", "measure"},
    "blocks": {"nn"},
    "rewrite": {"blocks", "factorize", "nn"},
    "storage": {"nn", "formats", "_codec"},
    "accelerate": {"_accelerate", "nn", "measure"},
    "_accelerate": {"nn", "measure"},
    "materialize": {"accelerate", "_accelerate", "measure", "prune"},
    "deploy": {"storage", "nn"},
    "plan": {
        "prune", "factorize", "distill", "rewrite", "accelerate", "measure", "storage",
    },
    "compress": {
        "prune", "factorize", "distill", "rewrite", "accelerate", "measure", "storage", "plan",
    },
    "data": set(),
    "demo": {"accelerate", "data", "measure", "prune", "storage"},
    "cli": {
        "compress", "plan", "deploy", "accelerate", "measure", "data", "demo", "storage", "prune",
    },
    "__main__": {"cli"},
}  # fmt: skip
# Nobody may need these to `import sparsecnn`; they are imported where they are used.
OPTIONAL = {
    "matplotlib", "onnx", "onnxruntime", "onnxscript", "pynvml", "ray", "rich", "sklearn",
    "tensorly", "timm", "torch_pruning", "torchvision",
}  # fmt: skip


def layer_of(path: Path) -> str:
    """The layer a source file of the package belongs to."""
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) > 1:
        return relative.parts[0]
    stem = relative.stem
    for owner in MAY_IMPORT:
        if stem.startswith(f"_{owner}_"):
            return owner
    return stem


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at module level) of every import in a file, relative ones resolved."""
    tree = ast.parse(path.read_text(), str(path))
    package = ["sparsecnn", *path.relative_to(PACKAGE).parent.parts]

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, top
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package[: len(package) - child.level + 1]
                    base = ".".join([*parts, base] if base else parts)
                for alias in child.names:
                    yield f"{base}.{alias.name}", child.lineno, top
            type_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from visit(child, top and not function and not type_checking)

    yield from visit(tree, True)


def target_layer(module: str) -> str | None:
    """The layer of this package that a dotted name lies in, or None for other packages."""
    parts = module.split(".")
    if parts[0] != "sparsecnn":
        return None
    if len(parts) == 1:
        return "sparsecnn"
    for owner in MAY_IMPORT:
        if parts[1].startswith(f"_{owner}_"):
            return owner
    return parts[1]


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_package_was_found() -> None:
    assert {"ops", "nn", "formats", "_library"} <= {layer_of(path) for path in PYTHON_FILES}
    found = [name for path in PYTHON_FILES for name, _, _ in imports_of(path)]
    assert len(found) > 50 and any(name.startswith("sparsecnn.formats") for name in found)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    layer = layer_of(path)
    if path == PACKAGE / "__init__.py":
        return  # the front door opens all rooms
    assert layer in MAY_IMPORT, f"{path.name}: give the new layer {layer!r} a line in MAY_IMPORT"
    for module, line, _ in imports_of(path):
        target = target_layer(module)
        if target is None or target == layer:
            continue
        # `sparsecnn.__version__` is a fact anyone may state; anything else goes by its layer.
        if target in ("__version__", "build_info", "isa") and layer in (
            "measure",
            "storage",
            "cli",
        ):
            continue
        assert target in MAY_IMPORT[layer], (
            f"{path.relative_to(ROOT)}:{line}: {layer} may import "
            f"{sorted(MAY_IMPORT[layer]) or 'nothing of this package'}, got {module}"
        )


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_where_they_are_used(path: Path) -> None:
    for module, line, top in imports_of(path):
        name = module.split(".")[0]
        assert not (top and name in OPTIONAL), (
            f"{path.relative_to(ROOT)}:{line}: import {name} inside the function that needs it"
        )


def test_no_pickle_in_the_package() -> None:
    for path in PYTHON_FILES:
        for module, line, _ in imports_of(path):
            assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib"), (
                f"{path.relative_to(ROOT)}:{line}: files are read without executing code"
            )


# ---- C++ -----------------------------------------------------------------------------------------

CSRC = ROOT / "csrc"
SOURCES = sorted(
    p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh") and p.is_file()
)
_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def includes_of(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of every include; kind is '<' or '"'."""
    return _INCLUDE.findall(path.read_text())


def test_the_sources_were_found() -> None:
    rooms = {path.relative_to(CSRC).parts[0] for path in SOURCES}
    assert {"core", "cpu", "ops"} <= rooms
    assert sum(len(includes_of(path)) for path in SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_follow_the_rooms(path: Path) -> None:
    room = path.relative_to(CSRC).parts[0]
    where = path.relative_to(ROOT)
    for kind, name in includes_of(path):
        first = name.split("/")[0]
        is_torch = first in ("torch", "ATen", "c10", "caffe2")
        if kind == "<":
            assert not is_torch or room == "ops", f"{where}: <{name}>: torch belongs in csrc/ops"
            if room == "core":
                assert name in ("cstdint", "cstddef"), f"{where}: <{name}> in core"
            if room == "ops" and is_torch:
                assert name.startswith(("torch/csrc/stable/", "torch/headeronly/")), (
                    f"{where}: <{name}>: only the headers of the stable ABI"
                )
            if room not in ("codec",):
                assert first not in ("pybind11", "Python.h"), f"{where}: <{name}>"
            continue
        allowed = {
            "core": {"core"},
            "cpu": {"core", "cpu"},
            "cuda": {"core", "cuda"},
            "codec": {"codec", "core"},
            "ops": {"core", "ops"},
        }[room]
        local = (path.parent / name).exists() and "/" not in name
        permitted = (
            local
            or first in allowed
            # A program is what an op keeps of its weight between calls, built outside the kernels.
            or (room == "ops" and re.fullmatch(r"cpu/(kernel_table|\w+_program)\.h", name))
            or (room == "ops" and name == "cuda/entry.h")
            # The emulator's stand-ins for the CUDA runtime, seen only under its own define.
            or (room == "cuda" and re.fullmatch(r"cuda_emu\w*\.h", name))
        )
        assert permitted, f'{where}: "{name}" may not be included from {room}'


def test_units_of_one_instruction_set_share_no_weak_code() -> None:
    """Standard headers with inline functions may not enter a unit compiled for AVX.

    The linker keeps one copy of an inline function; it could be the AVX-512 one, which stops
    older processors with an illegal instruction.
    """
    safe = {
        "stddef.h", "stdint.h", "string.h", "math.h", "immintrin.h", "cstdint", "cstddef",
    }  # fmt: skip
    kernels = [*CSRC.glob("cpu/kernels/*"), CSRC / "cpu/isa.h", CSRC / "cpu/vec.h"]
    assert len(kernels) >= 5
    for path in kernels:
        for kind, name in includes_of(path):
            assert kind == '"' or name in safe, f"{path.relative_to(ROOT)}: <{name}>"


# ---- house rules ---------------------------------------------------------------------------------


def house_files() -> list[Path]:
    """Every source file that people write here."""
    found = [ROOT / "setup.py", *SOURCES]
    for folder in ("sparsecnn", "bench", "tests", "_build"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp")]
    return sorted(set(found))


def test_files_are_short() -> None:
    long = []
    for path in house_files():
        cap = 600 if path.relative_to(ROOT).parts[0] == "tests" else 400
        lines = len(path.read_text().splitlines())
        if lines > cap:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {cap}")
    assert not long, "\n".join(long)


def test_lines_are_short() -> None:
    for path in house_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.relative_to(ROOT)}:{number}: {len(line)} columns"


def test_reference_is_independent() -> None:
    """The references of the tests never call what they are the reference of."""
    for name in ("reference.py", "tolerance.py", "cases.py", "fuzz.py"):
        tree = ast.parse((ROOT / "tests" / name).read_text())
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            assert not any(m.split(".")[0] == "sparsecnn" for m in modules), name
