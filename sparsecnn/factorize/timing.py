"""How long a layer takes, as it is and as a chain, on inputs of its real shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn.measure import LatencyStats, time_interleaved
from sparsecnn.nn.factorized import FactorizedConv2d

from .assemble import assemble
from .method import Factors, Method
from .problem import LayerProblem

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BUDGET_S = 0.25
_GRAPH_CALLS = 20


def time_layer(
    dense: nn.Module, chain: nn.Module | None, x: Tensor, budget_s: float = BUDGET_S
) -> dict[str, LatencyStats]:
    """Times of a layer and its factorization, interleaved: each in its best memory format.

    Args:
        dense: the layer.
        chain: a `FactorizedConv2d` or `FactorizedLinear`; None to time the layer alone.
        x: an input of the layer.
        budget_s: for everything together.

    Returns:
        "dense", "convs" (the stages one after the other) and, where the kernel has a form for the
        stages, "chain" (all of them as one kernel); on CUDA the device's time per call.
    """
    fns: dict[str, Callable[[], object]] = {}
    for name, layer in (("dense", dense), ("convs", chain), ("chain", _fused(chain))):
        if layer is None:
            continue
        for layout in LAYOUTS if x.dim() == 4 else ["contiguous"]:
            placed = copy.deepcopy(layer).eval()
            if layer is not dense or x.dim() == 4:
                placed = placed.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
            data = x.contiguous(memory_format=LAYOUTS[layout])
            fns[f"{name} {layout}"] = lambda m=placed, d=data: m(d)  # type: ignore[misc]
    stats = time_interleaved(
        fns, warmup=3, runs=1000, max_time_s=budget_s, device=x.device, graph_calls=_GRAPH_CALLS
    )
    return _best(stats)


def _best(stats: Mapping[str, LatencyStats]) -> dict[str, LatencyStats]:
    best: dict[str, LatencyStats] = {}
    for key, value in stats.items():
        name = key.split()[0]
        if name not in best or value.median_s < best[name].median_s:
            best[name] = value
    return best


def _fused(chain: nn.Module | None) -> nn.Module | None:
    if not isinstance(chain, FactorizedConv2d):
        return None
    try:
        return chain.to_chain()
    except (NotImplementedError, ValueError, TypeError):
        return None  # grouped stages, a permutation, padding that is not zeros, a dtype


def placeholder(p: LayerProblem, method: Method, ranks: tuple[int, ...]) -> nn.Module:
    """A factorization with random numbers: it takes as long as the real one, and none to solve.

    Channels are reordered wherever the method may do so: a copy each.
    """
    source = torch.Generator().manual_seed(p.seed)
    stages = method.stages(p, ranks)
    widths = [stages[0].c_in, *(stage.c_out for stage in stages)]
    factors = [
        Factors(
            [
                torch.randn(s.c_out, s.c_in // s.groups, *s.kernel, generator=source).double()
                / (s.c_in // s.groups * s.kernel[0] * s.kernel[1]) ** 0.5
                for s in stages
            ],
            {i: torch.randperm(widths[i], generator=source) for i in method.permuted},
        )
        for _ in range(p.groups)
    ]
    return assemble(p, method, ranks, factors, torch.empty(0, dtype=p.dtype, device=p.device))


def dense_layer(p: LayerProblem) -> nn.Module:
    """The layer of a problem."""
    options: dict[str, Any] = {"device": p.device, "dtype": p.dtype}
    weight = p.weight.to(p.device, p.dtype).flatten(0, 1)
    layer: nn.Module
    if p.linear:
        layer = nn.Linear(p.S, p.T, p.bias is not None, **options)
        weight = weight.flatten(1)
    else:
        mode: Any = p.padding_mode
        layer = nn.Conv2d(
            p.groups * p.S, p.groups * p.T, (p.kh, p.kw), p.stride, p.padding, p.dilation,
            p.groups, p.bias is not None, mode, **options,
        )  # fmt: skip
    layer.weight = nn.Parameter(weight.contiguous())
    return layer


def random_input(p: LayerProblem) -> Tensor:
    """An input of the layer's real shape."""
    shape = (p.batch, p.groups * p.S) if p.linear else (p.batch, p.groups * p.S, *p.in_hw)
    source = torch.Generator().manual_seed(p.seed)
    return torch.randn(shape, generator=source).to(p.device, p.dtype)
