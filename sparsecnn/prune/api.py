"""Prune in one call: `prune_` in place, `prune` on a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsecnn._models import refuse_sparse_layers

from .budget import Budget
from .importance import PruneConfig
from .mask import fold_foreign_mask, living, zero_dead_
from .parts import choose_budget, choose_granularity
from .protocols import Calibration
from .selection import TopK, plan_masks
from .targets import FilterFn, Target, candidate_targets, check_maskable, find_classifier, match

Config = PruneConfig | Mapping[str, PruneConfig | None]
DEFAULT = "_default"
# TOML has no null; a layer that stays dense is written as this word.
_KEEP_DENSE = "dense"


def prune_(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None = None,
    *,
    include_classifier: bool = False,
    example_inputs: Tensor | Sequence[Any] | None = None,
    calibration: Calibration | None = None,
    keep_zeros: bool = False,
) -> nn.Module:
    r"""Zero the least important weights of `model`, once, in place.

    ```python
    prune_(model, Magnitude(sparsity=0.9))
    prune_(model, {"conv1": None, r"re:layer4\..*": Magnitude(sparsity=0.95),
                   "_default": Magnitude(sparsity=0.8)})
    ```

    The zeros are in the plain weights, no mask stays behind; training would revive them, use
    `Pruner` for that. The Parameters stay the same objects.

    Args:
        model: any module with `nn.Conv2d` or `nn.Linear` layers.
        config: one importance with a budget for all layers except the classifier (see
            `find_targets`), or a mapping from layer names, "re:<regular expression>" (matched in
            full) and "_default" to importances or None (stays dense). A name beats expressions,
            these beat "_default"; layers that nothing addresses stay dense. Layers with equal
            configs share one pool under scope "global". A name or expression reaches the
            classifier too.
        filter_fn: `filter_fn(module, name)` returns False for layers to leave out.
        include_classifier: let "_default" and a single config reach the classifier.
        example_inputs: finds the classifier by call order, see `find_targets`.
        calibration: collects what an importance lists in `needs`.
        keep_zeros: count entries that are zero now as dropped first, whatever their score.
            Masks of torch.nn.utils.prune count in any case; they are folded into zeros.

    Returns:
        `model`.

    Raises:
        TypeError: `config` or `model` of the wrong type.
        ValueError: no budget, an unknown layer name, two expressions that disagree about a layer,
            nothing to prune, a layer already swapped by sparsecnn, NaN weights. The model is
            unchanged then.
    """
    refuse_sparse_layers(model, "prune_")
    chosen = resolve(model, config, filter_fn, include_classifier, example_inputs)
    masks: dict[Target, Tensor] = {}
    groups: dict[PruneConfig, list[Target]] = {}
    for target, layer_config in chosen.items():
        check_maskable(target, "prune_")
        groups.setdefault(layer_config, []).append(target)
    needs = frozenset().union(*(c.needs for c in groups))
    if needs and calibration is None:
        raise ValueError(
            f"prune_: expected calibration to collect {', '.join(sorted(needs))}, got None"
        )
    budgets = {c: _budget(c) for c in groups}
    shapes = {c: choose_granularity(None, c) for c in groups}
    selectors = {c: TopK("layer" if c.scope is None else c.scope) for c in groups}
    for c, targets in groups.items():
        selectors[c].check(targets, shapes[c], budgets[c])
    stats = None
    if needs and calibration is not None:
        stats = calibration.collect(model, list(chosen), frozenset(needs))
    # All masks before the first write: an error in the last layer leaves the first one whole.
    for c, targets in groups.items():
        current = {t: living(t, keep_zeros) for t in targets}
        _, planned = plan_masks(targets, shapes[c], budgets[c], c, selectors[c], stats, current)
        masks.update(planned)
    for target, mask in masks.items():
        fold_foreign_mask(target)
        zero_dead_(target.dense, mask.to(target.dense.device))
    return model


def prune(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None = None,
    *,
    include_classifier: bool = False,
    example_inputs: Tensor | Sequence[Any] | None = None,
    calibration: Calibration | None = None,
    keep_zeros: bool = False,
) -> nn.Module:
    """The copying twin of `prune_`: `model` keeps its weights, a pruned deep copy is returned."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune: expected model to be a torch.nn.Module, got {model!r:.80}")
    return prune_(
        _copy(model),
        config,
        filter_fn,
        include_classifier=include_classifier,
        example_inputs=example_inputs,
        calibration=calibration,
        keep_zeros=keep_zeros,
    )


def _copy(model: nn.Module) -> nn.Module:
    """Deep copy that also works with masks of torch.nn.utils.prune attached.

    Those leave the masked weight behind as a tensor with a graph, which `deepcopy` refuses. The
    copies get it without a graph; the next forward pass computes it anew in any case.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in list(module._parameters):
            stale = module.__dict__.get(name.removesuffix("_orig"))
            if name.endswith("_orig") and isinstance(stale, Tensor):
                memo[id(stale)] = stale.detach().clone()
    return copy.deepcopy(model, memo)


def config_to_dict(config: Config) -> dict[str, Any]:
    """A config as plain values for TOML or JSON; a layer that stays dense is "dense"."""
    if isinstance(config, PruneConfig):
        return config.to_dict()
    _check_mapping(config)
    return {
        name: _KEEP_DENSE if entry is None else entry.to_dict() for name, entry in config.items()
    }


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """Inverse of `config_to_dict`; JSON's null is accepted for "dense".

    A mapping whose values are mappings, "dense" or null is one of layers; otherwise it is the
    fields of one importance.

    Raises:
        TypeError: `data` is no mapping.
        ValueError: an unknown importance or field.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"config_from_dict: expected a mapping, got {data!r}")
    layered = all(
        entry is None or entry == _KEEP_DENSE or isinstance(entry, Mapping)
        for entry in data.values()
    )
    if data and layered:
        return {
            name: PruneConfig.from_dict(dict(entry)) if isinstance(entry, Mapping) else None
            for name, entry in data.items()
        }
    return PruneConfig.from_dict(dict(data))


def _check_mapping(config: object) -> None:
    if not isinstance(config, Mapping):
        raise TypeError(
            "prune_: expected config to be an importance such as Magnitude(sparsity=0.9) or a "
            f"mapping of layer names to them, got {config!r:.80}"
        )
    for name, entry in config.items():
        if entry is not None and not isinstance(entry, PruneConfig):
            raise TypeError(
                f"prune_: expected config[{name!r}] to be an importance or None, got {entry!r:.80}"
            )


def resolve(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None,
    include_classifier: bool,
    example_inputs: Tensor | Sequence[Any] | None,
) -> dict[Target, PruneConfig]:
    """Which config each weight gets, in registration order; dense layers left out.

    Args:
        model: as in `prune_`, like everything else here.
        config: one config or a mapping.
        filter_fn: leaves layers out.
        include_classifier: let "_default" and a single config reach the classifier.
        example_inputs: finds the classifier by call order.

    Raises:
        TypeError: `config` or `model` of the wrong type.
        ValueError: an unknown name, expressions that disagree, or no layer left.
    """
    if isinstance(config, PruneConfig):
        config = {DEFAULT: config}
    _check_mapping(config)
    candidates = candidate_targets(model)
    exact: dict[Target, tuple[str, PruneConfig | None]] = {}
    matched: dict[Target, tuple[str, PruneConfig | None]] = {}
    for pattern, entry in config.items():
        if pattern == DEFAULT:
            continue
        table = matched if isinstance(pattern, str) and pattern.startswith("re:") else exact
        for target in match(pattern, candidates, "prune_: config"):
            earlier = table.get(target)
            # The order of a mapping must not decide: files are sorted and merged by other tools.
            if earlier is not None and earlier[1] != entry:
                raise ValueError(
                    f"prune_: expected one config for layer {target.name!r}, got different ones "
                    f"from {earlier[0]!r} and {pattern!r}; name the layer"
                )
            table[target] = (pattern, entry)
    classifier = None
    if not include_classifier and config.get(DEFAULT) is not None:
        classifier = find_classifier(model, candidates, example_inputs)
    chosen: dict[Target, PruneConfig] = {}
    for target in candidates:
        if target in exact:
            entry = exact[target][1]
        elif target in matched:
            entry = matched[target][1]
        else:
            entry = None if target is classifier else config.get(DEFAULT)
        if entry is None or (filter_fn is not None and not filter_fn(target.module, target.name)):
            continue
        chosen[target] = entry
    if not chosen:
        raise ValueError(
            f"prune_: expected config and filter_fn to leave at least one layer, got none of "
            f"{len(candidates)}"
        )
    return chosen


def _budget(config: PruneConfig) -> Budget:
    budget = choose_budget(None, config, choose_granularity(None, config))
    if budget is None:
        name = type(config).__name__
        raise ValueError(
            f"{name}: expected one of sparsity, density or count, got none; e.g. "
            f"{name}(sparsity=0.9)"
        )
    return budget
