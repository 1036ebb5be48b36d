"""Curves of single layers: what they prune, that they put it back, and how they are shown."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

from sparsecnn.prune import (
    Magnitude,
    Sensitivity,
    find_targets,
    register_importance,
    sensitivity,
    sparsity,
)

from .nets import mixed, weights


def zeros_of(model):
    return float(sparsity(model).zeros)


def test_each_layer_alone_is_pruned_and_put_back():
    model = mixed().train()
    model.hidden.eval()
    before = weights(model)
    modes = [m.training for m in model.modules()]
    seen = []

    def evaluate(candidate):
        assert candidate is model and not any(m.training for m in model.modules())
        seen.append({e.name: e.zeros for e in sparsity(model).layers if e.zeros})
        return zeros_of(model)

    found = sensitivity(model, evaluate, Magnitude(granularity="filter"), (0.25, 0.5))
    names = [t.name for t in find_targets(model)]
    assert [entry.name for entry in found.layers] == names
    assert len(seen) == 1 + 2 * len(names) and seen[0] == {}
    for name, pair in zip(names, zip(seen[1::2], seen[2::2], strict=True), strict=True):
        assert [list(zeroed) for zeroed in pair] == [[name], [name]]
    for entry, t in zip(found.layers, find_targets(model), strict=True):
        per_filter = t.dense[0].numel()
        kept = [round(t.shape[0] * share) * per_filter for share in (0.25, 0.5)]
        assert all(abs(s - k) <= per_filter for s, k in zip(entry.scores, kept, strict=True))
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m.training for m in model.modules()] == modes
    assert found.baseline == 0 and found.granularity == "filter"


def test_weights_come_back_after_an_error():
    model = mixed()
    before = weights(model)
    calls = []

    def evaluate(candidate):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return 0.0

    with pytest.raises(RuntimeError, match="out of memory"):
        sensitivity(model, evaluate, sparsities=(0.5, 0.9))
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_highest_stops_at_the_first_loss():
    found = Sensitivity.from_dict(
        json.loads(
            json.dumps(
                Sensitivity((0.5, 0.7, 0.9), 0.9, "element", ()).to_dict()
                | {
                    "layers": [
                        {"name": "a", "shape": [4, 2], "scores": [0.9, 0.89, 0.5]},
                        {"name": "b", "shape": [4], "scores": [0.7, 0.95, 0.95]},
                    ]
                }
            )
        )
    )
    assert found.highest(0.02) == {"a": 0.7, "b": 0.0}
    assert found.highest(0.5) == {"a": 0.9, "b": 0.9}
    assert Sensitivity.from_dict(found.to_dict()) == found
    assert "0.89" in str(found) and "90%" in str(found)
    image = ElementTree.fromstring(found.to_svg())
    circles = [e for e in image.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 * (4 + 1)  # the unpruned point, three shares, and the legend
    assert any("a: 0.89" in (e.text or "") for e in image.iter() if e.tag.endswith("title"))
    with pytest.raises(ValueError, match="tolerance >= 0, got -1"):
        found.highest(-1)
    with pytest.raises(ValueError, match="schema_version 1, got 2"):
        Sensitivity.from_dict({"schema_version": 2})


@register_importance(needs={"grad"})
def NeedsGradient(t, stats):
    return stats.get("grad", t).abs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": (0.9, 0.5)}, "ascending in (0, 1)"),
        ({"sparsities": ()}, "ascending in (0, 1)"),
        ({"sparsities": (1.0,)}, "ascending in (0, 1)"),
        ({"sparsities": (90,)}, "did you mean 0.9?"),
        ({"importance": NeedsGradient()}, "expected calibration to collect grad, got None"),
        ({"evaluate": lambda m: float("nan")}, "expected evaluate to return a number, got NaN"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError) as error:
        sensitivity(nn.Linear(3, 2), **({"evaluate": lambda m: 0.0} | arguments))
    assert message in str(error.value)
