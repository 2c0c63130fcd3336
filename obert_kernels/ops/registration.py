"""Registration of the operators with torch, and the status they report failures in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import fallback, native, reference

_NAMESPACE = "obert_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")


def _has_cuda_kernels() -> bool:
    return native.failure() is None and hasattr(native.core(), "cuda")


def operator(
    schema: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
) -> Callable:
    """Register the decorated native implementation, its oracle of the same name, checks and shapes.

    Args:
        schema: of torch, without the name.
        check: raises for bad arguments.
        fake: shapes of the result.
    """

    def register(native: Callable) -> Callable:
        name = native.__name__.removeprefix("_")
        oracle = getattr(reference, name)

        def run_native(*args: Any) -> Any:
            check(*args)
            return fallback.run(native, oracle, args)

        def run_on_device(*args: Any) -> Any:
            check(*args)
            with torch.cuda.device(args[0].device):
                return fallback.run(native, oracle, args)

        def run_oracle(*args: Any) -> Any:
            check(*args)
            fallback.warn_if_slower(args[0].device)
            return oracle(*args)

        _library.define(f"{name}{schema}")
        _library.impl(name, run_oracle, "CompositeExplicitAutograd")
        _library.impl(name, run_native, "CPU")
        if _has_cuda_kernels():
            _library.impl(name, run_on_device, "CUDA")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
        registered = getattr(getattr(torch.ops, _NAMESPACE), name).default
        registered.__doc__ = oracle.__doc__
        return registered

    return register
