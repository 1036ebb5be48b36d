"""Factorized layers as layers: dense and fused forms, copies, slices, flags, wrong arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.nn import ChainConv2d, FactorizedConv2d, FactorizedLinear, FusedConv2d
from sparsecnn.nn import PermuteChannels as Permute

PW, V, H = (1, 1), (3, 1), (1, 3)


def conv(
    c_in: int, c_out: int, kernel: tuple[int, int], groups: int = 1, **kw: object
) -> nn.Conv2d:
    """Padded to keep the size, strided as asked."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(c_in, c_out, kernel, padding=padding, groups=groups, **{"bias": False} | kw)


def pattern(name: str, dtype: torch.dtype = torch.float32, stride: int = 1) -> FactorizedConv2d:
    """One of the chains that the methods make: 6 channels to 8."""
    torch.manual_seed(0)
    stages = {
        "PW>DENSE>PW": lambda: (
            conv(6, 3, PW),
            conv(3, 4, (3, 3), stride=stride),
            conv(4, 8, PW, bias=True),
        ),
        "DENSE>PW": lambda: (conv(6, 4, (3, 3), stride=stride), conv(4, 8, PW, bias=True)),
        "V>H": lambda: (
            conv(6, 4, V, stride=(stride, 1)),
            conv(4, 8, H, stride=(1, stride), bias=True),
        ),
        "PW>DW>PW": lambda: (
            conv(6, 5, PW),
            conv(5, 5, (3, 3), 5, stride=stride),
            conv(5, 8, PW, bias=True),
        ),
        "PW>DWv>DWh>PW": lambda: (
            conv(6, 5, PW),
            conv(5, 5, V, 5, stride=(stride, 1)),
            conv(5, 5, H, 5, stride=(1, stride)),
            conv(5, 8, PW, bias=True),
        ),
    }[name]()
    return FactorizedConv2d(*stages, method="own", ranks=(3, 4)).to(dtype)


PATTERNS = ("PW>DENSE>PW", "DENSE>PW", "V>H", "PW>DW>PW", "PW>DWv>DWh>PW")


def image(dtype: torch.dtype = torch.float32, channels: int = 6) -> Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 9, 8, generator=source, dtype=torch.float64).to(dtype)


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, gradient for x and gradients of the parameters, under a fixed random loss."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * weights.to(y.dtype)).sum().backward()
    return y.detach(), x.grad, [p.grad for p in layer.parameters()]


def close(a: Tensor, b: Tensor, rtol: float = 1e-5) -> None:
    """Within a share of the largest value."""
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_chain_agrees_with_the_sequential_forward_and_backward(
    name: str, stride: int, dtype: torch.dtype
) -> None:
    layer = pattern(name, dtype, stride)
    chain = layer.to_chain()
    assert type(chain) is ChainConv2d and len(chain.stages) == len(layer)
    wanted, got = run(layer, image(dtype)), run(chain, image(dtype))
    close(got[0], wanted[0])
    close(got[1], wanted[1])
    assert len(got[2]) == len(wanted[2]) == len(layer) + 1
    for one, two in zip(got[2], wanted[2], strict=True):
        close(one, two)


@pytest.mark.parametrize("name", PATTERNS)
def test_chain_shares_no_weight(name: str) -> None:
    layer, x = pattern(name), image()
    chain = layer.to_chain()
    before = chain(x)
    with torch.no_grad():
        for stage in layer:
            stage.weight.zero_()
    assert torch.equal(chain(x), before) and bool((before.abs() > 0.01).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PATTERNS)
def test_dense_weight_is_that_of_the_composed_stages(name: str, dtype: torch.dtype) -> None:
    layer = pattern(name, dtype, stride=2)
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d and dense.weight.shape == (8, 6, 3, 3)
    assert (dense.stride, dense.padding, dense.dilation) == ((2, 2), (1, 1), (1, 1))
    assert torch.equal(dense.weight, layer.dense_weight()) and dense.weight.dtype == dtype
    assert dense.bias is layer[-1].bias
    wanted, got = run(layer, image(dtype)), run(dense, image(dtype))
    close(got[0], wanted[0])
    close(got[1], wanted[1])


def test_dense_weight_by_hand() -> None:
    layer = FactorizedConv2d(conv(2, 1, V), conv(1, 2, H))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]).reshape(1, 2, 3, 1))
        layer[1].weight.copy_(torch.tensor([[1.0, 10, 100], [0, 2, 0]]).reshape(2, 1, 1, 3))
    weight = layer.dense_weight()
    assert weight[0, 1].tolist() == [[4, 40, 400], [5, 50, 500], [6, 60, 600]]
    assert weight[1, 0].tolist() == [[0, 2, 0], [0, 4, 0], [0, 6, 0]]
    assert not weight.requires_grad


def test_groups_and_permutations_in_the_dense_weight() -> None:
    torch.manual_seed(3)
    index = torch.tensor([2, 0, 3, 1])
    layer = FactorizedConv2d(
        conv(6, 4, PW, 2), Permute.of(torch.tensor([1, 0, 3, 2])), conv(4, 4, (3, 3), 4),
        conv(4, 4, PW, 2, bias=True), groups=2,
    )  # fmt: skip
    assert layer.dense_weight().shape == (4, 3, 3, 3)
    close(layer.to_dense()(image()), layer(image()))
    # Behind the last stage a permutation moves the bias, too.
    tail = FactorizedConv2d(conv(6, 3, (3, 3)), conv(3, 4, PW, bias=True), Permute.of(index))
    dense = tail.to_dense()
    assert torch.equal(dense.bias, tail[1].bias[index])
    close(dense(image()), tail(image()))


def test_a_bias_between_the_stages_is_carried_on_where_that_is_exact() -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(6, 4, V)
    for padding, mode in ((0, "zeros"), ((0, 1), "replicate"), ((0, 1), "zeros")):
        second = nn.Conv2d(4, 8, H, padding=padding, padding_mode=mode)  # type: ignore[arg-type]
        layer = FactorizedConv2d(first, second)
        if padding and mode == "zeros":
            with pytest.raises(NotImplementedError, match="bias in front of stage 1, which pads"):
                layer.to_dense()
            continue
        dense = layer.to_dense()
        close(dense(image()), layer(image()))
        assert dense.bias.requires_grad and not torch.equal(dense.bias, second.bias)


def test_linear_layers() -> None:
    torch.manual_seed(0)
    layer = FactorizedLinear(
        nn.Linear(7, 3, bias=False), nn.Linear(3, 5), method="fc_svd", ranks=(3,)
    )
    dense, x = layer.to_dense(), torch.randn(4, 7)
    assert type(dense) is nn.Linear and dense.weight.shape == (5, 7)
    assert dense.bias is layer[1].bias
    assert torch.equal(dense.weight, layer[1].weight @ layer[0].weight)
    close(dense(x), layer(x))
    inner = FactorizedLinear(nn.Linear(7, 3), nn.Linear(3, 5))
    close(inner.to_dense()(x), inner(x))
    # One stage alone: its own copy.
    single = FactorizedLinear(nn.Linear(7, 3))
    assert single.dense_weight().data_ptr() != single[0].weight.data_ptr()


def layers() -> list[tuple[nn.Module, Tensor]]:
    permuted = FactorizedConv2d(
        conv(6, 4, PW), Permute.of(torch.tensor([3, 1, 0, 2])), conv(4, 8, (3, 3), bias=True),
        method="own", ranks=(4,), groups=1,
    )  # fmt: skip
    linear = FactorizedLinear(
        nn.Linear(7, 3, bias=False), nn.Linear(3, 5), method="fc_svd", ranks=(3,)
    )
    return [(permuted, image()), (linear, torch.randn(4, 7)), (permuted[1], image(channels=4))]


@pytest.mark.parametrize("place", [0, 1, 2], ids=["conv", "linear", "permute"])
def test_copies_pickle_and_state(place: int) -> None:
    layer, x = layers()[place]
    wanted = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and repr(twin) == repr(layer)
        assert torch.equal(twin(x), wanted)
        for name in ("method", "ranks", "groups"):
            assert getattr(twin, name, None) == getattr(layer, name, None)
    torch.manual_seed(9)
    other, _ = layers()[place]
    if isinstance(other, Permute):
        other = Permute(4)
        assert torch.equal(other(x), x)  # the identity at first
    assert not torch.equal(other(x), wanted)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), wanted)


def test_permute_by_hand() -> None:
    layer = Permute.of(torch.tensor([2, 0, 1]))
    x = torch.arange(3.0).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert layer(x)[1, :, 0, 0].tolist() == [2.0, 0.0, 1.0]
    assert layer(x[:, :, 0]).shape == (2, 3, 5)
    assert layer.half().index.dtype == torch.int64 and "3" in repr(layer)


def test_slices_are_layers() -> None:
    layer = pattern("PW>DW>PW")
    x = image()
    head, tail = layer[:2], layer[2:]
    assert type(head) is type(tail) is FactorizedConv2d and (len(head), len(tail)) == (2, 1)
    assert torch.equal(tail(head(x)), layer(x))
    close(head.to_dense()(x), head(x))
    grouped = FactorizedConv2d(conv(6, 4, PW, 2), conv(4, 8, (3, 3), 2), groups=2)
    part = grouped[:2]  # groups are a label of the whole: the dense kernel is block-diagonal
    assert part.dense_weight().shape == (8, 6, 3, 3)
    assert float(part.dense_weight()[:4, 3:].abs().max()) == 0
    close(part.to_dense()(x), grouped(x))
    linear, y = layers()[1]
    assert type(linear[1:]) is FactorizedLinear
    assert torch.equal(linear[1:](linear[0](y)), linear(y))


@pytest.mark.parametrize("linear", [False, True])
def test_to_dense_keeps_flags_and_hooks(linear: bool) -> None:
    layer, x = layers()[linear]
    calls: list[str] = []
    layer.register_forward_hook(lambda m, a, y: calls.append(type(m).__name__))
    layer.eval()
    dense = layer.to_dense()
    dense(x)
    assert calls == ["Linear" if linear else "Conv2d"] and not dense.training
    assert dense.weight.requires_grad and dense.bias.requires_grad
    layer.requires_grad_(False)
    frozen = layer.train().to_dense()
    assert not frozen.weight.requires_grad and not frozen.bias.requires_grad and frozen.training
    if not linear:
        chain = pattern("V>H").eval()
        chain.register_forward_hook(lambda m, a, y: calls.append(type(m).__name__))
        fused = chain.to_chain()
        fused(image())
        assert calls[-1] == "ChainConv2d" and not fused.training


@pytest.mark.parametrize("ranks", [(0,), (-1,), (2.0,), (True,), ("2",), (None,), "12", (2, 0)])
def test_wrong_ranks_are_refused(ranks: object) -> None:
    for kind in (FactorizedConv2d, FactorizedLinear):
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected ranks integers >= 1, got"):
            kind(ranks=ranks)  # type: ignore[arg-type]


def test_wrong_arguments_are_refused() -> None:
    for kind in (FactorizedConv2d, FactorizedLinear):
        with pytest.raises(TypeError, match=f"{kind.__name__}: expected method a name, got int"):
            kind(method=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"expected at least one nn\.\w+, got none"):
            kind().dense_weight()
    for groups in (0, -1, 1.0, True, "1"):
        with pytest.raises(ValueError, match="FactorizedConv2d: expected groups an integer >= 1"):
            FactorizedConv2d(groups=groups)  # type: ignore[arg-type]
    for channels in (0, -3, 2.0, True, "4"):
        with pytest.raises(ValueError, match="PermuteChannels: expected channels an integer >= 1"):
            Permute(channels)  # type: ignore[arg-type]
    for index in ([0, 0], [1, 2], [[0, 1]], [0.0, 1.0], [-1, 0]):
        with pytest.raises(ValueError, match="PermuteChannels: expected index a permutation"):
            Permute.of(torch.tensor(index))


def test_stages_that_have_no_dense_form_are_refused() -> None:
    for stage in (nn.ReLU(), FusedConv2d(8, 8, 1, activation="relu"), nn.BatchNorm2d(8)):
        layer = FactorizedConv2d(conv(6, 8, PW), stage)
        for form in (layer.dense_weight, layer.to_dense):
            with pytest.raises(TypeError, match=f"PermuteChannels, got {type(stage).__name__} '1'"):
                form()
    with pytest.raises(TypeError, match=r"stages of nn\.Linear, got ReLU '1'"):
        FactorizedLinear(nn.Linear(3, 3), nn.ReLU()).to_dense()
    with pytest.raises(NotImplementedError, match="got PermuteChannels '1'"):
        layers()[0][0].to_chain()
    with pytest.raises(NotImplementedError, match="groups"):
        FactorizedConv2d(conv(6, 4, PW, 2), conv(4, 8, (3, 3), 2), groups=2).to_chain()
