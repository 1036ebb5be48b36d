"""Denton's structures: planted ones come back, and each step does what it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsecnn.factorize import Energy, LayerProblem, Method, UnsupportedLayer, factorize
from sparsecnn.factorize.method import chain_macs
from sparsecnn.factorize.methods.denton import BiclusterOuter, BiclusterSVD, Monochromatic
from sparsecnn.factorize.solvers.clustering import balanced_assignment, balanced_kmeans
from sparsecnn.factorize.solvers.denton import (
    bicluster,
    blocks_of,
    exact_terms,
    monochromatic,
    outer_product,
    two_svds,
)
from sparsecnn.nn.factorized import PermuteChannels


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def same_partition(found: Tensor, planted: Tensor) -> bool:
    pairs = set(zip(found.tolist(), planted.tolist(), strict=True))
    return len(pairs) == len(set(found.tolist())) == len(set(planted.tolist()))


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


# ---- clusters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "clusters"), [(6, 3), (7, 3), (8, 3), (5, 5), (5, 1)])
def test_assignment_is_the_cheapest_of_all_balanced_ones(items: int, clusters: int) -> None:
    cost = normal(items, clusters, seed=items)
    sizes = [items // clusters, -(-items // clusters)]
    least = min(
        float(cost[range(items), labels].sum())
        for labels in itertools.product(range(clusters), repeat=items)
        if all(labels.count(j) in sizes for j in range(clusters))
    )
    found = balanced_assignment(cost)
    assert found.dtype == torch.int64
    assert set(torch.bincount(found, minlength=clusters).tolist()) <= set(sizes)
    assert float(cost[range(items), found].sum()) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(("items", "clusters"), [(24, 4), (26, 4), (23, 5)])
def test_cluster_sizes_are_exactly_equal(items: int, clusters: int, dim: int) -> None:
    x = normal(items, 6) * torch.arange(1, items + 1)[:, None]  # unbalanced on purpose
    sizes = torch.bincount(balanced_kmeans(x, clusters, dim=dim), minlength=clusters)
    size, rest = divmod(items, clusters)
    assert sorted(sizes.tolist()) == [size] * (clusters - rest) + [size + 1] * rest


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_kmeans_recovers_planted_clusters(dim: int) -> None:
    planted = torch.arange(40) % 5
    if dim:
        bases = normal(5, dim, 30)
        x = torch.einsum("nd,ndf->nf", normal(40, dim, seed=1), bases[planted])  # signs at random
    else:
        x = 4 * normal(5, 30)[planted] + normal(40, 30, seed=1)
    order = shuffled(40)
    found = balanced_kmeans(x[order], 5, dim=dim, seed=3)
    assert same_partition(found, planted[order])
    firsts = [found.tolist().index(j) for j in range(5)]
    assert firsts == sorted(firsts)  # numbered by their first members
    assert torch.equal(found, balanced_kmeans(x[order], 5, dim=dim, seed=3))


def test_kmeans_takes_equal_and_zero_rows() -> None:
    for dim in (0, 1):
        for x in (torch.zeros(6, 4), torch.ones(6, 4)):
            found = balanced_kmeans(x.double(), 3, dim=dim)
            assert torch.bincount(found).tolist() == [2, 2, 2]


def test_bad_clusterings_are_refused() -> None:
    with pytest.raises(ValueError, match="got 4 clusters for 3 items"):
        balanced_kmeans(normal(3, 2), 4)
    with pytest.raises(ValueError, match="got 0 clusters for 3 items"):
        balanced_kmeans(normal(3, 2), 0)
    with pytest.raises(ValueError, match="got 3 clusters for 2 items"):
        balanced_assignment(normal(2, 3))
    with pytest.raises(ValueError, match="expected dim >= 0, got -1"):
        balanced_kmeans(normal(3, 2), 2, dim=-1)


# ---- monochromatic -------------------------------------------------------------------------------


def planted_colours(seed: int = 0) -> tuple[Tensor, Tensor]:
    """24 filters of 6 colours over 5 channels, and their labels."""
    labels = (torch.arange(24) % 6)[shuffled(24, seed)]
    w = torch.einsum("ts,tij->tsij", normal(6, 5, seed=seed)[labels], normal(24, 3, 4, seed=9))
    return w, labels


@pytest.mark.parametrize("seed", range(5))
def test_mono_recovers_planted_colours(seed: int) -> None:
    w, labels = planted_colours(seed)
    found = monochromatic(w, 6, seed=seed)
    assert same_partition(found.labels, labels)
    assert torch.bincount(found.labels).tolist() == [4] * 6
    rebuilt = torch.einsum("ts,tij->tsij", found.colours[found.labels], found.taps)
    assert error(rebuilt, w) < 1e-6
    for j in range(6):  # the singular value is split evenly
        taps = found.taps[found.labels == j]
        assert float(found.colours[j].norm()) == pytest.approx(float(taps.norm()), rel=1e-9)
    assert error(rebuilt, normal(24, 5, 3, 4, seed=7)) > 0.5


def test_mono_alternation_is_monotone_and_beats_one_clustering() -> None:
    gained = []
    for seed in range(5):
        w = normal(48, 6, 3, 3, seed=seed)
        found = monochromatic(w, 8)
        steps = np.diff(found.errors)
        assert len(found.errors) >= 3 and (steps <= 1e-9 * found.errors[0]).all()
        rebuilt = torch.einsum("ts,tij->tsij", found.colours[found.labels], found.taps)
        assert float((rebuilt - w).square().sum()) == pytest.approx(found.errors[-1], rel=1e-9)
        gained.append(found.errors[0] - found.errors[-1])
    assert max(gained) > 0  # the clustering alone is not yet a fixed point


def test_mono_of_one_input_channel_is_exact() -> None:
    w = normal(8, 1, 3, 3)
    found = monochromatic(w, 2)
    rebuilt = torch.einsum("ts,tij->tsij", found.colours[found.labels], found.taps)
    assert error(rebuilt, w) < 1e-12


def test_mono_of_zeros_is_finite() -> None:
    found = monochromatic(torch.zeros(4, 2, 3, 3, dtype=torch.float64), 2)
    assert found.colours.isfinite().all() and not found.taps.any()


# ---- blocks --------------------------------------------------------------------------------------


def planted_blocks(terms: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W (18, 24, 3, 3) of 2 x 3 blocks with so many outer products each, in a random order."""
    a, b, c = (
        normal(3, 2, size, terms, seed=seed + i) for i, size in enumerate((9, 8, 9))
    )
    blocks = torch.einsum("ghtk,ghsk,ghpk->htgsp", a, b, c)  # 3 clusters of channels, 2 of filters
    w = blocks.reshape(18, 24, 3, 3)
    filters, channels = shuffled(18, seed), shuffled(24, seed + 1)
    return w[filters][:, channels], channels // 8, filters // 9


def assembled(blocks: Tensor, channels: Tensor, filters: Tensor) -> Tensor:
    """The bank from its blocks (G, H, T/H, S/G, kh, kw), undoing the orders."""
    w = blocks.permute(1, 2, 0, 3, 4, 5).reshape(len(filters), len(channels), *blocks.shape[4:])
    return w[filters.argsort()][:, channels.argsort()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("terms", [1, 2])
def test_bicluster_recovers_planted_blocks(terms: int, seed: int) -> None:
    w, labels_in, labels_out = planted_blocks(terms, seed)
    found_in, found_out = bicluster(w, 3, 2, ranks=(terms, terms), seed=seed)
    assert same_partition(found_in, labels_in) and same_partition(found_out, labels_out)
    blocks, channels, filters = blocks_of(w, found_in, found_out)
    assert blocks.shape == (3, 2, 9, 8, 3, 3)
    assert torch.equal(assembled(blocks, channels, filters), w)
    flat = blocks.flatten(0, 1)
    a, b, c = outer_product(flat, terms)
    outer = torch.einsum("ntk,nsk,nkij->ntsij", a, b, c)
    assert error(assembled(outer.reshape(blocks.shape), channels, filters), w) < 1e-6
    first, core, last = two_svds(flat, terms, terms)
    svds = torch.einsum("ntb,nbaij,nas->ntsij", last, core, first)
    assert error(assembled(svds.reshape(blocks.shape), channels, filters), w) < 1e-6
    # The order matters: blocks of unsorted channels do not have the rank.
    mixed, *_ = blocks_of(w, torch.arange(24) // 8, found_out)
    a, b, c = outer_product(mixed.flatten(0, 1), terms)
    assert error(torch.einsum("ntk,nsk,nkij->ntsij", a, b, c), mixed.flatten(0, 1)) > 0.1


def test_bicluster_of_repeated_channels_by_their_means() -> None:
    labels_in, labels_out = (torch.arange(12) % 3)[shuffled(12)], (torch.arange(8) % 2)[shuffled(8)]
    w = normal(2, 3, 3, 3)[labels_out][:, labels_in] + 0.05 * normal(8, 12, 3, 3, seed=1)
    for ranks in (None, (1, 1)):
        found_in, found_out = bicluster(w, 3, 2, ranks=ranks)
        assert same_partition(found_in, labels_in) and same_partition(found_out, labels_out)


def test_outer_product_is_the_best_rank_one_of_a_matrix() -> None:
    blocks = normal(3, 7, 5, 1, 1)
    for terms in (1, 3):
        a, b, c = outer_product(blocks, terms)
        left = blocks - torch.einsum("ntk,nsk,nkij->ntsij", a, b, c)
        tail = torch.linalg.svdvals(blocks[..., 0, 0])[:, terms:].square().sum(1)
        torch.testing.assert_close(left.square().sum((1, 2, 3, 4)), tail, rtol=1e-6, atol=0)


def test_outer_product_errors_fall_with_the_terms_and_end_at_zero() -> None:
    blocks = normal(2, 4, 3, 2, 1)
    assert exact_terms((4, 3, 2, 1)) == 6
    errors = []
    for terms in range(1, 8):
        a, b, c = outer_product(blocks, terms)
        assert a.shape == (2, 4, terms) and b.shape == (2, 3, terms) and c.shape == (2, terms, 2, 1)
        for f in (b, c.flatten(2).mT):  # a term's norm is split evenly in three
            torch.testing.assert_close(f.norm(dim=1), a.norm(dim=1), rtol=1e-9, atol=1e-12)
        errors.append(error(torch.einsum("ntk,nsk,nkij->ntsij", a, b, c), blocks))
    assert errors[0] > 0.3 and all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[5] < 1e-12 and errors[6] < 1e-12


def test_joint_refit_is_no_worse_than_greedy_terms() -> None:
    blocks = normal(4, 6, 5, 3, 3)
    rest = blocks
    for _ in range(3):
        rest = rest - torch.einsum("ntk,nsk,nkij->ntsij", *outer_product(rest, 1))
    a, b, c = outer_product(blocks, 3)
    joint = blocks - torch.einsum("ntk,nsk,nkij->ntsij", a, b, c)
    before, after = (x.flatten(1).norm(dim=1) for x in (rest, joint))
    assert (after <= before * (1 + 1e-9)).all() and (after < 0.99 * before).any()


@pytest.mark.parametrize("ranks", [(1, 1), (2, 5), (4, 3), (4, 6)])
def test_two_svds_leaves_the_sum_of_both_tails(ranks: tuple[int, int]) -> None:
    blocks = normal(3, 6, 4, 3, 2)
    first, core, last = two_svds(blocks, *ranks)
    assert core.shape == (3, ranks[1], ranks[0], 3, 2)
    got = torch.einsum("ntb,nbaij,nas->ntsij", last, core, first)
    u, values, _ = np.linalg.svd(blocks.transpose(1, 2).flatten(2).numpy(), full_matrices=False)
    tail = (values[:, ranks[0] :] ** 2).sum(1)
    seen = np.einsum("ntsij,nsk->ntkij", blocks.numpy(), u[:, :, : ranks[0]])
    tail += (np.linalg.svd(seen.reshape(3, 6, -1), compute_uv=False)[:, ranks[1] :] ** 2).sum(1)
    np.testing.assert_allclose((got - blocks).square().sum((1, 2, 3, 4)), tail, atol=1e-10)
    for index in range(ranks[0]):
        norms = first[:, index].norm(dim=1), core[:, :, index].flatten(1).norm(dim=1)
        torch.testing.assert_close(*norms)


def test_two_svds_of_a_small_block_pads_with_zeros() -> None:
    blocks = normal(2, 1, 6, 2, 1)  # the input unfolding has rank 2
    first, core, last = two_svds(blocks, 5, 1)
    assert first.shape == (2, 5, 6) and not first[:, 2:].any()
    torch.testing.assert_close(torch.einsum("ntb,nbaij,nas->ntsij", last, core, first), blocks)


def test_zero_blocks_are_finite() -> None:
    blocks = torch.zeros(2, 4, 3, 2, 2, dtype=torch.float64)
    for factors in (outer_product(blocks, 2), two_svds(blocks, 2, 2)):
        assert all(f.isfinite().all() for f in factors)
    assert not torch.einsum("ntk,nsk,nkij->ntsij", *outer_product(blocks, 2)).any()


def test_bad_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected terms >= 1, got 0"):
        outer_product(normal(1, 2, 2, 1, 1), 0)
    for ranks in ((0, 1), (1, 3), (4, 1)):
        with pytest.raises(ValueError, match="the 3 input and 2 output channels"):
            two_svds(normal(1, 2, 3, 1, 1), *ranks)


# ---- layers --------------------------------------------------------------------------------------


def conv_of(w: Tensor, **options: object) -> nn.Conv2d:
    """A convolution with these weights and a bias."""
    t, s, kh, kw = w.shape
    conv = nn.Conv2d(s, t, (kh, kw), dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.weight.copy_(w)
        assert conv.bias is not None
        conv.bias.copy_(normal(t, seed=11))
    return conv


def agrees(chain: nn.Module, conv: nn.Conv2d, tolerance: float) -> bool:
    x = normal(2, conv.in_channels, 11, 9, seed=12)
    return error(chain(x), conv(x)) < tolerance


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": (1, 2), "dilation": (2, 1)}])
def test_mono_layer_equals_dense_on_planted_colours(geometry: dict[str, object]) -> None:
    w, _ = planted_colours()
    conv = conv_of(w, **geometry)
    chain = factorize(conv, "mono", 6)
    assert agrees(chain, conv, 1e-6)
    assert [type(m) for m in chain] == [nn.Conv2d, nn.Conv2d, PermuteChannels]
    assert chain[0].out_channels == 6 and chain[1].groups == 6
    assert not agrees(factorize(conv, "mono", 3), conv, 1e-2)  # colours are missing


def test_mono_counts_and_divisors() -> None:
    p = LayerProblem.of(conv_of(normal(12, 5, 3, 3), stride=2, padding=1), in_hw=(11, 9))
    method = Monochromatic()
    assert [method.clamp(p, (rank,)) for rank in (0, 1, 5, 7, 11, 40)] == [
        (1,), (1,), (4,), (6,), (6,), (12,),
    ]  # fmt: skip
    assert chain_macs(p, method.stages(p, (4,))) == 5 * 4 * 99 + 12 * 9 * 30
    with pytest.raises(ValueError, match="divides the 12 filters, got 5"):
        method.stages(p, (5,))
    assert factorize(conv_of(normal(12, 5, 3, 3)), method, 5).ranks == (4,)


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": (1, 2), "dilation": (2, 1)}])
@pytest.mark.parametrize("method", [BiclusterOuter(3, 2), BiclusterSVD(3, 2)], ids=lambda m: m.name)
def test_permuted_layer_equals_dense(method: Method, geometry: dict[str, object]) -> None:
    conv = conv_of(normal(8, 12, 3, 2), **geometry)  # sorted by clusters that mean nothing
    full = method.full_ranks(LayerProblem.of(conv))
    chain = factorize(conv, method, full)
    assert sum(isinstance(m, PermuteChannels) for m in chain) == 3
    assert agrees(chain, conv, 1e-10)
    w, *_ = planted_blocks(1)
    planted = conv_of(w, **geometry)
    ranks = (1,) * len(full)
    assert agrees(factorize(planted, method, ranks, seed=1), planted, 1e-6)
    assert not agrees(factorize(conv, method, ranks), conv, 0.5)
    without = [m for m in chain if not isinstance(m, PermuteChannels)]
    assert not agrees(nn.Sequential(*without), conv, 0.5)


def test_bicluster_counts() -> None:
    p = LayerProblem.of(conv_of(normal(8, 12, 3, 3), stride=2, padding=1), in_hw=(11, 9))
    outer, svds = BiclusterOuter(3, 2), BiclusterSVD(3, 2)
    assert outer.full_ranks(p) == (16,) and svds.full_ranks(p) == (4, 4)
    assert chain_macs(p, outer.stages(p, (5,))) == (
        12 * 2 * 5 * 99 + 3 * 2 * 5 * 9 * 30 + 8 * 3 * 5 * 30
    )
    assert chain_macs(p, svds.stages(p, (2, 3))) == (
        12 * 2 * 2 * 99 + 3 * 2 * 2 * 3 * 9 * 30 + 8 * 3 * 3 * 30
    )


def test_bicluster_svd_energy_follows_the_blocks() -> None:
    w, *_ = planted_blocks(2)
    conv = conv_of(torch.cat([w, w]))
    energies = BiclusterSVD(1, 1).spectra(LayerProblem.of(conv))
    assert [len(e) for e in energies] == [24, 36]
    for e, unfolded in zip(
        energies, (conv.weight.transpose(0, 1), conv.weight), strict=True
    ):
        torch.testing.assert_close(e, torch.linalg.svdvals(unfolded.flatten(1)).square())
    # Per block: blocks of a repeated channel pattern have one direction each.
    repeated = normal(2, 3, 3, 3)[torch.arange(8) % 2][:, torch.arange(12) % 3]
    energies = BiclusterSVD(3, 2).spectra(LayerProblem.of(conv_of(repeated)))
    assert [int((e > 1e-9 * e[0]).sum()) for e in energies] == [1, 1]
    assert float(energies[0].sum()) == pytest.approx(float(repeated.square().sum()))
    assert factorize(conv_of(repeated), BiclusterSVD(3, 2), Energy(0.999)).ranks == (1, 1)


@pytest.mark.parametrize("name", ["mono", "bicluster_outer", "bicluster_svd"])
def test_same_seed_same_bits(name: str) -> None:
    conv = conv_of(normal(8, 6, 3, 3))
    one, two = (factorize(conv, name, 2, seed=5).state_dict() for _ in range(2))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["mono", "bicluster_outer", "bicluster_svd"])
def test_grouped_layers_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedLayer, match=f"method '{name}': expected groups 1, got 2"):
        factorize(nn.Conv2d(4, 8, 3, groups=2), name, 1)
    with pytest.raises(UnsupportedLayer, match="no form for linear layers; use fc_svd"):
        factorize(nn.Linear(8, 6), name, 1)


def test_unequal_clusters_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="to divide the 3 input channels, got 2"):
        factorize(nn.Conv2d(3, 8, 3), "bicluster_svd", 1)
    with pytest.raises(UnsupportedLayer, match="to divide the 8 filters, got 3"):
        factorize(nn.Conv2d(6, 8, 3), BiclusterOuter(3, 3), 1)
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="BiclusterOuter: expected clusters_in an integer"):
            BiclusterOuter(bad, 2)  # type: ignore[arg-type]
