"""Zeros are accepted from wherever they come, and the user's model is not touched."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from sparsecnn.accelerate import accelerate, accelerate_
from sparsecnn.nn import CSRConv2d, CSRLinear

from .conftest import FakeTimer, assert_same_function, liven_norms, zero_weights

X = (1, 3, 10, 10)


class Mask(nn.Module):
    """Parametrization with a fixed mask."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.8
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 5),
    )
    return liven_norms(net).eval()  # type: ignore[return-value]


def _targets(net: nn.Sequential) -> list[nn.Module]:
    return [net[0], net[3], net[5]]


def attached(net: nn.Sequential) -> None:
    for module in _targets(net):
        prune.l1_unstructured(module, "weight", 0.8)


def attached_twice_and_bias(net: nn.Sequential) -> None:
    for module in _targets(net):
        prune.random_unstructured(module, "weight", 0.5)
        prune.l1_unstructured(module, "weight", 0.6)
    prune.l1_unstructured(net[0], "bias", 0.5)


def removed(net: nn.Sequential) -> None:
    attached(net)
    for module in _targets(net):
        prune.remove(module, "weight")


def plain_zeros(net: nn.Sequential) -> None:
    zero_weights(net, 0.8)


def parametrized(net: nn.Sequential) -> None:
    for module in _targets(net):
        parametrize.register_parametrization(module, "weight", Mask(module.weight))


def weight_norm_parametrization(net: nn.Sequential) -> None:
    plain_zeros(net)
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[3])


def weight_norm_hook(net: nn.Sequential) -> None:
    plain_zeros(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(net[0])
        torch.nn.utils.spectral_norm(net[3])


MASKS = [
    attached,
    attached_twice_and_bias,
    removed,
    plain_zeros,
    parametrized,
    weight_norm_parametrization,
    weight_norm_hook,
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_every_kind_of_mask_is_accelerated(
    mask: Callable[[nn.Sequential], None], timer: Callable[..., FakeTimer]
) -> None:
    timer()
    net = _net()
    mask(net)
    net.eval()
    x = torch.randn(X)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kinds = [type(m) for m in net.modules()]
    fast = accelerate(net, x)
    for index, kind in ((0, CSRConv2d), (3, CSRConv2d), (5, CSRLinear)):
        assert type(fast[index]) is kind
        assert fast[index].density < 0.5
    assert_same_function(net, fast, torch.randn(X))
    # The user's model: same modules, same state, still working with its masks attached.
    assert [type(m) for m in net.modules()] == kinds
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    with torch.no_grad():
        net(x)


@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_in_place_twin(
    mask: Callable[[nn.Sequential], None], timer: Callable[..., FakeTimer]
) -> None:
    timer()
    net = _net()
    mask(net)
    net.eval()
    x = torch.randn(X)
    with torch.no_grad():
        want = net(x)
    assert accelerate_(net, x) is net
    assert type(net[0]) is CSRConv2d and type(net[5]) is CSRLinear
    with torch.no_grad():
        got = net(x)
    assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())
    assert not any(key.endswith(("_orig", "_mask")) for key in net.state_dict())


def test_masked_dense_layer_is_plain_afterwards(timer: Callable[..., FakeTimer]) -> None:
    timer(csr=9.0, swapped=9.0)
    net = _net()
    attached(net)
    fast = accelerate(net, torch.randn(X))
    assert list(fast[5].state_dict()) == ["weight", "bias"]
    assert isinstance(fast[5].weight, nn.Parameter)
    assert float((fast[5].weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)


def test_result_shares_nothing_with_the_model(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net()
    plain_zeros(net)
    fast = accelerate(net, torch.randn(X))
    mine = {t.data_ptr() for t in (*net.parameters(), *net.buffers())}
    for name, tensor in (*fast.named_parameters(), *fast.named_buffers()):
        assert tensor.data_ptr() not in mine, name
    x = torch.randn(X)
    with torch.no_grad():
        want = fast(x)
        for tensor in net.parameters():
            tensor.add_(1.0)
        assert torch.equal(fast(x), want)


def test_flags_survive(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net().double()
    plain_zeros(net)
    net = net.float()
    net[0].weight.requires_grad_(False)
    net[5].weight.requires_grad_(False)
    fast = accelerate(net, torch.randn(X))
    assert not fast[0].values.requires_grad and not fast[5].values.requires_grad
    assert fast[3].values.requires_grad
    assert not any(m.training for m in fast.modules())
    assert {p.dtype for p in fast.parameters()} == {torch.float32}


def test_copy_and_pickle_of_the_result(timer: Callable[..., FakeTimer]) -> None:
    timer(**{"swapped channels_last": 0.5})
    net = _net()
    plain_zeros(net)
    fast = accelerate(net, torch.randn(X))
    assert fast.report.layout == "channels_last"
    x = torch.randn(X)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.no_grad():
            assert torch.equal(twin(x), fast(x))
        assert twin.report.to_dict()["layers"][0]["kernel"] == "csr"


def test_training_mode_is_left_with_a_warning(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net().train()
    plain_zeros(net)
    with pytest.warns(UserWarning, match="training mode"):
        fast = accelerate(net, torch.randn(X))
    assert net.training and net[1].training and not fast.training
    assert any("training mode" in note for note in fast.report.notes)
    assert_same_function(net.eval(), fast, torch.randn(X))


def test_bfloat16(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net()
    plain_zeros(net)
    net = net.to(torch.bfloat16)
    fast = accelerate(net, torch.randn(X).to(torch.bfloat16))
    assert isinstance(fast[0], CSRConv2d) and fast[0].values.dtype == torch.bfloat16
    x = torch.randn(X).to(torch.bfloat16)
    with torch.no_grad():
        want, got = net(x).double(), fast(x).double()
    assert float((want - got).abs().max()) <= 0.1 * float(want.abs().max())


def test_float16_stays_dense_with_the_reason(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net()
    plain_zeros(net)
    fast = accelerate(net.half(), torch.randn(X).half())
    reasons = [layer.reason for layer in fast.report.layers]
    assert all("float16 on cpu" in reason for reason in reasons), reasons
    assert not any(isinstance(m, (CSRConv2d, CSRLinear)) for m in fast.modules())
