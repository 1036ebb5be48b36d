"""Low-rank expansions: separable filters per channel, or vertical then horizontal ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ..method import Factors, Method, Stage, register_method, separable_stages
from ..problem import LayerProblem
from ..solvers.jaderberg import separable_per_channel, vh_als
from .svd import VH

Solver = Literal["vh", "als"]


@dataclass(frozen=True)
class Jaderberg1(Method):
    """M separable filters per input channel: ``W[t,s] ~ sum_m A[t,s,m] V[s,m] H[s,m]'``.

    Depthwise kh x 1 with M filters per channel, depthwise 1 x kw, 1x1 S M -> T: MACs
    ``S M (kh P_v + kw P_out + T P_out)``, full M = kh kw (Jaderberg, Vedaldi, Zisserman, "Speeding
    up convolutional neural networks with low rank expansions", BMVC 2014, scheme 1).
    """

    name: ClassVar[str] = "jaderberg1"

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """One filter per tap."""
        return (p.kh * p.kw,)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Two depthwise ones, 1x1."""
        return separable_stages(p, ranks[0])

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """A CP per channel."""
        vertical, horizontal, mixing = separable_per_channel(
            p.weight[group], ranks[0], seed=p.seed
        )
        return Factors([
            vertical.reshape(-1, 1, p.kh, 1),
            horizontal.reshape(-1, 1, 1, p.kw),
            mixing.reshape(p.T, -1, 1, 1),
        ])  # fmt: skip


@dataclass(frozen=True)
class Jaderberg2(VH):
    """Scheme 2 of Jaderberg et al., whose chain is that of `VH`.

    Attributes:
        order: see `VH`.
        solver: "vh", the closed form, or "als", the alternation that the paper had to use; it
            cannot be better.
    """

    solver: Solver = "vh"
    name: ClassVar[str] = "jaderberg2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in get_args(Solver):
            raise ValueError(f"Jaderberg2: expected solver 'vh' or 'als', got {self.solver!r}")

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The closed form or the alternation."""
        if self.solver == "vh":
            return super().solve(p, ranks, group)
        first, second, _ = vh_als(self._kernel(p, group), ranks[0], seed=p.seed)
        if self.order == "vh":
            return Factors([first[:, :, :, None], second[:, :, None, :]])
        return Factors([first[:, :, None, :], second[:, :, :, None]])


register_method("jaderberg1", Jaderberg1)
register_method("jaderberg2", Jaderberg2)
