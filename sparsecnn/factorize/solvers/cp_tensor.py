"""Canonical polyadic (CP) tensors, and the one contraction that every CP solver spends its time in.

X[i_1 .. i_d] ~ sum_r w_r A_1[i_1, r] ... A_d[i_d, r], the columns of every A_m of length 1.

The solvers work on a batch of B tensors (or B starts on one tensor) with the longest mode last, as
the matrix `Unfolded.matrix` (B, N / n, n) where N = n_1 ... n_d and n is the longest mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CP:
    """A sum of R rank-1 terms.

    Attributes:
        weights: (R,), not negative, descending.
        factors: one (n_m, R) per mode, columns of length 1 (0 where the weight is 0).
    """

    weights: Tensor
    factors: tuple[Tensor, ...]

    def to_tensor(self) -> Tensor:
        """X (n_1 .. n_d); one product of N R multiply-adds."""
        first, *rest = self.factors
        scaled = first * self.weights
        if not rest:
            return scaled.sum(1)
        product = khatri_rao([f.unsqueeze(0) for f in rest])[0]
        return (scaled @ product.T).reshape([len(f) for f in self.factors])

    def relative_error(self, x: Tensor) -> float:
        """||X - CP|| / ||X||, from the difference itself; 0 for X = 0."""
        x = x.double()
        return float((x - self.to_tensor()).norm() / x.norm().clamp_min(_TINY))

    def degeneracy(self, x: Tensor) -> float:
        """sum_r w_r^2 / ||X||^2: 1 for orthogonal terms, far above 1 where terms cancel."""
        x = x.double()
        return float(self.weights.square().sum() / x.square().sum().clamp_min(_TINY))

    def split(self) -> list[Tensor]:
        """A_m w^(1/d) per mode: factors of equal column lengths, the weights inside."""
        root = self.weights ** (1 / len(self.factors))
        return [f * root for f in self.factors]


# Up to this many entries * rank a fit of five starts takes about a second.
_SMALL = 2_000_000
_TINY = torch.finfo(torch.float64).tiny


def normalized(weights: Tensor, factors: Sequence[Tensor]) -> CP:
    """The CP of w (R,) and A_m (n_m, R) with columns of length 1 and descending weights.

    Signs go into the first factor; ties keep their order.
    """
    norms = [f.norm(dim=0) for f in factors]
    total = weights.clone()
    for norm in norms:
        total = total * norm
    order = total.abs().sort(descending=True, stable=True).indices
    unit = [f / norm.clamp_min(_TINY) for f, norm in zip(factors, norms, strict=True)]
    unit[0] = unit[0] * torch.where(total < 0, -1.0, 1.0)
    return CP(total.abs()[order], tuple(f[:, order] for f in unit))


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product of (B, n_m, R): (B, prod n_m, R), the last mode fastest."""
    product = factors[0]
    for f in factors[1:]:
        product = (product.unsqueeze(2) * f.unsqueeze(1)).flatten(1, 2)
    return product


@dataclass(frozen=True)
class Unfolded:
    """Tensors with their longest mode split off.

    Attributes:
        matrix: (B, N / n, n) float64; row = the other modes in their order, the last one fastest.
        order: the modes as they stand here; order[-1] is the longest.
        sizes: n_m in this order.
    """

    matrix: Tensor
    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Unfolded:
        """From X (B, n_1 .. n_d); of equally long modes the first is split off."""
        sizes = list(x.shape[1:])
        longest = sizes.index(max(sizes))
        order = [m for m in range(len(sizes)) if m != longest] + [longest]
        # Row-major, so that the products below need no copies.
        matrix = x.double().movedim(longest + 1, -1).flatten(1, -2).contiguous()
        return cls(matrix, tuple(order), tuple(sizes[m] for m in order))

    def repeated(self, times: int) -> Unfolded:
        """The same B tensors `times` times: a batch of times * B, of B = 1 without a copy."""
        matrix = self.matrix.unsqueeze(0).expand(times, *self.matrix.shape).flatten(0, 1)
        return Unfolded(matrix, self.order, self.sizes)

    def arranged(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Factors given in the tensor's order, in this order."""
        return [factors[m] for m in self.order]

    def restored(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Factors given in this order, in the tensor's order."""
        return [factors[self.order.index(m)] for m in range(len(self.order))]

    def sweep(self, factors: list[Tensor], update: Callable[[int, Tensor], Tensor]) -> None:
        """For m = 0 .. d-1 in turn: factors[m] = update(m, X_(m) KR_{q != m} factors[q]).

        The product with the longest factor is formed once and serves all other modes, each of
        which is then contracted away (a dimension tree: Phan, Tichavsky, Cichocki, IEEE TSP 61
        (2013)). Two products of N R multiply-adds per sweep whatever d, in place of d.

        Args:
            factors: (B, n_m, R) in this order; changed in place.
            update: gets the mode and the product (B, n_m, R), returns the new factor.
        """
        longest = len(factors) - 1
        partial = self.matrix @ factors[longest]  # (B, N / n, R)
        for m in range(longest):
            partial = partial.unflatten(1, (self.sizes[m], -1))
            if m + 1 < longest:
                others = khatri_rao(factors[m + 1 : longest])
                product = (partial * others.unsqueeze(1)).sum(2)
            else:
                product = partial.squeeze(2)
            factors[m] = update(m, product)
            partial = (partial * factors[m].unsqueeze(2)).sum(1)
        product = self.matrix.mT @ khatri_rao(factors[:longest])
        factors[longest] = update(longest, product)


def normal_columns(
    sizes: Sequence[int], rank: int, batch: int, generator: torch.Generator
) -> list[Tensor]:
    """Random columns of length 1, one (batch, n_m, rank) per mode."""
    drawn = [
        torch.randn(batch, n, rank, dtype=torch.float64, generator=generator) for n in sizes
    ]
    return [f / f.norm(dim=1, keepdim=True) for f in drawn]


def checked(what: str, x: Tensor, rank: int) -> Tensor:
    """X as float64.

    Raises:
        ValueError: fewer than two modes, an empty mode, or a rank below 1.
    """
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"{what}: expected x of 2 or more modes, none empty, got {tuple(x.shape)}"
        )
    if rank < 1:
        raise ValueError(f"{what}: expected rank >= 1, got {rank}")
    return x.double()


def check_init(what: str, x: Tensor, rank: int, init: CP) -> None:
    """Raise ValueError unless the factors of `init` fit the tensor and the rank."""
    wanted = [(n, rank) for n in x.shape]
    got = [tuple(f.shape) for f in init.factors]
    if got != wanted:
        raise ValueError(f"{what}: expected init with factors {wanted}, got {got}")


def hadamard(matrices: Sequence[Tensor]) -> Tensor:
    """Elementwise product of one or more."""
    product = matrices[0]
    for matrix in matrices[1:]:
        product = product * matrix
    return product


def effort(x: Tensor, rank: int, small: int, large: int) -> int:
    """`small` for tensors on which a sweep costs little, `large` for the others."""
    return small if x.numel() * rank <= _SMALL else large
