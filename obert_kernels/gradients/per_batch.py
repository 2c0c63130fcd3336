"""Mini-batch gradients of a model's loss with respect to the weights to prune."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.status import NotFiniteError
from ..sparsity.wrappers import unwrapped
from .backward import backward, evaluation, grads_of
from .batches import to_device
from .ignored_labels import all_labels_ignored, require_some_label
from .losses import LossFn, model_loss
from .source import BatchSource


def batch_gradients(
    model: nn.Module,
    batches: Iterable[Any] | BatchSource,
    weights: Mapping[str, nn.Parameter],
    num_grads: int,
    loss_fn: LossFn | None = None,
    *,
    is_part: bool = False,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield one gradient of the mean batch loss per batch, ``num_grads`` in all.

    The model runs in eval mode and is put back afterwards, ``.grad`` as well, so that a training
    step under way loses nothing.

    Args:
        model: any module.
        batches: an iterable of batches; it is started over when it ends early.
        weights: name to parameter, the gradients wanted.
        num_grads: how many gradients.
        loss_fn: ``loss_fn(model, batch)`` returning a scalar; None: :func:`model_loss` (where
            :func:`obert_kernels.prune` takes :func:`prediction_loss` for classifiers).
        is_part: there are other weights, so that a batch may reach none of these.

    Yields:
        name to gradient in the shape and type of the weight; zeros where the loss does not
        depend on it, and of a batch with labels of -100 alone.

    Raises:
        ValueError: too few batches, or labels of -100 alone in all; a loss that is not a finite
            scalar or depends on none of the weights, or a gradient with NaN or infinity (the
            message names batch and matrix).
        TypeError: no loss could be had from the batch, see :func:`model_loss`.
    """
    model, loss_fn = unwrapped(model), loss_fn or model_loss
    device = next(iter(weights.values())).device
    any_counts = False
    with evaluation(model):  # also while the caller makes a batch, maybe with this model
        for index, (where, batch) in enumerate(BatchSource.of(batches).take(num_grads)):
            with grads_of(model, weights):
                loss = loss_fn(model, to_device(batch, device))
                counts = not all_labels_ignored(batch, loss)
                if counts:
                    check_loss(loss, where)
                    backward(loss, weights.values())
                found = {name: weight.grad for name, weight in weights.items()}
            any_counts |= counts
            if index == num_grads - 1:
                require_some_label(any_counts)
            if counts and not is_part:
                check_reached(any(gradient is not None for gradient in found.values()), where)
            gradients = {
                name: torch.zeros_like(weights[name]) if gradient is None else gradient
                for name, gradient in found.items()
            }
            _check_finite(gradients, where)
            del loss, found
            yield gradients
            del gradients  # there are to be those of one batch alone


def check_loss(loss: Any, where: str) -> None:
    """Raise ValueError unless the loss is a finite scalar with a gradient."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a {type(loss).__name__}"
        if isinstance(loss, Tensor):
            got = f"one of shape {list(loss.shape)}"
        raise ValueError(
            f"{where}: the loss must be a scalar tensor, got {got}: return the mean over the "
            "samples from loss_fn"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{where}: the loss has no gradient: it was computed under torch.no_grad, is detached, "
            "or depends on none of the matrices to prune"
        )
    if not torch.isfinite(loss):
        raise NotFiniteError(
            f"{where}: the loss is {loss.item()}; check its inputs and labels, or the model, or "
            "compute in float32 without autocast"
        )


def check_reached(reached: bool, where: str) -> None:
    """Raise ValueError unless the backward pass came to any of the weights."""
    if not reached:
        raise ValueError(
            f"{where}: the loss depends on none of the matrices to prune; compute it with "
            "this model, and with use_reentrant=False where it is checkpointed"
        )


def _check_finite(gradients: Mapping[str, Tensor], where: str) -> None:
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            raise not_finite(name, where)


def not_finite(name: str, where: str) -> NotFiniteError:
    """The error of a matrix whose gradient cannot be used."""
    return NotFiniteError(
        f"{where}: the gradient of {name} holds NaN or infinity; leave that batch out, or compute "
        "gradients in float32 without autocast"
    )
