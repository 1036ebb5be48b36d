"""Top-k accuracy on a labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sparsecnn._models import evaluating

from ._inputs import check_count, check_model


def accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    topk: Sequence[int] = (1,),
    device: torch.device | str | None = None,
) -> dict[str, float | int]:
    """Share of the images whose label is among the k highest logits, over all of `loader`.

    Images are weighted equally whatever the batch sizes. Equal logits rank by class index, as
    `argmax` does; a NaN logit ranks above all numbers and never counts as a hit, so a model that
    outputs NaN scores 0.

    Args:
        model: classifier, (N, ...) -> logits (N, classes); evaluated in evaluation mode, each
            module's mode is restored.
        loader: batches (images, labels) with integer labels (N,).
        topk: the values of k.
        device: where to evaluate; `None` takes the model's own. The model is not moved.

    Returns:
        For each k "top<k>" in [0, 1] and "top<k>_correct", a count; "images", the number of images.

    Raises:
        TypeError: a wrong type, labels that are no integers.
        ValueError: no k, k outside [1, classes], no image, shapes that do not fit, labels outside
            [0, classes).
    """
    check_model("accuracy", model)
    if isinstance(topk, (str, int)) or not topk:
        raise ValueError(f"accuracy: expected topk with at least one k, got {topk!r}")
    for k in topk:
        check_count("accuracy", "topk", k, 1)
    if device is None:
        first = next(model.parameters(), None)
        device = first.device if first is not None else torch.device("cpu")
    correct = dict.fromkeys(topk, 0)
    images = 0
    with evaluating(model), torch.inference_mode():
        for batch in loader:
            x, labels = _batch(batch)
            ranks = _ranks(model(x.to(device)), labels.to(device), max(topk))
            images += len(ranks)
            for k in topk:
                correct[k] += int((ranks < k).sum())
    if images == 0:
        raise ValueError("accuracy: expected loader with at least one image, got none")
    result: dict[str, float | int] = {}
    for k in topk:
        result[f"top{k}"] = correct[k] / images
        result[f"top{k}_correct"] = correct[k]
    result["images"] = images
    return result


def _batch(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"accuracy: expected loader to yield (images, labels), got {type(batch).__name__}"
        )
    x, labels = batch
    if not isinstance(x, Tensor) or not isinstance(labels, Tensor):
        raise TypeError(
            "accuracy: expected loader to yield two tensors, got "
            f"{type(x).__name__} and {type(labels).__name__}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"accuracy: expected integer labels, got {labels.dtype}")
    return x, labels


def _ranks(logits: Tensor, labels: Tensor, most: int) -> Tensor:
    """Number of classes that rank before the label's, (N,); `classes` for a NaN logit."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"accuracy: expected model to return logits (N, classes), got {got}")
    classes = logits.shape[1]
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"accuracy: expected labels of shape ({logits.shape[0]},), got {tuple(labels.shape)}"
        )
    if most > classes:
        raise ValueError(f"accuracy: expected topk <= {classes} classes, got {most}")
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"accuracy: expected labels in [0, {classes}), got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    column = labels.long().unsqueeze(1)
    own = logits.gather(1, column)
    index = torch.arange(classes, device=logits.device)
    before = (logits > own) | ((logits == own) & (index < column)) | logits.isnan()
    return before.sum(dim=1).masked_fill(own.squeeze(1).isnan(), classes)
