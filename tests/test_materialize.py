"""From masks to a smaller and faster network with the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsecnn
from sparsecnn.data import DigitsNet, ResDigitsNet
from sparsecnn.prune import Magnitude, Pruner, find_targets, recipes

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = {"warmup": 1, "runs": 5}


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def network(make, seed=0):
    """Seeded, with batch norms that are no identities."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_filters_are_removed_and_the_report_says_so():
    model = network(ResDigitsNet)
    makers = find_targets(model, filter_fn=lambda _, name: name.endswith("conv1"))
    pruner = recipes.l1_filters(model, 0.5, targets=makers, example_inputs=X)
    pruner.step()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        masked = model(X)
        fast = sparsecnn.materialize(pruner, X[:1], **QUICK)
        torch.testing.assert_close(fast(X[:1]), masked[:1], rtol=1e-4, atol=1e-4)
    # The pruner and its model go on as they were.
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert "removed: blocks.0.conv1 has 8 of 16 filters" in fast.report.notes
    assert "removed: blocks.1.conv1 has 16 of 32 filters" in fast.report.notes
    assert parameters(fast) < 0.6 * parameters(network(ResDigitsNet))


def test_what_cannot_be_removed_is_named():
    model = network(DigitsNet)
    with torch.no_grad():
        model.features[0].weight[3] = 0  # its map is a constant in front of a padded layer
    fast = sparsecnn.materialize(model, X[:1], **QUICK)
    (note,) = [note for note in fast.report.notes if note.startswith("not removed")]
    assert "features.0" in note and "1 filters are zero" in note


def test_single_zeros_become_sparse_kernels_or_stay_dense():
    model = network(DigitsNet)
    pruner = Pruner(model, importance=Magnitude(sparsity=0.9))
    pruner.step()
    fast = sparsecnn.materialize(pruner.finalize(), X, **QUICK)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-4)
    assert {entry.name for entry in fast.report.layers} >= {"features.3", "features.7"}


def test_bad_input():
    with pytest.raises(TypeError, match=r"materialize: expected model to be .* or a Pruner, got 3"):
        sparsecnn.materialize(3, X)
    with pytest.raises(ValueError, match="swapped"):
        swapped = nn.Sequential(sparsecnn.nn.CSRConv2d.from_dense(nn.Conv2d(1, 2, 3)))
        sparsecnn.materialize(swapped, X)
