"""A chain of convolutions as the chain kernel takes it.

A stage's weight keeps its shape ``(K, C/G, R, S)``; what changes is its order in memory,
``[R][S][C/G][K]`` with the output channels innermost, because the lanes of the kernel are output
channels: one load brings the weights of one input channel for a vector of outputs. Any other order
is legal and copied by every call, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

MAX_STAGES = 8
"""Stages that one call takes."""


def channels_innermost(weight: Tensor) -> Tensor:
    """The same ``(K, C/G, R, S)`` values, stored ``[R][S][C/G][K]``; a copy unless they are."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


@dataclass(frozen=True)
class ChainStage:
    """One convolution of a chain with its bias and activation.

    Attributes:
        weight: ``(K, C/G, R, S)``, in any order in memory.
        bias: ``(K,)`` or None.
        stride: vertical, horizontal.
        padding: top, bottom, left, right.
        dilation: vertical, horizontal.
        groups: 1, or C for a depthwise stage with K = C.
        activation: ``none``, ``relu``, ``relu6``, ``silu`` or ``hardswish``.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "none"


@dataclass(frozen=True)
class ChainGeometry:
    """What a chain is apart from its tensors, as the op takes it: flat lists over the stages.

    Attributes:
        stride: two for each stage.
        padding: four for each stage.
        dilation: two for each stage.
        groups: one for each stage.
        activations: names joined by commas.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: list[int]
    activations: str

    @classmethod
    def of(cls, stages: Sequence[ChainStage]) -> ChainGeometry:
        """The geometry of stages whose options have been checked."""
        return cls(
            [v for s in stages for v in s.stride],
            [v for s in stages for v in s.padding],
            [v for s in stages for v in s.dilation],
            [s.groups for s in stages],
            ",".join(s.activation for s in stages),
        )
