"""The status operators report failures in, and the error it becomes."""

from __future__ import annotations

import torch
from torch import Tensor


class NumericalError(ArithmeticError):
    """A Fisher block is not positive definite in the arithmetic used, or a result not finite.

    Attributes:
        block: index of the first such block, None where it is not about blocks.
        matrix: name of what the block is of.
        remedy: what can be done about it.
    """

    def __init__(
        self, message: str, block: int | None = None, matrix: str = "", remedy: str = ""
    ) -> None:
        super().__init__(message)
        self.block = block
        self.matrix = matrix
        self.remedy = remedy

    @classmethod
    def of_block(cls, matrix: str, block: int, remedy: str) -> NumericalError:
        """Return the error of a block of a matrix."""
        message = f"{matrix}: block {block} is not positive definite; {remedy}"
        return cls(message, block, matrix, remedy)


class NotFiniteError(ValueError):
    """A model gave a loss, logits or gradients with NaN or infinity, before anything was pruned.

    In bfloat16, float16 or under autocast, float32 may do.
    """


def new_status(device: torch.device | str | None = None) -> Tensor:
    """Return a status tensor that says all is well; by default on torch's default device."""
    return torch.full((1,), -1, dtype=torch.int64, device=device)


def record_failure(status: Tensor, bad: Tensor, first_block: int = 0) -> None:
    """Store the first failed block, ``bad`` says which, without waiting for the device."""
    if not bad.numel():
        return
    failed = torch.where(bad.any(), bad.to(torch.uint8).argmax() + first_block, -1)
    is_first = (failed >= 0) & ((status < 0) | (failed < status))
    status.copy_(torch.where(is_first, failed, status))


def raise_for_status(status: Tensor, what: str, remedy: str) -> None:
    """Raise :class:`NumericalError` if an operator recorded a failed block.

    Waits for the device of ``status``.
    """
    block = int(status.item())
    if block >= 0:
        raise NumericalError.of_block(what, block, remedy)
