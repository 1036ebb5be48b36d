"""CSRConv2d.specialize_(): when the code made for a weight serves, and when it must not.

Without a GPU the code runs in the emulator in place of compiler, driver and device; the last part
is the real thing and needs CUDA.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from sparsecnn.nn import CSRConv2d
from sparsecnn.ops import _specialized
from sparsecnn.ops._csr_source import Source, Unsuitable
from sparsecnn.ops._nvrtc import NvrtcError
from tests.cuda_emu import emulator, specialized

needs_emulator = pytest.mark.skipif(emulator.CXX is None, reason="the emulator needs g++")


def dense(channels: int = 8, filters: int = 9, **options: Any) -> nn.Conv2d:
    """A convolution with a sparse weight of small integers."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, filters, 3, padding=1, **options)
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-4, 5, conv.weight.shape))
        conv.weight.mul_(torch.rand(conv.weight.shape) < 0.3)
        if conv.bias is not None:
            conv.bias.copy_(torch.randint(-4, 5, conv.bias.shape))
    return conv.eval()


def image(n: int = 2, channels: int = 8, h: int = 7, w: int = 6, device: str = "cpu") -> Tensor:
    torch.manual_seed(1)
    return torch.randint(-4, 5, (n, channels, h, w)).float().to(device)


@pytest.fixture
def warnings() -> Any:
    """What the layer logs."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = logging.getLogger("sparsecnn.nn.csr"), Listener()
    logger.addHandler(listener)
    yield heard
    logger.removeHandler(listener)


# ---- reasons -------------------------------------------------------------------------------------


def test_a_cpu_layer_gives_a_reason(warnings: list[str]) -> None:
    layer = CSRConv2d.from_dense(dense(), specialize=True)
    assert layer.specialization == "portable: expected the weight on a CUDA device, got cpu"
    assert warnings == [f"CSRConv2d.specialize_: {layer.specialization}"]
    assert layer.specialize_() == layer.specialization
    with torch.no_grad():
        assert torch.equal(layer(image()), CSRConv2d.from_dense(dense())(image()))


def test_unasked_layers_say_so() -> None:
    layer = CSRConv2d.from_dense(dense())
    assert layer.specialization.startswith("portable: not asked for")
    assert CSRConv2d(4, 4, 1).specialization == layer.specialization


def test_other_reasons(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setattr(_specialized, "_architecture", lambda device: "sm_90")

    def broken(text: str, architecture: str) -> bytes:
        raise NvrtcError("no libnvrtc.so.13 found")

    monkeypatch.setattr(_specialized, "cubin_of", broken)
    reasons = {
        "no libnvrtc.so.13 found": dense(),
        "expected at least 8 filters in a group, got 1": dense(8, 8, groups=8),
        "expected float32, float16 or bfloat16, got torch.float64": dense().double(),
    }
    for reason, conv in reasons.items():
        layer = CSRConv2d.from_dense(conv, specialize=True)
        assert layer.specialization == f"portable: {reason}"
        assert warnings.pop() == f"CSRConv2d.specialize_: portable: {reason}"
    with torch.inference_mode():
        layer = CSRConv2d.from_dense(dense(), specialize=True)
    assert "inference tensors" in layer.specialization
    computed = CSRConv2d.from_dense(dense())
    prune.l1_unstructured(computed, "values", amount=0.5)
    assert "got computed ones" in computed.specialize_()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    source = specialized.source_of(specialized.cases.build(specialized.WEIGHTS["3x3"]))
    monkeypatch.setattr(_specialized, "cubin_of", lambda text, architecture: b"\x7fELF")
    with pytest.raises(Unsuitable, match=r"libcuda.so.1|cu\w+: "):
        _specialized._launcher(source, "sm_90", torch.device("cuda", 0))


# ---- when the code serves, in the emulator -------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Source], specialized.Kernels]:
    """Kernels of a source, compiled once."""

    @functools.cache
    def compiled(source: Source) -> specialized.Kernels:
        folder: Path = tmp_path_factory.mktemp("specialized")
        return specialized.Kernels(specialized.build(folder, [source]), [source])

    return compiled


@pytest.fixture
def launches(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[Source], specialized.Kernels]
) -> list[str]:
    """Puts the emulator in the place of the device; grows with each launch."""
    made: list[str] = []

    def launcher(source: Source, architecture: str, device: torch.device) -> tuple[Any, str]:
        kernels = build(source)

        def launch(args: Any) -> None:
            made.append(architecture)
            kernels.raw(0, args)

        return launch, f"{architecture} code"

    monkeypatch.setattr(_specialized, "_architecture", lambda device: "emulated")
    monkeypatch.setattr(_specialized, "_launcher", launcher)
    return made


@needs_emulator
def test_serves_plain_inference_only(launches: list[str]) -> None:
    conv = dense()
    layer = CSRConv2d.from_dense(conv, activation="relu", specialize=True)
    assert layer.specialization == "emulated code"
    x = image()
    want = conv(x).relu().detach()
    for mode in (torch.no_grad, torch.inference_mode):
        for given in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            before = len(launches)
            with mode():
                y = layer(given)
            assert torch.equal(y, want) and len(launches) == before + 1
            assert y.is_contiguous(memory_format=specialized.memory_format(given))
    with torch.no_grad():
        assert torch.equal(layer(x[0], torch.ones_like(want[0])), (conv(x[0]) + 1).relu())
        assert layer(x[:0]).shape == (0, *want.shape[1:])
    served = len(launches)
    assert layer(x).requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), want)
        exported = torch.export.export(layer, (x,))
        assert "sparsecnn.csr_conv2d" in str(exported.graph)
        assert torch.equal(torch.func.vmap(layer)(x[None])[0], want)
        with pytest.raises(ValueError, match="channels"):
            layer(x[:, :3])
        with pytest.raises(ValueError, match="expected residual"):
            layer(x, torch.zeros(1))
        with pytest.raises(TypeError, match="of the dtype of x"):
            layer(x.double())
    assert len(launches) == served
    assert layer.specialization == "emulated code"


def in_place(layer: CSRConv2d) -> None:
    with torch.no_grad():
        layer.values.mul_(2)


def optimizer_step(layer: CSRConv2d) -> None:
    layer(image()).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


def loaded(layer: CSRConv2d) -> None:
    layer.load_state_dict(layer.state_dict() | {"values": 2 * layer.values.detach()})


def loaded_dense(layer: CSRConv2d) -> None:
    other = dense(8, 8)
    with torch.no_grad():
        other.weight[0] = 3
    layer.load_state_dict(other.state_dict())


def replaced(layer: CSRConv2d) -> None:
    layer.values = nn.Parameter(layer.values.detach() * 2)


def data_replaced(layer: CSRConv2d) -> None:
    layer.values.data = layer.values.data * 2


def other_columns(layer: CSRConv2d) -> None:
    first = int(layer.row_ptr[1])
    layer.col_idx[:first] = torch.arange(first)


def there_and_back(layer: CSRConv2d) -> None:
    with torch.no_grad():
        layer.values.add_(1 / 4096)
    layer.specialize_()
    layer.half().float()  # rounds, counts nothing, and may get the old memory again


def data_in_training(layer: CSRConv2d) -> None:
    layer.train()(image())
    layer.values.data.mul_(2)
    layer.eval()


CHANGES: list[Callable[[CSRConv2d], None]] = [
    in_place, optimizer_step, loaded, loaded_dense, replaced, data_replaced, other_columns,
    there_and_back, data_in_training,
]  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_never_stale(
    change: Callable[[CSRConv2d], None], launches: list[str]
) -> None:
    small = dense(8, 8)
    layer = CSRConv2d.from_dense(small, specialize=True)
    x = image()
    with torch.no_grad():
        layer(x)
    assert launches
    change(layer)
    served = len(launches)
    with torch.no_grad():
        y = layer(x)
        want = torch.nn.functional.conv2d(x, layer.weight.to_dense(), layer.bias, padding=1)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)
    assert len(launches) == served
    assert layer.specialization.startswith("portable: ")
    if change in (in_place, other_columns):
        assert layer.specialize_() == "emulated code"
        with torch.no_grad():
            again = layer(x)
        assert torch.equal(again, y) and len(launches) == served + 1


@needs_emulator
def test_bias_and_activation_are_read_at_each_call(launches: list[str]) -> None:
    layer = CSRConv2d.from_dense(dense(), specialize=True)
    x = image()
    with torch.no_grad():
        y = layer(x)
        assert layer.bias is not None
        layer.bias.add_(1)
        assert torch.equal(layer(x), y + 1)
        layer.activation = "relu6"
        assert torch.equal(layer(x), (y + 1).clamp(0, 6))
    assert len(launches) == 3


@needs_emulator
def test_copies_are_portable(launches: list[str]) -> None:
    layer = CSRConv2d.from_dense(dense(), specialize=True)
    x = image()
    with torch.no_grad():
        want = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    served = len(launches)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert other.specialization.startswith("portable: a copy")
        with torch.no_grad():
            assert torch.equal(other(x), want)
    assert len(launches) == served
    assert layer.specialization == "emulated code"
    assert set(layer.state_dict()) == {"values", "col_idx", "row_ptr", "bias"}


# ---- on a GPU ------------------------------------------------------------------------------------


def on_gpu(device: str = "cuda", dtype: torch.dtype = torch.float32) -> tuple[CSRConv2d, CSRConv2d]:
    """A specialized layer and its portable twin."""
    conv = dense(40, 72).to(device, dtype)
    layer = CSRConv2d.from_dense(conv, activation="silu", specialize=True)
    assert layer.specialization.startswith("sm_"), layer.specialization
    return layer, CSRConv2d.from_dense(conv, activation="silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_results_are_those_of_the_portable_kernel(cuda: str, dtype: torch.dtype) -> None:
    layer, portable = on_gpu(dtype=dtype)
    for n, h, w in ((1, 1, 1), (3, 7, 7), (2, 56, 57), (5, 14, 14)):
        for order in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(n, 40, h, w, device=cuda).to(dtype, memory_format=order)
            residual = torch.randn(n, 72, h, w, device=cuda).to(dtype, memory_format=order)
            with torch.no_grad():
                assert torch.equal(layer(x, residual), portable(x, residual))
                assert torch.equal(layer(x), portable(x))


def test_gpu_graphs_streams_and_threads(cuda: str) -> None:
    layer, portable = on_gpu()
    x = torch.randn(2, 40, 9, 9, device=cuda)
    with torch.no_grad():
        want = portable(x)
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(-2)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, portable(x))
        late = torch.full_like(x, float("nan"))
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # another stream would read the NaN
            late.copy_(x)
            y = layer(late)
        side.synchronize()
        assert torch.equal(y, portable(x))
    got: list[Tensor] = []

    def call() -> None:  # a thread in which the runtime has not been called
        with torch.no_grad():
            got.append(layer(x / -2))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert torch.equal(got[0], want)


def test_gpu_another_device(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    layer, portable = on_gpu("cuda:1")
    x = torch.randn(2, 40, 9, 9, device="cuda:1")
    with torch.no_grad():
        assert torch.equal(layer(x), portable(x))
    assert torch.cuda.current_device() == 0
    layer.to("cuda:0")
    assert layer.specialization.startswith("portable: the weight or its place changed")


def test_gpu_layers_move_to_the_cpu(cuda: str) -> None:
    layer, portable = on_gpu()
    x = torch.randn(2, 40, 9, 9, device=cuda)
    with torch.no_grad():
        want = portable(x).cpu()
        torch.testing.assert_close(copy.deepcopy(layer).cpu()(x.cpu()), want)
        torch.testing.assert_close(layer.cpu()(x.cpu()), want)
