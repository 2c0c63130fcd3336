"""All or nothing: a call that fails, or is interrupted, leaves the model as it was.

Everything that changes a model for a while puts it back in a block of its own.  An interruption may
come in the middle of that, or between the last change and the end of the call.  So the outermost
call notes what the model was like before it did anything, and puts all of that back.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Hooks that the package registers itself, for a while; of a parameter, and of a module.
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_MODULES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class Rollback:
    """What a model is like now: modes, hooks, gradients, and where its weights are.

    Weights that are about to be overwritten are given to :meth:`keep` first.

    Args:
        model: any module.
        weights: the parameters that may be changed.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        modules, parameters = list(model.modules()), list(model.parameters())
        self._modes = [(module, module.training) for module in modules]
        self._hooks = [_hooks(module, _OF_MODULES) for module in modules]
        self._hooks += [_hooks(parameter, _OF_PARAMETERS) for parameter in parameters]
        self._flags = [(p, p.requires_grad, p.grad) for p in parameters]
        self._data = {name: (weight, weight.data) for name, weight in weights.items()}
        self._values: dict[str, Tensor] = {}

    def keep(self, name: str, value: Tensor) -> None:
        """Note what a weight holds, unless it was noted before; the tensor is not copied."""
        self._values.setdefault(name, value)

    def undo(self) -> None:
        """Put everything back; an interruption in the middle of it starts it again."""
        with _interrupts_wait():
            try:
                self._put_back()
            except BaseException:
                self._put_back()
                raise

    def _put_back(self) -> None:
        torch.clear_autocast_cache()  # which may hold copies of weights that were tried
        for name, (weight, data) in self._data.items():
            weight.data = data
            if name in self._values:
                data.copy_(self._values[name])
        for module, training in self._modes:
            module.training = training
        for owner, known in self._hooks:
            for name, (hooks, content) in known.items():
                _put_hooks_back(owner, name, hooks, content)
        for parameter, requires_grad, grad in self._flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad


def _hooks(owner: Any, names: tuple[str, ...]) -> tuple[Any, dict[str, tuple[Any, dict]]]:
    """Dictionaries of hooks, each with a copy of what is in it."""
    found = {name: getattr(owner, name, None) for name in names}
    return owner, {name: (hooks, dict(hooks or {})) for name, hooks in found.items()}


def _put_hooks_back(owner: Any, name: str, hooks: Any, content: dict) -> None:
    now = getattr(owner, name, None)
    if hooks is None and now:  # autograd would still call what is in it
        now.clear()
    if hooks is None:
        return
    if now is not hooks:
        setattr(owner, name, hooks)
    if dict(hooks) != content:
        hooks.clear()
        hooks.update(content)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C inside the block counts when it is over (other threads never see one)."""
    missed: list[tuple[Any, ...]] = []
    handler = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, lambda *now: missed.append(now))
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if missed and callable(handler):
            handler(*missed[0])
