"""Residual blocks and runs of layers: found where they are, refused where they only look so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn import accelerate, densify
from sparsecnn._accelerate.blocks import Block, find_blocks, find_runs
from sparsecnn._accelerate.survey import Site, find_sites, fold_sites, record_sites
from sparsecnn.nn import ChainConv2d, CSRConv2d, FusedConv2d, ResidualBlock
from tests.accelerate.conftest import FakeTimer, assert_same_function, liven_norms, zero_weights

X = (2, 8, 9, 7)


class Basic(nn.Module):
    """conv, norm, relu, conv, norm, + x, relu; `sum` and `after` may be changed."""

    def __init__(
        self,
        add: Callable[[Tensor, Tensor], Tensor] = torch.add,
        after: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.add, self.after = add, after

    def body(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return torch.as_tensor(self.bn2(self.conv2(y)))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.add(self.body(x), x))


class Projected(Basic):
    """The shortcut is a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(12)
        self.down = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2), nn.BatchNorm2d(12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.down(x)
        return F.silu(y)


class Excited(Basic):
    """A module that is no convolution between the two."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))

    def __init__(self) -> None:
        super().__init__()
        self.gate = self.Gate()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.act1(self.bn1(self.conv1(x))))
        return torch.as_tensor(self.bn2(self.conv2(y)) + x)


class Leaky(Basic):
    """What runs beside the two paths would be lost."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.seen = y.mean()
        return F.relu(y + x)


class ReadTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return torch.as_tensor(self.bn2(self.conv2(y)) + y)


class Activated(Basic):
    """An activation in front of the addition cannot move behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x)) + x


class SelfSum(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + y


def net(*middle: nn.Module, channels: int = 8) -> nn.Module:
    """Blocks between two plain convolutions, so that no block is the model itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), *middle, nn.Conv2d(channels, 4, 1)).eval()
    return liven_norms(zero_weights(model, 0.6))


def analyse(model: nn.Module) -> tuple[list[Block], list[list[str]]]:
    """Blocks, and names of the layers of each run."""
    sites = find_sites(model, None)
    recording = record_sites(model, (torch.randn(X),), sites)
    fold_sites(sites, recording)
    blocks = find_blocks(model, sites, recording)
    return blocks, [[s.name for s in run] for run in find_runs(sites, recording, blocks)]


def names(path: tuple[Site | str, ...]) -> list[str]:
    return [part if isinstance(part, str) else part.name for part in path]


def test_identity_block_is_found() -> None:
    blocks, runs = analyse(net(Basic()))
    (block,) = blocks
    assert block.name == "1"
    assert names(block.body) == ["1.conv1", "1.conv2"]
    assert block.shortcut == ()
    assert block.activation == "relu"
    # The input of a block is read twice, its output by the next layer: runs end at its border.
    assert runs == [["1.conv1", "1.conv2"]]


def test_projection_and_in_place_sum_are_found() -> None:
    (block,) = analyse(net(Projected(), channels=12))[0]
    assert names(block.body) == ["1.conv1", "1.conv2"]
    assert names(block.shortcut) == ["1.down.0"]
    assert block.activation == "silu"


def test_modules_of_other_kinds_are_kept() -> None:
    (block,) = analyse(net(Excited()))[0]
    assert names(block.body) == ["1.conv1", "1.gate", "1.conv2"]
    assert block.activation == "none"


@pytest.mark.parametrize(
    "block",
    [
        Basic(add=lambda a, b: torch.add(a, b, alpha=2)),
        Basic(add=torch.sub),
        Basic(add=torch.mul),
        Basic(add=lambda a, b: a + b + 1),
        Basic(add=lambda a, b: a + 1),
        Basic(after=torch.sigmoid),
        Basic(after=lambda y: F.relu(y) * 2),
        Basic(after=lambda y: F.relu(y) + y),
        Leaky(),
        ReadTwice(),
        Activated(),
        SelfSum(),
    ],
    ids=lambda b: type(b).__name__,
)
def test_what_only_looks_like_a_block_is_left_alone(block: nn.Module) -> None:
    model = net(block)
    blocks, _ = analyse(model)
    assert blocks == []


def test_blocks_called_twice_or_listened_to_are_left_alone() -> None:
    block = Basic()
    assert analyse(net(block, block))[0] == []
    for name in ("", "act1", "conv2"):
        heard = Basic()
        heard.get_submodule(name).register_forward_hook(lambda *_: None)
        assert analyse(net(heard))[0] == []


def test_intermediate_that_the_model_returns_is_no_block() -> None:
    taps: list[Tensor] = []

    class Tapped(Basic):
        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            taps.append(y)
            return F.relu(y + x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tapped()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            taps.clear()
            return self.inner(x), taps[0]

    assert analyse(Model().eval())[0] == []


@pytest.mark.parametrize("make", [Basic, Projected, Excited], ids=lambda m: m.__name__)
def test_accelerated_blocks_compute_the_same(
    make: Callable[[], nn.Module], timer: Callable[..., FakeTimer]
) -> None:
    timer()
    model = net(make(), channels=12 if make is Projected else 8)
    fast = accelerate(model, torch.randn(X))
    block = fast[1]
    assert isinstance(block, ResidualBlock)
    last = block.body[-1]
    assert isinstance(last, CSRConv2d)
    assert last.activation == {Basic: "relu", Projected: "silu", Excited: "none"}[make]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert_same_function(model, fast, torch.randn(X))
    assert_same_function(model, densify(fast), torch.randn(X))
    reasons = {layer.name: layer.reason for layer in fast.report.layers}
    assert "adds the residual of its block" in reasons["1.conv2"]
    assert "adds the residual" not in reasons["1.conv1"]


def test_a_block_whose_last_layer_stays_dense(timer: Callable[..., FakeTimer]) -> None:
    timer(csr=5.0, fused=1.0)
    model = net(Basic())
    fast = accelerate(model, torch.randn(X))
    assert isinstance(fast[1], ResidualBlock)
    assert type(fast[1].body[-1]) is FusedConv2d
    assert_same_function(model, fast, torch.randn(X))


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, add: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24),
            nn.ReLU6(inplace=True), nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return torch.as_tensor(x + y if self.add else y)


@pytest.mark.parametrize("add", [False, True])
def test_a_chain_takes_the_place_of_its_layers(add: bool, timer: Callable[..., FakeTimer]) -> None:
    timer(chain=0.5)
    model = net(Inverted(add))
    fast = accelerate(model, torch.randn(X))
    (chain,) = [m for m in fast.modules() if isinstance(m, ChainConv2d)]
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU6)) for m in fast.modules())
    if add:
        assert isinstance(fast[1], ResidualBlock)
        assert list(fast[1].body) == [chain]
    kernels = {layer.name: layer.kernel for layer in fast.report.layers}
    inside = [name for name, kernel in kernels.items() if kernel == "chain"]
    assert inside == ["1.layers.0", "1.layers.3", "1.layers.6"]
    assert_same_function(model, fast, torch.randn(X))
    dense = densify(fast)
    assert not any(isinstance(m, (ChainConv2d, CSRConv2d)) for m in dense.modules())
    assert_same_function(model, dense, torch.randn(X))
    reason = {layer.name: layer.reason for layer in fast.report.layers}["1.layers.6"]
    assert "0.5 ms vs 1 ms apart" in reason


def test_a_chain_that_is_no_faster_is_not_taken(timer: Callable[..., FakeTimer]) -> None:
    timer(chain=0.99)
    fast = accelerate(net(Inverted(True)), torch.randn(X))
    assert not any(isinstance(m, ChainConv2d) for m in fast.modules())
    timer(chain=0.1)
    fast = accelerate(net(Inverted(True)), torch.randn(X), candidates=["csr"])
    assert not any(isinstance(m, ChainConv2d) for m in fast.modules())


def test_a_wrong_chain_is_not_taken(
    timer: Callable[..., FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any = ChainConv2d.forward

    def wrong(self: ChainConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return torch.as_tensor(right(self, x, residual) * 1.001)

    monkeypatch.setattr(ChainConv2d, "forward", wrong)
    timer(chain=0.5)
    fast = accelerate(net(Inverted(True)), torch.randn(X))
    assert not any(isinstance(m, ChainConv2d) for m in fast.modules())


def test_an_empty_body_is_refused() -> None:
    with pytest.raises(ValueError, match="expected body with at least one layer, got none"):
        ResidualBlock([])
