"""The CSR form of a pruned layer against the framework's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsecnn.formats import CSRWeight
from sparsecnn.nn import CSRConv2d

CASES = tuple(itertools.product((1, 2), (0, 1), (1, 2), (1, 2)))


def pruned(kind: str, shape: tuple[int, ...]) -> Tensor:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=source)
    if kind == "zero":
        return torch.zeros(shape)
    if kind != "full":
        weight = weight * (torch.rand(shape, generator=source) < 0.3)
    if kind == "empty row":
        weight[1] = 0
    return weight


@pytest.mark.parametrize("kind", ["random", "zero", "empty row", "full"])
def test_csr_roundtrip_and_conv(kind: str) -> None:
    for stride, padding, dilation, groups in CASES:
        conv = torch.nn.Conv2d(4, 6, 3, stride, padding, dilation, groups)
        with torch.no_grad():
            conv.weight.copy_(pruned(kind, tuple(conv.weight.shape)))
        packed = CSRWeight.from_dense(conv.weight.detach())
        wanted = conv.weight.detach().flatten(1).to_sparse_csr()
        assert torch.equal(packed.values, wanted.values())
        assert torch.equal(packed.col_idx.long(), wanted.col_indices().long())
        assert torch.equal(packed.row_ptr.long(), wanted.crow_indices().long())
        assert bool((packed.values != 0).all())  # no explicit zero is stored
        assert torch.equal(packed.to_dense(), conv.weight)
        arrays = (packed.values, packed.col_idx, packed.row_ptr)
        assert packed.nbytes == sum(a.numel() * a.element_size() for a in arrays)
        layer = CSRConv2d.from_dense(conv)
        x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
        y = functional.conv2d(x, conv.weight, conv.bias, stride, padding, dilation, groups)
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
