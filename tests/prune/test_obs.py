"""Optimal brain surgeon against solutions of the constrained problem in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sparsecnn.prune import (
    Batches,
    Budget,
    Iterative,
    Magnitude,
    Pruner,
    Random,
    TopK,
    element,
    filter_,
    find_targets,
)
from sparsecnn.prune.calibration import Collected
from sparsecnn.prune.gauss_newton import inverse_hessian, need
from sparsecnn.prune.obs import OBSUpdate, SequentialOBS, cost, delete_, delete_together

from .nets import mixed


def half_squared_error(outputs, labels):
    return 0.5 * (outputs - labels).square().flatten(1).sum(1).mean()


def toy(seed=0, damping=1e-2):
    """12 weights, 40 outer vectors of 20 samples, and H itself."""
    source = torch.Generator().manual_seed(seed)
    vectors = torch.randn(40, 12, generator=source, dtype=torch.float64)
    values = torch.randn(12, generator=source, dtype=torch.float64)
    hessian = damping * np.eye(12) + vectors.numpy().T @ vectors.numpy() / 20
    return values, vectors, hessian


def kkt(hessian, values, dropped):
    """min d^T H d / 2 with d = -w at the dropped ones, by the KKT system."""
    n, m = len(values), len(dropped)
    rows = np.eye(n)[dropped]
    system = np.block([[hessian, rows.T], [rows, np.zeros((m, m))]])
    change = np.linalg.solve(system, np.concatenate([np.zeros(n), -values[dropped]]))[:n]
    return change, 0.5 * change @ hessian @ change


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_obs_exact_recursion(damping):
    _, vectors, _ = toy()
    few = vectors[:7]  # fewer than weights: H alone is singular
    for rows, samples in ((vectors, 20), (few, 7), (vectors.repeat(5, 1), 100)):
        hessian = damping * np.eye(12) + rows.numpy().T @ rows.numpy() / samples
        got = inverse_hessian(rows, damping, samples).numpy()
        want = np.linalg.inv(hessian)
        assert np.abs(got - want).max() <= 1e-8 * max(1, np.abs(want).max())
    one_by_one = torch.eye(12, dtype=torch.float64) / damping
    for x in vectors:
        moved = one_by_one @ x
        one_by_one = one_by_one - torch.outer(moved, moved) / (20 + x @ moved)
    torch.testing.assert_close(inverse_hessian(vectors, damping, 20), one_by_one, rtol=0, atol=1e-8)
    blocks = inverse_hessian(vectors.reshape(40, 3, 4).movedim(1, 0), damping, 20)
    torch.testing.assert_close(blocks[1], inverse_hessian(vectors[:, 4:8], damping, 20))


def test_obs_exact_one_step():
    values, _, hessian = toy()
    inverse = torch.from_numpy(np.linalg.inv(hessian))
    for q in range(12):
        want, price = kkt(hessian, values.numpy(), [q])
        assert abs(float(cost(values, inverse)[q]) - price) < 1e-10
        moved, reduced = values.clone(), inverse.clone()
        delete_(moved, reduced, q)
        np.testing.assert_allclose((moved - values).numpy(), want, rtol=0, atol=1e-10)
        assert moved[q] == 0 and int((moved != values).sum()) == 12  # the others answer
        # The inverse of H without row and column q, and nothing where q was.
        rest = [k for k in range(12) if k != q]
        np.testing.assert_allclose(
            reduced.numpy()[np.ix_(rest, rest)],
            np.linalg.inv(hessian[np.ix_(rest, rest)]),
            atol=1e-10,
        )
        assert not reduced[q].any() and not reduced[:, q].any()


def test_obs_exact_five_deletions():
    values, _, hessian = toy(1)
    inverse = torch.from_numpy(np.linalg.inv(hessian))
    moved, reduced, chosen, prices = values.clone(), inverse.clone(), [], 0.0
    for _ in range(5):
        costs = cost(moved, reduced)
        q = int(costs.argmin())
        prices += float(costs[q])
        chosen.append(q)
        delete_(moved, reduced, q)
        assert not moved[chosen].any()  # deleted ones are never moved again
    assert len(set(chosen)) == 5
    want, price = kkt(hessian, values.numpy(), chosen)
    np.testing.assert_allclose((moved - values).numpy(), want, rtol=0, atol=1e-8)
    assert abs(prices - price) < 1e-8
    dropped = torch.zeros(12, dtype=torch.bool)
    dropped[chosen] = True
    together = delete_together(values, inverse, dropped)
    torch.testing.assert_close(together, moved, rtol=0, atol=1e-8)
    assert not together[dropped].any()
    # Zeroing without the answer of the others costs more.
    naive = torch.where(dropped, -values, 0.0).numpy()
    assert 0.5 * naive @ hessian @ naive > 1.2 * price


def select(selector, t, budget, inverse=None, current=None):
    stats = None
    if inverse is not None:
        stats = Collected({(need(selector.block, selector.damping), t): inverse})
    alive = torch.ones(t.shape, dtype=torch.bool) if current is None else current
    return selector.select([t], {}, element, budget, stats, {t: alive})[t]


def linear_target(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor(rows, dtype=torch.float64)
    return find_targets(layer)[0]


def test_obs_exact_selection():
    hessian = torch.tensor([[5.0, 1, -1], [1, 10, -3], [-1, -3, 4]], dtype=torch.float64)
    t = linear_target([[2.5, 2.0, 3.0]])
    inverse = torch.linalg.inv(hessian)
    one = Budget(count=2)
    assert select(SequentialOBS(), t, one, inverse[None]).tolist() == [True, True, False]
    prices = cost(t.values()[0], inverse)
    torch.testing.assert_close(
        prices, torch.tensor([14.8185, 15.4737, 13.5], dtype=torch.float64), rtol=0, atol=1e-4
    )
    alive = {t: torch.ones(t.shape, dtype=torch.bool)}
    for score, survivors in (
        (t.values()[0].abs(), [True, False, True]),
        (hessian.diagonal() * t.values()[0].square() / 2, [False, True, True]),
    ):
        assert TopK().select([t], {t: score}, element, one, None, alive)[t].tolist() == survivors


def test_obs_exact_sequence_of_the_selector():
    """The path of the selector is the greedy one, and skips what is dead."""
    values, _, hessian = toy(3)
    inverse = torch.from_numpy(np.linalg.inv(hessian))
    t = linear_target(values.reshape(3, 4).tolist())
    dropped = []
    for _ in range(6):  # each step from scratch, by the KKT system
        prices = {}
        for q in set(range(12)) - set(dropped):
            prices[q] = kkt(hessian, values.numpy(), [*dropped, q])[1]
        dropped.append(min(prices, key=prices.get))
    keep = select(SequentialOBS(), t, Budget(count=6), inverse[None])
    assert (~keep).nonzero().flatten().tolist() == sorted(dropped)
    current = torch.ones(3, 4, dtype=torch.bool)
    current.view(-1)[dropped[5]] = False  # dead already, and counted
    keep = select(SequentialOBS(), t, Budget(count=6), inverse[None], current)
    assert int((~keep).sum()) == 6 and not keep[dropped[5]]


def test_blocks_and_scope():
    source = torch.Generator().manual_seed(0)
    t = linear_target(torch.randn(4, 5, generator=source).tolist())
    rows = inverse_hessian(torch.randn(4, 30, 5, generator=source), 1e-3, 30)
    keep = select(SequentialOBS("row", 1e-3), t, Budget(sparsity=0.4), rows)
    assert int((~keep).sum()) == 8
    # Blocks do not touch each other: the full H with these blocks gives the same.
    full = torch.block_diag(*rows)[None]
    assert torch.equal(keep, select(SequentialOBS(damping=1e-3), t, Budget(sparsity=0.4), full))
    assert int(select(SequentialOBS("row", 1e-3), t, Budget(sparsity=1.0), rows).sum()) == 1

    first, second = linear_target([[1.0, 2, 3, 4]]), linear_target([[10.0, 20, 30, 40]])
    second = copy.copy(second)
    object.__setattr__(second, "name", "second")
    eye = torch.eye(4, dtype=torch.float64)[None]
    stats = Collected({(need(None, 1e-6), t): eye for t in (first, second)})
    alive = {t: torch.ones(t.shape, dtype=torch.bool) for t in (first, second)}
    for order in ([first, second], [second, first]):
        got = SequentialOBS(scope="global").select(
            order, {}, element, Budget(sparsity=0.5), stats, alive
        )
        assert [int(got[first].sum()), int(got[second].sum())] == [1, 3]
        got = SequentialOBS().select(order, {}, element, Budget(sparsity=0.5), stats, alive)
        assert got[first].tolist() == got[second].tolist() == [False, False, True, True]


def explicit_hessian(model, parameter, x, y, loss, curvature):
    """(1/N) sum J^T C J with a loop over samples and outputs; C from the outputs."""
    total = 0.0
    for n in range(len(x)):
        outputs = model(x[n : n + 1]).flatten()
        rows = [
            torch.autograd.grad(o, parameter, retain_graph=True)[0].flatten() for o in outputs
        ]
        jacobian = torch.stack(rows).double()
        total = total + jacobian.T @ curvature(outputs.detach().double()) @ jacobian
    return total / len(x)


def softmax_curvature(outputs):
    p = outputs.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "hidden", "head"])
@pytest.mark.parametrize("kind", ["cross entropy", "squared"])
def test_the_hessian_of_each_kind_of_layer(name, kind):
    model = mixed().double().eval()
    source = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, 5, 5, generator=source, dtype=torch.float64)
    y = torch.randint(4, (7,), generator=source)
    loss, curvature = cross_entropy, softmax_curvature
    if kind == "squared":
        y = torch.randn(7, 4, generator=source, dtype=torch.float64)
        loss, curvature = half_squared_error, lambda outputs: torch.eye(4, dtype=torch.float64)
    (t,) = [t for t in find_targets(model, include_classifier=True) if t.name == name]
    hessian = explicit_hessian(model, t.dense, x, y, loss, curvature)
    data = Batches([(x[:5], y[:5]), (x[5:], y[5:])], loss)  # batches of unequal size
    wanted = [need(None, 1e-2), need("row", 1e-2), need(5, 1e-2)]
    got = data.collect(model, [t], frozenset(wanted))
    n, row = t.dense.numel(), t.dense[0].numel()
    damped = hessian + 1e-2 * torch.eye(n, dtype=torch.float64)
    for one, size in zip(wanted, (n, row, 5), strict=True):
        blocks = got.get(one, t)
        assert blocks.shape == (-(-n // size), size, size)
        for number, block in enumerate(blocks):
            part = slice(number * size, min((number + 1) * size, n))
            length = part.stop - part.start
            want = torch.linalg.inv(damped[part, part])
            torch.testing.assert_close(block[:length, :length], want, rtol=0, atol=1e-8)
            assert torch.equal(block[length:, :length], torch.zeros(size - length, length).double())


def planted(seed=0, n=60):
    """Linear regression on correlated inputs: H is exact, so is the loss the method predicts."""
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=source, dtype=torch.float64)
    x = torch.randn(n, 12, generator=source, dtype=torch.float64) @ mixing
    truth = torch.randn(12, 3, generator=source, dtype=torch.float64)
    y = x @ truth + 0.1 * torch.randn(n, 3, generator=source, dtype=torch.float64)
    model = nn.Linear(12, 3, bias=False, dtype=torch.float64)
    model.weight.data = torch.linalg.lstsq(x, y).solution.T.contiguous()  # a minimum
    return model, x, y


def pruned_loss(model, x, y, sparsity=0.5, **parts):
    pruner = Pruner(
        model,
        budget=Budget(sparsity=sparsity),
        calibration=Batches([(x, y)], half_squared_error),
        **parts,
    )
    pruner.step()
    finished = pruner.finalize().requires_grad_(False)
    assert int((finished.weight == 0).sum()) == round(sparsity * finished.weight.numel())
    return float(half_squared_error(finished(x), y))


def test_in_a_pruner():
    """The loss rises by the sum of L_q; others pay more, and random choices do not pass."""
    model, x, y = planted()
    start = half_squared_error(model(x), y).item()
    predicted = 0.0
    inverse = torch.block_diag(*[torch.linalg.inv(x.T @ x / len(x))] * 3)
    values = model.weight.detach().flatten().clone()
    for _ in range(18):
        costs = cost(values, inverse)
        predicted += float(costs.min())
        delete_(values, inverse, int(costs.argmin()))
    surgeon = {"selector": SequentialOBS("row", 1e-8), "compensator": OBSUpdate("row", 1e-8)}
    rise = pruned_loss(copy.deepcopy(model), x, y, **surgeon) - start
    assert abs(rise - predicted) < 1e-4 * predicted
    update = OBSUpdate("row", 1e-8)
    rival = pruned_loss(copy.deepcopy(model), x, y, importance=Magnitude(), compensator=update)
    still = pruned_loss(copy.deepcopy(model), x, y, selector=SequentialOBS("row", 1e-8))
    chance = [
        pruned_loss(copy.deepcopy(model), x, y, importance=Random(seed=s), compensator=update)
        for s in range(5)
    ]
    assert rise < 0.9 * min(rival - start, *(c - start for c in chance))
    assert rise < 0.5 * (still - start)


def test_deleted_weights_stay_deleted_over_events():
    torch.manual_seed(0)
    model = mixed()
    x, y = torch.randn(24, 3, 5, 5), torch.randint(4, (24,))
    targets = [t for t in find_targets(model) if t.name in ("grouped", "depthwise", "hidden")]
    pruner = Pruner(
        model,
        budget=Budget(sparsity=0.6),
        selector=SequentialOBS("row"),
        compensator=OBSUpdate("row"),
        schedule=Iterative((0.5, 1.0), every=1),
        targets=targets,
        calibration=Batches([(x, y)]),
    )
    pruner.step()
    half, before = pruner.masks(), {t: t.dense.detach().clone() for t in targets}
    pruner.step()
    for t in targets:
        mask = pruner.masks()[t.key]
        assert int((~mask).sum()) == round(0.6 * mask.numel())
        assert not (mask & ~half[t.key]).any()
        assert not t.dense[~mask].any() and t.dense.isfinite().all()
        assert (t.dense != before[t])[mask].any()


def test_what_is_refused():
    for kind in (SequentialOBS, OBSUpdate):
        for block in (0, -1, True, "column", 1.5):
            with pytest.raises(ValueError, match=f"{kind.__name__}: expected block"):
                kind(block=block)
        for damping in (0.0, -1.0, float("nan"), float("inf"), 1):
            with pytest.raises(ValueError, match="expected damping"):
                kind(damping=damping)
    with pytest.raises(ValueError, match="scope"):
        SequentialOBS(scope="block")
    t = linear_target([[1.0, 2.0]])
    with pytest.raises(ValueError, match="granularity 'element', got filter"):
        SequentialOBS().select([t], {}, filter_, Budget(sparsity=0.5), None, {})
    with pytest.raises(ValueError, match="expected a budget"):
        select(SequentialOBS(), t, None)
    with pytest.raises(ValueError, match="expected statistics"):
        select(SequentialOBS(), t, Budget(sparsity=0.5))
    with pytest.raises(ValueError, match="one flag for each of the 2 weights"):
        OBSUpdate().apply(t, torch.ones(1, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="expected statistics"):
        OBSUpdate().apply(t, torch.ones(2, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="damping > 0"):
        inverse_hessian(torch.ones(2, 2), 0.0, 1)
    with pytest.raises(ValueError, match="samples >= 1"):
        inverse_hessian(torch.ones(2, 2), 1.0, 0)

    big = nn.Linear(100, 50)
    data = Batches([(torch.randn(2, 100), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(ValueError, match=r"at most 4096 weights, got 5000.*block='row'"):
        data.collect(big, find_targets(big), frozenset({need(None, 1e-6)}))

    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    pair = Twice(4, 3)
    data = Batches([(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(ValueError, match="a tensor of 2 samples, got tuple"):
        data.collect(pair, find_targets(pair), frozenset({need(None, 1e-6)}))


def test_one_measurement_serves_both_parts():
    assert SequentialOBS(7, 1e-5).needs == OBSUpdate(7, 1e-5).needs
    assert SequentialOBS().needs != OBSUpdate("row").needs
