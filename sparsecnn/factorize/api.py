"""``factorize``: one layer or kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from sparsecnn.nn._common import inherit
from sparsecnn.nn.factorized import FactorizedConv2d, FactorizedLinear

from .assemble import assemble
from .method import Factors, Method, chain_macs, chain_params, method_of
from .problem import LayerProblem, UnsupportedLayer
from .ranks import Rank, RankPolicy, policy_of

if TYPE_CHECKING:
    from .moments import Moments

Objective = Literal["macs", "params"]
Factorized = FactorizedConv2d | FactorizedLinear


class NoGain(ValueError):
    """A factorization that costs as much as the layer; the layer should stay dense."""


@dataclass(frozen=True)
class Factorize:
    """How layers are factorized.

    Attributes:
        method: a registered name, see `METHODS`, or a `Method` with its options.
        rank: an integer, one per rank of the method, or a policy: `Fixed`, `Ratio`, `Energy`,
            `TargetSpeedup`, `ParamRatio`, `EVBMF`, `Latency`, or over all layers
            `PCAEnergyGlobal`, `Sensitivity`.
        objective: what must shrink: "macs" or "params".
        min_gain: a layer whose chain is not better by this factor stays dense.
        multiple_of: ranks are rounded down to multiples, but not below one.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown method or a value out of range.
    """

    method: str | Method
    rank: Rank
    objective: Objective = "macs"
    min_gain: float = 1.0
    multiple_of: int = 1

    def __post_init__(self) -> None:
        method_of(self.method)
        policy_of(self.rank)
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"factorize: expected objective one of {', '.join(get_args(Objective))}, got "
                f"{self.objective!r}"
            )
        if not isinstance(self.min_gain, (int, float)) or not self.min_gain > 0:
            raise ValueError(f"factorize: expected min_gain > 0, got {self.min_gain!r}")
        if (
            not isinstance(self.multiple_of, int)
            or isinstance(self.multiple_of, bool)
            or self.multiple_of < 1
        ):
            raise ValueError(
                f"factorize: expected multiple_of an integer >= 1, got {self.multiple_of!r}"
            )

    def ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """What the policy chooses for one layer, clamped and rounded.

        Raises:
            UnsupportedLayer: the method cannot take the layer.
            ValueError: see the policy.
        """
        method = method_of(self.method)
        check_layer(p, method)
        policy = policy_of(self.rank)
        if not isinstance(policy, RankPolicy):
            raise ValueError(
                f"factorize: {p.name}: expected rank of one layer, got {type(policy).__name__}, "
                "which ranks a network; use factorize_"
            )
        return self.rounded(p, policy.select(p, method))

    def rounded(self, p: LayerProblem, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Clamped to [1, full] and rounded down to multiples."""
        method = method_of(self.method)
        step = self.multiple_of
        return method.clamp(p, [r if r < step else r - r % step for r in method.clamp(p, ranks)])

    def check_gain(self, p: LayerProblem, ranks: tuple[int, ...]) -> None:
        """Raise `NoGain` if the chain is not better than the layer by `min_gain`."""
        stages = method_of(self.method).stages(p, ranks)
        dense, chain = p.dense_macs, chain_macs(p, stages)
        if self.objective == "params":
            dense, chain = p.dense_params, chain_params(p, stages)
        unit = "MACs" if self.objective == "macs" else "weights"
        if chain * self.min_gain >= dense:
            raise NoGain(
                f"no gain: ranks {ranks} need {chain} {unit}, the layer {dense}"
                + (f" (min_gain {self.min_gain:g})" if self.min_gain != 1 else "")
            )


def check_layer(p: LayerProblem, method: Method) -> None:
    """Whether a method can take a layer at all.

    Raises:
        UnsupportedLayer: it cannot; says why.
        ValueError: it needs calibration data or gradients and has none.
    """
    if p.linear and not method.linear and not _all_pointwise(p, method):
        raise UnsupportedLayer(
            f"factorize: {p.name}: method {method.name!r} has no form for linear layers; use fc_svd"
        )
    method.check(p)
    if method.needs_data and p.moments is None:
        raise ValueError(
            f"factorize: {p.name}: expected calibration data for method {method.name!r}, got none; "
            "pass calib"
        )
    if method.needs_gradients and p.gradients is None:
        raise ValueError(
            f"factorize: {p.name}: expected gradients for method {method.name!r}, got none; pass "
            "those of collect_gradients"
        )


def _all_pointwise(p: LayerProblem, method: Method) -> bool:
    stages = method.stages(p, method.full_ranks(p))
    return all(stage.kernel == (1, 1) and stage.groups == 1 for stage in stages)


def solve(
    p: LayerProblem, method: Method, ranks: tuple[int, ...], like: Tensor
) -> tuple[Factorized, str]:
    """The factorized layer of one problem, and what the method says of it.

    Args:
        p: the layer.
        method: the method.
        ranks: within [1, full].
        like: dtype and device of the weights.
    """
    factors: list[Factors] = [method.solve(p, ranks, group) for group in range(p.groups)]
    note = "; ".join(dict.fromkeys(f.note for f in factors if f.note))
    return assemble(p, method, ranks, factors, like), note


def take_place(made: Factorized, layer: nn.Module) -> None:
    """Give a factorized layer what its layer has: mode, hooks, what trains, memory format."""
    inherit(made, layer)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    for stage in made.modules():
        stage.training = layer.training
        if isinstance(stage, (nn.Conv2d, nn.Linear)):
            if not weight.requires_grad:
                stage.weight.requires_grad_(False)
            if stage.bias is not None:
                own = weight if bias is None else bias
                stage.bias.requires_grad_(bool(own.requires_grad))
    last = torch.channels_last
    if weight.dim() == 4 and not weight.is_contiguous():
        if weight.is_contiguous(memory_format=last):
            made.to(memory_format=last)  # type: ignore[call-overload]


@torch.no_grad()
def factorize(
    layer: nn.Module | Tensor,
    method: str | Method,
    rank: Rank,
    *,
    in_hw: tuple[int, int] | None = None,
    data: Moments | None = None,
    gradients: Tensor | None = None,
    objective: Objective = "macs",
    min_gain: float = 0.0,
    multiple_of: int = 1,
    seed: int = 0,
) -> Factorized:
    """One layer as a chain of smaller ones; the layer itself is left as it is.

    The factors are computed in float64 and stored in the layer's dtype; no bias and no activation
    stands between the stages, so at full rank the chain equals the layer.

    Args:
        layer: `nn.Conv2d`, `nn.Linear`, or a kernel: (K, C, R, S) or (O, I).
        method: name or `Method`.
        rank: integer, tuple or policy.
        in_hw: size of the input map, for policies that count MACs; 56 x 56 if not given.
        data: responses and inputs of the layer, for the methods that need them.
        gradients: shape of the weight, see `collect_gradients`; for `Mahalanobis`.
        objective: see `Factorize`.
        min_gain: see `Factorize`; 0 factorizes at any cost, full rank for instance.
        multiple_of: see `Factorize`.
        seed: of the methods that draw random starts: same seed, same bits.

    Returns:
        A `FactorizedConv2d` or `FactorizedLinear` with the layer's flags, hooks and memory format.

    Raises:
        UnsupportedLayer: a layer that the method cannot take.
        NoGain: the chain is not better than the layer by `min_gain`.
        TypeError: see `Factorize`.
        ValueError: an unknown method, ranks or a target out of reach, weights not finite.

    Cost: that of the method, one to a few SVDs for most.
    """
    config = Factorize(method, rank, objective, min_gain or 1.0, multiple_of)
    module = _as_module(layer)
    p = LayerProblem.of(
        module, in_hw=in_hw, moments=data, gradients=gradients, seed=seed,
        name=type(module).__name__,
    )  # fmt: skip
    ranks = config.ranks(p)
    if min_gain:
        config.check_gain(p, ranks)
    weight = module.weight
    assert isinstance(weight, Tensor)
    made, _ = solve(p, method_of(method), ranks, weight)
    take_place(made, module)
    return made


def _as_module(layer: nn.Module | Tensor) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    if not isinstance(layer, Tensor):
        raise TypeError(
            f"factorize: expected layer a module or a weight, got {type(layer).__name__}"
        )
    if layer.dim() == 2:
        made: nn.Module = nn.Linear(layer.shape[1], layer.shape[0], False, "meta", layer.dtype)
    elif layer.dim() == 4:
        k, c, r, s = layer.shape
        made = nn.Conv2d(c, k, (r, s), bias=False, device="meta", dtype=layer.dtype)
    else:
        raise ValueError(
            f"factorize: expected a weight (K, C, R, S) or (O, I), got shape {tuple(layer.shape)}"
        )
    made.weight = nn.Parameter(layer.detach(), requires_grad=layer.is_floating_point())
    return made
