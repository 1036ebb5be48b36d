"""Canonical polyadic decompositions: pointwise, depthwise, pointwise."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..method import Factors, Method, Stage, register_method
from ..problem import LayerProblem
from ..solvers.cp import cp_als, cp_exact, guarded
from ..solvers.cp_nls import cp_nls
from ..solvers.cp_power import cp_tpm
from ..solvers.cp_tensor import CP as CPTensor
from ..solvers.svd import svd_truncate

Modes = Literal[3, 4]
Solver = Literal["als", "nls", "tpm"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CP(Method):
    """A kernel as R rank-1 terms: ``W[t,s,i,j] ~ sum_r T[t,r] S[s,r] H[i,r] W[j,r]``.

    Four modes: 1x1 S -> R, depthwise kh x 1, depthwise 1 x kw, 1x1 R -> T: MACs
    ``R (S P_in + kh P_v + kw P_out + T P_out)`` (Lebedev et al., "Speeding-up convolutional neural
    networks using fine-tuned CP-decomposition", ICLR 2015). Three modes: both spatial ones in one
    depthwise kh x kw, better for 3x3 kernels, and all that there is where kh or kw is 1. A 1x1
    kernel is a matrix, its CP the singular value decomposition: 1x1 S -> R -> T.

    Full rank min(S, T) kh kw, built and not solved for. Below it, terms that cancel are replaced
    by tamer ones (`guarded`) and log and report say so. Fine-tune with small steps and clipped
    gradients.

    Attributes:
        modes: 4 or 3.
        solver: "als", "nls" (joint Gauss-Newton steps from there) or "tpm" (greedy deflation:
            greater error, bounded weights).
    """

    modes: Modes = 4
    solver: Solver = "als"
    name: ClassVar[str] = "cp"

    def __post_init__(self) -> None:
        if self.modes not in get_args(Modes):
            raise ValueError(f"{type(self).__name__}: expected modes 3 or 4, got {self.modes!r}")
        if self.solver not in get_args(Solver):
            raise ValueError(
                f"{type(self).__name__}: expected solver one of {', '.join(get_args(Solver))}, got "
                f"{self.solver!r}"
            )

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """One term per tap and channel, or filter."""
        return (min(p.S, p.T) * p.kh * p.kw,)

    def _merged(self, p: LayerProblem) -> bool:
        return self.modes == 3 or p.kh == 1 or p.kw == 1

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """1x1, one or two depthwise ones, 1x1."""
        (rank,) = ranks
        if p.kh == p.kw == 1:
            return [Stage(p.S, rank, axes="hw"), Stage(rank, p.T)]
        spatial = [Stage(rank, rank, (p.kh, p.kw), rank, "hw")]
        if not self._merged(p):
            spatial = [
                Stage(rank, rank, (p.kh, 1), rank, "h"), Stage(rank, rank, (1, p.kw), rank, "w"),
            ]  # fmt: skip
        return [Stage(p.S, rank), *spatial, Stage(rank, p.T)]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The fit of the solver, or the exact terms at full rank."""
        (rank,) = ranks
        weight = p.weight[group]
        if p.kh == p.kw == 1:
            left, right, _ = svd_truncate(weight[:, :, 0, 0], rank)
            return Factors([right[:, :, None, None], left[:, :, None, None]])
        merged = self._merged(p)
        x = weight.flatten(2) if merged else weight
        note = ""
        if rank >= self.full_ranks(p)[0]:
            terms = cp_exact(x)
        else:
            terms, note = self._fit(x, rank, p.seed)
            if note:
                _log.warning("factorize: %s, group %d: %s", p.name, group, note)
        filters, channels, *taps = terms.split()
        if merged:
            spatial = [taps[0].T.reshape(rank, 1, p.kh, p.kw)]
        else:
            spatial = [taps[0].T[:, None, :, None], taps[1].T[:, None, None, :]]
        chain = [channels.T[:, :, None, None], *spatial, filters[:, :, None, None]]
        return Factors(chain, note=note)

    def _fit(self, x: Tensor, rank: int, seed: int) -> tuple[CPTensor, str]:
        if self.solver == "tpm":
            return cp_tpm(x, rank, seed=seed), ""
        solver = cp_als if self.solver == "als" else cp_nls
        return guarded(x, lambda l2: solver(x, rank, l2=l2, seed=seed), seed=seed)


@dataclass(frozen=True)
class CPNLS(CP):
    """`CP` by joint Gauss-Newton steps."""

    solver: Solver = "nls"
    name: ClassVar[str] = "cp_nls"


@dataclass(frozen=True)
class CPTPM(CP):
    """`CP` by the tensor power method.

    To be fine-tuned layer by layer (Astrid, Lee, "CP-decomposition with tensor power method for
    convolutional neural networks compression", BigComp 2017).
    """

    solver: Solver = "tpm"
    name: ClassVar[str] = "cp_tpm"


register_method("cp", CP)
register_method("cp_nls", CPNLS)
register_method("cp_tpm", CPTPM)
