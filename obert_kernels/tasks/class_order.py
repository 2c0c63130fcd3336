"""Whether classes that have no common name were brought together rightly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..gradients.backward import evaluation
from .loaders import Batch
from .precision import autocast

# A class is taken for another one where the model gives it to so many texts, and so large a share
# of them is of the other.
_TEXTS, _SHARE = 5, 0.6


def check_order(
    name: str,
    model: nn.Module,
    batches: Iterable[Batch],
    class_names: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ValueError if a model's predictions say that its classes have another order.

    Two classes for each other, or more of them in a circle, are no matter of a model that is not
    good: it is right about the texts, under other numbers.

    Args:
        name: of the model.
        model: a classifier.
        batches: texts it was trained on, or alike.
        class_names: the classes of the data, in the order that is doubted.
        dtype: to compute in.
    """
    counts = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
    device = next(model.parameters()).device
    with evaluation(model), torch.inference_mode(), autocast(device, dtype):
        for batch in batches:
            found = model(**batch).logits.argmax(dim=-1).tolist()
            for given, meant in zip(found, batch["labels"].tolist(), strict=True):
                counts[given, meant] += 1
    circle = _circle(_mistaken(counts))
    if circle:
        pairs = ", ".join(f"{class_names[i]} for {class_names[j]}" for i, j in circle[:3])
        raise ValueError(
            f"the classes of {name} seem to be in another order than those of the data: taken in "
            f"order, it gives {pairs}; write the names of its classes into id2label of its "
            "config.json"
        )


def _mistaken(counts: Tensor) -> dict[int, int]:
    """Return which class, as the model numbers them, is most of the time which of the data."""
    found = {}
    for given, row in enumerate(counts):
        meant = int(row.argmax())
        if meant != given and row.sum() >= _TEXTS and row[meant] >= _SHARE * row.sum():
            found[given] = meant
    return found


def _circle(mistaken: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return the steps of a way that comes back to where it began, if there is one."""
    for start in mistaken:
        steps: list[tuple[int, int]] = []
        at = start
        while at in mistaken and len(steps) <= len(mistaken):
            steps.append((at, mistaken[at]))
            at = mistaken[at]
            if at == start:
                return steps
    return []
