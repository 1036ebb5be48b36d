"""Runs a choice of cases on a library built with sanitizers; started by a test, with its path."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.cases import build
from tests.cuda_emu import cases
from tests.cuda_emu.emulator import Emulator


def main() -> None:
    """Every case in one layout and two block sizes; values are checked too."""
    emu = Emulator(Path(sys.argv[1]))
    count = 0
    others = [(case, emu.depthwise) for case in cases.DEPTHWISE]
    others += [(case, emu.pointwise) for case in cases.POINTWISE]
    for index, case in enumerate(cases.ALL):
        emu.set_device(1 if index % 3 else 100_000)
        layout = "channels_last" if index % 2 else "contiguous"
        problem = build(case.but(layout=layout))
        # The sanitizer guards both ends of every tensor's allocation.
        problem.check(emu.forward(problem))
        emu.grad_values(problem, torch.ones(case.n, case.k, *case.out_size))
        count += 1
    for index, (case, run) in enumerate(others):
        for layout in ("contiguous", "channels_last"):
            dtype = (torch.float32, torch.float16, torch.bfloat16)[index % 3]
            problem = build(case.but(layout=layout, dtype=dtype))
            problem.check(run(problem))
            count += 1
    for index, case in enumerate(cases.POINTWISE):
        problem = build(case.but(layout=("contiguous", "channels_last")[index % 2]))
        problem.check(emu.pointwise(problem, tf32=True))
        count += 1
    print(f"{count} cases passed")


if __name__ == "__main__":
    main()
