"""Masks under torchrun: two processes, one of which starts with other masks and sees other data."""

from __future__ import annotations

import pytest
import torch

from .nets import run_two_ranks

WORKER = """
import gc
import torch
import torch.distributed as dist
from torch import nn
from sparsecnn.prune import Batches, Magnitude, OneShot, Pruner, register_importance

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
torch.manual_seed(rank)  # other weights on each rank: DDP must make them equal
model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
pruner = Pruner(model, importance=Magnitude(sparsity=0.5), schedule=OneShot(4))
pruner.step(force=True)
assert any("mask" in name for name, _ in model.named_buffers())
ddp = nn.parallel.DistributedDataParallel(model)  # broadcasts parameters and buffers of rank 0
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
pruner.attach(optimizer)


def same(tensor):
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    return torch.equal(*both)


for step in range(8):
    optimizer.zero_grad()
    x = torch.randn(4, 2, 6, 6)  # other data on each rank
    ddp(x).square().mean().backward()
    optimizer.step()
    mask = pruner.masks()["0.weight"]
    assert int(mask.sum()) == 54, mask.sum()
    assert same(mask.to(torch.uint8)), f"masks differ at step {step}"
    assert same(model[0].weight.detach().contiguous()), f"weights differ at step {step}"


@register_importance(needs={"grad"})
def Saliency(t, stats):
    return (stats.get("grad", t) * t.dense.detach().double()).abs()


# Each rank measures its own data, and not even equally much of it.
data = [(torch.randn(n, 2, 6, 6), torch.randint(3, (n,))) for n in (4, 2 + 3 * rank)]
weight = pruner.finalize()[0].weight.detach().contiguous()
assert same(weight)
measured = Pruner(model, importance=Saliency(sparsity=0.5), calibration=Batches(data))
(target,) = measured.targets
got = measured.calibration.collect(model, [target], frozenset({"grad"})).get("grad", target)
everything = [None, None]
dist.all_gather_object(everything, data)
loss = 0
for x, y in everything[0] + everything[1]:
    loss = loss + nn.functional.cross_entropy(model(x), y, reduction="sum") / 15  # samples
wanted = torch.autograd.grad(loss, target.dense)[0].double()
assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-7), (got - wanted).abs().max()
local = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
assert not torch.allclose(got, torch.autograd.grad(local, target.dense)[0].double(), rtol=1e-2)
measured.step()
(mask,) = measured.masks().values()
assert int(mask.sum()) == 54 and same(mask.to(torch.uint8)), "masks of measured scores differ"
# The reducer holds the process group: left to the interpreter's exit, the group's threads outlive
# it in one run of ten, with or without this library, and the runtime aborts.
del ddp
gc.collect()
dist.destroy_process_group()
print("ok")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_keep_equal_masks(tmp_path):
    printed = run_two_ranks(tmp_path, WORKER)
    assert printed.split().count("ok") == 2, printed
