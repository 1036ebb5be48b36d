"""The demo's last check: a fresh Python process loads the saved file and computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsecnn.data import ResNet20, digits
from sparsecnn.storage import load


class ReloadError(Exception):
    """The fresh process failed; the message holds its last line."""


def reload_logits(path: str, width: int, seed: int, threads: int, device: str, out: str) -> None:
    """What the fresh process runs: load the file, write the test images' logits to `out`.

    Args:
        path: of the saved model.
        width: of the network.
        seed: of the split.
        threads: as in the process that saved, so that sums have the same order.
        device: to compute on.
        out: safetensors file to write.
    """
    torch.set_num_threads(threads)
    model = load(path, ResNet20(width)).eval().to(device)
    images = digits(32, seed).test.tensors[0].to(device)
    with torch.inference_mode():
        save_file({"logits": model(images).cpu().contiguous()}, out)


def reload(path: Path, width: int, seed: int, threads: int, device: str) -> Tensor:
    """Logits (N, 10) of the test images, computed by a fresh process from the saved file.

    Args:
        path: of the saved model; the others as in `reload_logits`.
        width: see there.
        seed: see there.
        threads: see there.
        device: see there.

    Raises:
        ReloadError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "logits.safetensors")
        arguments = [os.path.abspath(path), width, seed, threads, device, out]
        code = (
            "import json, sys; from sparsecnn._demo_reload import reload_logits; "
            "reload_logits(*json.loads(sys.argv[1]))"
        )
        # The package may have been found through the current folder, which -c does not look in
        # when it is started elsewhere.
        root = str(Path(__file__).resolve().parents[1])
        path_list = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path_list)},
            cwd=folder,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ReloadError(f"the fresh process could not reload {path}: {last}")
        return load_file(out)["logits"]
