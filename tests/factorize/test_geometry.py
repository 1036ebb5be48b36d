"""Every method on every geometry: exact at full rank, itself at low rank, counted right."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn.factorize import METHODS, LayerProblem, TargetSpeedup, UnsupportedLayer, factorize
from sparsecnn.factorize.method import chain_macs, chain_params
from sparsecnn.measure import count_macs

# Methods whose chain needs responses are exact on data only; they have tests of their own.
ON_WEIGHTS = sorted(n for n, make in METHODS.items() if not make().needs_data)
KERNELS = (1, 3, (1, 7), (3, 5), 5)
STRIDES = (1, 2, (2, 1))
PADDINGS = (0, 1, 2, "same")
GROUPS = ("1", "2", "depthwise")
MODES = ("zeros", "reflect", "circular")
HW = (11, 9)


def layer(
    kernel, stride, padding, dilation, groups, bias, mode, dtype=torch.float64
) -> nn.Conv2d | None:  # type: ignore[no-untyped-def]
    """The layer, or None where PyTorch has no such one on the small test image."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    if padding == "same" and stride != 1:
        return None
    pad = 0 if padding == "same" else padding
    if any(dilation * (k - 1) + 1 > n + 2 * pad for k, n in zip((kh, kw), HW, strict=True)):
        return None
    c_in, c_out, g = {"1": (4, 6, 1), "2": (4, 6, 2), "depthwise": (4, 4, 4)}[groups]
    source = torch.Generator().manual_seed(hash((kh, kw, dilation, g)) % 1000)
    conv = nn.Conv2d(
        c_in, c_out, (kh, kw), stride, padding, dilation, g, bias, mode, dtype=dtype
    )
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64))
    return conv


def image(dtype: torch.dtype = torch.float64, channels: int = 4) -> Tensor:
    """Two images of odd size."""
    source = torch.Generator().manual_seed(5)
    return torch.randn(2, channels, *HW, generator=source, dtype=torch.float64).to(dtype)


def full(method: str, conv: nn.Module, **options: object) -> nn.Module:
    """The factorization at full rank."""
    ranks = METHODS[method]().full_ranks(LayerProblem.of(conv))
    return factorize(conv, method, ranks, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("method", ON_WEIGHTS)
def test_full_rank_equals_dense(method: str, kernel: object, groups: str) -> None:
    x = image()
    cases = 0
    for stride, padding, dilation, mode in itertools.product(STRIDES, PADDINGS, (1, 2), MODES):
        conv = layer(kernel, stride, padding, dilation, groups, (cases % 2) == 0, mode)
        if conv is None:
            continue
        try:
            chain = full(method, conv, in_hw=HW)
        except UnsupportedLayer:
            assert method in UNSUPPORTED and (groups != "1" or method == "fc_svd")
            return
        torch.testing.assert_close(chain(x), conv(x), rtol=0, atol=1e-9)
        cases += 1
    assert cases > 10


UNSUPPORTED = {"fc_svd", "mono", "bicluster_outer", "bicluster_svd"}
