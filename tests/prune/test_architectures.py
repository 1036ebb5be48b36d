from __future__ import annotations

import json

import pytest
import torch

from bench.channels import main, sweep_one
from sparsecnn.prune import Magnitude
from sparsecnn.prune.channels import prune_channels_
from tests.models import create, prepare_torchvision

if not prepare_torchvision():
    pytest.skip("torchvision does not fit this torch", allow_module_level=True)
pytest.importorskip("timm")

SMALL = [
    "resnet18", "mobilenetv2_050", "mobilenetv3_small_050", "regnetx_002", "mnasnet_small",
    "ghostnet_050",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_architecture_shrinks(name):
    model = create(name, num_classes=10)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = sum(p.numel() for p in model.parameters())
    _, report = prune_channels_(model, x, Magnitude(sparsity=0.3))
    assert report.layers
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before
    for training in (False, True):
        assert model.train(training)(x).shape == (2, 10)


def test_sweep_has_a_row_for_everything():
    shuffled = sweep_one("torchvision", "shufflenet_v2_x0_5")
    assert shuffled["reason"] is None and shuffled["params"][1] < 0.8 * shuffled["params"][0]
    assert any("channel shuffle" in why for why in shuffled["kept"].values())
    refused = sweep_one("torchvision", "googlenet+aux")
    assert "reach the outputs in evaluation mode" in refused["reason"]
    assert "RuntimeError" in sweep_one("timm", "no_such_network")["reason"]


def test_sweep_writes_where_it_was_made(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main(["--only", "mobilenet_v3_small", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    for key in ("commit", "environment", "rows"):
        assert key in result
    assert [row["architecture"] for row in result["rows"]] == ["mobilenet_v3_small"]
    assert "mobilenet_v3_small" in capsys.readouterr().out
