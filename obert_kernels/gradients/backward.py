"""Backward passes that leave a model, and a training step under way, as they were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..sparsity.wrappers import wrappers_at_rest


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module as it was afterwards.

    An autocast around it all keeps its copies of weights until it ends, also of weights that have
    changed: they are dropped before and after.
    """
    training = [module for module in model.modules() if module.training]
    torch.clear_autocast_cache()
    try:
        model.eval()
        with wrappers_at_rest(model):
            yield
    finally:
        torch.clear_autocast_cache()
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
    """Eval mode, and no parameter collects a gradient; the first of them still starts a graph."""

    def enter(module: nn.Module, args: tuple, output: Any) -> Any:
        # A checkpointed segment needs an input that requires a gradient.
        if not isinstance(output, Tensor) or output.requires_grad or not torch.is_grad_enabled():
            return None
        if not output.is_floating_point():
            return None
        return Tap.apply(output, anchor, output.new_empty(0), lambda a, d: None)

    # What a module with others inside owns, say positions, is used where no hook sees it.
    bare = {
        id(parameter)
        for module in model.modules()
        if next(module.children(), None) is not None
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [(parameter, _take_grad(parameter)) for parameter in trained if id(parameter) in bare]
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                stack.enter_context(removed(module.register_forward_hook(enter)))
        try:
            for parameter in trained:
                parameter.requires_grad_(id(parameter) in bare)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for parameter, grad in held:
                _put_grad(parameter, grad)


def anchor_of(weights: Mapping[str, nn.Parameter]) -> Tensor:
    """Return a leaf of the graph, on the device of the weights."""
    with torch.inference_mode(False):
        return torch.zeros((), requires_grad=True, device=next(iter(weights.values())).device)


@contextmanager
def grads_of(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode; :func:`backward` leaves gradients in ``.grad`` of the weights.

    (``torch.autograd.grad`` would not go into segments of a reentrant checkpoint.)  What was in
    ``.grad`` is there again afterwards, and hooks of a training step are not called.
    """
    held = {name: _take_grad(weight) for name, weight in weights.items()}
    try:
        with frozen(model, anchor_of(weights)), torch.inference_mode(False), torch.enable_grad():
            try:
                for weight in weights.values():
                    weight.requires_grad_(True)
                yield
            finally:
                for weight in weights.values():
                    weight.requires_grad_(False)
    finally:
        for name, weight in weights.items():
            _put_grad(weight, held[name])


_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_Grad = tuple[Tensor | None, dict[str, Any]]


def _grad_of(tensor: Tensor) -> _Grad:
    """What a backward pass would add to, and the hooks it would call."""
    hooks = {name: getattr(tensor, name, None) for name in _HOOKS}
    return tensor.grad, {name: known for name, known in hooks.items() if known}


def _take_grad(tensor: Tensor) -> _Grad:
    """The same, and leave none of it there."""
    found = _grad_of(tensor)
    tensor.grad = None
    for name in found[1]:
        setattr(tensor, name, OrderedDict())
    return found


def _put_grad(tensor: Tensor, grad: _Grad) -> None:
    tensor.grad, hooks = grad
    for name, known in hooks.items():
        setattr(tensor, name, known)


def backward(loss: Tensor, weights: Iterable[nn.Parameter]) -> None:
    """Run the backward pass; of all leaves of the graph it changes the weights' ``.grad`` alone.

    A loss may depend on what is no part of the model: a head of its own, a larger model.  (What is
    used inside of a reentrant checkpoint alone is not seen here.)
    """
    own = {id(weight) for weight in weights}
    others = [leaf for leaf in _leaves(loss) if id(leaf) not in own]
    held = [(leaf, _grad_of(leaf)) for leaf in others]
    try:
        try:
            for leaf in others:
                _take_grad(leaf)
            loss.backward()
        finally:
            for leaf, grad in held:
                _put_grad(leaf, grad)
    except BaseException:  # maybe an interruption while they were put back
        for leaf, grad in held:
            _put_grad(leaf, grad)
        raise


def _leaves(loss: Tensor) -> list[Tensor]:
    """Tensors that a backward pass leaves gradients in."""
    found: dict[int, Tensor] = {}
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found[id(variable)] = variable
        left += [below for below, _ in node.next_functions]
    return list(found.values())
