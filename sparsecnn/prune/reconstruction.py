"""Input channels chosen so that a layer's output can be rebuilt from the rest, and the rebuilding.

A layer computes Y = sum_c X_c W_c + b from the patches X_c of its input channels (`samples`). Two
selectors decide which channels stay, `LeastSquares` fits the weights of those that do. All three
work on the granularity "channel", the input channels of a layer: with G conv groups a channel is
read by the filters of its group only, and the channels of all groups share one budget.

The order of the targets matters and is the caller's: list the layers as the data meets them, from
shallow to deep, so that each is fitted to inputs that the pruning before it has already changed.
Pass the unpruned network as the `reference` of `Batches`, or errors add up from layer to layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .budget import Budget
from .granularity import channel
from .lasso import lasso_support
from .protocols import Granularity, Stats
from .samples import io_need, io_of
from .selection import alive_first, top
from .targets import Target

Per = Literal["filter", "channel_scale"]


@dataclass(frozen=True)
class LassoPath:
    """Keep the channels that a LASSO on their contributions to the output chooses.

        min over beta of 1/(2 n) ||Y - sum_c beta_c X_c W_c||^2 + lam ||beta||_1,  ||W_c||_F = 1

    with n the number of sampled positions times filters and lam raised until as many beta_c as the
    budget allows are nonzero (He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural
    Networks", ICCV 2017). W stays fixed: combine it with `LeastSquares`, the paper's second step.
    Where the layer has a bias, which the refit sets anew, both sides are centred per filter first
    (ours). No sampled row is left out: the solver needs only the channels' inner products,
    <X_c W_c, X_d W_d> = <X_c' X_d, W_c W_d'>.

    A residual branch's first layer shares its input with the shortcut; a mask on its weight leaves
    that tensor whole.

    Cost: O(N J^2) per layer for N samples of J = C/G*R*S inputs, then O(C^2) per sweep of the
    solver.

    Attributes:
        samples: output positions per layer.
        shortcuts: see `LeastSquares`.

    Raises:
        ValueError: bad samples or names.
    """

    uses_scores: ClassVar[bool] = False
    uses_budget: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    samples: int = 5000
    shortcuts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        io_need(self.samples, self.shortcuts, "LassoPath")

    @property
    def needs(self) -> frozenset[str]:
        """Sampled inputs and outputs."""
        return frozenset({io_need(self.samples, self.shortcuts, "LassoPath")})

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per channel; see `Selector.select` for shapes.

        Raises:
            ValueError: another granularity, or no budget or one that a layer does not have.
        """
        (need,) = self.needs
        counts = {t: _kept_count(t, granularity, budget, "LassoPath") for t in targets}
        keep = {}
        for t in targets:
            gram, moment = channel_problem(*io_of(stats, need, t), t)
            norms = channel.reduce(_weight(t), t, "l2")
            # A channel without weights contributes nothing and has no direction to normalize.
            unit = torch.where(norms > 0, norms, torch.inf)
            gram, moment = gram / unit[:, None] / unit, moment / unit
            beta = torch.from_numpy(lasso_support(gram.numpy(), moment.numpy(), counts[t]))
            keep[t] = top(alive_first(beta.abs(), granularity, t, current.get(t)), counts[t])
        return keep


@dataclass(frozen=True)
class GreedyReconstruction:
    """Remove the channels whose contributions to the output cancel best.

    At sampled output positions i, with a random filter o each, channel c of a conv group g
    contributes x_gic = sum_rs X_gicrs W_ocrs, so that sum_c x_gic = y_gi - b_o. The removed set T
    starts empty and is given, again and again, the channel with which

        sum over g, i of (sum over c in T of x_gic)^2

    is smallest (ThiNet: Luo, Wu, Lin, ICCV 2017). The statistics are those of the layer that reads
    the channels, not of the one that makes them. The paper goes on with
    `LeastSquares("channel_scale")` and a short training after each layer.

    Cost: O(C N) per removed channel, for the inner running sum is kept.

    Attributes:
        samples: output positions per layer; the paper takes 10 per image of 10 images per class.
        seed: of the filters at each position.

    Raises:
        ValueError: bad samples or seed.
    """

    uses_scores: ClassVar[bool] = False
    uses_budget: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    samples: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        io_need(self.samples, {}, "GreedyReconstruction")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(
                f"GreedyReconstruction: expected seed to be an int >= 0, got {self.seed!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Sampled inputs and outputs."""
        return frozenset({io_need(self.samples, {}, "GreedyReconstruction")})

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per channel; see `Selector.select` for shapes.

        Raises:
            ValueError: another granularity, or no budget or one that a layer does not have.
        """
        (need,) = self.needs
        counts = {
            t: _kept_count(t, granularity, budget, "GreedyReconstruction") for t in targets
        }
        keep = {}
        for t in targets:
            x, _ = io_of(stats, need, t)
            contributions, _ = filter_contributions(x, t, self.seed)
            alive = torch.ones(granularity.n_groups(t), dtype=torch.bool)
            if t in current:
                alive = granularity.reduce(current[t], t, "max").bool()
            keep[t] = greedy_keep(contributions, counts[t], alive)
        return keep


@dataclass(frozen=True)
class LeastSquares:
    """Fit the weights of the kept channels, and the bias, to the reference's outputs.

        min over W', b' of 1/N ||Y - X W' - b'||^2 + ridge ||W' - W||^2

    over the kept channels of each conv group. "filter" fits every weight (He, Zhang, Sun, 2017);
    "channel_scale" only one factor per channel, W'_c = s_c W_c, penalized as ridge ||s - 1||^2
    (Luo, Wu, Lin, 2017). A layer without bias stays without. Of several solutions, where a channel
    never fires or there are fewer samples than weights, the one nearest to the present weights is
    taken (ours): what the samples do not speak about stays as it is.

    The layer's weight must belong to it alone and its input channels are kept or dropped whole;
    entries that a mask zeroes within a kept channel are fitted as if they were free.

    Cost: O(N J^2) per conv group for N samples of J kept inputs.

    Attributes:
        per: "filter" or "channel_scale".
        ridge: weight of the penalty.
        samples: output positions per layer; take more than J.
        shortcuts: {name of the last layer of a residual branch: name of the module whose output
            is added to its own}. The layer is then fitted to Y1 - Y1' + Y2, where Y1 and Y2 are
            the shortcut's and the layer's outputs in the reference and Y1' is the shortcut's now:
            it makes up for the error that reaches the sum by the shortcut. Between the layer and
            the sum nothing may stand: fold batch norm first (torch.nn.utils.fusion).

    Raises:
        ValueError: an unknown `per`, a negative ridge, bad samples or names.
    """

    per: Per = "filter"
    ridge: float = 0.0
    samples: int = 5000
    shortcuts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.per not in ("filter", "channel_scale"):
            raise ValueError(
                f"LeastSquares: expected per 'filter' or 'channel_scale', got {self.per!r}"
            )
        if not 0.0 <= self.ridge < math.inf:
            raise ValueError(f"LeastSquares: expected ridge in [0, inf), got {self.ridge!r}")
        io_need(self.samples, self.shortcuts, "LeastSquares")

    @property
    def needs(self) -> frozenset[str]:
        """Sampled inputs and outputs."""
        return frozenset({io_need(self.samples, self.shortcuts, "LeastSquares")})

    @torch.no_grad()
    def apply(self, t: Target, keep: Tensor, stats: Stats | None) -> None:
        """Update the kept channels of `t.dense`, and the bias, in place.

        Raises:
            ValueError: `keep` has not one flag per input channel.
        """
        (need,) = self.needs
        groups, _, channels, _ = t.grouped_shape
        if keep.numel() != groups * channels:
            raise ValueError(
                f"LeastSquares: expected granularity channel, with {groups * channels} groups in "
                f"layer {t.name!r}, got {keep.numel()}"
            )
        x, y = io_of(stats, need, t)
        weight = _weight(t)
        # What an earlier event has zeroed does not come back, whatever the flags say.
        kept = keep.cpu() & channel.reduce(weight != 0, t, "max")
        w = weight.reshape(t.grouped_shape).clone()
        if self.per == "filter":
            _refit(w, x, y, kept.reshape(groups, channels), self.ridge, _centred(t))
        else:
            gram, moment = channel_problem(x, y, t)
            scale = _scales(gram, moment, kept, self.ridge)
            w *= scale.reshape(groups, 1, channels, 1)
        flags = channel.expand(kept, t).to(t.dense.device)
        t.dense.copy_(torch.where(flags, w.reshape(t.shape).to(t.dense), t.dense))
        bias = t.module.bias
        if isinstance(bias, Tensor):
            w = w * kept.reshape(groups, 1, channels, 1)
            rest = y.mean(1) - torch.einsum("gcs,gkcs->gk", x.mean(1), w)
            bias.copy_(rest.reshape(-1).to(bias))


def channel_problem(x: Tensor, y: Tensor, t: Target) -> tuple[Tensor, Tensor]:
    """The quadratic form of 1/(2 n) ||Y - sum_c beta_c X_c W_c||^2 in beta, n = N * K.

    Args:
        x: (G, N, C/G, R*S) float64.
        y: (G, N, K/G) float64, bias included; both are centred if the layer has a bias.
        t: whose weights, as the forward pass sees them.

    Returns:
        Z'Z / n (C, C) and Z'y / n (C,) for Z with the columns vec(X_c W_c) over all filters. Conv
        groups do not mix: Z'Z is block-diagonal.
    """
    groups, rows, channels, spatial = t.grouped_shape
    w = _weight(t).reshape(groups, rows, channels * spatial)
    flat = x.flatten(2)
    if _centred(t):
        flat, y = flat - flat.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    count = y.numel()
    products = (flat.mT @ flat) * (w.mT @ w)
    blocks = products.unflatten(1, (channels, spatial)).unflatten(3, (channels, spatial))
    moment = ((flat.mT @ y) * w.mT).unflatten(1, (channels, spatial)).sum((2, 3))
    return torch.block_diag(*blocks.sum((2, 4))) / count, moment.reshape(-1) / count


def filter_contributions(x: Tensor, t: Target, seed: int) -> tuple[Tensor, Tensor]:
    """What each input channel adds to a random filter's output at every sampled position.

    Args:
        x: (G, N, C/G, R*S) float64.
        t: whose weights, as the forward pass sees them.
        seed: of the filters; the layer's name goes in too.

    Returns:
        (G, N, C/G) contributions and (G, N) int64, the filters within their conv groups.
    """
    groups, rows, _, _ = t.grouped_shape
    source = torch.Generator().manual_seed(seed ^ zlib.crc32(t.name.encode()))
    filters = torch.randint(rows, (groups, x.shape[1]), generator=source)
    w = _weight(t).reshape(t.grouped_shape)
    chosen = w[torch.arange(groups)[:, None], filters]
    return (x * chosen).sum(3), filters


def greedy_keep(x: Tensor, count: int, alive: Tensor) -> Tensor:
    """Remove channels until `count` are left, each time the one that leaves the least error.

    Args:
        x: (G, N, C/G) contributions.
        count: channels to keep over all conv groups.
        alive: (C,) bool; the others are removed first and do not count as contributions.

    Returns:
        (C,) bool. Of equal candidates the last is removed.
    """
    total = alive.numel()
    keep = top(torch.where(alive, 1.0, 0.0), max(count, int(alive.sum())))
    running = torch.zeros(x.shape[:2], dtype=x.dtype)
    own = x.square().sum(1).reshape(-1)
    for _ in range(int(keep.sum()) - count):
        # ||s + x_c||^2 = ||s||^2 + 2 s'x_c + ||x_c||^2, and ||s||^2 is the same for all.
        growth = 2 * torch.einsum("gn,gnc->gc", running, x).reshape(-1) + own
        growth = growth.masked_fill(~keep, math.inf)
        chosen = total - 1 - int(growth.flip(0).argmin())
        keep[chosen] = False
        group, position = divmod(chosen, x.shape[2])
        running[group] += x[group, :, position]
    return keep


def _weight(t: Target) -> Tensor:
    """The weight of the forward pass, float64 on the CPU."""
    return t.weight.detach().to("cpu", torch.float64)


def _centred(t: Target) -> bool:
    """Whether a bias takes up the means."""
    return isinstance(t.module.bias, Tensor)


def _kept_count(t: Target, granularity: Granularity, budget: Budget | None, what: str) -> int:
    """Channels that stay, at least one."""
    if granularity != channel:
        raise ValueError(f"{what}: expected granularity channel, got {granularity}")
    if budget is None:
        raise ValueError(f"{what}: expected a budget, got None")
    total = granularity.n_groups(t)
    if budget.count is not None and budget.count > total:
        raise ValueError(
            f"{what}: expected count at most the number of input channels, got {budget.count} "
            f"where {t.name!r} has {total}"
        )
    return max(total - max(math.ceil(budget.to_drop(total) - 0.5), 0), 1)


def _refit(w: Tensor, x: Tensor, y: Tensor, kept: Tensor, ridge: float, centred: bool) -> None:
    """Fit the kept channels of w (G, K/G, C/G, R*S) in place, one conv group after the other."""
    for group, columns in enumerate(kept):
        if not columns.any():
            continue
        inputs, outputs = x[group][:, columns].flatten(1), y[group]
        if centred:
            inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
        old = w[group][:, columns].flatten(1)
        missing = outputs - inputs @ old.mT
        if ridge > 0:
            count, width = inputs.shape
            penalty = math.sqrt(ridge * count) * torch.eye(width, dtype=inputs.dtype)
            inputs = torch.cat([inputs, penalty])
            missing = torch.cat([missing, missing.new_zeros(width, missing.shape[1])])
        # By SVD: the least correction where the inputs are linearly dependent (torch's "gelsy" does
        # not pivot and stops at the first zero column). Centring leaves rounding errors, which the
        # default limit would take for directions.
        change = torch.linalg.lstsq(inputs, missing, rcond=1e-11, driver="gelsd").solution
        w[group][:, columns] = (old + change.mT).unflatten(1, (-1, w.shape[3]))


def _scales(gram: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """(C,) factors, 1 for what is dropped; the correction of the present factors 1 is fitted."""
    scale = torch.ones_like(moment)
    if kept.any():
        inner = gram[kept][:, kept]
        missing = moment[kept] - inner.sum(1)
        inner = inner + ridge * torch.eye(len(inner), dtype=inner.dtype)
        change = torch.linalg.lstsq(inner, missing[:, None], rcond=1e-13, driver="gelsd").solution
        scale[kept] += change[:, 0]
    return scale
