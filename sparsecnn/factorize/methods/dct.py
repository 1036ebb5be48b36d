"""Kernels written in cosines: a fixed separable basis, learned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..dct import dct2d_separable, dct_matrix, zigzag
from ..method import Factors, Method, Stage, register_method, separable_stages
from ..problem import LayerProblem

Keep = Literal["zigzag", "energy"]


@dataclass(frozen=True)
class DCT(Method):
    """Every kernel slice as a sum of M products of cosines.

    ``W[t,s] = sum_uv B[t,s,u,v] c_u c_v^T`` with the rows c of `dct_matrix` and
    ``B[t,s] = C_h W[t,s] C_w^T``, of which M pairs (u, v) are kept, the same ones in the whole
    layer. The basis is orthonormal, so that the squared error is the energy of what is dropped.

    Chain: per channel M filters kh x 1, on each its filter 1 x kw, both fixed; then 1x1 S M -> T.
    MACs ``S M (kh P_v + kw P_out) + S M T P_out``, S M T learned weights, full rank kh kw. A
    separable transform as a sequence of one-dimensional ones; not a decomposition of this kernel:
    spatially smooth kernels need few atoms.

    Attributes:
        keep: "energy" keeps the atoms that carry most in this layer, ties in zigzag order, "zigzag"
            the lowest frequencies of any layer.
    """

    keep: Keep = "energy"
    name: ClassVar[str] = "dct"

    def __post_init__(self) -> None:
        if self.keep not in ("zigzag", "energy"):
            raise ValueError(f"DCT: expected keep 'zigzag' or 'energy', got {self.keep!r}")

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """All atoms."""
        return (p.kh * p.kw,)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Two depthwise ones and a learned 1x1."""
        return separable_stages(p, ranks[0], fixed=True)

    def _ordered(self, p: LayerProblem) -> tuple[Tensor, Tensor]:
        """Atoms (kh*kw, 2) in the order in which they are kept, and their energies."""
        atoms = zigzag(p.kh, p.kw)
        energies = dct2d_separable(p.weight).square().sum((0, 1, 2))[atoms[:, 0], atoms[:, 1]]
        if self.keep == "energy":
            order = energies.argsort(descending=True, stable=True)
            atoms, energies = atoms[order], energies[order]
        return atoms, energies

    def spectra(self, p: LayerProblem) -> list[Tensor]:
        """Energy of the atoms in the order in which they are kept: for zigzag, not descending."""
        return [self._ordered(p)[1]]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The coefficients of the kept atoms."""
        u, v = self._ordered(p)[0][: ranks[0]].unbind(1)
        kept = dct2d_separable(p.weight[group])[:, :, u, v]
        vertical = dct_matrix(p.kh)[u].repeat(p.S, 1)[:, None, :, None]
        horizontal = dct_matrix(p.kw)[v].repeat(p.S, 1)[:, None, None, :]
        return Factors([vertical, horizontal, kept.flatten(1)[:, :, None, None]])


register_method("dct", DCT)
