"""chain_conv2d on the emulator: its parameter block, its call and chains for every path."""

from __future__ import annotations

import ctypes
import dataclasses

import torch
from torch import Tensor

from tests.cases import memory_format
from tests.chains import DW, ChainCase, ChainProblem, Stage, inverted
from tests.cuda_emu.emulator import ACTIVATIONS, DTYPES, ConvShape, Emulator, pointer


class ChainStage(ctypes.Structure):
    """Mirror of ``ChainStage`` in ``core/params.h``."""

    _fields_ = [
        ("shape", ConvShape),
        ("activation", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64 * 4),
        ("bias", ctypes.c_void_p),
    ]


class ChainParams(ctypes.Structure):
    """Mirror of ``ChainConv2dParams``."""

    _fields_ = [
        ("stages", ctypes.c_int32),
        ("stage", ChainStage * 8),
        ("n", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


def params_of(problem: ChainProblem, y: Tensor) -> ChainParams:
    """The block of a chain that writes into `y`; the problem owns what it points to."""
    case, shapes = problem.case, problem.case.shapes
    params = ChainParams(
        stages=len(case.stages),
        n=case.n,
        dtype=DTYPES[case.dtype],
        layout=int(memory_format(problem.x) is torch.channels_last),
        x=problem.x.data_ptr(),
        residual=pointer(problem.residual),
        y=y.data_ptr(),
    )
    for i, (stage, weight) in enumerate(zip(case.stages, problem.weights, strict=True)):
        (c, h, w), (k, p, q), pads = shapes[i], shapes[i + 1], stage.pads
        sizes = (case.n, c, h, w, k, *stage.kernel, p, q, *stage.stride, pads[0], pads[2])
        params.stage[i] = ChainStage(
            ConvShape(*sizes, *stage.dilation, problem.groups[i]),
            ACTIVATIONS.index(stage.activation),
            weight.data_ptr(),
            (ctypes.c_int64 * 4)(*weight.stride()),
            pointer(problem.biases[i]),
        )
    return params


def run_raw(emu: Emulator, params: ChainParams) -> None:
    """chain_conv2d on a parameter block; raises as `Emulator.forward_raw`."""
    assert emu.number("emu_sizeof_chain_params") == ctypes.sizeof(ChainParams)
    emu.call("emu_chain_conv2d", params)


def run(emu: Emulator, problem: ChainProblem) -> Tensor:
    """chain_conv2d; the output starts as NaN."""
    case = problem.case
    y = torch.full((case.n, *case.shapes[-1]), float("nan"), dtype=case.dtype)
    y = y.contiguous(memory_format=memory_format(problem.x))
    run_raw(emu, params_of(problem, y))
    return y


_TALL, _WIDE = Stage(None, (3, 1)), Stage(None, (1, 3))


def cases() -> list[ChainCase]:
    """Every way through the kernels with few enough pixels for the emulator; integers."""
    found = [
        ChainCase(inverted(20, 5), residual=True),  # chunks, the last of them part of one
        ChainCase(inverted(96, 24, 5, 2), n=1, c=16, h=11, w=9),
        ChainCase((DW, Stage(33)), c=24, h=9, w=12),
        ChainCase((Stage(16, (7, 1)), Stage(24, (1, 7), activation="relu")), n=1, c=16),
        ChainCase((Stage(16), Stage(16, (3, 3)), Stage(40)), n=1, c=40, h=9, w=11),
        ChainCase((Stage(20), _TALL, _WIDE, Stage(36)), n=1, c=32, h=9, w=10),
        # Ends that are depthwise, with and without a residual.
        ChainCase((Stage(20, (3, 3)), DW), residual=True, c=7),
        ChainCase((DW, Stage(None, (2, 5), (2, 1)))),
        ChainCase((DW, Stage(24), DW, Stage(8)), c=8),
        # One stage alone; more pixels in a tile than the warps have; weights in several passes.
        ChainCase((Stage(70, stride=(2, 1)),), c=40),
        ChainCase((Stage(5, (3, 3)),) * 4, n=1, h=20, w=20, c=3),
        ChainCase((Stage(64, (5, 5)),), n=1, c=32, h=5, w=6, residual=True),
        # Geometry.
        ChainCase((Stage(6, (3, 3), dilation=(2, 3)), Stage(None, (3, 3), dilation=(1, 2)))),
        ChainCase((Stage(6, (3, 3), padding=(4, 4, 5, 5)), Stage(9, (2, 2), (2, 3))), h=6),
        ChainCase((Stage(9), Stage(None, (3, 3), (2, 1), (0, 3, 2, 0)), Stage(3)), h=7, w=5),
        ChainCase(inverted(9, 3), h=1, w=1),
        ChainCase(inverted(300, 2), n=1, c=1, h=3, w=70),
        # Weights whose filters do not lie innermost.
        *(
            ChainCase((Stage(37, (3, 2), order=o), Stage(kernel=(3, 3), order=o)), c=19, h=6)
            for o in ("contiguous", "channels_last", "strided")
        ),
    ]
    return [case.but(integers=True) for case in found]


def variants(case: ChainCase) -> list[ChainCase]:
    """The case in both layouts, and as random floats in each storage type."""
    found = [case, case.but(layout="channels_last")]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            found.append(dataclasses.replace(case, integers=False, dtype=dtype, layout=layout))
    return found
