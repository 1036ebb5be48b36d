from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.prune import Magnitude
from sparsecnn.prune.channels import coupled_groups, prune_channels, prune_channels_

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
HALF = Magnitude(sparsity=0.5)


class Between(nn.Module):
    """A convolution to 8 maps, something in the middle, a convolution, a linear layer."""

    def __init__(self, middle, width=8, **layers):
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.b = nn.Conv2d(width, 6, 1)
        self.fc = nn.Linear(6, 4)
        self.middle = middle

    def forward(self, x):
        y = self.middle(self, self.a(x).relu())
        return self.fc(self.b(y).relu().mean((2, 3)))


def grouped(cin, cout, groups):
    torch.manual_seed(5)
    return nn.Conv2d(cin, cout, 3, padding=1, groups=groups)


def l1(module):
    return module.weight.detach().double().abs().flatten(1).mean(1).numpy()


def ignoring(model, name, gone):
    """`model` in which the consumer `name` reads zeros instead of these maps."""

    def mask(_module, args):
        y = args[0].clone()
        y[:, gone] = 0
        return (y,)

    masked = copy.deepcopy(model)
    masked.get_submodule(name).register_forward_pre_hook(mask)
    return masked


def same(small, reference):
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(X), reference.eval()(X), rtol=0, atol=1e-5)


def test_outputs_of_a_grouped_convolution():
    model = Between(lambda m, y: m.g(y).relu(), g=grouped(8, 8, 2))
    score = l1(model.g)
    kept = sorted([*np.argsort(score[:4])[2:], *(4 + np.argsort(score[4:])[2:])])
    # Over all 8 the choice would be another one: the groups decide.
    assert kept != sorted(np.argsort(score)[4:])
    small, report = prune_channels(model, X, {"g": HALF})
    assert report.layers == {"g": (8, 4)} and small.g.groups == 2
    assert torch.equal(small.g.weight, model.g.weight[kept])
    assert torch.equal(small.g.bias, model.g.bias[kept])
    same(small, ignoring(model, "b", [i for i in range(8) if i not in kept]))


def test_depthwise_with_several_filters_per_map():
    model = Between(lambda m, y: m.dw(y).relu(), width=16, dw=grouped(8, 16, 8))
    kept = [2 * i + int(np.argmax(l1(model.dw)[2 * i : 2 * i + 2])) for i in range(8)]
    small, report = prune_channels(model, X, {"dw": HALF})
    assert report.layers == {"dw": (16, 8)} and small.dw.groups == 8
    assert torch.equal(small.dw.weight, model.dw.weight[kept])
    same(small, ignoring(model, "b", [i for i in range(16) if i not in kept]))
    with pytest.raises(ValueError, match="a: kept, each of its maps is a whole convolution group"):
        prune_channels(model, X, {"a": HALF})


def test_maps_and_their_functions_in_one_concatenation_go_together():
    # Ghost module: b reads map i and g(map i); the sum with p, seen first, reaches both.
    def middle(m, y):
        return m.p(m.x) + torch.cat([y, m.dw(y)], 1)

    model = Between(middle, width=16, dw=grouped(8, 8, 8), p=nn.Conv2d(3, 16, 1))
    model.register_forward_pre_hook(lambda m, args: setattr(m, "x", args[0]))
    coupled = next(c for c in coupled_groups(copy.deepcopy(model), X) if "p" in c.producers)
    assert coupled.size == 8
    assert coupled.producers["p"] == {i: [i, i + 8] for i in range(8)}
    assert coupled.producers["a"] == {i: [i] for i in range(8)}
    small, report = prune_channels(model, X, {"a": HALF, "dw": HALF, "p": HALF})
    assert report.layers == {"a": (8, 4), "dw": (8, 4), "p": (16, 8)}
    score = l1(model.a) + l1(model.dw) + l1(model.p)[:8] + l1(model.p)[8:]
    gone = np.argsort(score)[:4].tolist()
    same(small, ignoring(model, "b", gone + [8 + i for i in gone]))


def shuffled(m, y):
    n, c, h, w = y.shape
    y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.c(m.inner(y).relu())


def test_channel_shuffle_stays_and_the_rest_shrinks():
    model = Between(shuffled, inner=nn.Conv2d(8, 10, 1), c=nn.Conv2d(10, 8, 1))
    small, report = prune_channels(model, X, HALF)
    assert report.kept == {"a": "a reshape regroups its maps (channel shuffle)"}
    assert report.layers == {"inner": (10, 5), "c": (8, 4), "b": (6, 3)}
    assert small.a.out_channels == 8 and small(X).shape == (2, 4)


@pytest.mark.parametrize("width, prunable", [(8, True), (6, False)])
def test_slices(width, prunable):
    model = Between(lambda m, y: y[:, :width], width=width)
    small, report = prune_channels(model, X, {"a": HALF, "b": HALF})
    assert small.a.out_channels == (4 if prunable else 8)
    assert report.kept == ({} if prunable else {"a": "a slice with fixed bounds reads its maps"})


def test_parts_of_a_grouped_input_stay():
    # a makes maps 0..7 of 12: alone it cannot lose one of every group of 6.
    def middle(m, y):
        return m.g(torch.cat([y, m.p(y)], 1)).relu()

    model = Between(middle, p=nn.Conv2d(8, 4, 1), g=grouped(12, 8, 2))
    small, report = prune_channels(model, X, {"a": HALF, "p": HALF, "g": HALF})
    reason = "its convolution groups are coupled unevenly"
    assert report.kept == {"a": reason, "p": reason}
    assert small.a.out_channels == 8 and small.g.out_channels == 4


def test_layer_norm_keeps_the_width_and_the_hidden_maps_go():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.up = nn.Linear(8, 32)
            self.down = nn.Linear(32, 8)
            self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5))

        def forward(self, x):
            y = self.norm(x.permute(0, 2, 3, 1))
            y = self.down(nn.functional.gelu(self.up(y)))
            return x + self.scale * y.permute(0, 3, 1, 2)

    model = Between(lambda m, y: m.block(y), block=Block())
    small, report = prune_channels(model, X, HALF)
    assert report.layers == {"block.up": (32, 16), "b": (6, 3)}
    assert set(report.kept) == {"a", "block.down"}
    assert "LayerNorm" in report.kept["a"] or "a parameter outside" in report.kept["a"]
    assert small.block.down.in_features == 16


def test_one_map_for_all_is_not_coupled():
    # Spatial attention; alone it must stay one map.
    model = Between(lambda m, y: m.act(y) * m.g(y).sigmoid(), g=nn.Conv2d(8, 1, 1), act=nn.PReLU())
    kept = sorted(np.argsort(l1(model.a))[4:])
    small, report = prune_channels(model, X, {"a": HALF, "g": HALF})
    assert report.layers == {"a": (8, 4), "g": (1, 1)}
    assert torch.equal(small.a.weight, model.a.weight[kept])
    gone = [i for i in range(8) if i not in kept]
    masked = ignoring(model, "b", gone)
    masked.g.weight.data[:, gone] = 0
    same(small, masked)


@pytest.mark.parametrize(
    "middle, width, reason",
    [
        (lambda m, y: torch.cat(y.chunk(2, 1)[::-1], 1), 8, "cannot be followed"),
        (lambda m, y: nn.functional.pixel_shuffle(y, 2), 2, "cannot be followed"),
        (lambda m, y: m.norm(y), 8, r"norm \(GroupNorm\) is coupled"),
    ],
)
def test_maps_behind_other_operations_stay(middle, width, reason):
    model = Between(middle, width=width, norm=nn.GroupNorm(2, 8))
    small, report = prune_channels(model, X, {"a": HALF, "b": HALF})
    assert re.search(reason, report.kept["a"]) and report.layers == {"b": (6, 3)}
    assert torch.equal(small.a.weight, model.a.weight)


def test_outputs_must_be_finite():
    model = Between(lambda m, y: y / 0)
    with pytest.raises(ValueError, match="expected finite outputs on example_inputs"):
        prune_channels(model, X, {"a": HALF})


def test_layers_that_only_run_in_training_are_refused():
    model = Between(lambda m, y: y + 0 * m.aux(y) if m.training else y, aux=nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=r"outputs in evaluation mode, got unused \['aux'\]"):
        prune_channels_(model, X, {"a": HALF})
    assert model.a.out_channels == 8
