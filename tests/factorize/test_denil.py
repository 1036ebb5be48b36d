"""Predicted weights: smooth ones are, noise is not; the chain of the fixed dictionary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.factorize import LayerProblem, factorize
from sparsecnn.factorize.method import chain_macs
from sparsecnn.factorize.methods.denil import Denil
from sparsecnn.factorize.problem import relative_error
from sparsecnn.factorize.solvers.ridge import (
    empirical_covariance,
    gaussian_kernel,
    observed_positions,
    predict_weights,
    product_of,
    ridge_dictionary,
    telling_positions,
)

GRID = (7, 7)


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64)


def smooth(n, grid=GRID, bandwidth=2.0, seed=0):
    """n columns (p, n) drawn from the Gaussian process."""
    values, vectors = torch.linalg.eigh(gaussian_kernel(grid, bandwidth))
    return vectors @ (values.clamp(min=0).sqrt()[:, None] * normal(len(values), n, seed=seed))


def test_denil_predicts_smooth_weights_and_not_noise():
    board = observed_positions(GRID, 25)
    assert torch.equal(board, torch.arange(0, 49, 2))  # the checkerboard of a 7 x 7 grid
    for seed in range(3):
        for weight, noise in ((smooth(200, seed=seed), False), (normal(49, 200, seed=seed), True)):
            found = predict_weights(weight[board], board, GRID, bandwidth=2.0)
            error = relative_error(found, weight)
            assert error > 0.6 if noise else error < 0.05
            torch.testing.assert_close(found[board], weight[board])


def test_denil_predicts_better_from_more_positions():
    weight = smooth(100)
    errors = []
    for count in (9, 13, 25, 49):
        at = observed_positions(GRID, count)
        errors.append(relative_error(predict_weights(weight[at], at, GRID, bandwidth=2.0), weight))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.2 and errors[-1] < 1e-12


@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 2.0, 10.0])
def test_denil_with_all_positions_is_exact(bandwidth):
    weight = normal(49, 20)
    found = predict_weights(weight, torch.arange(49), GRID, bandwidth=bandwidth, lam=0.0)
    assert relative_error(found, weight) < 1e-6


def test_denil_dictionary_is_kernel_ridge_regression():
    kernel, at = gaussian_kernel((3, 5), 1.0), torch.tensor([0, 3, 7, 11])
    p, q = 4, 11  # (0, 4) and (2, 1): squared distance 4 + 9
    assert float(kernel[p, q]) == pytest.approx(np.exp(-13 / 2))
    whole = kernel.numpy()
    for lam in (1e-3, 0.5):
        want = whole[:, at] @ np.linalg.inv(whole[np.ix_(at, at)] + lam * np.eye(4))
        np.testing.assert_allclose(ridge_dictionary(kernel, at, lam).numpy(), want, atol=1e-10)
    exact = whole[:, at] @ np.linalg.inv(whole[np.ix_(at, at)])
    np.testing.assert_allclose(ridge_dictionary(kernel, at, 0.0).numpy(), exact, atol=1e-9)


def test_denil_covariance_predicts_what_is_not_smooth():
    mixing = normal(25, 6)  # weights of rank 6, rough over the positions
    known, weight = mixing @ normal(6, 500, seed=1), mixing @ normal(6, 50, seed=2)
    at = observed_positions((5, 5), 9)
    covariance = empirical_covariance(known)
    torch.testing.assert_close(covariance, known @ known.T / 500)
    found = predict_weights(weight[at], at, (5, 5), kernel=covariance)
    assert relative_error(found, weight) < 1e-6
    assert relative_error(predict_weights(weight[at], at, (5, 5)), weight) > 0.3


def test_observed_positions_lie_evenly():
    assert observed_positions((3, 3), 1).tolist() == [4]
    assert observed_positions((3, 3), 5).tolist() == [0, 2, 4, 6, 8]
    assert observed_positions((5, 5), 9).tolist() == [0, 2, 4, 10, 12, 14, 20, 22, 24]
    assert observed_positions((1, 7), 4).tolist() == [0, 2, 4, 6]
    assert observed_positions((4, 1), 2).tolist() == [0, 2]
    for grid in ((3, 5), (4, 4), (1, 6)):
        total = grid[0] * grid[1]
        before: set[int] = set()
        for count in range(1, total + 1):
            now = set(observed_positions(grid, count).tolist())
            assert len(now) == count and before < now
            before = now
        assert before == set(range(total))


def test_products_of_positions():
    rows, columns = product_of(torch.tensor([0, 2, 4, 10, 12, 14]), (5, 5))
    assert rows.tolist() == [0, 2] and columns.tolist() == [0, 2, 4]
    assert product_of(torch.tensor([0, 2, 4, 6, 8]), (3, 3)) is None
    assert product_of(torch.arange(15), (3, 5)) is not None


LAYERS = {
    "plain": dict(in_channels=4, out_channels=6, kernel_size=(3, 5), padding=1, stride=(2, 1)),
    "groups": dict(in_channels=4, out_channels=6, kernel_size=5, groups=2, padding="same"),
    "depthwise": dict(in_channels=5, out_channels=5, kernel_size=3, groups=5, dilation=2),
    "row": dict(in_channels=3, out_channels=4, kernel_size=(1, 7)),
}
METHODS = [Denil(), Denil("covariance"), Denil(bandwidth=2.0)]


def conv(options, weight=None):
    layer = nn.Conv2d(**options, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=i))
        if weight is not None:
            layer.weight.copy_(weight.T.reshape(layer.weight.shape))
    return layer


@pytest.mark.parametrize("method", METHODS, ids=["gaussian", "covariance", "wide"])
@pytest.mark.parametrize("name", LAYERS)
def test_denil_at_full_rank_is_the_layer(name, method):
    layer = conv(LAYERS[name])
    x = normal(2, layer.in_channels, 11, 9)
    chain = factorize(layer, method, layer.kernel_size[0] * layer.kernel_size[1])
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.1])
@pytest.mark.parametrize("rank", [4, 9])
@pytest.mark.parametrize("kernel", ["gaussian", "covariance"])
def test_denil_weights_are_the_best_for_the_dictionary(kernel, rank, lam):
    layer = conv(LAYERS["groups"])
    chain = factorize(layer, Denil(kernel, 1.5, lam), rank)
    slices = layer.weight.detach().reshape(-1, 25).T
    k = gaussian_kernel((5, 5), 1.5) if kernel == "gaussian" else empirical_covariance(slices)
    basis = ridge_dictionary(k, observed_positions((5, 5), rank), lam)
    best = (basis @ np.linalg.lstsq(basis, slices, rcond=None)[0]).T.reshape(6, 2, 5, 5)
    torch.testing.assert_close(chain.dense_weight(), best, rtol=0, atol=1e-8)


def test_denil_keeps_smooth_layers_and_not_noise():
    weight = smooth(12, (5, 5), 3.0)
    near = factorize(conv(LAYERS["groups"], weight), Denil(bandwidth=3.0), 9)
    far = factorize(conv(LAYERS["groups"]), Denil(bandwidth=3.0), 9)
    assert relative_error(near.dense_weight(), weight.T.reshape(6, 2, 5, 5)) < 0.05
    assert relative_error(far.dense_weight(), conv(LAYERS["groups"]).weight.detach()) > 0.6


def test_denil_chain_is_separable_where_the_positions_are_a_product():
    layer = conv(LAYERS["groups"])
    chain = factorize(layer, "denil", 9)
    shapes = [tuple(stage.weight.shape) for stage in chain]
    assert shapes == [(4 * 3, 1, 5, 1), (4 * 9, 1, 1, 5), (6, 2 * 9, 1, 1)]
    assert [stage.weight.requires_grad for stage in chain] == [False, False, True]
    for method, rank in ((Denil(), 8), (Denil("covariance"), 9), (Denil(lam=0.1), 9)):
        chain = factorize(layer, method, rank)
        assert [tuple(stage.weight.shape) for stage in chain] == [
            (4 * rank, 1, 5, 5), (6, 2 * rank, 1, 1),
        ]  # fmt: skip
        assert [stage.weight.requires_grad for stage in chain] == [False, True]
    p = LayerProblem.of(layer, in_hw=(11, 9))
    assert chain_macs(p, Denil().stages(p, (9,))) == 99 * (12 * 5 + 36 * 5 + 6 * 18)
    assert chain_macs(p, Denil().stages(p, (8,))) == 99 * (32 * 25 + 6 * 16)


@pytest.mark.parametrize("method", METHODS[:2], ids=["gaussian", "covariance"])
def test_denil_twice_is_the_same(method):
    layer = conv(LAYERS["groups"])
    first, second = (factorize(layer, method, 6) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_denil_of_zeros_is_zero():
    layer = conv(LAYERS["groups"], torch.zeros(25, 12).double())
    for method in METHODS:
        assert not factorize(layer, method, 5).dense_weight().any()


def test_denil_refuses_bad_arguments():
    with pytest.raises(ValueError, match="expected kernel 'gaussian' or 'covariance', got 'rbf'"):
        Denil("rbf")
    with pytest.raises(ValueError, match="Denil: expected bandwidth > 0, got 0"):
        Denil(bandwidth=0.0)
    with pytest.raises(ValueError, match="Denil: expected lam >= 0, got nan"):
        Denil(lam=float("nan"))
    with pytest.raises(ValueError, match="gaussian_kernel: expected bandwidth > 0, got -1"):
        gaussian_kernel(GRID, -1.0)
    with pytest.raises(ValueError, match=r"expected count in \[1, 49\], got 50"):
        observed_positions(GRID, 50)
    kernel, at = gaussian_kernel(GRID, 1.0), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="ridge_dictionary: expected lam >= 0, got -1"):
        ridge_dictionary(kernel, at, -1.0)
    for wrong in ([], [1, 1], [-1], [49]):
        with pytest.raises(ValueError, match=r"expected observed to name positions in \[0, 49\)"):
            ridge_dictionary(kernel, torch.tensor(wrong, dtype=torch.int64), 0.0)
    with pytest.raises(ValueError, match=r"expected values \(2, n\), got \(3, 4\)"):
        predict_weights(torch.zeros(3, 4), at, GRID)
    with pytest.raises(ValueError, match=r"expected kernel \(49, 49\), got \(9, 9\)"):
        predict_weights(torch.zeros(2, 4), at, GRID, kernel=torch.eye(9))


@pytest.mark.parametrize("name", LAYERS)
def test_denil_across_channels_at_full_rank_is_the_layer(name):
    layer = conv(LAYERS[name])
    method = Denil("covariance", across_channels=True)
    (full,) = method.full_ranks(LayerProblem.of(layer))
    x = normal(2, layer.in_channels, 11, 9)
    chain = factorize(layer, method, full)
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-9)
    assert [stage.weight.requires_grad for stage in chain] == [False, True]
    assert [stage.groups for stage in chain] == [layer.groups] * 2


def test_denil_across_channels_is_the_best_for_its_dictionary_and_no_better_than_the_svd():
    layer = conv(dict(in_channels=4, out_channels=12, kernel_size=3))
    filters = layer.weight.detach().reshape(12, 36)
    kernel = empirical_covariance(filters.T)
    before = np.inf
    for rank in (1, 3, 6, 12):
        chain = factorize(layer, Denil("covariance", across_channels=True), rank)
        assert [tuple(s.weight.shape) for s in chain] == [(rank, 4, 3, 3), (12, rank, 1, 1)]
        basis = ridge_dictionary(kernel, telling_positions(kernel, rank), 0.0)
        best = (basis @ np.linalg.lstsq(basis, filters.T, rcond=None)[0]).T
        found = chain.dense_weight().reshape(12, 36)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-8)
        error = relative_error(found, filters)
        least = factorize(layer, "channel_svd", rank).dense_weight().reshape(12, 36)
        assert relative_error(least, filters) - 1e-9 <= error < before
        before = error
    planted = normal(36, 5, seed=1) @ normal(5, 12, seed=2)
    layer.weight.data = planted.T.reshape(12, 4, 3, 3).contiguous()
    chain = factorize(layer, Denil("covariance", across_channels=True), 5)
    torch.testing.assert_close(chain.dense_weight(), layer.weight.detach(), rtol=0, atol=1e-9)


def test_telling_positions_leave_out_what_others_tell():
    rows = normal(4, 50)
    weight = torch.stack([3 * rows[0], 2 * rows[1], 2 * rows[0], rows[2], 2 * rows[1] + rows[0]])
    kernel = empirical_covariance(weight)
    first = int(kernel.diagonal().argmax())
    assert telling_positions(kernel, 1).tolist() == [first]
    at = telling_positions(kernel, 3)
    rest = ridge_dictionary(kernel, at, 0.0) @ weight[at]
    torch.testing.assert_close(rest, weight)
    assert telling_positions(kernel, 5).tolist() == [0, 1, 2, 3, 4]
    assert telling_positions(torch.zeros(3, 3), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"telling_positions: expected count in \[1, 5\], got 6"):
        telling_positions(kernel, 6)
    with pytest.raises(ValueError, match="kernel 'covariance' with across_channels, got 'gaussian"):
        Denil(across_channels=True)
    with pytest.raises(TypeError, match="across_channels a bool, got 1"):
        Denil("covariance", across_channels=1)
