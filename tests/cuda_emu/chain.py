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
