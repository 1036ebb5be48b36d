"""What is zero: sparsity per layer, of entries and of whole groups.

A kernel, filter or column counts as zero only if all of its entries are: 90 % zero entries
usually contain not one zero filter, and a report that says otherwise promises a speed-up that
no dense kernel can deliver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .granularity import channel, filter_, kernel, shape
from .targets import SUPPORTED, Target, candidate_targets

if TYPE_CHECKING:
    from rich.table import Table

_GROUPS = {"kernel": kernel, "filter": filter_, "channel": channel, "column": shape}


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one weight. The last five are shares in [0, 1] of that kind of group.

    Attributes:
        name: qualified name of the layer.
        type: class of the layer.
        shape: of W, (K, C/G, R, S) or (O, I).
        elements: entries of W.
        zeros: zero entries.
        element: zeros / elements.
        kernel: all-zero kernels W[k, c].
        filter: all-zero filters W[k].
        channel: input channels that no filter of their conv group reads.
        column: all-zero columns W[:, c, r, s] of a conv group.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    elements: int
    zeros: int
    element: float
    kernel: float
    filter: float
    channel: float
    column: float


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity of a model's prunable weights; `str` is a table, `__rich__` a rich one.

    Attributes:
        layers: one entry per weight, in registration order.
    """

    layers: list[LayerSparsity] = field(default_factory=list)

    @property
    def elements(self) -> int:
        """Entries of all layers."""
        return sum(entry.elements for entry in self.layers)

    @property
    def zeros(self) -> int:
        """Zero entries of all layers."""
        return sum(entry.zeros for entry in self.layers)

    @property
    def element(self) -> float:
        """Share of zero entries over all layers, 0 for no layers."""
        return self.zeros / self.elements if self.elements else 0.0

    def __getitem__(self, name: str) -> LayerSparsity:
        for entry in self.layers:
            if entry.name == name:
                return entry
        known = ", ".join(repr(entry.name) for entry in self.layers[:8])
        raise KeyError(f"SparsityReport: expected one of {known}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema_version": 1,
            "elements": self.elements,
            "zeros": self.zeros,
            "element": self.element,
            "layers": [asdict(entry) | {"shape": list(entry.shape)} for entry in self.layers],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SparsityReport:
        """Inverse of `to_dict`.

        Raises:
            ValueError: written by another schema.
        """
        if data.get("schema_version") != 1:
            raise ValueError(
                f"SparsityReport: expected schema_version 1, got {data.get('schema_version')!r}"
            )
        layers = [LayerSparsity(**(e | {"shape": tuple(e["shape"])})) for e in data["layers"]]
        return cls(layers)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="sparsity: zero entries and whole zero groups")
        for heading in ("layer", "type", "weight"):
            table.add_column(heading, no_wrap=True)
        for heading in ("zeros", "element", *_GROUPS):
            table.add_column(heading, justify="right", no_wrap=True)
        for entry in self.layers:
            table.add_row(
                entry.name or "(model)",
                entry.type,
                "x".join(map(str, entry.shape)),
                f"{entry.zeros}/{entry.elements}",
                f"{entry.element:.1%}",
                *(f"{getattr(entry, kind):.1%}" for kind in _GROUPS),
            )
        table.add_section()
        table.add_row("all", "", "", f"{self.zeros}/{self.elements}", f"{self.element:.1%}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        # Wide enough for any layer name: a table in a log file must not be cut.
        widest = max([len(entry.name) for entry in self.layers], default=0)
        console = Console(width=widest + 120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def sparsity(model: nn.Module) -> SparsityReport:
    """Count the zeros of every convolution and linear layer, whoever made them.

    Plain zeros, masks of `Pruner` and of torch.nn.utils.prune count alike; layers swapped by
    sparsecnn are counted through their dense form. The classifier is included.

    Args:
        model: any module with such layers.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no such layer.
    """
    return report_of(_readable_targets(model))


def _readable_targets(model: nn.Module) -> list[Target]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsity: expected model to be a torch.nn.Module, got {model!r:.80}")
    swapped = {
        name: module
        for name, module in model.named_modules()
        if getattr(type(module), "is_sparsecnn_layer", False)
    }
    if not swapped:
        return candidate_targets(model)
    dense = {name: module.to_dense() for name, module in swapped.items()}
    targets = {name: Target(layer, "weight", name) for name, layer in dense.items()}
    if any(isinstance(m, SUPPORTED) for m in model.modules()):
        for target in candidate_targets(model):
            targets.setdefault(target.name, target)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(targets.values(), key=lambda t: order[t.name])


def report_of(targets: Sequence[Target]) -> SparsityReport:
    """The report for given weights, read as the forward pass sees them."""
    return SparsityReport([_layer(t, t.weight.detach()) for t in targets])


def _layer(t: Target, weight: Tensor) -> LayerSparsity:
    alive = weight != 0
    zeros = int((~alive).sum())
    share = {
        kind: _share_of_false(granularity.reduce(alive, t, "max"))
        for kind, granularity in _GROUPS.items()
    }
    return LayerSparsity(
        name=t.name,
        # A masked layer has a generated class; the user knows the one before.
        type=parametrize.type_before_parametrizations(t.module).__name__,
        shape=tuple(weight.shape),
        elements=alive.numel(),
        zeros=zeros,
        element=zeros / alive.numel() if alive.numel() else 0.0,
        **share,
    )


def _share_of_false(flags: Tensor) -> float:
    """Exact, because it is a quotient of integers; 0 for no flags."""
    return int((~flags).sum()) / flags.numel() if flags.numel() else 0.0
