"""All or nothing: a call that fails, or is interrupted, leaves the model as it was.

Everything that changes a model for a while puts it back in a block of its own.  An interruption may
come in the middle of that, or between the last change and the end of the call.  So the outermost
call notes what the model was like before it did anything, and puts all of that back.  It does so
twice, in two blocks: whatever interrupts the first time, the second does it all.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..fisher.free_memory import out_of_memory

T = TypeVar("T")

# Hooks that the package registers itself, for a while; of a parameter, and of a module.
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_FLAGS = ("training", "require_backward_grad_sync")  # the second of DistributedDataParallel
_OF_MODULES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class Rollback:
    """What a model is like now: modes, hooks, gradients, and where its weights are.

    Weights that are about to be overwritten are given to :meth:`keep` first.

    Args:
        model: any module, with its wrappers.
        weights: the tensors that may be changed.
        also: objects whose attributes go back as well.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], also: Iterable[object] = ()
    ) -> None:
        self._on_interrupt = signal.getsignal(signal.SIGINT)
        self._attributes = [(owner, dict(vars(owner))) for owner in also]
        self._has_fast_path = torch.backends.mha.get_fastpath_enabled()
        modules, parameters = list(model.modules()), list(model.parameters())
        self._modes = [
            (module, {name: vars(module)[name] for name in _FLAGS if name in vars(module)})
            for module in modules
        ]
        self._hooks = [_hooks(module, _OF_MODULES) for module in modules]
        self._hooks += [_hooks(parameter, _OF_PARAMETERS) for parameter in parameters]
        self._flags = [(p, p.requires_grad, p.grad) for p in parameters]
        self._data = {name: (weight, weight.data) for name, weight in weights.items()}
        self._values: dict[str, Tensor] = {}

    @property
    def values(self) -> Mapping[str, Tensor]:
        """What weights that have been changed, or may be, held before."""
        return self._values

    def keep(self, name: str, value: Tensor) -> None:
        """Note what a weight holds, unless it was noted before; the tensor is not copied."""
        self._values.setdefault(name, value)

    def keep_all(self) -> Rollback:
        """Note what every weight holds now, in a copy."""
        for name, (weight, _) in self._data.items():
            if name not in self._values:
                self.keep(name, weight.detach().clone())
        return self

    def undo(self) -> None:
        """Put everything back; Ctrl-C has to wait meanwhile."""
        with _interrupts_wait(self._on_interrupt):
            self._put_back()

    def undo_again(self) -> None:
        """The same, after something else may have interrupted it."""
        if _is_main_thread() and signal.getsignal(signal.SIGINT) != self._on_interrupt:
            signal.signal(signal.SIGINT, self._on_interrupt)
        self._put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        for owner, attributes in self._attributes:
            vars(owner).update(attributes)
        torch.backends.mha.set_fastpath_enabled(self._has_fast_path)
        torch.clear_autocast_cache()  # which may hold copies of weights that were tried
        for name, (weight, data) in self._data.items():
            weight.data = data
            if name in self._values:
                data.copy_(self._values[name])
        for module, flags in self._modes:
            vars(module).update(flags)
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


def _is_main_thread() -> bool:
    """The only one that an interrupt comes to."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _interrupts_wait(handler: Any) -> Iterator[None]:
    """Ctrl-C inside the block counts when it is over, and goes to its handler."""
    if handler is None or not _is_main_thread():
        yield
        return
    missed: list[tuple[Any, ...]] = []
    try:
        signal.signal(signal.SIGINT, lambda *now: missed.append(now))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if missed and callable(handler):
        handler(*missed[0])


def all_or_nothing(rollback: Rollback, call: Callable[[], T]) -> T:
    """Return what a call gives; whatever it raises, put everything back first.

    Raises:
        MemoryError: also in place of torch's own error.
    """
    try:
        try:
            return call()
        except BaseException:
            rollback.undo()
            raise
    except BaseException as error:
        rollback.undo_again()
        if (told := out_of_memory(error)) is not None:
            raise told from error
        raise


def put_back_after(rollback: Rollback, call: Callable[[], T]) -> T:
    """Return what a call gives, with everything put back, whether it succeeds or not."""
    try:
        try:
            return call()
        finally:
            rollback.undo()
    except BaseException:
        rollback.undo_again()
        raise
