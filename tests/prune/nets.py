"""Small networks of the pruning tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Three convolutions and two linear layers for 8x8 digits: 23 034 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(128, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 10)."""
        x = self.bn1(self.conv1(x)).relu()
        x = nn.functional.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        x = nn.functional.max_pool2d(self.bn3(self.conv3(x)).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Mixed(nn.Module):
    """One layer of each geometry: plain, grouped, depthwise, pointwise, linear, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, (1, 3), padding=(0, 1), groups=2)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(24, 8, 1)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4)."""
        x = self.pointwise(self.depthwise(self.grouped(self.plain(x).relu()).relu()).relu())
        return self.head(self.hidden(x.mean((2, 3))).relu())


def mixed(seed: int = 0) -> Mixed:
    """`Mixed` with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mixed()


def digits_net(seed: int = 0) -> DigitsNet:
    """`DigitsNet` with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNet()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all 2-d and 4-d parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() in (2, 4)}


def run_two_ranks(folder: Path, worker: str, *arguments: str) -> str:
    """Run a script in two processes of torchrun; what they printed, once both have succeeded."""
    script = folder / "worker.py"
    script.write_text(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
