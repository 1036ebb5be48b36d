"""Runs of dense convolutions as one fused kernel each, where that measured faster than apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..measure import LatencyStats
from ..nn import ChainConv2d
from .choice import Settings, quiet, random_inputs, surely_faster, time_layers, unclear
from .copy import LAYOUTS
from .fold import rounding
from .kernels import DTYPES, build_dense
from .precision import strict_float
from .survey import Site

# Stage kinds: P pointwise, D depthwise, V one row or one column of taps, K any other dense
# convolution. What a fused run can win from: the intermediate is large and little is computed
# from it, or what the run multiplies is small.
FORMS = re.compile("DP|KDP|KD|PD|PDP|PDDP|VV|PVVP|PKP|KP")
LONGEST = 4
CHAIN_BUDGET_S = 1.5


@dataclass(eq=False)
class Chain:
    """Consecutive layers that one `ChainConv2d` may replace.

    Attributes:
        sites: the layers, in order.
        wins: layouts in which it measured faster than the layers apart.
        times: "chain <layout>" and "apart <layout>" -> statistics.
        refused: why it cannot be built, or computes something else; empty where it can.
    """

    sites: tuple[Site, ...]
    wins: frozenset[str] = frozenset()
    times: dict[str, LatencyStats] = field(default_factory=dict)
    refused: str = ""

    def build(self, activation: str | None = None) -> nn.Module:
        """The fused layer; `activation` overrides the last one."""
        layers = [site.layer for site in self.sites if site.layer is not None]
        activations = [layer.activation for layer in layers]
        if activation is not None:
            activations[-1] = activation
        convs = [layer.module for layer in layers if isinstance(layer.module, nn.Conv2d)]
        fused: nn.Module = ChainConv2d.from_convs(convs, activations)
        return fused

    def gain(self, layout: str) -> float:
        """Seconds a forward pass saves."""
        return self.times[f"apart {layout}"].median_s - self.times[f"chain {layout}"].median_s


def form_of(sites: Sequence[Site]) -> str:
    """One letter for each layer; "?" for a layer no chain can hold."""
    text = ""
    for site in sites:
        conv = None if site.layer is None else site.layer.module
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
            text += "?"
        elif conv.weight.dtype not in DTYPES.get(conv.weight.device.type, ()):
            text += "?"
        elif conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1:
            text += "D"
        elif conv.groups != 1:
            text += "?"
        elif tuple(conv.kernel_size) == (1, 1):
            text += "P"
        else:
            text += "V" if 1 in conv.kernel_size else "K"
    return text


def candidates(run: Sequence[Site]) -> Iterator[Chain]:
    """Every part of a run that has one of the `FORMS`."""
    form = form_of(run)
    for first in range(len(run)):
        for end in range(first + 2, min(first + LONGEST, len(run)) + 1):
            if FORMS.fullmatch(form[first:end]):
                yield Chain(tuple(run[first:end]))


def choose_chains(
    runs: Sequence[Sequence[Site]],
    settings: Settings,
    step: Callable[[str], None],
) -> list[Chain]:
    """Time every candidate against its layers apart, in both layouts, each with its best kernel.

    The addition at the end of a residual block is in neither time.

    Args:
        runs: of measured layers.
        settings: how to measure.
        step: called when done.

    Returns:
        Those that won somewhere; parts of one run may overlap, see `pick`.
    """
    cache: dict[object, Chain] = {}
    found = []
    for run in runs:
        for chain in candidates(run):
            key = tuple(site.layer.key() for site in chain.sites if site.layer is not None)
            if key not in cache:
                cache[key] = _measure(chain, settings)
            chain.times, chain.wins = cache[key].times, cache[key].wins
            chain.refused = cache[key].refused
            if chain.wins and chain is not cache[key]:
                chain.refused = _disagreement(chain)
            if chain.wins and not chain.refused:
                found.append(chain)
    step("chains")
    return found


def pick(chains: Sequence[Chain], layout: str) -> frozenset[Chain]:
    """Chains without a common layer: the one that saves most first, of equals the longest."""
    taken: set[Site] = set()
    kept = []
    for chain in sorted(
        (c for c in chains if layout in c.wins), key=lambda c: (-c.gain(layout), -len(c.sites))
    ):
        if not taken & set(chain.sites):
            kept.append(chain)
            taken |= set(chain.sites)
    return frozenset(kept)


def _measure(chain: Chain, settings: Settings) -> Chain:
    why = _disagreement(chain)
    if why:
        chain.refused = why
        return chain
    first = chain.sites[0].layer
    assert first is not None
    fns: dict[str, Callable[[], object]] = {}
    fused = quiet(chain.build())
    for layout in first.layouts:
        x = random_inputs(first, layout)[0]
        apart = nn.Sequential(*(_best(site, layout) for site in chain.sites)).eval()
        fns[f"apart {layout}"] = lambda m=apart, x=x: m(x)  # type: ignore[misc]
        fns[f"chain {layout}"] = lambda x=x: fused(x)  # type: ignore[misc]
    for effort in (1, 4):
        device = first.module.weight.device
        chain.times = time_layers(fns, settings, CHAIN_BUDGET_S, device, effort)
        pairs = [
            (chain.times[f"chain {layout}"], chain.times[f"apart {layout}"])
            for layout in LAYOUTS
            if f"chain {layout}" in chain.times
        ]
        if not any(unclear(new, old, settings.tie_margin) for new, old in pairs):
            break
    chain.wins = frozenset(
        layout
        for layout in first.layouts
        if surely_faster(
            chain.times[f"chain {layout}"], chain.times[f"apart {layout}"], settings.tie_margin
        )
    )
    return chain


def _best(site: Site, layout: str) -> nn.Module:
    assert site.choice is not None and site.layer is not None
    kernel = site.choice.kernel_in(layout)
    if kernel == "dense":
        return quiet(build_dense(site.layer, layout))
    return quiet(site.built[kernel].module)


@torch.no_grad()
@strict_float()
def _disagreement(chain: Chain) -> str:
    """Why the chain must not be used: it cannot be built, or is not what its layers compute."""
    try:
        fused = quiet(chain.build())
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    first = chain.sites[0].layer
    assert first is not None
    x = random_inputs(first, "contiguous")[0][:1]
    want = x
    growth = 0.0
    for site in chain.sites:
        assert site.layer is not None and isinstance(site.layer.module, nn.Conv2d)
        want = quiet(build_dense(site.layer, "contiguous"))(want)
        growth += rounding(site.layer.module)
    got = fused(x)
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"returned {tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)}"
    worst = float((got - want).abs().max())
    # Roundings of every stage, relative to the size of what the last one returns: the magnitudes
    # of the terms inside are not known here, and on random data of the same order.
    if worst <= 2 * growth * max(float(want.abs().max()), 1e-30):
        return ""
    return f"differs by {worst:.3g} from its layers on random data"
