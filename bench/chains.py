"""The chains and pointwise layers that are benchmarked, by name; blocks of real networks."""

from __future__ import annotations

from tests.chains import ChainCase, Stage, inverted

_DW = Stage(kernel=(3, 3), activation="relu6")
_TALL, _WIDE = Stage(None, (3, 1)), Stage(None, (1, 3))


def _mobile(c: int, t: int, k: int, size: int, stride: int = 1) -> ChainCase:
    """A block of MobileNetV2, batch normalization folded."""
    residual = stride == 1 and c == k
    return ChainCase(inverted(t, k, 3, stride), 1, c, size, size, residual)


def _square(stages: tuple[Stage, ...], c: int, size: int, residual: bool = False) -> ChainCase:
    return ChainCase(stages, 1, c, size, size, residual)


_BOTTLENECK = (
    Stage(64, activation="relu"), Stage(64, (3, 3), activation="relu"),
    Stage(256, activation="relu"),
)  # fmt: skip

CHAINS: dict[str, ChainCase] = {
    "dw_pw_144_24": _square((_DW, Stage(24)), 144, 56),
    "dw_pw_512_512": _square((_DW, Stage(512, activation="relu6")), 512, 14),
    "mbv2_16_96_24_s2": _mobile(16, 96, 24, 112, 2),
    "mbv2_24_144_24": _mobile(24, 144, 24, 56),
    "mbv2_32_192_32": _mobile(32, 192, 32, 28),
    "mbv2_64_384_64": _mobile(64, 384, 64, 14),
    "mbv2_96_576_96": _mobile(96, 576, 96, 14),
    "mbv2_96_576_160_s2": _mobile(96, 576, 160, 14, 2),
    "mbv2_160_960_160": _mobile(160, 960, 160, 7),
    "separable_7x1_1x7": _square((Stage(32, (7, 1)), Stage(64, (1, 7))), 64, 56),
    "tucker2_14": _square((Stage(64), Stage(64, (3, 3)), Stage(256)), 256, 14),
    "tucker2_56": _square((Stage(64), Stage(64, (3, 3)), Stage(256)), 256, 56),
    "cp_28": _square((Stage(160), _TALL, _WIDE, Stage(128)), 128, 28),
    "kxk_pw_28": _square((Stage(32, (3, 3)), Stage(128)), 128, 28),
    "bottleneck_56": _square(_BOTTLENECK, 256, 56, True),
}

POINTWISE: dict[str, ChainCase] = {
    f"{c}_{k}_{size}": _square((Stage(k),), c, size)
    for c, k, size in (
        (256, 64, 56), (64, 256, 56), (1024, 256, 14), (256, 1024, 14), (512, 2048, 7),
        (2048, 512, 7), (16, 96, 112), (24, 144, 56), (144, 24, 56), (32, 192, 28), (192, 32, 28),
        (96, 576, 14), (576, 96, 14), (160, 960, 7), (960, 160, 7), (320, 1280, 7),
    )
}  # fmt: skip


def label(case: ChainCase) -> str:
    """Readable description: channels, filters, size."""
    text = str(case.c)
    for stage, (k, _, _) in zip(case.stages, case.shapes[1:], strict=True):
        kernel = f"{stage.kernel[0]}x{stage.kernel[1]}"
        step = f"/{stage.stride[0]}" if stage.stride[0] > 1 else ""
        text += f" {'dw ' if stage.k is None else ''}{kernel}{step}> {k}"
    return f"{text} @{case.h}{' + x' if case.residual else ''}"
