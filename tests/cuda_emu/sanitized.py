"""Runs a choice of cases on a library built with sanitizers; started by a test, with its path."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.cases import build
from tests.chains import build_chain
from tests.cuda_emu import cases, chain
from tests.cuda_emu.emulator import Emulator
from tests.ops import two_four
from tests.ops.pattern import CUTS, pack
from tests.ops.winograd import KINDS, make


def main() -> None:
    """Cases of every kernel and its edges in one layout or both; values are checked too."""
    emu = Emulator(Path(sys.argv[1]))
    count = 0
    others = [(case, emu.depthwise) for case in cases.DEPTHWISE]
    others += [(case, emu.pointwise) for case in cases.POINTWISE]
    for index, case in enumerate(cases.ALL[::2]):
        emu.set_device(1)
        layout = "channels_last" if index % 2 else "contiguous"
        problem = build(case.but(layout=layout))
        # The sanitizer guards both ends of every tensor's allocation.
        problem.check(emu.forward(problem))
        emu.grad_values(problem, torch.ones(case.n, case.k, *case.out_size))
        count += 1
    for sm_count, case in ((1, cases.SPLIT[0]), (8, cases.SPLIT[1]), (16, cases.SPLIT[2])):
        emu.set_device(sm_count)
        problem = build(case)
        problem.check(emu.forward(problem))
        count += 1
    for index, (case, run) in enumerate(others[::2]):
        for layout in ("contiguous", "channels_last"):
            dtype = (torch.float32, torch.float16, torch.bfloat16)[index % 3]
            problem = build(case.but(layout=layout, dtype=dtype))
            problem.check(run(problem))
            count += 1
    emu.set_device()
    for case in two_four.GEOMETRIES:
        packed = two_four.two_four(case, share=3)
        packed.problem.check(emu.pattern_2_4(packed))
        count += 1
    for index, case in enumerate((*cases.ALL[::5], *cases.TENSOR_CORES)):
        emu.set_device(1 if index % 3 else 100_000)
        layout = "channels_last" if index % 2 else "contiguous"
        dtype = (torch.float32, torch.float16, torch.bfloat16)[index % 3]
        packed = pack(build(case.but(layout=layout, dtype=dtype)), *CUTS[index % len(CUTS)])
        packed.problem.check(emu.pattern(packed))
        count += 1
    for number, case in enumerate(cases.WINOGRAD[1:16:4]):
        for turn, (tile, sparse) in enumerate(KINDS):
            emu.set_device(1 if (number + turn) % 2 else 1000)
            layout = "channels_last" if (number + turn // 2) % 2 else "contiguous"
            p = make(case.but(layout=layout), tile, sparse)
            p.check(emu.winograd(p), cuda=True)
            count += 1
        emu.set_device(1 if number % 2 else 1000)
        p = make(case.but(dtype=torch.float16), 2)
        p.check(emu.winograd(p), cuda=True)
        count += 1
    for index, chained in enumerate(chain.cases()[::4]):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[index % 3]
        emu.set_device(smem_bytes=12 * 1024 if index % 2 else 227 * 1024)
        layout = ("contiguous", "channels_last")[index // 3 % 2]
        chain_problem = build_chain(chained.but(layout=layout, dtype=dtype, integers=False))
        chain_problem.check(chain.run(emu, chain_problem))
        count += 1
    for index, case in enumerate(cases.POINTWISE[::3]):
        problem = build(case.but(layout=("contiguous", "channels_last")[index % 2]))
        problem.check(emu.pointwise(problem, tf32=True))
        count += 1
    print(f"{count} cases passed")


if __name__ == "__main__":
    main()
