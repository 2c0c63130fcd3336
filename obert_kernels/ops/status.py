"""The status operators report failures in, and the error it becomes."""

from __future__ import annotations

import torch
from torch import Tensor


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
