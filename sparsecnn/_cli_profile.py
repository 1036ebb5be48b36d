"""`sparsecnn profile`: what one forward pass of a network costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsecnn.measure import (
    count_macs,
    energy,
    environment,
    model_size,
    peak_memory,
    time_interleaved,
)

if TYPE_CHECKING:
    from rich.table import Table


def profile(
    name: str, model: nn.Module, x: Tensor, runs: int, step: Callable[[str], None]
) -> dict[str, Any]:
    """Count and measure one forward pass.

    Args:
        name: of the model.
        model: in evaluation mode, on the device of `x`.
        x: input (N, C, H, W).
        runs: timed passes.
        step: called with the name of each part before it starts.

    Returns:
        Plain values for JSON: counts, bytes, seconds, joules or None with the reason.
    """
    step("count MACs")
    cost = count_macs(model, x)
    step("sizes")
    size = model_size(model)
    step("latency")
    stats = time_interleaved(
        {"model": lambda: model(x)}, warmup=10, runs=runs, max_time_s=120.0, device=x.device
    )["model"]
    step("peak memory")
    peak = peak_memory(lambda: model(x), device=x.device)
    step("energy")
    used = energy(lambda: model(x), device=x.device)
    layers = {
        layer: {
            "type": entry.type,
            "weight_shape": list(entry.weight_shape),
            "macs": entry.dense_macs,
            "effective_macs": entry.effective_macs,
            "params": entry.params,
            "nonzero_params": entry.nonzero_params,
        }
        for layer, entry in cost.layers.items()
    }
    return {
        "schema_version": 1,
        "model": name,
        "input": list(x.shape),
        "device": str(x.device),
        "macs": cost.dense_macs,
        "effective_macs": cost.effective_macs,
        "params": cost.params,
        "nonzero_params": cost.nonzero_params,
        "params_bytes": size["params_bytes"],
        "buffers_bytes": size["buffers_bytes"],
        "file_bytes": size["file_bytes"],
        "latency": stats.to_dict(),
        "images_per_s": stats.throughput(x.shape[0]),
        "peak_memory_bytes": peak,
        "energy": {"joules": used.joules, "source": used.source, "reason": used.reason},
        "layers": layers,
        "environment": environment(),
    }


def profile_table(figures: dict[str, Any]) -> Table:
    """The figures of `profile` for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    latency, used = figures["latency"], figures["energy"]
    where = figures["environment"]
    share = figures["effective_macs"] / max(figures["macs"], 1)
    nonzero = figures["nonzero_params"] / max(figures["params"], 1)
    joules = used["joules"]
    rows = [
        ("input", "x".join(map(str, figures["input"])) + f" on {figures['device']}"),
        ("MACs", f"{figures['macs']:,}"),
        ("MACs with a nonzero weight", f"{figures['effective_macs']:,} ({share:.1%})"),
        ("parameters", f"{figures['params']:,}"),
        ("nonzero parameters", f"{figures['nonzero_params']:,} ({nonzero:.1%})"),
        ("stored as safetensors", f"{figures['file_bytes']:,} bytes"),
        (
            "latency p50 / p90 / p99",
            " / ".join(f"{latency[k] * 1e3:.3f}" for k in ("median_s", "p90_s", "p99_s"))
            + f" ms ({latency['runs']} runs, IQR {latency['iqr_s'] * 1e3:.3f} ms)",
        ),
        ("throughput", f"{figures['images_per_s']:,.1f} images/s"),
        ("peak memory of one pass", f"{figures['peak_memory_bytes']:,} bytes"),
        (
            "energy of one pass",
            f"not measured: {used['reason']}"
            if joules is None
            else f"{joules * 1e3:.3f} mJ ({used['reason']})",
        ),
        ("machine", f"{where['cuda'] or where['cpu']}, {where['threads']} thread(s)"),
        ("software", f"torch {where['torch']}, sparsecnn {where['sparsecnn']}, {where['isa']}"),
    ]
    table = Table(box=SIMPLE_HEAD, show_header=False, title=Text(figures["model"]), pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    return table
