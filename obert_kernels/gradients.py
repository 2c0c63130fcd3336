"""Mini-batch gradients of a model's loss with respect to the weights to prune."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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


class Tap(torch.autograd.Function):
    """The identity on a layer's output; hands input and output gradient to a receiver.

    What it saves is saved by autograd, so that checkpointing and saved-tensor hooks see it.  The
    anchor, a leaf, makes an output of frozen layers part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, receive: Any) -> Tensor:
        """Return a copy of the output."""
        ctx.save_for_backward(inputs)
        ctx.receive = receive
        return output.clone()  # what comes next may change it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Call the receiver."""
        (inputs,) = ctx.saved_tensors
        ctx.receive(inputs, grad)
        return grad, None, None, None


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """A hook, for a while."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(model: nn.Module, anchor: Tensor) -> Iterator[None]:
    """Eval mode, and no parameter collects a gradient; embeddings still start a graph."""

    def enter(module: nn.Module, args: tuple, output: Any) -> Any:
        # A checkpointed segment needs an input that requires a gradient.
        if torch.is_grad_enabled() and isinstance(output, Tensor):
            return Tap.apply(output, anchor, output.new_empty(0), lambda a, d: None)
        return None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(evaluation(model, []))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.enter_context(removed(module.register_forward_hook(enter)))
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def anchor_of(weights: Mapping[str, nn.Parameter]) -> Tensor:
    """Return a leaf of the graph, on the device of the weights."""
    with torch.inference_mode(False):
        return torch.zeros((), requires_grad=True, device=next(iter(weights.values())).device)


@contextmanager
def grads_of(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode; a backward pass leaves gradients in ``.grad`` of the weights and nowhere else.

    (``torch.autograd.grad`` would not go into segments of a reentrant checkpoint.)  What was in
    ``.grad`` is there again afterwards.
    """
    held = {name: weight.grad for name, weight in weights.items()}
    with frozen(model, anchor_of(weights)), torch.inference_mode(False), torch.enable_grad():
        try:
            for weight in weights.values():
                weight.grad = None
                weight.requires_grad_(True)
            yield
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(False)
                weight.grad = held[name]


def batch_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    num_grads: int,
    loss_fn: LossFn | None = None,
    *,
    first_index: int = 0,
) -> Iterator[dict[str, Tensor]]:
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
        first_index: number of the first batch, for messages.

    Yields:
        name to gradient in the shape and type of the weight; zeros where the loss does not
        depend on it.

    Raises:
        ValueError: too few batches, a loss that is not a finite scalar or depends on none of the
            weights, or a gradient with NaN or infinity (the message names batch and matrix).
        TypeError: no loss could be had from the batch, see :func:`model_loss`.
    """
    loss_fn = loss_fn or model_loss
    device = next(iter(weights.values())).device
    with evaluation(model, []):
        for index, batch in enumerate(take_batches(batches, num_grads), first_index):
            with grads_of(model, weights):
                loss = loss_fn(model, to_device(batch, device))
                check_loss(loss, index)
                loss.backward()
                found = {name: weight.grad for name, weight in weights.items()}
            check_reached(any(gradient is not None for gradient in found.values()), index)
            gradients = {
                name: torch.zeros_like(weights[name]) if gradient is None else gradient
                for name, gradient in found.items()
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


def check_reached(reached: bool, index: int) -> None:
    """Raise ValueError unless the backward pass came to any of the weights."""
    if not reached:
        raise ValueError(
            f"batch {index}: the loss depends on none of the matrices to prune; compute it with "
            "this model, and with use_reentrant=False where it is checkpointed"
        )


def _check_finite(gradients: Mapping[str, Tensor], index: int) -> None:
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"batch {index}: the gradient of {name} holds NaN or infinity; leave that batch "
                "out, or compute gradients in float32"
            )
