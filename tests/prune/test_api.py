from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

from sparsecnn.prune import (
    Budget,
    Event,
    Magnitude,
    Polynomial,
    Pruner,
    Random,
    TopK,
    find_targets,
    prune,
    prune_,
    sparsity,
)

from .nets import digits_net, mixed, weights


def zeros(model):
    return {e.name: e.zeros for e in sparsity(model).layers}


def test_prune_in_place_leaves_plain_weights():
    model = mixed()
    before = weights(model)
    parameters = {n: p for n, p in model.named_parameters()}
    assert prune_(model, Magnitude(sparsity=0.9)) is model
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert zeros(model) == {
        "plain": 194, "grouped": 130, "depthwise": 194, "pointwise": 173, "hidden": 43, "head": 0,
    }  # fmt: skip
    for name, old in before.items():
        new = parameters[name].detach()
        kept = new != 0
        assert torch.equal(new[kept], old[kept])
        if not kept.all():
            assert old[~kept].abs().max() <= old[kept].abs().min()
            assert not new[~kept].signbit().any()


def test_prune_copies():
    model = mixed()
    before = weights(model)
    copied = prune(model, Magnitude(sparsity=0.5))
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    assert zeros(copied)["plain"] == 108
    assert not {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}


@pytest.mark.parametrize("config", [Magnitude(sparsity=0.0), Magnitude(density=1.0)])
def test_nothing_to_drop_changes_nothing(config):
    model = mixed()
    before = weights(model)
    prune_(model, config)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())


def test_sparsity_one_leaves_one_group_per_layer():
    model = mixed()
    prune_(model, Magnitude(sparsity=1.0, granularity="filter"))
    report = sparsity(model)
    for name, module in model.named_children():
        if name != "head":
            assert report[name].filter == 1 - 1 / module.weight.shape[0]


def test_mapping_of_names_expressions_and_default():
    model = digits_net()
    config = {
        "conv1": None,
        r"re:conv\d": Magnitude(sparsity=0.25),
        "conv3": Magnitude(sparsity=0.75),
        "_default": Magnitude(sparsity=0.5),
    }
    prune_(model, config)
    report = sparsity(model)
    got = {e.name: e.element for e in report.layers}
    assert got == {"conv1": 0.0, "conv2": 0.25, "conv3": 0.75, "fc1": 0.5, "fc2": 0.0}


def test_result_does_not_depend_on_the_order_of_the_mapping():
    entries = [
        ("conv3", Magnitude(sparsity=0.75)),
        (r"re:conv[12]", Random(sparsity=0.5, scope="global", seed=2)),
        ("fc1", Random(sparsity=0.5, scope="global", seed=2)),
        ("_default", Magnitude(sparsity=0.9)),
    ]
    results = []
    for order in (entries, entries[::-1], entries[2:] + entries[:2]):
        model = digits_net()
        prune_(model, dict(order))
        results.append(weights(model))
    for other in results[1:]:
        assert all(torch.equal(results[0][n], other[n]) for n in other)


def test_no_default_leaves_the_rest_dense():
    model = digits_net()
    prune_(model, {"conv2": Magnitude(sparsity=0.5)})
    assert {n for n, z in zeros(model).items() if z} == {"conv2"}


def test_the_classifier_is_reached_only_by_name():
    for config, options, touched in (
        (Magnitude(sparsity=0.5), {}, False),
        ({"_default": Magnitude(sparsity=0.5)}, {}, False),
        (Magnitude(sparsity=0.5), {"include_classifier": True}, True),
        ({"head": Magnitude(sparsity=0.5)}, {}, True),
        ({"re:h.*": Magnitude(sparsity=0.5)}, {}, True),
    ):
        model = mixed()
        prune_(model, config, **options)
        assert (zeros(model)["head"] > 0) is touched


def test_filter_fn_narrows():
    model = mixed()
    seen = []

    def depthwise_only(module, name):
        seen.append((module, name))
        return isinstance(module, nn.Conv2d) and module.groups == module.in_channels

    prune_(model, Magnitude(sparsity=0.5), depthwise_only)
    assert {n for n, z in zeros(model).items() if z} == {"depthwise"}
    assert (model.plain, "plain") in seen
    with pytest.raises(ValueError, match="leave at least one layer, got none of 6"):
        prune_(model, Magnitude(sparsity=0.5), lambda m, n: False)


def test_global_scope_shares_one_budget_among_equal_configs():
    model = mixed()
    with torch.no_grad():
        model.plain.weight.mul_(1e-4)
    prune_(model, Magnitude(sparsity=0.5, scope="global"))
    report = sparsity(model)
    pruned = [e for e in report.layers if e.name != "head"]
    total = sum(e.elements for e in pruned)
    assert sum(e.zeros for e in pruned) == total // 2
    assert report["plain"].zeros == report["plain"].elements - 1


def test_masks_of_torch_prune_survive():
    model = mixed()
    torch_prune.random_unstructured(model.plain, "weight", 0.4)
    torch_prune.l1_unstructured(model.hidden, "weight", 0.75)
    model(torch.randn(1, 3, 6, 6))  # leaves `weight` tensors with a graph behind
    dead = {n: getattr(model, n).weight_mask == 0 for n in ("plain", "hidden")}
    copied = prune(model, Magnitude(sparsity=0.5))
    assert hasattr(model.plain, "weight_mask")  # the twin left the original alone
    for each in (copied, prune_(model, Magnitude(sparsity=0.5))):
        assert zeros(each)["plain"] == 108  # 86 were dead already and count
        assert zeros(each)["hidden"] == 36  # 75 % were dead: more than asked
        for name, gone in dead.items():
            assert not getattr(each, name).weight[gone].any()
            assert list(getattr(each, name)._parameters) == ["weight", "bias"]
            assert not getattr(each, name)._forward_pre_hooks
    each(torch.randn(1, 3, 6, 6)).sum().backward()


def test_keep_zeros_counts_them_as_dropped():
    for keep in (False, True):
        model = mixed()
        with torch.no_grad():
            model.plain.weight[:, 0] = 0
        prune_(model, Random(sparsity=0.5, seed=1), keep_zeros=keep)
        assert (zeros(model)["plain"] == 108) is keep


class Swapped(nn.Module):
    is_sparsecnn_layer = True


def test_swapped_layers_are_refused():
    model = mixed()
    targets = find_targets(model)
    model.depthwise = Swapped()
    for call in (
        lambda: prune_(model, Magnitude(sparsity=0.5)),
        lambda: prune(model, Magnitude(sparsity=0.5)),
        lambda: find_targets(model),
        lambda: Pruner(model, importance=Magnitude(sparsity=0.5), targets=targets),
    ):
        with pytest.raises(ValueError, match=r"got 1: depthwise \(Swapped\); call sc\.densify"):
            call()


BAD = [
    (0.9, TypeError, r"an importance such as Magnitude\(sparsity=0.9\)"),
    (Magnitude, TypeError, "an importance such as"),
    ({"plain": 0.9}, TypeError, r"config\['plain'\] to be an importance or None, got 0.9"),
    ({3: Magnitude(sparsity=0.5)}, TypeError, "a layer name, got 3"),
    (Magnitude(), ValueError, "one of sparsity, density or count, got none"),
    ({"plane": Magnitude(sparsity=0.5)}, ValueError, "got 'plane'; did you mean 'plain'"),
    ({"plane": None}, ValueError, "got 'plane'; did you mean 'plain'"),
    ({"re:conv.*": Magnitude(sparsity=0.5)}, ValueError, "matches a layer in full"),
    ({}, ValueError, "leave at least one layer, got none of 6"),
    ({"_default": None}, ValueError, "leave at least one layer, got none of 6"),
    (
        {"re:p.*": Magnitude(sparsity=0.5), "re:.*n": Magnitude(sparsity=0.6)},
        ValueError,
        r"one config for layer 'plain', got different ones from 're:p\.\*' and 're:\.\*n'",
    ),
    (Magnitude(granularity="2:4"), ValueError, r"'plain' \(3\).*leave these layers out"),
    (Magnitude(count=9, granularity="filter"), ValueError, "got 9 where 'plain' has 8"),
    (Magnitude(sparsity=0.5, granularity="layer"), ValueError, "scope 'global'"),
]


@pytest.mark.parametrize(("config", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_configs_change_nothing(config, error, message):
    model = mixed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune_(model, config)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_an_error_in_the_last_layer_leaves_the_first_one_whole():
    model = mixed()
    torch_prune.l1_unstructured(model.plain, "weight", 0.25)
    with torch.no_grad():
        model.hidden.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    config = {"plain": Magnitude(sparsity=0.5), "_default": Magnitude(sparsity=0.9)}
    with pytest.raises(ValueError, match="without NaN, got 1 in layer 'hidden'"):
        prune_(model, config)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[n], v) for n, v in after.items() if n != "hidden.weight")
    pruner = Pruner(model, importance=Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match="in layer 'hidden'"):
        pruner.step()
    assert pruner.masks()["grouped.weight"].all()


class Half:
    """Has only half of what a part needs."""

    needs = frozenset()


M = Magnitude(sparsity=0.5)
BAD_PRUNERS = [
    ({}, ValueError, "expected an importance for TopK, got None"),
    ({"importance": Magnitude()}, ValueError, "expected a budget for TopK, got None"),
    ({"importance": M, "budget": Budget(sparsity=0.6)}, ValueError, "expected one budget"),
    ({"importance": M, "budget": 0.5}, TypeError, "budget to be a Budget, got 0.5"),
    (
        {"importance": Magnitude(sparsity=0.5, granularity="filter"), "granularity": "kernel"},
        ValueError,
        "expected one granularity, got kernel and the importance's filter",
    ),
    (
        {"importance": Magnitude(sparsity=0.5, scope="global"), "selector": TopK("layer")},
        ValueError,
        "expected one scope, got the selector's 'layer' and the importance's 'global'",
    ),
    ({"importance": M, "mask_mode": "soft"}, ValueError, "'hard' or 'ste', got 'soft'"),
    ({"importance": Half()}, TypeError, "expected importance like Importance"),
    ({"importance": Magnitude}, TypeError, "expected importance like Importance"),
    ({"importance": M, "selector": Half()}, TypeError, "expected selector like Selector"),
    ({"importance": M, "compensator": Half()}, TypeError, "expected compensator like Comp"),
    ({"importance": M, "schedule": Half()}, TypeError, "expected schedule like Schedule"),
    ({"importance": M, "regrowth": Half()}, TypeError, "expected regrowth like Regrowth"),
    ({"importance": M, "calibration": []}, TypeError, "expected calibration like Calib"),
    ({"importance": M, "regularizers": [Half()]}, TypeError, "expected regularizers like"),
    ({"importance": M, "granularity": 4}, TypeError, "expected granularity like Gran"),
    ({"importance": M, "targets": []}, ValueError, "at least one target, got none"),
    ({"importance": M, "targets": ["plain"]}, TypeError, "targets from find_targets"),
    ({"importance": M, "targets": find_targets(mixed())}, ValueError, "got 'plain' of another"),
    (
        {"importance": M, "schedule": Polynomial(0, 9, initial=0.6)},
        ValueError,
        "expected Polynomial.initial <= sparsity 0.5, got 0.6",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_PRUNERS, ids=lambda v: str(v)[:40])
def test_bad_pruners_change_nothing(options, error, message):
    model = mixed()
    torch_prune.l1_unstructured(model.plain, "weight", 0.25)
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        Pruner(model, **options)
    assert list(model.state_dict()) == keys
    assert isinstance(model.plain, nn.Conv2d)
    assert type(model.grouped) is nn.Conv2d


def test_attach_refuses_foreign_and_second_optimizers():
    model = mixed()
    pruner = Pruner(model, importance=M)
    with pytest.raises(ValueError, match="holds the pruned weights, got none of 5"):
        pruner.attach(torch.optim.SGD(mixed().parameters(), lr=0.1))
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="expected one optimizer, got a second one"):
        pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype):
    model = mixed().to(dtype)
    expected = prune(copy.deepcopy(model).double(), M)
    prune_(model, M)
    for name, weight in weights(model).items():
        assert weight.dtype == dtype
        assert torch.equal(weight != 0, weights(expected)[name] != 0)


class OwnSelector:
    """A selector without scores: drops the first filter of every layer."""

    needs = frozenset()
    uses_scores = False
    uses_budget = False

    def select(self, targets, scores, granularity, budget, stats, current):
        assert scores == {}
        assert budget is None
        keep = {t: torch.ones(granularity.n_groups(t), dtype=torch.bool) for t in targets}
        for flags in keep.values():
            flags[0] = False
        return keep


def test_a_selector_may_need_neither_scores_nor_budget():
    pruner = Pruner(mixed(), granularity="filter", selector=OwnSelector())
    assert pruner.step() == Event("prune")
    for t in pruner.targets:
        assert not t.weight[0].any()
        assert t.weight[1:].all()
