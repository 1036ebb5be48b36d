"""Low rank of responses: the solvers, the method, and ranks shared by all layers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.factorize import Energy, LayerProblem, TargetSpeedup, UnsupportedLayer, factorize
from sparsecnn.factorize.collect import collect_moments
from sparsecnn.factorize.global_ranks import PCAEnergyGlobal
from sparsecnn.factorize.method import chain_macs
from sparsecnn.factorize.methods.svd import VH, ChannelSVD
from sparsecnn.factorize.methods.zhang import Zhang, pca_eigenvalues
from sparsecnn.factorize.moments import Moments
from sparsecnn.factorize.solvers.response import (
    greedy_pca_ranks,
    principal_projection,
    reduced_rank_regression,
    relaxed_targets,
    whitened_svd,
    zhang_nonlinear,
)
from sparsecnn.factorize.solvers.svd import svd_truncate, vh_matrix
from sparsecnn.factorize.timing import placeholder

N = 3000


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (32, 72), b0 (32,), inputs (72, n) with a 12-dim latent, a mean and noise; responses."""
    weight = rand(32, 72, seed=seed) / 72**0.5
    bias = rand(32, seed=seed + 1) / 4
    x = rand(72, 12, seed=seed + 2) @ rand(12, N, seed=seed + 3) / 12**0.5
    x += rand(72, 1, seed=seed + 4) / 2 + 0.1 * rand(72, N, seed=seed + 5)
    return weight, bias, x, weight @ x + bias[:, None]


def error(found: Tensor, wanted: Tensor) -> float:
    """Mean squared error per sample."""
    return float((found - wanted).detach().square().sum() / wanted.shape[1])


def covariance(y: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance and mean of columns."""
    return torch.cov(y, correction=0), y.mean(1)


def test_pca_loses_less_of_the_responses_than_the_svd_of_the_weights() -> None:
    weight, bias, x, y = data()
    left, right, _ = svd_truncate(weight, 8)
    of_weights = error(left @ (right @ x) + bias[:, None], y)
    assert 2 * error(principal_projection(*covariance(y), 8)(y), y) < of_weights
    # The best bias for the weights' factors does not save them.
    gap = y - left @ (right @ x)
    assert 2 * error(principal_projection(*covariance(y), 8)(y), y) < error(
        gap.mean(1, keepdim=True).expand_as(gap), gap
    )


def test_pca_error_is_the_tail_of_the_eigenvalues() -> None:
    y = data()[3]
    c, mean = covariance(y)
    values = torch.linalg.eigvalsh(c).flip(0)
    for rank in (1, 4, 8, 31):
        found = error(principal_projection(c, mean, rank)(y), y)
        assert found == pytest.approx(float(values[rank:].sum()), rel=1e-8)


def test_pca_carries_a_large_mean_in_the_bias() -> None:
    y = data()[3]
    moved = y + 100
    c, mean = covariance(moved)
    assert error(principal_projection(c, mean, 4)(moved), moved) == pytest.approx(
        error(principal_projection(*covariance(y), 4)(y), y), rel=1e-6
    )


def regression_case() -> tuple[Tensor, Tensor]:
    """Targets and regressors that a linear map connects only in part."""
    y = data()[3]
    return rand(32, 32, seed=9) @ y + y.square() + 0.3 * rand(32, N, seed=8), y


def test_reduced_rank_error_is_least_squares_plus_tail() -> None:
    z, y = regression_case()
    with_one = torch.cat([y, torch.ones(1, N, dtype=y.dtype)])
    best = torch.linalg.lstsq(with_one.T, z.T).solution.T
    least = float((best @ with_one - z).square().sum())
    fitted = best[:, :32] @ (y - y.mean(1, keepdim=True))
    s = torch.linalg.svdvals(fitted)
    for rank in (1, 6, 20, 32):
        left, right, bias, spectrum = reduced_rank_regression(z, y, rank)
        assert left.shape == (32, rank) and right.shape == (rank, 32)
        torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=y.dtype))
        got = float((left @ right @ y + bias[:, None] - z).square().sum())
        assert got == pytest.approx(least + float(s[rank:].square().sum()), rel=1e-4)
        torch.testing.assert_close(spectrum, s, rtol=1e-4, atol=1e-6)


def test_reduced_rank_regression_is_a_minimum() -> None:
    z, y = regression_case()
    left, right, bias, _ = reduced_rank_regression(z, y, 5)
    least = float((left @ right @ y + bias[:, None] - z).square().sum())
    for seed in range(20):
        a = left + 1e-2 * rand(32, 5, seed=100 + seed)
        b = right + 1e-2 * rand(5, 32, seed=200 + seed)
        c = bias + 1e-2 * rand(32, seed=300 + seed)
        assert float((a @ b @ y + c[:, None] - z).square().sum()) > least


def test_reduced_rank_regression_takes_responses_without_variance() -> None:
    z = rand(3, 50)
    left, right, bias, _ = reduced_rank_regression(z, torch.ones(3, 50, dtype=z.dtype), 2)
    assert bool((left @ right == 0).all())
    torch.testing.assert_close(bias, z.mean(1))


def test_relaxed_targets_are_the_minimum_of_a_grid() -> None:
    wanted = rand(6, 40).relu()
    predicted = rand(6, 40, seed=1)
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)[:, None, None]
    for lam in (0.01, 0.5, 1.0):
        z = relaxed_targets(wanted, predicted, lam)
        cost = (wanted - z.relu()).square() + lam * (z - predicted).square()
        others = (wanted - grid.relu()).square() + lam * (grid - predicted).square()
        assert bool((cost <= others.min(0).values + 1e-12).all())


def test_relaxed_objective_never_grows() -> None:
    y = data()[3]
    for y_hat in (y, y + 0.3 * rand(32, N, seed=7)):
        for rank in (4, 8):
            found = zhang_nonlinear(y, y_hat, rank)
            assert [len(values) for values in found.history] == [26, 26]
            for values in found.history:
                assert values[-1] < values[0]
                steps = itertools.pairwise(values)
                assert all(b <= a * (1 + 1e-9) for a, b in steps)


def test_nonlinear_beats_linear_behind_a_relu() -> None:
    y = data()[3]
    for rank in (4, 8):
        linear = principal_projection(*covariance(y), rank)(y)
        found = zhang_nonlinear(y, y, rank)
        assert torch.linalg.matrix_rank(found.left @ found.right) == rank
        assert error(found(y).relu(), y.relu()) < 0.95 * error(linear.relu(), y.relu())
        # It pays with the responses that the ReLU hides.
        assert error(found(y), y) > error(linear, y)


def test_asymmetric_beats_symmetric_on_perturbed_inputs() -> None:
    weight, bias, x, y = data()
    left, right, _ = svd_truncate(x, 7)  # what a compressed layer before leaves of its output
    y_hat = weight @ (left @ right) + bias[:, None]
    for rank in (4, 8):
        symmetric = zhang_nonlinear(y, y, rank)
        asymmetric = zhang_nonlinear(y, y_hat, rank)
        assert error(asymmetric(y_hat).relu(), y.relu()) < 0.95 * error(
            symmetric(y_hat).relu(), y.relu()
        )


def test_greedy_ranks_respect_the_budget_and_are_near_the_best() -> None:
    for seed in range(30):
        source = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(2):
            mixing, latent = (
                torch.randn(6, n, generator=source, dtype=torch.float64) for n in (6, 40)
            )
            values.append(torch.linalg.eigvalsh(torch.cov(mixing @ latent)).flip(0))
        costs = [1.0 + float(torch.rand((), generator=source)) * 4 for _ in range(2)]
        for speedup in (1.5, 2.0):
            found = greedy_pca_ranks(values, costs, speedup)

            def spent(ranks: tuple[int, ...], costs: list[float] = costs) -> float:
                return sum(r / 6 * c for r, c in zip(ranks, costs, strict=True))

            def energy(ranks: tuple[int, ...], values: list[Tensor] = values) -> float:
                kept = [float(v[:r].sum()) for v, r in zip(values, ranks, strict=True)]
                return kept[0] * kept[1]

            budget = sum(costs) / speedup
            assert spent(tuple(found)) <= budget * (1 + 1e-9)
            choices = itertools.product(range(1, 7), repeat=2)
            best = max(energy(c) for c in choices if spent(c) <= budget)
            assert energy(tuple(found)) >= 0.9 * best


def test_greedy_ranks_follow_the_rule_by_hand() -> None:
    # Shares per cost of the last components: 1/10 / 1 and 3/10 / 1: the first layer loses one;
    # then 2/9 against 3/10, the first again.
    values = [torch.tensor([7.0, 2.0, 1.0]), torch.tensor([4.0, 3.0, 3.0])]
    assert greedy_pca_ranks(values, [3.0, 3.0], 6 / 4) == [1, 3]
    # A layer that is dear per component goes first: 0.3 / 4 < 0.1 / 1.
    assert greedy_pca_ranks(values, [3.0, 12.0], 15 / 11) == [3, 2]
    assert greedy_pca_ranks(values, [3.0, 3.0], 1) == [3, 3]
    # The last drop, of a component that costs 4, leaves room for two that cost 1.
    values = [torch.tensor([5.0, 5.0]), torch.tensor([8.0, 1.0, 1.0])]
    assert greedy_pca_ranks(values, [8.0, 3.0], 11 / 8) == [1, 3]
    # A layer without variance gives all it can.
    assert greedy_pca_ranks([torch.zeros(3), torch.ones(3)], [3.0, 3.0], 1.5) == [1, 3]
    values = [torch.ones(3), torch.ones(3)]
    with pytest.raises(ValueError, match=r"expected speedup from 1 to 3 .*got 3\.5"):
        greedy_pca_ranks(values, [3.0, 3.0], 3.5)
    with pytest.raises(ValueError, match=r"greedy_pca_ranks: expected speedup from 1"):
        greedy_pca_ranks(values, [3.0, 3.0], 0.5)


def test_whitened_svd_has_the_least_response_error() -> None:
    weight, _, x, _ = data()
    second = x @ x.T / N
    whitened = torch.linalg.svdvals(weight @ torch.linalg.cholesky(second))
    for rank in (2, 4, 8):
        left, right = whitened_svd(weight, second, rank)
        assert left.shape == (32, rank) and right.shape == (rank, 72)
        plain_left, plain_right, _ = svd_truncate(weight, rank)
        found = error(left @ (right @ x), weight @ x)
        assert found < 0.7 * error(plain_left @ (plain_right @ x), weight @ x)
        # The tail, but for the small ridge.
        assert found == pytest.approx(float(whitened[rank:].square().sum()), rel=1e-3)
        norms = left.norm(dim=0), (right @ torch.linalg.cholesky(second)).norm(dim=1)
        torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-9)


def test_whitened_svd_of_full_rank_and_without_data_is_the_matrix() -> None:
    weight, _, x, _ = data()
    for second in (x @ x.T / N, x[:, :5] @ x[:, :5].T, torch.zeros(72, 72, dtype=x.dtype)):
        left, right = whitened_svd(weight, second, 32)
        torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-9)


# ---- the method ----------------------------------------------------------------------------------


def images(count: int = 60, channels: int = 8, seed: int = 0) -> Tensor:
    """Correlated maps (N, C, 9, 8) with a mean."""
    source = rand(count, 3, 9, 8, seed=seed)
    smooth = nn.functional.avg_pool2d(source, 3, 1, 1)
    mixed = torch.einsum("cd,ndhw->nchw", rand(channels, 3, seed=seed + 1), smooth)
    return mixed + rand(channels, 1, 1, seed=seed + 2) + 0.05 * rand(*mixed.shape, seed=seed + 3)


def conv(groups: int = 1, **options: Any) -> nn.Conv2d:
    """8 -> 16 channels, 3x3, seeded."""
    layer = nn.Conv2d(8, 16, 3, groups=groups, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.copy_(rand(*layer.weight.shape, seed=4) / 8)
        if layer.bias is not None:
            layer.bias.copy_(rand(16, seed=5) / 4)
    return layer


def moments(layer: nn.Module, x: Tensor, **options: Any) -> Moments:
    """Of a single layer, all positions."""
    model = nn.Sequential(layer)
    return collect_moments(model, ["0"], x.split(16), positions=99, **options)["0"]


@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"groups": 2}, {"groups": 8}, {"stride": 2, "padding": 1},
    {"padding": "same", "padding_mode": "reflect"}, {"padding": 2, "dilation": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("variant", ["2d", "3d"])
def test_zhang_full_rank_equals_the_layer(variant: str, options: dict[str, Any]) -> None:
    layer = conv(**options)
    x = images()
    method = Zhang(variant=variant)  # type: ignore[arg-type]
    ranks = method.full_ranks(LayerProblem.of(layer))
    chain = factorize(layer, method, ranks, data=moments(layer, x, patches=False))
    assert len(chain) == (2 if variant == "2d" else 3)
    other = rand(2, 8, 9, 8, seed=77)  # not only on the data
    torch.testing.assert_close(chain(other), layer(other), rtol=0, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("nonlinear", [True, False])
def test_zhang_chain_computes_the_map_of_the_solver(groups: int, nonlinear: bool) -> None:
    layer = conv(groups, padding=1)
    x = images()
    found = moments(layer, x)
    chain = factorize(layer, Zhang(nonlinear=nonlinear), 3, data=found)
    wanted = []
    for y in layer(x).detach().transpose(0, 1).flatten(1).chunk(groups):
        if nonlinear:
            wanted.append(zhang_nonlinear(y, y, 3)(y))
        else:
            wanted.append(principal_projection(*covariance(y), 3)(y))
    got = chain(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=1e-6)
    assert chain.ranks == (3,)
    assert [stage.groups for stage in chain] == [groups, groups]
    assert chain[0].bias is None and chain[0].padding == (1, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_zhang_beats_weights_and_the_linear_map_on_data(groups: int) -> None:
    layer, x = conv(groups, padding=1), images()
    found = moments(layer, x)

    def loss(chain: nn.Module) -> float:
        return float((chain(x).relu() - layer(x).relu()).detach().square().mean())

    weights, linear, nonlinear = (
        loss(factorize(layer, method, 2, data=found))
        for method in (ChannelSVD(), Zhang(nonlinear=False), Zhang())
    )
    noise = loss(placeholder(LayerProblem.of(layer), ChannelSVD(), (2,)))
    assert nonlinear < linear < 0.7 * weights < 0.7 * noise


def test_zhang_uses_the_data() -> None:
    layer = conv()
    chains = [
        factorize(layer, Zhang(), 3, data=moments(layer, images(seed=seed))) for seed in (0, 0, 30)
    ]
    weights = [chain.dense_weight() for chain in chains]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], rtol=0.1)


def test_zhang_stages_share_the_scale() -> None:
    layer = conv()
    for variant in ("2d", "3d"):
        method = Zhang(variant=variant)
        ranks = (4,) if variant == "2d" else (4, 6)
        chain = factorize(layer, method, ranks, data=moments(layer, images()))
        before, last = list(chain)[-2:]
        torch.testing.assert_close(
            before.weight.flatten(1).norm(dim=1), last.weight.flatten(1).norm(dim=0)
        )


def test_zhang_3d_splits_the_filters_of_2d_by_the_closed_form() -> None:
    layer, x = conv(padding=1), images()
    found = moments(layer, x)
    flat = factorize(layer, Zhang(), (4,), data=found)
    full = factorize(layer, Zhang(variant="3d"), (4, 12), data=found)
    torch.testing.assert_close(full(x), flat(x))
    split = factorize(layer, Zhang(variant="3d"), (4, 5), data=found)
    assert [tuple(s.weight.shape) for s in split] == [(5, 8, 3, 1), (4, 5, 1, 3), (16, 4, 1, 1)]
    # In the span of the responses, the loss of the split is the tail of its spectrum.
    filters = flat[0].weight.detach() * flat[1].weight.detach().norm(dim=0)[:, :, :, None]
    tail = torch.linalg.svdvals(vh_matrix(filters))[5:]
    gap = split.dense_weight() - flat.dense_weight()
    assert float(gap.norm()) == pytest.approx(float(tail.norm()), rel=1e-8)
    error_of = [float((c(x) - layer(x)).detach().norm()) for c in (split, flat)]
    assert error_of[0] > error_of[1]


def test_zhang_asymmetric_corrects_a_compressed_prefix() -> None:
    first, second = conv(padding=1), nn.Conv2d(16, 12, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        second.weight.copy_(rand(12, 16, 3, 3, seed=6) / 12)
    original = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    x = images()
    now = copy.deepcopy(original)
    now[0] = factorize(first, "channel_svd", 2)
    results = []
    for reference in (None, original):
        found = collect_moments(
            now if reference else original, ["2"], [x], positions=99, reference=reference
        )["2"]
        assert found.asymmetric == (reference is not None)
        net = copy.deepcopy(now)
        net[2] = factorize(second, Zhang(), 4, data=found)
        results.append(float((net(x) - original(x)).detach().norm()))
    assert results[1] < 0.9 * results[0]
    # At full rank there is nothing to lose in this layer, and the errors before it to win.
    net[2] = factorize(second, Zhang(), 12, data=found)
    left = float((net(x) - original(x)).detach().norm())
    assert left < 0.95 * float((now(x) - original(x)).detach().norm())


def test_zhang_takes_linear_layers() -> None:
    layer = nn.Linear(72, 32, dtype=torch.float64)
    weight, bias, x, y = data()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    found = collect_moments(nn.Sequential(layer), ["0"], [x.T])["0"]
    chain = factorize(layer, Zhang(nonlinear=False), 8, data=found)
    values = torch.linalg.eigvalsh(covariance(y)[0]).flip(0)
    assert error(chain(x.T).T, y) == pytest.approx(float(values[8:].sum()), rel=1e-6)
    with pytest.raises(UnsupportedLayer, match="'3d' splits kernels"):
        factorize(layer, Zhang(variant="3d"), (8, 8), data=found)


def test_zhang_rank_by_energy_is_that_of_the_responses() -> None:
    layer, x = conv(padding=1), images()
    found = moments(layer, x)
    y = layer(x).detach().transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(covariance(y)[0]).flip(0)
    kept = values.cumsum(0) / values.sum()
    rank = factorize(layer, Zhang(), Energy(0.95), data=found).ranks[0]
    assert kept[rank - 1] >= 0.95 > kept[rank - 2]
    # The weights would ask for more: their spectrum is flat.
    assert rank < factorize(layer, "channel_svd", Energy(0.95)).ranks[0]


def test_zhang_names_what_is_missing() -> None:
    layer, x = conv(), images()
    with pytest.raises(ValueError, match=r"expected calibration data .*pass calib"):
        factorize(layer, "zhang", 4)
    with pytest.raises(ValueError, match=r"expected calibration data .*pass calib"):
        Zhang().spectra(LayerProblem.of(layer))
    with pytest.raises(ValueError, match=r"expected moments of 1 groups of 16 filters, got 2 of 8"):
        factorize(layer, "zhang", 4, data=moments(conv(2), x))
    few = collect_moments(nn.Sequential(layer), ["0"], [x[:1]], positions=4)["0"]
    with pytest.raises(ValueError, match=r"expected more than 4 calibration samples .*got 4"):
        factorize(layer, "zhang", 4, data=few)
    with pytest.raises(ValueError, match="expected variant '2d' or '3d', got '4d'"):
        Zhang(variant="4d")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected nonlinear a bool, got 1"):
        Zhang(nonlinear=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("c_in", [3, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_zhang_3d_ranks_share_a_speedup(c_in: int, stride: int) -> None:
    layer = nn.Conv2d(c_in, 64, 3, stride, 1)
    p = LayerProblem.of(layer, in_hw=(28, 28))
    method = Zhang(variant="3d")
    speedup = 1.6 if c_in == 3 else 3.0
    rank, pairs = method.ranks_for(p, speedup)
    counted = chain_macs(p, method.stages(p, (rank, pairs)))
    assert speedup <= p.dense_macs / counted
    if c_in == 64:
        assert p.dense_macs / counted <= 1.15 * speedup
        flat = Zhang()
        parts = (
            p.dense_macs / chain_macs(p, flat.stages(p, (rank,))),
            chain_macs(p, flat.stages(p, (rank,))[:1])
            / chain_macs(p, method.stages(p, (rank, pairs))[:2]),
        )
        assert parts[0] == pytest.approx(parts[1], rel=0.1) and min(parts) >= speedup**0.5
    assert Zhang().ranks_for(p, speedup) == TargetSpeedup(speedup).select(p, Zhang())
    with pytest.raises(ValueError, match="within reach of method 'zhang', got 1e"):
        method.ranks_for(p, 1e6)


def test_zhang_pairs_are_clamped_to_what_the_filters_can_use() -> None:
    p = LayerProblem.of(conv())
    method = Zhang(variant="3d")
    assert method.full_ranks(p) == (16, 24)
    assert method.clamp(p, (2, 24)) == (2, 6)
    assert [len(values) for values in method.spectra(with_moments(p))] == [16, 24]


def with_moments(p: LayerProblem) -> LayerProblem:
    """The problem of `conv` with its moments."""
    return LayerProblem.of(conv(), in_hw=p.in_hw, moments=moments(conv(), images()))


# ---- ranks of all layers -------------------------------------------------------------------------


def network() -> tuple[dict[str, LayerProblem], list[Tensor]]:
    """Two layers with responses of 3 and about 16 dimensions."""
    layers = {"narrow": conv(padding=1), "wide": conv(2, padding=1)}
    inputs = {"narrow": images(), "wide": rand(60, 8, 9, 8, seed=40)}
    found = {
        name: LayerProblem.of(
            layer, in_hw=(9, 8), moments=moments(layer, inputs[name]), name=name
        )
        for name, layer in layers.items()
    }
    return found, [pca_eigenvalues(p) for p in found.values()]


def test_global_ranks_are_the_greedy_ones_of_the_responses() -> None:
    problems, values = network()
    costs = [float(p.dense_macs) for p in problems.values()]
    for speedup in (1.5, 3.0):
        found = PCAEnergyGlobal(speedup).select_all(problems, Zhang())
        # Two conv groups: 8 components, each of both.
        assert found == dict(
            zip(problems, [(r,) for r in greedy_pca_ranks(values, costs, speedup)], strict=True)
        )
        used = sum(
            found[n][0] / p.T * p.dense_macs for n, p in problems.items()
        )
        assert used <= sum(costs) / speedup
    shares = [found[n][0] / p.T for n, p in problems.items()]
    assert shares[0] < shares[1]
    assert PCAEnergyGlobal(3.0).select_all(problems, ChannelSVD()) == found


def test_global_eigenvalues_are_those_of_the_centred_responses() -> None:
    layer, x = conv(2, padding=1), images()
    p = LayerProblem.of(layer, moments=moments(layer, x))
    parts = layer(x).detach().transpose(0, 1).flatten(1).chunk(2)
    wanted = sum(torch.linalg.eigvalsh(torch.cov(y, correction=0)).flip(0) for y in parts)
    torch.testing.assert_close(pca_eigenvalues(p), wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(Zhang().spectra(p), [wanted], rtol=1e-8, atol=1e-10)


def test_global_ranks_of_3d_are_pairs() -> None:
    problems, _ = network()
    method = Zhang(variant="3d")
    found = PCAEnergyGlobal(4.0).select_all(problems, method)
    flat = PCAEnergyGlobal(2.0).select_all(problems, Zhang())
    for name, p in problems.items():
        rank, pairs = found[name]
        assert (rank,) == flat[name]
        assert pairs == method.pairs_for(p, rank, 2.0)
        filters = chain_macs(p, Zhang().stages(p, (rank,))[:1])
        assert chain_macs(p, method.stages(p, (rank, pairs))[:2]) <= filters / 2
        assert chain_macs(p, method.stages(p, (rank, pairs + 1))[:2]) > filters / 2


def test_global_ranks_refuse_what_they_cannot_choose() -> None:
    problems, _ = network()
    with pytest.raises(UnsupportedLayer, match="method 'vh' does not have"):
        PCAEnergyGlobal(2.0).select_all(problems, VH())
    with pytest.raises(ValueError, match="expected speedup from 1 to"):
        PCAEnergyGlobal(100.0).select_all(problems, Zhang())
    with pytest.raises(ValueError, match="PCAEnergyGlobal: expected speedup > 1, got 1"):
        PCAEnergyGlobal(1.0)
    with pytest.raises(ValueError, match="expected calibration data"):
        PCAEnergyGlobal(2.0).select_all({"a": LayerProblem.of(conv())}, Zhang())
