"""Factorized networks leave PyTorch as ordinary convolutions: ONNX, torch.export, tracing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecnn
from sparsecnn.factorize import Factorize, factorize_
from sparsecnn.nn import FactorizedConv2d

# What the layers of `net` are in ONNX; whatever else appears is no plain network any more.
ORDINARY = {
    "Conv", "Relu", "BatchNormalization", "Flatten", "Reshape", "Gemm", "GlobalAveragePool",
    "ReduceMean", "Identity",
}  # fmt: skip
METHODS = {"0": "tucker2", "3": "vh", "5": "cp", "7": "tucker2"}  # 7 is the grouped one


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 12, 10, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    """A small network whose four convolutions are factorized."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, (3, 5), padding=(1, 2)), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    model(image(8))  # statistics of the batch norm
    model.eval()
    config: dict[str, Any] = {name: Factorize(m, 3) for name, m in METHODS.items()}
    factorize_(model, config, image(), measure=False, recalibrate=False)
    for name, method in METHODS.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, FactorizedConv2d) and layer.method == method
    assert model[7].groups == 2
    return model


def convs_of(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def exported(model: nn.Module, path: Path) -> list[str]:
    """Types of the nodes, after the checker and the runtime have agreed with the network."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(model, (image(),), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))
    stored = onnx.load(str(path))
    onnx.checker.check_model(stored, full_check=True)
    assert {node.domain for node in stored.graph.node} <= {""} and not stored.functions
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: image().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(image()), rtol=1e-4, atol=1e-4)
    return [node.op_type for node in stored.graph.node]


def test_onnx_holds_ordinary_convolutions_only(tmp_path: Path) -> None:
    model = net()
    types = exported(model, tmp_path / "m.onnx")
    assert set(types) <= ORDINARY
    assert types.count("Conv") == convs_of(model) == 3 + 2 + 4 + 3


def test_onnx_after_accelerate_and_densify(tmp_path: Path) -> None:
    model = net()
    fast = sparsecnn.accelerate(model, image(), warmup=1, runs=2)
    plain = sparsecnn.densify(fast)
    with torch.no_grad():
        torch.testing.assert_close(plain(image()), model(image()), rtol=1e-4, atol=1e-4)
    types = exported(plain, tmp_path / "m.onnx")
    # Which other ordinary operators there are depends on the layouts that measured faster.
    assert types.count("Conv") == convs_of(plain)


def test_torch_export_with_a_dynamic_batch() -> None:
    model = net()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("conv2d" in target for target in calls) == convs_of(model)
    assert not any("sparsecnn" in target for target in calls)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    back = torch.export.load(stored).module()
    for x in (image(2), image(5)):
        torch.testing.assert_close(back(x), model(x))


def test_tracing() -> None:
    model = net()
    for traced in (torch.jit.trace(model, image()), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(traced(image(3)), model(image(3)))
    graph = torch.fx.symbolic_trace(model)
    called = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    layers = [graph.get_submodule(name) for name in called]
    assert sum(type(layer) is nn.Conv2d for layer in layers) == convs_of(model)
