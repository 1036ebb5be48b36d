"""Variational Bayesian matrix factorization against planted matrices and the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from sparsecnn.factorize.solvers.vbmf import EVBMF, evbmf, evbmf_spectrum

PLANTED = [(48, 80, 6, 0.5), (64, 64, 5, 1.0), (32, 288, 8, 0.5), (80, 48, 6, 0.5)]


def planted(rows, columns, rank, noise, seed=0):
    """A B + noise E of independent normal numbers."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return normal(rows, rank) @ normal(rank, columns) + noise * normal(rows, columns)


def phi(z):
    return np.log(1 + z) / z - 0.5


def root(alpha):
    return brentq(lambda t: phi(t) + phi(t / alpha), 1e-6, 10.0, xtol=1e-14)


def xbar(alpha):
    return (1 + root(alpha)) * (1 + alpha / root(alpha))


def free_energy(values, columns, sigma2):
    """The published objective, term by term."""
    alpha = len(values) / columns
    x = values**2 / (columns * sigma2)
    noise, signal = x[x <= xbar(alpha)], x[x > xbar(alpha)]
    half = signal - (1 + alpha)
    t = (half + np.sqrt(half**2 - 4 * alpha)) / 2
    kept = signal - t + np.log((t + 1) / signal) + alpha * np.log(t / alpha + 1)
    return (noise - np.log(noise)).sum() + kept.sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows,columns,rank,noise", PLANTED)
def test_evbmf_recovers_planted_rank_and_noise(rows, columns, rank, noise, seed):
    found = evbmf(planted(rows, columns, rank, noise, seed))
    assert found.rank == rank == len(found.shrunk)
    assert abs(found.sigma2 / noise**2 - 1) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_evbmf_of_pure_noise_is_0(seed):
    found = evbmf(planted(40, 60, 0, 1.0, seed))
    assert found.rank == 0 and found.shrunk.shape == (0,)
    assert abs(found.sigma2 - 1) < 0.05


def test_evbmf_does_not_depend_on_the_scale():
    matrix = planted(48, 80, 6, 0.5)
    plain = evbmf(matrix)
    for scale in (1000.0, 1e-6):  # an absolute tolerance of the search would fail at one of them
        scaled = evbmf(scale * matrix)
        assert scaled.rank == plain.rank
        assert scaled.sigma2 == pytest.approx(scale**2 * plain.sigma2, rel=1e-6)
        assert scaled.threshold == pytest.approx(scale * plain.threshold, rel=1e-6)
        torch.testing.assert_close(scaled.shrunk, scale * plain.shrunk)


def test_evbmf_computes_in_float64():
    matrix = planted(48, 80, 6, 0.5).float()
    low, high = evbmf(matrix), evbmf(matrix.double())
    assert low.shrunk.dtype == torch.float64
    assert (low.rank, low.sigma2) == (high.rank, high.sigma2)
    assert torch.equal(low.shrunk, high.shrunk)


def test_evbmf_transposes_tall_matrices():
    matrix = planted(48, 80, 6, 0.5)
    wide, tall = evbmf(matrix), evbmf(matrix.T)
    assert tall.rank == wide.rank
    assert tall.sigma2 == pytest.approx(wide.sigma2, rel=1e-6)
    torch.testing.assert_close(tall.shrunk, wide.shrunk)


@pytest.mark.parametrize("alpha,off", [(0.5, 0.003), (0.1, 0.034), (0.01, 0.112)])
def test_evbmf_threshold_is_the_solved_one(alpha, off):
    columns = round(20 / alpha)
    values = torch.from_numpy(np.r_[30.0, np.linspace(1.1, 0.9, 19)] * np.sqrt(columns))
    found = evbmf_spectrum(values, (20, columns))
    assert found.rank == 1
    want = np.sqrt(columns * found.sigma2 * xbar(alpha))
    assert found.threshold == pytest.approx(want, rel=1e-9)
    # The usual constant would be off by so much here.
    assert 1 - 2.5129 * np.sqrt(alpha) / root(alpha) == pytest.approx(off, abs=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.8])
@pytest.mark.parametrize("rows,columns", [(12, 12), (24, 60), (20, 160)])
def test_evbmf_finds_the_least_free_energy(rows, columns, decay):
    rough = np.random.default_rng(rows).uniform(0.5, 1.5, rows)
    values = np.sort(np.exp(-decay * np.arange(rows)) * rough)[::-1].copy()
    found = evbmf_spectrum(torch.from_numpy(values), (rows, columns))
    alpha = rows / columns
    most = int(np.ceil(rows / (1 + alpha))) - 1
    high = (values**2).sum() / (rows * columns)
    low = max(values[most] ** 2 / (columns * xbar(alpha)), (values[most:] ** 2).mean() / columns)
    assert low * (1 - 1e-9) <= found.sigma2 <= high * (1 + 1e-9)
    grid = np.geomspace(low, high, 2000)
    least = min(free_energy(values, columns, point) for point in grid)
    assert free_energy(values, columns, found.sigma2) <= least + 1e-7
    assert found.rank == int((values > found.threshold).sum())


def test_evbmf_shrinks_to_the_posterior_mean():
    matrix = planted(48, 80, 6, 0.5)
    found = evbmf(matrix)
    g, s = torch.linalg.svdvals(matrix)[:6], found.sigma2
    part = 1 - 128 * s / g**2
    want = g / 2 * (part + (part**2 - 4 * 48 * 80 * s**2 / g**4).sqrt())
    torch.testing.assert_close(found.shrunk, want)
    clean = torch.linalg.svdvals(planted(48, 80, 6, 0.0))[:6]
    assert (found.shrunk - clean).abs().sum() < (g - clean).abs().sum()


def test_evbmf_spectrum_from_the_gram_matrix():
    matrix = planted(64, 1152, 9, 0.5)
    values = torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0).sqrt()
    found, want = evbmf_spectrum(values, (64, 1152)), evbmf(matrix)
    assert found.rank == want.rank == 9
    assert found.sigma2 == pytest.approx(want.sigma2, rel=1e-6)
    assert evbmf_spectrum(values, (1152, 64)).rank == 9


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_evbmf_without_noise_is_the_rank(rank):
    found = evbmf(planted(40, 60, rank, 0.0))
    assert found.rank == rank and found.sigma2 < 1e-20


def test_evbmf_of_zeros_and_of_one_row():
    zero = evbmf(torch.zeros(3, 4))
    assert (zero.rank, zero.sigma2, zero.threshold, zero.shrunk.shape) == (0, 0.0, 0.0, (0,))
    assert evbmf(torch.ones(1, 5)).rank == 0


def test_evbmf_twice_is_the_same():
    first, second = (evbmf(planted(32, 288, 8, 0.5)) for _ in range(2))
    assert isinstance(first, EVBMF)
    assert (first.rank, first.sigma2, first.threshold) == (
        second.rank, second.sigma2, second.threshold,
    )  # fmt: skip
    assert torch.equal(first.shrunk, second.shrunk)


def test_evbmf_refuses_what_is_no_matrix():
    for shape in ((2, 3, 4), (0, 3)):
        with pytest.raises(ValueError, match="expected matrix to have shape") as caught:
            evbmf(torch.zeros(shape))
        assert str(caught.value).endswith(str(shape))
    with pytest.raises(ValueError, match="evbmf: expected matrix to be finite, got NaN"):
        evbmf(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"expected values of shape \(3,\) .* got \(4,\)"):
        evbmf_spectrum(torch.ones(4), (3, 4))
    with pytest.raises(ValueError, match="expected values to be finite and >= 0"):
        evbmf_spectrum(torch.tensor([1.0, -1.0]), (2, 4))
