"""Batch norms and activations are folded exactly where that is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn.accelerate import accelerate
from sparsecnn.measure import LayerReport
from sparsecnn.nn import CSRConv2d, FusedConv2d

from .conftest import FakeTimer, assert_same_function, liven_norms, zero_weights

X = (2, 3, 12, 12)


class Net(nn.Module):
    """Pieces that the forward functions of the tests put together."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn_in = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU()
        self.silu = nn.SiLU()
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def chain(n: Net, x: Tensor) -> Tensor:
    return n.silu(n.bn2(n.conv2(n.relu(n.bn(n.conv(x))))))


def no_norm(n: Net, x: Tensor) -> Tensor:
    return n.relu2(n.conv2(n.relu(n.conv(x))))


def shared_relu(n: Net, x: Tensor) -> Tensor:
    return n.relu(n.bn2(n.conv2(n.relu(n.bn(n.conv(x))))))


def residual(n: Net, x: Tensor) -> Tensor:
    y = n.relu(n.bn(n.conv(x)))
    z = n.bn2(n.conv2(y))
    z += y
    return n.silu(z)


def conv_output_used_elsewhere(n: Net, x: Tensor) -> Tensor:
    y = n.conv(x)
    return n.relu(n.bn(y)) + y


def conv_output_returned_too(n: Net, x: Tensor) -> Tensor:
    y = n.conv(x)
    return torch.cat([y, n.bn(y)], 1)


def norm_output_used_twice(n: Net, x: Tensor) -> Tensor:
    y = n.bn(n.conv(x))
    return n.relu2(y) + y


def norm_used_twice(n: Net, x: Tensor) -> Tensor:
    return n.bn(n.conv2(n.bn(n.conv(x))))


def conv_used_twice_same_norm(n: Net, x: Tensor) -> Tensor:
    y = n.conv(x)
    return n.bn2(n.conv2(n.relu(n.bn2(n.conv2(y)))))


def conv_used_twice_two_norms(n: Net, x: Tensor) -> Tensor:
    y = n.conv(x)
    return n.bn2(n.conv2(n.bn(n.conv2(y))))


def pre_activation(n: Net, x: Tensor) -> Tensor:
    y = n.conv(n.relu2(n.bn_in(x)))
    return n.conv2(n.silu(n.bn(y))) + y


def functional_relu(n: Net, x: Tensor) -> Tensor:
    return F.relu(n.bn(n.conv(x)))


def functional_between(n: Net, x: Tensor) -> Tensor:
    return n.bn(F.relu(n.conv(x)))


def inplace_between(n: Net, x: Tensor) -> Tensor:
    y = n.conv(x)
    y.mul_(2.0)
    return n.relu(n.bn(y))


def view_of_output(n: Net, x: Tensor) -> Tensor:
    y = n.conv(x)
    corner = y[:, :, :1, :1]
    return n.bn(y) + corner


def relu_before_norm(n: Net, x: Tensor) -> Tensor:
    return n.bn(n.relu(n.conv(x)))


def two_images(n: Net, x: Tensor) -> Tensor:
    return n.relu(n.bn(n.conv(x))).mean((2, 3)) + n.relu(n.bn(n.conv(x[:, :, 2:, 2:]))).mean((2, 3))


def eval_dropout(n: Net, x: Tensor) -> Tensor:
    return n.relu(F.dropout(n.bn(n.conv(x)), training=n.training))


# forward -> what must be folded into conv and into conv2
CASES: list[tuple[Callable[[Net, Tensor], Tensor], set[str], set[str]]] = [
    (chain, {"bn", "relu"}, {"bn2", "silu"}),
    (no_norm, {"relu"}, {"relu2"}),
    (shared_relu, {"bn"}, {"bn2"}),
    (residual, {"bn", "relu"}, {"bn2"}),
    (conv_output_used_elsewhere, set(), set()),
    (conv_output_returned_too, set(), set()),
    (norm_output_used_twice, {"bn"}, set()),
    (norm_used_twice, set(), set()),
    (conv_used_twice_same_norm, set(), {"bn2"}),
    (conv_used_twice_two_norms, set(), set()),
    (pre_activation, set(), set()),
    (functional_relu, {"bn"}, set()),
    (functional_between, set(), set()),
    (inplace_between, set(), set()),
    (view_of_output, set(), set()),
    (relu_before_norm, {"relu"}, set()),
    (two_images, {"bn", "relu"}, set()),
    (eval_dropout, {"bn", "relu"}, set()),
]


def _net(forward: Callable[[Net, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    return liven_norms(zero_weights(Net(forward), 0.8)).eval()  # type: ignore[return-value]


def _layers(model: nn.Module) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in model.report.layers}  # type: ignore[union-attr]


@pytest.mark.parametrize("sparse", [True, False], ids=["csr", "dense"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=[c[0].__name__ for c in CASES])
def test_folds_what_may_be_folded_and_nothing_else(
    case: tuple[Callable[[Net, Tensor], Tensor], set[str], set[str]],
    layout: str,
    sparse: bool,
    timer: Callable[..., FakeTimer],
) -> None:
    forward, into_conv, into_conv2 = case
    net = _net(forward)
    x = torch.randn(X)
    timer(csr=1.0 if sparse else 3.0, **{f"swapped {layout}": 1.0, f"folded {layout}": 2.0})
    fast = accelerate(net, x)
    layers = _layers(fast)
    # The recording alone must get it right; the comparison of outputs is the second line.
    assert not any("undone" in note for note in fast.report.notes)  # type: ignore[union-attr]
    if sparse:
        assert layers["conv"].kernel == "csr" and isinstance(fast.conv, CSRConv2d)
    if sparse or into_conv or into_conv2:
        assert set(layers["conv"].folded) == into_conv, layers["conv"].reason
        assert set(layers["conv2"].folded) == into_conv2, layers["conv2"].reason
        for name in into_conv | into_conv2:
            assert isinstance(getattr(fast, name), nn.Identity)
    assert_same_function(net, fast, torch.randn(X))
    assert_same_function(net, fast, torch.randn(X).to(memory_format=torch.channels_last))


def test_reasons_for_not_folding_are_named(timer: Callable[..., FakeTimer]) -> None:
    timer()
    x = torch.randn(X)
    elsewhere = _layers(accelerate(_net(conv_output_used_elsewhere), x))["conv"].reason
    assert "read elsewhere" in elsewhere
    twice = _layers(accelerate(_net(conv_used_twice_two_norms), x))["conv2"].reason
    assert "different modules" in twice
    shared = _layers(accelerate(_net(shared_relu), x))["conv"].reason
    assert "used elsewhere" in shared


def test_norm_without_running_statistics_is_not_folded(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(X)
    fast = accelerate(zero_weights(net, 0.8), x)
    assert "no running statistics" in _layers(fast)["0"].reason
    assert type(fast[1]) is nn.BatchNorm2d
    assert_same_function(net, fast, torch.randn(X))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), nn.SyncBatchNorm(4)])
def test_other_plain_batch_norms_are_folded(
    norm: nn.Module, timer: Callable[..., FakeTimer]
) -> None:
    timer()
    net = liven_norms(zero_weights(nn.Sequential(nn.Conv2d(3, 4, 3), norm), 0.8)).eval()
    fast = accelerate(net, torch.randn(X))
    assert _layers(fast)["0"].folded == ("1",)
    assert_same_function(net, fast, torch.randn(X))


class Shifted(nn.BatchNorm2d):
    """Looks like a batch norm and is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class NormAct(nn.BatchNorm2d):
    """Norm, dropout and activation in one module, as timm has it."""

    def __init__(self, channels: int, act: nn.Module, shift: float = 0.0) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)
        return self.act(self.drop(x)) + self.shift


def test_subclass_of_batch_norm_is_left_alone(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Shifted(4)).eval()
    fast = accelerate(liven_norms(zero_weights(net, 0.8)), torch.randn(X))
    assert "forward of its own" in _layers(fast)["0"].reason
    assert type(fast[1]) is Shifted
    assert_same_function(net, fast, torch.randn(X))


@pytest.mark.parametrize(
    ("act", "activation", "left"),
    [
        (nn.ReLU(inplace=True), "relu", nn.Identity),
        (nn.Hardswish(), "hardswish", nn.Identity),
        (nn.Identity(), "none", nn.Identity),
        (nn.GELU(), "none", nn.GELU),
    ],
    ids=["relu", "hardswish", "identity", "gelu"],
)
def test_norm_with_activation_inside(
    act: nn.Module, activation: str, left: type, timer: Callable[..., FakeTimer]
) -> None:
    timer()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, act)).eval()
    fast = accelerate(liven_norms(zero_weights(net, 0.8)), torch.randn(X))
    assert isinstance(fast[0], CSRConv2d) and fast[0].activation == activation
    assert type(fast[1]) is left
    assert_same_function(net, fast, torch.randn(X))


def test_norm_that_does_something_else_fails_the_check_on_data(
    timer: Callable[..., FakeTimer],
) -> None:
    timer()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, nn.ReLU(), shift=0.5)).eval()
    fast = accelerate(liven_norms(zero_weights(net, 0.8)), torch.randn(X))
    assert "changed the output" in _layers(fast)["0"].reason
    assert type(fast[1]) is NormAct
    assert_same_function(net, fast, torch.randn(X))


def test_folding_an_infinite_scale_is_refused(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0), nn.ReLU()).eval()
    zero_weights(net, 0.8)
    net[1].running_var[1] = 0.0
    fast = accelerate(net, torch.randn(X))
    assert "not finite" in _layers(fast)["0"].reason
    assert type(fast[1]) is nn.BatchNorm2d


def test_module_with_hooks_is_not_folded_away(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net(chain)
    seen: list[tuple[int, ...]] = []
    net.bn.register_forward_hook(lambda m, a, y: seen.append(tuple(y.shape)))
    net.conv2.register_forward_hook(lambda m, a, y: seen.append(tuple(y.shape)))
    fast = accelerate(net, torch.randn(X))
    assert "hooks" in _layers(fast)["conv"].reason and "hooks" in _layers(fast)["conv2"].reason
    seen.clear()
    with torch.no_grad():
        fast(torch.randn(X))
    assert seen == [(2, 8, 12, 12), (2, 8, 12, 12)]
    assert_same_function(net, fast, torch.randn(X))


def test_reference_kept_outside_the_module_tree_undoes_the_folding(
    timer: Callable[..., FakeTimer],
) -> None:
    """The forward reaches the old convolution by a way no replacement sees: caught by outputs."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.bn = nn.BatchNorm2d(8)
            self.also = [self.conv]

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.also[0](x))

    net = liven_norms(zero_weights(Hidden(), 0.8)).eval()
    timer()
    fast = accelerate(net, torch.randn(X))
    assert "undone" in _layers(fast)["conv"].reason
    assert type(fast.bn) is nn.BatchNorm2d
    assert any("undone" in note for note in fast.report.notes)
    assert_same_function(net, fast, torch.randn(X))


def test_dense_layer_with_folded_activation_is_a_fused_convolution(
    timer: Callable[..., FakeTimer],
) -> None:
    timer(csr=9.0, folded=1.0)
    net = _net(chain)
    fast = accelerate(net, torch.randn(X))
    assert isinstance(fast.conv, FusedConv2d) and fast.conv.activation == "relu"
    assert isinstance(fast.conv2, FusedConv2d) and fast.conv2.activation == "silu"
    assert fast.conv.bias is not None and fast.conv.weight.requires_grad
