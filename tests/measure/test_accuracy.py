"""Accuracy against counts made by hand; logits are given, so every hit is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsecnn.measure import accuracy

NAN = float("nan")
# Rank of class 0 in each row: 0, 1, 2, 3.
LOGITS = torch.tensor([[4.0, 3, 2, 1], [3, 4, 2, 1], [2, 3, 4, 1], [1.0, 2, 3, 4]])
FIRST = torch.zeros(4, dtype=torch.long)


def test_top_k_by_hand():
    result = accuracy(nn.Identity(), [(LOGITS, FIRST)], topk=(1, 2, 4))
    assert result == {
        "top1": 0.25,
        "top1_correct": 1,
        "top2": 0.5,
        "top2_correct": 2,
        "top4": 1.0,
        "top4_correct": 4,
        "images": 4,
    }


def test_images_weigh_the_same_in_batches_of_any_size():
    whole = accuracy(nn.Identity(), [(LOGITS, FIRST)])
    uneven = [(LOGITS[:1], FIRST[:1]), (LOGITS[1:], FIRST[1:]), (LOGITS[:0], FIRST[:0])]
    assert accuracy(nn.Identity(), iter(uneven)) == whole


def test_top1_is_argmax_on_ties():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (500, 5), generator=generator).float()
    labels = torch.randint(0, 5, (500,), generator=generator)
    result = accuracy(nn.Identity(), [(logits, labels)])
    assert result["top1_correct"] == int((logits.argmax(1) == labels).sum())


def test_nan_never_hits():
    logits = torch.tensor([[NAN, NAN, NAN], [NAN, 1, 2], [5, NAN, 2], [5, 1, 2]])
    result = accuracy(nn.Identity(), [(logits, torch.zeros(4, dtype=torch.long))], topk=(1, 3))
    assert (result["top1_correct"], result["top3_correct"]) == (1, 2)


def test_evaluates_in_eval_mode_without_gradients_and_restores_modes():
    seen: list[tuple[bool, bool]] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return self.norm(x)

    model = Spy().train()
    model.norm.eval()
    accuracy(model, [(LOGITS, FIRST)])
    assert seen == [(False, False)]
    assert model.training and not model.norm.training
    assert model.norm.num_batches_tracked == 0


def test_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4)).train()
    with pytest.raises(RuntimeError):
        accuracy(model, [(torch.ones(2, 3), FIRST[:2])])
    assert model.training


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loader": []}, ValueError, "loader with at least one image, got none"),
        ({"loader": [(LOGITS[:0], FIRST[:0])]}, ValueError, "at least one image, got none"),
        ({"loader": [LOGITS]}, TypeError, r"to yield \(images, labels\), got Tensor"),
        ({"loader": [(LOGITS, [0])]}, TypeError, "two tensors, got Tensor and list"),
        ({"loader": [(LOGITS, FIRST.float())]}, TypeError, "integer labels, got torch.float32"),
        ({"loader": [(LOGITS, FIRST[:3])]}, ValueError, r"labels of shape \(4,\), got \(3,\)"),
        ({"loader": [(LOGITS, FIRST + 4)]}, ValueError, r"labels in \[0, 4\), got 4 to 4"),
        ({"loader": [(LOGITS, FIRST - 1)]}, ValueError, r"labels in \[0, 4\), got -1 to -1"),
        ({"loader": [(LOGITS[None], FIRST)]}, ValueError, r"logits \(N, classes\), got \(1, 4, 4"),
        ({"topk": ()}, ValueError, "topk with at least one k"),
        ({"topk": 1}, ValueError, "topk with at least one k, got 1"),
        ({"topk": (0,)}, ValueError, "topk >= 1, got 0"),
        ({"topk": (1.0,)}, TypeError, "topk to be an int, got 1.0"),
        ({"topk": (1, 5)}, ValueError, "topk <= 4 classes, got 5"),
        ({"model": len}, TypeError, "model to be an nn.Module"),
    ],
)
def test_bad_arguments(changes: dict[str, object], error: type[Exception], message: str):
    arguments: dict[str, object] = {"model": nn.Identity(), "loader": [(LOGITS, FIRST)]}
    with pytest.raises(error, match=f"accuracy: expected .*{message}"):
        accuracy(**{**arguments, **changes})  # type: ignore[arg-type]
