"""Mini-batch gradients of a model's loss with respect to the weights to prune."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batches import take_batches, to_device
from .losses import LossFn, model_loss


@contextmanager
def evaluation(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Eval mode and gradients for ``weights``; everything as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        model.eval()
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for module in training:
            module.training = True


def batch_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    num_grads: int,
    loss_fn: LossFn | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield one gradient of the mean batch loss per batch, ``num_grads`` in all.

    The model runs in eval mode and is put back afterwards; no ``.grad`` is touched, so a
    training step under way loses nothing.

    Args:
        model: any module; with ``loss_fn=None`` it must return an output with ``.loss``.
        batches: an iterable of batches; it is started over when it ends early.
        weights: name to parameter, the gradients wanted.
        num_grads: how many gradients.
        loss_fn: ``loss_fn(model, batch)`` returning a scalar, the task loss.

    Yields:
        name to gradient in the shape and type of the weight; zeros where the loss does not
        depend on it.

    Raises:
        ValueError: too few batches, a loss that is not a finite scalar, or a gradient with
            NaN or infinity (the message names batch and matrix).
        TypeError: no loss could be had from the batch, see :func:`model_loss`.
    """
    loss_fn = loss_fn or model_loss
    names, parameters = list(weights), list(weights.values())
    device = parameters[0].device
    with evaluation(model, parameters):
        for index, batch in enumerate(take_batches(batches, num_grads)):
            with torch.inference_mode(False), torch.enable_grad():
                loss = loss_fn(model, to_device(batch, device))
                check_loss(loss, index)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = {
                name: torch.zeros_like(parameter) if gradient is None else gradient
                for name, parameter, gradient in zip(names, parameters, found, strict=True)
            }
            _check_finite(gradients, index)
            del loss, found
            yield gradients


def check_loss(loss: Any, index: int) -> None:
    """Raise ValueError unless the loss is a finite scalar with a gradient."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(f"batch {index}: the loss must be a scalar tensor, got {type(loss)}")
    if not loss.requires_grad:
        raise ValueError(
            f"batch {index}: the loss has no gradient; compute it without torch.no_grad"
        )
    if not torch.isfinite(loss):
        raise ValueError(
            f"batch {index}: the loss is {loss.item()}; check its inputs and labels, or the model"
        )


def _check_finite(gradients: Mapping[str, Tensor], index: int) -> None:
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"batch {index}: the gradient of {name} holds NaN or infinity; leave that batch "
                "out, or compute gradients in float32"
            )
