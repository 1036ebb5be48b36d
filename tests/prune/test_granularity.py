from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.prune import (
    NM,
    block,
    channel,
    element,
    filter_,
    find_targets,
    kernel,
    layer,
    neuron,
    parse_granularity,
    shape,
    strided,
)
from sparsecnn.prune.granularity import HOW

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3),
    "rect": nn.Conv2d(3, 5, (1, 3)),
    "groups2": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "depthwise_x2": nn.Conv2d(3, 6, 3, groups=3),
    "pointwise": nn.Conv2d(5, 7, 1),
    "linear": nn.Linear(8, 6),
}
GRANULARITIES = [
    element, kernel, filter_, channel, shape, layer, neuron, NM(2, 4),
    block(1, 4), block(2, 3), block(4, 1), block(5, 7), block(100, 100),
    strided(1), strided(2), strided(3), strided(4), strided(20),
]  # fmt: skip


def target(name):
    return find_targets(LAYERS[name])[0]


def name_of_group(granularity, module, k, c, r, s):
    """What the entry (k, c, r, s) belongs to, in words: the definition, one entry at a time."""
    groups = getattr(module, "groups", 1)
    out, cin = module.weight.shape[:2]
    kernel_size = tuple(module.weight.shape[2:]) or (1, 1)
    rows = out // groups
    g = k // rows
    column = (c * kernel_size[0] + r) * kernel_size[1] + s
    if str(granularity).startswith("block"):
        return g, (k % rows) // granularity.bh, column // granularity.bw
    if str(granularity).startswith("strided"):
        return g * cin + c, (r * kernel_size[1] + s) % granularity.stride
    return {
        "element": (k, c, r, s),
        "2:4": (k, c, r, s),
        "kernel": (k, c),
        "filter": (k,),
        "channel": (g * cin + c,),
        "shape": (g * cin + c, r, s),
        "layer": (),
    }[str(granularity)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_granularity_partition(granularity, name):
    t = target(name)
    n = granularity.n_groups(t)
    labels = granularity.expand(torch.arange(n), t)
    assert labels.shape == t.shape
    # Each entry has one label, each label is used, and entries share one iff they share a group.
    assert sorted(set(labels.flatten().tolist())) == list(range(n))
    by_label: dict[int, set[object]] = {}
    full = labels.reshape(*t.shape[:2], *(t.shape[2:] or (1, 1)))
    for index in itertools.product(*map(range, full.shape)):
        word = name_of_group(granularity, t.module, *index)
        by_label.setdefault(int(full[index]), set()).add(word)
    assert all(len(words) == 1 for words in by_label.values())
    assert len(set.union(*by_label.values())) == n
    # Group sizes.
    sizes = granularity.reduce(torch.ones(t.shape), t, "sum")
    assert torch.equal(sizes.long(), torch.bincount(labels.flatten(), minlength=n))
    # A kept entry keeps its group.
    mask = torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    assert bool((granularity.expand(granularity.reduce(mask, t, "max"), t) >= mask).all())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_reductions_equal_numpy_loops(granularity, name):
    t = target(name)
    x = torch.randn(t.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = granularity.expand(torch.arange(granularity.n_groups(t)), t).numpy().ravel()
    values = x.numpy().ravel()
    members = [values[labels == g] for g in range(granularity.n_groups(t))]
    expected = {
        "sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min,
        "l1": lambda v: np.abs(v).sum(), "l2": lambda v: np.sqrt((v * v).sum()),
    }  # fmt: skip
    for how in HOW:
        got = granularity.reduce(x, t, how).numpy()
        np.testing.assert_allclose(got, [expected[how](m) for m in members], rtol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_keep_masks_nest(name):
    t = target(name)
    gone = torch.ones(filter_.n_groups(t), dtype=torch.bool)
    gone[2] = False
    mask = filter_.expand(gone, t)
    kernels = kernel.reduce(mask, t, "max").reshape(t.shape[0], t.shape[1])
    # A dropped filter drops its C/G kernels, and only those.
    assert not kernels[2].any()
    assert int((~kernels).sum()) == t.shape[1]
    alive = torch.rand(t.shape, generator=torch.Generator().manual_seed(3)) < 0.1
    chain = [alive] + [g.expand(g.reduce(alive, t, "max"), t) for g in (kernel, filter_, layer)]
    assert all(bool((small <= big).all()) for small, big in itertools.pairwise(chain))


def test_channel_of_grouped_conv_belongs_to_one_group():
    t = target("groups2")
    keep = torch.ones(channel.n_groups(t), dtype=torch.bool)
    assert keep.numel() == 4
    keep[3] = False  # second channel of the second conv group
    mask = channel.expand(keep, t)
    assert mask[:3].all()
    assert mask[3:, 0].all()
    assert not mask[3:, 1].any()


def test_masked_channel_is_not_read():
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    t = find_targets(conv)[0]
    keep = torch.tensor([True, True, True, False])
    with torch.no_grad():
        conv.weight.mul_(channel.expand(keep, t))
    x = torch.randn(1, 4, 5, 5)
    y = conv(x)
    x[:, 3] = 1000.0
    assert torch.equal(conv(x), y)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_text_round_trip(granularity):
    assert parse_granularity(str(granularity)) == granularity


@pytest.mark.parametrize(
    ("spec", "error"),
    [("rows", ValueError), ("block(0,2)", ValueError), ("3:2", ValueError), ("0:4", ValueError),
     ("block(2)", ValueError), ("strided(0)", ValueError), (4, TypeError), (None, TypeError)],
)  # fmt: skip
def test_bad_text(spec, error):
    with pytest.raises(error, match=r"expected .* got"):
        parse_granularity(spec)


def test_wrong_shapes_are_refused():
    t = target("conv")
    for granularity in (kernel, block(2, 2)):
        with pytest.raises(ValueError, match="expected x of shape"):
            granularity.reduce(torch.zeros(4, 6, 3, 3), t)
        with pytest.raises(ValueError, match="expected g of shape"):
            granularity.expand(torch.zeros(5), t)
        with pytest.raises(ValueError, match="expected how"):
            granularity.reduce(torch.zeros(6, 4, 3, 3), t, "median")
