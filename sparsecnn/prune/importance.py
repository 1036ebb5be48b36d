"""What a weight is worth: scores, higher = keep.

An importance is also the config of `prune_`: a frozen dataclass that carries, besides its own
options, how much to prune (`sparsity`, `density` or `count`), in what units (`granularity`) and
over what (`scope`). A new one is one decorated function, see
`register_importance`.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields, make_dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from .budget import Budget
from .granularity import Axes, Block, Strided, parse
from .protocols import Granularity, Stats
from .targets import Target

Scope = Literal["layer", "global"]
SCOPES = ("layer", "global")
_REGISTRY: dict[str, type[PruneConfig]] = {}


@dataclass(frozen=True)
class PruneConfig:
    """Base of all importances: the fields every one of them carries.

    Attributes:
        sparsity: share of zeros in [0, 1].
        density: 1 - sparsity.
        count: groups to keep.
        granularity: a granularity or its name; None means "element".
        scope: "layer" gives every layer the budget, "global" lets all layers with this config
            compete for one; None means "layer".

    Raises:
        TypeError: a field of the wrong type.
        ValueError: more than one of sparsity, density and count, or a value out of range.
    """

    reduction: ClassVar[str] = "mean"

    sparsity: float | None = field(default=None, kw_only=True)
    density: float | None = field(default=None, kw_only=True)
    count: int | None = field(default=None, kw_only=True)
    granularity: str | Axes | Block | Strided | None = field(default=None, kw_only=True)
    scope: Scope | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.budget()
        if self.granularity is not None:
            object.__setattr__(self, "granularity", parse(self.granularity))
        if self.scope is not None and self.scope not in SCOPES:
            raise ValueError(
                f"{type(self).__name__}: expected scope 'layer' or 'global', got {self.scope!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What `stats` must hold for `score`; may depend on the options."""
        return frozenset()

    def budget(self) -> Budget | None:
        """The budget in the fields, None if there is none."""
        if self.sparsity is None and self.density is None and self.count is None:
            return None
        return Budget(self.sparsity, self.density, self.count)

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """Scores shaped like W or (n_groups,)."""
        raise NotImplementedError(f"{type(self).__name__}: expected a score method, got none")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that TOML and JSON can hold; fields that are None are left out."""
        data: dict[str, Any] = {"importance": type(self).__name__}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                data[entry.name] = str(value) if entry.name == "granularity" else value
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PruneConfig:
        """Inverse of `to_dict`; "importance" names a registered class, Magnitude by default.

        Raises:
            TypeError: `data` is not a dict.
            ValueError: an unknown importance or field.
        """
        if not isinstance(data, dict):
            raise TypeError(f"from_dict: expected a dict of fields, got {data!r}")
        options = dict(data)
        name = options.pop("importance", "Magnitude")
        if name not in _REGISTRY:
            known = ", ".join(sorted(_REGISTRY))
            raise ValueError(f"from_dict: expected importance to be one of {known}, got {name!r}")
        kind = _REGISTRY[name]
        known_fields = {entry.name for entry in fields(kind)}
        unknown = sorted(set(options) - known_fields)
        if unknown:
            raise ValueError(
                f"{name}: expected fields {', '.join(sorted(known_fields))}, got "
                f"{', '.join(unknown)}"
            )
        return kind(**options)


C = TypeVar("C", bound=type[PruneConfig])


def register(kind: C) -> C:
    """Make a config class known to `from_dict` under its name.

    Raises:
        ValueError: another class has the name. Defining the same one again (a notebook cell run
            twice) replaces it.
    """
    other = _REGISTRY.get(kind.__name__)
    if other is not None and _origin(other) != _origin(kind):
        raise ValueError(
            f"register_importance: expected a new name, got {kind.__name__!r}, taken by "
            f"{'.'.join(_origin(other))}"
        )
    _REGISTRY[kind.__name__] = kind
    return kind


def _origin(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


@register
@dataclass(frozen=True)
class Magnitude(PruneConfig):
    """Score |w|^p, for a group the mean over its entries.

    Within a layer this ranks filters as their Lp norm does (p = 1: Li et al., "Pruning Filters
    for Efficient ConvNets", ICLR 2017); the mean instead of the sum keeps groups of different
    size comparable under a global scope. For single entries every p gives the same masks
    (Han et al., "Learning both Weights and Connections", NIPS 2015).

    Attributes:
        p: exponent, in (0, inf).
        normalize: "layer" divides by the layer's mean score, so that under a global scope layers
            with small weights are not emptied first; None leaves the scores as they are.

    Raises:
        ValueError: p or normalize out of range; see also `PruneConfig`.
    """

    p: float = 1.0
    normalize: Literal["layer"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)):
            raise TypeError(f"Magnitude: expected p to be a number, got {self.p!r}")
        if not 0.0 < self.p < float("inf"):
            raise ValueError(f"Magnitude: expected p in (0, inf), got {self.p}")
        if self.normalize not in (None, "layer"):
            raise ValueError(
                f"Magnitude: expected normalize None or 'layer', got {self.normalize!r}"
            )

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """|w|^p, float64 on the CPU, shape of W."""
        score = t.values().abs()
        if self.p != 1:
            score = score.pow(self.p)
        if self.normalize == "layer":
            mean = score.mean()
            if mean > 0:
                score = score / mean
        return score


@register
@dataclass(frozen=True)
class Random(PruneConfig):
    """Uniform random score per group: the baseline every other importance must beat.

    The draw of a layer depends only on the seed and the layer's name, not on the order of layers
    or events, so successive events of a schedule prune nested sets.

    Attributes:
        seed: of the draw. None takes a seed from the `generator` of the `Pruner`, 0 without one.
        generator: alternative to `seed`: one number is drawn from it here.

    Raises:
        ValueError: seed and generator both given.
    """

    seed: int | None = None
    generator: InitVar[torch.Generator | None] = None

    # The InitVar reaches this hook as an argument that the base class does not have.
    def __post_init__(self, generator: torch.Generator | None) -> None:
        super().__post_init__()
        if generator is not None:
            if self.seed is not None:
                raise ValueError("Random: expected seed or generator, got both")
            object.__setattr__(self, "seed", draw_seed(generator))
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, type(None))):
            raise TypeError(f"Random: expected seed to be an int, got {self.seed!r}")

    def seeded(self, generator: torch.Generator | None) -> Random:
        """This importance with a definite seed; `Pruner` calls it once."""
        if self.seed is not None:
            return self
        return replace(self, seed=0 if generator is None else draw_seed(generator))

    def _uniform(self, t: Target, count: int) -> Tensor:
        mixed = ((self.seed or 0) * 0x9E3779B97F4A7C15 + zlib.crc32(t.name.encode())) % 2**63
        source = torch.Generator().manual_seed(mixed)
        return torch.rand(count, generator=source, dtype=torch.float64)

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """Uniform in [0, 1) per entry, shape of W."""
        return self._uniform(t, t.dense.numel()).reshape(t.shape)

    def group_score(self, t: Target, granularity: Granularity, stats: Stats | None) -> Tensor:
        """Uniform per group: a mean over entries would depend on the group's size."""
        return self._uniform(t, granularity.n_groups(t))


def draw_seed(generator: torch.Generator) -> int:
    """One seed from a generator on any device."""
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())


def register_importance(
    function: Callable[..., Tensor] | None = None,
    *,
    needs: frozenset[str] | set[str] | tuple[str, ...] = (),
    reduction: str = "mean",
) -> Any:
    """Turn a function into an importance.

    ```python
    @register_importance
    def Centered(t, stats, *, shift: float = 0.0):
        return (t.values() - shift).abs()

    prune_(model, Centered(sparsity=0.8, shift=0.1))
    ```

    Args:
        function: `function(t, stats, *, option=default, ...)` returns scores shaped like W or
            (n_groups,), higher = keep. Keyword-only parameters become fields of the config.
        needs: what `stats` must hold; `Pruner` then asks for a calibration.
        reduction: how scores shaped like W combine within a group; see `Granularity.reduce`.

    Returns:
        A registered frozen dataclass called like the function, derived from `PruneConfig`.

    Raises:
        TypeError: the function has other parameters than two positional ones and keyword-only
            ones with defaults, or an option is called like a field of `PruneConfig`.
        ValueError: the name is taken.
    """

    def build(function: Callable[..., Tensor]) -> type[PruneConfig]:
        name = getattr(function, "__name__", "importance")
        parameters = list(inspect.signature(function).parameters.values())
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(positional) != 2 or len(positional) + len(options) != len(parameters):
            raise TypeError(
                f"register_importance: expected {name}(t, stats, *, option=default), got "
                f"{name}{inspect.signature(function)}"
            )
        taken = {entry.name for entry in fields(PruneConfig)} | {"importance", "score", "needs"}
        for option in options:
            if option.default is option.empty or option.name in taken:
                raise TypeError(
                    f"register_importance: expected option {option.name!r} of {name} to have a "
                    f"default and a name other than {', '.join(sorted(taken))}"
                )

        def score(self: PruneConfig, t: Target, stats: Stats | None) -> Tensor:
            return function(t, stats, **{o.name: getattr(self, o.name) for o in options})

        kind = make_dataclass(
            name,
            [(o.name, Any, field(default=o.default, kw_only=True)) for o in options],
            bases=(PruneConfig,),
            namespace={
                "score": score,
                "needs": frozenset(needs),
                "reduction": reduction,
                "__doc__": function.__doc__,
            },
            frozen=True,
        )
        kind.__module__, kind.__qualname__ = function.__module__, function.__qualname__
        return register(kind)

    return build if function is None else build(function)
