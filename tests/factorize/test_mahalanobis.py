"""Factorization in the metric of the loss, and the gradients that are its measure."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F

from sparsecnn.factorize import (
    CP,
    VH,
    Denil,
    Energy,
    Factorize,
    LayerProblem,
    Mahalanobis,
    UnsupportedLayer,
    Zhang,
    collect_gradients,
    factorize,
    factorize_,
)

BASES = [
    "channel_svd", "vh", VH(order="hv"), "tucker2", "tucker4", CP(modes=3), "cp", "jaderberg1",
    "rigamonti", "bicluster_svd", "bicluster_outer",
]  # fmt: skip
UNGROUPED = {"bicluster_svd", "bicluster_outer"}


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64)


def conv(groups=1, seed=0, size=(8, 12)) -> nn.Conv2d:
    layer = nn.Conv2d(*size, 3, padding=1, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=seed + i))
    return layer


def product(layer, seed=7):
    """alpha that is a factor per filter times one per channel, (K, C/G, 3, 3)."""
    k, c = layer.weight.shape[:2]
    a, b = normal(k, seed=seed).abs() + 0.2, normal(c, seed=seed + 1).abs() + 0.2
    return (a[:, None] * b)[:, :, None, None].expand(layer.weight.shape)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_full_rank_equals_dense(base, groups):
    layer, method = conv(groups, size=(4, 6)), Mahalanobis(base)
    p = LayerProblem.of(layer)
    if groups > 1 and str(method).split(",")[0] in UNGROUPED:
        with pytest.raises(UnsupportedLayer, match="expected groups 1"):
            factorize(layer, method, method.full_ranks(p), gradients=product(layer))
        return
    x = normal(2, 4, 7, 7)
    chain = factorize(layer, method, method.full_ranks(p), gradients=product(layer))
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-8)
    low = tuple(max(1, r // 8) for r in method.full_ranks(p))
    chain = factorize(layer, method, low, gradients=product(layer))
    plain = factorize(layer, base, low)
    assert [type(s) for s in chain] == [type(s) for s in plain] and chain.ranks == plain.ranks
    assert not torch.allclose(chain.dense_weight(), plain.dense_weight(), atol=1e-3)


@pytest.mark.parametrize("base", ["channel_svd", "vh", "tucker2", "cp", "bicluster_svd"])
def test_the_weighted_error_is_less_than_without_the_metric(base):
    layer = conv()
    alpha = product(layer)
    ranks = {"tucker2": (4, 3), "bicluster_svd": (2, 2)}.get(base, 4)

    def error(method, **options):
        made = factorize(layer, method, ranks, **options).dense_weight()
        return float((alpha * (made - layer.weight.detach())).norm())

    assert error(Mahalanobis(base), gradients=alpha) < 0.9 * error(base)


def test_the_svd_is_the_optimum_of_the_weighted_error():
    layer, rank = conv(), 5
    alpha = product(layer)
    made = factorize(layer, Mahalanobis(), rank, gradients=alpha)
    scaled = (alpha * layer.weight.detach()).flatten(1)
    tail = torch.linalg.svdvals(scaled)[rank:].square().sum()
    gap = (alpha * (made.dense_weight() - layer.weight.detach())).square().sum()
    torch.testing.assert_close(gap, tail)
    # Energies are those of the weighted kernel: the rank follows the metric.
    spectrum = torch.linalg.svdvals(scaled).square()
    least = int((spectrum.cumsum(0) < 0.8 * spectrum.sum()).sum()) + 1
    p = LayerProblem.of(layer, gradients=alpha)
    assert Energy(0.8).select(p, Mahalanobis()) == (least,)
    assert Energy(0.8).select(p, Mahalanobis()) < Energy(0.8).select(p, Mahalanobis().base_method)


def test_gradients_that_favour_nobody_change_nothing():
    layer = conv()
    for alpha in (torch.ones_like(layer.weight), torch.zeros_like(layer.weight)):
        made = factorize(layer, Mahalanobis("vh"), 6, gradients=alpha)
        torch.testing.assert_close(made.dense_weight(), factorize(layer, "vh", 6).dense_weight())


def test_slices_without_a_gradient_come_last_and_stay_finite():
    layer = conv()
    alpha = torch.ones_like(layer.weight)
    alpha[8:] = 0
    made = factorize(layer, Mahalanobis(), 8, gradients=alpha).dense_weight()
    assert torch.isfinite(made).all()
    gap = (made - layer.weight.detach()).flatten(1).norm(dim=1)
    assert gap[:8].max() < 0.1 < gap[8:].min()


def test_linear_layers():
    layer = nn.Linear(10, 7, dtype=torch.float64)
    alpha = (normal(7, 1).abs() + 0.1) * (normal(1, 10, seed=1).abs() + 0.1)
    made = factorize(layer, Mahalanobis("fc_svd"), 3, gradients=alpha)
    gap = (alpha * (made.dense_weight() - layer.weight.detach())).square().sum()
    tail = torch.linalg.svdvals(alpha * layer.weight.detach())[3:].square().sum()
    torch.testing.assert_close(gap, tail)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def labelled(n=6):
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(n) % 4


def masked() -> Net:
    model = Net()
    nn.utils.prune.random_unstructured(model.conv, "weight", 0.5)
    return model


def test_collected_gradients_are_those_of_single_samples():
    torch.manual_seed(0)
    model = Net().train()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    x, y = labelled()
    found = collect_gradients(model, ["conv", "fc"], [(x[:4], y[:4]), ((x[4:],), y[4:])])
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    squares = dict.fromkeys(("conv", "fc"), 0.0)
    for i in range(6):
        twin.zero_grad()
        F.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
        for name in squares:
            squares[name] += twin.get_submodule(name).weight.grad.double().square()
    for name, total in squares.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], (total / 6).sqrt(), rtol=1e-4, atol=1e-9)
    assert model.training and not model.norm.training
    assert not model.conv.weight.requires_grad and model.fc.weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    squared = collect_gradients(
        model, ["fc"], [(x, y)], loss_fn=lambda out, labels: out.square().mean()
    )
    assert not torch.allclose(squared["fc"], found["fc"])


def test_a_network_in_the_metric_of_its_loss():
    torch.manual_seed(0)
    model = Net().eval()
    x, y = labelled()
    config = {"conv": Factorize(Mahalanobis("vh"), 2), "fc": Factorize(Mahalanobis("fc_svd"), 1)}
    gradients = collect_gradients(model, ["conv", "fc"], [(x, y)])
    dense = copy.deepcopy(model)
    with pytest.raises(ValueError, match="expected gradients of 'conv' for a method that works"):
        factorize_(model, config, x, gradients={"fc": gradients["fc"]}, measure=False)
    with pytest.raises(TypeError, match="gradients a mapping of layer names to tensors, got list"):
        factorize_(model, config, x, gradients=list(gradients.values()), measure=False)
    assert type(model.conv) is nn.Conv2d
    report = factorize_(model, config, x, gradients=gradients, measure=False)
    assert [r.method for r in report] == ["vh, mahalanobis", "fc_svd, mahalanobis"]
    assert model.conv.method == "vh, mahalanobis"
    made = factorize(dense.conv, Mahalanobis("vh"), 2, gradients=gradients["conv"], in_hw=(8, 8))
    torch.testing.assert_close(model.conv.dense_weight(), made.dense_weight())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mahalanobis(3), TypeError, "method a name or a Method, got int"),
        (lambda: Mahalanobis("vv"), ValueError, "method one of .*, got 'vv'"),
        (lambda: Mahalanobis(Zhang()), ValueError, "on the weights alone, got 'zhang'"),
        (lambda: Mahalanobis(Mahalanobis()), ValueError, "weights alone, got 'channel_svd, maha"),
        (lambda: factorize(conv(), Mahalanobis(), 3), ValueError, "expected gradients for method"),
        (lambda: factorize(conv(), Mahalanobis("dct"), 3, gradients=product(conv())),
         UnsupportedLayer, "without a fixed basis, got 'dct'"),
        (lambda: factorize(conv(), Mahalanobis(Denil()), 3, gradients=product(conv())),
         UnsupportedLayer, "without a fixed basis, got 'denil'"),
        (lambda: factorize(conv(), Mahalanobis(), 3, gradients=torch.ones(3)),
         ValueError, r"expected gradients \(12, 8, 3, 3\), got \(3,\)"),
        (lambda: factorize(conv(), Mahalanobis(), 3, gradients=3.0), ValueError, "got float"),
        (lambda: factorize(conv(), Mahalanobis(), 3, gradients=-product(conv())), ValueError,
         "expected gradients finite and >= 0"),
        (lambda: collect_gradients(Net(), ["conf"], [labelled()]), ValueError, "module 'conf'"),
        (lambda: collect_gradients(Net(), ["norm"], [labelled()]), TypeError, "got BatchNorm2d"),
        (lambda: collect_gradients(Net(), ["conv"], []), ValueError, "at least one sample, got"),
        (lambda: collect_gradients(Net(), ["conv"], [labelled()[0]]), TypeError, "inputs, labels"),
        (lambda: collect_gradients(Net(), ["conv"], [("x", 1)]), TypeError, "tensors, got 'x'"),
        (lambda: collect_gradients(Net(), ["conv"], [(labelled()[0], [1] * 6)]), TypeError,
         r"labels to be a tensor, got \[1"),
        (lambda: collect_gradients(Net(), ["conv"], [(labelled()[0], labelled()[1][:4])]),
         ValueError, r"inputs \(6, 3, 8, 8\) and labels \(4,\)"),
        (lambda: collect_gradients(masked(), ["conv"], [labelled()]), ValueError,
         "plain weights at 'conv', got masked ones"),
        (lambda: collect_gradients(
            Net(), ["conv"], [labelled()], loss_fn=lambda out, y: (out / 0).sum()
        ), ValueError, "finite gradients, got NaN or infinity at 'conv'"),
    ],
)  # fmt: skip
def test_wrong_values(call, error, message):
    with pytest.raises(error, match=message):
        call()
