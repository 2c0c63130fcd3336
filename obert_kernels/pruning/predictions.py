"""What a model makes of a few batches: its loss, and how sure it is of each class."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gradients.backward import evaluation
from ..gradients.batches import to_device
from ..gradients.losses import LossFn, class_logits, model_loss
from ..ops.status import NotFiniteError


class Predictions(NamedTuple):
    """What :func:`predict` returns.

    Attributes:
        loss: mean over the batches, every batch with the same weight.
        log_probabilities: float64 ``[samples, classes]``; None if the model does not give each
            sample one of several classes.
        broken: the first batch for which what counts of the two is not finite, if there is one.
    """

    loss: float
    log_probabilities: Tensor | None
    broken: int | None = None


def predict(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None = None) -> Predictions:
    """Return loss and predictions, in eval mode and without gradients.

    Args:
        model: what it returns is looked at for ``.logits``, as Hugging Face models have it.
        batches: as for :func:`obert_kernels.prune`.
        loss_fn: likewise.
    """
    loss_fn = loss_fn or model_loss
    device = next(model.parameters()).device
    losses: list[float] = []
    logits: list[Tensor | None] = []

    def note(module: nn.Module, args: object, output: Any) -> None:
        logits.append(class_logits(module, output))

    with evaluation(model), torch.no_grad(), model.register_forward_hook(note):
        for batch in batches:
            losses.append(float(loss_fn(model, to_device(batch, device))))
    known = [found.double() for found in logits if found is not None and found.dim() == 2]
    whole = known and len(known) == len(logits) and len({found.shape[1] for found in known}) == 1
    judged = known if whole else [torch.tensor(loss) for loss in losses]
    broken = (i for i, values in enumerate(judged) if not bool(torch.isfinite(values).all()))
    return Predictions(
        sum(losses) / len(losses),
        torch.cat(known).log_softmax(dim=1) if whole else None,
        next(broken, None),
    )


def divergence(before: Predictions, after: Predictions) -> float | None:
    """Return the Kullback-Leibler divergence of the classes' probabilities, before from after.

    Its second derivative by the weights, taken before pruning, is the Fisher matrix, so that this
    is what a pruning by the Fisher keeps small.

    Returns:
        Nats, mean over samples; None if there are no probabilities on both sides.
    """
    p, q = before.log_probabilities, after.log_probabilities
    if p is None or q is None or p.shape != q.shape:
        return None
    return float((p.exp() * (p - q)).sum(dim=1).mean())


class Calibration:
    """The batches that dampings are judged on, and what the model made of them before.

    Args:
        model: as it is before anything is pruned, when it is first asked for a change.
        batches: which the Fisher should not have seen.
        loss_fn: as for :func:`predict`.
        use: what they serve, for messages.

    Raises:
        ValueError: there are no batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFn | None = None,
        use: str = "the damping is chosen",
    ) -> None:
        self._use = use
        self._model, self.batches, self._loss_fn = model, list(batches), loss_fn
        if not self.batches:
            raise ValueError(
                "calibration is empty: pass batches to choose the damping on (an iterator may be "
                "used up), or a number as damping"
            )

    @cached_property
    def before(self) -> Predictions:
        """Of the model as it was when this was first asked for.

        Raises:
            NotFiniteError: they are not finite.
        """
        before = predict(self._model, self.batches, self._loss_fn)
        if before.broken is not None:
            raise NotFiniteError(
                f"batch {before.broken} of those that {self._use} on gives "
                f"{'a loss' if before.log_probabilities is None else 'logits'} with NaN or "
                "infinity before anything is pruned: leave it out, compute in float32 without "
                "autocast, or pass calibration="
            )
        return before

    def change(self) -> tuple[float, float | None]:
        """Loss of the model as it is now, and the divergence of its predictions from before."""
        after = predict(self._model, self.batches, self._loss_fn)
        return after.loss, divergence(self.before, after)
