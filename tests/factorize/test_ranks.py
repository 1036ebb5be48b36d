"""Rank policies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsecnn.factorize import (
    METHODS,
    Energy,
    Factorize,
    Fixed,
    Latency,
    LayerProblem,
    NoGain,
    ParamRatio,
    Ratio,
    TargetSpeedup,
    UnsupportedLayer,
    factorize,
)
from sparsecnn.factorize.method import chain_macs, chain_params
from sparsecnn.factorize.ranks import energy_rank
from sparsecnn.factorize.timing import placeholder
from sparsecnn.nn.factorized import PermuteChannels


def conv(c_in=64, c_out=96, k=3, stride=1, groups=1, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, **options)


def problem(layer=None, hw=(28, 28)) -> LayerProblem:
    return LayerProblem.of(layer or conv(), in_hw=hw)


# Methods whose rank is a matter of a few spatial patterns step too coarsely for a close target.
FINE = ["channel_svd", "cp", "jaderberg2", "tucker2", "vh"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("v", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("method", FINE)
def test_target_speedup_is_met_closely(method, v, stride):
    p = problem(conv(stride=stride))
    made = METHODS[method]()
    ranks = TargetSpeedup(v).select(p, made)
    speedup = p.dense_macs / chain_macs(p, made.stages(p, ranks))
    assert v <= speedup <= 1.15 * v
    ranks = ParamRatio(v).select(p, made)
    assert v <= p.dense_params / chain_params(p, made.stages(p, ranks)) <= 1.15 * v


def test_target_speedup_is_the_closed_form():
    p, v = problem(), 3.0
    t, s, k = 96, 64, 3
    wanted = {
        "channel_svd": k * k * s * t / (v * (k * k * s + t)),
        "cp": k * k * s * t / (v * (s + k + k + t)),
        "jaderberg2": k * k * s * t / (v * (k * s + k * t)),
        "vh": k * k * s * t / (v * (k * s + k * t)),
    }
    for method, rank in wanted.items():
        assert TargetSpeedup(v).select(p, METHODS[method]()) == (math.floor(rank),)
    a, b, c = k * k * t * s, t * t + s * s, -k * k * t * s / v
    ratio = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    found = TargetSpeedup(v).select(p, METHODS["tucker2"]())
    assert found == (math.floor(ratio * t), math.floor(ratio * s))


def test_an_unreachable_target_says_so():
    p = problem(conv(4, 4))
    with pytest.raises(ValueError, match=r"within reach of method 'tucker2', got 500 times fewer"):
        TargetSpeedup(500).select(p, METHODS["tucker2"]())


def test_energy():
    energies = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [energy_rank(energies, tau) for tau in (0.4, 0.41, 0.7, 0.9, 1.0)] == [1, 2, 2, 3, 4]
    assert energy_rank(torch.zeros(3), 0.5) == 1
    p = problem()
    for method in ("channel_svd", "vh", "tucker2"):
        made = METHODS[method]()
        tau = 0.8
        for rank, spectrum in zip(Energy(tau).select(p, made), made.spectra(p), strict=True):
            kept = spectrum[:rank].sum() / spectrum.sum()
            assert kept >= tau - 1e-12 and (spectrum[: rank - 1].sum() / spectrum.sum()) < tau
    with pytest.raises(UnsupportedLayer, match="no matrix whose singular values"):
        Energy(0.5).select(p, METHODS["cp"]())


def test_ratio_and_multiples():
    p = problem()
    assert Ratio(0.5).select(p, METHODS["tucker2"]()) == (48, 32)
    assert Factorize("tucker2", Ratio(0.4), multiple_of=16).ranks(p) == (32, 16)
    # A rank below one multiple stays what it is.
    assert Factorize("tucker2", 5, multiple_of=16).ranks(p) == (5, 5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Fixed(0), ValueError, "expected rank >= 1, got 0"),
        (lambda: Fixed(1.5), TypeError, "expected rank an integer, got float"),
        (lambda: Fixed(()), ValueError, "at least one rank"),
        (lambda: Ratio(1.5), ValueError, r"expected q in \(0, 1\], got 1.5"),
        (lambda: Energy(0), ValueError, r"expected tau in \(0, 1\], got 0"),
        (lambda: TargetSpeedup(1), ValueError, "expected v > 1, got 1"),
        (lambda: TargetSpeedup("2"), TypeError, "expected v a number, got str"),
        (lambda: ParamRatio(0.5), ValueError, "expected v > 1"),
        (lambda: Latency(0), ValueError, "expected speedup > 0"),
        (lambda: Latency(2, multiple_of=0), ValueError, "expected multiple_of >= 1, got 0"),
        (lambda: Factorize("tuker", 2), ValueError, "expected method one of .*, got 'tuker'"),
        (lambda: Factorize(3, 2), TypeError, "expected method a name or a Method, got int"),
        (lambda: Factorize("vh", None), TypeError, "expected rank an integer, a tuple or a policy"),
        (lambda: Factorize("vh", Ratio), TypeError, "got Ratio"),
        (lambda: Factorize("vh", 2, objective="time"), ValueError, "objective one of macs, params"),
        (lambda: Factorize("vh", 2, min_gain=0), ValueError, "expected min_gain > 0, got 0"),
        (lambda: Factorize("vh", 2, multiple_of=0), ValueError, "multiple_of an integer >= 1"),
        (lambda: factorize(conv(), "tucker2", (3,)), ValueError, "rank with 2 entries .* got 1"),
        (lambda: factorize(conv(), "tucker2", (97, 3)), ValueError, r"at most \(96, 64\)"),
        (lambda: factorize(conv(), "vh", 10**6), ValueError, r"at most \(192,\) \(full\)"),
        (lambda: factorize("conv", "vh", 2), TypeError, "expected layer a module or a weight"),
        (lambda: factorize(torch.ones(3), "vh", 2), ValueError, r"\(K, C, R, S\) or \(O, I\)"),
    ],
)  # fmt: skip
def test_wrong_values(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_weights_that_are_not_finite_and_other_layers():
    layer = conv()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite weights, got 1 that are NaN or infinite"):
        factorize(layer, "vh", 2)
    with pytest.raises(UnsupportedLayer, match=r"expected nn.Conv2d or nn.Linear, got ConvTrans"):
        factorize(nn.ConvTranspose2d(3, 3, 3), "vh", 2)
    with pytest.raises(UnsupportedLayer, match="for linear layers; use channel_svd"):
        factorize(conv(), "fc_svd", 2)
    with pytest.raises(UnsupportedLayer, match="no form for linear layers; use fc_svd"):
        factorize(nn.Linear(8, 8), "jaderberg1", 2)
    with pytest.raises(ValueError, match="expected calibration data for method 'zhang'"):
        factorize(conv(), "zhang", 2)


def test_no_gain_leaves_the_layer_and_says_why():
    tiny = conv(16, 16, 1)
    with pytest.raises(NoGain, match=r"ranks \(16,\) need 401408 MACs, the layer 200704"):
        factorize(tiny, "channel_svd", 16, in_hw=(28, 28), min_gain=1)
    with pytest.raises(NoGain, match="weights"):
        factorize(tiny, "channel_svd", 16, objective="params", min_gain=1)
    assert factorize(tiny, "channel_svd", 16).ranks == (16,)


def test_kernels_and_linear_layers():
    kernel = torch.randn(12, 8, 3, 3, dtype=torch.float64)
    chain = factorize(kernel, "channel_svd", 12)
    torch.testing.assert_close(chain.dense_weight(), kernel)
    linear = nn.Linear(10, 7, dtype=torch.float64)
    x = torch.randn(3, 10, dtype=torch.float64)
    for rank in range(1, 8):
        made = factorize(linear, "fc_svd", rank)
        singular = torch.linalg.svdvals(linear.weight.detach())
        gap = made.dense_weight() - linear.weight
        torch.testing.assert_close(gap.square().sum(), singular[rank:].square().sum())
        torch.testing.assert_close(made.to_dense()(x), made(x))
    torch.testing.assert_close(made(x), linear(x))
    assert [s.bias is not None for s in made] == [False, True]


def test_tucker_ranks_are_cut_to_what_the_core_can_hold():
    layer = conv()
    assert factorize(layer, "tucker2", (96, 4)).ranks == (36, 4)
    assert factorize(layer, "tucker2", (2, 64)).ranks == (2, 18)
    made = factorize(layer, "tucker4", (42, 21, 1, 1))
    assert made.ranks == (21, 21, 1, 1) and made[2].kernel_size == (1, 3)


def test_latency_measures_or_refuses_with_the_times():
    p = problem(conv(64, 64), (14, 14))
    made = METHODS["tucker2"]()
    tried = Latency(0.001).candidates(p, made)
    assert all(chain_macs(p, made.stages(p, ranks)) < p.dense_macs for ranks in tried)
    assert all(r < 8 or r % 8 == 0 for ranks in tried for r in ranks)
    # A thousand times slower is slow enough for any machine, a million times faster too fast.
    assert Latency(0.001).select(p, made) == tried[-1]
    with pytest.raises(NoGain, match=r"no gain: ranks .* take .* us as .*, the layer .* us"):
        Latency(1e6).select(p, made)


def test_latency_depends_on_the_times(monkeypatch):
    # The layer takes 100 us; a chain its MACs: the largest candidate within 50 us wins.
    from sparsecnn.factorize import latency
    from sparsecnn.measure import LatencyStats

    p = problem(conv(64, 64, bias=False), (14, 14))
    made = METHODS["channel_svd"]()

    def fake(dense, chain, x):
        macs = sum(c.weight.numel() for c in chain) / dense.weight.numel()
        return {
            "dense": LatencyStats.from_ns([100_000]),
            "chain": LatencyStats.from_ns([round(100_000 * macs)]),
            "convs": LatencyStats.from_ns([10**9]),
        }

    monkeypatch.setattr(latency, "time_layer", fake)
    monkeypatch.setattr(latency, "_cache", {})
    policy = Latency(2.0)
    ranks = policy.select(p, made)
    tried = policy.candidates(p, made)
    within = [r for r in tried if 2 * chain_macs(p, made.stages(p, r)) <= p.dense_macs]
    assert ranks == within[-1] and len(within) < len(tried)


def test_latency_is_measured_anew_for_another_number_of_threads(monkeypatch):
    from sparsecnn.factorize import latency

    counted = []
    monkeypatch.setattr(latency, "_cache", {})
    monkeypatch.setattr(
        Latency, "_measured", lambda self, p, method: (counted.append(1), (len(counted),))[1]
    )
    p, made, policy = problem(), METHODS["vh"](), Latency(2.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert policy.select(p, made) == policy.select(p, made) == (1,)
        torch.set_num_threads(2)
        assert policy.select(p, made) == (2,)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fc_svd"}))
def test_what_is_timed_reorders_channels_where_the_factorization_may(method):
    made, layer = METHODS[method](), conv(8, 12)
    p = problem(layer, (6, 6))
    timed = placeholder(p, made, made.clamp(p, [2] * len(made.full_ranks(p))))
    assert sum(isinstance(m, PermuteChannels) for m in timed) == len(made.permuted)
    if made.needs_data or made.needs_gradients:
        return
    real = factorize(layer, method, tuple(timed.ranks))
    kinds = [(type(m), getattr(m, "weight", torch.empty(0)).shape) for m in real]
    wanted = iter([(type(m), getattr(m, "weight", torch.empty(0)).shape) for m in timed])
    assert all(kind in wanted for kind in kinds)  # a permutation that changes nothing is left out
