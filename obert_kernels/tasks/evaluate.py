"""How well a classifier does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..gradients.backward import evaluation
from ..gradients.batches import to_device
from ..ops.status import NumericalError
from ..progress import Progress
from .loaders import Batch
from .precision import autocast

EVALUATION_BATCH = 64  # texts


class Evaluation(NamedTuple):
    """How well a model does.

    Attributes:
        accuracy: share of texts whose class it gives right.
        loss: mean over the texts; NaN for a model that returns none.
    """

    accuracy: float
    loss: float


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    stage: str = "evaluate",
) -> Evaluation:
    """Return accuracy and loss of the model, in eval mode.

    Args:
        model: returns an output with ``.logits``, and ``.loss``, for ``model(**batch)``.
        loader: batches with ``labels``.
        dtype: to compute in, float32 or bfloat16.
        progress: called as ``progress(stage, done, total)``, in batches.
        stage: name given to ``progress``.

    Raises:
        NumericalError: the model gives NaN or infinite logits.
    """
    device = next(model.parameters()).device
    batches = loader if isinstance(loader, Sequence | DataLoader) else list(loader)
    right = total = 0
    loss = 0.0
    with evaluation(model), torch.inference_mode(), autocast(device, dtype):
        for index, batch in enumerate(batches):
            batch = to_device(batch, device)
            output = model(**batch)
            if not torch.isfinite(output.logits).all():
                raise NumericalError(
                    f"{stage}: the model gives NaN or infinite logits in "
                    f"{str(dtype).removeprefix('torch.')}"
                    + (": use --precision float32" if dtype == torch.bfloat16 else "")
                )
            found = output.logits.argmax(dim=-1)
            right += int((found == batch["labels"]).sum())
            total += len(found)
            own = getattr(output, "loss", None)
            loss += math.nan if own is None else float(own) * len(found)
            if progress is not None:
                progress(stage, index + 1, len(batches))
    return Evaluation(right / total, loss / total)


def accuracy(model: nn.Module, loader: Iterable[Batch], **options: Any) -> float:
    """Return the share of texts whose class the model gives right: see :func:`evaluate`."""
    return evaluate(model, loader, **options).accuracy
