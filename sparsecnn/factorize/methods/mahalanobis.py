"""Any method on the weights, in the metric of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..method import Factors, Method, Stage, method_of, register_method
from ..problem import LayerProblem, UnsupportedLayer

# Of the root mean square of all slices. A slice without a gradient is approximated last, but it is:
# its weights come back divided by this.
_FLOOR = 1e-2


@dataclass(frozen=True)
class Mahalanobis(Method):
    r"""Another method, where an error counts by what the loss makes of it.

        min ||alpha * (W - W_hat)||,    alpha_p = sqrt(mean_n (dl_n / dW_p)^2)

    Entry by entry the product with alpha would leave no low rank, so alpha is taken for one factor
    per filter times one per channel: ``alpha[t, s, i, j] ~ a[t] b[s]``, a^2 and b^2 in proportion
    to the means of alpha^2 over the other indices, which is exact where alpha^2 is such a product.
    The base method factorizes a[t] b[s] W[t, s], and its last stage is divided by a, its first one
    by b. Chain, ranks and MACs are those of the base.

    Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting linear structure within convolutional
    networks for efficient evaluation", NIPS 2014, section 3.1.

    Measure before relying on it: a sum of squares of single changes knows nothing of how errors of
    many weights add up. On 32-64-64 networks that fit their 8x8 digits, ``||alpha (W - W_hat)||``
    fell by 3 to 9 %, while the loss before fine-tuning, with batch norms as they were, mostly rose,
    at a quarter of the MACs from 0.43 to 0.70 (`ChannelSVD`) and from 0.16 to 0.24 (`VH`) on one of
    three seeds.

    Attributes:
        base: name or method, on weights and without a fixed basis.

    Raises:
        TypeError: base neither a name nor a method.
        ValueError: an unknown base, or one that works on data or gradients itself.
    """

    base: str | Method = "channel_svd"
    name: ClassVar[str] = "mahalanobis"

    def __post_init__(self) -> None:
        base = self.base_method
        if base.needs_data or base.needs_gradients:
            raise ValueError(
                f"Mahalanobis: expected base a method on the weights alone, got {str(base)!r}"
            )

    def __str__(self) -> str:
        """With the base's name."""
        return f"{self.base_method}, {self.name}"

    @property
    def base_method(self) -> Method:
        """The base as a method."""
        return method_of(self.base)

    @property
    def linear(self) -> bool:
        """That of the base."""
        return self.base_method.linear

    @property
    def permuted(self) -> tuple[int, ...]:
        """Those of the base."""
        return self.base_method.permuted

    @property
    def needs_gradients(self) -> bool:
        """They are the metric."""
        return True

    def check(self, p: LayerProblem) -> None:
        """What the base refuses, and a basis at either end that is not to be changed."""
        self.base_method.check(p)
        stages = self.base_method.stages(p, self.base_method.full_ranks(p))
        if stages[0].fixed or stages[-1].fixed:
            raise UnsupportedLayer(
                f"factorize: {p.name}: method 'mahalanobis' expects a base without a fixed basis, "
                f"got {str(self.base_method)!r}"
            )

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """Those of the base."""
        return self.base_method.full_ranks(p)

    def clamp(self, p: LayerProblem, ranks: Sequence[int]) -> tuple[int, ...]:
        """That of the base."""
        return self.base_method.clamp(p, ranks)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Those of the base."""
        return self.base_method.stages(p, ranks)

    def unfoldings(self, p: LayerProblem, group: int) -> list[Tensor]:
        """Of the weighted kernel."""
        return self.base_method.unfoldings(_weighted(p)[0], group)

    def spectra(self, p: LayerProblem) -> list[Tensor]:
        """Of the weighted kernel."""
        return self.base_method.spectra(_weighted(p)[0])

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The base's solution for the weighted kernel, without the weights."""
        weighted, of_filters, of_channels = _weighted(p)
        found = self.base_method.solve(weighted, ranks, group)
        first, last = self.stages(p, ranks)[0], len(found.weights)
        inputs, outputs = of_channels[group], of_filters[group]
        # Behind permutation `index` channel i is channel index[i] of before.
        if 0 in found.permutations:
            inputs = inputs[found.permutations[0]]
        if last in found.permutations:
            outputs = outputs[found.permutations[last].argsort()]
        columns = inputs.reshape(first.groups, -1)
        columns = columns.repeat_interleave(first.c_out // first.groups, 0)
        weights = list(found.weights)
        weights[0] = weights[0] / columns[:, :, None, None]
        weights[-1] = weights[-1] / outputs[:, None, None, None]
        return replace(found, weights=weights)


def _weighted(p: LayerProblem) -> tuple[LayerProblem, Tensor, Tensor]:
    """The problem of a[t] b[s] W[t, s], a (G, T) and b (G, S)."""
    assert p.gradients is not None
    squares = p.gradients.square()
    of_filters, of_channels = (_scales(squares.mean(dims)) for dims in ((2, 3, 4), (1, 3, 4)))
    scales = of_filters[:, :, None] * of_channels[:, None, :]
    weighted = replace(p, weight=p.weight * scales[:, :, :, None, None], gradients=None)
    return weighted, of_filters, of_channels


def _scales(squares: Tensor) -> Tensor:
    """Roots with a root mean square of 1 over all groups, none close to 0."""
    mean = squares.mean()
    if not float(mean) > 0:  # the loss minds nothing: all alike
        return torch.ones_like(squares)
    return (squares / mean).sqrt().clamp(min=_FLOOR)


register_method("mahalanobis", Mahalanobis)
