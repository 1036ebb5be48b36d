"""Separable filters per channel and across channels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from sparsecnn.factorize import LayerProblem, TargetSpeedup, factorize
from sparsecnn.factorize.method import chain_macs
from sparsecnn.factorize.methods.jaderberg import Jaderberg1, Jaderberg2
from sparsecnn.factorize.problem import relative_error
from sparsecnn.factorize.solvers.cp import cp_als
from sparsecnn.factorize.solvers.jaderberg import separable_per_channel, vh_als
from sparsecnn.factorize.solvers.svd import vh_closed_form


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def recomposed(vertical, horizontal, mixing):
    return torch.einsum("tsm,smi,smj->tsij", mixing, vertical, horizontal)


def planted(t, s, kh, kw, count, seed=0):
    return recomposed(
        normal(s, count, kh, seed=seed),
        normal(s, count, kw, seed=seed + 1),
        normal(t, s, count, seed=seed + 2),
    )


def conv(c_in, c_out, kernel, **options):
    layer = nn.Conv2d(c_in, c_out, kernel, dtype=torch.float64, **options)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=i))
    return layer


def shapes(chain):
    return [(s.in_channels, s.out_channels, s.kernel_size, s.groups) for s in chain]


# ---- scheme 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [6, 40])  # fewer and more than taps
def test_separable_filters_of_each_channel_are_recovered(filters):
    weight = planted(filters, 7, 5, 3, 2)
    found = separable_per_channel(weight, 2)
    assert [tuple(f.shape) for f in found] == [(7, 2, 5), (7, 2, 3), (filters, 7, 2)]
    assert relative_error(recomposed(*found), weight) < 1e-6
    assert relative_error(recomposed(*separable_per_channel(weight, 1)), weight) > 0.1


def test_one_filter_per_tap_is_exact():
    weight = normal(6, 4, 3, 5)
    torch.testing.assert_close(
        recomposed(*separable_per_channel(weight, 15)), weight, rtol=0, atol=1e-12
    )
    weight[:, 1, 2, 3] = 0  # a tap that no filter uses
    torch.testing.assert_close(
        recomposed(*separable_per_channel(weight, 15)), weight, rtol=0, atol=1e-12
    )


def test_filters_beyond_the_taps_lose_nothing_by_their_coordinates():
    weight = planted(30, 3, 3, 3, 2) + 0.1 * normal(30, 3, 3, 3, seed=9)
    error = relative_error(recomposed(*separable_per_channel(weight, 2)), weight)
    alone = [cp_als(weight[:, s], 2) for s in range(3)]
    squares = [(weight[:, s] - cp.to_tensor()).square().sum() for s, cp in enumerate(alone)]
    assert error == pytest.approx(float((sum(squares) / weight.square().sum()).sqrt()), rel=1e-3)


def test_mixing_is_the_least_squares_one_and_more_filters_help():
    weight = normal(20, 5, 3, 3)
    errors = []
    for count in range(1, 10):
        v, h, a = separable_per_channel(weight, count)
        errors.append(relative_error(recomposed(v, h, a), weight))
        basis = torch.einsum("smi,smj->sijm", v, h).flatten(1, 2)
        best = torch.linalg.lstsq(basis, weight.permute(1, 2, 3, 0).flatten(1, 2)).solution
        refit = recomposed(v, h, best.permute(2, 0, 1))
        assert relative_error(refit, weight) == pytest.approx(errors[-1], rel=1e-3, abs=1e-9)
        lengths = torch.stack([v.norm(dim=2), h.norm(dim=2), a.norm(dim=0)])
        torch.testing.assert_close(lengths, lengths[:1].expand(3, -1, -1))
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_scheme_1_chain_is_depthwise_depthwise_pointwise():
    layer = conv(4, 10, (3, 5), stride=(2, 1), padding=1, groups=2)
    chain = factorize(layer, "jaderberg1", 3)
    assert shapes(chain) == [(4, 12, (3, 1), 4), (12, 12, (1, 5), 12), (12, 10, (1, 1), 2)]
    assert [s.stride for s in chain] == [(2, 1), (1, 1), (1, 1)]
    assert [s.padding for s in chain] == [(1, 0), (0, 1), (0, 0)]


def test_scheme_1_layer_of_planted_filters_is_recovered_in_each_group():
    layer = conv(6, 8, (3, 5), padding=1, groups=2)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([planted(4, 3, 3, 5, 2, seed) for seed in (0, 10)]))
    x = normal(2, 6, 9, 8)
    chain = factorize(layer, "jaderberg1", 2)
    torch.testing.assert_close(chain(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_depthwise_filters_lose_their_trailing_singular_values(count):
    layer = conv(6, 6, 5, groups=6)
    weight = layer.weight.detach()
    lost = (factorize(layer, "jaderberg1", count).dense_weight() - weight).square().sum((1, 2, 3))
    tail = torch.linalg.svdvals(weight[:, 0])[:, count:].square().sum(1)
    torch.testing.assert_close(lost, tail, rtol=1e-5, atol=1e-8)


def test_scheme_1_costs_and_target_speedup_are_the_closed_forms():
    strided = LayerProblem.of(conv(16, 24, 3, padding=1, stride=2), in_hw=(14, 14))
    macs = chain_macs(strided, Jaderberg1().stages(strided, (2,)))
    assert macs == 16 * 2 * (3 * 7 * 14 + 3 * 49 + 24 * 49)
    p = LayerProblem.of(conv(64, 96, 5, padding=2), in_hw=(14, 14))
    assert TargetSpeedup(3).select(p, Jaderberg1()) == (25 * 96 // (3 * (5 + 5 + 96)),)
    assert TargetSpeedup(3).select(p, Jaderberg2()) == (
        25 * 64 * 96 // (3 * (5 * 64 + 5 * 96)),
    )


# ---- scheme 2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_alternation_of_scheme_2_never_beats_the_closed_form(seed):
    weight = normal(7, 5, 3, 4, seed=seed)
    best = float(vh_closed_form(weight, 4)[2].square().sum())
    vertical, horizontal, errors = vh_als(weight, 4, seed=seed)
    product = torch.einsum("ksi,tkj->tsij", vertical, horizontal)
    error = float((weight - product).square().sum())
    assert error >= best - 1e-9
    assert error == pytest.approx(float(errors[-1]), rel=1e-9)
    assert error == pytest.approx(best, rel=1e-3)
    assert (errors.diff() <= 1e-9).all() and errors[0] > 1.01 * best


@pytest.mark.parametrize("order", ["vh", "hv"])
@pytest.mark.parametrize("solver", ["vh", "als"])
def test_scheme_2_layer_has_the_error_of_its_solver(solver, order):
    layer = conv(10, 12, (3, 5), padding=1, groups=2)
    chain = factorize(layer, Jaderberg2(order=order, solver=solver), 6)
    first, second = ((3, 1), (1, 5)) if order == "vh" else ((1, 5), (3, 1))
    assert shapes(chain) == [(10, 12, first, 2), (12, 12, second, 2)]
    lost, least = 0.0, 0.0
    for part, kernel in zip(
        chain.dense_weight().chunk(2), layer.weight.detach().chunk(2), strict=True
    ):
        turned = kernel if order == "vh" else kernel.transpose(2, 3)
        lost += float((part - kernel).square().sum())
        least += float(vh_closed_form(turned, 6)[2].square().sum())
    assert least - 1e-9 <= lost
    assert lost == pytest.approx(least, rel=1e-9 if solver == "vh" else 1e-2)


@pytest.mark.parametrize("method", ["jaderberg1", "jaderberg2"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_full_rank_equals_dense(method, groups):
    layer = conv(4, 8, (3, 5), padding=1, groups=groups)
    p = LayerProblem.of(layer)
    kinds = {"jaderberg1": [Jaderberg1()], "jaderberg2": [Jaderberg2(), Jaderberg2(solver="als")]}
    for kind in kinds[method]:
        chain = factorize(layer, kind, kind.full_ranks(p))
        x = normal(2, 4, 9, 8)
        torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [Jaderberg1(), Jaderberg2(solver="als")], ids=str)
def test_same_seed_same_bits(method):
    layer = conv(6, 8, 3)
    first, second = (factorize(layer, method, 3, seed=5) for _ in range(2))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="separable_per_channel: expected count >= 1, got 0"):
        separable_per_channel(normal(4, 3, 3, 3), 0)
    with pytest.raises(ValueError, match="Jaderberg2: expected solver 'vh' or 'als', got 'cg'"):
        Jaderberg2(solver="cg")
    with pytest.raises(ValueError, match="expected order 'vh' or 'hv', got 'both'"):
        Jaderberg2(order="both")
