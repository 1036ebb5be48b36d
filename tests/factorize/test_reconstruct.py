"""Chains fitted to the responses of the layers they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.factorize import factorize
from sparsecnn.factorize.collect import layer_inputs
from sparsecnn.factorize.reconstruct import reconstruct_


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source)


def images(count: int = 24, seed: int = 0) -> Tensor:
    """Correlated maps (N, 8, 10, 10): three latent channels, smooth."""
    smooth = nn.functional.avg_pool2d(rand(count, 3, 10, 10, seed=seed), 3, 1, 1)
    mixed = torch.einsum("cd,ndhw->nchw", rand(8, 3, seed=seed + 1), smooth)
    return mixed + 0.05 * rand(count, 8, 10, 10, seed=seed + 2)


def conv(c_in: int = 8, c_out: int = 12, seed: int = 5) -> nn.Conv2d:
    """3x3, seeded."""
    layer = nn.Conv2d(c_in, c_out, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(rand(*layer.weight.shape, seed=seed) / 9)
        assert layer.bias is not None
        layer.bias.copy_(rand(c_out, seed=seed + 1) / 4)
    return layer


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("method", "rank"), [("vh", 4), ("channel_svd", 3)])
def test_reconstruction_lowers_the_response_error(method: str, rank: int, relu: bool) -> None:
    layer, x = conv(), images()
    chain = factorize(layer, method, rank)
    act = nn.ReLU() if relu else nn.Identity()
    with torch.no_grad():
        start = relative(act(chain(x)), act(layer(x)))
        before, after = reconstruct_(chain, layer, x.split(8), steps=90, lr=1e-2, relu=relu)
        assert before == pytest.approx(start, rel=1e-4)
        assert after == pytest.approx(relative(act(chain(x)), act(layer(x))), rel=1e-4)
        assert after < 0.9 * before
        # Not only on the maps it has seen.
        fresh = images().flip(2)
        old = factorize(layer, method, rank)
        wanted = act(layer(fresh))
        assert relative(act(chain(fresh)), wanted) < relative(act(old(fresh)), wanted)


def test_reconstruction_behind_a_relu_serves_the_relu() -> None:
    layer, x = conv(), images()
    errors = []
    for relu in (False, True):
        chain = factorize(layer, "channel_svd", 3)
        reconstruct_(chain, layer, x.split(8), steps=90, lr=1e-2, relu=relu)
        with torch.no_grad():
            errors.append(relative(chain(x).relu(), layer(x).relu()))
    assert errors[1] < 0.97 * errors[0]


def test_reconstruction_never_raises_the_error() -> None:
    layer, x = conv(), images()
    for lr in (30.0, 1e30):
        chain = factorize(layer, "vh", 4)
        before, after = reconstruct_(chain, layer, [x], steps=5, lr=lr)
        assert after <= before
        with torch.no_grad():
            assert relative(chain(x), layer(x)) <= before * (1 + 1e-5)
    start = copy.deepcopy(chain.state_dict())
    assert reconstruct_(chain, layer, [x], steps=0) == (before, before)
    assert all(torch.equal(v, start[k]) for k, v in chain.state_dict().items())


def test_reconstruction_of_an_exact_chain_is_left_alone() -> None:
    layer, x = conv(), images()
    chain = copy.deepcopy(layer)
    assert reconstruct_(chain, layer, [x], steps=3) == (0.0, 0.0)
    assert torch.equal(chain.weight, layer.weight)
    silent = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    nn.init.zeros_(silent.weight)
    assert reconstruct_(copy.deepcopy(silent), silent, [x], steps=3) == (0.0, 0.0)


def test_reconstruction_is_deterministic_and_uses_its_seed() -> None:
    layer, x = conv(), images()

    def weights(seed: int) -> Tensor:
        chain = factorize(layer, "vh", 4)
        torch.manual_seed(torch.randint(100, ()))
        reconstruct_(chain, layer, x.split(4), steps=12, lr=1e-2, seed=seed)
        return chain[0].weight.detach()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_reconstruction_touches_the_chain_only() -> None:
    net = nn.Sequential(conv(), nn.ReLU(), conv(12, 6, 8))
    layer = copy.deepcopy(net[0])
    net[0] = factorize(layer, "channel_svd", 3)
    fixed, trained = net[0][0].weight, net[0][1].weight
    fixed.requires_grad_(False)
    net[0][1].eval()
    trained.grad = torch.ones_like(trained)
    before = copy.deepcopy(net.state_dict())
    original = copy.deepcopy(layer.state_dict())
    reconstruct_(net[0], layer, [images()], steps=4, lr=1e-2)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.1.weight", "0.1.bias"}
    assert all(torch.equal(v, original[k]) for k, v in layer.state_dict().items())
    assert torch.equal(trained.grad, torch.ones_like(trained))
    assert all(p.grad is None for p in layer.parameters()) and net[0][1].bias.grad is None
    assert net[0].training and not net[0][1].training and net[0][0].training


def test_reconstruction_layer_by_layer_corrects_and_freezes() -> None:
    original = nn.Sequential(conv(), nn.ReLU(), conv(12, 8, 8), nn.ReLU())
    x = images()
    net = copy.deepcopy(original)
    net[0] = factorize(net[0], "vh", 4)
    reconstruct_(net[0], original[0], layer_inputs(net, "0", [x]), steps=20, lr=1e-2, relu=True)
    frozen = copy.deepcopy(net[0].state_dict())
    results = []
    for reference in (None, original):
        last = copy.deepcopy(net)
        pairs = layer_inputs(last if reference else original, "2", x.split(8), reference=reference)
        last[2] = factorize(original[2], "vh", 6)
        before, after = reconstruct_(last[2], original[2], pairs, steps=90, lr=1e-2, relu=True)
        assert after < before
        for name, value in last[0].state_dict().items():
            assert torch.equal(value, frozen[name])
        with torch.no_grad():
            results.append(relative(last(x), original(x)))
    # Fitted to what it gets in the compressed network, not in the original one.
    assert results[1] < 0.95 * results[0]


def test_reconstruction_refuses_bad_arguments() -> None:
    layer, x = conv(), images(2)
    chain = factorize(layer, "vh", 4)
    for steps in (-1, 1.5, True):
        with pytest.raises(ValueError, match="expected steps an integer >= 0, got"):
            reconstruct_(chain, layer, [x], steps=steps)  # type: ignore[arg-type]
    for lr in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected lr > 0, got"):
            reconstruct_(chain, layer, [x], steps=1, lr=lr)
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        reconstruct_(chain, layer, [], steps=1)
    with pytest.raises(TypeError, match="a tensor or a pair of tensors, got list"):
        reconstruct_(chain, layer, [[x]], steps=1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"expected responses \(2, 12, 10, 10\) of the chain, got"):
        reconstruct_(chain, layer, [(x[:, :, :8], x)], steps=1)
    with pytest.raises(ValueError, match="a chain with parameters to train, got none"):
        reconstruct_(copy.deepcopy(chain).requires_grad_(False), layer, [x], steps=1)
