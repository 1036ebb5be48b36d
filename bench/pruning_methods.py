"""The methods of `bench/pruning.py`: which network, how it is pruned and fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.digits_training import (
    BATCH,
    EPOCHS,
    RATE,
    Context,
    accuracy_of,
    example,
    fit,
    steps_per_epoch,
)
from sparsecnn.data import DigitsNet, ResDigitsNet
from sparsecnn.nn import WinogradReLUConv2d
from sparsecnn.prune import (
    Batches,
    Magnitude,
    Polynomial,
    Pruner,
    Target,
    Threshold,
    find_targets,
    fold_gates_,
    recipes,
)
from sparsecnn.prune.search import csr_bytes
from sparsecnn.storage.codebook import bake_weights_, share_weights_
from sparsecnn.storage.compressed import save_compressed


def wide() -> nn.Module:
    """`DigitsNet` with 256 units in its hidden layer, most of them redundant."""
    model = DigitsNet()
    model.classifier[1], model.classifier[3] = nn.Linear(128, 256), nn.Linear(256, 10)
    return model


def winograd() -> nn.Module:
    """`DigitsNet` whose two later convolutions have their ReLU in the Winograd domain.

    The activation in front of such a layer is the layer's own.
    """
    model = DigitsNet()
    features = list(model.features)
    kept = []
    for i, module in enumerate(features):
        if isinstance(module, nn.Conv2d) and i > 0:
            # Batch norm, (pooling,) transform, ReLU: the ReLU in front goes.
            last = max(j for j, m in enumerate(kept) if isinstance(m, nn.ReLU))
            del kept[last]
            module = WinogradReLUConv2d(
                module.in_channels, module.out_channels, padding=1, bias=False
            )
        kept.append(module)
    model.features = nn.Sequential(*kept)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": DigitsNet, "wide": wide, "winograd": winograd, "residual": ResDigitsNet,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as in `recipes`.
        paper: short citation.
        network: of `NETWORKS`.
        run: gives the pruned network.
        may_lose: accuracy that the mean over the seeds may lose, as a share.
        zeros: that the mean must have at least, as a share.
        macs: that the mean may have at most, as a share of the dense network's.
        smaller: times that the file must be smaller at least.
        save: writes the file; None for `sparsecnn.save` of the materialized network.
    """

    name: str
    paper: str
    network: str
    run: Callable[[Context], nn.Module]
    may_lose: float
    zeros: float = 0.0
    macs: float = 1.0
    smaller: float = 1.0
    save: Callable[[nn.Module, Path], None] | None = None


def tuned(
    context: Context, network: str, make: Callable[[nn.Module], Pruner], epochs: int = EPOCHS
) -> nn.Module:
    """Prune along a training run, then take the masks into the weights."""
    model = context.dense(network)
    pruner = make(model)
    fit(model, context.data, context.seed + 100, epochs, pruner)
    return pruner.finalize().eval()


def batches(context: Context, reference: nn.Module | None = None) -> Batches:
    """Training images for statistics."""
    images, labels = context.data.train.tensors
    return Batches(
        zip(images.split(BATCH), labels.split(BATCH), strict=True), reference=reference
    )


def on_validation(context: Context) -> Callable[[nn.Module], float]:
    """What searches maximize: the accuracy on the validation images."""
    return lambda model: accuracy_of(model, context.data.val)


def _unit_bias(context: Context) -> nn.Module:
    at = 14 * steps_per_epoch(context.data)
    return tuned(
        context, "plain", lambda m: recipes.unit_bias(m, 0.05, at, example_inputs=example(context))
    )


def _collins(context: Context) -> nn.Module:
    model = context.dense("plain")
    full = sum(csr_bytes(t, t.dense.numel()) for t in find_targets(model))
    pruner = recipes.collins(
        model, on_validation(context), full // 8, lam=1e-4, grid=(1.0, 0.5, 0.25, 0.15, 0.1, 0.05)
    )
    pruner.step()
    fit(model, context.data, context.seed + 100, pruner=pruner)
    return pruner.finalize().eval()


def _iht(context: Context) -> nn.Module:
    epoch = steps_per_epoch(context.data)
    return tuned(context, "plain", lambda m: recipes.iht(m, 0.88, 4 * epoch, 2 * epoch, 2))


def _less_is_more(context: Context) -> nn.Module:
    at = 10 * steps_per_epoch(context.data)
    return tuned(
        context, "plain",
        lambda m: recipes.less_is_more(m, 1.5, at, example_inputs=example(context)),
    )  # fmt: skip


def _ssl(context: Context) -> nn.Module:
    at = 12 * steps_per_epoch(context.data)
    return tuned(context, "residual", lambda m: recipes.ssl(m, 1.8, at), 30)


def _group_brain_damage(context: Context) -> nn.Module:
    epoch = steps_per_epoch(context.data)
    return tuned(
        context, "plain",
        lambda m: recipes.group_brain_damage(m, 0.6, 0, 10 * epoch, lam=1e-3, growth=1e-5),
    )  # fmt: skip


def _l0(context: Context) -> nn.Module:
    # Gates are noise that batch norm learns to expect: they are folded before the fine-tuning.
    at = EPOCHS * steps_per_epoch(context.data) - 1
    model = context.dense("residual")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        pruner = recipes.l0(model, 1.35e-3, at, example(context), targets=_makers(model))
        fit(model, context.data, context.seed + 100, pruner=pruner)
    model = fold_gates_(pruner.finalize())
    shut = Pruner(
        model,
        importance=Magnitude(granularity="filter"),
        selector=Threshold(0.0),
        targets=_makers(model),
        example_inputs=example(context),
    )
    fit(model, context.data, context.seed + 200, pruner=shut)
    return shut.finalize().eval()


def _obd(context: Context) -> nn.Module:
    every = 4 * steps_per_epoch(context.data)
    return tuned(context, "plain", lambda m: recipes.obd(m, 0.88, batches(context), every=every))


def _obs(context: Context) -> nn.Module:
    model = context.dense("plain")
    images, labels = context.data.train.tensors
    few = Batches([(images[:256], labels[:256])])
    pruner = recipes.obs(model, 0.72, few)
    pruner.step()
    return pruner.finalize().eval()


def _fisher(context: Context) -> nn.Module:
    return tuned(
        context, "residual",
        lambda m: recipes.fisher(m, 0.57, batches(context), example_inputs=example(context)),
    )  # fmt: skip


def _apoz(context: Context) -> nn.Module:
    every = 4 * steps_per_epoch(context.data)
    return tuned(
        context, "plain",
        lambda m: recipes.apoz(m, batches(context), rounds=2, every=every,
                               example_inputs=example(context)),
    )  # fmt: skip


def _han(context: Context) -> nn.Module:
    # The spread of what survives grows: the same quality drops more in each of three rounds.
    every = 4 * steps_per_epoch(context.data)
    return tuned(
        context, "plain", lambda m: recipes.han(m, 1.45, fractions=(0.4, 0.7, 1.0), every=every)
    )


def _deep_compression(context: Context) -> nn.Module:
    epoch = steps_per_epoch(context.data)
    importance = Magnitude(sparsity=0.9)
    model = tuned(
        context, "plain",
        lambda m: Pruner(m, importance=importance, schedule=Polynomial(0, 10 * epoch, epoch)),
    )  # fmt: skip
    share_weights_(model, conv_bits=4, linear_bits=4)
    fit(model, context.data, context.seed + 200, 5, rate=RATE / 10)
    return bake_weights_(model).eval()


def _data_free(context: Context) -> nn.Module:
    model = context.dense("wide")
    pruner = recipes.data_free(model, 0.5)
    pruner.step()
    return pruner.finalize().eval()


def _dns(context: Context) -> nn.Module:
    stop = 12 * steps_per_epoch(context.data)
    return tuned(context, "plain", lambda m: recipes.dns(m, 2.85, 1e-3, stop=stop), 30)


def _winograd_relu(context: Context) -> nn.Module:
    every = 4 * steps_per_epoch(context.data)
    return tuned(context, "winograd", lambda m: recipes.winograd_relu(m, 0.3, every=every))


def _lasso_channel(context: Context) -> nn.Module:
    model = context.dense("residual")
    data = batches(context, context.dense("residual"))
    pruner = recipes.lasso_channel(model, 0.55, data, targets=_inner(model))
    pruner.step()
    fit(model, context.data, context.seed + 100, pruner=pruner)
    return pruner.finalize().eval()


def _l1_filters(context: Context) -> nn.Module:
    return tuned(
        context, "residual",
        lambda m: recipes.l1_filters(m, 0.55, example_inputs=example(context), targets=_makers(m)),
    )  # fmt: skip


def _thinet(context: Context) -> nn.Module:
    model = context.dense("residual")
    data = batches(context, context.dense("residual"))
    every = 4 * steps_per_epoch(context.data)
    pruner = recipes.thinet(model, 0.55, data, every=every, targets=_inner(model))
    fit(model, context.data, context.seed + 100, pruner=pruner)
    return pruner.finalize().eval()


def _random_masks(context: Context) -> nn.Module:
    return tuned(
        context, "plain",
        lambda m: recipes.random_masks(m, 0.6, "kernel", on_validation(context), targets=_convs(m)),
    )  # fmt: skip


def _nm(context: Context) -> nn.Module:
    return tuned(
        context, "plain",
        lambda m: Pruner(m, importance=Magnitude(granularity="2:4"), targets=_convs(m)[1:]),
    )  # fmt: skip


def _convs(model: nn.Module) -> list[Target]:
    return find_targets(model, types=(nn.Conv2d,))


def _makers(model: nn.Module) -> list[Target]:
    """First convolutions of the residual blocks: their maps are read by the second ones only."""
    return find_targets(model, filter_fn=lambda _, name: name.endswith("conv1"))


def _inner(model: nn.Module) -> list[Target]:
    """Second convolutions of the residual blocks."""
    return find_targets(model, filter_fn=lambda _, name: name.endswith("conv2"))


METHODS = (
    Method("unit_bias", "Hanson & Pratt 1988", "plain", _unit_bias, 0.01),
    Method("collins", "Collins & Kohli 2014", "plain", _collins, 0.01, zeros=0.85),
    Method("iht", "Jin et al. 2016", "plain", _iht, 0.015, zeros=0.85),
    Method("less_is_more", "Zhou et al. 2016", "plain", _less_is_more, 0.01, macs=0.55),
    Method("ssl", "Wen et al. 2016", "residual", _ssl, 0.01, macs=0.5),
    Method("group_brain_damage", "Lebedev & Lempitsky 2016", "plain", _group_brain_damage, 0.01),
    Method("l0", "Louizos et al. 2018", "residual", _l0, 0.01, macs=0.5),
    Method("obd", "LeCun et al. 1989", "plain", _obd, 0.01, zeros=0.85),
    Method("obs", "Hassibi & Stork 1992", "plain", _obs, 0.02, zeros=0.7),
    Method("fisher", "Theis et al. 2018", "residual", _fisher, 0.01, macs=0.5),
    Method("apoz", "Hu et al. 2016", "plain", _apoz, 0.01, macs=0.5),
    Method("han", "Han et al. 2015", "plain", _han, 0.01, zeros=0.85),
    Method(
        "deep_compression", "Han et al. 2016", "plain", _deep_compression, 0.015,
        smaller=12.0, save=save_compressed,
    ),
    Method("data_free", "Srinivas & Babu 2015", "wide", _data_free, 0.01),
    Method("dns", "Guo et al. 2016", "plain", _dns, 0.01, zeros=0.85),
    Method("winograd_relu", "Liu et al. 2018", "winograd", _winograd_relu, 0.01),
    Method("lasso_channel", "He et al. 2017", "residual", _lasso_channel, 0.01, macs=0.5),
    Method("l1_filters", "Li et al. 2017", "residual", _l1_filters, 0.01, macs=0.5),
    Method("thinet", "Luo et al. 2017", "residual", _thinet, 0.01, macs=0.5),
    Method("random_masks", "Anwar & Sung 2016", "plain", _random_masks, 0.01),
    Method("2:4", "Mishra et al. 2021", "plain", _nm, 0.01),
)
