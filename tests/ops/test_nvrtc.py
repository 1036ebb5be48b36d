"""Run-time compilation: what the generated kernels become, and the cache of what was compiled.

Compiling needs NVRTC (package nvidia-cuda-nvrtc, part of torch's CUDA builds) and no GPU.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from sparsecnn.ops import _nvrtc
from sparsecnn.ops._csr_source import Source, generate
from sparsecnn.ops._nvrtc import Nvrtc, NvrtcError, cubin_of
from tests.cases import ConvCase, build
from tests.cuda_emu import specialized

ARCHITECTURES = ("sm_80", "sm_90a")
REGISTERS_OF_AN_SM = 65536
# The low 12 bits of FFMA with a 32-bit immediate, which is the upper half of the first word; the
# same on both architectures (cuobjdump -sass).
FFMA_IMMEDIATE = 0x823


@pytest.fixture(scope="session")
def nvrtc() -> Nvrtc:
    try:
        return Nvrtc.find()
    except NvrtcError as error:
        pytest.skip(str(error))


# Slabs of 64 and of 128 filters, several chunks of channels, all storage types.
SOURCES = {
    "3x3": ConvCase(c=64, k=64, density=0.1),
    "strided": ConvCase(c=24, k=72, density=0.2, stride=(2, 2)),
    "pointwise": ConvCase(c=64, k=256, density=0.1, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "very sparse": ConvCase(c=64, k=128, density=0.03),
    "7x7": ConvCase(c=3, k=64, density=0.5, kernel=(7, 7), stride=(2, 2)),
    "half": ConvCase(c=16, k=40, dtype=torch.float16),
    "bfloat16": ConvCase(c=16, k=40, dtype=torch.bfloat16),
}


def source_of(name: str) -> Source:
    return specialized.source_of(build(SOURCES[name]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_values_are_operands_of_instructions(nvrtc: Nvrtc, name: str, architecture: str) -> None:
    source = source_of(name)
    cubin, log = nvrtc.compile(source.text, architecture, "--ptxas-options=-v")
    stored = re.findall(r" F\(\d+,([0-9A-F]{8})\)", source.text)
    assert len(stored) == build(SOURCES[name]).nnz
    found = Counter[int]()
    for at in range(0, len(cubin) - 15, 16):
        (word,) = struct.unpack_from("<Q", cubin, at)
        if word & 0xFFF == FFMA_IMMEDIATE:
            found[word >> 32] += 1
    missing = Counter(int(bits, 16) for bits in stored) - found
    assert not missing, f"{missing.total()} of {len(stored)} values"
    # Nothing spills, and two blocks fit a multiprocessor, all functions of the kernel together.
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", log)
    assert len(frames) == 1 + source.slabs and set(frames) == {("0", "0", "0")}, log
    (registers,) = re.findall(r"Used (\d+) registers", log)
    assert 2 * source.threads * int(registers) <= REGISTERS_OF_AN_SM
    assert "warning" not in log, log


def test_immediates_are_looked_for_where_they_can_be_missing(nvrtc: Nvrtc) -> None:
    # The check above on a kernel that reads its values from memory.
    text = "__global__ void k(float* y, const float* w) { *y = fmaf(*y, *w, 1.5f); }"
    cubin, _ = nvrtc.compile(text, "sm_90")
    words = [struct.unpack_from("<Q", cubin, at)[0] for at in range(0, len(cubin) - 15, 16)]
    assert not any(word & 0xFFF == FFMA_IMMEDIATE for word in words)


def test_compiler_errors_are_told(nvrtc: Nvrtc) -> None:
    with pytest.raises(NvrtcError, match=r"NVRTC \d+\.\d+ for sm_90: .*error: \w+"):
        nvrtc.compile("nonsense", "sm_90")
    with pytest.raises(NvrtcError, match="for sm_1: "):
        nvrtc.compile("", "sm_1")


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc, "_candidates", lambda: ["/nonexistent/a", "libnvrtc.so.none"])
    Nvrtc.find.cache_clear()
    try:
        with pytest.raises(NvrtcError, match=r"no libnvrtc.so.none found; install"):
            Nvrtc.find()
    finally:
        Nvrtc.find.cache_clear()


def test_the_library_of_torch_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    names = [Path(name).name for name in _nvrtc._candidates()]
    assert names[-1] == "libnvrtc.so.12" and set(names) == {"libnvrtc.so.12"}
    monkeypatch.setattr(torch.version, "cuda", None)
    names = [Path(name).name for name in _nvrtc._candidates()]
    assert names[-1] == "libnvrtc.so.12" and "libnvrtc.so.13" in names


def test_a_generated_kernel_through_the_real_cache(
    nvrtc: Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weight = specialized.weight_of(build(SOURCES["half"]))
    first = cubin_of(generate(weight, (1, 1), (1, 1), 1).text, "sm_90")
    monkeypatch.setattr(Nvrtc, "compile", None)
    assert cubin_of(generate(weight, (1, 1), (1, 1), 1).text, "sm_90") == first
    assert first.startswith(b"\x7fELF")


# ---- the cache, with a compiler that counts ------------------------------------------------------


class Counting:
    """Stands in for NVRTC."""

    version = "13.0"

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, text: str, architecture: str) -> tuple[bytes, str]:
        self.compiled.append(text)
        return f"code of {text} for {architecture}".encode() * 20, ""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counting:
    counting = Counting()
    monkeypatch.setattr(Nvrtc, "find", staticmethod(lambda: counting))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return counting


def stored() -> list[Path]:
    return sorted(_nvrtc.cache_folder().iterdir())


def test_a_hit_compiles_nothing(compiler: Counting, tmp_path: Path) -> None:
    first = cubin_of("a", "sm_90")
    assert cubin_of("a", "sm_90") == first and compiler.compiled == ["a"]
    (file,) = stored()
    assert file.is_relative_to(tmp_path / "cache" / "sparsecnn" / "cubin")
    assert file.parent.stat().st_mode & 0o077 == 0 and file.stat().st_mode & 0o077 == 0


def test_source_architecture_and_version_are_the_key(compiler: Counting) -> None:
    results = {cubin_of("a", "sm_90"), cubin_of("b", "sm_90"), cubin_of("a", "sm_80")}
    compiler.version = "13.1"
    cubin_of("a", "sm_90")
    assert len(results) == 3 and len(compiler.compiled) == 4 == len(stored())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: content[:-3] + b"\0" + content[-2:],
        lambda content: b"sparsecnn cubin 0\n" + content[18:],
    ],
)
def test_damaged_files_are_compiled_again(compiler: Counting, damage: object) -> None:
    want = cubin_of("a", "sm_90")
    (file,) = stored()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))  # type: ignore[operator]
    assert cubin_of("a", "sm_90") == want and len(compiler.compiled) == 2
    assert stored() == [file] and file.read_bytes() == whole


def test_files_of_another_key_or_another_writer_are_not_used(compiler: Counting) -> None:
    cubin_of("a", "sm_90")
    cubin_of("b", "sm_90")
    one, two = stored()
    two.write_bytes(one.read_bytes())
    cubin_of("a", "sm_90")
    cubin_of("b", "sm_90")
    assert len(compiler.compiled) == 3
    two.chmod(0o666)
    one.chmod(0o620)
    cubin_of("a", "sm_90")
    cubin_of("b", "sm_90")
    assert len(compiler.compiled) == 5
    two.parent.chmod(0o777)
    cubin_of("a", "sm_90")
    assert len(compiler.compiled) == 6


def test_without_a_place_to_write(
    compiler: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cubin_of("a", "sm_90") == cubin_of("a", "sm_90")
    assert len(compiler.compiled) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored by its standard
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _nvrtc.cache_folder() == tmp_path / "home" / ".cache" / "sparsecnn" / "cubin"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", staticmethod(homeless))
    assert cubin_of("a", "sm_90") and len(compiler.compiled) == 3


def test_a_failed_write_leaves_nothing(
    compiler: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    assert cubin_of("a", "sm_90")
    assert stored() == []


def test_many_writers_at_once(compiler: Counting) -> None:
    results: list[bytes] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for text in "abcd":
            results.append(cubin_of(text, "sm_90"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 32 and len(set(results)) == 4
    assert len(stored()) == 4 and {file.suffix for file in stored()} == {".cubin"}
    before = len(compiler.compiled)
    assert {cubin_of(text, "sm_90") for text in "abcd"} == set(results)
    assert len(compiler.compiled) == before
