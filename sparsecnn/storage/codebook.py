r"""Weight sharing: the nonzero weights of a layer take few values, found by k-means and trained.

k = 2^bits centroids C minimize sum_i (w_i - C[I_i])^2 over the nonzero weights w_i; zeros stay
zeros and are no centroid. Training then moves the centroids only: with the assignment I frozen,
dL/dC_k = sum_{i: I_i = k} dL/dw_i.

Han, Mao, Dally, "Deep Compression", ICLR 2016, section 3. Their widths are 8 bits for convolutions
and 5 for linear layers of AlexNet; small layers need fewer, a codebook takes 4 * 2^bits bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

Init = Literal["linear", "forgy", "density"]
MAX_BITS = 8
_MAX_ROUNDS = 300  # Lloyd's iterations; from a linear grid a layer settles after some tens

_Floats = NDArray[np.float64]


def initial_centroids(
    values: _Floats, k: int, init: Init, generator: torch.Generator | None = None
) -> _Floats:
    """Where k-means starts, (k,) ascending.

    Args:
        values: (n,) ascending, with at least k different ones.
        k: centroids.
        init: "linear": even steps from the least to the greatest weight, which keeps the rare
            large ones; "density": even steps of the distribution function; "forgy": k different
            weights at random.
        generator: of "forgy"; None is seed 0.
    """
    if init == "linear":
        return np.linspace(values[0], values[-1], k)
    if init == "density":
        return np.quantile(values, (np.arange(k) + 0.5) / k)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    distinct = np.unique(values)
    return np.sort(distinct[torch.randperm(len(distinct), generator=generator)[:k].numpy()])


def lloyd(values: _Floats, centroids: _Floats) -> Iterator[tuple[_Floats, float]]:
    """Lloyd's iteration in one dimension; the sum of squares never grows.

    A cluster is a run of the sorted weights, so that a round is a search for k borders. An empty
    cluster is seeded anew at the weight that is farthest from its centroid.

    Args:
        values: (n,) ascending.
        centroids: (k,) ascending start.

    Yields:
        Centroids, (k,) ascending, and the sum of squares to them: of the start, then of every
        round, until nothing moves.

    Cost: O(n + k log n) per round.
    """
    for _ in range(_MAX_ROUNDS):
        owner = _nearest(values, centroids)
        error = (values - centroids[owner]) ** 2
        yield centroids, float(error.sum())
        sizes = np.bincount(owner, minlength=len(centroids))
        sums = np.bincount(owner, weights=values, minlength=len(centroids))
        moved = np.where(sizes > 0, sums / np.maximum(sizes, 1), centroids)
        for empty in np.flatnonzero(sizes == 0):
            far = int(error.argmax())
            moved[empty] = values[far]
            error[values == values[far]] = 0  # served: the next one seeds elsewhere
        moved.sort()
        if np.array_equal(moved, centroids):
            return
        centroids = moved


def _nearest(values: NDArray[np.floating], centroids: NDArray[np.floating]) -> NDArray[np.int64]:
    """Number of the nearest of ascending centroids; the lower one of two equally near."""
    borders = (centroids[1:] + centroids[:-1]) / 2
    nearest: NDArray[np.int64] = np.searchsorted(borders, values, side="left")
    return nearest


@dataclass(frozen=True, eq=False)
class Codebook:
    """The values that the nonzero weights of one layer share.

    Attributes:
        centroids: (k,) float32 on the CPU, ascending, none of them 0; k = 0 for a weight of zeros.
    """

    centroids: Tensor

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        bits: int,
        init: Init = "linear",
        generator: torch.Generator | None = None,
    ) -> Codebook:
        """Cluster the nonzero entries of a weight.

        A weight of at most 2^bits different values gets exactly these.

        Args:
            weight: float32, any shape and device; finite.
            bits: 1 to 8; k = 2^bits.
            init: see `initial_centroids`.
            generator: of "forgy"; None is seed 0.

        Raises:
            TypeError: weight is not float32.
            ValueError: bits or init unknown, or a weight that is not finite.

        Cost: O(n log n) and some tens of passes.
        """
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
            raise ValueError(
                f"Codebook.fit: expected bits an int from 1 to {MAX_BITS}, got {bits!r}"
            )
        if init not in get_args(Init):
            raise ValueError(
                f"Codebook.fit: expected init among {', '.join(get_args(Init))}, got {init!r}"
            )
        if weight.dtype != torch.float32:
            raise TypeError(f"Codebook.fit: expected a float32 weight, got {weight.dtype}")
        flat = weight.detach().cpu().reshape(-1).numpy()
        if not np.isfinite(flat).all():
            raise ValueError(
                "Codebook.fit: expected a finite weight, got "
                f"{int((~np.isfinite(flat)).sum())} infinite or NaN entries"
            )
        flat = np.sort(flat[flat != 0])
        distinct = np.unique(flat)
        if len(distinct) <= 2**bits:
            return cls(torch.from_numpy(distinct))
        values = flat.astype(np.float64)
        start = initial_centroids(values, 2**bits, init, generator)
        centroids, _ = deque(lloyd(values, start), maxlen=1).pop()
        rounded = centroids.astype(np.float32)
        for k in np.flatnonzero(rounded == 0):
            # A cluster around 0 must not turn weights into zeros: its smallest member stands in.
            own = distinct[_nearest(distinct, centroids) == k]
            rounded[k] = own[np.abs(own).argmin()] if own.size else np.finfo(np.float32).tiny
        return cls(torch.from_numpy(np.unique(rounded)))

    def assign(self, weight: Tensor) -> Tensor:
        """0 where the weight is 0, else 1 + the number of the nearest centroid.

        Returns:
            int16 of the weight's shape and device.
        """
        flat = weight.detach().cpu().numpy()
        labels = np.where(flat == 0, 0, _nearest(flat, self.centroids.numpy()) + 1)
        return torch.from_numpy(labels.astype(np.int16)).to(weight.device)

    def quantize(self, weight: Tensor) -> Tensor:
        """The weight with every nonzero entry replaced by its nearest centroid."""
        return _looked_up(self.centroids.to(weight.device), self.assign(weight))


def _looked_up(centroids: Tensor, labels: Tensor) -> Tensor:
    table = torch.cat([centroids.new_zeros(1), centroids])
    return table[labels.long()]


class SharedWeights(nn.Module):
    """Parametrization: the trained Parameter is the codebook, the weight looks its values up.

    Args:
        codebook: where the centroids start.
        weight: whose entries are assigned now, for good.
    """

    labels: Tensor

    def __init__(self, codebook: Codebook, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("labels", codebook.assign(weight))
        self._start = codebook.centroids

    def forward(self, centroids: Tensor) -> Tensor:
        """(k,) -> shape of W; the gradient of a centroid is the sum over its weights."""
        return _looked_up(centroids, self.labels)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook, which becomes the Parameter."""
        return self._start.to(weight.device)


def share_weights_(
    model: nn.Module,
    conv_bits: int = 8,
    linear_bits: int = 5,
    init: Init = "linear",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give every convolution and linear layer a codebook; training then moves centroids only.

    Build the optimizer afterwards: the Parameters of the weights are new ones. `bake_weights_`
    makes plain weights again.

    Args:
        model: changed in place.
        conv_bits: of `nn.Conv2d` layers.
        linear_bits: of `nn.Linear` layers.
        init: see `Codebook.fit`.
        generator: likewise.

    Returns:
        The model.

    Raises:
        ValueError: no such layer, layers with one weight, or one whose weight is parametrized
            (finalize the pruner first); see also `Codebook.fit`. Nothing has been changed then.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if not layers:
        raise ValueError(
            "share_weights_: expected model with convolutions or linear layers, got none in "
            f"{type(model).__name__}"
        )
    seen: set[int] = set()
    books = []
    for layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"share_weights_: expected plain weights, got a parametrized {layer}; finalize "
                "the pruner first"
            )
        if id(layer.weight) in seen:
            raise ValueError(
                f"share_weights_: expected a weight per layer, got one that {layer} shares"
            )
        seen.add(id(layer.weight))
        bits = conv_bits if isinstance(layer, nn.Conv2d) else linear_bits
        books.append(Codebook.fit(layer.weight, bits, init, generator))
    for layer, book in zip(layers, books, strict=True):
        # Unsafe only in that the Parameter has another shape than the weight.
        shared = SharedWeights(book, layer.weight)
        parametrize.register_parametrization(layer, "weight", shared, unsafe=True)
    return model


def bake_weights_(model: nn.Module) -> nn.Module:
    """Turn weights with codebooks into plain Parameters; others stay as they are.

    Returns:
        The model.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            chain = module.get_submodule("parametrizations.weight")
            if any(isinstance(part, SharedWeights) for part in chain.children()):
                weight = module.weight
                assert isinstance(weight, Tensor)
                plain = nn.Parameter(weight.detach().clone())
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                # In front of the bias, where the layer's constructor registers it.
                rest = {n: p for n, p in module._parameters.items() if n != "weight"}
                module._parameters.clear()
                module._parameters.update({"weight": plain, **rest})
    return model
