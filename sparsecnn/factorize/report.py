"""What `factorize_` did, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """One layer.

    Attributes:
        name: qualified name.
        type: class name of the layer.
        method: registered name.
        ranks: chosen ranks; empty where the layer stayed dense.
        full_ranks: at which the chain equals the layer.
        weight_error: ||W - W_hat|| / ||W||.
        response_error: ||y - y_hat|| / ||y|| on the example inputs, bias included.
        dense_macs: of the layer for one image.
        macs: after the pass.
        dense_params: weights of the layer.
        params: after the pass.
        dense_us: measured time of the layer, its better memory format; 0 if not measured.
        convs_us: of the stages one after the other.
        chain_us: of the stages as one kernel; None where there is no such kernel.
        reason: why the layer stayed dense; empty where it did not.
        note: what the method says of its solution; mostly empty.
    """

    name: str
    type: str
    method: str = ""
    ranks: tuple[int, ...] = ()
    full_ranks: tuple[int, ...] = ()
    weight_error: float = 0.0
    response_error: float = 0.0
    dense_macs: int = 0
    macs: int = 0
    dense_params: int = 0
    params: int = 0
    dense_us: float = 0.0
    convs_us: float = 0.0
    chain_us: float | None = None
    reason: str = ""
    note: str = ""


@dataclass
class FactorizeReport:
    """All layers that the config addressed.

    Attributes:
        layers: in the order of their calls.
        notes: what else was done to the model.
    """

    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The report of one layer.

        Raises:
            KeyError: the config did not address it.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def dense_macs(self) -> int:
        """MACs of the layers before, for one image."""
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def macs(self) -> int:
        """MACs of the layers after, for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def dense_params(self) -> int:
        """Weights of the layers before."""
        return sum(layer.dense_params for layer in self.layers)

    @property
    def params(self) -> int:
        """Weights of the layers after."""
        return sum(layer.params for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The table."""
        from rich.console import Console
        from rich.table import Table

        title = f"factorized {sum(not r.reason for r in self)} of {len(self.layers)} layers"
        table = Table(title=title)
        for heading in ("layer", "method"):
            table.add_column(heading, no_wrap=True)
        headings = ("ranks", "of", "weight", "response", "MACs", "params", "us", "convs", "chain")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for r in self.layers:
            if r.reason:
                time = [f"{r.dense_us:.0f}"] if r.dense_us else []
                table.add_row(r.name, r.method, "dense", *[""] * 5 * len(time), *time)
                continue
            table.add_row(
                r.name, r.method, _ranks(r.ranks), _ranks(r.full_ranks), f"{r.weight_error:.3f}",
                f"{r.response_error:.3f}", f"{r.dense_macs / max(r.macs, 1):.2f}x",
                f"{r.dense_params / max(r.params, 1):.2f}x", f"{r.dense_us:.0f}",
                f"{r.convs_us:.0f}", "-" if r.chain_us is None else f"{r.chain_us:.0f}",
            )  # fmt: skip
        console = Console(width=160)
        with console.capture() as capture:
            console.print(table)
        total = (
            f"MACs {self.dense_macs:,} > {self.macs:,} "
            f"({self.dense_macs / max(self.macs, 1):.2f}x), weights {self.dense_params:,} > "
            f"{self.params:,} ({self.dense_params / max(self.params, 1):.2f}x)"
        )
        kept = [f"{r.name} stays dense: {r.reason}" for r in self.layers if r.reason]
        said = [f"{r.name}: {r.note}" for r in self.layers if r.note]
        return "\n".join([capture.get().rstrip(), total, *kept, *said, *self.notes])


def _ranks(ranks: tuple[int, ...]) -> str:
    return ",".join(map(str, ranks))
