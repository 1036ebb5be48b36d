"""Sampled inputs and outputs of layers: the layer itself is the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecnn.prune import Batches, find_targets
from sparsecnn.prune.samples import io_need, io_of

from .nets import mixed


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def only(model, name=""):
    (t,) = [t for t in find_targets(model, include_classifier=True) if t.name == name]
    return t


def collect(model, t, x, samples=10_000, reference=None, shortcuts=None):
    need = io_need(samples, shortcuts or {}, "test")
    data = [(part, torch.zeros(len(part))) for part in x.split(16)]
    stats = Batches(data, reference=reference).collect(model, [t], frozenset({need}))
    return need, stats


def pairs(model, t, x, **options):
    need, stats = collect(model, t, x, **options)
    return io_of(stats, need, t)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Conv2d(6, 12, 3, groups=6, bias=False),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"),
        nn.Linear(6, 5),
    ],
    ids=["plain", "grouped", "depthwise", "reflect", "linear"],
)
def test_samples_are_the_inputs_of_the_outputs(conv):
    conv = conv.double()
    x = rand(20, 7, 9, 6).double() if isinstance(conv, nn.Linear) else rand(20, 6, 7, 9).double()
    t = only(conv)
    xs, ys = pairs(conv, t, x)
    groups, rows, channels, spatial = t.grouped_shape
    total = conv(x).numel() // t.shape[0]
    assert xs.shape == (groups, total, channels, spatial)
    assert ys.shape == (groups, total, rows)
    w = t.values().reshape(t.grouped_shape)
    predicted = torch.einsum("gncs,gkcs->gnk", xs, w)
    if conv.bias is not None:
        predicted += conv.bias.detach().reshape(groups, 1, rows)
    torch.testing.assert_close(predicted, ys, atol=1e-12, rtol=0)
    # All positions, each once: the outputs of a full sample are those of the layer.
    whole = conv(x).movedim(1, -1) if isinstance(conv, nn.Conv2d) else conv(x)
    expected = whole.detach().reshape(-1, groups, rows).movedim(1, 0)
    assert torch.equal(ys.sort(1).values, expected.sort(1).values)


def test_samples_are_an_exact_count_and_do_not_depend_on_other_targets():
    model, x = mixed(), rand(40, 3, 6, 6)
    targets = find_targets(model)
    need = io_need(100, {}, "test")
    batches = Batches([(part, torch.zeros(len(part))) for part in x.split(16)])
    together = batches.collect(model, targets, frozenset({need}))
    reverse = batches.collect(model, targets[::-1], frozenset({need}))
    for t in targets:
        alone = batches.collect(model, [t], frozenset({need})).get(need, t)
        assert torch.equal(together.get(need, t), alone)
        assert torch.equal(together.get(need, t), reverse.get(need, t))
        assert alone.shape[1] == (40 if isinstance(t.module, nn.Linear) else 100)


def test_samples_come_from_two_networks():
    model, x = mixed(), rand(16, 3, 6, 6)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.plain.weight[:4] = 0
        model.grouped.weight[:, 0] += 1  # its outputs must come from the reference
    t = only(model, "grouped")
    twin = only(reference, "grouped")
    xs, ys = pairs(model, t, x, reference=reference)
    old_xs, old_ys = pairs(reference, twin, x)
    assert torch.equal(ys, old_ys)
    assert not torch.equal(xs, old_xs)
    assert torch.equal(xs, pairs(model, t, x)[0])
    assert not torch.equal(ys, pairs(model, t, x)[1])


def test_samples_refuse_what_they_cannot_pair():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.a(self.a(x))

    x = rand(4, 2, 3, 3)
    model = Twice()
    with pytest.raises(ValueError, match="'a' to run once per forward pass"):
        pairs(model, only(model, "a"), x)
    with pytest.raises(ValueError, match="'b' to run in each forward pass, got none"):
        pairs(model, only(model, "b"), x)
    with pytest.raises(ValueError, match="expected reference with a module 'b', got none"):
        pairs(model, only(model, "b"), x, reference=nn.Conv2d(2, 2, 1))
    chain = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match="expected model with a module '7', got none"):
        pairs(chain, only(chain, "1"), x, shortcuts={"1": "7"})
    with pytest.raises(ValueError, match="outputs of one shape at layer '1' and its shortcut"):
        pairs(nn.Sequential(*chain, nn.MaxPool2d(2)), only(chain, "1"), x, shortcuts={"1": "2"})
    tied = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="expected layers that own their weight alone, got 0, 1"):
        pairs(tied, only(tied, "0"), x)
    bare = nn.Conv2d(2, 2, 1)
    with pytest.raises(ValueError, match=r"expected inputs \(N, C, H, W\)"):
        Batches([(rand(2, 3, 3), 0)]).collect(bare, [only(bare)], frozenset({"io:5"}))


