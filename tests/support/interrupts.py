"""An exception at a chosen line of the package, and what a model looks like afterwards."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import obert_kernels

ROOT = str(Path(obert_kernels.__file__).parent) + os.sep

Line = tuple[str, int]  # file and number


@contextmanager
def tracing(on_line: Callable[[Line], None]) -> Iterator[None]:
    """Call a function before every line of the package that this thread runs."""

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            on_line((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return local if frame.f_code.co_filename.startswith(ROOT) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], object]) -> Counter[Line]:
    """How often each line of the package runs in a call, whether it succeeds or not."""
    counts: Counter[Line] = Counter()

    def count(line: Line) -> None:
        counts[line] += 1

    with tracing(count), suppress(Exception, KeyboardInterrupt):
        call()
    return counts


def interrupt(call: Callable[[], object], line: Line, hit: int, error: BaseException) -> bool:
    """Raise an error before the ``hit``-th time that a line runs; say whether it came out."""
    left = hit

    def stop(here: Line) -> None:
        nonlocal left
        if here == line:
            left -= 1
            if left == 0:
                raise error

    with tracing(stop):
        try:
            call()
        except BaseException as caught:
            if caught is not error and not isinstance(caught, type(error)):
                raise
            return True
    return False


def state_of(model: nn.Module) -> dict[str, Any]:
    """All of a model that a call could leave changed; tensors are copied."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name} mode"] = module.training
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                     "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
                     "_forward_pre_hooks_with_kwargs"):  # fmt: skip
            state[f"{name} {kind}"] = dict(getattr(module, kind))
    for name, parameter in model.named_parameters():
        state[f"{name} value"] = parameter.detach().clone()
        state[f"{name} place"] = parameter.data_ptr()
        state[f"{name} requires_grad"] = parameter.requires_grad
        state[f"{name} grad"] = parameter.grad
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            state[f"{name} {kind}"] = dict(getattr(parameter, kind, None) or {})
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what has changed."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a is b or torch.equal(a, b)
        return bool(a == b)

    assert before.keys() == after.keys()
    return [name for name in before if not same(before[name], after[name])]
