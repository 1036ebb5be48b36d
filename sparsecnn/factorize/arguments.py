"""The arguments of ``factorize_``: checks, and which layer gets which config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from sparsecnn._models import match_names

from .api import Factorize
from .method import method_of
from .ranks import GlobalPolicy
from .survey import Site

DEFAULT = "_default"
Order = Literal["one_shot", "layerwise"]
Config = Factorize | Mapping[str, Factorize | None]
FilterFn = Callable[[nn.Module, str], bool]


def check_arguments(
    model: object,
    config: object,
    calib: object,
    order: object,
    reconstruct: object,
    finetune: object,
    gradients: object,
) -> None:
    """Refuse arguments of `factorize_` of the wrong type or value."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"factorize_: expected model an nn.Module, got {type(model).__name__}")
    entries = config.values() if isinstance(config, Mapping) else [config]
    for entry in entries:
        if not isinstance(entry, Factorize) and not (
            entry is None and isinstance(config, Mapping)
        ):
            raise TypeError(
                "factorize_: expected config a Factorize or a mapping of layer names to them, got "
                f"{entry!r:.80}"
            )
    if order not in get_args(Order):
        raise ValueError(f"factorize_: expected order one_shot or layerwise, got {order!r}")
    if isinstance(reconstruct, bool) or not isinstance(reconstruct, int) or reconstruct < 0:
        raise ValueError(
            f"factorize_: expected reconstruct an integer >= 0, got {reconstruct!r}"
        )
    if reconstruct and calib is None:
        raise ValueError("factorize_: expected calib for reconstruct, got None")
    if calib is not None and (isinstance(calib, Tensor) or not isinstance(calib, Iterable)):
        raise TypeError(
            f"factorize_: expected calib batches of inputs, got {type(calib).__name__}; put a "
            "tensor in a list"
        )
    if finetune is not None and not callable(finetune):
        raise TypeError(
            f"factorize_: expected finetune a function, got {type(finetune).__name__}"
        )
    if gradients is not None and not isinstance(gradients, Mapping):
        raise TypeError(
            "factorize_: expected gradients a mapping of layer names to tensors, got "
            f"{type(gradients).__name__}"
        )


def named(config: Config) -> frozenset[str]:
    """The keys of a mapping that ask for a factorization."""
    if isinstance(config, Factorize):
        return frozenset()
    return frozenset(name for name, entry in config.items() if entry is not None)


def needs_data(config: Factorize) -> bool:
    """Whether the method or the rank policy works on calibration data."""
    policy = config.rank
    of_ranks = isinstance(policy, GlobalPolicy) and policy.needs_data
    return method_of(config.method).needs_data or of_ranks


def check_data(
    chosen: Mapping[str, Factorize], calib: object, gradients: Mapping[str, Tensor] | None
) -> None:
    """Refuse configs that work on what is not given."""
    if calib is None and any(needs_data(entry) for entry in chosen.values()):
        raise ValueError(
            "factorize_: expected calib for a method that works on responses, got None; pass "
            "batches of inputs"
        )
    for name, entry in chosen.items():
        if method_of(entry.method).needs_gradients and name not in (gradients or {}):
            raise ValueError(
                f"factorize_: expected gradients of {name!r} for a method that works on them, got "
                "none; pass those of collect_gradients"
            )


def assign(
    sites: Sequence[Site], config: Config, filter_fn: FilterFn | None
) -> dict[str, Factorize]:
    """Name of each addressed layer to its config, in the order of the calls."""
    if isinstance(config, Factorize):
        config = {DEFAULT: config}
    names = {alias: site for site in sites for alias in site.names}
    exact: dict[str, Factorize | None] = {}
    matched: dict[str, Factorize | None] = {}
    for pattern, entry in config.items():
        if pattern == DEFAULT:
            continue
        table = matched if pattern.startswith("re:") else exact
        for alias in match_names(pattern, names, "factorize_: config", "a layer"):
            name = names[alias].name
            if name in table and table[name] != entry:
                raise ValueError(
                    f"factorize_: expected one config for layer {name!r}, got different ones; "
                    "name the layer"
                )
            table[name] = entry
    default = config.get(DEFAULT)
    chosen = {}
    for site in sites:
        linear = isinstance(site.module, nn.Linear)
        fits = default is not None and linear == method_of(default.method).linear
        fallback = default if fits else None
        entry = exact.get(site.name, matched.get(site.name, fallback))
        if entry is not None and (filter_fn is None or filter_fn(site.module, site.name)):
            chosen[site.name] = entry
    if not chosen:
        raise ValueError(
            "factorize_: expected config and filter_fn to leave at least one layer, got none of "
            f"{len(sites)}"
        )
    return chosen
