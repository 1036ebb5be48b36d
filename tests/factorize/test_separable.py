"""Shared separable filters against planted banks, and the thresholding step by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.factorize import LayerProblem, factorize
from sparsecnn.factorize.method import chain_macs
from sparsecnn.factorize.methods.separable import Rigamonti
from sparsecnn.factorize.problem import relative_error
from sparsecnn.factorize.solvers.separable import SOLVERS, _by_svt, sep_svd, separable_basis, svt


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64)


def planted(n=40, count=3, size=(5, 5), noise=0.0, seed=0):
    """n random combinations of `count` separable filters, and the filters (count, kh, kw)."""
    rows = normal(count, size[0], seed=seed)
    columns = normal(count, size[1], seed=seed + 100)
    basis = rows[:, :, None] * columns[:, None, :]
    bank = torch.einsum("nk,kij->nij", normal(n, count, seed=seed + 200), basis)
    return bank + noise * normal(n, *size, seed=seed + 300), basis


def made(basis, weights):
    return torch.einsum("nk,kij->nij", weights, basis)


def second_over_first(basis):
    values = torch.linalg.svdvals(basis)
    return float((values[:, 1] / values[:, 0]).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_recovers_planted_bank(solver, seed):
    bank, want = planted(seed=seed)
    basis, weights = separable_basis(bank, 3, solver=solver)
    assert basis.shape == (3, 5, 5) and weights.shape == (40, 3)
    assert relative_error(made(basis, weights), bank) < 1e-5
    # The very filters, in some order and up to their sign.
    unit = want.flatten(1) / torch.linalg.vector_norm(want.flatten(1), dim=1, keepdim=True)
    overlap = (basis.flatten(1) @ unit.T).abs()
    torch.testing.assert_close(overlap.amax(1), torch.ones(3).double(), rtol=0, atol=1e-6)
    assert sorted(overlap.argmax(1).tolist()) == [0, 1, 2]
    # Two filters do not make up three.
    fewer = relative_error(made(*separable_basis(bank, 2, solver=solver)), bank)
    assert fewer > 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_basis_has_rank_1_and_norm_1(solver):
    for count in (1, 4):
        basis, _ = separable_basis(normal(30, 3, 4), count, solver=solver)
        assert second_over_first(basis) < 1e-6
        sizes = torch.linalg.vector_norm(basis.flatten(1), dim=1)
        torch.testing.assert_close(sizes, torch.ones(count).double())


def test_thresholding_alone_makes_the_basis_separable():
    bank, _ = planted()
    reduced = torch.linalg.qr(bank.flatten(1), mode="r").R
    starts = _by_svt(reduced / torch.linalg.vector_norm(reduced), (3, 5, 5), 0)
    errors = []
    for basis in starts:
        assert second_over_first(basis) < 1e-6
        weights = bank.flatten(1) @ torch.linalg.pinv(basis.flatten(1))
        errors.append(relative_error(made(basis, weights), bank))
    assert min(errors) < 0.05  # and it stays near the bank that it came from


def test_separable_shares_better_than_one_svd_per_filter():
    bank, _ = planted()
    shared = relative_error(made(*separable_basis(bank, 3)), bank)
    own = relative_error(sep_svd(bank, 1), bank)
    assert shared < 1e-5 and own > 0.1
    # The baseline is the truncated SVD of each filter.
    left, values, right = np.linalg.svd(bank[0].numpy())
    want = values[0] * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(sep_svd(bank, 1)[0].numpy(), want, atol=1e-12)
    torch.testing.assert_close(sep_svd(bank, 5), bank)


def test_prox_step_equals_svt_by_hand():
    matrices = normal(3, 4, 5)
    found = svt(matrices, 0.7)
    for matrix, got in zip(matrices.numpy(), found.numpy(), strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        want = sum(
            max(value - 0.7, 0) * np.outer(left[:, i], right[i]) for i, value in enumerate(values)
        )
        np.testing.assert_allclose(got, want, atol=1e-12)

        def cost(x, a=matrix):
            return ((x - a) ** 2).sum() / 2 + 0.7 * np.linalg.svd(x, compute_uv=False).sum()

        rng = np.random.default_rng(0)
        for _ in range(20):  # a minimum: every step away costs
            assert cost(got) < cost(got + 0.05 * rng.normal(size=got.shape))
    assert not svt(matrices, 100.0).any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_of_noise_comes_near_the_bound_without_cancelling(solver):
    bank = normal(256, 3, 3)
    values = torch.linalg.svdvals(bank.flatten(1)).square()
    bound = float((values[4:].sum() / values.sum()).sqrt())  # any 4 filters, separable or not
    basis, weights = separable_basis(bank, 4, solver=solver)
    error = relative_error(made(basis, weights), bank)
    assert bound <= error < 1.02 * bound
    components = torch.linalg.vector_norm(weights, dim=0)
    assert float(components.max()) < 10 * float(torch.linalg.vector_norm(bank))


def test_separable_of_a_kernel_of_one_row_are_principal_components():
    bank = normal(30, 1, 5)
    values = torch.linalg.svdvals(bank[:, 0]).square()
    error = relative_error(made(*separable_basis(bank, 2)), bank)
    assert error == pytest.approx(float((values[2:].sum() / values.sum()).sqrt()), rel=1e-6)


def test_separable_of_one_filter_is_its_svd():
    bank = normal(1, 3, 5)
    for count in (1, 2, 3, 5):
        found = made(*separable_basis(bank, count))
        torch.testing.assert_close(found, sep_svd(bank, count), rtol=0, atol=1e-12)
    zero, weights = separable_basis(torch.zeros(4, 3, 3), 2)
    assert not weights.any() and second_over_first(zero) == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_same_seed_same_bits(solver):
    bank = normal(20, 3, 3)
    first, second = (separable_basis(bank, 3, solver=solver, seed=4) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    state = torch.random.get_rng_state()
    separable_basis(bank, 3, solver=solver, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)


LAYERS = {
    "plain": dict(in_channels=4, out_channels=6, kernel_size=(3, 5), padding=1, stride=(2, 1)),
    "groups": dict(in_channels=4, out_channels=6, kernel_size=3, groups=2, padding="same"),
    "depthwise": dict(in_channels=5, out_channels=5, kernel_size=3, groups=5, dilation=2),
}


def conv(options, size=None):
    layer = nn.Conv2d(**options, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=i))
        if size is not None:  # a planted bank in each group
            shape = layer.weight.shape
            for g, part in enumerate(layer.weight.chunk(layer.groups)):
                bank = planted(len(part) * shape[1], size, tuple(shape[2:]), seed=g)[0]
                part.copy_(bank.reshape(part.shape))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_rigamonti_at_full_rank_is_the_layer(name):
    layer = conv(LAYERS[name])
    x = normal(2, layer.in_channels, 11, 9)
    chain = factorize(layer, "rigamonti", layer.kernel_size[0] * layer.kernel_size[1])
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", LAYERS)
def test_rigamonti_finds_the_filters_of_a_layer(name, solver):
    layer = conv(LAYERS[name], 2)
    chain = factorize(layer, Rigamonti(solver), 2)
    assert relative_error(chain.dense_weight(), layer.weight.detach()) < 1e-5
    x = normal(2, layer.in_channels, 11, 9)
    torch.testing.assert_close(chain(x), layer(x), rtol=1e-4, atol=1e-3)


def test_rigamonti_chain_repeats_the_taps_of_all_channels():
    layer = conv(LAYERS["plain"])
    chain = factorize(layer, "rigamonti", 3)
    shapes = [tuple(stage.weight.shape) for stage in chain]
    assert shapes == [(12, 1, 3, 1), (12, 1, 1, 5), (6, 12, 1, 1)]
    for stage in list(chain)[:2]:
        taps = stage.weight.reshape(4, 3, -1)
        assert torch.equal(taps, taps[:1].expand_as(taps))
        assert stage.weight.requires_grad
    sizes = [
        torch.linalg.vector_norm(taps.detach(), dim=dims)
        for taps, dims in (
            (chain[0].weight.reshape(4, 3, 3)[0], 1),
            (chain[1].weight.reshape(4, 3, 5)[0], 1),
            (chain[2].weight.reshape(6, 4, 3), (0, 1)),
        )
    ]
    torch.testing.assert_close(sizes[0], sizes[1])
    torch.testing.assert_close(sizes[0], sizes[2])
    p = LayerProblem.of(layer, in_hw=(11, 9))
    macs = chain_macs(p, Rigamonti().stages(p, (3,)))
    assert macs == 12 * 3 * 6 * 9 + 12 * 5 * 6 * 7 + 6 * 12 * 6 * 7


def test_rigamonti_same_seed_same_bits():
    layer = conv(LAYERS["groups"])
    first, second = (factorize(layer, "rigamonti", 3, seed=1) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_separable_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"expected filters \(n, kh, kw\), got \(3, 3\)"):
        separable_basis(torch.zeros(3, 3), 1)
    for count in (0, 10):
        with pytest.raises(ValueError, match=rf"expected count in \[1, 9\], got {count}"):
            separable_basis(torch.zeros(2, 3, 3), count)
    with pytest.raises(ValueError, match="expected solver 'svt' or 'cp', got 'sgd'"):
        separable_basis(torch.zeros(2, 3, 3), 1, solver="sgd")
    with pytest.raises(ValueError, match="Rigamonti: expected solver 'svt' or 'cp', got 'sgd'"):
        Rigamonti("sgd")
