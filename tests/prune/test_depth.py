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


def test_layer_prune_resnet_refuses_what_changes_shapes():
    with pytest.raises(ValueError, match="inside of a residual branch"):
        remove_layers(resnet(), ["0"], X)
    with pytest.raises(ValueError, match="name of a layer that is called"):
        remove_layers(resnet(), ["9"], X)
