"""CP: solvers against autograd, einsum, tensorly and planted tensors; the chain of the layer."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import nn

from sparsecnn.factorize import LayerProblem, TargetSpeedup, factorize
from sparsecnn.factorize.method import chain_macs
from sparsecnn.factorize.methods.cp import CP, CPNLS, CPTPM
from sparsecnn.factorize.problem import relative_error
from sparsecnn.factorize.solvers import cp_nls as nls_module
from sparsecnn.factorize.solvers import cp_tensor
from sparsecnn.factorize.solvers.cp import cp_als, cp_als_batch, cp_exact, guarded
from sparsecnn.factorize.solvers.cp_nls import cp_nls
from sparsecnn.factorize.solvers.cp_power import cp_tpm
from sparsecnn.factorize.solvers.cp_tensor import CP as CPTensor
from sparsecnn.factorize.solvers.cp_tensor import Unfolded, normal_columns, normalized

LETTERS = "abcde"


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def composed(factors, weights=None):
    """sum_r w_r a_r o b_r o .., by einsum."""
    letters = LETTERS[: len(factors)]
    ones = torch.ones(factors[0].shape[1], dtype=torch.float64)
    terms = ",".join(f"{c}r" for c in letters)
    return torch.einsum(f"{terms},r->{letters}", *factors, ones if weights is None else weights)


def planted(shape, rank, seed=0):
    return composed([normal(n, rank, seed=seed + m) for m, n in enumerate(shape)])


def random_cp(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = [f[0] for f in normal_columns(shape, rank, 1, generator)]
    return normalized(torch.ones(rank, dtype=torch.float64), columns)


def objective(cp, x, l2):
    return float((x - cp.to_tensor()).square().sum() + l2 * cp.weights.square().sum())


def collinear(shape, rank, angle, seed=0):
    """Terms whose columns are `angle` apart: alternating least squares creeps."""
    factors = []
    for m, n in enumerate(shape):
        common = normal(n, 1, seed=seed + 10 * m)
        own = normal(n, rank, seed=seed + 10 * m + 1)
        factors.append(common / common.norm() + math.tan(angle) * own / own.norm(dim=0))
    return composed(factors)


def border_rank_two():
    """The limit of rank-2 tensors that cancel; itself of rank 3."""
    a, b = normal(8, seed=1), normal(8, seed=2)
    return sum(
        torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a))
    )


# ---- the tensor and its contraction --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7, 3), (7, 4, 3), (3, 4, 7), (3, 6, 2, 5), (5, 5), (6, 3)])
def test_sweep_contracts_all_but_one_mode(shape):
    x = normal(2, *shape)
    u = Unfolded.of(x)
    first = [normal(2, n, 3, seed=5 + m) for m, n in enumerate(shape)]
    factors = u.arranged(first)
    expected = list(first)
    seen = []

    def update(m, product):
        mode = u.order[m]
        letters = LETTERS[: len(shape)]
        terms = [f"z{c}r" for q, c in enumerate(letters) if q != mode]
        others = [f for q, f in enumerate(expected) if q != mode]
        wanted = torch.einsum(
            f"z{letters},{','.join(terms)}->z{letters[mode]}r", x, *others
        )
        torch.testing.assert_close(product, wanted)
        expected[mode] = product.sin()  # later modes must see the new factor
        seen.append(mode)
        return expected[mode]

    u.sweep(factors, update)
    assert sorted(seen) == list(range(len(shape)))
    for f, wanted in zip(u.restored(factors), expected, strict=True):
        assert torch.equal(f, wanted)


def test_normalized_keeps_the_tensor_and_sorts_the_weights():
    factors = [normal(n, 4, seed=n) for n in (5, 3, 2)]
    weights = torch.tensor([0.5, -3.0, 2.0, 0.0], dtype=torch.float64)
    cp = normalized(weights, factors)
    torch.testing.assert_close(cp.to_tensor(), composed(factors, weights))
    assert (cp.weights >= 0).all() and (cp.weights.diff() <= 0).all()
    for f in cp.factors:
        torch.testing.assert_close(f.norm(dim=0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(composed(cp.split()), cp.to_tensor())
    lengths = torch.stack([f.norm(dim=0) for f in cp.split()])
    torch.testing.assert_close(lengths, lengths[:1].expand(3, -1))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 6, 3, 3), (5, 3, 9), (3, 5, 2, 4)])
def test_exact_terms_reproduce_the_tensor_at_full_rank(shape):
    x = normal(*shape)
    cp = cp_exact(x)
    assert len(cp.weights) == min(shape[:2]) * math.prod(shape[2:])
    torch.testing.assert_close(cp.to_tensor(), x, rtol=0, atol=1e-12)


# ---- alternating least squares -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_als_recovers_planted_rank_from_a_random_start(seed):
    x = planted((10, 8, 3, 3), 3)
    cp = cp_als(x, 3, init=random_cp(x.shape, 3, seed))
    assert cp.relative_error(x) < 1e-6
    assert random_cp(x.shape, 3, seed).relative_error(x) > 0.5
    assert cp_als(x, 2).relative_error(x) > 0.05


def test_als_takes_the_steps_of_tensorly():
    import tensorly as tl
    from tensorly.decomposition import parafac

    x = normal(3, 4, 9)  # the longest mode last, so that both go through the modes in one order
    start = random_cp(x.shape, 3, 1)
    for sweeps in (1, 2, 7):
        with tl.backend_context("pytorch"):
            found = parafac(
                x, 3, n_iter_max=sweeps, init=(start.weights, list(start.factors)), tol=0
            )
            wanted = tl.cp_to_tensor(found)
        ours = cp_als(x, 3, init=start, max_iter=sweeps, tol=0.0)
        torch.testing.assert_close(ours.to_tensor(), wanted, rtol=1e-6, atol=1e-8)


def test_als_error_is_no_worse_than_tensorly():
    import tensorly as tl
    from tensorly.decomposition import parafac

    x = planted((9, 7, 3, 3), 4) + 0.5 * normal(9, 7, 3, 3, seed=9)
    with tl.backend_context("pytorch"):
        theirs = tl.cp_to_tensor(parafac(x, 4, 500, "random", random_state=0))
    assert cp_als(x, 4).relative_error(x) <= relative_error(theirs, x) * (1 + 1e-4)


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_als_objective_never_rises(l2):
    x = normal(9, 7, 3, 3)
    start = random_cp(x.shape, 5, 2)
    runs = [cp_als(x, 5, init=start, l2=l2, max_iter=n, tol=0.0) for n in range(1, 12)]
    values = [objective(cp, x, l2) for cp in runs]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(values))
    assert values[-1] < values[0]


def test_als_ends_where_the_gradient_of_the_penalized_objective_vanishes():
    x, l2 = planted((9, 7, 3, 3), 3) + 0.1 * normal(9, 7, 3, 3, seed=9), 0.2
    cp = cp_als(x, 3, l2=l2, max_iter=2000, tol=1e-14)
    factors = [f.requires_grad_() for f in cp.split()]
    squares = torch.stack([f.square().sum(0) for f in factors]).prod(0)
    value = (x - composed(factors)).square().sum() + l2 * squares.sum()
    value.backward()
    assert max(float(f.grad.abs().max()) for f in factors) < 1e-4 * float(x.norm())
    unpenalized = cp_als(x, 3)
    assert cp.weights.sum() < unpenalized.weights.sum()


def test_als_of_a_matrix_is_its_svd_and_l2_shrinks_by_a_known_factor():
    x = normal(9, 6)
    s = torch.linalg.svdvals(x)
    for shape in ((9, 6), (1, 9, 6), (9, 1, 6, 1)):
        cp = cp_als(x.reshape(shape), 3)
        torch.testing.assert_close(cp.weights, s[:3], rtol=1e-6, atol=0)
    penalized = cp_als(x, 3, l2=0.25, max_iter=2000, tol=1e-14)
    torch.testing.assert_close(penalized.weights, s[:3] / 1.25, rtol=1e-4, atol=0)


def test_als_batch_solves_every_tensor():
    x = torch.stack([planted((6, 5, 3), 2, seed) for seed in (1, 20, 40)])
    weights, factors = cp_als_batch(x, 2, max_iter=1000, tol=1e-8)
    for b in range(3):
        cp = normalized(weights[b], [f[b] for f in factors])
        assert cp.relative_error(x[b]) < 1e-6


def test_als_spectral_start_is_exact_at_full_rank():
    x = normal(6, 5, 3, 3)
    assert cp_als(x, 45, n_init=0, max_iter=2).relative_error(x) < 1e-6


def test_als_of_a_large_tensor_has_one_start_and_few_sweeps(monkeypatch):
    x = normal(9, 7, 3, 3)
    monkeypatch.setattr(cp_tensor, "_SMALL", x.numel())
    first, second = cp_als(x, 4, seed=1), cp_als(x, 4, seed=2)
    assert torch.equal(first.weights, second.weights)
    wanted = cp_als(x, 4, n_init=0, max_iter=30)
    assert torch.equal(first.weights, wanted.weights)
    assert cp_als(x, 4, n_init=4).relative_error(x) <= first.relative_error(x)


def test_solvers_are_ordered_by_error():
    x = normal(16, 12, 3, 3)
    for tensor in (x, x.flatten(2)):
        tpm, als, nls = (f(tensor, 4).relative_error(tensor) for f in (cp_tpm, cp_als, cp_nls))
        assert nls <= als <= tpm < 1
        assert als < 0.9999 * tpm


def test_als_also_starts_from_the_power_method(monkeypatch):
    x = normal(6, 5, 3, 3, seed=4)
    tpm = cp_tpm(x, 2).relative_error(x)
    assert cp_als(x, 2, n_init=0).relative_error(x) <= tpm
    monkeypatch.setattr(cp_tensor, "_SMALL", 0)
    assert cp_als(x, 2, n_init=0, max_iter=300).relative_error(x) > 1.01 * tpm


# ---- Gauss-Newton --------------------------------------------------------------------------------


def flat(factors):
    return torch.cat([f.flatten() for f in factors])


@pytest.mark.parametrize("l2", [0.0, 0.7])
def test_nls_gradient_and_model_are_those_of_the_residuals(l2):
    shape, rank = (4, 3, 2), 2
    x = normal(*shape)
    u = Unfolded.of(x.unsqueeze(0))
    factors = u.arranged([normal(n, rank, seed=7 + n) for n in shape])

    def residuals(v):
        parts = [p.reshape(-1, rank) for p in v.split([n * rank for n in u.sizes])]
        weights = torch.stack([p.square().sum(0) for p in parts]).prod(0).sqrt()
        gap = composed(parts) - x.permute(u.order)
        return torch.cat([gap.flatten(), math.sqrt(l2) * weights])

    jacobian = torch.autograd.functional.jacobian(residuals, flat(factors))
    r = residuals(flat(factors))
    value, gradient = nls_module._evaluate(u, factors, float(x.square().sum()), l2)
    assert value == pytest.approx(float(r @ r) / 2, rel=1e-12)
    torch.testing.assert_close(flat(gradient), jacobian.T @ r)
    model = nls_module._Model(factors, l2)
    v = [normal(n, rank, seed=30 + n) for n in u.sizes]
    hessian = jacobian.T @ jacobian
    torch.testing.assert_close(flat(model.times(v)), hessian @ flat(v))
    step = flat(model.step(gradient, 0.1, 60))
    left = hessian @ step + 0.1 * step + flat(gradient)
    assert left.norm() <= 1.01e-3 * flat(gradient).norm()


def test_nls_solves_what_alternating_least_squares_creeps_on():
    x = collinear((8, 7, 6), 4, 0.3)
    start = random_cp(x.shape, 4, 3)
    als = cp_als(x, 4, init=start, max_iter=50, tol=0.0)
    nls = cp_nls(x, 4, init=als, max_iter=50)
    assert nls.relative_error(x) < 1e-6 < 1e-4 < als.relative_error(x)


def test_nls_minimizes_the_penalized_objective():
    x, l2 = normal(9, 7, 3, 3), 0.05
    als = cp_als(x, 6, l2=l2)
    nls = cp_nls(x, 6, init=als, l2=l2)
    assert objective(nls, x, l2) < objective(als, x, l2)
    assert objective(nls, x, l2) < objective(cp_nls(x, 6, init=als), x, l2)


# ---- deflation -----------------------------------------------------------------------------------


def orthogonal_tensor():
    factors = [torch.linalg.qr(normal(n, 3, seed=n))[0] for n in (10, 8, 5, 3)]
    weights = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    return composed(factors, weights), weights, factors


@pytest.mark.parametrize("seed", range(3))
def test_tpm_recovers_the_terms_of_an_orthogonal_tensor(seed):
    x, weights, factors = orthogonal_tensor()
    cp = cp_tpm(x, 3, seed=seed)
    torch.testing.assert_close(cp.weights, weights, rtol=0, atol=1e-6)
    for found, wanted in zip(cp.factors, factors, strict=True):
        overlap = (found.T @ wanted).abs()
        torch.testing.assert_close(overlap, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_tpm_finds_the_weights_of_tensorly():
    import numpy as np
    import tensorly as tl
    from tensorly.decomposition import parafac_power_iteration

    x, weights, _ = orthogonal_tensor()
    state = np.random.get_state()  # noqa: NPY002
    with tl.backend_context("pytorch"):
        found, _ = parafac_power_iteration(x, 3, n_repeat=10, n_iteration=30)
    np.random.set_state(state)  # noqa: NPY002
    torch.testing.assert_close(found.sort(descending=True).values, weights, rtol=1e-4, atol=0)
    torch.testing.assert_close(cp_tpm(x, 3).weights, weights, rtol=1e-6, atol=0)


def test_tpm_residual_falls_by_the_square_of_each_weight():
    x = normal(12, 10, 3, 3)
    before, terms = x.square().sum(), []
    for r in range(1, 7):
        cp = cp_tpm(x, r)
        gaps = [(w, min((abs(w - v) for v in terms), default=1.0)) for w in cp.weights.tolist()]
        (lam,) = [w for w, gap in gaps if gap > 1e-9]  # the others are the terms of one rank less
        terms.append(lam)
        after = (x - cp.to_tensor()).square().sum()
        assert 0 < lam <= x.norm()
        assert after < before
        torch.testing.assert_close(after, before - lam**2, rtol=1e-10, atol=0)
        before = after
        for f in cp.factors:
            torch.testing.assert_close(f.norm(dim=0), torch.ones(r, dtype=torch.float64))


def test_tpm_takes_the_best_of_its_starts():
    x = normal(12, 10, 3, 3)
    single = [float(cp_tpm(x, 1, n_repeat=1, seed=s).weights[0]) for s in range(8)]
    many = [float(cp_tpm(x, 1, n_repeat=20, seed=s).weights[0]) for s in range(3)]
    assert min(many) > sum(single) / 8
    assert max(many) >= max(single) * (1 - 1e-6)


def test_tpm_term_is_a_fixed_point_of_the_power_iteration():
    x = normal(12, 10, 3, 3)
    cp = cp_tpm(x, 1, tol=0.0, max_iter=2000)
    a, b, c, d = (f[:, 0] for f in cp.factors)
    for product, f in (
        (torch.einsum("tshw,s,h,w->t", x, b, c, d), a),
        (torch.einsum("tshw,t,s,h->w", x, a, b, c), d),
    ):
        torch.testing.assert_close(product, cp.weights[0] * f, rtol=1e-5, atol=1e-5)


def test_tpm_stops_at_an_exhausted_residual():
    cp = cp_tpm(planted((6, 5, 4), 1), 3)
    assert cp.relative_error(planted((6, 5, 4), 1)) < 1e-9
    assert cp.weights[1] < 1e-9 * cp.weights[0]


# ---- the guard -----------------------------------------------------------------------------------


def test_guard_refits_terms_that_cancel():
    x = border_rank_two()
    assert cp_nls(x, 2).degeneracy(x) > 10
    cp, note = guarded(x, lambda l2: cp_nls(x, 2, l2=l2))
    assert cp.degeneracy(x) <= 10
    assert "terms cancel" in note and "l2=0.001" in note
    assert cp.relative_error(x) < 0.1 < cp_tpm(x, 2).relative_error(x)


def test_guard_falls_back_on_the_power_method():
    x = border_rank_two()
    bad = cp_nls(x, 2)
    asked = []

    def fit(l2):
        asked.append(l2)
        return bad

    cp, note = guarded(x, fit, seed=4)
    assert asked == [0.0, 0.001, 0.01]
    assert "power method" in note
    assert torch.equal(cp.weights, cp_tpm(x, 2, seed=4).weights)
    assert cp.degeneracy(x) <= 1


def test_guard_leaves_other_fits_alone():
    x = normal(8, 6, 3, 3)
    good = cp_als(x, 3)
    cp, note = guarded(x, lambda l2: good)
    assert cp is good and note == ""


# ---- the layer -----------------------------------------------------------------------------------


def conv(c_in, c_out, kernel, seed=0, **options):
    layer = nn.Conv2d(c_in, c_out, kernel, dtype=torch.float64, **options)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=seed + i))
    return layer


def shapes(chain):
    return [(s.in_channels, s.out_channels, s.kernel_size, s.groups) for s in chain]


def test_layer_has_four_stages_with_depthwise_ones_in_the_middle():
    layer = conv(8, 10, (3, 5), stride=(2, 1), padding=1, groups=2)
    chain = factorize(layer, "cp", 3)
    assert shapes(chain) == [
        (8, 6, (1, 1), 2), (6, 6, (3, 1), 6), (6, 6, (1, 5), 6), (6, 10, (1, 1), 2),
    ]  # fmt: skip
    assert [s.stride for s in chain] == [(1, 1), (2, 1), (1, 1), (1, 1)]
    assert [s.bias is not None for s in chain] == [False, False, False, True]
    assert shapes(factorize(layer, CP(modes=3), 3)) == [
        (8, 6, (1, 1), 2), (6, 6, (3, 5), 6), (6, 10, (1, 1), 2),
    ]  # fmt: skip
    line = factorize(conv(8, 10, (1, 7)), "cp", 3)
    assert shapes(line) == [(8, 3, (1, 1), 1), (3, 3, (1, 7), 3), (3, 10, (1, 1), 1)]


@pytest.mark.parametrize("method", [CP(), CP(modes=3), CPNLS(), CPNLS(modes=3)], ids=str)
def test_layer_of_planted_rank_is_recovered_in_each_group(method):
    layer = conv(10, 12, (3, 5), padding=1, groups=2)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([planted((6, 5, 3, 5), 3, seed) for seed in (1, 20)]))
    chain = factorize(layer, method, 3)
    x = normal(2, 10, 9, 8)
    torch.testing.assert_close(chain(x), layer(x), rtol=1e-5, atol=1e-5)
    smaller = factorize(layer, method, 2).dense_weight()
    assert relative_error(smaller, layer.weight.detach()) > 0.02


def test_each_solver_makes_its_own_factors():
    layer = conv(12, 16, 3)
    kernel = layer.weight.detach()
    for name, solver in (("cp", cp_als), ("cp_nls", cp_nls), ("cp_tpm", cp_tpm)):
        chain = factorize(layer, name, 4, seed=3)
        torch.testing.assert_close(chain.dense_weight(), solver(kernel, 4, seed=3).to_tensor())
        assert chain.method == name
    assert factorize(layer, CP(solver="tpm"), 4).method == "cp"


@pytest.mark.parametrize("method", [CP(), CP(modes=3)], ids=str)
def test_full_rank_layer_equals_dense_in_float32(method):
    layer = conv(6, 8, 3, padding=1).float()
    chain = factorize(layer, method, 54)
    x = normal(2, 6, 7, 7).float()
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-5)


def test_pointwise_and_linear_layers_are_the_svd():
    for layer in (conv(8, 6, 1, stride=2), nn.Linear(8, 6, dtype=torch.float64)):
        chain = factorize(layer, "cp", 4)
        assert len(chain) == 2
        weight = layer.weight.detach().flatten(1)
        product = (chain[1].weight.flatten(1) @ chain[0].weight.flatten(1)).detach()
        tail = torch.linalg.svdvals(weight)[4:].square().sum()
        torch.testing.assert_close((product - weight).square().sum(), tail)


def test_depthwise_filters_lose_their_trailing_singular_values():
    layer = conv(6, 6, 5, groups=6)
    chain = factorize(layer, "cp", 2)
    weight = layer.weight.detach()
    lost = (chain.dense_weight() - weight).square().sum((1, 2, 3))
    tail = torch.linalg.svdvals(weight[:, 0])[:, 2:].square().sum(1)
    torch.testing.assert_close(lost, tail, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("modes", "taps"), [(4, 6), (3, 9)])
def test_target_speedup_is_the_closed_form(modes, taps):
    layer = conv(64, 96, 3, padding=1)
    p = LayerProblem.of(layer, in_hw=(14, 14))
    (rank,) = TargetSpeedup(3).select(p, CP(modes=modes))
    assert rank == 9 * 64 * 96 // (3 * (64 + taps + 96))
    strided = LayerProblem.of(conv(64, 96, 3, padding=1, stride=2), in_hw=(14, 14))
    macs = chain_macs(strided, CP().stages(strided, (10,)))
    assert macs == 10 * (64 * 196 + 3 * 7 * 14 + 3 * 49 + 96 * 49)


def test_layer_reports_terms_that_cancel():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("sparsecnn.factorize.methods.cp")
    logger.addHandler(handler)
    layer = nn.Conv2d(8, 8, (2, 4), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(border_rank_two().reshape(8, 8, 2, 4))
    try:
        chain = factorize(layer, CP(modes=3, solver="nls"), 2)
        factorize(conv(8, 6, 3), "cp", 2)
    finally:
        logger.removeHandler(handler)
    (record,) = records
    assert "Conv2d, group 0: terms cancel" in record.getMessage()
    assert relative_error(chain.dense_weight(), layer.weight.detach()) < 0.1


@pytest.mark.parametrize("method", [CP(), CPNLS(modes=3), CPTPM()], ids=str)
def test_a_kernel_of_zeros_stays_one(method):
    layer = conv(6, 8, 3)
    nn.init.zeros_(layer.weight)
    assert not factorize(layer, method, 2).dense_weight().any()


@pytest.mark.parametrize("name", ["cp", "cp_nls", "cp_tpm"])
def test_same_seed_same_bits_and_other_seeds_differ(name):
    layer = conv(12, 16, 3)
    first, second, third = (factorize(layer, name, 4, seed=s) for s in (1, 1, 2))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first[0].weight, third[0].weight)


# ---- refusals ------------------------------------------------------------------------------------


def wrong_init():
    return CPTensor(torch.ones(2), (normal(4, 2), normal(3, 2), normal(5, 2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cp_als(normal(4, 3, 2), 0), "cp_als: expected rank >= 1, got 0"),
        (lambda: cp_tpm(normal(4), 1), r"cp_tpm: expected x of 2 or more modes.*got \(4,\)"),
        (lambda: cp_nls(torch.empty(4, 0, 2), 1), "cp_nls: expected x of 2 or more modes"),
        (lambda: cp_als_batch(normal(2, 4, 3), 0), "cp_als_batch: expected x of 2 or more|rank"),
        (lambda: cp_exact(normal(4)), "cp_exact: expected x of 2 or more modes"),
        (lambda: cp_als(normal(4, 3, 2), 1, l2=-1.0), "cp_als: expected l2 >= 0.*got -1.0"),
        (lambda: cp_als(normal(4, 3, 2), 1, n_init=-1), "cp_als: expected .* n_init >= 0"),
        (lambda: cp_als(normal(4, 3, 2), 1, max_iter=0), "cp_als: expected .* max_iter >= 1"),
        (lambda: cp_nls(normal(4, 3, 2), 1, l2=math.nan), "cp_nls: expected l2 >= 0.*got nan"),
        (lambda: cp_nls(normal(4, 3, 2), 1, max_iter=0), "cp_nls: expected .* max_iter >= 1"),
        (lambda: cp_tpm(normal(4, 3, 2), 1, n_repeat=0), "cp_tpm: expected n_repeat"),
        (lambda: cp_als(normal(4, 3, 2), 2, init=wrong_init()), r"cp_als: expected init.*\(2, 2\)"),
        (lambda: cp_nls(normal(4, 3, 2), 2, init=wrong_init()), "cp_nls: expected init"),
        (lambda: CP(modes=5), "CP: expected modes 3 or 4, got 5"),
        (lambda: CP(solver="sgd"), "CP: expected solver one of als, nls, tpm, got 'sgd'"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
