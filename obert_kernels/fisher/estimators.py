"""Estimates of the Fisher by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plugins import Registry
from .base import Fisher
from .gram import gram_bytes
from .living import block_fisher, fisher_bytes

# Called with (remaining, block_size, group_size, dtype=, name=), as the class Fisher says.
Create = Callable[..., Fisher]
NumBytes = Callable[[Tensor, int, int, torch.dtype], int]


@dataclass(frozen=True)
class Estimator:
    """How a Fisher of one matrix is made, and how much memory it takes."""

    create: Create
    num_bytes: NumBytes


estimators: Registry[Estimator] = Registry("estimator")


def _as_large_as_a_gram(
    remaining: Tensor, block_size: int, group_size: int, dtype: torch.dtype
) -> int:
    return gram_bytes(remaining.numel(), block_size, dtype)


def register_fisher(
    name: str, *, num_bytes: NumBytes = _as_large_as_a_gram
) -> Callable[[Create], Create]:
    """Register a subclass of :class:`Fisher` by the name that ``estimator=`` takes.

    Args:
        name: of the estimator.
        num_bytes: called as ``num_bytes(remaining, block_size, group_size, dtype)`` before there is
            one; without it the memory of a Gram is assumed.
    """

    def register(create: Create) -> Create:
        estimators.add(name, Estimator(create, num_bytes))
        return create

    return register


register_fisher("gram", num_bytes=fisher_bytes)(block_fisher)
