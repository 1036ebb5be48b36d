"""The methods of `bench/pruning.py`: which network, how it is pruned and fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from sparsecnn.data import Digits, DigitsNet, ResDigitsNet, digits
from sparsecnn.measure import accuracy
from sparsecnn.nn import WinogradReLUConv2d
from sparsecnn.prune import (
    Batches,
    Magnitude,
    Polynomial,
    Pruner,
    Target,
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
BATCH = 64
EPOCHS = 20
RATE = 0.05


@dataclass
class Context:
    """What a method works with.

    Attributes:
        seed: of the split, the weights and the order of the images.
        networks: the trained dense networks by name.
        data: images (N, 1, 8, 8) in three parts.
    """

    seed: int
    networks: dict[str, nn.Module]
    data: Digits = field(init=False)

    def __post_init__(self) -> None:
        self.data = digits(8, self.seed)

    def dense(self, network: str) -> nn.Module:
        """A copy of a trained network."""
        return copy.deepcopy(self.networks[network]).eval()


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as in `recipes`.
        paper: short citation.
        network: of `NETWORKS`.
        run: gives the pruned network.
        may_lose: accuracy that the mean over the seeds may lose, as a share.
        save: writes the file; None for `sparsecnn.save` of the materialized network.
    """

    name: str
    paper: str
    network: str
    run: Callable[[Context], nn.Module]
    may_lose: float
    save: Callable[[nn.Module, Path], None] | None = None


def accuracy_of(model: nn.Module, part: TensorDataset) -> float:
    """Top-1 accuracy in [0, 1]."""
    return float(accuracy(model, [part.tensors])["top1"])


def fit(
    model: nn.Module,
    data: Digits,
    seed: int,
    epochs: int = EPOCHS,
    pruner: Pruner | None = None,
    rate: float = RATE,
) -> nn.Module:
    """Train with SGD and a one-cycle rate; a pruner runs along."""
    images, labels = data.train.tensors
    named = list(model.named_parameters())
    gates = [p for name, p in named if name.endswith("log_alpha")]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if not name.endswith("log_alpha")], "lr": rate},
    ]
    if gates:  # they move on the scale of 1, and have a few hundred steps
        groups.append({"params": gates, "lr": 20 * rate, "momentum": 0.0, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=5e-4)
    if pruner is not None:
        pruner.attach(optimizer)
    plan = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=epochs * steps_per_epoch(data),
        cycle_momentum=False,
    )
    source = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=source).split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            if pruner is not None:
                loss = loss + pruner.penalty()
            loss.backward()
            optimizer.step()
            plan.step()
    return model.eval()


def steps_per_epoch(data: Digits) -> int:
    """Optimizer steps of one pass over the training images."""
    return -(-len(data.train) // BATCH)


def dense_networks(seed: int) -> dict[str, nn.Module]:
    """The trained networks of one seed."""
    data = digits(8, seed)
    trained = {}
    for name, make in NETWORKS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained[name] = fit(make(), data, seed)
    return trained


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


def example(context: Context) -> Tensor:
    """One image."""
    return context.data.train.tensors[0][:1]


def _unit_bias(context: Context) -> nn.Module:
    at = 14 * steps_per_epoch(context.data)
    return tuned(
        context, "plain", lambda m: recipes.unit_bias(m, 0.05, at, example_inputs=example(context))
    )


def _collins(context: Context) -> nn.Module:
    model = context.dense("plain")
    full = sum(csr_bytes(t, t.dense.numel()) for t in find_targets(model))
    pruner = recipes.collins(
        model, on_validation(context), full // 6, lam=1e-4, grid=(1.0, 0.5, 0.25, 0.15, 0.1, 0.05)
    )
    pruner.step()
    fit(model, context.data, context.seed + 100, pruner=pruner)
    return pruner.finalize().eval()


def _iht(context: Context) -> nn.Module:
    epoch = steps_per_epoch(context.data)
    return tuned(context, "plain", lambda m: recipes.iht(m, 0.85, 4 * epoch, 2 * epoch, 2))


def _less_is_more(context: Context) -> nn.Module:
    at = 12 * steps_per_epoch(context.data)
    return tuned(
        context, "plain",
        lambda m: recipes.less_is_more(m, 0.5, at, example_inputs=example(context)),
    )  # fmt: skip


def _ssl(context: Context) -> nn.Module:
    at = 10 * steps_per_epoch(context.data)
    return tuned(context, "residual", lambda m: recipes.ssl(m, 1.3, at))


def _group_brain_damage(context: Context) -> nn.Module:
    epoch = steps_per_epoch(context.data)
    return tuned(
        context, "plain",
        lambda m: recipes.group_brain_damage(m, 0.6, 0, 10 * epoch, lam=1e-3, growth=1e-5),
    )  # fmt: skip


def _l0(context: Context) -> nn.Module:
    at = 12 * steps_per_epoch(context.data)
    model = context.dense("plain")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        pruner = recipes.l0(model, 9e-4, at, example(context))
        fit(model, context.data, context.seed + 100, pruner=pruner)
    return fold_gates_(pruner.finalize()).eval()


def _obd(context: Context) -> nn.Module:
    every = 4 * steps_per_epoch(context.data)
    return tuned(context, "plain", lambda m: recipes.obd(m, 0.85, batches(context), every=every))


def _obs(context: Context) -> nn.Module:
    model = context.dense("plain")
    images, labels = context.data.train.tensors
    few = Batches([(images[:256], labels[:256])])
    pruner = recipes.obs(model, 0.7, few)
    pruner.step()
    return pruner.finalize().eval()


def _fisher(context: Context) -> nn.Module:
    return tuned(
        context, "residual",
        lambda m: recipes.fisher(m, 0.4, batches(context), example_inputs=example(context)),
    )  # fmt: skip


def _apoz(context: Context) -> nn.Module:
    every = 4 * steps_per_epoch(context.data)
    return tuned(
        context, "plain",
        lambda m: recipes.apoz(m, batches(context), rounds=3, every=every,
                               example_inputs=example(context)),
    )  # fmt: skip


def _han(context: Context) -> nn.Module:
    # The spread of what survives grows: the same quality drops more in each of three rounds.
    every = 4 * steps_per_epoch(context.data)
    return tuned(
        context, "plain", lambda m: recipes.han(m, 1.35, fractions=(0.4, 0.7, 1.0), every=every)
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
    return tuned(context, "plain", lambda m: recipes.dns(m, 1.5, 1e-3, stop=stop))


def _winograd_relu(context: Context) -> nn.Module:
    every = 4 * steps_per_epoch(context.data)
    return tuned(context, "winograd", lambda m: recipes.winograd_relu(m, 0.3, every=every))


def _lasso_channel(context: Context) -> nn.Module:
    model = context.dense("residual")
    data = batches(context, context.dense("residual"))
    pruner = recipes.lasso_channel(model, 0.3, data, targets=_inner(model))
    pruner.step()
    return pruner.finalize().eval()


def _l1_filters(context: Context) -> nn.Module:
    return tuned(
        context, "residual",
        lambda m: recipes.l1_filters(m, 0.4, example_inputs=example(context), targets=_makers(m)),
    )  # fmt: skip


def _thinet(context: Context) -> nn.Module:
    model = context.dense("residual")
    data = batches(context, context.dense("residual"))
    every = 4 * steps_per_epoch(context.data)
    pruner = recipes.thinet(model, 0.5, data, every=every, targets=_inner(model))
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
    Method("unit_bias", "Hanson & Pratt 1988", "plain", _unit_bias, 0.02),
    Method("collins", "Collins & Kohli 2014", "plain", _collins, 0.02),
    Method("iht", "Jin et al. 2016", "plain", _iht, 0.02),
    Method("less_is_more", "Zhou et al. 2016", "plain", _less_is_more, 0.02),
    Method("ssl", "Wen et al. 2016", "residual", _ssl, 0.02),
    Method("group_brain_damage", "Lebedev & Lempitsky 2016", "plain", _group_brain_damage, 0.02),
    Method("l0", "Louizos et al. 2018", "plain", _l0, 0.02),
    Method("obd", "LeCun et al. 1989", "plain", _obd, 0.02),
    Method("obs", "Hassibi & Stork 1992", "plain", _obs, 0.02),
    Method("fisher", "Theis et al. 2018", "residual", _fisher, 0.02),
    Method("apoz", "Hu et al. 2016", "plain", _apoz, 0.02),
    Method("han", "Han et al. 2015", "plain", _han, 0.02),
    Method(
        "deep_compression", "Han et al. 2016", "plain", _deep_compression, 0.02, save_compressed
    ),
    Method("data_free", "Srinivas & Babu 2015", "wide", _data_free, 0.01),
    Method("dns", "Guo et al. 2016", "plain", _dns, 0.02),
    Method("winograd_relu", "Liu et al. 2018", "winograd", _winograd_relu, 0.02),
    Method("lasso_channel", "He et al. 2017", "residual", _lasso_channel, 0.02),
    Method("l1_filters", "Li et al. 2017", "residual", _l1_filters, 0.02),
    Method("thinet", "Luo et al. 2017", "residual", _thinet, 0.02),
    Method("random_masks", "Anwar & Sung 2016", "plain", _random_masks, 0.03),
    Method("2:4", "Mishra et al. 2021", "plain", _nm, 0.02),
)
