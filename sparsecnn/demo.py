"""The main job end to end on real images: train, prune, fine-tune, accelerate, save, reload.

`run` does it and returns the figures; the file it saves is loaded again by a fresh Python process,
which must compute the same logits on the whole test set.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from sparsecnn._demo_reload import ReloadError, reload
from sparsecnn.accelerate import accelerate
from sparsecnn.data import Digits, ResNet20, digits
from sparsecnn.measure import LatencyStats, Report, accuracy, model_size, time_interleaved
from sparsecnn.prune import Magnitude, Polynomial, Pruner, find_targets, sparsity
from sparsecnn.storage import save

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ReloadError", "Result", "Settings", "compare_latency", "run"]

BATCH = 64
LEARNING_RATE = 3e-3
# Share of the fine-tuning steps in which the sparsity grows; the rest is for recovery.
PRUNING_SHARE = 0.6
# Largest loss of test accuracy that the demo calls a success, and of the reloaded logits.
MAX_DROP = 0.01
MAX_RELOAD_DIFF = 1e-5
# The stem has one input channel: a few hundred weights, all of them needed.
KEPT_DENSE = ("stem.0",)


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        out: folder for the results; made if missing.
        epochs: passes over the training images for the dense network.
        finetune_epochs: the same for pruning and fine-tuning.
        sparsity: share of zeros in every pruned convolution.
        seed: of the split, the weights and the order of the images.
        threads: for all measurements and the reloading process; training uses all cores.
        device: "cpu" or "cuda".
        width: channels of the network's first stage.
        quick: a run of seconds on a part of the images, to test the path; says nothing about
            accuracy, which is not checked then.
    """

    out: Path
    epochs: int = 4
    finetune_epochs: int = 6
    sparsity: float = 0.9
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    width: int = 32
    quick: bool = False


@dataclass(frozen=True)
class Result:
    """Figures of a run; sizes in bytes, times in milliseconds, accuracies in [0, 1].

    Attributes:
        images: of the test set.
        accuracy_dense: of the trained dense network on the test set.
        accuracy_sparse: of the accelerated network on the same images.
        sparsity: share of zeros over all convolutions and linear layers.
        dense_bytes: of the dense network as a safetensors file.
        file_bytes: of the saved accelerated network.
        dense_layout: the faster memory layout of the dense network.
        dense_p50_ms: its median latency at batch 1, eager.
        fast_p50_ms: that of the accelerated network, timed in turn with it.
        dense_iqr_ms: spread of the former.
        fast_iqr_ms: spread of the latter.
        threads: used for these.
        reload_diff: largest difference of a logit after reloading in a fresh process.
        reload_bitwise: whether all were equal bit for bit.
        seconds: of the whole run.
        quick: whether accuracy was not checked.
    """

    schema_version: ClassVar[int] = 1

    images: int
    accuracy_dense: float
    accuracy_sparse: float
    sparsity: float
    dense_bytes: int
    file_bytes: int
    dense_layout: str
    dense_p50_ms: float
    fast_p50_ms: float
    dense_iqr_ms: float
    fast_iqr_ms: float
    threads: int
    reload_diff: float
    reload_bitwise: bool
    seconds: float
    quick: bool

    @property
    def drop(self) -> float:
        """Accuracy lost, as a share; negative when the sparse network is better."""
        return self.accuracy_dense - self.accuracy_sparse

    @property
    def speedup(self) -> float:
        """Median latency of the dense network over that of the accelerated one."""
        return self.dense_p50_ms / self.fast_p50_ms

    def failures(self) -> list[str]:
        """What the run promised and did not keep, one sentence each; empty for success."""
        failed = []
        if not self.quick and self.drop > MAX_DROP + 1e-12:
            failed.append(
                f"accuracy fell by {self.drop * 100:.2f} points, at most {MAX_DROP * 100:.0f} is "
                "allowed; train longer with --epochs or prune less with --sparsity"
            )
        if not self.reload_diff <= MAX_RELOAD_DIFF:  # NaN fails too
            failed.append(
                f"the reloaded model differs by {self.reload_diff:.3g}, at most "
                f"{MAX_RELOAD_DIFF:g} is allowed"
            )
        return failed

    def to_dict(self) -> dict[str, object]:
        """The fields and what follows from them, for JSON."""
        return {
            "schema_version": self.schema_version,
            **asdict(self),
            "accuracy_drop": self.drop,
            "speedup": self.speedup,
            "failures": self.failures(),
        }


def run(settings: Settings, progress: Progress) -> tuple[Result, Report]:
    """Run the demo and write `report.html`, `report.json`, `summary.json`, `model.safetensors`.

    Args:
        settings: what to run.
        progress: started rich progress display; tasks are added to it.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
        OSError: the results cannot be written.
        ReloadError: the fresh process could not load the file.

    Cost: with the default settings about two minutes on two cores.
    """
    begin = time.perf_counter()
    data = _subset(digits(32, settings.seed), settings.quick)
    settings.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(settings.device)
    with _seeded(settings.seed), _threads(_cores()):
        dense = ResNet20(settings.width).to(device)
        _train(dense, data, settings.epochs, LEARNING_RATE, settings.seed, progress, "train")
        sparse = copy.deepcopy(dense)
        _prune(sparse, data, settings, progress)
    with _threads(settings.threads):
        dense, sparse = dense.eval(), sparse.eval()
        images, labels = (part.to(device) for part in data.test.tensors)
        with _task(progress, "accelerate: time every kernel"):
            fast = accelerate(sparse, images[:1])
        assert isinstance(fast.report, Report)
        with _task(progress, "compare latencies"):
            stats, layout = compare_latency(dense, fast, images[:1])
        target = settings.out / "model.safetensors"
        save(fast, target)
        with torch.inference_mode():
            logits = fast(images).cpu()
        with _task(progress, "reload in a fresh process"):
            again = reload(target, settings.width, settings.seed, settings.threads, settings.device)
        result = Result(
            images=len(labels),
            accuracy_dense=accuracy(dense, [(images, labels)])["top1"],
            accuracy_sparse=accuracy(fast, [(images, labels)])["top1"],
            sparsity=sparsity(fast).element,
            dense_bytes=model_size(dense)["file_bytes"],
            file_bytes=target.stat().st_size,
            dense_layout=layout,
            dense_p50_ms=stats[layout].median_s * 1e3,
            fast_p50_ms=stats["accelerated"].median_s * 1e3,
            dense_iqr_ms=stats[layout].iqr_s * 1e3,
            fast_iqr_ms=stats["accelerated"].iqr_s * 1e3,
            threads=settings.threads,
            reload_diff=float((again - logits).abs().max()),
            reload_bitwise=torch.equal(again, logits),
            seconds=time.perf_counter() - begin,
            quick=settings.quick,
        )
    report = fast.report
    report.notes += _notes(result)
    report.to_json(settings.out / "report.json")
    report.to_html(settings.out / "report.html")
    text = json.dumps(result.to_dict(), indent=2) + "\n"
    (settings.out / "summary.json").write_text(text, encoding="utf-8")
    return result, report


def compare_latency(
    dense: nn.Module, fast: nn.Module, x: Tensor
) -> tuple[dict[str, LatencyStats], str]:
    """Time a dense network in both memory layouts in turn with its accelerated form.

    Args:
        dense: the network in evaluation mode; not changed.
        fast: what `accelerate` made of it.
        x: input (N, C, H, W) on their device.

    Returns:
        Statistics of "contiguous", "channels_last" and "accelerated", and which of the first two
        is faster.
    """
    fns: dict[str, Callable[[], object]] = {}
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for name, form in layouts.items():
        model = copy.deepcopy(dense).to(memory_format=form)  # type: ignore[call-overload]
        fns[name] = _call(model, x.contiguous(memory_format=form))
    fns["accelerated"] = _call(fast, x)
    stats = time_interleaved(fns, warmup=20, runs=200, max_time_s=20.0, device=x.device)
    return stats, min(layouts, key=lambda name: stats[name].median_s)


def _train(
    model: nn.Module,
    data: Digits,
    epochs: int,
    rate: float,
    seed: int,
    progress: Progress,
    title: str,
    pruner: Pruner | None = None,
) -> None:
    device = next(model.parameters()).device
    images, labels = (part.to(device) for part in data.train.tensors)
    if device.type == "cpu":
        # Training convolutions take about half the time of the contiguous layout on the CPU.
        images = images.contiguous(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = steps_per_epoch(len(labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    if pruner is not None:
        pruner.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    task = progress.add_task(title, total=epochs * steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(labels), generator=generator).to(device)
        for batch in order[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            plan.step()
            progress.advance(task)
        found = accuracy(model, _batches(data.val))["top1"]
        text = f"{title} {epoch + 1}/{epochs}, validation {found:.1%}"
        if pruner is not None:
            text += f", zeros {pruner.sparsity().element:.1%}"
        progress.update(task, description=text)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _prune(model: nn.Module, data: Digits, settings: Settings, progress: Progress) -> None:
    steps = steps_per_epoch(len(data.train)) * settings.finetune_epochs
    end = max(2, round(steps * PRUNING_SHARE))
    schedule = Polynomial(begin=1, end=end, every=max(1, end // 12))
    pruner = Pruner(
        model,
        importance=Magnitude(sparsity=settings.sparsity),
        schedule=schedule,
        targets=find_targets(model, ignore=KEPT_DENSE),
    )
    _train(
        model, data, settings.finetune_epochs, LEARNING_RATE, settings.seed + 1, progress,
        "prune, fine-tune", pruner,
    )  # fmt: skip
    pruner.finalize()


def steps_per_epoch(images: int) -> int:
    """Batches of an epoch; a last one too small for batch statistics is left out."""
    return max(1, images // BATCH)


def _batches(part: TensorDataset) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = part.tensors
    yield from zip(images.split(256), labels.split(256), strict=True)


def _subset(data: Digits, quick: bool) -> Digits:
    """The data, or for a quick run a small part for training; the test set stays whole."""
    if not quick:
        return data
    train = TensorDataset(*(t[:256] for t in data.train.tensors))
    val = TensorDataset(*(t[:64] for t in data.val.tensors))
    return Digits(train, val, data.test)


def _notes(result: Result) -> list[str]:
    same = "bit for bit" if result.reload_bitwise else f"within {result.reload_diff:.2g}"
    return [
        f"test accuracy on {result.images} images: dense {result.accuracy_dense:.2%}, "
        f"sparse {result.accuracy_sparse:.2%} at {result.sparsity:.1%} zeros",
        f"dense eager network, {result.dense_layout} (its best layout): "
        f"{result.dense_p50_ms:.2f} ms; accelerated: {result.fast_p50_ms:.2f} ms; "
        f"{result.speedup:.2f}x at batch 1 on {result.threads} thread(s)",
        f"file: {result.dense_bytes:,} -> {result.file_bytes:,} bytes",
        f"reloaded by a fresh process, logits on the test set equal {same}",
    ]


@contextmanager
def _task(progress: Progress, title: str) -> Iterator[None]:
    """A pulsing bar for work of unknown length."""
    task = progress.add_task(title, total=None)
    yield
    progress.update(task, total=1, completed=1)


def _call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: model(x)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights from `seed`, the caller's random state as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
