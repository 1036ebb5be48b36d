"""Every method on every geometry: exact at full rank, itself at low rank, counted right."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn.factorize import METHODS, LayerProblem, UnsupportedLayer, factorize
from sparsecnn.factorize.method import chain_macs, chain_params
from sparsecnn.measure import count_macs

# Methods that work on responses are exact on data only: they have tests of their own, as have the
# one around other methods and the one for linear layers.
METHODS_FOR_CONVS = sorted(
    name
    for name, make in METHODS.items()
    if not (make().needs_data or make().needs_gradients or make().linear)
)
# The same chain as "cp" by a slower solver, which has its own tests.
SOLVED_QUICKLY = [name for name in METHODS_FOR_CONVS if name != "cp_nls"]
UNGROUPED = {"mono", "bicluster_outer", "bicluster_svd"}
# One colour per filter: exact only where each filter reads one direction of the channels. Its own
# tests plant such filters.
NEVER_EXACT = {"mono"}
KERNELS = (1, 3, (1, 7), (3, 5), 5)
STRIDES = (1, 2, (2, 1))
PADDINGS = (0, 1, 2, "same")
GROUPS = {"1": (4, 6, 1), "2": (4, 6, 2), "depthwise": (4, 4, 4)}
MODES = ("zeros", "reflect", "circular")
HW = (11, 9)


def layer(kernel, stride, padding, dilation, groups, bias, mode, dtype=torch.float64):
    """The layer, or None where PyTorch has no such one on the small test image."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    if padding == "same" and stride != 1:
        return None
    pad = 0 if padding == "same" else padding
    if any(dilation * (k - 1) + 1 > n + 2 * pad for k, n in zip((kh, kw), HW, strict=True)):
        return None
    c_in, c_out, g = GROUPS[groups]
    source = torch.Generator().manual_seed(kh * 100 + kw * 10 + g)
    conv = nn.Conv2d(c_in, c_out, (kh, kw), stride, padding, dilation, g, bias, mode, dtype=dtype)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64))
    return conv


def geometries(kernel, groups, dtype=torch.float64):
    """All layers of one kernel size."""
    for i, case in enumerate(itertools.product(STRIDES, PADDINGS, (1, 2), MODES)):
        stride, padding, dilation, mode = case
        conv = layer(kernel, stride, padding, dilation, groups, i % 2 == 0, mode, dtype)
        if conv is not None:
            yield conv


def image(dtype: torch.dtype = torch.float64) -> Tensor:
    """Two images of odd size."""
    source = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, *HW, generator=source, dtype=torch.float64).to(dtype)


def full_ranks(method: str, conv: nn.Module) -> tuple[int, ...]:
    return METHODS[method]().full_ranks(LayerProblem.of(conv))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("method", METHODS_FOR_CONVS)
def test_full_rank_equals_dense(method, kernel, groups):
    if method in NEVER_EXACT and kernel != 1:
        pytest.skip("no rank is exact")
    x = image()
    convs = list(geometries(kernel, groups))
    assert len(convs) > 10
    if method in UNGROUPED:  # their solvers are slow, and all geometries go the same way
        convs = convs[::5]
    for conv in convs:
        try:
            chain = factorize(conv, method, full_ranks(method, conv), in_hw=HW)
        except UnsupportedLayer:
            assert method in UNGROUPED and groups != "1"
            return
        torch.testing.assert_close(chain(x), conv(x), rtol=0, atol=1e-9)
        torch.testing.assert_close(chain.dense_weight(), conv.weight.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", sorted({*METHODS_FOR_CONVS} - NEVER_EXACT))
def test_full_rank_in_float32(method):
    conv = layer(3, (2, 1), 1, 1, "1", True, "zeros", torch.float32)
    x = image(torch.float32)
    chain = factorize(conv, method, full_ranks(method, conv), in_hw=HW)
    assert all(p.dtype == torch.float32 for p in chain.parameters())
    torch.testing.assert_close(chain(x), conv(x), rtol=0, atol=1e-4)


def low(method: str, conv: nn.Module) -> tuple[int, ...]:
    """A quarter of the full ranks."""
    return tuple(max(1, r // 4) for r in full_ranks(method, conv))


@pytest.mark.parametrize("method", SOLVED_QUICKLY)
@pytest.mark.parametrize("groups", ["1", "2"])
def test_low_rank_is_the_layer_of_its_dense_weight(method, groups):
    if groups != "1" and method in UNGROUPED:
        pytest.skip("refused: another test")
    x = image()
    for kernel in (1, (3, 5)):
        # The factors do not depend on the geometry: a few of them, each kind once.
        for conv in list(geometries(kernel, groups))[::37]:
            chain = factorize(conv, method, low(method, conv), in_hw=HW)
            weight = chain.dense_weight()
            assert weight.shape == conv.weight.shape
            dense = chain.to_dense()
            for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
                wanted = getattr(conv, name)
                if name == "padding_mode" and not any(conv._reversed_padding_repeated_twice):
                    continue  # nothing is padded
                if name == "dilation":  # of an axis with one tap it means nothing
                    wanted = tuple(
                        d if k > 1 else 1 for d, k in zip(wanted, conv.kernel_size, strict=True)
                    )
                    got = tuple(
                        d if k > 1 else 1
                        for d, k in zip(dense.dilation, conv.kernel_size, strict=True)
                    )
                    assert got == wanted
                    continue
                assert getattr(dense, name) == wanted, name
            torch.testing.assert_close(dense(x), chain(x), rtol=0, atol=1e-9)
            # Not the layer itself: the low rank is really low.
            if kernel != 1:
                assert not torch.allclose(weight, conv.weight, atol=1e-3)


@pytest.mark.parametrize("method", SOLVED_QUICKLY)
def test_macs_and_params_are_the_counted_ones(method):
    for stride, padding in ((1, 1), (2, 1), ((2, 1), 2)):
        conv = layer((3, 5), stride, padding, 1, "1", False, "zeros")
        ranks = low(method, conv)
        chain = factorize(conv, method, ranks, in_hw=HW)
        p = LayerProblem.of(conv, in_hw=HW)
        stages = METHODS[method]().stages(p, METHODS[method]().clamp(p, ranks))
        counted = count_macs(chain, image()[:1])
        assert chain_macs(p, stages) == counted.dense_macs
        assert chain_params(p, stages) == counted.params
        assert p.dense_macs == count_macs(conv, image()[:1]).dense_macs


@pytest.mark.parametrize("method", METHODS_FOR_CONVS)
def test_a_strided_pointwise_layer_subsamples_first(method):
    conv = layer(1, 2, 0, 1, "1", True, "zeros")
    chain = factorize(conv, method, low(method, conv), in_hw=HW)
    convs = [m for m in chain if isinstance(m, nn.Conv2d)]
    assert convs[0].stride == (2, 2) and all(m.stride == (1, 1) for m in convs[1:])
    assert [m.bias is not None for m in convs] == [False] * (len(convs) - 1) + [True]


@pytest.mark.parametrize("method", SOLVED_QUICKLY)
def test_copies_states_traces_and_layouts(method):
    conv = layer(3, 1, 1, 1, "1", True, "zeros")
    x = image()
    chain = factorize(conv, method, low(method, conv)).eval()
    wanted = chain(x)
    twin = copy.deepcopy(chain)
    assert twin.method == chain.method and twin.ranks == chain.ranks
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(chain.state_dict())
    torch.testing.assert_close(twin(x), wanted, rtol=0, atol=0)
    traced = torch.jit.trace(chain, x)
    torch.testing.assert_close(traced(x), wanted)
    torch.testing.assert_close(chain(x.to(memory_format=torch.channels_last)), wanted)


@pytest.mark.parametrize("method", SOLVED_QUICKLY)
def test_same_seed_same_bits_and_gradients_reach_the_input(method):
    conv = layer(3, 1, 1, 1, "1", True, "zeros")
    a, b = (factorize(conv, method, low(method, conv), seed=3) for _ in range(2))
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(left, right)
    x = image().requires_grad_()
    a(x).square().sum().backward()
    y = image().requires_grad_()
    F.conv2d(y, a.dense_weight(), conv.bias, padding=1).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    trained = [p.grad is not None for p in a.parameters() if p.requires_grad]
    assert trained and all(trained)


def test_error_falls_with_the_rank():
    conv = layer(3, 1, 1, 1, "1", True, "zeros")
    for method in METHODS_FOR_CONVS:
        (full, *_) = full_ranks(method, conv)
        if len(full_ranks(method, conv)) > 1 or method in UNGROUPED:
            continue
        errors = [
            float((factorize(conv, method, r).dense_weight() - conv.weight.detach()).norm())
            for r in sorted({1, full // 4 or 1, full})
        ]
        assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors)), method
        assert errors[-1] < 1e-9
