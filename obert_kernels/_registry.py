"""Registration of the operators with torch, and the status they report failures in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _lib, reference

_NAMESPACE = "obert_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")


class NumericalError(ArithmeticError):
    """A Fisher block is not positive definite in the arithmetic used, or a result not finite.

    Attributes:
        block: index of the first such block, None where it is not about blocks.
    """

    def __init__(self, message: str, block: int | None = None) -> None:
        super().__init__(message)
        self.block = block


def new_status(device: torch.device | str | None = None) -> Tensor:
    """Return a status tensor that says all is well; by default on torch's default device."""
    return torch.full((1,), -1, dtype=torch.int64, device=device)


def raise_for_status(status: Tensor, what: str, remedy: str) -> None:
    """Raise :class:`NumericalError` if an operator recorded a failed block.

    Waits for the device of ``status``.
    """
    block = int(status.item())
    if block >= 0:
        raise NumericalError(f"{what}: block {block} is not positive definite; {remedy}", block)


def _has_cuda_kernels() -> bool:
    return _lib.failure() is None and hasattr(_lib.core(), "cuda")


def operator(
    schema: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    oracle: Callable[..., Any] | None = None,
) -> Callable:
    """Register the decorated native implementation, its oracle, checks and shapes.

    Args:
        schema: of torch, without the name.
        check: raises for bad arguments.
        fake: shapes of the result.
        oracle: in torch; by default of the same name in :mod:`obert_kernels.reference`.
    """
    given = oracle

    def register(native: Callable) -> Callable:
        name = native.__name__.removeprefix("_")
        oracle = given or getattr(reference, name)

        def run_native(*args: Any) -> Any:
            check(*args)
            return native(*args)

        def run_on_device(*args: Any) -> Any:
            check(*args)
            with torch.cuda.device(args[0].device):
                return native(*args)

        def run_oracle(*args: Any) -> Any:
            check(*args)
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
