"""Statistics measured anew, against numpy."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparsecnn.measure.batchnorm import recalibrate_batchnorm
from sparsecnn.prune import Magnitude, prune_

from .nets import digits_net, run_two_ranks

GROUPS = {"plain": 1, "groups": 2, "depthwise": 4}


def net(groups=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Dropout(0.5), nn.Conv2d(4, 4, 3, groups=groups, bias=False), nn.BatchNorm2d(4)
    )


def batches(seed=1, sizes=(3, 5, 8)):
    source = torch.Generator().manual_seed(seed)
    return [2 + 3 * torch.randn(n, 4, 5, 5, generator=source) for n in sizes]


def by_numpy(model, data):
    """Mean over batches of the channel means and unbiased variances of the convolution."""
    with torch.no_grad():
        outputs = [model[1](x).double().numpy() for x in data]
    means = [y.mean((0, 2, 3)) for y in outputs]
    variances = [y.var((0, 2, 3), ddof=1) for y in outputs]
    return np.mean(means, 0), np.mean(variances, 0)


def assert_statistics(norm, mean, var):
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), var, rtol=1e-5)


@pytest.mark.parametrize("kind", GROUPS)
def test_batchnorm_statistics_equal_numpy(kind):
    model, data = net(GROUPS[kind]), batches()
    prune_(model, Magnitude(sparsity=0.5))
    with torch.no_grad():
        model[2].running_mean.fill_(7.0)  # of another network: must leave no trace
    assert recalibrate_batchnorm(model, iter(data)) is model
    assert_statistics(model[2], *by_numpy(model, data))
    assert int(model[2].num_batches_tracked) == 3
    # Again, with the batches as tuples: the same to the bit.
    once = copy.deepcopy(model.state_dict())
    recalibrate_batchnorm(model, [(x,) for x in data])
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())


def test_batchnorm_leaves_everything_else():
    model, data = net(), batches()
    model[0].eval()
    model[2].momentum = 0.3
    model.register_buffer("other", torch.ones(2))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    recalibrate_batchnorm(model, data)
    assert torch.equal(torch.get_rng_state(), random)  # dropout has drawn nothing
    assert [m.training for m in model.modules()] == modes
    assert modes[0] and not modes[1]
    assert model[2].momentum == 0.3
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert model[1].weight.grad.eq(1).all() and model[1].weight.requires_grad


def test_batchnorm_momentum_goes_on_from_the_present():
    model, data = net(), batches(sizes=(4,))
    mean, var = by_numpy(model, data)
    recalibrate_batchnorm(model, data, momentum=0.25)
    assert_statistics(model[2], 0.25 * mean, 0.75 + 0.25 * var)
    assert model[2].momentum == 0.1


def test_batchnorm_deeper_layers_see_what_training_shows_them():
    model = digits_net().eval()
    x = torch.randn(16, 1, 8, 8)
    recalibrate_batchnorm(model, [x])
    twin = digits_net().train()
    for norm in (twin.bn1, twin.bn2, twin.bn3):
        norm.momentum = None
    twin(x)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())
    assert not model.bn2.training


def test_batchnorm_that_is_never_called_keeps_its_statistics():
    model = net()
    model[1].unused = nn.BatchNorm2d(4)
    model[1].unused.running_mean.fill_(3.0)
    recalibrate_batchnorm(model, batches())
    assert model[1].unused.running_mean.eq(3).all()
    assert model[2].running_mean.ne(0).all()


BAD = {
    "no module": (lambda m: recalibrate_batchnorm([m], []), TypeError, "model to be a torch.nn"),
    "no norm": (
        lambda m: recalibrate_batchnorm(m[1], batches()),
        ValueError,
        "a batch norm that keeps running statistics, got none in Conv2d",
    ),
    "no statistics": (
        lambda m: recalibrate_batchnorm(nn.BatchNorm2d(4, track_running_stats=False), batches()),
        ValueError,
        "got none in BatchNorm2d",
    ),
    "momentum": (
        lambda m: recalibrate_batchnorm(m, batches(), momentum=1.5),
        ValueError,
        r"momentum None or in \(0, 1\], got 1.5",
    ),
    "momentum 0": (
        lambda m: recalibrate_batchnorm(m, batches(), momentum=0),
        ValueError,
        r"momentum None or in \(0, 1\], got 0",
    ),
    "no batch": (
        lambda m: recalibrate_batchnorm(m, []),
        ValueError,
        "batches that reach a batch norm, got none",
    ),
    "pairs": (
        lambda m: recalibrate_batchnorm(m, [batches()[0], [batches()[0], 1]]),
        TypeError,
        "batches of tensors or tuples of inputs, got list",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_batchnorm_bad_inputs_change_nothing(case):
    call, error, message = BAD[case]
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=f"^recalibrate_batchnorm: expected .*{message}"):
        call(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and model[2].momentum == 0.1


def test_batchnorm_is_whole_again_after_a_failing_batch():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, [batches()[0], torch.randn(2, 3, 5, 5)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


WORKER = """
import sys
import torch
import torch.distributed as dist
from sparsecnn.prune import recalibrate_batchnorm
from tests.prune.test_batchnorm import batches, net

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = net()
# Uneven shares: two batches and one.
recalibrate_batchnorm(model, batches()[:2] if rank == 0 else batches()[2:])
torch.save(model[2].state_dict(), f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_batchnorm_averages_over_ranks(tmp_path: Path):
    run_two_ranks(tmp_path, WORKER, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    norm = nn.BatchNorm2d(4)
    norm.load_state_dict(first)
    assert_statistics(norm, *by_numpy(net(), batches()))
    assert int(norm.num_batches_tracked) == 3
