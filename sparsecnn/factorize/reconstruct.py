"""Fit a chain to the responses of the layer it replaces."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsecnn._models import evaluating

Pair = tuple[Tensor, Tensor]


def reconstruct_(
    chain: nn.Module,
    original: nn.Module,
    batches: Iterable[Tensor | Pair],
    *,
    steps: int,
    lr: float = 1e-3,
    seed: int = 0,
    relu: bool = False,
) -> tuple[float, float]:
    r"""Lower the response error of a chain in place, never raise it.

        min over the chain's parameters of sum_i ||f(original(x_i)) - f(chain(x_hat_i))||^2

    with f the identity or ReLU, by Adam with a falling rate from the chain's present weights: the
    data reconstruction of Jaderberg, Vedaldi, Zisserman, "Speeding up convolutional neural networks
    with low rank expansions", BMVC 2014. After each pass over the batches the error on all of them
    is taken, and the best state met stays. Only the chain's parameters with ``requires_grad``
    change; its modes, gradients and buffers, and everything of the original, stay as they are.

    Args:
        chain: what replaces the layer.
        original: the layer.
        batches: inputs of the layer; or pairs, the chain's inputs x_hat from a network that is
            compressed up to here, and the original's x (see `layer_inputs`).
        steps: of Adam, one batch each.
        lr: its first rate.
        seed: of the order of the batches.
        relu: whether a ReLU follows the layer.

    Returns:
        The relative errors ``sqrt(sum ||difference||^2 / sum ||target||^2)`` before and after.

    Raises:
        TypeError: batches of another kind.
        ValueError: steps or lr out of range, no batches, responses of unequal shape, or a chain
            without a parameter to train.

    Cost: `steps` forward and backward passes, and a forward pass over all batches per round.
    """
    what = "reconstruct_"
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{what}: expected steps an integer >= 0, got {steps!r}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"{what}: expected lr > 0, got {lr!r}")
    trained = [p for p in chain.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{what}: expected a chain with parameters to train, got none")
    with evaluating(chain), evaluating(original):
        pairs = _targets(original, batches, relu, what)
        wanted = math.sqrt(sum(float(t.double().square().sum()) for _, t in pairs)) or 1.0
        before = _error(chain, pairs, relu, what) / wanted
        best, least = _state(trained), before
        gradients = [p.grad for p in trained]
        try:
            with torch.enable_grad():
                for _ in _rounds(chain, trained, pairs, steps, lr, seed, relu):
                    error = _error(chain, pairs, relu, what) / wanted
                    if error < least:  # False for NaN: a step too far is forgotten
                        best, least = _state(trained), error
        finally:
            with torch.no_grad():
                for p, value, gradient in zip(trained, best, gradients, strict=True):
                    p.copy_(value)
                    p.grad = gradient
    return before, least


def _targets(
    original: nn.Module, batches: Iterable[Tensor | Pair], relu: bool, what: str
) -> list[Pair]:
    pairs = []
    for batch in batches:
        x_hat, x = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch, batch)
        if not isinstance(x_hat, Tensor) or not isinstance(x, Tensor):
            raise TypeError(
                f"{what}: expected batches of a tensor or a pair of tensors, got "
                f"{type(batch).__name__}"
            )
        with torch.no_grad():
            target = original(x)
        pairs.append((x_hat, target.relu() if relu else target))
    if not pairs:
        raise ValueError(f"{what}: expected at least one batch, got none")
    return pairs


def _rounds(
    chain: nn.Module,
    trained: list[nn.Parameter],
    pairs: list[Pair],
    steps: int,
    lr: float,
    seed: int,
    relu: bool,
) -> Iterable[None]:
    """Train; yield after every pass over the batches and at the end."""
    source = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained, lr=lr)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(pairs), generator=source).tolist()
        x_hat, target = pairs[order.pop()]
        optimizer.zero_grad()
        # The scale of the responses must not meet Adam's epsilon.
        loss = (_response(chain, x_hat, relu) - target).square().sum()
        (loss / target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)).backward()
        optimizer.step()
        rates.step()
        if not order or step == steps - 1:
            yield


def _error(chain: nn.Module, pairs: list[Pair], relu: bool, what: str) -> float:
    total = 0.0
    with torch.no_grad():
        for x_hat, target in pairs:
            found = _response(chain, x_hat, relu)
            if found.shape != target.shape:
                raise ValueError(
                    f"{what}: expected responses {tuple(target.shape)} of the chain, got "
                    f"{tuple(found.shape)}"
                )
            total += float((found.double() - target.double()).square().sum())
    return math.sqrt(total) if total == total else math.inf


def _response(chain: nn.Module, x: Tensor, relu: bool) -> Tensor:
    y: Tensor = chain(x)
    return y.relu() if relu else y


def _state(trained: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in trained]
