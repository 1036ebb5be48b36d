"""Circulant maps: what they keep, against brute force; and networks with compact maps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsecnn.factorize import UnsupportedLayer
from sparsecnn.factorize.circulant import compact_maps_
from sparsecnn.factorize.solvers import circulant as solver
from sparsecnn.factorize.solvers.circulant import (
    captured,
    circulant_rows,
    learn_circulant,
    pca_bound,
    quadratic_form,
)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latent(d: int = 32, rank: int = 6, seed: int = 0) -> Tensor:
    """The covariance of d responses with so many latent dimensions and a little noise."""
    mix = normal(d, rank, seed=seed)
    return mix @ mix.T / rank + 0.01 * torch.eye(d, dtype=torch.float64)


def random_orthogonal_circulant(d: int, seed: int) -> Tensor:
    spectrum = np.fft.fft(normal(d, seed=seed).numpy())
    return torch.from_numpy(np.fft.ifft(spectrum / np.abs(spectrum)).real)


# ---- the matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 8, 9, 32])
def test_hard_mode_is_exactly_orthogonal(d: int) -> None:
    for k in {1, max(d // 2, 1), d}:
        q = learn_circulant(latent(d), k)
        matrix = scipy.linalg.circulant(q.numpy())
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(circulant_rows(q, k).numpy(), matrix[:k])  # rows, not columns
    assert captured(latent(d), circulant_rows(q, d)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("d", "k"), [(5, 2), (6, 6), (7, 1)])
def test_energy_is_a_quadratic_form(d: int, k: int) -> None:
    c, q = latent(d), normal(d, seed=1)
    rows = scipy.linalg.circulant(q.numpy())[:k]
    want = np.trace(rows @ c.numpy() @ rows.T)
    assert float(q @ quadratic_form(c, k) @ q) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_energy_kept_is_between_random_and_pca(seed: int) -> None:
    c, k = latent(seed=seed), 8
    kept = captured(c, circulant_rows(learn_circulant(c, k), k))
    drawn = [
        captured(c, circulant_rows(random_orthogonal_circulant(32, 100 + i), k)) for i in range(50)
    ]
    values = np.linalg.eigvalsh(c.numpy())
    assert pca_bound(c, k) == pytest.approx(values[-k:].sum() / values.sum(), rel=1e-12)
    assert max(drawn) <= kept <= pca_bound(c, k)
    assert kept >= 1.5 * np.mean(drawn)
    assert kept < 0.7 < 0.98 < pca_bound(c, k)  # what the docstring admits


@pytest.mark.parametrize("d", [4, 5])
def test_hard_mode_finds_the_best_of_all_angles(d: int) -> None:
    c = latent(d, 2, seed=3)
    grid = 2 * np.pi * np.arange(48) / 48
    best = 0.0
    for nyquist in (1.0, -1.0):
        for angles in np.stack(np.meshgrid(*[grid] * ((d - 1) // 2)), -1).reshape(-1, (d - 1) // 2):
            inner = np.exp(1j * angles)
            ends = [nyquist] if d % 2 == 0 else []
            q = np.fft.irfft(np.concatenate([[1], inner, ends]), n=d)
            best = max(best, captured(c, torch.from_numpy(scipy.linalg.circulant(q)[:2])))
    kept = captured(c, circulant_rows(learn_circulant(c, 2), 2))
    assert best <= kept + 1e-9 and kept < best + 0.02


@pytest.mark.parametrize("d", [6, 7])
def test_slopes_are_those_of_the_values(d: int) -> None:
    form = quadratic_form(latent(d), 3).numpy()
    angles, q = normal((d - 1) // 2).numpy(), normal(d).numpy()
    for function, at, extra in (
        (solver._hard, angles, (form, -1.0)),
        (solver._soft, q, (form, 0.3)),
    ):
        _, slope = function(at, *extra)
        for i in range(len(at)):
            step = np.zeros(len(at))
            step[i] = 1e-6
            difference = function(at + step, *extra)[0] - function(at - step, *extra)[0]
            assert difference / 2e-6 == pytest.approx(slope[i], rel=1e-5, abs=1e-7)


def test_soft_mode_weighs_orthogonality() -> None:
    c, k = latent(16), 4
    gaps, losses = [], []
    for lam in (0.1, 10.0, 1e4):
        q = learn_circulant(c, k, lam)
        matrix = torch.from_numpy(scipy.linalg.circulant(q.numpy()))
        gap = float((matrix @ matrix.T - torch.eye(16)).square().sum())
        # In the Fourier domain.
        spectrum = np.abs(np.fft.fft(q.numpy())) ** 2
        assert ((spectrum - 1) ** 2).sum() == pytest.approx(gap, rel=1e-9, abs=1e-18)
        gaps.append(gap)
        losses.append(-float(torch.trace(matrix[:k] @ c @ matrix[:k].T)) + lam * gap)
        # No worse than the exactly orthogonal one, whose penalty is 0.
        rows = circulant_rows(learn_circulant(c, k), k)
        assert losses[-1] <= -float(torch.trace(rows @ c @ rows.T)) + 1e-6
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3
    hard = captured(c, circulant_rows(learn_circulant(c, k), k))
    assert captured(c, circulant_rows(q, k)) == pytest.approx(hard, rel=0.05)


def test_distance_identity() -> None:
    y = normal(40, 12) @ normal(12, 12, seed=1) + 3.0
    rows = circulant_rows(learn_circulant(torch.cov(y.T), 5), 5)
    lost = 0.0
    for one in y:
        for other in y:
            gap = one - other
            lost += float(gap @ gap - (rows @ gap) @ (rows @ gap))
    c = torch.cov(y.T, correction=0)
    want = 2 * 40**2 * float(torch.trace(c) - torch.trace(rows @ c @ rows.T))
    assert lost == pytest.approx(want, rel=1e-9)


def test_same_seed_same_bits_and_more_restarts_are_no_worse() -> None:
    c = latent(24, seed=2)
    assert torch.equal(learn_circulant(c, 6, seed=3), learn_circulant(c, 6, seed=3))
    kept = [captured(c, circulant_rows(learn_circulant(c, 6, restarts=r), 6)) for r in (1, 4, 8)]
    assert kept[0] <= kept[1] + 1e-9 and kept[1] <= kept[2] + 1e-9
    # The scale of the data changes nothing.
    torch.testing.assert_close(learn_circulant(1e8 * c, 6), learn_circulant(c, 6))
    assert learn_circulant(torch.zeros_like(c), 6).isfinite().all()


def test_bad_matrices_and_numbers_are_refused() -> None:
    for c, k, lam, restarts, message in (
        (normal(3, 4), 1, None, 1, r"expected c \(d, d\), got shape \(3, 4\)"),
        (latent(4) * torch.nan, 1, None, 1, "expected finite c"),
        (latent(4), 0, None, 1, "expected k between 1 and 4, got 0"),
        (latent(4), 5, None, 1, "expected k between 1 and 4, got 5"),
        (latent(4), 1, 0.0, 1, "expected lam None or in"),
        (latent(4), 1, None, 0, "expected restarts >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_circulant(c, k, lam, restarts=restarts)


# ---- networks ------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions with all kinds of steps in between, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.b = nn.Conv2d(8, 10, (3, 2), stride=2, padding=1)  # read from a as it is
        self.norm = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(10, 12, 3, padding="same", bias=False)  # by norm and ReLU
        self.d = nn.Conv2d(12, 6, 1)  # by a ReLU in place
        self.e = nn.Conv2d(6, 6, 3, padding=1)  # from d, which the sum reads too
        self.hidden = nn.Linear(6, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.norm(self.b(self.a(x))).relu()).relu_()
        x = self.d(x)
        x = (x + self.e(x)).mean((2, 3))
        return self.head(self.hidden(x))


def network() -> tuple[Net, list[Tensor]]:
    """The network with batch norm statistics of its own, and three batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net().double()
    batches = [normal(8, 3, 7, 6, seed=s) for s in range(3)]
    for batch in batches:
        net(batch)
    return net.eval(), batches


PAIRS = [("a", "b"), ("b", "c"), ("c", "d"), ("hidden", "head")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_all_maps_reproduce_the_network_exactly(pair: tuple[str, str]) -> None:
    net, batches = network()
    compact = copy.deepcopy(net)
    d = compact.get_submodule(pair[0]).weight.shape[0]
    state = torch.get_rng_state()
    done = compact_maps_(compact, *pair, d, batches)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = normal(4, 3, 7, 6, seed=9)
    torch.testing.assert_close(compact(fresh), net(fresh), rtol=1e-9, atol=1e-9)
    assert done.error < 1e-6 and done.kept == pytest.approx(1) == done.kept_by_pca
    assert (type(compact.norm) is nn.Identity) == (pair == ("b", "c"))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_compact_maps_have_a_share_of_the_weights(pair: tuple[str, str]) -> None:
    net, batches = network()
    compact = copy.deepcopy(net)
    first, second = (net.get_submodule(name) for name in pair)
    d = first.weight.shape[0]
    k = d // 2
    done = compact_maps_(compact, *pair, k, batches)
    new_first, new_second = (compact.get_submodule(name) for name in pair)
    assert new_first.weight.numel() * d == first.weight.numel() * k
    assert new_second.weight.numel() * d == second.weight.numel() * k
    assert type(new_first) is type(first) and not new_first.training
    assert 0 < done.kept < done.kept_by_pca <= 1
    # The error is that of the second layer's responses on the data.
    responses: dict[nn.Module, list[Tensor]] = {second: [], new_second: []}
    for module in responses:
        module.register_forward_hook(lambda m, args, output: responses[m].append(output.clone()))
    for batch in batches:
        net(batch), compact(batch)
    want, got = (torch.cat(responses[m]) for m in (second, new_second))
    want = want.detach()
    found = float((got.detach() - want).norm() / want.norm())
    assert found == pytest.approx(done.error, rel=1e-4)

    # A second layer that is only turned, not refitted, is worse; so is one for random maps.
    def error() -> float:
        responses[new_second].clear()
        for batch in batches:
            compact(batch)
        return float((torch.cat(responses[new_second]).detach() - want).norm() / want.norm())

    with torch.no_grad():
        fitted = new_second.weight.clone()
        rows = circulant_rows(done.q, k)
        new_second.weight.copy_(torch.einsum("od...,kd->ok...", second.weight, rows))
        assert error() > 1.02 * done.error
        new_second.weight.copy_(fitted)
        new_first.weight.copy_(normal(*new_first.weight.shape, seed=5))
        assert error() > 1.2 * done.error


def test_linear_in_between_is_rows_times_the_layer() -> None:
    net, batches = network()
    compact = copy.deepcopy(net)
    rows = circulant_rows(compact_maps_(compact, "a", "b", 3, batches).q, 3)
    torch.testing.assert_close(compact.a(batches[0]), torch.einsum(
        "kd,ndhw->nkhw", rows, net.a(batches[0])
    ))  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_mean_counts_where_no_bias_takes_it_up(bias: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 5, bias=bias)).double()
    with torch.no_grad():
        net[0].weight.copy_(normal(16, 6))
        net[0].bias.fill_(4.0)
    x = normal(60, 6, seed=1)
    responses = net[0](x).detach()
    done = compact_maps_(copy.deepcopy(net), "0", "1", 4, [x[:20], x[20:]])
    moment = responses.T @ responses / 60
    c = torch.cov(responses.T, correction=0) if bias else moment
    torch.testing.assert_close(done.q, learn_circulant(c, 4), rtol=0, atol=1e-3)
    assert done.kept_by_pca == pytest.approx(pca_bound(c, 4), rel=1e-9)
    assert abs(pca_bound(c, 4) - pca_bound(moment if bias else torch.cov(responses.T), 4)) > 0.01


def test_relu_in_between_is_the_least_squares_fit_of_the_compact_activation() -> None:
    net, batches = network()
    compact = copy.deepcopy(net)
    rows = circulant_rows(compact_maps_(compact, "b", "c", 4, batches).q, 4)
    inputs = [net.a(batch).detach() for batch in batches]
    target = torch.cat([net.norm(net.b(x)).relu() for x in inputs]).detach()
    target = torch.einsum("kd,ndhw->nkhw", rows, target)
    left = target - torch.cat([compact.b(x) for x in inputs]).detach()
    # The residual is orthogonal to every input of the layer and to the bias.
    patches = torch.nn.functional.unfold(torch.cat(inputs), (3, 2), 1, 1, 2)
    products = torch.einsum("npl,nkl->pk", patches, left.flatten(2))
    assert products.abs().max() < 1e-8 * patches.norm() * target.norm()
    assert left.mean((0, 2, 3)).abs().max() < 1e-9


def test_refit_makes_up_for_what_two_rows_keep_of_two_dimensions() -> None:
    net = nn.Sequential(nn.Linear(2, 12, bias=False), nn.Linear(12, 5)).double()
    with torch.no_grad():
        net[0].weight.copy_(normal(12, 2))
    compact = copy.deepcopy(net)
    done = compact_maps_(compact, "0", "1", 2, [normal(50, 2)])
    assert done.kept < 0.85 < 0.99 < done.kept_by_pca and done.error < 1e-3
    fresh = normal(10, 2, seed=7)
    torch.testing.assert_close(compact(fresh), net(fresh), rtol=1e-2, atol=1e-3)


def test_modes_hooks_dtype_and_flags_stay() -> None:
    net, batches = network()
    net.float().train()
    net.c.eval()
    net.c.weight.requires_grad_(False)
    calls: list[int] = []
    net.c.register_forward_hook(lambda module, args, output: calls.append(1))
    statistics = net.norm.running_mean.clone()
    compact_maps_(net, "c", "d", 5, [batch.float() for batch in batches])
    assert torch.equal(net.norm.running_mean, statistics)
    assert net.training and net.b.training and not net.c.training and net.d.training
    assert net.c.weight.dtype == torch.float32 and not net.c.weight.requires_grad
    calls.clear()
    net(batches[0].float())
    assert calls == [1]
    one, two = (copy.deepcopy(network()[0]) for _ in range(2))
    for other in (one, two):
        compact_maps_(other, "b", "c", 4, batches, seed=3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def test_other_readers_and_other_steps_are_refused() -> None:
    net, batches = network()
    before = copy.deepcopy(net.state_dict())
    for pair, message in (
        (("d", "e"), "depends on it otherwise"),
        (("c", "a"), "expected second to read the 12 maps of first"),
        (("e", "head"), "expected second to read the 6 maps"),
        (("a", "norm"), "expected nn.Conv2d or nn.Linear, got BatchNorm2d"),
    ):
        with pytest.raises(UnsupportedLayer, match=message):
            compact_maps_(net, *pair, 2, batches)
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)).double()
    with pytest.raises(UnsupportedLayer, match="nothing but a batch norm and a ReLU"):
        compact_maps_(pooled, "0", "2", 2, batches)
    twice = nn.Sequential(conv := nn.Conv2d(3, 3, 1), conv, nn.Conv2d(3, 2, 1)).double()
    with pytest.raises(UnsupportedLayer, match="got 2 and 1 calls"):
        compact_maps_(twice, "0", "2", 2, batches)
    current = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 2, 1)
    ).double()
    with pytest.raises(UnsupportedLayer, match="without running statistics"):
        compact_maps_(current, "0", "2", 2, batches)
    grouped = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1, groups=2)).double()
    with pytest.raises(UnsupportedLayer, match="1: expected groups 1, got 2"):
        compact_maps_(grouped, "0", "1", 2, batches)
    prune.random_unstructured(grouped[0], "weight", 0.5)
    with pytest.raises(UnsupportedLayer, match="0: expected plain weights, got masked ones"):
        compact_maps_(grouped, "0", "1", 2, batches)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_bad_arguments_are_refused() -> None:
    net, batches = network()
    for name in ("nothing", "a.b"):
        with pytest.raises(ValueError, match=f"names of two layers of the model, got '{name}'"):
            compact_maps_(net, "a", name, 2, batches)
    for k in (0, 9, True, 2.0):
        with pytest.raises(ValueError, match=f"expected k between 1 and 8, got {k}"):
            compact_maps_(net, "a", "b", k, batches)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        compact_maps_(net, "a", "b", 2, [])
    with pytest.raises(TypeError, match="got list; leave labels out"):
        compact_maps_(net, "a", "b", 2, [[batches[0], batches[0]]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="expected finite c"):
        compact_maps_(net, "a", "b", 2, [*batches, batches[0] * torch.inf])
