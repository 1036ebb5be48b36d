"""CUDA source to machine code at run time: finds NVRTC, compiles, keeps the result on disk.

NVRTC comes with torch's CUDA builds (package ``nvidia-cuda-nvrtc`` or the toolkit) and needs no
GPU. Nothing here is imported or loaded before the first compilation.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

import torch

_MAGIC = b"sparsecnn cubin 1\n"
_OPTIONS = ("-std=c++17",)


class NvrtcError(Exception):
    """Why there is no machine code, in words for the user."""


def _major_versions() -> tuple[int, ...]:
    """Versions to look for: that of torch, for a CPU build any."""
    version = torch.version.cuda
    return (int(version.split(".")[0]),) if version else (13, 12)


def _candidates() -> list[str]:
    """Paths and names of the library, the one beside torch first."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for major in _major_versions():
        name = f"libnvrtc.so.{major}"
        for folder in folders:
            for package in (f"cu{major}", "cuda_nvrtc"):
                path = Path(folder, package, "lib", name)
                if path.exists():
                    found.append(str(path))
        found.append(name)  # the loader's own search: a toolkit, or loaded by torch already
    return found


class Nvrtc:
    """The library; ``Nvrtc.find()`` gives the one of the process."""

    def __init__(self, path: str) -> None:
        # It opens its builtins by name, which the loader finds only if they are there already.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(builtins))
        self._lib = ctypes.CDLL(path)
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
        self.version = f"{major.value}.{minor.value}"

    @staticmethod
    @functools.cache
    def find() -> Nvrtc:
        """The library that belongs to this torch.

        Raises:
            NvrtcError: there is none.
        """
        names = _candidates()
        for name in names:
            try:
                return Nvrtc(name)
            except OSError:
                continue
        raise NvrtcError(
            f"no {names[-1]} found; install the package nvidia-cuda-nvrtc of torch's CUDA version"
        )

    def _check(self, code: int, what: str) -> None:
        if code:
            text = self._lib.nvrtcGetErrorString(code).decode()
            raise NvrtcError(f"NVRTC: {what}: {text}")

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        """One of the program's two outputs, ``ProgramLog`` or ``CUBIN``."""
        size = ctypes.c_size_t()
        sizer = getattr(self._lib, f"nvrtcGet{what}Size")
        self._check(sizer(program, ctypes.byref(size)), what)
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw[: size.value]

    def compile(self, text: str, architecture: str, *options: str) -> tuple[bytes, str]:
        """Machine code of a source.

        Args:
            text: CUDA C++ without includes.
            architecture: such as ``sm_90``.
            options: more of the compiler's.

        Returns:
            The cubin and the compiler's log.

        Raises:
            NvrtcError: with the first error of the log.
        """
        program = ctypes.c_void_p()
        created = self._lib.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), b"sparsecnn.cu", 0, None, None
        )
        self._check(created, "create")
        try:
            words = [f"--gpu-architecture={architecture}", *_OPTIONS, *options]
            array = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
            code = self._lib.nvrtcCompileProgram(program, len(words), array)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if code:
                first = next((line for line in log.splitlines() if "error" in line), log.strip())
                raise NvrtcError(f"NVRTC {self.version} for {architecture}: {first[:300]}")
            return self._read(program, "CUBIN"), log
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/sparsecnn/cubin``; its files may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "sparsecnn" / "cubin"


def _own(path: Path) -> bool:
    """Whether nobody but the user (or root) can have written a file."""
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _load(path: Path, key: str) -> bytes | None:
    """The cubin in a file of the cache, None unless it is whole and was stored for this key."""
    try:
        if not _own(path) or not _own(path.parent):
            return None
        content = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + hashlib.sha256().digest_size
    cubin = content[head:]
    return cubin if cubin and content[:head] == _MAGIC + _seal(key, cubin) else None


def _seal(key: str, cubin: bytes) -> bytes:
    return hashlib.sha256(key.encode() + cubin).digest()


def _store(path: Path, key: str, cubin: bytes) -> None:
    """Writes a file at once or not at all; a cache that cannot be written is none."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16])
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + _seal(key, cubin) + cubin)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)


def cubin_of(text: str, architecture: str) -> bytes:
    """Machine code of a source, compiled unless the cache has it.

    The key is the hash of source, architecture, options and compiler version. A file is used only
    if its checksum matches and only the user can have written it.

    Raises:
        NvrtcError: no library, or the source does not compile.
    """
    nvrtc = Nvrtc.find()
    parts = (text, architecture, nvrtc.version, *_OPTIONS)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    try:
        path = cache_folder() / f"{key}.cubin"
    except RuntimeError:  # no home
        return nvrtc.compile(text, architecture)[0]
    cubin = _load(path, key)
    if cubin is None:
        cubin, _ = nvrtc.compile(text, architecture)
        _store(path, key, cubin)
    return cubin
