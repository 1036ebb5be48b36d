"""Methods that are one singular value decomposition: exact optima, no data, no iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..method import Factors, Method, Stage, register_method
from ..problem import LayerProblem, UnsupportedLayer
from ..solvers.response import whitened_svd
from ..solvers.svd import svd_truncate, vh_closed_form, vh_matrix

Side = Literal["out", "in"]
Metric = Literal["weight", "cov"]
Order = Literal["vh", "hv"]


@dataclass(frozen=True)
class _Matrix(Method):
    """A method that cuts off the SVD of one matrix, in the metric of the weights or of the data."""

    metric: Metric = "weight"

    def __post_init__(self) -> None:
        if self.metric not in ("weight", "cov"):
            raise ValueError(
                f"{type(self).__name__}: expected metric 'weight' or 'cov', got {self.metric!r}"
            )

    @property
    def needs_data(self) -> bool:
        """With metric "cov"."""
        return self.metric == "cov"

    def _factors(self, p: LayerProblem, rank: int, group: int) -> tuple[Tensor, Tensor]:
        matrix = self.unfoldings(p, group)[0]
        if self.metric == "cov":
            assert p.moments is not None
            return whitened_svd(matrix, p.moments.cov_in()[group], rank)
        return svd_truncate(matrix, rank)[:2]


@dataclass(frozen=True)
class ChannelSVD(_Matrix):
    """A kernel with fewer filters, then a 1x1 convolution: ``W.reshape(T, -1) = U S V^T``.

    Side "out": R filters kh x kw that carry stride, padding and dilation, then 1x1 R -> T. MACs
    ``R (kh kw S + T)`` per output position, full rank min(T, S kh kw). Side "in": 1x1 S -> R, then
    kh x kw R -> T, full rank min(S, T kh kw). Also known as Tucker-1.

    Attributes:
        metric: "cov" minimizes the error of the responses to calibration data instead of that of
            the weights (Denton et al., NIPS 2014), side "out" only.
        side: "out" or "in".
    """

    side: Side = "out"
    name: ClassVar[str] = "channel_svd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("out", "in"):
            raise ValueError(f"ChannelSVD: expected side 'out' or 'in', got {self.side!r}")
        if self.side == "in" and self.metric == "cov":
            raise ValueError("ChannelSVD: expected metric 'weight' with side 'in', got 'cov'")

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """The smaller size of the unfolding."""
        rows, columns = (p.T, p.S) if self.side == "out" else (p.S, p.T)
        return (min(rows, columns * p.kh * p.kw),)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """A bank kh x kw and 1x1, or the other way round."""
        (rank,) = ranks
        if self.side == "out":
            return [Stage(p.S, rank, (p.kh, p.kw), axes="hw"), Stage(rank, p.T)]
        return [Stage(p.S, rank), Stage(rank, p.T, (p.kh, p.kw), axes="hw")]

    def unfoldings(self, p: LayerProblem, group: int) -> list[Tensor]:
        """The kernel with the filters, or the channels, as rows."""
        weight = p.weight[group]
        return [(weight if self.side == "out" else weight.transpose(0, 1)).flatten(1)]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The truncated SVD."""
        (rank,) = ranks
        left, right = self._factors(p, rank, group)
        if self.side == "out":
            first = right.reshape(rank, p.S, p.kh, p.kw)
            return Factors([first, left[:, :, None, None]])
        last = right.reshape(rank, p.T, p.kh, p.kw).transpose(0, 1)
        return Factors([left.T[:, :, None, None], last])


@dataclass(frozen=True)
class VH(Method):
    """Vertical filters, then horizontal ones: ``W[t,s,i,j] ~ sum_k V[k,s,i] H[t,k,j]``.

    K filters kh x 1 over all channels, then 1 x kw: ``K (S kh P_v + T kw P_out)`` MACs, full rank
    min(S kh, T kw). The closed form is the global optimum (Tai et al., "Convolutional neural
    networks with low-rank regularization", ICLR 2016).

    Attributes:
        order: "vh", or "hv" for the horizontal filters first.
    """

    order: Order = "vh"
    name: ClassVar[str] = "vh"

    def __post_init__(self) -> None:
        if self.order not in ("vh", "hv"):
            raise ValueError(f"VH: expected order 'vh' or 'hv', got {self.order!r}")

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """The smaller size of the unfolding."""
        first, second = (p.kh, p.kw) if self.order == "vh" else (p.kw, p.kh)
        return (min(p.S * first, p.T * second),)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """One filter bank per axis."""
        (rank,) = ranks
        kernels = {"h": (p.kh, 1), "w": (1, p.kw)}
        first, second = ("h", "w") if self.order == "vh" else ("w", "h")
        return [
            Stage(p.S, rank, kernels[first], axes=first),
            Stage(rank, p.T, kernels[second], axes=second),
        ]

    def _kernel(self, p: LayerProblem, group: int) -> Tensor:
        weight = p.weight[group]
        return weight if self.order == "vh" else weight.transpose(2, 3)

    def unfoldings(self, p: LayerProblem, group: int) -> list[Tensor]:
        """``M[(s, i), (t, j)]``."""
        return [vh_matrix(self._kernel(p, group))]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The truncated SVD of the unfolding."""
        first, second, _ = vh_closed_form(self._kernel(p, group), ranks[0])
        if self.order == "vh":
            return Factors([first[:, :, :, None], second[:, :, None, :]])
        return Factors([first[:, :, None, :], second[:, :, :, None]])


@dataclass(frozen=True)
class FCSVD(_Matrix):
    """A linear layer as two: ``W = U S V^T`` cut off after R singular values.

    R (I + O) weights, full rank min(O, I) (Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting
    linear structure within convolutional networks for efficient evaluation", NIPS 2014).

    Attributes:
        metric: "cov" minimizes the error of the responses to calibration data.
    """

    name: ClassVar[str] = "fc_svd"

    @property
    def linear(self) -> bool:
        """Nothing else."""
        return True

    def check(self, p: LayerProblem) -> None:
        """Linear layers only."""
        if not p.linear:
            raise UnsupportedLayer(
                f"factorize: {p.name}: method 'fc_svd' is for linear layers; use channel_svd"
            )

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """min(O, I)."""
        return (min(p.T, p.S),)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """I -> R -> O."""
        return [Stage(p.S, ranks[0]), Stage(ranks[0], p.T)]

    def unfoldings(self, p: LayerProblem, group: int) -> list[Tensor]:
        """The matrix."""
        return [p.weight[group, :, :, 0, 0]]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The truncated SVD."""
        left, right = self._factors(p, ranks[0], group)
        return Factors([right[:, :, None, None], left[:, :, None, None]])


register_method("channel_svd", ChannelSVD)
register_method("vh", VH)
register_method("fc_svd", FCSVD)
