"""Separable filters that all kernel slices share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import Factors, Method, Stage, register_method, separable_stages
from ..problem import LayerProblem
from ..solvers.separable import SOLVERS, Solver, separable_basis


@dataclass(frozen=True)
class Rigamonti(Method):
    """Every kernel slice as a sum of K separable filters, the same ones for all channels.

    ``W[t,s] ~ sum_k w[t,s,k] v_k h_k^T``, fitted by `separable_basis`. Chain: per channel K filters
    kh x 1, on each its filter 1 x kw, then 1x1 S K -> T. MACs ``S K (kh P_v + kw P_out) + S K T
    P_out``, full rank kh kw. The taps are stored once per channel and may drift apart in training.
    Rigamonti, Sironi, Lepetit, Fua, "Learning separable filters", CVPR 2013.

    Attributes:
        solver: "svt" or "cp", see `separable_basis`.
    """

    solver: Solver = "svt"
    name: ClassVar[str] = "rigamonti"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"Rigamonti: expected solver 'svt' or 'cp', got {self.solver!r}")

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """One filter per position."""
        return (p.kh * p.kw,)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Two depthwise ones and a 1x1."""
        return separable_stages(p, ranks[0])

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The shared basis of the T S slices, each component's size spread over its 3 factors."""
        basis, weights = separable_basis(
            p.weight[group].flatten(0, 1), ranks[0], solver=self.solver, seed=p.seed
        )
        left, _, right = torch.linalg.svd(basis, full_matrices=False)
        sizes = torch.linalg.vector_norm(weights, dim=0)
        root = torch.where(sizes > 0, sizes, 1.0) ** (1 / 3)
        vertical, horizontal = root[:, None] * left[:, :, 0], root[:, None] * right[:, 0]
        last = (weights / root.square()).reshape(p.T, -1)
        return Factors([
            vertical.repeat(p.S, 1)[:, None, :, None],
            horizontal.repeat(p.S, 1)[:, None, None, :],
            last[:, :, None, None],
        ])  # fmt: skip


register_method("rigamonti", Rigamonti)
