"""How much each layer can lose: prune one layer at a time, evaluate, put it back.

Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017, section 3.2), choose every layer's
ratio from such curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsecnn._models import evaluating, progress_bar, refuse_sparse_layers

from .budget import Budget, check_share
from .importance import Magnitude, PruneConfig
from .mask import living, zero_dead_
from .parts import choose_granularity
from .protocols import Calibration
from .selection import TopK, plan_masks
from .targets import Target, check_maskable, find_targets

if TYPE_CHECKING:
    from rich.table import Table

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class LayerSensitivity:
    """Results of one layer.

    Attributes:
        name: qualified name of the layer.
        shape: of its weight.
        scores: of the model with this layer alone pruned, one per sparsity.
    """

    name: str
    shape: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Curves of all layers; `str` is a table, `__rich__` a rich one.

    Attributes:
        sparsities: shares of zeros tried, ascending.
        baseline: score of the unpruned model.
        granularity: what was pruned.
        layers: one entry per layer, in registration order.
    """

    sparsities: tuple[float, ...]
    baseline: float
    granularity: str
    layers: tuple[LayerSensitivity, ...]

    def highest(self, tolerance: float) -> dict[str, float]:
        """The largest tried sparsity of each layer up to which all scores stay near the baseline.

        Args:
            tolerance: loss of score that is accepted, >= 0.

        Returns:
            Layer name -> sparsity, 0 where the first one already loses more.

        Raises:
            ValueError: a negative tolerance.
        """
        if not tolerance >= 0:
            raise ValueError(f"highest: expected tolerance >= 0, got {tolerance}")
        found = {}
        for entry in self.layers:
            best = 0.0
            for share, score in zip(self.sparsities, entry.scores, strict=True):
                if score < self.baseline - tolerance:
                    break
                best = share
            found[entry.name] = best
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layers = [
            {"name": entry.name, "shape": list(entry.shape), "scores": list(entry.scores)}
            for entry in self.layers
        ]
        return {"schema_version": 1, **asdict(self), "sparsities": list(self.sparsities),
                "layers": layers}  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        """Inverse of `to_dict`.

        Raises:
            ValueError: written by another schema.
        """
        if data.get("schema_version") != 1:
            raise ValueError(
                f"Sensitivity: expected schema_version 1, got {data.get('schema_version')!r}"
            )
        layers = tuple(
            LayerSensitivity(e["name"], tuple(e["shape"]), tuple(e["scores"]))
            for e in data["layers"]
        )
        return cls(tuple(data["sparsities"]), data["baseline"], data["granularity"], layers)

    def to_svg(self) -> str:
        """The curves as an SVG document."""
        from sparsecnn.measure.curves import curves

        return curves(
            (0.0, *self.sparsities),
            {entry.name: (self.baseline, *entry.scores) for entry in self.layers},
            title=f"sensitivity of single layers, granularity {self.granularity}",
            x_label="sparsity of the layer",
            y_label="score",
            reference=self.baseline,
        )

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"score with one layer pruned ({self.granularity}); unpruned {self.baseline:.4g}"
        table = Table(title=title)
        for heading in ("layer", "weight"):
            table.add_column(heading, no_wrap=True)
        for share in self.sparsities:
            table.add_column(f"{share:.0%}", justify="right", no_wrap=True)
        for entry in self.layers:
            scores = [f"{score:.4g}" for score in entry.scores]
            table.add_row(entry.name, "x".join(map(str, entry.shape)), *scores)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        widest = max(len(entry.name) for entry in self.layers)
        console = Console(width=widest + 140, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return "\n".join(row.rstrip() for row in capture.get().splitlines())


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    importance: PruneConfig | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    targets: Sequence[Target] | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Score the model with each layer alone pruned to each sparsity, without training.

    Args:
        model: any module with prunable layers; every weight is put back bit for bit, also after
            an error. Evaluated in evaluation mode, modes are restored.
        evaluate: `evaluate(model)`, higher = better, e.g. accuracy on validation images.
        importance: which weights go first, with its granularity; default `Magnitude()`. Its own
            budget plays no part.
        sparsities: shares of zeros, ascending in (0, 1).
        targets: the layers; default `find_targets(model, example_inputs)`.
        example_inputs: see `find_targets`.
        calibration: collects what the importance needs, once.
        progress: show a bar on a terminal.

    Returns:
        The curves.

    Raises:
        ValueError: bad sparsities, a layer that cannot be pruned, or a score that is no number.

    Cost: layers * sparsities + 1 evaluations.
    """
    refuse_sparse_layers(model, "sensitivity")
    shares = tuple(check_share(s, "sparsities", "sensitivity") for s in sparsities)
    if not shares or any(not 0 < s < 1 for s in shares) or list(shares) != sorted(set(shares)):
        raise ValueError(f"sensitivity: expected sparsities ascending in (0, 1), got {sparsities}")
    config = Magnitude() if importance is None else importance
    granularity = choose_granularity(None, config)
    chosen = list(find_targets(model, example_inputs) if targets is None else targets)
    for t in chosen:
        check_maskable(t, "sensitivity")
    stats = None
    if config.needs:
        if calibration is None:
            raise ValueError(
                f"sensitivity: expected calibration to collect {', '.join(sorted(config.needs))}, "
                "got None"
            )
        stats = calibration.collect(model, chosen, config.needs)

    def score() -> float:
        value = float(evaluate(model))
        if math.isnan(value):
            raise ValueError("sensitivity: expected evaluate to return a number, got NaN")
        return value

    layers = []
    total = len(chosen) * len(shares)
    with progress_bar(progress, "sensitivity", total) as tick, evaluating(model), torch.no_grad():
        baseline = score()
        for t in chosen:
            original = t.dense.detach().clone()
            scores = []
            try:
                for share in shares:
                    budget, alive = Budget(sparsity=share), {t: living(t, False)}
                    _, masks = plan_masks([t], granularity, budget, config, TopK(), stats, alive)
                    zero_dead_(t.dense, masks[t].to(t.dense.device))
                    scores.append(score())
                    t.dense.copy_(original)
                    tick()
            finally:
                t.dense.copy_(original)
            layers.append(LayerSensitivity(t.name, tuple(t.shape), tuple(scores)))
    return Sensitivity(shares, baseline, str(granularity), tuple(layers))
