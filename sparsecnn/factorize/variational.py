"""Ranks without a budget, and the compression of whole networks with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import Factorize
from .method import Method
from .methods.svd import ChannelSVD
from .problem import LayerProblem
from .solvers.vbmf import evbmf_spectrum
from .survey import survey

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EVBMF:
    """The rank at which what is left of a weight is noise.

    Empirical variational Bayes matrix factorization of the method's unfoldings, by its global
    analytic solution (Nakajima, Sugiyama, Babacan, Tomioka, JMLR 14, 2013); of several conv groups
    the greatest. A weight that is noise altogether has rank 0 and gets 1, with a warning.
    """

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """From the singular values of the unfoldings.

        Raises:
            UnsupportedLayer: the method has no unfoldings.

        Cost: an eigenproblem of the smaller side of each unfolding.
        """
        groups = [
            [evbmf_spectrum(_singular(m), (m.shape[0], m.shape[1])).rank for m in unfolded]
            for unfolded in (method.unfoldings(p, group) for group in range(p.groups))
        ]
        ranks = tuple(max(of_groups) for of_groups in zip(*groups, strict=True))
        if not all(ranks):
            _log.warning("EVBMF: %s: nothing but noise, ranks %s; 1 is taken for 0", p.name, ranks)
        return tuple(max(1, rank) for rank in ranks)


def _singular(matrix: Tensor) -> Tensor:
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values: Tensor = torch.linalg.eigvalsh(small @ small.T).clamp(min=0).sqrt()
    return values


def kim(
    model: nn.Module, example_inputs: Tensor | Sequence[Any], **options: Any
) -> dict[str, Factorize]:
    """The config of one-shot whole network compression, for `factorize_`.

    Ranks by `EVBMF`. The first convolution becomes fewer filters and 1x1 (Tucker-1), every other
    one Tucker-2, linear layers two by SVD; the paper takes the first linear layer for a convolution
    over the whole map, here it is a matrix like the others. Fine-tune once, afterwards (Kim, Park,
    Yoo, Choi, Yang, Shin, "Compression of deep convolutional neural networks for fast and low power
    mobile applications", ICLR 2016).

    Args:
        model: the network.
        example_inputs: give the order of the layers.
        options: of every `Factorize`.
    """
    config: dict[str, Factorize] = {}
    for site in survey(model, example_inputs):
        if site.obstacle:
            continue
        if isinstance(site.module, nn.Linear):
            config[site.name] = Factorize("fc_svd", EVBMF(), **options)
        elif type(site.module) is nn.Conv2d:
            method = "tucker2" if any(c.method != "fc_svd" for c in config.values()) else None
            config[site.name] = Factorize(method or ChannelSVD(), EVBMF(), **options)
    return config
