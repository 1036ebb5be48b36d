"""The command line: help, exit status, one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from safetensors.torch import save_file
from torch import nn

import sparsecnn
from sparsecnn._cli_doctor import examine_tensors
from sparsecnn._cli_models import open_source
from sparsecnn.cli import main
from sparsecnn.data import DigitsNet
from sparsecnn.measure import Report
from sparsecnn.prune import Magnitude, Pruner, Random, find_targets, prune_
from tests.models import prepare_torchvision

COMMANDS = ("demo", "doctor", "profile", "bench", "sensitivity")
NET = "sparsecnn.data:DigitsNet"
SMALL = ("--input", "1,1,8,8", "--threads", "1")


@pytest.fixture(autouse=True)
def restored_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder of good and bad files."""
    torch.manual_seed(0)
    net = DigitsNet()
    torch.save(net.state_dict(), tmp_path / "dense.pt")
    torch.save(net, tmp_path / "pickled.pt")
    prune_(net, Magnitude(sparsity=0.9))
    state = net.state_dict()
    torch.save(state, tmp_path / "pruned.pth")
    save_file(state, tmp_path / "pruned.safetensors")
    sparsecnn.save(net, tmp_path / "ours.safetensors")
    for name in ("pruned.pth", "pruned.safetensors", "ours.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut.{name.split('.')[1]}").write_bytes(whole[: len(whole) // 2])
        if name.startswith("ours"):
            (tmp_path / "cut-ours.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no checkpoint\n")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    torch.save({"embedding": torch.zeros(3)}, tmp_path / "vectors.pt")
    (tmp_path / "folder.pt").mkdir()
    return tmp_path


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"sparsecnn {sparsecnn.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    found = capsys.readouterr()
    assert "--threads" in found.out and "--device" in found.out and found.err == ""


def test_python_m_runs_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsecnn", "doctor", "nowhere.pt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere.pt" in done.stderr


# Arguments ({} is the folder of files) and words of the one line on standard error.
MISTAKES: list[tuple[str, tuple[str, ...]]] = [
    ("", ("COMMAND",)),
    ("fly", ("invalid choice", "demo")),
    ("doctor", ("MODEL",)),
    ("doctor {}/nowhere.pt", ("existing file", "nowhere.pt")),
    ("doctor nowhere", ("existing file", "torchvision:NAME")),
    ("doctor {}/folder.pt", ("folder",)),
    ("doctor {}/empty.pt", ("empty file",)),
    ("doctor {}/cut.pth", ("damaged or foreign", "cut.pth")),
    ("doctor {}/text.pth", ("damaged or foreign", "text.pth")),
    ("doctor {}/cut.safetensors", ("complete safetensors", "cut.safetensors")),
    ("doctor {}/cut-ours.safetensors", ("safetensors", "cut-ours")),
    ("doctor {}/pickled.pt", ("state dict", "objects other than tensors")),
    ("doctor {}/numbers.pt", ("state dict", "dict")),
    ("doctor {}/vectors.pt", ("convolution or linear weight",)),
    ("doctor {}/ours.safetensors", ("DigitsNet", "--arch")),
    ("doctor {}/dense.pt --arch nowhere:Net", ("nowhere",)),
    ("doctor {}/dense.pt --arch resnet50", ("torchvision:NAME",)),
    ("doctor {}/dense.pt --arch sparsecnn.data:ResNet20", ("fit", "stem.0.weight")),
    ("doctor {}/dense.pt --arch " + NET + " --input 1,3,8,8", ("--input", "1,3,8,8")),
    ("doctor {}/dense.pt --arch " + NET + " --json {}/none/x.json", ("existing folder", "none")),
    ("doctor " + NET + " --arch " + NET, ("--arch only",)),
    ("doctor sparsecnn.data:Nothing", ("no such attribute", "Nothing")),
    ("doctor sparsecnn.data:digits --input 1,1,8,8", ("Module", "Digits")),
    ("doctor torch.nn:Conv2d", ("failed", "TypeError")),
    ("doctor math:pi", ("callable", "3.14")),
    ("doctor " + NET + " --input 1,1,8", ("--input", "N,C,H,W")),
    ("doctor " + NET + " --input 1,1,8,0", ("--input", "N,C,H,W")),
    ("doctor " + NET + " --input eight", ("--input", "eight")),
    ("doctor " + NET + " --threads 0", ("--threads", "'0'")),
    ("doctor " + NET + " --device tpu", ("--device", "tpu")),
    ("doctor " + NET + " --device meta", ("--device", "cpu or cuda")),
    ("profile {}/dense.pt", ("--arch", "dense.pt")),
    ("profile " + NET + " --runs none", ("--runs", "none")),
    ("bench " + NET + " --sparsity 1.5", ("--sparsity", "[0, 1)", "1.5")),
    ("bench " + NET + " --sparsity 90", ("--sparsity", "0.9 for 90 %")),
    ("bench " + NET + " --sparsity nan", ("--sparsity", "nan")),
    ("bench " + NET + " --batch -1", ("--batch", "-1")),
    ("bench torch.nn:Identity --input 1,1,8,8", ("convolutions",)),
    ("demo --sparsity 1.5", ("--sparsity", "1.5")),
    ("demo --seed -1", ("--seed", "-1")),
    ("demo --epochs 0", ("--epochs", "'0'")),
    ("demo --out {}/dense.pt", ("folder", "dense.pt")),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    line: str, words: tuple[str, ...], checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As joined arguments: "--batch -1" would read as an option without a value.
    arguments = line.replace("{}", str(checkpoints)).replace("--batch -1", "--batch=-1").split()
    before = sorted(checkpoints.iterdir())
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1, found.err
    assert "\x1b" not in found.err
    assert found.err.startswith("sparsecnn") and ": error: " in found.err
    for word in words:
        assert word in found.err
    assert sorted(checkpoints.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["demo", f"doctor {NET}", f"profile {NET}", f"bench {NET}"])
def test_cuda_without_a_gpu(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--device", "cuda"]) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and "0 CUDA devices" in found and "--device cpu" in found


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_unknown_and_missing_model_libraries(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision" if prepare_torchvision() else library)
    pytest.importorskip(library)
    assert main(["doctor", f"{library}:resnet5O"]) == 2
    found = capsys.readouterr().err
    assert "did you mean" in found and "resnet50" in found and found.count("\n") == 1
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["doctor", f"{library}:resnet50"]) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and library in found
    assert "pip install 'sparsecnn[models]'" in found


def test_networks_of_libraries_keep_their_residual_branches() -> None:
    prepare_torchvision()
    pytest.importorskip("timm")
    model = open_source("timm:resnet18").model
    assert model is not None
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and all(bool(m.weight.any()) for m in norms)


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor_judges_a_checkpoint_by_its_zeros(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(checkpoints / "dense.pt")]) == 0
    text = capsys.readouterr().out
    assert "no zeros to skip" in text and "prune it first" in text and "likely" not in text
    for name in ("pruned.pth", "pruned.safetensors"):
        target = checkpoints / "doctor.json"
        assert main(["doctor", str(checkpoints / name), "--json", str(target)]) == 0
        text = capsys.readouterr().out
        assert "likely faster" in text and "--arch" in text and "prune it first" not in text
        data = json.loads(target.read_text())
        assert data["schema_version"] == 1 and data["measured"] is False
        layers = {layer["name"]: layer for layer in data["layers"]}
        assert set(layers) == {
            "features.0", "features.3", "features.7", "classifier.1", "classifier.3",
        }  # fmt: skip
        assert layers["features.3"]["density"] == pytest.approx(0.1, abs=1e-3)
        assert layers["features.3"]["gain"] is None
        assert layers["classifier.3"]["verdict"] == "dense"


def _zeroed(share: float, kind: str) -> torch.Tensor:
    weight = torch.ones(16, 16, 3, 3)
    count = round(16 * share)
    if kind == "filters":
        weight[:count] = 0
    elif kind == "channels":
        weight[:, :count] = 0
    elif kind == "kernels":
        for k in range(16):
            weight[k, (torch.arange(count) + k) % 16] = 0
    elif kind == "columns":
        weight.flatten(1)[:, : round(144 * share) : 1] = 0
        weight = weight.flatten(1)[:, torch.randperm(144)].view(16, 16, 3, 3)
    else:
        layer = nn.Conv2d(16, 16, 3, bias=False)
        prune_(layer, Random(sparsity=share, seed=0))
        weight = layer.weight.detach()
    return weight


@pytest.mark.parametrize("kind", ["filters", "channels", "kernels", "columns", "elements"])
def test_doctor_names_the_pattern(kind: str) -> None:
    torch.manual_seed(0)
    verdict = examine_tensors("x", {"conv.weight": _zeroed(0.75, kind)}).verdicts[0]
    assert verdict.pattern.startswith(kind if kind == "elements" else f"whole {kind} (75%)")
    assert ("filters are all zero" in verdict.why) == (kind == "filters")


@pytest.mark.parametrize(
    ("density", "verdict"),
    [(1.0, "dense"), (0.6, "dense"), (0.4, "maybe faster"), (0.1, "likely faster")],
)
def test_doctor_verdict_by_density(density: float, verdict: str) -> None:
    weight = torch.ones(40, 50)
    weight.view(-1)[round(2000 * density) :] = 0
    found = examine_tensors("x", {"fc.weight": weight[:, torch.randperm(50)]}).verdicts[0]
    assert found.verdict == verdict and found.density == pytest.approx(density)


def _with_torch_masks(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            torch_prune.l1_unstructured(module, "weight", 0.8)
    return net


def _with_pruner_masks(net: nn.Module) -> nn.Module:
    convolutions = find_targets(net, types=(nn.Conv2d,))
    Pruner(net, importance=Magnitude(sparsity=0.8), targets=convolutions).step()
    return net


@pytest.mark.parametrize("mask", [_with_torch_masks, _with_pruner_masks])
def test_doctor_applies_saved_masks(mask: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    net = mask(DigitsNet()).eval()
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "masked.ckpt")
    source = open_source(str(tmp_path / "masked.ckpt"))
    plain = DigitsNet().eval()
    plain.load_state_dict(source.tensors)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(plain(x), net(x))
    found = {v.name: v.density for v in examine_tensors("x", source.tensors).verdicts}
    assert list(found) == [
        "features.0", "features.3", "features.7", "classifier.1", "classifier.3",
    ]  # fmt: skip
    assert found["features.3"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("name", ["pruned.pth", "ours.safetensors"])
def test_doctor_measures_with_an_architecture(
    name: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = checkpoints / "doctor.json"
    arguments = ["doctor", str(checkpoints / name), "--arch", NET, *SMALL, "--json", str(target)]
    assert main(arguments) == 0
    assert "accelerate makes" in capsys.readouterr().out
    data = json.loads(target.read_text())
    assert data["measured"] is True and data["before_ms"] > 0 and data["after_ms"] > 0
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert layers["features.3"]["density"] == pytest.approx(0.1, abs=1e-3)
    for layer in layers.values():
        assert layer["verdict"] in ("faster", "not faster", "kept dense", "dense")
        assert layer["why"] and layer["dense_ms"] > 0
        assert (layer["gain"] is None) == (layer["verdict"] == "dense")
    assert layers["classifier.3"]["verdict"] == "dense"
    assert "no zeros to skip" in layers["classifier.3"]["why"]


# ---- profile, bench ------------------------------------------------------------------------------


def test_profile_counts_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "profile.json"
    arguments = ["profile", NET, "--input", "2x1x8x8", "--threads", "1", "--runs", "20"]
    assert main([*arguments, "--json", str(target)]) == 0
    text = capsys.readouterr().out
    data = json.loads(target.read_text())
    assert data["schema_version"] == 1 and data["input"] == [2, 1, 8, 8]
    assert data["macs"] == data["effective_macs"] == 2 * 460_416
    assert data["params"] == 23_034 and f"{data['params']:,}" in text
    assert data["file_bytes"] > data["params_bytes"] == 4 * 23_034
    latency = data["latency"]
    assert latency["runs"] == 20
    assert 0 < latency["median_s"] <= latency["p90_s"] <= latency["p99_s"]
    assert data["images_per_s"] == pytest.approx(2 / latency["median_s"])
    # The first convolution's output alone.
    assert data["peak_memory_bytes"] >= 2 * 16 * 64 * 4
    energy = data["energy"]
    assert energy["reason"] and (energy["joules"] is None or energy["joules"] > 0)
    assert len(data["layers"]) == 5 and data["environment"]["threads"] == 1


def test_profile_counts_zeros_of_a_checkpoint(checkpoints: Path) -> None:
    target = checkpoints / "profile.json"
    arguments = [str(checkpoints / "pruned.pth"), "--arch", NET, *SMALL, "--runs", "5"]
    assert main(["profile", *arguments, "--json", str(target)]) == 0
    data = json.loads(target.read_text())
    assert data["macs"] == 460_416
    assert data["effective_macs"] == pytest.approx(46_000, rel=0.05)
    assert data["nonzero_params"] < 0.2 * data["params"]


def test_bench_prunes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    arguments = ["bench", NET, *SMALL, "--batch", "2", "--sparsity", "0.8"]
    assert main([*arguments, "--json", str(out), "--html", str(page)]) == 0
    assert "80% random zeros in 2 of 3 convolutions" in capsys.readouterr().out
    report = Report.from_json(out.read_text())
    density = {layer.name: layer.density for layer in report.layers}
    assert density["features.0"] == 1 and density["classifier.1"] == 1
    assert density["features.3"] == pytest.approx(0.2, abs=1e-3)
    assert report.layers[0].input_shape == (2, 1, 8, 8)
    assert "features.3" in page.read_text()


def test_a_factory_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from torch import nn\nimport absent_library_xyz\n"
    (tmp_path / "broken_factory.py").write_text(code)
    (tmp_path / "own_factory.py").write_text(
        "from torch import nn\n"
        "class Holder:\n    net = staticmethod(lambda: nn.Sequential(nn.Conv2d(1, 4, 3)))\n"
        "ready = nn.Sequential(nn.Conv2d(1, 4, 3)).train()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("own_factory:Holder.net", "own_factory:ready"):
        model = open_source(name).model
        assert isinstance(model, nn.Sequential) and not model.training
    assert main(["doctor", "broken_factory:net"]) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and "absent_library_xyz" in found


def test_sensitivity_writes_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    json_file, svg_file = tmp_path / "s.json", tmp_path / "s.svg"
    status = main([
        "sensitivity", NET, *SMALL, "--data", "digits", "--sparsities", "0.5,0.9",
        "--granularity", "kernel", "--json", str(json_file), "--svg", str(svg_file),
    ])  # fmt: skip
    assert status == 0
    data = json.loads(json_file.read_text())
    assert [len(entry["scores"]) for entry in data["layers"]] == [2, 2, 2, 2]
    assert 0 <= data["baseline"] <= 1 and data["granularity"] == "kernel"
    assert svg_file.read_text().startswith("<svg xmlns")
    assert "features.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "expected --data as digits or module.path:factory"),
        (["--data", "no.such:thing"], "expected a module 'no.such'"),
        (["--data", "sparsecnn.data:DigitsNet"], "batches"),
        (["--data", "digits", "--sparsities", "0.9,0.5"], "ascending shares of zeros"),
        (["--data", "digits", "--granularity", "row"], "expected one of element"),
        ([], "--data"),
    ],
)
def test_bad_sensitivity(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sensitivity", NET, *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
