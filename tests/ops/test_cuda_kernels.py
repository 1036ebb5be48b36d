"""A few cases of every CUDA kernel and type: little enough for compute-sanitizer to watch.

The cases are those that reach every path in the emulator; a GPU has more multiprocessors than it
pretends, so that some are repeated over more images, for the block shapes of large problems.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.cases import ConvCase, build
from tests.chains import build_chain, in_order
from tests.cuda_emu import cases, chain
from tests.ops import chain as chain_op
from tests.ops import csr, depthwise, pattern, two_four, winograd

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGE = ConvCase(n=12, c=24, h=31, w=33, k=72, density=0.1)


def variants(family: list[ConvCase], every: int) -> Iterator[tuple[int, ConvCase]]:
    """Each of some cases in both layouts, the types in turn."""
    for index, case in enumerate(family[::every]):
        for turn, layout in enumerate(("contiguous", "channels_last")):
            dtype = DTYPES[(index + turn) % len(DTYPES)]
            yield index, case.but(layout=layout, dtype=dtype)
    for index, dtype in enumerate(DTYPES):
        for layout in ("contiguous", "channels_last"):
            yield index, family[0].but(layout=layout, dtype=dtype)


def test_every_kernel_of_csr_conv2d(cuda: str) -> None:
    for _, case in variants([LARGE, *cases.SPLIT, *cases.ALL], 5):
        problem = build(case, cuda)
        csr.check(problem)
        grad = torch.ones(case.n, case.k, *case.out_size, dtype=case.dtype, device=cuda)
        args = csr.grad_values_args(problem, grad)
        values = torch.ops.sparsecnn.csr_conv2d_grad_values.default(*args)
        assert values.shape == problem.values.shape and bool(values.isfinite().all())


def test_every_kernel_of_depthwise_conv2d(cuda: str) -> None:
    for _, case in variants(cases.DEPTHWISE, 2):
        depthwise.check(build(case, cuda))


def test_every_kernel_of_pattern_conv2d(cuda: str) -> None:
    for index, case in variants([LARGE, *cases.TENSOR_CORES, *cases.ALL], 6):
        pattern.check(pattern.make(case, index, cuda))
    for index, case in enumerate(two_four.GEOMETRIES):
        pattern.check(two_four.two_four(case, share=1 + index % 3, device=cuda))


def test_every_kernel_of_pointwise_conv2d(cuda: str) -> None:
    large = cases.POINTWISE[0].but(n=12, c=40, h=31, w=33, k=72)
    for _, case in variants([large, *cases.POINTWISE], 2):
        for order in ("contiguous", "innermost"):
            for tf32 in (False, True):
                problem = build(case, cuda)
                weight = in_order(problem.weight.to(case.dtype), order)
                y = chain_op.run_pointwise(problem, weight, tf32)
                problem.check(y, tf32=tf32)


def test_every_kernel_of_winograd_conv2d(cuda: str) -> None:
    large = cases.WINOGRAD[0].but(n=8, c=24, h=31, w=33, k=72)
    for _, case in variants([large, *cases.WINOGRAD], 4):
        for tile, sparse in winograd.KINDS:
            winograd.check(winograd.make(case, tile, sparse, cuda))


def test_every_kernel_of_chain_conv2d(cuda: str) -> None:
    for index, case in enumerate(chain.cases()):
        for turn, layout in enumerate(("contiguous", "channels_last")):
            dtype = DTYPES[(index + turn) % len(DTYPES)]
            problem = build_chain(case.but(layout=layout, dtype=dtype)).to(cuda)
            problem.check(chain_op.run_op(problem))
