"""Tucker decompositions: a small core between factors of the channels, or of all four modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..method import Factors, Method, Stage, register_method
from ..problem import LayerProblem
from ..solvers.svd import hoi, unfold


def _consistent(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of a core none of which is above the product of the others: more adds nothing."""
    size = math.prod(sizes)
    cut = tuple(min(n, size // n) for n in sizes)
    return sizes if cut == sizes else _consistent(cut)


@dataclass(frozen=True)
class Tucker2(Method):
    """1x1, a small convolution, 1x1: ``W ~ core x_0 U_T x_1 U_S``.

    S -> R_S, then the core R_S -> R_T with kh x kw taps, then R_T -> T. MACs
    ``S R_S P_in + R_S R_T kh kw P_out + R_T T P_out``, full ranks (T, S); a rank of one side above
    kh kw times the other adds nothing and is cut. Factors by higher-order orthogonal iteration
    (Kim, Park, Yoo, Choi, Yang, Shin, "Compression of deep convolutional neural networks for fast
    and low power mobile applications", ICLR 2016).

    Ranks are (R_T, R_S).
    """

    name: ClassVar[str] = "tucker2"

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """All filters and channels that are linearly independent."""
        taps = p.kh * p.kw
        return min(p.T, p.S * taps), min(p.S, p.T * taps)

    def clamp(self, p: LayerProblem, ranks: Sequence[int]) -> tuple[int, ...]:
        """Also to kh kw times the other one."""
        r_t, r_s = super().clamp(p, ranks)
        return _consistent((r_t, r_s, p.kh * p.kw))[:2]

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """1x1, core, 1x1."""
        r_t, r_s = ranks
        return [
            Stage(p.S, r_s), Stage(r_s, r_t, (p.kh, p.kw), axes="hw"), Stage(r_t, p.T),
        ]  # fmt: skip

    def unfoldings(self, p: LayerProblem, group: int) -> list[Tensor]:
        """With filters as rows, and with channels as rows."""
        return [unfold(p.weight[group], 0), unfold(p.weight[group], 1)]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """Higher-order orthogonal iteration."""
        core, (u_t, u_s), _ = hoi(p.weight[group], ranks, (0, 1))
        return Factors([u_s.T[:, :, None, None], core, u_t[:, :, None, None]])


@dataclass(frozen=True)
class Tucker4(Method):
    """Tucker decomposition of all four modes.

    1x1 S -> R_S; per channel R_h filters kh x 1; per channel of those R_w filters 1 x kw; 1x1 R_S
    R_h R_w -> R_T; 1x1 R_T -> T. The spatial modes of 3x3 kernels are so small that `Tucker2` is
    the better choice there.

    Ranks are (R_T, R_S, R_h, R_w); full (T, S, kh, kw).
    """

    name: ClassVar[str] = "tucker4"

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """The linearly independent slices of each mode."""
        shape = p.weight.shape[1:]
        size = p.weight[0].numel()
        return tuple(min(n, size // n) for n in shape)

    def clamp(self, p: LayerProblem, ranks: Sequence[int]) -> tuple[int, ...]:
        """Also to the product of the other ones."""
        return _consistent(super().clamp(p, ranks))

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """1x1, two depthwise ones with multipliers, the core as 1x1, 1x1."""
        r_t, r_s, r_h, r_w = ranks
        return [
            Stage(p.S, r_s),
            Stage(r_s, r_s * r_h, (p.kh, 1), r_s, "h"),
            Stage(r_s * r_h, r_s * r_h * r_w, (1, p.kw), r_s * r_h, "w"),
            Stage(r_s * r_h * r_w, r_t),
            Stage(r_t, p.T),
        ]

    def unfoldings(self, p: LayerProblem, group: int) -> list[Tensor]:
        """One per mode."""
        return [unfold(p.weight[group], mode) for mode in range(4)]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """Higher-order orthogonal iteration on all modes."""
        r_t, r_s, r_h, _ = ranks
        core, (u_t, u_s, u_h, u_w), _ = hoi(p.weight[group], ranks, (0, 1, 2, 3))
        # Output (s, h) of the vertical stage is filter h on channel s; then (s, h, w) likewise.
        vertical = u_h.T.repeat(r_s, 1)[:, None, :, None]
        horizontal = u_w.T.repeat(r_s * r_h, 1)[:, None, None, :]
        return Factors([
            u_s.T[:, :, None, None],
            vertical,
            horizontal,
            core.reshape(r_t, -1)[:, :, None, None],
            u_t[:, :, None, None],
        ])  # fmt: skip


register_method("tucker2", Tucker2)
register_method("tucker4", Tucker4)
