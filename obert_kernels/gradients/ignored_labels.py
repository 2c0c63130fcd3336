"""Labels of -100: samples that a loss leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .batches import map_tensors, samples_in, tensors_in

# Of labels that are left out of a loss, as in torch and Hugging Face models.
IGNORED = -100


def all_labels_ignored(batch: Any, loss: Any) -> bool:
    """Did no sample of a batch count, so that the mean of its loss is no number?"""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or not bool((labels == IGNORED).all()):
        return False  # what is wrong with its loss is an error
    return not isinstance(loss, Tensor) or not (loss.requires_grad and loss.isfinite().all())


def require_some_label(any_counts: bool) -> None:
    """Raise ValueError if all batches were left out."""
    if not any_counts:
        raise ValueError(
            f"all labels of all batches are {IGNORED}, so that every sample is left out of the "
            "loss: give batches without labels (predictions need none), or pass loss_fn"
        )


def has_ignored_labels(batch: Any) -> bool:
    """Does it hold the label of samples that a loss leaves out?"""
    if isinstance(batch, Mapping):
        batch = batch.get("labels")
    labels = [tensor for tensor in tensors_in(batch) if tensor.dtype == torch.int64]
    return any(bool((tensor == IGNORED).any()) for tensor in labels)


def without_ignored_samples(batch: Any) -> Any:
    """The samples of a batch that are not left out of its loss; all if none would be left."""
    if samples_in(batch) is None or not has_ignored_labels(batch) or not isinstance(batch, Mapping):
        return batch
    counts = (batch["labels"] != IGNORED).flatten(1 if batch["labels"].dim() > 1 else 0)
    counts = counts.any(dim=1) if counts.dim() > 1 else counts
    return map_tensors(batch, lambda tensor: tensor[counts]) if bool(counts.any()) else batch
