"""Ranks by measured time: MACs do not say how long a chain takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .api import NoGain
from .method import Method, chain_macs
from .problem import LayerProblem
from .ranks import check_number, ranks_at
from .timing import dense_layer, placeholder, random_input, time_layer

_RATIOS = 32
_cache: dict[object, tuple[int, ...] | str] = {}


@dataclass(frozen=True)
class Latency:
    """The largest ranks whose chain is measured to be faster by a factor.

    Candidates are common ratios to the full ranks, rounded down to multiples of `multiple_of`.
    Each is built with random numbers and timed on the layer's real batch, map, dtype and device, as
    one fused kernel and as its convolutions one after the other, interleaved with the layer, all in
    their better memory format. Layers of one shape are measured once per process and number of
    threads.

    Attributes:
        speedup: time of the layer over that of the chain, at least.
        multiple_of: vector lanes; ranks below it are tried as they are.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    speedup: float = 2.0
    multiple_of: int = 8

    def __post_init__(self) -> None:
        check_number("Latency", "speedup", self.speedup, 0)
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int):
            raise TypeError(
                "Latency: expected multiple_of an integer, got "
                f"{type(self.multiple_of).__name__}"
            )
        if self.multiple_of < 1:
            raise ValueError(f"Latency: expected multiple_of >= 1, got {self.multiple_of}")

    def select(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        """By bisection over the candidates.

        Raises:
            NoGain: even the smallest candidate is not faster by the factor; with the times.

        Cost: about five measurements of a quarter of a second.
        """
        key = (self, method, p.key(), torch.get_num_threads())
        if key not in _cache:
            try:
                _cache[key] = self._measured(p, method)
            except NoGain as error:
                _cache[key] = str(error)
        found = _cache[key]
        if isinstance(found, str):
            raise NoGain(found)
        return found

    def candidates(self, p: LayerProblem, method: Method) -> list[tuple[int, ...]]:
        """Ranks from small to large."""
        step = self.multiple_of
        found = {
            method.clamp(p, [r if r < step else r - r % step for r in ranks])
            for ranks in (ranks_at(p, method, i / _RATIOS) for i in range(_RATIOS + 1))
        }
        macs = {ranks: chain_macs(p, method.stages(p, ranks)) for ranks in found}
        return sorted((r for r in found if macs[r] < p.dense_macs), key=lambda r: (macs[r], r))

    def _measured(self, p: LayerProblem, method: Method) -> tuple[int, ...]:
        tried = self.candidates(p, method)
        if not tried:
            raise NoGain("no gain: no rank has fewer MACs than the layer")
        dense, x = dense_layer(p), random_input(p)
        low, high = -1, len(tried)
        said = ""
        while high - low > 1:
            # The smallest first: if it does not pay nothing does.
            middle = (low + high) // 2 if low >= 0 or high == 1 else 0
            times = time_layer(dense, placeholder(p, method, tried[middle]), x)
            name = min((n for n in times if n != "dense"), key=lambda n: times[n].median_s)
            if times[name].median_s * self.speedup <= times["dense"].median_s:
                low = middle
            else:
                high = middle
                said = (
                    f"ranks {tried[middle]} take {times[name].median_s * 1e6:.0f} us as {name}, "
                    f"the layer {times['dense'].median_s * 1e6:.0f} us"
                )
        if low < 0:
            raise NoGain(f"no gain: {said} (speedup {self.speedup:g} is asked for)")
        return tried[low]
