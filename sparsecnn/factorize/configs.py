"""Configs of ``factorize_`` as plain values, for TOML and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from .api import Factorize
from .arguments import Config
from .global_ranks import PCAEnergyGlobal
from .latency import Latency
from .method import METHODS, Method, method_of
from .ranks import Energy, Fixed, ParamRatio, Ratio, TargetSpeedup
from .variational import EVBMF

_DENSE = "dense"
# Sensitivity is not among them: it holds a function.
_POLICIES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        EVBMF, Energy, Fixed, Latency, PCAEnergyGlobal, ParamRatio, Ratio, TargetSpeedup,
    )
}  # fmt: skip


def config_to_dict(config: Config) -> dict[str, Any]:
    """A config as plain values for TOML or JSON; a layer that stays dense is "dense".

    Raises:
        TypeError: neither a `Factorize` nor a mapping to them.
        ValueError: a method that is not registered, or a policy that plain values cannot hold
            (`Sensitivity` has a function; policies of your own).
    """
    if isinstance(config, Factorize):
        return _entry_to_dict(config)
    if not isinstance(config, Mapping) or not all(
        entry is None or isinstance(entry, Factorize) for entry in config.values()
    ):
        raise TypeError(
            "config_to_dict: expected config a Factorize or a mapping of layer names to them, got "
            f"{config!r:.80}"
        )
    return {n: _DENSE if entry is None else _entry_to_dict(entry) for n, entry in config.items()}


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """Inverse of `config_to_dict`; JSON's null is accepted for "dense".

    A mapping whose values are "dense", null or mappings with a "method" is one of layers; otherwise
    it is the fields of one `Factorize`.

    Raises:
        TypeError: `data` is no mapping, or a value of the wrong type.
        ValueError: an unknown field, method or policy, or a value out of range.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"config_from_dict: expected a mapping, got {data!r:.80}")
    layered = all(
        entry is None or entry == _DENSE or (isinstance(entry, Mapping) and "method" in entry)
        for entry in data.values()
    )
    if data and layered:
        return {
            name: _entry_from_dict(entry) if isinstance(entry, Mapping) else None
            for name, entry in data.items()
        }
    return _entry_from_dict(data)


def _entry_to_dict(config: Factorize) -> dict[str, Any]:
    data = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    data["method"] = _method_to_value(config.method)
    data["rank"] = _rank_to_value(config.rank)
    return data


def _entry_from_dict(data: Mapping[str, Any]) -> Factorize:
    _check_fields("config_from_dict", data, Factorize)
    for name in ("method", "rank"):
        if name not in data:
            raise ValueError(f"config_from_dict: expected a {name}, got {sorted(data)}")
    options = dict(data)
    options["method"] = _method_of_value(data["method"])
    options["rank"] = _rank_of_value(data["rank"])
    return Factorize(**options)


def _options(found: object) -> dict[str, Any]:
    """The fields of a method or policy; tuples as lists, which is what files give back."""
    if not is_dataclass(found):
        return {}
    return {entry.name: _plain(getattr(found, entry.name)) for entry in fields(found)}


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return _method_to_value(value)
    return list(value) if isinstance(value, tuple) else value


def _method_to_value(method: str | Method) -> str | dict[str, Any]:
    if isinstance(method, str):
        return method
    if method.name not in METHODS or type(method_of(method.name)) is not type(method):
        raise ValueError(
            f"config_to_dict: expected method a registered one, got {method!r:.80}; "
            "register_method makes it known"
        )
    return {"name": method.name, **_options(method)}


def _method_of_value(value: object) -> str | Method:
    if not isinstance(value, Mapping):
        return _text(value)
    options = dict(value)
    method = method_of(_text(options.pop("name", None)))
    if isinstance(options.get("base"), Mapping):  # a method around another one
        options["base"] = _method_of_value(options["base"])
    _check_fields(method.name, options, type(method))
    return replace(method, **options) if options else method  # type: ignore[type-var]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"config_from_dict: expected method a name, got {value!r:.80}")
    return value


def _rank_to_value(rank: object) -> Any:
    if isinstance(rank, (int, tuple)):
        return _plain(rank)
    name = type(rank).__name__
    if _POLICIES.get(name) is not type(rank):
        raise ValueError(
            f"config_to_dict: expected rank one of {', '.join(_POLICIES)} or integers, got {name}"
        )
    return {"policy": name, **_options(rank)}


def _rank_of_value(value: object) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in value.items()}
    name = options.pop("policy", None)
    if name not in _POLICIES:
        raise ValueError(
            f"config_from_dict: expected policy one of {', '.join(_POLICIES)}, got {name!r:.80}"
        )
    _check_fields(str(name), options, _POLICIES[name])
    return _POLICIES[name](**options)


def _check_fields(what: str, given: Mapping[str, Any], kind: type[Any]) -> None:
    known = sorted(entry.name for entry in fields(kind)) if is_dataclass(kind) else []
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"{what}: expected fields {', '.join(known) or 'none'}, got {', '.join(unknown)}"
        )
