"""Masks under DistributedDataParallel: two processes, one of which starts with other masks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

WORKER = """
import gc
import sys
import torch
import torch.distributed as dist
from torch import nn
from sparsecnn.prune import Magnitude, OneShot, Pruner, find_targets

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
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
# The reducer holds the process group: left to the interpreter's exit, the group's threads outlive
# it in one run of ten, with or without this library, and the runtime aborts.
del ddp
gc.collect()
dist.destroy_process_group()
print("ok")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_keep_equal_masks(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    store = tmp_path / "store"
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(store)],
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert output.strip().endswith("ok")
