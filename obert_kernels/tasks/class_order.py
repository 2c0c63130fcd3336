"""Whether classes that have no common name were brought together rightly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..gradients.backward import evaluation
from .loaders import Batch
from .precision import autocast

# A class is taken for another one where the model gives it to so many texts, and so large a share
# of them is of the other; and a circle of such classes counts if the texts that say so outnumber
# those that do not by so many standard errors, which chance does once in thirty thousand models.
_TEXTS, _SHARE, _ERRORS = 5, 0.6, 4.0


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
    said = _contradiction(counts, class_names)
    if said:
        raise ValueError(
            f"the classes of {name} seem to be in another order than those of the data: taken in "
            f"order, it {said}; write the names of its classes into id2label of its config.json"
        )


def _contradiction(counts: Tensor, class_names: Sequence[str]) -> str:
    """Return what speaks against the order, "" if nothing does.

    Args:
        counts: of texts, ``[class as the model numbers them, class of the data]``.
        class_names: of the data.
    """
    circle = _circle(_mistaken(counts))
    against, in_favour = (
        sum(int(counts[pair]) for pair in pairs) for pairs in (circle, [(i, i) for i, _ in circle])
    )
    if against - in_favour > _ERRORS * math.sqrt(against + in_favour):
        return "gives " + ", ".join(f"{class_names[i]} for {class_names[j]}" for i, j in circle[:3])
    # A model may give one class for two others; but learnt or not, it is right as often as if it
    # knew no more than how often each class comes.
    right, texts = int(counts.trace()), int(counts.sum())
    by_chance = float(counts.sum(dim=0) @ counts.sum(dim=1)) / max(texts, 1)
    if by_chance - right > _ERRORS * math.sqrt(by_chance):
        return f"is right about {right} of {texts} texts, where chance is {by_chance:.0f}"
    return ""


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
