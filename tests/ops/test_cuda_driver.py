"""The calls that launch a run-time compiled kernel, against a library that pretends to be CUDA's.

It has the driver's C signatures: what reaches it has passed through ctypes as it would to a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsecnn.ops import _cuda_driver
from sparsecnn.ops._csr_tiles import args_type
from sparsecnn.ops._cuda_driver import DriverError, Function
from tests.cuda_emu import emulator

pytestmark = pytest.mark.skipif(emulator.CXX is None, reason="the pretended driver needs g++")

STUB = r"""
#include <cstring>
extern "C" {
typedef void* Handle;
int fail_at = 0, contexts = 0, pushed = 0;
unsigned numbers[7];
Handle last_function, last_stream, pushed_context;
char name[64], code[8];
static char marks[8];
unsigned char args[4096];
int cuInit(unsigned) { return fail_at == 1 ? 100 : 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDevicePrimaryCtxRetain(Handle* context, int device) {
  ++contexts;
  *context = marks + device - 40;
  return 0;
}
int cuCtxPushCurrent_v2(Handle context) { ++pushed; pushed_context = context; return 0; }
int cuCtxPopCurrent_v2(Handle*) { --pushed; return 0; }
int cuModuleLoadData(Handle* module, const void* image) {
  if (pushed != 1) return 201;
  std::memcpy(code, image, 4);
  *module = marks + 6;
  return fail_at == 2 ? 209 : 0;
}
int cuModuleGetFunction(Handle* function, Handle module, const char* wanted) {
  std::strcpy(name, wanted);
  *function = reinterpret_cast<Handle>(0x7f0011223344);
  return module == marks + 6 ? 0 : 400;
}
int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned smem, Handle stream, void** params,
                   void** extra) {
  const unsigned given[] = {gx, gy, gz, bx, by, bz, smem};
  std::memcpy(numbers, given, sizeof given);
  last_function = function, last_stream = stream;
  std::memcpy(args, params[0], 512);
  return extra || pushed != 1 ? 1 : fail_at == 3 ? 701 : 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 209 ? "no image for this device" : error == 701 ? "out of resources" : "other";
  return 0;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "stub.cpp").write_text(STUB)
    output = folder / "libstub.so"
    assert emulator.CXX is not None
    subprocess.run(
        [emulator.CXX, "-shared", "-fPIC", str(folder / "stub.cpp"), "-o", str(output)], check=True
    )
    return output


@pytest.fixture
def stub(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: real(str(library)))
    for cached in (_cuda_driver._driver, _cuda_driver._primary_context):
        cached.cache_clear()
    loaded = real(str(library))
    ctypes.c_int.in_dll(loaded, "fail_at").value = 0
    ctypes.c_int.in_dll(loaded, "contexts").value = 0
    yield loaded
    for cached in (_cuda_driver._driver, _cuda_driver._primary_context):
        cached.cache_clear()


def test_a_launch_arrives_as_it_was_meant(stub: ctypes.CDLL) -> None:
    function = Function(b"\x7fELF and more", "a_kernel", 192, 40_000, 3)
    assert bytes((ctypes.c_char * 64).in_dll(stub, "name")).startswith(b"a_kernel\0")
    assert bytes((ctypes.c_char * 4).in_dll(stub, "code")) == b"\x7fELF"
    args = args_type(192)()
    args.x, args.work, args.activation = 0x7EEE11112222, 77, 4
    args.pixel[0] = 9
    for work, blocks in ((77, 77), (2**40, 2**31 - 1)):
        function.launch(args, work, 0x7FFF_0000_1111)
        numbers = list((ctypes.c_uint * 7).in_dll(stub, "numbers"))
        assert numbers == [blocks, 1, 1, 192, 1, 1, 40_000]
    assert ctypes.c_void_p.in_dll(stub, "last_function").value == 0x7F0011223344
    assert ctypes.c_void_p.in_dll(stub, "last_stream").value == 0x7FFF_0000_1111
    assert bytes((ctypes.c_ubyte * 512).in_dll(stub, "args")) == bytes(args)[:512]
    function.launch(args, 1, 0)
    assert ctypes.c_void_p.in_dll(stub, "last_stream").value is None
    assert ctypes.c_int.in_dll(stub, "pushed").value == 0


def test_a_context_is_retained_once_for_each_device(stub: ctypes.CDLL) -> None:
    used = []
    for device in (0, 1, 0):
        Function(b"\x7fELF", "k", 256, 0, device).launch(args_type(256)(), 1, 0)
        used.append(ctypes.c_void_p.in_dll(stub, "pushed_context").value)
    assert used[0] == used[2] != used[1]
    assert ctypes.c_int.in_dll(stub, "contexts").value == 2


def test_errors_are_raised_with_their_text(stub: ctypes.CDLL) -> None:
    fail_at = ctypes.c_int.in_dll(stub, "fail_at")
    function = Function(b"\x7fELF", "k", 256, 0, 0)
    fail_at.value = 3
    with pytest.raises(DriverError, match="cuLaunchKernel: out of resources"):
        function.launch(args_type(256)(), 1, 0)
    fail_at.value = 2
    with pytest.raises(DriverError, match="cuModuleLoadData: no image for this device"):
        Function(b"\x7fELF", "k", 256, 0, 0)
    assert ctypes.c_int.in_dll(stub, "pushed").value == 0
    fail_at.value = 1
    _cuda_driver._primary_context.cache_clear()
    with pytest.raises(DriverError, match="cuInit: other"):
        Function(b"\x7fELF", "k", 256, 0, 0)
