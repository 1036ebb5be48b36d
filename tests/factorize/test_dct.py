"""Cosine transform against scipy's, and the method against Parseval's equation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

from sparsecnn.factorize import Energy, LayerProblem, factorize
from sparsecnn.factorize.dct import dct2d_separable, dct_matrix, zigzag
from sparsecnn.factorize.method import chain_macs, chain_params
from sparsecnn.factorize.methods.dct import DCT
from sparsecnn.factorize.problem import relative_error

LAYERS = [
    dict(in_channels=4, out_channels=6, kernel_size=(3, 5), padding=1, stride=(2, 1)),
    dict(in_channels=4, out_channels=6, kernel_size=5, groups=2, padding="same"),
    dict(in_channels=5, out_channels=5, kernel_size=3, groups=5, dilation=2),
    dict(in_channels=3, out_channels=4, kernel_size=(1, 7), bias=False),
]


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64)


def conv(options, seed=0):
    layer = nn.Conv2d(**options, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=seed + i))
    return layer


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16])
def test_dct_matrix_is_orthonormal(n):
    atoms = dct_matrix(n)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    assert bool((atoms[0] > 0).all())  # the constant comes first


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 7), (1, 1), (8, 1)])
def test_dct2d_by_rows_and_columns_equals_scipy(shape):
    x = normal(*shape)
    want = scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(dct2d_separable(x).numpy(), want, rtol=0, atol=1e-12)
    low = dct2d_separable(x.float())
    assert low.dtype == torch.float32
    np.testing.assert_allclose(low.numpy(), want, rtol=0, atol=1e-5)


def test_zigzag_is_the_order_of_jpeg():
    corner = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    assert [tuple(pair) for pair in zigzag(8, 8).tolist()][:10] == corner
    for h, w in ((3, 5), (1, 4), (4, 1)):
        assert sorted(map(tuple, zigzag(h, w).tolist())) == [
            (u, v) for u in range(h) for v in range(w)
        ]


@pytest.mark.parametrize("keep", ["zigzag", "energy"])
@pytest.mark.parametrize("options", LAYERS, ids=["stride", "groups", "depthwise", "row"])
def test_dct_with_all_atoms_is_the_layer(options, keep):
    layer = conv(options)
    full = layer.kernel_size[0] * layer.kernel_size[1]
    x = normal(2, options["in_channels"], 11, 9)
    chain = factorize(layer, DCT(keep), full)
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("keep", ["zigzag", "energy"])
@pytest.mark.parametrize("options", LAYERS, ids=["stride", "groups", "depthwise", "row"])
def test_dct_error_is_the_energy_of_the_dropped_atoms(options, keep):
    layer = conv(options)
    weight = layer.weight.detach()
    energy = scipy.fft.dctn(weight.numpy(), axes=(2, 3), norm="ortho") ** 2
    energy = energy.sum((0, 1))
    order = [energy[u, v] for u, v in zigzag(*layer.kernel_size).tolist()]
    order = sorted(order, reverse=True) if keep == "energy" else order
    for rank in range(1, energy.size + 1):
        error = (factorize(layer, DCT(keep), rank).dense_weight() - weight).square().sum()
        assert float(error) == pytest.approx(sum(order[rank:]), abs=1e-9)


def test_dct_keeps_what_smooth_kernels_are_made_of():
    layer = conv(LAYERS[1])
    rows, columns = dct_matrix(5)[:2], dct_matrix(5)[:2]
    with torch.no_grad():
        layer.weight.copy_(rows.T @ normal(6, 2, 2, 2) @ columns)
    # (0, 0), (0, 1), (1, 0) and, after (2, 0), (1, 1).
    for method, rank in ((DCT("energy"), 4), (DCT("zigzag"), 5)):
        chain = factorize(layer, method, rank)
        torch.testing.assert_close(chain.dense_weight(), layer.weight.detach())
        assert factorize(layer, method, Energy(1.0)).ranks == (rank,)
    assert relative_error(factorize(layer, "dct", 3).dense_weight(), layer.weight.detach()) > 0.1


def test_dct_chain_is_a_fixed_basis_and_learned_weights():
    layer = conv(LAYERS[0])
    chain = factorize(layer, "dct", 4)
    assert [stage.weight.requires_grad for stage in chain] == [False, False, True]
    assert [tuple(stage.weight.shape) for stage in chain] == [
        (16, 1, 3, 1), (16, 1, 1, 5), (6, 16, 1, 1),
    ]  # fmt: skip
    vertical = chain[0].weight.reshape(4, 4, 3)
    assert torch.equal(vertical, vertical[:1].expand(4, 4, 3))  # the same atoms in every channel
    p = LayerProblem.of(layer, in_hw=(11, 9))
    stages = DCT().stages(p, (4,))
    # 4 channels, 4 atoms; rows 11 -> 6 by stride 2, then columns 9 -> 7.
    assert chain_macs(p, stages) == 16 * 3 * 6 * 9 + 16 * 5 * 6 * 7 + 6 * 16 * 6 * 7
    assert chain_params(p, stages) == 16 * 3 + 16 * 5 + 6 * 16


def test_dct_ties_go_by_position_and_twice_is_the_same():
    layer = conv(LAYERS[1])
    first, second = (factorize(layer, "dct", 7) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        layer.weight.zero_()
    atoms, chain = dct_matrix(5), factorize(layer, "dct", 3)
    torch.testing.assert_close(chain[0].weight[:3, 0, :, 0], atoms[[0, 0, 1]])
    torch.testing.assert_close(chain[1].weight[:3, 0, 0], atoms[[0, 1, 0]])


def test_dct_refuses_bad_arguments():
    with pytest.raises(ValueError, match="DCT: expected keep 'zigzag' or 'energy', got 'low'"):
        DCT("low")
    with pytest.raises(ValueError, match="dct_matrix: expected n >= 1, got 0"):
        dct_matrix(0)
    with pytest.raises(ValueError, match=r"dct2d_separable: expected x \(..., h, w\), got \(3,\)"):
        dct2d_separable(torch.zeros(3))
    with pytest.raises(TypeError, match=r"dct2d_separable: .* floating point, got torch.int64"):
        dct2d_separable(torch.zeros(3, 3, dtype=torch.int64))
