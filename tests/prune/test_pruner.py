from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.nn.utils import parametrize

from sparsecnn.prune import (
    NM,
    Budget,
    Event,
    Magnitude,
    OneShot,
    Polynomial,
    Pruner,
    Random,
    TopK,
    sparsity,
)

from .nets import digits_net, mixed

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
}


def batches(seed=0, shape=(3, 6, 6), classes=4):
    source = torch.Generator().manual_seed(seed)
    while True:
        yield (
            torch.randn(8, *shape, generator=source),
            torch.randint(classes, (8,), generator=source),
        )


def train(model, optimizer, steps, data, pruner=None, each=lambda step: None):
    for step in range(steps):
        x, y = next(data)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss if pruner is None else loss + pruner.penalty()).backward()
        optimizer.step()
        each(step)


def is_plus_zero(values):
    return bool((values == 0).all()) and not bool(values.signbit().any())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hook_order_hard_keeps_bitwise_zeros(name):
    model = mixed()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, importance=Magnitude(sparsity=0.7), schedule=OneShot(at=2))
    pruner.attach(optimizer)
    data = batches()
    train(model, optimizer, 3, data)  # momentum builds up before the event at tick 2
    masks = pruner.masks()
    assert {k: int((~m).sum()) for k, m in masks.items()} == {
        t.key: round(0.7 * t.dense.numel()) for t in pruner.targets
    }
    before = {t.name: t.dense.detach().clone() for t in pruner.targets}

    def check(step):
        for t in pruner.targets:
            dead = ~masks[t.key]
            assert is_plus_zero(t.dense.detach()[dead])
            assert is_plus_zero(t.weight.detach()[dead])
            moments = [
                v for v in optimizer.state[t.dense].values() if getattr(v, "shape", None) == t.shape
            ]
            assert moments
            for value in moments:
                assert not value[dead].any()
                assert value[~dead].any()

    check(-1)
    train(model, optimizer, 20, data, pruner, check)
    assert all(torch.equal(m, masks[k]) for k, m in pruner.masks().items())
    assert all((t.dense != before[t.name])[masks[t.key]].any() for t in pruner.targets)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ste_shadow_moves(name):
    model = mixed()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, importance=Magnitude(sparsity=0.7), mask_mode="ste").attach(optimizer)
    pruner.step()
    before = {t.name: t.dense.detach().clone() for t in pruner.targets}
    masks = pruner.masks()
    data = batches()
    for t in pruner.targets:
        assert before[t.name][~masks[t.key]].all()

    pulled = {t.name: torch.zeros(t.shape, dtype=torch.bool) for t in pruner.targets}

    def check(step):
        for t in pruner.targets:
            assert is_plus_zero(t.weight.detach()[~masks[t.key]])
            assert torch.equal(t.weight[masks[t.key]], t.dense[masks[t.key]])
            pulled[t.name] |= t.dense.grad != 0

    train(model, optimizer, 20, data, pruner, check)
    for t in pruner.targets:
        dead = ~masks[t.key]
        # Only units that no sample activates get no gradient.
        assert pulled[t.name][dead].float().mean() > 0.3
        moved = (t.dense != before[t.name])[dead & pulled[t.name]]
        assert moved.float().mean() > 0.99
    assert is_plus_zero(pruner.finalize().plain.weight.detach()[~masks["plain.weight"]])


def test_the_zeroing_does_not_rely_on_masked_gradients():
    class Drift(torch.optim.Optimizer):
        """Moves every entry and remembers it, whatever its gradient."""

        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(1.0)
                    self.state[p]["momentum"] = torch.ones_like(p)

    model = mixed()
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5))
    pruner.step()
    optimizer = Drift(model.parameters())
    pruner.attach(optimizer)
    optimizer.step()
    for t in pruner.targets:
        dead = ~pruner.masks()[t.key]
        assert is_plus_zero(t.dense.detach()[dead])
        assert not optimizer.state[t.dense]["momentum"][dead].any()
        assert optimizer.state[t.dense]["momentum"][~dead].all()


class Recorder:
    """Regularizer that shrinks by lr * lam and writes down what it saw."""

    def __init__(self, lam=0.0):
        self.lam = lam
        self.seen = []

    def penalty(self, targets):
        return self.lam * sum(t.weight.abs().sum() for t in targets)

    def prox_(self, targets, lr, step):
        for t in targets:
            self.seen.append((step, t.name, lr, int((t.dense == 0).sum())))
            t.dense.add_(1e-3)  # revives every zero: the masks must come after


def test_prox_runs_first_with_the_rate_of_its_group():
    model = mixed()
    recorder = Recorder()
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5), regularizers=(recorder,))
    pruner.step()
    optimizer = torch.optim.SGD(
        [
            {"params": [*model.plain.parameters(), *model.grouped.parameters()], "lr": 0.1},
            {"params": [*model.depthwise.parameters(), *model.pointwise.parameters()], "lr": 0.01},
            {"params": [*model.head.parameters()], "lr": 1.0},
        ]
    )
    pruner.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    data = batches()
    for _ in range(2):
        train(model, optimizer, 1, data, pruner)
        scheduler.step()
    rates = [(step, name, lr) for step, name, lr, _ in recorder.seen]
    assert rates == [
        (1, "plain", 0.1), (1, "grouped", 0.1), (1, "depthwise", 0.01), (1, "pointwise", 0.01),
        (2, "plain", 0.05), (2, "grouped", 0.05), (2, "depthwise", 0.005), (2, "pointwise", 0.005),
    ]  # fmt: skip
    for name in ("plain", "grouped"):
        dead = ~pruner.masks()[f"{name}.weight"]
        assert is_plus_zero(getattr(model, name).weight.detach()[dead])


def test_penalty_is_differentiable_and_zero_by_default():
    model = mixed()
    assert Pruner(model, importance=Magnitude(sparsity=0.5)).penalty().item() == 0.0
    model = mixed()
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5), regularizers=[Recorder(2.0)])
    pruner.penalty().backward()
    (t, *_) = pruner.targets
    assert torch.equal(t.dense.grad, 2.0 * t.dense.detach().sign())
    with pytest.raises(ValueError, match="expected an attached optimizer"):
        pruner.after_step()


def test_polynomial_run_meets_every_count():
    model = mixed()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = Polynomial(begin=5, end=25, every=5, initial=0.2)
    pruner = Pruner(model, importance=Magnitude(sparsity=0.8), schedule=schedule).attach(optimizer)
    history = []
    train(
        model, optimizer, 30, batches(), pruner,
        lambda step: history.append((step, pruner.masks())),
    )  # fmt: skip
    previous = None
    for step, masks in history:
        if step < 5:
            expected = 0.0
        else:
            tick = min(step - step % 5, 25)
            expected = 0.8 + (0.2 - 0.8) * (1 - (tick - 5) / 20) ** 3
        for key, mask in masks.items():
            assert abs(int((~mask).sum()) - expected * mask.numel()) <= 0.5 + 1e-9
            assert previous is None or not bool((mask & ~previous[key]).any())
        previous = masks


@pytest.mark.parametrize("mode", ["hard", "ste"])
@pytest.mark.parametrize("importance", [Magnitude(sparsity=0.8), Random(sparsity=0.8)])
def test_state_dict_mid_schedule_continues_bitwise(importance, mode):
    def build(seed):
        model = mixed(seed)
        optimizer = OPTIMIZERS["adam"](model.parameters())
        pruner = Pruner(
            model,
            importance=importance,
            schedule=Polynomial(10, 60, 7),
            mask_mode=mode,
            generator=torch.Generator().manual_seed(seed),
        )
        return model, optimizer, pruner.attach(optimizer)

    model, optimizer, pruner = build(1)
    train(model, optimizer, 25, batches(1), pruner)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    train(model, optimizer, 50, batches(2), pruner)
    assert sparsity(model)["plain"].element == pytest.approx(0.8, abs=0.01)

    file.seek(0)
    states = torch.load(file, weights_only=True)
    other, other_optimizer, other_pruner = build(2)
    for part, state in zip((other, other_optimizer, other_pruner), states, strict=True):
        part.load_state_dict(state)
    train(other, other_optimizer, 50, batches(2), other_pruner)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for key, mask in pruner.masks().items():
        assert torch.equal(mask, other_pruner.masks()[key])


def test_state_of_another_model_is_refused_untouched():
    pruner = Pruner(mixed(), importance=Magnitude(sparsity=0.5))
    foreign = Pruner(digits_net(), importance=Magnitude(sparsity=0.5)).state_dict()
    for state, message in (
        (foreign, r"expected masks for the pruned layers.*conv1.weight"),
        (pruner.state_dict() | {"version": 2}, "expected version 1, got 2"),
        (pruner.state_dict() | {"base": {}}, "expected base"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(state)
    assert all(m.all() for m in pruner.masks().values())


def test_finalize_leaves_plain_layers_and_the_same_parameters():
    model = mixed().to(memory_format=torch.channels_last)
    names = [n for n, _ in model.named_parameters()]
    identities = [id(p) for p in model.parameters()]
    model.plain.weight.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5)).attach(optimizer)
    pruner.step()
    assert model.plain.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6)
    y = model(x)
    report = pruner.sparsity()
    assert pruner.finalize() is model
    assert pruner.finalize() is model
    assert [n for n, _ in model.named_parameters()] == names
    assert [id(p) for p in model.parameters()] == identities
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert type(model.plain) is nn.Conv2d
    assert not model.plain.weight.requires_grad
    assert model.plain.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(x), y)
    assert pruner.sparsity() == report
    assert report["plain"].zeros == 108
    # The hook is gone: a step may revive zeros now.
    train(model, optimizer, 1, batches())
    assert report["grouped"].zeros == 72
    assert sparsity(model)["grouped"].zeros < 72
    for call in (pruner.step, pruner.after_step, pruner.epoch_end):
        with pytest.raises(ValueError, match="got a finalized one"):
            call()


def test_masks_of_torch_prune_are_folded_in():
    model = mixed()
    torch_prune.random_unstructured(model.plain, "weight", 0.25)
    held = model.plain.weight_orig
    dead = model.plain.weight_mask == 0
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5), schedule=OneShot(at=3))
    pruner.attach(optimizer)
    assert not hasattr(model.plain, "weight_orig")
    assert find_parameter(model, held)

    def check(step):
        assert is_plus_zero(model.plain.weight.detach()[dead])
        assert sparsity(model)["plain"].zeros == (54 if step < 3 else 108)

    train(model, optimizer, 6, batches(), pruner, check)


def find_parameter(model, parameter):
    return any(p is parameter for p in model.parameters())


@pytest.mark.parametrize("keep", [False, True])
def test_existing_zeros_are_held_when_asked(keep):
    model = mixed()
    with torch.no_grad():
        model.plain.weight[:, 0] = 0
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner = Pruner(
        model, importance=Magnitude(sparsity=0.5), schedule=OneShot(99), keep_zeros=keep
    ).attach(optimizer)
    train(model, optimizer, 3, batches(), pruner)
    assert bool((model.plain.weight[:, 0] == 0).all()) is keep


class GradImportance:
    """Scores with a calibration result."""

    needs = frozenset({"grad"})

    def score(self, t, stats):
        return (t.dense.detach() * stats.get("grad", t)).abs()


class GradCalibration:
    def __init__(self):
        self.calls = []

    def collect(self, model, targets, needs):
        self.calls.append(needs)
        x, y = next(batches(5))
        loss = nn.functional.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, [t.dense for t in targets])
        table = {id(t): g for t, g in zip(targets, grads, strict=True)}

        class Found:
            def get(self, need, t):
                assert need == "grad"
                return table[id(t)]

        return Found()


def test_statistics_reach_the_importance():
    model = mixed()
    scores = {}
    x, y = next(batches(5))
    nn.functional.cross_entropy(model(x), y).backward()
    for name in ("plain", "grouped", "depthwise", "pointwise", "hidden"):
        weight = getattr(model, name).weight
        scores[f"{name}.weight"] = (weight * weight.grad).detach().abs()
    model.zero_grad()
    calibration = GradCalibration()
    with pytest.raises(ValueError, match="expected calibration to collect grad, got None"):
        Pruner(model, importance=GradImportance(), budget=Budget(sparsity=0.5))
    pruner = Pruner(
        model, importance=GradImportance(), budget=Budget(sparsity=0.5), calibration=calibration
    )
    pruner.step()
    assert calibration.calls == [frozenset({"grad"})]
    for key, mask in pruner.masks().items():
        score = scores[key].flatten()
        assert score[mask.flatten()].min() >= score[~mask.flatten()].max()
        assert int((~mask).sum()) == mask.numel() // 2


class KeepRowSums:
    """Compensator: adds what is dropped from a row to the first kept entry of the row."""

    needs = frozenset()

    def apply(self, t, keep, stats):
        keep = keep.reshape(t.shape)
        for row, flags in zip(t.dense, keep, strict=True):
            row[flags.nonzero()[0]] += row[~flags].sum()


def test_compensator_sees_the_values_that_are_dropped():
    model = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 2))
    sums = model[0].weight.detach().double().sum(1)
    pruner = Pruner(
        model, importance=Magnitude(sparsity=0.6), compensator=KeepRowSums(), selector=TopK()
    )
    pruner.step()
    assert sparsity(model)["0"].zeros == 36
    torch.testing.assert_close(model[0].weight.detach().double().sum(1), sums, atol=1e-6, rtol=0)


class Alternate:
    def event(self, step, epoch):
        kinds = {0: "prune", 4: "regrow", 8: "prune", 9: "freeze", 12: "regrow"}
        return Event(kinds[step]) if step in kinds else None


class ReviveFilter0:
    needs = frozenset()

    def regrow(self, t, mask, stats):
        mask[0] = True
        return mask


def test_regrowth_and_freeze():
    model = mixed()
    with torch.no_grad():
        model.grouped.weight[:, 3] = 0  # held zeros stay out of reach of a regrowth
    optimizer = OPTIMIZERS["adam"](model.parameters())
    pruner = Pruner(
        model, importance=Magnitude(sparsity=0.75), schedule=Alternate(),
        regrowth=ReviveFilter0(), keep_zeros=True,
    ).attach(optimizer)  # fmt: skip
    history = []

    def watch(step):
        history.append(pruner.masks()["grouped.weight"])
        if step == 4:  # revived entries restart from zero
            revived = history[4] & ~history[3]
            assert revived.any()
            assert is_plus_zero(model.grouped.weight.detach()[revived])
        if step == 5:
            assert model.grouped.weight[history[4] & ~history[3]].any()

    train(model, optimizer, 15, batches(), pruner, watch)
    total = history[0].numel()
    assert int(history[0].sum()) == int(history[8].sum()) == total // 4
    assert history[4][0, :3].all()
    assert not history[4][:, 3].any()
    assert torch.equal(history[14], history[8])  # frozen at 9: no regrowth at 12
    with pytest.raises(ValueError, match="expected a regrowth"):
        bare = Pruner(mixed(), importance=Magnitude(sparsity=0.5), schedule=Alternate())
        for _ in range(5):
            bare.step()


class AtEpoch:
    def event(self, step, epoch):
        return Event("prune") if epoch == 2 else None


def test_schedules_see_the_epoch_and_force_prunes_now():
    pruner = Pruner(mixed(), importance=Magnitude(sparsity=0.5), schedule=AtEpoch())
    assert pruner.step() is None
    pruner.epoch_end()
    pruner.epoch_end()
    assert pruner.step() == Event("prune")
    pruner = Pruner(mixed(), importance=Magnitude(sparsity=0.5), schedule=OneShot(9))
    assert pruner.step(force=True) == Event("prune")
    assert pruner.sparsity()["plain"].zeros == 108


class EveryTick:
    def event(self, step, epoch):
        return Event("prune")


def test_ste_lets_weights_come_back_and_hard_does_not():
    outcome = {}
    for mode in ("hard", "ste"):
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.05, 1.0]]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruner(model, importance=Magnitude(count=1), schedule=EveryTick(), mask_mode=mode)
        pruner.step()
        assert pruner.masks()["weight"].tolist() == [[False, True]]
        pruner.attach(optimizer)
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        for _ in range(60):
            optimizer.zero_grad()
            (model(x) - x @ torch.tensor([[3.0], [1.0]])).square().mean().backward()
            optimizer.step()
            outcome.setdefault(mode, set()).add(tuple(pruner.masks()["weight"][0].tolist()))
    assert outcome == {"hard": {(False, True)}, "ste": {(False, True), (True, False)}}


def test_forward_is_right_without_the_hook():
    model = mixed()
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5))
    pruner.step()
    with torch.no_grad():
        for t in pruner.targets:
            t.dense.sub_(1.0)
            t.dense.view(-1)[:] = torch.where(
                pruner.masks()[t.key].view(-1), t.dense.view(-1), torch.tensor([-torch.inf])
            )
    assert pruner.sparsity()["plain"].zeros == 108
    assert is_plus_zero(model.plain.weight.detach()[~pruner.masks()["plain.weight"]])
    other = copy.deepcopy(model)
    assert sparsity(other)["plain"].zeros == 108


@pytest.mark.parametrize("mode", ["hard", "ste"])
def test_masks_are_buffers(mode):
    model = mixed()
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5), mask_mode=mode)
    pruner.step()
    key = "plain.parametrizations.weight.0.mask"
    for table in (dict(model.named_buffers()), model.state_dict()):
        assert torch.equal(table[key], pruner.masks()["plain.weight"])
        assert table[key].dtype == torch.bool
    assert model.to(torch.float64).state_dict()[key].dtype == torch.bool
    model(torch.zeros(1, 3, 6, 6, dtype=torch.float64))


def test_nm_pruner():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
    pruner = Pruner(model, importance=Magnitude(granularity="2:4"))
    pruner.step()
    for t in pruner.targets:
        windows = (t.weight != 0).unflatten(1, (-1, 4)).sum(2)
        assert bool((windows == 2).all())
    with pytest.raises(ValueError, match="expected a schedule that prunes at once"):
        Pruner(
            pruner.finalize(), importance=Magnitude(granularity=NM(2, 4)), schedule=Polynomial(0, 5)
        )
