"""Low-rank layers that train from scratch: the exact merge, geometry, refusals, training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.nn import FactorizedConv2d, LowRankConvBN

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "padding": (2, 1), "stride": (2, 1)},
    {"kernel_size": (1, 5), "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 2, "dilation": (1, 2), "stride": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "activation": False},
]


def used(geometry: dict[str, Any]) -> tuple[LowRankConvBN, Tensor]:
    """A layer in float64 whose norms have seen data and are not the identity."""
    torch.manual_seed(0)
    layer = LowRankConvBN(4, 6, rank=3, dtype=torch.float64, **geometry)
    with torch.no_grad():
        for norm in (layer.inner_norm, layer.outer_norm):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    x = torch.randn(5, 4, 11, 9, dtype=torch.float64)
    for _ in range(3):
        layer(x + 0.5)
    return layer.eval(), x


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_merge_is_exact_in_eval_mode(geometry: dict[str, Any]) -> None:
    layer, x = used(geometry)
    wanted = layer(x).detach()
    merged = layer.merge_inner_bn()
    torch.testing.assert_close(merged(x), wanted, rtol=0, atol=1e-12)
    chain, norm, *rest = merged
    assert type(chain) is FactorizedConv2d and type(norm) is nn.BatchNorm2d
    assert [type(m) for m in rest] == [nn.ReLU] * geometry.get("activation", True)
    assert (chain.method, chain.ranks, len(chain)) == ("vh", (3,), 2)
    assert chain.groups == geometry.get("groups", 1)
    # The inner norm matters: its bias is not zero, and it is not lost at the border.
    assert float(chain[0].bias.detach().abs().max()) > 0.1
    # No tensor is shared.
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    torch.testing.assert_close(merged(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometry_is_that_of_the_dense_layer(geometry: dict[str, Any]) -> None:
    layer, x = used(geometry)
    plain = {k: v for k, v in geometry.items() if k != "activation"}
    dense = nn.Conv2d(4, 6, bias=False, dtype=torch.float64, **plain)
    chain = FactorizedConv2d(layer.vertical, layer.horizontal, groups=plain.get("groups", 1))
    with torch.no_grad():
        dense.weight.copy_(chain.dense_weight())
        torch.testing.assert_close(chain(x), dense(x), rtol=0, atol=1e-12)
        assert layer(x).shape == dense(x).shape
    inner = 3 * plain.get("groups", 1)
    assert layer.vertical.out_channels == layer.inner_norm.num_features == inner


def test_without_zero_padding_the_merged_chain_is_one_convolution() -> None:
    layer, x = used({"kernel_size": 3, "padding": (1, 0)})
    chain = layer.merge_inner_bn()[0]
    torch.testing.assert_close(chain.to_dense()(x), chain(x), rtol=0, atol=1e-12)
    layer, x = used({"kernel_size": 3, "padding": 1})
    with pytest.raises(NotImplementedError, match="bias in front of stage 1"):
        layer.merge_inner_bn()[0].to_dense()


def test_merged_layers_keep_hooks_and_the_original_its_state() -> None:
    layer, x = used({"kernel_size": 3, "padding": 1})
    calls: list[str] = []
    layer.register_forward_hook(lambda m, a, y: calls.append(type(m).__name__))
    before = {k: t.clone() for k, t in layer.state_dict().items()}
    merged = layer.merge_inner_bn()
    merged(x)
    assert calls == ["Sequential"] and not any(m.training for m in merged.modules())
    assert all(torch.equal(t, before[k]) for k, t in layer.state_dict().items())


def test_wrong_arguments_are_refused() -> None:
    for rank in (0, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="LowRankConvBN: expected rank an integer >= 1, got"):
            LowRankConvBN(4, 6, 3, rank)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected activation a bool, got 'relu'"):
        LowRankConvBN(4, 6, 3, 2, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="divisible by groups"):
        LowRankConvBN(4, 6, 3, 2, groups=3)
    with pytest.raises(ValueError, match="padding='same' is not supported for strided"):
        LowRankConvBN(4, 6, 3, 2, 2, "same")
    with pytest.raises(ValueError, match=r"expected the layer in eval mode.*call \.eval\(\)"):
        LowRankConvBN(4, 6, 3, 2).merge_inner_bn()


def toy() -> tuple[Tensor, Tensor]:
    """Stripes in four directions at random phases, in noise."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 4
    down, right = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
    waves = torch.stack([down, right, (down + right) / 1.4, (down - right) / 1.4])[y]
    phase = 6.3 * torch.rand(64, 1, 1, generator=source)
    noise = 0.3 * torch.randn(64, 10, 10, generator=source)
    return (torch.sin(1.5 * waves + phase) + noise)[:, None], y


def trained(strip: Callable[[LowRankConvBN], object]) -> float:
    """Loss of a network of six low-rank layers after 40 steps."""
    torch.manual_seed(0)
    layers = [LowRankConvBN(1 if i == 0 else 12, 12, 3, 4, padding=1) for i in range(6)]
    for layer in layers:
        strip(layer)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    x, y = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_trains_from_scratch(record_property: Callable[[str, object], None]) -> None:
    def without_norms(layer: LowRankConvBN) -> None:
        layer.inner_norm = layer.outer_norm = nn.Identity()  # type: ignore[assignment]

    loss = trained(lambda layer: None)
    record_property("loss with norms", loss)
    record_property("loss without", trained(without_norms))
    assert loss < 0.3  # that of a guess is log 4 = 1.39
