"""Loads machine code into the CUDA context that torch uses, and launches it, by the driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

_MAX_GRID = 2**31 - 1


class DriverError(RuntimeError):
    """An error of the CUDA driver."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError("no libcuda.so.1 found") from error
    lib.cuLaunchKernel.argtypes = [
        ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    lib.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    return lib


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{what}: {(text.value or b'unknown error').decode()}")


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """The context that the CUDA runtime, and so torch, uses on a device."""
    _check(_driver().cuInit(0), "cuInit")
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    retained = _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    _check(retained, "cuDevicePrimaryCtxRetain")
    return context


@contextlib.contextmanager
def _current(context: ctypes.c_void_p) -> Iterator[None]:
    """Makes a context current: a thread in which the runtime was not yet called has none."""
    _check(_driver().cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
    try:
        yield
    finally:
        _driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class Function:
    """A kernel of a loaded cubin.

    It stays loaded until the process ends: CUDA graphs that hold it may be replayed at any time.
    """

    def __init__(
        self, cubin: bytes, name: str, threads: int, smem_bytes: int, device: int
    ) -> None:
        """Load onto a device; at most 48 KB of dynamic shared memory."""
        self._context = _primary_context(device)
        self._threads, self._smem_bytes = threads, smem_bytes
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with _current(self._context):
            _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
            _check(
                _driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()),
                "cuModuleGetFunction",
            )

    def launch(self, args: ctypes.Structure, work: int, stream: int) -> None:
        """Run on a stream of the device; the kernel strides over its work.

        Args:
            args: the kernel's only parameter, read before this returns.
            work: blocks' worth.
            stream: handle.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        with _current(self._context):
            code = _driver().cuLaunchKernel(
                self._function, min(work, _MAX_GRID), 1, 1, self._threads, 1, 1, self._smem_bytes,
                stream, pointers, None,
            )  # fmt: skip
        _check(code, "cuLaunchKernel")
