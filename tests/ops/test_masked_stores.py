"""What the compiler made of masked stores: none may fault on an address that its mask leaves out.

The kernels store the end of a row under a mask, at addresses that may lie behind the tensor.
Whether the page there exists is up to the allocator, so that no run shows the fault for certain;
the instructions do.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sparsecnn

# Stores with exceptions of type E6NF (Intel SDM, volume 2): no fault is suppressed where the mask
# is zero.
FAULTING = re.compile(r"\s(vextract[fi]\w+\s[^#\n]*\)\{%k[1-7]\})")
MASKED = re.compile(r"\)\{%k[1-7]\}")


def test_pattern_of_faulting_stores() -> None:
    bad = "  5e02b6:\tvextractf32x8 $0x1,%zmm14,(%rax,%r9,1){%k1}\n"
    good = "  5e02b6:\tvmovups %ymm0,(%rsi,%r8,1){%k3}\n  1:\tvextractf32x8 $0x1,%zmm1,%ymm2{%k1}\n"
    assert FAULTING.findall(bad) == ["vextractf32x8 $0x1,%zmm14,(%rax,%r9,1){%k1}"]
    assert not FAULTING.findall(good) and MASKED.search(good)


def test_no_masked_store_faults_where_its_mask_is_zero() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    if platform.machine() != "x86_64":
        pytest.skip("the library has no code with mask registers")
    library = Path(sparsecnn.__file__).with_name("libsparsecnn.so")
    masked, faulting = 0, set()
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:  # not all at once: about a hundred megabytes
            if MASKED.search(line):
                masked += 1
                faulting |= set(FAULTING.findall(line))
    assert process.returncode == 0
    assert masked > 100, "no masked stores seen: the test shows nothing"
    assert not faulting, sorted(faulting)[:5]
