from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecnn.prune.depth import remove_layers


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down = nn.Conv2d(cin, cout, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.down(x)).relu()


def resnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(8, 8, 1), Block(8, 16, 2)).eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["1.conv1", "1.bn2", "2.conv1", "2.conv2"])
def test_layer_prune_resnet(name):
    model = resnet()
    reference = copy.deepcopy(model)
    reference[int(name[0])].bn2.register_forward_hook(lambda _m, _i, output: output * 0)
    small = remove_layers(model, [name], X)
    with torch.no_grad():
        assert (small(X) - reference(X)).abs().max() == 0
        assert not torch.equal(small(X), model(X))
    assert f"{name[0]}.conv1.weight" not in dict(small.named_parameters())


def test_layer_prune_resnet_named_projection():
    model = resnet()
    reference = copy.deepcopy(model)
    reference[2].down.register_forward_hook(lambda _m, _i, output: output * 0)
    small = remove_layers(model, ["2.down"], X)
    with torch.no_grad():
        assert (small(X) - reference(X)).abs().max() == 0
    names = dict(small.named_parameters())
    assert "2.down.weight" not in names and "2.conv1.weight" in names


def test_layer_prune_resnet_several_at_once_leave_the_model_alone():
    model = resnet().train()
    names = list(model.state_dict())
    small = remove_layers(model, ["1.conv1", "1.conv2", "2.bn1"], X)
    assert list(model.state_dict()) == names and small.training
    assert {n.split(".")[0] + n.split(".")[1] for n in small.state_dict()} == {
        "0weight", "0bias", "2down"
    }  # fmt: skip
    small.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(small(X), model[2].down(model[0](X).relu()).relu())


def straight(**middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, **middle), nn.Conv2d(8, 4, 1))


def test_layer_prune_outside_a_shortcut():
    model = straight(padding=1).eval()
    small = remove_layers(model, ["1"], X)
    with torch.no_grad():
        assert torch.equal(small(X), model[2](model[0](X)))
        assert not torch.equal(small(X), model(X))
    for name in ("0", "2"):  # in != out
        with pytest.raises(ValueError, match="equal input and output shapes"):
            remove_layers(model, [name], X)
    with pytest.raises(ValueError, match="with stride 1"):
        remove_layers(straight(padding=1, stride=2).eval(), ["1"], X)
    # One pixel in and out: only the stride says that other inputs would change their shape.
    with pytest.raises(ValueError, match="with stride 1"):
        remove_layers(straight(padding=1, stride=2).eval(), ["1"], torch.randn(1, 3, 3, 3))
    with pytest.raises(ValueError, match="equal input and output shapes"):
        remove_layers(straight().eval(), ["1"], X)


def test_layer_prune_needs_a_traceable_model():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="traceable by torch"):
        remove_layers(Branching(), ["a"], X)


def test_layer_prune_resnet_refuses_what_changes_shapes():
    with pytest.raises(ValueError, match="inside of a residual branch"):
        remove_layers(resnet(), ["0"], X)
    with pytest.raises(ValueError, match="name of a layer that is called"):
        remove_layers(resnet(), ["9"], X)
