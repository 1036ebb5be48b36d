from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.nn.utils import parametrizations

from sparsecnn.prune import Magnitude, Pruner, find_targets, prune_, sparsity

from .nets import digits_net, mixed


def names(targets):
    return [t.name for t in targets]


def test_all_layers_but_the_classifier():
    model = digits_net()
    assert names(find_targets(model)) == ["conv1", "conv2", "conv3", "fc1"]
    every = find_targets(model, include_classifier=True)
    assert names(every) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert [t.key for t in every] == [n for n, p in model.named_parameters() if p.dim() > 1]
    assert all(t.weight is t.module.weight for t in every)
    assert names(find_targets(model, types=(nn.Linear,))) == ["fc1"]
    assert names(find_targets(model, ignore=("conv1", "re:fc.*"))) == ["conv2", "conv3"]
    assert names(find_targets(model, filter_fn=lambda m, n: n.endswith("3"))) == ["conv3"]


def test_a_single_layer_is_a_target_and_not_a_classifier():
    assert names(find_targets(nn.Linear(3, 2))) == [""]
    assert find_targets(nn.Conv2d(3, 2, 1))[0].key == "weight"


class HeadFirst(nn.Module):
    """Registers its classifier before the layer that is called first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.BatchNorm1d(2).eval()

    def forward(self, x):
        return self.frozen(self.head(self.norm(self.body(x))))


def test_classifier_by_call_order():
    model = HeadFirst()
    assert names(find_targets(model)) == ["head"]
    running = model.norm.running_mean.clone()
    x = torch.randn(5, 3)
    assert names(find_targets(model, x)) == ["body"]
    assert names(find_targets(model, (x,))) == ["body"]
    assert torch.equal(model.norm.running_mean, running)
    assert model.training
    assert not model.frozen.training
    assert not model.head._forward_hooks
    prune_(model, Magnitude(sparsity=0.5), example_inputs=x)
    assert sparsity(model)["head"].zeros == 0
    assert sparsity(model)["body"].zeros == 6


def test_shared_weights_are_listed_once():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1))
    model[1].weight = model[0].weight
    model.add_module("again", model[2])
    targets = find_targets(model)
    assert names(targets) == ["0", "2"]
    assert [t.aliases for t in targets] == [("0", "1"), ("2", "again")]
    assert targets[0].owners == (model[0], model[1])
    # Every alias addresses the weight.
    assert names(find_targets(model, ignore=["1"])) == ["2"]
    assert names(find_targets(model, ignore=["again"])) == ["0"]


@pytest.mark.parametrize("mode", ["hard", "ste"])
def test_shared_weights_are_masked_everywhere(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    parameter = model[0].weight
    pruner = Pruner(model, importance=Magnitude(sparsity=0.75), mask_mode=mode)
    pruner.step()
    assert int((model[1].weight == 0).sum()) == 12
    assert torch.equal(model[0].weight, model[1].weight)
    pruner.finalize()
    assert model[0].weight is parameter
    assert model[1].weight is parameter
    assert int((parameter == 0).sum()) == 12


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"ignore": ["conv9"]}, ValueError, r"got 'conv9'; did you mean 'conv\d'"),
        ({"ignore": ["bn1"]}, ValueError, r"name of a prunable layer, got 'bn1'"),
        ({"ignore": ["zzz"]}, ValueError, r"known layers: 'conv1', 'conv2'"),
        ({"ignore": ["re:conv"]}, ValueError, r"matches a layer in full, got 're:conv'"),
        ({"ignore": ["re:("]}, ValueError, r"valid regular expression, got 're:\('"),
        ({"ignore": "conv1"}, TypeError, r"a list of names, got 'conv1'"),
        ({"ignore": [3]}, TypeError, r"a layer name, got 3"),
        ({"types": (nn.Conv1d,)}, TypeError, r"nn.Conv2d, nn.Linear or subclasses"),
        ({"types": (nn.BatchNorm2d,)}, TypeError, r"got .*BatchNorm2d"),
    ],
)
def test_bad_inputs(kwargs, error, message):
    with pytest.raises(error, match=message):
        find_targets(digits_net(), **kwargs)


def test_block_names_get_a_hint():
    model = nn.Sequential()
    model.add_module("stage1", mixed())
    with pytest.raises(ValueError, match=r"it is a block, use 're:stage1\\\..\*' for its 6 layers"):
        find_targets(model, ignore=["stage1"])


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.Conv1d(3, 3, 3)])
def test_models_without_layers(model):
    for call in (find_targets, sparsity, lambda m: prune_(m, Magnitude(sparsity=0.5))):
        with pytest.raises(ValueError, match="expected model to contain a layer"):
            call(model)


@pytest.mark.parametrize("model", [None, "resnet50", nn.Conv2d, {}])
def test_wrong_type_of_model(model):
    for call in (find_targets, sparsity):
        with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module"):
            call(model)


def test_unmaskable_weights_are_refused_by_name():
    cases = {
        "without parametrizations of its weight, got _WeightNorm": parametrizations.weight_norm(
            nn.Linear(3, 3)
        ),
        "without parametrizations of its weight, got _Orthogonal": parametrizations.orthogonal(
            nn.Linear(3, 3)
        ),
        "to be initialized, got a lazy layer": nn.LazyLinear(3),
        "with data, got torch.float32 on meta": nn.Linear(3, 3, device="meta"),
    }
    old = nn.Linear(3, 3)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(old)
    cases["to own its weight as a Parameter"] = old
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    torch_prune.l1_unstructured(tied[0], "weight", 0.5)
    cases["only on unshared weights"] = tied
    for message, layer in cases.items():
        for call in (find_targets, lambda m: prune_(m, Magnitude(sparsity=0.5))):
            with pytest.raises(ValueError, match=message):
                call(layer)


def test_a_second_pruner_is_refused():
    model = mixed()
    first = Pruner(model, importance=Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match="got Mask; finalize the other Pruner"):
        Pruner(model, importance=Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match="got Mask; finalize the other Pruner"):
        prune_(model, Magnitude(sparsity=0.5))
    first.finalize()
    prune_(model, Magnitude(sparsity=0.5))
