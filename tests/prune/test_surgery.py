"""Masks that change while training: iterative hard thresholding and dynamic network surgery."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsecnn.prune import (
    NM,
    Alternating,
    Budget,
    Event,
    Iterative,
    LayerByLayer,
    Magnitude,
    Probabilistic,
    Pruner,
    Random,
    ReactivateAll,
    Splice,
    Threshold,
    find_targets,
)

from .nets import mixed

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=5e-4),
}


def train(model, optimizer, steps, watch=lambda step: None, seed=0):
    source = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 6, 6, generator=source)
        model(x).square().mean().backward()
        optimizer.step()
        watch(step)


def events(schedule, ticks):
    found = [(tick, schedule.event(tick, 0)) for tick in range(ticks)]
    return [(tick, event) for tick, event in found if event is not None]


# ---- schedules -----------------------------------------------------------------------------------


def test_alternating_ends_sparse():
    found = events(Alternating(s1=3, s2=2, rounds=2, begin=1), 40)
    assert [(t, e.kind) for t, e in found] == [
        (1, "prune"), (4, "regrow"), (6, "prune"), (9, "regrow"), (11, "prune"),
    ]  # fmt: skip
    grows = [e.fraction for _, e in events(Alternating(1, 1, 3, progressive=True), 40)]
    assert [f for f in grows[::2]] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_iterative_and_layer_by_layer():
    found = events(Iterative((0.5, 0.9, 1.0), every=4, begin=2), 40)
    assert [(t, e.fraction) for t, e in found] == [(2, 0.5), (6, 0.9), (10, 1.0)]
    found = events(LayerByLayer(every=5, layers=3, begin=1), 40)
    assert [(t, e.layer) for t, e in found] == [(1, 0), (6, 1), (11, 2)]


def test_probabilistic_fires_at_the_expected_ticks():
    schedule = Probabilistic(gamma=0.5, power=1.0, stop=60, seed=3)
    fired = [tick for tick, _ in events(schedule, 200)]
    wanted = []
    for tick in range(60):
        mixed_seed = (3 * 0x9E3779B97F4A7C15 + tick) % 2**63
        draw = torch.rand(
            (), generator=torch.Generator().manual_seed(mixed_seed), dtype=torch.float64
        )
        if draw < 1 / (1 + 0.5 * tick):
            wanted.append(tick)
    assert fired == wanted and fired[0] == 0
    assert len(events(Probabilistic(gamma=0.0, stop=30), 100)) == 30
    # Averaged over seeds the frequency is the probability: 4 standard errors of 2000 draws.
    rate = sum(len(events(Probabilistic(1.0, 1.0, 2, s), 2)) - 1 for s in range(2000)) / 2000
    assert abs(rate - 0.5) < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Iterative((0.5, 0.4, 1.0)), "fractions ascending in (0, 1] up to 1"),
        (lambda: Iterative((0.5,)), "fractions ascending"),
        (lambda: Iterative(every=0), "every >= 1, got 0"),
        (lambda: Alternating(0, 1), "s1 >= 1, got 0"),
        (lambda: Probabilistic(gamma=-1), "gamma in [0, inf), got -1"),
        (lambda: LayerByLayer(1, 0), "layers >= 1, got 0"),
        (lambda: Event("prune", layer=-1), "layer >= 0, got -1"),
        (lambda: Threshold(float("nan")), "finite numbers"),
        (lambda: Threshold(1.0, of="mean"), "of among absolute"),
        (lambda: Threshold(1.0, floor=-1), "floor to be an int >= 0"),
        (lambda: Splice(-1.0), "value >= 0, got -1"),
        (lambda: Splice(1.0, margin=0.0), "margin in (0, inf), got 0"),
    ],
)
def test_bad_parts_are_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


# ---- thresholds ----------------------------------------------------------------------------------


def test_thresholds_are_those_of_the_papers():
    model = mixed()
    for granularity in ("element", "filter"):
        pruner = Pruner(
            mixed(), importance=Magnitude(granularity=granularity), selector=Threshold(0.0)
        )
        with torch.no_grad():
            pruner.model.plain.parametrizations.weight.original[3] = 0
        pruner.step()
        mask = pruner.masks()["plain.weight"]
        assert not mask[3].any() and mask[[0, 1, 2, 4, 5, 6, 7]].all()
    pruner = Pruner(model, importance=Magnitude(), selector=Threshold(0.8, of="weight_std"))
    pruner.step()
    for t in pruner.targets:
        limit = 0.8 * t.values().std(correction=0)
        assert torch.equal(pruner.masks()[t.key], t.values().abs() >= limit) or t.name == "hidden"
    model = mixed()
    pruner = Pruner(
        model, importance=Magnitude(granularity="filter"), selector=Threshold(1.0, of="scores")
    )
    scores = {t: t.values().abs().flatten(1).mean(1) for t in pruner.targets}
    pruner.step()
    for t, score in scores.items():
        below = score < score.mean() - score.std(correction=0)
        assert torch.equal(~pruner.masks()[t.key].flatten(1).any(1), below), t.name
    assert any((s < s.mean() - s.std(correction=0)).any() for s in scores.values())


def test_a_threshold_never_empties_a_layer():
    pruner = Pruner(mixed(), importance=Magnitude(), selector=Threshold(1e9))
    pruner.step()
    assert [int(m.sum()) for m in pruner.masks().values()] == [1] * len(pruner.targets)


def test_layer_by_layer_prunes_only_its_layer():
    pruner = Pruner(
        mixed(), importance=Magnitude(sparsity=0.5), schedule=LayerByLayer(every=1, layers=5)
    )
    for number in range(5):
        pruner.step()
        pruned = [not bool(mask.all()) for mask in pruner.masks().values()]
        assert pruned == [i <= number for i in range(5)]
    late = Pruner(
        mixed(), importance=Magnitude(sparsity=0.5), schedule=LayerByLayer(every=1, layers=9)
    )
    for _ in range(5):
        late.step()
    with pytest.raises(ValueError, match="schedule of at most 5 layers, got layer 5"):
        late.step()


# ---- iterative hard thresholding -----------------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_iht_phases(optimizer_name):
    model = mixed()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    seen = []

    class Recorded(Alternating):
        def event(self, step, epoch):
            event = super().event(step, epoch)
            if event is not None:
                seen.append((step, event.kind))
            return event

    pruner = Pruner(
        model, importance=Magnitude(sparsity=0.75), schedule=Recorded(s1=20, s2=3, rounds=2),
        regrowth=ReactivateAll(),
    ).attach(optimizer)  # fmt: skip
    dead = {}

    def watch(step):
        phase = step % 23
        for t in pruner.targets:
            kept = round(t.dense.numel() * 0.25)
            mask = pruner.masks()[t.key]
            if phase < 20:
                assert abs(int(mask.sum()) - kept) <= 1  # of 27 and 54 entries, 0.75 is no count
                zeros = t.dense[~mask]
                assert torch.equal(zeros, torch.zeros_like(zeros)) and not zeros.signbit().any()
                dead[t] = ~mask
                for value in optimizer.state[t.dense].values():
                    if torch.is_tensor(value) and value.shape == t.dense.shape:
                        assert not value[~mask].any()
            else:
                assert mask.all()
            if phase == 20:  # re-activated in this very tick: from 0
                assert not t.dense[dead[t]].any()
            if phase == 21:
                # The first step of the dense phase moves exactly what has a gradient: decay and
                # momentum of a re-activated weight start from 0.
                moved = t.dense[dead[t]] != 0
                assert torch.equal(moved, t.dense.grad[dead[t]] != 0) and moved.any()

    train(model, optimizer, 60, watch)
    assert [kind for _, kind in seen] == ["prune", "regrow", "prune", "regrow", "prune"]


class Planted(nn.Linear):
    """One regression per row, each with its own inputs: y[s] = X[s] w[s]."""

    def __init__(self, x):
        super().__init__(x.shape[2], x.shape[0], bias=False, dtype=torch.float64)
        self.x = x
        nn.init.zeros_(self.weight)

    def forward(self):
        return torch.einsum("snd,sd->sn", self.x, self.weight)


def test_iht_phases_recover_a_planted_support():
    """Thirty regressions with 30 equations, 60 unknowns and 4 of them nonzero, at once.

    A row per problem and the constraint 4 of 60 keep the four largest weights of every problem,
    as the whole layer's top k does for one.
    """
    n, d, k, seeds = 30, 60, 4, 30
    x = torch.stack([
        torch.randn(n, d, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in range(seeds)
    ])  # fmt: skip
    truth = torch.zeros(seeds, d, dtype=torch.float64)
    for s in range(seeds):
        source = torch.Generator().manual_seed(1000 + s)
        where = torch.randperm(d, generator=source)[:k]
        truth[s, where] = torch.randn(k, generator=source, dtype=torch.float64)
    y = torch.einsum("snd,sd->sn", x, truth)
    support = truth != 0

    def recovered(weight):
        best = torch.zeros_like(support).scatter_(1, weight.abs().topk(k).indices, True)
        return int((best == support).all(1).sum())

    model = Planted(x)
    s1, s2, rounds = 100, 5, 30
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 * n / d)
    targets = find_targets(model, include_classifier=True)

    def descend(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            ((model() - y).square().sum() / (2 * n)).backward()
            optimizer.step()

    descend(400)
    one_shot = recovered(model.weight.detach())
    Pruner(
        model, granularity=NM(k, d), importance=Magnitude(), targets=targets,
        schedule=Alternating(s1, s2, rounds), regrowth=ReactivateAll(),
    ).attach(optimizer)  # fmt: skip
    descend((s1 + s2) * rounds + s1)
    iterated = recovered(model.weight.detach())
    assert iterated >= 20 and iterated >= one_shot + 5, (iterated, one_shot)


# ---- dynamic network surgery ---------------------------------------------------------------------


def surgery(mode):
    """Least squares with true w = (2, 1) from (0.05, 1): the first step prunes w_0 wrongly."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.05, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(
        model, importance=Magnitude(), selector=Threshold(0.5, floor=0),
        schedule=Probabilistic(gamma=0.0, stop=60), regrowth=Splice(0.6), mask_mode=mode,
        targets=find_targets(model, include_classifier=True),
    )  # fmt: skip
    pruner.step()
    assert pruner.masks()["0.weight"].tolist() == [[False, True]]
    pruner.attach(optimizer)
    x = torch.eye(2, dtype=torch.float64)
    y = x @ torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    for _ in range(59):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return pruner, float((model(x) - y).square().sum())


def test_dns_splices():
    pruner, loss = surgery("ste")
    assert pruner.masks()["0.weight"].tolist() == [[True, True]] and loss < 1e-9
    pruner, loss = surgery("hard")
    assert pruner.masks()["0.weight"].tolist() == [[False, True]] and loss > 3


def test_dns_splices_keep_the_mask_within_the_band():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    pruner = Pruner(
        model, importance=Magnitude(), selector=Threshold(0.5, floor=0), regrowth=Splice(0.6),
        schedule=Probabilistic(gamma=0.0, stop=5), mask_mode="ste",
        targets=find_targets(model, include_classifier=True),
    )  # fmt: skip
    dense = pruner.targets[0].dense

    def after(values):
        with torch.no_grad():
            dense.copy_(torch.tensor([values]))
        pruner.step()
        return pruner.masks()["0.weight"][0].tolist()

    assert after([0.4, 0.55, 0.7, 0.5]) == [False, True, True, True]
    assert after([0.55, 0.55, 0.55, 0.49]) == [False, True, True, False]
    assert after([0.61, 0.55, 0.3, 0.59]) == [True, True, False, False]
    assert after([0.55, -0.55, -0.7, 0.6]) == [True, True, True, True]
    assert after([0.1, 0.55, 0.7, 0.6]) == [False, True, True, True]
    # Tick 5 is the stop: never again.
    assert after([0.7, 0.1, 0.1, 0.1]) == [False, True, True, True]


def test_dns_splices_by_the_initial_statistics():
    model = mixed()
    sizes = {t.key: t.values().abs() for t in find_targets(model)}
    pruner = Pruner(
        model, importance=Magnitude(), selector=Threshold(0.5, of="initial"),
        regrowth=Splice(0.5, initial=True), schedule=Probabilistic(gamma=0.0), mask_mode="ste",
    )  # fmt: skip
    with torch.no_grad():
        for t in pruner.targets:
            t.dense.mul_(2)  # the thresholds must not follow the weights
    state = pruner.state_dict()
    pruner.step()
    for t in pruner.targets:
        size = sizes[t.key]
        low = 0.9 * (size.mean() + 0.5 * size.std(correction=0))
        assert torch.equal(pruner.masks()[t.key], 2 * size >= low), t.name
    again = Pruner(
        mixed(1), importance=Magnitude(), selector=Threshold(0.5, of="initial"),
        regrowth=Splice(0.5, initial=True), mask_mode="ste",
    )  # fmt: skip
    again.load_state_dict(state)
    for t, other in zip(pruner.targets, again.targets, strict=True):
        assert torch.equal(
            pruner.running.values["running:initial"][t],
            again.running.values["running:initial"][other],
        )
    with pytest.raises(ValueError, match="expected base, masks, got base, masks, running:initial"):
        Pruner(mixed(), importance=Magnitude(sparsity=0.5)).load_state_dict(state)


# ---- the order of what happens after a step ------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_hook_order(optimizer_name):
    log = []

    class Logged:
        def penalty(self, targets):
            return torch.zeros(())

        def prox_(self, targets, lr, step):
            log.append("prox")
            for t in targets:
                # Masks come after the proximal step: what it writes into the dead is undone.
                t.dense.add_(1e-3)

    class Ticking:
        def event(self, step, epoch):
            log.append("tick")
            return Event("prune") if step == 0 else None

    for mode in ("hard", "ste"):
        log.clear()
        model = mixed()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        pruner = Pruner(
            model, importance=Random(seed=1), budget=Budget(sparsity=0.5), schedule=Ticking(),
            regularizers=[Logged()], mask_mode=mode,
        ).attach(optimizer)  # fmt: skip
        moved = {t: False for t in pruner.targets}
        before = {}

        def watch(step, mode=mode, pruner=pruner, moved=moved, before=before):
            for t in pruner.targets:
                dead = ~pruner.masks()[t.key]
                assert dead.any()
                if mode == "hard":
                    assert not t.dense[dead].any()
                elif t in before:
                    moved[t] |= bool((t.dense[dead] != before[t]).any())
                assert not t.weight[dead].any()
                before[t] = t.dense[dead].clone()

        train(model, optimizer, 20, watch)
        assert log == ["prox", "tick"] * 20
        assert mode == "hard" or all(moved.values())
